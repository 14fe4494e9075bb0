"""`rsrlm report` and `rsrlm compare`: runs as a page to look at, and as Markdown to hand on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsrlm import config as configs
from rsrlm.commands import duel
from rsrlm.records import Prompt
from rsrlm.report.alarms import DEFAULT_LIMITS, Limit, limits_of
from rsrlm.report.heartbeat import Heartbeat, json_of
from rsrlm.report.page import contents, render, samples
from rsrlm.report.page.past import Past, read
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.atomic import write_whole
from rsrlm.store.folder import RunFolder
from rsrlm.store.tables import rows

FILES = ("report.html", "report.md")


def write(folders: Sequence[Path], out: Path, say: render.Progress = lambda _: None) -> None:
    """report.html and report.md of these runs, in the folder `out`. Several runs stand beside each other first.

    Raises ConfigError where a folder holds no run, or `out` cannot be written.
    """
    pasts = [past_of(folder) for folder in folders]
    budget = samples.MOST_BYTES // len(pasts)
    runs = [_with_samples(past, budget, say) for past in pasts]
    comparison = render.compared(pasts) if len(pasts) > 1 else None
    title = f"{pasts[0].name}: report" if len(pasts) == 1 else f"Report of {len(pasts)} runs"
    keep(out, FILES, title, runs, comparison)


def compare(folders: Sequence[Path], out: Path, found_duels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """compare.html and compare.md of these runs, in the folder `out`; returns what they say. Raises as `write`."""
    pasts = [past_of(folder) for folder in folders]
    found = {**render.compared(pasts), "duel": found_duels}
    keep(out, ("compare.html", "compare.md"), " and ".join(found["names"]), [], found)
    return found


def duels(folders: Sequence[Path], out: Path, judge: str | None, report: Report) -> dict[str, Any]:
    """The last model of the first run against that of each other, on the held-out prompts that they share.

    Raises ConfigError where they share none, or a run kept no model.
    """
    first, config = RunFolder.open(folders[0])
    table = []
    for number, folder in enumerate(folders[1:]):
        other = RunFolder.open(folder)[0]
        prompts = shared_prompts(first.folder, other.folder)
        ours, theirs = (str(last_model(one.folder)) for one in (first, other))
        found = duel.eval_duel(config, ours, theirs, judge, prompts, out / f"duel-{number}", report)
        figures = [contents.with_interval(found[name], percent=True) for name in ("win", "tie", "loss")]
        table.append([f"{folders[0].name} over {folder.name}", *figures, str(found["win"]["n"]), found["judge"]])
    columns = ["last models", "win", "tie", "loss", "prompts", "judge"]
    return {"title": "Head to head on the held-out prompts that they share", "columns": columns, "rows": table}


def shared_prompts(first: Path, other: Path) -> list[Prompt]:
    """Held-out prompts of both runs, by id and text. Raises ConfigError for none."""
    of_first, of_other = (
        {row["id"]: row["text"] for path in sorted(folder.glob("heldout/*/prompts.parquet"))[:1] for row in rows(path)}
        for folder in (first, other)
    )
    found = [Prompt(id=name, text=text) for name, text in of_first.items() if of_other.get(name) == text]
    if not found:
        raise ConfigError(f"--duel: {first} and {other} share no held-out prompts; use `rsrlm eval duel` with a file")
    return found


def last_model(folder: Path) -> Path:
    """The folder of the newest model of a run. Raises ConfigError where there is none."""
    trained = [row["weight_version"] for row in RunFolder(folder).metrics() if row.get("weight_version")]
    path = folder / "models" / str(trained[-1]) if trained else folder / "models"
    if not trained or not path.is_dir():
        raise ConfigError(f"--duel: {folder} has no model of its own yet; let an iteration finish first")
    return path


def past_of(folder: Path) -> Past:
    """A run as its folder tells it, with its status now."""
    beat = Heartbeat(folder)
    beat.look()
    status = beat.status(str(json_of(folder / "summary.json").get("status", "")))
    return read(folder, "not heard of for a while" if status == "silent" else status)


def _with_samples(past: Past, budget: int, say: render.Progress) -> dict[str, Any]:
    found = render.sections(past, limits(past), say)
    say("samples")
    return {**found, "browser": render.sampled(past, found["missing"], budget)}


def limits(past: Past) -> Mapping[str, Limit]:
    """Those of the run's config; the defaults where this version cannot read it."""
    try:
        return limits_of(configs.load(past.folder / "config.yaml"))
    except ConfigError:
        return DEFAULT_LIMITS


def keep(
    out: Path, names: Sequence[str], title: str, runs: Sequence[Mapping[str, Any]], found: Mapping[str, Any] | None
) -> None:
    """Write the page and the Markdown under these names."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in zip(
            names, (render.html(title, runs, found), render.markdown(title, runs, found)), strict=True
        ):
            write_whole(out / name, text.encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}; choose a folder that you can write") from None
