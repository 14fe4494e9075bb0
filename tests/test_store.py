"""Files that are whole or not there, journals that survive a cut, and Parquet that others read."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from disks import small_disk

from rsrlm.config import dump, load
from rsrlm.settings.base import ConfigError
from rsrlm.store.atomic import sift_lines, write_whole
from rsrlm.store.folder import RunFolder
from rsrlm.store.steps import StepLog

# -- files -------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    with pytest.raises(OSError, match="File too large"), small_disk():
        write_whole(path, b"x" * 5000)
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_whole(path, b"old")
    with pytest.raises(OSError, match="File too large"), small_disk():
        write_whole(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")  # over what the failure left beside it
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"a", []),
        (b"a\n", [b"a"]),
        (b"a\nb", [b"a"]),
        (b"a\n\xc3", [b"a"]),  # cut within a character
        ("ü\u2028\x85\nb\n".encode(), ["ü\u2028\x85".encode(), b"b"]),
    ],
)
def test_whole_lines(tmp_path: Path, content: bytes, lines: list[bytes]) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    found: dict[int, bytes] = {}
    assert sift_lines(path, lambda line, offset: found.setdefault(offset, line), mend=False) == ""
    assert path.read_bytes() == content
    assert sift_lines(path, lambda line, offset: found.setdefault(offset, line)) == ""
    assert list(found.values()) == [line + b"\n" for line in lines]
    whole = b"".join(found.values())
    assert path.read_bytes() == whole
    assert all(whole[offset:].startswith(line) for offset, line in found.items())


# -- journal -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


# -- run folder --------------------------------------------------------------------------------------------------------


def test_a_new_run_folder_holds_its_config(make_config: Any) -> None:
    config = make_config(name="tee")
    store = RunFolder.create(config)
    assert store.folder == config.folder
    opened, again = RunFolder.open(config.folder)
    assert opened.folder == store.folder
    assert yaml.safe_load(dump(again)) == yaml.safe_load(dump(config))
    assert yaml.safe_load((store.folder / "config.yaml").read_text())["train"]["beta"] == 0.1  # a default, written out


def test_a_run_is_never_overwritten(make_config: Any) -> None:
    store = RunFolder.create(make_config(name="tee", seed=1))
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(make_config(name="tee", seed=2))
    assert f"{store.folder} holds a run already; go on with `rsrlm resume {store.folder}`" in str(caught.value)
    assert load(store.folder / "config.yaml").seed == 1


def test_a_folder_that_cannot_be_written(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(make_config(runs=str(tmp_path / "file" / "runs")))
    assert f"run folder {tmp_path / 'file' / 'runs' / 'test'}: Not a directory; choose a folder" in str(caught.value)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "test").write_text("")
    with pytest.raises(ConfigError, match="File exists; choose a folder that you can write with runs=FOLDER"):
        RunFolder.create(make_config())


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no"):
        with pytest.raises(ConfigError, match="no run here"):
            RunFolder.open(folder)


def test_a_run_that_was_moved_goes_on_where_it_is(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.create(make_config()).folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    store, config = RunFolder.open(Path("moved"))
    monkeypatch.chdir("/")  # nothing depends on where it was opened
    assert store.folder == config.folder == tmp_path / "moved"


def test_facts_of_the_start_stay(store: RunFolder) -> None:
    assert store.fix("model", "/models/a") == "/models/a"
    assert store.fix("seed", None) is None
    later = RunFolder(store.folder)
    assert later.fix("model", "/models/b") == "/models/a"
    assert later.fix("seed", 5) is None  # None is a fact as well
    assert later.fix("new", "Tüte") == "Tüte"
    assert RunFolder(store.folder).fix("new", "") == "Tüte"


def test_metrics_stop_where_the_first_is_missing(store: RunFolder) -> None:
    assert store.metrics() == []
    for iteration in (0, 1, 3):
        store.write_metrics(iteration, {"iteration": iteration, "mean": 0.1})
    assert store.metrics() == [{"iteration": 0, "mean": 0.1}, {"iteration": 1, "mean": 0.1}]


def test_summary_and_events(store: RunFolder) -> None:
    assert store.summary() == {}
    store.write_summary({"pairs": 3, "note": "Grüße"})
    assert store.summary() == {"pairs": 3, "note": "Grüße"}
    store.event("group", g="00/tea", reason="a\nb")
    store.event("step", step=1)
    lines = (store.folder / "events.jsonl").read_text().split("\n")
    events = [json.loads(line) for line in lines[:2]]
    assert lines[2:] == [""]
    assert [event.pop("t") > 0 for event in events] == [True, True]
    assert events == [{"event": "group", "g": "00/tea", "reason": "a\nb"}, {"event": "step", "step": 1}]


def test_an_event_on_a_full_disk_leaves_no_half_line(store: RunFolder) -> None:
    store.event("first")
    with pytest.raises(OSError, match="File too large"), small_disk():
        store.event("large", text="x" * 5000)
    store.event("last")
    lines = (store.folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "last"]


def test_a_file_system_without_locks_is_named(store: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store.folder.mkdir()
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConfigError, match=r"cannot lock files \(No locks available\); choose another with runs=FOLDER"):
        store.lock()


def test_what_a_kill_left_half_written_is_removed(store: RunFolder) -> None:
    store.write_metrics(0, {})
    (store.folder / "models" / "M1.123.tmp").mkdir(parents=True)
    (store.folder / "models" / "M1.123.tmp" / "config.json").write_text("{}")
    (store.iteration(0) / ".pairs.parquet.tmp").write_text("half")
    (store.folder / "models" / "M1.tmpl").write_text("kept")
    (store.folder / "eval" / "judge").mkdir(parents=True)
    (store.folder / "eval" / "judge" / ".metrics.json.tmp").write_text("being written")
    store.remove_scratch()
    left = {str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file()}
    assert left == {"iterations/00/metrics.json", "models/M1.tmpl", "eval/judge/.metrics.json.tmp"}


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_are_kept_up_to_the_one_that_comes_again(store: RunFolder) -> None:
    log = store.steps(0)
    for step in range(4):
        log.add({"step": step, "loss": 0.5, "pair_ids": ["00/ü/1>0"]})
    assert store.steps(0).rows == log.rows
    log.keep_before(2)
    assert [row["step"] for row in log.rows] == [0, 1]
    assert store.steps(0).rows == log.rows
    log.add({"step": 2, "loss": 0.25, "pair_ids": []})
    assert [(row["step"], row["loss"]) for row in store.steps(0).rows] == [(0, 0.5), (1, 0.5), (2, 0.25)]
    log.keep_before(3)  # nothing to forget
    assert len(store.steps(0).rows) == 3
    log.keep_before(0)
    assert store.steps(0).rows == log.rows == []


def test_a_step_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1')
    log = StepLog(path)
    assert log.rows == [{"step": 0}]
    log.add({"step": 1})
    assert StepLog(path).rows == [{"step": 0}, {"step": 1}]


def test_a_bad_line_of_the_steps_comes_again_in_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 0}\n\0\0\n{"step": 2}\n[]\n')
    log = StepLog(path)
    assert log.rows == [{"step": 0}, {"step": 2}]
    assert f"{path}: line 2 cannot be read" in caplog.text
    log.add({"step": 1})  # from the checkpoint
    log.keep_before(3)
    assert StepLog(path).rows == log.rows == [{"step": 0}, {"step": 1}, {"step": 2}]
