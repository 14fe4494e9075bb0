"""The signs of trouble in an iteration. Self-rewarding runs go wrong in known ways: answers grow, scores saturate, the
judge follows length or position.

Each sign is one function below, with its limit; docs/alarms.md has a section for each, with the papers that saw it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import fmean
from typing import Literal

import numpy as np

from rsrlm.judges.verdicts import SCORE, Form
from rsrlm.pairing import TIE
from rsrlm.records import Group, PreferencePair
from rsrlm.report.evidence import Evidence, Lengths, Pairs, mean
from rsrlm.report.metrics import MIN_N, spearman

SATURATED = 4.5  # points: hardly any room is left above it on a scale of 5

Direction = Literal["above", "below"]

Measure = Callable[[Evidence], float | None]


@dataclass(frozen=True, slots=True)
class Sign:
    """A value `direction` of `warn` is worth a look, and `remedy` a try; None warns of nothing.

    `over` names the part of Evidence whose length is the denominator; `on_points` marks a limit that supposes scores
    from 0 to 5.
    """

    measure: Measure
    direction: Direction
    warn: float | None
    remedy: str
    over: str
    on_points: bool


SIGNS: dict[str, Sign] = {}

MORE_JUDGEMENTS = "average more judgements"
CONTROL_LENGTH = "raise pair.rho"
SHORTEN_JUDGEMENTS = "shorten judgements"
STOP_EARLIER = "stop training earlier"
SPARE_JUDGE = "train the judge less"


def sign(
    direction: Direction, warn: float | None, remedy: str, over: str = "", on_points: bool = False
) -> Callable[[Measure], Measure]:
    """Registers a function as the sign of its name; its docstring says what it measures."""

    def register(measure: Measure) -> Measure:
        SIGNS[measure.__name__] = Sign(measure, direction, warn, remedy, over, on_points)
        return measure

    return register


@sign("above", 0.5, MORE_JUDGEMENTS, over="groups")
def equal_scores(it: Evidence) -> float | None:
    """Share of the groups with two or more scored responses in which all scores are equal."""
    return mean(it.groups)


@sign("above", 4.7, MORE_JUDGEMENTS, over="scored", on_points=True)
def score_mean(it: Evidence) -> float | None:
    """Mean score of the responses with a readable one, in points."""
    return mean(it.scored)


@sign("above", 0.5, MORE_JUDGEMENTS, over="scored", on_points=True)
def score_drift(it: Evidence) -> float | None:
    """`score_mean` less that of the first iteration, in points."""
    now, first = score_mean(it), it.earlier[0].get("score_mean") if it.earlier else None
    return None if now is None or first is None else now - first


@sign("above", 0.7, MORE_JUDGEMENTS, over="scored", on_points=True)
def saturated(it: Evidence) -> float | None:
    """Share of the responses with a readable score that have 4.5 points or more."""
    return mean(bytearray(points >= SATURATED - TIE for points in it.scored))


@sign("below", 0.5, "sample more answers", over="actor_pairs", on_points=True)
def pair_score_gap(it: Evidence) -> float | None:
    """Score of the chosen response less that of the rejected one, mean over actor pairs, in points."""
    return mean(it.actor_pairs.gaps)


@sign("above", 2500.0, CONTROL_LENGTH, over="actor_pairs")
def chosen_chars(it: Evidence) -> float | None:
    """Mean characters of the chosen responses of actor pairs."""
    return it.chars.mean(it.actor_pairs.chosen)


@sign("above", None, CONTROL_LENGTH, over="actor_pairs")
def rejected_chars(it: Evidence) -> float | None:
    """Mean characters of the rejected responses of actor pairs."""
    return it.chars.mean(it.actor_pairs.rejected)


@sign("above", 1.25, CONTROL_LENGTH, over="actor_pairs")
def chosen_chars_ratio(it: Evidence) -> float | None:
    """`chosen_chars` divided by that of the iteration before."""
    now, before = chosen_chars(it), it.earlier[-1].get("chosen_chars") if it.earlier else None
    return now / before if now is not None and before else None


@sign("above", 1100.0, SHORTEN_JUDGEMENTS, over="judge_pairs")
def judge_chosen_chars(it: Evidence) -> float | None:
    """Mean characters of the chosen judgements of judge pairs."""
    return it.chars.mean(it.judge_pairs.chosen)


@sign("above", None, SHORTEN_JUDGEMENTS, over="judge_pairs")
def judge_rejected_chars(it: Evidence) -> float | None:
    """Mean characters of the rejected judgements of judge pairs."""
    return it.chars.mean(it.judge_pairs.rejected)


@sign("above", 0.5, CONTROL_LENGTH, over="scored")
def score_length(it: Evidence) -> float | None:
    """Spearman's correlation of score and characters over 30 or more responses with a readable score."""
    points, chars = np.asarray(it.scored), np.asarray(it.scored_chars)
    return spearman(points, chars) if len(points) >= MIN_N and np.ptp(points) > 0 and np.ptp(chars) > 0 else None


@sign("below", 0.1, STOP_EARLIER, over="responses")
def distinct_1(it: Evidence) -> float | None:
    """Different words divided by all words of a group's responses, mean over groups."""
    return mean(it.distinct_1)


@sign("below", 0.3, STOP_EARLIER, over="responses")
def distinct_2(it: Evidence) -> float | None:
    """Different pairs of neighbouring words divided by all of them in a group's responses, mean over groups."""
    return mean(it.distinct_2)


@sign("above", 0.2, "try judge.kind=structured", over="judgements")
def unreadable(it: Evidence) -> float | None:
    """Share of the judgements that could not be read."""
    return mean(it.judgements)


@sign("above", 0.05, "drop prompts that ask for scores", over="responses")
def claims(it: Evidence) -> float | None:
    """Share of the responses with text in the form of the judge's verdict, such as "Score: 5"."""
    return mean(it.responses)


@sign("below", -10.0, "raise train.nll_scale", over="steps")
def chosen_logp_change(it: Evidence) -> float | None:
    """Log-probability of the chosen texts, mean of the last tenth of the steps less the first, in nats per text."""
    values = [row["chosen_logp"] for row in it.steps if "chosen_logp" in row]
    tenth = max(1, len(values) // 10)  # every step has other pairs, so a single one says little
    return _finite(fmean(values[-tenth:]) - fmean(values[:tenth])) if len(values) > 1 else None


@sign("above", 0.2, STOP_EARLIER, over="steps")
def kl_per_token(it: Evidence) -> float | None:
    """Estimated KL divergence from the reference at the last step, in nats per token."""
    return _finite(it.steps[-1].get("kl_per_token", nan)) if it.steps else None


@sign("above", 0.5, STOP_EARLIER)
def kl_to_first(it: Evidence) -> float | None:
    """Estimated KL divergence of the new model from M0 on held-out prompts, in nats per token."""
    return it.kl_to_first


@sign("above", 0.65, SPARE_JUDGE, over="decided")
def first_position_wins(it: Evidence) -> float | None:
    """Share of the decided comparisons, of judgements or of responses, that what is shown first wins."""
    return mean(it.decided)


@sign("above", 0.9, SPARE_JUDGE, over="decided_apart")
def higher_score_wins(it: Evidence) -> float | None:
    """Share of the decided meta-judgements between different points that the judgement with more points wins."""
    return mean(it.decided_apart)


def measure(
    groups: Iterable[Group],
    pairs: Iterable[PreferencePair],
    steps: Sequence[Mapping[str, float]],
    *,
    earlier: Sequence[Mapping[str, float | None]] = (),
    kl_to_first: float | None = None,
    form: Form = SCORE,
) -> dict[str, float | None]:
    """The signs of one iteration: a number for every name in `SIGNS`, or None where it cannot be estimated. The
    denominators stand beside them, as `n_` and the name in `Sign.over`.

    Groups and pairs are read once, one at a time; memory holds some 150 bytes a response.

    `pairs` are of these groups' responses and judgements (KeyError for others); `steps` are the learner's rows in
    order, without log-probabilities where it did not train on pairs; `earlier` holds what this function returned for
    the iterations before, from the first on; `kl_to_first` was measured on held-out answers; `form` is that of the
    judge's verdicts.
    """
    of_kind = {"actor": Pairs(), "judge": Pairs()}
    for pair in pairs:
        if pair.kind in of_kind:
            of_kind[pair.kind].add(pair)
    it = Evidence(
        actor_pairs=of_kind["actor"],
        judge_pairs=of_kind["judge"],
        chars=Lengths(of_kind.values()),
        steps=steps,
        earlier=earlier,
        kl_to_first=kl_to_first,
        form=form,
    )
    for group in groups:
        it.add(group)
    found = {name: sign.measure(it) for name, sign in SIGNS.items()}
    return found | {f"n_{sign.over}": len(getattr(it, sign.over)) for sign in SIGNS.values() if sign.over}


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
