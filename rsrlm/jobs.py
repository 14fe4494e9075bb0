"""What passes between a run and its learner: training jobs, and what is heard of them."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from rsrlm.settings.train import TrainRule
from rsrlm.store.steps import StepLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A training that goes on with the optimizer of the one before it, on items of its own.

    `after` is the name of the model that the one before trained, empty for the first. The learning rate is that of step
    `step` of `of` where it begins. `reference` is the folder of the model whose log-probabilities are the reference.
    With `publish` its weights are written for the engines.
    """

    after: str
    step: int
    of: int
    reference: str
    publish: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """The training of the model `name` from the one in the folder `model`, to `output`, by the iteration's own rules.

    `items` is the file of `rsrlm.store.items` that holds what is trained on, in training order, and `digest` that of
    what it holds. With `until`, the job goes to that optimizer step of the whole training: the model is exported as a
    candidate, `output`@`until`, and another job of this name takes the training up from there. With `course`, its
    optimizer is kept for the training that goes on from it.
    """

    run: str
    iteration: int
    seed: int
    model: str
    output: str
    name: str
    train: TrainRule
    items: str
    digest: str
    until: int | None = None
    course: Course | None = None

    def continues(self, other: "TrainJob") -> bool:
        """Whether both are parts of the same training."""
        return replace(self, until=None) == replace(other, until=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceBatch:
    """One micro-batch of each rank has its log-probabilities under the model before the first update."""

    done: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Training goes on after this number of optimizer steps, of `of` in all; `rows` are the metrics of those before."""

    step: int
    of: int
    packed: bool
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrained:
    """The metrics of an optimizer step, with its number `step` and the `pair_ids` of its items."""

    row: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaying:
    """The learner's group was built anew: this number of optimizer steps is done again, from step `after` on."""

    steps: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A job is done: the training has come to optimizer step `steps`, having done `replayed` of them again.

    `files` are the transfer files of the weights, and None of a candidate or of what is not published. Seconds include
    those of a group that is built anew from its last start on.
    """

    steps: int
    files: Any
    train_seconds: float
    write_seconds: float
    export_seconds: float
    replayed: int = 0


Event = ReferenceBatch | Resumed | StepTrained | Replaying
Said = ReferenceBatch | Resumed | StepTrained | Trained  # by the learner's first rank


async def follow(said: AsyncIterator[Said], log: StepLog, on_event: Callable[[Event], None]) -> Trained:
    """Hear a job to its end and keep the log: steps that a group has lost leave it, and come again."""
    replayed = 0
    async for event in said:
        if isinstance(event, Trained):
            return replace(event, replayed=replayed)
        if isinstance(event, StepTrained):
            log.add(event.row)
        lost = _take_up(event, log) if isinstance(event, Resumed) else None
        on_event(event)
        if lost:
            replayed += lost.steps
            on_event(lost)
    raise AssertionError("the learner said nothing of the end of its job")


def _take_up(event: Resumed, log: StepLog) -> Replaying | None:
    """Bring the log to where the training goes on; returns what is lost of it."""
    lost = sum(row["step"] >= event.step for row in log.rows)
    known = {row["step"] for row in log.rows}
    # A driver that was interrupted may not have heard of the last steps before the checkpoint.
    for row in (row for row in event.rows if row["step"] not in known):
        log.add(row)
    log.keep_before(event.step)
    return Replaying(steps=lost, after=event.step) if lost else None
