"""`train.dropout` is what a stage trains with, whatever the model's config says, and no other stage inherits it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rsrlm.jobs import TrainJob
from rsrlm.runtime.dropout import set_dropout
from rsrlm.runtime.export import export
from rsrlm.runtime.policy import load_policy
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import ModelConfig
from rsrlm.settings.train import Train

pytestmark = pytest.mark.torch

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(config: Any, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained_with(folder: Path, dropout: float) -> Any:
    return load_policy(str(folder), ModelConfig(path=str(folder)), Train(lr=1e-3, pairs_per_step=1, dropout=dropout))


def varies(model: Any) -> bool:
    """Whether two forward passes of one input differ, as dropout makes them."""
    import torch

    tokens = torch.arange(1, 21).reshape(1, -1)
    with torch.no_grad():
        first, *others = (model(tokens).logits for _ in range(4))
    return any(not torch.equal(first, other) for other in others)


def configs() -> dict[str, Any]:
    from transformers import (
        Gemma3Config,
        GPT2Config,
        LlamaConfig,
        OPTConfig,
        Starcoder2Config,
    )

    small = {"vocab_size": 64, "hidden_size": 16}
    return {
        "llama": LlamaConfig(**SMALL, attention_dropout=0.5),
        "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        "starcoder2": Starcoder2Config(**SMALL, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5),
        "opt": OPTConfig(
            **small, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, dropout=0.5, layerdrop=0.5,
        ),
        "gemma3": Gemma3Config(
            text_config={**SMALL, "head_dim": 8, "num_key_value_heads": 1, "attention_dropout": 0.5},
            vision_config={key: value for key, value in SMALL.items() if key != "vocab_size"},
        ),
    }  # fmt: skip


NAMES = ["llama", "gpt2", "starcoder2", "opt", "gemma3"]


def test_all_configs_are_tried() -> None:
    assert list(configs()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_zero_whatever_the_models_config_says(name: str, tmp_path: Path) -> None:
    folder = saved(configs()[name], tmp_path / "m0")
    assert not varies(trained_with(folder, 0.0))
    assert varies(trained_with(folder, 0.5))


def test_the_names_of_every_part() -> None:
    gpt2, llama, gemma = configs()["gpt2"], configs()["llama"], configs()["gemma3"]
    for config in (gpt2, llama, gemma):
        set_dropout(config, 0.25)
    assert (gpt2.attn_pdrop, gpt2.resid_pdrop, gpt2.embd_pdrop) == (0.25, 0.25, 0.25)
    assert gpt2.summary_first_dropout == 0.1  # of a head that a language model has not
    assert (llama.attention_dropout, gemma.text_config.attention_dropout) == (0.25, 0.25)
    set_dropout(gpt2, 0.0)
    assert (gpt2.attn_pdrop, gpt2.resid_pdrop, gpt2.embd_pdrop) == (0, 0, 0)


def test_an_architecture_without_dropout() -> None:
    from transformers import MambaConfig

    set_dropout(MambaConfig(), 0.0)
    with pytest.raises(ConfigError, match=r"train.dropout=0.1: the architecture mamba has no dropout"):
        set_dropout(MambaConfig(), 0.1)


@pytest.mark.parametrize("own", [0.0, 0.25])
def test_an_exported_model_has_the_dropout_of_the_first(own: float, smollm2: Path, tmp_path: Path) -> None:
    """Not that of the stage that trained it: neither 0.1 of SFT nor 0 of DPO."""
    from transformers import AutoConfig, LlamaConfig

    model = ModelConfig(path="m0", dtype="float32")
    folder = saved(LlamaConfig(**SMALL, attention_dropout=own), tmp_path / "M0")
    tokenizer = [path for path in smollm2.iterdir() if path.name.startswith(("tokenizer", "chat_template"))]
    for path in tokenizer:
        shutil.copy(path, folder)
    for number, dropout in enumerate((0.1, 0.0), start=1):
        policy = trained_with(folder, dropout)
        train = Train(lr=1e-3, pairs_per_step=1, dropout=dropout)
        output = tmp_path / f"M{number}"
        job = TrainJob(
            run=str(tmp_path), iteration=number - 1, seed=0, model=str(folder), output=str(output),
            name=output.name, train=train, items="", digest="",
        )  # fmt: skip
        export(policy, policy.state_dict(), job, model, output)
        found, first = AutoConfig.from_pretrained(output), AutoConfig.from_pretrained(tmp_path / "M0")
        assert found.attention_dropout == own
        assert found.to_dict() | {"_name_or_path": ""} == first.to_dict() | {"_name_or_path": ""}
        assert policy.config.attention_dropout == dropout  # a candidate is exported while training goes on
        assert json.loads((output / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        folder = output
