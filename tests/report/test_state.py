"""How a run stands by its folder, at every stage of it: files by hand, whole, torn, or of another version."""

import json
import math
import os
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from samples import PAIR, made_for, response

from rsrlm.records import Group
from rsrlm.report import heartbeat
from rsrlm.report.pulse import SHOWN_CHARS, sample_of
from rsrlm.report.state import RunReader, State
from rsrlm.settings.base import ConfigError
from rsrlm.store.buffer import Buffer, receipt_of
from rsrlm.store.folder import LAYOUT, RunFolder
from rsrlm.store.followed import Followed
from rsrlm.store.items import Segment

CONFIG = "name: x\niterations: 3\nrecipe: self_rewarding\nclock: {kind: iterative}\n"
ONLINE = "name: x\niterations: 9\nrecipe: oaif\nclock: {kind: online, lag: 1}\n"


class Clock:
    """Ours, and how far that of the run's host is ahead of it."""

    def __init__(self) -> None:
        self.passed, self.at = 0.0, time.time()

    def time(self) -> float:
        return self.at + self.passed

    def monotonic(self) -> float:
        return self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(time=clock.time, monotonic=clock.monotonic))
    return clock


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    return run_at(tmp_path / "run", CONFIG)


def run_at(folder: Path, config: str) -> RunFolder:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    return RunFolder(folder)


def alive(store: RunFolder, at: float, **doing: Any) -> None:
    store.write_note("alive", {"host": "head", "pid": 12, "at": at, **doing})


def look(store: RunFolder) -> State:
    return RunReader(store.folder).look()


def append(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": loss, "pair_ids": [], **more}


# -- who runs --------------------------------------------------------------------------------------------------------


def test_what_was_never_begun(store: RunFolder, clock: Clock) -> None:
    state = look(store)
    assert (state.status, state.goes_on, state.finished, state.iterations) == ("starting", True, 0, 3)
    assert (state.pulse, state.sample, state.step, state.losses, state.began) == (None, None, {}, (), None)
    clock.passed += heartbeat.STARTS_S + 1
    assert look(store).status == "killed"


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed", "no_pairs", "stopped"])
def test_how_it_ended(store: RunFolder, clock: Clock, status: str) -> None:
    store.write_summary({"status": status, "iterations": [], "reason": "why"})
    store.event("run_ended", status=status)
    alive(store, clock.time())  # still there, or left by a copy
    state = look(store)
    assert (state.status, state.reason, state.goes_on, state.pulse) == (status, "why", False, None)
    assert state.now == state.event["t"]


def test_it_runs_while_somebody_says_so(store: RunFolder, clock: Clock) -> None:
    store.write_summary({"status": "running", "iterations": []})
    alive(store, clock.time() - 4)
    reader = RunReader(store.folder)
    state = reader.look()
    assert (state.status, round(state.silent_s)) == ("running", 4)
    assert state.pulse is not None
    assert (state.pulse.host, state.pulse.pid, state.pulse.stages) == ("head", 12, ())
    clock.passed += 100
    assert reader.look().status == "killed"
    alive(store, clock.time())  # resumed, or its disk is back
    assert reader.look().status == "running"


def test_a_run_that_was_killed_is_looked_at_twice(store: RunFolder, clock: Clock) -> None:
    store.write_summary({"status": "running", "iterations": []})
    alive(store, clock.time() - 3600)
    reader = RunReader(store.folder)
    assert reader.look().status == "silent"
    clock.passed += heartbeat.LOOK_S
    state = reader.look()
    assert (state.status, state.goes_on, round(state.silent_s)) == ("killed", False, 3605)


@pytest.mark.parametrize("ahead", [-7200.0, 7200.0])
def test_a_host_whose_clock_is_wrong(store: RunFolder, clock: Clock, ahead: float) -> None:
    store.write_summary({"status": "running", "iterations": []})
    alive(store, clock.time() + ahead)
    reader = RunReader(store.folder)
    assert reader.look().status == ("silent" if ahead < 0 else "running")
    clock.passed += 2
    alive(store, clock.time() + ahead)
    assert reader.look().status == "running"
    clock.passed += 7
    state = reader.look()
    assert (state.status, round(state.silent_s)) == ("running", 7)
    assert state.now == pytest.approx(clock.time() + ahead, abs=0.1)  # times of stages are by its clock
    clock.passed += heartbeat.SILENT_S
    assert reader.look().status == "killed"


def test_between_the_last_sign_of_life_and_the_summary(store: RunFolder, clock: Clock) -> None:
    store.write_summary({"status": "running", "iterations": []})
    os.utime(store.folder / "summary.json", (1.0, 1.0))
    os.utime(store.folder / "config.yaml", (1.0, 1.0))
    alive(store, clock.time())
    reader = RunReader(store.folder)
    reader.look()
    clock.passed += 2
    (store.folder / "alive.json").unlink()
    assert reader.look().status == "running"
    store.write_summary({"status": "completed", "iterations": []})
    assert reader.look().status == "completed"


@pytest.mark.parametrize(
    "said", [b"", b"{", b"[1]", b'{"host": 1, "pid": "x"}', b"\xff\xfe", b'{"at": "soon"}', b"[" * 100_000]
)
def test_a_note_that_cannot_be_read(store: RunFolder, clock: Clock, said: bytes) -> None:
    store.write_summary({"status": "running", "iterations": []})
    (store.folder / "alive.json").write_bytes(said)
    state = look(store)
    assert (state.status, state.pulse) == ("running", None)  # for as long as the summary is young


def test_fields_of_a_newer_version_cost_only_themselves(store: RunFolder, clock: Clock) -> None:
    store.write_summary({"status": "running", "iterations": []})
    alive(store, clock.time(), stages="many", weather="fine")
    state = look(store)
    assert state.pulse is not None
    assert (state.pulse.host, state.pulse.stages) == ("head", ())


# -- what is in its files --------------------------------------------------------------------------------------------


def test_no_run_and_one_of_another_version(tmp_path: Path, store: RunFolder) -> None:
    for folder in (tmp_path, tmp_path / "gone", store.folder / "config.yaml"):
        with pytest.raises(ConfigError, match=r"no run here \(no config.yaml\); give the folder of a run"):
            RunReader(folder)
    store.write_note("start", {"layout": LAYOUT})
    RunReader(store.folder)
    store.write_note("start", {"drawn": {}})  # younger layouts are named
    RunReader(store.folder)
    store.write_note("start", {"layout": LAYOUT - 1})
    with pytest.raises(ConfigError, match="begun with another version of rsrlm"):
        RunReader(store.folder)


@pytest.mark.parametrize("text", [b"a: [", b"\xff", b"- 1\n", b""])
def test_half_a_config(store: RunFolder, text: bytes) -> None:
    (store.folder / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config.yaml: .*is the folder still being copied\?"):
        RunReader(store.folder)


def test_the_recipe_of_the_step_that_goes_on(tmp_path: Path) -> None:
    store = run_at(tmp_path / "steps", "steps: [{name: A, recipe: sft}, {name: B, recipe: irpo}]\nrecipe: x\n")
    assert (look(store).recipe, look(store).iterations) == ("sft", 2)
    store.write_metrics(0, {"weight_version": "A"})
    assert look(store).recipe == "irpo"
    store.write_metrics(1, {"weight_version": "B"})
    assert (look(store).recipe, look(store).models) == ("irpo", ("M0", "A", "B"))


def test_events_are_told_once_and_torn_ones_when_they_are_whole(store: RunFolder) -> None:
    path = store.folder / "events.jsonl"
    store.event("ray", address="local")
    store.event("group", g="00/a", pairs=[])
    store.event("alarm", sign="score_length", iteration=0, value=0.6, action="warn")
    append(
        path, b"not json\n", b"[1]\n", b'"x"\n', b'{"event": 3, "t": 1}\n', b'{"event": "x", "t": "now"}\n', b"\xff\n"
    )
    append(path, b'{"t": 5.0, "event": "engi')
    reader = RunReader(store.folder)
    state = reader.look()
    assert [event["event"] for event in state.news] == ["ray", "alarm"]
    assert (state.alarm["sign"], state.event["event"], state.began) == ("score_length", "alarm", state.news[0]["t"])
    append(path, b'ne_lost"}\n')
    state = reader.look()
    assert [event["event"] for event in state.news] == ["engine_lost"]
    assert (state.alarm["sign"], reader.look().news) == ("score_length", ())


def test_a_file_that_another_took_the_place_of_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, {"a": 1}, {"a": 2})
    followed = Followed(path)
    assert list(followed.lines()) == [{"a": 1}, {"a": 2}]
    assert list(followed.lines()) == []
    append(tmp_path / "other", {"b": 1}, {"b": 2}, {"b": 3})
    (tmp_path / "other").replace(path)
    assert list(followed.lines()) == [{"b": 1}, {"b": 2}, {"b": 3}]
    path.write_bytes(b'{"c": 1}\n')  # cut in place
    assert list(followed.lines()) == [{"c": 1}]
    path.unlink()
    assert list(followed.lines()) == []


def test_the_first_look_reads_the_last_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, *({"a": number} for number in range(100)))
    line = len(b'{"a": 99}\n')
    followed = Followed(path, 3 * line - 1)  # cuts the third last one
    assert list(followed.lines()) == [{"a": 98}, {"a": 99}]
    append(path, {"a": 100})
    assert list(followed.lines()) == [{"a": 100}]
    assert [row["a"] for row in Followed(path, 1 << 20).lines()] == list(range(101))


def test_a_gigabyte_is_not_read(store: RunFolder) -> None:
    path = store.folder / "events.jsonl"
    store.event("ray")
    with path.open("r+b") as file:
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write(b"\n")
    store.event("engine_lost", pool="engines")
    reader = RunReader(store.folder)
    tracemalloc.start()
    before = read_bytes()
    assert [event["event"] for event in reader.look().news] == ["engine_lost"]
    assert read_bytes() - before < 40 << 20
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()
    store.event("engine_restarted")
    before = read_bytes()
    assert [event["event"] for event in reader.look().news] == ["engine_restarted"]
    assert read_bytes() - before < 1 << 20


def read_bytes() -> int:
    """By this process, from wherever."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_steps_of_the_newest_training(store: RunFolder) -> None:
    path = store.iteration(0) / "steps.jsonl"
    append(path, step(0, 0.7, margin=0.0), step(1, 0.6), b'{"step": 2, "lo')
    reader = RunReader(store.folder)
    state = reader.look()
    assert (state.training, state.step["step"], state.losses) == (0, 1, (0.7, 0.6))
    append(path, b'ss": NaN}\n', b'{"loss": 1}\n', b'{"step": "3", "loss": 1}\n', step(3, math.inf))
    state = reader.look()
    assert [str(loss) for loss in state.losses] == ["0.7", "0.6", "nan", "inf"]
    # The group was built anew: steps 1 to 3 are lost and come again.
    path.with_name("kept").write_text(json.dumps(step(0, 0.7)) + "\n")
    path.with_name("kept").replace(path)
    append(path, step(1, 0.5))
    assert reader.look().losses == (0.7, 0.5)
    # The iteration is finished, and the next trains first another model and then its own.
    store.write_metrics(0, {"weight_version": "M1"})
    assert reader.look().losses == (0.7, 0.5)
    append(store.iteration(1) / "M2-draft" / "steps.jsonl", step(0, 3.0))
    state = reader.look()
    assert (state.training, state.losses) == (1, (3.0,))
    append(store.iteration(1) / "steps.jsonl", step(0, 2.0))
    os.utime(store.iteration(1) / "M2-draft" / "steps.jsonl", (1.0, 1.0))
    assert reader.look().losses == (2.0,)


def test_how_many_steps_the_training_has(store: RunFolder, clock: Clock) -> None:
    store.write_summary({"status": "running", "iterations": []})
    append(store.iteration(1) / "steps.jsonl", step(0, 0.7))
    store.write_metrics(0, {"weight_version": "M1"})

    def stage(title: str, of: int) -> dict[str, Any]:
        return {"title": title, "began": 1.0, "bars": [{"what": "steps", "done": 1, "of": of}]}

    alive(store, clock.time(), stages=[stage("iteration 0", 5), stage("iteration 1", 7)])
    assert look(store).steps == 7
    alive(store, clock.time(), stages=[stage("iteration 0", 5)])
    assert look(store).steps is None


def test_rounds_are_one_curve_and_lag_behind(tmp_path: Path, clock: Clock) -> None:
    store = run_at(tmp_path / "online", ONLINE)
    store.write_summary({"status": "running", "iterations": []})
    for number, (actor, version) in enumerate([("M0", "M1"), ("M0", "M2"), ("M1", "M2")]):
        append(store.iteration(number) / "steps.jsonl", step(0, 1 - number / 10))
        store.write_metrics(number, {"actor": actor, "weight_version": version})
    reader = RunReader(store.folder)
    state = reader.look()
    assert (state.online, state.models, state.losses) == (True, ("M0", "M1", "M2", "M2"), (1.0, 0.9, 0.8))
    assert state.lag == 1  # round 2 was learnt from by M2, and answered by M1
    # Round 2 had no pairs: M2 is what round 3 is learnt from as well.
    assert (state.behind(3, "M2"), state.behind(3, "M1"), state.behind(4, "M2"), state.behind(0, "M0")) == (0, 2, 1, 0)
    append(store.iteration(3) / "steps.jsonl", step(0, 0.7))
    assert reader.look().losses == (1.0, 0.9, 0.8, 0.7)
    store.write_metrics(3, {"weight_version": "M4"})  # without an actor, as on the iterative clock
    assert reader.look().lag is None


# -- the last response -----------------------------------------------------------------------------------------------


def group() -> Group:
    made = made_for("tea")
    pair = replace(PAIR, chosen_score=0.4321987)
    responses = (made.responses[0], replace(response(1, "chosen"), id="00/tea/1"))
    return replace(made, responses=responses, pairs=(pair,), no_pair_reason="")


def test_what_is_shown_of_a_group() -> None:
    shown = sample_of(group())
    assert shown is not None
    assert (shown.group, shown.prompt, shown.response) == ("00/tea", "About tea?", "chosen")
    assert (shown.score, shown.rejected, shown.reason) == (0.4322, 0.0, "")
    # No pair: the first response, with the mean of what could be read of its judgements.
    plain = sample_of(made_for("tea"))
    assert plain is not None
    assert (plain.score, plain.rejected, plain.reason) == (0.0, None, "equal scores")
    assert sample_of(replace(made_for("tea"), responses=(), judgements=())) is None


def test_a_long_text_and_one_that_no_encoding_has() -> None:
    made = replace(made_for("tea"), responses=(response(0, "a\ud800" + "b" * SHOWN_CHARS),), judgements=())
    shown = sample_of(made)
    assert shown is not None
    assert shown.response == "a?" + "b" * (SHOWN_CHARS - 2) + " ..."
    assert shown.score is None


def test_of_a_run_that_ended_the_tables_tell(store: RunFolder) -> None:
    store.write_summary({"status": "completed", "iterations": []})
    assert look(store).sample is None
    store.write_groups(0, [made_for("milk"), made_for("tea", responses=3)])
    reader = RunReader(store.folder)
    sample = reader.look().sample
    assert sample is not None
    assert (sample.group, sample.prompt, sample.score) == ("00/tea", "About tea?", round(2 / 3, 4))
    store.write_metrics(0, {"weight_version": "M1"})
    (store.iteration(0) / "responses.parquet").unlink()  # it was read once
    assert reader.look().sample == sample
    store.iteration(1).mkdir()
    (store.iteration(1) / "responses.parquet").write_bytes(b"PAR1 half")
    assert reader.look().sample == sample


def test_the_buffer_knows_what_was_put_last(tmp_path: Path) -> None:
    segment, buffer = Segment.another(tmp_path, "groups"), Buffer(["00/a", "00/tea"], tmp_path)
    assert (buffer.finished, buffer.last) == (0, None)
    receipt = receipt_of(group(), segment)
    buffer.put(1, receipt)
    assert (buffer.finished, buffer.last, len(buffer.pairs)) == (1, receipt, 1)
