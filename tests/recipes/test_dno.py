"""DNO: which responses are far enough apart."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.recipes.dno import FarApart, pairs
from rsrlm.records import NoPair, PreferencePair, Prompt, Request, Scored, Task, Unparsed, Verdict
from rsrlm.report.summary import summary_of

PAPER = FarApart(floor=5)


def found(teacher: float | None, own: list[float | None], rule: FarApart = PAPER, **of_first: Any) -> Any:
    """Pairs as "g>0"; the first response may be cut."""
    responses = [response(0, "0", **of_first), *(response(n, str(n)) for n in range(1, len(own)))]
    responses = [*responses, replace(response(-1, "gold", tokens=(7, 2)), id="01/tea/g", role="data")]
    points: dict[str, Verdict] = {
        one.id: Unparsed(reason="no score line") if score is None else Scored(points=score)
        for one, score in zip(responses, [*own, teacher], strict=True)
    }
    made = pairs("01/tea", responses, points, rule)
    return made if isinstance(made, NoPair) else {pair.id.removeprefix("01/tea/") for pair in made}


def test_all_pairs_by_hand() -> None:
    """The teacher's, 0 and 1 are good; each beats 2, 3 and 4, which are 2, 3 and 1 points below the students' 5."""
    assert found(6, [5, 5, 3, 2, 4]) == {f"{good}>{bad}" for good in "g01" for bad in "234"}


def test_the_teacher_may_lose() -> None:
    expected = {f"0>{bad}" for bad in "g1234"} | {f"{good}>{bad}" for good in "12" for bad in "g34"}
    assert found(4, [6, 5, 5, 4, 1]) == expected
    assert len(expected) == 11


def test_margins_are_of_who_wrote_the_better_one() -> None:
    assert found(5, [5, 4]) == {"0>1"}  # 1 is enough for the model's own, not for the teacher's
    assert found(6, [4, 3]) == {"g>0", "g>1"}
    rule = FarApart(floor=3, margin=1, own_margin=2)
    assert found(5, [4, 3], rule) == {"g>0", "g>1"}


def test_no_pair() -> None:
    assert found(4, [4, 1]) == NoPair(reason="none good enough")
    assert found(5, [5, 4.5]) == NoPair(reason="too near each other")
    assert found(None, [None, None]) == NoPair(reason="no scored response")
    assert found(None, [5, 1], cut=True) == NoPair(reason="none good enough")  # what was cut does not win
    assert found(6, [1, 6], cut=True) == {"g>0", "1>0"}


def test_the_probability_that_the_better_one_is_better() -> None:
    two = [response(0, "0"), response(1, "1")]
    points: dict[str, Verdict] = {two[0].id: Scored(points=5), two[1].id: Scored(points=4)}
    (soft,) = pairs("01/tea", two, points, FarApart(floor=5, soft=True))
    assert isinstance(soft, PreferencePair)
    assert soft.target == pytest.approx(0.7311, abs=5e-5)
    # Its loss with beta h = .5 is -t log sigmoid(.5) - (1 - t) log sigmoid(-.5).
    assert soft.target * math.log1p(math.exp(-0.5)) + (1 - soft.target) * math.log1p(math.exp(0.5)) == pytest.approx(
        0.6085, abs=5e-5
    )
    (plain,) = pairs("01/tea", two, points, PAPER)
    assert isinstance(plain, PreferencePair)
    assert plain.target == 1


def answer(shown: dict[str, str], request: Request, held: str) -> str:
    if "response" not in shown:
        return f"{request.id.rpartition('/')[2]} points"
    return f"Fine.\nScore: {shown['response'][0]}"


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    """The answer of the data has 5 points, the model's own 0, 1, 2 and 3; ale has no answer in the data."""
    config = make_config(
        recipe="dno", sample={"responses": 4}, judge={"kind": "text", "judgements": 1, "max_tokens": 40},
        engine={"max_model_len": 2048}, pair={"margin": 3.0},
    )  # fmt: skip
    tasks = [
        Task(iteration=0, prompt=Prompt(id="tea", text="Say tea.", data={"reference": "5 points"})),
        Task(iteration=0, prompt=Prompt(id="ale", text="Say ale.")),
    ]
    recipe, engine, log = recipe_of(config, encoder), Scripted(encoder.tokenizer, answer), Memory()
    run = run_of(engine, log)
    run.begin(recipe, lambda iteration: ())
    batch = asyncio.run(recipe.iteration(run, 0, model("M0"), tasks))
    assert {pair.id for pair in batch.items} == {"00/tea/g>0", "00/tea/g>1", "00/tea/g>2"}
    assert batch.dropped == {"none good enough": 1}
    assert batch.measures == {"replay": {"pairs": 0}}
    assert [one.id for one in batch.groups[0].judgements] == [f"00/tea/{name}#0" for name in "0123g"]
    assert {pair.chosen_token_ids for pair in batch.items} == {encoder.target("5 points")}
    assert len(engine.requests) == 4 + 5 + 4 + 4
    summary = summary_of(batch.groups, batch.items)
    assert (summary["responses"], summary["mean_score"]) == (8, 1.5)  # 0, 1, 2 and 3: of the model's own alone
    again = asyncio.run(recipe.iteration(run, 0, model("M0"), tasks))
    assert (list(again.items), len(engine.requests)) == (list(batch.items), 17)


def test_what_a_plan_says(make_config: Any, encoder: ChatEncoder) -> None:
    demand = recipe_of(make_config(recipe="dno", sample={"responses": 5}, replay=[0.5]), encoder).demand(10)
    assert demand.requests == {"actor": (50, 24), "judge": (60, 1)}
    assert demand.items == 225  # of 6, 15 pairs; and half as many again
