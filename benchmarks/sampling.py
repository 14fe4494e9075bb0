"""What do actors, routing and records cost? Tokens/s through rsrlm over vLLM's offline `LLM.generate`.

    .venv/bin/python benchmarks/sampling.py [--kind inprocess|async] [--rounds 5] [--prompts 32]

rsrlm's side is the real one: recipe and journal over an `EnginePool` of `EngineActor`s in Ray, every response written
to the journal, which is closed (fsync) within the time. Its judge is a function that returns 0. The other side is an
`LLM` in a Ray actor with the same environment, given the very requests that the recipe makes (same token ids,
sampling parameters and seeds, in the order of submission) in one call; only `LLM.generate` is timed there. Both
engines stay resident and only one generates at a time; before each timed run its engine answers a full batch of other
prompts.

Engine arguments are the same, `rsrlm_arguments` (priority scheduling, weight transfer) included, and the token budget
of a step, which vLLM chooses by the class that asks for it, is set to rsrlm's. --plain leaves all this to vLLM: an
`LLM` as a user would make it. Every round takes prompts of its own while the file lasts (5 rounds of 32), so that the
prefix cache holds what the four responses to a prompt share, and nothing of earlier rounds.

What bounds the figure: the ratio is 1 when the engine never waits for rsrlm. On a CPU, engine and driver share the
cores, so that all of the driver's work counts. `other_cores` says how much of the machine somebody else used: with
anybody else's work beside it the figure means nothing, since the OpenMP threads of `LLM`, which spin while they wait,
lose several times more by it than those of the engine's thread.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ENVIRONMENT, RESULTS, Load, cluster, head, interleaved, shown, spread, write

from rsrlm import config as configs
from rsrlm.config import Config
from rsrlm.engines import Answers, Engines, Model
from rsrlm.records import Completion, Group, Request
from rsrlm.report.progress import Report
from rsrlm.runtime.setup import Prepared, prepare
from rsrlm.store.folder import RunFolder
from rsrlm.store.journal import CompletionLog

QUESTION = "tokens/s through rsrlm's actors, routing and records over vLLM's offline LLM.generate"
WARMUP_TOKENS = 16
ENGINE_VARIABLES = (
    "OMP_NUM_THREADS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)


class Recorder:
    """Engines that answer nothing at once and keep the requests."""

    slots = 10**6

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests += requests
        return [
            Completion(request_id=one.id, token_ids=(), text="", finish_reason="stop", weight_version="M0")
            for one in requests
        ]


class Offline:
    """vLLM's `LLM` in a process of its own."""

    def __init__(self, config: Config, folder: str, token_budget: int | None) -> None:
        from vllm import LLM

        from rsrlm.runtime.engine import engine_arguments, rsrlm_arguments

        arguments = engine_arguments(config, folder)
        self._priorities = token_budget is not None
        if token_budget is not None:
            arguments |= {**rsrlm_arguments(), "max_num_batched_tokens": token_budget}
        self._llm = LLM(**arguments)

    def facts(self) -> dict[str, Any]:
        return engine_facts(self._llm.llm_engine)

    def generate(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """Seconds of `LLM.generate` alone, and the token ids of each request."""
        from vllm.inputs import tokens_input

        from rsrlm.runtime.engine import sampling_params

        prompts = [tokens_input(list(request.prompt_token_ids)) for request in requests]
        params = [sampling_params(request) for request in requests]
        priority = [request.priority for request in requests] if self._priorities else None
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False, priority=priority)
        return time.perf_counter() - started, [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Ends vLLM's further processes, which would leave their shared memory behind if killed."""
        self._llm.llm_engine.engine_core.shutdown()


def engine_facts(engine: Any) -> dict[str, Any]:
    """What vLLM made of the arguments. `torch_threads` and `cores` are those of the process that was asked."""
    import torch

    config = engine.vllm_config
    scheduler, cache, parallel = config.scheduler_config, config.cache_config, config.parallel_config
    return {
        "dtype": str(config.model_config.dtype),
        "enforce_eager": config.model_config.enforce_eager,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "scheduling_policy": str(scheduler.policy),
        "async_scheduling": scheduler.async_scheduling,
        "block_size": cache.block_size,
        "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "pid": os.getpid(),
        "executor": str(parallel.distributed_executor_backend),
        "torch_threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        **{name: os.environ.get(name) for name in ENGINE_VARIABLES},
    }


def facts_of_actor(actor: Any) -> dict[str, Any]:
    return engine_facts(actor._engine._engine)


def resolve(path: str, runs: str, overrides: dict[str, Any]) -> Config:
    """The config with the benchmark's sizes; every round is an iteration with a hand of prompts of its own."""
    fixed = {
        "name": "benchmark",
        "runs": runs,
        "prompts.heldout": 0,
        "prompts.reuse": True,
        "engine.replicas": 1,
        "judge": "{kind: function, function: 'common:no_judge'}",
    }
    settings = {**fixed, **{key: value for key, value in overrides.items() if value is not None}}
    return configs.load(path, [f"{key}={value}" for key, value in settings.items()])


async def answered(prepared: Prepared, pool: Any, journal: Path, number: int) -> list[Group]:
    """The groups of a round, whose answers go to a journal that is on disk when this returns."""
    log = CompletionLog(journal)
    one = prepared.iterations[number]
    engines = Engines(pool, Model(name="M0", digest="M0"), Answers(log))
    try:
        return await engines.each(lambda task: one.recipe.group(engines, task), one.tasks, one.recipe.width)
    finally:
        log.close()


async def requests_of(prepared: Prepared, number: int, scratch: Path) -> list[Request]:
    """The requests that the recipe makes in this round."""
    recorder = Recorder()
    await answered(prepared, recorder, scratch / f"recorded-{number}.jsonl", number)
    return recorder.requests


def warm_up_requests(prepared: Prepared, number: int, requests: Sequence[Request]) -> list[Request]:
    """Short requests that fill the engine once, on prompts of their own, with the sampling of the others."""
    sampling = replace(requests[0].sampling, max_tokens=WARMUP_TOKENS)
    return [
        Request(
            id=f"warm-up-{number}-{index}",
            prompt_token_ids=prepared.heldout.context.encoder.user(f"Say hello number {index} of round {number}."),
            sampling=replace(sampling, seed=index),
            priority=requests[0].priority,
        )
        for index in range(prepared.config.engine.sequences)
    ]


async def run_rsrlm(
    prepared: Prepared, pool: Any, store: RunFolder, number: int, warm_up: Sequence[Request], idle: int
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    await asyncio.gather(*(pool.generate(request) for request in warm_up))
    with Load(idle) as load:
        started = time.perf_counter()
        groups = await answered(prepared, pool, store.folder / f"journal-{number}.jsonl", number)
        seconds = time.perf_counter() - started
    tokens = {response.id: list(response.token_ids) for group in groups for response in group.responses}
    return figures(seconds, tokens, load), tokens


async def run_offline(
    offline: Any, requests: Sequence[Request], warm_up: Sequence[Request], idle: int
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    await offline.generate.remote(list(warm_up))
    with Load(idle) as load:
        seconds, answers = await offline.generate.remote(list(requests))
    tokens = {request.id: answer for request, answer in zip(requests, answers, strict=True)}
    return figures(seconds, tokens, load), tokens


def figures(seconds: float, tokens: dict[str, list[int]], load: Load) -> dict[str, Any]:
    total = sum(len(ids) for ids in tokens.values())
    return {"seconds": round(seconds, 3), "tokens": total, "tokens_per_s": total / seconds, **load.figures()}


def equal_share(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> float:
    if ours.keys() != theirs.keys():
        raise RuntimeError("the two sides answered other requests")
    return sum(ours[key] == theirs[key] for key in ours) / len(ours)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ratio": spread([one["ratio"] for one in rounds]),
        "rsrlm_tokens_per_s": spread([one["rsrlm"]["tokens_per_s"] for one in rounds]),
        "llm_tokens_per_s": spread([one["llm"]["tokens_per_s"] for one in rounds]),
        "responses_equal": min(one["responses_equal"] for one in rounds),
        "other_cores": spread([one[side]["other_cores"] for one in rounds for side in ("rsrlm", "llm")]),
    }


def show(rounds: list[dict[str, Any]], data: dict[str, Any]) -> None:
    report = Report()
    sides = data["engines"]
    report.table(
        "Engine arguments as vLLM took them",
        [{"what": key, "rsrlm": str(sides["rsrlm"][key]), "llm": str(sides["llm"][key])} for key in sides["rsrlm"]],
        {"what": "", "rsrlm": "rsrlm", "llm": "LLM"},
    )
    rows = [
        {
            "round": one["round"],
            "first": one["order"][0],
            "ours": one["rsrlm"]["tokens_per_s"],
            "llm": one["llm"]["tokens_per_s"],
            "ratio": one["ratio"],
            "equal": one["responses_equal"],
            "other": f"{one['rsrlm']['other_cores']:.2f} / {one['llm']['other_cores']:.2f}",
            "idle": f"{one['rsrlm']['idle_cores']:.2f} / {one['llm']['idle_cores']:.2f}",
        }
        for one in rounds
    ]
    columns = {"round": "round", "first": "first", "ours": "rsrlm tok/s", "llm": "LLM tok/s", "ratio": "ratio"}
    columns |= {"equal": "responses equal", "other": "cores of others", "idle": "cores of the idle engine"}
    report.table("Rounds", rows, columns)
    report.line(f"ratio, median (range): {shown([one['ratio'] for one in rounds])}")


async def measure(prepared: Prepared, rounds: int, plain: bool, out: Path, name: str) -> None:
    import ray

    from rsrlm.model import weight_files
    from rsrlm.runtime.engine import cpu_environment, engine_arguments
    from rsrlm.runtime.pool import EnginePool
    from rsrlm.runtime.weights import WeightSet, describe

    config, folder = prepared.config, str(prepared.model)
    store = RunFolder.create(config)
    weights = WeightSet(version="M0", folder=folder, files=describe(weight_files(prepared.model)))
    pool = EnginePool(config, weights, "engines", config.engine.replicas, store.event)
    await pool.start()
    ours = await pool.replicas.all[0].actor.__ray_call__.remote(facts_of_actor)
    offline_class = ray.remote(Offline).options(
        num_cpus=config.engine.cpus,
        num_gpus=config.engine.gpus,
        runtime_env={"env_vars": cpu_environment(config.engine)},
    )
    offline = offline_class.remote(config, folder, None if plain else ours["max_num_batched_tokens"])
    data = {
        **head(QUESTION),
        "plain": plain,
        "work": {"prompts": config.prompts.per_iteration, **config.sample.model_dump()},
        "arguments": engine_arguments(config, folder),
        "engines": {"rsrlm": ours, "llm": await offline.facts.remote()},
    }
    done: list[dict[str, Any]] = []
    for number in range(rounds):
        requests = await requests_of(prepared, number, store.folder)
        done.append(await one_round(prepared, pool, offline, store, number, requests, data["engines"]))
        write(out, name, {**data, "summary": summary(done), "rounds": done})
        Report().line(f"round {number}: ratio {done[-1]['ratio']:.3f}")
    show(done, data)
    await pool.close()
    await offline.close.remote()
    ray.kill(offline)


async def one_round(
    prepared: Prepared,
    pool: Any,
    offline: Any,
    store: RunFolder,
    number: int,
    requests: Sequence[Request],
    engines: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    warm_up = warm_up_requests(prepared, number, requests)
    tokens: dict[str, dict[str, list[int]]] = {}

    async def rsrlm_side(number: int) -> dict[str, Any]:
        idle = engines["llm"]["pid"]
        found, tokens["rsrlm"] = await run_rsrlm(prepared, pool, store, number, warm_up, idle)
        return found

    async def llm_side(number: int) -> dict[str, Any]:
        found, tokens["llm"] = await run_offline(offline, requests, warm_up, engines["rsrlm"]["pid"])
        return found

    done = await interleaved(number, {"rsrlm": rsrlm_side, "llm": llm_side})
    done["ratio"] = done["rsrlm"]["tokens_per_s"] / done["llm"]["tokens_per_s"]
    done["responses_equal"] = equal_share(tokens["rsrlm"], tokens["llm"])
    return done


def main(
    config: Annotated[str, typer.Option(help="engine, sampling parameters and prompts are taken from it")] = (
        "configs/quickstart.yaml"
    ),
    model: Annotated[str | None, typer.Option(help="instead of the config's")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    prompts: Annotated[int, typer.Option(min=1)] = 32,
    responses: Annotated[int, typer.Option(min=2)] = 4,
    max_tokens: Annotated[int, typer.Option(min=1)] = 96,
    kind: Annotated[str, typer.Option(help="inprocess or async, on both sides")] = "inprocess",
    threads: Annotated[int | None, typer.Option(help="of either engine, instead of the config's")] = None,
    plain: Annotated[bool, typer.Option(help="LLM without rsrlm's arguments and with vLLM's own token budget")] = False,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    overrides = {
        "model": model,
        "iterations": rounds,
        "prompts.per_iteration": prompts,
        "sample.responses": responses,
        "sample.max_tokens": max_tokens,
        "engine.kind": kind,
        "engine.threads": threads,
    }
    name = f"sampling_{kind}" + ("_plain" if plain else "")
    with tempfile.TemporaryDirectory(prefix="rsrlm-sampling-") as runs:
        prepared = prepare(resolve(config, runs, overrides))
        with cluster(prepared.config.ray.object_store_mib):
            asyncio.run(measure(prepared, rounds, plain, out, name))
    Report().line(f"result: {out / (name + '.json')}")


if __name__ == "__main__":
    typer.run(main)
