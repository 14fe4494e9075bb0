"""The config of a command that is given a model in the place of a config: what the user sets, and defaults for the rest
by what this machine has."""

import json
import os
from pathlib import Path
from typing import Any

from rsrlm.commands.shapes import shape_of
from rsrlm.config import Config, load, resolve
from rsrlm.model import folder_of
from rsrlm.settings.base import ConfigError
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
    room = min(MOST_LEN[engine.gpus > 0], _positions(folder_of(first.model)))
    chosen: dict[str, Any] = {"max_model_len": room}
    if not engine.gpus:
        chosen["kv_cache_gib"] = _cache(first, engine.max_model_len if "max_model_len" in _given(given) else room)
    return _resolved(given, recipe, chosen)


def _resolved(given: dict[str, Any], recipe: str, engine: dict[str, Any]) -> Config:
    """With defaults under what is given, section by section. Nobody trains: what a training needs is there in form."""
    gpus = _given(given).get("gpus", int(Path("/proc/driver/nvidia").exists()))
    digits = recipe != "meta_rewarding" and "endpoint" not in _given(given, "judge")
    defaults: dict[str, Any] = {
        "name": "standalone",
        "iterations": 1,
        "recipe": recipe,
        "model": {"dtype": "bfloat16" if gpus else "float32"},
        "prompts": {"path": "builtin", "per_iteration": 1, "heldout": 0},
        "sample": {"max_tokens": 512},
        "judge": {"kind": "digits" if digits else "text"},
        "train": {"lr": 1e-6, "pairs_per_step": 1, "zero_stage": 1 if gpus else 0},
        "engine": {
            "kind": "async" if gpus else "inprocess",
            "gpus": gpus,
            "threads": len(os.sched_getaffinity(0)),
            "max_model_len": max(MOST_LEN.values()),
            **engine,
        },
    }
    merged = {**defaults, **given}
    for name, section in defaults.items():
        if isinstance(section, dict) and isinstance(given.get(name), dict):
            merged[name] = {**section, **given[name]}
    return resolve(merged, "the command line")


def _given(given: dict[str, Any], section: str = "engine") -> dict[str, Any]:
    """What is given of a section."""
    found = given.get(section)
    return found if isinstance(found, dict) else {}


def _positions(folder: Path) -> int:
    """Tokens that the model was made for."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = {**content, **(content.get("text_config") or {})}
    found = content.get("max_position_embeddings") or content.get("n_positions")
    return found if isinstance(found, int) and found > 0 else min(MOST_LEN.values())


def _cache(config: Config, room: int) -> float:
    """GiB of the cache of an engine on CPUs: at least 1, and enough for two of the longest requests."""
    try:
        token = shape_of(config.model.path).cached({"float32": 4, "bfloat16": 2}[config.model.dtype])
    except ConfigError:  # with experts, say: nothing is known of its cache
        return 1.0
    return max(1.0, round(2 * room * token / GIB, 2))
