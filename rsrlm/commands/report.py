"""`rsrlm report` and `rsrlm compare`: runs as a page to look at, and as Markdown to hand on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsrlm import config as configs
from rsrlm.report.alarms import DEFAULT_LIMITS, Limit, limits_of
from rsrlm.report.page import render, samples
from rsrlm.report.page.past import Past, read
from rsrlm.runtime.alive import how_it_ended
from rsrlm.settings.base import ConfigError
from rsrlm.store.atomic import write_whole
from rsrlm.store.folder import RunFolder

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


def compare(folders: Sequence[Path], out: Path, duel: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """compare.html and compare.md of these runs, in the folder `out`; returns what they say. Raises as `write`."""
    pasts = [past_of(folder) for folder in folders]
    found = {**render.compared(pasts), "duel": duel}
    keep(out, ("compare.html", "compare.md"), " and ".join(found["names"]), [], found)
    return found


def past_of(folder: Path) -> Past:
    """A run as its folder tells it, with its status now."""
    try:
        status = how_it_ended(RunFolder(folder)) if (folder / "config.yaml").is_file() else ""
    except (ConfigError, OSError, ValueError, KeyError):  # a read-only folder, a torn note: what the summary says
        status = ""
    return read(folder, status)


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
