"""What a run says of itself in alive.json: from its screen, its engines and its buffer."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from samples import made_for
from scripted import model, run_of

from rsrlm.engines import Engines
from rsrlm.records import Group, Prompt, Task
from rsrlm.report.pulse import Bar, Filling, PoolPulse, Pulse, Stage
from rsrlm.runtime import alive
from rsrlm.runtime.monitor import ENDED_SHOWN, Monitor
from rsrlm.store.folder import RunFolder


class Shown:
    """A screen that keeps what it is told."""

    def __init__(self) -> None:
        self.ticks: list[Any] = []

    def line(self, text: str) -> None:
        self.ticks.append(text)

    @contextmanager
    def stage(self, title: str, totals: dict[str, int]) -> Iterator[Any]:
        yield lambda *tick: self.ticks.append((title, *tick))


def said(monitor: Monitor) -> Pulse:
    return msgspec.convert({"host": "head", "pid": 12, "at": 1.0, **monitor.doing()}, Pulse)


def replica(version: str, outstanding: int, ready: bool = True) -> Any:
    return SimpleNamespace(version=version, outstanding=outstanding, ready=ready)


def test_stages_that_go_on_and_those_that_ended() -> None:
    screen = Shown()
    monitor = Monitor(screen)
    monitor.line("hello")
    with monitor.stage("iteration 1", {"respond": 4}) as first:
        with monitor.stage("iteration 0", {"reference": 1, "steps": 2}) as second:
            first("respond", 1, 30)
            second("steps", 1, 5)
            second("steps", 1, 6)
            one, other = said(monitor).stages
            assert one.bars == (Bar(what="respond", done=1, of=4, tokens=30),)
            assert other.bars == (Bar(what="reference", done=0, of=1), Bar(what="steps", done=2, of=2, tokens=11))
            assert (one.title, one.ended, other.ended) == ("iteration 1", None, None)
            assert abs(one.began - time.time()) < 60
        ended, still = said(monitor).stages
        assert (ended.title, still.title, still.ended) == ("iteration 0", "iteration 1", None)
        assert ended.ended is not None
        assert ended.ended >= ended.began
    told = ["hello", ("iteration 1", "respond", 1, 30), ("iteration 0", "steps", 1, 5), ("iteration 0", "steps", 1, 6)]
    assert screen.ticks == told


def test_a_stage_that_fails_has_ended_and_few_are_kept() -> None:
    monitor = Monitor(Shown())
    for number in range(ENDED_SHOWN + 2):
        with pytest.raises(KeyError), monitor.stage(str(number), {}):
            raise KeyError
    stages = said(monitor).stages
    assert [stage.title for stage in stages] == [str(number) for number in range(2, ENDED_SHOWN + 2)]
    assert all(isinstance(stage, Stage) and stage.ended for stage in stages)


def test_engines_and_those_that_were_lost() -> None:
    monitor, kept = Monitor(Shown()), []
    note = monitor.heard(lambda kind, **fields: kept.append(kind))
    note("engine_up", pool="engines", replica=0)
    note("engine_lost", pool="engines", replica=1, error="gone")
    note("engine_lost", pool="judges", replica=0, error="gone")
    note("producer_lost", producer=1, error="gone")
    assert kept == ["engine_up", "engine_lost", "engine_lost", "producer_lost"]
    assert said(monitor).engines == ()
    both = [replica("M1", 30), replica("M1", 5), replica("M0", 0, ready=False)]
    pools = {
        "engines": SimpleNamespace(all=both, ready=both[:2]),
        "judges": SimpleNamespace(all=[replica("judge", 0)], ready=[]),
    }
    monitor.follow(SimpleNamespace(replicas=pools, producers=SimpleNamespace(number=2)))
    assert said(monitor).engines == (
        PoolPulse(name="engines", ready=2, wanted=3, lost=1, queued=35, held=("M1",)),
        PoolPulse(name="judges", ready=0, wanted=1, lost=1),
        PoolPulse(name="producers", ready=2, wanted=2, lost=1),
    )


class Made:
    """A recipe whose groups are there."""

    width = 1

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, list[Pulse]()

    async def group(self, engines: Engines, task: Task) -> Group:
        await asyncio.sleep(0)
        self.seen.append(self.look())
        return made_for(task.prompt.id)

    def requests(self, prompts: int) -> dict[Any, int]:
        return {"actor": prompts}


def test_the_buffer_and_the_group_that_was_finished_last() -> None:
    monitor = Monitor(Shown())
    run = run_of(SimpleNamespace(slots=1))
    monitor.follow(SimpleNamespace(replicas={}, producers=None), run)
    recipe = Made(lambda: said(monitor))
    names = ("tea", "milk", "rum", "ale", "gin", "soup")
    tasks = [Task(iteration=0, prompt=Prompt(id=name, text=name)) for name in names]

    async def story() -> None:
        await run.groups(await run.load(model("M0")), recipe, tasks)

    asyncio.run(story())
    assert recipe.seen[0].buffer == (Filling(iteration=0, by="M0", groups=0, of=6, pairs=0),)
    assert recipe.seen[0].sample is None
    assert {seen.buffer[0].groups for seen in recipe.seen} > {0, 2}
    last = said(monitor)
    assert last.buffer == (Filling(iteration=0, by="M0", groups=6, of=6, pairs=0),)
    assert last.sample is not None
    assert (last.sample.group, last.sample.reason) == ("00/soup", "equal scores")
    run.finished(0)  # its file is gone
    after = said(monitor)
    assert (after.buffer, after.sample) == ((), last.sample)


def test_what_is_said_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "EVERY_S", 0.01)
    store, saying = RunFolder(tmp_path), {"stages": []}

    def doing() -> Any:
        if "broken" in saying:
            raise KeyError
        return saying

    with alive.noted_alive(store, doing):
        until(lambda: "stages" in store.note("alive"))
        saying["broken"] = []
        until(lambda: "stages" not in store.note("alive"))  # it goes on, and says who it is
        before = store.note("alive")
        assert before.keys() == {"host", "pid", "at"}
        until(lambda: store.note("alive")["at"] > before["at"])
    assert not (tmp_path / "alive.json").exists()


def until(true: Any) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
