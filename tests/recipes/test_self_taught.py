"""Self-Taught Evaluators: two answers of which one is bad by construction, and what the judgements of them teach."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.config import load
from rsrlm.engines import JUDGE_PRIORITY
from rsrlm.judges.rubric import TOO_LONG
from rsrlm.judges.templates import form_of
from rsrlm.judges.verdicts import NO_WINNER, WINNER, parse_winner
from rsrlm.losses.schedule import lr_at
from rsrlm.recipes.base import NoItems
from rsrlm.recipes.labelled import EVENED, evenly, is_right, pair, position, right_one, right_side
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.self_taught import SelfTaught, SelfTaughtDPO, instruction_of
from rsrlm.records import (
    Completion,
    Group,
    Judgement,
    NoPair,
    PreferencePair,
    Preferred,
    Prompt,
    Request,
    Sampling,
    Task,
    Unparsed,
    seed_of,
)
from rsrlm.report.signs import measure
from rsrlm.settings.base import ConfigError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL: dict[str, Any] = {
    "compare": {"judgements": 6, "max_tokens": 40},
    "engine": {"max_model_len": 1024},
}
TEA = Prompt(id="tea", text="Praise tea.", data={"reference": "Tea is good."})
TASKS = [Task(iteration=1, prompt=prompt) for prompt in (TEA, Prompt(id="ale", text="Praise ale."))]


def judged(verdicts: str, first: str = "g", second: str = "1", prompt: str = "tea") -> list[Judgement]:
    """Judgements of `first` shown before `second`: A, B, t for a tie, - for what cannot be read."""
    known: dict[str, Any] = {
        "A": Preferred(winner="A"), "B": Preferred(winner="B"), "t": Preferred(winner="tie"), "-": NO_WINNER,
    }  # fmt: skip
    return [
        Judgement(
            id=f"01/{prompt}/{first}~{second}#{n}", prompt_id=prompt, response_id=f"01/{prompt}/{first}", index=n,
            role="duel", judge="j", text=one, token_ids=(50 + n, 2), finish_reason="stop", weight_version="M1",
            sampling=Sampling(temperature=0.7, top_p=0.9, max_tokens=9, seed=n), verdict=known[one],
        )
        for n, one in enumerate(verdicts)
    ]  # fmt: skip


# -- the core, by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "form", "winner"),
    [
        ("Winner: [[A]]", WINNER, "A"),
        ("Winner: [[B]]", WINNER, "B"),
        ("Winner: [[A]] or [[B]]", WINNER, NO_WINNER),
        ("Winner: [[C]]", WINNER, NO_WINNER),
        ("[[A]]", WINNER, NO_WINNER),  # without a label
        ("Final verdict: [[B]]", form_of("{#- verdict: {label: Verdict} -#}", WINNER), "B"),
        ("Winner: [[m]]", form_of("{#- verdict: {sides: [m, M]} -#}", WINNER), "A"),
    ],
)
def test_the_authors_form_of_a_verdict(line: str, form: Any, winner: Any) -> None:
    assert parse_winner(f"First A, then B.\n{line}", "stop", form) == winner


def test_which_side_is_right_stands_in_the_id() -> None:
    """The worse response is that of index 1; ids of prompts may hold anything but / # >."""
    assert [right_side(f"01/tea/{name}") for name in ("g~1#0", "0~1#14", "1~g#2>0", "1~0#3")] == ["A", "A", "B", "B"]
    assert right_side("01/1~x/0~1#0") == "A"
    assert right_side("01/0~1/1~0#0") == "B"


def test_one_right_judgement_of_fifteen() -> None:
    """Truth B: A eleven times, B three times, once nothing: one of the three."""
    judgements = judged("AAAABAAAB-AABAA", "1", "g")
    assert [is_right(one) for one in judgements].count(True) == 3
    drawn = [right_one(judgements, seed) for seed in range(40)]
    assert {one.index for one in drawn if isinstance(one, Judgement)} == {4, 8, 12}
    assert drawn == [right_one(judgements, seed) for seed in range(40)]
    assert right_one(judged("AAt-", "1", "g"), 0) == NoPair(reason="no right verdict")


def test_right_is_preferred_to_wrong_or_unreadable() -> None:
    judgements = judged("AAAABAAAB-AABAA", "1", "g")
    pairs = [pair(judgements, (7, 8), seed) for seed in range(200)]
    made = [one for one in pairs if isinstance(one, PreferencePair)]
    assert len(made) == 200
    right = {f"01/tea/1~g#{index}" for index in (4, 8, 12)}
    assert {one.chosen_id for one in made} == right
    assert {one.rejected_id for one in made} == {one.id for one in judgements} - right  # the unreadable one among them
    one = made[0]
    chosen, rejected = (next(j for j in judgements if j.id == name) for name in (one.chosen_id, one.rejected_id))
    assert one == PreferencePair(
        id=f"{chosen.id}>{rejected.index}", prompt_id="tea", kind="judge", chosen_id=chosen.id,
        rejected_id=rejected.id, prompt_token_ids=(7, 8), chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids, chosen_score=1.0, rejected_score=0.0, weight_version="M1",
    )  # fmt: skip
    assert one.chosen_id == right_one(judgements, 0).id  # type: ignore[union-attr]


def test_pairs_that_cannot_be_made() -> None:
    assert pair(judged("AAA"), (), 0) == NoPair(reason="no wrong verdict")
    assert pair(judged("BB-t"), (), 0) == NoPair(reason="no right verdict")
    assert isinstance(pair(judged("At"), (), 0), PreferencePair)  # a tie is wrong: one of the two is better


def test_as_many_that_are_right_with_a_as_with_b() -> None:
    """7 and 4: 4 of each; which four are drawn by seed, whatever the order in which they come."""
    ids = [f"01/p{n}/g~1#3" for n in range(7)] + [f"01/q{n}/1~g#3" for n in range(4)]
    kept = evenly(ids, 0, 1)
    assert Counter(right_side(ids[at]) for at in kept) == {"A": 4, "B": 4}
    assert [ids[at] for at in kept] == [ids[::-1][at] for at in evenly(ids[::-1], 0, 1)]
    drawn = {frozenset(evenly(ids, seed, 1)) for seed in range(20)}
    assert len(drawn) > 1
    assert {at for one in drawn for at in one} == set(range(11))
    assert kept != sorted(kept)  # shuffled
    assert evenly(ids, 0, 2) != kept
    assert evenly(ids[:7], 0, 1) == []


def test_how_often_the_judge_is_right_by_position() -> None:
    """Shown first: 3 of 4 that could be read, a tie being wrong. Shown second: 1 of 3."""

    def group(judgements: list[Judgement]) -> Group:
        return replace(group_of(TASKS[0], (), (), ()), comparisons=tuple(judgements))

    groups = [group(judged("AAt-")), group(judged("A")), group(judged("BAA-", "1", "0"))]
    assert position(groups) == {
        "right_shown_first": 3 / 4, "right_shown_second": 1 / 3, "readable_shown_first": 4,
        "readable_shown_second": 3, "unreadable": 2,
    }  # fmt: skip
    nothing = position([])
    assert (nothing["right_shown_first"], nothing["right_shown_second"], nothing["unreadable"]) == (None, None, 0)


@pytest.mark.parametrize(
    ("text", "cut", "found"),
    [
        (" Praise ale. \n", False, "Praise ale."),
        (" praise   TEA.\n", False, NoPair(reason="other instruction the same")),
        (" \n", False, NoPair(reason="other instruction empty")),
        ("Praise ale, and", True, NoPair(reason="other instruction cut")),
    ],
)
def test_the_other_instruction(text: str, cut: bool, found: Any) -> None:
    assert instruction_of(response(2, text, cut=cut), TEA.text) == found


# -- whole iterations --------------------------------------------------------------------------------------------------


class Author(Scripted):
    """Writes "Praise NAME 2." for an instruction, answers, and judges as `verdict` says of the number and whether the
    good response is shown first. `texts` replaces what is written, by id."""

    def __init__(
        self, encoder: ChatEncoder, verdict: Callable[[int, bool], str], texts: dict[str, str] | None = None
    ) -> None:
        super().__init__(encoder.tokenizer, self._answer)
        self.verdict, self.texts, self.cut = verdict, texts or {}, set[str]()

    def _answer(self, shown: dict[str, str], request: Request, held: str) -> str:
        if request.id in self.texts:
            return self.texts[request.id]
        if request.role == "duel":
            number = int(request.id.rpartition("#")[2])
            return f"Plan {number}.\nWinner: {self.verdict(number, 'bad' not in shown['response A'])}"
        if request.role == "prompter":
            return f"{shown['question'][:-1]} twice."
        return "bad" if request.id.endswith("/1") else "good"

    async def generate(self, request: Request) -> Completion:
        made = await super().generate(request)
        return replace(made, finish_reason="length") if request.id in self.cut else made


def both(number: int, good_first: bool) -> str:
    """Half of the verdicts are right."""
    return "AB"[good_first is (number % 2 == 0)]


def iteration(config: Any, encoder: ChatEncoder, engine: Any, log: Memory | None = None, tasks: Any = None) -> Any:
    recipe, run = recipe_of(config, encoder), run_of(engine, log)
    run.names = ["M0", "M1"]
    batch = asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), tasks or TASKS), 60))
    return batch, run


@pytest.fixture
def seed(make_config: Any, encoder: ChatEncoder) -> int:
    """One by which tea's good response is shown first, and ale's second."""
    for seed in range(50):
        recipe = recipe_of(make_config(recipe="self_taught", seed=seed, **SMALL), encoder)
        shown = [recipe.matches(task, (response(0), response(1)))[0].response_id[-1] for task in TASKS]
        if shown == ["0", "1"]:
            return seed
    raise AssertionError("the order is always the same")


@pytest.mark.parametrize("recipe", ["self_taught", "self_taught_dpo"])
def test_an_iteration(recipe: str, seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    config = make_config(recipe=recipe, seed=seed, **SMALL)
    engine, log = Author(encoder, both), Memory()
    batch, run = iteration(config, encoder, engine, log)
    asked = {request.id: request for request in engine.requests}
    assert Counter((one.role, one.id.split("/")[1]) for one in engine.requests) == {
        ("prompter", "tea"): 1, ("actor", "tea"): 1, ("duel", "tea"): 6,  # a reference: the good one is not sampled
        ("prompter", "ale"): 1, ("actor", "ale"): 2, ("duel", "ale"): 6,
    }  # fmt: skip
    assert set(asked) == {
        "01/tea/2", "01/tea/1", "01/ale/0", "01/ale/2", "01/ale/1",
        *(f"01/tea/g~1#{n}" for n in range(6)), *(f"01/ale/1~0#{n}" for n in range(6)),
    }  # fmt: skip
    assert asked["01/tea/1"].prompt_token_ids == encoder.user("Praise tea twice.")
    assert asked["01/ale/0"].prompt_token_ids == encoder.user("Praise ale.")
    assert asked["01/tea/2"].sampling.seed == seed_of(seed, 1, "tea", "prompter", "2")
    assert len({request.sampling.seed for request in engine.requests}) == len(engine.requests)
    assert len({asked[f"01/tea/g~1#{n}"].prompt_token_ids for n in range(6)}) == 1  # one prompt for all judgements
    assert {asked[f"01/tea/g~1#{n}"].priority for n in range(6)} == {JUDGE_PRIORITY}
    tea, ale = batch.groups
    assert [(one.id, one.text) for one in tea.responses] == [("01/tea/g", "Tea is good."), ("01/tea/1", "bad")]
    assert [one.text for one in ale.responses] == ["good", "bad"]
    assert batch.measures["taught"] == {
        "right_shown_first": 0.5, "right_shown_second": 0.5, "readable_shown_first": 6, "readable_shown_second": 6,
        "unreadable": 0,
    }  # fmt: skip
    shown = {"write": 2, "respond": 4, "compare": 12}
    assert run.screen.totals == [("iteration 1", shown)]
    assert len(batch.items) == 2
    for item in batch.items:
        name = item.id.rpartition("#")[0]
        number, _, rejected = item.id.rpartition("#")[2].partition(">")
        assert item.kind == "judge"
        assert item.prompt_token_ids == asked[f"{name}#0"].prompt_token_ids
        target = item.target_token_ids if recipe == "self_taught" else item.chosen_token_ids
        winner = "A" if "tea" in name else "B"
        assert encoder.tokenizer.decode(target[:-1]) == f"Plan {number}.\nWinner: {winner}"
        assert int(number) % 2 == 1
        if recipe == "self_taught_dpo":
            assert int(rejected) % 2 == 0
    again, _ = iteration(config, encoder, Author(encoder, both), log)
    assert (list(again.items), again.measures) == (list(batch.items), batch.measures)
    second = Author(encoder, both)
    iteration(config, encoder, second, log)
    assert second.requests == []


def test_both_imitate_and_prefer_the_same_judgement(seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    made = [
        {one.id.partition(">")[0] for one in iteration(config, encoder, Author(encoder, both))[0].items}
        for config in (make_config(recipe=name, seed=seed, **SMALL) for name in ("self_taught", "self_taught_dpo"))
    ]
    assert made[0] == made[1]


DROPPED = [
    ({"01/ale/0": " "}, set(), "good response empty or cut", {"01/ale/0"}),
    ({}, {"01/ale/0"}, "good response empty or cut", {"01/ale/0"}),
    ({"01/ale/2": "PRAISE ale."}, set(), "other instruction the same", {"01/ale/0", "01/ale/2"}),
    ({"01/ale/2": "\n"}, set(), "other instruction empty", {"01/ale/0", "01/ale/2"}),
    ({}, {"01/ale/2"}, "other instruction cut", {"01/ale/0", "01/ale/2"}),
    ({"01/ale/2": "word " * 1000}, set(), "other instruction too long", {"01/ale/0", "01/ale/2"}),
    ({"01/ale/1": ""}, set(), "bad response empty", {"01/ale/0", "01/ale/2", "01/ale/1"}),
    ({"01/ale/1": " good\n"}, set(), "bad response the same", {"01/ale/0", "01/ale/2", "01/ale/1"}),
]


@pytest.mark.parametrize(("texts", "cut", "reason", "asked"), DROPPED)
def test_prompts_that_are_left_out(
    texts: dict[str, str], cut: set[str], reason: str, asked: set[str], make_config: Any, encoder: ChatEncoder
) -> None:
    """Nobody is asked about what is of no use; and with one prompt left, no side is as frequent as the other."""
    config = make_config(recipe="self_taught_dpo", **SMALL)
    engine = Author(encoder, both, texts)
    engine.cut = cut
    batch, _ = iteration(config, encoder, engine)
    assert batch.dropped == {reason: 1, EVENED: 1}
    assert {request.id for request in engine.requests if "ale" in request.id} == asked
    assert list(batch.items) == []
    assert batch.groups[1].no_pair_reason == reason


def right(_: int, good_first: bool) -> str:
    return "BA"[good_first]


def wrong(_: int, good_first: bool) -> str:
    return "AB"[good_first]


def test_a_judge_that_is_always_right_can_be_imitated(seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    batch, _ = iteration(make_config(recipe="self_taught", seed=seed, **SMALL), encoder, Author(encoder, right))
    assert (len(batch.items), batch.dropped) == (2, {})


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [(right, "no wrong verdict"), (wrong, "no right verdict"), (lambda *_: "C", "no right verdict")],
)
def test_judgements_without_a_pair(verdict: Any, reason: str, make_config: Any, encoder: ChatEncoder) -> None:
    batch, _ = iteration(make_config(recipe="self_taught_dpo", **SMALL), encoder, Author(encoder, verdict))
    assert (list(batch.items), batch.dropped) == ([], {reason: 2})


def test_an_iteration_without_a_right_judgement_has_failed(make_config: Any, encoder: ChatEncoder) -> None:
    with pytest.raises(NoItems, match=r"^iteration 1 has no judgement to imitate: \{'no right verdict': 2\}"):
        iteration(make_config(recipe="self_taught", **SMALL), encoder, Author(encoder, wrong))


@pytest.mark.parametrize("recipe", ["self_taught", "self_taught_dpo"])
def test_the_signs_of_an_iteration(recipe: str, seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    """Half of the verdicts are right: shown first wins 3 of 6 times for tea and for ale."""
    batch, _ = iteration(make_config(recipe=recipe, seed=seed, **SMALL), encoder, Author(encoder, both))
    found = measure(batch.groups, batch.items if recipe == "self_taught_dpo" else (), [])
    assert (found["first_position_wins"], found["n_decided"]) == (0.5, 12)
    assert found["n_judge_pairs"] == (2 if recipe == "self_taught_dpo" else 0)


def test_a_bias_towards_the_first_position_shows(seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    """Who always says A is right where the good one is A; what says nothing is left out of the shares."""
    config = make_config(recipe="self_taught_dpo", seed=seed, **SMALL)
    batch, _ = iteration(config, encoder, Author(encoder, lambda number, _: "A" if number else "neither"))
    measured = batch.measures["taught"]
    assert (measured["right_shown_first"], measured["right_shown_second"]) == (1.0, 0.0)
    assert (measured["readable_shown_first"], measured["readable_shown_second"], measured["unreadable"]) == (5, 5, 2)
    assert batch.dropped == {"no right verdict": 1, EVENED: 1}  # tea: right over unreadable


def test_responses_that_are_too_long_to_judge(make_config: Any, encoder: ChatEncoder) -> None:
    task = replace(TASKS[0], prompt=replace(TEA, data={"reference": "word " * 900}))
    engine = Author(encoder, both)
    batch, _ = iteration(make_config(recipe="self_taught_dpo", **SMALL), encoder, engine, tasks=[task])
    assert batch.dropped == {TOO_LONG.reason: 1}
    assert {request.role for request in engine.requests} == {"prompter", "actor"}
    assert {one.verdict for one in batch.groups[0].comparisons} == {TOO_LONG}


def test_a_cut_judgement_is_never_imitated(seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    """All judgements are right, and all but number 3 of each prompt were cut after their verdict."""
    engine = Author(encoder, right)
    engine.cut = {f"01/{name}#{n}" for name in ("tea/g~1", "ale/1~0") for n in (0, 1, 2, 4, 5)}
    batch, _ = iteration(make_config(recipe="self_taught", seed=seed, **SMALL), encoder, engine)
    assert {one.id for one in batch.items} == {"01/tea/g~1#3", "01/ale/1~0#3"}
    assert {type(one.verdict) for one in batch.groups[0].comparisons if one.index != 3} == {Unparsed}


def test_a_template_with_sides_of_its_own(tmp_path: Path, seed: int, make_config: Any, encoder: ChatEncoder) -> None:
    file = tmp_path / "sides.jinja"
    tags = "".join(f"<response {s.upper()} {{{{ fence }}}}>\n{{{{ response_{s} }}}}\n</response {s.upper()} {{{{ fence }}}}>\n" for s in "ab")  # fmt: skip  # noqa: E501
    file.write_text("{#- verdict: {label: Verdict, sides: [m, M]} -#}\n{{ instruction }}\n" + tags)
    config = make_config(
        recipe="self_taught", seed=seed, compare={**SMALL["compare"], "template": str(file)}, engine=SMALL["engine"]
    )
    engine = Author(encoder, lambda _, good_first: f"x\nVerdict: [[{'Mm'[good_first]}]]")
    batch, _ = iteration(config, encoder, engine)
    assert batch.measures["taught"]["right_shown_first"] == 1.0
    assert len(batch.items) == 2


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["self_taught", "self_taught_dpo"])
def test_what_a_plan_says(recipe: str, make_config: Any, encoder: ChatEncoder) -> None:
    made = recipe_of(make_config(recipe=recipe, **SMALL), encoder)
    demand = made.demand(10)
    assert demand.requests == {"prompter": (10, 24), "actor": (20, 24), "duel": (60, 40)}
    assert (demand.items, demand.item_tokens) == (10, 400 + 48 + (40 if recipe == "self_taught" else 80))
    needs = made.needs()
    assert needs["sample.max_tokens"] == len(encoder.user("")) + 24
    assert needs["the judge of two responses"] == made.compare.needs(48) > 48
    assert needs["the request for another instruction"] == made.similar.needs() + 24 > 24
    assert made.asks == [made.similar.source, made.compare.source]
    assert made.width == 6
    assert (SelfTaught.trains, SelfTaughtDPO.trains) == ("examples", "pairs")
    assert (SelfTaught.asks_one_model(), SelfTaughtDPO.asks_one_model()) == (False, True)


def test_a_prompt_fits_its_request(make_config: Any, encoder: ChatEncoder) -> None:
    """`needs` is what is asked beside the question, to the token."""
    recipe = recipe_of(make_config(recipe="self_taught", **SMALL), encoder)
    engine = Author(encoder, both)
    iteration(make_config(recipe="self_taught_dpo", **SMALL), encoder, engine)
    (asked,) = [request for request in engine.requests if request.id == "01/tea/2"]
    question = len(encoder.user(TEA.text)) - len(encoder.user(""))
    assert len(asked.prompt_token_ids) == recipe.similar.needs() + question


@pytest.mark.parametrize("recipe", ["self_taught", "self_taught_dpo"])
def test_what_it_cannot_do_is_refused(recipe: str, make_config: Any, encoder: ChatEncoder) -> None:
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "gpt"}}
    for judge, who in ((server, "gpt"), ({"model": "x/y", "replicas": 1}, "x/y")):
        with pytest.raises(ConfigError, match=rf"trains on the model's own judgements, but {who} judges; leave"):
            make_config(recipe=recipe, judge=judge, evaluate={"duel": False}, **SMALL)
    same = {**SMALL["compare"], "temperature": 0}
    with pytest.raises(ConfigError, match=r"compare\.temperature=0 with compare\.judgements=6: all .*; raise it, or"):
        make_config(recipe=recipe, compare=same, engine=SMALL["engine"])
    make_config(recipe=recipe, compare={**same, "judgements": 1}, engine=SMALL["engine"])
    with pytest.raises(ConfigError, match=r"compare\.read='letters'"):
        make_config(recipe=recipe, compare={**SMALL["compare"], "read": "letters"}, engine=SMALL["engine"])
    with pytest.raises(ConfigError, match=r"compare\.max_tokens=1024 leaves no room for a prompt"):
        make_config(recipe=recipe, compare={**SMALL["compare"], "max_tokens": 1024}, engine=SMALL["engine"])
    for key, section in (("similar", "nowhere"), ("compare", {**SMALL["compare"], "template": "nowhere"})):
        config = make_config(recipe=recipe, **{**SMALL, key: section})
        with pytest.raises(ConfigError, match=r"^(similar|compare\.template)='nowhere'"):
            recipe_of(config, encoder)
    with pytest.raises(ConfigError, match=r"^similar='yes_no': uses response, which nobody fills"):
        recipe_of(make_config(recipe=recipe, similar="yes_no", **SMALL), encoder)


def test_examples_are_no_rounds_of_the_online_clock(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"recipe=self_taught with clock\.kind=online"):
        make_config(recipe="self_taught", clock={"kind": "online"}, **SMALL)
    make_config(recipe="self_taught_dpo", clock={"kind": "online"}, **SMALL)


def test_a_learning_rate_never_rises(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr_final=1e-07 is above train\.lr=5\.5e-08; lower it"):
        make_config(recipe="self_taught_dpo", train={"lr": 5.5e-8, "lr_final": 1e-7}, **SMALL)
    for name in ("self_taught_llama3_70b", "self_taught_smollm2_cpu"):
        for step in load(CONFIGS / f"{name}.yaml").planned:
            rule = step.config.train
            rates = [
                lr_at(n, 10, lr=rule.lr, lr_final=rule.lr_final, warmup_steps=0, schedule=rule.schedule)
                for n in range(10)
            ]
            assert rates == sorted(rates, reverse=True)
            assert rates[0] > rates[-1]


def test_the_config_carries_the_papers_values() -> None:
    *taught, preferred = load(CONFIGS / "self_taught_llama3_70b.yaml").planned
    assert [step.recipe for step in taught] == [SelfTaught] * 5
    for step in taught:
        rule, compare = step.config.train, step.config.compare
        assert (rule.start, rule.lr, rule.lr_final, rule.epochs) == ("first", 1e-6, 1e-7, 1)
        assert (compare.judgements, compare.temperature, compare.top_p, compare.read) == (15, 0.7, 0.9, "text")
    rule = preferred.config.train
    assert preferred.recipe is SelfTaughtDPO
    assert (rule.start, rule.beta, rule.nll_scale, rule.lr) == ("before", 0.1, 1.5, 5.5e-8)
