"""The signs of trouble of one iteration, and the alarms that they raise.

Self-rewarding runs go wrong in known ways: answers grow, scores saturate, the judge follows length or position. `SIGNS`
holds what is watched, from where on it is worth a warning, who saw it go wrong, and what they did. A warning limit that
no paper names is our own guess: it asks for a look, so none of them stops a run by default. Limits in points suppose
the scale of 0 to 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from statistics import fmean
from typing import Literal

from rsrlm.config import Config, ConfigError
from rsrlm.judges.verdicts import SCORE, Form, claimed
from rsrlm.pairing import TIE
from rsrlm.records import Group, PreferencePair, Scored, Unparsed, Verdict
from rsrlm.report.metrics import MIN_N, distinct_n, spearman

SATURATED = 4.5  # points: no room is left above it on a scale of 5

Direction = Literal["above", "below"]
Action = Literal["warn", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A value strictly `direction` of `warn` or `stop` is an alarm; None is none."""

    direction: Direction
    warn: float | None = None
    stop: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    sign: str
    value: float
    limit: float
    action: Action
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A meta-judge's verdict on two judgements of one response, which gave these points. None is unreadable."""

    first_points: float
    second_points: float
    winner: Literal["A", "B", "tie"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What a sign measures, its default limit, what was seen, and what the papers did about it."""

    meaning: str
    direction: Direction
    warn: float | None
    seen: str
    remedy: str


_LENGTH_SEEN = (
    "answers grew from 1,092 to 1,552 and 2,552 characters over three iterations (2401.10020 sec. 3.2.1), and to 2,212 "
    "in iteration 4 without length control (2407.19594 table 4)"
)
_LENGTH_REMEDY = (
    "2407.19594 sec. 2.2 takes the shortest of the best and the longest of the worst responses (rho 0.32 to 0.4 from "
    "iteration 2 on) and drops pairs with a chosen response over 2,500 characters in iteration 1 (app. A.3); "
    "2410.10630 takes a share of the normalised length off the score"
)
_SATURATION_SEEN = "the mean score rose from 4.1 to over 4.7 in two iterations of judge training (2407.19594 sec. 3.5)"
_SATURATION_REMEDY = (
    "2407.19594 averages 11 judgements and keeps fractions of a point (sec. 3.5), and suggests a finer scale or "
    "comparisons (sec. 5)"
)
_VERBOSE_SEEN = "the meta-judge prefers long judgements, which makes all outputs longer (2407.19594 sec. 2.2)"
_VERBOSE_REMEDY = (
    "2407.19594 app. A.3 drops pairs with a chosen judgement longer than 1,100 in iteration 1 and 1,000 in iteration 2"
)
_COLLAPSE_SEEN = "answers collapsed into random words and one constant ending after long training (2505.21444)"
_COLLAPSE_REMEDY = (
    "2505.21444 found that early stopping on held-out labels and an easy-to-hard curriculum help; a KL penalty does "
    "not, and a lower learning rate or fewer votes only delay it"
)
_LOGP_SEEN = (
    "DPO lowers the chosen log-probability too; GSM8K was 61.8 % without a likelihood term and 73.1 % with it "
    "(2404.19733)"
)
_LOGP_REMEDY = "2404.19733 adds the chosen response's negative log-likelihood to the loss (train.nll_scale)"

SIGNS: dict[str, Sign] = {
    "equal_scores": Sign(
        meaning="share of the groups with two or more scored responses in which all scores are equal",
        direction="above",
        warn=0.5,
        seen="scores of an untrained judge converged to 4, and 541 pairs were left where a trained one left 3,964 "
        "(2401.10020 sec. 3.1.3, app. A.3)",
        remedy="2401.10020 sec. 3.1.1 trains the judge on examples with the most frequent score thinned out; "
        "2407.19594 averages 11 judgements instead of 3 (sec. 2.2) and suggests a finer scale or comparisons (sec. 5)",
    ),
    "score_mean": Sign(
        meaning="mean score of the responses with a readable one, in points",
        direction="above",
        warn=4.7,
        seen=_SATURATION_SEEN,
        remedy=_SATURATION_REMEDY,
    ),
    "score_drift": Sign(
        meaning="score_mean less that of the first iteration, in points",
        direction="above",
        warn=0.5,
        seen=_SATURATION_SEEN,
        remedy=_SATURATION_REMEDY,
    ),
    "saturated": Sign(
        meaning=f"share of the responses with a readable score that have {SATURATED} points or more",
        direction="above",
        warn=0.7,
        seen=_SATURATION_SEEN,
        remedy=_SATURATION_REMEDY,
    ),
    "pair_score_gap": Sign(
        meaning="mean score of chosen less that of rejected responses, over actor pairs, in points",
        direction="below",
        warn=0.5,
        seen="the gap shrank ninefold over the iterations, and the DPO gradient with it (2508.06026)",
        remedy="2508.06026 takes rejected responses from the first model and chosen ones from a briefly trained "
        "successor",
    ),
    "chosen_chars": Sign(
        meaning="mean characters of the chosen responses of actor pairs",
        direction="above",
        warn=2500.0,
        seen=_LENGTH_SEEN,
        remedy=_LENGTH_REMEDY,
    ),
    "rejected_chars": Sign(
        meaning="mean characters of the rejected responses of actor pairs",
        direction="above",
        warn=None,
        seen=_LENGTH_SEEN,
        remedy=_LENGTH_REMEDY,
    ),
    "chosen_chars_ratio": Sign(
        meaning="chosen_chars over that of the iteration before",
        direction="above",
        warn=1.25,
        seen=_LENGTH_SEEN,
        remedy=_LENGTH_REMEDY,
    ),
    "judge_chosen_chars": Sign(
        meaning="mean characters of the chosen judgements of judge pairs",
        direction="above",
        warn=1100.0,
        seen=_VERBOSE_SEEN,
        remedy=_VERBOSE_REMEDY,
    ),
    "judge_rejected_chars": Sign(
        meaning="mean characters of the rejected judgements of judge pairs",
        direction="above",
        warn=None,
        seen=_VERBOSE_SEEN,
        remedy=_VERBOSE_REMEDY,
    ),
    "score_length": Sign(
        meaning="Spearman's correlation of score and characters over the responses with a readable score",
        direction="above",
        warn=0.5,
        seen=_LENGTH_SEEN,
        remedy=_LENGTH_REMEDY,
    ),
    "distinct_1": Sign(
        meaning="different words over all words of a group's responses, mean over groups",
        direction="below",
        warn=0.1,
        seen=_COLLAPSE_SEEN,
        remedy=_COLLAPSE_REMEDY,
    ),
    "distinct_2": Sign(
        meaning="different pairs of neighbouring words over all of them in a group's responses, mean over groups",
        direction="below",
        warn=0.3,
        seen=_COLLAPSE_SEEN,
        remedy=_COLLAPSE_REMEDY,
    ),
    "unreadable": Sign(
        meaning="share of the judgements that could not be read",
        direction="above",
        warn=0.2,
        seen="a judge without judge training often broke the score format, and few pairs were left "
        "(2401.10020 app. A.3)",
        remedy="2407.19594 sec. 2.2 leaves unreadable judgements out of the mean; 2401.10020 sec. 3.1.1 trains the "
        "format with judge examples",
    ),
    "claims": Sign(
        meaning='share of the responses with text in the shape of the judge\'s verdict, such as "Score: 5"',
        direction="above",
        warn=0.05,
        seen="3 of 4 readable judgements of a 135M judge repeated the score that the response gave itself, while any "
        "score in the judge's prose counted (benchmarks/echo.py)",
        remedy="the judge is shown such text as a claim and only its own last line counts; look at the responses, and "
        "drop their prompts if they ask for scores",
    ),
    "chosen_logp_change": Sign(
        meaning="log-probability of the chosen texts, last tenth of the steps less the first, in nats per text",
        direction="below",
        warn=-10.0,
        seen=_LOGP_SEEN,
        remedy=_LOGP_REMEDY,
    ),
    "kl_per_token": Sign(
        meaning="estimated KL divergence from the reference at the last step, in nats per token",
        direction="above",
        warn=0.2,
        seen="KL shot up when the answers collapsed (2505.21444)",
        remedy=_COLLAPSE_REMEDY,
    ),
    "kl_to_first": Sign(
        meaning="estimated KL divergence of the new model from M0, which is the model before any supervised "
        "fine-tuning, on held-out prompts, in nats per token",
        direction="above",
        warn=0.5,
        seen="KL shot up when the answers collapsed (2505.21444)",
        remedy=_COLLAPSE_REMEDY,
    ),
    "first_position_wins": Sign(
        meaning="share of the decided meta-judgements that the judgement shown first wins",
        direction="above",
        warn=0.65,
        seen="it rose from 44 % to 68 % from iteration 1 to 2, and to 88 % between judgements of one score "
        "(2407.19594 table 5)",
        remedy="2407.19594 sec. 2.2 weighs wins by how often the other position wins, counted anew in each iteration, "
        "and trains the judge in iterations 1 and 2 only (app. A.3)",
    ),
    "higher_score_wins": Sign(
        meaning="share of the decided meta-judgements of unlike points that the judgement with more points wins",
        direction="above",
        warn=0.9,
        seen="it rose from 63 % to 98 % after one iteration of judge training (2407.19594 table 5)",
        remedy="2407.19594 app. A.3 trains the judge in iterations 1 and 2 only",
    ),
}

ON_POINTS = ("score_mean", "score_drift", "saturated", "pair_score_gap")

DEFAULT_LIMITS: dict[str, Limit] = {
    name: Limit(direction=sign.direction, warn=sign.warn) for name, sign in SIGNS.items()
}


def limits_of(config: Config, scale: tuple[int, int] = (0, 5)) -> dict[str, Limit]:
    """The defaults with the config's changes. Raises ConfigError for a sign that is not known.

    Limits on points suppose a judge that scores from 0 to 5: another `scale`, and a function, which may use any, have
    none by default.
    """
    limits = dict(DEFAULT_LIMITS)
    if config.judge.read == "function" or scale != (0, 5):
        limits = {name: replace(limit, warn=None) if name in ON_POINTS else limit for name, limit in limits.items()}
    unknown = {name: Limit(direction="above") for name in config.watch if name not in SIGNS}
    check_limits(unknown)
    for name, changes in config.watch.items():
        chosen = {"warn": None, "stop": None} if changes is None else changes.model_dump(exclude_unset=True)
        limits[name] = replace(limits[name], **chosen)
    return limits


def comparisons_of(groups: Sequence[Group]) -> list[Comparison]:
    """The meta-judge's verdicts with the scores of the two judgements."""
    found = []
    for group in groups:
        points = {one.id: one.verdict.points for one in group.judgements if isinstance(one.verdict, Scored)}
        for one in group.comparisons:
            first, _, second = one.id.rpartition("~")
            winner: dict[float, Literal["A", "B", "tie"]] = {1.0: "A", 0.0: "B", 0.5: "tie"}
            verdict = one.verdict
            found.append(
                Comparison(
                    first_points=points[first],
                    second_points=points[f"{one.response_id}#{second}"],
                    winner=winner[verdict.points] if isinstance(verdict, Scored) else None,
                )
            )
    return found


def signs(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    pairs: Sequence[PreferencePair],
    steps: Sequence[Mapping[str, float]],
    *,
    comparisons: Sequence[Comparison] = (),
    earlier: Sequence[Mapping[str, float | None]] = (),
    kl_to_first: float | None = None,
    form: Form = SCORE,
) -> dict[str, float | None]:
    """The signs of one iteration: a number, or None where it cannot be estimated, for every name in `SIGNS`.

    `verdicts` holds the mean verdict of each response by its id; `pairs` are of these groups' responses and judgements
    (KeyError for others); `steps` are the learner's rows in order, without log-probabilities where it did not train on
    pairs; `earlier` what this function gave for the iterations before, from the first on; `kl_to_first` is measured on
    held-out answers, whose metrics hold its number of tokens; `form` is that of the judge's verdicts.

    The denominators stand beside the signs: `n_groups` (equal_scores), `n_responses` (distinct_1, distinct_2, claims),
    `n_scored` (score_mean, score_drift, saturated, score_length), `n_judgements` (unreadable), `n_actor_pairs` and
    `n_judge_pairs` (gap and characters), `n_steps` (chosen_logp_change, kl_per_token), `n_decided`
    (first_position_wins) and `n_decided_apart` (higher_score_wins). A correlation needs 30 scored responses.
    """
    responses = [response for group in groups for response in group.responses]
    judgements = [one for group in groups for one in group.judgements if one.role == "judge"]
    points = {response.id: v.points for response in responses if isinstance(v := verdicts.get(response.id), Scored)}
    by_group = [[points[one.id] for one in group.responses if one.id in points] for group in groups]
    by_group = [scores for scores in by_group if len(scores) > 1]
    scored = list(points.values())
    chars_scored = [len(response.text) for response in responses if response.id in points]
    score_mean = _mean(scored)

    chars = {response.id: len(response.text) for response in responses}
    chars |= {judgement.id: len(judgement.text) for judgement in judgements}
    actor = [pair for pair in pairs if pair.kind == "actor"]
    judge = [pair for pair in pairs if pair.kind == "judge"]
    chosen_chars = _mean([chars[pair.chosen_id] for pair in actor])

    texts = [[response.text for response in group.responses] for group in groups]
    distinct = {n: [d for group in texts if (d := distinct_n(group, n)) is not None] for n in (1, 2)}

    decided = [one for one in comparisons if one.winner in ("A", "B")]
    apart = [one for one in decided if abs(one.first_points - one.second_points) > TIE]

    return {
        "equal_scores": _mean([max(scores) - min(scores) <= TIE for scores in by_group]),
        "score_mean": score_mean,
        "score_drift": _difference(score_mean, earlier[0].get("score_mean") if earlier else None),
        "saturated": _mean([value >= SATURATED - TIE for value in scored]),
        "pair_score_gap": _mean([pair.chosen_score - pair.rejected_score for pair in actor]),
        "chosen_chars": chosen_chars,
        "rejected_chars": _mean([chars[pair.rejected_id] for pair in actor]),
        "chosen_chars_ratio": _ratio(chosen_chars, earlier[-1].get("chosen_chars") if earlier else None),
        "judge_chosen_chars": _mean([chars[pair.chosen_id] for pair in judge]),
        "judge_rejected_chars": _mean([chars[pair.rejected_id] for pair in judge]),
        "score_length": _correlation(scored, chars_scored),
        "distinct_1": _mean(distinct[1]),
        "distinct_2": _mean(distinct[2]),
        "unreadable": _mean([isinstance(judgement.verdict, Unparsed) for judgement in judgements]),
        "claims": _mean([claimed(response.text, form) != response.text for response in responses]),
        "chosen_logp_change": _change([row["chosen_logp"] for row in steps if "chosen_logp" in row]),
        "kl_per_token": _finite(steps[-1].get("kl_per_token", nan)) if steps else None,
        "kl_to_first": kl_to_first,
        "first_position_wins": _mean([one.winner == "A" for one in decided]),
        "higher_score_wins": _mean([(one.winner == "A") == (one.first_points > one.second_points) for one in apart]),
        "n_groups": len(by_group),
        "n_responses": len(responses),
        "n_scored": len(scored),
        "n_judgements": len(judgements),
        "n_actor_pairs": len(actor),
        "n_judge_pairs": len(judge),
        "n_steps": len(steps),
        "n_decided": len(decided),
        "n_decided_apart": len(apart),
    }


def check_limits(limits: Mapping[str, Limit]) -> None:
    """Raises ConfigError for limits of signs that there are not."""
    unknown = sorted(set(limits) - set(SIGNS))
    if unknown:
        raise ConfigError(
            f"no sign {', '.join(map(repr, unknown))} to set a limit for; the signs are {', '.join(SIGNS)}"
        )


def alarms(found: Mapping[str, float | None], limits: Mapping[str, Limit] = DEFAULT_LIMITS) -> list[Alarm]:
    """At most one alarm per sign, in the order of `limits`; past both limits it is a stop.

    A sign that is None raises none. Raises ConfigError for limits of signs that there are not.
    """
    check_limits(limits)
    raised: list[Alarm] = []
    actions: tuple[Action, Action] = ("stop", "warn")
    for name, limit in limits.items():
        value = found.get(name)
        if value is None:
            continue
        for action, bound in zip(actions, (limit.stop, limit.warn), strict=True):
            if bound is not None and (value > bound if limit.direction == "above" else value < bound):
                raised.append(_alarm(name, value, bound, action, limit.direction))
                break
    return raised


def _alarm(name: str, value: float, limit: float, action: Action, direction: Direction) -> Alarm:
    sign = SIGNS[name]
    message = (
        f"{name} is {value:.4g}, {direction} its limit of {limit:g} ({sign.meaning}). Seen before: {sign.seen}. "
        f"What was done: {sign.remedy}."
    )
    return Alarm(sign=name, value=value, limit=limit, action=action, message=message)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _difference(value: float | None, before: float | None) -> float | None:
    return None if value is None or before is None else value - before


def _ratio(value: float | None, before: float | None) -> float | None:
    return value / before if value is not None and before else None


def _change(values: Sequence[float]) -> float | None:
    """Mean of the last tenth less mean of the first: every step has other pairs, so one step says little."""
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return _finite(fmean(values[-tenth:]) - fmean(values[:tenth]))


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    return spearman(x, y) if len(x) >= MIN_N and len(set(x)) > 1 and len(set(y)) > 1 else None
