"""Process-based self-rewarding: who wins how often, the pair behind a shared beginning, and going back."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from made import response
from scripted import Memory, model, recipe_of, run_of
from writer import Writer

from rsrlm.chat import ChatEncoder
from rsrlm.engines import JUDGE_PRIORITY
from rsrlm.judges.base import judgement_of
from rsrlm.recipes.comparing import win_rates
from rsrlm.recipes.steps import EQUAL, pair
from rsrlm.records import (
    Judgement,
    NoPair,
    PreferencePair,
    Preferred,
    Prompt,
    Request,
    Response,
    Scored,
    Task,
    Unparsed,
    Verdict,
    Winner,
    seed_of,
)
from rsrlm.settings.base import ConfigError
from rsrlm.store.tables import write_groups

TEA = Task(iteration=1, prompt=Prompt(id="tea", text="3 + 4?"))
ALE = Task(iteration=1, prompt=Prompt(id="ale", text="4 + 4?"))


# -- wins and pairs ----------------------------------------------------------------------------------------------------


def steps_of(number: int) -> list[Response]:
    return [replace(response(index, f"step {index}"), id=f"01/tea/s1.{index}") for index in range(number)]


def said(steps: list[Response], winners: Mapping[tuple[int, int], Winner | None]) -> list[Judgement]:
    """`winners` by what is shown as A and as B; None cannot be read."""
    return [
        judgement_of(
            None, Unparsed(reason="no winner line") if winner is None else Preferred(winner=winner),
            id=f"{steps[a].id}~{b}", prompt_id="tea", response_id=steps[a].id, index=a, role="duel", judge="j",
            sampling=None,
        )
        for (a, b), winner in winners.items()
    ]  # fmt: skip


def both(beats: list[tuple[int, int]]) -> dict[tuple[int, int], Winner | None]:
    """The first of each wins in both orders."""
    found: dict[tuple[int, int], Winner | None] = {}
    for a, b in beats:
        found |= {(a, b): "A", (b, a): "B"}
    return found


def rates(steps: list[Response], winners: Mapping[tuple[int, int], Winner | None]) -> dict[str, Verdict]:
    return win_rates(steps, said(steps, winners), soft=False)


def scored(*points: float) -> dict[str, Verdict]:
    return {one.id: Scored(points=points[index]) for index, one in enumerate(steps_of(len(points)))}


def test_wins_by_hand() -> None:
    """Wins [2 1 0] are the pair (0, 2): of three, itself included with a half, 0 wins against 2.5."""
    steps = steps_of(3)
    found = pair("01/tea", steps, rates(steps, both([(0, 1), (0, 2), (1, 2)])), [True] * 3)
    assert isinstance(found, PreferencePair)
    assert (found.id, found.kind) == ("01/tea/s1.0>s1.2", "step")
    assert (found.chosen_score, found.rejected_score) == pytest.approx((2.5 / 3, 0.5 / 3))
    reverse = pair("01/tea", steps, rates(steps, both([(2, 1), (2, 0), (1, 0)])), [True] * 3)
    assert isinstance(reverse, PreferencePair)
    assert reverse.id == "01/tea/s1.2>s1.0"


def test_a_circle_is_no_pair() -> None:
    """A beats B, B beats C, C beats A."""
    steps = steps_of(3)
    assert pair("01/tea", steps, rates(steps, both([(0, 1), (1, 2), (2, 0)])), [True] * 3) == EQUAL


def test_who_wins_in_one_place_alone_does_not_win() -> None:
    steps = steps_of(2)
    for side in ("A", "B"):
        assert pair("01/tea", steps, rates(steps, {(0, 1): side, (1, 0): side}), [True] * 2) == EQUAL  # type: ignore[dict-item]
    same = [replace(one, text="the same") for one in steps]
    assert pair("01/tea", same, rates(same, {}), [True] * 2) == EQUAL  # not compared


def test_a_step_of_which_nothing_could_be_read_is_not_the_worst() -> None:
    """0 may be the best of all; 1 beats 2."""
    steps = steps_of(3)
    unread = {(0, 1): None, (1, 0): None, (0, 2): None, (2, 0): None}
    found = pair("01/tea", steps, rates(steps, {**unread, **both([(1, 2)])}), [True] * 3)
    assert isinstance(found, PreferencePair)
    assert found.id == "01/tea/s1.1>s1.2"
    none = {(a, b): None for a, b in permutations(range(3), 2)}
    assert pair("01/tea", steps, rates(steps, none), [True] * 3) == NoPair(reason="no comparison that can be read")


def test_what_was_cut_may_lose_and_never_wins() -> None:
    steps = steps_of(3)
    found = pair("01/tea", steps, scored(2, 1, 0), [False, True, True])
    assert isinstance(found, PreferencePair)
    assert found.id == "01/tea/s1.1>s1.2"
    assert pair("01/tea", steps, scored(2, 0, 0), [False, True, True]) == EQUAL
    assert pair("01/tea", steps, scored(2, 1, 0), [False] * 3) == NoPair(reason="no step that goes on")
    equals = pair("01/tea", steps_of(4), scored(2, 2, 0, 0), [True] * 4)
    assert isinstance(equals, PreferencePair)
    assert equals.id == "01/tea/s1.0>s1.2"  # the first of equals
    same = [replace(one, token_ids=(5, 2)) for one in steps]
    assert pair("01/tea", same, scored(2, 1, 0), [True] * 3) == NoPair(reason="same tokens")


# -- whole iterations --------------------------------------------------------------------------------------------------

QUALITY = {"Right": 3, "Good": 2, "So-so": 1, "Bad": 0}


def better(shown: dict[str, str], request: Request) -> str:
    """By the first words of the two steps; equal ones tie."""
    first, second = (QUALITY[shown[f"response {side}"].split(" ")[0].strip(",")] for side in "AB")
    return "tie" if first == second else "A" if first > second else "B"


def writes(texts: Mapping[str, str]) -> Callable[[Request, str], str]:
    """By the name of the candidate; a line goes on beyond its end."""

    def write(request: Request, begun: str) -> str:
        text = texts[request.id.rpartition("/")[2]]
        return f"{text}This is not read." if text.endswith("\n") else text

    return write


@pytest.fixture
def config_of(make_config: Any) -> Callable[..., Any]:
    def made(**keys: Any) -> Any:
        sections = {"sample": {"max_tokens": 60}, "line": {"max_tokens": 20}, "candidates": 3, **keys}
        return make_config(recipe="process", **sections)

    return made


def iteration(config: Any, encoder: ChatEncoder, engine: Writer, log: Any = None, tasks: Any = (TEA,)) -> Any:
    recipe, run = recipe_of(config, encoder), run_of(engine, log)
    batch = asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), list(tasks)), 60))
    return batch, run


PLAIN = {
    "s1.0": "So-so start.\n", "s1.1": "Bad start.\n", "s1.2": "Good start.\n",
    "s2.0": "Right, it is 7.", "s2.1": "Bad line.\n", "s2.2": "Good line.\n",
}  # fmt: skip


def test_an_iteration(config_of: Any, encoder: ChatEncoder, tmp_path: Any) -> None:
    """The answer goes on from s1.2, and ends with s2.0."""
    config, log = config_of(), Memory()
    engine = Writer(encoder.tokenizer, writes(PLAIN), better)
    batch, run = iteration(config, encoder, engine, log)
    first, second = sorted(batch.items, key=lambda one: one.id)
    assert (first.id, second.id) == ("01/tea/s1.2>s1.1", "01/tea/s2.0>s2.1")
    question, begun = encoder.user("3 + 4?"), encoder.target("Good start.\n")[:-1]
    assert first.prompt_token_ids == question
    assert first.chosen_token_ids == begun
    assert first.rejected_token_ids == encoder.target("Bad start.\n")[:-1]
    assert second.prompt_token_ids == question + begun
    assert second.chosen_token_ids == encoder.target("Right, it is 7.")  # the model ended it
    assert second.rejected_token_ids == encoder.target("Bad line.\n")[:-1]
    assert {(one.kind, one.weight) for one in batch.items} == {("step", 1)}
    (group,) = batch.groups
    assert [one.id for one in group.responses] == [f"01/tea/s{n}.{i}" for n in (1, 2) for i in range(3)]
    assert all(one.complete for one in group.responses)
    assert [one.text for one in group.responses][3:5] == ["Right, it is 7.", "Bad line.\n"]
    named = [f"01/tea/s{n}.{a}~{b}" for n in (1, 2) for a, b in permutations(range(3), 2)]
    assert [one.id for one in group.comparisons] == named
    write_groups(tmp_path, [group])
    assert run.screen.totals == [("iteration 1", {"respond": 26 * 3 * 2, "compare": 26 * 3 * 2})]
    again = Writer(encoder.tokenizer, writes(PLAIN), better)
    assert list(iteration(config, encoder, again, log)[0].items) == list(batch.items)
    assert again.requests == []


def test_what_is_asked(config_of: Any, encoder: ChatEncoder) -> None:
    engine = Writer(encoder.tokenizer, writes(PLAIN), better)
    iteration(config_of(sample={"max_tokens": 60, "temperature": 0.5, "top_p": 0.95}), encoder, engine)
    sampled = {one.id.rpartition("/")[2]: one for one in engine.requests if "~" not in one.id}
    for name, one in sampled.items():
        assert one.sampling.seed == seed_of(0, 1, "tea", "actor", name)
        assert (one.sampling.temperature, one.sampling.top_p, one.sampling.stop) == (0.5, 0.95, ("\n",))
    assert sampled["s2.1"].prompt_token_ids == encoder.user("3 + 4?") + encoder.target("Good start.\n")[:-1]
    compared = {one.id: one for one in engine.requests if "~" in one.id}
    assert len(compared) == 12
    for name, one in compared.items():
        assert one.sampling.seed == seed_of(0, 1, "01/tea", "duel", name.removeprefix("01/tea/"))
        assert (one.priority, one.role) == (JUDGE_PRIORITY, "duel")
    text = encoder.tokenizer.decode(compared["01/tea/s2.0~1"].prompt_token_ids)
    fence = text.partition("<steps ")[2][:8]
    assert f"<steps {fence}>\nGood start.\n\n</steps {fence}>" in text
    assert f"<response A {fence}>\nRight, it is 7.\n</response A {fence}>" in text
    assert f"<response B {fence}>\nBad line.\n\n</response B {fence}>" in text
    fences = {encoder.tokenizer.decode(one.prompt_token_ids).partition("<steps ")[2][:8] for one in compared.values()}
    assert len(fences) == 2  # one for each step


def test_equal_steps_take_back_the_one_before(config_of: Any, encoder: ChatEncoder) -> None:
    """The second step's candidates are alike: the first is made anew, under names and seeds of its own."""
    texts = {
        **PLAIN, **{f"s2.{index}": "Bad line.\n" for index in range(3)},
        "s1r1.0": "Right start.\n", "s1r1.1": "Bad start.\n", "s1r1.2": "Good start.\n",
        "s2r1.0": "Right, it is 7.", "s2r1.1": "Bad line.\n", "s2r1.2": "Good line.\n",
    }  # fmt: skip
    engine = Writer(encoder.tokenizer, writes(texts), better)
    batch, _ = iteration(config_of(), encoder, engine)
    assert sorted(one.id for one in batch.items) == ["01/tea/s1r1.0>s1r1.1", "01/tea/s2r1.0>s2r1.1"]
    (group,) = batch.groups
    assert len(group.responses) == len({one.id for one in group.responses}) == 12
    assert not [one for one in group.comparisons if "/s2." in one.id]  # the same text is not compared
    seeds = [one.sampling.seed for one in engine.requests if "~" not in one.id]
    assert len(set(seeds)) == 12
    chosen = next(one for one in batch.items if "s2r1" in one.id)
    assert chosen.prompt_token_ids == encoder.user("3 + 4?") + encoder.target("Right start.\n")[:-1]


def test_equal_first_steps_give_the_question_up(config_of: Any, encoder: ChatEncoder) -> None:
    """Six candidates of one text; and another question that is not given up."""
    texts = {**{f"s1.{index}": "Bad start.\n" for index in range(6)}}
    engine = Writer(encoder.tokenizer, writes(texts), better)
    batch, _ = iteration(config_of(candidates=6), encoder, engine)
    assert (list(batch.items), batch.dropped) == ([], {"no step is better than another": 1})
    assert len(engine.requests) == 6

    def write(request: Request, begun: str) -> str:
        return "Bad start.\n" if "/ale/" in request.id else writes(PLAIN)(request, begun)

    batch, _ = iteration(config_of(), encoder, Writer(encoder.tokenizer, write, better), tasks=(ALE, TEA))
    assert {one.prompt_id for one in batch.items} == {"tea"}
    assert batch.dropped == {"no step is better than another": 1}


@pytest.mark.parametrize(("rollbacks", "asked"), [(0, 2), (1, 4), (3, 8)])
def test_going_back_ends(rollbacks: int, asked: int, config_of: Any, encoder: ChatEncoder) -> None:
    """The first step is always decided and the second never: in the end nothing is left."""

    def write(request: Request, begun: str) -> str:
        good = request.id.endswith("0") and "/s1" in request.id
        return "Good line.\n" if good else "Bad line.\n"

    engine = Writer(encoder.tokenizer, write, better)
    batch, _ = iteration(config_of(rollbacks=rollbacks), encoder, engine)
    assert (list(batch.items), batch.dropped) == ([], {"no step is better than another": 1})
    assert len([one for one in engine.requests if "~" not in one.id]) == 3 * asked


def test_what_is_left_where_going_back_ends(config_of: Any, encoder: ChatEncoder) -> None:
    """Two steps are decided, the third never: the second's pair is dropped with it, and the first's stays."""

    def write(request: Request, begun: str) -> str:
        good = request.id.endswith("0") and begun.count("\n") < 2
        return "Good line.\n" if good else "Bad line.\n"

    batch, _ = iteration(config_of(rollbacks=1), encoder, Writer(encoder.tokenizer, write, better))
    assert [one.id for one in batch.items] == ["01/tea/s1.0>s1.1"]
    assert batch.dropped == {}


def test_an_answer_has_so_many_steps_and_tokens(config_of: Any, encoder: ChatEncoder) -> None:
    def write(request: Request, begun: str) -> str:
        return "Good line.\n" if request.id.endswith("0") else "Bad line.\n"

    batch, _ = iteration(config_of(depth=3), encoder, Writer(encoder.tokenizer, write, better))
    assert len(batch.items) == 3
    line = len(encoder.target("Good line.\n")) - 1
    batch, _ = iteration(
        config_of(sample={"max_tokens": 2 * line + 1}), encoder, Writer(encoder.tokenizer, write, better)
    )
    # The third step has room for a token: it is cut, whoever wins; what is taken back does not help.
    assert batch.dropped == {}
    assert [one.id for one in batch.items] == ["01/tea/s1.0>s1.1"]
    (group,) = batch.groups
    assert [one.complete for one in group.responses if "/s3." in one.id] == [False] * 3


@pytest.mark.parametrize(("read", "tokens"), [("letters", 1), ("text", 50)])
def test_what_a_plan_says(read: str, tokens: int, config_of: Any, encoder: ChatEncoder) -> None:
    config = config_of(candidates=4, depth=5, rollbacks=2, compare={"read": read, "max_tokens": 50})
    recipe = recipe_of(config, encoder)
    demand, rounds = recipe.demand(10), 5 + 2 * 2
    assert demand.requests == {"actor": (10 * rounds * 4 * 2, 10), "duel": (10 * rounds * 12, tokens)}
    assert (demand.items, demand.item_tokens) == (50, 60 + 20 + 64)
    assert recipe.needs()["the judge of two steps"] == recipe.compare.needs(80) > 80
    assert recipe.needs()["sample.max_tokens"] == len(encoder.user("")) + 60
    assert recipe.asks == [recipe.compare.source]
    assert recipe.compare.name == ("steps (letters)" if read == "letters" else "steps_text (text)")
    assert (recipe.width, recipe.scale) == (4, (0, 1))


def test_what_it_cannot_do_is_refused(config_of: Any, encoder: ChatEncoder) -> None:
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "x"}}
    with pytest.raises(
        ConfigError, match=r"compare\.read=letters: judge\.endpoint compares in text; set compare\.read"
    ):
        config_of(judge=server)
    behind = config_of(judge=server, compare={"read": "text"}, evaluate={"duel": False})
    assert recipe_of(behind, encoder).needs()["the judge of two steps"] == 0
    with pytest.raises(ConfigError, match=r"^compare\.template='pairwise': does not use steps; add"):
        recipe_of(config_of(compare={"template": "pairwise"}), encoder)
