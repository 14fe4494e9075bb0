"""What a model drops while it is trained. Nothing here imports torch: a run checks its config with it."""

from typing import Any

from rsrlm.settings.base import ConfigError

# How transformers' causal language models call the shares that they drop of activations and attention weights.
DROPOUT_KEYS = frozenset(
    {
        *("dropout", "dropout_p", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"),
        *("hidden_dropout", "hidden_dropout_prob", "residual_dropout", "resid_dropout", "resid_pdrop", "mlp_dropout"),
        *("activation_dropout", "embedding_dropout", "embed_dropout", "embd_pdrop", "emb_pdrop"),
    }
)


def set_dropout(model_config: Any, dropout: float) -> None:
    """Set the dropout that the architecture has, nested configs such as text_config included.

    0 means that nothing is dropped, whatever the names, layers included. Raises ConfigError for another value where the
    architecture has no dropout.
    """
    found = [
        (part, key)
        for part in _parts(model_config)
        for key, value in vars(part).items()
        if "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool)
        if not dropout or key in DROPOUT_KEYS
    ]
    if dropout and not found:
        raise ConfigError(
            f"train.dropout={dropout}: the architecture {model_config.model_type} has no dropout; set train.dropout=0"
        )
    for part, key in found:
        setattr(part, key, dropout)


def _parts(model_config: Any) -> list[Any]:
    """A config and those within it."""
    parts = [value for key, value in vars(model_config).items() if key.endswith("_config")]
    inside = [part for part in parts if hasattr(part, "to_dict")]
    return [model_config, *(part for value in inside for part in _parts(value))]
