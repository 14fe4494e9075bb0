"""Whole iterations of the methods over scripted engines: who is asked what, what is trained on, and nothing twice."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.records import (
    Completion,
    Judgement,
    NoPair,
    PreferencePair,
    Prompt,
    Request,
    Scored,
    Task,
    seed_of,
)
from rsrlm.settings.base import ConfigError

PROMPTS = [Prompt(id=name, text=f"Say {name}.", data={"answer": "7"}) for name in ("tea", "ale")]
TASKS = [Task(iteration=1, prompt=prompt) for prompt in PROMPTS]
ANSWER = {"kind": "answer"}


class Written(Scripted):
    """Writes what `text` says of the response's index, the prompt and the model; likelihoods are `logprob`."""

    def __init__(
        self,
        encoder: ChatEncoder,
        text: Callable[[int, str, str], str],
        logprob: Callable[[int, str], float] | None = None,
    ) -> None:
        super().__init__(encoder.tokenizer, self._answer)
        self.text, self.logprob = text, logprob
        self.asked: list[tuple[str, str]] = []  # model and id

    def _answer(self, shown: dict[str, str], request: Request, held: str) -> str:
        self.asked.append((held, request.id))
        if "#" in request.id or request.score_from is not None:
            return ""
        group, _, index = request.id.rpartition("/")
        return self.text(int(index), group.rpartition("/")[2], held)

    async def generate(self, request: Request) -> Completion:
        made = await super().generate(replace(request, label_ids=()))
        if request.score_from is not None and self.logprob:
            index = int(request.id.split("/")[2])
            tokens = len(request.prompt_token_ids) - request.score_from
            return replace(made, prompt_logprobs=(self.logprob(index, self.held) / tokens,) * tokens)
        if request.label_ids:  # the digit that the response ends with
            text = self.tokenizer.decode(request.prompt_token_ids)
            digit = int(text.partition("points=")[2][:1])
            return replace(made, label_logprobs=tuple(0.0 if digit == label else -99.0 for label in range(6)))
        return made


def iteration(
    config: Any,
    encoder: ChatEncoder,
    engine: Any,
    log: Memory | None = None,
    tasks: list[Task] | None = None,
    run: Any = None,
    **verbs: Any,
) -> Any:
    """The batch of iteration 1, which starts from M1."""
    recipe, run = recipe_of(config, encoder), run or run_of(engine, log)
    run.names = ["M0", "M1"]
    vars(run).update(verbs)
    return asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), tasks or TASKS), 60))


def ids(batch: Any) -> list[str]:
    """In the order of training, which for two prompts of iteration 1 happens to be that of their names."""
    return [pair.id for pair in batch.items]


def test_what_a_response_and_its_judge_need(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(), encoder)
    needs = {"sample.max_tokens": len(encoder.user("")) + 24, "the judge of a response": recipe.judge.needs(24)}
    assert recipe.needs() == needs
    assert needs["the judge of a response"] > 24
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "x"}}
    assert (
        recipe_of(make_config(judge=server, evaluate={"duel": False}), encoder).judge.needs(24) == 0
    )  # it has a context of its own


def test_irpo(make_config: Any, encoder: ChatEncoder) -> None:
    """Tea: right at 0 and 3 of 4. Ale: never. The likelihood of the chosen is trained by default."""
    config = make_config(recipe="irpo", judge=ANSWER, sample={"responses": 4}, pairs=3)
    right = {("tea", 0), ("tea", 3)}
    engine = Written(encoder, lambda index, prompt, _: f"{index}. Final answer: {7 if (prompt, index) in right else 8}")
    batch = iteration(config, encoder, engine)
    assert ids(batch) == ["01/tea/0>1", "01/tea/3>2"]
    assert batch.dropped == {"no right answer": 1}
    assert config.planned[0].config.train.nll_scale == 1
    assert {held for held, _ in engine.asked} == {"M1"}
    assert len(engine.asked) == 8  # nobody is asked to judge
    (pair,) = [pair for pair in batch.items if pair.id == "01/tea/0>1"]
    assert encoder.tokenizer.decode(pair.chosen_token_ids[:-1]) == "0. Final answer: 7"


def test_irpo_takes_the_solution_of_a_prompt(make_config: Any, encoder: ChatEncoder) -> None:
    config = make_config(recipe="irpo", judge=ANSWER, sample={"responses": 2})
    task = Task(iteration=1, prompt=Prompt(id="tea", text="3 + 4?", data={"answer": "7", "solution": "3 + 4 = 7"}))
    batch = iteration(config, encoder, Written(encoder, lambda index, *_: f"Final answer: {index}"), tasks=[task])
    assert ids(batch) == ["01/tea/g>0", "01/tea/g>1"]
    solution = recipe_of(config, encoder).solution(task)
    assert (solution.text, solution.token_ids) == ("3 + 4 = 7", encoder.target("3 + 4 = 7"))
    assert recipe_of(config, encoder).solution(TASKS[0]) is None
    assert batch.items[0].chosen_token_ids == encoder.target("3 + 4 = 7")
    assert batch.items[0].prompt_token_ids == encoder.user("3 + 4?")


def test_irpo_refuses_what_it_cannot_compare(make_config: Any, encoder: ChatEncoder) -> None:
    with pytest.raises(ConfigError, match=r"takes right from wrong answers, but judge\.kind=digits"):
        make_config(recipe="irpo")
    recipe = recipe_of(make_config(recipe="irpo", judge=ANSWER), encoder)
    recipe.check(PROMPTS)
    with pytest.raises(ConfigError, match="prompt 'wine' has no answer"):
        recipe.check([*PROMPTS, Prompt(id="wine", text="Say wine.")])


def test_scpo(make_config: Any, encoder: ChatEncoder) -> None:
    """Of 4 that vote, three say 5; 2 more are sampled hotter and do not vote: one says 6, which has no votes."""
    config = make_config(recipe="scpo", judge=ANSWER, sample={"responses": 4, "temperature": 0.7}, more=2, least=0.75)
    said = {"tea": [5, 5, 5, 7, 5, 6], "ale": [1, 1, 7, 7, 7, 7]}
    engine = Written(encoder, lambda index, prompt, _: f"Final answer: {said[prompt][index]}")
    batch = iteration(config, encoder, engine)
    (pair,) = batch.items
    assert pair.rejected_id == "01/tea/5"
    assert (pair.weight, pair.chosen_score, pair.rejected_score) == (0.75, 0.75, 0.0)
    assert batch.dropped == {"too few votes": 1}
    hotter = {request.id[-1] for request in engine.requests if request.sampling.temperature == 1.2}
    assert hotter == {"4", "5"}
    # Ale: two answers with two votes each, of which the first is looked at.
    assert batch.measures["votes"] == {"largest_share": 0.625, "majority_right": 0.0, "majority_known": 2}
    assert sorted(one.verdict.points for one in batch.groups[0].judgements) == [0.0, 0.25, 0.75, 0.75, 0.75, 0.75]
    assert [one.id for one in batch.groups[0].judgements] == [f"01/tea/{index}#0" for index in range(6)]


def test_scpo_takes_answers_that_are_known(make_config: Any, encoder: ChatEncoder) -> None:
    """Against the majority, with the weight 1; where there is no answer, the votes decide."""
    config = make_config(recipe="scpo", judge=ANSWER, sample={"responses": 4}, use_answers=True)
    tasks = [TASKS[0], replace(TASKS[1], prompt=Prompt(id="ale", text="Say ale."))]
    engine = Written(encoder, lambda index, *_: f"{index}. Final answer: {7 if index == 2 else 5}")
    batch = iteration(config, encoder, engine, tasks=tasks)
    voted, known = batch.items
    assert (known.id, known.weight) == ("01/tea/2>0", 1.0)
    assert (voted.rejected_id, voted.weight) == ("01/ale/2", 0.5)
    with pytest.raises(ConfigError, match=r"counts final answers, but judge\.kind=digits"):
        make_config(recipe="scpo")


def test_scpo_draws_by_the_seed_and_the_group(make_config: Any, encoder: ChatEncoder) -> None:
    """Six alike: each may be chosen."""
    for seed in (1, 2):
        config = make_config(recipe="scpo", judge=ANSWER, sample={"responses": 8}, seed=seed)
        engine = Written(encoder, lambda index, *_: f"{index}. Final answer: {5 if index < 6 else 7}")
        for pair in iteration(config, encoder, engine).items:
            group = pair.id.rpartition("/")[0]
            draw = random.Random(f"votes {seed} {group}")
            assert pair.id == f"{group}/{draw.choice(range(6))}>{draw.choice([6, 7])}"


def test_votes_where_nobody_answers_or_nothing_is_known(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="scpo", judge=ANSWER, sample={"responses": 2}), encoder)
    nothing = {"largest_share": None, "majority_right": None, "majority_known": 0}
    assert recipe.items(1, []).measures == {"votes": nothing}
    tasks = [replace(task, prompt=replace(task.prompt, data={})) for task in TASKS]
    engine = Written(encoder, lambda index, prompt, _: "Final answer: 5" if prompt == "tea" else "Who knows?")
    config = make_config(recipe="scpo", judge=ANSWER, sample={"responses": 2})
    batch = iteration(config, encoder, engine, tasks=tasks)
    assert batch.measures["votes"] == {"largest_share": 0.5, "majority_right": None, "majority_known": 0}


def test_scpo_refuses_answers_that_it_cannot_read(make_config: Any, encoder: ChatEncoder) -> None:
    prompts = [*PROMPTS, Prompt(id="wine", text="Say wine."), Prompt(id="mead", text="?", data={"answer": "seven"})]
    recipe = recipe_of(make_config(recipe="scpo", judge=ANSWER, use_answers=True), encoder)
    recipe.check(prompts[:3])  # one without an answer is left to the votes
    said = r"prompt 'mead'.*'seven' with judge\.value=number; correct its field \"answer\", or use judge\.value=text"
    with pytest.raises(ConfigError, match=said):
        recipe.check(prompts)
    recipe_of(make_config(recipe="scpo", judge=ANSWER), encoder).check(prompts)


@pytest.mark.parametrize("future", [True, False])
def test_temporal(future: bool, make_config: Any, encoder: ChatEncoder) -> None:
    """M1 writes answers of 2 and 3 points, M0 of 1, the model ahead of 4 or (for ale) of 2; M1 scores all."""
    trained: list[Any] = []

    async def train(start: Any, items: Any, rule: Any, name: str) -> Any:
        trained.append((start.name, sorted(pair.id for pair in items), rule.lr, name))
        return model(name)

    def text(index: int, prompt: str, held: str) -> str:
        points = {"M0": 1, "M1": 2 + index % 2}.get(held, 4 if prompt == "tea" else 2)
        return f"{index} points={points}"

    config = make_config(recipe="temporal", future=future)
    engine, log = Written(encoder, text), Memory()
    run = run_of(engine, log)
    batch = iteration(config, encoder, engine, run=run, train=train)
    first = ["01/ale/1>2", "01/tea/1>2"]
    if future:
        assert trained == [("M1", first, 1e-3, "M1.ahead")]
        assert ids(batch) == ["01/ale/1>2", "01/tea/4>2"]
        assert batch.measures["temporal"] == {"rejected_of_first": 2, "chosen_of_ahead": 1}
    else:
        assert (trained, ids(batch)) == ([], first)
    authors = {
        held: {int(one[-1]) for who, one in engine.asked if who == held and "#" not in one} for held, _ in engine.asked
    }
    assert authors == {"M0": {2, 3}, "M1": {0, 1}, **({"M1.ahead": {4, 5}} if future else {})}
    assert {held for held, one in engine.asked if "#" in one} == {"M1"}
    seeds = [request.sampling.seed for request in engine.requests if "#" not in request.id]
    assert len(set(seeds)) == len(seeds) == (12 if future else 8)
    judged = {request.id: request.sampling.seed for request in engine.requests if "#" in request.id}
    places = [(prompt.id, index) for prompt in PROMPTS for index in range(6 if future else 4)]
    assert judged == {f"01/{name}/{i}#0": seed_of(0, 1, f"01/{name}/{i}", "judge", "0") for name, i in places}
    first_told = [event for event in run.events if event["event"] == "group"][-4:-2] if future else run.events[-2:]
    assert [(one["g"], one["pairs"], one["reason"]) for one in first_told] == [
        (f"01/{name}", [f"01/{name}/1>2"], None) for name in ("tea", "ale")
    ]
    shown = [("M0 answers", {"respond": 4}), ("M1 judges", {"judge": 4})]
    if future:
        shown += [("M1.ahead answers", {"respond": 4}), ("M1 judges", {"judge": 4})]
    assert [one for one in run.screen.totals if one in shown] == shown
    (group, _) = batch.groups
    versions = [response.weight_version for response in group.responses]
    assert versions == ["M1", "M1", "M0", "M0", *(["M1.ahead"] * 2 if future else [])]
    # Killed at its end and run again: everything is known.
    asked = len(engine.requests)
    again = iteration(config, encoder, engine, log, train=train)
    assert (again.items, len(engine.requests)) == (batch.items, asked)


def test_whose_responses_make_the_pairs(make_config: Any, encoder: ChatEncoder) -> None:
    """The last of each model: M0's worst is its second, and that of the model ahead is best. Tea's own are not even
    scored, which makes no pair."""

    async def train(*_: Any) -> Any:
        return model("M1.ahead")

    points = {0: 3, 1: 3, 2: 2, 3: 1, 4: 4, 5: 5}
    engine = Written(encoder, lambda index, prompt, _: f"{index} points={points[index]}")
    batch = iteration(make_config(recipe="temporal"), encoder, engine, train=train)
    assert ids(batch) == ["01/ale/5>3", "01/tea/5>3"]
    assert batch.measures["temporal"] == {"rejected_of_first": 2, "chosen_of_ahead": 2}
    recipe, (group, _) = recipe_of(make_config(recipe="temporal"), encoder), batch.groups
    assert recipe.pair(TASKS[0], group.responses, group.judgements[2:]) == NoPair(reason="no scored response")


def test_temporal_samples_anew_of_the_model_that_it_starts_from(make_config: Any, encoder: ChatEncoder) -> None:
    """In the first iteration both models are M0: its second half has seeds of its own."""
    config = make_config(recipe="temporal", future=False)
    engine = Written(encoder, lambda index, *_: f"points={index}")
    run = run_of(engine)
    batch = asyncio.run(recipe_of(config, encoder).iteration(run, 0, model("M0"), TASKS))
    assert len({request.sampling.seed for request in engine.requests if "#" not in request.id}) == 8
    assert ids(batch) == ["01/ale/1>0", "01/tea/1>0"]  # 2 and 3 points of the "first" model are not worse than 0


@pytest.mark.parametrize("consistency", ["iteration", "prompt"])
def test_cream(consistency: str, make_config: Any, encoder: ChatEncoder) -> None:
    """Of 3 responses, M1 less M0 ranks 0 < 1 < 2; the mean likelihood of a token under M0 ranks 0 < 2 < 1."""
    config = make_config(recipe="cream", sample={"responses": 3}, consistency=consistency)
    logprobs = {"M0": [-30.0, -10.0, -20.0], "M1": [-29.0, -8.0, -17.0]}
    engine = Written(encoder, lambda index, *_: "abc"[index], lambda index, held: logprobs[held][index])
    log = Memory()
    batch = iteration(config, encoder, engine, log)
    assert ids(batch) == ["01/ale/2>0", "01/tea/2>0"]
    for pair in batch.items:
        assert isinstance(pair, PreferencePair)
        assert (pair.chosen_score, pair.rejected_score) == pytest.approx((3.0, 1.0))
        assert pair.target == pytest.approx(2 / 3)  # 2 concordant, 1 discordant: tau = 1/3
        assert pair.weight == 1
    assert batch.measures["consistency"] == {"mean": pytest.approx(2 / 3), "prompts": 2}
    assert [one.verdict.points for one in batch.groups[0].judgements] == pytest.approx([1.0, 2.0, 3.0])
    assert batch.groups[0].judgements[2] == Judgement(
        id="01/tea/2#0", prompt_id="tea", response_id="01/tea/2", index=0, role="judge", text="", token_ids=(),
        judge="log-likelihood ratio to M0", finish_reason="stop", weight_version="M1", sampling=None,
        verdict=batch.groups[0].judgements[2].verdict,
    )  # fmt: skip
    scored = sorted((held, one) for held, one in engine.asked if one.endswith("/logprobs"))
    assert len(scored) == 2 * 6  # two models: the one before is M0 itself
    asked = len(engine.requests)
    again = iteration(config, encoder, engine, log)
    assert (again.items, len(engine.requests)) == (batch.items, asked)


def test_cream_compares_with_the_model_before(make_config: Any, encoder: ChatEncoder) -> None:
    """Iteration 2 starts from M2: with M1 it agrees, with M0 it would not."""
    config = make_config(recipe="cream", sample={"responses": 3})
    logprobs = {"M0": [-10.0, -20.0, -30.0], "M1": [-9.0, -18.0, -27.0], "M2": [-8.0, -16.0, -24.0]}
    engine = Written(encoder, lambda index, *_: "abc"[index], lambda index, held: logprobs[held][index])
    run = run_of(engine)
    run.names = ["M0", "M1", "M2"]
    batch = asyncio.run(recipe_of(config, encoder).iteration(run, 2, model("M2"), TASKS))
    assert [pair.target for pair in batch.items] == [1.0, 1.0]
    said = [f"log-probabilities of 6 responses under {name}" for name in ("M2", "M1", "M0")]
    assert [line for line in run.screen.lines if line in said] == said


@pytest.mark.parametrize(("consistency", "targets"), [("iteration", [0.5, 0.5]), ("prompt", [0.0, 1.0])])
def test_cream_of_an_iteration_or_of_each_prompt(
    consistency: str, targets: list[float], make_config: Any, encoder: ChatEncoder
) -> None:
    """The rankings of tea agree, those of ale are each other's reverse."""
    config = make_config(recipe="cream", sample={"responses": 2}, consistency=consistency)
    recipe = recipe_of(config, encoder)
    assert recipe.needs()["the judge of a response"] == 0
    run = run_of(Written(encoder, lambda index, *_: "ab"[index]))
    groups = asyncio.run(run.load(model("M0")))
    made = [asyncio.run(recipe.group(groups, task)) for task in TASKS]
    now = {one.id: Scored(points=one.index) for group in made for one in group.responses}
    then = {name: one if "tea" in name else Scored(points=-one.points) for name, one in now.items()}
    batch = recipe.ranked(1, made, model("M1"), now, then)
    assert [(pair.prompt_id, pair.target) for pair in batch.items] == list(zip(("ale", "tea"), targets, strict=True))


def test_cream_of_the_first_model_goes_by_its_likelihood(make_config: Any, encoder: ChatEncoder) -> None:
    """There is no ratio to itself, and no other model to agree with."""
    config = make_config(recipe="cream", sample={"responses": 3})
    engine = Written(encoder, lambda index, *_: "abc"[index], lambda index, _: [-30.0, -10.0, -20.0][index])
    batch = asyncio.run(recipe_of(config, encoder).iteration(run_of(engine), 0, model("M0"), TASKS))
    assert ids(batch) == ["01/ale/1>0", "01/tea/1>0"]
    assert {pair.target for pair in batch.items} == {1.0}


@pytest.mark.parametrize(
    ("recipe", "keys", "requests", "items"),  # at most; of 24 tokens a response
    [
        ("irpo", {"judge": ANSWER, "pairs": 5}, {"actor": 20}, 50),
        ("scpo", {"judge": ANSWER, "more": 3}, {"actor": 50}, 10),
        ("temporal", {}, {"actor": 60, "judge": 60}, 10),
        ("temporal", {"future": False}, {"actor": 40, "judge": 40}, 10),
        ("cream", {}, {"actor": 20}, 10),
    ],
)
def test_what_a_plan_says(
    recipe: str, keys: dict[str, Any], requests: dict[str, int], items: int, make_config: Any, encoder: ChatEncoder
) -> None:
    demand = recipe_of(make_config(recipe=recipe, **keys), encoder).demand(10)
    assert {role: number for role, (number, _) in demand.requests.items()} == requests
    assert demand.items == items
    assert demand.item_tokens == 2 * 24 + 64
