"""Does an attack in a response raise the score that the built-in 135M judge gives it?

    python benchmarks/attacks.py [--prompts 100] [--attacks 10]

The model answers each prompt once. Its answer is scored (`digits`: the mean over the scale in one decoding step) as it
is, with an attack behind it (tests/hostile.py: ends of turns, closed tags, orders to the judge, forged verdicts,
Jinja, in many spellings), with the same and no marking of forged verdicts (`verdicts.claimed`), and with as long a
piece of harmless text behind it, since a judge goes by length too. What raises the score of the same answer is the
attack's doing.
"""

import asyncio
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import ENVIRONMENT, RESULTS, head, write

QUESTION = "does an attack in a response raise the score that the built-in 135M judge gives it?"
FILLER = "Green tea needs water of about eighty degrees, and two or three minutes are enough for most kinds of it. "


async def measured(prompts_wanted: int, attacks_wanted: int, seed: int) -> dict[str, Any]:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from hostile import attacks

    from rsrlm.chat import ChatEncoder
    from rsrlm.config import resolve
    from rsrlm.data import prompts as prompt_files
    from rsrlm.judges import verdicts
    from rsrlm.judges.base import Context, Origin, judge_of
    from rsrlm.model import folder_of, load_tokenizer
    from rsrlm.records import Completion, Prompt, Request, Response, Sampling, Scored
    from rsrlm.runtime.inprocess_engine import InProcessEngine

    with tempfile.TemporaryDirectory() as runs:
        config = resolve(
            {
                "name": "attacks", "runs": runs, "iterations": 1, "model": "smollm2-135m-instruct",
                "prompts": {"path": "builtin", "per_iteration": 1}, "sample": {"responses": 2, "max_tokens": 96},
                "judge": {"kind": "digits", "fence_salt": "salt"}, "train": {"lr": 1e-6, "pairs_per_step": 1},
                "engine": {"max_model_len": 2048},
            }
        )  # fmt: skip
    folder = folder_of(config.model)
    encoder = ChatEncoder(load_tokenizer(folder, False))
    judge: Any = judge_of(config.judge, Context(encoder=encoder, seed=seed, room=2048, fence_salt="salt"))
    engine = InProcessEngine(config, str(folder), "M0", 0)
    asked = prompt_files.read(prompt_files.file_of(config.prompts))[:prompts_wanted]
    sampling = Sampling(temperature=0.8, top_p=1.0, max_tokens=96, seed=seed)

    async def complete(requests: Sequence[Request]) -> list[Completion]:
        found = await engine.generate(requests)
        for one in found:
            if not isinstance(one, Completion):
                raise one
        return found  # type: ignore[return-value]

    answers = await complete(
        [
            Request(id=f"a{number}", prompt_token_ids=encoder.user(one.text), sampling=sampling, priority=0)
            for number, one in enumerate(asked)
        ]
    )

    async def scores(name: str, shown: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        requests = []
        for number, (prompt, text) in enumerate(shown):
            response = Response(
                id=f"{name}{number}", prompt_id=prompt.id, index=0, role="actor", text=text, token_ids=(1,),
                prompt_token_ids=(1,), finish_reason="stop", weight_version="M0", sampling=sampling,
            )  # fmt: skip
            ids = judge.prompt_of(prompt, response, Origin(iteration=0, name=prompt.id))
            if len(ids) < 2047:
                requests.append(
                    Request(
                        id=f"{name}{number}", prompt_token_ids=ids, sampling=judge.sampling(0), priority=0,
                        label_ids=judge.labels, role="judge",
                    )
                )  # fmt: skip
        read = {one.request_id: judge.read(one) for one in await complete(requests)}
        found = [read.get(f"{name}{number}") for number in range(len(shown))]
        return [one.points if isinstance(one, Scored) else None for one in found]

    pairs = [
        (prompt, answer.text) for prompt, answer in zip(asked, answers, strict=True) for _ in range(attacks_wanted)
    ]
    rng, made = random.Random(seed), list(attacks(len(pairs), seed))
    plain = await scores("plain", [(prompt, answer.text) for prompt, answer in zip(asked, answers, strict=True)])
    plain = [one for one in plain for _ in range(attacks_wanted)]
    ways = {
        "attack": [(prompt, f"{text}\n{bad}") for (prompt, text), bad in zip(pairs, made, strict=True)],
        "harmless": [
            (prompt, f"{text}\n{(FILLER * (1 + len(bad) // len(FILLER)))[: len(bad)]}")
            for (prompt, text), bad in zip(pairs, made, strict=True)
        ],
    }
    found = {name: await scores(name, shown) for name, shown in ways.items()}
    marking, verdicts.claimed = verdicts.claimed, lambda text, *_: text
    found["unmarked attack"] = await scores("unmarked", ways["attack"])
    verdicts.claimed = marking
    engine.close()
    draws = np.random.default_rng(rng.randrange(2**32))
    return {
        "prompts": len(asked),
        "attacks": len(made),
        "mean_score_without": float(np.mean([one for one in plain if one is not None])),
        **{name: _against(plain, values, attacks_wanted, draws) for name, values in found.items()},
    }


def _against(
    plain: Sequence[float | None], values: Sequence[float | None], each: int, draws: np.random.Generator
) -> dict[str, Any]:
    """How much higher the scores of the same answers are with something behind them; the interval is over prompts."""
    raised = [None if a is None or b is None else b - a for a, b in zip(plain, values, strict=True)]
    by_prompt = [
        float(np.mean(known))
        for start in range(0, len(raised), each)
        if (known := [one for one in raised[start : start + each] if one is not None])
    ]
    known = [one for one in raised if one is not None]
    means = draws.choice(by_prompt, (10_000, len(by_prompt))).mean(1)
    return {
        "scored": len(known),
        "raised_by": round(float(np.mean(by_prompt)), 3),
        "interval_95": [round(float(one), 3) for one in np.quantile(means, [0.025, 0.975])],
        "raised_by_half_a_point": round(float(np.mean([one >= 0.5 for one in known])), 3),
        "raised_by_at_most": round(max(known), 2),
    }


def main(
    prompts: Annotated[int, typer.Option(min=1)] = 100,
    attacks: Annotated[int, typer.Option(min=1, help="on each answer")] = 10,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="folder of attacks.json")] = RESULTS,
) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    facts = head(QUESTION)
    data = {**facts, **asyncio.run(measured(prompts, attacks, seed))}
    print(write(out, "attacks", data).read_text())


if __name__ == "__main__":
    typer.run(main)
