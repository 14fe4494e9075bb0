"""What a driver makes of what its learner says: the log of optimizer steps, and steps that are done again."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Screen

from rsrlm.jobs import ReferenceBatch, Replaying, Resumed, StepTrained, Trained, TrainJob, follow
from rsrlm.runtime.mailbox import Failed, Finished, Mailbox
from rsrlm.settings.train import Train
from rsrlm.store.steps import StepLog
from rsrlm.training import Progress

DONE = Trained(steps=3, files="f", train_seconds=1.0, write_seconds=2.0, export_seconds=3.0)
JOB = TrainJob(
    run="r", iteration=0, seed=0, model="m", output="o", name="M1", train=Train(lr=1e-3, pairs_per_step=1), items="i",
    digest="d", until=4,
)  # fmt: skip


def step(number: int, loss: float = 0.5) -> StepTrained:
    return StepTrained(row={"step": number, "loss": loss})


def resumed(number: int, rows: Sequence[StepTrained] = ()) -> Resumed:
    return Resumed(step=number, of=5, packed=True, rows=[one.row for one in rows])


def heard(events: Sequence[Any], log: StepLog) -> tuple[Trained, list[Any]]:
    told: list[Any] = []

    async def said() -> AsyncIterator[Any]:
        for event in events:
            yield event

    return asyncio.run(follow(said(), log, told.append)), told


def test_steps_go_into_the_log_as_they_come(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    events = [ReferenceBatch(done=1, of=1), resumed(0), step(0), step(1), step(2)]
    assert heard([*events, DONE], log) == (DONE, events)
    assert log.rows == StepLog(tmp_path / "steps.jsonl").rows == [step(n).row for n in range(3)]


def test_a_group_that_is_built_anew_replays_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    """The log was at step 3 and the checkpoint knows one step: two are lost, and come again with other figures."""
    log = StepLog(tmp_path / "steps.jsonl")
    first = [resumed(0), step(0), step(1), step(2)]
    again = [resumed(1, [step(0)]), step(1, 0.4), step(2, 0.3)]
    done, told = heard([*first, *again, DONE], log)
    assert done == replace(DONE, replayed=2)
    assert told == [*first, again[0], Replaying(steps=2, after=1), *again[1:]]
    assert [row["loss"] for row in StepLog(tmp_path / "steps.jsonl").rows] == [0.5, 0.4, 0.3]


def test_a_driver_that_was_interrupted_learns_what_it_missed(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    log.add(step(0, 0.9).row)
    done, told = heard([resumed(3, [step(0), step(1), step(2)]), DONE], log)
    assert (done.replayed, len(told)) == (0, 1)
    assert [(row["step"], row["loss"]) for row in log.rows] == [(0, 0.9), (1, 0.5), (2, 0.5)]


def test_parts_of_one_training() -> None:
    assert JOB.continues(replace(JOB, until=None))
    assert JOB.continues(replace(JOB, until=2))
    others: list[dict[str, Any]] = [
        {"name": "M2"}, {"digest": "e"}, {"run": "s"}, {"train": Train(lr=1e-4, pairs_per_step=1)}, {"model": "n"},
    ]  # fmt: skip
    assert not [change for change in others if JOB.continues(replace(JOB, **change))]


@pytest.mark.parametrize("end", [DONE, Finished(), Failed(message="m")])
def test_a_job_is_handed_out_until_it_is_finished(end: Any) -> None:
    """A rank that was rebuilt asks from the beginning; one that has done a job asks for the next."""

    async def story() -> None:
        box = Mailbox()
        assert await box.next(-1, wait_s=0) == (-1, None)
        waiting = asyncio.ensure_future(box.next(-1, wait_s=5))
        await asyncio.sleep(0)
        first = await box.post(JOB)
        assert await waiting == (first, JOB)
        assert await box.next(first, wait_s=0) == (first, None)
        assert await box.events(first, 0, wait_s=0) == []
        await box.emit(first, step(0))
        assert await box.next(-1) == (first, JOB)
        await box.emit(first, end)
        assert await box.events(first, 0) == [step(0), end]
        assert await box.events(first, 1) == [end]
        assert await box.next(-1, wait_s=0) == (-1, None)
        second = await box.post(JOB)
        assert await box.next(-1) == (second, JOB)

    asyncio.run(story())


@pytest.mark.parametrize(("wanted", "packed", "said"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_model_that_takes_no_packed_rows_says_so(wanted: bool, packed: bool, said: int) -> None:
    training: Any = SimpleNamespace(iteration=0, name="M1", rule=SimpleNamespace(packed=wanted), totals={})
    screen = Screen()
    progress = Progress(training, SimpleNamespace(), screen, lambda *_: None)  # type: ignore[arg-type]
    progress(Resumed(step=0, of=5, packed=packed, rows=[]))
    assert len(screen.lines) == said
    assert all(line.startswith("M1 is trained on padded rows: ") for line in screen.lines)
