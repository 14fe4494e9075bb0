"""From comparisons of one response's judgements to at most one judge pair (2407.19594v2, section 2.3).

What the paper leaves open is decided here: what counts where nobody won, and how the Bradley-Terry fit stays finite.
"""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsrlm.judges.verdicts import mean_points
from rsrlm.pairing import pair_of_judgements
from rsrlm.records import Judgement, NoPair, PreferencePair, Preferred, Response, Scored

RIDGE = 0.01  # times the sum of squared Bradley-Terry scores
TIE = 1e-6  # Bradley-Terry scores nearer to each other than this are equal: the fit is no more exact


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionWeights:
    """What a win counts for the judgement shown first and for the one shown second."""

    first: float
    second: float


EVEN = PositionWeights(first=0.5, second=0.5)


def comparison_id(first: Judgement, second: Judgement) -> str:
    """Of the comparison that shows `first` first: `00/tea/2#1~3`."""
    return f"{first.id}~{second.index}"


def most_uncertain(responses: Sequence[Response], judgements: Sequence[Judgement], seed: int) -> Response | None:
    """The response whose readable scores vary most; ties at random by `seed` and the responses' ids.

    None if no response has two readable judgements. Where no scores vary at all, all such responses tie.
    """
    variances: dict[str, float] = {}
    for response in responses:
        verdicts = [one.verdict for one in readable(judgements, response)]
        if len(verdicts) >= 2:
            mean = mean_points(verdicts)
            assert isinstance(mean, Scored)
            variances[response.id] = mean.variance or 0.0
    if not variances:
        return None
    top = max(variances.values())
    tied = sorted((r for r in responses if variances.get(r.id, -1.0) >= top - 1e-9), key=lambda r: r.index)
    return random.Random(f"uncertain {seed} {tied[0].id}").choice(tied)


def readable(judgements: Iterable[Judgement], response: Response) -> list[Judgement]:
    """The response's judgements with a score, ordered by index."""
    found = [one for one in judgements if one.response_id == response.id and isinstance(one.verdict, Scored)]
    return sorted(found, key=lambda one: one.index)


def contestants(judgements: Sequence[Judgement], rule: Any) -> list[Judgement]:
    """The readable judgements of one response that are compared: at least two, or none."""
    found = list(judgements)
    if rule.collapse:
        first: dict[str, Judgement] = {}
        for one in found:
            first.setdefault(one.text, one)
        found = list(first.values())
    return found if len(found) >= 2 else []


def matches(contestants: Sequence[Judgement]) -> list[tuple[Judgement, Judgement]]:
    """Who is shown first and second: each two in both orders."""
    return [match for one, other in itertools.combinations(contestants, 2) for match in ((one, other), (other, one))]


def most_comparisons(judgements: int) -> int:
    """Comparisons of one prompt, at most: every two judgements of a response in both orders."""
    return judgements * (judgements - 1)


def result(comparison: Judgement) -> int:
    """r of the paper: 1 if the judgement shown first won, -1 if the second did, 0 for a tie or no readable verdict."""
    verdict = comparison.verdict
    return {"A": 1, "B": -1}.get(verdict.winner, 0) if isinstance(verdict, Preferred) else 0


def position_weights(comparisons: Iterable[Judgement]) -> PositionWeights:
    """w1 and w2: each position's wins over all wins, swapped. Where nobody won, 0.5 each."""
    results = [result(one) for one in comparisons]
    first, second = results.count(1), results.count(-1)
    if not first + second:
        return EVEN
    return PositionWeights(first=second / (first + second), second=first / (first + second))


def battle_matrix(
    indices: Sequence[int], results: Mapping[tuple[int, int], int], weights: PositionWeights
) -> list[list[float]]:
    """B: how much each judgement (row) won against each other one (column), in the order of `indices`.

    `results` holds r by (index shown first, index shown second). B_mn = w1 [r_mn = 1] + w2 [r_nm = -1].
    """
    return [
        [
            weights.first * (results.get((m, n)) == 1) + weights.second * (results.get((n, m)) == -1) if m != n else 0.0
            for n in indices
        ]
        for m in indices
    ]


def bradley_terry(battles: Sequence[Sequence[float]], ridge: float = RIDGE) -> list[float]:
    """Scores eps that maximise sum B_mn log sigmoid(eps_m - eps_n) - ridge * sum eps^2; their mean is 0.

    The ridge keeps the score of a judgement that never lost finite; without any win all scores are 0.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit

    won = np.asarray(battles, dtype=float)

    def loss(eps: np.ndarray) -> tuple[float, np.ndarray]:
        gap = eps[:, None] - eps[None, :]
        pull = won * expit(-gap)
        gradient = pull.sum(0) - pull.sum(1) + 2 * ridge * eps
        return float(ridge * (eps**2).sum() - (won * log_expit(gap)).sum()), gradient

    found = minimize(loss, np.zeros(len(won)), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    return [float(value) for value in found.x - found.x.mean()]


def results_of(contestants: Sequence[Judgement], comparisons: Sequence[Judgement]) -> dict[tuple[int, int], int]:
    """What came of each comparison that was made, by the indices of the judgements shown first and second."""
    by_id = {one.id: one for one in comparisons}
    return {
        (first.index, second.index): result(by_id[key])
        for first, second in itertools.permutations(contestants, 2)
        if (key := comparison_id(first, second)) in by_id
    }


def judge_pair(
    prompt_token_ids: Sequence[int],
    contestants: Sequence[Judgement],
    comparisons: Sequence[Judgement],
    weights: PositionWeights,
    rule: Any,
    seed: int,
) -> PreferencePair | NoPair:
    """The pair of one response's judgements, or the reason why there is none.

    `contestants` are judgements of one response, `comparisons` the verdicts of their `matches`, and `prompt_token_ids`
    what the judge was shown. Chosen is the complete judgement with the highest Bradley-Terry score, rejected the one
    with the lowest; equal ones are drawn by `seed`. The scores on the pair are the Bradley-Terry scores.
    """
    if len(contestants) < 2:
        return NoPair(reason="fewer than two judgements to compare")
    results = results_of(contestants, comparisons)
    if not any(results.values()):
        return NoPair(reason="no readable winner")
    scores = bradley_terry(battle_matrix([one.index for one in contestants], results, weights))
    ranked = list(zip(contestants, scores, strict=True))
    complete = [(one, score) for one, score in ranked if one.finish_reason == "stop"]
    if not complete:
        return NoPair(reason="no complete judgement")
    draw = random.Random(f"judge pair {seed} {contestants[0].id}")
    chosen, best = _drawn(complete, max(score for _, score in complete), draw)
    rejected, worst = _drawn(ranked, min(score for _, score in ranked), draw)
    if best - worst <= TIE:
        return NoPair(reason="equal judgements")
    if chosen.token_ids == rejected.token_ids:
        return NoPair(reason="same tokens")
    if rule.max_chosen_chars is not None and len(chosen.text) > rule.max_chosen_chars:
        return NoPair(reason="chosen too long")
    # Rounded: a resumed run on another machine must come to the same pair.
    return pair_of_judgements(chosen, rejected, prompt_token_ids, (round(best, 6), round(worst, 6)))


def _drawn(ranked: Sequence[tuple[Judgement, float]], score: float, draw: random.Random) -> tuple[Judgement, float]:
    return draw.choice([entry for entry in ranked if abs(entry[1] - score) <= TIE])
