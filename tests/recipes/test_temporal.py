"""Temporal Self-Rewarding: whose response is chosen and whose rejected."""

from collections.abc import Sequence

import pytest
from made import response

from rsrlm.pairing import Candidate, candidates, pair_of
from rsrlm.recipes.temporal import chosen_and_rejected
from rsrlm.records import NoPair, PreferencePair, Scored, Unparsed, group_id
from rsrlm.settings.methods import Pair

NOW = [3.2, 4.1, 2.8, 3.9]


def scored(points: Sequence[float], model: str, first: int = 0) -> list[Candidate]:
    return [
        Candidate(response=response(index, model=model), points=value, may_win=True)
        for index, value in enumerate(points, start=first)
    ]


def paired(now: Sequence[float], past: Sequence[float], future: Sequence[float] = ()) -> object:
    """(points, author) of the chosen and of the rejected response, or the reason why there is no pair."""
    found = chosen_and_rejected(scored(now, "M2"), scored(past, "M0", 10), scored(future, "M2+future", 20))
    assert not isinstance(found, NoPair)
    chosen, rejected = found
    made = pair_of(group_id(1, "tea"), chosen, rejected)
    if isinstance(made, NoPair):
        return made.reason
    assert (made.chosen_id, made.rejected_id) == (chosen.response.id, rejected.response.id)
    assert made.id == f"01/tea/{chosen.response.index}>{rejected.response.index}"
    return [(one.points, one.response.weight_version) for one in (chosen, rejected)]


@pytest.mark.parametrize(
    ("past", "future", "expected"),
    [
        ([2.1, 3.6, 3.0], [], [(4.1, "M2"), (2.1, "M0")]),
        ([2.1, 3.6, 3.0], [4.0, 4.4, 3.7], [(4.4, "M2+future"), (2.1, "M0")]),
        ([3.5, 3.6, 3.0], [], [(4.1, "M2"), (2.8, "M2")]),  # the first model's worst is better than the own worst
        ([2.8, 3.6], [], [(4.1, "M2"), (2.8, "M2")]),  # not strictly worse
        ([2.8 - 1e-12], [], [(4.1, "M2"), (2.8, "M2")]),  # a sum in another order
        ([2.1], [4.0, 4.1], [(4.1, "M2"), (2.1, "M0")]),  # not strictly better
        ([2.1], [4.1 + 1e-12], [(4.1, "M2"), (2.1, "M0")]),
        ([], [4.2], [(4.2, "M2+future"), (2.8, "M2")]),
    ],
)
def test_by_hand(past: list[float], future: list[float], expected: object) -> None:
    assert paired(NOW, past, future) == expected


def test_equal_scores_make_no_pair() -> None:
    assert paired([3.0, 3.0], [3.0]) == "equal scores"


def test_the_first_of_equals_counts() -> None:
    found = chosen_and_rejected(scored([4.0, 4.0, 1.0, 1.0], "M2"), scored([0.5, 0.5], "M0", 10))
    assert not isinstance(found, NoPair)
    assert [one.response.index for one in found] == [0, 10]


def test_a_cut_response_may_lose_and_never_wins() -> None:
    """Whichever model wrote it. What could not be read takes no part."""

    def taking_part(points: Sequence[float | None], cut: Sequence[int], first: int) -> list[Candidate]:
        made = [response(first + index, cut=index in cut) for index in range(len(points))]
        verdicts = {
            one.id: Unparsed(reason="no score line") if value is None else Scored(points=value)
            for one, value in zip(made, points, strict=True)
        }
        return candidates(made, verdicts, Pair())

    now, past = taking_part([5.0, 4.0, None], [0], 0), taking_part([1.0, None], [0], 10)
    future = taking_part([9.0, 4.5], [0], 20)
    found = chosen_and_rejected(now, past, future)
    assert not isinstance(found, NoPair)
    assert [one.response.index for one in found] == [21, 10]
    assert chosen_and_rejected(now[:1], past, future) == NoPair(reason="no complete response")
    assert chosen_and_rejected([], past, future) == NoPair(reason="no scored response")


def test_two_models_may_write_the_same() -> None:
    now = [Candidate(response=response(0, tokens=(7,)), points=4.0, may_win=True)]
    past = [Candidate(response=response(10, tokens=(7,)), points=2.0, may_win=True)]
    found = chosen_and_rejected(now, past)
    assert not isinstance(found, NoPair)
    assert pair_of("01/tea", *found) == NoPair(reason="same tokens")


def test_the_version_on_the_pair_is_that_of_the_chosen() -> None:
    found = chosen_and_rejected(scored(NOW, "M2"), scored([1.0], "M0", 10), scored([9.0], "M2+future", 20))
    assert not isinstance(found, NoPair)
    made = pair_of("01/tea", *found)
    assert isinstance(made, PreferencePair)
    assert made.weight_version == "M2+future"
