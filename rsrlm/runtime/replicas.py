"""Engine replicas as the driver sees them: brought up, watched, and replaced when they fail.

A replica that failed serves nothing until it holds the current weights.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from rsrlm.config import Config
from rsrlm.records import Request, Sampling
from rsrlm.runtime.engine import EngineDead, RequestFailed, cpu_environment
from rsrlm.runtime.engine_actor import EngineActor
from rsrlm.runtime.logs import keep_log
from rsrlm.runtime.routing import least_busy
from rsrlm.runtime.weights import WeightSet
from rsrlm.settings.base import first_line

# Ways in which a replica is gone and can be replaced; Ray's memory monitor has one of its own.
DEAD = (RayActorError, OutOfMemoryError, NodeDiedError)  # of any actor
GONE = (*DEAD, EngineDead)
MOST_RESTARTS = 5  # of a replica in an hour; of a producer in a run
HOUR_S = 3600.0
LEAVING_S = 0.2  # between two looks at what a replica that is to leave still has to do
RETRY_AFTER_S, LONGEST_RETRY_S = 1.0, 60.0  # between attempts to replace a replica
LOOK_EVERY_S = 15.0
SLEEP_S = 120.0  # to move the weights of an engine to the memory of its host, or back
SILENCE_S = 60.0  # without an answer, or a step, before a replica that has work is suspect


class PoolFailed(RuntimeError):
    """The engines cannot be kept alive, or one of them refuses its weights."""


class Replica:
    """One engine actor. `ready` is set while it may be given work; `generation` counts the actors before it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.actor: Any = None
        self.version = ""
        self.node, self.host, self.pid = "", "", 0  # where the actor is: the id of the Ray node, its host and process
        self.generation = 0
        self.served = False  # one of its actors was once ready
        self.outstanding = 0  # tokens that the requests in flight may still take
        self.last_answer = time.monotonic()
        self.ready = asyncio.Event()


def _vanished(error: BaseException | None) -> bool:
    """Whether an actor ended without an error of its own: with its host, or killed."""
    return isinstance(error, RayActorError) and not error.actor_init_failed


class Replicas:
    """Engine actors that are to hold the same weights, `weights`. Use them from one event loop.

    Once `failure` is set, none of them serves.
    """

    def __init__(self, config: Config, weights: WeightSet, name: str, number: int, note: Callable[..., None]) -> None:
        self.config = config
        self.weights = weights
        self.name = name
        self.all = [Replica(index) for index in range(number)]
        self.failure: PoolFailed | None = None
        self._note = note
        self._tasks: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Condition()
        self._restarts: list[float] = []  # when replicas were replaced, in the last hour
        self._health_checks = 0
        self._left: dict[int, int] = {}  # generation with which one of this index would begin, after one that left
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.all if replica.ready.is_set()]

    async def start(self) -> None:
        """As many replicas up as the run needs to begin, each having generated a token; the others come when they can.
        Raises PoolFailed after engine.start_timeout_s."""
        least = self.config.engine.least(len(self.all))
        await asyncio.gather(*(self._start(replica) for replica in self.all[:least]))
        for replica in self.all[least:]:
            self.spawn(self._persist(replica, self._start))
        self.spawn(self.watch())

    async def _start(self, replica: Replica) -> None:
        started = time.monotonic()
        await self._bring_up(replica)
        seconds = round(time.monotonic() - started, 1)
        self._note("engine_up", pool=self.name, replica=replica.index, seconds=seconds, host=replica.host)

    async def _restart(self, replica: Replica) -> None:
        await self._bring_up(replica)
        what = {"pool": self.name, "replica": replica.index, "version": replica.version, "host": replica.host}
        self._note("engine_restarted", **what)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background until the pool is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bring_up(self, replica: Replica) -> None:
        await self._awake.wait()  # while the others sleep, the learner has the GPUs
        if replica not in self.all:
            raise PoolFailed(f"replica {replica.index} of pool {self.name} has left")
        config, weights = self.config, self.weights
        actor_class = ray.remote(EngineActor).options(
            num_cpus=config.engine.cpus,
            num_gpus=config.gpus_of_engine,
            label_selector=config.ray.hosts.of(self.name),
            scheduling_strategy="SPREAD" if config.ray.spread else "DEFAULT",
            max_concurrency=100_000,
            max_restarts=0,  # the pool replaces it, so that it never serves stale weights
            enable_task_events=False,  # Ray's GCS would keep some kilobytes of each call
            runtime_env={"env_vars": cpu_environment(config.engine)},
        )
        replica.actor = actor_class.remote(config, weights.folder, weights.version, replica.index)
        replica.version = weights.version
        where = f"replica {replica.index} of pool {self.name}"
        try:
            await asyncio.wait_for(self._one_token(replica), config.engine.start_timeout_s)
        except TimeoutError:
            raise PoolFailed(
                f"{where} gave no token within engine.start_timeout_s={config.engine.start_timeout_s}; "
                "is there room for it (rsrlm plan)?"
            ) from None
        except RayTaskError as error:
            raise PoolFailed(f"{where} did not start: {error.cause!r}") from error
        except (RequestFailed, *GONE) as error:
            raise PoolFailed(f"{where} did not start: {error}") from error
        if weights is not self.weights:  # published while it came up: once more, from the new folder
            ray.kill(replica.actor)
            return await self._bring_up(replica)
        replica.outstanding = 0
        replica.last_answer = time.monotonic()
        replica.served = True
        replica.ready.set()
        await self.wake()

    async def _one_token(self, replica: Replica) -> None:
        self._health_checks += 1
        sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=0)
        request = Request(id=f"health-{self._health_checks}", prompt_token_ids=(1,), sampling=sampling, priority=-1)
        replica.node, replica.host, replica.pid = await replica.actor.place.remote()
        [outcome] = await replica.actor.generate.remote([request])
        if isinstance(outcome, Exception):
            raise outcome

    def resize(self, number: int) -> None:
        """Come to this number of replicas: more start as soon as there is room. Of too many those leave first that do
        not serve; the others end what they were asked."""
        free = (index for index in itertools.count() if index not in {replica.index for replica in self.all})
        while len(self.all) < number:
            replica = Replica(next(free))
            replica.generation = self._left.get(replica.index, 0)
            self.all.append(replica)
            self.spawn(self._persist(replica, self._start))
        by_use = sorted(self.all, key=lambda replica: (not replica.ready.is_set(), replica.index))
        for replica in by_use[number:]:
            self.all.remove(replica)
            self.spawn(self._leave(replica))

    async def _leave(self, replica: Replica) -> None:
        replica.ready.clear()
        self._left[replica.index] = replica.generation + 1  # what is said of its actor says nothing of the next one
        deadline = time.monotonic() + self.config.engine.start_timeout_s
        while replica.outstanding > 0 and time.monotonic() < deadline:
            await asyncio.sleep(LEAVING_S)
        replica.generation += 1  # what it still had goes to others
        with contextlib.suppress(Exception):
            ray.kill(replica.actor)
        self._note("engine_left", pool=self.name, replica=replica.index, host=replica.host)

    async def wake(self) -> None:
        """Those who wait for a replica look again."""
        async with self._freed:
            self._freed.notify_all()

    async def least_busy(self) -> Replica:
        """The ready replica with the least outstanding work, as soon as there is one. Raises PoolFailed."""
        async with self._freed:
            while True:
                if self.failure:
                    raise self.failure
                if found := least_busy(self.all):
                    return found
                await self._freed.wait()

    def lost(self, replica: Replica, generation: int, error: Exception) -> None:
        """Replace the replica, unless that actor of it has been replaced already."""
        if replica.generation != generation or self.failure or replica not in self.all:
            return
        replica.generation += 1
        replica.ready.clear()
        now = time.monotonic()
        self._restarts = [*(one for one in self._restarts if now - one < HOUR_S), now]
        self._note("engine_lost", pool=self.name, replica=replica.index, host=replica.host, error=first_line(error))
        log = self.config.folder / "logs" / f"{self.name}-{replica.index}-{replica.host}-{replica.pid}.err"
        self.spawn(self._keep_log(replica.index, replica.node, replica.pid, log))
        if len(self._restarts) > MOST_RESTARTS * len(self.all):
            self.fail(
                PoolFailed(f"pool {self.name}: engines died {len(self._restarts)} times in an hour; last: {error}")
            )
            return
        with contextlib.suppress(Exception):
            ray.kill(replica.actor)
        self.spawn(self._persist(replica, self._restart))

    async def _keep_log(self, index: int, node: str, pid: int, log: Path) -> None:
        if lines := await keep_log(node, pid, log):
            self._note("engine_log", pool=self.name, replica=index, log=str(log), lines=lines[-5:])

    def fail(self, error: PoolFailed) -> None:
        """Every request ends with this error, those in flight too: nobody watches their engines any more."""
        self.failure = error
        for replica in self.all:
            replica.ready.clear()
            with contextlib.suppress(Exception):
                ray.kill(replica.actor)
        self.spawn(self.wake())

    async def _persist(self, replica: Replica, start: Callable[[Replica], Awaitable[None]]) -> None:
        """As often as it takes while others serve, and for one that has never served: a host may be away for hours.
        Where none serves any more, for as long as a start may take: Ray may not have seen yet that a host is dead, and
        place a replica there."""
        wait_s, deadline = RETRY_AFTER_S, time.monotonic() + self.config.engine.start_timeout_s
        while replica in self.all:
            try:
                await start(replica)
                return
            except Exception as error:
                if replica not in self.all:
                    return
                if (
                    replica.served
                    and not self.ready
                    and not (_vanished(error.__cause__) and time.monotonic() < deadline)
                ):
                    self.fail(error if isinstance(error, PoolFailed) else PoolFailed(repr(error)))
                    return
                self._note("engine_not_up", pool=self.name, replica=replica.index, error=first_line(error))
            with contextlib.suppress(Exception):
                ray.kill(replica.actor)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    async def watch(self, every_s: float = LOOK_EVERY_S, silence_s: float = SILENCE_S) -> None:
        """Replace each replica that has work and makes no step between two looks, or does not answer at all.

        Nobody awaits this task: where it cannot go on, the pool fails.
        """
        try:
            while True:
                await asyncio.sleep(every_s)
                now = time.monotonic()
                silent = [one for one in self.ready if one.outstanding and now - one.last_answer > silence_s]
                await asyncio.gather(*(self._check(replica, silence_s) for replica in silent))
        except Exception as error:
            self.fail(PoolFailed(f"pool {self.name}: its engines cannot be watched any more: {error!r}"))

    async def _check(self, replica: Replica, patience_s: float) -> None:
        generation = replica.generation
        try:
            before = await asyncio.wait_for(replica.actor.progress.remote(), patience_s)
            await asyncio.sleep(patience_s)
            after = await asyncio.wait_for(replica.actor.progress.remote(), patience_s)
        except Exception as error:  # dead, silent, or unable to say what it does
            self.lost(replica, generation, error)
            return
        if after == before and replica.outstanding and replica.generation == generation:
            self.lost(replica, generation, EngineDead(f"no step in {patience_s} s with requests in flight"))

    async def ask(
        self, method: str, timeout_s: float = 30.0, replaced: tuple[type[Exception], ...] = (*GONE, TimeoutError)
    ) -> list[Any]:
        """Answers of the ready replicas to a method of EngineActor. One that is gone or silent, or fails in another way
        of `replaced`, is replaced, and its answer left out."""
        ready = self.ready
        generations = [replica.generation for replica in ready]
        answers = await asyncio.gather(
            *(asyncio.wait_for(getattr(replica.actor, method).remote(), timeout_s) for replica in ready),
            return_exceptions=True,
        )
        good = []
        for replica, generation, answer in zip(ready, generations, answers, strict=True):
            if isinstance(answer, replaced):
                self.lost(replica, generation, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                good.append(answer)
        return good

    async def sleep(self) -> None:
        """All replicas give up their GPUs until `awake`; those that are not up yet start anew then."""
        self._awake.clear()
        for replica in self.all:
            if not replica.ready.is_set() and replica.actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(replica.actor)
        await self.ask("sleep", SLEEP_S, (Exception,))

    async def awake(self) -> None:
        """Every replica that sleeps has its GPU again."""
        if not self._awake.is_set():
            await self.ask("wake", SLEEP_S, (Exception,))
            self._awake.set()

    async def close(self) -> None:
        self.failure = PoolFailed("the pool is closed")
        for task in list(self._tasks):
            task.cancel()
        actors = [replica.actor for replica in self.all if replica.actor is not None]
        with contextlib.suppress(Exception):
            closing = [actor.close.remote() for actor in actors]
            await asyncio.wait_for(asyncio.gather(*closing, return_exceptions=True), 10)
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
