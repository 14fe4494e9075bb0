"""What passes between the driver and the learner's ranks. A module of its own, so that its actor imports little."""

import asyncio
import contextlib
from typing import Any


class Mailbox:
    """Jobs for the learner's ranks and events from rank 0. Ranks wait here, never inside a collective."""

    def __init__(self) -> None:
        self._jobs: list[Any] = []
        self._events: list[list[dict[str, Any]]] = []
        self._finished: set[int] = set()
        self._decisions: dict[tuple[int, int], bool] = {}
        self._changed = asyncio.Condition()

    async def post(self, job: Any) -> int:
        async with self._changed:
            self._jobs.append(job)
            self._events.append([])
            self._changed.notify_all()
            return len(self._jobs) - 1

    async def next(self, done: int, wait_s: float = 10.0) -> tuple[int, Any]:
        """The first unfinished job after number `done`; (done, None) when there is none for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while (number := self._behind(done)) is None:
                    await self._changed.wait()
                return number, self._jobs[number]
        return done, None

    async def emit(self, number: int, event: dict[str, Any]) -> None:
        async with self._changed:
            self._events[number].append(event)
            if event["event"] in ("done", "failed"):
                self._finished.add(number)
                self._jobs[number] = None  # its pairs are not needed any more
            self._changed.notify_all()

    async def decide(self, number: int, step: int, go_on: bool) -> None:
        """Whether training goes on behind the candidate of this step of a job."""
        async with self._changed:
            self._decisions[number, step] = go_on
            self._changed.notify_all()

    async def decision(self, number: int, step: int, wait_s: float = 1.0) -> bool | None:
        """What was decided; None when nothing is for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while (number, step) not in self._decisions:
                    await self._changed.wait()
        return self._decisions.get((number, step))

    def _behind(self, number: int) -> int | None:
        return next((one for one in range(number + 1, len(self._jobs)) if one not in self._finished), None)

    async def events(self, number: int, since: int, wait_s: float = 5.0) -> list[dict[str, Any]]:
        """Events of a job from index `since` on; waits a while for the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while len(self._events[number]) <= since:
                    await self._changed.wait()
        return self._events[number][since:]
