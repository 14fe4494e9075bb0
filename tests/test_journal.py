"""The journal under every answer: what was added is there after a kill, byte by byte, and memory stays small."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from disks import Disk, small_disk
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.store.journal import CompletionLog

PAYLOAD = {
    "id": "00/tea/1",
    "token_ids": (128255, 0),
    "text": "Grüße,\u2028\r\nTee",
    "finish_reason": "length",
    "weight_version": "M0",
    "label_logprobs": (-0.1, -1 / 3, -1e-300),
    "prompt_logprobs": (),
}


def key(index: int) -> bytes:
    return random.Random(index).randbytes(16)


def plain(payload: Any) -> Any:
    """Tuples as the lists that JSON has."""
    return json.loads(json.dumps(payload))


def contents(log: CompletionLog, count: int = 8) -> dict[int, Any]:
    return {index: log.get(key(index)) for index in range(count) if key(index) in log}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "00" / "completions.jsonl"


def test_a_log_gives_back_what_was_added(path: Path) -> None:
    log = CompletionLog(path)
    log.add(key(0), PAYLOAD)
    log.add(key(1), {})
    # Not closed: a killed process does not close its files either.
    for one in (log, CompletionLog(path), CompletionLog(path, readonly=True)):
        assert one.get(key(0)) == plain(PAYLOAD)
        assert one.get(key(1)) == {}
        assert key(0) in one
        assert key(2) not in one
        assert one.get(key(2)) is None
        assert len(one) == 2
    assert json.loads(path.read_bytes().splitlines()[0]) == {"k": key(0).hex(), **plain(PAYLOAD)}


def test_the_first_payload_of_a_key_counts(path: Path) -> None:
    log = CompletionLog(path)
    log.add(key(0), {"text": "first"})
    written = path.read_bytes()
    log.add(key(0), {"text": "second"})
    assert path.read_bytes() == written
    path.write_bytes(written + written.replace(b"first", b"third"))
    again = CompletionLog(path)
    assert again.get(key(0)) == {"text": "first"}
    assert len(again) == 1


@pytest.mark.parametrize("text", [*(text for _, text in HOSTILE), "a\ud800b", "\udc00", "null", "NaN"])
def test_any_text_comes_back(path: Path, text: str) -> None:
    CompletionLog(path).add(key(0), {"text": text})
    assert path.read_bytes().count(b"\n") == 1
    assert CompletionLog(path).get(key(0)) == {"text": text}


@pytest.mark.parametrize("number", [float("-inf"), float("inf"), 1 / 3, -5e-324, 2**63 - 1, 0.1 + 0.2, None])
def test_any_number_comes_back(path: Path, number: float) -> None:
    CompletionLog(path).add(key(0), {"label_logprobs": (number,), "text": "\ud800" if number == 1 / 3 else ""})
    found = CompletionLog(path).get(key(0))
    assert found is not None
    assert found["label_logprobs"] == [number]


@pytest.mark.parametrize(("bad_key", "payload"), [(b"", {}), (b"x" * 15, {}), (b"x" * 17, {}), (b"x" * 16, {"k": 1})])
def test_what_could_not_be_found_again_is_refused(path: Path, bad_key: bytes, payload: Any) -> None:
    log = CompletionLog(path)
    with pytest.raises(ValueError, match="a digest has 16 bytes"):
        log.add(bad_key, payload)
    assert path.read_bytes() == b""


def test_digests_that_share_bytes_are_told_apart(path: Path) -> None:
    """Neighbours in a table whose bytes, read across their border, look like a third digest."""
    head, tail = b"\1\2", bytes(range(7))
    keys = [head + tail * 2, head + b"\0" * 14, head + b"\0" * 13 + b"\1", head + tail[1:] + tail + b"\0"]
    log = CompletionLog(path)
    for index, one in enumerate(keys):
        assert one not in log
        log.add(one, {"index": index})
    for one in (log, CompletionLog(path)):
        assert [one.get(each) for each in keys] == [{"index": index} for index in range(4)]
        for place in range(0, 24 * 3):  # whatever stands in the table between the digests
            between = head + bytes(log._index._tables[head])[place : place + 14]
            assert (between in one) == (between in keys)


def test_readers_of_a_log_that_is_being_written(path: Path) -> None:
    assert len(CompletionLog(path, readonly=True)) == 0
    assert not path.parent.exists()
    CompletionLog(path).add(key(0), PAYLOAD)
    with path.open("ab", buffering=0) as owner:
        owner.write(b"no JSON\n")
        owner.write(b'{"k": "%s"' % key(1).hex().encode())
        before = path.read_bytes()
        reader = CompletionLog(path, readonly=True)
        assert path.read_bytes() == before
        owner.write(b"}\n")  # the reader keeps what it saw
    assert contents(reader) == {0: plain(PAYLOAD)}
    reader.close()
    assert path.read_bytes() == before + b"}\n"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_reader_keeps_what_it_saw_when_the_owner_mends_the_log(path: Path) -> None:
    CompletionLog(path).add(key(0), PAYLOAD)
    path.write_bytes(b"bad\n" + path.read_bytes())
    reader = CompletionLog(path, readonly=True)
    assert contents(CompletionLog(path)) == contents(reader) == {0: plain(PAYLOAD)}


# -- cuts, bad lines, full disks, kills --------------------------------------------------------------------------------


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_log_cut_at_any_byte_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "completions.jsonl"
    log, ends = CompletionLog(path), [0]
    for index in range(4):
        log.add(key(index), {**PAYLOAD, "index": index})
        ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:cut])
    left = sum(end <= cut for end in ends) - 1

    opened = CompletionLog(path)
    assert contents(opened) == {index: plain({**PAYLOAD, "index": index}) for index in range(left)}
    assert path.stat().st_size == ends[left]
    opened.add(key(7), {"text": "after the cut"})
    assert contents(CompletionLog(path)) == contents(opened)


BAD = [
    b"\0\0\0",
    b'{"k',
    b"[1]",
    b"7",
    b"\xff",
    b"{}",
    b'{"text": "no key"}',
    b'{"k": 5}',
    b'{"k": "zz"}',
    b'{"k": "abcd", "text": ""}',
    b'{"k": "' + key(9).hex().encode() + b'", "text": "\xff"}',
    b'{"k": "' + key(9).hex().encode() + b'", "token_ids": [1, 2, \0\0\0]}',
    b'{"k": "' + key(9).hex().encode() + b'"} {}',
    b'{"k": "' + key(9).hex().encode() + b'", "text": ' + b"[" * 100_000,
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_bad_lines_are_set_aside(path: Path, bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What they held is made again; the others are not."""
    for index in range(3):
        CompletionLog(path).add(key(index), {"index": index})
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + b"\n" + third + bad + b"\n")
    opened = CompletionLog(path)
    assert contents(opened, 10) == {0: {"index": 0}, 2: {"index": 2}}
    assert path.with_name("completions.jsonl.bad").read_bytes() == (bad + b"\n") * 2
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: line 2 cannot be read (")
    assert warning.endswith("2 such lines are set aside in completions.jsonl.bad, and what they held is made again")
    opened.add(key(1), {"index": 1})
    caplog.clear()
    assert contents(CompletionLog(path)) == contents(opened)
    assert not caplog.messages
    assert path.read_bytes().startswith(first + third)
    assert sorted(one.name for one in path.parent.iterdir()) == ["completions.jsonl", "completions.jsonl.bad"]


def test_a_full_disk_leaves_the_log_as_it_was(path: Path) -> None:
    log = CompletionLog(path)
    log.add(key(0), PAYLOAD)
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"), small_disk():
        log.add(key(1), {"text": "x" * 5000})
    assert path.read_bytes() == before
    assert key(1) not in log
    log.add(key(1), {"text": "there is room again"})
    assert contents(CompletionLog(path)) == contents(log)
    assert len(log) == 2


WRITER = """
import sys
from pathlib import Path
from test_journal import PAYLOAD, key
from rsrlm.store.journal import CompletionLog
log = CompletionLog(Path(sys.argv[1]))
for index in range(len(log), 1_000_000):
    log.add(key(index), {**PAYLOAD, "index": index})
    print(index, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_had_added(path: Path) -> None:
    told = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(200)]
            os.kill(process.pid, signal.SIGKILL)
            lines += [line for line in process.stdout if line.endswith(b"\n")]
        told = int(lines[-1]) + 1
    log = CompletionLog(path)
    assert told <= len(log) <= told + 1  # the last may have been added and not told
    assert contents(log, len(log)) == {index: plain({**PAYLOAD, "index": index}) for index in range(len(log))}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.text(st.characters(), max_size=5)),
        st.tuples(st.just("reopen"), st.just(0), st.just("")),
        st.tuples(st.just("bad line"), st.just(0), st.just("")),
        st.tuples(st.just("cut line"), st.just(0), st.just("")),
    ),
    max_size=20,
)


@given(operations=OPERATIONS)
@settings(deadline=None, max_examples=80)
def test_a_log_is_a_dict_that_keeps_the_first(operations: list[tuple[str, int, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        log, model = CompletionLog(path), dict[int, Any]()
        for operation, index, text in operations:
            if operation == "add":
                log.add(key(index), {"text": text, "lengths": (len(text), len(model))})
                model.setdefault(index, {"text": text, "lengths": [len(text), len(model)]})
            else:
                log.close()
                with path.open("ab") as file:
                    file.write({"bad line": b'{"k": 1}\n', "cut line": b'{"k": '}.get(operation, b""))
                log = CompletionLog(path)
            assert contents(log) == model
            assert len(log) == len(model)
        assert contents(CompletionLog(path, readonly=True)) == model


# -- syncs -------------------------------------------------------------------------------------------------------------


def test_a_sync_covers_all_that_was_added_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    log = CompletionLog(path)
    assert disk.folders == [path.parent]  # a file whose name is not on disk is lost with its folder's block

    async def work() -> None:
        await log.sync()
        assert disk.calls == 0  # an empty one has nothing to lose
        log.add(key(0), PAYLOAD)
        await log.sync()
        await log.sync()
        assert disk.calls == 1
        assert disk.safe[path.name] == path.read_bytes()
        # A process that was killed had not synced: its lines count as much.
        await CompletionLog(path).sync()
        assert disk.calls == 2

    asyncio.run(work())


def test_one_sync_serves_all_who_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.gate.clear()
    log = CompletionLog(path)
    found = []

    async def one(index: int) -> None:
        log.add(key(index), PAYLOAD)
        await log.sync()
        found.append(disk.safe[path.name].count(b"\n") > index)  # its own line is safe

    async def work() -> None:
        first = asyncio.ensure_future(one(0))
        while not disk.calls:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(one(index)) for index in range(1, 20)]
        await asyncio.sleep(0)  # all of them wait for the first sync, which does not cover their lines
        disk.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(work())
    assert found == [True] * 20
    assert disk.calls == 2


def test_a_closed_log_is_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    log = CompletionLog(path)
    log.add(key(0), PAYLOAD)
    log.close()
    log.close()
    assert disk.safe[path.name] == path.read_bytes() != b""


# -- memory ------------------------------------------------------------------------------------------------------------

GROWING = """
import os, sys
from pathlib import Path
from rsrlm.store.journal import CompletionLog

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

log = CompletionLog(Path(sys.argv[1]))
log.add(os.urandom(16), {})
before, most, kept = resident(), 0, len(log)
if kept < 2:
    for index in range(300_000):
        log.add(os.urandom(16), {"text": "x" * 200})
        if index % 10_000 == 0:
            most = max(most, resident())
print((max(most, resident()) - before) / 300_000, kept)
"""


def test_a_line_that_somebody_else_wrote_over_is_no_answer(path: Path) -> None:
    first, second = CompletionLog(path), CompletionLog(path)
    first.add(key(0), {"index": 0})
    second.add(key(1), {"index": 1})  # over it: there must be one writer
    with pytest.raises(OSError, match="did somebody else write to it"):
        first.get(key(0))
    assert second.get(key(1)) == {"index": 1}


def test_memory_holds_digests_and_places_alone(path: Path) -> None:
    """At 300,000 lines of 250 bytes: nearly 5 to each of 65,536 tables, where a table costs more than at 8 million."""

    def run() -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", GROWING, str(path)], capture_output=True, text=True, check=True, timeout=120
        )
        return [float(word) for word in done.stdout.split()]

    growing, _ = run()
    assert growing < 150
    from_the_start, kept = run()
    assert kept == 300_002
    assert from_the_start < 5  # all is there once it is open; the file itself, 70 MB, never is in memory
