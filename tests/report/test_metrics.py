"""Figures by hand, their intervals against brute force, and what no order of the data may change."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rsrlm.report.metrics import (
    Compared,
    Rated,
    distinct_n,
    judge_metrics,
    mean_figure,
    pairwise_judge_metrics,
    win_rate,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
RANK_FIGURES = (
    "pairwise_accuracy", "tie_share", "agreement", "agreement_without_ties", "exact_match", "spearman", "kendall_tau",
    "score_length", "score_length_within", "pair_yield",
)  # fmt: skip
FIGURES = (*RANK_FIGURES, "five_best", "readable")
Shape = tuple[Sequence[float], Sequence[float | None]]


def rated(*shapes: tuple[int, Sequence[float], Sequence[float | None]]) -> list[Rated]:
    """(how often, ranks, scores); all lengths differ."""
    found: list[Rated] = []
    for times, ranks, scores in shapes:
        for _ in range(times):
            lengths = tuple(range(10, 10 + len(ranks)))
            found.append(Rated(id=f"{len(found):04d}", ranks=tuple(ranks), scores=tuple(scores), lengths=lengths))
    return found


def measured(*shapes: tuple[int, Sequence[float], Sequence[float | None]], **options: Any) -> dict[str, Any]:
    return judge_metrics(rated(*shapes), **{"readable": 0, "judgements": 0, "points": [], "bootstrap": 50, **options})


def test_the_vector_of_three_replies() -> None:
    """Two of three pairs are in order, so the whole is not; 1 - 6 (0 + 1 + 1) / (3 * 8) = 0.5 and (2 - 1) / 3."""
    found = measured((30, [0, 1, 2], [4.33, 3.67, 4.00]))
    assert found["pairwise_accuracy"] == {
        "value": pytest.approx(2 / 3), "low": pytest.approx(2 / 3), "high": pytest.approx(2 / 3),
        "n": 90, "prompts": 30, "count": 60, "estimable": True,
    }  # fmt: skip
    assert found["exact_match"]["value"] == 0
    assert found["spearman"]["value"] == pytest.approx(0.5)
    assert found["kendall_tau"]["value"] == pytest.approx(1 / 3)
    assert found["score_length_within"]["value"] == pytest.approx(-0.5)  # lengths grow with the rank
    assert found["spearman"]["count"] is None


def test_right_tied_wrong_and_unreadable_pairs() -> None:
    found = measured(
        (60, [0, 1], [5.0, 3.0]),
        (20, [1, 0], [3.0, 3.0]),
        (20, [0, 1], [2.0, 5.0]),
        (50, [0, 1], [None, 4.0]),  # no pair, and neither reply lost
    )
    values = {name: (found[name]["value"], found[name]["n"], found[name]["prompts"]) for name in RANK_FIGURES}
    assert values["pairwise_accuracy"] == (0.6, 100, 100)
    assert values["tie_share"] == (0.2, 100, 100)
    assert values["agreement"] == (0.7, 100, 100)
    assert values["agreement_without_ties"] == (0.75, 80, 80)
    assert values["exact_match"] == (0.6, 100, 100)
    assert values["spearman"] == (pytest.approx(0.5), 80, 80)  # 60 of +1, 20 of -1
    assert values["kendall_tau"] == (pytest.approx(0.5), 80, 80)
    assert found["five_best"]["value"] == 0.75
    assert found["five_best"]["n"] == 80
    assert (found["pair_yield"]["value"], found["pair_yield"]["n"]) == (pytest.approx(80 / 150), 150)
    assert found["left_out"] == {"fewer than two scored": 50, "equal scores": 20, "equal ranks": 0}
    assert (found["replies"], found["replies_unreadable"]) == (300, 50)


@pytest.mark.parametrize(
    ("ranks", "scores", "matches", "n"),
    [
        ([0, 1, 2], [5, 3, 1], 30, 30),
        ([0, 1, 2], [5, 3, 3], 0, 30),  # people tell them apart, the judge does not
        ([0, 1, 1], [5, 2, 3], 30, 30),  # people do not: either order will do
        ([0, 1, 1], [5, 3, 3], 30, 30),
        ([0, 0, 1], [4, 2, 3], 0, 30),
        ([1, 1, 1], [4, 2, 3], 0, 0),  # no preference, nothing to match
        ([0, 1, 2], [5, None, 1], 0, 0),  # no total order was given
        ([0], [5], 0, 0),
        ([], [], 0, 0),
    ],
)
def test_exact_match(ranks: list[float], scores: list[float | None], matches: int, n: int) -> None:
    found = measured((30, ranks, scores))["exact_match"]
    assert (found["count"], found["n"]) == (matches, n)


@pytest.mark.parametrize(
    ("ranks", "scores", "best", "n"),
    [
        ([0, 1, 2], [5, 5, 4], 1, 2),
        ([0, 0, 1], [5, 5, 1], 2, 2),  # two share the top
        ([0, 1], [None, 5], 0, 1),  # the best reply is still the best, though nobody could read its score
        ([3, 7], [5, 1], 1, 1),  # the top is the lowest rank there is, not 0
        ([1, 1], [5, 5], 0, 0),  # nobody is top-ranked where all are
        ([0, 1], [4.99, 4.0], 0, 0),
        ([0, 1], [sum([5 / 3] * 3), 1], 1, 1),
        ([0, 1], [5 - 1e-12, 1], 1, 1),  # a mean in another order
        ([0, 1], [6, 1], 0, 0),  # a function judge's scale has no perfect 5
    ],
)
def test_five_best(ranks: list[float], scores: list[float | None], best: int, n: int) -> None:
    found = measured((30, ranks, scores))["five_best"]
    assert (found["count"], found["n"]) == (30 * best, 30 * n)


def test_prompts_that_can_say_nothing_are_not_counted() -> None:
    """No pair can be made of one reply, and equal lengths or scores have no correlation."""
    found = judge_metrics(
        [
            *(Rated(id=f"a{i}", ranks=(0.0, 1.0), scores=(2.0, 4.0), lengths=(10, 20)) for i in range(30)),
            *(Rated(id=f"b{i}", ranks=(0.0, 1.0), scores=(2.0, 4.0), lengths=(10, 10)) for i in range(7)),
            *(Rated(id=f"c{i}", ranks=(0.0, 1.0), scores=(2.0, 2.0), lengths=(10, 20)) for i in range(5)),
            *(Rated(id=f"d{i}", ranks=(0.0,), scores=(2.0,), lengths=(10,)) for i in range(3)),
        ],
        readable=0,
        judgements=0,
        points=[],
        bootstrap=20,
    )
    within = found["score_length_within"]
    assert (within["value"], within["n"], within["prompts"]) == (pytest.approx(1.0), 30, 30)
    assert (found["pair_yield"]["count"], found["pair_yield"]["n"]) == (37, 42)


def test_rounding_makes_no_order() -> None:
    found = measured((30, [0, 1], [0.1 + 0.2, 0.3]))
    assert found["tie_share"]["value"] == 1
    assert found["left_out"]["equal scores"] == 30


def test_constant_scores_are_counted_apart_and_are_no_nan() -> None:
    found = measured((40, [0, 1], [4, 4]), (30, [0, 1], [4, 3]), (5, [2, 2], [1, 2]))
    assert found["spearman"]["value"] == pytest.approx(1)
    assert found["spearman"]["n"] == 30
    assert found["left_out"] == {"fewer than two scored": 0, "equal scores": 40, "equal ranks": 5}
    assert "NaN" not in json.dumps(found)


def test_below_thirty_there_are_counts_only() -> None:
    found = measured((29, [0, 1], [5, 3]), readable=58, judgements=58)
    for name in ("pairwise_accuracy", "five_best", "readable"):
        assert found[name]["estimable"] is False
        assert (found[name]["value"], found[name]["low"], found[name]["high"]) == (None, None, None)
        assert found[name]["prompts"] == 29
    assert (found["pairwise_accuracy"]["count"], found["pairwise_accuracy"]["n"]) == (29, 29)
    assert (found["readable"]["count"], found["readable"]["n"]) == (58, 58)
    # Many pairs of few prompts say little about other prompts.
    assert measured((29, [0, 1, 2], [5, 3, 1]))["pairwise_accuracy"]["estimable"] is False
    assert measured((30, [0, 1, 2], [5, 3, 1]))["pairwise_accuracy"]["estimable"] is True


def test_nothing_at_all() -> None:
    found = measured()
    assert all(found[name]["n"] == 0 and found[name]["value"] is None for name in FIGURES)
    assert found["score_histogram"]["n"] == 0


def test_readable_share_has_wilsons_interval() -> None:
    """n = 100, p = 0.9, z = 1.96: centre (0.9 + z^2/200) / (1 + z^2/100), half width z sqrt(0.0009 + z^2/40000) / .."""
    found = measured((30, [0, 1], [5, 3]), readable=90, judgements=100)["readable"]
    z2 = 1.959964**2
    centre, half = (0.9 + z2 / 200) / (1 + z2 / 100), math.sqrt(z2 * (0.0009 + z2 / 40000)) / (1 + z2 / 100)
    assert (found["value"], found["count"], found["n"], found["prompts"]) == (0.9, 90, 100, 30)
    assert (found["low"], found["high"]) == (pytest.approx(centre - half), pytest.approx(centre + half))


def test_histogram_goes_by_the_nearest_whole_number() -> None:
    found = measured(points=[0, 0.49, 0.5, 4.5, 4.49, 5, 5.49, 5.5, -0.5, -0.51, 17])["score_histogram"]
    assert found == {"counts": {"0": 3, "1": 1, "2": 0, "3": 0, "4": 1, "5": 3}, "outside": 3, "n": 11}


def test_intervals_resample_prompts_and_not_pairs() -> None:
    """100 prompts of 45 pairs each, half of them all right: as wide as that of 100 throws of a coin, not of 4,500."""
    ranks = list(range(10))
    found = measured((50, ranks, ranks[::-1]), (50, ranks, ranks), bootstrap=1000)["pairwise_accuracy"]
    low, high = stats.binom(100, 0.5).interval(0.95)
    assert found["n"] == 4500
    assert found["low"] == pytest.approx(low / 100, abs=0.021)
    assert found["high"] == pytest.approx(high / 100, abs=0.021)


def drawn(seed: int, prompts: int) -> list[Rated]:
    source = random.Random(seed)
    found = []
    for number in range(prompts):
        replies = range(source.randint(1, 4))
        found.append(
            Rated(
                id=f"{number:04d}",
                ranks=tuple(source.randint(0, 2) for _ in replies),
                scores=tuple(source.choice([None, 1.0, 2.5, 3.0, 5.0]) for _ in replies),
                lengths=tuple(source.randint(1, 30) for _ in replies),
            )
        )
    return found


def test_intervals_against_resampling_by_hand() -> None:
    """Every resample is written out and measured anew."""
    prompts = drawn(3, 60)
    found = judge_metrics(prompts, readable=0, judgements=0, points=[], bootstrap=40, seed=7)
    times = np.random.default_rng(7).multinomial(60, np.full(60, 1 / 60), size=40)
    correlations, accuracies = [], []
    for row in times:
        again = [one for one, repeats in zip(prompts, row, strict=True) for _ in range(repeats)]
        scores, lengths, right, pairs = [], [], 0, 0
        for one in again:
            readable = [i for i, score in enumerate(one.scores) if score is not None]
            scores += [one.scores[i] for i in readable]
            lengths += [one.lengths[i] for i in readable]
            better = [(i, j) for i in readable for j in readable if one.ranks[i] < one.ranks[j]]
            right += sum(one.scores[i] > one.scores[j] for i, j in better)
            pairs += len(better)
        correlations.append(stats.spearmanr(scores, lengths).statistic)
        accuracies.append(right / pairs)
    for name, values in (("score_length", correlations), ("pairwise_accuracy", accuracies)):
        assert (found[name]["low"], found[name]["high"]) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_the_seed_decides_the_interval() -> None:
    prompts = drawn(4, 120)
    one, same, other = (
        judge_metrics(prompts, readable=0, judgements=0, points=[], bootstrap=100, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same
    assert one["spearman"]["low"] != other["spearman"]["low"]
    assert one["spearman"]["value"] == other["spearman"]["value"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ranks": (0.0,)}, "1 ranks, 2 scores, 2 lengths"),
        ({"scores": (math.nan, 1.0)}, "finite"),
        ({"ranks": (0.0, math.inf)}, "finite"),
    ],
)
def test_a_prompt_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rated(**{"id": "tea", "ranks": (0.0, 1.0), "scores": (1.0, 2.0), "lengths": (3, 4), **fields})


def test_input_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="share an id"):
        judge_metrics(rated((1, [0, 1], [1, 2])) * 2, readable=0, judgements=0, points=[])
    with pytest.raises(ValueError, match="5 readable of 4"):
        measured(readable=5, judgements=4)


REPLIES = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.integers(0, 10).map(lambda half: half / 2), st.integers(0, 40)),
    max_size=4,
)


def prompts_of(shapes: Sequence[Sequence[tuple]]) -> list[Rated]:
    """At least 35 prompts, the shapes in turn."""
    repeated = (list(shapes) * 35)[: max(35, len(shapes))]
    return [
        Rated(id=f"{i:03d}", **dict(zip(("ranks", "scores", "lengths"), zip(*shape, strict=True), strict=True)))
        if shape
        else Rated(id=f"{i:03d}", ranks=(), scores=(), lengths=())
        for i, shape in enumerate(repeated)
    ]


def near(one: dict[str, Any], other: dict[str, Any], names: Sequence[str]) -> bool:
    return all(
        one[name] == {key: pytest.approx(value, abs=1e-9) for key, value in other[name].items()} for name in names
    )


@given(shapes=st.lists(REPLIES, min_size=1, max_size=8), data=st.data())
@settings(deadline=None, max_examples=25)
def test_what_holds_for_all_figures(shapes: list[list[tuple]], data: st.DataObject) -> None:
    prompts = prompts_of(shapes)
    options: dict[str, Any] = {"readable": 30, "judgements": 40, "points": [], "bootstrap": 30}
    found = judge_metrics(prompts, **options)
    for name in FIGURES:
        figure = found[name]
        assert figure["estimable"] == (figure["value"] is not None)
        assert not figure["estimable"] or min(figure["n"], figure["prompts"]) >= 30
        if figure["estimable"]:
            least = 0 if figure["count"] is not None else -1
            assert least - 1e-12 <= figure["low"] <= figure["value"] <= figure["high"] <= 1 + 1e-12

    shuffled = [
        Rated(
            id=one.id,
            ranks=tuple(one.ranks[i] for i in order),
            scores=tuple(one.scores[i] for i in order),
            lengths=tuple(one.lengths[i] for i in order),
        )
        for one in prompts
        for order in [random.Random(data.draw(st.integers(0, 9))).sample(range(len(one.ranks)), len(one.ranks))]
    ]
    random.Random(1).shuffle(shuffled)
    assert near(judge_metrics(shuffled, **options), found, FIGURES)

    stretched = [
        Rated(
            id=one.id,
            ranks=tuple(3 * rank - 50 for rank in one.ranks),
            scores=tuple(None if score is None else score**3 - 7 for score in one.scores),
            lengths=one.lengths,
        )
        for one in prompts
    ]
    assert near(judge_metrics(stretched, **options), found, RANK_FIGURES)


def compared(times: int, first: Any, second: Any, human: Any, start: int) -> list[Compared]:
    return [Compared(prompt_id=f"{start + i}", first=first, second=second, human=human) for i in range(times)]


def test_pairwise_judge() -> None:
    outcomes = [
        *compared(30, "A", "B", "first", 0),  # reply 1 in both orders
        *compared(10, "B", "A", "first", 100),  # reply 2 in both orders
        *compared(20, "A", "A", "second", 200),  # position decides
        *compared(10, "tie", "tie", "first", 300),
        *compared(10, "A", "tie", "first", 400),
        *compared(5, "A", "B", None, 500),
        *compared(5, "A", "B", "tie", 600),
        *compared(10, None, "A", "first", 700),
    ]
    found = pairwise_judge_metrics(outcomes, bootstrap=50)
    shares = {name: (figure["count"], figure["n"]) for name, figure in found.items()}
    assert shares == {
        "first_position": (30 + 10 + 40 + 10 + 10, 2 * 90 - 2 * 10 - 10),
        "inconsistent": (30, 90),
        "tie": (10, 90),
        "agreement": (30, 40),
        "unreadable": (10, 200),
    }
    assert found["agreement"]["value"] == 0.75
    assert found["agreement"]["low"] < 0.75 < found["agreement"]["high"]


def test_position_bias_is_a_half_for_a_judge_that_looks_at_the_replies_only() -> None:
    found = pairwise_judge_metrics(compared(40, "A", "B", "first", 0), bootstrap=20)
    assert found["first_position"]["value"] == 0.5
    assert found["agreement"]["value"] == 1


@pytest.mark.parametrize("measure", ["scores", "comparisons", "wins"])
def test_a_report_made_again_says_the_same(measure: str) -> None:
    """Resamples are those of seed 0, unless somebody asks for others."""
    outcomes = [*compared(30, "A", "B", "first", 0), *compared(20, "B", "A", "first", 100)]
    wins: list[Any] = [*["first"] * 30, *["tie"] * 13, *["second"] * 20]

    def of(**options: int) -> Any:
        if measure == "scores":
            found = judge_metrics(drawn(5, 60), readable=0, judgements=0, points=[], bootstrap=100, **options)
            return found["agreement"]["low"], found["spearman"]["high"], found["score_length"]["low"]
        if measure == "wins":
            found = win_rate(wins, bootstrap=100, **options)
        else:
            found = pairwise_judge_metrics(outcomes, bootstrap=100, **options)
        return [(figure["low"], figure["high"]) for figure in found.values()]

    assert of() == of(seed=0)
    assert of() != of(seed=1)


def test_score_and_length_need_thirty_replies_of_thirty_prompts() -> None:
    def of(prompts: int, replies: int) -> Any:
        found = [
            Rated(
                id=f"{i:03d}",
                ranks=(0.0,) * replies,
                scores=tuple(float(i + j) for j in range(replies)),
                lengths=tuple(2 * i + j for j in range(replies)),
            )
            for i in range(prompts)
        ]
        return judge_metrics(found, readable=0, judgements=0, points=[], bootstrap=20)["score_length"]

    enough = of(30, 1)
    assert (enough["value"], enough["n"], enough["prompts"], enough["estimable"]) == (1.0, 30, 30, True)
    for prompts, replies in ((29, 1), (29, 2)):  # 58 replies, but still of 29 prompts
        assert of(prompts, replies) == {
            "value": None, "low": None, "high": None, "n": prompts * replies, "prompts": prompts, "count": None,
            "estimable": False,
        }  # fmt: skip


def test_resamples_without_a_correlation_are_left_out_of_the_interval() -> None:
    """One reply of 40 has another score: about a third of the resamples miss it, and their scores are all equal."""
    prompts = [
        Rated(id=f"{i:03d}", ranks=(0.0,), scores=(5.0 if i == 7 else 3.0,), lengths=(10 + 3 * i % 17,))
        for i in range(40)
    ]
    found = judge_metrics(prompts, readable=0, judgements=0, points=[], bootstrap=60, seed=3)["score_length"]
    correlations = []
    for row in np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=60):
        again = [one for one, repeats in zip(prompts, row, strict=True) for _ in range(repeats)]
        if row[7]:
            correlations.append(stats.spearmanr([o.scores[0] for o in again], [o.lengths[0] for o in again]).statistic)
    assert 30 < len(correlations) < 50
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(correlations, [0.025, 0.975])))


def test_comparisons_of_one_prompt_are_resampled_together() -> None:
    one = [Compared(prompt_id="tea", first="A", second="B", human="first")] * 40
    assert pairwise_judge_metrics(one)["agreement"]["estimable"] is False
    assert pairwise_judge_metrics(one)["agreement"]["n"] == 40
    assert pairwise_judge_metrics([])["unreadable"]["n"] == 0


def test_win_rate() -> None:
    outcomes = [*["first"] * 50, *["tie"] * 30, *["second"] * 20]
    found = win_rate(outcomes, bootstrap=1000)
    values = {name: figure["value"] for name, figure in found.items()}
    assert values == {"win": 0.5, "tie": 0.3, "loss": 0.2, "win_rate": 0.65}
    assert all(figure["n"] == 100 for figure in found.values())
    # Variance of (1, 0.5, 0): 0.5 + 0.25 * 0.3 - 0.65^2 = 0.1525, so 1.96 standard errors are 0.0765.
    assert found["win_rate"]["low"] == pytest.approx(0.65 - 0.0765, abs=0.012)
    assert found["win_rate"]["high"] == pytest.approx(0.65 + 0.0765, abs=0.012)
    random.Random(0).shuffle(outcomes)
    assert win_rate(outcomes, bootstrap=1000) == found
    few = win_rate(["first"] * 29)
    assert (few["win"]["value"], few["win"]["count"], few["win"]["n"]) == (None, 29, 29)


def test_the_mean_of_one_value_per_prompt() -> None:
    values = [1.0] * 30 + [-0.5] * 50
    found = mean_figure(values, bootstrap=1000)
    assert found == {**found, "n": 80, "prompts": 80, "count": None, "estimable": True}
    assert found["value"] == pytest.approx(5 / 80)
    # Variance 30/80 * 1 + 50/80 * 0.25 - (5/80)^2 = 0.527, so 1.96 standard errors are 0.159.
    assert found["low"] == pytest.approx(5 / 80 - 0.159, abs=0.02)
    assert found["high"] == pytest.approx(5 / 80 + 0.159, abs=0.02)
    assert mean_figure(values[::-1], bootstrap=1000) == found == mean_figure(values, bootstrap=1000, seed=0)
    assert mean_figure(values, bootstrap=1000, seed=1)["low"] != found["low"]
    assert mean_figure([1.0] * 29)["value"] is None


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a", "a b"], 1, 2 / 5),
        (["a b a", "a b"], 2, 2 / 3),  # ab ba ab: no pair of words spans two texts
        (["a b a", "a b"], 3, 1.0),
        (["a b a", "a b"], 4, None),
        (["a\n b\t"], 1, 1.0),
        ([], 1, None),
        (["", " \n"], 1, None),
    ],
)
def test_distinct_n(texts: list[str], n: int, expected: float | None) -> None:
    assert distinct_n(texts, n) == expected


def test_people_agree_with_themselves_on_real_ranks() -> None:
    path = DATA / "openassistant_en_70_trees.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    prompts = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        tree = json.loads(line) if line else {"prompt": {"replies": []}, "message_tree_id": ""}
        replies = [reply for reply in tree["prompt"]["replies"] if reply.get("rank") is not None]
        if len(replies) > 1:
            prompts.append(
                Rated(
                    id=tree["message_tree_id"],
                    ranks=tuple(reply["rank"] for reply in replies),
                    scores=tuple(5.0 - reply["rank"] / 2 for reply in replies),
                    lengths=tuple(len(reply["text"]) for reply in replies),
                )
            )
    found = judge_metrics(prompts, readable=1, judgements=1, points=[], bootstrap=20)
    names = ("pairwise_accuracy", "exact_match", "spearman", "kendall_tau", "five_best")
    assert {name: found[name]["value"] for name in names} == pytest.approx(dict.fromkeys(names, 1.0))
    assert found["exact_match"]["n"] == len(prompts) > 50
