"""Which candidate becomes the next model, and when training ends early. The engines are scripted: an answer names its
model, and the judge goes by the name that stands in the answer."""

import asyncio
import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Scripted, context_of, run_of

from rsrlm.candidates import Choice, choose, goes_on
from rsrlm.chat import ChatEncoder
from rsrlm.evaluate import Evaluation, evaluate
from rsrlm.judges.base import judge_of
from rsrlm.records import Prompt, Request
from rsrlm.store.folder import RunFolder

PROMPTS = [Prompt(id=f"p{i}", text=f"Say {i}.") for i in range(40)]
NAMES = ["M1@2", "M1@4", "M1@6", "M1"]
Points = dict[str, float]


def model_in(text: str) -> str:
    return re.findall(r"I am (\S+) on", text)[0]


@pytest.fixture
def scene(make_config: Any, encoder: ChatEncoder) -> Callable[..., Any]:
    """A run from M0, which has 2 points, with four candidates of the points given.

    `worth` changes the points of an answer by model and prompt, "" being no readable verdict; keyword arguments change
    the config's train section, `judge` its evaluate.judge.
    """

    numbers = itertools.count()

    def make(
        *points: float,
        worth: Callable[[str, int, float], Any] = lambda model, prompt, points: points,
        judge: dict[str, Any] | None = None,
        evaluated: dict[str, Any] | None = None,
        **train: Any,
    ) -> Any:
        of: Points = {"M0": 2, **dict(zip(NAMES, points, strict=True))}

        def points_of(text: str) -> Any:
            model, prompt = model_in(text), int(text.split(" on ")[1].split(".")[0])
            return worth(model, prompt, of[model])

        def answer(shown: dict[str, str], request: Request, held: str) -> str:
            if "response" in shown:
                judged = points_of(shown["response"])
                return "No idea." if judged == "" else f"Score: {judged}"
            if "response A" in shown:
                a, b = points_of(shown["response A"]), points_of(shown["response B"])
                return "tie" if a == b else "A" if a > b else "B"
            return f"I am {held} on {request.id.split('/p')[1].split('/')[0]}."

        engines, outside = Scripted(encoder.tokenizer, answer), Scripted(encoder.tokenizer, answer)
        outside.held = "validator"
        rule = {"candidate_every_steps": 2, "choose": "score", **train}
        config = make_config(
            name=f"scene{next(numbers)}", judge={"kind": "text", "judgements": 1}, train=rule,
            prompts={"validation": len(PROMPTS)}, evaluate={"judge": judge or {}, **(evaluated or {})},
        )  # fmt: skip
        store = RunFolder(config.folder)
        first = config.folder / "first"
        for name in (first, *map(store.model, NAMES)):
            name.mkdir(parents=True)
            (name / "weights").write_text(name.name)
        run = run_of(
            engines,
            validator=outside if judge else None,
            folder=lambda name: first if name == "M0" else store.model(name),
        )
        run.first = asyncio.run(run.pools.model("M0"))
        context = context_of(config, encoder)
        evaluation = Evaluation(
            config, context, judge_of(config.judge, context), judge_of(config.validating, context), context, PROMPTS
        )
        return SimpleNamespace(
            engines=engines,
            outside=outside,
            said=run.screen.lines,  # type: ignore[attr-defined]
            evaluation=evaluation,
            config=config,
            choice=Choice(config=config, rule=config.train, evaluation=evaluation, before=run.first),
            run=run,
            store=store,
        )

    return make


def best_of(scene: Any, names: list[str] = NAMES) -> tuple[str, dict[str, Any]]:
    found: tuple[str, dict[str, Any]] = asyncio.run(scene.choice.best_of(scene.run, names))
    return found


def best(scene: Any) -> tuple[str, list[str]]:
    chosen, found = best_of(scene)
    return chosen, list(found)


def chosen_of(scene: Any) -> dict[str, Any]:
    return asyncio.run(choose(scene.run, scene.store, scene.choice, 0, "M1"))


def evaluated(scene: Any, name: str, before: str | None) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        models = [await scene.run.pools.model(one) if one else None for one in (name, before)]
        return await evaluate(scene.run, scene.evaluation, *models)

    return asyncio.run(work())


WAYS = pytest.mark.parametrize("way", ["score", "duel"])


@WAYS
@pytest.mark.parametrize(
    ("points", "early_stop", "chosen", "looked_at"),
    [
        ((3, 4, 1, 5), False, "M1", 4),
        ((3, 4, 1, 3), False, "M1@4", 4),
        ((3, 4, 1, 5), True, "M1@4", 3),  # what comes after the first that is not better is not looked at
        ((3, 4, 4, 5), True, "M1@4", 3),  # an equal one is not better
        ((3, 4, 4.5, 5), True, "M1", 4),
        ((3, 3, 3, 3), False, "M1@2", 4),
        ((1, 0, 1, 2), False, "M0", 4),  # all worse than the model before, or equal to it
        ((1, 5, 5, 5), True, "M0", 1),
    ],
)
def test_the_best_candidate_by_the_text_of_its_answers(
    scene: Callable[..., Any], way: str, points: tuple[float, ...], early_stop: bool, chosen: str, looked_at: int
) -> None:
    made = scene(*points, choose=way, early_stop=early_stop)
    assert best(made) == (chosen, NAMES[:looked_at])
    assert made.engines.held == "M0"
    asked, holds = len(made.engines.requests), len(made.engines.holds)
    assert best(made) == (chosen, NAMES[:looked_at])
    assert (len(made.engines.requests), len(made.engines.holds)) == (asked, holds)  # it is all in the journals


@WAYS
def test_a_gain_within_its_interval_is_none(scene: Callable[..., Any], way: str) -> None:
    """Half of the prompts better and half worse by as much, but for one: a mean gain above 0 that chance explains."""

    def worth(model: str, prompt: int, points: float) -> float:
        return points if model == "M0" else points + (1 if prompt < 21 else -1)

    assert best(scene(2, 2, 2, 2, worth=worth, choose=way))[0] == "M0"
    # 34 better and 6 worse: a mean of 0.7, whose standard error is 0.11.
    made = scene(2, 2, 2, 2, worth=lambda m, p, x: x + (m != "M0") * (1 if p < 34 else -1), choose=way)
    found = best_of(made, NAMES[:1])
    assert found[0] == "M1@2"
    assert {key: found[1]["M1@2"][key] for key in ("over", "by", "judge")} == {"over": "M0", "by": way, "judge": "M0"}
    assert re.fullmatch(rf"M1@2 over M0 by M0 \({way}\): gain 0.700 \(0\.\d+ to 0\.\d+, n=40\)", made.said[0])
    figure = found[1]["M1@2"]
    assert (figure["value"], figure["n"], figure["over"], figure["by"]) == (pytest.approx(0.7), 40, "M0", way)
    assert 0.7 - 4 * 0.115 < figure["low"] < 0.7 < figure["high"] < 0.7 + 4 * 0.115


def test_only_prompts_that_are_readable_for_both_are_compared(scene: Callable[..., Any]) -> None:
    """A candidate whose one readable answer is splendid, and one that is readable where the model before is weak."""

    def one_readable(model: str, prompt: int, points: float) -> Any:
        return points if model in ("M0", "M1") or prompt == 0 else ""

    made = scene(5, 5, 5, 3, worth=one_readable)
    chosen, found = best_of(made)
    assert [found[name]["n"] for name in NAMES] == [1, 1, 1, 40]
    assert [found[name]["estimable"] for name in NAMES] == [False, False, False, True]
    assert chosen == "M1"
    assert made.said[0].endswith("cannot be told apart: 1 prompts are readable for both, 30 are needed")

    def weak(model: str, prompt: int, points: float) -> Any:
        """M0 has 0 points where the candidate cannot be read and 4 elsewhere: its own mean would be 3."""
        return ("" if prompt < 10 else points) if model != "M0" else 0 if prompt < 10 else 4

    made = scene(3.5, 3.5, 3.5, 3.5, worth=weak)
    chosen, found = best_of(made)
    assert chosen == "M0"
    assert (found["M1"]["value"], found["M1"]["n"]) == (pytest.approx(-0.5), 30)


@WAYS
def test_another_validator_judges_candidates(scene: Callable[..., Any], way: str) -> None:
    """Other weights: the model in training is not asked to judge, and is not put back to do so."""
    made = scene(3, 4, 1, 5, judge={"model": "some/judge"}, choose=way)
    assert best(made) == ("M1", NAMES)
    assert not [request for request in made.engines.requests if "#" in request.id or ">" in request.id]
    assert len(made.outside.requests) == {"score": 5 * 40, "duel": 4 * 2 * 40}[way]
    assert made.engines.holds == NAMES  # M0 answers first, and is not held again


def test_a_validator_behind_an_api_scores_in_text(make_config: Any, encoder: ChatEncoder) -> None:
    def names(config: Any) -> tuple[Any, Any]:
        return judge_of(config.judge, context_of(config, encoder)), judge_of(
            config.validating, context_of(config, encoder)
        )

    server = {"url": "http://localhost:1/v1", "model": "claude"}
    config = make_config(evaluate={"judge": {"endpoint": server, "read": "text"}})
    assert config.judge.kind == "digits"
    judge, own = names(config)
    assert judge.name == "additive_digits (digits)"
    assert (own.name, own.per_response) == ("additive (text)", 3)
    assert names(make_config())[1].name == "additive_digits (digits)"
    # Another model scores in words where the rewards are a function's; nothing of the function is in its scores.
    function = {"kind": "function", "function": "judge_functions:by_length"}
    _, own = names(make_config(judge=function, evaluate={"judge": {"model": "x"}}))
    assert (own.name, own.needs(9) > 0) == ("additive (text)", True)
    assert names(make_config(judge=function))[1].name == "judge_functions:by_length"


def test_the_model_before_is_kept_where_nothing_is_better(scene: Callable[..., Any]) -> None:
    made = scene(1, 1, 1, 1)
    before = asyncio.run(made.run.pools.model("M1"))
    found = chosen_of(made)
    assert found["chosen"] == "M0"
    assert found["candidates"] == list(found["found"]) == NAMES
    assert (made.store.model("M1") / "weights").read_text() == "first"
    assert (made.config.folder / "first" / "weights").exists()  # copied, not moved
    assert sorted(path.name for path in made.store.model("M1").parent.iterdir()) == ["M1"]
    # The folder holds other weights now, and that is what M1 means.
    after = asyncio.run(made.run.pools.model("M1"))
    assert (before.digest, after.digest) == ("M1", made.run.first.digest)
    assert chosen_of(made) == found  # after a kill


def test_the_chosen_candidate_takes_the_models_place(scene: Callable[..., Any]) -> None:
    made = scene(3, 4, 1, 2)
    assert chosen_of(made)["chosen"] == "M1@4"
    assert (made.store.model("M1") / "weights").read_text() == "M1@4"
    assert made.said[-1] == "iteration 0: M1@4 of M0, M1@2, M1@4, M1@6, M1 becomes M1"
    # No replica that restarts meanwhile looks for a folder that goes.
    assert made.engines.held == "M0"


def test_a_choice_that_was_made_is_kept(scene: Callable[..., Any]) -> None:
    """Killed before the folders were moved: nobody is asked again, whatever the judge would say today."""
    made = scene(3, 4, 1, 2)
    made.store.write_json(made.store.iteration(0) / "chosen.json", {"chosen": "M1@2"})
    assert chosen_of(made) == {"chosen": "M1@2"}
    assert made.engines.requests == []
    assert (made.store.model("M1") / "weights").read_text() == "M1@2"


@WAYS
def test_training_goes_on_while_candidates_get_better(scene: Callable[..., Any], way: str) -> None:
    """Asked at each candidate, in the order of training; later ones may lie there from before a kill."""
    made = scene(3, 4, 1, 5, early_stop=True, choose=way)

    def ask(scene: Any, steps: int) -> bool:
        return asyncio.run(goes_on(scene.run, scene.store, scene.choice, "M1", steps))

    assert ask(made, 2)
    assert not any("M1@4" in request.id for request in made.engines.requests)
    assert ask(made, 4)
    assert not ask(made, 6)
    assert made.said[-1] == "M1@6 is not better than M1@4: training ends"
    assert best(made)[0] == "M1@4"
    assert not any(request.id.startswith("M1/") for request in made.engines.requests)
    worse = scene(1, 5, 5, 5, early_stop=True, choose=way)
    assert not ask(worse, 2)  # worse than M0


def test_held_out_prompts_report_who_won(scene: Callable[..., Any]) -> None:
    """The new model's points against those of the model before, by the frozen first model in both orders."""
    made = scene(2, 2, 2, 4.5, worth=lambda model, prompt, points: 1 if model == "M1" and prompt < 10 else points)
    first = evaluated(made, "M0", None)
    assert first["score_by_first"] == first["score_by_current"] == {"judge": "M0", "mean": 2.0, "n": 40}
    assert "kl_to_first" not in first
    found = evaluated(made, "M1", "M0")
    duel = found["duel_with_M0"]
    assert (duel["win"], duel["tie"], duel["loss"], duel["n"]) == (0.75, 0.0, 0.25, 40)
    assert found["score_by_first"] == {"judge": "M0", "mean": pytest.approx((10 * 1 + 30 * 4.5) / 40), "n": 40}
    assert found["score_by_current"]["judge"] == "M1"
    # r = -2 - -1 for every token: the new model samples, and the two are asked in their turns.
    assert found["kl_to_first"]["per_token"] == pytest.approx(2.718281828459045**-1)
    assert (made.engines.holds, made.engines.held) == (["M1", "M0"], "M0")
    # All of it is known: a resume asks nobody, and moves no weights.
    asked = len(made.engines.requests)
    assert evaluated(made, "M1", "M0") == found
    assert (len(made.engines.requests), made.engines.holds) == (asked, ["M1", "M0"])


def test_the_validator_reports_in_the_place_of_the_first_model(scene: Callable[..., Any]) -> None:
    made = scene(2, 2, 2, 5, judge={"model": "some/judge"}, evaluated={"kl": False})
    first = evaluated(made, "M0", None)
    assert (first["score_by_first"]["judge"], first["score_by_current"]["judge"]) == ("some/judge", "M0")
    found = evaluated(made, "M1", "M0")
    assert (found["score_by_first"]["judge"], found["score_by_current"]["judge"]) == ("some/judge", "M1")
    assert found["duel_with_M0"]["win"] == 1.0
    assert "by some/judge" in found["duel_with_M0"]["judge"]
    assert len(made.outside.requests) == 2 * 40 + 2 * 40  # scores of M0 and M1, and both orders
    assert made.engines.holds == ["M1"]


def test_a_validator_is_asked_though_the_judge_bears_its_name(scene: Callable[..., Any]) -> None:
    """Servers of one's own are often called "default"."""
    server = {"endpoint": {"url": "http://b:1/v1", "model": "M0"}, "read": "text"}
    made = scene(2, 2, 2, 5, judge=server, evaluated={"kl": False, "duel": False})
    made.outside.answer = lambda shown, request, held: "Score: 5"
    found = evaluated(made, "M0", None)
    assert found["score_by_current"] == {"judge": "M0", "mean": 2.0, "n": 40}
    assert found["score_by_first"] == {"judge": "M0", "mean": 5.0, "n": 40}
    assert len(made.outside.requests) == 40
