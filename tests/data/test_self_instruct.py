"""Requests and their answers by hand, and rounds of them with a model that writes by a script."""

import asyncio
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompt_pool import plain_f

from rsrlm.data import prompts as prompt_files
from rsrlm.data.prompt_pool import PromptPool
from rsrlm.data.self_instruct import (
    CUT,
    HEADER,
    TOO_SIMILAR,
    Continuation,
    Filters,
    demonstrations,
    id_of,
    make_prompts,
    refused,
    request_text,
    select,
    split,
)
from rsrlm.settings.base import ConfigError
from rsrlm.settings.data import SelfInstruct

SEEDS = [f"seed {n}" for n in range(20)]
NEW = [f"new {n}" for n in range(10)]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_six_seeds_and_two_generated_ones_are_shown() -> None:
    shown = demonstrations(SEEDS, NEW, seed=7, batch=3)
    assert len(set(shown)) == 8
    assert len(set(shown) & set(SEEDS)) == 6
    assert len(set(shown) & set(NEW)) == 2
    assert shown == demonstrations(SEEDS, NEW, seed=7, batch=3)


def test_requests_differ_by_batch_and_by_seed() -> None:
    shown = {tuple(demonstrations(SEEDS, NEW, seed=seed, batch=batch)) for seed in range(5) for batch in range(50)}
    assert len(shown) == 250


def test_generated_ones_stand_anywhere_and_each_prompt_has_its_turn() -> None:
    shown = [demonstrations(SEEDS, NEW, seed=0, batch=batch) for batch in range(200)]
    assert {place for one in shown for place, text in enumerate(one) if text in NEW} == set(range(8))
    assert {text for one in shown for text in one} == {*SEEDS, *NEW}


@pytest.mark.parametrize(("have", "from_generated"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_seeds_fill_up_while_there_are_few_generated_ones(have: int, from_generated: int) -> None:
    shown = demonstrations(SEEDS, NEW[:have], seed=0, batch=0)
    assert len(set(shown)) == 8
    assert len(set(shown) & set(NEW)) == from_generated


def test_other_numbers_of_demonstrations() -> None:
    shown = demonstrations(SEEDS, NEW, seed=0, batch=0, from_seeds=1, from_generated=4)
    assert (len(set(shown) & set(SEEDS)), len(set(shown) & set(NEW))) == (1, 4)


def test_too_few_seeds() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.path: 7 prompts .* shows 8 of them; add prompts"):
        demonstrations(SEEDS[:7], [], seed=0, batch=0)
    assert len(demonstrations(SEEDS[:7], NEW[:1], seed=0, batch=0)) == 8


def test_request_text() -> None:
    texts = ["Name a tea.", "Rewrite this:\n\n  a b\tc", "Translate the text :", "List these::", "E", "F", "G", "H"]
    assert request_text(texts) == (
        f"{HEADER}\n1. Name a tea.\n2. Rewrite this: a b c\n3. Translate the text\n4. List these\n"
        "5. E\n6. F\n7. G\n8. H\n9."
    )
    assert "\n" not in HEADER


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "cut", "expected"),
    [
        (" name a tea.\n10. Draft a\n  letter to NASA.\n11 . sum 3.5 and 4.", False,
         ["Name a tea.", "Draft a letter to NASA.", "Sum 3.5 and 4."]),
        (" Name a tea.\n10. Draft a let", True, ["Name a tea."]),
        (" Name a tea.\n10.", True, ["Name a tea."]),  # cut after the number: the one before is whole
        (" Name a tea.\n10", True, []),  # cut within it: nobody knows
        (" Name a tea.\n10.Draft\n11.  Sum", False, ["Name a tea.", "Draft", "Sum"]),
        (" Name a tea.\r\n10. Draft", False, ["Name a tea.", "Draft"]),
        (" Name a tea.\n10.\n11. Draft", False, ["Name a tea.", "Draft"]),
        ("9. Name a tea.\n10. Draft", False, ["Name a tea.", "Draft"]),  # the number written once more
        ("\n9. Name a tea.", False, ["Name a tea."]),
        ("ßeta is a letter", False, ["ßeta is a letter"]),
        ("", False, []),
        ("", True, []),
        (" \n\t ", False, []),
    ],
)  # fmt: skip
def test_split(completion: str, cut: bool, expected: list[str]) -> None:
    assert split(completion, cut) == expected


@pytest.mark.parametrize(
    "separator",
    ["---", "###", "===", "* * *".replace(" ", ""), "-----", "### Answers", "  ---  ", "Answer:", "answers:",
     "**Answer:**", "Answer 1: Green tea", "## Response", "Solution:\r", "11. ---", "11. Answer: Green tea"],
)  # fmt: skip
@pytest.mark.parametrize("cut", [False, True])
def test_a_separator_ends_the_prompts(separator: str, cut: bool) -> None:
    """What stands before it is whole, even if the answers were cut."""
    text = f" Name a tea.\n10. Draft a letter.\n{separator}\n1. Green tea is a tea.\n2. Dear"
    assert split(text, cut, cut_at_separator=True) == ["Name a tea.", "Draft a letter."]
    assert len(split(text, cut)) > 2  # not asked for


@pytest.mark.parametrize(
    "line", ["Answer the question above.", "- one", "-- two", "#1", "**bold**", "the answer: 4", "____ is red."]
)
def test_other_lines_are_no_separator(line: str) -> None:
    assert split(f" Name a tea.\n10. Draft\n{line}", False, cut_at_separator=True) == ["Name a tea.", f"Draft {line}"]


def test_without_a_separator_a_cut_item_is_left_out_all_the_same() -> None:
    assert split(" Name a tea.\n10. Draft", True, cut_at_separator=True) == ["Name a tea."]
    assert split("---\n1. Green tea", False, cut_at_separator=True) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hostile", [" ", "\n", "\n1", "# ", "* ", "1", "\t."])
def test_hostile_text_is_split_in_linear_time(hostile: str) -> None:
    """A second at most; in quadratic time it would be many minutes."""
    assert len(split("Tea\n" + hostile * 500_000, False, cut_at_separator=True)) <= 1


@given(text=st.text(alphabet=st.sampled_from("aB .:\n\t19-#ß\u2028")), cut=st.booleans(), separator=st.booleans())
def test_what_holds_for_every_split(text: str, cut: bool, separator: bool) -> None:
    whole, found = (split(text, one, cut_at_separator=separator) for one in (False, cut))
    assert found in (whole, whole[:-1])
    for item in whole:
        assert item == " ".join(item.split()) != ""
        assert not "a" <= item[0] <= "z"


# -- filters -----------------------------------------------------------------------------------------------------------

KEYWORD = "asks for what a text model cannot do"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name four green teas.", ""),
        ("Name three teas.", "too short"),
        ("", "too short"),
        (" ".join(["word"] * 150), ""),
        (" ".join(["word"] * 151), "too long"),
        ("Describe the image in words.", KEYWORD),
        ("Describe these IMAGES, in words.", KEYWORD),
        ("Look at the (graph) and explain.", KEYWORD),
        ("Write down the plot of Hamlet.", KEYWORD),
        ("Should I go to the dentist?", KEYWORD),
        ("Imagine a photographic memory, filed and mapped.", ""),  # not the whole word
        ("We go together to imagery of a paragraph.", ""),
        ("Write a program that adds numbers.", "forbidden start"),
        ("write a Program that adds numbers.", "forbidden start"),
        ("Please write a program that adds.", ""),
        ("- Name four green teas.", "starts with punctuation"),
        ('"Name" four green teas.', "starts with punctuation"),
        ("1 plus 2 is what?", ""),
        ("Ärger in vier Worten beschreiben.", "starts with a non-ASCII character"),
        ("名 four green teas.", "starts with a non-ASCII character"),
        ("Describe Ärger in four words.", ""),
        ("Name four green \ufffd teas.", "broken character"),
        ("Name four \0 green teas.", "broken character"),
        ("Name four \ud800 green teas.", "broken character"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    assert refused(text, Filters()) == reason


def test_own_filters() -> None:
    filters = Filters(min_words=0, max_words=2, keywords=("C++", "go  home", " "), forbidden_starts=())
    assert refused("Tea?", filters) == ""
    assert refused("Name three teas.", filters) == "too long"
    assert refused("Explain c++.", filters) == KEYWORD
    assert refused("Go home", filters) == KEYWORD
    assert refused("Explain C+", filters) == ""
    assert refused("Image", Filters(min_words=0, keywords=())) == ""


# -- selection ---------------------------------------------------------------------------------------------------------


def written(request: int, text: str, cut: bool = False) -> Continuation:
    return Continuation(request=request, text=text, cut=cut, model="tea-7b", demonstrations=("d1", "d2"))


def test_select() -> None:
    pool = PromptPool(["Name four kinds of green tea."])
    answers = [
        written(10, " Tell me how bees find their way home.\n10. Tell me about the sta", cut=True),
        written(
            9, " name five kinds of green tea.\n10. Tell me how bees find home.\n11. Draw a bee for me.\n12. Bees?"
        ),
        written(2, " Write a letter to my aunt.\n10. Write a letter to my aunt."),
        written(3, "\n10.\n11. Explain\nrain to me."),
    ]
    kept, reasons = select(answers, pool, Filters())
    assert [(one.text, one.request, one.index) for one in kept] == [
        ("Write a letter to my aunt.", 2, 0),
        ("Explain rain to me.", 3, 0),
        ("Tell me how bees find home.", 9, 1),  # 9 before 10: numbers, not texts
    ]
    # 10 / 12 for the tea and 12 / 14 for the bees.
    assert reasons == Counter({TOO_SIMILAR: 3, KEYWORD: 1, "too short": 1, CUT: 1})
    assert {(one.model, one.demonstrations) for one in kept} == {("tea-7b", ("d1", "d2"))}
    assert pool.add("Explain rain to me.") == "Explain rain to me."


def test_select_passes_the_separator_on() -> None:
    answers = [written(0, " Explain rain to me.\n---\n10. Rain is water that falls.", cut=True)]
    kept, reasons = select(answers, PromptPool(), Filters(), cut_at_separator=True)
    assert ([one.text for one in kept], reasons) == (["Explain rain to me."], Counter())
    kept, reasons = select(answers, PromptPool(), Filters())
    assert ([one.text for one in kept], reasons) == (["Explain rain to me. ---"], Counter({CUT: 1}))


def test_nothing_comes_of_nothing() -> None:
    assert select([], PromptPool(), Filters()) == ([], Counter())
    assert select([written(0, ""), written(1, "", cut=True)], PromptPool(), Filters()) == ([], Counter())


def test_two_continuations_of_a_request_have_no_order() -> None:
    with pytest.raises(ValueError, match="two continuations of request 4"):
        select([written(4, " Name a tea."), written(5, ""), written(4, " Name a cake.")], PromptPool(), Filters())


ITEMS = st.lists(st.lists(st.sampled_from("abcd"), min_size=2, max_size=8).map(" ".join), max_size=4)


@given(lists=st.lists(ITEMS, max_size=6), cuts=st.lists(st.booleans(), min_size=6, max_size=6), data=st.data())
@settings(deadline=None)
def test_what_holds_for_every_selection(lists: list[list[str]], cuts: list[bool], data: st.DataObject) -> None:
    answers = [
        written(number, "".join(f"\n{place}. {item}" for place, item in enumerate(items, start=9)), cuts[number])
        for number, items in enumerate(lists)
    ]
    kept, reasons = select(answers, PromptPool(), Filters())
    assert select(data.draw(st.permutations(answers)), PromptPool(), Filters()) == (kept, reasons)
    assert len(kept) + reasons.total() == sum(map(len, lists))  # everything is somewhere
    assert len({one.id for one in kept}) == len(kept)
    for one in kept:
        assert one.text == split(answers[one.request].text, False)[one.index]
        assert all(plain_f(one.text, other.text) <= Fraction("0.7") for other in kept if other is not one)


def test_ids_are_those_of_a_prompt_file(tmp_path: Path) -> None:
    """The same text has the same id for ever, and the file of generated prompts can be read."""
    assert id_of("Name four kinds of green tea.") == "generated-4f828aa29c111960"
    texts = ["Name four kinds of green tea.", "Name four kinds of # > / tea.", "名"]
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps({"id": id_of(text), "prompt": text}) + "\n" for text in texts))
    assert [prompt.text for prompt in prompt_files.read(path)] == texts


# -- rounds ------------------------------------------------------------------------------------------------------------

SEED_PROMPTS = {f"s{n}": f"Seed prompt number {n} about {'tea' * n}." for n in range(8)}
RULE = SelfInstruct()


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsrlm.data.self_instruct.ROUND", 3)
    monkeypatch.setattr("rsrlm.data.self_instruct.GIVE_UP_AFTER", 2)


def made(number: int, answers: dict[int, str], rule: SelfInstruct = RULE, seed: int = 0) -> tuple[Any, dict, list[int]]:
    """With a model that writes these answers, later requests first; what it was asked, and the counts."""
    asked: dict[int, str] = {}
    counts: list[int] = []

    async def complete(request: int, text: str) -> tuple[str, bool]:
        asked[request] = text
        for _ in range(9 - request % 9):
            await asyncio.sleep(0)
        return answers.get(request, ""), request == 7

    work = make_prompts(complete, SEED_PROMPTS, number, rule, seed=seed, model="M", count=counts.append)
    return asyncio.run(work), asked, counts


def test_rounds_go_on_until_there_are_enough() -> None:
    answers = {
        0: " Describe a red car.\n10. Name\n11. Explain how rain is made.",
        2: " Write a poem on snow and ice.\n10. Describe a red car.",
        4: " Describe a big red car.\n10. Tell me how bees find home.",
        5: " List some uses of a brick.",
    }
    found, asked, counts = made(4, answers)
    # By request and place, not by arrival; a whole round counts, and a prompt is compared with all before it.
    assert [(one.request, one.index, one.text) for one in found.prompts] == [
        (0, 0, "Describe a red car."), (0, 2, "Explain how rain is made."), (2, 0, "Write a poem on snow and ice."),
        (4, 1, "Tell me how bees find home."), (5, 0, "List some uses of a brick."),
    ]  # fmt: skip
    assert found.reasons == Counter({"too short": 1, TOO_SIMILAR: 2})
    assert (found.requests, sorted(asked), counts) == (6, list(range(6)), [3, 1])
    # The first round shows seeds alone, the second two of those made in the first.
    new = {one.id: one.text for one in found.prompts[:3]}
    for request, text in asked.items():
        shown = [line.partition(". ")[2] for line in text.splitlines()[1:-1]]
        assert len(shown) == 8
        assert sum(line in new.values() for line in shown) == (2 if request > 2 else 0)
    assert {len(set(one.demonstrations) & new.keys()) for one in found.prompts[3:]} == {2}
    texts = SEED_PROMPTS | new
    for one in found.prompts:
        assert asked[one.request] == request_text([texts[name] for name in one.demonstrations])
    again, same, _ = made(4, answers)
    assert (again, same) == (found, asked)
    assert made(4, answers, seed=1)[1] != asked


def test_rounds_without_a_new_prompt_end_it() -> None:
    """Two in a row; a prompt between them starts the count again. What the length limit cut is left out."""
    answers = {4: " Describe a red car.", 7: " Write a poem on snow and ice.\n10. Tell me how bees"}
    found, asked, counts = made(5, answers)
    assert [one.text for one in found.prompts] == ["Describe a red car.", "Write a poem on snow and ice."]
    assert (found.requests, len(asked), counts) == (15, 15, [0, 1, 1, 0, 0])
    assert found.reasons == Counter({CUT: 1})
    none, _, _ = made(5, {})
    assert (none.prompts, none.requests) == ([], 6)


def test_a_row_says_where_a_prompt_comes_from() -> None:
    found, _, _ = made(1, {1: " Describe a red car."})
    (prompt,) = found.prompts
    assert prompt.row == {
        "id": id_of("Describe a red car."), "prompt": "Describe a red car.", "request": 1, "index": 0, "model": "M",
        "demonstrations": prompt.demonstrations,
    }  # fmt: skip


def test_the_rules_of_a_config_are_followed() -> None:
    answers = {
        0: " Describe a red car.\n---\n10. It is red.",
        1: " Describe a red train.",
        2: " One two three four five",
    }
    rule = RULE.model_copy(update={"max_words": 4, "cut_at_separator": True, "max_rouge": 0.9})
    found, asked, _ = made(2, answers, rule.model_copy(update={"from_seeds": 3, "from_generated": 0}))
    assert [one.text for one in found.prompts] == ["Describe a red car.", "Describe a red train."]
    assert found.reasons == Counter({"too long": 1})
    assert all(len(text.splitlines()) == 3 + 2 for text in asked.values())
