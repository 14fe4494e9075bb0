"""What an iteration left behind, as columns of numbers: memory holds neither the records nor their texts."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeAlias

import numpy as np

from rsrlm.judges.base import mean_verdicts
from rsrlm.judges.verdicts import Form, claimed
from rsrlm.pairing import TIE
from rsrlm.records import Group, Judgement, PreferencePair, Preferred, Response, Scored, Unparsed, Verdict
from rsrlm.report.metrics import distinct_n

Floats: TypeAlias = "array[float]"
Hashes: TypeAlias = "array[int]"


def floats() -> Floats:
    return array("d")


def hashes() -> Hashes:
    return array("q")


def mean(values: "Floats | bytearray") -> float | None:
    # Over an iterator, between whose values other threads may run: over the whole of a long column none could.
    return fmean(iter(values)) if values else None


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of one kind: hashes of the ids that they name, and the score of the chosen less the other's."""

    chosen: Hashes = field(default_factory=hashes)
    rejected: Hashes = field(default_factory=hashes)
    gaps: Floats = field(default_factory=floats)

    def __len__(self) -> int:
        return len(self.gaps)

    def add(self, pair: PreferencePair) -> None:
        self.chosen.append(hash(pair.chosen_id))
        self.rejected.append(hash(pair.rejected_id))
        self.gaps.append(pair.chosen_score - pair.rejected_score)


class Lengths:
    """Characters of the texts that pairs name. Memory holds 12 bytes a text: a hash of 64 bits stands for its id."""

    def __init__(self, pairs: Iterable[Pairs]) -> None:
        hashes = [np.asarray(column) for one in pairs for column in (one.chosen, one.rejected)]
        self._hashes = array("q", np.unique(np.concatenate(hashes)).tobytes())
        self._chars = np.full(len(self._hashes), -1, np.int32)  # -1: not seen yet

    def add(self, records: Iterable[Response | Judgement]) -> None:
        """Those that no pair names are passed over."""
        for one in records:
            key = hash(one.id)
            place = bisect_left(self._hashes, key)
            if place < len(self._hashes) and self._hashes[place] == key:
                self._chars[place] = len(one.text)

    def mean(self, hashes: Hashes) -> float | None:
        """Over the texts with these hashes that were added: nobody sampled a solution that came with a prompt."""
        chars = self._chars[np.searchsorted(np.asarray(self._hashes), np.asarray(hashes))]
        chars = chars[chars >= 0]
        return float(chars.mean()) if len(chars) else None  # a mean of whole numbers is exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The populations that signs are shares or means of: one number for each member, where 1 stands for yes."""

    groups: bytearray = field(default_factory=bytearray)  # those with two scores or more: are they equal?
    responses: bytearray = field(default_factory=bytearray)  # has its text the form of a verdict?
    scored: Floats = field(default_factory=floats)  # points of the responses with a readable score
    scored_chars: Floats = field(default_factory=floats)  # of the same responses
    distinct_1: Floats = field(default_factory=floats)  # of the groups that have it
    distinct_2: Floats = field(default_factory=floats)
    judgements: bytearray = field(default_factory=bytearray)  # is it unreadable?
    decided: bytearray = field(default_factory=bytearray)  # comparisons with a winner: is it the one shown first?
    decided_apart: bytearray = field(default_factory=bytearray)  # between different points: is it the one with more?
    actor_pairs: Pairs
    judge_pairs: Pairs
    chars: Lengths
    steps: Sequence[Mapping[str, float]]
    earlier: Sequence[Mapping[str, float | None]]
    kl_to_first: float | None
    form: Form

    def add(self, group: Group) -> None:
        responses, judgements = group.answers, [one for one in group.judgements if one.role == "judge"]
        verdicts = mean_verdicts(responses, group.judgements)
        points = {name: verdict.points for name, verdict in verdicts.items() if isinstance(verdict, Scored)}
        if len(points) > 1:
            self.groups.append(max(points.values()) - min(points.values()) <= TIE)
        for one in responses:
            self.responses.append(claimed(one.text, self.form) != one.text)
            if one.id in points:
                self.scored.append(points[one.id])
                self.scored_chars.append(len(one.text))
        texts = [one.text for one in responses]
        for n, column in ((1, self.distinct_1), (2, self.distinct_2)):
            if (share := distinct_n(texts, n)) is not None:
                column.append(share)
        self.judgements.extend(isinstance(one.verdict, Unparsed) for one in judgements)
        for gap, first_won in _decided(group):
            self.decided.append(first_won)
            if abs(gap) > TIE:
                self.decided_apart.append(first_won == (gap > 0))
        self.chars.add(group.responses)
        self.chars.add(judgements)


def _decided(group: Group) -> Iterator[tuple[float, bool]]:
    """The comparisons with a winner: points of the judgement shown first less the other's, and whether it won.
    Responses that are compared have no points."""
    points = {one.id: one.verdict.points for one in group.judgements if isinstance(one.verdict, Scored)}
    for one in group.comparisons:
        first, _, second = one.id.rpartition("~")
        if (first_won := _first_won(one.verdict)) is not None:
            other = f"{one.response_id}#{second}"
            yield points[first] - points[other] if one.role == "meta" else 0.0, first_won


def _first_won(verdict: Verdict) -> bool | None:
    """Of a comparison; None for a tie and where its verdict is unreadable."""
    return verdict.winner == "A" if isinstance(verdict, Preferred) and verdict.winner != "tie" else None
