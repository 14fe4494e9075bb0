"""The producers of a run as the driver sees them: started, lent replicas, sent tasks, replaced when they die."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayTaskError

from rsrlm.config import Config
from rsrlm.engines import Model
from rsrlm.records import Task
from rsrlm.runtime.producer import Loan, Lost, Made, Producer
from rsrlm.runtime.replicas import DEAD, LOOK_EVERY_S, MOST_RESTARTS, PoolFailed, Replica
from rsrlm.settings.base import first_line
from rsrlm.store.buffer import Receipt

SILENCE_S = 120.0  # it loads a tokenizer, and recipes, before it answers


class Lender(Protocol):
    """The pools whose replicas the producers ask."""

    async def loan(self, number: int, of: int) -> tuple[Loan, list[Replica]]:
        """The share of producer `number` of `of`, as soon as a replica of each pool is ready."""
        ...

    def lost(self, lost: Lost) -> None: ...


class Member:
    """One producer. `starts` counts its actors, `open` the tasks that it has."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.actor: Any = None
        self.starts = 0
        self.open = 0
        self.lent: Any = None  # what tells the loan that it has from others
        self.changing = asyncio.Lock()


class Producers:
    """Use it from one event loop."""

    def __init__(
        self, config: Config, drawn: Mapping[str, str], lender: Lender, note: Callable[..., None], number: int
    ) -> None:
        """`note` is called with a kind of event ("producer_lost") and its fields."""
        self._config, self._drawn, self._lender, self._note = config, drawn, lender, note
        self._members = [Member(index) for index in range(number)]
        self._watching: asyncio.Task[None] | None = None
        for member in self._members:
            self._start(member)

    @property
    def number(self) -> int:
        return len(self._members)

    def _start(self, member: Member) -> None:
        actor_class = ray.remote(Producer).options(
            num_cpus=0, max_concurrency=100_000, max_restarts=0, enable_task_events=False
        )
        if member.actor:  # one that Ray cannot reach may be alive
            ray.kill(member.actor)
        member.actor = actor_class.remote(self._config, dict(self._drawn))
        member.starts += 1
        member.lent = None

    async def make(
        self,
        model: Model,
        task: Task,
        hold: Callable[[Model], Awaitable[None]],
        count: Callable[[str, int, int], None],
    ) -> Receipt:
        """The receipt of a task's group, from the producer with the fewest open tasks. `hold` loads the model on the
        engines, and `count` is told of requests that are answered. Raises PoolFailed."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        member = min(self._members, key=lambda one: (one.open, one.number))
        member.open += 1
        try:
            while True:
                made = await self._once(member, model, task)
                if made is None:
                    continue
                for answered in made.counts:
                    count(*answered)
                for lost in made.losses:
                    self._lender.lost(lost)
                if made.not_held:
                    await hold(model)
                if made.receipt:
                    return made.receipt
        finally:
            member.open -= 1

    async def _once(self, member: Member, model: Model, task: Task) -> Made | None:
        """None where the producer died, and another is in its place."""
        starts = member.starts
        try:
            async with member.changing:
                replicas = await self._lend(member)
            with _given_work(replicas):
                made: Made = await member.actor.make.remote(model, task)
            return made
        except RayTaskError as error:
            raise error.cause from None  # without the actor's stack trace
        except DEAD as error:
            if member.starts == starts:
                self._note("producer_lost", producer=member.number, error=first_line(error))
                if starts > MOST_RESTARTS:
                    raise PoolFailed(f"producer {member.number} died {starts} times; last: {error}") from error
                self._start(member)
            return None

    async def _watch(self) -> None:
        """Kill a producer that has tasks and does not answer: what it was asked then fails, and it is replaced."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await asyncio.gather(*(self._look(member) for member in self._members if member.open))

    async def _look(self, member: Member) -> None:
        actor = member.actor
        try:
            await asyncio.wait_for(actor.alive.remote(), SILENCE_S)
        except TimeoutError:
            self._note("producer_silent", producer=member.number, seconds=SILENCE_S)
            ray.kill(actor)
        except Exception:
            return  # it died: who asked it hears of that

    async def _lend(self, member: Member) -> list[Replica]:
        loan, replicas = await self._lender.loan(member.number, len(self._members))
        lent = (
            loan.model,
            [(name, one.index, one.generation) for name, some in loan.replicas.items() for one in some],
        )
        if lent != member.lent:
            await member.actor.lend.remote(loan)
            member.lent = lent
        return replicas

    def close(self) -> None:
        if self._watching:
            self._watching.cancel()
        for member in self._members:
            with contextlib.suppress(Exception):
                ray.kill(member.actor)


@contextlib.contextmanager
def _given_work(replicas: list[Replica]) -> Iterator[None]:
    """Replicas that producers ask are watched as those that the driver asks itself: see `Replicas.watch`."""
    generations = [replica.generation for replica in replicas]
    for replica in replicas:
        replica.outstanding += 1
    try:
        yield
    finally:
        for replica, generation in zip(replicas, generations, strict=True):
            if replica.generation == generation:
                replica.outstanding -= 1
                replica.last_answer = time.monotonic()
