"""What a run on GPUs would take, by formulas: requests, tokens, memory of each GPU, seconds. It needs no GPU, weights,
prompts or seed data: the model's config.json is enough.

docs/gpus.md says where the constants come from. Only training was measured, on one H200
(benchmarks/gpu.py): 20 % of the peak at most, where 40 % stands here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rsrlm.commands import plan
from rsrlm.commands.gpu_memory import (
    GB,
    checkpoint_bytes,
    disk,
    engine_memory,
    gpus_of,
    host_memory,
    pools,
    rank_memory,
    too_large,
)
from rsrlm.commands.shapes import Shape, shape_of
from rsrlm.config import Config
from rsrlm.recipes.base import JUDGE_PROMPT, Demand
from rsrlm.recipes.reading import Reading
from rsrlm.recipes.sft import SFT
from rsrlm.report.progress import Report
from rsrlm.settings.steps import Step
from rsrlm.settings.train import TrainRule

# An H100: dense bfloat16 operations and bytes of its memory, a second.
FLOPS, BANDWIDTH = 989e12, 3.35e12

# Time. Shares of the peak that prefill, training and decoding reach; what ZeRO 3 leaves of training.
PREFILL, TRAINING, DECODING, ZERO3 = 0.5, 0.4, 0.78, 0.65
STEP_S, CONTEXT = 0.002, 1300  # of decoding: what a step takes beside reading memory; tokens behind a sequence
# Bytes a second: pageable copies between host and GPU, copies in memory, files in /dev/shm, the checksum, disk, a
# network of 10 Gbit/s.
TO_HOST, IN_MEMORY, TO_SHM, CHECKSUM, DISK, NETWORK = 4e9, 8e9, 4e9, 10.9e9, 1.5e9, 1.2e9

# Lengths in tokens and shares: of a question, and of what an answer, judgement or comparison may have at most.
QUESTION, ANSWER, JUDGEMENT, COMPARISON = 115, 0.44, 0.6, 0.625
ROW_TOKENS = 4000  # of a forward pass that keeps a GPU busy: with fewer, it waits for the host (benchmarks/gpu.py)
PAIRED = 0.75  # of the pairs that an iteration can have at most


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens of an iteration, as expected: made by engines, read by them (what they share once), trained on in all
    epochs, and once for the reference."""

    generated: float
    prefilled: float
    trained: float
    reference: float


@dataclass(frozen=True, kw_only=True)
class Seconds:
    generation: float
    training: float
    weights: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.generation + self.training + self.weights + self.checkpoints


# -- what is asked for -------------------------------------------------------------------------------------------------


def demands_of(config: Config) -> list[Demand]:
    """What each iteration comes to, without prompts, documents and seed data: of SFT what data.max_ift and data.max_eft
    allow."""
    return [_sft(config, step) if issubclass(step.recipe, SFT) else _demand(step) for step in config.planned]


def _demand(step: Step) -> Demand:
    prompts = step.config.prompts.per_iteration if step.recipe.answers_prompts(step.config) else 0
    found: Demand = step.recipe.demand_of(step.config, prompts)
    return found


def _sft(config: Config, step: Step) -> Demand:
    found, own = _demand(step), step.config
    known = {"ift": own.data.max_ift or 0, "eft": own.data.max_eft or 0}
    reply = (own.data.max_chars or 4 * config.engine.max_model_len) // 4
    return replace(
        found,
        items=sum(math.ceil(known.get(source.path, 0) * source.weight) for source in own.sources),
        item_tokens=max(found.item_tokens, JUDGE_PROMPT + reply + own.judge.tokens),
    )


def unknown_of(config: Config) -> list[str]:
    """What is not counted, since only the data tells."""
    found = []
    for step in config.planned:
        if issubclass(step.recipe, SFT):
            limits = {"ift": step.config.data.max_ift, "eft": step.config.data.max_eft}
            paths = [source.path for source in step.config.sources]
            left = [path for path in paths if path != "positive" and not limits.get(path)]
            if left:
                found.append(
                    f"{step.name}: the examples of {', '.join(left)}; data.max_ift and data.max_eft bound them"
                )
            if "eft" in paths:
                found.append(f"{step.name}: the judgements of ranked replies that make eft")
        elif isinstance(step.config, Reading) and step.config.per_iteration is None:
            found.append(f"{step.name}: the pieces of the documents; per_iteration bounds them")
    return found


def work_of(config: Config, step: Step, demand: Demand) -> Work:
    requests = demand.requests
    responses, most = requests.get("actor", (0, 0))
    answer = ANSWER * most
    judged, judge_most = requests.get("judge", (0, 0))
    judgement = _length(JUDGEMENT, judge_most)
    compared, meta_most = requests.get("meta", requests.get("duel", (0, 0)))
    shown = JUDGE_PROMPT + QUESTION + answer  # what all judgements of a response share
    pair = QUESTION + 2 * answer
    if "meta" in requests:  # as many pairs of judgements as of responses
        pair = (pair + shown + 2 * judgement) / 2
    asked, asked_most = requests.get("prompter", (0, 0))
    example = pair / 2
    if isinstance(step.config, Reading):
        example = demand.item_tokens / 2  # of questions and of what they are asked about
    elif any(one.path == "eft" for one in getattr(step.config, "sources", ())):
        example = shown + judgement
    imitates = step.recipe.trains == "examples"
    trains = demand.items * (example if imitates else PAIRED * pair)
    rule = step.config.train
    return Work(
        generated=responses * answer
        + judged * judgement
        + compared * _length(COMPARISON, meta_most)
        + asked * ANSWER * asked_most,
        prefilled=responses * QUESTION
        + asked * (QUESTION + getattr(step.config, "piece_tokens", 0))
        + judged / max(1, config.judge.per_response) * shown
        # The second judgement and the words around it; or both answers and all.
        + compared * (JUDGE_PROMPT + QUESTION + 2 * answer if "duel" in requests else judgement + 50),
        trained=trains * (rule.stop_after_epoch or rule.epochs),
        reference=0.0 if imitates else trains,
    )


def _length(share: float, most: int) -> float:
    return share * most if most > 1 else most


# -- time --------------------------------------------------------------------------------------------------------------


def decode_rate(shape: Shape, config: Config, gpu: float) -> float:
    """Tokens a second of one replica: a step reads the weights and what all its sequences keep in the cache."""
    size, gpus = plan.BYTES[config.model.dtype], config.engine.gpus
    room = engine_memory(shape, config, gpu)["cache of keys and values"] * gpus
    batch = max(1, min(config.engine.sequences, int(room / (CONTEXT * shape.cached(size)))))
    read = shape.parameters * size + batch * CONTEXT * shape.cached(size)
    return DECODING * batch / (read / gpus / BANDWIDTH + STEP_S)


def prefill_rate(shape: Shape, gpus: int) -> float:
    """Tokens a second that one replica reads: two operations for each parameter."""
    return PREFILL * FLOPS * gpus / (2 * shape.parameters)


def train_rate(shape: Shape, train: TrainRule, ranks: int) -> float:
    """Tokens a second of all ranks, forward and backward, and the forward pass once more under checkpointing. Frozen
    weights have no gradients of their own to compute."""
    operations = 2 * train.gradient_checkpointing * shape.parameters + 4 * shape.parameters
    operations += 2 * shape.learning(train.lora)
    return TRAINING * FLOPS * ranks * (ZERO3 if train.zero_stage == 3 else 1) / operations


def publish_seconds(shape: Shape, config: Config) -> tuple[float, float]:
    """From the learner into the engines, the export included; and a model that is loaded again from its folder."""
    size = float(shape.parameters * plan.BYTES[config.model.dtype])
    hosts = math.ceil(config.engine.gpus * config.engine.replicas / 8)  # of engines
    hops = math.ceil(math.log2(1 + hosts)) if config.weights.transport == "gloo" else 0
    first = size * (2 / TO_HOST + 1 / IN_MEMORY + 1 / TO_SHM + 2 / CHECKSUM + 1 / DISK)
    return first + hops * size / NETWORK, size * (2 / CHECKSUM + 1 / TO_HOST + 0.5 / DISK)


def seconds_of(shape: Shape, config: Config, rule: TrainRule, work: Work, steps: int, gpu: float) -> Seconds:
    replicas, gpus = config.engine.replicas + config.judge.replicas, config.engine.gpus
    generation = 0.0
    if gpus:
        generation = work.generated / (decode_rate(shape, config, gpu) * replicas)
        generation += work.prefilled / (prefill_rate(shape, gpus) * replicas)
    forward = TRAINING * FLOPS * config.train.workers / (2 * shape.parameters)
    first, again = publish_seconds(shape, config)
    kept = checkpoint_bytes(shape, rule, plan.BYTES[config.model.dtype]) * (steps // rule.checkpoint_every_steps)
    return Seconds(
        generation=generation,
        training=(work.trained / train_rate(shape, rule, config.train.workers) + work.reference / forward)
        * (config.train.gpus > 0),
        weights=first + 2 * again,  # the first model and the new one again, for the held-out answers
        checkpoints=kept / DISK,
    )


# -- the screen --------------------------------------------------------------------------------------------------------


def show(config: Config, gpu_gb: float, report: Report) -> None:
    """Print the plan of a run on GPUs of so many GB (10^9 bytes). Raises ConfigError where the shape is not known."""
    shape, gpu = shape_of(config.model.path), gpu_gb * GB
    demands = demands_of(config)
    plan.show_bounds(plan.bounds(config, demands), config, report)
    _show_memory(shape, config, demands, gpu, report)
    _show_time(shape, config, demands, gpu, report)
    for line in unknown_of(config):
        report.line(f"not counted: {line}")
    for line in too_large(config, demands, gpu):
        report.line(f"does not fit: {line}")
    if config.train.gpus and (said := idle(config, demands)):
        report.line(said)
    if config.model.dtype == "float32":
        report.line("model.dtype=float32: bfloat16 takes half the memory, and several times less time")
    report.line(
        "These are formulas for H100s (docs/gpus.md), hardly measured: decoding may be off by 30 %, lengths by 40 %, "
        "and training may take twice as long."
    )
    report.line(f"run folder: {config.folder}")


def idle(config: Config, demands: Sequence[Demand]) -> str:
    """What to change where rows are too short to keep a GPU busy; empty where they are not."""
    rows = [
        step.config.train.micro_batch * min(config.engine.max_model_len, demand.item_tokens) * ANSWER
        for step, demand in zip(config.planned, demands, strict=True)
    ]
    if min(rows) >= ROW_TOKENS / 2:
        return ""
    own = config.planned[rows.index(min(rows))].config.train.micro_batch
    return (
        f"train.micro_batch={own}: forward passes of about {min(rows):.0f} tokens leave a GPU idle; "
        f"{math.ceil(own * ROW_TOKENS / min(rows))} would make it {ROW_TOKENS}, where memory allows"
    )


def _show_memory(shape: Shape, config: Config, demands: Sequence[Demand], gpu: float, report: Report) -> None:
    for pool in pools(config):
        title = f"Each GPU of an engine that {pool.does}, of {gpu / GB:.0f} GB"
        _table(report, title, engine_memory(pool.shape, config, gpu))
    if config.train.gpus:
        _table(report, f"The GPU of a rank, of {gpu / GB:.0f} GB", rank_memory(shape, config, demands))
    hosts = {one.label: one.size for one in host_memory(shape, config) if one.number}
    _table(report, "Memory of the hosts", hosts, summed=False)
    _table(report, "Disk", disk(shape, config, demands), summed=False)


def _table(report: Report, title: str, sizes: dict[str, float], summed: bool = True) -> None:
    rows = {**sizes, **({"sum": sum(sizes.values())} if summed else {})}
    report.table(
        title,
        [{"what": name, "n": f"{size / GB:.1f} GB"} for name, size in rows.items()],
        {"what": "", "n": "size"},
    )


def _show_time(shape: Shape, config: Config, demands: Sequence[Demand], gpu: float, report: Report) -> None:
    rows, total = [], 0.0
    for step, demand in zip(config.planned, demands, strict=True):
        rule, work = step.config.train, work_of(config, step, demand)
        took = seconds_of(shape, config, rule, work, rule.steps(demand.items), gpu)
        total += took.total
        tokens = {"made": work.generated, "read": work.prefilled, "trained": work.trained}
        hours = {"generation": took.generation, "training": took.training}
        rows.append(
            {
                "iteration": step.name,
                **{name: f"{number / 1e6:.1f}" for name, number in tokens.items()},
                **{name: f"{number / 3600:.2f}" for name, number in hours.items()},
                **{name: f"{number:.0f}" for name, number in (("w", took.weights), ("c", took.checkpoints))},
            }
        )
    titles = {"iteration": "iteration", "made": "M tokens made", "read": "read", "trained": "trained on"}
    titles |= {"generation": "generation, h", "training": "training, h", "w": "weights, s", "c": "checkpoints, s"}
    report.table("As expected, by iteration", rows, titles)
    gpus = gpus_of(config)
    report.line(
        f"together {total / 3600:.1f} h on {gpus} GPUs, {gpus * total / 3600:.0f} GPU hours, without start and "
        "held-out prompts"
    )
    for what, on in (("engines", config.engine.gpus), ("ranks", config.train.gpus)):
        if not on:
            report.line(f"not counted: {what} without GPUs")
