"""Weights & Biases; offline without a key."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rsrlm.report.trackers.base import COMPLETED, ITERATION, STEP, Row, Tracked
from rsrlm.report.trackers.samples import COLUMNS
from rsrlm.settings.trackers import Wandb

INIT_S, FINISH_S = 30.0, 15.0
BLOCK, HEADER = 32768, struct.Struct("<IHB")  # of the log that a .wandb file is: checksum, length, part
BEGINS_WITH = 7  # bytes before its first record


class WandbTracker:
    """The number of a row is its position: the server takes none twice, and offline the files say which are there."""

    name = "wandb"

    def __init__(self, run: Tracked, own: Wandb) -> None:
        self._tracked, self._own = run, own
        self._run: Any = None
        self._groups: set[str] = set()
        self.where = ""

    def open(self) -> int:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.teardown()  # of an attempt that failed: it keeps the id
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        held = held_in(self._tracked.folder / "wandb", self._tracked.id) if mode == "offline" else 0
        self._run = wandb.init(
            project=self._own.project,
            entity=self._own.entity,
            name=self._tracked.name,
            id=self._tracked.id,
            resume="allow",
            dir=str(self._tracked.folder),
            config=dict(self._tracked.config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_S,
                finish_timeout=FINISH_S,
                # Neither the command line, which may hold a password, nor the code and packages of this machine.
                x_disable_meta=True,
                disable_git=True,
                x_save_requirements=False,
            ),
        )
        self._groups = set()
        self._axis("train", STEP)
        if mode == "online":
            self.where = self._run.url
        else:
            folders = self._tracked.folder / "wandb" / f"offline-run-*-{self._tracked.id}"
            self.where = f"offline; wandb sync {folders}" if mode == "offline" else mode
        return held if mode == "offline" else int(self._run.step)

    def _axis(self, group: str, axis: str) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/*", step_metric=axis)

    def log(self, rows: Sequence[Row]) -> None:
        import wandb

        for row in rows:
            found: dict[str, Any] = dict(row.numbers)
            for name in row.numbers:
                self._axis(name.partition("/")[0], ITERATION)
            if row.samples:
                table = [[sample[column] for column in COLUMNS] for sample in row.samples]
                found["samples"] = wandb.Table(columns=list(COLUMNS), data=table)
            self._run.log(found, step=row.position)

    def close(self, status: str) -> None:
        import wandb

        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == COMPLETED else 1)
        wandb.teardown()  # its process has written everything


def held_in(folder: Path, identifier: str) -> int:
    """The position after the last row in the offline files of this run: a kill loses what wandb had not written yet."""
    from wandb.proto.wandb_internal_pb2 import Record

    held = 0
    for path in folder.glob(f"offline-run-*-{identifier}/*.wandb"):
        for data in records_in(path):
            record = Record.FromString(data)
            if record.HasField("history"):
                held = max(held, record.history.step.num + 1)
    return held


def records_in(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, a log as LevelDB has it, up to one that a kill broke off."""
    left, part = b"", path.read_bytes()
    at = BEGINS_WITH
    while at + HEADER.size <= len(part):
        if BLOCK - at % BLOCK < HEADER.size:  # the rest of a block that holds no header is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(part, at)
        at += HEADER.size
        if kind not in (1, 2, 3, 4) or at + length > len(part):
            return
        left += part[at : at + length]
        at += length
        if kind in (1, 4):  # whole, or its last part
            yield left
            left = b""
