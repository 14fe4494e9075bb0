"""Steps of an answer that are compared two by two, without engines: the best against the worst of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rsrlm.pairing import POINTS, Candidate, pair_of
from rsrlm.records import NoPair, PreferencePair, Response, Scored, Verdict

EQUAL = NoPair(reason="no step is better than another")


def pair(
    group: str, steps: Sequence[Response], rates: Mapping[str, Verdict], may_win: Sequence[bool]
) -> PreferencePair | NoPair:
    """The step with the highest win rate against the one with the lowest, each the first of its equals. Their tokens
    follow the same beginning. One that no comparison tells of takes no part."""
    ranked = [
        Candidate(response=step, points=rate.points, may_win=may)
        for step, may in zip(steps, may_win, strict=True)
        if isinstance(rate := rates[step.id], Scored)
    ]
    if not ranked:
        return NoPair(reason="no comparison that can be read" if len({one.text for one in steps}) > 1 else EQUAL.reason)
    best = max((one for one in ranked if one.may_win), key=POINTS, default=None)
    worst = min(ranked, key=POINTS)
    if best is None:
        return NoPair(reason="no step that goes on")
    if best.points <= worst.points:
        return EQUAL
    made = pair_of(group, best, worst)
    return made if isinstance(made, NoPair) else replace(made, kind="step")
