"""One training job: from items to the next model, or the result of an earlier attempt that got so far."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rsrlm.recipes.base import Item
from rsrlm.run import Screen
from rsrlm.settings.train import DPO, TrainRule
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import write_items
from rsrlm.store.steps import StepLog

GoesOn = Callable[[int], Awaitable[bool]]

DONE_SECONDS = ("train_seconds", "decide_seconds", "write_seconds", "export_seconds")


class Learner(Protocol):
    def train(
        self, iteration: int, source: str, version: str, train: TrainRule, items: Path
    ) -> AsyncIterator[dict[str, Any]]:
        """`items` is a file of `rsrlm.store.items`."""
        ...

    async def decide(self, step: int, go_on: bool) -> None:
        """Continue or stop the training that is paused at its candidate of this step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """Training the model `name` from `source` on the items, noted in `folder`."""

    iteration: int
    source: str
    name: str
    rule: TrainRule
    items: Sequence[Item]
    folder: Path

    @property
    def what(self) -> str:
        return "pairs" if isinstance(self.rule, DPO) else "examples"


async def train(
    learner: Learner, store: RunFolder, screen: Screen, job: Job, workers: int, goes_on: GoesOn | None = None
) -> dict[str, Any]:
    """Do a job, or give the result of an earlier attempt that got so far: figures, and the learner's transfer files if
    they are fresh. `goes_on` is asked at each candidate where job.rule.early_stop."""
    iteration, name, rule, items = job.iteration, job.name, job.rule, job.items
    finished, written = job.folder / "training.json", job.folder / "items"
    digest = await asyncio.to_thread(write_items, written, items)
    if finished.exists():
        trained: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        if trained.pop("items", None) == digest:
            written.unlink()
            return trained
        screen.line(f"iteration {iteration}: {name} was trained on other {job.what} and is trained again")
        for name_of in ("training.json", "steps.jsonl", "chosen.json"):  # a choice among other candidates as well
            (job.folder / name_of).unlink(missing_ok=True)
        store.drop_checkpoints()
    log = StepLog(job.folder / "steps.jsonl")
    files = None
    done: dict[str, Any] = {}
    replayed = 0
    pairs = isinstance(rule, DPO)
    screen.line(f"iteration {iteration}: training {name} on {len(items)} {job.what}")
    per_rank = -(-len(items) // workers)
    rounds = -(-per_rank // rule.micro_batch) if pairs else 0
    with screen.stage(
        f"iteration {iteration}", {**({"reference": rounds} if pairs else {}), "steps": rule.steps(len(items))}
    ) as tick:
        async for event in learner.train(iteration, job.source, name, rule, written):
            if event["event"] == "reference":
                tick("reference", 1, 0)
            elif event["event"] == "resumed":
                lost = [row for row in log.rows if row["step"] >= event["step"]]
                known = {row["step"] for row in log.rows}
                for row in (row for row in event["rows"] if row["step"] not in known):
                    log.add(row)
                if event["step"]:
                    if pairs:
                        tick("reference", rounds, 0)
                    tick("steps", event["step"], 0)
                if lost:
                    replayed += len(lost)
                    screen.line(f"replaying {len(lost)} optimizer steps after the last checkpoint")
                    store.event("replay", iteration=iteration, steps=len(lost), after=event["step"])
                log.keep_before(event["step"])
            elif event["event"] == "step":
                row = event["row"]
                log.add(row)
                store.event("step", iteration=iteration, step=row["step"], loss=row["loss"], pairs=row["pair_ids"])
                tick("steps", 1, int(row["tokens"]))
            elif event["event"] == "candidate" and rule.early_stop and goes_on:
                await learner.decide(event["step"], await goes_on(event["step"]))
            elif event["event"] == "done":
                files = event["files"]
                done = {key: round(event[key], 3) for key in DONE_SECONDS}
    trained = {
        **summary_of(log.rows, "dpo_loss" if pairs else "sft_loss"),
        "steps_replayed": replayed,
        "learner": {**done, "memory_gib": max(row["memory_gib"] for row in log.rows)},
    }
    store.write_json(finished, {"items": digest, **trained})
    store.drop_checkpoints()  # the next iteration starts from the exported model
    written.unlink()  # its items are in the Parquet files
    return {**trained, "files": files}


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
