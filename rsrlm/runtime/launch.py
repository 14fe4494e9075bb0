"""From a checked config to a finished run: Ray, the actors, the loop, and everything down again in order."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rsrlm.config import Config
from rsrlm.engines import Answers
from rsrlm.iterative import Spine, run_iterations
from rsrlm.online import run_rounds
from rsrlm.report import tables
from rsrlm.report.progress import Report
from rsrlm.report.trackers.following import follow
from rsrlm.run import Run
from rsrlm.runtime import reporting, scale
from rsrlm.runtime.alive import noted_alive
from rsrlm.runtime.cluster import ray_cluster
from rsrlm.runtime.exits import EXIT_OK, failure, interruptible, write_summary
from rsrlm.runtime.metrics import Counting, Meters, Watcher, exported
from rsrlm.runtime.monitor import Monitor
from rsrlm.runtime.places import check_hosts
from rsrlm.runtime.room import engines_of
from rsrlm.runtime.setup import Prepared
from rsrlm.store.folder import RunFolder
from rsrlm.store.journal import Journals


def noting(config: Config, store: RunFolder, report: Report) -> Callable[..., None]:
    """What takes the events of engines: they are kept, and those that a user waits for are shown."""
    up: list[int] = []

    def note(kind: str, **fields: Any) -> None:
        store.event(kind, **fields)
        if kind == "engine_up":
            up.append(fields["replica"])
            report.line(f"engine {len(up)} of {max(engines_of(config), len(up))} is up after {fields['seconds']:.0f} s")
        elif kind == "scaled":
            report.line(f"{fields['pool']}: {fields['before']} replicas become {fields['after']}")

    return note


async def _run(
    prepared: Prepared, store: RunFolder, report: Report, meters: Meters, watcher: Watcher, monitor: Monitor
) -> list[dict[str, Any]]:
    from rsrlm.runtime.group import LearnerGroup
    from rsrlm.runtime.pools import EnginePools
    from rsrlm.runtime.producers import Producers

    config = prepared.config
    group = LearnerGroup(config, store.folder / ".train")
    models = {config.model_name(0): prepared.model}
    note = monitor.heard(noting(config, store, report))
    pools = EnginePools(config, store, models, group.broadcast, prepared.judge, prepared.validator, note)
    watcher.follow(pools, asyncio.get_running_loop())
    monitor.follow(pools)
    answers = Journals(store.folder)
    try:
        with report.busy("starting engines and learner"):
            if config.engine.producers:
                pools.producers = Producers(config, prepared.drawn, pools, note, config.engine.producers)
            if not config.ray.share_gpus:
                await group.start()
            await pools.start(newest_model(config, store))
            if config.ray.share_gpus:  # engines come first: what they leave of each GPU is room for one rank
                await group.start()
        if len(answers):
            report.line(f"{len(answers)} answers are known already")
        first, screen = await pools.model(config.model_name(0)), Counting(monitor, meters)
        run = Run(pools, Answers(answers), screen, store.event, first, store.segments)
        monitor.follow(pools, run)
        spine = Spine(
            run=run,
            learner=group,
            store=store,
            heldout=prepared.heldout,
            validation=prepared.validation,
            endpoints=pools.endpoint_usage,
            config=config,
        )
        clock = run_rounds if config.clock.kind == "online" else run_iterations
        async with scale.followed(store, pools.replicas, note):
            return await clock(spine, prepared.iterations)
    finally:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.gather(group.close(), pools.close()), 25)
        answers.close()


def newest_model(config: Config, store: RunFolder) -> str:
    """The name of the model that the engines come up with: after an iteration's training its result; on the online
    clock the one that answers the next round."""
    rows = store.metrics()
    if config.clock.kind == "online":
        return [config.model_name(0), *(str(row["weight_version"]) for row in rows)][config.clock.answers(len(rows))]
    next_model = config.model_name(len(rows) + 1)
    if (store.iteration(len(rows)) / "training.json").exists() and store.model(next_model).exists():
        return next_model
    return str(rows[-1]["weight_version"]) if rows else config.model_name(0)


def execute(prepared: Prepared, store: RunFolder, report: Report, ray: Future[Any] | None = None) -> int:
    """Run to the end, to the user's interruption or to a failure; returns the exit code. The summary always fits.

    `ray` is what `cluster.begin` gave.
    """
    config = prepared.config
    lock = store.lock()
    store.remove_scratch()
    for remark in prepared.remarks:
        report.line(remark)
    # Until the loop takes over, and after it: the default would leave the summary as it is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    write_summary(store, "running")
    trackers = follow(config, store, report)
    status, code, reason = "completed", EXIT_OK, ""
    try:
        monitor = Monitor(report)
        with contextlib.ExitStack() as stack:
            stack.enter_context(noted_alive(store, monitor.doing))
            stack.enter_context(ray_cluster(config, store, begun=ray))
            models = {"model": prepared.model, "judge.model": prepared.judge}
            check_hosts(config, {**models, "evaluate.judge.model": prepared.validator})
            stack.enter_context(reporting.refreshed(store, config.report))
            meters = Meters(config.name)
            watcher = Watcher(meters, config, store)
            stack.enter_context(exported(meters, watcher))
            work = _run(prepared, store, report, meters, watcher, monitor)
            interruptible(work, lambda: write_summary(store, "interrupted"))
    except BaseException as error:
        status, code, reason = failure(error)
    write_summary(store, status, reason)
    with contextlib.suppress(OSError):
        store.event("run_ended", status=status, reason=reason or None)
    trackers.end(status)
    lock.close()
    tables.show(store, status, reason, report)
    if config.report and status != "interrupted":  # who interrupts wants it to end
        reporting.finish(store, report)
    return code
