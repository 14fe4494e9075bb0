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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

Figure = dict[str, Any]

MIN_N = 30
DIGITS = 9  # means of N judgements are not exact: what differs after this is a tie
PERFECT = 5.0
CELLS = 1_000_000  # of one array during the bootstrap, so that its memory does not grow with the data


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """The replies to one prompt, in any order; a preference data set is the case of two.

    `ranks` are human: lower is better, equal ones are ties. `scores` are the judge's means, None without a readable
    judgement. `lengths` are in characters. Raises ValueError where these are not as many, or not finite.
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

    None is an unreadable verdict. `human` is the reply that people prefer, None where nobody said. Several comparisons
    may share a prompt.
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
    judgement. The figures, and what their `n` counts:
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
      spearman, kendall_tau (b): prompts; the mean over them of the correlation of scores and human preference, over
        replies with a readable score. `left_out` counts the prompts where none is defined.
      readable: judgements. Its interval is Wilson's, which takes judgements as independent.
      score_length: replies with a readable score; Spearman's correlation of score and characters over all of them.
      score_length_within: prompts; the mean over them of that correlation within the prompt.
    Beside these:
      score_histogram: `counts` of points by the nearest whole number 0 to 5 (halves go up), those `outside`, and `n`.
      left_out: prompts without a rank correlation, by reason: "fewer than two scored", "equal scores", "equal ranks".
      replies, replies_unreadable: counts.

    Raises ValueError for ids that are not unique, and for counts that cannot be.
    """
    import numpy as np

    if len({one.id for one in rated}) < len(rated):
        raise ValueError("several of the rated prompts share an id")
    if not 0 <= readable <= judgements:
        raise ValueError(f"{readable} readable of {judgements} judgements")
    shares: dict[str, list[tuple[float, float]]] = {
        name: []
        for name in (
            "pairwise_accuracy",
            "tie_share",
            "agreement",
            "agreement_without_ties",
            "five_best",
            "exact_match",
            "pair_yield",
        )
    }
    means: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("spearman", "kendall_tau", "score_length_within")
    }
    left_out = {"fewer than two scored": 0, "equal scores": 0, "equal ranks": 0}
    replies: list[tuple[int, float, float]] = []  # prompt, score, characters
    ordered = sorted(rated, key=lambda one: one.id)  # so that the order of prompts does not change the resamples
    for number, one in enumerate(ordered):
        kept = [index for index, score in enumerate(one.scores) if score is not None]
        scores = np.array([one.scores[index] for index in kept], dtype=float).round(DIGITS)
        ranks = np.array([one.ranks[index] for index in kept], dtype=float)
        lengths = np.array([one.lengths[index] for index in kept], dtype=float)
        replies += [(number, score, length) for score, length in zip(scores, lengths, strict=True)]

        better = ranks[:, None] < ranks[None, :]  # a pair of different ranks is True once
        right = int((better & (scores[:, None] > scores[None, :])).sum())
        ties = int((better & (scores[:, None] == scores[None, :])).sum())
        pairs = int(better.sum())
        shares["pairwise_accuracy"].append((right, pairs))
        shares["tie_share"].append((ties, pairs))
        shares["agreement"].append((right + 0.5 * ties, pairs))
        shares["agreement_without_ties"].append((right, pairs - ties))
        preference = len(set(one.ranks)) > 1
        fives = scores == PERFECT
        top = fives & (ranks == min(one.ranks, default=0.0))
        shares["five_best"].append((int(top.sum()), int(fives.sum())) if preference else (0, 0))
        complete = preference and len(kept) == len(one.ranks)
        shares["exact_match"].append((int(complete and right == pairs), int(complete)))

        shares["pair_yield"].append((int(len(set(scores.tolist())) > 1), int(len(one.scores) > 1)))

        reason = _undefined(scores, ranks)
        if reason:
            left_out[reason] += 1
        means["spearman"].append((0.0, 0) if reason else (spearman(scores, -ranks), 1))
        means["kendall_tau"].append((0.0, 0) if reason else (_kendall(scores, -ranks), 1))
        apart = _undefined(scores, lengths)
        means["score_length_within"].append((0.0, 0) if apart else (spearman(scores, lengths), 1))

    rounded = [floor(value + 0.5) for value in points]
    counts = {str(whole): rounded.count(whole) for whole in range(6)}
    return {
        **_ratios(shares, bootstrap, seed),
        **_ratios(means, bootstrap, seed, counted=False),
        "readable": _wilson(readable, judgements, len(rated)),
        "score_length": _correlation(replies, len(ordered), bootstrap, seed),
        "score_histogram": {"counts": counts, "outside": len(points) - sum(counts.values()), "n": len(points)},
        "left_out": left_out,
        "replies": sum(len(one.scores) for one in rated),
        "replies_unreadable": sum(score is None for one in rated for score in one.scores),
    }


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
    names = ("first_position", "inconsistent", "tie", "agreement", "unreadable")
    prompts: dict[str, dict[str, tuple[float, float]]] = {}
    for one in outcomes:
        found = prompts.setdefault(one.prompt_id, dict.fromkeys(names, (0, 0)))
        both = (one.first, one.second)
        readable = None not in both
        named = "first" if both == ("A", "B") else "second" if both == ("B", "A") else None
        tie = both == ("tie", "tie")
        preferred = one.human in ("first", "second")
        added = {
            "first_position": (both.count("A"), 2 - both.count("tie")) if readable else (0, 0),
            "inconsistent": (int(readable and not tie and named is None), int(readable)),
            "tie": (int(tie), int(readable)),
            "agreement": (int(named == one.human), 1) if named and preferred else (0, 0),
            "unreadable": (both.count(None), 2),
        }
        for name, (numerator, denominator) in added.items():
            found[name] = (found[name][0] + numerator, found[name][1] + denominator)
    ordered = [found for _, found in sorted(prompts.items())]
    return _ratios({name: [found[name] for found in ordered] for name in names}, bootstrap, seed)


def win_rate(
    outcomes: Sequence[Literal["first", "second", "tie"]], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Shares that the first of two models wins, ties and loses, and `win_rate`, where a tie counts one half.

    One outcome per prompt; `n` counts prompts with a readable outcome, so the caller leaves the others out.
    """
    ordered = sorted(outcomes)
    worth = {
        "win": {"first": 1.0},
        "tie": {"tie": 1.0},
        "loss": {"second": 1.0},
        "win_rate": {"first": 1.0, "tie": 0.5},
    }
    columns = {name: [(value.get(one, 0.0), 1) for one in ordered] for name, value in worth.items()}
    return _ratios(columns, bootstrap, seed)


def mean_figure(values: Sequence[float], *, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The mean of one value per prompt, such as the gain of one model over another; `n` counts the values."""
    return _ratios({"mean": [(value, 1) for value in sorted(values)]}, bootstrap, seed, counted=False)["mean"]


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of the texts (1510.03055 sec. 5.3), by words between white space.

    It falls as texts are added, so compare like amounts of text only. None where no text has n words.
    """
    split = [text.split() for text in texts]
    grams = [tuple(words[start : start + n]) for words in split for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def spearman(x: "Sequence[float] | Numbers", y: "Sequence[float] | Numbers") -> float:
    """Spearman's rank correlation, ties by mean rank. Neither side may be constant."""
    from scipy import stats

    return float(stats.spearmanr(x, y).statistic)


def _kendall(x: "Numbers", y: "Numbers") -> float:
    from scipy import stats

    return float(stats.kendalltau(x, y).statistic)


def _undefined(scores: "Numbers", others: "Numbers") -> str:
    """Why there is no rank correlation, or ""."""
    if len(scores) < 2:
        return "fewer than two scored"
    if len(set(scores.tolist())) == 1:
        return "equal scores"
    return "equal ranks" if len(set(others.tolist())) == 1 else ""


def _ratios(
    columns: Mapping[str, Sequence[tuple[float, float]]], bootstrap: int, seed: int, counted: bool = True
) -> dict[str, Figure]:
    """A figure for each column of (numerator, denominator) per prompt: the sum of the one over that of the other."""
    import numpy as np

    prompts = len(next(iter(columns.values())))
    top_PF = np.array([[pair[0] for pair in column] for column in columns.values()], dtype=float).T
    bottom_PF = np.array([[pair[1] for pair in column] for column in columns.values()], dtype=float).T
    drawn: list[Numbers] = []
    for weights_BP in _resamples(prompts, prompts, bootstrap, seed):
        below_BF = weights_BP @ bottom_PF
        drawn.append(np.divide(weights_BP @ top_PF, below_BF, out=np.full_like(below_BF, np.nan), where=below_BF > 0))
    resampled_BF = np.concatenate(drawn) if drawn else np.zeros((0, len(columns)))
    figures = {}
    for column, name in enumerate(columns):
        count, n = float(top_PF[..., column].sum()), int(bottom_PF[..., column].sum())
        having = int((bottom_PF[..., column] > 0).sum())
        figures[name] = _figure(
            count / n if n else None, n, having, count if counted else None, resampled_BF[:, column]
        )
    return figures


def _correlation(replies: Sequence[tuple[int, float, float]], prompts: int, bootstrap: int, seed: int) -> Figure:
    """Spearman's correlation over all replies, which are (prompt, x, y); intervals rank each resample anew."""
    import numpy as np

    number_R, x_R, y_R = (np.array(column) for column in (zip(*replies, strict=True) if replies else ([], [], [])))
    n, having = len(replies), len(set(number_R.tolist()))
    if n < MIN_N or having < MIN_N or _undefined(x_R, y_R):
        return _figure(None, n, having, None, np.zeros(0))
    drawn = []
    for weights_BP in _resamples(prompts, n, bootstrap, seed):
        weights_BR = weights_BP[:, number_R]
        total_B1 = weights_BR.sum(axis=1, keepdims=True)
        centred = []
        for values_R in (x_R, y_R):
            ranks_BR = _mid_ranks(values_R, weights_BR)
            centred.append(ranks_BR - (weights_BR * ranks_BR).sum(axis=1, keepdims=True) / total_B1)
        x_BR, y_BR = centred
        both_B, own_B = (weights_BR * x_BR * y_BR).sum(axis=1), (weights_BR * x_BR**2).sum(axis=1)
        scale_B = np.sqrt(own_B * (weights_BR * y_BR**2).sum(axis=1))
        drawn.append(np.divide(both_B, scale_B, out=np.full_like(scale_B, np.nan), where=scale_B > 0))
    return _figure(spearman(x_R, y_R), n, having, None, np.concatenate(drawn))


def _mid_ranks(values_R: "Numbers", weights_BR: "Numbers") -> "Numbers":
    """[B, R]: the mean rank, less one half, of each value among the values repeated as the weights say."""
    import numpy as np

    _, place_R = np.unique(values_R, return_inverse=True)
    order_R = np.argsort(place_R, kind="stable")
    starts_U = np.searchsorted(place_R[order_R], np.arange(place_R.max() + 1))
    counts_BU = np.add.reduceat(weights_BR[:, order_R], starts_U, axis=1)
    return (counts_BU.cumsum(axis=1) - counts_BU / 2)[:, place_R]


def _resamples(prompts: int, width: int, bootstrap: int, seed: int) -> "Iterator[Numbers]":
    """Chunks of [B, P]: how often each prompt is in a resample; no chunk where no figure can be estimated."""
    import numpy as np

    if prompts < MIN_N:
        return
    rng = np.random.default_rng(seed)
    chunk = max(1, CELLS // width)
    for start in range(0, bootstrap, chunk):
        size = min(chunk, bootstrap - start)
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=size).astype(float)


def _figure(value: float | None, n: int, prompts: int, count: float | None, resampled: "Numbers") -> Figure:
    import numpy as np

    if value is None or min(n, prompts) < MIN_N:
        return _described(None, None, None, n, prompts, count)
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    # The value itself is added up in another order: rounding alone must not put it outside.
    return _described(value, min(float(low), value), max(float(high), value), n, prompts, count)


def _wilson(count: int, n: int, prompts: int) -> Figure:
    from scipy import stats

    if min(n, prompts) < MIN_N:
        return _described(None, None, None, n, prompts, count)
    interval = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    return _described(count / n, float(interval.low), float(interval.high), n, prompts, count)


def _described(
    value: float | None, low: float | None, high: float | None, n: int, prompts: int, count: float | None
) -> Figure:
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "prompts": prompts,
        "count": count,
        "estimable": value is not None,
    }
