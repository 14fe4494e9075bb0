"""Ray actors around plain classes, and the driver's side of them: engine pool, learner.

They decide nothing about scores, pairs or losses. What they do decide is who serves what: requests go to the replica
with the least outstanding work, and a replica that failed serves nothing until it holds the current weights.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rsrlm.config import Config
from rsrlm.engines import gather
from rsrlm.records import Completion, Request, Sampling
from rsrlm.runtime.engine import EngineDead, RequestFailed, cpu_environment, make_engine
from rsrlm.runtime.learner import BroadcastJob, TrainJob, serve
from rsrlm.runtime.mailbox import Mailbox
from rsrlm.runtime.weights import WeightSet

MAX_ATTEMPTS = 3  # of one request: engines died under it, or gave an answer that is none
# Ways in which a replica is gone and can be replaced; Ray's memory monitor has one of its own.
GONE = (RayActorError, OutOfMemoryError, NodeDiedError, EngineDead)


class PoolFailed(RuntimeError):
    """The engines cannot be kept alive, or an update did not reach all of them."""


class EngineActor:
    """One replica. An async actor with one event loop and no concurrency groups: AsyncLLM binds to that loop."""

    async def __init__(self, config: Config, folder: str, version: str, replica: int) -> None:  # type: ignore[misc]
        self._engine = make_engine(config, folder, version, replica)

    async def generate(self, request: Request) -> Completion:
        return await self._engine.generate(request)

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion | BaseException]:
        """A completion or what went wrong, for each request: one that fails does not spoil the others."""
        asked = (self._engine.generate(request) for request in requests)
        return list(await asyncio.gather(*asked, return_exceptions=True))

    async def connect(self, init_info: dict[str, Any]) -> None:
        await self._engine.connect(init_info)

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]:
        started = time.perf_counter()
        seconds = await self._engine.update(update_info, version)
        return {**seconds, "total": time.perf_counter() - started}

    async def version(self) -> str:
        return await self._engine.version()

    async def stats(self) -> dict[str, float]:
        return await self._engine.stats()

    async def progress(self) -> int:
        """Grows with every step of the engine."""
        return self._engine.progress()

    async def pid(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        self._engine.close()


class Replica:
    """The driver's view of one engine actor. `ready` is set while it may be given work."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.actor: Any = None
        self.version = ""
        self.generation = 0
        self.outstanding = 0  # tokens that the requests in flight may still take
        self.last_answer = time.monotonic()
        self.ready = asyncio.Event()


def _work(request: Request) -> int:
    """Tokens a request may cost: decoding one is far dearer than reading one of a prompt."""
    return request.sampling.max_tokens * 8 + len(request.prompt_token_ids)


class EnginePool:
    """Replicas with the same weights. Use it from one event loop."""

    def __init__(self, config: Config, weights: WeightSet, name: str, replicas: int, note: Callable[..., None]) -> None:
        self._config = config
        self._weights = weights
        self._name = name
        self._note = note
        self._replicas = [Replica(index) for index in range(replicas)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._freed = asyncio.Condition()
        self._restarts = 0
        self._attempt = 0

    @property
    def version(self) -> str:
        return self._weights.version

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        return len(self._replicas) * self._config.engine.max_num_seqs

    async def start(self) -> None:
        """All replicas up, each having generated a token. Raises PoolFailed after engine.start_timeout_s."""
        await asyncio.gather(*(self._bring_up(replica) for replica in self._replicas))
        self._spawn(self._watch())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bring_up(self, replica: Replica) -> None:
        config = self._config
        weights = self._weights
        actor_class = ray.remote(EngineActor).options(
            num_cpus=config.engine.cpus,
            num_gpus=config.engine.gpus,
            max_concurrency=100_000,
            max_restarts=0,  # the pool replaces it, so that it never serves with weights of long ago
            runtime_env={"env_vars": cpu_environment(config.engine)},
        )
        replica.actor = actor_class.remote(config, weights.folder, weights.version, replica.index)
        replica.version = weights.version
        try:
            await asyncio.wait_for(self._one_token(replica), config.engine.start_timeout_s)
        except TimeoutError:
            raise PoolFailed(
                f"replica {replica.index} of pool {self._name} gave no token within engine.start_timeout_s="
                f"{config.engine.start_timeout_s}; is there room for it (rsrlm plan)?"
            ) from None
        except RayTaskError as error:
            raise PoolFailed(f"replica {replica.index} of pool {self._name} did not start: {error.cause!r}") from error
        except GONE as error:
            raise PoolFailed(f"replica {replica.index} of pool {self._name} did not start: {error}") from error
        if weights is not self._weights:  # published while it came up: once more, from the new folder
            ray.kill(replica.actor)
            return await self._bring_up(replica)
        replica.outstanding = 0
        replica.last_answer = time.monotonic()
        replica.ready.set()
        await self._wake()

    async def _one_token(self, replica: Replica) -> None:
        self._attempt += 1
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, seed=0)
        request = Request(id=f"health-{self._attempt}", prompt_token_ids=(1,), sampling=sampling, priority=-1)
        await replica.actor.generate.remote(request)

    async def _wake(self) -> None:
        async with self._freed:
            self._freed.notify_all()

    async def _pick(self) -> Replica:
        async with self._freed:
            while True:
                if self._failure:
                    raise self._failure
                ready = [replica for replica in self._replicas if replica.ready.is_set()]
                if ready:
                    return min(ready, key=lambda replica: (replica.outstanding, replica.index))
                await self._freed.wait()

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions from one replica, asked in one call: prompts that they share are computed once there.

        What fails is asked again, each for itself. Raises PoolFailed.
        """
        if len(requests) == 1:
            return [await self.generate(requests[0])]
        replica = await self._pick()
        generation, work = replica.generation, sum(map(_work, requests))
        replica.outstanding += work
        sent = []
        for request in requests:
            self._attempt += 1
            sent.append(replace(request, id=f"{request.id}~{self._attempt}"))
        try:
            answers = await replica.actor.generate_all.remote(sent)
            replica.last_answer = time.monotonic()
        except GONE as error:
            answers = [error] * len(requests)
        finally:
            if replica.generation == generation:
                replica.outstanding -= work

        async def settled(request: Request, answer: Completion | BaseException) -> Completion:
            if isinstance(answer, Completion):
                return replace(answer, request_id=request.id)
            if isinstance(answer, GONE):
                self._lost(replica, generation, answer)
            elif not isinstance(answer, RequestFailed):
                raise answer
            return await self.generate(request)

        return await gather([settled(*pair) for pair in zip(requests, answers, strict=True)])

    async def generate(self, request: Request) -> Completion:
        """The completion, from whichever replica; done again when an engine dies under it or gives no usable answer.

        Raises PoolFailed after MAX_ATTEMPTS.
        """
        work = _work(request)
        for attempt in range(MAX_ATTEMPTS):
            replica = await self._pick()
            generation = replica.generation
            replica.outstanding += work
            self._attempt += 1
            try:
                # vLLM forgets a request's id only when it has finished: an id of its own for each attempt.
                sent = replace(request, id=f"{request.id}~{self._attempt}")
                completion = await replica.actor.generate.remote(sent)
                replica.last_answer = time.monotonic()
                return replace(completion, request_id=request.id)
            except (RequestFailed, *GONE) as error:
                if not isinstance(error, RequestFailed):  # that engine is well and keeps its other requests
                    self._lost(replica, generation, error)
                if attempt == MAX_ATTEMPTS - 1:
                    cause = getattr(error, "cause", error)  # without the actor's stack trace
                    raise PoolFailed(f"request {request.id} failed {MAX_ATTEMPTS} times; last: {cause}") from error
            finally:
                if replica.generation == generation:
                    replica.outstanding -= work
        raise AssertionError("not reached")

    def _lost(self, replica: Replica, generation: int, error: Exception) -> None:
        if replica.generation != generation or self._failure:
            return
        replica.generation += 1
        replica.ready.clear()
        self._restarts += 1
        self._note(
            "engine_lost",
            pool=self._name,
            replica=replica.index,
            error=(str(error) or repr(error)).splitlines()[0][:300],
        )
        if self._restarts > 5 * len(self._replicas):
            self._fail(PoolFailed(f"pool {self._name}: engines died {self._restarts} times; last: {error}"))
            return
        with contextlib.suppress(Exception):
            ray.kill(replica.actor)
        self._spawn(self._revive(replica))

    def _fail(self, error: PoolFailed) -> None:
        """Every request ends with this error, those in flight too: nobody watches their engines any more."""
        self._failure = error
        for replica in self._replicas:
            replica.ready.clear()
            with contextlib.suppress(Exception):
                ray.kill(replica.actor)
        self._spawn(self._wake())

    async def _revive(self, replica: Replica) -> None:
        try:
            await self._bring_up(replica)
            self._note("engine_restarted", pool=self._name, replica=replica.index, version=replica.version)
        except Exception as error:
            self._fail(error if isinstance(error, PoolFailed) else PoolFailed(repr(error)))

    async def _watch(self, every_s: float = 15.0, silence_s: float = 60.0) -> None:
        """A replica that has work and makes no step between two looks, or does not even say so, is replaced.

        Nobody looks at this task: where it cannot go on, the pool fails.
        """
        try:
            while True:
                await asyncio.sleep(every_s)
                now = time.monotonic()
                busy = [replica for replica in self._replicas if replica.ready.is_set() and replica.outstanding]
                silent = [replica for replica in busy if now - replica.last_answer > silence_s]
                await asyncio.gather(*(self._check(replica, silence_s) for replica in silent))
        except Exception as error:
            self._fail(PoolFailed(f"pool {self._name}: its engines cannot be watched any more: {error!r}"))

    async def _check(self, replica: Replica, patience_s: float) -> None:
        generation = replica.generation
        try:
            before = await asyncio.wait_for(replica.actor.progress.remote(), patience_s)
            await asyncio.sleep(patience_s)
            after = await asyncio.wait_for(replica.actor.progress.remote(), patience_s)
        except Exception as error:  # dead, silent, or unable to say what it does
            self._lost(replica, generation, error)
            return
        if after == before and replica.outstanding and replica.generation == generation:
            self._lost(replica, generation, EngineDead(f"no step in {patience_s} s with requests in flight"))

    async def publish(self, weights: WeightSet, broadcast: Callable[[WeightSet, str, int, int], Any]) -> list[Any]:
        """The version on every replica, or PoolFailed with a reason within weights.deadline_s.

        Returns the seconds of each replica. `broadcast` sends the files where the transport is gloo.
        """
        if self._failure:
            raise self._failure
        self._weights = weights
        deadline = self._config.weights.deadline_s
        replicas = [replica for replica in self._replicas if replica.ready.is_set()]
        # Before the update: a request in flight may be the first to see that a replica is dead, and replace it.
        generations = [replica.generation for replica in replicas]
        for replica in replicas:
            replica.ready.clear()
        if self._config.weights.transport == "gloo" and replicas:
            return await self._publish_gloo(replicas, generations, weights, broadcast)
        reports = await asyncio.gather(*(self._update(r, weights) for r in replicas), return_exceptions=True)
        return await self._settle(replicas, generations, reports, weights, deadline)

    async def _update(self, replica: Replica, weights: WeightSet) -> dict[str, float]:
        report = await asyncio.wait_for(
            replica.actor.update.remote(weights.update_info(), weights.version), self._config.weights.deadline_s
        )
        replica.version = weights.version
        return report

    async def _publish_gloo(
        self,
        replicas: list[Replica],
        generations: list[int],
        weights: WeightSet,
        broadcast: Callable[[WeightSet, str, int, int], Any],
    ) -> list[Any]:
        """A new group for every version: replicas may have come and gone. Rank 0 is the sender."""
        deadline = self._config.weights.deadline_s
        address, port = _rendezvous()
        ranks = max(1, self._config.engine.gpus)
        world_size = 1 + ranks * len(replicas)

        async def receive(place: int, replica: Replica) -> dict[str, float]:
            info = {
                "master_address": address,
                "master_port": port,
                "rank_offset": 1 + place * ranks,
                "world_size": world_size,
            }
            await replica.actor.connect.remote(info)
            return await self._update(replica, weights)

        sending = asyncio.ensure_future(broadcast(weights, address, port, world_size))
        reports = await asyncio.gather(
            *(asyncio.wait_for(receive(i, r), deadline) for i, r in enumerate(replicas)), return_exceptions=True
        )
        try:
            await asyncio.wait_for(sending, deadline)
        except Exception as error:
            raise PoolFailed(f"weights {weights.version}: the sender failed: {error!r}") from error
        return await self._settle(replicas, generations, reports, weights, deadline)

    async def _settle(
        self,
        replicas: list[Replica],
        generations: list[int],
        reports: list[Any],
        weights: WeightSet,
        deadline: float,
    ) -> list[Any]:
        """Replicas that hold the version serve again; dead ones are replaced; any other failure fails the update."""
        good = []
        for replica, generation, report in zip(replicas, generations, reports, strict=True):
            if replica.generation != generation:
                continue  # replaced meanwhile, by one that comes up with this version
            if isinstance(report, GONE):
                self._lost(replica, generation, report)
            elif isinstance(report, TimeoutError):
                raise PoolFailed(
                    f"weights {weights.version} did not reach replica {replica.index} of pool {self._name} within "
                    f"weights.deadline_s={deadline}"
                )
            elif isinstance(report, BaseException):
                cause = getattr(report, "cause", report)
                raise PoolFailed(
                    f"replica {replica.index} of pool {self._name} refused weights {weights.version}: {cause}"
                ) from report
            else:
                good.append({"replica": replica.index, **report})
                replica.ready.set()
        await self._wake()
        return good

    async def _ask(self, method: str, timeout_s: float = 30.0) -> list[Any]:
        """Answers of the replicas that serve; one that is gone or silent is replaced and leaves its answer out."""
        ready = [replica for replica in self._replicas if replica.ready.is_set()]
        generations = [replica.generation for replica in ready]
        answers = await asyncio.gather(
            *(asyncio.wait_for(getattr(replica.actor, method).remote(), timeout_s) for replica in ready),
            return_exceptions=True,
        )
        found = []
        for replica, generation, answer in zip(ready, generations, answers, strict=True):
            if isinstance(answer, (*GONE, TimeoutError)):
                self._lost(replica, generation, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        return found

    async def stats(self) -> list[dict[str, float]]:
        """Counters of each replica since it started."""
        return await self._ask("stats")

    async def versions(self) -> list[str]:
        """What each engine itself says it holds."""
        return await self._ask("version")

    async def close(self) -> None:
        self._failure = PoolFailed("the pool is closed")
        for task in list(self._tasks):
            task.cancel()
        closing = [replica.actor.close.remote() for replica in self._replicas if replica.actor is not None]
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.gather(*closing, return_exceptions=True), 10)
        for replica in self._replicas:
            if replica.actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(replica.actor)


def _rendezvous() -> tuple[str, int]:
    """An address of this host that other hosts reach, and a free port on it."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


class LearnerFailed(RuntimeError):
    """The learner group cannot go on."""


class Learner:
    """The learner group: one long fit of Ray Train, fed through a mailbox.

    Ray Train places the ranks together, sets up their process group and rebuilds the group when a rank dies.
    """

    def __init__(self, config: Config, storage: Path) -> None:
        self._config = config
        self._storage = storage
        self._mailbox: Any = None
        self._fitting: Any = None
        self._fit: asyncio.Future[None] | None = None
        self._working = 0  # jobs that are not done
        self._training = -1  # number of the newest training job

    async def start(self) -> None:
        self._mailbox = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000).remote()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Not every worker of a cluster has the settings of Ray Train that this process was given.
        settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
        options = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": {"env_vars": settings}}
        self._fitting = ray.remote(Fitting).options(**options).remote()
        ended = self._fitting.fit.remote(self._config, self._mailbox, self._storage)

        async def fit() -> None:
            try:
                await ended
            except Exception as caught:
                raise LearnerFailed(_last_line(caught)) from caught

        self._fit = asyncio.ensure_future(fit())

    async def _run(self, job: TrainJob | BroadcastJob) -> AsyncIterator[dict[str, Any]]:
        assert self._fit is not None
        self._working += 1
        number = await self._mailbox.post.remote(job)
        if isinstance(job, TrainJob):
            self._training = number
        seen = 0
        while True:
            waiting = asyncio.ensure_future(self._mailbox.events.remote(number, seen))
            try:
                await asyncio.wait({waiting, self._fit}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not waiting.done():
                    waiting.cancel()
            if not waiting.done():
                self._fit.result()
                raise LearnerFailed("the learner group ended before its job")
            for event in await waiting:
                seen += 1
                if event["event"] == "failed":
                    raise LearnerFailed(event["message"])
                if event["event"] == "done":
                    self._working -= 1
                yield event
                if event["event"] == "done":
                    return

    def train(self, job: TrainJob) -> AsyncIterator[dict[str, Any]]:
        """Events of `rsrlm.runtime.learner.run_job`, the last one `done`. Raises LearnerFailed."""
        return self._run(job)

    async def decide(self, step: int, go_on: bool) -> None:
        """Whether the training job goes on behind its candidate of this step; it waits for that."""
        await self._mailbox.decide.remote(self._training, step, go_on)

    async def broadcast(self, weights: WeightSet, address: str, port: int, world_size: int) -> None:
        paths = tuple(file.path for file in weights.files)
        job = BroadcastJob(paths=paths, address=address, port=port, world_size=world_size)
        async for _ in self._run(job):
            pass

    async def close(self) -> None:
        if self._fit is None:
            return
        if not self._working:  # in the middle of a job no rank hears it
            with contextlib.suppress(Exception):
                await self._mailbox.post.remote("stop")
                await asyncio.wait({self._fit}, timeout=15)
        for actor in (self._fitting, self._mailbox):
            with contextlib.suppress(Exception):
                ray.kill(actor)
        with contextlib.suppress(Exception):
            await self._fit


class Fitting:
    """Ray Train's fit, in a process of its own: it owns the controller and the ranks, which die with it. In a thread of
    the driver nothing could end it, and the end of Ray under it would take the driver along."""

    def fit(self, config: Config, mailbox: Any, storage: Path) -> None:
        _trainer(config, mailbox, storage).fit()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else repr(error)


def _trainer(config: Config, mailbox: Any, storage: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = config.train
    resources: dict[str, float] = {"CPU": train.cpus}
    if train.gpus:
        resources["GPU"] = train.gpus
    environment = {"OMP_NUM_THREADS": str(train.threads), "DS_ACCELERATOR": "cuda" if train.gpus else "cpu"}
    return TorchTrainer(
        serve,
        train_loop_config={
            "model": config.model,
            "train": train,
            "mailbox": mailbox,
            "folder": str(config.folder),
        },
        torch_config=TorchConfig(backend="nccl" if train.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.workers, use_gpu=bool(train.gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="group",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=train.max_restarts, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment},
        ),
    )
