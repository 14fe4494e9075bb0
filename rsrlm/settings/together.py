"""Keys of several sections that do not go together."""

from collections.abc import Mapping
from typing import Any


def fits_online(config: Any, step: Any) -> None:
    """Raises ValueError where a step of this config cannot be on the online clock."""
    train = step.train
    _refuse(
        "clock.kind=online",
        {
            "steps": bool(config.steps) and "online rounds are alike; leave it out",
            "train.choose": train.choose != "last" and "candidates are for iterations; leave it out",
            "train.start": train.start != "before" and "a round goes on from the one before it; leave it out",
            "train.lora": train.lora is not None and "adapters do not go on from round to round yet; leave it out",
            "train.zero_stage": train.zero_stage == 3
            and (config.clock.reference == "first" or config.clock.sync_every > 1)
            and "weights that are divided cannot be exchanged for those of the reference; set clock.reference=before "
            "and clock.sync_every=1",
        },
    )


def shares_gpus(config: Any) -> None:
    """Raises ValueError where the engines and ranks of this config cannot take turns on the same GPUs."""
    engine, train = config.engine, config.train
    engines = engine.least(engine.replicas)
    _refuse(
        "ray.share_gpus=true",
        {
            f"engine.gpus={engine.gpus}": engine.gpus != 1 and "an engine shares one GPU; set it to 1",
            f"train.gpus={train.gpus}": train.gpus != 1 and "a rank shares one GPU; set it to 1",
            f"clock.kind={config.clock.kind}": config.clock.kind == "online"
            and "engines answer while the learner trains; leave out one of them",
            f"train.workers={train.workers}": train.workers > engines
            and f"each rank shares the GPU of an engine, and there are {engines}; lower it, or raise engine.replicas",
        },
    )


def _refuse(because: str, wrong: Mapping[str, str | bool]) -> None:
    for key, why in wrong.items():
        if why:
            raise ValueError(f"{key} with {because}: {why}")
