"""Low-rank adapters (LoRA, 2106.09685) in a model that learns: they alone have gradients, moments and checkpoints. What
leaves the learner is the whole model, with its adapters added to the weights, and beside it the adapters."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rsrlm.settings.base import ConfigError, first_line
from rsrlm.settings.train import LoRA

NAME = "default"  # peft's, of the one adapter of a layer
FOLDER = "adapter"  # in that of an exported model: where it lay beside the weights, transformers would take it for them
FILE = "adapter_model.safetensors"
OF_PEFT = "base_model.model."  # how names begin in peft's files


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


def adapters(model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of the adapters, by their names in peft's files."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield OF_PEFT + name.replace(f".{NAME}.", "."), parameter


def whole(parameters: list[Any], adapter: Any) -> torch.Tensor:
    """The weight of the whole model; the sum is made in float32 and rounded once."""
    weight: torch.Tensor = parameters[0].detach()
    if adapter is None:
        return weight
    return (weight.float() + adapter.get_delta_weight(NAME).detach().float()).to(weight.dtype)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], lora: LoRA, base: str, base_folder: str) -> None:
    """A folder that peft loads on top of the model in `base_folder`; `base` is the name of that model in the run."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    layers = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=layers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_folder,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(dict(tensors), folder / FILE, metadata={"format": "pt", "base": base})


def base_of(folder: Path) -> str:
    """The name of the model in the run that an adapter was trained on."""
    from safetensors import safe_open

    with safe_open(folder / FILE, framework="pt") as file:
        return str(file.metadata()["base"])


def stack(folders: Sequence[Path], output: Path, base: str, base_folder: str) -> int:
    """Adapters that were trained one after the other, each added to the weights before the next, as one on top of the
    model in `base_folder`; returns its rank, the sum of theirs. It adds what they have added, but for the rounding of
    the weights in between."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    parts = [(PeftConfig.from_pretrained(str(folder)), load_file(folder / FILE)) for folder in folders]
    total = sum(config.r for config, _ in parts)
    stacked: dict[str, torch.Tensor] = {}
    begin = 0
    for config, tensors in parts:
        for name, tensor in tensors.items():
            down = ".lora_A." in name  # [rank, in]; the other half is [out, rank]
            shape = (total, tensor.shape[1]) if down else (tensor.shape[0], total)
            place = stacked.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
            place.narrow(0 if down else 1, begin, config.r).copy_(
                tensor if down else tensor * (config.lora_alpha / config.r)
            )
        begin += config.r
    write_adapter(output, stacked, LoRA(rank=total, alpha=total), base, base_folder)
    return int(total)
