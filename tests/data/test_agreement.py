"""Judgements that agree with people's ranks, by hand and against every choice there is."""

import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranked_files import prompt_of

from rsrlm.data.agreement import NoneAccepted, accept, thin
from rsrlm.data.ranked import RankedPrompt

ORDER = [
    # ranks, samples of a, b, c ..., accepted samples or the reason
    ((0, 1), [[4], [3]], {"a": 0, "b": 0}),
    ((1, 0), [[3], [4]], {"a": 0, "b": 0}),
    ((0, 1, 2), [[4.33], [3.67], [4.0]], "scores in another order"),
    ((0, 1), [[3], [3]], "equal scores for different ranks"),
    ((0, 1), [[3, 4], [4, 3]], "equal scores for different ranks"),
    ((0, 1), [[0.1 + 0.2], [0.3]], "equal scores for different ranks"),  # a rounding error is no lead
    ((0, 0, 1), [[4], [5], [3]], {"a": 0, "b": 0, "c": 0}),  # a human tie imposes nothing
    ((0, 0, 1), [[5], [5], [3]], {"a": 0, "b": 0, "c": 0}),
    ((0, 0, 1), [[4], [2], [3]], "scores in another order"),
    ((0, 0), [[5], [1]], "all ranks are equal"),
    ((0, None), [[5], [1]], "fewer than two ranked replies"),
    ((None, None), [[5], [1]], "fewer than two ranked replies"),
    ((0, None, 1), [[4], [5], [3]], {"a": 0, "c": 0}),  # nobody ranked b
    ((0, 1), [[4], [None, None]], "a ranked reply without readable judgement"),
    ((0, 1), [[4], []], "a ranked reply without readable judgement"),
    ((0, 1), [[None, 4], [3, None]], {"a": 1, "b": 0}),  # an unread sample is no 0
    ((0, 1), [[0], [None]], "a ranked reply without readable judgement"),
    ((0, 1), [[5, 4, 4], [1, 2, 2]], {"a": 1, "b": 1}),  # nearest to 4.33 and 1.67, the lowest index of equal ones
    ((0, 1), [[4, 5], [1]], {"a": 0, "b": 0}),  # 4 and 5 are as near to 4.5
    ((0, 1), [[4, 4, 4], [4, 4, 3]], {"a": 0, "b": 2}),  # the samples taken must differ too, not only the means
    ((0, 1), [[5, 4, 4], [4, 4, 4]], {"a": 0, "b": 0}),
    ((0, 1, 2), [[4], [1, 5], [2]], "no samples in this order"),  # means 4, 3, 2, but b has neither 3
    ((0, 1, 2), [[5, 4], [4, 4, 3], [3, 3]], {"a": 0, "b": 0, "c": 0}),
    ((0, 1, 1), [[4, 3], [3, 2], [2, 4]], {"a": 0, "b": 0, "c": 0}),
    ((0, 1, 1), [[4, 3], [3, 1], [2, 2]], {"a": 0, "b": 0, "c": 0}),
    ((0, 1, 1), [[3], [2], [4, 4]], "scores in another order"),
]


def sampled(scores: Sequence[Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    return {chr(97 + n): samples for n, samples in enumerate(scores)}


@pytest.mark.parametrize(("people", "scores", "expected"), ORDER)
def test_accept_by_order(people: Sequence[float | None], scores: list[list[float | None]], expected: object) -> None:
    found = accept(prompt_of(*people), sampled(scores), "order")
    assert (found.reason if isinstance(found, NoneAccepted) else dict(found)) == expected


@pytest.mark.parametrize(
    ("people", "scores", "expected"),
    [
        ((0, 1), [[4], [3]], {"a": 0, "b": 0}),
        ((0, 1), [[3], [4]], "no reply agrees more than it disagrees"),
        ((0, 1), [[3], [3]], "no reply agrees more than it disagrees"),
        # a > b and a > c agree, b > c does not: a 2:0, b 1:1, c 1:1
        ((0, 1, 2), [[5], [3], [4]], {"a": 0}),
        # a > c, b > c agree, a > b is a tie: a 1:1, b 1:1, c 2:0
        ((0, 1, 2), [[4], [4], [3]], {"c": 0}),
        # four replies, only c > d wrong: a 3:0, b 3:0, c 2:1, d 2:1
        ((0, 1, 2, 3), [[5], [4], [2], [3]], {"a": 0, "b": 0, "c": 0, "d": 0}),
        # an unread reply takes no part; the others are judged among themselves
        ((0, 1, 2), [[5, 3], [None], [3, 3]], {"a": 0, "c": 0}),
        ((0, 1), [[5], [None]], "no reply agrees more than it disagrees"),
        # b and c are a human tie: no pair, a wins both
        ((0, 1, 1), [[5], [3], [4]], {"a": 0, "b": 0, "c": 0}),
        ((0, 1, None), [[5], [3], [1]], {"a": 0, "b": 0}),
        ((0, 1), [[5, 4, 4], [1, 2, 2]], {"a": 1, "b": 1}),
        ((0, 0), [[5], [1]], "all ranks are equal"),
        ((0, None), [[5], [1]], "fewer than two ranked replies"),
    ],
)
def test_accept_by_pairs(people: Sequence[float | None], scores: list[list[float | None]], expected: object) -> None:
    found = accept(prompt_of(*people), sampled(scores), "pairs")
    assert (found.reason if isinstance(found, NoneAccepted) else dict(found)) == expected


@pytest.mark.parametrize(
    ("rule", "people", "scores", "most", "expected"),
    [
        # 1 of a and 5 of b contradict people
        ("pairs", (0, 1), [[5, 5, 5, 1], [2, 5]], 4, [("a", 0), ("a", 1), ("a", 2), ("b", 0)]),
        # mean 3.5: 4 and 3 are as near, then 5; b is accepted with all that it has
        ("pairs", (0, 1), [[5, 4, 3, 2], [1]], 3, [("a", 1), ("a", 2), ("a", 0), ("b", 0)]),
        # a > b > c: first 4 3 2; then 5 4 1 holds, and a third choice has nothing left of c
        (
            "order", (0, 1, 2), [[4, 5, 4], [3, 4, 2], [2, 1]], 3,
            [("a", 0), ("a", 2), ("b", 0), ("b", 2), ("c", 0), ("c", 1)],
        ),
        ("pairs", (0, 1), [[3, 3], [4, 4]], 2, "no reply agrees more than it disagrees"),
    ],
)  # fmt: skip
def test_accept_more_than_one_sample_of_a_reply(
    rule: Any, people: Sequence[float], scores: list[list[float | None]], most: int, expected: object
) -> None:
    found = accept(prompt_of(*people), sampled(scores), rule, most)
    assert (found.reason if isinstance(found, NoneAccepted) else found) == expected


def test_accept_wants_a_known_rule() -> None:
    with pytest.raises(ValueError, match="order or pairs"):
        accept(prompt_of(0, 1), {}, "best")  # type: ignore[arg-type]


samples_of_replies = st.lists(
    st.tuples(
        st.sampled_from([None, 0.0, 1.0, 2.0]),
        st.lists(st.sampled_from([None, 0.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]), max_size=3),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=400)
@given(replies=samples_of_replies, stranger=st.booleans())
@example(replies=[(0.0, [5.0, 4.0]), (1.0, [4.0, 4.0, 3.0]), (2.0, [3.0, 3.0])], stranger=True)
def test_order_against_every_choice(replies: list[tuple[float | None, list[float | None]]], stranger: bool) -> None:
    prompt = prompt_of(*(rank for rank, _ in replies))
    scores = sampled([samples for _, samples in replies]) | ({"of another prompt": [5.0]} if stranger else {})
    found = accept(prompt, scores, "order")
    taking_part = [reply for reply in prompt.replies if reply.rank is not None]
    readable = [[(i, s) for i, s in enumerate(scores[reply.id]) if s is not None] for reply in taking_part]

    def agree(values: Sequence[float]) -> bool:
        pairs = list(itertools.permutations(zip(taking_part, values, strict=True), 2))
        ordered = [(a, b) for (one, a), (other, b) in pairs if (one.rank or 0) < (other.rank or 0)]
        return bool(ordered) and all(a > b for a, b in ordered)

    choices = []
    if all(readable):
        means = [statistics.mean(score for _, score in samples) for samples in readable]
        if agree([round(mean, 6) for mean in means]):
            for choice in itertools.product(*readable):
                if agree([score for _, score in choice]):
                    away = sum(abs(score - mean) for (_, score), mean in zip(choice, means, strict=True))
                    choices.append((away, [index for index, _ in choice]))
    if isinstance(found, NoneAccepted):
        assert not choices
        return
    assert [identifier for identifier, _ in found] == [reply.id for reply in taking_part]
    distance = {tuple(indices): away for away, indices in choices}
    assert distance[tuple(index for _, index in found)] == pytest.approx(min(distance.values()))


@settings(deadline=None, max_examples=400)
@given(replies=samples_of_replies, most=st.integers(1, 3))
@example(replies=[(0.0, [5.0, 5.0, 1.0]), (1.0, [3.0, 3.0, 5.0])], most=3)
def test_what_pairs_accepts_agrees_more_than_it_disagrees(
    replies: list[tuple[float | None, list[float | None]]], most: int
) -> None:
    """The means and every sample taken, each against the means of the other replies; and nothing that does is left."""
    prompt, scores = prompt_of(*(rank for rank, _ in replies)), sampled([samples for _, samples in replies])
    found = accept(prompt, scores, "pairs", most)
    readable = {reply.id: [s for s in scores[reply.id] if s is not None] for reply in prompt.replies}
    means = {name: statistics.mean(samples) for name, samples in readable.items() if samples}

    def agrees(reply: Any, score: float) -> bool:
        balance = 0
        for other in prompt.replies:
            if other.rank is not None and other.rank != reply.rank and other.id in means:
                ahead = (score - means[other.id]) * (1 if reply.rank < other.rank else -1)
                balance += 1 if ahead > 1e-9 else -1
        return balance > 0

    expected = []
    for reply in prompt.replies:
        if reply.rank is not None and reply.id in means and agrees(reply, means[reply.id]):
            own = [i for i, s in enumerate(scores[reply.id]) if s is not None and agrees(reply, s)]
            near = sorted(own, key=lambda i: (round(abs(scores[reply.id][i] - means[reply.id]), 9), i))
            expected += [(reply.id, index) for index in near[:most]]
    assert (found if isinstance(found, list) else []) == expected
    turned = RankedPrompt(id="p", text="Q?", replies=prompt.replies[::-1])
    again = accept(turned, scores, "pairs", most)
    assert sorted(again if isinstance(again, list) else []) == sorted(expected)


# ---- thinning


def scored(**numbers: int) -> list[tuple[str, float]]:
    """s4=3 is three examples with score 4; s35=1 is one with 3.5."""
    return [
        (f"{name}-{n}", float(name[1:2] + "." + (name[2:] or "0")))
        for name, number in numbers.items()
        for n in range(number)
    ]


@pytest.mark.parametrize(
    ("examples", "most", "left"),
    [
        (scored(s4=8, s3=2, s5=2), 0.5, {"s4": 4, "s3": 2, "s5": 2}),
        (scored(s4=8, s3=2, s5=2), 1.0, {"s4": 8, "s3": 2, "s5": 2}),
        (scored(s4=8, s3=2, s5=2), 0.7, {"s4": 8, "s3": 2, "s5": 2}),  # 8 of 12 is less
        (scored(s4=8, s3=2, s5=2), 0.34, {"s4": 2, "s3": 2, "s5": 2}),  # 2.06 rounded down
        (scored(s4=80, s3=70), 0.3, {"s4": 30, "s3": 70}),
        (scored(s4=5, s35=4, s3=1), 0.4, {"s4": 3, "s35": 4, "s3": 1}),  # 3.5 is not 4
        (scored(s4=3, s3=3), 0.4, {"s4": 2, "s3": 3}),  # the higher of equally common ones
        (scored(s4=3), 0.9, {}),
        (scored(s4=3), 1.0, {"s4": 3}),
        ([], 0.5, {}),
    ],
)
def test_thin(examples: list[tuple[str, float]], most: float, left: dict[str, int]) -> None:
    names = [identifier.split("-")[0] for identifier in thin(examples, most, 3)]
    assert {name: names.count(name) for name in names} == left


@given(
    scores=st.lists(st.sampled_from([3.0, 3.5, 4.0, 5.0]), max_size=40),
    most=st.floats(0.05, 1.0),
    seed=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_thinning_is_no_more_than_needed(scores: list[float], most: float, seed: int, order: random.Random) -> None:
    examples = [(f"e{number}", score) for number, score in enumerate(scores)]
    kept = thin(examples, most, seed)
    gone = [score for identifier, score in examples if identifier not in kept]
    assert len(set(gone)) <= 1
    if gone:
        assert scores.count(gone[0]) == max(map(scores.count, scores))
        stay = scores.count(gone[0]) - len(gone)
        assert stay <= most * len(kept) + 1e-6
        assert stay + 1 > most * (len(kept) + 1) - 1e-6
    elif scores and most < 1:
        assert max(map(scores.count, scores)) <= most * len(scores) + 1e-6
    order.shuffle(examples)
    assert thin(examples, most, seed) == kept


def test_the_seed_chooses_who_goes() -> None:
    examples = scored(s4=100, s3=10)
    assert len({frozenset(thin(examples, 0.5, seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize("most", [0, -0.5, 1.5, float("nan")])
def test_thin_refuses(most: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        thin([("a", 1.0)], most, 0)


def test_thin_refuses_repeated_ids() -> None:
    with pytest.raises(ValueError, match="unique"):
        thin([("a", 1.0), ("a", 2.0)], 0.5, 0)
