"""Comparisons of judgements, and the pairs of judgements that come of them."""

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from scripted import Characters, Memory, Seeded, context_of, judge_pairs, model, run_of

from rsrlm.config import Config, resolve
from rsrlm.engines import JUDGE_PRIORITY
from rsrlm.meta_judging import EVEN, most_uncertain
from rsrlm.recipes.meta_rewarding import MetaRewarding, decided
from rsrlm.recipes.self_rewarding import in_training_order
from rsrlm.records import Completion, Group, NoPair, PreferencePair, Prompt, Request, Scored, Task, Unparsed
from rsrlm.run import Run
from rsrlm.settings.base import ConfigError

PROMPTS = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk", "t", "1", "water")]


def config(**meta: Any) -> Config:
    """Two responses to each prompt, with three judgements each."""
    return resolve(
        {
            "name": "meta",
            "seed": 5,
            "model": "some/id",
            "prompts": {"path": "builtin", "per_iteration": 4},
            "sample": {"responses": 2, "max_tokens": 24, "temperature": 0.9, "top_p": 0.8},
            "judge": {"kind": "text", "judgements": 3},
            "steps": [{"recipe": "meta_rewarding", "meta": meta}],
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "engine": {"max_model_len": 512},
        }
    )


def recipe_of(made_by: Config) -> MetaRewarding:
    context = context_of(made_by, Characters())
    return MetaRewarding(made_by.planned[0].config, context, context)


def compare(
    engine: Any,
    log: Any = None,
    prompts: list[Prompt] = PROMPTS[:2],
    made_by: Config | None = None,
    run: Run | None = None,
) -> list[Group]:
    over = run or run_of(engine, log)
    tasks = [Task(iteration=1, prompt=prompt) for prompt in prompts]

    async def work() -> list[Group]:
        return list(await over.groups(await over.load(model("M4")), recipe_of(made_by or config()), tasks))

    return asyncio.run(asyncio.wait_for(work(), 20))


def test_judgements_are_compared_in_both_orders() -> None:
    """Those of the response whose scores differ most, in one call; all comparisons of a prompt share a fence, and none
    a seed."""
    engine, log = Seeded(), Memory()
    run = run_of(engine, log)
    groups = compare(engine, run=run)
    asked = {request.id: request for request in engine.requests}
    for group in groups:
        response = most_uncertain(group.responses, group.judgements, 5)
        assert response is not None
        readable = [j for j in group.judgements if j.response_id == response.id and isinstance(j.verdict, Scored)]
        expected = {(a.id, b.index): (a, b) for a, b in itertools.permutations(readable, 2)}
        assert {one.id for one in group.comparisons} == {f"{of}~{other}" for of, other in expected}
        assert [one.id for one in group.comparisons] in engine.calls
        fences = set()
        for one in group.comparisons:
            of, other = one.id.split("~")
            first, second = expected[of, int(other)]
            request = asked[one.id]
            *shown, fence = "".join(map(chr, request.prompt_token_ids)).split("|")
            assert shown == [group.prompt.text, response.text, first.text, second.text]
            fences.add(fence)
            assert request.priority == JUDGE_PRIORITY
            assert (one.prompt_id, one.response_id, one.index, one.role, one.judge) == (
                group.prompt.id, response.id, first.index, "meta", "meta (text)",
            )  # fmt: skip
            assert one.sampling == request.sampling
        assert len(fences) == 1
    assert len({request.sampling.seed for request in engine.requests}) == len(engine.requests)

    made = [one for group in groups for one in group.comparisons]
    screen = cast(Any, run.screen)
    assert [tick for tick in screen.ticks if tick[0] == "compare"] == [("compare", 1, 2)] * len(made)
    assert screen.totals == [("iteration 1", {"respond": 4, "judge": 12, "compare": 12})]
    again = Seeded()
    assert compare(again, log) == groups
    assert again.requests == []


def test_comparisons_that_do_not_fit_are_unread_and_not_sent() -> None:
    """300 tokens are for the verdict. The others of the same prompt are asked as they are elsewhere."""

    class Long(Seeded):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            own = request.id.rpartition("#")[2]
            text = {"0": "Score: 1", "1": "x" * 120 + "\nScore: 2", "2": "Score: 3"}.get(own)
            return replace(made, text=text or "An answer.", finish_reason="stop")

    engine = Long()
    made_by = config(max_tokens=300)
    (group,) = compare(engine, prompts=PROMPTS[:1], made_by=made_by.model_copy(update={"engine": made_by.engine}))
    assert len(group.comparisons) == 6
    narrow = made_by.model_copy(update={"engine": made_by.engine.model_copy(update={"max_model_len": 400})})
    engine = Long()
    (group,) = compare(engine, prompts=PROMPTS[:1], made_by=narrow)
    unsent = [one for one in group.comparisons if one.verdict == Unparsed(reason="judge prompt too long")]
    assert [one.id.rpartition("#")[2] for one in unsent] == ["0~1", "1~0", "1~2", "2~1"]
    assert {(one.weight_version, one.token_ids) for one in unsent} == {("", ())}
    asked = [request.id.rpartition("#")[2] for request in engine.requests if "~" in request.id]
    assert sorted(asked) == ["0~2", "2~0"]


class Opinionated(Seeded):
    """Scores 1, 3 and 5 for every response, and judgements 1 and 2 beat judgement 0. Nothing about milk is readable."""

    async def generate(self, request: Request) -> Completion:
        own = request.id.rpartition("#")[2]
        text = {"0": "Score: 1", "1": "Score: 3", "2": "Score: 5"}.get(own, "")
        if "~" in own:
            text = {"0": "Winner: B", "1": "Winner: A", "2": "Winner: A"}[own[0]] if "0" in own else "Neither."
        made = await super().generate(request)
        return replace(made, text="" if "milk" in request.id else text or made.text, finish_reason="stop")


@pytest.mark.parametrize("weights", ["iteration", "prompt", "none"])
def test_judge_pairs_are_of_the_judgements_that_were_compared(weights: str) -> None:
    """All responses are as uncertain as each other: which one is taken, and which judgement wins, is the seed's say."""
    engine = Opinionated()
    groups = compare(engine, prompts=PROMPTS)
    recipe = recipe_of(config(weights=weights))
    found, over_all = judge_pairs(recipe, groups)
    assert list(found) == [f"01/{prompt.id}" for prompt in PROMPTS]
    assert found.pop("01/milk") == NoPair(reason="no response with two readable judgements")
    asked = {request.id: request for request in engine.requests}
    winners, responses = set(), set()
    for name, pair in found.items():
        group = next(group for group in groups if group.id == name)
        compared = {one.response_id for one in group.comparisons}
        assert isinstance(pair, PreferencePair)
        winner, _, loser = pair.id.rpartition("#")[2].partition(">")
        assert compared == {pair.id.rpartition("#")[0]}
        assert (pair.chosen_id, loser) == (f"{compared.pop()}#{winner}", "0")
        assert pair.prompt_token_ids == asked[pair.chosen_id].prompt_token_ids  # what the judge itself was shown
        winners.add(winner)
        responses.add(pair.chosen_id[-3])
    assert (winners, responses) == ({"1", "2"}, {"0", "1"})
    ids = [pair.id for pair in found.values() if isinstance(pair, PreferencePair)]
    assert ids == ["01/tea/1#1>0", "01/t/0#1>0", "01/1/1#1>0", "01/water/0#2>0"]  # resumed runs rely on it
    assert judge_pairs(recipe, groups)[0].items() >= found.items()
    assert over_all == EVEN  # each win was seen in both orders


class Divided(Seeded):
    """Response 1 has 4 points and response 0 has 2, but for judgements of response 1 that say 3 and 5; the judgement
    that says 5 wins. All ends by itself."""

    async def generate(self, request: Request) -> Completion:
        own = request.id.rpartition("#")[2]
        text = f"An answer to {request.id}."
        if "~" in own:
            text = {"2": "Winner: A"}.get(own[0], "Winner: B" if own[2] == "2" else "Neither.")
        elif "#" in request.id:
            text = f"Score: {2 if '/0#' in request.id else 3 + int(own)}"
        return replace(await super().generate(request), text=text, finish_reason="stop")


def test_a_batch_has_both_kinds_of_pairs_in_an_order_of_ids_and_seed() -> None:
    recipe, groups = recipe_of(config()), compare(Divided(), prompts=PROMPTS)
    batch = recipe.items(1, groups)
    actor, judged = (sorted(pair.id for pair in batch.items if pair.kind == kind) for kind in ("actor", "judge"))
    assert actor == sorted(f"01/{prompt.id}/1>0" for prompt in PROMPTS)
    assert [name.rpartition(">")[0] for name in judged] == sorted(f"01/{prompt.id}/1#2" for prompt in PROMPTS)
    order = [pair.id for pair in batch.items]
    assert order != sorted(order)
    assert order == [pair.id for pair in recipe.items(1, groups[::-1]).items]
    assert order == [pair.id for pair in in_training_order(list(batch.items), 5, 1)]
    assert order != [pair.id for pair in recipe.items(2, groups).items]
    assert batch.dropped == {}
    assert batch.groups == groups


def test_what_a_batch_says_about_its_comparisons() -> None:
    """Judgement 0 loses in both orders, and 1 and 2 are not told apart: four decided comparisons of six."""
    prompts = [*PROMPTS, Prompt(id="milkshake", text="Say milkshake.")]
    batch = recipe_of(config()).items(1, compare(Opinionated(), prompts=prompts))
    assert {kind: number for kind, number in batch.dropped.items() if kind.startswith("judge: ")} == {
        "judge: no response with two readable judgements": 2
    }
    assert sum(batch.dropped.values()) == 2 + 6  # all responses to a prompt have the same mean
    assert batch.measures == {
        "meta": {
            "weights": "iteration",
            "position_weights": {"first": 0.5, "second": 0.5},
            "comparisons_decided": 16,
            "comparisons_unreadable": 8,
            "first_position_wins": 0.5,
        }
    }


def test_without_comparisons_nothing_is_said_of_positions() -> None:
    assert decided([]) == {"comparisons_decided": 0, "comparisons_unreadable": 0, "first_position_wins": None}


@pytest.mark.parametrize(("read", "tokens"), [("text", 300), ("letters", 1)])
def test_what_a_plan_says(read: str, tokens: int) -> None:
    """Three judgements of one response, in both orders: six comparisons. A judge's prompt has 400 tokens, and a pair of
    judgements is about a response of 24."""
    recipe = recipe_of(config(read=read))
    demand = recipe.demand(10)
    judged = recipe.judge.max_tokens
    assert demand.requests == {"actor": (20, 24), "judge": (60, judged), "meta": (60, tokens)}
    assert demand.items == 20
    assert demand.item_tokens == 400 + 24 + 2 * judged
    assert recipe.needs()["the meta-judge"] == recipe.meta.needs(24 + 2 * judged) > 0


def test_a_template_may_print_what_the_prompt_carries(tmp_path: Path) -> None:
    template = tmp_path / "meta.jinja"
    fields = ("instruction", "response", "judgement_a", "judgement_b", "fence", "data.reference")
    template.write_text(" ".join(f"{{{{ {name} }}}}" for name in fields))
    made_by = config(template=str(template))
    carries = [replace(prompt, data={"reference": "A drink."}) for prompt in PROMPTS[:1]]
    (group,) = compare(Seeded(), prompts=carries, made_by=made_by)
    assert group.comparisons
    with pytest.raises(ExceptionGroup) as caught:
        compare(Seeded(), prompts=PROMPTS[:1], made_by=made_by)
    assert "prompt 'tea' has no 'reference'" in str(caught.value.exceptions[0])


def test_a_template_that_is_not_there_is_named_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^meta\.template='nowhere'"):
        recipe_of(config(template="nowhere"))


def test_a_resumed_run_asks_as_before() -> None:
    """Seeds and fences of everything that is asked: no release may change them while runs go on."""
    engine = Seeded()
    compare(engine)
    asked = {request.id: request for request in engine.requests}
    seeds = {name: asked[name].sampling.seed for name in ("01/tea/0", "01/tea/0#1", "01/tea/0#2~0")}
    assert seeds == {
        "01/tea/0": 3913104472571874090,
        "01/tea/0#1": 8962293754405235360,
        "01/tea/0#2~0": 2811300901876898492,
    }
    fences = ["".join(map(chr, asked[name].prompt_token_ids)).split("|")[-1] for name in ("01/tea/0#1", "01/tea/0#2~0")]
    assert fences == ["9949cdb9", "d93484ef"]
