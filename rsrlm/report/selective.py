"""Refusing what is judged badly: how often the rest is bad (Self-J, 2409.00935).

Coverage is the share of the responses that are kept, risk the share of bad ones among them. A response whose judgement
cannot be read has no points, and is refused at every threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

MOST_SHOWN = 400  # points of a plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a threshold keeps: `kept` responses with at least so many points."""

    threshold: float
    coverage: float
    risk: float
    kept: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the risk."""
        from scipy.stats import binomtest

        low, high = binomtest(round(self.risk * self.kept), self.kept).proportion_ci(method="wilson")
        return float(low), float(high)


def risk_coverage(scored: Sequence[tuple[float | None, bool]]) -> list[Kept]:
    """Of responses as (points, good), what each different score keeps as the threshold, from the highest down. Equal
    scores are kept or refused together; points are None where no judgement can be read."""
    ranked = sorted(((points, good) for points, good in scored if points is not None), key=lambda one: -one[0])
    found, kept, bad = [], 0, 0
    for points, equal in groupby(ranked, key=lambda one: one[0]):
        goods = [good for _, good in equal]
        kept, bad = kept + len(goods), bad + goods.count(False)
        found.append(Kept(threshold=points, coverage=kept / len(scored), risk=bad / kept, kept=kept))
    return found


def area(curve: Sequence[Kept]) -> float:
    """Mean risk over all coverages that a threshold reaches, each standing for those since the one above it: lower is
    better."""
    steps = zip([0.0, *(one.coverage for one in curve)], curve, strict=False)
    return sum((one.coverage - before) * one.risk for before, one in steps) / curve[-1].coverage


def threshold_for(curve: Sequence[Kept], most_risk: float) -> Kept | None:
    """The threshold that keeps most with a risk of at most `most_risk`; None if none does."""
    return max((one for one in curve if one.risk <= most_risk), key=lambda one: one.coverage, default=None)


def as_csv(curve: Sequence[Kept]) -> str:
    """A line for each threshold, from the highest down."""
    lines = [f"{one.threshold!r},{one.coverage:.6f},{one.risk:.6f},{one.kept}" for one in curve]
    return "\n".join(["threshold,coverage,risk,kept", *lines]) + "\n"


def as_svg(curve: Sequence[Kept], chosen: Kept | None = None) -> str:
    """Risk over coverage as a plot; `chosen` is marked."""
    import vl_convert

    every = -(-len(curve) // MOST_SHOWN)
    shown = [curve[at] for at in range(0, len(curve), every)] + [curve[-1]]

    def points(of: Sequence[Kept]) -> dict[str, Any]:
        return {"values": [{"coverage": one.coverage, "risk": one.risk} for one in of]}

    across = {"field": "coverage", "title": "coverage: share kept", "scale": {"domain": [0, 1]}}
    up = {"field": "risk", "title": "risk: share of bad ones among the kept"}
    mark = {"type": "point", "filled": True, "size": 90, "color": "black", "opacity": 1}
    layers = [
        {"data": points(shown), "mark": {"type": "line", "interpolate": "step-before"}},
        {"data": points([chosen] if chosen else []), "mark": mark},
    ]
    axes = {"x": {**across, "type": "quantitative"}, "y": {**up, "type": "quantitative"}}
    text: str = vl_convert.vegalite_to_svg({"layer": layers, "encoding": axes})
    return text
