"""An engine actor without an engine, for tests of what the pool does about faults. Ray's workers import it."""

import asyncio
import os
import sys
from typing import Any

import ray

from rsrlm.records import Completion, Request


class SlowEngine:
    """Answers after two seconds, updates in one and a half."""

    def __init__(self, config: Any, folder: str, version: str, replica: int) -> None:
        self._version = version

    async def generate(self, requests: list[Request]) -> list[Completion]:
        if not requests[0].id.startswith("health"):
            await asyncio.sleep(2)
        return [self._completion(request) for request in requests]

    def _completion(self, request: Request) -> Completion:
        return Completion(
            request_id=request.id,
            token_ids=(1,),
            text="a",
            finish_reason="stop",
            weight_version=self._version,
        )

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]:
        await asyncio.sleep(1.5)
        self._version = version
        return {"total": 0.0}

    async def version(self) -> str:
        return self._version

    async def place(self) -> tuple[str, str, int]:
        print("an engine's last words", file=sys.stderr, flush=True)
        return ray.get_runtime_context().get_node_id(), "here", os.getpid()

    async def pid(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        pass
