"""The steps of a run: each has a recipe, and that recipe's keys over the defaults of the same name."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from rsrlm.settings.base import JUDGES, NAME, RECIPES, ConfigError, plugin
from rsrlm.settings.methods import WHO_JUDGES
from rsrlm.settings.source import keys_at, message_of

RANKS = ("workers", "threads", "cpus", "gpus", "silence_s")  # of train: they hold for the whole run

# Keys that have moved: what to write in their place.
MOVED = {
    "schedule": "steps: a list with one entry for each iteration, such as {recipe: meta_rewarding, name: M1, "
    "pair: {rho: 0.3}}",
    "sft": "steps: an entry {recipe: sft, sources: [{path: ift}]}",
    "judge.read": "judge.kind: text, structured, digits or function",
    "train.method": "recipe: sft, self_rewarding or meta_rewarding, at the top or in an entry of steps",
    "pair.kinds": "recipe: meta_rewarding trains on pairs of responses and of judgements, self_rewarding on the former",
    "wandb": "trackers.wandb: {project: NAME}, and nothing for a run without wandb",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One iteration: the name of the model that it trains, its recipe, and the recipe's own config."""

    name: str
    recipe: Any  # a class of rsrlm.recipes
    config: Any


def resolved(config: Any, raw: Mapping[str, Any], source: str) -> list[Step]:
    """The steps of a config, from the plain data that it was made of. Raises ConfigError."""
    entries = raw.get("steps") or [{}]
    names = [str(entry.get("name", f"M{number}")) for number, entry in enumerate(entries, start=1)]
    made = []
    for number, entry in enumerate(entries):
        where = f"{source}: step {number}" if config.steps else source
        made.append(_step(config, raw, entry, names[number], where))
    if len({"M0", *names}) <= len(names):
        raise ConfigError(f"{source}: steps: the models M0, {', '.join(names)} need names of their own")
    _check_defaults(raw, made, type(config).model_fields, source)
    for step in made:
        try:
            config.step_fits(step.config)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        if config.clock.kind == "online" and not step.recipe.asks_one_model():
            raise ConfigError(
                f"{source}: recipe={dotted(step.recipe)} with clock.kind=online: an iteration of it may train, or ask "
                "several models; leave out clock"
            )
    return made


def _step(config: Any, raw: Mapping[str, Any], entry: Any, name: str, where: str) -> Step:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: {entry!r} must be a mapping of keys, such as {{recipe: self_rewarding}}")
    if not re.fullmatch(NAME, name) or name.endswith((".tmp", ".old")):
        raise ConfigError(
            f"{where}: name={name!r} must be letters, digits, '.', '_' and '-', and not end in .tmp or .old"
        )
    kind = str(entry.get("recipe", config.recipe))
    recipe = plugin(kind, RECIPES, "recipe")
    fields = recipe.Config.model_fields
    own = {key: value for key, value in entry.items() if key not in ("name", "recipe")}
    if unknown := sorted(own.keys() - fields.keys()):
        raise ConfigError(f"{where}: {unknown[0]}: recipe {kind} has no such key; it has {', '.join(sorted(fields))}")
    fixed = config.judge.model_dump()
    for key in WHO_JUDGES:
        judged = own.get("judge")
        if isinstance(judged, dict) and key in judged and judged[key] != fixed[key]:
            raise ConfigError(f"{where}: judge.{key} holds for the whole run; set it at the top of the config")
    merged = {}
    for key in fields:
        if key in own and not isinstance(own[key], dict):
            merged[key] = own[key]
        elif key in own or key in raw:
            merged[key] = _over(raw.get(key), own.get(key), recipe.Config, key)
    try:
        return Step(name=name, recipe=recipe, config=recipe.Config.model_validate(merged))
    except ValidationError as error:
        raise ConfigError(message_of(error, where, recipe.Config)) from None


def _over(default: Any, own: Any, model: type[BaseModel], key: str) -> Any:
    """A section's default with a step's own keys over it; of the default only what the step's section knows."""
    if not isinstance(default, dict):
        return own if own is not None else default
    own = own or {}
    if key == "judge":
        kind = str(own.get("kind", default.get("kind", "text")))
        known = set(plugin(kind, JUDGES, "judge.kind").Config.model_fields)
    else:
        known = set(keys_at(model, (key,)))
    return {**{name: value for name, value in default.items() if name in known}, **own}


def _check_defaults(raw: Mapping[str, Any], steps: list[Step], own: Collection[str], source: str) -> None:
    """Raises ConfigError for a key at the top that neither the run, whose sections are `own`, nor any step uses."""
    models = {step.recipe.Config for step in steps}
    for key, value in raw.items():
        if (key == "train" or key not in own) and isinstance(value, dict):
            used = {name for model in models if key in model.model_fields for name in keys_at(model, (key,))}
            used |= set(RANKS) if key == "train" else set()
            if unused := sorted(value.keys() - used):
                recipes = ", ".join(sorted({step.recipe.__name__ for step in steps}))
                raise ConfigError(
                    f"{source}: {key}.{unused[0]}={value[unused[0]]!r}: no step uses it (recipes: {recipes}); known "
                    f"here: {', '.join(sorted(used)) or 'nothing'}"
                )


def unknown_keys(data: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys at the top: those of the run are `own`, others must be keys of a step's recipe."""
    steps = data.get("steps")
    entries = [entry for entry in steps if isinstance(entry, dict)] if isinstance(steps, list) else []
    names = {str(entry.get("recipe", data.get("recipe", "self_rewarding"))) for entry in entries or [{}]}
    try:
        recipes = [plugin(name, RECIPES, "recipe") for name in sorted(names)]
    except ConfigError:  # said where the step is resolved
        return []
    known = {*own, *(field for recipe in recipes for field in recipe.Config.model_fields)}
    unknown = [key for key, value in data.items() if key not in known and value != {}]
    return [f"{key}: unknown key; known here: {', '.join(sorted(known))}" for key in unknown]


def refuse_moved(data: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError for keys that are written otherwise, with what to write."""
    for key, hint in MOVED.items():
        section, _, name = key.partition(".")
        if section in data and (not name or (isinstance(data[section], dict) and name in data[section])):
            raise ConfigError(f"{source}: {key} is written otherwise: {hint}")


def dotted(recipe: type) -> str:
    """The short name of a recipe, or package.module:Class."""
    path = f"{recipe.__module__}:{recipe.__qualname__}"
    return next((name for name, known in RECIPES.items() if known == path), path)
