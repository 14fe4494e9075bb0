"""What a run would do, before anything starts: requests, tokens, memory and disk.

Counts and tokens are upper bounds. Memory and disk are estimates whose constants were measured (benchmarks/results).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rsrlm.commands.shapes import shape_of
from rsrlm.config import Config, dump
from rsrlm.model import num_parameters, weight_files
from rsrlm.online import intervals
from rsrlm.recipes.base import Demand
from rsrlm.records import Role
from rsrlm.report.progress import Report
from rsrlm.runtime.address import address_of
from rsrlm.runtime.setup import Prepared
from rsrlm.settings.base import ConfigError
from rsrlm.settings.methods import JudgeSection
from rsrlm.settings.train import TrainRule

GIB = 2**30
LABELS: dict[Role, str] = {"actor": "responses", "judge": "judgements", "meta": "comparisons", "duel": "comparisons"}
SELDOM: dict[Role, str] = {"prompter": "prompts that are written"}  # shown where a recipe asks for them alone
BYTES = {"float32": 4, "bfloat16": 2}
# Resident memory of a process that has imported its libraries and started, without weights and caches.
ENGINE_BASE = 1.15 * GIB
ENGINE_CORE_BASE = 1.40 * GIB  # further processes of AsyncLLM
LEARNER_BASE = 0.85 * GIB
DRIVER = 0.60 * GIB
PRODUCER = 0.60 * GIB
RECORD_ON_DISK = {True: 1800, False: 900}  # bytes of a response, and of a judgement or comparison
RAY = 1.75 * GIB  # raylet, GCS, agents, mailbox and the helpers of Ray Train


@dataclass(frozen=True)
class Process:
    """`number` processes that take `size` bytes each."""

    name: str
    number: int
    size: float

    @property
    def label(self) -> str:
        return self.name if self.number == 1 else f"each of {self.number} {self.name}s"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What any one iteration comes to, at most, and the actors of the run."""

    requests: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    optimizer_steps: int
    actors: list[tuple[str, int, str]]


@dataclass(frozen=True, kw_only=True)
class Plan(Bounds):
    """And estimates of the run. Memory in bytes by process, disk in bytes by kind."""

    memory: list[Process]
    disk: dict[str, float]


def plan(
    config: Config,
    demands: Sequence[Demand],
    model: Path,
    judge: Path | None = None,
    validator: Path | None = None,
) -> Plan:
    """The plan of a run of `config` with the model in the folder `model`, and in `judge` and `validator` other ones
    that judge and validate; `demands` are those of each iteration's recipe."""
    return Plan(
        **vars(bounds(config, demands)),
        memory=memory(config, demands, model, judge, validator),
        disk=disk(config, demands, model, _steps(config, demands)),
    )


def bounds(config: Config, demands: Sequence[Demand]) -> Bounds:
    """The same without a model: `demands` are those of each iteration's recipe."""
    each = [
        _iteration(config, step.config.train, demand, number == 0)
        for number, (step, demand) in enumerate(zip(config.planned, demands, strict=True))
    ]
    names = dict.fromkeys(name for one in each for name in one)
    asked = {name: max((one.get(name, (0, 0)) for one in each), key=lambda pair: pair[0]) for name in names}
    room = config.engine.max_model_len
    return Bounds(
        requests={name: number for name, (number, _) in asked.items()},
        prompt_tokens=max(sum(number * (room - tokens) for number, tokens in one.values()) for one in each),
        generated_tokens=max(sum(number * tokens for number, tokens in one.values()) for one in each),
        optimizer_steps=max(_steps(config, demands)),
        actors=actors(config),
    )


def _steps(config: Config, demands: Sequence[Demand]) -> list[int]:
    """Optimizer steps of each iteration."""
    return [step.config.train.steps(demand.items) for step, demand in zip(config.planned, demands, strict=True)]


def _iteration(config: Config, rule: TrainRule, demand: Demand, first: bool) -> dict[str, tuple[int, int]]:
    """Requests of one iteration at most, and the tokens that each may generate; nothing longer than the context is
    ever sent. Before the first one begins, M0 answers too and judges itself."""
    # A judge of no tokens asks no engine.
    none = dict.fromkeys(LABELS.values(), (0, 0))
    asked = {name: one for role, name in (LABELS | SELDOM).items() if (one := demand.requests.get(role, (0, 0)))[1]}
    return none | asked | _held_out(config, first) | _validation(config, rule, demand)


def _held_out(config: Config, first: bool) -> dict[str, tuple[int, int]]:
    heldout, evaluate = config.prompts.heldout, config.evaluate
    judged, judge_tokens = _asked(config.judge)
    validated, validated_tokens = _asked(config.validating)
    return {
        "held-out answers": (heldout * (1 + first + evaluate.kl), evaluate.max_tokens),
        # M0 by itself, and the new model by itself
        "held-out judgements": (heldout * judged * (1 + first), judge_tokens),
        # the new model by M0, or by another validator, who judges M0 too
        "held-out judgements to report": (
            heldout * validated * (1 + (first if config.validator.external else 0)),
            validated_tokens,
        ),
        "held-out log-probabilities": (2 * heldout if evaluate.kl else 0, 1),  # under the new model and M0
        "held-out duels": (heldout * 2 * evaluate.duel, _duel_tokens(config)),
    }


def _validation(config: Config, rule: TrainRule, demand: Demand) -> dict[str, tuple[int, int]]:
    """Of the model before and of each candidate."""
    validation, every = config.prompts.validation, rule.candidate_every_steps
    if not validation:
        return {}
    candidates = -(-rule.steps(demand.items) // every) if every else 0
    by_score, by_duel = (candidates if rule.choose == way else 0 for way in ("score", "duel"))
    validated, validated_tokens = _asked(config.validating)
    return {
        "validation answers": (validation * (candidates + 1) if candidates else 0, config.evaluate.max_tokens),
        "validation judgements": (validation * validated * (by_score + 1) if by_score else 0, validated_tokens),
        "validation duels": (validation * 2 * by_duel, _duel_tokens(config)),
    }


def _duel_tokens(config: Config) -> int:
    return 1 if config.evaluate.judge.read == "letters" else config.evaluate.judge.max_tokens


def _asked(judge: JudgeSection) -> tuple[int, int]:
    """Judgements of a response that an engine or a server is asked for, and the tokens of each, at most."""
    return (judge.per_response, judge.tokens) if judge.tokens else (0, 0)


def actors(config: Config) -> list[tuple[str, int, str]]:
    """Kind of actor, how many, and what each is given."""
    engine, train = config.engine, config.train
    each = f"{engine.cpus:g} Ray CPU, {engine.threads} threads, {engine.gpus} GPU, {engine.kind}"
    found = [("engine (samples" + ("" if config.judge.replicas else " and judges") + ")", engine.replicas, each)]
    if config.judge.replicas:
        found.append(("engine (judges)", config.judge.replicas, each))
    if config.evaluate.judge.model:
        found.append(("engine (validates)", config.evaluate.judge.replicas, each))
    if engine.producers:
        found.append(("producer", engine.producers, "its share of the engines"))
    found.append(("learner rank", train.workers, f"{train.cpus:g} Ray CPU, {train.threads} threads, {train.gpus} GPU"))
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
    found = ENGINE_BASE + 2 * weights + head * shape["tied"] + engine.cpu_cache_gib * GIB
    if config.evaluate.kl and config.prompts.heldout:
        # Logits and log-probabilities of a held-out prompt with its answer; longer prompts are not expected.
        found += 8 * shape["vocabulary"] * min(engine.max_model_len, config.evaluate.max_tokens + 512)
    return found + ENGINE_CORE_BASE * (engine.kind == "async")


def memory(
    config: Config,
    demands: Sequence[Demand],
    model: Path,
    judge: Path | None = None,
    validator: Path | None = None,
) -> list[Process]:
    """Peak resident bytes of each process on a CPU machine (GPU memory is not in here). `judge` and `validator` hold
    other models that judge and validate."""
    shape = _shape(model)
    weights = num_parameters(model) * BYTES[config.model.dtype]
    engine, rules = config.engine, [step.config.train for step in config.planned]
    copies = max(3 if rule.zero_stage == 0 else 4 for rule in rules)  # gradients, two moments; ZeRO's flat copy
    layers, hidden = shape["layers"], shape["hidden"]
    kept = {True: layers * hidden * 2, False: layers * (14 * hidden + 4 * shape["intermediate"])}  # of a token
    activations = BYTES[config.model.dtype] * max(
        rule.micro_batch * min(engine.max_model_len, demand.item_tokens) * kept[rule.gradient_checkpointing]
        for rule, demand in zip(rules, demands, strict=True)
    )
    logits = 12 * shape["vocabulary"] * min(512, 2 * config.sample.max_tokens * max(one.micro_batch for one in rules))
    rank = float(LEARNER_BASE + weights + copies * _learning(config, model) + activations + logits)
    return [
        Process("engine", engine.replicas, _engine(config, model)),
        Process("judge engine", config.judge.replicas, _engine(config, judge or model)),
        Process(
            "validator engine",
            config.evaluate.judge.replicas if config.evaluate.judge.model else 0,
            _engine(config, validator or model),
        ),
        Process("learner rank", config.train.workers, rank),
        Process("producer", engine.producers, float(PRODUCER)),
        Process("driver", 1, float(DRIVER)),
        Process("ray", 1, float(RAY)),
    ]


def _learning(config: Config, model: Path) -> int:
    """Bytes of the parameters that have gradients, in the iteration with the most."""
    loras = [step.config.train.lora for step in config.planned]
    parameters = max(shape_of(str(model)).learning(lora) if lora else num_parameters(model) for lora in loras)
    return parameters * BYTES[config.model.dtype]


def total_memory(processes: Sequence[Process]) -> float:
    return sum(one.number * one.size for one in processes)


def disk(config: Config, demands: Sequence[Demand], model: Path, steps: Sequence[int]) -> dict[str, float]:
    """Bytes of the run folder at its end, by kind; and at its peak, a second checkpoint beside the first. `steps` are
    the optimizer steps of each iteration."""
    weights = num_parameters(model) * BYTES[config.model.dtype]
    others = sum(file.stat().st_size for file in model.iterdir() if file.is_file() and file not in weight_files(model))
    found = {"models": float(config.models_kept * (weights + others))}
    candidates = [
        -(-number // every) - 1
        for number, step in zip(steps, config.planned, strict=True)
        if (every := step.config.train.candidate_every_steps)
    ]
    if candidates and max(candidates) > 0:  # they go when one of them is chosen
        found["candidates"] = float(max(candidates) * (weights + others))
    every = [step.config.train.checkpoint_every_steps for step in config.planned]
    if any(number > most for number, most in zip(steps, every, strict=True)) or config.clock.kind == "online":
        found["checkpoint"] = 3.0 * _learning(config, model)
    found["records"] = sum(
        float(RECORD_ON_DISK[role in ("actor", "prompter")] * number)
        for demand in demands
        for role, (number, _) in demand.requests.items()
    )
    return found


def check(planned: Plan, config: Config) -> None:
    """Raises ConfigError when the run cannot fit on this machine's memory or disk."""
    need = total_memory(planned.memory)
    have = psutil.virtual_memory().total
    on_gpus = config.engine.gpus or config.train.gpus
    if not address_of(config) and not on_gpus and need > have:
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


def show_bounds(planned: Bounds, config: Config, report: Report) -> None:
    """Print the config, the actors, and what an iteration comes to at most."""
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
    for line in intervals(config, planned.optimizer_steps):
        report.line(line)


def show(planned: Plan, config: Config, report: Report) -> None:
    """Print the plan."""
    show_bounds(planned, config, report)
    sizes = [{"what": f"memory: {one.label}", "n": f"{one.size / GIB:.2f} GiB"} for one in planned.memory if one.number]
    sizes.append({"what": "memory: all", "n": f"{total_memory(planned.memory) / GIB:.2f} GiB"})
    sizes += [{"what": f"disk: {name}", "n": f"{size / GIB:.3f} GiB"} for name, size in planned.disk.items()]
    report.table("Estimates", sizes, {"what": "", "n": "size"})
    report.line(f"run folder: {config.folder}")


def plan_of(prepared: Prepared) -> Plan:
    """What the run would do, with the seed data that is there."""
    demands = [one.recipe.demand(len(one.tasks)) for one in prepared.iterations]
    return plan(prepared.config, demands, prepared.model, prepared.judge, prepared.validator)
