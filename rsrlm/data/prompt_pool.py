"""Prompts that are not too similar to each other, by ROUGE-L as in Self-Instruct (arXiv 2212.10560)."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

_TOKEN = re.compile(r"[a-z0-9]+")


def rouge_l(one: str, other: str) -> float:
    """F-measure of ROUGE-L of two texts, as in `PromptPool`."""
    from rapidfuzz.distance import LCSseq

    tokens = [_TOKEN.findall(text.lower()) for text in (one, other)]
    length = sum(map(len, tokens))
    return 2 * LCSseq.similarity(*tokens) / length if length else 0.0


class PromptPool:
    """Prompts of which no new one is too similar to any other.

    Similar is the F-measure of ROUGE-L, 2 LCS / (m + n), over the tokens that the `rouge_score` package makes without
    stemming: runs of a-z and 0-9 in lower case; m and n are their numbers, LCS is the length of the longest common
    subsequence. It is 0 for a text without tokens. Compared exactly: F = max_rouge is not too similar. An equal text
    always is.

    Every different token becomes one character and every prompt a string, and RapidFuzz compares some 10 million of
    these per second; the strings are kept by their length, as most lengths are too different to be similar. Adding to
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
        """None if the text was added, else what keeps it out: an equal prompt, or the first of the most similar."""
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
            match: Any = extractOne(encoded, strings, scorer=LCSseq.similarity, score_cutoff=needed)
            if match is not None:
                _, common, index = match
                candidate = (-2 * int(common) / total, *self._places[length][index])
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[2]


@cache
def _needed(total: int, max_rouge: float) -> int:
    """The smallest LCS that is too similar for two prompts of together `total` tokens; at least 1."""
    common = max(1, int(max_rouge * total / 2) - 1)
    # The division of integers is rounded once, so that 14 / 20 is the same float as 0.7.
    while total and 2 * common / total <= max_rouge:
        common += 1
    return common
