"""TensorBoard: event files, a folder for each run."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import yaml

from rsrlm.report.trackers.base import ITERATION, STEP, Row, Tracked
from rsrlm.settings.trackers import TensorBoard
from rsrlm.store.atomic import append, numbered

PREFIX = "events.out.tfevents"  # the reader goes by this part of a file's name, and by the order of names


class TensorBoardTracker:
    """Every start writes a file of its own, after what those before hold."""

    name = "tensorboard"

    def __init__(self, run: Tracked, own: TensorBoard) -> None:
        self._run = run
        self._folder = Path(own.folder).expanduser() / f"{run.name}-{run.id}" if own.folder else run.folder / self.name
        self.where = f"tensorboard --logdir {self._folder.parent if own.folder else run.folder.parent}"
        self._file: IO[bytes] | None = None
        self._last = 0  # iteration that is finished
        self._status = ""  # that is written, with nothing after it

    def open(self) -> int:
        self._end()
        held = {STEP: -1, ITERATION: -1, "config": -1}
        self._status = ""
        for event in self._events():
            values = {value.tag: value for value in event.summary.value}
            held |= {tag: event.step for tag in held if tag in values}
            self._status = values["status"].tensor.string_val[0].decode() if "status" in values else ""
        if held["config"] < 0:
            config = yaml.safe_dump(dict(self._run.config), sort_keys=False, allow_unicode=True)
            self._summary(0, [_text("config", f"```\n{config}\n```")])
        self._last = max(held[ITERATION], 0)
        return held[STEP] + held[ITERATION] + 2

    def _events(self) -> Iterator[Any]:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for path in sorted(self._folder.glob(f"{PREFIX}.*")):
            yield from LegacyEventFileLoader(str(path)).Load()

    def log(self, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._status = ""
        for row in rows:
            values = [Summary.Value(tag=tag, simple_value=number) for tag, number in row.numbers.items()]
            if row.samples:
                values.append(_text("samples", markdown(row.samples)))
            self._summary(row.at, values)
            if row.kind == "iteration":
                self._last = row.at

    def close(self, status: str) -> None:
        if status != self._status:
            self._summary(self._last, [_text("status", status)])
        self._end()

    def _end(self) -> None:
        if self._file:
            self._file.close()
        self._file = None

    def _summary(self, step: int, values: Sequence[Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step=step, summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        """All of a row in one record, at once: a kill leaves it whole or broken off, which readers pass over."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            path = numbered(self._folder, f"{PREFIX}.{int(time.time()):010d}")
            self._file = path.open("ab", buffering=0)
            self._write(file_version="brain.Event:2")
        record = BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        append(self._file.fileno(), os.fstat(self._file.fileno()).st_size, record.getvalue())


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    return Summary.Value(tag=tag, metadata=create_summary_metadata(tag, ""), tensor=make_tensor_proto(text))


def markdown(samples: Sequence[Mapping[str, Any]]) -> str:
    """Samples to be read, each text as a block of code: whatever a model wrote is shown as it is."""
    parts, prompt = [], None
    for one in samples:
        if one["prompt_id"] != prompt:
            prompt = one["prompt_id"]
            parts += [f"### `{prompt}`", _block(one["prompt"])]
        score = "no score" if one["score"] is None else f"score {one['score']:.2f}"
        parts += [
            f"`{one['response']}`, {score}" + (f", **{one['used']}**" if one["used"] else ""),
            _block(one["text"]),
        ]
    return "\n\n".join(parts)


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
