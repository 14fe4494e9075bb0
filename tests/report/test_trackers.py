"""Trackers: what they are given by runs that are killed anywhere, and what the real ones have of it when it is read
back. No key is in the environment, and nobody is there to answer a prompt."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from metric_names import REAL, never_logged, undocumented
from rich.console import Console
from spine import World, sections
from test_iterative import start

from rsrlm.commands import running
from rsrlm.records import Example, Prompt
from rsrlm.report.progress import Report
from rsrlm.report.trackers import following, wandb
from rsrlm.report.trackers.base import Row, Tracked, flat, numbers
from rsrlm.report.trackers.following import Follower, Following, check, follow
from rsrlm.report.trackers.mlflow import MlflowTracker
from rsrlm.report.trackers.rows import Rows
from rsrlm.report.trackers.samples import COLUMNS, samples_of
from rsrlm.report.trackers.tensorboard import TensorBoardTracker, markdown
from rsrlm.settings.base import ConfigError
from rsrlm.settings.trackers import Mlflow, TensorBoard, Trackers, Wandb
from rsrlm.store.folder import RunFolder

PROMPTS = [Prompt(id=f"p{number}", text=f"Say {number}.") for number in range(6)]
HELDOUT = [Prompt(id=f"h{number}", text=f"Tell {number}.") for number in range(2)]
VALIDATION = [Prompt(id=f"v{number}", text=f"Show {number}.") for number in range(30)]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setattr("sys.stdin", None)


@pytest.fixture
def world(make_config: Any) -> Callable[..., World]:
    """Two iterations of three prompts, three optimizer steps each."""

    def make(over: dict[str, Any] | None = None, **changes: Any) -> World:
        defaults: dict[str, Any] = {
            "iterations": 2,
            "sample": {"responses": 3, "max_tokens": 24},
            "judge": {"kind": "text", "judgements": 2, "max_tokens": 60},
            "prompts": {"per_iteration": 3, "validation": len(VALIDATION)},
            "train": {"checkpoint_every_steps": 2, "pairs_per_step": 1},
        }
        return World(make_config(**sections(defaults, changes)), PROMPTS, HELDOUT, VALIDATION, **(over or {}))

    return make


@pytest.fixture
def done(world: Callable[..., World]) -> World:
    made = world()
    made.start()
    return made


class Recorder:
    """A tracker in memory, which outlives the process of the run. `fail` says of its rows after which of them it
    breaks, having taken them."""

    name = "recorder"
    where = "in memory"

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.opened, self.statuses = 0, list[str]()
        self.fail: Callable[[Row], bool] = lambda _: False
        self.error = "no answer"

    def open(self) -> int:
        self.opened += 1
        return self.rows[-1].position + 1 if self.rows else 0

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            if self.fail(row):
                raise OSError(self.error)

    def close(self, status: str) -> None:
        self.statuses.append(status)


def quiet() -> Report:
    return Report(Console(file=StringIO()))


def said(report: Report) -> str:
    file = report.console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def run_of(made: World) -> Tracked:
    return Tracked(id="0a1b", name=made.config.name, folder=made.store.folder, config={"train": {"lr": 0.1}, "n": [1]})


def sent(tracker: Any, store: RunFolder, status: str = "completed") -> None:
    """What a start of a run leaves in a tracker."""
    follower = Follower(tracker, store, print)
    follower.look(status)
    assert follower.closed


def places(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    return [(row.kind, row.at, row.position) for row in rows]


TWO = [("train", 0, 0), ("train", 1, 1), ("train", 2, 2), ("iteration", 0, 3)]
TWO += [("train", 3, 4), ("train", 4, 5), ("train", 5, 6), ("iteration", 1, 7)]


# -- what is logged ------------------------------------------------------------------------------------------------


def test_numbers_have_the_names_of_where_they_stand() -> None:
    found = numbers(
        {
            "pairs": 3, "mean_score": None, "model": "M1", "cut": True, "list": [1], "signs": {"n": 2.5, "a": {"b": 1}},
            "heldout": {"duel_with_M0": {"win": 0.5}}, "reasons": {"no line / such as 'x'": 4, "../a": 1},
        }
    )  # fmt: skip
    assert found == {
        "iteration/pairs": 3,
        "signs/n": 2.5,
        "signs/a/b": 1,
        "heldout/duel/win": 0.5,
        "reasons/no line/such as _x_": 4,
        "reasons/a": 1,
    }
    assert numbers({"loss": 1, "judge/margin": 2}, "train") == {"train/loss": 1, "train/judge/margin": 2}
    assert flat({"a": {"b": 1, "c": []}, "d": [{"e": None}]}) == {"a.b": 1, "a.c": [], "d.0.e": None}


def test_rows_of_a_run(done: World) -> None:
    rows = list(Rows(done.store, 0).new())
    assert places(rows) == TWO
    step = rows[5].numbers
    assert (step["train/step"], step["train/iteration"], step["train/dpo_loss"]) == (4, 1, pytest.approx(0.6))
    assert "train/pair_ids" not in step
    assert rows[7].numbers["iteration/number"] == 1
    metrics = done.store.metrics()[1]
    assert rows[7].numbers["heldout/duel/win"] == metrics["heldout"]["duel_with_M1"]["win"]
    assert rows[7].numbers["iteration/mean_score"] == metrics["mean_score"]
    assert rows[3].numbers["heldout_first/score_by_first/n"] == 2
    assert not any(name.startswith("heldout_first") for name in rows[7].numbers)
    assert [len(row.samples) for row in rows] == [0, 0, 0, 9, 0, 0, 0, 9]
    assert [len(row.samples) for row in Rows(done.store, 4).new()] == [0] * 7 + [9]


def test_samples_say_what_was_chosen(done: World, tmp_path: Path) -> None:
    found = samples_of(done.store.iteration(0), 0)
    first = [one for one in found if one["prompt_id"] == "p0"]
    assert tuple(first[0]) == COLUMNS
    assert [(one["response"], one["used"]) for one in first] == [
        ("00/p0/0", "rejected"),
        ("00/p0/1", ""),
        ("00/p0/2", "chosen"),
    ]
    # Of two judgements of M0 the first is a point below the second.
    assert [one["score"] for one in first] == [0, 0.5, 1.5]
    assert first[2]["text"] == "M0 as 2."
    assert first[2]["prompt"] == "Say 0."
    assert first[2]["judgement"] == "Number 0.\nScore: 1"
    assert samples_of(tmp_path, 0) == []
    damaged = done.store.iteration(0) / "responses.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert samples_of(done.store.iteration(0), 0) == []


def test_a_script_in_a_response_is_text() -> None:
    shown = markdown(
        [{"prompt_id": "p", "prompt": "Say.", "response": "0", "text": "<script>\nx", "score": None, "used": ""}]
    )
    assert shown == "### `p`\n\n    Say.\n\n`0`, no score\n\n    <script>\n    x"


# -- runs that are killed, trackers that fail ----------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["iterative", "online"])
def test_whenever_a_run_is_killed_every_row_is_logged_once(clock: str, world: Callable[..., World]) -> None:
    undisturbed = world(name="undisturbed", clock=clock)
    undisturbed.start()
    whole = list(Rows(undisturbed.store, 0).new())
    assert places(whole) == TWO
    made, tracker, seen = world(name="killed", clock=clock), Recorder(), [0]

    def follow_and_kill(follower: Follower, at: int) -> Callable[[str], bool]:
        left = [at]

        def kill(_: str) -> bool:
            left[0] -= 1
            seen[0] += 1
            if seen[0] % 3:  # it has not looked at all of what a kill leaves
                follower.look()
            return left[0] == 0

        return kill

    for at in range(7, 400, 5):  # each start gets a little further
        made.kill = follow_and_kill(Follower(tracker, made.store, print), at)
        if start(made, seed=at):
            break
    assert tracker.opened > 5
    sent(tracker, made.store)
    assert places(tracker.rows) == TWO
    for row, other in zip(tracker.rows, whole, strict=True):
        apart = ("seconds", "replayed")
        assert {key: value for key, value in row.numbers.items() if not any(word in key for word in apart)} == {
            key: value for key, value in other.numbers.items() if not any(word in key for word in apart)
        }
        assert [{**one, "text": ""} for one in row.samples] == [{**one, "text": ""} for one in other.samples]


def test_a_row_that_was_taken_before_the_kill_is_not_logged_again(done: World) -> None:
    """The tracker has it, and the process is gone before it hears so."""
    tracker = Recorder()
    for position in (3, 3, 5):
        tracker.fail = lambda row, last=position: row.position == last  # type: ignore[misc]
        Follower(tracker, done.store, lambda _: None).look()
    tracker.fail = lambda _: False
    sent(tracker, done.store, "interrupted")
    sent(tracker, done.store)
    assert places(tracker.rows) == TWO
    assert tracker.statuses == ["interrupted", "completed"]


def test_steps_that_are_done_again_are_the_rows_that_they_were(tmp_path: Path, world: Callable[..., World]) -> None:
    store = world().store
    log, rows = store.steps(0), Rows(store, 0)
    for number in range(4):
        log.add({"step": number, "loss": 1.0 - number / 10})
    assert places(list(rows.new())) == [("train", number, number) for number in range(4)]
    log.keep_before(2)
    for number in range(2, 6):
        log.add({"step": number, "loss": 9.0})
    again = list(rows.new())
    assert [(row.at, row.numbers["train/loss"]) for row in again] == [(4, 9.0), (5, 9.0)]
    # A damaged file: what it has lost is waited for until the iteration is finished, and passed over then.
    (store.iteration(0) / "steps.jsonl").write_text('{"step": 0}\nbroken\n{"step": 2}\n')
    rows = Rows(store, 0)
    assert [row.at for row in rows.new()] == [0]
    store.write_metrics(0, {"iteration": 0, "optimizer_steps": 2})
    assert places(list(rows.new())) == [("train", 2, 2), ("iteration", 0, 3)]


def test_a_tracker_that_fails_is_told_of_once_and_tried_again(done: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "AGAIN_S", 0.0)
    tracker, lines = Recorder(), list[str]()
    tracker.fail = lambda row: row.position in (1, 5)
    follower = Follower(tracker, done.store, lines.append)
    for _ in range(4):
        follower.look()
    assert places(tracker.rows) == TWO
    assert lines == ["recorder: in memory", "recorder: no answer; the run goes on, and it is tried again"]
    monkeypatch.setattr(following, "AGAIN_S", 60.0)
    tracker.rows.clear()
    tracker.fail = lambda _: True
    follower = Follower(tracker, done.store, lines.append)
    follower.look()
    follower.look()  # too early
    assert len(tracker.rows) == 1
    follower.look("completed")  # the last look is made in any case
    assert len(tracker.rows) == 2
    assert not follower.closed


def test_no_password_is_said(done: World) -> None:
    tracker, lines = Recorder(), list[str]()
    tracker.where = "http://me:secret@host:1/#/x"
    tracker.fail, tracker.error = (lambda _: True), "http://me:secret@host:1/api: no answer"
    Follower(tracker, done.store, lines.append).look("completed")
    assert lines == [
        "recorder: http://host:1/#/x",
        "recorder: http://host:1/api: no answer; the run goes on, and it is tried again",
    ]


def test_a_tracker_that_hangs_holds_up_nobody(done: World) -> None:
    class Hanging(Recorder):
        name = "hanging"

        def log(self, rows: Sequence[Row]) -> None:
            never.wait()

    never, hanging, other, report = threading.Event(), Hanging(), Recorder(), quiet()
    followers = [Follower(one, done.store, report.line) for one in (hanging, other)]
    following = Following(followers, done.store, report, every_s=0.01)
    deadline = time.monotonic() + 60
    while len(other.rows) < len(TWO):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = time.monotonic()
    following.end("completed", limit_s=0.5)
    assert 0.4 < time.monotonic() - started < 20
    never.set()
    assert f"hanging lacks rows of this run; `rsrlm resume {done.store.folder}` sends them" in said(report)
    assert places(other.rows) == TWO


# -- config --------------------------------------------------------------------------------------------------------


def test_true_takes_the_defaults() -> None:
    assert Trackers.model_validate({"wandb": True, "mlflow": False}) == Trackers(wandb=Wandb(project="rsrlm"))
    assert Trackers.model_validate({"tensorboard": {}}) == Trackers(tensorboard=TensorBoard())


def test_a_missing_package_is_said_before_anything_starts(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(trackers={"mlflow": True})
    check(config)
    monkeypatch.setattr(following, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^trackers.mlflow: mlflow is not installed; pip install 'rsrlm\[trackers\]'"
    ):
        check(config)
    check(make_config())


def test_a_run_without_trackers_has_no_thread_and_notes_nothing(done: World) -> None:
    threads = threading.active_count()
    following = follow(done.config, done.store, quiet())
    assert threading.active_count() == threads
    following.end("completed")
    assert "tracker_id" not in done.store.note("start")


def test_a_finished_run_is_sent_to_a_tracker_that_was_not_there_before(done: World) -> None:
    config = done.config.model_copy(update={"trackers": Trackers(tensorboard=TensorBoard())})
    for _ in range(2):
        assert running.run(config, quiet(), or_resume=True) == 0
        assert scalars(done.store.folder / "tensorboard")["iteration/number"] == [(0, 0.0), (1, 1.0)]


# -- the real ones -------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [(one.step, one.tensor_proto.string_val[0].decode()) for one in read.Tensors(tag)]


def test_tensorboard_has_each_row_once_after_a_kill_that_breaks_a_record_off(done: World) -> None:
    folder = done.store.folder / "tensorboard"
    tracker = TensorBoardTracker(run_of(done), TensorBoard())
    assert tracker.open() == 0
    tracker.log(list(Rows(done.store, 0).new())[:6])
    (file,) = folder.glob("*")
    file.write_bytes(file.read_bytes()[:-9])  # within the row of step 4
    again = TensorBoardTracker(run_of(done), TensorBoard())
    assert again.open() == 5
    sent(TensorBoardTracker(run_of(done), TensorBoard()), done.store, "interrupted")
    sent(TensorBoardTracker(run_of(done), TensorBoard()), done.store)
    files = len(list(folder.glob("*")))
    sent(TensorBoardTracker(run_of(done), TensorBoard()), done.store)  # nothing is new
    assert len(list(folder.glob("*"))) == files
    found = scalars(folder)
    assert [step for step, _ in found["train/dpo_loss"]] == [0, 1, 2, 3, 4, 5]
    assert [value for _, value in found["train/dpo_loss"]] == pytest.approx([0.7, 0.6, 0.5] * 2)
    assert [step for step, _ in found["iteration/mean_score"]] == [0, 1]
    assert texts(folder, "config") == [(0, "```\ntrain:\n  lr: 0.1\nn:\n- 1\n\n```")]
    assert texts(folder, "status") == [(1, "interrupted"), (1, "completed")]
    (step, sample), _ = texts(folder, "samples")
    assert step == 0
    assert "### `p0`\n\n    Say 0.\n\n`00/p0/0`, score 0.00, **rejected**\n\n    M0 as 0." in sample


def test_tensorboard_on_a_disk_that_is_full_for_a_while(done: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "AGAIN_S", 0.0)
    lines = list[str]()
    follower = Follower(TensorBoardTracker(run_of(done), TensorBoard()), done.store, lines.append)
    with small_disk(1500):
        follower.look()
        follower.look()
    assert "; the run goes on" in lines[-1]
    follower.look("completed")
    assert follower.closed
    found = scalars(done.store.folder / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in found["iteration/number"]] == [0, 1]


def test_a_folder_for_all_runs_keeps_them_apart(done: World, tmp_path: Path) -> None:
    sent(TensorBoardTracker(run_of(done), TensorBoard(folder=str(tmp_path / "board"))), done.store)
    (found,) = (tmp_path / "board").iterdir()
    assert found.name == f"{done.config.name}-0a1b"


def history(folder: Path) -> list[dict[str, Any]]:
    """What the offline files of a run have, in the order of their times; wandb's own messages, as it wrote them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in wandb.records_in(path):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = {(one.key or "/".join(one.nested_key)): one.value_json for one in record.history.item}
                found.append({name: json.loads(value) for name, value in items.items()})
    return found


KILLED = """
import os, sys, time
from rsrlm.report.trackers import wandb
from rsrlm.report.trackers.base import Row, Tracked
from rsrlm.settings.trackers import Wandb
from pathlib import Path

tracker = wandb.WandbTracker(Tracked(id="0a1b", name="x", folder=Path(sys.argv[1]), config={}), Wandb())
first, last = int(sys.argv[2]), int(sys.argv[3])
held = tracker.open()
assert held <= first, held
numbers = {f"train/number {n}": n / 7 for n in range(40)}
tracker.log([
    Row(kind="train", at=n, position=n, numbers={"train/step": n, **numbers}) for n in range(held, last)
])
print(held, flush=True)
if last < 200:
    (file,) = Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")
    while file.stat().st_size < 1 << 16:  # wandb has written two blocks
        time.sleep(0.05)
    os.kill(os.getpid(), 9)
tracker.close("completed")
"""


def test_wandb_offline_goes_on_under_its_id_after_a_kill(tmp_path: Path) -> None:
    """Without a key, without anybody at a terminal; more than a block of its file, whose end the kill takes away."""
    env = {**os.environ, "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0"}
    held = []
    for first, last in ((0, 150), (150, 200)):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(first), str(last)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False, env=env
        )
        assert done.returncode == (-signal.SIGKILL if last < 200 else 0), done.stderr
        held.append(int(done.stdout.splitlines()[-1]))
    assert held[0] == 0
    assert 0 < held[1] < 150  # else the test has shown nothing
    assert len(list((tmp_path / "wandb").glob("offline-run-*-0a1b"))) == 2
    rows = history(tmp_path / "wandb")
    assert [row["_step"] for row in rows] == list(range(200))
    assert [row["train/step"] for row in rows] == list(range(200))
    assert rows[199]["train/number 39"] == 39 / 7


def test_wandb_has_a_table_of_samples(done: World) -> None:
    sent(wandb.WandbTracker(run_of(done), Wandb()), done.store)
    folder = done.store.folder / "wandb"
    rows = history(folder)
    assert [row["_step"] for row in rows] == list(range(8))
    assert rows[3]["samples/_type"] == "table-file"
    assert [json.loads(path.read_text())["columns"] for path in folder.rglob("*.table.json")] == [list(COLUMNS)] * 2
    (path,) = (folder / "latest-run").glob(f"files/{rows[3]['samples/path']}")
    table = json.loads(path.read_text())
    assert table["data"][2] == list(samples_of(done.store.iteration(0), 0)[2].values())


def mlflow_has(uri: str, run: str) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("rsrlm").experiment_id], f"tags.rsrlm_id = '{run}'")
    identifier = found.info.run_id
    table = json.loads(Path(client.download_artifacts(identifier, "samples/00.json")).read_text())
    return {
        "losses": [(one.step, one.value) for one in client.get_metric_history(identifier, "train/dpo_loss")],
        "scores": [one.step for one in client.get_metric_history(identifier, "iteration/mean_score")],
        "params": found.data.params,
        "status": found.info.status,
        "tag": found.data.tags["status"],
        "samples": len(table["data"]),
        "columns": table["columns"],
    }


def killed_and_resumed(make: Callable[[], MlflowTracker], store: RunFolder) -> None:
    tracker = make()
    assert tracker.open() == 0
    rows = list(Rows(store, 0).new())
    tracker.log(rows[:3])
    tracker._samples(rows[3])  # and killed before the numbers of the row
    again = make()
    assert again.open() == 3
    sent(make(), store, "interrupted")
    assert make().open() == len(rows)
    sent(make(), store)


HAS = {
    "losses": [(step, pytest.approx(0.7 - 0.1 * (step % 3))) for step in range(6)],
    "scores": [0, 1],
    "params": {"train.lr": "0.1", "n.0": "1"},
    "status": "FINISHED",
    "tag": "completed",
    "samples": 9,
    "columns": list(COLUMNS),
}


def test_mlflow_in_a_file_beside_the_run(done: World) -> None:
    killed_and_resumed(lambda: MlflowTracker(run_of(done), Mlflow()), done.store)
    assert mlflow_has(f"sqlite:///{done.store.folder.parent / 'mlflow.db'}", "0a1b") == HAS


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on this machine."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [f"--backend-store-uri=sqlite:///{tmp_path}/server.db", f"--artifacts-destination={tmp_path}/artifacts"]
    log = (tmp_path / "server.log").open("w")
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        [*command, *store], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.full
def test_mlflow_with_a_server(done: World, server: str) -> None:
    killed_and_resumed(lambda: MlflowTracker(run_of(done), Mlflow(uri=server)), done.store)
    assert mlflow_has(server, "0a1b") == HAS


@pytest.mark.parametrize("silent", [False, True])
def test_an_mlflow_server_that_is_gone_costs_seconds(
    silent: bool, done: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses the connection, and one that takes it and says nothing."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    lines = list[str]()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        if silent:
            one.listen()
        uri = f"http://127.0.0.1:{one.getsockname()[1]}"
        started = time.monotonic()
        follower = Follower(MlflowTracker(run_of(done), Mlflow(uri=uri)), done.store, lines.append)
        follower.look("completed")
    assert not follower.closed
    assert time.monotonic() - started < 20
    assert len(lines) == 1
    assert lines[0].endswith("; the run goes on, and it is tried again")


# -- the documentation ---------------------------------------------------------------------------------------------

# Of the losses that the learner of these runs has not.
LOSSES = ("tokens_trained", "examples", "sft_loss", "teacher_ce", "student_ce", "kl", "student_right")
LOSSES += ("actor/margin", "judge/margin")


def test_the_names_in_the_documentation_are_those_that_are_logged(world: Callable[..., World]) -> None:
    """But for what no scripted engine or learner can measure."""
    rewarding = world(name="rewarding", recipe="meta_rewarding", evaluate={"duel": True})
    rewarding.endpoints = {name: {"requests": 3, "cost": 0.1} for name in ("judge", "validator")}
    chosen = world(name="chosen", train={"choose": "score", "candidate_every_steps": 1})
    files = {
        "x.jsonl": [Example(id=f"x{n}", kind="ift", prompt_token_ids=(1,), target_token_ids=(n,)) for n in range(9)]
    }
    source = {"path": "x.jsonl", "weight": 1.0}
    tuned = world({"files": files}, name="tuned", steps=[{"recipe": "sft", "sources": [source]}], iterations=1)
    online = world(name="online", clock="online")
    logged = {f"train/{name}" for name in LOSSES}
    for made in (rewarding, chosen, tuned, online):
        made.start()
        logged |= {name for row in Rows(made.store, 0).new() for name in row.numbers}
    recipes = Path(__file__).parents[2] / "rsrlm" / "recipes"
    of_recipes = {
        name for path in recipes.glob("*.py") for name in re.findall(r'measures ?= ?{"(\w+)"', path.read_text())
    }
    logged |= {f"{name}/x" for name in of_recipes}
    logged |= {f"iteration/{kind}_{name}_last" for kind in ("actor", "judge") for name in ("accuracy", "margin")}
    logged |= {"dropped/x", "unreadable_reasons/x", "no_pair_reasons/x"}
    assert undocumented(logged) == set()
    assert never_logged(logged) == REAL
