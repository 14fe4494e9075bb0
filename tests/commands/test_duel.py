"""Two models head to head, with a judge that is scripted."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scripted import Memory, Scripted, context_of, engines_of

from rsrlm.chat import ChatEncoder
from rsrlm.commands.duel import answers, compare
from rsrlm.engines import SAMPLE_PRIORITY, Answers
from rsrlm.evaluate import EVALUATION
from rsrlm.judges.pairwise import duel_judge
from rsrlm.records import Completion, Prompt, Request, Response, Sampling, seed_of
from rsrlm.report import metrics

SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_tokens=9, seed=1)


def likes_good(shown: dict[str, str], request: Request, held: str) -> str:
    return "A" if shown["response A"].startswith("good") else "B"


def answer(prompt: Prompt, text: str) -> Response:
    return Response(
        id=f"{prompt.id}/0", prompt_id=prompt.id, index=0, role="actor", text=text, token_ids=(5,),
        prompt_token_ids=(1,), finish_reason="stop", weight_version="M0", sampling=SAMPLING,
    )  # fmt: skip


@pytest.fixture
def compared(make_config: Any, encoder: ChatEncoder) -> Callable[..., dict[str, Any]]:
    def make(
        engine: Any, prompts: list[Prompt], first: list[Response], second: list[Response], seed: int = 0,
        answers: Answers | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        config = make_config(seed=seed)
        judge = duel_judge(config, context_of(config, encoder))
        return asyncio.run(compare(prompts, first, second, judge, engines_of(engine, answers=answers)))

    return make


def test_a_duel_counts_both_orders_and_equal_answers(compared: Callable[..., Any], encoder: ChatEncoder) -> None:
    prompts = [Prompt(id=f"p{i}", text="?") for i in range(40)]
    first = [answer(p, "same" if i < 10 else "good") for i, p in enumerate(prompts)]
    second = [answer(p, "same" if i < 10 else "bad") for i, p in enumerate(prompts)]
    engine = Scripted(encoder.tokenizer, likes_good)
    found = compared(engine, prompts, first, second)
    assert (found["win"]["value"], found["tie"]["value"], found["loss"]["value"]) == (0.75, 0.25, 0.0)
    assert found["win_rate"]["value"] == 0.875
    assert len(engine.requests) == 60  # equal answers need no judge
    assert found["mean_chars"] == [4.0, pytest.approx(3.25)]
    swapped = compared(Scripted(encoder.tokenizer, likes_good), prompts, second, first)
    assert (swapped["win"]["value"], swapped["loss"]["value"]) == (0.0, 0.75)


def test_two_models_answer_with_the_same_luck(make_config: Any, encoder: ChatEncoder) -> None:
    """One answer to each prompt, in their order, with the seed of the prompt; what the journal holds is not asked."""
    config = make_config(evaluate={"temperature": 0.3, "max_tokens": 17})
    prompts = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk")]
    ticks: list[tuple[str, int, int]] = []

    def of(engine: Scripted, log: Memory) -> list[Response]:
        asked = Answers(log)
        with asked.counted(lambda *tick: ticks.append(tick)):
            engines = engines_of(engine, answers=asked)
            return asyncio.run(answers(prompts, engines, context_of(config, encoder), config.evaluate))

    one, other, none = (Scripted(encoder.tokenizer, lambda *_: "x") for _ in range(3))
    log = Memory()
    found = of(one, log)
    assert [(a.id, a.prompt_id, a.index, a.role) for a in found] == [
        ("tea/0", "tea", 0, "actor"), ("milk/0", "milk", 0, "actor"),
    ]  # fmt: skip
    assert ticks == [("actor", 1, 2)] * 2
    assert [request.prompt_token_ids for request in one.requests] == [encoder.user(prompt.text) for prompt in prompts]
    assert {(r.sampling.temperature, r.sampling.max_tokens) for r in one.requests} == {(0.3, 17)}
    assert [request.sampling.seed for request in one.requests] == [3951183676720834804, 412244639712059126]
    of(other, Memory())
    assert other.requests == one.requests
    assert of(none, log) == found
    assert none.requests == []


def test_a_duel_is_seeded_and_counted(compared: Callable[..., Any], encoder: ChatEncoder) -> None:
    """40 prompts, of which five have equal answers and five cannot be read in one order."""
    prompts = [Prompt(id=f"p{i}", text=f"number {i}?") for i in range(40)]
    first = [answer(p, "same" if i < 5 else f"good {i}") for i, p in enumerate(prompts)]
    second = [answer(p, "same" if i < 5 else f"bad {i}") for i, p in enumerate(prompts)]

    class Blind(Scripted):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            unread = request.id in {f"p{i}#1" for i in range(5, 10)}
            return replace(made, label_logprobs=(-20.0, -20.0)) if unread else made

    engine, asked, ticks = Blind(encoder.tokenizer, likes_good), Answers(Memory()), []
    with asked.counted(lambda *tick: ticks.append(tick)):
        found = compared(engine, prompts, first, second, 7, asked)
    assert found["unreadable"] == 5
    assert {request.priority for request in engine.requests} == {SAMPLE_PRIORITY}
    outcomes: list[Any] = ["tie"] * 5 + ["first"] * 30
    assert {key: found[key] for key in ("win", "tie", "loss", "win_rate")} == metrics.win_rate(outcomes, seed=7)
    assert found["win"] != metrics.win_rate(outcomes, seed=8)["win"]
    # Equal answers count as both of their orders: the bar comes to its end.
    assert sorted(ticks) == [("duel", 1, 2)] * 70 + [("duel", 2, 0)] * 5
    assert {request.id: request.sampling.seed for request in engine.requests} == {
        f"p{i}#{order}": seed_of(7, EVALUATION, f"p{i}", "duel", order) for i in range(5, 40) for order in ("0", "1")
    }
    again = Blind(encoder.tokenizer, likes_good)
    assert compared(again, prompts, first, second, 7, asked) == found
    assert again.requests == []
    nobody = compared(engine, [], [], [], 7)
    assert nobody["mean_chars"] == [None, None]
