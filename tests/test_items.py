"""Items by reference: what was added comes back, from any process, and only what is asked for is read."""

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import PAIR

from rsrlm.records import Example, PreferencePair
from rsrlm.settings.base import ConfigError
from rsrlm.store import items
from rsrlm.store.items import ItemFile, Items, Segment, decoded, encoded, write_items

EXAMPLE = Example(id="ift/1", kind="ift", prompt_token_ids=(), target_token_ids=(0, 2**31 - 1, -1))


@dataclass(frozen=True)
class Graded:
    """An item of somebody else's method."""

    id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    grade: float | None
    turns: int


GRADED = Graded(id="ü", token_ids=(1,), logprobs=(-1 / 3, 0.0, float("-inf")), grade=None, turns=-(2**40))


def pairs(count: int) -> list[PreferencePair]:
    return [
        replace(PAIR, id=f"00/{number}/1>0", chosen_token_ids=(number,) * (number % 5), weight=number / 3)
        for number in range(count)
    ]


@pytest.mark.parametrize("item", [PAIR, EXAMPLE, GRADED, replace(PAIR, id="\U0001f375\0\n", rejected_score=-0.0)])
def test_an_item_comes_back(item: Any) -> None:
    again = decoded(encoded(item), type(item))
    assert again == item
    assert repr(again) == repr(item)  # tuples are tuples, and 0.0 is not 0


@given(
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1)).map(tuple),
    logprobs=st.lists(st.floats(allow_nan=False)).map(tuple),
    turns=st.integers(-(2**63), 2**64 - 1),
    text=st.text(st.characters(codec="utf-8")),
)
@settings(deadline=None, max_examples=100)
def test_any_item_comes_back(tokens: tuple, logprobs: tuple, turns: int, text: str) -> None:
    item = Graded(id=text, token_ids=tokens, logprobs=logprobs, grade=None, turns=turns)
    assert decoded(encoded(item), Graded) == item


def test_items_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "00" / "items"
    made = pairs(100)
    write_items(path, made)
    file: ItemFile[PreferencePair] = ItemFile(path)
    assert len(file) == 100
    assert file.kind is PreferencePair
    for index in (0, 1, 99, -1, -100):
        assert file[index] == made[index]
    assert list(file) == file[:] == made
    assert file[10:1:-3] == made[10:1:-3]
    for outside in (100, -101):
        with pytest.raises(IndexError):
            file[outside]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("item", [EXAMPLE, GRADED])
def test_a_file_knows_the_type_of_its_items(tmp_path: Path, item: Any) -> None:
    write_items(tmp_path / "items", [item, replace(item, id="2")])
    file: ItemFile[Any] = ItemFile(tmp_path / "items")
    assert list(file) == [item, replace(item, id="2")]
    assert file.kind is type(item)


def test_the_digest_is_of_the_items_and_their_order(tmp_path: Path) -> None:
    made = pairs(3)
    digest = write_items(tmp_path / "a", made)
    assert len(digest) == 32
    assert write_items(tmp_path / "b", pairs(3)) == digest
    others = [made[:2], made[::-1], [*made[:2], replace(made[2], target=0.5)], [*made[:2], replace(made[2], id="x")]]
    assert len({digest, *(write_items(tmp_path / "c", other) for other in others)}) == 5


@pytest.mark.parametrize("items", [[], [PAIR, EXAMPLE]])
def test_items_of_one_type_or_none(tmp_path: Path, items: list[Any]) -> None:
    write_items(tmp_path / "items", [PAIR])
    before = (tmp_path / "items").read_bytes()
    with pytest.raises(ValueError, match=f"{len(items)} items of {len(items)} types; a training job has items of one"):
        write_items(tmp_path / "items", items)
    assert (tmp_path / "items").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["items"]


def by_reference(folder: Path, made: list[PreferencePair]) -> Items[PreferencePair]:
    """In three segments."""
    segments = [Segment(folder / f"{number}.items") for number in range(3)]
    items = Items(PreferencePair)
    for number, item in enumerate(made):
        segment = segments[number % 3]
        items.put(segment.path, segment.add(item))
    return items


def test_items_stay_in_the_segments_where_they_were_written(tmp_path: Path) -> None:
    made = pairs(50)
    items = by_reference(tmp_path, made)
    assert items.ids == [one.id for one in made]
    assert list(items) == items[:] == made
    backwards = items.taken(range(49, -1, -1))
    assert (list(backwards), backwards.ids) == (made[::-1], items.ids[::-1])
    digest = write_items(tmp_path / "job", backwards)
    assert list(ItemFile(tmp_path / "job")) == made[::-1]
    assert write_items(tmp_path / "written", made[::-1]) == digest
    sizes = [(tmp_path / name).stat().st_size for name in ("job", "written", "0.items")]
    assert sizes[0] < 50 * 22 + 300
    assert sizes[1] > 2 * sizes[2]


def test_two_lots_of_items_as_one(tmp_path: Path) -> None:
    made = pairs(12)
    first, other = by_reference(tmp_path / "a", made[:5]), by_reference(tmp_path / "b", made[5:])
    both = first.with_others(other)
    assert (list(both), both.ids) == (made, first.ids + other.ids)
    assert list(both.taken([11, 0, 7])) == [made[11], made[0], made[7]]
    assert list(first.with_others(Items(PreferencePair))) == made[:5]
    assert len(first) == 5


def test_what_is_known_of_an_item_without_its_tokens(tmp_path: Path) -> None:
    write_items(tmp_path / "items", [GRADED, replace(GRADED, token_ids=(), turns=3)])
    file: ItemFile[Graded] = ItemFile(tmp_path / "items")
    assert file.outline(0) == {"id": "ü", "token_ids": 1, "logprobs": 3, "grade": None, "turns": -(2**40)}
    assert file.outline(-1) == {"id": "ü", "token_ids": 0, "logprobs": 3, "grade": None, "turns": 3}


def test_a_full_disk_loses_no_item(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "segment")
    with pytest.raises(OSError, match="File too large"), small_disk():
        segment.add(replace(PAIR, chosen_token_ids=(7,) * 1000))
    items = Items(PreferencePair)
    for one in pairs(2):
        items.put(segment.path, segment.add(one))
    with pytest.raises(OSError, match="File too large"), small_disk(60):
        write_items(tmp_path / "items", items)
    assert [path.name for path in tmp_path.iterdir()] == ["segment"]
    write_items(tmp_path / "items", items)
    assert list(ItemFile(tmp_path / "items")) == pairs(2)


READER = """
import os
import sys
from pathlib import Path
from rsrlm.store.items import ItemFile
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
file = ItemFile(Path(sys.argv[1]))
before = resident()
items = [file[index] for index in (0, len(file) // 2, len(file) - 1)]
print(len(file), *(item.chosen_token_ids[0] for item in items), resident() - before)
"""


def test_a_reader_holds_what_it_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "items"
    write_items(path, [replace(PAIR, chosen_token_ids=(number,) * 10_000) for number in range(1000)])  # 40 MB
    done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True)
    length, *firsts, grown = map(int, done.stdout.split())
    assert (length, firsts) == (1000, [0, 500, 999])
    assert grown < 8_000_000


def put(segment: Segment, item: Any) -> Items[Any]:
    made = Items[Any](type(item))
    made.put(segment.path, segment.add(item))
    return made


def test_bytes_that_another_host_sees_late_are_waited_for(tmp_path: Path) -> None:
    """The file is not there yet, then it is short, then it holds zeros: as a network file system shows it."""
    segment = Segment(tmp_path / "segment")
    made = put(segment, PAIR)
    whole = Path(segment.path).read_bytes()
    Path(segment.path).unlink()

    def arrive() -> None:
        for data in (whole[:5], bytes(len(whole)), whole):
            time.sleep(0.15)
            late = tmp_path / "late"
            late.write_bytes(data)
            late.replace(segment.path)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    assert made[0] == PAIR
    arriving.join()


def test_bytes_that_never_come_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "SEEN_WITHIN_S", 0.2)
    segment = Segment(tmp_path / "segment")
    made = put(segment, PAIR)
    with Path(segment.path).open("r+b") as file:
        file.seek(30)
        file.write(b"?")
    for read in (lambda: made[0], lambda: made.outline(0)):
        with pytest.raises(ConfigError, match=r"segment: \d+ bytes at 0 are not here as they were .* all hosts share"):
            read()
