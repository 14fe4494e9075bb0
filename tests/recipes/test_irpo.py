"""Iterative RPO: which answers are right, and which pairs a prompt gives."""

from collections.abc import Sequence

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st
from made import response

from rsrlm.judges.answers import RightAnswer
from rsrlm.recipes.irpo import cycled, pairs
from rsrlm.recipes.parts import given
from rsrlm.records import NoPair, PreferencePair, Prompt, Response, Sampling, Task, Unparsed, Verdict, group_id

GROUP = group_id(1, "tea")
ASKED = Prompt(id="tea", text="?", data={"answer": "7"})
GOLD = given(Task(iteration=1, prompt=ASKED), "3 + 4 = 7", (1, 9), (77, 2))
JUDGE = RightAnswer(RightAnswer.Config(), None)  # type: ignore


def answers(*values: str | None) -> list[Response]:
    return [
        response(index, "I do not know." if value is None else f"Final answer: {value}")
        for index, value in enumerate(values)
    ]


def verdicts(responses: Sequence[Response]) -> dict[str, Verdict]:
    return {one.id: JUDGE.verdict(ASKED, JUDGE.read(one)) for one in responses}


def paired(responses: Sequence[Response], most: int = 10, solution: Response | None = None) -> list[str] | str:
    """The pairs as "chosen>rejected", or the reason why there is none; 7 is the right answer."""
    found = pairs(GROUP, responses, verdicts(responses), most, solution)
    return found.reason if isinstance(found, NoPair) else [pair.id.removeprefix(f"{GROUP}/") for pair in found]


def test_both_lists_are_walked_at_once() -> None:
    """Winners 0 1 2, losers 3 4, five pairs: each list starts again at its end."""
    five = answers("7", "7.0", "7", "8", "9")
    assert paired(five, 5) == ["0>3", "1>4", "2>3", "0>4", "1>3"]
    assert paired(five, 2) == ["0>3", "1>4"]
    assert paired(five) == ["0>3", "1>4", "2>3", "0>4", "1>3", "2>4"]  # no pair comes twice


@examples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_all_take_part_and_none_twice(right: int, wrong: int, most: int) -> None:
    winners, losers = ([response(index) for index in range(start, start + n)] for start, n in ((0, right), (50, wrong)))
    found = [(winner.index, loser.index) for winner, loser in cycled(winners, losers, most)]
    assert len(set(found)) == len(found) <= most
    if most >= max(right, wrong):
        assert {winner for winner, _ in found} == set(range(right))
        assert {loser for _, loser in found} == set(range(50, 50 + wrong))


def test_the_records() -> None:
    right, wrong = answers("7", "8")
    assert pairs(GROUP, [right, wrong], verdicts([right, wrong]), 10) == [
        PreferencePair(
            id="01/tea/0>1", prompt_id="tea", kind="actor", chosen_id="01/tea/0", rejected_id="01/tea/1",
            prompt_token_ids=(1, 9), chosen_token_ids=(100, 2), rejected_token_ids=(101, 2), chosen_score=1.0,
            rejected_score=0.0, weight_version="M1", weight=1.0, target=1.0,
        )
    ]  # fmt: skip


def test_no_final_answer_is_no_right_one() -> None:
    """It loses, as all do that have no reward; or it takes no part. It never wins."""
    mixed = answers("7", None, "8")
    assert paired(mixed) == ["0>1", "0>2"]


def test_what_was_cut_may_lose_and_never_wins() -> None:
    responses = [response(0, "Final answer: 7", cut=True), response(1, "Final answer: 7")]
    assert paired(responses) == ["1>0"]
    assert paired(responses[:1]) == "no right answer"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["7", "7"], "no wrong answer"),
        (["8", "9"], "no right answer"),
        ([None, None], "no right answer"),
    ],
)
def test_without_winners_or_losers_there_is_no_pair(values: list[str | None], reason: str) -> None:
    assert paired(answers(*values)) == reason


def test_a_function_that_scores_nothing_readable_makes_no_pair() -> None:
    """Answers without a verdict take no part: the others need one another."""
    right, none, wrong = answers("7", None, "8")
    found = {**verdicts([right, wrong]), none.id: Unparsed(reason="function raised ValueError")}
    (pair,) = pairs(GROUP, [right, none, wrong], found, 10)
    assert (pair.chosen_id, pair.rejected_id) == (right.id, wrong.id)
    for one, reason in ((right, "no wrong answer"), (wrong, "no right answer")):
        assert pairs(GROUP, [one, none], found, 10) == NoPair(reason=reason)
    assert pairs(GROUP, [none], found, 10) == NoPair(reason="no readable answer")


def test_a_solution_that_came_with_the_prompt_is_a_winner_more() -> None:
    assert GOLD.complete
    assert given(Task(iteration=1, prompt=ASKED), "3 + 4 = 7", (1, 9), (77, 2)) == Response(
        id="01/tea/g", prompt_id="tea", index=-1, role="data", text="3 + 4 = 7", token_ids=(77, 2),
        prompt_token_ids=(1, 9), finish_reason="stop", weight_version="",
        sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=0, seed=0),
    )  # fmt: skip
    assert paired(answers("8", "9"), solution=GOLD) == ["g>0", "g>1"]
    assert paired(answers("7", "8", "9"), solution=GOLD) == ["0>1", "g>2"]
    assert paired(answers("7", "7"), solution=GOLD) == "no wrong answer"
    same = [response(0, "Final answer: 7", tokens=(77, 2)), response(1, "Final answer: 8")]
    assert paired(same, solution=GOLD) == ["0>1"]  # the model wrote it itself


def test_equal_and_empty_responses() -> None:
    """Of responses with the same tokens the first takes part; one without text does not."""
    twice = [response(0, "Final answer: 7", tokens=(5,)), response(1, "Final answer: 7", tokens=(5,))]
    wrong = [response(2, "Final answer: 8"), response(3, " \n")]
    assert paired([*wrong, *twice]) == ["0>2"]
