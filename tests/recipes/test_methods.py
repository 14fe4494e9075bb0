"""Whole iterations of the methods over scripted engines: who is asked what, what is trained on, and nothing twice."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.records import Completion, PreferencePair, Prompt, Request, Task
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
    **verbs: Any,
) -> tuple[Any, Any]:
    """The batch of iteration 1, which starts from M1; and the run."""
    recipe, run = recipe_of(config, encoder), run_of(engine, log)
    run.names = ["M0", "M1"]
    vars(run).update(verbs)
    return asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), tasks or TASKS), 60))


def ids(batch: Any) -> list[str]:
    return sorted(pair.id for pair in batch.items)


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


def test_scpo_takes_answers_that_are_known(make_config: Any, encoder: ChatEncoder) -> None:
    """Against the majority, with the weight 1; where there is no answer, the votes decide."""
    config = make_config(recipe="scpo", judge=ANSWER, sample={"responses": 4}, use_answers=True)
    tasks = [TASKS[0], replace(TASKS[1], prompt=Prompt(id="ale", text="Say ale."))]
    engine = Written(encoder, lambda index, *_: f"Final answer: {7 if index == 2 else 5}")
    batch = iteration(config, encoder, engine, tasks=tasks)
    known, voted = sorted(batch.items, key=lambda pair: pair.prompt_id, reverse=True)
    assert (known.id, known.weight) == ("01/tea/2>0", 1.0)
    assert (voted.rejected_id, voted.weight) == ("01/ale/2", 0.5)
    with pytest.raises(ConfigError, match=r"counts final answers, but judge\.kind=digits"):
        make_config(recipe="scpo")


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
    batch = iteration(config, encoder, engine, log, train=train)
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
    (group, _) = batch.groups
    versions = [response.weight_version for response in group.responses]
    assert versions == ["M1", "M1", "M0", "M0", *(["M1.ahead"] * 2 if future else [])]
    # Killed at its end and run again: everything is known.
    asked = len(engine.requests)
    again = iteration(config, encoder, engine, log, train=train)
    assert (again.items, len(engine.requests)) == (batch.items, asked)


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
    assert {one.weight_version for one in batch.groups[0].judgements} == {"M1"}
    scored = sorted((held, one) for held, one in engine.asked if one.endswith("/logprobs"))
    assert len(scored) == 2 * 6  # two models: the one before is M0 itself
    asked = len(engine.requests)
    again = iteration(config, encoder, engine, log)
    assert (again.items, len(engine.requests)) == (batch.items, asked)


def test_cream_of_the_first_model_goes_by_its_likelihood(make_config: Any, encoder: ChatEncoder) -> None:
    """There is no ratio to itself, and no other model to agree with."""
    config = make_config(recipe="cream", sample={"responses": 3})
    engine = Written(encoder, lambda index, *_: "abc"[index], lambda index, _: [-30.0, -10.0, -20.0][index])
    batch = asyncio.run(recipe_of(config, encoder).iteration(run_of(engine), 0, model("M0"), TASKS))
    assert ids(batch) == ["01/ale/1>0", "01/tea/1>0"]
    assert {pair.target for pair in batch.items} == {1.0}


@pytest.mark.parametrize(
    ("recipe", "keys", "requests", "items"),
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
