"""The Ray actor that holds one engine."""

import os
import socket
import time
from typing import Any

import ray

from rsrlm.config import Config
from rsrlm.records import Request
from rsrlm.runtime.async_engine import AsyncEngine
from rsrlm.runtime.engine import Outcome, ServingEngine
from rsrlm.runtime.inprocess_engine import InProcessEngine


def make_engine(config: Config, folder: str, version: str, replica: int) -> ServingEngine:
    kinds: dict[str, type[InProcessEngine] | type[AsyncEngine]] = {"inprocess": InProcessEngine, "async": AsyncEngine}
    return kinds[config.engine.kind](config, folder, version, replica)


class EngineActor:
    """One replica. An async actor with one event loop and no concurrency groups: AsyncLLM binds to that loop."""

    async def __init__(self, config: Config, folder: str, version: str, replica: int) -> None:  # type: ignore[misc]
        self._engine = make_engine(config, folder, version, replica)
        self._calls = 0  # that wait for answers

    async def generate(self, requests: list[Request]) -> list[Outcome]:
        self._calls += 1
        try:
            return await self._engine.generate(requests)
        finally:
            self._calls -= 1

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]:
        """The seconds that the update took, by part."""
        started = time.perf_counter()
        seconds = await self._engine.update(update_info, version)
        return {**seconds, "total": time.perf_counter() - started}

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def version(self) -> str:
        return await self._engine.version()

    async def stats(self) -> dict[str, float]:
        return await self._engine.stats()

    async def progress(self) -> int:
        """Another number after every step of the engine, and while it has nothing to do."""
        return self._engine.progress() if self._calls else -time.monotonic_ns()

    async def place(self) -> tuple[str, str, int]:
        """The id of the Ray node that it runs on, the name of its host, and its process there."""
        return ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid()

    async def pid(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        self._engine.close()
