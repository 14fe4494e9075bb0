"""SPPO: win rates of comparisons, and the pair that they make."""

import asyncio
import math
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.recipes.comparing import NOT_COMPARED, preference, win_rates
from rsrlm.records import Judgement, Preferred, Prompt, Request, Sampling, Scored, Task, Unparsed, Verdict
from rsrlm.settings.base import ConfigError
from rsrlm.settings.train import SPPO

THREE = [response(index, text) for index, text in enumerate(("one", "two", "three"))]
UNREAD = Unparsed(reason="little mass on letters")
TASKS = [Task(iteration=1, prompt=Prompt(id=name, text=f"Say {name}.")) for name in ("tea", "ale")]


def compared(verdicts: dict[tuple[int, int], Verdict]) -> list[Judgement]:
    return [
        Judgement(
            id=f"01/tea/{first}~{second}", prompt_id="tea", response_id=f"01/tea/{first}", index=first, role="duel",
            judge="j", text="", token_ids=(), finish_reason="stop", weight_version="M1", verdict=verdict,
            sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=0),
        )
        for (first, second), verdict in verdicts.items()
    ]  # fmt: skip


def preferred(share: float) -> Preferred:
    return Preferred(winner="tie" if share == 0.5 else "A" if share > 0.5 else "B", share=share)


def of_scores(scores: list[float]) -> dict[tuple[int, int], Verdict]:
    """P(i beats j) = sigmoid(s_i - s_j), whichever is shown first."""
    every = range(len(scores))
    return {(i, j): preferred(1 / (1 + math.exp(scores[j] - scores[i]))) for i in every for j in every if i != j}


def rates(verdicts: dict[tuple[int, int], Verdict], soft: bool = True) -> list[float | Unparsed]:
    found = win_rates(THREE, compared(verdicts), soft)
    assert list(found) == [one.id for one in THREE]
    return [one.points if isinstance(one, Scored) else one for one in found.values()]  # type: ignore[union-attr,misc]


def test_win_rates_by_hand() -> None:
    """P(0 beats 1) .7311, P(0 beats 2) .8808, and a half against itself."""
    assert rates(of_scores([1, 0, -1])) == pytest.approx([0.7040, 0.5, 0.2960], abs=5e-5)


def test_hard_win_rates() -> None:
    """0 beats both, 1 beats 2: (1/2 + 1 + 1) / 3, (1/2 + 0 + 1) / 3, (1/2) / 3."""
    assert rates(of_scores([1, 0, -1]), soft=False) == pytest.approx([5 / 6, 1 / 2, 1 / 6])


def test_who_prefers_what_stands_first_prefers_nobody() -> None:
    verdicts = {(i, j): preferred(0.9) for i in range(3) for j in range(3) if i != j}
    assert rates(verdicts) == pytest.approx([0.5] * 3)
    assert preference(preferred(0.7), preferred(0.6), True) == pytest.approx(0.55)
    assert preference(preferred(0.7), preferred(0.6), False) == 0.5


def test_what_cannot_be_read_is_left_out() -> None:
    """One order is not enough: the judge may prefer a place. 0 and 1 are compared with 2 alone."""
    verdicts = of_scores([1, 0, -1]) | {(0, 1): UNREAD}
    assert rates(verdicts) == pytest.approx([(0.5 + 0.8808) / 2, (0.5 + 0.7311) / 2, 0.2960], abs=5e-5)
    alone = rates(verdicts | {(2, 0): UNREAD})
    assert alone[0] == NOT_COMPARED
    assert alone[1:] == pytest.approx([(0.5 + 0.7311) / 2, (0.5 + 0.2689) / 2], abs=5e-5)


def words(shown: dict[str, str], request: Request, held: str) -> str:
    """The judge likes the longer text; all responses to ale are the same."""
    if request.label_ids:
        a, b = len(shown["response A"]), len(shown["response B"])
        return "tie" if a == b else "A" if a > b else "B"
    _, name, index = request.id.split("/")
    return "tea " * (int(index) + 1) if name == "tea" else "ale"


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="sppo", sample={"responses": 3}), encoder)
    engine, log = Scripted(encoder.tokenizer, words), Memory()
    batch = asyncio.run(recipe.iteration(run_of(engine, log), 1, model("M1"), TASKS))
    (made,) = batch.items
    share = 7 / 9
    assert made.id == "01/tea/2>0"
    assert (made.chosen_score, made.rejected_score) == pytest.approx(((0.5 + 2 * share) / 3, (2.5 - 2 * share) / 3))
    assert (made.weight, made.target) == (1, 1)
    assert batch.dropped == {"equal scores": 1}
    orders = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert [one.id for one in batch.groups[0].comparisons] == [f"01/tea/{i}~{j}" for i, j in orders]
    asked = len(engine.requests)
    again = asyncio.run(recipe.iteration(run_of(engine, log), 1, model("M1"), TASKS))
    assert (list(again.items), len(engine.requests)) == (list(batch.items), asked)


def test_what_a_plan_says(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="sppo", sample={"responses": 5}), encoder)
    demand = recipe.demand(10)
    assert demand.requests == {"actor": (50, 24), "duel": (200, 1)}
    assert (demand.items, recipe.scale) == (10, (0, 1))


def test_its_loss_is_its_own(make_config: Any) -> None:
    train = make_config(recipe="sppo").planned[0].config.train
    assert isinstance(train, SPPO)
    assert (train.loss, train.beta) == ("sppo", 0.001)
    with pytest.raises(ConfigError, match=r"train\.loss"):
        make_config(recipe="sppo", train={"loss": "sigmoid"})
    with pytest.raises(ConfigError, match=r"train\.loss"):
        make_config(recipe="self_rewarding", train={"loss": "sppo"})


def test_what_has_no_answer_is_not_compared(make_config: Any, encoder: ChatEncoder) -> None:
    """A response of a thought alone would lose against each, and push the others up."""
    texts = ["So. <R> tea", "No marker", "So. <R> tea tea"]

    def thinking(shown: dict[str, str], request: Request, held: str) -> str:
        return words(shown, request, held) if request.label_ids else texts[int(request.id.rpartition("/")[2])]

    engine = Scripted(encoder.tokenizer, thinking)
    for recipe, keys, compared in (("sppo", {"sample": {"responses": 3}}, 2), ("oaif", {}, 0)):
        config = make_config(recipe=recipe, thought={}, engine={"max_model_len": 2048}, **keys)
        batch = asyncio.run(recipe_of(config, encoder).iteration(run_of(engine), 1, model("M1"), TASKS[:1]))
        assert len(batch.groups[0].comparisons) == compared
        assert {pair.id for pair in batch.items} <= {"01/tea/2>0"}
    assert batch.dropped == {"no text": 1}
