"""What a run on GPUs needs of memory and disk, by formulas over the model's shape (docs/gpus.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rsrlm.commands import plan
from rsrlm.commands.shapes import Shape, shape_of
from rsrlm.config import Config
from rsrlm.recipes.base import Demand
from rsrlm.settings.train import TrainRule

GB = 10**9
# What vLLM keeps beside weights and cache, and that of a learner rank.
ENGINE_ACTIVATIONS, ENGINE_CUDA, LEARNER_CUDA = 3 * GB, 2 * GB, 1.5 * GB
BUCKET, LIVE = 5 * 10**8, 10**9  # DeepSpeed's reduce_bucket_size and stage3_max_live_parameters
HEAD_TOKENS = 512  # whose logits exist at a time
ENGINE_HOST, RANK_HOST = 8 * GB, 4 * GB  # memory of the host, beside weights


@dataclass(frozen=True)
class GpuPool:
    """Engines on GPUs: what they do, how many, the model that they hold and the key that names it."""

    does: str
    replicas: int
    path: str
    key: str = "model.path"

    @property
    def shape(self) -> Shape:
        return shape_of(self.path, self.key)


def pools(config: Config) -> list[GpuPool]:
    judge, validator, own = config.judge, config.evaluate.judge, config.model.path
    if not config.engine.gpus:
        return []
    found = [GpuPool("samples" if judge.replicas else "samples and judges", config.engine.replicas, own)]
    if judge.replicas:
        found.append(
            GpuPool("judges", judge.replicas, judge.model or own, "judge.model" if judge.model else "model.path")
        )
    if validator.model:
        found.append(GpuPool("validates", validator.replicas, validator.model, "evaluate.judge.model"))
    return found


def gpus_of(config: Config) -> int:
    """Of all engines and ranks."""
    engines = sum(pool.replicas for pool in pools(config)) * config.engine.gpus
    return engines + config.train.gpus * config.train.workers * (not config.ray.share_gpus)


def engine_memory(shape: Shape, config: Config, gpu: float) -> dict[str, float]:
    """Bytes on each GPU of a replica, by what takes them; the cache has what is left of vLLM's share."""
    parts = {
        "weights": shape.parameters * plan.BYTES[config.model.dtype] / config.engine.gpus,
        "activations": float(ENGINE_ACTIVATIONS),
        "CUDA, NCCL, graphs": float(ENGINE_CUDA),
    }
    return {**parts, "cache of keys and values": config.engine.gpu_share * gpu - sum(parts.values())}


def learner_memory(shape: Shape, train: TrainRule, ranks: int, dtype: str, tokens: int) -> dict[str, float]:
    """Bytes on the GPU of one of `ranks`, by what takes them; `tokens` are those of a forward pass."""
    size, parameters, stage = plan.BYTES[dtype], shape.parameters, train.zero_stage
    learning = shape.learning(train.lora)
    bucket = min(BUCKET, parameters) * size
    layer = tokens * (14 * shape.hidden + 4 * shape.intermediate) * size  # what a layer keeps for its backward pass
    if train.gradient_checkpointing:
        # Each layer's input; and one layer that is made again, with the gradients of its parts.
        kept = tokens * shape.layers * shape.hidden * size
        layer = tokens * (18 * shape.hidden + 8 * shape.intermediate) * size
    else:
        kept, layer = shape.layers * layer, 0
    return {
        "weights": parameters * size / (ranks if stage == 3 else 1),
        "gradients": learning * size / (ranks if stage >= 2 else 1),
        "optimizer": 0.0 if on_the_host(train) else optimizer_memory(shape, train, ranks, dtype),
        "buckets and gathered layers": {0: 1, 1: 3, 2: 3, 3: 2}[stage] * bucket
        + (stage == 3) * (min(LIVE, parameters) + shape.head) * size,
        "kept for the backward pass": float(kept),
        "one layer": float(layer),
        "logits": 3 * min(HEAD_TOKENS, tokens) * shape.vocabulary * 4.0,
        "CUDA, NCCL": float(LEARNER_CUDA),
    }


def on_the_host(train: TrainRule) -> bool:
    """Whether DeepSpeed keeps the optimizer there."""
    offload = train.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {})
    return bool(offload) and offload.get("device", "cpu") == "cpu"


def optimizer_memory(shape: Shape, train: TrainRule, ranks: int, dtype: str) -> float:
    """Bytes of a rank's moments, and of its float32 weights beside others."""
    return shape.learning(train.lora) * (12 if plan.BYTES[dtype] == 2 else 8) / (ranks if train.zero_stage else 1)


def host_memory(shape: Shape, config: Config) -> list[plan.Process]:
    """Of the hosts, at their peaks. Files that engines map while they load count for nobody."""
    weights = float(shape.parameters * plan.BYTES[config.model.dtype])
    engine, train = config.engine, config.train
    # Under ZeRO 3 it is divided as it is read.
    whole = weights * any(step.config.train.zero_stage < 3 for step in config.planned)
    moved = [
        optimizer_memory(shape, step.config.train, train.workers, config.model.dtype)
        for step in config.planned
        if on_the_host(step.config.train)
    ]
    return [
        plan.Process(
            "engine", sum(pool.replicas for pool in pools(config)), ENGINE_HOST + weights * config.ray.share_gpus
        ),
        plan.Process("learner rank", train.workers, RANK_HOST + whole + max(moved, default=0.0)),
        plan.Process("first rank's copy for an export", 1, weights),
        plan.Process("/dev/shm", 1, 2 * weights),  # a version, while the next one is written
        plan.Process("driver", 1, float(plan.DRIVER)),
        plan.Process("producer", engine.producers, float(plan.PRODUCER)),
    ]


def disk(shape: Shape, config: Config, demands: Sequence[Demand]) -> dict[str, float]:
    """Bytes of the run folder at its end, and of a checkpoint, of which two stand there for a moment."""
    size = plan.BYTES[config.model.dtype]
    records = sum(
        plan.RECORD_ON_DISK[role == "actor"] * number
        for demand in demands
        for role, (number, _) in demand.requests.items()
    )
    return {
        "models": float(config.models_kept * shape.parameters * size),
        "checkpoint": float(max(checkpoint_bytes(shape, step.config.train, size) for step in config.planned)),
        "records": float(records),
    }


def checkpoint_bytes(shape: Shape, train: TrainRule, size: int) -> int:
    return shape.learning(train.lora) * (14 if size == 2 else 12)


def rank_memory(shape: Shape, config: Config, demands: Sequence[Demand]) -> dict[str, float]:
    """`learner_memory` of the iteration that needs most."""
    each = []
    for step, demand in zip(config.planned, demands, strict=True):
        rule = step.config.train
        tokens = rule.micro_batch * min(config.engine.max_model_len, demand.item_tokens)
        each.append(learner_memory(shape, rule, config.train.workers, config.model.dtype, tokens))
    return max(each, key=lambda parts: sum(parts.values()))


def too_large(config: Config, demands: Sequence[Demand], gpu: float) -> list[str]:
    """What does not fit on GPUs of so many bytes, and what to change."""
    found, of, gpus = [], f"of {gpu / GB:.0f} GB", config.engine.gpus
    for pool in pools(config):
        cache = engine_memory(pool.shape, config, gpu)["cache of keys and values"] * gpus
        need = config.engine.max_model_len * pool.shape.cached(plan.BYTES[config.model.dtype])
        if cache < need:
            found.append(
                f"engine.gpus={gpus}: an engine that {pool.does} has {max(cache, 0) / GB:.1f} GB left for its cache "
                f"{of} each, and one request of engine.max_model_len needs {need / GB:.1f}; raise engine.gpus"
            )
    shape = shape_of(config.model.path)
    if config.train.gpus:
        rank = sum(rank_memory(shape, config, demands).values())
        if rank > gpu:
            found.append(
                f"train.workers={config.train.workers}: a rank needs {rank / GB:.0f} GB {of}; raise train.workers or "
                "train.zero_stage, set train.gradient_checkpointing=true, lower train.micro_batch, or keep the "
                "optimizer on the hosts (train.deepspeed.zero_optimization.offload_optimizer.device=cpu)"
            )
    return found
