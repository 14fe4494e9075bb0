"""One interface to trackers of experiments, and what they are given: rows of numbers in a fixed order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

STEP, ITERATION = "train/step", "iteration/number"  # of the last row of each kind that a tracker holds
COMPLETED, INTERRUPTED = "completed", "interrupted"  # of a run's statuses; all others say that it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is logged at once: the numbers of an optimizer step, or of a finished iteration.

    `at` counts the optimizer steps of all iterations, or the iterations, from 0 on; `position` counts both, in the
    order in which they come.
    """

    kind: Literal["train", "iteration"]
    at: int
    position: int
    numbers: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()  # see `rsrlm.report.trackers.samples`


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run that is tracked. `id` is drawn when it starts, and every resume goes on under it."""

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)


class Tracker(Protocol):
    """Raises whatever its library does: the run goes on, and `open` is called again after a while."""

    name: str
    where: str  # how a user looks at it, once it is open

    def open(self) -> int:
        """Reach what keeps the rows; the position after the last one that it holds. After a failure, begin anew."""
        ...

    def log(self, rows: Sequence[Row]) -> None:
        """Add rows that it does not hold, in their order."""
        ...

    def close(self, status: str) -> None:
        """Nothing more comes of a run that has ended with this status, until somebody resumes it."""
        ...


def numbers(metrics: Mapping[str, Any], group: str = "iteration") -> dict[str, float]:
    """Nested numbers by slash-separated names; loose ones are in `group`. Those of a duel have one name, whichever the
    model before is called."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            name = "duel" if key.startswith("duel_with_") else plain(key)
            found |= numbers(value, name if group == "iteration" else f"{group}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{group}/{plain(key)}"] = float(value)
    return found


def plain(name: str) -> str:
    """A name that every tracker takes: MLflow is the strictest, and a name of its may be a path."""
    parts = (re.sub(r"[^\w. :-]", "_", part, flags=re.ASCII).strip(" .") for part in name.split("/"))
    return "/".join(part for part in parts if part)[:200] or "_"


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a nested config by dotted names."""
    if isinstance(config, (Mapping, list)) and config:
        items = config.items() if isinstance(config, Mapping) else enumerate(config)
        return {key: leaf for inner, value in items for key, leaf in flat(value, f"{name}.{inner}").items()}
    return {name.removeprefix("."): config}
