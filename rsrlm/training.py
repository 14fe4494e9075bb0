"""The training of one model: from items to the next weights, or the result of an earlier attempt that got so far."""

import asyncio
import json
import math
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rsrlm.engines import Model
from rsrlm.jobs import Course, Event, ReferenceBatch, Replaying, Resumed, StepTrained, Trained, TrainJob
from rsrlm.recipes.base import Item
from rsrlm.run import Screen
from rsrlm.settings.train import DPO, TrainRule
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import write_items
from rsrlm.store.steps import StepLog

FINISHED, BEGUN = "training.json", "training_items.json"
GoesOn = Callable[[int], Awaitable[bool]]


class Learner(Protocol):
    async def train(self, job: TrainJob, log: StepLog, on_event: Callable[[Event], None]) -> Trained:
        """Do a job; its steps are in the log when it is done. Raises LearnerFailed."""
        ...

    async def forget(self) -> None:
        """Give up what is kept in memory for another job of the same training."""
        ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training the model `name` from `source` on the items, noted in `folder`. `seed` is the run's, and `workers` the
    number of the learner's ranks."""

    iteration: int
    source: Model
    name: str
    rule: TrainRule
    items: Sequence[Item]
    folder: Path
    seed: int
    workers: int
    course: Course | None = None

    @property
    def what(self) -> str:
        return "pairs" if isinstance(self.rule, DPO) else "examples"

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the checkpoints that keep the optimizer before and after a training on a course."""
        return (f"{self.course.after}-end", f"{self.name}-end") if self.course else ()

    @property
    def loss(self) -> str:
        """Key of the loss without additional terms, in the metrics of a step."""
        return "dpo_loss" if isinstance(self.rule, DPO) else "sft_loss"

    @property
    def totals(self) -> dict[str, int]:
        """What there is to do: micro-batches of a rank for the reference, and optimizer steps."""
        rounds = math.ceil(math.ceil(len(self.items) / self.workers) / self.rule.micro_batch)
        reference = {"reference": rounds} if isinstance(self.rule, DPO) else {}
        return {**reference, "steps": self.rule.steps(len(self.items))}

    @property
    def stops(self) -> list[int]:
        """Numbers of optimizer steps after which a candidate is exported, and of all."""
        last, every = self.rule.steps(len(self.items)), self.rule.candidate_every_steps
        return [*range(every, last, every), last] if every else [last]


async def train(
    learner: Learner, store: RunFolder, screen: Screen, training: Training, goes_on: GoesOn | None = None
) -> dict[str, Any]:
    """Train, or give the result of an earlier attempt that got so far: figures, and the learner's transfer files if
    they are fresh. `goes_on` is asked after each candidate where rule.early_stop."""
    iteration, name, folder = training.iteration, training.name, training.folder
    written = folder / "items"
    digest = await asyncio.to_thread(write_items, written, training.items)
    earlier = _read(folder / FINISHED) or _read(folder / BEGUN)
    if earlier.pop("items", digest) != digest:
        screen.line(f"iteration {iteration}: {name} was trained on other {training.what} and is trained again")
        _begin_anew(store, training)
    elif earlier:
        written.unlink()
        return earlier
    store.write_json(folder / BEGUN, {"items": digest})
    log = StepLog(folder / "steps.jsonl")
    screen.line(f"iteration {iteration}: training {name} on {len(training.items)} {training.what}")
    with screen.stage(f"iteration {iteration}", training.totals) as tick:
        progress = Progress(training, store, screen, tick)
        done, decide_seconds = [], 0.0
        for job in _jobs(store, training, written, digest):
            if job.until is None or not _is_done(store, log, name, job.until):
                done.append(await learner.train(job, log, progress))
            if job.until is not None and training.rule.early_stop and goes_on:
                asked = time.perf_counter()
                better = await goes_on(job.until)
                decide_seconds += time.perf_counter() - asked
                if not better:
                    await learner.forget()
                    break
    trained = {
        **summary_of(log.rows, training.loss),
        "steps_replayed": sum(one.replayed for one in done),
        "learner": {
            "train_seconds": round(sum(one.train_seconds for one in done), 3),
            "decide_seconds": round(decide_seconds, 3),
            "write_seconds": round(sum(one.write_seconds for one in done), 3),
            "export_seconds": round(sum(one.export_seconds for one in done), 3),
            "memory_gib": max(row["memory_gib"] for row in log.rows),
        },
    }
    store.write_json(folder / FINISHED, {"items": digest, **trained})
    # The next iteration starts from the exported model, and on a course with the optimizer too.
    store.drop_checkpoints(but=training.ends)
    written.unlink()  # its items are in the Parquet files
    (folder / BEGUN).unlink()
    return {**trained, "files": done[-1].files if done else None}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _begin_anew(store: RunFolder, training: Training) -> None:
    """Remove what an earlier attempt has left."""
    for name_of in (FINISHED, BEGUN, "steps.jsonl", "chosen.json"):  # a choice among other candidates as well
        (training.folder / name_of).unlink(missing_ok=True)
    for candidate in store.candidates(training.name)[:-1]:
        shutil.rmtree(store.model(candidate), ignore_errors=True)
    store.drop_checkpoints(but=training.ends)


def _jobs(store: RunFolder, training: Training, items: Path, digest: str) -> Iterator[TrainJob]:
    """The training in parts: to each candidate, and to the end."""
    for stop in training.stops:
        yield TrainJob(
            run=str(store.folder),
            iteration=training.iteration,
            seed=training.seed,
            model=str(training.source.folder),
            output=str(store.model(training.name)),
            name=training.name,
            train=training.rule,
            items=str(items),
            digest=digest,
            until=None if stop == training.stops[-1] else stop,
            course=training.course,
        )


def _is_done(store: RunFolder, log: StepLog, name: str, step: int) -> bool:
    """Whether an earlier attempt has left the candidate of this step, and the metrics of the steps before it."""
    known = {row["step"] for row in log.rows}
    return store.model(f"{name}@{step}").exists() and known.issuperset(range(step))


class Progress:
    """Shows and notes what is heard of the jobs of a training."""

    def __init__(self, training: Training, store: RunFolder, screen: Screen, tick: Callable[..., None]) -> None:
        self._training, self._store, self._screen, self._tick = training, store, screen, tick
        self._shown = {"reference": 0, "steps": 0}

    def __call__(self, event: Event) -> None:
        iteration = self._training.iteration
        if isinstance(event, ReferenceBatch):
            self._up_to("reference", event.done)
        elif isinstance(event, Resumed):
            if self._training.rule.packed and not event.packed:
                self._screen.line(
                    f"{self._training.name} is trained on padded rows: its layers take no mask that packs several "
                    "texts into one; train.packed=false leaves the attempt out"
                )
            self._up_to("reference", self._training.totals.get("reference", 0))
            self._up_to("steps", event.step)
        elif isinstance(event, StepTrained):
            row = event.row
            self._store.event("step", iteration=iteration, step=row["step"], loss=row["loss"], pairs=row["pair_ids"])
            self._up_to("steps", row["step"] + 1, int(row["tokens"]))
        elif isinstance(event, Replaying):
            self._screen.line(f"replaying {event.steps} optimizer steps after the last checkpoint")
            self._store.event("replay", iteration=iteration, steps=event.steps, after=event.after)

    def _up_to(self, what: str, done: int, tokens: int = 0) -> None:
        """Steps that are replayed were shown before."""
        more = done - self._shown[what]
        if more > 0:
            self._shown[what] = done
            self._tick(what, more, tokens)


def summary_of(rows: Sequence[dict[str, Any]], loss: str) -> dict[str, Any]:
    """What the optimizer steps of an iteration come to. `loss` names the key of the loss without additional terms."""
    first, last = rows[0], rows[-1]
    found = {
        f"{'pairs' if loss == 'dpo_loss' else 'examples'}_trained": len(
            {one for row in rows for one in row["pair_ids"]}
        ),
        "optimizer_steps": len(rows),
        f"{loss}_first": first[loss],
        f"{loss}_last": last[loss],
    }
    if loss == "dpo_loss":
        found |= {"accuracy_last": last["accuracy"], "margin_last": last["margin"]}
        for kind in ("actor", "judge"):
            of_kind = [row for row in rows if f"{kind}/margin" in row]
            if of_kind:
                found |= {f"{kind}_{name}_last": of_kind[-1][f"{kind}/{name}"] for name in ("accuracy", "margin")}
    return found
