"""What trackers are given, read from the run folder: nothing in a run waits for them, and nothing that a kill leaves
out is lost."""

from collections.abc import Iterator
from typing import Any

from rsrlm.report.trackers.base import ITERATION, STEP, Row, numbers
from rsrlm.report.trackers.samples import samples_of
from rsrlm.store.folder import RunFolder
from rsrlm.store.followed import Followed


class Rows:
    """The rows of a run, from its first one on, as they come to be in its folder.

    A step that is done again after a kill is the row that it was. Rows before position `held` have no samples.
    """

    def __init__(self, store: RunFolder, held: int) -> None:
        self._store, self._held = store, held
        self._steps_before = 0  # optimizer steps of the iterations before
        self._begin(0)

    def _begin(self, iteration: int) -> None:
        self._iteration = iteration
        self._given = 0  # optimizer steps of this iteration
        self._known: dict[int, dict[str, Any]] = {}  # of it, steps to come
        self._file = Followed(self._store.iteration(iteration) / "steps.jsonl")

    def new(self) -> Iterator[Row]:
        """Those that have come since the last time."""
        while metrics := self._store.metrics_of(self._iteration):
            yield from self._steps(finished=True)
            self._steps_before += max(self._given, metrics.get("optimizer_steps", 0))
            yield self._finished(metrics)
            self._begin(self._iteration + 1)
        yield from self._steps()

    def _steps(self, finished: bool = False) -> Iterator[Row]:
        """In order; in an iteration that is finished, whatever a damaged file has lost between them."""
        self._known |= {row["step"]: row for row in self._file.lines() if row.get("step", -1) >= self._given}
        while self._given in self._known or (finished and self._known):
            step = min(self._known)
            self._given = step + 1
            yield self._step(step, self._known.pop(step))

    def _step(self, step: int, row: dict[str, Any]) -> Row:
        at = self._steps_before + step
        measured = {name: value for name, value in row.items() if name != "step"}
        return Row(
            kind="train",
            at=at,
            position=at + self._iteration,
            numbers={STEP: at, "train/iteration": self._iteration, **numbers(measured, "train")},
        )

    def _finished(self, metrics: dict[str, Any]) -> Row:
        iteration, position = self._iteration, self._steps_before + self._iteration
        first = {"heldout_first": self._store.note("start").get("heldout_first") or {}} if not iteration else {}
        told = {name: value for name, value in metrics.items() if name != "iteration"}
        wanted = position >= self._held
        return Row(
            kind="iteration",
            at=iteration,
            position=position,
            numbers={ITERATION: iteration, **numbers({**told, **first})},
            samples=samples_of(self._store.iteration(iteration), iteration) if wanted else (),
        )
