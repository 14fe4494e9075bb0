"""What the shapes of ranked data have in common: messages, fields of the right type, ids that records can hold."""

import hashlib
import math
import reprlib
import unicodedata
from typing import Any, NamedTuple

from rsrlm.settings.base import ConfigError


class Message(NamedTuple):
    """A question or a reply as its source has it; `refused` says why it is left out, as far as its shape can tell."""

    id: str
    text: str
    rank: float | None = None
    language: str | None = None
    synthetic: bool = False
    refused: str | None = None


Conversation = tuple[Message, list[Message]]  # a question and the replies to it


def typed(record: Any, name: str, kind: type, where: str, *, optional: bool = False, null: bool = False) -> Any:
    """A field of a record. It may be null with `null`, and null or absent with `optional`. Raises ConfigError."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: must be an object with {name}, not {reprlib.repr(record)}")
    if name not in record and not optional:
        raise ConfigError(f"{where}: has no {name}; its keys are {reprlib.repr(sorted(record))}")
    value = record.get(name)
    if not isinstance(value, kind) and not ((optional or null) and value is None):
        kinds = {str: "a text", bool: "true or false", list: "a list"}
        raise ConfigError(f"{where}: {name} must be {kinds[kind]}, not {reprlib.repr(value)}")
    return value


def number(value: Any, what: str) -> float | None:
    """None for null and for NaN, which pandas makes of null. Raises ConfigError for what is no finite number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    except OverflowError:
        pass
    raise ConfigError(f"{what} must be a finite number or null, not {reprlib.repr(value)}")


def record_id(raw: str) -> str:
    """The id itself, or a hash of it where ids of records cannot hold it."""
    fits = raw and writable(raw) and not any(c in "/#>" or unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in raw)
    return raw if fits else digest(raw)


def writable(text: str) -> bool:
    """Whether UTF-8 can write it; JSON can hold half a surrogate pair, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(*texts: str) -> str:
    return hashlib.blake2b("\x1f".join(texts).encode(errors="surrogatepass"), digest_size=12).hexdigest()
