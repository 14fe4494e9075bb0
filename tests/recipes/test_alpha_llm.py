"""AlphaLLM: what a tree decides by, what its options are, and whole iterations over an engine that writes lines."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from made import response
from scripted import Memory, engines_of, model, recipe_of, run_of
from writer import Writer

from rsrlm.chat import ChatEncoder
from rsrlm.judges.true_false import LITTLE_MASS, p_true
from rsrlm.recipes.base import NoItems
from rsrlm.recipes.search import Node, back_up, children_of, is_leaf, kept, least_distance, ucb, walk, worth
from rsrlm.recipes.tree import Width
from rsrlm.records import Example, NoPair, Prompt, Request, Response, Scored, Task, Unparsed, Verdict, seed_of
from rsrlm.settings.base import ConfigError
from rsrlm.store.tables import write_groups

RIGHT = Scored(points=pytest.approx(0.75))
UNREAD = Unparsed(reason="little mass on True and False")
TEA = Task(iteration=1, prompt=Prompt(id="tea", text="3 + 4?", data={"answer": "7"}))
ALE = Task(iteration=1, prompt=Prompt(id="ale", text="4 + 4?", data={"answer": "8"}))


def scored(*points: float) -> list[Verdict]:
    return [Scored(points=one) for one in points]


def leaf(path: str, index: int, text: str = "words", cut: bool = False) -> Response:
    return replace(response(index, text, cut=cut), id=f"01/tea/{path}")


# -- what a tree decides by --------------------------------------------------------------------------------------------


def test_ucb_by_hand() -> None:
    """N = 8; the second row is the form of the authors' code, without the 2."""
    children = [(3 / 5, 5), (1.2 / 2, 2), (0.9, 1)]
    assert [ucb(mean, n, 8, 1.0) for mean, n in children] == pytest.approx([1.5120, 2.0420, 2.9393], abs=1e-4)
    without = [ucb(mean, n, 8, 1 / math.sqrt(2)) for mean, n in children]
    assert without == pytest.approx([1.2449, 1.6197, 2.3420], abs=1e-4)


@pytest.mark.parametrize(
    ("importance", "alpha", "least", "expected"), [(0.3, 1, 2, 2), (2.4, 1, 2, 3), (30, 1, 2, 10), (2.4, 2, 3, 5)]
)
def test_width_by_hand(importance: float, alpha: float, least: int, expected: int) -> None:
    means = [1.0, 1.0 - importance, 1.0 + importance / 2]
    assert children_of(1.0, means, alpha, least, 10) == expected
    assert children_of(1.0, [], alpha, least, 10) == least  # nothing is known yet


def test_distances_by_hand() -> None:
    others = ["She has 3 + 4 = 7 apples.\n"]
    assert least_distance("She has 3+4=7 apples.", others) == 4
    assert least_distance("First count the pears: 5.", others) == 21
    assert least_distance("First count the pears: 5.", [*others, "First count the pears: 6."]) == 1
    assert least_distance("She has 3 + 4 = 7 apples.", others) == 0  # the end of a line is no difference
    assert least_distance("First", []) == math.inf


def test_p_true_by_hand() -> None:
    assert p_true((math.log(0.6), math.log(0.2))) == Scored(points=pytest.approx(0.75))
    assert p_true((math.log(0.2), math.log(0.6))) == Scored(points=pytest.approx(0.25))
    # One of them missing is no reading of the authors' code: its own probability is asked for.
    assert p_true((-math.inf, math.log(0.2))) == Scored(points=0.0)
    assert p_true((math.log(0.2), -math.inf)) == Scored(points=1.0)
    assert p_true((-math.inf, -math.inf)) == LITTLE_MASS == UNREAD
    assert p_true((math.log(0.02), math.log(0.02))) == LITTLE_MASS
    assert p_true((math.nan, 0.0)) != LITTLE_MASS
    assert isinstance(p_true((math.nan, 0.0)), Unparsed)


def test_worth_by_hand() -> None:
    """Value head .4 (which the recipe leaves out), PRM .75, rollouts .9 .7 1.0 .6."""
    rollouts = scored(0.9, 0.7, 1.0, 0.6)
    assert worth([(1, scored(0.4)), (1, scored(0.75)), (1, rollouts)]) == pytest.approx(1.95)
    assert worth([(1, scored(0.75)), (1, rollouts)]) == pytest.approx(1.55)
    assert worth([(2, scored(0.75)), (0.5, rollouts)]) == pytest.approx(1.9)
    assert worth([(1, scored(0.75)), (1, [])]) == 0.75  # who is asked nothing says nothing
    assert worth([(1, [UNREAD]), (1, rollouts)]) is None
    assert worth([(1, scored(0.75)), (1, [UNREAD, UNREAD])]) is None
    assert worth([(1, scored(0.75)), (1, [UNREAD, *scored(0.5)])]) == 1.25  # the mean of what can be read


def node(path: str, mean: float, visits: int, children: Sequence[Node] = (), done: bool = False) -> Node:
    return Node(path=path, answer=leaf(path, 0), visits=visits, total=mean * visits, children=list(children), done=done)


def test_means_are_backed_up() -> None:
    root, child = node("t", 0, 0), node("t0", 0, 0)
    for points in (0.8, 0.2, 0.6):
        back_up([root, child], points)
    back_up([root], 1.0)
    assert (child.visits, child.mean) == (3, pytest.approx(0.5333, abs=1e-4))
    assert (root.visits, root.mean) == (4, pytest.approx(0.65))


def wide(root_least: int = 2, least: int = 2, alpha: float = 0.0) -> Any:
    return Width(root_least=root_least, root_most=60, least=least, most=10, alpha=alpha)


def test_a_walk_goes_by_ucb_to_a_node_that_may_have_more_children() -> None:
    inner = node("t1", 0.6, 2, [node("t1.0", 0.5, 1)])
    done = node("t2", 0.9, 1, done=True)
    root = node("t", 0.6375, 8, [node("t0", 0.6, 5), inner, done])

    def walked(c: float, width: Any) -> list[str]:
        return [one.path for one in walk(root, c, width)]

    assert walked(1, wide(root_least=4)) == ["t"]  # not full yet
    assert walked(1, wide(root_least=3)) == ["t", "t2"]  # a finished answer may be looked at again
    root.children.remove(done)
    assert walked(1, wide()) == ["t", "t1"]  # 2.042 against 1.512
    assert walked(1, wide(least=1)) == ["t", "t1", "t1.0"]
    assert walked(0, wide()) == ["t", "t0"]  # of equal means the first
    # Children far from the node make it wider: |0.6 - 0.6375| * 60 = 2.25.
    assert walked(1, wide(alpha=60)) == ["t"]
    assert walked(1, wide(alpha=50)) == ["t", "t1"]  # 1.875: two are enough


def test_names_of_nodes() -> None:
    root = node("t", 0, 0)
    root.tried = 11
    child = Node(path=root.next_path(), answer=leaf("t11", 0), tried=2)
    assert (child.path, child.next_path()) == ("t11", "t11.2")
    assert is_leaf(leaf("t11.2", 0))
    assert not is_leaf(leaf("t11.2.r0", 0))


def test_what_is_kept_is_strictly_above_the_limit() -> None:
    """Best leaves of three prompts have .95, .90, .97: the first and the third are kept."""
    for outcome, keeps in ((0.95, True), (0.90, False), (0.97, True)):
        responses = [leaf("t0", 0), leaf("t1.0", 1), leaf("t1.r0", 2)]
        outcomes = dict(zip((one.id for one in responses), scored(0.5, outcome, 0.99), strict=True))
        found = kept(responses, outcomes, 0.9)
        assert found == (responses[1] if keeps else NoPair(reason="outcome not above least"))


def test_which_leaf_is_best() -> None:
    first, second = leaf("t1", 0), leaf("t0", 1)
    outcomes = {first.id: scored(0.8)[0], second.id: scored(0.8)[0]}
    assert kept([second, first], outcomes, 0.5) == first  # of equal ones the first that was found
    nothing = NoPair(reason="no finished answer with an outcome")
    assert kept([], {}, 0.5) == nothing
    assert kept([first], {first.id: UNREAD}, 0.5) == nothing
    for bad in (leaf("t1", 0, cut=True), leaf("t1", 0, " \n"), leaf("t1.r0", 0)):
        assert kept([bad], {bad.id: scored(0.9)[0]}, 0.5) == nothing


# -- whole iterations --------------------------------------------------------------------------------------------------

LINES = {
    "t0": "Add three and four.\n", "t0.r0": "It is 6.", "t1": "Guess.\n", "t1.r0": "It is 9.",
    "t0.0": "3 + 4 = 7.\n", "t0.0.r0": "It is 7.", "t0.1": "It is 7, I think.", "t0.0.0": "So the answer\nis 7.",
}  # fmt: skip
SAYS = {  # by what ends the text
    "four.": 0.8, "It is 6.": 0.6, "Guess.": 0.2, "It is 9.": 0.2,
    "= 7.": 0.9, "It is 7.": 0.9, "I think.": 0.95, "is 7.": 0.97,
}  # fmt: skip


def path_of(request: Request) -> str:
    return request.id.rpartition("/")[2].partition("@")[0].partition("#")[0]


def write(request: Request, begun: str) -> str:
    """More than a line, where there is one: a stop string has to end it."""
    text = LINES[path_of(request)]
    return f"{text}This is not read." if text.endswith("\n") else text


def says(shown: dict[str, str], request: Request) -> tuple[float, float]:
    end = max((end for end in SAYS if shown["response"].strip().endswith(end)), key=len)
    return SAYS[end] / 2, (1 - SAYS[end]) / 2


@pytest.fixture
def config_of(make_config: Any) -> Callable[..., Any]:
    """Trees with two options everywhere, and one rollout for each."""

    def made(search: dict[str, Any] | None = None, **keys: Any) -> Any:
        narrow = {"root_least": 2, "root_most": 2, "least": 2, "most": 2}
        small = {"simulations": 5, "depth": 3, "rollouts": 1, "distance": 0, "c": 0.0, **(search or {})}
        sections = {"sample": {"max_tokens": 60}, "line": {"max_tokens": 20}, "width": narrow, "judge": {}, **keys}
        return make_config(recipe="alpha_llm", search=small, **sections)

    return made


def grown(config: Any, encoder: ChatEncoder, engine: Any, task: Task = TEA, log: Any = None) -> Any:
    recipe = recipe_of(config, encoder)
    return asyncio.run(asyncio.wait_for(recipe.search(engines_of(engine, log=log), task), 60))


def paths(records: Sequence[Any]) -> list[str]:
    return [one.id.rpartition("/")[2] for one in records]


def test_a_tree_by_hand(config_of: Any, encoder: ChatEncoder) -> None:
    """With c = 0 the best mean is looked at: t0 (.8 + .6), t1 (.2 + .2), then behind t0: t0.0 (.9 + .9), the leaf t0.1,
    and behind t0.0 the rest of an answer."""
    engine = Writer(encoder.tokenizer, write, says)
    found = grown(config_of(), encoder, engine)
    assert paths(found.responses) == ["t0.r0", "t1.r0", "t0.0.r0", "t0.1", "t0.0.0"]
    assert [one.index for one in found.responses] == [0, 1, 2, 3, 4]
    texts = [one.text for one in found.responses]
    assert texts[0] == "Add three and four.\nIt is 6."
    assert texts[3] == "Add three and four.\nIt is 7, I think."
    assert texts[4] == "Add three and four.\n3 + 4 = 7.\nSo the answer\nis 7."
    for one in found.responses:
        assert one.complete
        assert one.prompt_token_ids == encoder.user("3 + 4?")
        assert one.token_ids == encoder.target(one.text)  # as written, line breaks and the end token included
    assert {name.rpartition("/")[2]: one.points for name, one in found.outcomes.items()} == pytest.approx(
        {"t0.r0": 0.6, "t1.r0": 0.2, "t0.0.r0": 0.9, "t0.1": 0.95, "t0.0.0": 0.97}
    )
    judged = ["t0#0", "t0.0#0", "t0.0.0#0", "t0.0.r0#0", "t0.1#0", "t0.r0#0", "t1#0", "t1.r0#0"]
    assert sorted(paths(found.judgements)) == sorted(judged)
    assert found.judgements == sorted(found.judgements, key=lambda one: one.id)
    sampled = [one for one in engine.requests if not one.label_ids]
    beyond = sum(len(encoder.target(LINES[path_of(one)])) - LINES[path_of(one)].endswith("\n") for one in sampled)
    assert found.tokens == beyond


def test_what_is_asked(config_of: Any, encoder: ChatEncoder) -> None:
    config = config_of(search={"rollout_temperature": 1.5}, sample={"max_tokens": 60, "temperature": 0.7})
    engine = Writer(encoder.tokenizer, write, says)
    grown(config, encoder, engine)
    asked = {path_of(one): one for one in engine.requests if not one.label_ids}
    warm = {path: one.sampling.temperature for path, one in asked.items()}
    assert warm == {
        "t0": 0.0, "t0.0": 0.0, "t0.0.0": 0.0, "t1": 0.7, "t0.1": 0.7, "t0.r0": 1.5, "t1.r0": 1.5, "t0.0.r0": 1.5
    }  # fmt: skip
    stops = {path: one.sampling.stop for path, one in asked.items() if one.sampling.stop}
    assert stops == dict.fromkeys(("t0", "t1", "t0.0", "t0.1"), ("\n",))  # t0.0.0 is the last of the depth
    seeds = {request.id: request.sampling.seed for request in engine.requests if not request.label_ids}
    for name, seed in seeds.items():
        assert seed == seed_of(0, 1, "tea", "actor", name.removeprefix("01/tea/"))
    assert {"01/tea/t0@0", "01/tea/t0.r0"} <= seeds.keys()
    first = len(encoder.target(LINES["t0"])) - 1
    assert asked["t0"].sampling.max_tokens == 20
    assert asked["t0.r0"].sampling.max_tokens == asked["t0.0.0"].sampling.max_tokens + len(
        encoder.target(LINES["t0.0"])[:-1]
    )
    assert asked["t0.r0"].sampling.max_tokens == 60 - first
    assert asked["t0.r0"].prompt_token_ids == encoder.user("3 + 4?") + encoder.target(LINES["t0"])[:-1]
    critics = [one for one in engine.requests if one.label_ids]
    assert {one.role for one in critics} == {"judge"}
    assert {len(one.label_ids) for one in critics} == {2}
    assert [encoder.tokenizer.decode([token]) for token in critics[0].label_ids] == ["True", "False"]
    whole = {"t0.0.0", "t0.1", "t0.r0", "t1.r0", "t0.0.r0"}
    for one in critics:
        text = encoder.tokenizer.decode(one.prompt_token_ids)
        assert ("final answer is correct" in text) == (path_of(one) in whole)
        assert ("its last line is correct" in text) == (path_of(one) not in whole)
        assert text.endswith("Verdict: (")


def test_an_iteration(config_of: Any, encoder: ChatEncoder, tmp_path: Any) -> None:
    """Ale's answers are worse: its best leaf has .95 * .9."""

    def less(shown: dict[str, str], request: Request) -> tuple[float, float]:
        true, _ = says(shown, request)
        return (true, 0.5 - true) if "/tea/" in request.id else (0.9 * true, 0.5 - 0.9 * true)

    config, log = config_of(), Memory()
    engine = Writer(encoder.tokenizer, write, less)
    recipe, run = recipe_of(config, encoder), run_of(engine, log)
    batch = asyncio.run(recipe.iteration(run, 1, model("M1"), [TEA, ALE]))
    text = "Add three and four.\n3 + 4 = 7.\nSo the answer\nis 7."
    assert list(batch.items) == [
        Example(
            id="01/tea/t0.0.0", kind="search", prompt_token_ids=encoder.user("3 + 4?"),
            target_token_ids=encoder.target(text),
        )
    ]  # fmt: skip
    assert batch.dropped == {"outcome not above least": 1}
    found = batch.measures["search"]
    assert found == {
        "trees": 2, "kept": 1, "leaves": 2.0,
        "best_outcome": pytest.approx((0.97 + 0.873) / 2),
    }  # fmt: skip
    assert [group.no_pair_reason for group in batch.groups] == ["", "outcome not above least"]
    write_groups(tmp_path, list(batch.groups))
    assert run.screen.totals == [("iteration 1", {"respond": 2 * 5 * (6 * 2 + 1), "judge": 2 * 5 * 2})]
    again = Writer(encoder.tokenizer, write, less)
    second = asyncio.run(recipe.iteration(run_of(again, log), 1, model("M1"), [TEA, ALE]))
    assert (again.requests, list(second.items)) == ([], list(batch.items))
    assert list(second.groups) == list(batch.groups)


def test_the_order_goes_by_ids_and_seed_alone(config_of: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(config_of(least=0.5), encoder)
    tasks = [Task(iteration=1, prompt=Prompt(id=f"p{n}", text=f"3 + {n}?")) for n in range(8)]
    engine = Writer(encoder.tokenizer, write, says)
    batch = asyncio.run(recipe.iteration(run_of(engine), 1, model("M1"), tasks))
    orders = {tuple(one.id for one in recipe.items(1, groups).items) for groups in (batch.groups, batch.groups[::-1])}
    assert len(orders) == 1
    (order,) = orders
    assert sorted(order) != list(order)
    assert tuple(one.id for one in recipe.items(2, batch.groups).items) != order
    other = recipe_of(config_of(least=0.5, seed=1), encoder)
    assert tuple(one.id for one in other.items(1, batch.groups).items) != order


def test_nothing_to_train_on_is_said(config_of: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(config_of(least=0.97), encoder)
    run = run_of(Writer(encoder.tokenizer, write, says))
    with pytest.raises(
        NoItems, match=r"iteration 1 has nothing to train on: \{'outcome not above least': 1\}; the best outcome"
    ):
        asyncio.run(recipe.iteration(run, 1, model("M1"), [TEA]))


# -- options -----------------------------------------------------------------------------------------------------------


def test_an_option_like_another_is_sampled_again(config_of: Any, encoder: ChatEncoder) -> None:
    """Six attempts at t1, none far enough: the furthest stays, with its own end and not that of the last (which the
    authors' code gives it)."""
    attempts = [
        "Add three and four.", "Add 3 and 4.\n", "Add three and four.", "Add three to four.", "Add three and four!",
        "Add three and four",
    ]  # fmt: skip

    def writes(request: Request, begun: str) -> str:
        name = request.id.rpartition("/")[2]
        return attempts[int(name[-1])] if name.startswith("t1@") else write(request, begun)

    def certain(shown: dict[str, str], request: Request) -> tuple[float, float]:
        return 0.5, 0.5

    engine = Writer(encoder.tokenizer, writes, certain)
    found = grown(config_of(search={"simulations": 2, "distance": 50}), encoder, engine)
    sampled = [one.id for one in engine.requests if not one.label_ids]
    assert sampled == ["01/tea/t0@0", "01/tea/t0.r0", *(f"01/tea/t1@{n}" for n in range(6)), "01/tea/t1.r0"]
    assert len({one.sampling.seed for one in engine.requests if not one.label_ids}) == 9
    assert paths(found.responses) == ["t0.r0", "t1.r0"]  # t1 goes on
    assert found.responses[1].text == "Add 3 and 4.\nIt is 9."
    engine = Writer(encoder.tokenizer, writes, certain)
    grown(config_of(search={"simulations": 2, "distance": 9}), encoder, engine)
    assert "01/tea/t1@1" in [one.id for one in engine.requests]
    assert "01/tea/t1@2" not in [one.id for one in engine.requests]  # the second attempt is far enough


def test_an_option_whose_critic_cannot_be_read_is_no_child(config_of: Any, encoder: ChatEncoder) -> None:
    """t0's line, and the leaf t1: two more options come in their places, which are not greedy."""
    texts = {**LINES, "t1": "It is 5.", "t2": "Think.\n", "t2.r0": "It is 7.", "t3": "Look.\n", "t3.r0": "It is 7."}

    def unread(shown: dict[str, str], request: Request) -> tuple[float, float]:
        return (0.0, 0.0) if path_of(request) in ("t0", "t1") else (0.3, 0.1)

    engine = Writer(encoder.tokenizer, lambda request, _: texts[path_of(request)], unread)
    found = grown(config_of(search={"simulations": 4}), encoder, engine)
    assert paths(found.responses) == ["t0.r0", "t1", "t2.r0", "t3.r0"]
    assert {path: one.verdict for path, one in zip(paths(found.judgements), found.judgements, strict=True)} == {
        "t0#0": UNREAD, "t1#0": UNREAD, **dict.fromkeys(("t0.r0#0", "t2#0", "t2.r0#0", "t3#0", "t3.r0#0"), RIGHT)
    }  # fmt: skip
    warm = {path_of(one): one.sampling.temperature for one in engine.requests if not one.label_ids}
    assert (warm["t0"], warm["t1"], warm["t2"], warm["t3"]) == (0.0, 0.8, 0.8, 0.8)
    assert kept(found.responses, found.outcomes, 0.5) == NoPair(reason="no finished answer with an outcome")


def test_an_answer_that_is_cut_is_worth_nothing_and_not_asked_about(config_of: Any, encoder: ChatEncoder) -> None:
    """Rollouts that never end: t0 is worth .8 + 0."""
    texts = {**LINES, "t0.r0": "well " * 99, "t1": "well " * 99}
    engine = Writer(encoder.tokenizer, lambda request, _: texts[path_of(request)], says)
    config = config_of(search={"simulations": 2}, line={"max_tokens": 60})
    found = grown(config, encoder, engine)
    assert [len(one.token_ids) for one in found.responses] == [60, 60]
    assert not any(one.complete for one in found.responses)
    assert paths(found.judgements) == ["t0#0"]
    assert kept(found.responses, found.outcomes, -1.0) == NoPair(reason="no finished answer with an outcome")


def test_without_rollouts_or_without_the_critic_of_lines(config_of: Any, encoder: ChatEncoder) -> None:
    for search, asked in (
        ({"rollouts": 0}, ["t0#0", "t1#0"]),
        ({"beta_orm": 0.0}, ["t0#0", "t1#0"]),
        ({"beta_prm": 0.0}, ["t0.r0#0", "t1.r0#0"]),
    ):
        engine = Writer(encoder.tokenizer, write, says)
        found = grown(config_of(search={"simulations": 2, **search}), encoder, engine)
        assert paths(found.judgements) == asked
        assert len(found.responses) == ("beta_prm" in search) * 2


def test_a_finished_answer_is_looked_at_again_and_costs_nothing(config_of: Any, encoder: ChatEncoder) -> None:
    texts = {"t0": "It is 7.", "t1": "It is 9."}
    engine = Writer(encoder.tokenizer, lambda request, _: texts[path_of(request)], says)
    found = grown(config_of(search={"simulations": 50}), encoder, engine)
    assert len(engine.requests) == 4
    assert paths(found.responses) == ["t0", "t1"]


# -- who judges --------------------------------------------------------------------------------------------------------


def test_the_judge_of_the_config_may_say_what_is_right(config_of: Any, encoder: ChatEncoder) -> None:
    judge = {"kind": "answer", "where": "end"}
    engine = Writer(encoder.tokenizer, write, says)
    config = config_of(judge=judge, outcome="judge")
    found = grown(config, encoder, engine)
    assert {name.rpartition("/")[2]: one.points for name, one in found.outcomes.items()} == {
        "t0.r0": 0.0, "t1.r0": 0.0, "t0.0.r0": 1.0, "t0.1": 1.0, "t0.0.0": 1.0
    }  # fmt: skip
    assert {path_of(one) for one in engine.requests if one.label_ids} == {"t0", "t1", "t0.0"}
    recipe = recipe_of(config, encoder)
    assert recipe.needs()["the critic of an answer"] == 0
    assert recipe.asks == [recipe.process.source, "final answer (end, number)"]
    with pytest.raises(ConfigError, match="prompt 'wine' has no answer"):
        recipe.check([TEA.prompt, Prompt(id="wine", text="?")])
    recipe_of(config_of(judge=judge), encoder).check([Prompt(id="wine", text="?")])  # the model says


def test_what_it_cannot_do_is_refused(config_of: Any, encoder: ChatEncoder) -> None:
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "x"}}
    with pytest.raises(ConfigError, match=r"judge\.endpoint with recipe alpha_llm.*leave it out, or use judge\.model"):
        config_of(judge=server, evaluate={"duel": False})
    with pytest.raises(ConfigError, match=r"outcome=judge with judge\.kind=digits, which asks a model; use"):
        config_of(outcome="judge")
    for search in ({"beta_orm": 0.0}, {"rollouts": 0}):
        with pytest.raises(ConfigError, match=r"search\.beta_prm=0 with .* nothing scores a line; raise search\.beta"):
            config_of(search={"beta_prm": 0.0, **search})
    with pytest.raises(ConfigError, match=r"clock\.kind=online"):
        config_of(clock="online")
    for key in ("step_template", "answer_template"):
        with pytest.raises(ConfigError, match=rf"^search\.{key}='nowhere'"):
            recipe_of(config_of(search={key: "nowhere"}), encoder)


def test_what_a_plan_says(config_of: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(config_of(search={"simulations": 10, "rollouts": 4}), encoder)
    demand = recipe.demand(3)
    options, rollouts = 3 * 10 * 6, 3 * 10 * 4
    assert demand.requests == {"actor": (2 * options + rollouts, 38), "judge": (3 * 10 * 5, 1)}
    assert 37 < 60 * (options + rollouts) / (2 * options + rollouts) < 38
    assert (demand.items, demand.item_tokens) == (3, 124)
    assert (recipe.width, recipe.scale) == (5, (0, 1))
    needs = recipe.needs()
    assert needs["sample.max_tokens"] == len(encoder.user("")) + 60
    assert needs["the critic of a line"] == recipe.process.needs(60) > 100
    assert needs["the critic of an answer"] > 100
    assert recipe.asks == [recipe.process.source, recipe.outcome.source]
    less = recipe_of(config_of(search={"simulations": 10, "rollouts": 4, "beta_orm": 0.0}), encoder)
    assert less.demand(3).requests["judge"] == (30, 1)
    assert less.width == 1
