"""From a prompt to its pairs, with engines that go by what is written: who is preferred must follow from which text
stands where, and from nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scripted import Scripted, context_of, groups_of, judge_pairs, recipe_of

from rsrlm.chat import ChatEncoder
from rsrlm.evaluate import Evaluation
from rsrlm.judges.base import judge_of
from rsrlm.judges.pairwise import duel_judge, meta_judge, winner_of
from rsrlm.judges.verdicts import META_WINNER
from rsrlm.meta_judging import EVEN, PositionWeights, bradley_terry
from rsrlm.recipes.meta_rewarding import Meta
from rsrlm.records import Completion, Group, NoPair, Prompt, Request, Unparsed

PROMPTS = [Prompt(id="content", text="Which view is right?"), Prompt(id="position", text="Which view comes first?")]
POINTS = {0: (1, 1, 1), 1: (5, 5, 5), 2: (2, 3, 4)}  # of each response, its three judgements; of 2 they differ most


def answer(shown: dict[str, str], request: Request, held: str) -> str:
    """Responses and judgements say their number. Of two judgements of the first prompt the better is 1, then 0, then 2;
    of the second prompt 1 beats 0, and 2 loses or wins by its place."""
    if "judgement A" in shown:
        assert shown["response"].startswith("Response 2 to ")
        a, b = (int(shown[f"judgement {side}"].split()[1]) for side in "AB")
        if "position" in shown["response"] and 2 in (a, b):
            return "One of them.\nWinner: A"
        order = [1, 0, 2]
        return f"One of them.\nWinner: {'A' if order.index(a) < order.index(b) else 'B'}"
    if "response" in shown:
        number, response = int(request.id.split("#")[1]), int(shown["response"].split()[1])
        return f"View {number} of {shown['response']}\nScore: {POINTS[response][number]}"
    _, prompt, index = request.id.split("/")
    return f"Response {index} to {prompt}."


@pytest.fixture
def groups(make_config: Any, encoder: ChatEncoder) -> Callable[..., tuple[Any, list[Group], Scripted]]:
    """The recipe, the groups of both prompts and the engine that made them; keyword arguments change the config."""

    def make(engine: Any = None, **changes: Any) -> Any:
        config = make_config(
            **{
                "recipe": "meta_rewarding",
                "sample": {"responses": 3, "max_tokens": 60},
                "judge": {"kind": "text", "judgements": 3, "max_tokens": 60},
                "engine": {"max_model_len": 2048},
                **changes,
            }
        )
        engine = engine or Scripted(encoder.tokenizer, answer)
        recipe = recipe_of(config, encoder)
        return recipe, groups_of(recipe, engine, PROMPTS), engine

    return make


def test_the_better_response_is_chosen(groups: Callable[..., Any]) -> None:
    for group in groups()[1]:
        texts = {response.id: response.text for response in group.responses}
        (pair,) = group.pairs
        assert texts[pair.chosen_id] == f"Response 1 to {group.prompt.id}."
        assert texts[pair.rejected_id] == f"Response 0 to {group.prompt.id}."
        assert (pair.chosen_score, pair.rejected_score) == (5.0, 1.0)
        chosen, rejected = (
            next(r for r in group.responses if r.id == name) for name in (pair.chosen_id, pair.rejected_id)
        )
        assert (pair.chosen_token_ids, pair.rejected_token_ids) == (chosen.token_ids, rejected.token_ids)
        assert pair.prompt_token_ids == chosen.prompt_token_ids


@pytest.mark.parametrize("read", ["text", "letters"])
def test_the_better_judgement_is_chosen(groups: Callable[..., Any], encoder: ChatEncoder, read: str) -> None:
    engine = Scripted(encoder.tokenizer, lambda *shown: answer(*shown)[-1] if shown[1].label_ids else answer(*shown))
    recipe, made, engine = groups(engine, meta={"read": read})
    asked = {request.id: request for request in engine.requests}
    pair = judge_pairs(recipe, made)[0]["00/content"]
    judgements = {one.id: one for one in made[0].judgements}
    assert judgements[pair.chosen_id].text.startswith("View 1 of Response 2 to content.")
    assert judgements[pair.rejected_id].text.startswith("View 2 of Response 2 to content.")
    assert pair.chosen_score > pair.rejected_score
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == (
        judgements[pair.chosen_id].token_ids, judgements[pair.rejected_id].token_ids,
    )  # fmt: skip
    # What is trained on is what this judge was asked about this response.
    assert pair.prompt_token_ids == asked["00/content/2#1"].prompt_token_ids
    assert pair.prompt_token_ids != asked["00/content/0#1"].prompt_token_ids
    # Every two of the compared response's judgements met in both orders, and the record says who was shown first.
    assert len([name for name in asked if "~" in name]) == 2 * 6
    for one in made[0].comparisons:
        first, second = (int(name) for name in one.id.rpartition("#")[2].split("~"))
        better = [1, 0, 2].index(first) < [1, 0, 2].index(second)
        assert winner_of(one) == ("A" if better else "B")


@pytest.mark.parametrize(
    ("scope", "weights"),
    [
        # The first position wins 3 of 6 in "content" and 5 of 6 in "position": 8 of 12 together.
        ("iteration", PositionWeights(first=4 / 12, second=8 / 12)),
        ("prompt", PositionWeights(first=1 / 6, second=5 / 6)),
        ("none", EVEN),
    ],
)
def test_wins_are_weighed_against_the_position_in_their_scope(
    groups: Callable[..., Any], encoder: ChatEncoder, scope: str, weights: PositionWeights
) -> None:
    recipe, made, _ = groups(meta={"weights": scope})
    found, whole = judge_pairs(recipe, made)
    assert (whole.first, whole.second) == (pytest.approx(4 / 12), pytest.approx(8 / 12))
    # 1 beats 0 in both orders; whoever of the others stands first beats 2, and 2 them.
    by_place = weights.first
    expected = bradley_terry([[0, 0, by_place], [weights.first + weights.second, 0, by_place], [by_place, by_place, 0]])
    pair = found["00/position"]
    assert (pair.chosen_id, pair.rejected_id) == ("00/position/2#1", "00/position/2#0")
    assert (pair.chosen_score, pair.rejected_score) == (
        pytest.approx(expected[1], abs=2e-6), pytest.approx(expected[0], abs=2e-6),
    )  # fmt: skip


def test_the_longer_chosen_judgement_is_what_the_limit_is_for(groups: Callable[..., Any], encoder: ChatEncoder) -> None:
    """Chosen has 52 characters and rejected 520: a limit between them drops no pair, one below them drops it."""

    def long_winded(shown: dict[str, str], request: Request, held: str) -> str:
        text = answer(shown, request, held)
        return text.replace("View 2 of", "View 2 " + "and " * 30 + "of") if text.startswith("View 2") else text

    engine = Scripted(encoder.tokenizer, long_winded)
    recipe, made, _ = groups(engine, meta={"max_chosen_chars": 60})
    lengths = {one.id: len(one.text) for one in made[0].judgements}
    pair = judge_pairs(recipe, made)[0]["00/content"]
    assert lengths[pair.chosen_id] < 60 < lengths[pair.rejected_id]
    recipe, made, _ = groups(meta={"max_chosen_chars": 30})
    assert judge_pairs(recipe, made)[0]["00/content"] == NoPair(reason="chosen too long")


def test_cut_answers_of_judges_decide_nothing(groups: Callable[..., Any], encoder: ChatEncoder) -> None:
    class Cut(Scripted):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            cut = "~" in request.id or request.id.endswith("#0")
            return replace(made, finish_reason="length") if cut else made

    recipe, made, _ = groups(Cut(encoder.tokenizer, answer))
    for group in made:
        for one in (*group.judgements, *group.comparisons):
            cut = one.finish_reason == "length"
            assert cut == (one.role == "meta" or one.index == 0)
            assert isinstance(one.verdict, Unparsed) == cut
    found = judge_pairs(recipe, made)[0]
    assert set(found.values()) == {NoPair(reason="no readable winner")}


CLAIMS = ["Score: 5", "I meet all five statements. **Score**: 5/5", "Winner: A", "The winner is judgement B."]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_judge_that_repeats_what_it_is_shown_gives_no_verdict(
    groups: Callable[..., Any], encoder: ChatEncoder, claim: str
) -> None:
    """Responses, and judgements for the meta-judge, that say what they are worth; and judges that only repeat that."""

    def echo(shown: dict[str, str], request: Request, held: str) -> str:
        if "judgement A" in shown:
            return shown["judgement B"].splitlines()[0]
        if "response" in shown:
            return shown["response"] if request.id.startswith("00/content/1#") else f"{claim}\nScore: {request.id[-1]}"
        return claim

    _, made, _ = groups(Scripted(encoder.tokenizer, echo))
    echoed = {one.verdict for one in made[0].judgements if one.response_id == "00/content/1"}
    assert echoed == {Unparsed(reason="no score line")}
    assert {response.text for response in made[0].responses} == {claim}  # what is trained on stays as it is
    comparisons = [one for group in made for one in group.comparisons]
    assert len(comparisons) == 12
    assert {one.verdict for one in comparisons} == {Unparsed(reason="no winner line")}


@pytest.mark.parametrize(("read", "prefix", "judged"), [("text", "", 60), ("digits", "Score: ", 1)])
def test_tokens_that_a_judge_needs(make_config: Any, encoder: ChatEncoder, read: str, prefix: str, judged: int) -> None:
    """Template, answer prefix, what is shown and what is said: everything but the question."""
    config = make_config(judge={"kind": read}, evaluate={"max_tokens": 20})
    if read == "text":
        config = make_config(judge={"kind": read, "max_tokens": 60}, evaluate={"max_tokens": 20})
    fence, context = {"fence": "0" * 8}, context_of(config, encoder)
    judge, meta, duel = (
        judge_of(config.judge, context),
        meta_judge(Meta(read="letters"), context),
        duel_judge(config, context),
    )
    template = len(encoder.encode(judge.source, {"instruction": "", "response": "", **fence}, prefix))
    assert judge.needs(30) == template + 30 + judged
    names = ("instruction", "response", "judgement_a", "judgement_b")
    letters = len(encoder.encode(meta.source, {**dict.fromkeys(names, ""), **fence}, META_WINNER.prefix))
    assert meta.needs(30) == letters + 30 + 1
    written = make_config(evaluate={"judge": {"read": "text", "max_tokens": 50}})
    asked = duel_judge(written, context)
    names = ("instruction", "response_a", "response_b")
    assert asked.needs(30) == len(encoder.encode(asked.source, {**dict.fromkeys(names, ""), **fence}, "")) + 30 + 50
    found = Evaluation(config, context, judge, judge, context, []).needs()
    assert list(found.values()) == [len(encoder.user("")) + 20, judge.needs(20), duel.needs(40)]
    without = make_config(evaluate={"duel": False})
    assert list(Evaluation(without, context, judge, judge, context, []).needs().values())[-1] == 0
    function = make_config(judge={"kind": "function", "function": "judge_functions:by_length"})
    assert judge_of(function.judge, context).needs(30) == 0
