"""The learner's group: one long fit of Ray Train, fed through a mailbox.

Ray Train places the ranks together, sets up their process group and rebuilds the group when a rank dies.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from rsrlm.config import Config
from rsrlm.jobs import Event, Trained, TrainJob, follow
from rsrlm.runtime.mailbox import BroadcastJob, Failed, Finished, ForgetJob, LearnerJob, Listening, Mailbox, Stop
from rsrlm.runtime.places import on_node
from rsrlm.runtime.rank import serve
from rsrlm.runtime.room import wait_of
from rsrlm.settings.base import first_line, last_line
from rsrlm.store.steps import StepLog

MAILBOX_S = 60.0  # for an actor on the driver's host to answer: it does nothing but pass messages on
RESTARTS = 2  # of the group in one run, after a rank died


class LearnerFailed(RuntimeError):
    """The learner group cannot go on."""


class LearnerGroup:
    """The driver's side of the learner. Use it from one event loop."""

    def __init__(self, config: Config, storage: Path) -> None:
        self._config = config
        self._storage = storage
        self._mailbox: Any = None
        self._fitting: Any = None
        self._fit: asyncio.Future[None] | None = None
        self._working = 0  # jobs that are not done

    async def start(self) -> None:
        # Beside the driver: a host that is lost takes no mailbox along, whose jobs nobody else knows.
        placed = on_node(ray.get_runtime_context().get_node_id())
        kept = {"max_concurrency": 1000, "enable_task_events": False}
        self._mailbox = ray.remote(Mailbox).options(**kept, **placed).remote()
        settings = {"env_vars": train_settings(self._config, os.environ)}
        self._fitting = ray.remote(Fitting).options(runtime_env=settings, **placed).remote()
        ended = self._fitting.fit.remote(self._config, self._mailbox, self._storage)

        async def fit() -> None:
            try:
                await ended
            except Exception as caught:
                raise LearnerFailed(last_line(caught)) from caught

        self._fit = asyncio.ensure_future(fit())

    async def _run(self, job: LearnerJob) -> AsyncIterator[Any]:
        """What is said of a job, to its end. Raises LearnerFailed."""
        assert self._fit is not None
        self._working += 1
        number = await self._answered(self._mailbox.post.remote(job))
        # Ray Train may wait for another host as long as the run does for its first ones.
        silence_s = max(self._config.train.silence_s, wait_of(self._config) + MAILBOX_S)
        seen, heard = 0, time.monotonic()
        while True:
            said = await self._answered(self._mailbox.events.remote(number, seen))
            if said:
                heard = time.monotonic()
            elif time.monotonic() - heard > silence_s:
                raise LearnerFailed(
                    f"the learner said nothing for {silence_s:g} s, after {seen} messages of its job: its ranks hang, "
                    "or a step takes longer than train.silence_s. See the logs of Ray's RayTrainWorker processes; then "
                    "resume, where it takes longer with a higher train.silence_s in the run's config.yaml"
                )
            for event in said:
                seen += 1
                if isinstance(event, (Trained, Finished, Failed)):
                    self._working -= 1
                if isinstance(event, Failed):
                    raise LearnerFailed(event.message)
                yield event
                if isinstance(event, (Trained, Finished)):
                    return

    async def _answered(self, asked: Any) -> Any:
        """The mailbox's answer. Raises LearnerFailed where there is none, or the group has ended meanwhile."""
        assert self._fit is not None
        waiting = asyncio.ensure_future(asked)
        try:
            await asyncio.wait({waiting, self._fit}, timeout=MAILBOX_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if waiting.done():
            try:
                return await waiting
            except RayActorError as error:
                raise LearnerFailed(f"the learner's mailbox is gone: {first_line(error)}") from error
        if self._fit.done():
            self._fit.result()
            raise LearnerFailed("the learner group ended before its job")
        raise LearnerFailed(f"the learner's mailbox, an actor beside the driver, has not answered for {MAILBOX_S:g} s")

    async def train(self, job: TrainJob, log: StepLog, on_event: Callable[[Event], None]) -> Trained:
        """Do a job; its steps are in the log when it is done. Raises LearnerFailed."""
        return await follow(self._run(job), log, on_event)

    async def forget(self) -> None:
        """Give up what the ranks keep in memory for another job of the same training."""
        async for _ in self._run(ForgetJob()):
            pass

    async def broadcast(self, job: BroadcastJob, listening: Callable[[Listening], None]) -> None:
        """Send files over gloo; `listening` is told where the receivers find the sender. Raises LearnerFailed."""
        async for event in self._run(job):
            if isinstance(event, Listening):
                listening(event)

    async def close(self) -> None:
        if self._fit is None:
            return
        if not self._working:  # in the middle of a job no rank hears it
            with contextlib.suppress(Exception):
                await self._mailbox.post.remote(Stop())
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


def train_settings(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Settings of Ray Train for its controller: those of this process, which not every worker of a cluster has. A group
    that has lost a host waits for another as long as a run does for its first ones."""
    settings = {name: value for name, value in environ.items() if name.startswith("RAY_TRAIN_")}
    settings.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{max(60.0, wait_of(config)):g}")
    return settings


def _trainer(config: Config, mailbox: Any, storage: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from rsrlm.runtime.network import NetworkConfig

    train = config.train
    resources: dict[str, float] = {"CPU": train.cpus}
    if train.gpus:
        resources["GPU"] = config.gpus_of_rank
    environment = {"OMP_NUM_THREADS": str(train.threads), "DS_ACCELERATOR": "cuda" if train.gpus else "cpu"}
    return TorchTrainer(
        serve,
        train_loop_config={
            "model": config.model,
            "train": train,
            "mailbox": mailbox,
            "folder": str(config.folder),
        },
        torch_config=NetworkConfig(backend="nccl" if train.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=bool(train.gpus),
            resources_per_worker=resources,
            label_selector=config.ray.hosts.learner or None,
        ),
        run_config=RunConfig(
            name="group",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment},
        ),
    )
