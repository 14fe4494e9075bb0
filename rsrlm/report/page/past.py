"""What a run folder holds, read for a report: whatever its state, with a note of everything that is not there."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import LAYOUT, RunFolder

# Of events.jsonl; groups and steps are told by the tables, and are nearly all of its lines.
TOLD = {
    "ray", "engine_up", "engine_lost", "engine_restarted", "engine_left", "engine_not_up", "producer_lost",
    "producer_silent", "published", "iteration_finished", "replay", "alarm", "run_ended",
}  # fmt: skip
SKIPPED = ('"event": "group"', '"event": "step"')


@dataclass(frozen=True, kw_only=True)
class Past:
    """A run as its folder tells it. `rows` are the metrics of the finished iterations, `steps` the learner's rows by
    iteration, `first` what was measured of the first model; `missing` says in sentences what could not be read."""

    folder: Path
    name: str
    config: dict[str, Any]
    status: str
    reason: str
    first: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    steps: Sequence[Sequence[dict[str, Any]]]
    events: Sequence[dict[str, Any]]
    missing: Sequence[str]

    @property
    def iterations(self) -> range:
        """Those of which anything is there, the unfinished one included."""
        return range(len(self.steps))

    @property
    def models(self) -> list[str]:
        """Those that were measured on held-out prompts, in order."""
        measured = [self.first, *(row.get("heldout") or {} for row in self.rows)]
        return [entry["model"] for entry in measured if entry.get("model")]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == "alarm"]


def read(folder: Path, status: str = "") -> Past:
    """Read a run's folder. `status` is better known to who can see whether it runs; else that of the summary is taken.

    Raises ConfigError where there is no run.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no run here (no config.yaml); give the folder of a run, such as runs/NAME")
    missing: list[str] = []
    text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        missing.append("config.yaml cannot be read")
        config = {}
    start, summary = (_json(folder / name, missing) for name in ("start.json", "summary.json"))
    if start and start.get("layout") != LAYOUT:
        missing.append("the run was made with another version of rsrlm: what that version called otherwise is not here")
    store = RunFolder(folder)
    found = [int(path.name) for path in folder.glob("iterations/*") if path.name.isdecimal() and path.is_dir()]
    last = max(found, default=-1) + 1
    steps = [[*_lines(store.iteration(number) / "steps.jsonl", missing)] for number in range(last)]
    rows = []
    for number in range(last):
        path = store.iteration(number) / "metrics.json"
        if row := _json(path, missing):
            rows.append({**row, "iteration": number})
        elif number + 1 < last:
            missing.append(f"iteration {number} has no metrics.json")
    if not found:
        missing.append("no iteration has begun")
    elif len(rows) < last:
        missing.append(f"iteration {last - 1} is not finished")
    events = (one for one in _lines(folder / "events.jsonl", missing, SKIPPED) if one.get("event") in TOLD)
    return Past(
        folder=folder,
        name=str(config.get("name") or folder.resolve().name),
        config=config,
        status=status or str(summary.get("status", "unknown")),
        reason=str(summary.get("reason") or ""),
        first=start.get("heldout_first") or {},
        rows=rows,
        steps=steps,
        events=[*events],
        missing=missing,
    )


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    """Empty where there is no such file, and where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict):
        return found
    missing.append(f"{path.parent.name}/{path.name} cannot be read")
    return {}


def _lines(path: Path, missing: list[str], skip: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, without lines that hold one of `skip`; torn ones are counted."""
    torn = 0
    if path.is_file():  # nor a device, which has no end
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if any(word in line for word in skip):
                    continue
                try:
                    found = json.loads(line)
                except ValueError:
                    found = None
                if isinstance(found, dict):
                    yield found
                else:
                    torn += 1
    if torn:
        missing.append(f"{torn} lines of {path.name} cannot be read")


def number_of(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
