"""Prompt files, line by line, and how prompts are dealt."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.config import Config, resolve
from rsrlm.data.prompts import deal, distinct, file_of, read, usable
from rsrlm.records import Prompt, wording
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import Engine
from rsrlm.settings.methods import Prompts

TEA = '{"id": "tea", "prompt": "Describe tea."}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    return str(caught.value)


def test_prompts_come_in_the_order_of_the_file(file: Path) -> None:
    file.write_text(
        '{"id": "z", "prompt": "One?", "source": "me"}\n\n   \n{"prompt": "  Zwei: \\u00fc\\n\\u2028ß ", "id": "a b"}',
        encoding="utf-8",
    )
    # Other texts are the prompt's data, empty lines do not matter; the text stays as it is.
    assert read(file) == [
        Prompt(id="z", text="One?", data={"source": "me"}),
        Prompt(id="a b", text="  Zwei: ü\n\u2028ß "),
    ]


def test_other_keys_are_what_a_prompt_carries(file: Path) -> None:
    """Texts as they are, other values as JSON; null is nothing."""
    entry = {
        "id": "a", "prompt": "x", "answer": 42, "reference": "Tee ü", "share": 0.5, "right": True,
        "documents": ["ä", {"b": 1}], "solution": None,
    }  # fmt: skip
    file.write_text(json.dumps(entry))
    (prompt,) = read(file)
    assert prompt.data == {
        "answer": "42", "reference": "Tee ü", "share": "0.5", "right": "true", "documents": '["ä", {"b": 1}]',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "a", "prompt": "x"', "not JSON (Expecting ',' delimiter at column 26)"),
        ("plain words", "not JSON"),
        ("[]", "must be an object such as"),
        ('"id prompt"', "must be an object such as"),
        ("null", "must be an object such as"),
        ("{}", "must be an object such as"),
        ('{"id": "a"}', "must be an object such as"),
        ('{"prompt": "x"}', "must be an object such as"),
        ('{"id": "a", "text": "x"}', "must be an object such as"),
        ('{"instruction": "x"}', "must be an object such as"),
        ('{"id": 7, "prompt": "x"}', "id 7 must be a text"),
        ('{"id": null, "prompt": "x"}', "id None must be a text"),
        ('{"id": "", "prompt": "x"}', "id '' must be a text"),
        ('{"id": "a/b", "prompt": "x"}', "id 'a/b' must be a text without / # >"),
        ('{"id": "a#1", "prompt": "x"}', "id 'a#1' must be a text"),
        ('{"id": "a>b", "prompt": "x"}', "id 'a>b' must be a text"),
        ('{"id": "a\\nb", "prompt": "x"}', "id 'a\\nb' must be a text"),
        ('{"id": "a\\u001fb", "prompt": "x"}', "id 'a\\x1fb' must be a text"),  # the separator of seeds
        ('{"id": "a\\rb", "prompt": "x"}', "id 'a\\rb' must be a text"),
        ('{"id": "a\\u0000b", "prompt": "x"}', "id 'a\\x00b' must be a text"),
        ('{"id": "a\\u0085b", "prompt": "x"}', "id 'a\\x85b' must be a text"),
        ('{"id": "a\\u2028b", "prompt": "x"}', "id 'a\\u2028b' must be a text"),
        ('{"id": "a", "prompt": 7}', "prompt of 'a' must be a text that is not empty"),
        ('{"id": "a", "prompt": ["x"]}', "prompt of 'a' must be a text that is not empty"),
        ('{"id": "a", "prompt": " \\n"}', "prompt of 'a' must be a text that is not empty"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(file: Path, line: str, said: str) -> None:
    file.write_text(f"{TEA}\n\n{line}\n")
    message = refused(file)
    assert message.startswith(f"prompts.path={file}, line 3: ")
    assert said in message


def test_an_id_that_stands_twice_names_both_lines(file: Path) -> None:
    file.write_text(f'{TEA}\n\n{{"id": "b", "prompt": "x"}}\n{{"id": "tea", "prompt": "Other."}}\n')
    assert f"prompts.path={file}, line 4: id 'tea' stands in line 1 already" in refused(file)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_a_file_without_prompts(file: Path, text: str) -> None:
    file.write_text(text)
    assert f"prompts.path={file}: no prompts in it" in refused(file)


def test_a_file_that_is_not_utf8_names_the_byte(file: Path) -> None:
    file.write_bytes(TEA.encode() + b'\n{"id": "b", "prompt": "\xe4"}\n')
    # TEA has 40 characters and a line end, and 23 stand before the byte in its line.
    assert f"prompts.path={file}: not UTF-8 at byte {40 + 1 + 23}; save the file as UTF-8" in refused(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file or directory; give a JSONL file" in refused(tmp_path / "no.jsonl")
    assert "Is a directory; give a JSONL file" in refused(tmp_path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_line_feeds_end_a_line(file: Path, character: str) -> None:
    """JSON allows these characters in texts as they are, and `ensure_ascii=False` leaves them there."""
    text = f"One{character}two"
    file.write_text(json.dumps({"id": "a", "prompt": text}, ensure_ascii=False) + f"\r\n{TEA}\r\n", encoding="utf-8")
    assert read(file) == [Prompt(id="a", text=text), Prompt(id="tea", text="Describe tea.")]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "prompt": "\\ud83d"}',
        '{"id": "\\ud83d", "prompt": "x"}',
        '{"id": "a", "prompt": "x", "answer": "\\ud83d"}',
        '{"id": "a", "prompt": "x", "\\ud83d": ["b"]}',
    ],
)
def test_half_a_surrogate_pair_is_refused(file: Path, line: str) -> None:
    """JSON allows it, UTF-8 does not: the journal and Parquet could not be written after hours of sampling."""
    file.write_text(f"{TEA}\n{line}\n")
    assert f"prompts.path={file}, line 2: " in refused(file)


def test_the_project_brings_prompts() -> None:
    prompts = read(file_of(Prompts(path="builtin", per_iteration=1)))
    assert len(prompts) >= 100
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_one_wording_is_one_prompt() -> None:
    texts = ["Describe tea.", "describe  TEA.\n", "Describe tea!", "Straße", "STRASSE", "Describe tea."]
    prompts = [Prompt(id=str(place), text=text) for place, text in enumerate(texts)]
    kept, repeated = distinct(prompts)
    assert ([prompt.id for prompt in kept], repeated) == (["0", "2", "3"], ["1", "4", "5"])
    builtin = read(file_of(Prompts(path="builtin", per_iteration=1)))
    assert distinct(builtin) == (builtin, [])


def test_a_path_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert file_of(Prompts(path="~/mine.jsonl", per_iteration=1)) == Path("/home/ann/mine.jsonl")
    nobodys = file_of(Prompts(path="~nobody-of-this-name/mine.jsonl", per_iteration=1))
    assert "prompts.path=~nobody-of-this-name/mine.jsonl: No such file" in refused(nobodys)


# -- dealing -----------------------------------------------------------------------------------------------------------


def config(*, iterations: int = 2, seed: int = 0, engine: Any = None, **prompts: Any) -> Config:
    return resolve(
        {
            "name": "deal",
            "seed": seed,
            "iterations": iterations,
            "model": "some/id",
            "prompts": {"path": "mine.jsonl", "per_iteration": 3, "heldout": 2, **prompts},
            "sample": {"max_tokens": 24},
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "engine": engine or {},
        }
    )


def some(number: int) -> list[Prompt]:
    return [Prompt(id=f"p{index}", text=f"Prompt {index}?") for index in range(number)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


@given(
    spare=st.integers(0, 5),
    heldout=st.integers(0, 4),
    hand=st.integers(1, 4),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_no_prompt_is_dealt_twice(
    spare: int, heldout: int, hand: int, iterations: int, seed: int, data: st.DataObject
) -> None:
    prompts = some(heldout + hand * iterations + spare)
    chosen = config(iterations=iterations, seed=seed, per_iteration=hand, heldout=heldout)
    held, _, hands = deal(prompts, chosen)
    assert [len(held), *map(len, hands)] == [heldout] + [hand] * iterations
    dealt = held + [prompt for one in hands for prompt in one]
    assert len(set(ids(dealt))) == len(dealt)
    assert set(dealt) <= set(prompts)
    assert deal(data.draw(st.permutations(prompts)), chosen) == (held, [], hands)


def test_prompts_that_decide_are_not_those_that_report() -> None:
    held = deal(some(20), config(iterations=2)).heldout
    dealt = deal(some(20), config(iterations=2, validation=5))
    assert dealt.heldout == held  # whatever else is set aside
    assert len(dealt.validation) == 5
    everything = [*dealt.heldout, *dealt.validation, *(prompt for hand in dealt.hands for prompt in hand)]
    assert len(set(ids(everything))) == len(everything) == 2 + 5 + 6
    with pytest.raises(
        ConfigError, match=r"12 usable prompts, but 13 are needed \(2 held out, 5 for validation, 3 for"
    ):
        deal(some(12), config(iterations=2, validation=5))


def test_what_is_trained_on_anyway_is_not_set_aside() -> None:
    """A question in another case and with other blanks is the same question."""
    prompts = some(20)
    held = deal(prompts, config()).heldout
    seen = {wording("  " + prompt.text.upper().replace(" ", "\n ")) for prompt in held}
    dealt = deal(prompts, config(iterations=6), seen)
    assert not set(held) & set(dealt.heldout)
    assert set(held) <= {prompt for hand in dealt.hands for prompt in hand}
    everything = {wording(prompt.text) for prompt in prompts}
    with pytest.raises(ConfigError, match=r"the steps train on 20 of 20 usable prompts, and the others are fewer"):
        deal(prompts, config(), everything)


def test_the_seed_decides_who_is_dealt() -> None:
    dealt = [deal(some(20), config(seed=seed)) for seed in range(5)]
    assert len({str(held) for held, _, _ in dealt}) == 5
    assert len({str(hands) for _, _, hands in dealt}) == 5


def test_more_iterations_go_on_with_the_same_cards() -> None:
    """A run with more iterations begins as the shorter one did."""
    held, _, hands = deal(some(20), config(iterations=2))
    assert deal(some(20), config(iterations=5))[0] == held
    assert deal(some(20), config(iterations=5))[2][:2] == hands


def test_too_few_prompts() -> None:
    # 2 held out and 3 for each of 4 iterations are 14.
    deal(some(14), config(iterations=4))
    with pytest.raises(ConfigError) as caught:
        deal(some(13), config(iterations=4))
    assert "mine.jsonl: 13 usable prompts, but 14 are needed (2 held out, 3 for each of 4" in str(caught.value)
    # With reuse, one hand must be there.
    deal(some(5), config(iterations=4, reuse=True))
    with pytest.raises(ConfigError, match="4 usable prompts, but 5 are needed"):
        deal(some(4), config(iterations=4, reuse=True))


@given(rest=st.integers(1, 9), hand=st.integers(1, 9), seed=st.integers(0, 9), data=st.data())
@settings(deadline=None, max_examples=100)
def test_reuse_goes_through_the_deck_again_and_again(rest: int, hand: int, seed: int, data: st.DataObject) -> None:
    hand = min(hand, rest)
    prompts = some(2 + rest)
    chosen = config(iterations=12, seed=seed, per_iteration=hand, reuse=True)
    held, _, hands = deal(prompts, chosen)
    assert all(len(set(ids(one))) == hand for one in hands)  # never twice in one iteration
    assert not set(ids(held)) & {prompt.id for one in hands for prompt in one}
    assert deal(data.draw(st.permutations(prompts)), chosen) == (held, [], hands)
    # Nobody comes a second time before everybody came once.
    dealt = [prompt.id for one in hands for prompt in one]
    assert len(set(dealt[:rest])) == min(rest, len(dealt))


def test_reuse_favours_nobody() -> None:
    """9 prompts, 7 at a time: after 63 iterations everybody had 49 turns, and never one more than another before."""
    _, _, hands = deal(some(9), config(iterations=63, heldout=0, per_iteration=7, reuse=True))
    turns = Counter({prompt.id: 0 for prompt in some(9)})
    spread = []
    for hand in hands:
        turns.update(ids(hand))
        spread.append(max(turns.values()) - min(turns.values()))
    assert max(spread) <= 1


def test_reuse_shuffles_again() -> None:
    _, _, hands = deal(some(10), config(iterations=6, heldout=0, per_iteration=10, reuse=True))
    assert len({str(hand) for hand in hands}) == 6


# -- prompts that do not fit -------------------------------------------------------------------------------------------


NEEDS = {"sample.max_tokens": 24, "the judge": 96}


def test_prompts_that_leave_no_room_are_left_out() -> None:
    # 200 tokens, of which the judge may take 96 (more than the 24 of samples): 104 are left.
    chosen = config(engine={"max_model_len": 200})
    prompts = some(4)
    lengths = {"p0": 104, "p1": 105, "p2": 1, "p3": 500}
    assert usable(prompts, lengths, NEEDS, chosen) == (
        [prompts[0], prompts[2]],
        ["p1", "p3"],
    )


@pytest.mark.parametrize("size", [96, 50])
def test_a_request_that_leaves_no_room_for_any_prompt_is_refused(size: int) -> None:
    small = config(engine={"max_model_len": 200}).model_copy(update={"engine": Engine(max_model_len=size)})
    with pytest.raises(ConfigError, match=rf"max_model_len={size} leaves no room for a prompt: the judge takes 96"):
        usable(some(1), {"p0": 1}, NEEDS, small)
