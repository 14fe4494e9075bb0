"""Files that are whole or not there, journals that survive a cut, and Parquet that others read."""

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from disks import Disk, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.config import ConfigError, load
from rsrlm.records import Judgement, PreferencePair, Prompt, Response, Sampling, Scored, Unparsed
from rsrlm.store.atomic import sift_lines, write_whole
from rsrlm.store.folder import Journal, RunFolder, StepLog, rows

LAST_SEED = 2**63 - 1
SAMPLING = Sampling(temperature=0.7, top_p=0.95, top_k=40, max_tokens=8, seed=LAST_SEED)


def response(index: int, text: str = "Grüße,\u2028\r\nTee") -> Response:
    return Response(
        id=f"00/tea/{index}",
        prompt_id="tea",
        index=index,
        role="actor",
        text=text,
        token_ids=(128255, 0),
        prompt_token_ids=(1,),
        finish_reason="length",
        weight_version="M0",
        sampling=replace(SAMPLING, seed=LAST_SEED - index),
    )


def judgement(index: int, verdict: Scored | Unparsed, sampling: Sampling | None = SAMPLING) -> Judgement:
    return Judgement(
        id=f"00/tea/0#{index}",
        prompt_id="tea",
        response_id="00/tea/0",
        index=index,
        role="judge",
        judge="additive (text)",
        text="",
        token_ids=(),
        finish_reason="stop",
        weight_version="M0" if sampling else "",
        sampling=sampling,
        verdict=verdict,
    )


JUDGEMENTS = [
    judgement(0, Scored(points=1 / 3)),
    judgement(1, Scored(points=2.0, variance=0.0)),
    judgement(2, Unparsed(reason="no score line")),
    judgement(3, Scored(points=-7.0), sampling=None),
]
PAIR = PreferencePair(
    id="00/tea/1>0",
    prompt_id="tea",
    kind="actor",
    chosen_id="00/tea/1",
    rejected_id="00/tea/0",
    prompt_token_ids=(1,),
    chosen_token_ids=(2, 128255),
    rejected_token_ids=(),
    chosen_score=1 / 3,
    rejected_score=0.0,
    weight_version="M0",
)


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


def test_a_journal_gives_back_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "00" / "journal.jsonl"
    journal = Journal(path)
    responses = [response(0), response(1, text="")]
    for record in [*responses, *JUDGEMENTS]:
        journal.add(record)
    # Not closed: a killed process does not close its files either.
    again = Journal(path)
    assert list(again.responses.values()) == list(journal.responses.values()) == responses
    assert list(again.judgements.values()) == list(journal.judgements.values()) == JUDGEMENTS
    assert set(again.judgements) == {"00/tea/0#0", "00/tea/0#1", "00/tea/0#2", "00/tea/0#3"}


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    records = [response(0), JUDGEMENTS[0], JUDGEMENTS[2], response(1)]
    journal, ends = Journal(path), [0]
    for record in records:
        journal.add(record)
        ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:cut])
    survivors = records[: sum(end <= cut for end in ends) - 1]

    opened = Journal(path)
    assert [*opened.responses.values()] == [one for one in survivors if isinstance(one, Response)]
    assert [*opened.judgements.values()] == [one for one in survivors if isinstance(one, Judgement)]
    opened.add(JUDGEMENTS[3])
    assert Journal(path).judgements == opened.judgements


@pytest.mark.parametrize("bad", [b"\0\0\0", b'{"resp', b"[1]", b'{"response": {"id": "00/tea/7"}}', b"\xff"])
def test_bad_lines_of_a_journal_are_set_aside(tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What they held is made again; the others are not."""
    path = tmp_path / "journal.jsonl"
    for record in [response(0), JUDGEMENTS[0], response(1)]:
        Journal(path).add(record)
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + b"\n" + third + bad + b"\n")
    opened = Journal(path)
    assert [*opened.responses.values()] == [response(0), response(1)]
    assert opened.judgements == {}
    assert path.with_name("journal.jsonl.bad").read_bytes() == (bad + b"\n") * 2
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: line 2 cannot be read (")
    assert warning.endswith("2 such lines are set aside in journal.jsonl.bad, and what they held is made again")
    opened.add(JUDGEMENTS[0])
    caplog.clear()
    again = Journal(path)
    assert (again.responses, again.judgements) == (opened.responses, opened.judgements)
    assert not caplog.messages


def test_a_sync_covers_all_that_was_added_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)

    async def work() -> None:
        await journal.sync()
        assert disk.calls == 0  # an empty one has nothing to lose
        journal.add(response(0))
        await journal.sync()
        await journal.sync()
        assert disk.calls == 1
        assert disk.safe["journal.jsonl"] == path.read_bytes()
        # A process that was killed had not synced: its records count as much.
        await Journal(path).sync()
        assert disk.calls == 2

    asyncio.run(work())


def test_one_sync_serves_all_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.gate.clear()
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    found = []

    async def one(index: int) -> None:
        journal.add(response(index))
        await journal.sync()
        found.append(disk.safe["journal.jsonl"].count(b"\n") > index)  # its own record is safe

    async def work() -> None:
        first = asyncio.ensure_future(one(0))
        while not disk.calls:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(one(index)) for index in range(1, 20)]
        await asyncio.sleep(0)  # all of them wait behind the first, which does not cover their records
        disk.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(work())
    assert found == [True] * 20
    assert disk.calls == 2


def test_a_closed_journal_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rests on held-out answers is written when their journal is closed."""
    disk = Disk(monkeypatch)
    journal = Journal(tmp_path / "M1.jsonl")
    journal.add(response(0))
    journal.close()
    assert disk.safe["M1.jsonl"] == (tmp_path / "M1.jsonl").read_bytes() != b""


# -- Parquet -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_parquet_is_what_datasets_reads(store: RunFolder, tmp_path: Path) -> None:
    from datasets import load_dataset

    prompts = [Prompt(id="z", text="Zwei?"), Prompt(id="tea", text="Describe tea.")]
    other = replace(PAIR, id="00/a/1>0", prompt_id="a")
    store.write_records(0, prompts, [response(1), response(0)], JUDGEMENTS[::-1], [], [PAIR, other])
    folder = store.iteration(0)
    read = {
        name: load_dataset(
            "parquet", data_files=str(folder / f"{name}.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        ).to_list()
        for name in ("prompts", "responses", "judgements", "pairs")
    }
    assert read["prompts"] == [{"id": "tea", "text": "Describe tea."}, {"id": "z", "text": "Zwei?"}]
    assert read["responses"] == [plain(response(0)), plain(response(1))]
    assert [row["sampling"]["seed"] for row in read["responses"]] == [LAST_SEED, LAST_SEED - 1]
    verdicts = [(row["id"][-1], row["points"], row["variance"], row["unparsed"]) for row in read["judgements"]]
    assert verdicts == [
        ("0", 1 / 3, None, None),
        ("1", 2.0, 0.0, None),
        ("2", None, None, "no score line"),  # and not 0
        ("3", -7.0, None, None),
    ]
    assert read["judgements"][1]["sampling"] == plain(SAMPLING)
    assert read["pairs"] == [plain(PAIR), plain(other)]  # training order, not that of the ids


def plain(record: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(record)))


def test_a_judgement_without_an_engine_has_no_sampling(store: RunFolder) -> None:
    store.write_records(0, [], [], JUDGEMENTS, [], [])
    found = list(rows(store.iteration(0) / "judgements.parquet"))
    assert [row["sampling"] is None for row in found] == [False, False, False, True]
    assert found[2]["sampling"]["seed"] == LAST_SEED


def test_records_are_complete_when_the_last_file_is_there(store: RunFolder) -> None:
    assert not store.records_complete(0)
    store.write_records(0, [], [], [], [], [])  # an iteration without any pair has its records too
    assert store.records_complete(0)
    assert not store.records_complete(1)
    assert list(rows(store.iteration(0) / "pairs.parquet")) == []
    assert {path.name for path in store.iteration(0).iterdir()} == {
        "prompts.parquet",
        "responses.parquet",
        "judgements.parquet",
        "pairs.parquet",
    }


# -- run folder --------------------------------------------------------------------------------------------------------


def test_a_new_run_folder_holds_its_config(make_config: Any) -> None:
    config = make_config(name="tee")
    store = RunFolder.create(config)
    assert store.folder == config.folder
    opened, again = RunFolder.open(config.folder)
    assert opened.folder == store.folder
    assert again == config
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


def test_what_a_kill_left_half_written_is_removed(store: RunFolder) -> None:
    store.write_metrics(0, {})
    (store.folder / "models" / "M1.123.tmp").mkdir(parents=True)
    (store.folder / "models" / "M1.123.tmp" / "config.json").write_text("{}")
    (store.iteration(0) / ".pairs.parquet.tmp").write_text("half")
    (store.folder / "models" / "M1.tmpl").write_text("kept")
    store.remove_scratch()
    left = {str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file()}
    assert left == {"iterations/00/metrics.json", "models/M1.tmpl"}


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
