"""Documents without labels: read, cut into pieces at paragraph borders, and what a model asks about a piece.

Everything here depends on texts alone, so that a run that goes on finds the same pieces under the same ids.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rsrlm.chat import ChatEncoder
from rsrlm.data import files, prompts
from rsrlm.data.self_instruct import any_of
from rsrlm.records import NoPair, Prompt
from rsrlm.settings.base import ConfigError

SUFFIXES = (".jsonl", ".txt", ".md")
REMEDY = "give a .jsonl file with id and text per line, a .txt or .md file, or a folder of such files"

# Where a text is cut, the first where that is enough: behind paragraphs, sentences, words, characters.
BORDERS = tuple(map(re.compile, (r"\n[^\S\n]*\n\s*", r"""(?<=[.!?…])["'”’»)\]]*\s+|[。！？]+|\n""", r"\s+", r"(?s:.)")))
FORM = r"Question: [^\n?]+\?\nAnswer: [^\n]+"  # of what `asked` reads, where an engine holds a model to it
# A second one is found though it be numbered or in bold: what follows it belongs to another question.
_LABEL = re.compile(r"^[\s*_#>-]*(question|answer)[ \t]*\d*[.*_ \t]*:[*_]*", re.IGNORECASE | re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a model wrote about a piece that it had read."""

    question: str
    answer: str


def read(source: str, key: str = "documents") -> tuple[Document, ...]:
    """The documents of a file, or of the files in a folder and in those below it, in the order of their names.

    A .txt or .md file is one document, and its name is the id. `key` is the config's. Raises ConfigError.
    """
    path = Path(os.path.expanduser(source))
    paths = [path]
    if path.is_dir():
        paths = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
        paths = [one for one in paths if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        if not paths:
            raise ConfigError(f"{key}={source}: no {', '.join(SUFFIXES)} file in this folder; {REMEDY}")
    elif path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{key}={source}: neither a folder nor one of {', '.join(SUFFIXES)}; {REMEDY}")
    found: list[Document] = []
    places: dict[str, str] = {}
    for one in paths:
        for where, identifier, text in _entries(one, path, key):
            if path.is_dir() and isinstance(text, str) and not text.strip():
                continue  # an empty file beside others
            prompts.check(identifier, text, where, name="text")
            if identifier in places:
                raise ConfigError(f"{where}: id {identifier!r} is that of {places[identifier]} already; ids are unique")
            places[identifier] = where.removeprefix(f"{key}=")
            found.append(Document(id=identifier, text=text))
    return tuple(found)


def _entries(path: Path, root: Path, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Of each document where it stands, its id, and its text."""
    if path.suffix.lower() != ".jsonl":
        # A path within the folder, without the character that ids must not have.
        name = "_".join(path.relative_to(root).parts) if path != root else path.name
        yield f"{key}={path}", name, files.text(path, key, REMEDY).removeprefix("\ufeff")
        return
    empty = True
    for number, entry in files.jsonl(path, key, REMEDY):
        empty, where = False, f"{key}={path}, line {number}"
        if not isinstance(entry, dict) or not entry.keys() >= {"id", "text"}:
            raise ConfigError(f'{where}: must be an object such as {{"id": "tea", "text": "Tea is a drink."}}')
        yield where, entry["id"], entry["text"]
    if empty:
        raise ConfigError(f"{key}={path}: no documents in it; write one JSON object with id and text per line")


@lru_cache(maxsize=2)  # all steps of a run that read the same documents
def pieces(documents: tuple[Document, ...], most: int, encoder: ChatEncoder) -> tuple[Prompt, ...]:
    """The documents in pieces of at most `most` tokens: `tea-0`, `tea-1`, ... of the document `tea`."""
    chat = len(encoder.user(""))

    def length(text: str) -> int:
        return len(encoder.user(text)) - chat

    return tuple(
        Prompt(id=f"{document.id}-{number}", text=text)
        for document in documents
        for number, text in enumerate(cut(document.text, most, length))
    )


def cut(text: str, most: int, length: Callable[[str], int], borders: Sequence[re.Pattern[str]] = BORDERS) -> list[str]:
    """The text in pieces as long as may be, without the white space around them. A part that is too long by itself is
    cut at the next kind of border."""
    places = sorted({0, *(match.end() for match in borders[0].finditer(text)), len(text)})
    parts = [text[start:end] for start, end in pairwise(places)]
    made, first = [], 0
    while first < len(parts):
        number = _fitting(parts, first, most, length)
        if number:
            made.append("".join(parts[first : first + number]).strip())
        else:
            made += cut(parts[first], most, length, borders[1:])
        first += max(1, number)
    return [piece for piece in made if piece]


def _fitting(parts: Sequence[str], first: int, most: int, length: Callable[[str], int]) -> int:
    """How many parts from the first on fit together. A few lengths are taken and not all: tokens add up nearly."""

    def together(number: int) -> int:
        return length("".join(parts[first : first + number]).strip())

    number, left = 1, len(parts) - first
    while number < left and together(number) <= most:
        number *= 2
    return bisect_right(range(1, min(number, left) + 1), most, key=together)


def asked(text: str) -> Asked | NoPair:
    """The question and the answer of a text that consists of one block of each, in this order; else the reason."""
    found = list(_LABEL.finditer(text))
    labels = [match[1].casefold() for match in found]
    for label in ("question", "answer"):
        if labels.count(label) != 1:
            return NoPair(reason=f"several {label}s" if label in labels else f"no {label}")
    first, second = found
    question, answer = text[first.end() : second.start()].strip(), text[second.end() :].strip()
    if labels[0] == "answer":
        return NoPair(reason="answer before question")
    if text[: first.start()].strip():
        return NoPair(reason="text before the question")
    if not question or not answer:
        return NoPair(reason="empty answer" if question else "empty question")
    return Asked(question=question, answer=answer)


def refused(found: Asked, piece: str, pointing: Sequence[str], least_overlap: float) -> str:
    """Why a question and its answer are of no use without the piece, or ""."""
    points = any_of(tuple(pointing))
    if points and points.search(found.question):
        return "question points into the text"
    if overlap(found.answer, piece) < least_overlap:
        return "answer not in the text"
    return ""


def overlap(answer: str, piece: str) -> float:
    """The share of the answer's words that occur in the piece, whatever their case; 0 without words."""
    words, known = _WORD.findall(answer.casefold()), set(_WORD.findall(piece.casefold()))
    return sum(word in known for word in words) / len(words) if words else 0.0
