"""How a run ends: exit codes, the signals that interrupt it, and what is said of a failure."""

import asyncio
import contextlib
import errno
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rsrlm.iterative import NoPairs, Stopped
from rsrlm.recipes.base import NoItems
from rsrlm.runtime.endpoint import BudgetSpent, EndpointFailed
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

Result = TypeVar("Result")

EXIT_OK, EXIT_USER, EXIT_NO_PAIRS, EXIT_FAILED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 2, 3, 4, 5, 130
# Ends that a run comes to by itself.
ENDINGS: dict[type[Exception], tuple[str, int]] = {
    NoPairs: ("no_pairs", EXIT_NO_PAIRS),
    NoItems: ("no_examples", EXIT_NO_PAIRS),
    Stopped: ("stopped", EXIT_STOPPED),
}


def interruptible(work: Coroutine[Any, Any, Result], heard: Callable[[], None] = lambda: None) -> Result:
    """Run in a new event loop; SIGINT and SIGTERM cancel the work, which then cleans up. What is `heard` then is called
    first: after `ray job stop` a process has 3 s."""

    async def main() -> Result:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            heard()
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        return await task

    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(main())
    finally:
        signal.signal(signal.SIGTERM, before)  # the loop leaves the default, which ends a process in the middle


def failure(error: BaseException) -> tuple[str, int, str]:
    """Status, exit code and reason. A full disk and a wrong config are the user's to mend: no stack trace for them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
        return "interrupted", EXIT_INTERRUPTED, ""
    for kind, (status, code) in ENDINGS.items():
        if isinstance(error, kind):
            return status, code, str(error)
    from ray.exceptions import RayTaskError

    from rsrlm.runtime.group import LearnerFailed
    from rsrlm.runtime.replicas import PoolFailed

    cause = error.cause if isinstance(error, RayTaskError) else error  # the actor's own, which has its errno
    if isinstance(cause, ConfigError):
        return "failed", EXIT_USER, str(cause)
    if isinstance(cause, (EndpointFailed, BudgetSpent)):
        return "failed", EXIT_FAILED, str(cause)
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, (LearnerFailed, PoolFailed)) and "No space left" in str(error)):
        return "failed", EXIT_USER, f"the disk is full ({cause}); free some space, then resume"
    if isinstance(error, (PoolFailed, LearnerFailed)):
        return "failed", EXIT_FAILED, str(error)
    logging.getLogger("rsrlm").error("the run failed", exc_info=error)
    return "failed", EXIT_FAILED, repr(error)


def write_summary(store: RunFolder, status: str, reason: str = "") -> None:
    """summary.json: the status, the metrics of the finished iterations and, of a failure, the reason."""
    summary: dict[str, Any] = {"status": status, "iterations": store.metrics()}
    if reason:
        summary["reason"] = reason
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
        store.write_summary(summary)
