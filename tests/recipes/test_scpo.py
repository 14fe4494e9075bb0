"""ScPO: votes, the pair that they make, and its weight."""

from collections import Counter
from collections.abc import Sequence

import pytest
from made import response

from rsrlm.judges.answers import NO_ANSWER, Found, RightAnswer
from rsrlm.recipes.scpo import pair, votes
from rsrlm.records import NoPair, PreferencePair, Response, Scored, group_id

GROUP = group_id(1, "tea")
JUDGE = RightAnswer(RightAnswer.Config(), None)  # type: ignore[arg-type]
EIGHT = ["18", "18", "20", "18", "20", "7", "18", None]


def answers(values: Sequence[str | None], first: int = 0) -> list[Response]:
    return [
        response(index, "I do not know." if value is None else f"Final answer: {value}")
        for index, value in enumerate(values, start=first)
    ]


def read(responses: Sequence[Response]) -> dict[str, Found]:
    return {one.id: JUDGE.read(one) for one in responses}


def made(responses: list[Response], voters: int = 8, least: float = 0.5, seed: int = 0) -> PreferencePair | NoPair:
    voting = sorted(responses, key=lambda one: one.index)[:voters]
    return pair(GROUP, responses, votes(read(responses), voting), least, seed)


def test_votes_by_hand() -> None:
    """18: 4, 20: 2, 7: 1 of 8; the one without an answer votes for nothing and has no number of votes."""
    responses = answers(EIGHT)
    found = votes(read(responses), responses)
    points = [verdict.points for verdict in found.values() if isinstance(verdict, Scored)]
    assert points == [count / 8 for count in (4, 4, 2, 4, 2, 1, 4)]
    assert found["01/tea/7"] == NO_ANSWER


def test_most_against_fewest_votes_weighted_by_the_votes_between() -> None:
    found = made(answers(EIGHT))
    assert isinstance(found, PreferencePair)
    assert found.chosen_id in {f"01/tea/{index}" for index in (0, 1, 3, 6)}
    assert found.rejected_id == "01/tea/5"
    assert found.id == f"{found.chosen_id}>5"
    assert (found.chosen_score, found.rejected_score) == (4 / 8, 1 / 8)
    assert found.weight == 0.375  # (4 - 1) / 8: of all that were asked, not of those that answered
    assert found.target == 1


def test_the_threshold_is_a_share_of_all_that_were_asked() -> None:
    assert isinstance(made(answers(EIGHT), least=0.5), PreferencePair)  # 4 of 8: not less
    assert made(answers(EIGHT), least=0.7) == NoPair(reason="too few votes")  # 4 < 5.6
    seven_of_ten = ["18"] * 7 + ["20", "21", None]
    assert isinstance(made(answers(seven_of_ten), voters=10, least=0.7), PreferencePair)


@pytest.mark.parametrize(
    ("values", "least", "reason"),
    [
        (["18"] * 8, 0.5, "equal votes"),  # no loser
        (["18"] * 4 + ["20"] * 4, 0.5, "equal votes"),
        (["18"] * 7 + [None], 0.5, "equal votes"),  # what cannot be read does not lose
        ([None] * 8, 0.5, "no final answer"),
        (["1", "2", "3", "3", *[None] * 4], 0.3, "too few votes"),
    ],
)
def test_no_pair(values: list[str | None], least: float, reason: str) -> None:
    assert made(answers(values), least=least) == NoPair(reason=reason)


def test_which_of_equal_responses_is_drawn_by_seed() -> None:
    responses = answers(EIGHT)
    drawn = [made(responses, seed=seed) for seed in range(40)]
    chosen = Counter(found.chosen_id for found in drawn if isinstance(found, PreferencePair))
    assert chosen.keys() == {f"01/tea/{index}" for index in (0, 1, 3, 6)}
    assert drawn == [made(responses[::-1], seed=seed) for seed in range(40)]  # in whatever order


def test_others_may_lose_without_voting() -> None:
    """Eight that agree, and two more that were sampled hotter: an answer that nobody voted for has 0 votes."""
    responses = answers(["18"] * 7 + [None] + ["18", "21"])
    found = made(responses)
    assert isinstance(found, PreferencePair)
    assert (found.chosen_score, found.rejected_score, found.rejected_id) == (7 / 8, 0, "01/tea/9")
    assert found.weight == 0.875
