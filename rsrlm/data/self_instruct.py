"""New prompts by Self-Instruct (arXiv 2212.10560), as Self-Rewarding uses it (arXiv 2401.10020v3, Sec. 2.2, App. A.5).

A model sees a numbered list of eight prompts and continues it; what it wrote is split, filtered, and kept where it is
not too similar to any prompt before. Everything here depends on texts, seeds and request numbers alone.
"""

import hashlib
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rsrlm.settings.base import ConfigError

HEADER = "Continue this numbered list of varied, open-ended tasks that people give to an assistant:"
CUT = "cut off by the length limit"
TOO_SIMILAR = "too similar to another prompt"

# Self-Instruct's, without the space after it: that could be the line break before the next number.
_NUMBER = re.compile(r"\n\d+\s?\.")
_TOKEN = re.compile(r"[a-z0-9]+")
# A line that starts with a rule or with a word that announces answers, perhaps as an item of the list.
_SEPARATOR = re.compile(
    r"^[ \t]*+(?:\d+\s?\.[ \t]*+)?"
    r"(?:[-=#*—]{3}|[*_# \t]*+(?:answers?|responses?|solutions?)[ \t]*\d*[*_ \t]*(?::|\r?$))",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a new prompt must not be: Self-Instruct's post-processing. Words are separated by whitespace.

    Of `keywords` only whole words count, in upper or lower case: they ask for what a text model cannot see or do.
    """

    min_words: int = 3  # must have more
    max_words: int = 150  # may have as many
    keywords: tuple[str, ...] = (
        *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
        *("draw", "plot", "go to"),
    )
    forbidden_starts: tuple[str, ...] = ("Write a program",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a model wrote after the text of one request.

    `request` is the number that chose the demonstrations, `cut` says that the length limit ended it, `model` names
    who wrote it and `demonstrations` the ids of the prompts that it was shown, in their order.
    """

    request: int
    text: str
    cut: bool
    model: str
    demonstrations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedPrompt:
    """A new prompt and where it comes from: item `index` (from 0) of what `model` wrote to request `request`."""

    id: str
    text: str
    request: int
    index: int
    model: str
    demonstrations: tuple[str, ...]


def demonstrations(
    seed_prompts: Sequence[str],
    generated: Sequence[str],
    *,
    seed: int,
    batch: int,
    from_seeds: int = 6,
    from_generated: int = 2,
) -> list[str]:
    """What request number `batch` shows: different seed prompts and generated ones, shuffled.

    Works on texts and on ids alike. While there are too few generated ones, seed prompts take their place. Depends on
    the order of both lists, so give generated ones as `select` ordered them. Raises ConfigError for too few seeds.
    """
    rng = random.Random(f"self-instruct {seed} {batch}")
    new = rng.sample(generated, min(from_generated, len(generated)))
    wanted = from_seeds + from_generated - len(new)
    if wanted > len(seed_prompts):
        raise ConfigError(
            f"prompts.path: {len(seed_prompts)} prompts to write new ones from, but a request shows {wanted} of them; "
            "add prompts"
        )
    chosen = rng.sample(seed_prompts, wanted) + new
    rng.shuffle(chosen)
    return chosen


def request_text(demonstrations: Sequence[str]) -> str:
    """The text to complete: a header, the prompts on numbered lines, and the next number."""
    lines = [f"{n}. {_one_line(text).rstrip(': ')}" for n, text in enumerate(demonstrations, start=1)]
    return "\n".join([HEADER, *lines, f"{len(lines) + 1}."])


def split(completion: str, cut: bool, *, cut_at_separator: bool = False) -> list[str]:
    """The prompts of a continued list: whitespace collapsed, first letter in upper case, empty ones left out.

    With `cut` (by the length limit) the last item is not whole and is left out. `cut_at_separator` is for a model that
    is trained to answer: it tends to write some prompts, then a separator such as `---`, `###`, `===` or `Answer:` on
    a line of its own, then answers (2401.10020v3, App. A.5); only what stands before counts, and that is whole.
    """
    if cut_at_separator and (separator := _SEPARATOR.search(completion)):
        completion, cut = completion[: separator.start()], False
    # The line break is for a model that writes once more the number that the request ended with.
    items = _NUMBER.split("\n" + completion.lstrip())
    if cut:
        items.pop()
    return [_capitalised(text) for text in map(_one_line, items) if text]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _capitalised(text: str) -> str:
    """Only the first letter: str.capitalize would turn NASA into nasa. Others than ASCII may become two letters."""
    return (text[0].upper() if text[0].isascii() else text[0]) + text[1:]


def refused(text: str, filters: Filters) -> str:
    """Why a prompt, as `split` returns it, is not good enough: a short text that is counted, or "" if it is."""
    words = len(text.split())
    if words <= filters.min_words:
        return "too short"
    if words > filters.max_words:
        return "too long"
    if (keywords := _any_of(filters.keywords)) and keywords.search(text):
        return "asks for what a text model cannot do"
    if text.casefold().startswith(tuple(start.casefold() for start in filters.forbidden_starts)):
        return "forbidden start"
    if text[0] in string.punctuation:
        return "starts with punctuation"
    if not text[0].isascii():
        return "starts with a non-ASCII character"
    if any(character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cs") for character in text):
        return "broken character"  # a byte-level tokenizer can write bytes that are no text
    return ""


@cache
def _any_of(keywords: tuple[str, ...]) -> re.Pattern[str] | None:
    words = (r"\s+".join(map(re.escape, keyword.split())) for keyword in keywords if keyword.strip())
    either = "|".join(words)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE) if either else None


class Pool:
    """Prompts of which no new one is too similar to any other.

    Similar is the F-measure of ROUGE-L, 2 LCS / (m + n), over the tokens that the `rouge_score` package makes without
    stemming: runs of a-z and 0-9 in lower case; m and n are their numbers, LCS is the length of the longest common
    subsequence. It is 0 for a text without tokens. Compared exactly: F = max_rouge is not too similar. An equal text
    always is.

    Every different token becomes one character and every prompt a string, which RapidFuzz compares some 10 million
    times per second; the strings are kept by their length, as most lengths are too different to be similar. Adding to
    a pool takes time in proportion to its size. Raises ValueError beyond 1,114,112 different tokens.
    """

    def __init__(self, known: Iterable[str] = (), *, max_rouge: float = 0.7) -> None:
        """`known` prompts are in it however similar they are to each other."""
        self._max_rouge = max_rouge
        self._characters: dict[str, str] = {}
        self._texts: set[str] = set()
        # Of each length the strings, and beside them (place in the order of adding, text).
        self._strings: dict[int, list[str]] = {}
        self._places: dict[int, list[tuple[int, str]]] = {}
        for text in known:
            self._keep(text, self._encode(text))

    def add(self, text: str) -> str | None:
        """None if the text is in now, else what keeps it out: an equal prompt, or the first of the most alike."""
        if text in self._texts:
            return text
        encoded = self._encode(text)
        similar = self._most_similar(encoded)
        if similar is None:
            self._keep(text, encoded)
        return similar

    def _encode(self, text: str) -> str:
        known = self._characters
        return "".join([known.setdefault(token, chr(len(known))) for token in _TOKEN.findall(text.lower())])

    def _keep(self, text: str, encoded: str) -> None:
        if text not in self._texts:
            self._strings.setdefault(len(encoded), []).append(encoded)
            self._places.setdefault(len(encoded), []).append((len(self._texts), text))
            self._texts.add(text)

    def _most_similar(self, encoded: str) -> str | None:
        from rapidfuzz.distance import LCSseq
        from rapidfuzz.process import extractOne

        best: tuple[float, int, str] | None = None
        for length, strings in self._strings.items():
            total = len(encoded) + length
            needed = _needed(total, self._max_rouge)
            if needed > min(len(encoded), length):
                continue
            # The first of several equally similar ones.
            found: Any = extractOne(encoded, strings, scorer=LCSseq.similarity, score_cutoff=needed)
            if found is not None:
                _, common, index = found
                place, text = self._places[length][index]
                one = (-2 * int(common) / total, place, text)
                best = one if best is None else min(best, one)
        return None if best is None else best[2]


@cache
def _needed(total: int, max_rouge: float) -> int:
    """The smallest LCS that is too similar for two prompts of together `total` tokens; at least 1."""
    common = max(1, int(max_rouge * total / 2) - 1)
    # The division of integers is rounded once, so that 14 / 20 is the same float as 0.7.
    while total and 2 * common / total <= max_rouge:
        common += 1
    return common


def select(
    continuations: Iterable[Continuation], pool: Pool, filters: Filters, *, cut_at_separator: bool = False
) -> tuple[list[GeneratedPrompt], Counter[str]]:
    """The new prompts, and how many items were left out for which reason. The new ones are in the pool afterwards.

    In order of the request numbers, whatever the order of arrival. Raises ValueError if two have the same number.
    """
    kept: list[GeneratedPrompt] = []
    reasons: Counter[str] = Counter()
    last: int | None = None
    for one in sorted(continuations, key=lambda one: one.request):
        if one.request == last:
            raise ValueError(f"two continuations of request {one.request}")
        last = one.request
        texts = split(one.text, one.cut, cut_at_separator=cut_at_separator)
        if cut := len(split(one.text, False, cut_at_separator=cut_at_separator)) - len(texts):
            reasons[CUT] += cut
        for index, text in enumerate(texts):
            reason = refused(text, filters) or (TOO_SIMILAR if pool.add(text) is not None else "")
            if reason:
                reasons[reason] += 1
                continue
            kept.append(
                GeneratedPrompt(
                    id=id_of(text),
                    text=text,
                    request=one.request,
                    index=index,
                    model=one.model,
                    demonstrations=one.demonstrations,
                )
            )
    return kept, reasons


def id_of(text: str) -> str:
    """The id of a generated prompt: of the same text the same, in any run."""
    return f"generated-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
