"""Pairs by hand, and what holds for every pair whatever the responses are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.pairing import TIE, best_against_worst, candidates, tiers
from rsrlm.records import NoPair, PreferencePair, Response, Sampling, Scored, Unparsed, Verdict
from rsrlm.settings.methods import Pair

SAMPLING = Sampling(temperature=0.8, top_p=1.0, max_tokens=8, seed=1)
UNREAD = Unparsed(reason="no score line")


def answer(index: int, text: str = "words", cut: bool = False, tokens: tuple[int, ...] | None = None) -> Response:
    return Response(
        id=f"03/tea/{index}",
        prompt_id="tea",
        index=index,
        role="actor",
        text=text,
        token_ids=(100 + index, 2) if tokens is None else tokens,
        prompt_token_ids=(1, 9),
        finish_reason="length" if cut else "stop",
        weight_version="M3",
        sampling=SAMPLING,
    )


def judged(points: Sequence[float | None]) -> Mapping[str, Verdict]:
    return {f"03/tea/{i}": UNREAD if p is None else Scored(points=p) for i, p in enumerate(points)}


def paired(points: Sequence[float | None], rule: Pair | None = None, cut: str = "", empty: str = "") -> object:
    """(chosen, rejected) by index, or the reason; `cut` and `empty` list indices."""
    responses = [
        answer(index, text=" \n" if str(index) in empty else "words", cut=str(index) in cut)
        for index in range(len(points))
    ]
    pair = best_against_worst(responses, judged(points), rule or Pair(), 3)
    if isinstance(pair, NoPair):
        return pair.reason
    return int(pair.chosen_id[-1]), int(pair.rejected_id[-1])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([2.0, 5.0, 0.5, 3.0], (1, 2)),
        ([1.0, 4.0, 4.0, 1.0], (1, 0)),  # ties: the lowest index on either side
        ([4.0, 1.0, 4.0, 1.0], (0, 1)),
        ([3.0, 3.0, 3.0], "equal scores"),
        ([2.0, 2.0 + 1e-12], "equal scores"),  # a sum in another order, not a better answer
        ([2.0, 2.0 + 1e-6], (1, 0)),
        ([0.0, -1.5], (0, 1)),  # function judges may give anything; 0 is a score like others
        ([None, 3.0, 2.0], (1, 2)),  # an unread judgement is no 0: it neither wins nor loses
        ([None, None, 2.0], "fewer than two scored responses"),
        ([None, None], "fewer than two scored responses"),
        ([5.0], "fewer than two scored responses"),
        ([], "fewer than two scored responses"),
    ],
)
def test_best_against_worst(points: list[float | None], expected: object) -> None:
    assert paired(points) == expected


def test_a_response_that_nobody_judged_takes_no_part() -> None:
    verdicts = judged([5.0, 3.0, 1.0])
    del verdicts["03/tea/0"], verdicts["03/tea/2"]
    assert best_against_worst([answer(0), answer(1), answer(2)], verdicts, Pair(), 3) == (
        NoPair(reason="fewer than two scored responses")
    )


@pytest.mark.parametrize(
    ("points", "cut", "expected"),
    [
        ([5.0, 3.0, 1.0], "0", (1, 2)),  # the best is cut: the best complete one wins
        ([5.0, 3.0, 1.0], "2", (0, 2)),  # a cut one may lose
        ([5.0, 1.0], "0", "equal scores"),  # the only complete one is also the worst
        ([5.0, 1.0, 1.0], "01", "equal scores"),
        ([5.0, 1.0], "01", "no complete response"),
    ],
)
def test_a_cut_response_never_wins(points: list[float | None], cut: str, expected: object) -> None:
    assert paired(points, cut=cut) == expected


@pytest.mark.parametrize(
    ("points", "empty", "expected"),
    [
        ([5.0, 3.0, 1.0], "0", (1, 2)),
        ([5.0, 3.0, 1.0], "2", (0, 1)),  # dropped
        ([5.0, 3.0], "0", "fewer than two scored responses"),
    ],
)
def test_an_empty_response_takes_no_part(points: list[float | None], empty: str, expected: object) -> None:
    assert paired(points, empty=empty) == expected


def test_cut_and_empty_at_once_takes_no_part() -> None:
    assert paired([5.0, 3.0, 1.0], cut="2", empty="2") == (0, 1)


def test_a_chosen_response_that_is_too_long_drops_the_pair() -> None:
    """The pair, not the response: the second best is not taken instead."""
    responses = [answer(0, text="x" * 11), answer(1, text="x" * 10), answer(2, text="y" * 99)]
    points = judged([5.0, 4.0, 1.0])
    assert best_against_worst(responses, points, Pair(max_chosen_chars=10), 3) == NoPair(reason="chosen too long")
    pair = best_against_worst(responses, points, Pair(max_chosen_chars=11), 3)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_id, pair.rejected_id) == ("03/tea/0", "03/tea/2")


def test_lengths_are_characters_and_not_bytes() -> None:
    """Two bytes each in UTF-8: six é are shorter than eight x, and no longer than six characters may be."""
    responses = [answer(0, "x" * 8), answer(1, "é" * 6), answer(2, "x" * 9), answer(3, "é" * 8)]
    pair = best_against_worst(responses, judged([4.0, 4.0, 1.0, 1.0]), Pair(ties="length", max_chosen_chars=6), 3)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_id[-1], pair.rejected_id[-1]) == ("1", "2")


def test_the_same_tokens_make_no_pair() -> None:
    """A judge that samples may give the same answer two scores."""
    responses = [answer(0, tokens=(7, 8, 2)), answer(1, tokens=(7, 8, 2))]
    assert best_against_worst(responses, judged([4.0, 1.0]), Pair(), 3) == NoPair(reason="same tokens")


def test_a_pair_carries_what_its_responses_say() -> None:
    responses = [answer(0, tokens=(5, 2)), answer(1, cut=True, tokens=(6, 6)), answer(2, tokens=(7, 2))]
    assert best_against_worst(responses, judged([2.0, 0.5, 4.5]), Pair(), 3) == PreferencePair(
        id="03/tea/2>1",
        prompt_id="tea",
        kind="actor",
        chosen_id="03/tea/2",
        rejected_id="03/tea/1",
        prompt_token_ids=(1, 9),
        chosen_token_ids=(7, 2),
        rejected_token_ids=(6, 6),
        chosen_score=4.5,
        rejected_score=0.5,
        weight_version="M3",
    )


def test_candidates_are_ordered_by_index() -> None:
    taking_part = candidates(
        [answer(10), answer(9), answer(2)], {f"03/tea/{i}": Scored(points=1.0) for i in (2, 9, 10)}, Pair()
    )
    assert [one.response.index for one in taking_part] == [2, 9, 10]


# Few values, so that ties, equal tokens and all the kinds of response meet often.
POINTS = st.none() | st.sampled_from([0.0, 1.0, 1.0 + 1e-12, 1.5, 2.0, 5.0]) | st.floats(-5, 5)
RESPONSES = st.lists(
    st.tuples(POINTS, st.sampled_from(["words", "more words", "", " \n"]), st.booleans(), st.integers(0, 3)), max_size=6
)
RULES = st.builds(
    Pair,
    max_chosen_chars=st.sampled_from([None, 6]),
)


@given(drawn=RESPONSES, rule=RULES, data=st.data())
@settings(deadline=None, max_examples=200)
def test_what_holds_for_every_pair(drawn: list[tuple], rule: Pair, data: st.DataObject) -> None:
    responses = [answer(i, text, cut, tokens=(token,)) for i, (_, text, cut, token) in enumerate(drawn)]
    verdicts = judged([points for points, *_ in drawn])
    pair = best_against_worst(responses, verdicts, rule, 3)
    shuffled = data.draw(st.permutations(responses))
    assert best_against_worst(shuffled, verdicts, rule, 3) == pair
    readable = [response for response in responses if isinstance(verdicts[response.id], Scored)]
    if isinstance(pair, NoPair):
        complete = [r for r in readable if r.complete and r.text.strip()]
        scores = [verdicts[response.id].points for response in complete]
        # Whatever the rule, two good responses that differ in everything are a pair.
        easy = rule.max_chosen_chars is None and len({r.token_ids for r in readable}) == len(readable)
        assert not (easy and scores and max(scores) - min(scores) > 1e-6)
        return
    chosen, rejected = (next(r for r in responses if r.id == name) for name in (pair.chosen_id, pair.rejected_id))
    assert chosen in readable
    assert rejected in readable
    assert chosen.complete
    assert chosen.text.strip()
    assert chosen.token_ids != rejected.token_ids
    assert pair.chosen_score > pair.rejected_score
    assert rejected.text.strip()
    assert rule.max_chosen_chars is None or len(chosen.text) <= rule.max_chosen_chars
    # Nobody who may win scored more, nobody who takes part scored less (a smaller difference than TIE is none).
    assert all(verdicts[r.id].points <= pair.chosen_score + TIE for r in readable if r.complete and r.text.strip())
    assert all(verdicts[r.id].points >= pair.rejected_score - TIE for r in readable if r.text.strip())


# -- length control (2407.19594v2, section 2.2) ------------------------------------------------------------------------

SCORES = [4.2, 4.6, 4.9, 3.1, 3.5, 4.85, 2.9]
LENGTHS = [1500, 900, 2400, 2100, 700, 1300, 1200]


@pytest.mark.parametrize(
    ("rho", "good", "bad", "chosen", "rejected"),
    [
        (0.0, {2}, {6}, 2, 6),
        (0.1, {2, 5}, {3, 6}, 5, 3),
        (0.32, {1, 2, 5}, {3, 4, 6}, 1, 3),
        (0.4, {0, 1, 2, 5}, {3, 4, 6}, 1, 3),
    ],
)
def test_length_control(rho: float, good: set[int], bad: set[int], chosen: int, rejected: int) -> None:
    responses = [answer(index, text="x" * length) for index, length in enumerate(LENGTHS)]
    taking_part = candidates(responses, judged(SCORES), Pair())
    found_good, found_bad = tiers(taking_part, taking_part, rho)
    assert {one.response.index for one in found_good} == good
    assert {one.response.index for one in found_bad} == bad
    pair = best_against_worst(responses, judged(SCORES), Pair(rho=rho), 3)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_id[-1], pair.rejected_id[-1]) == (str(chosen), str(rejected))


def test_bounds_of_the_tiers_are_inclusive_in_spite_of_rounding() -> None:
    # 0.9 * 4.1 + 0.1 * 3.1 is 4.0 by hand, and 4.000000000000001 in floats
    responses = [answer(0, "long answer"), answer(1, "short"), answer(2, "longest answer of all")]
    pair = best_against_worst(responses, judged([4.1, 4.0, 3.1]), Pair(rho=0.1), 3)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen_id.endswith("/1")


def test_length_control_goes_from_the_best_that_may_win() -> None:
    """The cut response holds the best score; the tier reaches down from 4.0, not from 5.0."""
    responses = [answer(0, "x" * 9, cut=True), answer(1, "xxxx"), answer(2, "x"), answer(3, "xx")]
    pair = best_against_worst(responses, judged([5.0, 4.0, 3.6, 2.0]), Pair(rho=0.25), 3)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_id[-1], pair.rejected_id[-1]) == ("2", "3")  # good: 3.5 and up; bad: up to 2.5


@pytest.mark.parametrize(
    ("ties", "expected"),
    [("first", ("0", "2")), ("length", ("1", "3"))],
)
def test_ties_of_scores(ties: Literal["first", "length"], expected: tuple[str, str]) -> None:
    responses = [answer(0, "xxx"), answer(1, "x"), answer(2, "x"), answer(3, "xxx")]
    pair = best_against_worst(responses, judged([4.0, 4.0, 1.0, 1.0]), Pair(ties=ties), 3)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_id[-1], pair.rejected_id[-1]) == expected


def test_random_ties_depend_on_the_seed_and_on_nothing_else() -> None:
    responses = [answer(index) for index in range(8)]
    points = judged([4.0] * 4 + [1.0] * 4)

    def of(seed: int, order: list[Response]) -> str:
        pair = best_against_worst(order, points, Pair(ties="random"), 3, seed)
        assert isinstance(pair, PreferencePair)
        return pair.id

    drawn = [of(seed, responses) for seed in range(40)]
    assert drawn == [of(seed, responses[::-1]) for seed in range(40)]
    assert len(set(drawn)) > 5
    without = best_against_worst(responses, points, Pair(ties="random"), 3)
    assert isinstance(without, PreferencePair)
    assert without.id == drawn[0]  # no seed is seed 0


def test_random_ties_are_drawn_for_each_prompt_and_iteration_anew() -> None:
    """Else the same places would win in all prompts of a run that got the same scores."""

    def of(prompt: str, iteration: int) -> str:
        responses = [replace(answer(index), id=f"{prompt}/{index}", prompt_id=prompt) for index in range(8)]
        points = {one.id: Scored(points=4.0 if one.index < 4 else 1.0) for one in responses}
        pair = best_against_worst(responses, points, Pair(ties="random"), iteration)
        assert isinstance(pair, PreferencePair)
        return pair.id.rpartition("/")[2]

    assert len({of(prompt, 3) for prompt in ("tea", "milk", "water", "juice", "soup", "broth")}) > 1
    assert len({of("tea", iteration) for iteration in range(6)}) > 1


def test_random_ties_where_one_alone_may_win() -> None:
    assert paired([4.0, 4.0, 4.0, 1.0], Pair(ties="random"), cut="012") == "equal scores"
    assert paired([1.0, 1.0, 4.0], Pair(ties="random"), cut="01") in {(2, 0), (2, 1)}


def test_of_equal_texts_only_the_first_takes_part() -> None:
    responses = [answer(0, "same"), answer(1, "same"), answer(2, "other")]
    points = judged([1.0, 5.0, 3.0])
    kept = candidates(responses, points, Pair(duplicates="drop"))
    assert [one.response.index for one in kept] == [0, 2]
    assert [one.response.index for one in candidates(responses, points, Pair())] == [0, 1, 2]
    unread = candidates(responses, judged([None, 5.0, 3.0]), Pair(duplicates="drop"))
    assert [one.response.index for one in unread] == [1, 2]  # a copy that nobody could read stands in nobody's way


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=2, max_size=8),
    st.floats(0, 0.49),
)
def test_length_control_never_prefers_a_worse_response(found: list[tuple[int, int]], rho: float) -> None:
    points = [score / 10 for score, _ in found]
    responses = [answer(index, text="x" * length) for index, (_, length) in enumerate(found)]
    pair = best_against_worst(responses, judged(points), Pair(rho=rho), 3)
    if max(points) == min(points):
        assert pair == NoPair(reason="equal scores")
    else:
        assert isinstance(pair, PreferencePair)
        assert pair.chosen_score > pair.rejected_score
        assert pair.chosen_score >= max(points) - rho * (max(points) - min(points)) - 1e-9
