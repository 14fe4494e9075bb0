"""What a run exports: from its folder, its engines and its screen, into metrics that Ray would serve."""

import asyncio
import json
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.runtime.metrics import COUNTERS, GAUGES, Counting, Meters, Watcher, exported
from rsrlm.store.folder import RunFolder
from rsrlm.store.followed import Followed

Seen = dict[tuple[str, str], float]


class Fake:
    """A metric that remembers its values by tag."""

    def __init__(self, seen: Seen, name: str, tags: tuple[str, ...], counts: bool) -> None:
        self.seen, self.name, self.keys, self.counts = seen, name, tags, counts

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.counts
        self._add(value + self.seen.get((self.name, self._tag(tags)), 0.0), tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert not self.counts
        self._add(value, tags)

    def _tag(self, tags: dict[str, str]) -> str:
        assert set(tags) == set(self.keys)
        assert tags["run"] == "mine"
        return next((tag for key, tag in tags.items() if key != "run"), "")

    def _add(self, value: float, tags: dict[str, str]) -> None:
        self.seen[self.name, self._tag(tags)] = value


@pytest.fixture
def seen() -> Seen:
    return {}


@pytest.fixture
def meters(seen: Seen) -> Meters:
    return Meters("mine", lambda name, text, tags, counts: Fake(seen, name, tags, counts))


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def watcher(meters: Meters, store: RunFolder, make_config: Any) -> Watcher:
    return Watcher(meters, make_config(iterations=2), store)


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_events(watcher: Watcher, store: RunFolder, seen: Seen) -> None:
    store.event("engine_up", pool="engines", replica=0, seconds=3.0)
    store.event("engine_up", pool="engines", replica=1, seconds=3.0)
    store.event("engine_lost", pool="engines", replica=1, error="gone")
    store.event("engine_restarted", pool="engines", replica=1, version="M0")
    store.event("group", g="00/a", pairs=["00/a/0>1", "00/a/2>1"], reason=None)
    store.event("group", g="00/b", pairs=[], reason="equal scores")
    store.event("step", iteration=0, step=0, loss=0.7, pairs=["00/a/0>1"])
    store.event("published", version="M1", replicas=[{"replica": 1, "total": 2.5}])
    store.event("alarm", iteration=0, sign="kl_per_token", value=3.0, action="warn")
    watcher.look()
    watcher.look()  # counts nothing twice
    assert {key: value for key, value in seen.items() if key[0] in COUNTERS} == {
        ("rsrlm_engines_up", "engines"): 2,
        ("rsrlm_engines_lost", "engines"): 1,
        ("rsrlm_engines_restarted", "engines"): 1,
        ("rsrlm_groups", "yes"): 1,
        ("rsrlm_groups", "no"): 1,
        ("rsrlm_pairs", ""): 2,
        ("rsrlm_steps", ""): 1,
        ("rsrlm_alarms", "kl_per_token"): 1,
    }
    assert seen["rsrlm_publish_seconds", "1"] == 2.5
    store.event("group", g="00/c", pairs=["00/c/0>1"], reason=None)
    watcher.look()
    assert (seen["rsrlm_groups", "yes"], seen["rsrlm_pairs", ""]) == (2, 3)


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    followed = Followed(tmp_path / "lines")
    assert list(followed.lines()) == []
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n{"b"')
    assert list(followed.lines()) == [{"a": 1}]
    with (tmp_path / "lines").open("ab") as stream:
        stream.write(b': 2}\nbroken\n{"c": 3}\n')
    assert list(followed.lines()) == [{"b": 2}, {"c": 3}]
    assert list(followed.lines()) == []


def test_steps_and_iterations(watcher: Watcher, store: RunFolder, seen: Seen) -> None:
    write(store.iteration(0) / "steps.jsonl", {"step": 0, "loss": 0.7}, {"step": 1, "loss": 0.6, "accuracy": 0.75})
    watcher.look()
    assert seen["rsrlm_step", "loss"] == 0.6
    assert seen["rsrlm_step", "accuracy"] == 0.75
    assert seen["rsrlm_iteration", ""] == 0
    row = {
        "judgements": 8,
        "judgements_unreadable": 2,
        "mean_score": 2.5,
        "mean_margin": None,
        "stage_seconds": {"train": 4.0},
        "signs": {"saturated": 0.5, "score_drift": None},
        "learner": {"train_seconds": 3.5},
        "published": {"seconds": 0.5},
        "heldout": {"kl_to_first": {"per_token": 0.1}, "score_by_first": {"mean": 2.0}},
    }
    (store.iteration(0) / "metrics.json").write_text(json.dumps(row))
    write(store.iteration(1) / "steps.jsonl", {"step": 0, "loss": 0.5})
    watcher.look()
    assert seen["rsrlm_iteration", ""] == 1
    assert seen["rsrlm_stage_seconds", "train"] == 4.0
    assert {tag: value for (name, tag), value in seen.items() if name == "rsrlm_sign"} == {"saturated": 0.5}
    assert {tag: value for (name, tag), value in seen.items() if name == "rsrlm_result"} == {
        "mean_score": 2.5,
        "unreadable_share": 0.25,
        "kl_to_first": 0.1,
        "heldout_score_by_first": 2.0,
        "train_seconds": 3.5,
        "publish_seconds": 0.5,
    }
    assert seen["rsrlm_step", "loss"] == 0.5


def test_engines(watcher: Watcher, seen: Seen) -> None:
    def replica(index: int, version: str, outstanding: int) -> Any:
        return SimpleNamespace(index=index, version=version, outstanding=outstanding)

    everyone = [replica(0, "M1", 100), replica(1, "M0", 20), replica(2, "", 0)]
    replicas = SimpleNamespace(name="engines", all=everyone, ready=everyone[:2])

    async def stats() -> dict[str, float]:
        return {"generation_tokens": 7.0}

    async def main() -> None:
        pools = SimpleNamespace(all=[SimpleNamespace(replicas=replicas)], stats=stats)
        watcher.follow(pools, asyncio.get_running_loop())
        await asyncio.to_thread(watcher.look)

    asyncio.run(main())
    watcher.look()  # after the loop's end there are none to look at
    assert seen["rsrlm_engines_wanted", "engines"] == 3
    assert seen["rsrlm_engines_ready", "engines"] == 2
    assert seen["rsrlm_queue_tokens", "engines"] == 120
    assert seen["rsrlm_engine_counter", "generation_tokens"] == 7
    held = {tag: value for (name, tag), value in seen.items() if name == "rsrlm_engine_weights"}
    assert held == {"engines/0": 1, "engines/1": 0}  # the third holds nothing yet


def test_endpoints(watcher: Watcher, store: RunFolder, seen: Seen) -> None:
    store.write_note("endpoint-judge", {"cost": 1.5, "requests": 3})
    watcher.look()
    assert seen["rsrlm_endpoint", "judge/cost"] == 1.5


def test_the_screen_is_counted(meters: Meters, seen: Seen) -> None:
    told: list[Any] = []

    @contextmanager
    def stage(title: str, totals: dict[str, int]) -> Any:
        yield lambda *arguments: told.append((title, *arguments))

    screen = Counting(SimpleNamespace(stage=stage, line=told.append), meters)
    with screen.stage("iteration 0", {"respond": 8}) as tick:
        tick("respond", 1, 24)
        tick("respond", 2, 0)
    screen.line("hello")
    assert told == [("iteration 0", "respond", 1, 24), ("iteration 0", "respond", 2, 0), "hello"]
    assert (seen["rsrlm_answers", "respond"], seen["rsrlm_tokens", "respond"]) == (3, 24)


def test_a_look_that_fails_is_no_matter_of_the_run(meters: Meters, watcher: Watcher, seen: Seen) -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())
        raise OSError("the disk is full")

    watcher.look = look  # type: ignore[method-assign]
    with exported(meters, watcher, every_s=0.01):
        assert seen["rsrlm_running", ""] == 1
        deadline = time.monotonic() + 5
        while len(looks) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        before = len(looks)
    assert before >= 2
    assert seen["rsrlm_running", ""] == 0


def test_the_last_look_is_at_the_end(meters: Meters, watcher: Watcher, store: RunFolder, seen: Seen) -> None:
    with exported(meters, watcher, every_s=60):
        store.event("step", iteration=0, step=0, loss=0.7, pairs=[])
    assert seen["rsrlm_steps", ""] == 1


def test_names() -> None:
    """Prometheus has no room for others, and Ray discards them without a word."""
    for name, (text, tag) in {**COUNTERS, **GAUGES}.items():
        assert name.startswith("rsrlm_")
        assert name.replace("_", "").isalnum()
        assert not name.endswith("_total")  # Prometheus' word for counters
        assert text
        assert tag != "run"
