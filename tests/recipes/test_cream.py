"""CREAM: rewards, how far two rankings agree, and the label that comes of it."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import response

from rsrlm.judges.verdicts import LOGPROBS_UNREADABLE
from rsrlm.pairing import Candidate
from rsrlm.recipes.cream import Likelihood, consistency, mean_consistency, pair, rewards
from rsrlm.records import NoPair, PreferencePair, Scored, Unparsed, Verdict

NOW, BEFORE = [1.2, -0.3, 0.8, -1.5, 0.1], [0.9, 0.2, 1.1, -0.7, -0.9]


def verdicts(points: Sequence[float | None]) -> dict[str, Verdict]:
    return {
        f"01/tea/{index}": Unparsed(reason="?") if value is None else Scored(points=value)
        for index, value in enumerate(points)
    }


def ranked(points: Sequence[float], cut: Sequence[int] = ()) -> list[Candidate]:
    return [
        Candidate(response=response(index, cut=index in cut), points=value, may_win=index not in cut)
        for index, value in enumerate(points)
    ]


def likelihoods(*logprobs: tuple[float, int]) -> dict[str, Likelihood]:
    return {
        name: Likelihood(logprob=total, tokens=tokens) for name, (total, tokens) in zip("abc", logprobs, strict=False)
    }


def test_rewards_by_hand() -> None:
    now, first = likelihoods((-1.5, 2), (-2.0, 1)), likelihoods((-3.0, 2), (-1.0, 1))
    assert rewards(now, first) == {"a": Scored(points=1.5), "b": Scored(points=-1.0)}
    assert rewards(now, None) == {"a": Scored(points=-0.75), "b": Scored(points=-2.0)}  # the mean of a token


def test_a_reward_that_is_no_number() -> None:
    impossible = likelihoods((-math.inf, 1))
    assert rewards(impossible, likelihoods((-1.0, 1))) == {"a": LOGPROBS_UNREADABLE}
    assert rewards(impossible, impossible) == {"a": LOGPROBS_UNREADABLE}
    assert rewards(likelihoods((0.0, 0)), None) == {"a": LOGPROBS_UNREADABLE}


def test_consistency_by_hand() -> None:
    """7 concordant and 3 discordant pairs: tau = 0.4."""
    assert consistency(verdicts(NOW), verdicts(BEFORE)) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], 0.0),
        ([1, 2, 2], [1, 2, 2], 1.0),  # a tie in both is no disagreement
        ([1, 2, 3], [1, 2, 2], (2 / math.sqrt(3 * 2) + 1) / 2),  # tau-b: 2 concordant, one tie in one ranking
        ([1, None, 3], [1, 2, 3], 1.0),  # ranked by both: 0 and 2
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2, 3], [1, 1, 1], None),
        ([1, None], [1, 2], None),
        ([], [], None),
    ],
)
def test_rankings(now: list[float | None], before: list[float | None], expected: float | None) -> None:
    found = consistency(verdicts(now), verdicts(before))
    assert found == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=7))
@settings(deadline=None, max_examples=100)
def test_the_order_of_responses_does_not_matter(both: list[tuple[int, int]]) -> None:
    now, before = (verdicts([float(pair[side]) for pair in both]) for side in (0, 1))
    found = consistency(now, before)
    assert consistency(dict(reversed(now.items())), before) == pytest.approx(found)
    assert consistency(before, now) == pytest.approx(found)
    assert found is None or 0 <= found <= 1


def test_the_mean_is_over_the_prompts_that_have_one() -> None:
    assert mean_consistency({"a": 0.7, "b": None, "c": 0.5}) == pytest.approx(0.6)
    assert mean_consistency({"a": None}) is None
    assert mean_consistency({}) is None


def test_the_best_against_the_worst_with_the_consistency_as_label() -> None:
    found = pair("01/tea", ranked(NOW), 0.7)
    assert isinstance(found, PreferencePair)
    assert (found.chosen_id, found.rejected_id, found.id) == ("01/tea/0", "01/tea/3", "01/tea/0>3")
    assert (found.chosen_score, found.rejected_score) == (1.2, -1.5)
    assert (found.target, found.weight) == (0.7, 1.0)


@pytest.mark.parametrize(
    ("points", "cut", "target", "reason"),
    [
        ([0.5, 0.5, 0.5], [], 0.7, "equal scores"),
        ([0.5], [], 0.7, "fewer than two scored responses"),
        ([], [], 0.7, "fewer than two scored responses"),
        ([1.0, 0.5], [0, 1], 0.7, "no complete response"),
        ([1.0, 0.5], [0], 0.7, "equal scores"),  # the one that may win is the worst itself
        ([1.0, 0.5], [], None, "no ranking to compare with"),
    ],
)
def test_no_pair(points: list[float], cut: list[int], target: float | None, reason: str) -> None:
    assert pair("01/tea", ranked(points, cut), target) == NoPair(reason=reason)


def test_a_cut_response_may_lose_and_never_wins() -> None:
    found = pair("01/tea", ranked([3.0, 2.0, 1.0], cut=[0, 2]), 0.9)
    assert isinstance(found, PreferencePair)
    assert (found.chosen_id, found.rejected_id) == ("01/tea/1", "01/tea/2")
