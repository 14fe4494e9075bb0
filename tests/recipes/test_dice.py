"""DICE: the price of a character, the pairs after it, and an iteration."""

import asyncio
from typing import Any

import pytest
from made import response
from scripted import Memory, model, recipe_of, run_of
from test_methods import Written

from rsrlm.chat import ChatEncoder
from rsrlm.pairing import Candidate
from rsrlm.recipes.dice import best_and_worst, price
from rsrlm.records import NoPair, PreferencePair, Prompt, Task

TASKS = [Task(iteration=1, prompt=Prompt(id=name, text=f"Say {name}.")) for name in ("tea", "ale")]


def ranked(points: list[float], chars: list[int]) -> list[Candidate]:
    return [
        Candidate(response=response(index, "x" * length), points=score)
        for index, (score, length) in enumerate(zip(points, chars, strict=True))
    ]


def test_the_price_by_hand() -> None:
    """At 0 the first is chosen, 300 characters longer than the last; at .001 the scores are .4, .6 and -.2."""
    found = ranked([1.0, 0.9, 0.1], [600, 300, 300])
    assert price([found]) == (0.001, 0)
    pair = best_and_worst("01/tea", found, 0.001)
    assert isinstance(pair, PreferencePair)
    assert pair.id == "01/tea/1>2"
    assert (pair.chosen_score, pair.rejected_score) == pytest.approx((0.6, -0.2))
    free = best_and_worst("01/tea", found, 0.0)
    assert isinstance(free, PreferencePair)
    assert free.id == "01/tea/0>2"


def test_one_price_for_all_prompts() -> None:
    """The second prompt's chosen is 300 shorter whatever the price, so the first's may be 300 longer."""
    second = ranked([5.0, -5.0], [100, 400])
    assert price([ranked([1.0, 0.9, 0.1], [600, 300, 300]), second]) == (0.0, 0)
    assert price([]) == (0.0, None)
    assert price([ranked([1.0, 1.0], [5, 5])]) == (0.0, 0)


def test_no_pair_of_equal_scores() -> None:
    assert best_and_worst("01/tea", ranked([1.0, 1.0], [5, 5]), 0.5) == NoPair(reason="equal scores")


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    """Response 0 is the most likely and the longest; a price of .1 a character makes 1 the chosen one."""
    config = make_config(recipe="dice", sample={"responses": 3}, pair={"least": 3, "least_chars": 1})
    logprobs = {"M0": [-30.0, -30.0, -30.0], "M1": [-27.0, -28.0, -29.0]}
    texts = ["a" * 22, "b" * 8, "c" * 8]
    engine = Written(encoder, lambda index, *_: texts[index], lambda index, held: logprobs[held][index])
    recipe, log, run = recipe_of(config, encoder), Memory(), None
    for _ in range(2):
        run = run_of(engine, log)
        run.names = ["M0", "M1"]
        batch = asyncio.run(recipe.iteration(run, 1, model("M1"), TASKS))
        assert {pair.id for pair in batch.items} == {"01/tea/1>2", "01/ale/1>2"}
        # 3 - 22 a < 2 - 8 a from a = 1/14 on
        assert batch.measures == {"length": {"alpha": 0.072, "chars_chosen_less_rejected": 0}}
        asked = len(engine.requests)
    assert len(engine.requests) == asked == 2 * 3 + 2 * 2 * 3
    assert [one.verdict.points for one in batch.groups[0].judgements] == pytest.approx([3, 2, 1])


def test_who_takes_part(make_config: Any, encoder: ChatEncoder) -> None:
    config = make_config(recipe="dice", sample={"responses": 3}, pair={"least": 3, "least_chars": 4})
    engine = Written(encoder, lambda index, *_: ["long enough", "also so", "no"][index], lambda index, _: -index - 9.0)
    batch = asyncio.run(recipe_of(config, encoder).iteration(run_of(engine), 0, model("M0"), TASKS))
    assert (list(batch.items), batch.dropped) == ([], {"too few whole responses": 2})
    assert batch.measures == {"length": {"alpha": 0.0, "chars_chosen_less_rejected": None}}


def test_the_first_model_goes_by_its_own_likelihood(make_config: Any, encoder: ChatEncoder) -> None:
    """There is no ratio to itself: the mean of a token's log-probability ranks, as for cream."""
    config = make_config(recipe="dice", sample={"responses": 3}, pair={"least": 3, "least_chars": 1})
    engine = Written(encoder, lambda index, *_: "abc"[index], lambda index, _: [-30.0, -10.0, -20.0][index])
    batch = asyncio.run(recipe_of(config, encoder).iteration(run_of(engine), 0, model("M0"), TASKS))
    assert {pair.id for pair in batch.items} == {"01/tea/1>0", "01/ale/1>0"}
    assert len(engine.requests) == 2 * 2 * 3  # asked of one model alone
