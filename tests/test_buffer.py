"""The preference buffer: receipts in any order, groups in that of their tasks, and neither in memory."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import PAIR, made_for

from rsrlm.records import Group
from rsrlm.store.buffer import Buffer, ids_of, in_order, pairs_of, reasons_of, receipt_of
from rsrlm.store.items import Segment


def paired(name: str, pairs: int = 1, responses: int = 2) -> Group:
    made = tuple(replace(PAIR, id=f"00/{name}/{number}>9", prompt_id=name) for number in range(pairs))
    return replace(made_for(name, responses=responses), pairs=made, no_pair_reason="" if pairs else "equal scores")


def buffered(folder: Path, groups: list[Group], seed: int = 0, producers: int = 2) -> Buffer:
    """Groups that are finished in an order of the seed's."""
    buffer = Buffer([group.id for group in groups], folder)
    segments = [Segment(folder / str(number)) for number in range(producers)]
    for index in random.Random(seed).sample(range(len(groups)), len(groups)):
        buffer.put(index, receipt_of(groups[index], segments[index % producers]))
    return buffer


@given(
    counts=st.lists(st.integers(0, 3), max_size=8),
    seed=st.integers(0, 9),
    producers=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_groups_come_back_in_the_order_of_their_tasks(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], seed: int, producers: int
) -> None:
    groups = [paired(f"{number}ü", pairs) for number, pairs in enumerate(counts)]
    buffer = buffered(tmp_path_factory.mktemp("buffer"), groups, seed, producers)
    assert list(buffer) == buffer[:] == groups
    assert buffer[1:] == groups[1:]
    assert list(ids_of(buffer)) == list(ids_of(groups))
    assert reasons_of(buffer) == reasons_of(groups) == ({"equal scores": counts.count(0)} if 0 in counts else {})
    # Whoever finishes first: the pairs are the same, and so is their order by id.
    by_id = lambda ids: sorted(range(len(ids)), key=ids.__getitem__)  # noqa: E731
    found = in_order(pairs_of(buffer), by_id)
    assert list(found) == list(in_order(pairs_of(groups), by_id))
    if groups:
        assert buffer[-1] == groups[-1]


def test_pairs_made_of_all_groups(tmp_path: Path) -> None:
    groups = [paired("tea"), paired("milk", 0)]
    more = [replace(PAIR, id=f"00/milk/0#{number}>2", kind="judge") for number in range(2)]
    together = pairs_of(buffered(tmp_path, groups), iter(more))
    assert list(together) == list(pairs_of(groups, more)) == [*groups[0].pairs, *more]


def test_groups_that_are_not_finished(tmp_path: Path) -> None:
    buffer = Buffer(["00/tea", "00/milk"], tmp_path)
    buffer.put(1, receipt_of(paired("milk"), Segment(tmp_path / "0")))
    with pytest.raises(KeyError, match="group 00/tea is not finished"):
        buffer[0]
    with pytest.raises(IndexError):
        buffer[2]


def test_a_full_disk_loses_no_group(tmp_path: Path) -> None:
    buffer, segment = Buffer(["00/tea", "00/milk"], tmp_path), Segment(tmp_path / "0")
    with pytest.raises(OSError, match="File too large"), small_disk():
        receipt_of(paired("tea", responses=20), segment)
    for index, name in enumerate(("tea", "milk")):
        buffer.put(index, receipt_of(paired(name), segment))
    assert list(buffer) == [paired("tea"), paired("milk")]


GROWING = """
import os, sys
from pathlib import Path
from test_buffer import paired
from rsrlm.store.buffer import Buffer, receipt_of
from rsrlm.store.items import Segment

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

ids = [f"00/{number}" for number in range(5_000)]
folder = Path(sys.argv[1])
before = resident()
buffer, segment = Buffer(ids, folder), Segment(folder / "0")
for number in range(5_000):
    buffer.put(number, receipt_of(paired(str(number), responses=4), segment))
for group in buffer:
    pass
print((resident() - before) / 5_000)
"""


def test_memory_holds_neither_groups_nor_pairs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWING, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert float(done.stdout) < 500  # a group of this size takes 10,000 as objects
