"""Judge pairs by hand: battle matrix, position weights and Bradley-Terry fit of the paper, and what it leaves open."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.meta_judging import (
    EVEN,
    TIE,
    PositionWeights,
    battle_matrix,
    bradley_terry,
    comparison_id,
    contestants,
    judge_pair,
    matches,
    most_comparisons,
    most_uncertain,
    position_weights,
    result,
)
from rsrlm.recipes.meta_rewarding import Meta
from rsrlm.records import (
    FinishReason,
    Judgement,
    NoPair,
    PreferencePair,
    Preferred,
    Response,
    Sampling,
    Scored,
    Unparsed,
    Verdict,
    Winner,
)

WINNERS: dict[int, Winner] = {1: "A", 0: "tie", -1: "B"}
SAMPLING = Sampling(temperature=0.8, top_p=1.0, max_tokens=8, seed=1)
UNREAD = Unparsed(reason="no winner line")
# r by (shown first, shown second), as in the worked example: three judgements, six comparisons
EXAMPLE = {(0, 1): 1, (1, 0): -1, (0, 2): 1, (2, 0): 1, (1, 2): 1, (2, 1): 0}


def response(index: int) -> Response:
    return Response(
        id=f"03/tea/{index}", prompt_id="tea", index=index, role="actor", text="t", token_ids=(7, 2),
        prompt_token_ids=(1,), finish_reason="stop", weight_version="M3", sampling=SAMPLING,
    )  # fmt: skip


def judgement(
    index: int,
    points: float | None = 3.0,
    of: int = 0,
    text: str | None = None,
    finish: FinishReason = "stop",
    tokens: tuple[int, ...] | None = None,
) -> Judgement:
    return Judgement(
        id=f"03/tea/{of}#{index}", prompt_id="tea", response_id=f"03/tea/{of}", index=index, role="judge",
        judge="additive", text=f"because {index}" if text is None else text,
        token_ids=(50 + index, 2) if tokens is None else tokens, finish_reason=finish, weight_version="M3",
        sampling=SAMPLING, verdict=UNREAD if points is None else Scored(points=points),
    )  # fmt: skip


def compared(first: Judgement, second: Judgement, r: int | None) -> Judgement:
    verdict: Verdict = UNREAD if r is None else Preferred(winner=WINNERS[r])
    return Judgement(
        id=comparison_id(first, second), prompt_id="tea", response_id=first.response_id, index=first.index, role="meta",
        judge="meta", text="", token_ids=(), finish_reason="stop", weight_version="M3", sampling=SAMPLING,
        verdict=verdict,
    )  # fmt: skip


def all_compared(found: Sequence[Judgement], results: Mapping[tuple[int, int], int | None]) -> list[Judgement]:
    by_index = {one.index: one for one in found}
    return [compared(by_index[m], by_index[n], r) for (m, n), r in results.items()]


def test_position_weights_of_the_example() -> None:
    comparisons = all_compared([judgement(i) for i in range(3)], EXAMPLE)
    assert position_weights(comparisons) == PositionWeights(first=0.2, second=0.8)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([0, 0, None], EVEN),  # nobody won
        ([], EVEN),
        ([1, 1, 1], PositionWeights(first=0.0, second=1.0)),  # always the first position: such wins say nothing
        ([-1, None], PositionWeights(first=1.0, second=0.0)),
        ([1, -1, 0, None], EVEN),
    ],
)
def test_position_weights_at_the_edges(results: list[int | None], expected: PositionWeights) -> None:
    assert position_weights([compared(judgement(0), judgement(1), r) for r in results]) == expected


def test_battle_matrix_of_the_example() -> None:
    found = battle_matrix([0, 1, 2], EXAMPLE, PositionWeights(first=0.2, second=0.8))
    assert found == [[0.0, pytest.approx(1.0), 0.2], [0.0, 0.0, 0.2], [0.2, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("ridge", "expected"),
    [(0.01, [1.058, -0.768, -0.291]), (1e-9, [1.136, -0.816, -0.320])],
)
def test_bradley_terry_of_the_example(ridge: float, expected: list[float]) -> None:
    battles = battle_matrix([0, 1, 2], EXAMPLE, PositionWeights(first=0.2, second=0.8))
    assert bradley_terry(battles, ridge) == pytest.approx(expected, abs=1e-3)


def test_bradley_terry_stays_finite_where_one_never_lost() -> None:
    scores = bradley_terry([[0, 1, 1], [0, 0, 1], [0, 0, 0]], 0.01)
    assert scores[0] > scores[1] > scores[2]
    assert max(map(abs, scores)) < 10
    assert bradley_terry([[0.0, 0.0], [0.0, 0.0]], 0.01) == [0.0, 0.0]


@pytest.mark.parametrize("ridge", [0.001, 0.01])
@pytest.mark.parametrize(
    "scores", [(1.0, -1.0), (2.0, 0.5, -2.5), (1.5, 1.25, 0.5, -0.25, -1.0, -2.0), (0.3, 0.2, 0.1, 0.0, -0.1, -0.5)]
)
def test_bradley_terry_is_more_exact_than_what_it_calls_a_tie(scores: tuple[float, ...], ridge: float) -> None:
    """Everyone beats the next one only, B_k times. The gradient is 0 where B_k sigmoid(-(e_k - e_k+1)) is
    2 ridge (e_0 + ... + e_k), so for scores that are given, B_k = 2 ridge (e_0 + ... + e_k) (1 + exp(e_k - e_k+1))."""
    battles = [[0.0] * len(scores) for _ in scores]
    for k, (one, other) in enumerate(itertools.pairwise(scores)):
        battles[k][k + 1] = 2 * ridge * sum(scores[: k + 1]) * (1 + math.exp(one - other))
    assert bradley_terry(battles, ridge) == pytest.approx(scores, abs=TIE / 4)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**32))
def test_in_a_balanced_round_robin_the_order_is_that_of_the_wins(number: int, seed: int) -> None:
    """Every two meet once and one wins: wins are sufficient for Bradley-Terry, and the ridge keeps the order."""
    draw = random.Random(seed)
    battles = [[0.0] * number for _ in range(number)]
    for m, n in itertools.combinations(range(number), 2):
        winner, loser = draw.sample([m, n], 2)
        battles[winner][loser] = 1.0
    scores = bradley_terry(battles, 0.01)
    wins = [sum(row) for row in battles]
    assert sum(scores) == pytest.approx(0, abs=1e-9)
    for m, n in itertools.permutations(range(number), 2):
        if wins[m] > wins[n]:
            assert scores[m] > scores[n] + 1e-6
        elif wins[m] == wins[n]:
            assert scores[m] == pytest.approx(scores[n], abs=1e-5)


def test_the_pair_of_the_example() -> None:
    found = [judgement(i) for i in range(3)]
    pair = judge_pair(
        (1, 9), found, all_compared(found, EXAMPLE), PositionWeights(first=0.2, second=0.8), Meta(), seed=0
    )
    assert isinstance(pair, PreferencePair)
    assert pair == PreferencePair(
        id="03/tea/0#0>1",
        prompt_id="tea",
        kind="judge",
        chosen_id="03/tea/0#0",
        rejected_id="03/tea/0#1",
        prompt_token_ids=(1, 9),
        chosen_token_ids=(50, 2),
        rejected_token_ids=(51, 2),
        chosen_score=pytest.approx(1.058, abs=1e-3),  # type: ignore[arg-type]
        rejected_score=pytest.approx(-0.768, abs=1e-3),  # type: ignore[arg-type]
        weight_version="M3",
    )
    # The last digits of a fit differ from machine to machine.
    for score in (pair.chosen_score, pair.rejected_score):
        assert score == round(score, 6) != round(score, 5)


@pytest.mark.parametrize(("r", "expected"), [(1, 1), (-1, -1), (0, 0), (None, 0)])
def test_the_result_of_a_comparison(r: int | None, expected: int) -> None:
    found = result(compared(judgement(0), judgement(1), r))
    assert found == expected
    assert found is not None


def test_a_purely_positional_judge_makes_no_pair() -> None:
    found = [judgement(i) for i in range(3)]
    always_first = all_compared(found, dict.fromkeys(itertools.permutations(range(3), 2), 1))
    for weights in (EVEN, position_weights(always_first)):
        assert judge_pair((1,), found, always_first, weights, Meta(), seed=0) == NoPair(reason="equal judgements")


def test_reasons_for_no_pair() -> None:
    a, b = judgement(0), judgement(1)
    wins = [compared(a, b, 1), compared(b, a, -1)]
    assert judge_pair((1,), [a], [], EVEN, Meta(), 0) == NoPair(reason="fewer than two judgements to compare")
    unread = [compared(a, b, None), compared(b, a, 0)]
    assert judge_pair((1,), [a, b], unread, EVEN, Meta(), 0) == NoPair(reason="no readable winner")
    assert judge_pair((1,), [a, b], wins, EVEN, Meta(max_chosen_chars=8), 0) == NoPair(
        reason="chosen too long"
    )  # "because 0"
    assert isinstance(judge_pair((1,), [a, b], wins, EVEN, Meta(max_chosen_chars=9), 0), PreferencePair)
    same = [judgement(0, tokens=(5, 2)), judgement(1, tokens=(5, 2))]
    assert judge_pair((1,), same, wins, EVEN, Meta(), 0) == NoPair(reason="same tokens")
    cut = [judgement(0, finish="length"), judgement(1, finish="length")]
    assert judge_pair((1,), cut, wins, EVEN, Meta(), 0) == NoPair(reason="no complete judgement")


def test_a_cut_judgement_may_lose_but_never_win() -> None:
    a, b, c = judgement(0, finish="length"), judgement(1), judgement(2)
    wins = [compared(a, b, 1), compared(a, c, 1), compared(b, c, 1), compared(b, a, -1)]
    pair = judge_pair((1,), [a, b, c], wins, EVEN, Meta(), 0)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_id[-1], pair.rejected_id[-1]) == ("1", "2")


def test_the_response_with_the_highest_variance() -> None:
    responses = [response(0), response(1), response(2)]
    scores = {0: [3.0, 3.0, 4.0], 1: [1.0, None, 5.0], 2: [None, 5.0, None]}
    found = [judgement(i, p, of) for of, points in scores.items() for i, p in enumerate(points)]
    chosen = most_uncertain(responses, found, seed=0)
    assert chosen is not None
    assert chosen.index == 1
    assert most_uncertain(responses, [judgement(0, 3.0), judgement(1, None)], seed=0) is None
    tied = [judgement(i, p, of) for of in range(3) for i, p in enumerate([2.0, 4.0])]
    drawn = {found.index for seed in range(30) if (found := most_uncertain(responses, tied, seed)) is not None}
    assert drawn == {0, 1, 2}
    assert most_uncertain(responses, tied, 5) == most_uncertain(responses[::-1], tied[::-1], 5)


def test_judgements_that_agree_are_less_uncertain_than_any_that_do_not() -> None:
    found = [judgement(i, p, of) for of, points in ((0, [2.0, 2.0]), (1, [2.0, 2.5])) for i, p in enumerate(points)]
    drawn = [most_uncertain([response(0), response(1), response(2)], found, seed) for seed in range(9)]
    assert drawn == [response(1)] * 9  # response 2 was not judged at all


def drawn_pair(seed: int) -> str:
    """Judgements 0 and 1 both beat 2 and 3 in both orders, and neither two are compared with each other."""
    found = [judgement(i) for i in range(4)]
    wins = {(a, b): 1 for a in (0, 1) for b in (2, 3)} | {(b, a): -1 for a in (0, 1) for b in (2, 3)}
    pair = judge_pair((1,), found, all_compared(found, wins), EVEN, Meta(), seed)
    assert isinstance(pair, PreferencePair)
    return pair.id.rpartition("#")[2]


def test_equal_judgements_are_drawn_by_the_seed() -> None:
    drawn = [drawn_pair(seed) for seed in range(40)]
    assert set(drawn) == {"0>2", "0>3", "1>2", "1>3"}
    assert drawn == [drawn_pair(seed) for seed in range(40)]


def test_a_resumed_run_draws_as_before() -> None:
    """Whose judgements are compared, and who wins a tie: no release may change it while runs go on."""
    responses = [response(i) for i in range(4)]
    tied = [judgement(i, p, of) for of in range(4) for i, p in enumerate([2.0, 4.0])]
    uncertain = [most_uncertain(responses, tied, seed) for seed in range(6)]
    assert [one.index for one in uncertain if one] == [0, 1, 0, 1, 0, 0]
    assert [drawn_pair(seed) for seed in range(6)] == ["1>3", "0>3", "0>2", "1>2", "1>3", "0>3"]


def test_who_is_compared() -> None:
    found = [judgement(0, text="x"), judgement(1, text="y"), judgement(2, text="x")]
    assert [one.index for one in contestants(found, Meta())] == [0, 1, 2]
    assert [one.index for one in contestants(found, Meta(collapse=True))] == [0, 1]
    assert contestants([found[0], found[2]], Meta(collapse=True)) == []


@pytest.mark.parametrize(("number", "comparisons"), [(0, 0), (1, 0), (2, 2), (3, 6), (11, 110)])
def test_every_two_meet_in_both_orders(number: int, comparisons: int) -> None:
    shown = [(a.index, b.index) for a, b in matches([judgement(i) for i in range(number)])]
    assert shown == sorted(shown, key=lambda match: (min(match), max(match)))
    assert set(shown) == set(itertools.permutations(range(number), 2))
    assert len(shown) == comparisons == most_comparisons(number)


def test_lengths_of_judgements_are_characters_of_the_chosen_one() -> None:
    """Nine é are nine characters (18 bytes); how long the rejected judgement is does not matter."""
    rule = Meta(max_chosen_chars=9)
    for chosen, rejected, expected in (("é" * 9, "x" * 99, "pair"), ("x" * 10, "x", "chosen too long")):
        a, b = judgement(0, text=rejected), judgement(1, text=chosen)
        pair = judge_pair((1,), [a, b], [compared(a, b, -1), compared(b, a, 1)], EVEN, rule, 0)
        if expected == "pair":
            assert isinstance(pair, PreferencePair)
            assert (pair.chosen_id[-1], pair.rejected_id[-1]) == ("1", "0")
        else:
            assert pair == NoPair(reason=expected)
