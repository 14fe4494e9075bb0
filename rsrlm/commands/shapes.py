"""The shape of a model, from its config.json alone: how many parameters it has, and what a token keeps in the cache."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsrlm.settings.base import ConfigError, first_line
from rsrlm.settings.machine import BUILTIN_MODEL
from rsrlm.settings.train import LoRA

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder with gated feed-forward layers, such as a Llama."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Weights and the scales of norms; a tied head counts once. Biases are left out: less than a thousandth."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.head * (1 if self.tied else 2) + self.layers * layer + self.hidden

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.vocabulary * self.hidden

    def learning(self, lora: LoRA | None) -> int:
        """Parameters that have gradients: all, or those of adapters. A layer of another name counts as a large one."""
        if lora is None:
            return self.parameters
        hidden, q, kv, feed = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": q, "gate_proj": feed, "up_proj": feed}
        sizes["down_proj"] = feed
        return self.layers * lora.rank * sum(hidden + sizes.get(name, feed) for name in lora.targets or sizes)

    def cached(self, size: int) -> int:
        """Bytes of the keys and values of one token, of `size` bytes each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size


LLAMA3_8B = Shape(hidden=4096, layers=32, intermediate=14336, vocabulary=128256, heads=32, kv_heads=8, head_dim=128)
LLAMA2_13B = Shape(hidden=5120, layers=40, intermediate=13824, vocabulary=32000, heads=40, kv_heads=40, head_dim=128)
LLAMA2_70B = Shape(hidden=8192, layers=80, intermediate=28672, vocabulary=32000, heads=64, kv_heads=8, head_dim=128)
# Models whose config.json is behind a licence.
KNOWN = {
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B,
    "meta-llama/Llama-3.1-8B": LLAMA3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA3_8B,
    "meta-llama/Llama-2-13b-hf": LLAMA2_13B,
    "meta-llama/Llama-2-13b-chat-hf": LLAMA2_13B,
    "meta-llama/Llama-2-70b-hf": LLAMA2_70B,
    "meta-llama/Llama-2-70b-chat-hf": LLAMA2_70B,
    BUILTIN_MODEL: Shape(
        hidden=576, layers=30, intermediate=1536, vocabulary=49152, heads=9, kv_heads=3, head_dim=64, tied=True
    ),
}


def shape_of(path: str, key: str = "model.path") -> Shape:
    """The shape of the model that `path` names: a folder with a config.json, a known model, or a Hugging Face id, of
    which that file alone is fetched. Raises ConfigError."""
    folder = Path(os.path.expanduser(path))
    if (folder / "config.json").is_file():
        return _read(folder / "config.json", key)
    if path in KNOWN:
        return KNOWN[path]
    size = f"or set {key} to a model of that size, such as meta-llama/Llama-3.1-8B or meta-llama/Llama-2-70b-hf"
    if folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"{key}={path}: no config.json in that folder; put it there (plan needs no weights), {size}")
    from huggingface_hub import hf_hub_download

    try:
        return _read(Path(hf_hub_download(path, "config.json")), key)
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ConfigError(
            f"{key}={path}: its config.json is not in the local cache and could not be fetched "
            f"({first_line(error)}); give a folder that holds it (plan needs no weights), {size}"
        ) from None


def _read(file: Path, key: str) -> Shape:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = from_config({**content, **(content.get("text_config") or {})})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{key}={file.parent}: its config.json gives no shape of a model ({type(error).__name__}: {error}); "
            "download it again"
        ) from None
    if found is None:
        raise ConfigError(f"{key}={file.parent}: it has experts, and plan knows dense models alone; give another model")
    return found


def from_config(content: dict[str, Any]) -> Shape | None:
    """From what a config.json says; None for a mixture of experts. Raises LookupError where something is missing."""

    def value(*names: str) -> int:
        found = next((content[name] for name in names if content.get(name) is not None), None)
        if found is None:
            raise LookupError(f"no {names[0]}")
        return int(found)

    if any((content.get(name) or 0) > 1 for name in EXPERTS):
        return None
    hidden, heads = value("hidden_size", "n_embd"), value("num_attention_heads", "n_head")
    return Shape(
        hidden=hidden,
        layers=value("num_hidden_layers", "n_layer"),
        intermediate=content.get("intermediate_size") or 4 * hidden,
        vocabulary=value("vocab_size"),
        heads=heads,
        kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or hidden // heads,
        tied=bool(content.get("tie_word_embeddings")),
    )
