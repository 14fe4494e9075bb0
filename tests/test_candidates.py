"""Which candidate becomes the next model, and when training ends early. The engines are scripted: an answer names its
model, and the judge goes by the name that stands in the answer."""

import asyncio
import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Scripted

from rsrlm.ask import Judging, validating
from rsrlm.chat import ChatEncoder
from rsrlm.evaluate import Evaluation
from rsrlm.loop import best_of, choose, evaluate, goes_on
from rsrlm.model import load_tokenizer
from rsrlm.records import Prompt, Request
from rsrlm.runtime.mailbox import Mailbox
from rsrlm.store.folder import RunFolder

PROMPTS = [Prompt(id=f"p{i}", text=f"Say {i}.") for i in range(40)]
NAMES = ["M1@2", "M1@4", "M1@6", "M1"]
Points = dict[str, float]


def model_in(text: str) -> str:
    return re.findall(r"I am (\S+) on", text)[0]


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(smollm2))


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

        engines = Scripted(encoder.tokenizer, answer)
        outside = Scripted(encoder.tokenizer, answer)
        rule = {"candidate_every_steps": 2, "choose": "score", **train}
        config = make_config(
            name=f"scene{next(numbers)}", judge={"read": "text", "judgements": 1}, train=rule,
            prompts={"validation": len(PROMPTS)}, evaluate={"judge": judge or {}, **(evaluated or {})},
        )  # fmt: skip
        store = RunFolder(config.folder)
        first = config.folder / "first"
        for name in (first, *map(store.model, NAMES)):
            name.mkdir(parents=True)
            (name / "weights").write_text(name.name)
        forgotten: list[str] = []
        said: list[str] = []
        return SimpleNamespace(
            engines=engines,
            outside=outside,
            forgotten=forgotten,
            said=said,
            choosing=Evaluation(
                config, encoder, Judging(config, encoder), PROMPTS, validating(config, encoder)
            ),
            config=config,
            step=SimpleNamespace(config=config, model="M1"),
            ports=SimpleNamespace(
                pools=SimpleNamespace(
                    samplers=engines, judges=engines, validators=outside if judge else engines, hold=engines.hold,
                    folder=lambda name: first if name == "M0" else store.model(name),
                    forget=lambda version, files=None: forgotten.append(version),
                ),
                store=store,
                report=SimpleNamespace(
                    line=said.append, stage=lambda name, totals: nullcontext(lambda what, done, tokens: None)
                ),
            ),
        )  # fmt: skip

    return make


def best(scene: Any) -> tuple[str, list[str]]:
    work = best_of(NAMES, scene.choosing, 0, "M0", scene.step, scene.ports)
    chosen, found = asyncio.run(work)
    return chosen, list(found)


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
    found = asyncio.run(best_of(NAMES[:1], made.choosing, 0, "M0", made.step, made.ports))
    assert found[0] == "M1@2"
    assert re.fullmatch(rf"M1@2 over M0 by M0 \({way}\): gain 0.700 \(0\.\d+ to 0\.\d+, n=40\)", made.said[0])
    figure = found[1]["M1@2"]
    assert (figure["value"], figure["n"], figure["over"], figure["by"]) == (pytest.approx(0.7), 40, "M0", way)
    assert 0.7 - 4 * 0.115 < figure["low"] < 0.7 < figure["high"] < 0.7 + 4 * 0.115


def test_only_prompts_that_are_readable_for_both_are_compared(scene: Callable[..., Any]) -> None:
    """A candidate whose one readable answer is splendid, and one that is readable where the model before is weak."""

    def one_readable(model: str, prompt: int, points: float) -> Any:
        return points if model in ("M0", "M1") or prompt == 0 else ""

    made = scene(5, 5, 5, 3, worth=one_readable)
    chosen, found = asyncio.run(best_of(NAMES, made.choosing, 0, "M0", made.step, made.ports))
    assert [found[name]["n"] for name in NAMES] == [1, 1, 1, 40]
    assert [found[name]["estimable"] for name in NAMES] == [False, False, False, True]
    assert chosen == "M1"
    assert made.said[0].endswith("cannot be told apart: 1 prompts are readable for both, 30 are needed")

    def weak(model: str, prompt: int, points: float) -> Any:
        """M0 has 0 points where the candidate cannot be read and 4 elsewhere: its own mean would be 3."""
        return ("" if prompt < 10 else points) if model != "M0" else 0 if prompt < 10 else 4

    made = scene(3.5, 3.5, 3.5, 3.5, worth=weak)
    chosen, found = asyncio.run(best_of(NAMES, made.choosing, 0, "M0", made.step, made.ports))
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
    server = {"url": "http://localhost:1/v1", "model": "claude"}
    config = make_config(evaluate={"judge": {"endpoint": server, "read": "text"}})
    assert config.judge.read == "digits"
    assert Judging(config, encoder).name == "additive_digits (digits)"
    judge = validating(config, encoder)
    assert (judge.name, judge.per_response) == ("additive (text)", 3)
    assert validating(make_config(), encoder).name == "additive_digits (digits)"
    # Another model scores in words where the rewards are a function's; nothing of the function is in its scores.
    function = {"read": "function", "function": "judge_functions:by_length"}
    own = validating(make_config(judge=function, evaluate={"judge": {"model": "x"}}), encoder)
    assert (own.name, own.needs(9) > 0) == ("additive (text)", True)
    assert validating(make_config(judge=function), encoder).name == "judge_functions:by_length"


def test_the_model_before_is_kept_where_nothing_is_better(scene: Callable[..., Any]) -> None:
    made = scene(1, 1, 1, 1)
    found = asyncio.run(choose(made.choosing, 0, "M0", made.step, {"files": "f"}, made.ports))
    assert found["choice"]["chosen"] == "M0"
    store = made.ports.store
    assert (store.model("M1") / "weights").read_text() == "first"
    assert (made.config.folder / "first" / "weights").exists()  # copied, not moved
    assert sorted(path.name for path in store.model("M1").parent.iterdir()) == ["M1"]
    assert made.forgotten == ["M1"]
    assert asyncio.run(choose(made.choosing, 0, "M0", made.step, {}, made.ports)) == found  # after a kill


def test_the_chosen_candidate_takes_the_models_place(scene: Callable[..., Any]) -> None:
    made = scene(3, 4, 1, 2)
    asyncio.run(choose(made.choosing, 0, "M0", made.step, {}, made.ports))
    assert (made.ports.store.model("M1") / "weights").read_text() == "M1@4"


@WAYS
def test_training_goes_on_while_candidates_get_better(scene: Callable[..., Any], way: str) -> None:
    """Asked at each candidate, in the order of training; later ones may lie there from before a kill."""
    made = scene(3, 4, 1, 5, early_stop=True, choose=way)

    def ask(steps: int) -> bool:
        return asyncio.run(goes_on(made.choosing, 0, "M0", made.step, steps, made.ports))

    assert ask(2)
    assert not any("M1@4" in request.id for request in made.engines.requests)
    assert ask(4)
    assert not ask(6)
    assert best(made)[0] == "M1@4"
    assert not any(request.id.startswith("M1/") for request in made.engines.requests)
    worse = scene(1, 5, 5, 5, early_stop=True, choose=way)
    assert not asyncio.run(goes_on(worse.choosing, 0, "M0", worse.step, 2, worse.ports))  # worse than M0


def test_held_out_prompts_report_who_won(scene: Callable[..., Any]) -> None:
    """The new model's points against those of the model before, by the frozen first model in both orders."""
    made = scene(2, 2, 2, 4.5, worth=lambda model, prompt, points: 1 if model == "M1" and prompt < 10 else points)
    config = made.config.model_copy(
        update={"prompts": made.config.prompts.model_copy(update={"heldout": len(PROMPTS)})}
    )
    made.ports.store.event = lambda *_, **__: None
    first = asyncio.run(evaluate(made.choosing, "M0", None, config, made.ports))
    assert first["score_by_first"] == first["score_by_current"] == {"judge": "M0", "mean": 2.0, "n": 40}
    assert "kl_to_first" not in first
    found = asyncio.run(evaluate(made.choosing, "M1", "M0", config, made.ports))
    duel = found["duel_with_M0"]
    assert (duel["win"], duel["tie"], duel["loss"], duel["n"]) == (0.75, 0.0, 0.25, 40)
    assert found["score_by_first"] == {"judge": "M0", "mean": pytest.approx((10 * 1 + 30 * 4.5) / 40), "n": 40}
    assert found["score_by_current"]["judge"] == "M1"
    # r = -2 - -1 for every token: the new model samples, and the two are asked in their turns.
    assert found["kl_to_first"]["per_token"] == pytest.approx(2.718281828459045**-1)
    assert (made.engines.holds, made.engines.held) == (["M1", "M0"], "M0")


def test_the_validator_reports_in_the_place_of_the_first_model(scene: Callable[..., Any]) -> None:
    made = scene(2, 2, 2, 5, judge={"model": "some/judge"}, evaluated={"kl": False})
    config = made.config.model_copy(
        update={"prompts": made.config.prompts.model_copy(update={"heldout": len(PROMPTS)})}
    )
    made.ports.store.event = lambda *_, **__: None
    first = asyncio.run(evaluate(made.choosing, "M0", None, config, made.ports))
    assert (first["score_by_first"]["judge"], first["score_by_current"]["judge"]) == ("some/judge", "M0")
    found = asyncio.run(evaluate(made.choosing, "M1", "M0", config, made.ports))
    assert (found["score_by_first"]["judge"], found["score_by_current"]["judge"]) == ("some/judge", "M1")
    assert found["duel_with_M0"]["win"] == 1.0
    assert "by some/judge" in found["duel_with_M0"]["judge"]
    assert len(made.outside.requests) == 2 * 40 + 2 * 40  # scores of M0 and M1, and both orders
    assert made.engines.holds == ["M1"]


def test_a_validator_is_asked_though_the_judge_bears_its_name(scene: Callable[..., Any]) -> None:
    """Servers of one's own are often called "default"."""
    server = {"endpoint": {"url": "http://b:1/v1", "model": "M0"}, "read": "text"}
    made = scene(2, 2, 2, 5, judge=server, evaluated={"kl": False, "duel": False})
    config = made.config.model_copy(
        update={"prompts": made.config.prompts.model_copy(update={"heldout": len(PROMPTS)})}
    )
    made.ports.store.event = lambda *_, **__: None
    made.outside.answer = lambda shown, request, held: "Score: 5"
    found = asyncio.run(evaluate(made.choosing, "M0", None, config, made.ports))
    assert found["score_by_current"] == {"judge": "M0", "mean": 2.0, "n": 40}
    assert found["score_by_first"] == {"judge": "M0", "mean": 5.0, "n": 40}
    assert len(made.outside.requests) == 40


def test_ranks_wait_for_a_decision() -> None:
    async def story() -> None:
        box = Mailbox()
        number = await box.post("train")
        assert await box.decision(number, 4, wait_s=0.01) is None
        assert await box.next(number, wait_s=0) == (number, None)
        behind = await box.post("broadcast")  # the candidate's weights are to be sent while the ranks wait
        assert await box.next(number, wait_s=0) == (behind, "broadcast")
        await box.emit(behind, {"event": "done"})
        assert await box.next(number, wait_s=0) == (number, None)
        waiting = asyncio.ensure_future(box.decision(number, 4, wait_s=5))
        await asyncio.sleep(0)
        await box.decide(number, 2, True)  # another candidate's
        await asyncio.sleep(0)
        assert not waiting.done()
        await box.decide(number, 4, False)
        assert await waiting is False
        assert await box.decision(number, 4) is False  # a rank that was rebuilt asks again
        assert await box.next(-1) == (number, "train")

    asyncio.run(story())
