"""The tree of a search, without engines: which node is looked at next, and what a search has found (AlphaLLM,
2404.12253v2)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rapidfuzz.distance import Levenshtein

from rsrlm.pairing import TIE
from rsrlm.records import NoPair, Response, Scored, Verdict


@dataclass(kw_only=True)
class Node:
    """The beginning of an answer, what it is worth by itself, and the means over what was found behind it.

    `tried` counts the options after it, with those whose critics could not be read: they are no children.
    """

    path: str  # of the root "t", of its third option "t2", of the first option after that "t2.0"
    answer: Response
    done: bool = False
    points: float = 0.0
    visits: int = 0
    total: float = 0.0
    tried: int = 0
    children: list["Node"] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return self.total / self.visits if self.visits else 0.0

    def next_path(self) -> str:
        return f"{self.path}{self.tried}" if self.path == "t" else f"{self.path}.{self.tried}"


def ucb(mean: float, visits: int, visits_of_parent: int, c: float) -> float:
    """w + c * sqrt(2 ln N / n). The authors' code leaves out the 2, which is a c of c / sqrt(2)."""
    return mean + c * math.sqrt(2 * math.log(visits_of_parent) / visits)


def children_of(mean: float, means: Sequence[float], alpha: float, least: int, most: int) -> int:
    """How many children a node may have: the more, the further one of them is from it."""
    importance = max((abs(one - mean) for one in means), default=0.0)
    return max(least, min(math.floor(alpha * importance) + 1, most))


def walk(root: Node, c: float, width: Any) -> list[Node]:
    """From the root by UCB to a node that may have another child, or to a finished answer. `width` has alpha, and least
    and most children, of the root and of others."""
    path = [root]
    while not (node := path[-1]).done:
        least, most = (width.root_least, width.root_most) if node is root else (width.least, width.most)
        means = [child.mean for child in node.children]
        if len(means) < children_of(node.mean, means, width.alpha, least, most):
            break
        path.append(max(node.children, key=lambda child: ucb(child.mean, child.visits, node.visits, c)))
    return path


def back_up(path: Sequence[Node], points: float) -> None:
    for node in path:
        node.visits += 1
        node.total += points


def least_distance(text: str, others: Sequence[str]) -> float:
    """Edits between a text and the nearest of the others, in characters; infinite where there are none."""
    plain = text.strip()
    return min((float(Levenshtein.distance(plain, one.strip())) for one in others), default=math.inf)


def worth(critics: Iterable[tuple[float, Sequence[Verdict]]]) -> float | None:
    """The sum over critics of weight and mean verdict. Those that were asked nothing add nothing; None where one was
    asked and cannot be read."""
    found = 0.0
    for weight, verdicts in critics:
        readable = [one.points for one in verdicts if isinstance(one, Scored)]
        if verdicts and not readable:
            return None
        found += weight * fmean(readable) if readable else 0.0
    return found


def is_leaf(response: Response) -> bool:
    """Whether a finished answer stands in the tree; else it is a rollout, such as `00/tea/t0.2.r1`."""
    return "r" not in response.id.rpartition("/")[2]


def ranked_leaves(responses: Sequence[Response], outcomes: Mapping[str, Verdict]) -> list[tuple[Response, float]]:
    """Leaves with their outcomes, the best first, and of equal ones the first that was found. An answer that was cut is
    none."""
    leaves = [
        (one, verdict.points)
        for one in sorted(responses, key=lambda one: one.index)
        if is_leaf(one) and one.complete and one.text.strip() and isinstance(verdict := outcomes[one.id], Scored)
    ]
    return sorted(leaves, key=lambda leaf: -leaf[1])


def kept(responses: Sequence[Response], outcomes: Mapping[str, Verdict], least: float) -> Response | NoPair:
    """The best leaf, if its outcome is strictly above `least`."""
    ranked = ranked_leaves(responses, outcomes)
    if not ranked:
        return NoPair(reason="no finished answer with an outcome")
    best, outcome = ranked[0]
    return best if outcome > least + TIE else NoPair(reason="outcome not above least")
