"""Near-duplicates by hand, against the plain definition and against `rouge_score`."""

import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from rouge_score.tokenizers import DefaultTokenizer

from rsrlm.data import prompts as prompt_files
from rsrlm.data.prompt_pool import PromptPool
from rsrlm.settings.methods import Prompts

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = ("self_instruct_seed_tasks.jsonl", "user_oriented_instructions.jsonl", "alpaca_eval_instructions.jsonl")


def rouge_l() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second, which other workers of pytest need not wait

    return RougeScorer(["rougeL"], use_stemmer=False)


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
    pool = PromptPool([known], max_rouge=max_rouge)
    assert pool.add(text) == expected


def test_the_most_similar_prompt_keeps_it_out() -> None:
    pool = PromptPool(["a b c d w x", "a b c d e y z", "a b c d e x", "x a b c d e"], max_rouge=0.5)
    assert pool.add("a b c d e f") == "a b c d e x"  # 10 / 12 as the last one; the second has 10 / 13
    assert pool.add("p q r s") is None
    assert pool.add("p q r s t") == "p q r s"  # an added one counts like a known one


def test_known_prompts_count_even_if_similar_to_each_other() -> None:
    pool = PromptPool(["a b c d", "a b c d e", "a b c d e f"])
    assert pool.add("b c d e f g") == "a b c d e f"  # 10 / 12; the first has 6 / 10, the second 8 / 11
    pool = PromptPool()
    assert pool.add("a b c d") is None
    assert pool.add("a b c d e f") == "a b c d"
    assert pool.add("c d e f g h") is None  # what was kept out does not keep others out


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "A!", "??", "ä", "e-f"]), max_size=9).map(" ".join)
LIMITS = st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


@given(known=st.lists(WORDS, max_size=4), texts=st.lists(WORDS, max_size=12), max_rouge=LIMITS)
@settings(deadline=None, max_examples=200)
def test_pool_is_the_plain_definition(known: list[str], texts: list[str], max_rouge: float) -> None:
    pool, there = PromptPool(known, max_rouge=max_rouge), list(known)
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
    scorer, pool = rouge_l(), PromptPool(max_rouge=max_rouge)
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
    scorer = rouge_l()
    rng = random.Random(1)
    for _ in range(200):
        one, other = rng.randrange(len(texts)), rng.randrange(len(texts))
        assert scorer.score(texts[one], texts[other])["rougeL"].fmeasure == pytest.approx(similarity[one, other], 1e-6)
    kept: list[int] = []
    for place in range(len(texts)):
        # cdist rounds to 32 bits.
        if not kept or max(similarity[place, kept]) <= max_rouge + 1e-6:
            kept.append(place)
    pool = PromptPool(max_rouge=max_rouge)
    assert [place for place, text in enumerate(texts) if pool.add(text) is None] == kept
    assert len(kept) < len(texts) - 100
