"""OAIF: which of two responses is preferred, and how surely."""

import asyncio
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.engines import JUDGE_PRIORITY
from rsrlm.recipes.oaif import pair
from rsrlm.records import (
    Judgement,
    NoPair,
    PreferencePair,
    Preferred,
    Prompt,
    Request,
    Response,
    Sampling,
    Task,
    Unparsed,
    Verdict,
    seed_of,
)
from rsrlm.settings.base import ConfigError

TWO = (response(0, "one"), response(1, "two"))
TASKS = [Task(iteration=1, prompt=Prompt(id=name, text=f"Say {name}.")) for name in ("tea", "ale")]


def preferred(share: float) -> Preferred:
    return Preferred(winner="tie" if share == 0.5 else "A" if share > 0.5 else "B", share=share)


def paired(
    first: Verdict, second: Verdict, soft: bool = True, responses: tuple[Response, Response] = TWO
) -> PreferencePair | NoPair:
    compared = [
        Judgement(
            id=f"01/tea/{n}~{1 - n}", prompt_id="tea", response_id=f"01/tea/{n}", index=n, role="duel", judge="j",
            text="", token_ids=(), finish_reason="stop", weight_version="M1", verdict=verdict,
            sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=0),
        )
        for n, verdict in enumerate((first, second))
    ]  # fmt: skip
    return pair("01/tea", responses, compared, soft)


@pytest.mark.parametrize(
    ("first", "second", "chosen", "target"),
    [(0.7, 0.6, 0, 0.55), (0.55, 0.2, 0, 0.675), (0.3, 0.9, 1, 0.8), (0.0, 1.0, 1, 1.0)],
)
def test_the_preference_is_the_mean_over_both_orders(first: float, second: float, chosen: int, target: float) -> None:
    found = paired(preferred(first), preferred(second))
    assert isinstance(found, PreferencePair)
    assert found.id == f"01/tea/{chosen}>{1 - chosen}"
    assert (found.chosen_id, found.rejected_id) == (f"01/tea/{chosen}", f"01/tea/{1 - chosen}")
    assert (found.target, found.chosen_score, found.rejected_score) == pytest.approx((target, target, 1 - target))
    assert found.weight == 1


def test_verdicts_in_the_place_of_probabilities() -> None:
    """Whoever prefers what stands first prefers nothing; a win and a tie are a preference, and surely so."""
    assert paired(preferred(0.7), preferred(0.6), soft=False) == NoPair(reason="equal preference")
    for second, share in ((0.5, 0.75), (0.2, 1.0)):
        found = paired(preferred(0.7), preferred(second), soft=False)
        assert isinstance(found, PreferencePair)
        assert (found.chosen_id, found.chosen_score, found.target) == ("01/tea/0", share, 1.0)


def test_no_pair() -> None:
    assert paired(preferred(0.5), preferred(0.5)) == NoPair(reason="equal preference")
    assert paired(preferred(0.7), preferred(0.7)) == NoPair(reason="equal preference")
    unread = Unparsed(reason="little mass on letters")
    for orders in ((unread, preferred(0.1)), (preferred(0.1), unread)):
        assert paired(*orders) == NoPair(reason="a comparison that cannot be read")
    same = (response(0, "one", tokens=(5, 2)), response(1, "two", tokens=(5, 2)))
    assert paired(preferred(0.9), preferred(0.1), responses=same) == NoPair(reason="same tokens")


def test_what_was_cut_may_lose_and_never_wins() -> None:
    for bad in (response(0, "one", cut=True), response(0, " ")):
        responses = (bad, response(1, "two"))
        assert paired(preferred(0.9), preferred(0.1), responses=responses) == NoPair(reason="no complete response")
        found = paired(preferred(0.1), preferred(0.9), responses=responses)
        assert isinstance(found, PreferencePair)
        assert found.rejected_id == "01/tea/0"


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    """The judge likes the second response to tea, in both orders; both responses to ale are the same."""

    def answer(shown: dict[str, str], request: Request, held: str) -> str:
        if request.label_ids:
            return "A" if shown["response A"] == "tea 1" else "B"
        _, name, index = request.id.split("/")
        return f"tea {index}" if name == "tea" else "ale"

    recipe = recipe_of(make_config(recipe="oaif"), encoder)
    engine, log = Scripted(encoder.tokenizer, answer), Memory()
    run = run_of(engine, log)
    batch = asyncio.run(recipe.iteration(run, 1, model("M1"), TASKS))
    (made,) = batch.items
    assert (made.id, made.target) == ("01/tea/1>0", pytest.approx(7 / 9))
    assert batch.dropped == {"same text": 1}
    tea, ale = batch.groups
    assert [one.id for one in tea.responses] == ["01/tea/0", "01/tea/1"]
    assert [(one.id, one.response_id, one.index) for one in tea.comparisons] == [
        ("01/tea/0~1", "01/tea/0", 0),
        ("01/tea/1~0", "01/tea/1", 1),
    ]
    assert (ale.comparisons, ale.judgements) == ((), ())
    compared = {request.id: request for request in engine.requests if "~" in request.id}
    for name, request in compared.items():
        assert request.sampling.seed == seed_of(0, 1, "01/tea", "duel", name.rpartition("/")[2])
        assert (request.priority, request.role) == (JUDGE_PRIORITY, "duel")
    fences = {
        encoder.tokenizer.decode(one.prompt_token_ids).partition("<response A ")[2][:8] for one in compared.values()
    }
    assert len(fences) == 1
    assert run.screen.totals == [("iteration 1", {"respond": 4, "compare": 4})]
    again = asyncio.run(recipe.iteration(run_of(Scripted(encoder.tokenizer, answer), log), 1, model("M1"), TASKS))
    assert list(again.items) == list(batch.items)


@pytest.mark.parametrize(("read", "tokens"), [("letters", 1), ("text", 50)])
def test_what_a_plan_says(read: str, tokens: int, make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="oaif", compare={"read": read, "max_tokens": 50}), encoder)
    demand = recipe.demand(10)
    assert demand.requests == {"actor": (20, 24), "duel": (20, tokens)}
    assert (demand.items, demand.item_tokens) == (10, 2 * 24 + 64)
    assert recipe.needs()["the judge of two responses"] == recipe.compare.needs(48) > 48
    assert recipe.needs()["sample.max_tokens"] == len(encoder.user("")) + 24
    assert recipe.asks == [recipe.compare.source]


def test_what_it_cannot_do_is_refused(make_config: Any, encoder: ChatEncoder) -> None:
    with pytest.raises(ConfigError, match=r"sample\.responses=3 with recipe oaif, which compares 2; set it"):
        make_config(recipe="oaif", sample={"responses": 3})
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "x"}}
    for read in ("letters", "structured"):
        with pytest.raises(ConfigError, match=rf"compare\.read={read}: judge\.endpoint compares in text; set compare"):
            make_config(recipe="oaif", judge=server, compare={"read": read})
    behind = make_config(recipe="oaif", judge=server, compare={"read": "text"}, evaluate={"duel": False})
    assert recipe_of(behind, encoder).needs()["the judge of two responses"] == 0  # a server has a context of its own
    with pytest.raises(ConfigError, match=r"compare\.max_tokens=512 leaves no room for a prompt"):
        make_config(recipe="oaif", compare={"read": "text", "max_tokens": 512})
    make_config(recipe="oaif", compare={"max_tokens": 512})  # letters take one token
    with pytest.raises(ConfigError, match=r"^compare\.template='nowhere'"):
        recipe_of(make_config(recipe="oaif", compare={"template": "nowhere"}), encoder)
