"""Self-J: grades from two signals, examples in two views, and what is asked for them."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.config import dump, load, resolve, without_steps
from rsrlm.data.prompt_pool import rouge_l
from rsrlm.judges.verdicts import LITTLE_DIGIT_MASS, Form, read_distribution
from rsrlm.recipes.base import NoItems
from rsrlm.recipes.parts import standardised
from rsrlm.recipes.self_j import grades_of
from rsrlm.records import Completion, Prompt, Request, Scored, Task
from rsrlm.settings.base import ConfigError

JUDGE = {"kind": "digits", "template": "self_j"}
REFERENCES = {"tea": "a hot drink of leaves", "ale": "a drink of malt", "rum": "a spirit", "gin": "nothing"}
PROMPTS = [Prompt(id=name, text=f"What is {name}?", data={"reference": text}) for name, text in REFERENCES.items()]
TASKS = [Task(iteration=0, prompt=prompt) for prompt in PROMPTS]
TEN = Form(label="Score", scale=(0, 9), prefix="Score: ")


def test_the_score_is_the_expected_digit() -> None:
    """Digits 2, 6, 7, 8 with .01, .10, .50, .29: 6.44 of .90."""
    found = {2: 0.01, 6: 0.10, 7: 0.50, 8: 0.29}
    logprobs = [math.log(found[digit]) if digit in found else -math.inf for digit in range(10)]
    verdict = read_distribution(logprobs, 0.05, TEN)
    assert isinstance(verdict, Scored)
    assert verdict.points == pytest.approx(7.1556, abs=5e-5)
    assert read_distribution([-math.inf] * 10, 0.05, TEN) == LITTLE_DIGIT_MASS


def test_grades_by_hand() -> None:
    ratings, similarities = [2, 9, 5, 7], [0.62, 0.91, 0.80, 0.75]
    sums = [one + other for one, other in zip(standardised(ratings), standardised(similarities), strict=True)]
    assert sums == pytest.approx([-2.890, 2.601, -0.002, 0.291], abs=5e-4)
    rated = dict(zip("abcd", zip(ratings, similarities, strict=True), strict=True))
    assert grades_of(rated, 10) == {"a": 0, "c": 2, "d": 5, "b": 7}


def test_grades_are_equally_frequent_and_do_not_depend_on_the_order() -> None:
    rated = {f"q{n:02d}": (float(n % 7), (n * 5 % 11) / 11) for n in range(40)}
    grades = grades_of(rated, 10)
    assert [list(grades.values()).count(grade) for grade in range(10)] == [4] * 10
    assert grades_of(dict(reversed(rated.items())), 10) == grades
    assert grades_of({}, 10) == {}
    assert grades_of({"b": (1.0, 1.0), "a": (1.0, 1.0)}, 10) == {"a": 0, "b": 5}  # equal: by id


def test_similarity() -> None:
    assert rouge_l("a hot drink", "A hot, hot drink of leaves") == pytest.approx(2 * 3 / 9)
    assert rouge_l("!", "?") == 0


class Grading(Scripted):
    """Writes the reference's first words, and rates with the digit that stands in `ratings`; None: no digit at all."""

    def __init__(self, encoder: ChatEncoder, ratings: dict[str, int | None]) -> None:
        super().__init__(encoder.tokenizer, lambda shown, request, held: self.text(request))
        self.ratings = ratings

    def text(self, request: Request) -> str:
        name = request.id.split("/")[1]
        return " " if name == "gin" else " ".join(REFERENCES[name].split()[:3])

    async def generate(self, request: Request) -> Completion:
        made = await super().generate(replace(request, label_ids=()))
        if not request.label_ids:
            return made
        digit = self.ratings[request.id.split("/")[1]]
        logprobs = tuple(-99.0 if label != digit else 0.0 for label in range(10))
        return replace(made, label_logprobs=logprobs)


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    """Rum is rated best and tea worst; nothing is written about gin, and ale's rating cannot be read."""
    config = make_config(recipe="self_j", judge=JUDGE, engine={"max_model_len": 2048})
    recipe, log = recipe_of(config, encoder), Memory()
    engine = Grading(encoder, {"tea": 1, "ale": None, "rum": 8, "gin": 9})
    batch = asyncio.run(recipe.iteration(run_of(engine, log), 0, model("M0"), TASKS))
    assert {one.id: one.label for one in batch.items} == {"00/tea/0": 0, "00/rum/0": 5}  # of two, tenths 0 and 5
    assert batch.dropped == {"no text": 1, "little mass on digits": 1}
    (tea,) = [one for one in batch.items if one.id == "00/tea/0"]
    teacher, student = (encoder.tokenizer.decode(ids) for ids in (tea.teacher_token_ids, tea.student_token_ids))
    assert "<reference>\na hot drink of leaves\n</reference>" in teacher
    assert "leaves" not in student
    assert all("a hot drink\n</response" in view and view.endswith("Score: ") for view in (teacher, student))
    assert [encoder.tokenizer.decode([one]) for one in tea.label_token_ids] == list("0123456789")
    assert (tea.prompt_token_ids, tea.target_token_ids) == (tea.student_token_ids, tea.label_token_ids[:1])
    asked = [request.id for request in engine.requests]
    assert sorted(asked) == sorted(f"00/{name}/0{judged}" for name in REFERENCES for judged in ("", "#0"))
    again = asyncio.run(recipe.iteration(run_of(engine, log), 0, model("M0"), TASKS))
    assert (again.items, len(engine.requests)) == (batch.items, len(asked))


def test_nothing_that_could_be_rated(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="self_j", judge=JUDGE, engine={"max_model_len": 2048}), encoder)
    engine = Grading(encoder, dict.fromkeys(REFERENCES))
    with pytest.raises(NoItems, match=r"no answer could be rated: \{'little mass on digits': 3, 'no text': 1\}"):
        asyncio.run(recipe.iteration(run_of(engine), 0, model("M0"), TASKS))


def test_what_it_cannot_do_is_refused(make_config: Any, encoder: ChatEncoder) -> None:
    with pytest.raises(ConfigError, match=r"recipe self_j trains the model itself .* judge\.kind=text by the model"):
        make_config(recipe="self_j", judge={"kind": "text"})
    with pytest.raises(ConfigError, match=r"teacher='self_j_reference' and judge\.template='additive': their verdicts"):
        recipe_of(make_config(recipe="self_j"), encoder)
    recipe = recipe_of(make_config(recipe="self_j", judge=JUDGE), encoder)
    recipe.check(PROMPTS)
    with pytest.raises(ConfigError, match=r"prompt 'wine' has no 'reference', which recipe self_j compares"):
        recipe.check([Prompt(id="wine", text="?")])


def test_what_a_plan_says(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="self_j", judge=JUDGE), encoder)
    demand = recipe.demand(10)
    assert (demand.requests, demand.items) == ({"actor": (10, 24), "judge": (10, 1)}, 10)
    assert recipe.needs()["the judge that sees the reference"] > recipe.needs()["the judge of a response"] > 24
    assert recipe.asks == [recipe.teacher.source, recipe.judge.source]
    assert recipe.trains == "examples"


def test_keys_of_its_own_may_stand_at_the_top(make_config: Any) -> None:
    config = make_config(recipe="self_j", judge=JUDGE, train={"kl_scale": 1})
    assert config.planned[0].config.train.kl_scale == 1.0
    with pytest.raises(ConfigError, match=r"train\.kl_scale=1: no step uses it \(recipes: SelfRewarding\)"):
        make_config(train={"kl_scale": 1})
    assert resolve(yaml.safe_load(dump(config))).planned[0].config == config.planned[0].config


def test_its_run_can_be_measured(make_config: Any) -> None:
    """As a run of plain self-rewarding, which trains nothing here."""
    for config in (make_config(recipe="self_j", judge=JUDGE, train={"kl_scale": 1}), make_config(recipe="sppo")):
        plain = without_steps(config, None)
        assert plain.planned[0].config.train.loss == "sigmoid"
        assert plain.judge == config.judge
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        without_steps(load(path, ["data.trees=x"]), None)


def test_it_has_nothing_to_do_on_the_online_clock(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"recipe=self_j with clock\.kind=online"):
        make_config(recipe="self_j", judge=JUDGE, clock="online")
