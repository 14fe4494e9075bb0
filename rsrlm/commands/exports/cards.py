"""Cards for the hub: a YAML header of huggingface_hub's, and below it what the run's folder knows."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rsrlm.commands.exports.source import RunSource
from rsrlm.report import tables
from rsrlm.report.progress import shown
from rsrlm.settings.base import RECIPES
from rsrlm.store.atomic import sift_lines


def write(out: Path, template: str, header: Any, **fields: Any) -> None:
    """`README.md` from a template of rsrlm/assets/cards; `header` is a card's data of huggingface_hub."""
    folder = resources.files("rsrlm") / "assets" / "cards"
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    body = environment.from_string((folder / template).read_text(encoding="utf-8")).render(
        about=about(fields["source"]), **fields
    )
    (out / "README.md").write_text(f"---\n{header.to_yaml()}\n---\n\n{body}", encoding="utf-8")


def dataset_header(source: RunSource, out: Path, files: Mapping[str, str], rows: int, what: str) -> Any:
    """Of the data set in `out` with a config for each entry of `files`, the largest of which has this number of rows.

    `datasets` keeps what it has loaded by the names of folder and files and by this header: without a digest of what is
    in them it would give one run's records for those of another.
    """
    from huggingface_hub import DatasetCardData

    configs = [
        {
            "config_name": name,
            "description": f"of run {source.config.name}, digest {_digest(sorted(out.glob(path)))}",
            "data_files": [{"split": "train", "path": path}],
        }
        for name, path in files.items()
    ]
    return DatasetCardData(
        pretty_name=f"{source.config.name}: {what}",
        task_categories=["text-generation"],
        size_categories=[size_of(rows)],
        tags=["synthetic", *tags(source)],
        configs=configs,
    )


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def size_of(rows: int) -> str:
    """The hub's category of a data set of this size."""
    limits = {1_000: "1K", 10_000: "10K", 100_000: "100K", 1_000_000: "1M", 10_000_000: "10M"}
    before = None
    for limit, name in limits.items():
        if rows < limit:
            return f"{before}<n<{name}" if before else f"n<{name}"
        before = name
    return "n>10M"


def recipes(source: RunSource) -> dict[str, str]:
    """What each recipe of the run does, in its own words."""
    config = source.config
    names = {(own.get("recipe") or config.recipe) for own in config.steps} or {config.recipe}
    said = {}
    for name in names:
        module = import_module(RECIPES.get(name, name).partition(":")[0])
        said[name.partition(":")[0]] = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    return said


def tags(source: RunSource) -> list[str]:
    """What the hub finds models and data of the run by."""
    pairs = any(step.recipe.trains == "pairs" for step in source.config.planned)
    return ["rsrlm", "self-rewarding", *(["dpo"] if pairs else []), *sorted(recipes(source))]


def about(source: RunSource) -> dict[str, Any]:
    """What all cards say of the run. Folders of this machine are named by their last part."""
    config = source.config
    last = config.planned[-1].config
    train = last.train
    plain = train.model_dump(exclude_defaults=True, exclude={"threads", "cpus", "workers", "silence_s", "deepspeed"})
    return {
        "name": config.name,
        "base": source.hub_id or Path(config.model.path).name,
        "recipes": recipes(source),
        "prompts": _last(config.prompts.path),
        "judge": judge(config),
        "validator": _last(config.evaluate.judge.external or "") or "the first model, M0",
        "sample": yaml.safe_dump(getattr(last, "sample", config.sample).model_dump(), sort_keys=False).strip(),
        "train": yaml.safe_dump(plain, sort_keys=False).strip(),
        "steps": bool(config.steps),
        "planned": config.iterations,
        "finished": len(source.metrics()),
        "seed": config.seed,
        "clock": config.clock.kind,
        "heldout": config.prompts.heldout,
    }


def judge(config: Any) -> str:
    """Who scored, and how."""
    section = config.judge
    how = getattr(section, "template", None) or getattr(section, "function", None)
    by = _last(section.model) if section.model else (section.endpoint.model if section.endpoint else "")
    who = by or ("a Python function" if section.kind == "function" else "the model itself, with its current weights")
    return f"{section.kind}" + (f" (`{_last(str(how))}`)" if how else "") + f", by {who}"


def _last(path: str) -> str:
    """A path without the folders of this machine; ids of the hub as they are."""
    return Path(path).name if path.startswith(("/", "~", ".")) or path.count("/") > 1 else path


def figures(source: RunSource) -> list[Sequence[str]]:
    """The table of the held-out prompts: headings, and a row for each model."""
    rows = source.metrics()
    if not any(row.get("heldout") for row in rows):
        return []
    columns = tables.heldout_columns(rows)
    body = [[_figure(row.get(key)) for key in columns] for row in tables.heldout_rows(source.store, rows)]
    return [list(columns.values()), *body]


def _figure(value: Any) -> str:
    return "-" if isinstance(value, float) and not math.isfinite(value) else shown(value)


def trouble(source: RunSource) -> list[str]:
    """Signs of trouble that the run has raised, in the order of the iterations."""
    path = source.store.folder / "events.jsonl"
    found: list[str] = []

    def take(line: bytes, _: int) -> None:
        if b'"alarm"' in line and (event := json.loads(line))["event"] == "alarm":
            text = f"iteration {event['iteration']}: `{event['sign']}` is {shown(event['value'])}"
            if text not in found:
                found.append(text)

    if path.is_file():
        sift_lines(path, take, mend=False)
    return found


def started(source: RunSource) -> datetime | None:
    """The date that the run's chat templates print; None where it was not noted."""
    date = source.store.note("start").get("drawn", {}).get("date")
    return datetime.fromisoformat(date) if date else None
