"""The config of a command that is given a model in the place of a config: what the user sets, and defaults for the rest
by what this machine has."""

import os
from pathlib import Path
from typing import Any

from rsrlm.commands.shapes import shape_of
from rsrlm.config import Config, load, resolve
from rsrlm.model import folder_of, load_config
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import ModelConfig
from rsrlm.settings.source import override_key

MOST_LEN = {False: 4096, True: 8192}  # tokens of prompt and answer together, at most: on CPUs, on a GPU
GIB = 2**30


def config_of(place: str, overrides: list[str], recipe: str = "self_rewarding") -> Config:
    """The config of a YAML file, or of a model: a Hugging Face id, a folder, or the built-in one. Raises ConfigError.

    `recipe` decides which keys a model's config has beside those that all have.
    """
    if place.lower().endswith((".yaml", ".yml")):
        return load(place, overrides)
    given: dict[str, Any] = {"model": {"path": place}}
    for override in overrides:
        override_key(given, override)
    first = _resolved(given, recipe, {})
    if (folder := Path(os.path.expanduser(place))).is_dir() and (folder / "summary.json").is_file():
        raise ConfigError(f"{place}: the folder of a run, and not of a model; give one of its models, as in models/")
    engine = first.engine
    room = min(MOST_LEN[engine.gpus > 0], _positions(first.model))
    chosen: dict[str, Any] = {"max_model_len": room}
    if not engine.gpus:
        chosen["kv_cache_gib"] = _cache(first, engine.max_model_len if "max_model_len" in _given(given) else room)
    return _resolved(given, recipe, chosen)


def _resolved(given: dict[str, Any], recipe: str, engine: dict[str, Any]) -> Config:
    """With defaults under what is given, section by section. Nobody trains: what a training needs is there in form."""
    gpus = _given(given).get("gpus", int(has_gpu()))
    server = "endpoint" in _given(given, "judge")
    compares = server or "endpoint" in _given(_given(given, "evaluate"), "judge")
    defaults: dict[str, Any] = {
        "name": "standalone",
        "iterations": 1,
        "recipe": recipe,
        "model": {"dtype": "bfloat16" if gpus else "float32"},
        "prompts": {"path": "builtin", "per_iteration": 1, "heldout": 0},
        "sample": {"max_tokens": 512},
        "judge": {"kind": "text" if server or recipe == "meta_rewarding" else "digits"},
        "evaluate": {"judge": {"read": "text" if compares else "letters"}},
        "train": {"lr": 1e-6, "pairs_per_step": 1, "zero_stage": 1 if gpus else 0},
        "engine": {
            "kind": "async" if gpus else "inprocess",
            "gpus": gpus,
            "threads": len(os.sched_getaffinity(0)),
            "max_model_len": max(MOST_LEN.values()),
            **engine,
        },
    }
    return resolve(_over(defaults, given), "the command line")


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given over the defaults, section by section."""
    both = {name for name in defaults.keys() & given.keys() if isinstance(defaults[name], dict)}
    deep = {name: _over(defaults[name], given[name]) for name in both if isinstance(given[name], dict)}
    return {**defaults, **given, **deep}


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia").exists()


def _given(given: dict[str, Any], section: str = "engine") -> dict[str, Any]:
    """What is given of a section."""
    found = given.get(section)
    return found if isinstance(found, dict) else {}


def _positions(model: ModelConfig) -> int:
    """Tokens that the model was made for; where its config.json does not say, as few as are needed here."""
    content = load_config(folder_of(model), model.trust_remote_code).get_text_config()
    return getattr(content, "max_position_embeddings", None) or min(MOST_LEN.values())


def _cache(config: Config, room: int) -> float:
    """GiB of the cache of an engine on CPUs: at least 1, and enough for two of the longest requests."""
    try:
        token = shape_of(config.model.path).cached({"float32": 4, "bfloat16": 2}[config.model.dtype])
    except ConfigError:  # with experts, say: nothing is known of its cache
        return 1.0
    return max(1.0, round(2 * room * token / GIB, 2))
