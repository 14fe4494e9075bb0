"""The prompts of a run: read, checked, and dealt out by seed: those set aside first, then a hand per iteration."""

import json
import os
import random
import unicodedata
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from rsrlm.config import Config
from rsrlm.records import Prompt, wording
from rsrlm.settings.base import ConfigError
from rsrlm.settings.methods import Prompts

BUILTIN = "builtin"
OWN = {BUILTIN: "instructions.jsonl", "arithmetic": "arithmetic.jsonl"}  # files of the project
REFUSED = ("Cc", "Zl", "Zp")  # Unicode categories of control characters and line breaks; seeds are separated by one


def file_of(prompts: Prompts) -> Path:
    if prompts.path in OWN:
        return Path(str(resources.files("rsrlm"))) / "assets" / "prompts" / OWN[prompts.path]
    return Path(os.path.expanduser(prompts.path))  # Path's own raises for a user that is not there


def read(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file with `id` and `prompt` per line; its other texts and numbers are the prompt's data, such
    as `answer`. Raises ConfigError with the line number."""
    try:
        # Not splitlines: JSON texts may hold U+2028 and its like as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts.path={path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(
            f"prompts.path={path}: {error.strerror}; give a JSONL file with id and prompt per line, or {BUILTIN!r}"
        ) from None
    found: dict[str, tuple[Prompt, int]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"prompts.path={path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(entry, dict) or not entry.keys() >= {"id", "prompt"}:
            raise ConfigError(f'{where}: must be an object such as {{"id": "tea", "prompt": "Describe tea."}}')
        identifier, text = entry["id"], entry["prompt"]
        if not isinstance(identifier, str) or not identifier or any(map(_refused, identifier)):
            raise ConfigError(
                f"{where}: id {identifier!r} must be a text without / # >, line breaks and control characters"
            )
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: prompt of {identifier!r} must be a text that is not empty")
        data = {
            name: str(value)
            for name, value in entry.items()
            if name not in ("id", "prompt") and isinstance(value, str | int | float) and not isinstance(value, bool)
        }
        everything = "".join((identifier, text, *data, *data.values()))
        if lone := [character for character in everything if unicodedata.category(character) == "Cs"]:
            # JSON can write it, UTF-8 cannot: no journal could take it.
            raise ConfigError(f"{where}: {lone[0]!r} is half a surrogate pair; write the whole character")
        if identifier in found:
            raise ConfigError(
                f"{where}: id {identifier!r} stands in line {found[identifier][1]} already; ids are unique"
            )
        found[identifier] = (Prompt(id=identifier, text=text, data=data), number)
    if not found:
        raise ConfigError(f"prompts.path={path}: no prompts in it; write one JSON object with id and prompt per line")
    return [prompt for prompt, _ in found.values()]


def distinct(prompts: list[Prompt]) -> tuple[list[Prompt], list[str]]:
    """The first prompt of every wording, and the ids of the others: a question must not be held out and trained on."""
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
    iteration that answers none (supervised fine-tuning on data that is there) gets none. Without `prompts.reuse` no
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
            # The last cards of the old deck are in this hand, so their turns in the new one come later.
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
    """Prompts whose tokens leave room for all that is asked about them, and the ids of the others.

    `lengths` counts the tokens of each prompt's text by id, `needs` those that each kind of request takes beside it: an
    answer that could be sampled but not judged would never take part in a pair. Raises ConfigError where
    prompts.overlong=error, and where there is no room for any prompt.
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
    if long and config.prompts.overlong == "error":
        raise ConfigError(
            f"prompt {long[0]!r} has {lengths[long[0]]} tokens, more than the {room} that engine.max_model_len="
            f"{config.engine.max_model_len} leaves beside the {needs[most]} of {most}; raise it, shorten the prompt or "
            "set prompts.overlong=drop"
        )
    left_out = set(long)
    return [prompt for prompt in prompts if prompt.id not in left_out], long
