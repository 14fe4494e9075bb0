"""Refusing what is judged badly: how often the rest is bad (Self-J, 2409.00935).

Coverage is the share of the responses that are kept, risk the share of bad ones among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a threshold keeps: responses with at least so many points."""

    threshold: float
    coverage: float
    risk: float


def risk_coverage(scored: Sequence[tuple[float, bool]]) -> list[Kept]:
    """Of responses as (points, good), what each different score keeps as the threshold, from the highest down. Equal
    scores are kept or refused together."""
    ranked = sorted(scored, key=lambda one: -one[0])
    found, kept, bad = [], 0, 0
    for points, equal in groupby(ranked, key=lambda one: one[0]):
        goods = [good for _, good in equal]
        kept, bad = kept + len(goods), bad + goods.count(False)
        found.append(Kept(threshold=points, coverage=kept / len(ranked), risk=bad / kept))
    return found


def area(curve: Sequence[Kept]) -> float:
    """Mean risk over all coverages, each threshold standing for those since the one above it: lower is better."""
    steps = zip([0.0, *(one.coverage for one in curve)], curve, strict=False)
    return sum((one.coverage - before) * one.risk for before, one in steps)


def threshold_for(curve: Sequence[Kept], most_risk: float) -> Kept | None:
    """The threshold that keeps most with a risk of at most `most_risk`; None if none does."""
    return max((one for one in curve if one.risk <= most_risk), key=lambda one: one.coverage, default=None)
