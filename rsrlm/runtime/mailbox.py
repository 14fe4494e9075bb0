"""What passes between the driver and the learner's ranks. A module of its own, so that its actor imports little."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

from rsrlm.jobs import Said, Trained, TrainJob


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastJob:
    """Send the files of a version to the other ranks of a gloo group, which meet where the first rank listens (rank 0
    only). It fails where they take longer than `deadline_s`."""

    paths: tuple[str, ...]
    world_size: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where the sender waits for the other ranks of its group."""

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class ForgetJob:
    """Give up the training that is kept in memory."""


@dataclass(frozen=True, slots=True)
class Stop:
    """There are no more jobs."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that gives nothing back is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A job cannot be done, and a rebuilt group could not do it either."""

    message: str


LearnerJob = TrainJob | BroadcastJob | ForgetJob | Stop
Answer = Said | Listening | Finished | Failed


class Mailbox:
    """Jobs for the learner's ranks and events from rank 0. Ranks wait here, never inside a collective."""

    def __init__(self) -> None:
        self._jobs: list[LearnerJob] = []
        self._events: list[list[Answer]] = []
        self._finished: set[int] = set()
        self._changed = asyncio.Condition()

    async def post(self, job: LearnerJob) -> int:
        """Returns the number of the job."""
        async with self._changed:
            self._jobs.append(job)
            self._events.append([])
            self._changed.notify_all()
            return len(self._jobs) - 1

    async def next(self, done: int, wait_s: float = 10.0) -> tuple[int, LearnerJob | None]:
        """The first unfinished job after number `done`; (done, None) when there is none for `wait_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while (number := self._unfinished_after(done)) is None:
                    await self._changed.wait()
                return number, self._jobs[number]
        return done, None

    async def emit(self, number: int, event: Answer) -> None:
        async with self._changed:
            self._events[number].append(event)
            if isinstance(event, (Trained, Finished, Failed)):
                self._finished.add(number)
            self._changed.notify_all()

    def _unfinished_after(self, number: int) -> int | None:
        return next((one for one in range(number + 1, len(self._jobs)) if one not in self._finished), None)

    async def events(self, number: int, since: int, wait_s: float = 5.0) -> list[Any]:
        """Events of a job from index `since` on; waits up to `wait_s` seconds for the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while len(self._events[number]) <= since:
                    await self._changed.wait()
        return self._events[number][since:]
