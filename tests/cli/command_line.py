"""What the tests of the command line share beside their fixtures."""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripted import DIGITS, LETTERS

from rsrlm.records import Completion, Request
from rsrlm.settings.base import ConfigError

PROMPTS = [{"id": f"p{number}", "prompt": f"Say {number}."} for number in range(7)]


@dataclass(frozen=True)
class Ended:
    code: Any
    out: str
    err: str


class Started(BaseException):
    """Instead of a run: the arguments of `launch.execute`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__("a run was started")
        self.arguments = arguments


def write_prompts(path: Path, entries: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_weights(path: Path, rows: int) -> None:
    """Zeros, in a file as small as can be."""
    header = json.dumps({"embed": {"dtype": "BF16", "shape": [rows, 4], "data_offsets": [0, 8 * rows]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 * rows))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def started_with(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a run was started with: what was prepared, and its folder."""
    try:
        raise AssertionError(f"nothing was started: {call()}")
    except Started as started:
        return started.arguments[:2]


class Answering:
    """All engines that are started, and what they were asked. They answer by `text`, and fail after `most` answers as
    if the command had been killed there."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Request]] = []  # with the version that was held
        self.clusters = 0
        self.most: int | None = None
        self.text: Callable[[str, Request], str] = lambda version, _: f"Because {version}.\nScore: 3"

    def answer(self, version: str, request: Request) -> Completion:
        self.requests.append((version, request))
        if self.most is not None and len(self.requests) > self.most:
            raise ConfigError("killed")
        labels: dict[int, tuple[float, ...]] = {2: LETTERS["A"], 6: DIGITS}
        return Completion(
            request_id=request.id, token_ids=(5,), text=self.text(version, request), finish_reason="stop",
            weight_version=version, label_logprobs=labels.get(len(request.label_ids), ()),
        )  # fmt: skip

    def take(self) -> list[str]:
        """Ids of what was asked since the last time, in the order of their names."""
        ids = sorted(request.id for _, request in self.requests)
        self.requests.clear()
        return ids


class AnsweringPool:
    """A pool of such engines in the place of real ones."""

    slots = 8
    nodes: tuple[str, ...] = ()

    def __init__(self, engines: Answering, weights: Any) -> None:
        self.engines, self.held = engines, weights.version

    async def start(self) -> None: ...
    async def close(self) -> None: ...

    async def publish(self, weights: Any) -> list[dict[str, Any]]:
        self.held = weights.version
        return []

    async def versions(self) -> list[str]:
        return [self.held]

    async def stats(self) -> list[dict[str, float]]:
        return []

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        return [self.engines.answer(self.held, request) for request in requests]
