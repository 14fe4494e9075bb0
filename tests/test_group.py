"""What the driver hears of its learner, and what it makes of silence: a mailbox on command, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rsrlm.runtime import group
from rsrlm.runtime.group import LearnerFailed, LearnerGroup
from rsrlm.runtime.mailbox import Failed, Finished


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


async def posted(_: Any) -> int:
    return 0


def forget(
    make_config: Any,
    events: Callable[..., Awaitable[Any]],
    post: Callable[..., Awaitable[Any]] = posted,
    fit: Callable[[], Awaitable[Any]] = never,
    silence_s: float = 100.0,
) -> None:
    """A job to its end."""

    async def main() -> None:
        config = make_config(train={"silence_s": silence_s})
        learner = LearnerGroup(config, config.folder)
        remote = {
            name: SimpleNamespace(remote=lambda *given, call=call: asyncio.ensure_future(call(*given)))
            for name, call in {"post": post, "events": events}.items()
        }
        learner._mailbox, learner._fit = SimpleNamespace(**remote), asyncio.ensure_future(fit())
        try:
            await asyncio.wait_for(learner.forget(), 5)
            assert not learner._working
        finally:
            learner._fit.cancel()

    asyncio.run(main())


def test_a_job_is_followed_to_its_end(make_config: Any) -> None:
    """Nothing new for a while is no silence."""
    said = iter([[], [], [Finished()]])

    async def events(_: int, since: int) -> list[Any]:
        assert since == 0
        return next(said)

    forget(make_config, events)


def test_a_job_that_fails(make_config: Any) -> None:
    async def events(_: int, __: int) -> list[Any]:
        return [Failed(message="the loss is nan")]

    with pytest.raises(LearnerFailed, match="the loss is nan"):
        forget(make_config, events)


def test_ranks_that_hang_end_the_run(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def events(_: int, __: int) -> list[Any]:
        await asyncio.sleep(0.01)
        return []

    monkeypatch.setattr(group, "MAILBOX_S", 0.1)
    with pytest.raises(LearnerFailed, match=r"said nothing for 0.1 s, after 0 messages"):
        forget(make_config, events, silence_s=0.1)


@pytest.mark.parametrize("silent", ["post", "events"])
def test_a_mailbox_that_hangs_ends_the_run(silent: str, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "MAILBOX_S", 0.05)
    with pytest.raises(LearnerFailed, match=r"mailbox, an actor beside the driver, has not answered for 0.05 s"):
        forget(make_config, never, never if silent == "post" else posted)


def test_a_mailbox_that_dies_ends_the_run(make_config: Any) -> None:
    async def events(_: int, __: int) -> list[Any]:
        raise RayActorError()

    with pytest.raises(LearnerFailed, match="the learner's mailbox is gone: "):
        forget(make_config, events)


def test_a_group_that_ends_before_its_job_ends_the_run(make_config: Any) -> None:
    async def failed() -> None:
        raise LearnerFailed("a rank died three times")

    with pytest.raises(LearnerFailed, match="a rank died three times"):
        forget(make_config, never, fit=failed)

    async def ended() -> None:
        return None

    with pytest.raises(LearnerFailed, match="ended before its job"):
        forget(make_config, never, fit=ended)
