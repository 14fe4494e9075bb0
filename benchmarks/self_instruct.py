"""How long does near-duplicate removal take at 20,000 prompts?

    .venv/bin/python benchmarks/self_instruct.py [--prompts 20000] [--rounds 3]

Synthetic prompts, all from one seed: each has as many words as one of the built-in prompts, drawn from the words of
all of them with their frequency; every tenth is an earlier one with two words replaced, so that some are refused.

- pool: a `rsrlm.data.prompt_pool.PromptPool` that holds the built-in prompts gets them one after the other: the total,
  the prompts per second, and the last 1,000 apart, when the pool is largest.
- rouge_score: `RougeScorer(["rougeL"]).score`, one text against another as in a naive loop, measured on a sample of
  pairs of the same prompts. Its total is extrapolated, never run: seconds per comparison times the comparisons of that
  loop, which sets every prompt against all that were kept before it.

Both in one process and one thread. Naive loops may use more processes; the ratio is per core.
"""

import asyncio
import random
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, Load, head, interleaved, shown, spread, write

from rsrlm.data import prompts as prompt_files
from rsrlm.data.prompt_pool import PromptPool
from rsrlm.report.progress import Report
from rsrlm.settings.methods import Prompts

QUESTION = "seconds of near-duplicate removal at this number of prompts, beside a naive loop of rouge_score"
NAME = "self_instruct"
NEAR_EVERY = 10
LAST = 1000


def synthetic(texts: list[str], count: int, seed: int) -> list[str]:
    rng = random.Random(f"benchmark {seed}")
    words = [word for text in texts for word in text.split()]
    lengths = [len(text.split()) for text in texts]
    made: list[list[str]] = []
    for number in range(count):
        if number % NEAR_EVERY == NEAR_EVERY - 1:
            one = list(rng.choice(made))
            for _ in range(2):
                one[rng.randrange(len(one))] = rng.choice(words)
        else:
            one = rng.choices(words, k=rng.choice(lengths))
        made.append(one)
    return [" ".join(one) for one in made]


def adding(known: list[str], texts: list[str]) -> dict[str, Any]:
    """All texts into a fresh pool. `comparisons` is what a naive loop would need to keep the same ones."""
    pool = PromptPool(known)
    kept = comparisons = 0
    started = last = time.perf_counter()
    for number, text in enumerate(texts):
        if number == len(texts) - LAST:
            last = time.perf_counter()
        comparisons += len(known) + kept
        kept += pool.add(text) is None
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "seconds_of_last": ended - last,
        "prompts_per_second": len(texts) / (ended - started),
        "kept": kept,
        "comparisons": comparisons,
    }


def comparing(texts: list[str], sample: int, number: int) -> dict[str, Any]:
    from rouge_score.rouge_scorer import RougeScorer

    score: Callable[[str, str], Any] = RougeScorer(["rougeL"], use_stemmer=False).score
    rng = random.Random(f"pairs {number}")
    pairs = [(rng.choice(texts), rng.choice(texts)) for _ in range(sample)]
    started = time.perf_counter()
    for one, other in pairs:
        score(one, other)
    return {"sample": sample, "microseconds_per_comparison": (time.perf_counter() - started) / sample * 1e6}


async def one_round(number: int, known: list[str], texts: list[str], sample: int) -> dict[str, Any]:
    async def pool(_: int) -> dict[str, Any]:
        adding(known, texts[: len(texts) // 10])
        with Load() as load:
            found = adding(known, texts)
        return {**found, **load.figures()}

    async def rouge_score(_: int) -> dict[str, Any]:
        comparing(texts, sample // 10, number)
        with Load() as load:
            found = comparing(texts, sample, number)
        return {**found, **load.figures()}

    one = await interleaved(number, {"pool": pool, "rouge_score": rouge_score})
    naive = one["rouge_score"]["microseconds_per_comparison"] * 1e-6 * one["pool"]["comparisons"]
    return {**one, "naive_seconds_extrapolated": naive, "naive_over_pool": naive / one["pool"]["seconds"]}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    of_pool = ("seconds", "seconds_of_last", "prompts_per_second")
    return {
        "kept": rounds[0]["pool"]["kept"],
        "naive_comparisons": rounds[0]["pool"]["comparisons"],
        "pool": {name: spread([one["pool"][name] for one in rounds]) for name in of_pool},
        "microseconds_per_comparison": spread([one["rouge_score"]["microseconds_per_comparison"] for one in rounds]),
        **{name: spread([one[name] for one in rounds]) for name in ("naive_seconds_extrapolated", "naive_over_pool")},
        "other_cores": spread([one[side]["other_cores"] for one in rounds for side in ("pool", "rouge_score")]),
    }


def show(rounds: list[dict[str, Any]], count: int) -> None:
    kept, comparisons = rounds[0]["pool"]["kept"], rounds[0]["pool"]["comparisons"]
    report = Report()
    report.line(f"{count:,} prompts, {kept:,} kept; median (range) of {len(rounds)} rounds")
    values = {
        f"pool: seconds for {count:,} prompts": shown([one["pool"]["seconds"] for one in rounds], 2),
        f"pool: seconds for the last {LAST:,}": shown([one["pool"]["seconds_of_last"] for one in rounds], 2),
        "rouge_score: microseconds per comparison": shown(
            [one["rouge_score"]["microseconds_per_comparison"] for one in rounds], 1
        ),
        f"naive loop: seconds for {comparisons:,} comparisons, extrapolated": shown(
            [one["naive_seconds_extrapolated"] for one in rounds], 0
        ),
        "naive loop over pool": shown([one["naive_over_pool"] for one in rounds], 0),
    }
    rows = [{"what": what, "value": value} for what, value in values.items()]
    report.table("Near-duplicates", rows, {"what": "", "value": ""})


def main(
    prompts: Annotated[int, typer.Option(min=LAST, help="synthetic prompts to add")] = 20_000,
    sample: Annotated[int, typer.Option(min=10, help="comparisons of rouge_score per round")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(help="of the synthetic prompts")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    path = prompt_files.file_of(Prompts(path=prompt_files.BUILTIN, per_iteration=1))
    known = [prompt.text for prompt in prompt_files.read(path)]
    texts = synthetic(known, prompts, seed)
    data = head(QUESTION)
    data["versions"] |= {name: metadata.version(name) for name in ("rapidfuzz", "rouge-score")}
    data |= {"prompts": prompts, "known": len(known), "seed": seed, "last": LAST}
    done: list[dict[str, Any]] = []
    for number in range(rounds):
        done.append(asyncio.run(one_round(number, known, texts, sample)))
        write(out, NAME, {**data, "summary": summary(done), "rounds": done})
        Report().line(f"round {number}: {done[-1]['pool']['seconds']:.2f} s")
    show(done, prompts)
    Report().line(f"result: {out / (NAME + '.json')}")


if __name__ == "__main__":
    typer.run(main)
