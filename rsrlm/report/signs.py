"""The signs of trouble in an iteration. Self-rewarding runs go wrong in known ways: answers grow, scores saturate, the
judge follows length or position.

Each sign is one function below, with its limit; docs/alarms.md has a section for each, with the papers that saw it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import fmean
from typing import Literal

from rsrlm.judges.verdicts import SCORE, Form, claimed
from rsrlm.pairing import TIE
from rsrlm.records import Group, Judgement, PreferencePair, Preferred, Response, Scored, Unparsed, Verdict
from rsrlm.report.metrics import MIN_N, distinct_n, spearman

SATURATED = 4.5  # points: hardly any room is left above it on a scale of 5

Direction = Literal["above", "below"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What an iteration left behind, as the populations that signs are shares or means of."""

    groups: list[list[float]]  # the scores of each group with two or more
    texts: list[list[str]]  # of each group's responses
    responses: list[Response]
    scored: list[tuple[float, int]]  # score and characters of each response with a readable score
    judgements: list[Judgement]
    chars: dict[str, int]  # of responses and judgements, by id
    actor_pairs: list[PreferencePair]
    judge_pairs: list[PreferencePair]
    decided: list[tuple[float, bool]]  # comparisons with a winner: points of the first less the second, first won
    decided_apart: list[tuple[float, bool]]  # those between different points
    steps: Sequence[Mapping[str, float]]
    earlier: Sequence[Mapping[str, float | None]]
    kl_to_first: float | None
    form: Form


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
    return _mean([max(scores) - min(scores) <= TIE for scores in it.groups])


@sign("above", 4.7, MORE_JUDGEMENTS, over="scored", on_points=True)
def score_mean(it: Evidence) -> float | None:
    """Mean score of the responses with a readable one, in points."""
    return _mean([points for points, _ in it.scored])


@sign("above", 0.5, MORE_JUDGEMENTS, over="scored", on_points=True)
def score_drift(it: Evidence) -> float | None:
    """`score_mean` less that of the first iteration, in points."""
    now, first = score_mean(it), it.earlier[0].get("score_mean") if it.earlier else None
    return None if now is None or first is None else now - first


@sign("above", 0.7, MORE_JUDGEMENTS, over="scored", on_points=True)
def saturated(it: Evidence) -> float | None:
    """Share of the responses with a readable score that have 4.5 points or more."""
    return _mean([points >= SATURATED - TIE for points, _ in it.scored])


@sign("below", 0.5, "sample more answers", over="actor_pairs", on_points=True)
def pair_score_gap(it: Evidence) -> float | None:
    """Score of the chosen response less that of the rejected one, mean over actor pairs, in points."""
    return _mean([pair.chosen_score - pair.rejected_score for pair in it.actor_pairs])


@sign("above", 2500.0, CONTROL_LENGTH, over="actor_pairs")
def chosen_chars(it: Evidence) -> float | None:
    """Mean characters of the chosen responses of actor pairs."""
    return _mean([it.chars[pair.chosen_id] for pair in it.actor_pairs])


@sign("above", None, CONTROL_LENGTH, over="actor_pairs")
def rejected_chars(it: Evidence) -> float | None:
    """Mean characters of the rejected responses of actor pairs."""
    return _mean([it.chars[pair.rejected_id] for pair in it.actor_pairs])


@sign("above", 1.25, CONTROL_LENGTH, over="actor_pairs")
def chosen_chars_ratio(it: Evidence) -> float | None:
    """`chosen_chars` divided by that of the iteration before."""
    now, before = chosen_chars(it), it.earlier[-1].get("chosen_chars") if it.earlier else None
    return now / before if now is not None and before else None


@sign("above", 1100.0, SHORTEN_JUDGEMENTS, over="judge_pairs")
def judge_chosen_chars(it: Evidence) -> float | None:
    """Mean characters of the chosen judgements of judge pairs."""
    return _mean([it.chars[pair.chosen_id] for pair in it.judge_pairs])


@sign("above", None, SHORTEN_JUDGEMENTS, over="judge_pairs")
def judge_rejected_chars(it: Evidence) -> float | None:
    """Mean characters of the rejected judgements of judge pairs."""
    return _mean([it.chars[pair.rejected_id] for pair in it.judge_pairs])


@sign("above", 0.5, CONTROL_LENGTH, over="scored")
def score_length(it: Evidence) -> float | None:
    """Spearman's correlation of score and characters over 30 or more responses with a readable score."""
    points, chars = zip(*it.scored, strict=True) if it.scored else ((), ())
    return spearman(points, chars) if len(points) >= MIN_N and len(set(points)) > 1 and len(set(chars)) > 1 else None


@sign("below", 0.1, STOP_EARLIER, over="responses")
def distinct_1(it: Evidence) -> float | None:
    """Different words divided by all words of a group's responses, mean over groups."""
    return _mean([share for texts in it.texts if (share := distinct_n(texts, 1)) is not None])


@sign("below", 0.3, STOP_EARLIER, over="responses")
def distinct_2(it: Evidence) -> float | None:
    """Different pairs of neighbouring words divided by all of them in a group's responses, mean over groups."""
    return _mean([share for texts in it.texts if (share := distinct_n(texts, 2)) is not None])


@sign("above", 0.2, "try judge.kind=structured", over="judgements")
def unreadable(it: Evidence) -> float | None:
    """Share of the judgements that could not be read."""
    return _mean([isinstance(judgement.verdict, Unparsed) for judgement in it.judgements])


@sign("above", 0.05, "drop prompts that ask for scores", over="responses")
def claims(it: Evidence) -> float | None:
    """Share of the responses with text in the form of the judge's verdict, such as "Score: 5"."""
    return _mean([claimed(response.text, it.form) != response.text for response in it.responses])


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
    """Share of the decided meta-judgements that the judgement shown first wins."""
    return _mean([first_won for _, first_won in it.decided])


@sign("above", 0.9, SPARE_JUDGE, over="decided_apart")
def higher_score_wins(it: Evidence) -> float | None:
    """Share of the decided meta-judgements between different points that the judgement with more points wins."""
    return _mean([first_won == (gap > 0) for gap, first_won in it.decided_apart])


def measure(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    pairs: Sequence[PreferencePair],
    steps: Sequence[Mapping[str, float]],
    *,
    earlier: Sequence[Mapping[str, float | None]] = (),
    kl_to_first: float | None = None,
    form: Form = SCORE,
) -> dict[str, float | None]:
    """The signs of one iteration: a number for every name in `SIGNS`, or None where it cannot be estimated. The
    denominators stand beside them, as `n_` and the name in `Sign.over`.

    `verdicts` holds the mean verdict of each response by its id; `pairs` are of these groups' responses and judgements
    (KeyError for others); `steps` are the learner's rows in order, without log-probabilities where it did not train on
    pairs; `earlier` holds what this function returned for the iterations before, from the first on; `kl_to_first` was
    measured on held-out answers; `form` is that of the judge's verdicts.
    """
    responses = [response for group in groups for response in group.responses]
    judgements = [one for group in groups for one in group.judgements if one.role == "judge"]
    points = {response.id: v.points for response in responses if isinstance(v := verdicts.get(response.id), Scored)}
    by_group = [[points[one.id] for one in group.responses if one.id in points] for group in groups]
    decided = [comparison for group in groups for comparison in _decided(group)]
    it = Evidence(
        groups=[scores for scores in by_group if len(scores) > 1],
        texts=[[response.text for response in group.responses] for group in groups],
        responses=responses,
        scored=[(points[one.id], len(one.text)) for one in responses if one.id in points],
        judgements=judgements,
        chars={one.id: len(one.text) for one in responses} | {one.id: len(one.text) for one in judgements},
        actor_pairs=[pair for pair in pairs if pair.kind == "actor"],
        judge_pairs=[pair for pair in pairs if pair.kind == "judge"],
        decided=decided,
        decided_apart=[(gap, first_won) for gap, first_won in decided if abs(gap) > TIE],
        steps=steps,
        earlier=earlier,
        kl_to_first=kl_to_first,
        form=form,
    )
    found = {name: sign.measure(it) for name, sign in SIGNS.items()}
    return found | {f"n_{sign.over}": len(getattr(it, sign.over)) for sign in SIGNS.values() if sign.over}


def _decided(group: Group) -> list[tuple[float, bool]]:
    """The comparisons with a winner: points of the judgement shown first less the other's, and whether it won."""
    points = {one.id: one.verdict.points for one in group.judgements if isinstance(one.verdict, Scored)}
    decided = []
    for one in group.comparisons:
        first, _, second = one.id.rpartition("~")
        if (first_won := _first_won(one.verdict)) is not None:
            decided.append((points[first] - points[f"{one.response_id}#{second}"], first_won))
    return decided


def _first_won(verdict: Verdict) -> bool | None:
    """Of a comparison; None for a tie and where its verdict is unreadable."""
    return verdict.winner == "A" if isinstance(verdict, Preferred) and verdict.winner != "tie" else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
