"""Risk and coverage of refusing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsrlm.report.selective import Kept, area, risk_coverage, threshold_for

SCORES = [7.2, 3.1, 5.5, 8.0, 4.4]
QUALITY = [8, 2, 7, 9, 3]  # below 5 is bad
CURVE = risk_coverage([(score, quality >= 5) for score, quality in zip(SCORES, QUALITY, strict=True)])


def test_by_hand() -> None:
    assert [one.threshold for one in CURVE] == [8.0, 7.2, 5.5, 4.4, 3.1]
    assert [one.coverage for one in CURVE] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [one.risk for one in CURVE] == pytest.approx([0, 0, 0, 0.25, 0.4])
    assert area(CURVE) == pytest.approx(0.13)


def test_the_threshold_that_keeps_most() -> None:
    assert threshold_for(CURVE, 0.0) == Kept(threshold=5.5, coverage=0.6, risk=0.0)
    assert threshold_for(CURVE, 0.3) == CURVE[3]
    assert threshold_for(CURVE, 1.0) == CURVE[4]
    assert threshold_for(risk_coverage([(1.0, False)]), 0.5) is None
    assert risk_coverage([]) == []


def test_equal_scores_are_kept_together() -> None:
    assert risk_coverage([(1.0, True), (1.0, False), (2.0, True)]) == [
        Kept(threshold=2.0, coverage=1 / 3, risk=0.0),
        Kept(threshold=1.0, coverage=1.0, risk=1 / 3),
    ]


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.booleans()), min_size=1))
def test_everything_kept_is_the_share_of_bad_ones(scored: list[tuple[float, bool]]) -> None:
    curve = risk_coverage(scored)
    assert curve[-1].coverage == 1
    assert curve[-1].risk == pytest.approx(sum(not good for _, good in scored) / len(scored))
    assert [one.coverage for one in curve] == sorted(one.coverage for one in curve)
    assert min(one.risk for one in curve) - 1e-9 <= area(curve) <= max(one.risk for one in curve) + 1e-9
