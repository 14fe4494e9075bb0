"""A judge function may hang, raise or die: that costs a verdict, and neither the run nor Ctrl-C."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from rsrlm.judges.function_pool import DIED, MOST_WORKERS, TIMED_OUT, FunctionPool
from rsrlm.records import Scored, Unparsed, Verdict
from rsrlm.settings.base import ConfigError

SCRIPT = Path(__file__).parent.parent / "function_run.py"


def judged(*responses: str, timeout_s: float = 60.0, prompt: str = "Why?") -> list[Verdict]:
    """Verdicts of `judge_functions:by_order` on all of them at once."""
    judge = FunctionPool("judge_functions:by_order", timeout_s)

    async def main() -> list[Verdict]:
        return await asyncio.wait_for(asyncio.gather(*(judge(prompt, one) for one in responses)), 50)

    return asyncio.run(main())


def points(*responses: str) -> list[Verdict]:
    return [Scored(points=float(len(one))) for one in responses]


def test_verdicts_come_from_other_processes_in_the_order_of_the_questions() -> None:
    texts = ["", "a", "abc", "üü", "\ud800"] * 8
    assert judged(*texts) == points(*texts)
    (verdict,) = judged("pid")
    assert isinstance(verdict, Scored)
    assert verdict.points != os.getpid()


def test_what_a_prompt_carries_comes_to_the_function() -> None:
    async def main() -> tuple[Verdict, Verdict]:
        pool = FunctionPool("judge_functions:by_reference", 30.0)
        return await pool("Why?", "a", {"reference": "üü\ud800"}), await pool("Why?", "a", {"reference": ""})

    assert asyncio.run(main()) == (Scored(points=3.0), Scored(points=0.0))


def test_a_call_that_hangs_ends_at_its_deadline() -> None:
    """Whatever it hangs in. Its process is replaced: there are fewer of them than such calls."""
    hangs = (["hang", "hang in C", "sleep"] * MOST_WORKERS)[: max(3, len(os.sched_getaffinity(0)) + 1)]
    assert judged(*hangs, "a", "ab", timeout_s=1.0) == [TIMED_OUT] * len(hangs) + points("a", "ab")


def test_a_function_that_raises_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    raised = Unparsed(reason="function raised ValueError")
    assert judged("raise", "a", "raise", prompt="Tea") == [raised, *points("a"), raised]
    (message,) = caplog.messages
    assert message.startswith(
        r"judge.function=judge_functions:by_order: 'ValueError: what is \x1b[31mTea?' for the prompt 'Tea'; this resp"
    )


def test_a_function_that_leaves_or_kills_its_process_costs_its_own_verdict() -> None:
    assert judged("leave", "a") == [Unparsed(reason="function raised SystemExit"), *points("a")]
    assert judged("die", "ab") == [DIED, *points("ab")]


def test_the_event_loop_goes_on_while_a_function_runs(tmp_path: Path) -> None:
    """The function waits for what the loop does next."""
    path = tmp_path / "go"

    async def main() -> Verdict:
        call = asyncio.ensure_future(FunctionPool("judge_functions:by_order", 30.0)(str(path), "wait"))
        await asyncio.sleep(0.1)
        path.touch()
        return await call

    assert asyncio.run(main()) == Scored(points=4.0)


def test_processes_that_were_killed_while_nothing_ran_are_replaced() -> None:
    judge = FunctionPool("judge_functions:by_order", 30.0)

    async def main() -> Verdict:
        await judge("", "a")
        workers = workers_of(os.getpid())
        assert workers
        for worker in workers:
            worker.kill()
        while any(worker.status() != psutil.STATUS_ZOMBIE for worker in workers if worker.is_running()):
            await asyncio.sleep(0.01)  # and not psutil.wait_procs, which would hide their end from the pool
        while (verdict := await judge("", "abc")) == DIED:
            pass
        return verdict

    assert asyncio.run(asyncio.wait_for(main(), 50)) == Scored(points=3.0)


def test_processes_end_with_the_judge() -> None:
    before = set(workers_of(os.getpid()))
    judge = FunctionPool("judge_functions:by_order", 30.0)
    asyncio.run(judge("", "a"))  # type: ignore[arg-type]
    workers = set(workers_of(os.getpid())) - before
    assert workers
    del judge
    assert not psutil.wait_procs(workers, 10)[1]


def test_a_function_that_a_process_cannot_import_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "once_only.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    raise ImportError('not here')\ndef f(p, r):\n    return 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = FunctionPool("once_only:f", 30.0)
    assert asyncio.run(judge("", "")) == Unparsed(reason="function raised ConfigError")  # type: ignore[arg-type]
    assert "ImportError: not here" in caplog.text


def test_what_cannot_be_imported_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"judge\.function=judge_functions:no_such: cannot be imported"):
        FunctionPool("judge_functions:no_such", 60.0)


# -- the end of the driver ---------------------------------------------------------------------------------------------


def workers_of(pid: int) -> list[psutil.Process]:
    """Its processes that run a function, without multiprocessing's own tracker."""
    return [one for one in psutil.Process(pid).children() if "spawn_main" in " ".join(one.cmdline())]


def survivors(workers: Sequence[psutil.Process], seconds: float = 5.0) -> list[psutil.Process]:
    """Those that are not dead by then; one that its new parent has not waited for yet is."""

    def lives(worker: psutil.Process) -> bool:
        try:
            return worker.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + seconds
    while (alive := [worker for worker in workers if lives(worker)]) and time.monotonic() < until:
        time.sleep(0.01)
    return alive


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Starts a driver whose judge hangs, and returns when it does."""
    started: list[subprocess.Popen] = []

    def start(response: str) -> Any:
        command = [sys.executable, str(SCRIPT), str(tmp_path / "journal"), response]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        started.append(run)
        assert run.stdout
        assert run.stdout.readline() == "judging\n"
        while True:  # until a process is inside of the function
            workers = workers_of(run.pid)
            if any(worker.cpu_percent(0.1) > 5 for worker in workers):
                return run, workers
            assert run.poll() is None

    yield start
    for run in started:
        run.kill()
        run.communicate()


@pytest.mark.parametrize("hang", ["hang", "hang in C"])
def test_an_interruption_is_heard_while_a_function_hangs(driver: Callable[[str], Any], hang: str) -> None:
    """Ctrl-C goes to all processes of the terminal. The deadline of a call is a minute."""
    run, workers = driver(hang)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert "CancelledError" in err or "KeyboardInterrupt" in err
    assert "judged" not in out
    assert not survivors(workers)


def test_no_process_outlives_a_driver_that_was_killed(driver: Callable[[str], Any]) -> None:
    run, workers = driver("hang in C")
    run.kill()
    assert not survivors(workers)
