"""What all sections of a config are made of: frozen, strict, and with errors that name key, value and remedy."""

import importlib
import math
import os
import re
import sys
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class ConfigError(Exception):
    """A user's mistake in configuration or input; the message says what to do about it. Exit code 2."""


class NotYet(ConfigError):
    """What stands in the way may be gone when the same is tried again: a host that has not joined, another process."""


def first_line(error: BaseException) -> str:
    """What an error says, without what libraries write below it; its type where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def last_line(error: BaseException) -> str:
    """The same of an error that came with a stack trace, as those of Ray's workers do."""
    return (str(error).strip() or repr(error)).splitlines()[-1].strip()[:300]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _whole_number_is_a_float(value: Any) -> Any:
    """YAML writes 1 for 1.0, and PyYAML reads 1e-6 (no dot) as a string: both are plainly numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # the same as 1e999, which is refused
            return math.inf
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


Number = Annotated[float, BeforeValidator(_whole_number_is_a_float)]


JUDGES = {
    "text": "rsrlm.judges.rubric:Text",
    "structured": "rsrlm.judges.rubric:Structured",
    "digits": "rsrlm.judges.digits:Digits",
    "yes_no": "rsrlm.judges.yes_no:YesNo",
    "true_false": "rsrlm.judges.true_false:TrueFalse",
    "function": "rsrlm.judges.function:Function",
    "answer": "rsrlm.judges.answers:RightAnswer",
}
RECIPES = {
    "sft": "rsrlm.recipes.sft:SFT",
    "self_rewarding": "rsrlm.recipes.self_rewarding:SelfRewarding",
    "meta_rewarding": "rsrlm.recipes.meta_rewarding:MetaRewarding",
    "irpo": "rsrlm.recipes.irpo:Irpo",
    "scpo": "rsrlm.recipes.scpo:Scpo",
    "temporal": "rsrlm.recipes.temporal:Temporal",
    "cream": "rsrlm.recipes.cream:Cream",
    "scir": "rsrlm.recipes.scir:Scir",
    "dice": "rsrlm.recipes.dice:Dice",
    "oaif": "rsrlm.recipes.oaif:Oaif",
    "open_book": "rsrlm.recipes.autonomous:OpenBook",
    "closed_book": "rsrlm.recipes.autonomous:ClosedBook",
    "sppo": "rsrlm.recipes.sppo:Sppo",
    "thinking": "rsrlm.recipes.thinking:Thinking",
    "self_j": "rsrlm.recipes.self_j:SelfJ",
    "spin": "rsrlm.recipes.spin:Spin",
    "dno": "rsrlm.recipes.dno:Dno",
    "self_taught": "rsrlm.recipes.self_taught:SelfTaught",
    "self_taught_dpo": "rsrlm.recipes.self_taught:SelfTaughtDPO",
    "spar": "rsrlm.recipes.spar:Spar",
    "alpha_llm": "rsrlm.recipes.alpha_llm:AlphaLLM",
    "process": "rsrlm.recipes.process:ProcessBased",
}


def plugin(name: str, known: dict[str, str], key: str) -> Any:
    """The class that a short name or `package.module:Class` names; the latter may lie in the working directory.

    Raises ConfigError with the key.
    """
    module, colon, attribute = known.get(name, name).partition(":")
    if not colon:
        raise ConfigError(f"{key}={name!r}: known here: {', '.join(known)}, or package.module:Class of your own")
    if name not in known and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file of the user's must not run in the place of a library
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"{key}={name!r}: {error}; give package.module:Class of a module that can be imported"
        ) from None
