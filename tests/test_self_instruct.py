"""Requests and their answers by hand; near-duplicates against the plain definition and against `rouge_score`."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from rsrlm.data import prompts as prompt_files
from rsrlm.data.self_instruct import (
    CUT,
    HEADER,
    TOO_SIMILAR,
    Continuation,
    Filters,
    Pool,
    demonstrations,
    id_of,
    refused,
    request_text,
    select,
    split,
)
from rsrlm.settings.base import ConfigError
from rsrlm.settings.methods import Prompts

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = ("self_instruct_seed_tasks.jsonl", "user_oriented_instructions.jsonl", "alpaca_eval_instructions.jsonl")
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


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def plain_lcs(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for token in one:
        before = 0
        for place, against in enumerate(other, start=1):
            before, row[place] = row[place], before + 1 if token == against else max(row[place], row[place - 1])
    return row[-1]


def plain_f(one: str, other: str) -> Fraction:
    first, second = (DefaultTokenizer(use_stemmer=False).tokenize(text) for text in (one, other))
    if not first or not second:
        return Fraction(0)
    return Fraction(2 * plain_lcs(first, second), len(first) + len(second))


def test_plain_f_by_hand() -> None:
    assert plain_f("Name a green tea", "Name some tea, please!") == Fraction(2 * 2, 8)
    assert plain_f("a b c d", "d c b a") == Fraction(2, 8)
    assert plain_f("Tea", "???") == 0


@pytest.mark.parametrize(
    ("known", "text", "max_rouge", "expected"),
    [
        ("a b c d e f g x y z", "a b c d e f g p q r", 0.7, None),  # 14 / 20 is not more than 0.7
        ("a b c d e f g x y", "a b c d e f g p q r", 0.7, "a b c d e f g x y"),  # 14 / 19 is
        ("a b c", "x y z", 0.0, None),
        ("a b c", "x y c", 0.0, "a b c"),
        ("Tea, please!", "tea PLEASE", 0.7, "Tea, please!"),  # tokens are lower case without punctuation
        ("Tea, please!", "tea PLEASE", 1.0, None),  # 1 is not more than 1
        ("Tea, please!", "Tea, please!", 1.0, "Tea, please!"),  # but it is the same text
        ("お茶", "緑茶", 0.7, None),  # no tokens: nothing in common
        ("お茶", "お茶", 0.7, "お茶"),
        ("", "", 0.7, ""),
        ("a b", "", 0.0, None),
    ],
)
def test_pool_by_hand(known: str, text: str, max_rouge: float, expected: str | None) -> None:
    pool = Pool([known], max_rouge=max_rouge)
    assert pool.add(text) == expected


def test_the_most_similar_prompt_keeps_it_out() -> None:
    pool = Pool(["a b c d w x", "a b c d e y z", "a b c d e x", "x a b c d e"], max_rouge=0.5)
    assert pool.add("a b c d e f") == "a b c d e x"  # 10 / 12 as the last one; the second has 10 / 13
    assert pool.add("p q r s") is None
    assert pool.add("p q r s t") == "p q r s"  # an added one counts like a known one


def test_known_prompts_count_even_if_similar_to_each_other() -> None:
    pool = Pool(["a b c d", "a b c d e", "a b c d e f"])
    assert pool.add("b c d e f g") == "a b c d e f"  # 10 / 12; the first has 6 / 10, the second 8 / 11
    pool = Pool()
    assert pool.add("a b c d") is None
    assert pool.add("a b c d e f") == "a b c d"
    assert pool.add("c d e f g h") is None  # what was kept out does not keep others out


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "A!", "??", "ä", "e-f"]), max_size=9).map(" ".join)
LIMITS = st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


@given(known=st.lists(WORDS, max_size=4), texts=st.lists(WORDS, max_size=12), max_rouge=LIMITS)
@settings(deadline=None, max_examples=200)
def test_pool_is_the_plain_definition(known: list[str], texts: list[str], max_rouge: float) -> None:
    pool, there = Pool(known, max_rouge=max_rouge), list(known)
    limit = Fraction(str(max_rouge))
    for text in texts:
        similar = max((plain_f(text, other) for other in there), default=Fraction(0))
        most = [other for other in there if plain_f(text, other) == similar]
        if text in there:
            assert pool.add(text) == text
        elif similar > limit:
            assert pool.add(text) == most[0]
        else:
            assert pool.add(text) is None
            there.append(text)


def built_in() -> list[str]:
    return [
        prompt.text
        for prompt in prompt_files.read(prompt_files.file_of(Prompts(path=prompt_files.BUILTIN, per_iteration=1)))
    ]


def recorded() -> list[str]:
    found = []
    for name in FILES:
        if not (DATA / name).exists():
            pytest.skip(f"needs {DATA / name}")
        lines = (DATA / name).read_text(encoding="utf-8").split("\n")
        found += [json.loads(line)["instruction"] for line in lines if line]
    return found


def varied(texts: list[str], count: int) -> Iterator[str]:
    """Texts in between: a word replaced, left out or moved, so that many are near any limit."""
    rng = random.Random(0)
    for _ in range(count):
        words = rng.choice(texts).split()
        for _ in range(rng.randrange(6)):
            place = rng.randrange(len(words))
            word = words.pop(place)
            if words and rng.random() < 0.7:
                words.insert(rng.randrange(len(words)), rng.choice([word, "other"]))
            words = words or [word]
        yield " ".join(words)


@pytest.mark.parametrize("max_rouge", [0.7, 0.4])
def test_pool_against_rouge_score(max_rouge: float) -> None:
    """With the package itself. It rounds on the way: exactly 0.7 can come out as 0.7000000000000001."""
    texts = built_in()[:80]
    texts += varied(texts, 100)
    scorer, pool = RougeScorer(["rougeL"], use_stemmer=False), Pool(max_rouge=max_rouge)
    kept: list[str] = []
    for text in texts:
        scores = [round(scorer.score(other, text)["rougeL"].fmeasure, 12) for other in kept]
        similar = max(scores, default=0.0)
        if similar > max_rouge:
            assert pool.add(text) == (text if text in kept else kept[scores.index(similar)])
        else:
            assert pool.add(text) is None
            kept.append(text)
    assert 20 < len(kept) < 170


@pytest.mark.parametrize("max_rouge", [0.7, 0.3])
def test_pool_on_recorded_prompts(max_rouge: float) -> None:
    """All against all, by RapidFuzz on whole lists of tokens and without any bound; spot-checked by `rouge_score`."""
    texts = built_in() + recorded()
    texts += varied(texts, 400)
    tokenizer = DefaultTokenizer(use_stemmer=False)
    tokens = [tokenizer.tokenize(text) for text in texts]
    assert all(tokens)
    similarity = cdist(tokens, tokens, scorer=Indel.normalized_similarity)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(1)
    for _ in range(200):
        one, other = rng.randrange(len(texts)), rng.randrange(len(texts))
        assert scorer.score(texts[one], texts[other])["rougeL"].fmeasure == pytest.approx(similarity[one, other], 1e-6)
    kept: list[int] = []
    for place in range(len(texts)):
        # cdist rounds to 32 bits.
        if not kept or max(similarity[place, kept]) <= max_rouge + 1e-6:
            kept.append(place)
    pool = Pool(max_rouge=max_rouge)
    assert [place for place, text in enumerate(texts) if pool.add(text) is None] == kept
    assert len(kept) < len(texts) - 100


# -- selection ---------------------------------------------------------------------------------------------------------


def written(request: int, text: str, cut: bool = False) -> Continuation:
    return Continuation(request=request, text=text, cut=cut, model="tea-7b", demonstrations=("d1", "d2"))


def test_select() -> None:
    pool = Pool(["Name four kinds of green tea."])
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
    kept, reasons = select(answers, Pool(), Filters(), cut_at_separator=True)
    assert ([one.text for one in kept], reasons) == (["Explain rain to me."], Counter())
    kept, reasons = select(answers, Pool(), Filters())
    assert ([one.text for one in kept], reasons) == (["Explain rain to me. ---"], Counter({CUT: 1}))


def test_nothing_comes_of_nothing() -> None:
    assert select([], Pool(), Filters()) == ([], Counter())
    assert select([written(0, ""), written(1, "", cut=True)], Pool(), Filters()) == ([], Counter())


def test_two_continuations_of_a_request_have_no_order() -> None:
    with pytest.raises(ValueError, match="two continuations of request 4"):
        select([written(4, " Name a tea."), written(5, ""), written(4, " Name a cake.")], Pool(), Filters())


ITEMS = st.lists(st.lists(st.sampled_from("abcd"), min_size=2, max_size=8).map(" ".join), max_size=4)


@given(lists=st.lists(ITEMS, max_size=6), cuts=st.lists(st.booleans(), min_size=6, max_size=6), data=st.data())
@settings(deadline=None)
def test_what_holds_for_every_selection(lists: list[list[str]], cuts: list[bool], data: st.DataObject) -> None:
    answers = [
        written(number, "".join(f"\n{place}. {item}" for place, item in enumerate(items, start=9)), cuts[number])
        for number, items in enumerate(lists)
    ]
    kept, reasons = select(answers, Pool(), Filters())
    assert select(data.draw(st.permutations(answers)), Pool(), Filters()) == (kept, reasons)
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
