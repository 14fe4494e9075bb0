"""The buffer of receipts: training order, and nothing lost with its process."""

import random
import tempfile
from pathlib import Path

import pytest
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.store.items import ItemRef
from rsrlm.store.receipts import Receipt, ReceiptBuffer


def receipt(prompt: str, iteration: int = 0, items: int = 1, reason: str = "") -> Receipt:
    group = f"{iteration:02d}/{prompt}"
    places = tuple(
        ItemRef(id=f"{group}/{number + 1}>0", segment=f"/tmp/{prompt[:1]}", offset=2**40 + number, length=9, tokens=600)
        for number in range(items)
    )
    return Receipt(group=group, iteration=iteration, items=places, reason=reason)


def filled(path: Path, prompts: str, iteration: int = 0) -> ReceiptBuffer:
    buffer = ReceiptBuffer(path)
    for prompt in prompts:
        assert buffer.put(receipt(prompt, iteration))
    return buffer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "receipts.jsonl"


def test_groups_with_items_and_without(path: Path) -> None:
    buffer = ReceiptBuffer(path)
    assert buffer.put(receipt("tea", items=2))
    assert buffer.put(receipt("milk", items=0, reason="equal scores"))
    assert buffer.put(receipt("water", items=0, reason="equal scores"))
    assert buffer.put(receipt("tea", iteration=1))
    for one in (buffer, ReceiptBuffer(path)):
        assert sorted(place.id for place in one.items(0, 0)) == ["00/tea/1>0", "00/tea/2>0"]
        assert one.items(1, 0) == list(receipt("tea", iteration=1).items)
        assert one.items(2, 0) == []
        assert one.counts(0) == {"groups": 3, "items": 2, "tokens": 1200, "reasons": {"equal scores": 2}}
        assert one.counts(1) == {"groups": 1, "items": 1, "tokens": 600, "reasons": {}}
    buffer.drop(0)
    assert buffer.items(0, 0) == []
    assert len(buffer.items(1, 0)) == 1


def test_the_first_receipt_of_a_group_stays(path: Path) -> None:
    buffer = filled(path, "ab")
    written = path.read_bytes()
    for one in (buffer, ReceiptBuffer(path)):
        assert not one.put(receipt("a", items=3))
        assert not one.put(receipt("b"))
        assert sorted(place.id for place in one.items(0, 0)) == ["00/a/1>0", "00/b/1>0"]
    assert path.read_bytes() == written


@given(order=st.permutations("abcdefgh"), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_training_order_depends_on_ids_and_seed_alone(order: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        buffer = filled(Path(folder) / "receipts.jsonl", "".join(order))
        buffer.put(receipt("x", iteration=1))
        expected = [f"00/{prompt}/1>0" for prompt in "abcdefgh"]
        random.Random(f"pairs {seed} 0").shuffle(expected)
        assert [place.id for place in buffer.items(0, seed)] == expected


def test_training_order_differs_by_seed_iteration_and_kind(path: Path) -> None:
    buffer = filled(path, "abcdefgh")
    for prompt in "abcdefgh":
        buffer.put(receipt(prompt, 1))
    orders = {
        tuple(place.id[3:] for place in buffer.items(iteration, seed, kind))
        for iteration in (0, 1)
        for seed in range(4)
        for kind in ("pairs", "examples")
    }
    assert len(orders) == 16


@given(groups=st.lists(st.tuples(st.sampled_from("aüc"), st.integers(0, 1), st.integers(0, 2))), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_buffer_cut_at_any_byte_holds_its_whole_receipts(
    groups: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    def state(buffer: ReceiptBuffer) -> object:
        return [(buffer.counts(iteration), buffer.items(iteration, 7)) for iteration in (0, 1)]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "receipts.jsonl"
        buffer = ReceiptBuffer(path)
        states = {0: state(buffer)}
        for prompt, iteration, items in groups:
            buffer.put(receipt(prompt, iteration, items, "" if items else "equal scores"))
            states[path.stat().st_size] = state(buffer)
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size))])
        left = max(size for size in states if size <= path.stat().st_size)
        again = ReceiptBuffer(path)
        assert state(again) == states[left]
        assert path.stat().st_size == left
        again.put(receipt("new"))
        assert state(ReceiptBuffer(path)) == state(again)


def test_a_receipt_that_cannot_be_read_is_told(path: Path) -> None:
    """Its items would be missing in the training, and nobody would know."""
    filled(path, "ab")
    path.write_bytes(path.read_bytes().replace(b'"group"', b'"gr\xffup"', 1))
    with pytest.raises(OSError, match="line 1 cannot be read"):
        ReceiptBuffer(path)


def test_a_full_disk_loses_no_receipt(path: Path) -> None:
    buffer = ReceiptBuffer(path)
    with pytest.raises(OSError, match="File too large"), small_disk():
        buffer.put(receipt("a", items=100))
    assert buffer.items(0, 0) == []
    assert buffer.put(receipt("a"))
    assert ReceiptBuffer(path).items(0, 0) == buffer.items(0, 0) == list(receipt("a").items)
