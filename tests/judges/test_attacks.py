"""Thousands of responses that want to leave their place, to all judges together: see tests/hostile.py."""

import itertools
from typing import Any

import pytest
from hostile import as_read, attacks

from rsrlm.chat import ChatEncoder
from rsrlm.judges import verdicts
from rsrlm.judges.templates import (
    ADDITIVE_VARIABLES,
    META_VARIABLES,
    PAIRWISE_VARIABLES,
    fence_of,
    form_of,
    load_template,
)
from rsrlm.judges.true_false import FORM as TRUE_FALSE
from rsrlm.judges.verdicts import META_WINNER, SCORE, WINNER, claimed, parse_points, parse_winner
from rsrlm.recipes.process import ProcessBased
from rsrlm.records import Unparsed

ATTACKS = 300  # on each judge, and others on each
# Template, what it prints, its form, the field under attack, whether the answer is begun for the judge.
JUDGES = [
    ("additive", ADDITIVE_VARIABLES, SCORE, "response", False),
    ("additive_digits", ADDITIVE_VARIABLES, SCORE, "response", True),
    ("buckets", ADDITIVE_VARIABLES, SCORE, "instruction", False),
    ("pairwise", PAIRWISE_VARIABLES, WINNER, "response_a", True),
    ("pairwise_text", PAIRWISE_VARIABLES, WINNER, "response_b", False),
    ("meta", META_VARIABLES, META_WINNER, "judgement_a", False),
    ("meta_letters", META_VARIABLES, META_WINNER, "judgement_b", True),
    ("answer_true", ADDITIVE_VARIABLES, TRUE_FALSE, "response", True),
    ("step_true", ADDITIVE_VARIABLES, TRUE_FALSE, "response", True),
    ("steps", ProcessBased.shown, WINNER, "steps", True),
    ("steps_text", ProcessBased.shown, WINNER, "response_a", False),
]


def test_attacks_are_many_and_always_the_same() -> None:
    made = [text for seed in range(len(JUDGES)) for text in attacks(ATTACKS, seed)]
    assert made[:ATTACKS] == list(attacks(ATTACKS))
    assert len(made) == 3300
    assert len(set(made)) > 0.95 * len(made)
    assert sum(len(text) >= 100_000 for text in made) >= 10


@pytest.mark.parametrize(("name", "variables", "form", "field", "begun"), JUDGES, ids=[judge[0] for judge in JUDGES])
def test_no_attack_leaves_its_place_or_reads_as_a_verdict(
    tokenizer: Any, encoder: ChatEncoder, name: str, variables: frozenset[str], form: Any, field: str, begun: bool
) -> None:
    """The tokens around it stay the same, none of its own is special, and no line that a judge could repeat of it is a
    verdict."""
    template, pairwise = load_template(name, variables), form is not SCORE
    form, fence = form_of(template, form), fence_of(1)
    added = set(tokenizer.get_added_vocab().values())

    def shown(text: str) -> str:
        return claimed(text, form, pairwise)

    def prompt_of(text: str) -> tuple[int, ...]:
        fields = {**dict.fromkeys(variables, "Tea."), field: shown(text), "fence": fence}
        return encoder.encode(template, fields, form.prefix if begun else "")

    def same(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

    # Two texts that begin and end otherwise show where the field is.
    first, second = prompt_of("green tea"), prompt_of("A leaf")
    start, end = same(first, second), same(first[::-1], second[::-1])
    before, after = first[:start], first[len(first) - end :]
    read = parse_winner if pairwise else parse_points
    for text in attacks(ATTACKS, seed=[judge[0] for judge in JUDGES].index(name)):
        prompt = prompt_of(text)
        assert prompt[:start] == before, text
        assert prompt[len(prompt) - end :] == after, text
        middle = prompt[start : len(prompt) - end]
        assert not added & set(middle), text
        decoded = tokenizer.decode(middle, clean_up_tokenization_spaces=False)
        assert decoded.strip() == as_read(shown(text)).strip(), text
        assert fence not in decoded
        for line in set(shown(text).splitlines()[-40:]):
            assert isinstance(read(line, "stop", form), Unparsed), line


@pytest.mark.parametrize("form", [SCORE, WINNER], ids=["points", "winner"])
def test_what_follows_an_attack_is_the_judges_own_verdict(form: verdicts.Form) -> None:
    """A judge that repeats all of it and then decides."""
    read, last = (parse_points, "Score: 2") if form is SCORE else (parse_winner, "Winner: B")
    expected = read(last, "stop", form)
    assert not isinstance(expected, Unparsed)
    for text in attacks(ATTACKS):
        assert read(f"{claimed(text, form, form is WINNER)}\n{last}", "stop", form) == expected, text
