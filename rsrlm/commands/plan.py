"""What a run would do, before anything starts: requests, tokens, memory and disk.

Counts and tokens are upper bounds. Memory and disk are estimates whose constants were measured (benchmarks/results).
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rsrlm.config import Config, ConfigError, Judge, dump
from rsrlm.data.prompts import answers
from rsrlm.meta_judging import most_comparisons
from rsrlm.model import num_parameters, weight_files
from rsrlm.report.progress import Report

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
# Resident memory of a process that has imported its libraries and started, without weights and caches.
ENGINE_BASE = 1.15 * GIB
ENGINE_CORE_BASE = 1.40 * GIB  # further processes of AsyncLLM
LEARNER_BASE = 0.85 * GIB
DRIVER = 0.60 * GIB
JUDGE_PROMPT = 400  # tokens of the additive template
RECORDS = "records in the driver, at most"
RECORD, RECORD_TOKEN = 1100, 40  # bytes of a record in the driver, and of each of its tokens with its text
RAY = 1.75 * GIB  # raylet, GCS, agents, buffer, mailbox and the helpers of Ray Train


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bounds for any one iteration and estimates of the run. Memory in bytes by process, disk in bytes by kind."""

    requests: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    optimizer_steps: int
    memory: dict[str, float]
    disk: dict[str, float]
    actors: list[tuple[str, int, str]]


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What supervised fine-tuning finds in data that is there: examples at most, and ranked replies to judge."""

    examples: int = 0
    replies: int = 0


def plan(
    config: Config,
    model: Path,
    seeds: Sequence[Seeds] | None = None,
    judge: Path | None = None,
    validator: Path | None = None,
) -> Plan:
    """The plan of a run of `config` with the model in the folder `model`, and in `judge` and `validator` other ones
    that judge and validate; `seeds` are those of each iteration."""
    each = [
        _iteration(step, number, seeds[number] if seeds else Seeds())
        for number, (step, _) in enumerate(config.distinct)
    ]
    requests = {name: max(one[0][name] for one in each) for name in each[0][0]}
    steps = max(one[3] for one in each)
    judged = sum(
        times * found.replies * step.data.eft_judgements
        for (step, times), found in zip(config.distinct, seeds or (), strict=False)
    )
    return Plan(
        requests=requests,
        prompt_tokens=max(one[1] for one in each),
        generated_tokens=max(one[2] for one in each),
        optimizer_steps=steps,
        memory=memory(config, model, judge, max(one[4] for one in each), validator),
        disk=disk(config, model, steps, judged),
        actors=actors(config),
    )


def _iteration(config: Config, number: int, seeds: Seeds) -> tuple[dict[str, int], int, int, int, float]:
    """Requests, prompt tokens, generated tokens, optimizer steps and bytes of the records of one iteration, at most."""
    prompts = config.prompts.per_iteration if answers(config) else 0
    heldout, k = config.prompts.heldout, config.sample.responses
    judged, judge_tokens = _asked(config.judge)
    validated, validated_tokens = _asked(config.validating)
    first = number == 0  # before it begins, M0 answers too and judges itself
    compared = prompts * most_comparisons(config) if "judge" in config.pair.kinds else 0
    meta_tokens = 1 if config.meta.read == "letters" else config.meta.max_tokens
    validator = config.evaluate.judge
    duel_tokens = 1 if validator.read == "letters" else validator.max_tokens
    validation = config.prompts.validation
    train = config.train
    if train.method == "dpo":
        items = prompts * len(config.pair.kinds)
    else:
        positive = sum(source.weight for source in config.sft.sources if source.path == "positive")
        items = seeds.examples + math.ceil(prompts * k * positive)
    steps = train.steps(items)
    candidates = -(-steps // train.candidate_every_steps) if train.candidate_every_steps else 0
    by_score, by_duel = (candidates if train.choose == way else 0 for way in ("score", "duel"))
    # requests and the tokens that each may generate; nothing longer than the context is ever sent
    found = {
        "responses": (prompts * k, config.sample.max_tokens),
        "judgements": (prompts * k * judged + seeds.replies * config.data.eft_judgements, judge_tokens),
        "comparisons": (compared, meta_tokens),
        "held-out answers": (heldout * (1 + first + config.evaluate.kl), config.evaluate.max_tokens),
        # M0 by itself, and the new model by itself
        "held-out judgements": (heldout * judged * (1 + first), judge_tokens),
        # the new model by M0, or by another validator, who judges M0 too
        "held-out judgements to report": (
            heldout * validated * (1 + (first if validator.external else 0)),
            validated_tokens,
        ),
        "held-out log-probabilities": (2 * heldout if config.evaluate.kl else 0, 1),  # under the new model and M0
        "held-out duels": (heldout * 2 * config.evaluate.duel, duel_tokens),
    }
    if validation:  # of the model before and of each candidate
        found |= {
            "validation answers": (validation * (candidates + 1) if candidates else 0, config.evaluate.max_tokens),
            "validation judgements": (validation * validated * (by_score + 1) if by_score else 0, validated_tokens),
            "validation duels": (validation * 2 * by_duel, duel_tokens),
        }
    return (
        {name: number for name, (number, _) in found.items()},
        sum(number * (config.engine.max_model_len - tokens) for number, tokens in found.values()),
        sum(number * tokens for number, tokens in found.values()),
        steps,
        sum(
            number * (RECORD + RECORD_TOKEN * tokens)
            for number, tokens in (found[name] for name in ("responses", "judgements", "comparisons"))
        ),
    )


def _asked(judge: Judge) -> tuple[int, int]:
    """Judgements of a response that an engine or a server is asked for, and the tokens of each, at most."""
    if judge.read == "function":
        return 0, 0
    return judge.per_response, 1 if judge.read == "digits" else judge.max_tokens


def _steps_at_most(config: Config) -> int:
    return _iteration(config, 1, Seeds())[3]


def actors(config: Config) -> list[tuple[str, int, str]]:
    """Kind of actor, how many, and what each is given."""
    engine, train = config.engine, config.train
    each = f"{engine.cpus:g} Ray CPU, {engine.threads} threads, {engine.gpus} GPU, {engine.kind}"
    found = [("engine (samples" + ("" if config.judge.replicas else " and judges") + ")", engine.replicas, each)]
    if config.judge.replicas:
        found.append(("engine (judges)", config.judge.replicas, each))
    if config.evaluate.judge.model:
        found.append(("engine (validates)", config.evaluate.judge.replicas, each))
    found.append(("learner rank", train.workers, f"{train.cpus:g} Ray CPU, {train.threads} threads, {train.gpus} GPU"))
    found.append(("preference buffer", 1, "0 Ray CPU"))
    return found


def _shape(model: Path) -> dict[str, int]:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = {**config, **(config.get("text_config") or {})}  # any key may be there and null
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    return {
        "hidden": hidden,
        "layers": config.get("num_hidden_layers") or config.get("n_layer") or 0,
        "intermediate": config.get("intermediate_size") or 4 * hidden,
        "vocabulary": config.get("vocab_size") or 0,
        "tied": int(bool(config.get("tie_word_embeddings"))),
    }


def _engine(config: Config, model: Path) -> float:
    """Peak resident bytes of an engine that holds this model."""
    shape, engine = _shape(model), config.engine
    weights = num_parameters(model) * BYTES[config.model.dtype]
    head = shape["vocabulary"] * shape["hidden"] * BYTES[config.model.dtype]
    # A tied LM head is packed apart from the embedding; the files of an update are mapped while it is loaded.
    found = ENGINE_BASE + 2 * weights + head * shape["tied"] + engine.kv_cache_gib * GIB
    if config.evaluate.kl and config.prompts.heldout:
        # Logits and log-probabilities of a held-out prompt with its answer; longer prompts are not expected.
        found += 8 * shape["vocabulary"] * min(engine.max_model_len, config.evaluate.max_tokens + 512)
    return found + ENGINE_CORE_BASE * (engine.kind == "async")


def memory(
    config: Config, model: Path, judge: Path | None = None, records: float = 0.0, validator: Path | None = None
) -> dict[str, float]:
    """Peak resident bytes of each process on a CPU machine (GPU memory is not in here). `judge` and `validator` hold
    other models that judge and validate; `records` are the bytes of an iteration's records, which the driver keeps."""
    shape = _shape(model)
    weights = num_parameters(model) * BYTES[config.model.dtype]
    engine, train = config.engine, config.train
    copies = 4 if train.zero_stage == 0 else 5  # weights, gradients, two moments; ZeRO's flat copy
    tokens = max(step.train.micro_batch * min(engine.max_model_len, _sequence(step)) for step, _ in config.distinct)
    per_token = shape["layers"] * (14 * shape["hidden"] + 4 * shape["intermediate"])
    if train.gradient_checkpointing:
        per_token = shape["layers"] * shape["hidden"] * 2
    activations = tokens * per_token * BYTES[config.model.dtype]
    logits = 3 * min(512, 2 * train.micro_batch * config.sample.max_tokens) * shape["vocabulary"] * 4
    found = {"engine" if engine.replicas == 1 else f"each of {engine.replicas} engines": _engine(config, model)}
    if config.judge.replicas:
        found[f"each of {config.judge.replicas} judge engines"] = _engine(config, judge or model)
    if config.evaluate.judge.model:
        found[f"each of {config.evaluate.judge.replicas} validator engines"] = _engine(config, validator or model)
    name = "learner" if train.workers == 1 else f"each of {train.workers} learner ranks"
    found[name] = float(LEARNER_BASE + copies * weights + activations + logits)
    found["driver"] = float(DRIVER)
    found[RECORDS] = records
    found["ray"] = float(RAY)
    return found


def _sequence(step: Config) -> int:
    """Tokens of one row of the learner: a prompt of usual length with what is trained behind it."""
    pair = 2 * step.sample.max_tokens + 64
    judgement = JUDGE_PROMPT + step.sample.max_tokens + 2 * step.judge.max_tokens
    reply = (step.data.max_chars or 4 * step.engine.max_model_len) // 4
    if step.train.method == "sft":
        return max(pair, JUDGE_PROMPT + reply + step.judge.max_tokens)
    return max(pair, judgement) if "judge" in step.pair.kinds else pair


def total_memory(config: Config, memory_by_process: dict[str, float]) -> float:
    counts = {
        "judge": config.judge.replicas,
        "validator": config.evaluate.judge.replicas,
        "ranks": config.train.workers,
        "engines": config.engine.replicas,  # the last, as the word is in others' names too
    }
    total = 0.0
    for name, size in memory_by_process.items():
        if name == RECORDS:  # a bound that supposes every answer as long as it may be: it must refuse no run
            continue
        count = next((number for word, number in counts.items() if name.startswith("each") and word in name), 1)
        total += size * count
    return total


def disk(config: Config, model: Path, steps: int, judged: int = 0) -> dict[str, float]:
    """Bytes of the run folder at its end, by kind; and at its peak, a second checkpoint beside the first. `judged` are
    the judgements of people's replies."""
    weights = num_parameters(model) * BYTES[config.model.dtype]
    others = sum(file.stat().st_size for file in model.iterdir() if file.is_file() and file not in weight_files(model))
    found = {"models": float(config.iterations * (weights + others))}
    candidates = [
        -(-_steps_at_most(step) // step.train.candidate_every_steps) - 1
        for step, _ in config.distinct
        if step.train.candidate_every_steps
    ]
    if candidates and max(candidates) > 0:  # they go when one of them is chosen
        found["candidates"] = float(max(candidates) * (weights + others))
    if steps > config.train.checkpoint_every_steps:
        found["checkpoint"] = float(3 * num_parameters(model) * 4)
    found["records"] = 900.0 * judged
    for step, number in config.distinct:
        prompts = step.prompts.per_iteration if answers(step) else 0
        compared = most_comparisons(step) if "judge" in step.pair.kinds else 0
        each = step.sample.responses * (1800 + 900 * step.judge.per_response) + 900 * compared
        found["records"] += float(number * prompts * each)
    return found


def check(planned: Plan, config: Config) -> None:
    """Raises ConfigError when the run cannot fit on this machine's memory or disk."""
    # "local" is Ray's word for a cluster of the run's own.
    joins = (config.ray.address or os.environ.get("RAY_ADDRESS") or "local") != "local"
    need = total_memory(config, planned.memory)
    have = psutil.virtual_memory().total
    if not joins and config.engine.gpus == 0 and need > have:
        raise ConfigError(
            f"the run needs about {need / GIB:.1f} GiB of memory (see `rsrlm plan`), this machine has "
            f"{have / GIB:.1f}; use a smaller model.path, engine.kv_cache_gib or train.micro_batch"
        )
    parent = config.folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    needed = sum(planned.disk.values()) + planned.disk.get("checkpoint", 0.0)
    if needed > free:
        raise ConfigError(
            f"runs={config.runs}: the run needs about {needed / GIB:.1f} GiB of disk, {free / GIB:.1f} are free at "
            f"{parent}; free some or choose another place with runs=FOLDER"
        )


def show(planned: Plan, config: Config, report: Report) -> None:
    """Print the plan."""
    report.line(dump(config))
    report.table(
        "Actors", [{"a": a, "n": n, "w": w} for a, n, w in planned.actors], {"a": "actor", "n": "number", "w": "each"}
    )
    report.table(
        "Per iteration, at most",
        [{"what": name, "n": number} for name, number in planned.requests.items()]
        + [
            {"what": "prompt tokens", "n": planned.prompt_tokens},
            {"what": "generated tokens", "n": planned.generated_tokens},
            {"what": "optimizer steps", "n": planned.optimizer_steps},
        ],
        {"what": "", "n": "number"},
    )
    sizes = [{"what": f"memory: {name}", "n": f"{size / GIB:.2f} GiB"} for name, size in planned.memory.items()]
    sizes.append({"what": "memory: all", "n": f"{total_memory(config, planned.memory) / GIB:.2f} GiB"})
    sizes += [{"what": f"disk: {name}", "n": f"{size / GIB:.3f} GiB"} for name, size in planned.disk.items()]
    report.table("Estimates", sizes, {"what": "", "n": "size"})
    report.line(f"run folder: {config.folder}")
