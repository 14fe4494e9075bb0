"""Limits, the alarms past them, and the page that alarms point to."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rsrlm.report.alarms import DEFAULT_LIMITS, Limit, check, limits_of
from rsrlm.report.signs import SIGNS, measure
from rsrlm.settings.base import JUDGES, RECIPES, ConfigError, Section, plugin

PAGE = Path(__file__).parents[2] / "docs" / "alarms.md"
WIDTH = 120
PAPERS = ("2401.10020", "2407.19594", "2505.21444", "2508.06026", "2404.19733", "benchmarks/")


def sections() -> dict[str, str]:
    """Headings of the third level of the page, each with its text."""
    parts = re.split(r"^### (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_an_alarm_says_what_to_know_in_one_line() -> None:
    (alarm,) = check({"first_position_wins": 0.68114, "score_mean": 4.0, "kl_per_token": None})
    assert (alarm.sign, alarm.value, alarm.limit, alarm.action) == ("first_position_wins", 0.68114, 0.65, "warn")
    assert alarm.message == (
        "first_position_wins is 0.6811, above 0.65: train the judge less (docs/alarms.md#first_position_wins)"
    )
    (alarm,) = check({"chosen_chars": 12_345.678})
    assert alarm.message.startswith("chosen_chars is 12350, above 2500: ")
    (alarm,) = check({"chosen_logp_change": -12.5})
    assert alarm.message.startswith("chosen_logp_change is -12.5, below -10: ")


@pytest.mark.parametrize("name", SIGNS)
def test_no_alarm_is_longer_than_a_line(name: str) -> None:
    """With the words that a run puts before it, at numbers as long as they come."""
    direction, warn = SIGNS[name].direction, SIGNS[name].warn or 1234.0
    far = {"above": 12_345.678 if name.endswith("chars") else 1.23456, "below": -234.5678}[direction]
    (alarm,) = check({name: warn + far}, {name: Limit(direction=direction, warn=warn)})
    assert len(f"after iteration 12: {alarm.message}") <= WIDTH


@pytest.mark.parametrize("name", SIGNS)
def test_every_sign_has_its_section(name: str) -> None:
    """Its denominator, its default limit, where it was seen and what to try."""
    text, sign = sections()[name], SIGNS[name]
    assert not sign.over or f"`n_{sign.over}`" in text
    limit = "no limit" if sign.warn is None else f"{sign.direction} {sign.warn:g}"
    assert re.search(rf"^- By default: {re.escape(limit)}\b", text, re.MULTILINE)
    assert any(paper in text for paper in PAPERS)
    for start in ("- Formula: ", "- Seen: ", "- Try: "):
        assert f"\n{start}" in text
    for other in re.findall(r"as for `(\w+)`", text):
        assert other in SIGNS


def test_the_keys_and_recipes_that_are_named_exist() -> None:
    def keys(section: type[Section]) -> set[str]:
        return {*section.model_fields, *(key for more in section.__subclasses__() for key in keys(more))}

    for name, known in itertools.chain(((name, RECIPES) for name in RECIPES), ((name, JUDGES) for name in JUDGES)):
        plugin(name, known, "")  # imported, with its own section
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`(?:[a-z]\w+\.)+([a-z]\w+)(?:=\w+)?`", text)
    named += [key for one in SIGNS.values() for key in re.findall(r"[a-z]\.([a-z_]+)", one.remedy)]
    assert {"rho", "nll_scale", "kind"} <= set(named)
    assert set(named) - {"kl_to_first", "json", "py"} <= keys(Section)  # those are of metrics.json and of files
    assert set(re.findall(r"recipe `(\w+)`", text)) <= RECIPES.keys()


def test_every_section_is_a_sign() -> None:
    assert sections().keys() == SIGNS.keys()


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (2.0, Limit(direction="above", warn=1.0), ("warn", 1.0)),
        (1.0, Limit(direction="above", warn=1.0), None),  # at the limit is not past it
        (0.0, Limit(direction="above", warn=1.0), None),
        (0.5, Limit(direction="below", warn=1.0), ("warn", 1.0)),
        (1.0, Limit(direction="below", warn=1.0), None),
        (3.0, Limit(direction="above", warn=1.0, stop=2.0), ("stop", 2.0)),  # one alarm, the graver one
        (1.5, Limit(direction="above", warn=1.0, stop=2.0), ("warn", 1.0)),
        (3.0, Limit(direction="above", stop=2.0), ("stop", 2.0)),
        (-1.0, Limit(direction="below", warn=1.0, stop=0.0), ("stop", 0.0)),
        (0.0, Limit(direction="above", stop=0.0), None),
        (1e9, Limit(direction="above"), None),
        (None, Limit(direction="below", warn=1.0, stop=1.0), None),
        (math.nan, Limit(direction="above", warn=1.0), None),
    ],
)
def test_limits(value: float | None, limit: Limit, expected: tuple[str, float] | None) -> None:
    raised = check({"score_mean": value}, {"score_mean": limit})
    assert [(alarm.action, alarm.limit) for alarm in raised] == ([] if expected is None else [expected])


def test_a_sign_that_was_not_measured_raises_no_alarm() -> None:
    assert check({}, {"unreadable": Limit(direction="above", warn=0.0)}) == []
    assert check(measure([], [], [])) == []


def test_the_config_changes_limits(make_config: Any) -> None:
    assert limits_of(make_config()) == DEFAULT_LIMITS
    changed = limits_of(
        make_config(
            watch={"claims": {"stop": 0.5}, "chosen_chars": {"warn": 900, "stop": None}, "distinct_1": None},
        )
    )
    assert changed == {
        **DEFAULT_LIMITS,
        "claims": Limit(direction="above", warn=0.05, stop=0.5),
        "chosen_chars": Limit(direction="above", warn=900.0),
        "distinct_1": Limit(direction="below"),
    }


def test_limits_in_points_suppose_a_scale_from_0_to_5(make_config: Any) -> None:
    on_points = ("score_mean", "score_drift", "saturated", "pair_score_gap")
    function = make_config(judge={"kind": "function", "function": "judge_functions:by_length"})
    for limits in (limits_of(function), limits_of(make_config(), scale=(1, 10))):
        assert {name for name, limit in limits.items() if limit != DEFAULT_LIMITS[name]} == set(on_points)
        assert all(limits[name] == Limit(direction=DEFAULT_LIMITS[name].direction) for name in on_points)
    assert limits_of(make_config(watch={"score_mean": {"warn": 8}}), scale=(1, 10))["score_mean"].warn == 8


def test_a_limit_for_no_sign_names_the_signs(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"watch: no sign 'chosen_length'; .*chosen_chars.*kl_per_token"):
        limits_of(make_config(watch={"chosen_length": {"warn": 1.0}}))
    with pytest.raises(ConfigError, match="no sign 'n_scored'"):
        limits_of(make_config(watch={"n_scored": None}))
