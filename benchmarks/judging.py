"""What do shared prompts save a judge, and what do eleven judgements cost over one?

    .venv/bin/python benchmarks/judging.py [--rounds 3] [--prompts 6] [--often 6]

The judges are rsrlm's own: written judgements (`judge.kind=text`, N = 11 and N = 1, each of at most 60 tokens), the
meta-judge's comparisons of four judgements of a response in both orders (`meta.read=text`, as long), and digits (one
decoding step). Their requests go through `Engines` and a journal to rsrlm's engine, which is in this process. The
responses that they judge are sampled first, four to a prompt; N = 11 judges `--often` of them, and the comparisons are
of half of those.

`shared` is as rsrlm asks: all judgements of a response have one prompt, comparisons differ late in theirs, and every
prompt begins with the judge's instructions, so that vLLM's prefix cache computes what is the same once. `apart` is the
same requests, token by token and seed by seed, each with a cache salt of its own: vLLM then shares nothing between two
of them, and all else stays as it is. Every side of every round has a salt besides, so that nothing is cached from
before, and a full batch of other requests warms the engine up.

Prompt tokens computed are those that vLLM looked up in its prefix cache less those that it found there.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ENVIRONMENT, RESULTS, Load, head, interleaved, shown, spread, write

from rsrlm.config import Config, resolve
from rsrlm.engines import JUDGE_PRIORITY, Answers, Engines, Model, gather
from rsrlm.judges.base import Context, Origin, judge_of
from rsrlm.judges.pairwise import Match, meta_judge
from rsrlm.meta_judging import comparison_id, matches
from rsrlm.recipes.base import respond
from rsrlm.recipes.meta_rewarding import Meta
from rsrlm.records import Completion, Judgement, Request, Response, Sampling, Task
from rsrlm.report.progress import Report
from rsrlm.runtime.engine import cpu_environment
from rsrlm.runtime.inprocess_engine import InProcessEngine
from rsrlm.runtime.setup import Prepared, prepare
from rsrlm.settings.methods import judge_section
from rsrlm.store.journal import CompletionLog

QUESTION = "seconds of judging with shared prompts over the same requests without, and of N = 11 judgements over N = 1"
MODEL = Model(name="M0", digest="M0")
MANY = 11
COMPARED = 4  # judgements of a response, each two in both orders
WARMUP_TOKENS = 16
SAVES = ("N = 11", "comparisons", "digits")

Judged = Sequence[tuple[Task, Response]]


class Held:
    """An engine in this process as a pool of one replica. `salt` gives the salt of a request by its id."""

    def __init__(self, config: Config, folder: str) -> None:
        self._engine = InProcessEngine(config, folder, MODEL.name, 0)
        self.slots = config.engine.sequences
        self.salt: Callable[[str], str] = str
        self.stats, self.close = self._engine.stats, self._engine.close
        add = self._engine._engine.add_request

        def salted(request_id: str, prompt: Any, params: Any, **options: Any) -> None:
            add(request_id, {**prompt, "cache_salt": self.salt(request_id)}, params, **options)

        self._engine._engine.add_request = salted

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        found = []
        for outcome in await self._engine.generate(requests):
            if not isinstance(outcome, Completion):
                raise outcome
            found.append(outcome)
        return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """Judging that is measured. `ask` makes what is judged of each item; an item comes to `each` requests."""

    ask: Callable[[Engines, Any], Awaitable[tuple[Judgement, ...]]]
    items: Sequence[Any]
    each: int


def config_of(runs: str, prompts: int, max_tokens: int) -> Config:
    return resolve(
        {
            "name": "judging", "runs": runs, "iterations": 1, "model": "smollm2-135m-instruct",
            "prompts": {"path": "builtin", "per_iteration": prompts, "heldout": 0},
            "sample": {"responses": 4, "max_tokens": 96, "temperature": 0.8},
            "judge": {"kind": "text", "judgements": MANY, "max_tokens": max_tokens, "fence_salt": ""},
            "train": {"lr": 1e-6, "pairs_per_step": 4},
            "engine": {"max_model_len": 1024, "max_num_seqs": 32},
        }
    )  # fmt: skip


# -- what is asked -----------------------------------------------------------------------------------------------------


async def written(judge: Any, count: int, engines: Engines, item: tuple[Task, Response]) -> tuple[Judgement, ...]:
    task, response = item
    origin = Origin(iteration=task.iteration, name=response.id)
    return await judge(engines, task.prompt, response, origin, count)


async def compared(
    judge: Any, context: Context, engines: Engines, item: tuple[Task, Response, Sequence[Judgement]]
) -> tuple[Judgement, ...]:
    """Every two of the judgements of a response in both orders, as the recipe of Meta-Rewarding asks."""
    task, response, judgements = item
    shown = {"instruction": task.prompt.text, "response": response.text}
    return await judge(
        engines,
        [
            Match(
                id=comparison_id(first, second), prompt_id=task.prompt.id, response_id=response.id, index=first.index,
                role="meta", fields={**shown, "judgement_a": first.text, "judgement_b": second.text},
                seed=context.seed_of(task.iteration, response.id, "meta", f"{first.index}~{second.index}"),
                fence_seed=context.seed_of(task.iteration, response.id, "meta", "fence"), priority=JUDGE_PRIORITY,
            )
            for first, second in matches(judgements)
        ],
    )  # fmt: skip


def cases_of(
    config: Config, context: Context, responses: Judged, judgements: dict[str, list[Judgement]], often: int
) -> dict[str, Case]:
    """`judgements` are those of a response that are compared, by its id."""
    text = judge_of(config.judge, context)
    digits = judge_of(judge_section({"kind": "digits", "fence_salt": ""}), context)
    meta = meta_judge(Meta(read="text", max_tokens=config.judge.tokens), context)
    contested = [(task, one, judgements[one.id]) for task, one in responses if one.id in judgements]
    return {
        "N = 11": Case(ask=partial(written, text, MANY), items=responses[:often], each=MANY),
        "N = 1": Case(ask=partial(written, text, 1), items=responses, each=1),
        "comparisons": Case(ask=partial(compared, meta, context), items=contested, each=COMPARED * (COMPARED - 1)),
        "digits": Case(ask=partial(written, digits, 1), items=responses, each=1),
    }


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass
class Judging:
    """An engine, what it is asked, and what it answered last, by case and side."""

    held: Held
    cases: dict[str, Case]
    encoder: Any
    scratch: Path
    made: dict[str, dict[str, tuple[int, ...]]]

    def sides(self) -> dict[str, Callable[[int], Any]]:
        named = {f"{name}, {how}": (name, how) for name in SAVES for how in ("shared", "apart")}
        return {
            key: partial(self.side, key, *one) for key, one in {**named, "N = 1, shared": ("N = 1", "shared")}.items()
        }

    async def side(self, key: str, name: str, how: str, number: int) -> dict[str, Any]:
        case, arm = self.cases[name], f"{number} {key}"
        await self.warm_up(arm)
        self.held.salt = (lambda request: f"{arm} {request}") if how == "apart" else (lambda request: arm)
        log = CompletionLog(self.scratch / f"{arm}.jsonl")
        engines = Engines(self.held, MODEL, Answers(log))
        before = await self.held.stats()
        with Load() as load:
            started = time.perf_counter()
            found = await engines.each(partial(case.ask, engines), case.items, case.each)
            log.close()
            seconds = time.perf_counter() - started
        after = await self.held.stats()
        judgements = [one for judged in found for one in judged]
        self.made[key] = {one.id: one.token_ids for one in judgements}
        spent = {counter: after[counter] - before[counter] for counter in after}
        return {
            "seconds": seconds,
            "items": len(case.items),
            "judgements": len(judgements),
            "seconds_a_judgement": seconds / len(judgements),
            "prompt_tokens_a_judgement": spent["prompt_tokens"] / len(judgements),
            "computed_a_judgement": (spent["prefix_cache_queries"] - spent["prefix_cache_hits"]) / len(judgements),
            "generated_a_judgement": sum(len(one.token_ids) for one in judgements) / len(judgements),
            "preemptions": spent["num_preemptions"],
            **load.figures(),
        }

    async def warm_up(self, arm: str) -> None:
        self.held.salt = str
        await self.held.generate_all(
            [
                Request(
                    id=f"warm-up {arm} {index}",
                    prompt_token_ids=self.encoder.user(f"Say hello number {index}."),
                    sampling=Sampling(temperature=0.7, top_p=1.0, max_tokens=WARMUP_TOKENS, seed=index),
                    priority=JUDGE_PRIORITY,
                )
                for index in range(self.held.slots)
            ]
        )

    def equal_share(self, name: str) -> float:
        """Of the judgements with the same tokens on both sides."""
        shared, apart = (self.made[f"{name}, {how}"] for how in ("shared", "apart"))
        return sum(shared[key] == apart[key] for key in shared) / len(shared)


async def prepared_judging(prepared: Prepared, held: Held, often: int, scratch: Path) -> Judging:
    """Responses to judge, and judgements of some of them to compare."""
    config, one = prepared.config, prepared.iterations[0]
    context = one.recipe.context
    log = CompletionLog(scratch / "responses.jsonl")
    engines = Engines(held, MODEL, Answers(log))
    held.salt = lambda request: "responses"
    places = [(task, index) for task in one.tasks for index in range(config.sample.responses)]
    sampled = await gather(respond(engines, context, task, index, config.sample) for task, index in places)
    responses = [(task, response) for (task, _), response in zip(places, sampled, strict=True)]
    text: Any = judge_of(config.judge, context)
    chosen = responses[: max(1, often // 2)]
    judged = await gather(written(text, COMPARED, engines, item) for item in chosen)
    log.close()
    cases = cases_of(config, context, responses, {one[0].response_id: list(one) for one in judged}, often)
    return Judging(held, cases, context.encoder, scratch, {})


async def one_round(judging: Judging, number: int) -> dict[str, Any]:
    sides = judging.sides()
    found = await interleaved(number, sides)
    many, once = found["N = 11, shared"], found["N = 1, shared"]
    return {
        **found,
        "saves": {name: found[f"{name}, apart"]["seconds"] / found[f"{name}, shared"]["seconds"] for name in SAVES},
        "N = 11 over N = 1": (many["seconds"] / many["items"]) / (once["seconds"] / once["items"]),
        "equal": {name: judging.equal_share(name) for name in SAVES},
    }


def summary(rounds: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
    figures = ("seconds_a_judgement", "prompt_tokens_a_judgement", "computed_a_judgement", "generated_a_judgement")
    return {
        "saves": {name: spread([one["saves"][name] for one in rounds]) for name in SAVES},
        "N = 11 over N = 1": spread([one["N = 11 over N = 1"] for one in rounds]),
        "equal": {name: min(one["equal"][name] for one in rounds) for name in SAVES},
        "sides": {key: {name: spread([one[key][name] for one in rounds]) for name in figures} for key in sides},
        "other_cores": spread([one[key]["other_cores"] for one in rounds for key in sides]),
    }


def show(rounds: Sequence[dict[str, Any]], sides: Sequence[str]) -> None:
    report = Report()
    rows = [
        {
            "side": key,
            "judgements": rounds[0][key]["judgements"],
            "seconds": shown([one[key]["seconds_a_judgement"] for one in rounds]),
            "prompt": shown([one[key]["prompt_tokens_a_judgement"] for one in rounds], 0),
            "computed": shown([one[key]["computed_a_judgement"] for one in rounds], 0),
            "generated": shown([one[key]["generated_a_judgement"] for one in rounds], 0),
        }
        for key in sides
    ]
    columns = {"side": "", "judgements": "judgements", "seconds": "s each", "prompt": "prompt tokens each"}
    columns |= {"computed": "computed of them", "generated": "generated"}
    report.table(f"Median of {len(rounds)} rounds (range)", rows, columns)
    for name in SAVES:
        share = min(one["equal"][name] for one in rounds)
        report.line(f"{name}: apart over shared {shown([one['saves'][name] for one in rounds], 2)}, equal {share:.3f}")
    report.line(f"a response, N = 11 over N = 1: {shown([one['N = 11 over N = 1'] for one in rounds], 2)}")
    report.line(f"cores of others: {shown([one[key]['other_cores'] for one in rounds for key in sides], 2)}")


async def measure(prepared: Prepared, held: Held, rounds: int, often: int, out: Path, scratch: Path) -> None:
    judging = await prepared_judging(prepared, held, often, scratch)
    work = {name: {"items": len(case.items), "requests of each": case.each} for name, case in judging.cases.items()}
    data = {**head(QUESTION), "work": work, "judge": prepared.config.judge.model_dump(mode="json")}
    done: list[dict[str, Any]] = []
    sides = list(judging.sides())
    for number in range(rounds):
        done.append(await one_round(judging, number))
        write(out, "judging", {**data, "summary": summary(done, sides), "rounds": done})
        saved = ", ".join(f"{name} {ratio:.2f}" for name, ratio in done[-1]["saves"].items())
        Report().line(
            f"round {number}: apart over shared: {saved}; N = 11 over N = 1 {done[-1]['N = 11 over N = 1']:.2f}"
        )
    show(done, sides)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="with four responses each")] = 6,
    often: Annotated[int, typer.Option(min=1, help="responses that are judged eleven times")] = 6,
    max_tokens: Annotated[int, typer.Option(min=1, help="of a judgement or a comparison")] = 60,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="rsrlm-judging-") as scratch:
        config = config_of(f"{scratch}/runs", prompts, max_tokens)
        os.environ.update(cpu_environment(config.engine))  # before anybody loads torch
        prepared = prepare(config)
        held = Held(prepared.config, str(prepared.model))
        asyncio.run(measure(prepared, held, rounds, often, out, Path(scratch)))
        held.close()
    Report().line(f"result: {out / 'judging.json'}")


if __name__ == "__main__":
    typer.run(main)
