"""Models with random weights, made in a second."""

import shutil
from pathlib import Path
from typing import Any


def make_tiny(folder: Path, source: Path, ends: bool, **changes: Any) -> Path:
    """A random-weight Llama of 0.1M parameters beside its tied embeddings, with the tokenizer of `source`.
    `changes` are of its config.

    With `ends`, the first residual dimension is constant and favours the end token: about one sampled token in ten.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(**{**shape, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if ends:
        with torch.no_grad():
            embedding = model.model.embed_tokens.weight
            embedding[:, 0] = 4.0
            embedding[2, 0] = 25.0
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = 0
                layer.mlp.down_proj.weight[0] = 0
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, folder)
    return folder
