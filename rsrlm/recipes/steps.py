"""Steps of an answer that are compared two by two, without engines: who wins how often, and the pair."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from rsrlm.judges.pairwise import winner_of
from rsrlm.judges.verdicts import combine_orders
from rsrlm.pairing import Candidate, pair_of
from rsrlm.records import Judgement, NoPair, PreferencePair, Response

EQUAL = NoPair(reason="no step is better than another")


def wins(steps: Sequence[Response], compared: Sequence[Judgement]) -> list[int]:
    """How many others each step beats: in both orders. What cannot be read, and what was not compared, beats nobody."""
    said = {one.id: winner_of(one) for one in compared}
    found = [0] * len(steps)
    for (at, one), (other_at, other) in combinations(enumerate(steps), 2):
        orders = [said.get(f"{one.id}~{other.index}"), said.get(f"{other.id}~{one.index}")]
        if orders[0] is None or orders[1] is None:
            continue
        decided = combine_orders(orders[0], orders[1])
        found[at] += decided == "first"
        found[other_at] += decided == "second"
    return found


def pair(group: str, steps: Sequence[Response], won: Sequence[int], may_win: Sequence[bool]) -> PreferencePair | NoPair:
    """The step that won most often against the one that won least often, each the first of its equals. Their tokens
    follow the same beginning."""
    candidates = [Candidate(response=step, points=float(points)) for step, points in zip(steps, won, strict=True)]
    best = max((one for one, may in zip(candidates, may_win, strict=True) if may), key=_points, default=None)
    worst = min(candidates, key=_points)
    if best is None:
        return NoPair(reason="no step that goes on")
    if best.points <= worst.points:
        return EQUAL
    made = pair_of(group, best, worst)
    return made if isinstance(made, NoPair) else replace(made, kind="step")


def _points(candidate: Candidate) -> float:
    return candidate.points
