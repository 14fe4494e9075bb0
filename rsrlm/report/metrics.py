"""How good a judge is, and which of two models wins, with the numbers that say how far to trust it.

Every figure is a dict that goes to JSON as it is:
  value: the figure; None where it is not estimable.
  low, high: its 95 % percentile bootstrap interval; None with `value`.
  n: its denominator; each function says what is counted.
  prompts: the prompts that these come from.
  count: its numerator, for shares; None for correlations.
  estimable: False below 30 in `n` or in `prompts`. `count` of `n` is then all there is to say.

Intervals resample prompts, not pairs: the pairs of one prompt share its difficulty and its replies.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor, isfinite, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Figure = dict[str, Any]
Ratio = tuple[float, float]  # numerator and denominator

MIN_N = 30
DIGITS = 9  # means of N judgements are not exact: what differs after this is a tie
PERFECT = 5.0
SHARES = (
    "pairwise_accuracy", "tie_share", "agreement", "agreement_without_ties", "five_best", "exact_match", "pair_yield",
)  # fmt: skip
COMPARED = ("first_position", "inconsistent", "tie", "agreement", "unreadable")
CORRELATIONS = ("spearman", "kendall_tau", "score_length_within")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """The replies to one prompt, in any order; a preference data set is the case of two.

    `ranks` are human: lower is better, equal ranks are ties. `scores` are the judge's means, None without a readable
    judgement. `lengths` are in characters. Raises ValueError if their numbers differ, or a value is not finite.
    """

    id: str
    ranks: tuple[float, ...]
    scores: tuple[float | None, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.ranks) == len(self.scores) == len(self.lengths):
            raise ValueError(
                f"{self.id}: {len(self.ranks)} ranks, {len(self.scores)} scores, {len(self.lengths)} lengths"
            )
        if not all(map(isfinite, (*self.ranks, *(score for score in self.scores if score is not None)))):
            raise ValueError(f"{self.id}: ranks {self.ranks} and scores {self.scores} must be finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A pairwise judge's verdicts on two replies: `first` with reply 1 shown as A, `second` with reply 2 shown as A.

    None is an unreadable verdict. `human` is the reply that people prefer, None if unknown. Several comparisons may
    share a prompt.
    """

    prompt_id: str
    first: Literal["A", "B", "tie"] | None
    second: Literal["A", "B", "tie"] | None
    human: Literal["first", "second", "tie"] | None


def judge_metrics(
    rated: Sequence[Rated],
    *,
    readable: int,
    judgements: int,
    points: Sequence[float],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How well the scores of a pointwise judge agree with human ranks (2401.10020v3 sec. 3.3, 2407.19594v2 sec. 3.4).

    `readable` of `judgements` could be read; `points` are what the histogram counts, such as those of every readable
    judgement. The figures are those of `_shares` and `_correlations`, and these, with what their `n` counts:
      readable: judgements. Its interval is Wilson's, which takes judgements as independent.
      score_length: replies with a readable score; Spearman's correlation of score and characters over all of them.
    Beside these:
      score_histogram: `counts` of points by the nearest whole number 0 to 5 (halves go up), those `outside`, and `n`.
      left_out: prompts without a rank correlation, by reason: "fewer than two scored", "equal scores", "equal ranks".
      replies, replies_unreadable: counts.

    Raises ValueError for ids that are not unique, and for counts that cannot be.
    """
    if len({one.id for one in rated}) < len(rated):
        raise ValueError("several of the rated prompts share an id")
    if not 0 <= readable <= judgements:
        raise ValueError(f"{readable} readable of {judgements} judgements")
    rated = sorted(rated, key=lambda one: one.id)  # so that the order of prompts does not change the resamples
    read = [_readable(one) for one in rated]
    shares = [_shares(one, scores, ranks) for one, (scores, ranks, _) in zip(rated, read, strict=True)]
    left_out = Counter(_undefined(scores, ranks) for scores, ranks, _ in read)
    return {
        **_ratios(SHARES, shares, bootstrap, seed),
        **_ratios(CORRELATIONS, [_correlations(*replies) for replies in read], bootstrap, seed, counted=False),
        "readable": _wilson(readable, judgements, len(rated)),
        "score_length": _score_length(read, bootstrap, seed),
        "score_histogram": _histogram(points),
        "left_out": {why: left_out[why] for why in ("fewer than two scored", "equal scores", "equal ranks")},
        "replies": sum(len(one.scores) for one in rated),
        "replies_unreadable": sum(score is None for one in rated for score in one.scores),
    }


def _readable(one: Rated) -> tuple[Numbers, Numbers, Numbers]:
    """[R]: scores, ranks and lengths of the replies with a readable score."""
    kept = [index for index, score in enumerate(one.scores) if score is not None]
    scores, ranks, lengths = (
        np.array([values[index] for index in kept], dtype=float) for values in (one.scores, one.ranks, one.lengths)
    )
    return scores.round(DIGITS), ranks, lengths


def _shares(one: Rated, scores_R: Numbers, ranks_R: Numbers) -> dict[str, Ratio]:
    """One prompt's part in each share, and what `n` counts:

    pairwise_accuracy: pairs of replies to one prompt with different human ranks and two readable scores, all prompts
      together. The judge must put them in the human order: equal scores are wrong.
    tie_share: the same pairs; those with equal scores.
    agreement: the same pairs; equal scores count one half.
    agreement_without_ties: those of them with different scores. It is also the pairwise accuracy without ties.
    five_best: replies with a mean of 5, in prompts with different human ranks; those that no reply outranks.
    exact_match: prompts with different human ranks and all scores readable; those with every such pair in the human
      order. Replies of one human rank may be in any order.
    pair_yield: prompts with two replies or more; those with two different readable scores, of which the loop would
      make a pair.
    """
    better_RR = ranks_R[:, None] < ranks_R[None, :]  # a pair of different ranks is True once
    pairs = int(better_RR.sum())
    right = int((better_RR & (scores_R[:, None] > scores_R[None, :])).sum())
    ties = int((better_RR & (scores_R[:, None] == scores_R[None, :])).sum())
    preference = len(set(one.ranks)) > 1
    complete = preference and len(scores_R) == len(one.ranks)
    five_R = scores_R == PERFECT
    top_R = ranks_R == min(one.ranks, default=0.0)
    return {
        "pairwise_accuracy": (right, pairs),
        "tie_share": (ties, pairs),
        "agreement": (right + 0.5 * ties, pairs),
        "agreement_without_ties": (right, pairs - ties),
        "five_best": (int((five_R & top_R).sum()), int(five_R.sum())) if preference else (0, 0),
        "exact_match": (int(complete and right == pairs), int(complete)),
        "pair_yield": (int(len(set(scores_R.tolist())) > 1), int(len(one.scores) > 1)),
    }


def _correlations(scores_R: Numbers, ranks_R: Numbers, lengths_R: Numbers) -> dict[str, Ratio]:
    """One prompt's part in each mean over the prompts that have the correlation, which `n` counts:

    spearman, kendall_tau (b): of scores and human preference, over replies with a readable score.
    score_length_within: Spearman's of score and characters.
    """
    from scipy import stats

    by_rank, by_length = (not _undefined(scores_R, others_R) for others_R in (ranks_R, lengths_R))
    return {
        "spearman": (spearman(scores_R, -ranks_R), 1) if by_rank else (0, 0),
        "kendall_tau": (float(stats.kendalltau(scores_R, -ranks_R).statistic), 1) if by_rank else (0, 0),
        "score_length_within": (spearman(scores_R, lengths_R), 1) if by_length else (0, 0),
    }


def _histogram(points: Sequence[float]) -> dict[str, Any]:
    rounded = Counter(floor(value + 0.5) for value in points)
    counts = {str(whole): rounded[whole] for whole in range(6)}
    return {"counts": counts, "outside": len(points) - sum(counts.values()), "n": len(points)}


def pairwise_judge_metrics(outcomes: Sequence[Compared], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Figure]:
    """A pairwise judge that was asked in both orders. The figures, and what their `n` counts:

    first_position: decided verdicts (no ties) of comparisons with both orders readable; those for the reply shown
      first. 0.5 is no bias, however good the replies are, because each is shown first once.
    inconsistent: comparisons with both orders readable; those where the orders name different replies, or only one
      names any.
    tie: the same comparisons; those where both orders say tie.
    agreement: comparisons where both orders name one reply and people prefer one; those where it is the same.
    unreadable: verdicts, two per comparison; those that could not be read.
    """
    sums: dict[str, dict[str, Ratio]] = {}
    for one in sorted(outcomes, key=lambda one: one.prompt_id):
        before = sums.get(one.prompt_id, dict.fromkeys(COMPARED, (0, 0)))
        both = (one.first, one.second)
        readable, tie = None not in both, both == ("tie", "tie")
        named = "first" if both == ("A", "B") else "second" if both == ("B", "A") else None
        preferred = one.human in ("first", "second")
        parts = {
            "first_position": (both.count("A"), 2 - both.count("tie")) if readable else (0, 0),
            "inconsistent": (int(readable and not tie and named is None), int(readable)),
            "tie": (int(tie), int(readable)),
            "agreement": (int(named == one.human), 1) if named and preferred else (0, 0),
            "unreadable": (both.count(None), 2),
        }
        sums[one.prompt_id] = {name: (before[name][0] + top, before[name][1] + n) for name, (top, n) in parts.items()}
    return _ratios(COMPARED, list(sums.values()), bootstrap, seed)


def win_rate(
    outcomes: Sequence[Literal["first", "second", "tie"]], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Shares that the first of two models wins, ties and loses, and `win_rate`, where a tie counts one half.

    One outcome per prompt; `n` counts prompts with a readable outcome, so the caller leaves the others out.
    """
    worth = {
        "win": {"first": 1.0},
        "tie": {"tie": 1.0},
        "loss": {"second": 1.0},
        "win_rate": {"first": 1.0, "tie": 0.5},
    }
    prompts = [{name: (of.get(outcome, 0.0), 1) for name, of in worth.items()} for outcome in sorted(outcomes)]
    return _ratios(tuple(worth), prompts, bootstrap, seed)


def mean_figure(values: Sequence[float], *, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The mean of one value per prompt, such as the gain of one model over another; `n` counts the values."""
    return _ratios(("mean",), [{"mean": (value, 1)} for value in sorted(values)], bootstrap, seed, False)["mean"]


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of the texts (1510.03055 sec. 5.3), by words between white space.

    It falls as texts are added, so compare like amounts of text only. None where no text has n words.
    """
    split = [text.split() for text in texts]
    grams = [tuple(words[start : start + n]) for words in split for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def spearman(x: Sequence[float] | Numbers, y: Sequence[float] | Numbers) -> float:
    """Spearman's rank correlation, ties by mean rank. Neither side may be constant."""
    from scipy.stats import rankdata

    first, second = (ranks - ranks.mean() for ranks in map(rankdata, (x, y)))  # half of what scipy's spearmanr holds
    return float(first @ second / sqrt((first @ first) * (second @ second)))


def _undefined(scores: Numbers, others: Numbers) -> str:
    """Why there is no rank correlation, or ""."""
    if len(scores) < 2:
        return "fewer than two scored"
    if len(set(scores.tolist())) == 1:
        return "equal scores"
    return "equal ranks" if len(set(others.tolist())) == 1 else ""


def _ratios(
    names: Sequence[str], prompts: Sequence[Mapping[str, Ratio]], bootstrap: int, seed: int, counted: bool = True
) -> dict[str, Figure]:
    """A figure for each name: the sum of the prompts' numerators over that of their denominators."""
    parts = np.array([[prompt[name] for name in names] for prompt in prompts], dtype=float)
    parts_PF2 = parts.reshape(len(prompts), len(names), 2)
    sums = [np.tensordot(times_P, parts_PF2, axes=1) for times_P in _resamples(len(prompts), bootstrap, seed)]
    top_BF, bottom_BF = np.moveaxis(np.array(sums).reshape(len(sums), len(names), 2), 2, 0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has no prompt that counts: NaN
        resampled_BF = top_BF / bottom_BF
    figures = {}
    for number, name in enumerate(names):
        count, n = float(parts_PF2[:, number, 0].sum()), int(parts_PF2[:, number, 1].sum())
        having = int((parts_PF2[:, number, 1] > 0).sum())
        interval = partial(_percentiles, resampled_BF[:, number])
        figures[name] = _figure(count / n if n else None, n, having, count if counted else None, interval)
    return figures


def _score_length(read: Sequence[tuple[Numbers, Numbers, Numbers]], bootstrap: int, seed: int) -> Figure:
    """Spearman's correlation of score and length over all replies; each resample of prompts is ranked anew."""
    from scipy import stats

    number_R = np.repeat(np.arange(len(read)), [len(scores) for scores, _, _ in read])
    x_R, y_R = (np.concatenate([np.zeros(0), *(replies[side] for replies in read)]) for side in (0, 2))
    value = None if _undefined(x_R, y_R) else spearman(x_R, y_R)

    def interval(value: float) -> tuple[float, float]:
        drawn = []
        for times_P in _resamples(len(read), bootstrap, seed):
            again_R = np.repeat(np.arange(len(x_R)), times_P[number_R])
            ranks_2R = stats.rankdata([x_R[again_R], y_R[again_R]], axis=1)
            with np.errstate(invalid="ignore"):  # equal scores or equal lengths have no correlation: NaN
                drawn.append(np.corrcoef(ranks_2R)[0, 1])
        return _percentiles(np.array(drawn), value)

    return _figure(value, len(x_R), len(set(number_R.tolist())), None, interval)


def _resamples(prompts: int, bootstrap: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """[P], `bootstrap` times: how often a resample has each prompt. None where no figure can be estimated."""
    if prompts < MIN_N:
        return
    rng = np.random.default_rng(seed)
    for _ in range(bootstrap):
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts))


def _figure(
    value: float | None, n: int, prompts: int, count: float | None, interval: Callable[[float], tuple[float, float]]
) -> Figure:
    """`interval` is asked for low and high where the value can be estimated."""
    figure = {"value": None, "low": None, "high": None, "n": n, "prompts": prompts, "count": count, "estimable": False}
    if value is not None and min(n, prompts) >= MIN_N:
        low, high = interval(value)
        figure |= {"value": value, "low": low, "high": high, "estimable": True}
    return figure


def _percentiles(resampled_B: Numbers, value: float) -> tuple[float, float]:
    low, high = np.nanquantile(resampled_B, [0.025, 0.975])
    # The value itself is added up in another order: rounding alone must not put it outside.
    return min(float(low), value), max(float(high), value)


def _wilson(count: int, n: int, prompts: int) -> Figure:
    from scipy import stats

    def interval(value: float) -> tuple[float, float]:
        low, high = stats.binomtest(count, n).proportion_ci(method="wilson")
        return float(low), float(high)

    return _figure(count / n if n else None, n, prompts, count, interval)
