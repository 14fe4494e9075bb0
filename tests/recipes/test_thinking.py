"""Thoughts before answers: who sees what, and the pair of the answers after the penalty for their length."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, context_of, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.judges.base import Context
from rsrlm.pairing import Candidate
from rsrlm.recipes.thinking import pair, penalised
from rsrlm.records import NoPair, PreferencePair, Prompt, Request, Task
from rsrlm.settings.base import ConfigError

TASKS = [Task(iteration=1, prompt=Prompt(id="tea", text="Say tea."))]
THREE = ([3, 5, 4.8], [100, 400, 100])


def test_the_penalty_by_hand() -> None:
    """Deviations are those of the population: .8994 of the scores, 141.42 of the lengths."""
    assert penalised(*THREE, 0) == pytest.approx([-1.408, 0.815, 0.593], abs=5e-4)
    assert penalised(*THREE, 0.25) == pytest.approx([-1.232, 0.462, 0.770], abs=5e-4)
    assert penalised([4, 4, 4], [100, 400, 100], 0.5) == pytest.approx([0.3536, -0.7071, 0.3536], abs=5e-5)
    assert penalised([3, 5], [100, 100], 0.5) == [-1, 1]


@pytest.mark.parametrize(("rho", "chosen"), [(0.0, 1), (0.25, 2)])
def test_the_pair_carries_the_judges_scores(rho: float, chosen: int) -> None:
    taking_part = [
        Candidate(response=response(index, "x" * length), points=points)
        for index, (points, length) in enumerate(zip(*THREE, strict=True))
    ]
    found = pair("01/tea", taking_part, rho)
    assert isinstance(found, PreferencePair)
    assert found.id == f"01/tea/{chosen}>0"
    assert (found.chosen_score, found.rejected_score) == (THREE[0][chosen], 3)


def test_no_pair() -> None:
    one, two = (Candidate(response=response(index, "x"), points=3) for index in range(2))
    assert pair("01/tea", [one], 0.25) == NoPair(reason="fewer than two scored responses")
    assert pair("01/tea", [one, two], 0.25) == NoPair(reason="equal scores")
    cut = [Candidate(response=response(index, "x", cut=True), points=index, may_win=False) for index in range(2)]
    assert pair("01/tea", cut, 0.25) == NoPair(reason="no complete response")


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("T <R> A", ("T", "A")),
        ("A", ("A", "")),
        ("T <R> A <R> B", ("T <R> A <R> B", "")),
        ("T <R> ", ("T", "")),
        ("<R>A", ("", "A")),
    ],
)
def test_what_is_thought_and_what_is_answer(written: str, parts: tuple[str, str], encoder: ChatEncoder) -> None:
    assert Context(encoder=encoder, seed=0, room=9, question="Say <R>", marker="<R>").parts_of(written) == parts
    assert Context(encoder=encoder, seed=0, room=9).parts_of(written) == ("", written)


def answer(shown: dict[str, str], request: Request, held: str) -> str:
    if "response" in shown:  # a judge: of the answer alone
        return f"Fine.\nScore: {len(shown['response'])}"
    return ("I wonder. <R> tea", "I wonder. <R> te", "No marker at all", "So. <R> t")[
        int(request.id.rpartition("/")[2])
    ]


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    """The judge likes longer answers; the one without a marker has none, though it is the longest text."""
    config = make_config(
        recipe="thinking", thought={}, pair={"rho": 0.1}, sample={"responses": 4}, engine={"max_model_len": 2048},
        judge={"kind": "text", "judgements": 1, "max_tokens": 40},
    )  # fmt: skip
    recipe, engine, log = recipe_of(config, encoder), Scripted(encoder.tokenizer, answer), Memory()
    batch = asyncio.run(recipe.iteration(run_of(engine, log), 1, model("M1"), TASKS))
    (made,) = batch.items
    assert (made.id, made.chosen_score, made.rejected_score) == ("01/tea/0>3", 3, 1)
    first, _, unmarked, _ = batch.groups[0].responses
    assert (first.thought, first.text) == ("I wonder.", "tea")
    assert (unmarked.thought, unmarked.text) == ("No marker at all", "")
    assert encoder.tokenizer.decode(made.chosen_token_ids[:-1]) == "I wonder. <R> tea"  # both are trained
    asked = encoder.tokenizer.decode(made.prompt_token_ids)
    assert "write <R> once" in asked
    assert "<question>\nSay tea.\n</question>" in asked
    judged = [encoder.tokenizer.decode(one.prompt_token_ids) for one in engine.requests if "#" in one.id]
    assert not any("wonder" in one or "<R>" in one for one in judged)
    asked_before = len(engine.requests)
    again = asyncio.run(recipe.iteration(run_of(engine, log), 1, model("M1"), TASKS))
    assert (list(again.items), len(engine.requests)) == ([made], asked_before)


def test_answers_that_nobody_gave(make_config: Any, encoder: ChatEncoder) -> None:
    config = make_config(recipe="thinking", thought={"marker": "<R>"}, engine={"max_model_len": 2048})
    recipe = recipe_of(config, encoder)
    texts = [response(index, "") for index in range(2)]
    assert recipe.pair(TASKS[0], texts, []) == NoPair(reason="no answer after a thought")


def test_what_it_needs(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe thinking trains thoughts, but thought is not set: write thought"):
        recipe_of(make_config(recipe="thinking"), encoder)
    recipe = recipe_of(make_config(thought={}), encoder)  # any recipe may think
    plain = recipe_of(make_config(), encoder)
    more = recipe.needs()["sample.max_tokens"] - plain.needs()["sample.max_tokens"]
    assert more == len(recipe.context.asked("")) - len(encoder.user("")) > 40
    own = tmp_path / "own.jinja"
    own.write_text("Think, then answer: {{ instruction }}")
    with pytest.raises(ConfigError, match=r"thought\.template='.*own\.jinja': does not name thought\.marker='<R>'"):
        context_of(make_config(thought={"template": str(own)}), encoder)
    assert context_of(make_config(thought={"template": str(own), "marker": "answer:"}), encoder).marker == "answer:"
    own.write_text("Think, then <R>.")
    with pytest.raises(ConfigError, match=r"thought\.template=.*does not use instruction"):
        context_of(make_config(thought={"template": str(own)}), encoder)
