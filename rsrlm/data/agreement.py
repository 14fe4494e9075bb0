"""Sampled judgements that agree with people's ranks: what a model may learn to judge from (EFT, 2401.10020v3, 3.1.1).

The targets are not in the data: the model samples them itself, and scores by reply id say which of them to take.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rsrlm.data.ranked import RankedPrompt
from rsrlm.data.shapes import digest

TIE = 1e-9  # means are not exact: a smaller difference is a tie

Samples = dict[str, list[tuple[int, float]]]  # of each reply by its id: (index, score) of its readable samples


@dataclass(frozen=True, slots=True, kw_only=True)
class NoneAccepted:
    """No judgement of a prompt is taken. The reason is one of a few, which are counted."""

    reason: str


NOT_RANKED = NoneAccepted(reason="fewer than two ranked replies")
ALL_EQUAL = NoneAccepted(reason="all ranks are equal")
NOT_READABLE = NoneAccepted(reason="a ranked reply without readable judgement")
OTHER_ORDER = NoneAccepted(reason="scores in another order")
EQUAL_SCORES = NoneAccepted(reason="equal scores for different ranks")
NO_CHOICE = NoneAccepted(reason="no samples in this order")
NO_MAJORITY = NoneAccepted(reason="no reply agrees more than it disagrees")


def accept(
    prompt: RankedPrompt,
    scores: Mapping[str, Sequence[float | None]],
    rule: Literal["order", "pairs"] = "order",
    most: int = 1,
) -> list[tuple[str, int]] | NoneAccepted:
    """The sampled judgements of a prompt that agree with people's ranks.

    `scores` holds the scores of the judgements sampled for each reply by its id, None for an unreadable one; it may
    hold other prompts' too. Returns (reply id, index of the sample), at most `most` per ranked reply, in the order of
    the replies. A reply's own score is the mean of its readable samples. Replies without rank take no part, equal
    ranks impose nothing, and where ranks differ, equal scores (within 1e-9) disagree.

    order: all or none (2401.10020v3, section 3.1.1, which leaves the number of samples and ties open). Every ranked
    reply has a readable sample, the means agree with every pair of different ranks, and so do the samples taken: of
    all choices of one readable sample per reply that agree, the one with the least sum of distances to the means.
    With a higher `most` the choice is made again from the samples that are left; the means stay.

    pairs: reply by reply. Over the pairs of different ranks whose replies both have a readable sample, a reply is
    accepted if the means agree in more of its pairs than they disagree in, and so does the sample taken with the other
    replies' means: of those that do, the ones nearest to the mean. Both replies of a pair gain or lose by it.

    At the same distance the lowest index is taken, of the first reply first.
    """
    if rule not in ("order", "pairs"):
        raise ValueError(f"rule must be order or pairs, not {rule!r}")
    ranks = {reply.id: reply.rank for reply in prompt.replies if reply.rank is not None}
    if len(ranks) < 2:
        return NOT_RANKED
    if len(set(ranks.values())) == 1:
        return ALL_EQUAL
    samples = {reply: [(i, s) for i, s in enumerate(scores.get(reply, ())) if s is not None] for reply in ranks}
    means = {reply: statistics.fmean(score for _, score in read) for reply, read in samples.items() if read}
    return (_in_order if rule == "order" else _by_pairs)(ranks, samples, means, most)


def _compared(ranks: Mapping[str, float], means: Mapping[str, float]) -> list[tuple[str, str]]:
    """(better, worse) by people, of the replies that have a mean."""
    pairs = itertools.permutations((reply for reply in ranks if reply in means), 2)
    return [(better, worse) for better, worse in pairs if ranks[better] < ranks[worse]]


def _by_pairs(
    ranks: Mapping[str, float], samples: Samples, means: Mapping[str, float], most: int
) -> list[tuple[str, int]] | NoneAccepted:
    pairs = _compared(ranks, means)

    def agrees(reply: str, score: float) -> bool:
        changed = {**means, reply: score}
        leads = [changed[better] - changed[worse] for better, worse in pairs if reply in (better, worse)]
        return sum(1 if lead > TIE else -1 for lead in leads) > 0

    accepted: list[tuple[str, int]] = []
    for reply, mean in means.items():
        if agrees(reply, mean):
            near = sorted(_distances([(i, s) for i, s in samples[reply] if agrees(reply, s)], mean))
            accepted += [(reply, index) for _, index in near[:most]]
    return accepted or NO_MAJORITY


def _in_order(
    ranks: Mapping[str, float], samples: Samples, means: Mapping[str, float], most: int
) -> list[tuple[str, int]] | NoneAccepted:
    if len(means) < len(ranks):
        return NOT_READABLE
    least = min(means[better] - means[worse] for better, worse in _compared(ranks, means))
    if least <= TIE:
        return OTHER_ORDER if least < -TIE else EQUAL_SCORES
    taken: dict[str, list[int]] = {reply: [] for reply in ranks}
    for _ in range(most):
        left = {reply: [(i, s) for i, s in read if i not in taken[reply]] for reply, read in samples.items()}
        for reply, index in _nearest_in_order(ranks, left, means).items():
            taken[reply].append(index)
    return [(reply, index) for reply in ranks for index in taken[reply]] or NO_CHOICE


def _nearest_in_order(ranks: Mapping[str, float], samples: Samples, means: Mapping[str, float]) -> dict[str, int]:
    """One sample per reply in people's order, together nearest to the means; empty where there is no such choice.

    Rank by rank from the worst, keeping the best choice so far for each highest score that it reaches: the next rank
    must lie above that and nothing else matters to it. The nearest sample of each reply would not do: of the samples
    4, 4, 4 and 4, 4, 3 the nearest ones tie, and the last 3 is in order.
    """
    replies = list(ranks)
    best: dict[float, tuple[float, list[tuple[int, int]]]] = {-math.inf: (0.0, [])}  # distance, (reply, sample) taken
    for rank in sorted(set(ranks.values()), reverse=True):
        level = [position for position, reply in enumerate(replies) if ranks[reply] == rank]
        tops = sorted({score for position in level for _, score in samples[replies[position]]})
        reached: dict[float, tuple[float, list[tuple[int, int]]]] = {}
        for (floor, (distance, taken)), top in itertools.product(best.items(), tops):
            inside = [[(i, s) for i, s in samples[replies[position]] if floor + TIE < s <= top] for position in level]
            if not all(inside):
                continue
            near = [min(_distances(some, means[replies[place]])) for place, some in zip(level, inside, strict=True)]
            more = [(position, index) for position, (_, index) in zip(level, near, strict=True)]
            choice = (round(distance + sum(away for away, _ in near), 9), sorted(taken + more))
            reached[top] = min(choice, reached.get(top, choice))
        best = reached
    return {replies[position]: index for position, index in min(best.values())[1]} if best else {}


def _distances(samples: Iterable[tuple[int, float]], mean: float) -> list[tuple[float, int]]:
    """(distance to the mean, index); rounding errors are no part of a distance."""
    return [(round(abs(score - mean), 9), index) for index, score in samples]


def thin(examples: Sequence[tuple[str, float]], most: float, seed: int) -> set[str]:
    """Ids that are kept of (id, score) examples, so that the most common score does not drown the others.

    Examples with that score stay as long as they are at most `most` (above 0, at most 1: all stay) of what is kept;
    those with other scores all stay (2401.10020v3, section 3.1.1, which does not say how many go). Scores are compared
    as they are, 3.5 is not 4; of two equally common ones the higher is thinned. Which go depends on seed and ids alone.
    Where all scores are the same and `most` is below 1, none is kept. Raises ValueError for another `most` or a
    repeated id.
    """
    if not 0 < most <= 1:
        raise ValueError(f"most must be above 0 and at most 1, not {most}")
    kept = {identifier for identifier, _ in examples}
    if len(kept) < len(examples):
        raise ValueError("ids must be unique")
    if most == 1 or not examples:
        return kept
    numbers = Counter(score for _, score in examples)
    common = max(numbers, key=lambda score: (numbers[score], score))
    room = math.floor(most * (len(kept) - numbers[common]) / (1 - most) + TIE)
    crowd = (identifier for identifier, score in examples if score == common)
    return kept - set(sorted(crowd, key=lambda identifier: digest(f"thin {seed}", identifier))[room:])
