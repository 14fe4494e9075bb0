"""Every method, killed at any request and begun again: the same items, and nothing asked twice that was answered.

The engine's answers are a function of what is asked and of the weights that it holds, as a real one's are.
"""

import asyncio
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import PAIR
from scripted import Memory, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.engines import key_of
from rsrlm.records import Completion, Prompt, Request, Task

DATA = {"answer": "7", "reference": "It is seven."}
TASKS = [
    Task(iteration=1, prompt=Prompt(id=name, text=f"What is {name}?", data=DATA)) for name in ("tea", "ale", "rum")
]
DIGITS = {"kind": "digits", "min_mass": 0.0}

METHODS: dict[str, dict[str, Any]] = {
    "self_rewarding": {"judge": DIGITS},
    "irpo": {"judge": {"kind": "answer", "where": "end"}},
    "scpo": {"judge": {"kind": "answer", "where": "end"}, "least": 0.3},
    "temporal": {"judge": DIGITS, "future": False},
    "cream": {"judge": DIGITS},
    "dice": {"judge": DIGITS, "pair": {"least": 2}},
    "scir": {"judge": DIGITS},
    "oaif": {"judge": DIGITS, "sample": {"responses": 2, "max_tokens": 24}},
    "sppo": {"judge": DIGITS},
    "spin": {"judge": DIGITS},
    "dno": {"judge": DIGITS, "pair": {"floor": 0.0, "margin": 0.1, "own_margin": 0.1}},
    "thinking": {"judge": DIGITS, "thought": {}},
    "self_j": {"judge": {**DIGITS, "template": "self_j"}},
    "self_taught": {"judge": DIGITS, "compare": {"judgements": 3, "max_tokens": 24}},
    "self_taught_dpo": {"judge": DIGITS, "compare": {"judgements": 3, "max_tokens": 24}},
    "spar": {"judge": {"kind": "yes_no", "judgements": 3, "max_tokens": 24}, "refine": {"tries": 2, "depth": 2}},
    "alpha_llm": {"judge": DIGITS, "least": 0.0, "search": {"simulations": 6, "rollouts": 2}},
    "process": {"judge": DIGITS, "candidates": 3, "depth": 2},
    "open_book": {"judge": DIGITS},
    "closed_book": {"judge": DIGITS},
}


WRITTEN = {"duel": ("Winner", "AB"), "judge": ("Verdict", ("Yes", "No"))}  # where a verdict is written


class Killed(BaseException):
    """The process is gone."""


class Engine:
    """Answers the first `left` requests."""

    slots = 4

    def __init__(self, encoder: ChatEncoder, left: int = 10**9) -> None:
        self.tokenizer, self.left, self.held = encoder.tokenizer, left, "M0"
        self.answered: Counter[bytes] = Counter()

    async def hold(self, version: str, files: Any = None) -> dict[str, Any]:
        self.held = version
        return {"version": version}

    async def generate(self, request: Request) -> Completion:
        key = key_of(model(self.held), request)
        draw = hashlib.blake2b(key).digest()
        for _ in range(draw[0] % 3):
            await asyncio.sleep(0)
        if self.left <= 0:
            raise Killed
        self.left -= 1
        self.answered[key] += 1
        text = f"So. <R> It is {'seven' if draw[1] % 3 else 'so'}, {draw[2] % 2 + 6}"
        if request.role == "prompter":
            text = f"Question: What is {draw[1]}?\nAnswer: {draw[2]}"
        elif request.role in WRITTEN and not request.label_ids:
            label, sides = WRITTEN[request.role]
            text = f"Because.\n{label}: {sides[draw[1] % 2]}"
        return Completion(
            request_id=request.id, token_ids=(*self.tokenizer.encode(text), 2), text=text, weight_version=self.held,
            finish_reason="stop" if draw[3] % 8 else "length",
            label_logprobs=tuple(-(draw[4 + place % 12] / 50) - 1 for place in range(len(request.label_ids))),
            prompt_logprobs=(-draw[16] / 50,) * (len(request.prompt_token_ids) - (request.score_from or 10**9)),
        )  # fmt: skip


def begun(config: Any, encoder: ChatEncoder, engine: Engine, log: Memory) -> Any:
    run = run_of(engine, log)
    run.names = ["M0", "M1"]
    recipe = recipe_of(config, encoder)
    run.begin(recipe, lambda iteration: [replace(PAIR, id="00/gin/1>0")])  # what spin and dno train on again
    batch = asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), TASKS), 60))
    return replace(batch, items=list(batch.items))  # they lie in a folder that goes with the run


@pytest.mark.parametrize("name", METHODS)
def test_killed_anywhere(name: str, make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    (tmp_path / "tea.txt").write_text("\n\n".join(f"Tea number {n} has a colour of its own." for n in range(9)))
    read = {"documents": str(tmp_path / "tea.txt"), "piece_tokens": 24} if name.endswith("_book") else {}
    keys = {"sample": {"responses": 3, "max_tokens": 24}, **read, **METHODS[name]}
    config = make_config(recipe=name, engine={"max_model_len": 2048}, **keys)
    engine = Engine(encoder)
    whole = begun(config, encoder, engine, Memory())
    assert whole.items
    requests = engine.answered.total()
    assert set(engine.answered.values()) == {1}
    for kill in sorted({0, 1, 2, requests // 3, requests // 2, requests - 1}):
        log, first = Memory(), Engine(encoder, kill)
        with pytest.raises((Killed, BaseExceptionGroup)):
            begun(config, encoder, first, log)
        known, second = set(log.entries), Engine(encoder)
        again = begun(config, encoder, second, log)
        assert again.items == whole.items
        assert (again.dropped, again.measures) == (whole.dropped, whole.measures)
        assert not set(second.answered) & known  # what the journal has is not asked again
