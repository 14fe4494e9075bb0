"""Python functions that judge, in separate processes: a call that hangs, raises or dies costs only its own verdict.

In the event loop it would hold up requests, supervision and Ctrl-C for as long as it takes.
"""

import asyncio
import ctypes
import importlib
import inspect
import logging
import math
import multiprocessing
import numbers
import os
import signal
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from rsrlm.records import Scored, Unparsed, Verdict
from rsrlm.settings.base import ConfigError

MOST_WORKERS = 8
TIMED_OUT = Unparsed(reason="function timed out")
DIED = Unparsed(reason="function's process died")
NO_NUMBER = Unparsed(reason="function returned no number")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_function: Callable[..., float] | None = None  # of this worker


def load_function(dotted: str) -> Callable[..., float]:
    """The function that `module:name` or `pkg.module.name` names, to be called with (prompt, response), and with what
    the prompt carries as the third argument where `takes_data` says so.

    Its module may be in the working directory, which is searched last. Raises ConfigError.
    """
    module, colon, name = dotted.partition(":")
    if not colon:
        module, _, name = dotted.rpartition(".")
    if not module or not name:
        raise ConfigError(f"judge.function={dotted!r}: write module:name, such as my_judges:shorter")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f"judge.function={dotted}: cannot be imported: {type(error).__name__}: {error}; put the folder of its "
            "module on PYTHONPATH"
        ) from error
    try:
        inspect.signature(function).bind("prompt", "response", *([{}] if takes_data(function) else []))
    except (TypeError, ValueError) as error:  # the latter for functions in C that do not say what they take
        raise ConfigError(
            f"judge.function={dotted}: must be callable with (prompt, response) or (prompt, response, data): {error}; "
            "change it accordingly"
        ) from None
    return function


def takes_data(function: Callable[..., float]) -> bool:
    """Whether it needs three arguments, or calls its third one `data`: other arguments with a default are its own."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [one for one in inspect.signature(function).parameters.values() if one.kind in places]
    return len(parameters) > 2 and (parameters[2].default is inspect.Parameter.empty or parameters[2].name == "data")


def call_function(
    function: Callable[..., float], prompt: str, response: str, data: Mapping[str, str] | None = None
) -> Verdict:
    """A verifiable reward: any finite number, where True and False are 1 and 0. `data` is passed on unless it is None.

    Raises what the function raises.
    """
    value = function(prompt, response, *([dict(data)] if data is not None else []))
    if not isinstance(value, numbers.Real):
        return NO_NUMBER
    try:
        points = float(value)
    except OverflowError:
        return NO_NUMBER
    return Scored(points=points) if math.isfinite(points) else NO_NUMBER


def _start_worker(dotted: str, parent: int) -> None:
    """In a new worker, before its first call and so outside of any deadline."""
    global _function
    # Not even a loop in C keeps the worker alive once the driver is gone or stops it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver's to handle
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before this process asked to be told
    try:
        _function = load_function(dotted)
    except ConfigError as error:  # though the driver could
        reason = error

        def _function(*_: Any) -> float:
            raise reason


def _call(prompt: str, response: str, data: dict[str, str] | None) -> tuple[Verdict, str]:
    """The verdict, and what was raised."""
    assert _function is not None
    try:
        return call_function(_function, prompt, response, data), ""
    except BaseException as error:  # SystemExit too
        return Unparsed(reason=f"function raised {type(error).__name__}"), f"{type(error).__name__}: {error}"


class FunctionPool:
    """Verdicts of the function that `module:name` names. Raises ConfigError where it cannot be imported.

    A call that takes longer than `timeout_s`, raises, or ends its process is Unparsed; the first one is logged. The
    processes start with the first call and end with this object.
    """

    def __init__(self, dotted: str, timeout_s: float) -> None:
        load_function(dotted)
        self._dotted = dotted
        self._timeout_s = timeout_s
        self._pool: Any = None
        self._stop: Callable[[], Any] = lambda: None
        self._told = False

    def _workers(self) -> Any:
        from pebble import ProcessPool

        if self._pool is None or not self._pool.active:  # a pool is broken when an idle worker is killed
            self._stop()
            self._pool = ProcessPool(
                max_workers=min(MOST_WORKERS, len(os.sched_getaffinity(0))),
                initializer=_start_worker,
                initargs=(self._dotted, os.getpid()),
                # A driver with Ray and threads cannot be forked.
                context=multiprocessing.get_context("spawn"),
            )
            self._stop = weakref.finalize(self, _stop, self._pool)
        return self._pool

    async def __call__(self, prompt: str, response: str, data: Mapping[str, str] | None = None) -> Verdict:
        """`data` is what the prompt carries, for a function that takes it (see `takes_data`)."""
        from pebble import ProcessExpired

        carried = dict(data) if data is not None else None
        try:
            call = self._workers().schedule(_call, (prompt, response, carried), timeout=self._timeout_s)
            verdict, said = await asyncio.wrap_future(call)
        except TimeoutError:
            verdict, said = TIMED_OUT, f"took longer than judge.timeout_s={self._timeout_s:g}"
        except (ProcessExpired, RuntimeError) as error:
            verdict, said = DIED, f"its process ended: {error}"
        if said and not self._told:
            self._told = True
            logging.getLogger("rsrlm").warning(
                "judge.function=%s: %r for the prompt %r; this response has no score, and more of its kind are only "
                "counted (unreadable_reasons)",
                *(self._dotted, said[:400], prompt[:200]),
            )
        return verdict


def _stop(pool: Any) -> None:
    pool.stop()
    pool.join()
