"""Low-rank adapters (LoRA, 2106.09685) in a model that learns: they alone have gradients, moments and checkpoints. What
leaves the learner is the whole model, with its adapters added to the weights."""

from collections.abc import Iterator
from typing import Any

import torch

from rsrlm.settings.base import ConfigError, first_line
from rsrlm.settings.train import LoRA

NAME = "default"  # peft's, of the one adapter of a layer


def add_adapters(model: Any, lora: LoRA, seed: int) -> None:
    """Adapters that do nothing yet, made alike by each rank and each resumed training. All other weights are frozen.

    Raises ConfigError where the model has no such linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ConfigError(f"train.lora.targets={lora.targets}: {first_line(error)}") from None
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, Linear):
            raise ConfigError(f"train.lora.targets={lora.targets}: {name} is no linear layer; leave it out")


def weights(model: Any) -> Iterator[tuple[str, list[Any], Any]]:
    """Of each weight of a whole model, with or without adapters: its name, the parameters that it is made of, and the
    adapter that `whole` joins them by."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for name, parameter in model.named_parameters():
        layer, _, rest = name.partition(".base_layer.")
        if rest == "weight":
            adapter = layers[layer]
            yield f"{layer}.weight", [parameter, adapter.lora_A[NAME].weight, adapter.lora_B[NAME].weight], adapter
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), [parameter], None


def whole(parameters: list[Any], adapter: Any) -> torch.Tensor:
    """The weight of the whole model; the sum is made in float32 and rounded once."""
    weight: torch.Tensor = parameters[0].detach()
    if adapter is None:
        return weight
    return (weight.float() + adapter.get_delta_weight(NAME).detach().float()).to(weight.dtype)
