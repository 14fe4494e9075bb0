"""Which candidate becomes the next model, and when training ends early. The engines are scripted."""

import asyncio
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.ask import Judging
from rsrlm.chat import ChatEncoder
from rsrlm.evaluate import Evaluation
from rsrlm.loop import best_of, evaluate, goes_on
from rsrlm.model import load_tokenizer
from rsrlm.records import Completion, Prompt, Request
from rsrlm.runtime.mailbox import Mailbox
from rsrlm.store import RunFolder

PROMPTS = [Prompt(id="tea", text="Say tea."), Prompt(id="milk", text="Say milk.")]
NAMES = ["M1@2", "M1@4", "M1@6", "M1"]


class Engines:
    """Answers with the model that it holds; as M0 it gives an answer the points of its model."""

    slots = 4

    def __init__(self, points: dict[str, int]) -> None:
        self.points = points
        self.held = "M0"
        self.asked: list[str] = []
        self.holds: list[str] = []

    async def hold(self, version: str) -> None:
        if version != self.held:
            self.holds.append(version)
        self.held = version

    async def generate(self, request: Request) -> Completion:
        self.asked.append(request.id)
        text = f"I am {self.held}."
        if "#" in request.id:
            assert self.held == "M0"  # the judge is the model that the iteration started from
            text = f"Score: {self.points[request.id.partition('/')[0].removesuffix('@last')]}"
        return Completion(
            request_id=request.id, token_ids=tuple(self.held.encode()), text=text, finish_reason="stop",
            weight_version=self.held, prompt_tokens=len(request.prompt_token_ids), cached_tokens=0, replica=0,
            prompt_logprobs=()
            if request.score_from is None
            else (-2.0 if self.held == "M0" else -1.0,) * (len(request.prompt_token_ids) - request.score_from),
        )  # fmt: skip


@pytest.fixture
def scene(make_config: Any, smollm2: Path) -> Callable[..., Any]:
    """A run with four candidates of these points; keyword arguments change the config's train section."""

    def make(*points: int, duel: bool = True, **train: Any) -> Any:
        engines = Engines(dict(zip(NAMES, points, strict=True)))
        rule = {"candidate_every_steps": 2, "choose": "score", **train}
        config = make_config(judge={"read": "text", "judgements": 1}, train=rule, evaluate={"duel": duel})
        store = RunFolder(config.folder)
        for name in NAMES:
            store.model(name).mkdir(parents=True)
        encoder = ChatEncoder(load_tokenizer(smollm2))
        return SimpleNamespace(
            engines=engines,
            evaluation=Evaluation(config, encoder, Judging(config, encoder), PROMPTS),
            config=config,
            step=SimpleNamespace(config=config, model="M1"),
            ports=SimpleNamespace(
                pools=SimpleNamespace(samplers=engines, judges=engines, hold=engines.hold),
                store=store,
                report=SimpleNamespace(
                    line=lambda text: None, stage=lambda name, totals: nullcontext(lambda what, done, tokens: None)
                ),
            ),
        )

    return make


def best(scene: Any) -> tuple[str, list[str]]:
    chosen, found = asyncio.run(best_of(NAMES, scene.evaluation, "M0", scene.step, scene.ports))
    return chosen, list(found)


@pytest.mark.parametrize(
    ("points", "early_stop", "chosen", "looked_at"),
    [
        ((2, 3, 1, 5), False, "M1", 4),
        ((2, 3, 1, 5), True, "M1@4", 3),  # what comes after the first that is not better is not looked at
        ((2, 3, 3, 5), True, "M1@4", 3),  # an equal one is not better
        ((2, 3, 4, 5), True, "M1", 4),
        ((2, 2, 2, 2), False, "M1@2", 4),
    ],
)
def test_the_candidate_with_the_best_score(
    scene: Callable[..., Any], points: tuple[int, ...], early_stop: bool, chosen: str, looked_at: int
) -> None:
    made = scene(*points, early_stop=early_stop)
    assert best(made) == (chosen, NAMES[:looked_at])
    assert made.engines.held == "M0"
    asked, holds = len(made.engines.asked), len(made.engines.holds)
    assert asked == looked_at * 4  # two answers and two judgements
    assert best(made) == (chosen, NAMES[:looked_at])
    assert (len(made.engines.asked), len(made.engines.holds)) == (asked, holds)  # it is all in the journals


def test_training_goes_on_while_candidates_get_better(scene: Callable[..., Any]) -> None:
    """Asked at each candidate, in the order of training; later ones may lie there from before a kill."""
    made = scene(2, 3, 1, 5, early_stop=True)

    def ask(steps: int) -> bool:
        return asyncio.run(goes_on(made.evaluation, "M0", made.step, steps, made.ports))

    assert ask(2)
    assert not any("M1@4" in identifier for identifier in made.engines.asked)
    assert ask(4)
    assert not ask(6)
    assert best(made)[0] == "M1@4"
    assert not any(identifier.startswith(("M1/", "M1@last")) for identifier in made.engines.asked)


def test_the_kl_is_between_the_new_model_and_the_first(scene: Callable[..., Any], monkeypatch: Any) -> None:
    """r = -2 - -1 for every token, as long as the new model samples and the two are asked in their turns."""
    made = scene(2, 3, 1, 5, duel=False)
    monkeypatch.setattr(made.evaluation, "scores", nobody_judges)
    found = asyncio.run(evaluate(made.evaluation, "M1", "M0", made.config, made.ports))
    assert found["kl_to_first"] == {"per_token": pytest.approx(math.exp(-1)), "tokens": 2 * len("M1")}
    assert (made.engines.holds, made.engines.held) == (["M1", "M0"], "M0")
    first = asyncio.run(evaluate(made.evaluation, "M0", None, made.config, made.ports))
    assert "kl_to_first" not in first


async def nobody_judges(*_: Any) -> list[Any]:
    return []


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
