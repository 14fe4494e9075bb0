"""The prompts of a run: read, checked, and dealt out by seed: some set aside first, then a hand for each iteration."""

import json
import os
import random
import unicodedata
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from rsrlm.config import Config
from rsrlm.data import files
from rsrlm.records import Prompt, wording
from rsrlm.settings.base import ConfigError
from rsrlm.settings.methods import Prompts

BUILTIN = "builtin"
OWN = {BUILTIN: "instructions.jsonl", "arithmetic": "arithmetic.jsonl"}  # files of the project
REFUSED = ("Cc", "Zl", "Zp")  # Unicode categories of control characters and line breaks; seeds are separated by one


def file_of(prompts: Prompts) -> Path:
    return file_named(prompts.path)


def file_named(name: str) -> Path:
    """The path, or one of the project's own files."""
    if name in OWN:
        return Path(str(resources.files("rsrlm"))) / "assets" / "prompts" / OWN[name]
    return Path(os.path.expanduser(name))  # Path's own raises for an unknown user


def read(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file with `id` and `prompt` per line; the other keys are the prompt's data, see `data_of`.

    Raises ConfigError with the line number.
    """
    key = f"prompts.path={path}"
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    remedy = f"give a JSONL file with id and prompt per line, or {BUILTIN!r}"
    for number, entry in files.jsonl(path, "prompts.path", remedy):
        where = f"{key}, line {number}"
        prompt = prompt_of(entry, where)
        if prompt.id in lines:
            raise ConfigError(f"{where}: id {prompt.id!r} stands in line {lines[prompt.id]} already; ids are unique")
        lines[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{key}: no prompts in it; write one JSON object with id and prompt per line")
    return prompts


def prompt_of(entry: Any, where: str) -> Prompt:
    """The prompt of a line. Raises ConfigError, which begins with `where`."""
    if not isinstance(entry, dict) or not entry.keys() >= {"id", "prompt"}:
        raise ConfigError(f'{where}: must be an object such as {{"id": "tea", "prompt": "Describe tea."}}')
    data = data_of(entry)
    check(entry["id"], entry["prompt"], where, data=data)
    return Prompt(id=entry["id"], text=entry["prompt"], data=data)


def check(
    identifier: Any, text: Any, where: str, *, name: str = "prompt", data: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError unless these are an id and a text, called `name`, that a run can work with."""
    if not isinstance(identifier, str) or not identifier or any(map(_refused, identifier)):
        raise ConfigError(
            f"{where}: id {identifier!r} must be a text without / # >, line breaks and control characters"
        )
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: {name} of {identifier!r} must be a text that is not empty")
    carried = data or {}
    everything = "".join((identifier, text, *carried, *carried.values()))
    if lone := [character for character in everything if unicodedata.category(character) == "Cs"]:
        # JSON can write it, UTF-8 cannot: no journal could take it.
        raise ConfigError(f"{where}: {lone[0]!r} is half a surrogate pair; write the whole character")


def data_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """What judges, functions and recipes may see of a line and the actor does not, such as `answer` or `reference`.

    Texts are taken as they are, other values as JSON (`42`, `true`, `["a", "b"]`); null is left out.
    """
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in entry.items()
        if name not in ("id", "prompt") and value is not None
    }


def distinct(prompts: list[Prompt]) -> tuple[list[Prompt], list[str]]:
    """The first prompt of each wording, and the ids of the others: a question must not be held out and trained on."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(wording(prompt.text), prompt)
    kept = {prompt.id for prompt in first.values()}
    return list(first.values()), [prompt.id for prompt in prompts if prompt.id not in kept]


def _refused(character: str) -> bool:
    return character in "/#>" or unicodedata.category(character) in REFUSED


class Dealt(NamedTuple):
    """Prompts that are set aside, to report and to decide on candidates, and those of each iteration."""

    heldout: list[Prompt]
    validation: list[Prompt]
    hands: list[list[Prompt]]


def deal(prompts: list[Prompt], config: Config, seen: Collection[str] = ()) -> Dealt:
    """Deal the prompts out in an order that depends on ids and seed alone.

    Prompts whose wording (`records.wording`) is in `seen`, because the run trains on it anyway, are not set aside. An
    iteration that answers no prompts (supervised fine-tuning on existing data) gets none. Without `prompts.reuse` no
    prompt is dealt twice; with it, no prompt repeats until all have been used. Raises ConfigError when there are too
    few.
    """
    hand_sizes = [
        step.config.prompts.per_iteration if step.recipe.answers_prompts(step.config) else 0 for step in config.planned
    ]
    heldout, validation = config.prompts.heldout, config.prompts.validation
    aside = heldout + validation
    needed = aside + (max(hand_sizes) if config.prompts.reuse else sum(hand_sizes))
    if needed > len(prompts):
        chosen_by = f"{validation} for validation, " if validation else ""
        iterations = sum(size > 0 for size in hand_sizes)
        each = " or ".join(str(size) for size in sorted({*hand_sizes} - {0}))
        raise ConfigError(
            f"prompts.path={config.prompts.path}: {len(prompts)} usable prompts, but {needed} are needed "
            f"({heldout} held out, {chosen_by}{each} for each of {iterations} iterations); add prompts, "
            "lower prompts.per_iteration or set prompts.reuse=true"
        )
    order = sorted(prompts, key=lambda prompt: prompt.id)
    random.Random(f"prompts {config.seed}").shuffle(order)
    unseen = [prompt for prompt in order if wording(prompt.text) not in seen] if seen else order
    if aside > len(unseen):
        raise ConfigError(
            f"prompts.path={config.prompts.path}: the steps train on {len(order) - len(unseen)} of {len(order)} "
            f"usable prompts, and the others are fewer than prompts.heldout={heldout} and prompts.validation="
            f"{validation} together; add prompts, or lower these"
        )
    held = {prompt.id for prompt in unseen[:aside]}
    rest = [prompt for prompt in order if prompt.id not in held]
    hands: list[list[Prompt]] = []
    deck: list[Prompt] = []
    for iteration, wanted in enumerate(hand_sizes):
        if len(deck) < wanted:
            again = list(rest)
            random.Random(f"prompts {config.seed} {iteration}").shuffle(again)
            # The rest of the old deck is in this hand, so in the new deck it comes later.
            old = {prompt.id for prompt in deck}
            hand = deck + [prompt for prompt in again if prompt.id not in old][: wanted - len(deck)]
            had = {prompt.id for prompt in hand} - old
            hands.append(hand)
            deck = [prompt for prompt in again if prompt.id not in had]
        else:
            hands.append(deck[:wanted])
            deck = deck[wanted:]
    return Dealt(unseen[:heldout], unseen[heldout:aside], hands)


def usable(
    prompts: list[Prompt], lengths: Mapping[str, int], needs: Mapping[str, int], config: Config
) -> tuple[list[Prompt], list[str]]:
    """Prompts whose tokens leave room for everything asked about them, and the ids of the others.

    `lengths` are the tokens of each prompt by id, `needs` the tokens that each kind of request takes besides: an answer
    that could be sampled but not judged would never take part in a pair. Raises ConfigError where
    there is no room for any prompt.
    """
    most = max(needs, key=lambda name: needs[name])
    room = config.engine.max_model_len - needs[most]
    if room <= 0:
        raise ConfigError(
            f"engine.max_model_len={config.engine.max_model_len} leaves no room for a prompt: {most} takes "
            f"{needs[most]} tokens beside it; raise engine.max_model_len, or lower the max_tokens of sample, judge, "
            "meta or evaluate"
        )
    long = [prompt.id for prompt in prompts if lengths[prompt.id] > room]
    left_out = set(long)
    return [prompt for prompt in prompts if prompt.id not in left_out], long
