"""How a run ends, whatever ends it: its exit code, what it says, and what it leaves in the summary."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rsrlm.config import Config
from rsrlm.iterative import NoPairs
from rsrlm.report.progress import Report
from rsrlm.runtime import exits, launch, setup
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

EXECUTE = launch.execute  # a fixture puts another in its place


FULL = "[Errno 28] No space left on device"


def of_an_actor(error: Exception) -> BaseException:
    """The error as Ray raises it in the driver."""
    from ray.exceptions import RayTaskError

    return RayTaskError("put", "Traceback of the actor", error).as_instanceof_cause()


def of_the_learner(message: str) -> Exception:
    from rsrlm.runtime.group import LearnerFailed

    return LearnerFailed(message)


def of_a_pool(message: str) -> Exception:
    from rsrlm.runtime.replicas import PoolFailed

    return PoolFailed(message)


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (full, FULL),
        (lambda: full(errno.EDQUOT), "[Errno 122] Disk quota exceeded"),
        (lambda: of_an_actor(full()), FULL),
        (lambda: of_the_learner(f"OSError: {FULL}: '/dev/shm/x'"), f"OSError: {FULL}: '/dev/shm/x'"),
        (lambda: of_a_pool(f"replica 0 did not start: OSError: {FULL}"), f"replica 0 did not start: OSError: {FULL}"),
    ],
    ids=["driver", "quota", "actor", "learner", "pool"],
)
def test_a_full_disk_is_the_users_to_mend(
    make: Callable[[], BaseException], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ("failed", 2, f"the disk is full ({reason}); free some space, then resume")
    assert exits.failure(make()) == expected
    assert caplog.records == []  # no stack trace


def test_mistakes_that_show_later_are_the_users_as_well(caplog: pytest.LogCaptureFixture) -> None:
    for error in (ConfigError("judge.function f raised"), of_an_actor(ConfigError("judge.function f raised"))):
        assert exits.failure(error) == ("failed", 2, "judge.function f raised")
    assert caplog.records == []


def test_other_failures_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert exits.failure(of_the_learner("rank 0 died")) == ("failed", 4, "rank 0 died")
    assert exits.failure(of_a_pool("no engine")) == ("failed", 4, "no engine")
    assert caplog.records == []
    with caplog.at_level(logging.ERROR):
        assert exits.failure(full(errno.EIO))[:2] == ("failed", 4)
        assert exits.failure(of_an_actor(ValueError("x")))[:2] == ("failed", 4)
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]


class Screen(Report):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def executed(
    monkeypatch: pytest.MonkeyPatch,
    store: RunFolder,
    config: Config,
    error: BaseException | None,
    work: Any = None,
    cluster: Any = None,
) -> tuple[int, list[str]]:
    """Exit code and lines of a run whose cluster raises this."""

    @contextlib.contextmanager
    def ray_cluster(config: Config, store: RunFolder, begun: None) -> Iterator[None]:
        if error:
            raise error
        yield

    async def nothing(*_: Any) -> None: ...

    monkeypatch.setattr(launch, "ray_cluster", cluster or ray_cluster)
    monkeypatch.setattr(launch, "_run", work or nothing)
    screen = Screen()
    nobody: Any = None
    prepared = setup.Prepared(
        config=config,
        drawn={},
        model=Path(),
        judge=None,
        validator=None,
        iterations=[],
        heldout=nobody,
        validation=nobody,
        parts=None,
        trained_on=nobody,
        left_out=["long", "longer"],
        repeated=["again"],
    )
    return EXECUTE(prepared, store, screen), screen.lines


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (None, 0, "completed"),
        (NoPairs("iteration 0 has no pairs"), 3, "no_pairs"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ExceptionGroup("", [ExceptionGroup("", [full()])]), 2, "failed"),
    ],
    ids=["completed", "no-pairs", "interrupted", "full"],
)
def test_how_a_run_ends(
    error: BaseException | None, code: int, status: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    store = RunFolder.create(config)
    ended, lines = executed(monkeypatch, store, config, error)
    assert ended == code
    assert lines[:2] == [
        "2 prompts are too long and left out: long, longer",
        "1 prompts are repeats of another's wording and left out: again",
    ]
    assert any(line.startswith(f"status: {status}") for line in lines)
    assert (lines[-1] == f"go on with: rsrlm resume {store.folder}") == (code != 0)
    summary = store.summary()
    assert summary["status"] == status
    assert ("reason" in summary) == (status in ("no_pairs", "failed"))
    events = [json.loads(line) for line in (store.folder / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["status"]) for event in events] == [("run_ended", status)]


def test_the_summary_tells_of_a_stop_before_anything_is_cleared_away(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job stop` leaves 3 s, and engines may take longer to end."""
    config = make_config()
    store = RunFolder.create(config)
    seen: list[str] = []

    async def work(*_: Any) -> None:
        seen.append(store.summary()["status"])
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(30)
        finally:
            seen.append(store.summary()["status"])

    before = signal.getsignal(signal.SIGTERM)
    try:
        code, lines = executed(monkeypatch, store, config, None, work)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, seen, store.summary()["status"]) == (130, ["running", "interrupted"], "interrupted")
    assert f"go on with: rsrlm resume {store.folder}" in lines
    assert not (store.folder / "alive.json").exists()


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_stop_while_ray_starts_or_ends(where: str, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    store = RunFolder.create(config)

    @contextlib.contextmanager
    def ray_cluster(config: Config, store: RunFolder, begun: None) -> Iterator[None]:
        if where == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        yield
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        code, _ = executed(monkeypatch, store, config, None, cluster=ray_cluster)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, store.summary()["status"]) == (130, "interrupted")


def test_a_disk_that_stays_full_does_not_hide_the_reason(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the summary nor the events can be written: /dev/full is a full disk."""
    config = make_config()
    store = RunFolder.create(config)
    for name in ("events.jsonl", f".summary.json.{os.getpid()}.tmp"):
        (store.folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        store.write_summary({})
    with pytest.raises(OSError, match="No space left on device"):
        store.event("any")
    exits.write_summary(store, "failed", "the reason")
    monkeypatch.setattr(RunFolder, "remove_scratch", lambda store: None)
    code, lines = executed(monkeypatch, store, config, full())
    assert code == 2
    assert f"status: failed: the disk is full ({FULL}); free some space, then resume" in lines
    assert store.summary() == {}
