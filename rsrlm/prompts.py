"""The prompts of a run: read, checked, and dealt out by seed: held-out ones first, then a hand per iteration."""

import json
import os
import random
import unicodedata
from importlib import resources
from pathlib import Path

from rsrlm.config import Config, ConfigError, Prompts
from rsrlm.records import Prompt

BUILTIN = "builtin"
REFUSED = ("Cc", "Zl", "Zp")  # Unicode categories of control characters and line breaks; seeds are separated by one


def file_of(prompts: Prompts) -> Path:
    if prompts.path == BUILTIN:
        return Path(str(resources.files("rsrlm"))) / "assets" / "prompts" / "instructions.jsonl"
    return Path(os.path.expanduser(prompts.path))  # Path's own raises for a user that is not there


def read(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file with `id` and `prompt` per line. Raises ConfigError with the line number."""
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
        if lone := [character for character in identifier + text if unicodedata.category(character) == "Cs"]:
            # JSON can write it, UTF-8 cannot: no journal could take it.
            raise ConfigError(f"{where}: {lone[0]!r} is half a surrogate pair; write the whole character")
        if identifier in found:
            raise ConfigError(
                f"{where}: id {identifier!r} stands in line {found[identifier][1]} already; ids are unique"
            )
        found[identifier] = (Prompt(id=identifier, text=text), number)
    if not found:
        raise ConfigError(f"prompts.path={path}: no prompts in it; write one JSON object with id and prompt per line")
    return [prompt for prompt, _ in found.values()]


def _refused(character: str) -> bool:
    return character in "/#>" or unicodedata.category(character) in REFUSED


def deal(prompts: list[Prompt], config: Config) -> tuple[list[Prompt], list[list[Prompt]]]:
    """Held-out prompts, and the prompts of each iteration: an order that depends on ids and seed alone.

    An iteration that answers none (supervised fine-tuning on data that is there) gets none. Without `prompts.reuse` no
    prompt is dealt twice; with it, all have had a turn before one has the next. Raises ConfigError when there are too
    few.
    """
    sizes = [(step.prompts.per_iteration if answers(step) else 0, number) for step, number in config.distinct]
    heldout = config.prompts.heldout
    needed = heldout + (max(size for size, _ in sizes) if config.prompts.reuse else sum(s * n for s, n in sizes))
    if needed > len(prompts):
        each = " or ".join(str(size) for size in sorted({size for size, _ in sizes if size}))
        raise ConfigError(
            f"prompts.path={config.prompts.path}: {len(prompts)} usable prompts, but {needed} are needed "
            f"({heldout} held out, {each} for each of {sum(number for size, number in sizes if size)} iterations); add "
            "prompts, lower prompts.per_iteration or set prompts.reuse=true"
        )
    hand_sizes = [size for size, number in sizes for _ in range(number)]
    order = sorted(prompts, key=lambda prompt: prompt.id)
    random.Random(f"prompts {config.seed}").shuffle(order)
    held, rest = order[:heldout], order[heldout:]
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
    return held, hands


def answers(step: Config) -> bool:
    """Whether an iteration answers prompts: always but for supervised fine-tuning on data that is there already."""
    return step.train.method == "dpo" or any(source.path == "positive" for source in step.sft.sources)


def usable(prompts: list[Prompt], lengths: dict[str, int], config: Config) -> tuple[list[Prompt], list[str]]:
    """Prompts whose tokens leave room for the answer, and the ids of the others.

    `lengths` counts the tokens of the whole chat prompt by id. Raises ConfigError where prompts.overlong=error.
    """
    longest = max(step.sample.max_tokens for step, _ in config.distinct)
    room = config.engine.max_model_len - max(longest, config.evaluate.max_tokens)
    long = [prompt.id for prompt in prompts if lengths[prompt.id] > room]
    if long and config.prompts.overlong == "error":
        raise ConfigError(
            f"prompt {long[0]!r} has {lengths[long[0]]} tokens, more than the {room} that engine.max_model_len="
            f"{config.engine.max_model_len} leaves beside max_tokens; raise it, shorten the prompt or set "
            "prompts.overlong=drop"
        )
    left_out = set(long)
    return [prompt for prompt in prompts if prompt.id not in left_out], long
