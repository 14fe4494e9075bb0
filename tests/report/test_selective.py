"""Risk and coverage of refusing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsrlm.report.selective import Kept, area, as_csv, as_svg, risk_coverage, threshold_for

SCORES = [7.2, 3.1, 5.5, 8.0, 4.4]
QUALITY = [8, 2, 7, 9, 3]  # below 5 is bad
CURVE = risk_coverage([(score, quality >= 5) for score, quality in zip(SCORES, QUALITY, strict=True)])


def test_by_hand() -> None:
    assert [one.threshold for one in CURVE] == [8.0, 7.2, 5.5, 4.4, 3.1]
    assert [one.coverage for one in CURVE] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [one.risk for one in CURVE] == pytest.approx([0, 0, 0, 0.25, 0.4])
    assert area(CURVE) == pytest.approx(0.13)


def test_the_threshold_that_keeps_most() -> None:
    assert threshold_for(CURVE, 0.0) == Kept(threshold=5.5, coverage=0.6, risk=0.0, kept=3)
    assert threshold_for(CURVE, 0.3) == CURVE[3]
    assert threshold_for(CURVE, 1.0) == CURVE[4]
    assert threshold_for(risk_coverage([(1.0, False)]), 0.5) is None
    assert risk_coverage([]) == []


def test_equal_scores_are_kept_together() -> None:
    assert risk_coverage([(1.0, True), (1.0, False), (2.0, True)]) == [
        Kept(threshold=2.0, coverage=1 / 3, risk=0.0, kept=1),
        Kept(threshold=1.0, coverage=1.0, risk=1 / 3, kept=3),
    ]


def test_what_cannot_be_read_is_never_kept() -> None:
    """Two of four are read: a threshold keeps half of them at most, and the area is the mean over that half."""
    curve = risk_coverage([(2.0, True), (None, True), (1.0, False), (None, False)])
    assert curve == [
        Kept(threshold=2.0, coverage=0.25, risk=0.0, kept=1),
        Kept(threshold=1.0, coverage=0.5, risk=0.5, kept=2),
    ]
    assert area(curve) == pytest.approx(0.25)
    assert risk_coverage([(None, True)]) == []


def test_the_interval_of_a_risk() -> None:
    """Wilson's of 1 in 4: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.95996."""
    low, high = Kept(threshold=0.0, coverage=1.0, risk=0.25, kept=4).interval
    assert (low, high) == pytest.approx((0.04559, 0.69936), abs=1e-5)


def test_as_a_table_and_as_a_plot() -> None:
    assert as_csv(CURVE).splitlines()[:2] == ["threshold,coverage,risk,kept", "8.0,0.200000,0.000000,1"]
    plain, marked = as_svg(CURVE), as_svg(CURVE, CURVE[2])
    assert plain.startswith("<svg")
    assert "coverage: share kept" in plain
    assert marked.count("<path") > plain.count("<path")
    many = [Kept(threshold=-n, coverage=(n + 1) / 5000, risk=n / 5000, kept=n + 1) for n in range(5000)]
    assert len(as_svg(many)) < 100_000


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.booleans()), min_size=1))
def test_everything_kept_is_the_share_of_bad_ones(scored: list[tuple[float, bool]]) -> None:
    curve = risk_coverage(scored)
    assert curve[-1].coverage == 1
    assert curve[-1].risk == pytest.approx(sum(not good for _, good in scored) / len(scored))
    assert [one.coverage for one in curve] == sorted(one.coverage for one in curve)
    assert min(one.risk for one in curve) - 1e-9 <= area(curve) <= max(one.risk for one in curve) + 1e-9
