"""The prompts of a run: read, checked, and dealt out by seed: held-out ones first, then a hand per iteration."""

import json
import random
from importlib import resources
from pathlib import Path

from rsrlm.config import Config, ConfigError, Prompts
from rsrlm.records import Prompt

BUILTIN = "builtin"


def file_of(prompts: Prompts) -> Path:
    if prompts.path == BUILTIN:
        return Path(str(resources.files("rsrlm"))) / "assets" / "prompts" / "instructions.jsonl"
    return Path(prompts.path).expanduser()


def read(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file with `id` and `prompt` per line. Raises ConfigError with the line number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
        if not isinstance(entry, dict) or set(entry) < {"id", "prompt"}:
            raise ConfigError(f'{where}: must be an object such as {{"id": "tea", "prompt": "Describe tea."}}')
        identifier, text = entry["id"], entry["prompt"]
        if not isinstance(identifier, str) or not identifier or any(c in identifier for c in "/#>\n\x1f"):
            raise ConfigError(f"{where}: id {identifier!r} must be a text without / # > and line breaks")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: prompt of {identifier!r} must be a text that is not empty")
        if identifier in found:
            raise ConfigError(f"{where}: id {identifier!r} stands in line {found[identifier][1]} already; ids are unique")
        found[identifier] = (Prompt(id=identifier, text=text), number)
    if not found:
        raise ConfigError(f"prompts.path={path}: no prompts in it; write one JSON object with id and prompt per line")
    return [prompt for prompt, _ in found.values()]


def deal(prompts: list[Prompt], config: Config) -> tuple[list[Prompt], list[list[Prompt]]]:
    """Held-out prompts, and the prompts of each iteration: an order that depends on ids and seed alone.

    Without `prompts.reuse` no prompt is dealt twice. Raises ConfigError when there are too few.
    """
    wanted, heldout = config.prompts.per_iteration, config.prompts.heldout
    needed = heldout + wanted * (1 if config.prompts.reuse else config.iterations)
    if needed > len(prompts):
        raise ConfigError(
            f"prompts.path={config.prompts.path}: {len(prompts)} usable prompts, but {needed} are needed "
            f"({heldout} held out, {wanted} for each of {config.iterations} iterations); add prompts, lower "
            "prompts.per_iteration or set prompts.reuse=true"
        )
    order = sorted(prompts, key=lambda prompt: prompt.id)
    random.Random(f"prompts {config.seed}").shuffle(order)
    held, rest = order[:heldout], order[heldout:]
    hands: list[list[Prompt]] = []
    deck: list[Prompt] = []
    for iteration in range(config.iterations):
        if len(deck) < wanted:
            leftover = {prompt.id for prompt in deck}
            again = [prompt for prompt in rest if prompt.id not in leftover]
            random.Random(f"prompts {config.seed} {iteration}").shuffle(again)
            deck = deck + again
        hands.append(deck[:wanted])
        deck = deck[wanted:]
    return held, hands


def usable(prompts: list[Prompt], lengths: dict[str, int], config: Config) -> tuple[list[Prompt], list[str]]:
    """Prompts whose tokens leave room for the answer, and the ids of the others.

    `lengths` counts the tokens of the whole chat prompt by id. Raises ConfigError where prompts.overlong=error.
    """
    room = config.engine.max_model_len - max(config.sample.max_tokens, config.evaluate.max_tokens)
    long = [prompt.id for prompt in prompts if lengths[prompt.id] > room]
    if long and config.prompts.overlong == "error":
        raise ConfigError(
            f"prompt {long[0]!r} has {lengths[long[0]]} tokens, more than the {room} that engine.max_model_len="
            f"{config.engine.max_model_len} leaves beside max_tokens; raise it, shorten the prompt or set "
            "prompts.overlong=drop"
        )
    left_out = set(long)
    return [prompt for prompt in prompts if prompt.id not in left_out], long
