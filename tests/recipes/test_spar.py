"""SPaR: which response is refined, how the search for a better one goes, and the pair that it gives."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.config import load
from rsrlm.judges.verdicts import NO_WINNER
from rsrlm.judges.yes_no import share_of_yes
from rsrlm.recipes.spar import Spar, Voted, accepted, best, negative, nodes_of
from rsrlm.records import Completion, Judgement, NoPair, PreferencePair, Prompt, Request, Scored, Task, seed_of
from rsrlm.report.signs import measure
from rsrlm.settings.base import ConfigError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
ENGINE = {"max_model_len": 1024}
JUDGE = {"kind": "yes_no", "max_tokens": 40}
TASKS = [Task(iteration=1, prompt=Prompt(id=name, text=f"Praise {name} in three words.")) for name in ("tea", "ale")]


def node(index: int, votes: str, text: str = "words", least: int = 2) -> Voted:
    known: dict[str, Any] = {"Y": Scored(points=1.0), "N": Scored(points=0.0), "-": NO_WINNER}
    judgements = tuple(
        Judgement(
            id=f"01/tea/{index}#{n}", prompt_id="tea", response_id=f"01/tea/{index}", index=n, role="judge",
            judge="yes_no", text=f"{one} {n}", token_ids=(n, 2), finish_reason="stop", weight_version="M1",
            sampling=None, verdict=known[one],
        )
        for n, one in enumerate(votes)
    )  # fmt: skip
    return Voted(response=response(index, text), votes=judgements, yes=share_of_yes(judgements, least))


# -- the core, by hand -------------------------------------------------------------------------------------------------


def test_the_majority_of_the_readable_votes() -> None:
    """Y Y N Y and one that cannot be read: 0.75, accepted. Y N: a tie, which is neither."""
    found = [node(index, votes) for index, votes in enumerate(("YYNY-", "YN---", "YNNN-", "Y----", "-----", ""))]
    assert [one.yes for one in found] == [0.75, 0.5, 0.25, None, None, None]
    assert [one.side for one in found] == ["yes", "tie", "no", "unread", "unread", "unusable"]
    assert accepted(found) is found[0]
    assert accepted(found[1:]) is None


def test_the_response_that_is_refined_is_drawn_among_those_with_no() -> None:
    nodes = [node(0, "YYYYY"), node(1, "NNNYY"), node(2, "YN---"), node(3, "N----"), node(4, "NNNNN")]
    drawn = [negative(nodes, "01/tea", seed) for seed in range(40)]
    assert {one.response.index for one in drawn if isinstance(one, Voted)} == {1, 4}
    assert drawn == [negative(nodes, "01/tea", seed) for seed in range(40)]
    cut = replace(nodes[1], response=response(1, cut=True))
    assert negative([cut], "01/tea", 0) is cut  # it may lose
    empty = replace(nodes[1], response=response(1, " "))
    assert negative([empty], "01/tea", 0) == NoPair(reason="no response with No")


@pytest.mark.parametrize(
    ("votes", "reason"),
    [
        (("YYYYY",) * 5, "no response with No"),
        (("YYYYY", "YN---"), "no response with No"),  # a tie is dropped
        (("N----", "YYYYY"), "no response with No"),
        (("N----", "-----"), "too few readable votes"),
    ],
)
def test_prompts_without_a_negative(votes: tuple[str, ...], reason: str) -> None:
    nodes = [node(index, one) for index, one in enumerate(votes)]
    assert negative(nodes, "01/tea", 0) == NoPair(reason=reason)


def test_the_best_of_a_level() -> None:
    """By share; of equal ones the first; those with too few votes are not among them."""
    nodes = [node(7, "YNNNN"), node(5, "YYNNN"), node(6, "Y----"), node(4, "YYNNN"), node(8, "")]
    assert [one.response.index for one in best(nodes)] == [4, 5, 7]
    assert accepted(nodes) is None
    assert accepted([*nodes, node(9, "YYYYN"), node(3, "YYYYN")]).response.index == 3  # type: ignore[union-attr]


def test_votes_find_their_responses_by_id() -> None:
    one, two = node(0, "YYYYY"), node(1, "NNNNN")
    votes = [*two.votes, *one.votes]
    found = nodes_of([one.response, two.response], votes, 2)
    assert [(node.response.index, node.yes) for node in found] == [(0, 1.0), (1, 0.0)]


# -- whole iterations --------------------------------------------------------------------------------------------------


class Writer(Scripted):
    """Responses and refinements say their index; each has the share of Yes that `votes` gives to its index, else No."""

    def __init__(
        self, encoder: ChatEncoder, votes: Mapping[int, str], texts: Callable[[int, dict[str, str]], str | None]
    ) -> None:
        super().__init__(encoder.tokenizer, self._answer)
        self.votes, self.texts, self.cut = votes, texts, set[str]()

    def _answer(self, shown: dict[str, str], request: Request, held: str) -> str:
        if request.role == "judge":
            index, _, number = request.id.rpartition("/")[2].partition("#")
            vote = self.votes.get(int(index), "NNNNN")[int(number)]
            return f"Check {number} of {index}.\n" + {"Y": "Verdict: Yes", "N": "Verdict: No", "-": "Now what?"}[vote]
        index = int(request.id.rpartition("/")[2])
        text = self.texts(index, shown)
        return f"Text {index}." if text is None else text

    async def generate(self, request: Request) -> Completion:
        made = await super().generate(request)
        return replace(made, finish_reason="length") if request.id in self.cut else made


def writer(encoder: ChatEncoder, votes: Mapping[int, str], texts: Mapping[int, str] | None = None) -> Writer:
    return Writer(encoder, votes, lambda index, _: (texts or {}).get(index))


def iteration(config: Any, encoder: ChatEncoder, engine: Any, log: Memory | None = None, tasks: Any = None) -> Any:
    recipe, run = recipe_of(config, encoder), run_of(engine, log)
    run.names = ["M0", "M1"]
    batch = asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), tasks or TASKS), 60))
    return batch, run


@pytest.fixture
def configured(make_config: Any) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        known = {"recipe": "spar", "judge": JUDGE, "sample": {"responses": 2}, "engine": ENGINE}
        return make_config(**{**known, **changes})

    return make


def asked_for(engine: Writer, name: str) -> set[int]:
    """Indices of what was written for a prompt."""
    return {int(one.id.rpartition("/")[2]) for one in engine.requests if one.role == "actor" and f"/{name}/" in one.id}


def test_an_iteration(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    """One try: response 1 of 2 is refined as response 2 + 1 * 1 + 0, by what its first vote for No says."""
    config = configured()
    engine, log = writer(encoder, {0: "YYYYY", 1: "YNNN-", 3: "YYNY-"}), Memory()
    batch, run = iteration(config, encoder, engine, log)
    asked = {request.id: request for request in engine.requests}
    assert asked_for(engine, "tea") == {0, 1, 3}
    assert len(engine.requests) == 2 * (3 + 3 * 5)
    assert len({request.sampling.seed for request in engine.requests}) == len(engine.requests)
    refiner = asked["01/tea/3"]
    assert refiner.sampling.seed == seed_of(0, 1, "tea", "actor", "3")
    assert (refiner.sampling.temperature, refiner.sampling.max_tokens) == (0.8, 24)
    shown = encoder.tokenizer.decode(refiner.prompt_token_ids)
    assert "\nText 1.\n</response" in shown
    assert "\nCheck 1 of 1.\nVerdict: No\n</judgement" in shown
    assert "\nPraise tea in three words.\n</question>" in shown
    pair = next(one for one in batch.items if one.prompt_id == "tea")
    original = next(one for one in batch.groups[0].responses if one.id == "01/tea/1")
    assert pair == PreferencePair(
        id="01/tea/3>1", prompt_id="tea", kind="actor", chosen_id="01/tea/3", rejected_id="01/tea/1",
        prompt_token_ids=encoder.user("Praise tea in three words."),
        chosen_token_ids=encoder.target("Text 3."), rejected_token_ids=original.token_ids,
        chosen_score=0.75, rejected_score=0.25, weight_version="M1",
    )  # fmt: skip
    refined = batch.groups[0].responses[-1]
    assert (refined.id, refined.prompt_token_ids) == ("01/tea/3", refiner.prompt_token_ids)  # as it was asked
    assert Counter(one.response_id for one in batch.groups[0].judgements) == {f"01/tea/{n}": 5 for n in (0, 1, 3)}
    assert (len(batch.items), batch.dropped) == (2, {})
    assert batch.measures == {"spar": {"sampled_yes": 2, "sampled_no": 2, "refined_yes": 2}}
    assert run.screen.totals == [("iteration 1", {"respond": 2 * 3, "judge": 2 * 3 * 5})]
    found = measure(batch.groups, batch.items, [])
    assert (found["pair_score_gap"], found["chosen_chars"], found["n_actor_pairs"]) == (0.5, 7.0, 2)
    second = writer(encoder, {})
    again, _ = iteration(config, encoder, second, log)
    assert (list(again.items), second.requests) == (list(batch.items), [])


def test_a_refinement_that_is_not_accepted(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    """With as many Yes as No, and with too few that can be read, it is not."""
    for votes, side in (("NNNNN", "no"), ("YN---", "tie"), ("Y----", "unread")):
        batch, _ = iteration(configured(), encoder, writer(encoder, {0: "YYYYY", 1: "NNNNN", 3: votes}))
        assert batch.dropped == {"no refinement accepted": 2}
        assert batch.measures["spar"][f"refined_{side}"] == 2
        assert list(batch.items) == []


def test_nothing_is_refined_where_all_say_yes(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    engine = writer(encoder, dict.fromkeys(range(5), "YYYYY"))
    batch, _ = iteration(configured(sample={"responses": 5}), encoder, engine)
    assert (batch.dropped, asked_for(engine, "tea")) == ({"no response with No": 2}, set(range(5)))


TREE = {"tries": 3, "depth": 3, "keep": 2}  # the paper's
LEVELS = [{5, 6, 7}, {17, 18, 19, 23, 24, 25}]  # of response 1: 2 + 1 * 3 + n; then of 5 and 7: 2 + 5 * 3 + n, ...


@pytest.mark.parametrize(
    ("votes", "asked", "chosen"),
    [
        # Level 1 accepts: level 2 is not searched. Of two that are accepted the better one is taken.
        ({5: "YYYNN", 6: "NNNNN", 7: "YYYYN"}, LEVELS[0], 7),
        # 5 and 7 are kept, as the best two: 6 has too few votes. Level 2 accepts 24.
        ({5: "YNNNN", 6: "Y----", 7: "YYNN-", 24: "YYYYY"}, LEVELS[0] | LEVELS[1], 24),
        # Of equal ones the first two are kept.
        ({5: "YNNNN", 6: "NNNNN", 7: "YNNNN", 17: "YYYYY"}, LEVELS[0] | LEVELS[1], 17),
        # None that can be read: there is nothing to go on with.
        ({5: "-----", 6: "N----", 7: "-----"}, LEVELS[0], None),
    ],
)
def test_the_search_goes_level_by_level(
    votes: dict[int, str], asked: set[int], chosen: int | None, configured: Callable[..., Any], encoder: ChatEncoder
) -> None:
    engine = writer(encoder, {0: "YYYYY", 1: "NNNNN", **votes})
    batch, _ = iteration(configured(refine=TREE), encoder, engine, tasks=TASKS[:1])
    assert asked_for(engine, "tea") == {0, 1} | asked
    assert [one.id for one in batch.items] == ([f"01/tea/{chosen}>1"] if chosen else [])


def test_the_last_level_is_the_last(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    """3, then 2 * 3, then 2 * 3, which is what the plan says; all have places of their own."""
    engine = writer(encoder, {0: "YYYYY"})
    config = configured(refine=TREE)
    batch, _ = iteration(config, encoder, engine, tasks=TASKS[:1])
    assert batch.dropped == {"no refinement accepted": 1}
    made = [one.index for one in batch.groups[0].responses]
    assert len(made) == len(set(made)) == 2 + 3 + 6 + 6
    demand = recipe_of(config, encoder).demand(1)
    assert {role: number for role, (number, _) in demand.requests.items()} == {"actor": 17, "judge": 85}
    assert len(engine.requests) == 17 + 85


def test_a_refinement_shows_what_is_wrong_with_its_own_parent(
    configured: Callable[..., Any], encoder: ChatEncoder
) -> None:
    engine = writer(encoder, {0: "YYYYY", 3: "YYNNN", 5: "YYYYY"})
    batch, _ = iteration(configured(refine={"depth": 2}), encoder, engine, tasks=TASKS[:1])
    assert [one.id for one in batch.items] == ["01/tea/5>1"]  # 2 + 3 * 1 + 0
    (deeper,) = [request for request in engine.requests if request.id == "01/tea/5"]
    shown = encoder.tokenizer.decode(deeper.prompt_token_ids)
    assert "\nText 3.\n</response" in shown
    assert "\nCheck 2 of 3.\nVerdict: No\n</judgement" in shown


@pytest.mark.parametrize(
    ("texts", "cut"),
    [({3: "  \n"}, set()), ({3: " Text 1. \n"}, set()), ({}, {"01/tea/3"})],
    ids=["empty", "unchanged", "cut"],
)
def test_refinements_of_no_use_are_not_judged(
    texts: dict[int, str], cut: set[str], configured: Callable[..., Any], encoder: ChatEncoder
) -> None:
    engine = writer(encoder, {0: "YYYYY", 1: "NNNNN", 3: "YYYYY"}, texts)
    engine.cut = cut
    batch, _ = iteration(configured(), encoder, engine, tasks=TASKS[:1])
    assert batch.dropped == {"no refinement accepted": 1}
    assert batch.measures["spar"]["refined_unusable"] == 1
    assert not any(request.id.startswith("01/tea/3#") for request in engine.requests)


def test_a_refinement_that_comes_back_to_the_original(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    """Two levels on, with votes that would accept it now."""
    engine = writer(encoder, {0: "YYYYY", 1: "NNNNN", 5: "YYYYY"}, {5: "Text 1."})
    batch, _ = iteration(configured(refine={"depth": 2}), encoder, engine, tasks=TASKS[:1])
    assert batch.dropped == {"no refinement accepted": 1}


def test_a_prompt_that_leaves_no_room_for_the_refiner(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    """A critique whose text takes more tokens than it was sampled with: nothing is sent."""
    engine = writer(encoder, {0: "YYYYY"})
    short = engine.answer

    def answer(shown: dict[str, str], request: Request, held: str) -> str:
        return ("word " * 900 if request.role == "judge" else "") + short(shown, request, held)

    engine.answer = answer
    batch, _ = iteration(configured(), encoder, engine, tasks=TASKS[:1])
    assert batch.dropped == {"no refinement accepted": 1}
    assert asked_for(engine, "tea") == {0, 1}
    assert batch.measures["spar"]["refined_unusable"] == 1


# -- settings ----------------------------------------------------------------------------------------------------------


def test_what_a_plan_says(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    recipe = recipe_of(configured(), encoder)
    demand = recipe.demand(10)
    assert demand.requests == {"actor": (10 * 3, 24), "judge": (10 * 3 * 5, 40)}
    assert (demand.items, demand.item_tokens) == (10, 2 * 24 + 64)
    needs = recipe.needs()
    assert needs["the request for a refined response"] == recipe.refine.needs() + 24 + 40 + 24
    assert needs["the judge of a response"] == recipe.judge.needs(24)
    assert recipe.asks == [recipe.judge.source, recipe.refine.source]
    assert recipe.scale == (0, 1)


def test_what_it_cannot_do_is_refused(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    with pytest.raises(ConfigError, match=r"refines what is judged with No, but judge\.kind=digits; use judge\.kind=y"):
        configured(judge={"kind": "digits"})
    with pytest.raises(ConfigError, match=r"readable=4 is more than judge\.judgements=3; lower it, or raise the votes"):
        configured(judge={**JUDGE, "judgements": 3}, readable=4)
    configured(judge={**JUDGE, "judgements": 3}, readable=3)
    with pytest.raises(ConfigError, match=r"refine\.depth=0"):
        configured(refine={"depth": 0})
    with pytest.raises(ConfigError, match=r"^refine\.template='additive': does not use judgement"):
        recipe_of(configured(refine={"template": "additive"}), encoder)


def test_another_model_may_judge(configured: Callable[..., Any], encoder: ChatEncoder) -> None:
    """Its own requests go to it; refinements are the model's."""
    config = configured(judge={**JUDGE, "model": "x/y", "replicas": 1})
    engine, other = writer(encoder, {}), writer(encoder, {0: "YYYYY", 1: "NNNNN", 3: "YYYYY"})
    other.held = "judge"
    recipe, run = recipe_of(config, encoder), run_of(engine, None, judge=other)
    batch = asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), TASKS[:1]), 60))
    assert [one.id for one in batch.items] == ["01/tea/3>1"]
    assert {request.role for request in engine.requests} == {"actor"}
    assert {request.role for request in other.requests} == {"judge"}


def test_the_config_carries_the_papers_values() -> None:
    config = load(CONFIGS / "spar_llama3_8b.yaml")
    assert [step.recipe for step in config.planned] == [Spar] * 3
    step = config.planned[0].config
    assert (step.sample.responses, step.sample.temperature, step.sample.top_p) == (5, 0.9, 0.9)
    assert (step.judge.judgements, step.judge.temperature) == (5, 0.7)
    assert (step.refine.tries, step.refine.keep, step.refine.depth) == (3, 2, 3)
    rule = step.train
    assert (rule.beta, rule.nll_scale, rule.lr, rule.schedule, rule.epochs) == (0.1, 0.1, 2e-7, "linear", 1)
    assert step.prompts.per_iteration == 10000


def test_what_it_refuses(make_config: Any, encoder: ChatEncoder) -> None:
    votes = {"kind": "yes_no", "judgements": 3}
    with pytest.raises(ConfigError, match=r"thought is set, but a refined answer of recipe spar has none"):
        recipe_of(make_config(recipe="spar", judge=votes, thought={}), encoder)
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "x"}}
    with pytest.raises(ConfigError, match=r"judge\.endpoint cannot vote for recipe spar; use judge\.model"):
        make_config(recipe="spar", judge=server, evaluate={"duel": False})
