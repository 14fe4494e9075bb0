"""The preference buffer: what it acknowledged is there after a kill, byte by byte."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.buffer import PreferenceBuffer
from rsrlm.records import PreferencePair


def pair(prompt: str, iteration: int = 0, chosen: int = 1) -> PreferencePair:
    group = f"{iteration:02d}/{prompt}"
    return PreferencePair(
        id=f"{group}/{chosen}>0",
        prompt_id=prompt,
        kind="actor",
        chosen_id=f"{group}/{chosen}",
        rejected_id=f"{group}/0",
        prompt_token_ids=(1, 2),
        chosen_token_ids=(3, 4, 49151),
        rejected_token_ids=(),
        chosen_score=3.1 + chosen / 3,
        rejected_score=-0.1,
        weight_version=f"M{iteration}",
    )


def filled(path: Path, prompts: str, iteration: int = 0) -> PreferenceBuffer:
    buffer = PreferenceBuffer(path)
    for prompt in prompts:
        buffer.put(f"{iteration:02d}/{prompt}", iteration, pair(prompt, iteration), "")
    return buffer


def ids(buffer: PreferenceBuffer, iteration: int = 0, seed: int = 0) -> list[str]:
    return [one.prompt_id for one in buffer.pairs(iteration, seed)]


def state(buffer: PreferenceBuffer) -> Any:
    return buffer.status(), [
        (buffer.groups(iteration), buffer.pairs(iteration, 7), buffer.trained(iteration)) for iteration in (0, 1, 2)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "buffer.jsonl"


def test_groups_with_and_without_a_pair(path: Path) -> None:
    buffer = PreferenceBuffer(path)
    buffer.put("00/tea", 0, pair("tea"), "")
    buffer.put("00/milk", 0, None, "equal scores")
    buffer.put("01/tea", 1, pair("tea", 1), "")
    assert buffer.pairs(0, 0) == [pair("tea")]
    assert buffer.pairs(1, 0) == [pair("tea", 1)]
    assert buffer.pairs(2, 0) == []
    assert buffer.groups(0) == {"00/tea": "", "00/milk": "equal scores"}
    assert buffer.groups(1) == {"01/tea": ""}
    assert buffer.status() == {"groups": 3, "pairs": 2, "trained": 0}


def test_what_is_put_is_on_disk_before_put_returns(path: Path) -> None:
    buffer = filled(path, "a")
    assert path.read_bytes().count(b"\n") == 1
    assert PreferenceBuffer(path).pairs(0, 0) == buffer.pairs(0, 0) == [pair("a")]  # the first one is still open


def test_the_same_group_again_changes_nothing(path: Path) -> None:
    buffer = filled(path, "ab")
    buffer.put("00/c", 0, None, "equal scores")
    written = path.read_bytes()
    buffer.put("00/a", 0, pair("a"), "")
    buffer.put("00/c", 0, None, "equal scores")
    again = PreferenceBuffer(path)
    again.put("00/b", 0, pair("b"), "")  # nor after a restart
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ((pair("a", chosen=2), ""), True),
        ((replace(pair("a"), chosen_token_ids=(3, 4)), ""), True),  # the same response, sampled anew
        ((None, "equal scores"), True),
        ((replace(pair("a"), chosen_score=4.0), ""), False),
        ((pair("a"), ""), False),
    ],
)
def test_the_first_pair_of_a_group_stays_and_another_one_is_told(path: Path, other: tuple, told: bool) -> None:
    """Refused, it would end every resume of a run that lost records."""
    for buffer in (filled(path, "a"), PreferenceBuffer(path)):
        assert buffer.put("00/a", 0, *other) is told
        assert buffer.pairs(0, 0) == [pair("a")]
    assert path.read_bytes().count(b"\n") == 1


def test_a_reason_in_other_words_is_no_other_pair(path: Path) -> None:
    buffer = PreferenceBuffer(path)
    assert buffer.put("00/a", 0, None, "equal scores") is False
    assert buffer.put("00/a", 0, None, "all scores are equal") is False
    assert buffer.put("00/a", 0, pair("a"), "") is True
    assert buffer.groups(0) == {"00/a": "equal scores"}
    assert buffer.pairs(0, 0) == []


def test_marks(path: Path) -> None:
    buffer = filled(path, "abcd")
    buffer.mark_trained(["00/a/1>0", "00/b/1>0"], 0)
    buffer.mark_trained(["00/c/1>0"], 1)
    assert buffer.trained(0) == {"00/a/1>0": 0, "00/b/1>0": 0, "00/c/1>0": 1}
    assert buffer.trained(1) == {}
    assert buffer.status()["trained"] == 3
    buffer.forget_trained_from(0, 1)
    assert buffer.trained(0) == {"00/a/1>0": 0, "00/b/1>0": 0}
    buffer.forget_trained_from(0, 1)  # again, by a driver that heard no answer
    assert buffer.trained(0) == {"00/a/1>0": 0, "00/b/1>0": 0}
    buffer.mark_trained(["00/c/1>0"], 1)
    assert buffer.trained(0)["00/c/1>0"] == 1
    assert state(PreferenceBuffer(path)) == state(buffer)
    buffer.forget_trained_from(0, 0)
    assert buffer.trained(0) == {}
    assert len(buffer.pairs(0, 0)) == 4
    assert state(PreferenceBuffer(path)) == state(buffer)


def test_forgetting_is_for_one_iteration(path: Path) -> None:
    buffer = filled(path, "a")
    buffer.put("01/a", 1, pair("a", 1), "")
    buffer.mark_trained(["00/a/1>0"], 5)
    buffer.mark_trained(["01/a/1>0"], 5)
    buffer.forget_trained_from(1, 0)
    assert (buffer.trained(0), buffer.trained(1)) == ({"00/a/1>0": 5}, {})


def test_forgetting_a_second_epoch_leaves_the_first(path: Path) -> None:
    """`trained` says which step was the last to use a pair: step 0 did, and is not lost."""
    buffer = filled(path, "ab")
    buffer.mark_trained(["00/a/1>0"], 0)
    buffer.mark_trained(["00/b/1>0"], 1)
    buffer.mark_trained(["00/a/1>0"], 2)
    buffer.forget_trained_from(0, 2)
    assert buffer.trained(0) == {"00/a/1>0": 0, "00/b/1>0": 1}
    assert buffer.status()["trained"] == 2
    buffer.forget_trained_from(0, 1)
    assert buffer.trained(0) == {"00/a/1>0": 0}
    assert state(PreferenceBuffer(path)) == state(buffer)


def test_marks_on_pairs_that_are_not_there_are_errors(path: Path) -> None:
    buffer = filled(path, "ab")
    buffer.put("00/c", 0, None, "equal scores")
    written = path.read_bytes()
    with pytest.raises(ValueError, match="pair 00/z/1>0 is not in the buffer"):
        buffer.mark_trained(["00/a/1>0", "00/z/1>0"], 0)
    assert buffer.trained(0) == {}  # all or nothing
    assert path.read_bytes() == written


def test_a_mark_does_not_go_through_all_groups(path: Path) -> None:
    """One per optimizer step: with a million groups that would take longer than the step."""

    class Whole(dict):
        def values(self) -> Any:
            raise AssertionError("went through all groups")

    buffer = filled(path, "ab")
    buffer._groups = Whole(buffer._groups)
    buffer.mark_trained(["00/a/1>0"], 0)
    assert buffer._trained == {"00/a/1>0": {0}}


# -- bad lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b"\0" * 9, b"{", b"7", b'{"group": "00/b"}', b'{"trained": ["00/a/1>0"]}'])
def test_a_bad_line_is_set_aside_and_told(path: Path, bad: bytes) -> None:
    filled(path, "abc")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + bad + b"\n" + lines[2])
    buffer = PreferenceBuffer(path)
    assert buffer.warning().startswith(f"{path}: line 2 cannot be read (")
    assert "1 such lines are set aside in buffer.jsonl.bad" in buffer.warning()
    assert path.with_name("buffer.jsonl.bad").read_bytes() == bad + b"\n"
    assert path.read_bytes() == lines[0] + lines[2]
    assert sorted(ids(buffer)) == ["a", "c"]
    assert buffer.put("00/b", 0, pair("b"), "") is False  # its group comes again
    again = PreferenceBuffer(path)
    assert (again.warning(), sorted(ids(again))) == ("", ["a", "b", "c"])


# -- training order ----------------------------------------------------------------------------------------------------


@given(order=st.permutations("abcdefgh"), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_training_order_depends_on_ids_and_seed_alone(order: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sorted_one = filled(Path(folder) / "sorted", "abcdefgh")
        other = filled(Path(folder) / "other", "".join(order))
        other.mark_trained(["00/a/1>0"], 0)
        other.put("01/x", 1, pair("x", 1), "")
        assert other.pairs(0, seed) == sorted_one.pairs(0, seed)
        assert sorted(ids(other, seed=seed)) == list("abcdefgh")


def test_training_order_differs_by_seed_and_iteration(path: Path) -> None:
    buffer = filled(path, "abcdefgh")
    for prompt in "abcdefgh":
        buffer.put(f"01/{prompt}", 1, pair(prompt, 1), "")
    orders = {"".join(ids(buffer, iteration, seed)) for iteration in (0, 1) for seed in range(4)}
    assert len(orders) == 8
    assert "abcdefgh" not in orders


# -- kills -------------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 1), st.sampled_from("aü"), st.booleans()),
        st.tuples(st.just("mark"), st.integers(0, 1), st.sampled_from("aü"), st.integers(0, 3)),
        st.tuples(st.just("forget"), st.integers(0, 1), st.just(""), st.integers(0, 3)),
    ),
    max_size=12,
)
# A pair each in two iterations, so that there is something to mark from the start.
FIRST = [("put", 0, "a", True), ("put", 1, "ü", True), ("mark", 0, "a", 1)]


def do(buffer: PreferenceBuffer, step: tuple[str, int, str, Any]) -> None:
    kind, iteration, prompt, value = step
    group = f"{iteration:02d}/{prompt}"
    if kind == "put" and group not in buffer.groups(iteration):
        buffer.put(group, iteration, pair(prompt, iteration) if value else None, "" if value else "equal scores")
    elif kind == "mark" and buffer.groups(iteration).get(group) == "":
        buffer.mark_trained([f"{group}/1>0"], value)
    elif kind == "forget":
        buffer.forget_trained_from(iteration, value)


@given(steps=STEPS, data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_buffer_cut_at_any_byte_is_the_one_of_its_last_whole_line(steps: list[tuple], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "buffer.jsonl"
        buffer = PreferenceBuffer(path)
        states = {0: state(buffer)}  # by the size of the file
        for step in FIRST + steps:
            do(buffer, step)
            states[path.stat().st_size] = state(buffer)
        cut = data.draw(st.integers(0, path.stat().st_size))
        path.write_bytes(path.read_bytes()[:cut])
        last = max(size for size in states if size <= cut)

        opened = PreferenceBuffer(path)
        assert state(opened) == states[last]
        assert path.stat().st_size == last  # what was cut is gone, or the next line would be glued to it
        opened.put("02/new", 2, None, "equal scores")
        assert state(PreferenceBuffer(path)) == state(opened)
