"""The learning rate of each optimizer step."""

import math


def lr_at(step: int, total_steps: int, *, lr: float, lr_final: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of optimizer step `step`, counted from 0 (self-rewarding sec. 3.1.3: 1e-6 to 1e-7).

    Warm-up: steps 0..warmup_steps-1 take lr * (step + 1) / (warmup_steps + 1), so no step is lost at 0 and step
    `warmup_steps` has `lr`. From there cosine and linear fall to `lr_final` at the last step, total_steps - 1, and stay
    there; constant stays at `lr`. A run that ends in its warm-up never falls.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if schedule == "cosine":
        fallen = (1 - math.cos(math.pi * progress)) / 2
    elif schedule == "linear":
        fallen = progress
    else:
        raise ValueError(f"no schedule {schedule!r}")
    return (1 - fallen) * lr + fallen * lr_final
