"""Functions that judge: how they are named, called, and what they may return."""

import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsrlm.judges.function_pool import NO_NUMBER, call_function, load_function, takes_data
from rsrlm.records import Scored, Verdict
from rsrlm.settings.base import ConfigError

INF = math.inf


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (3, Scored(points=3.0)),
        (-2.5, Scored(points=-2.5)),
        (True, Scored(points=1.0)),
        (np.float32(0.5), Scored(points=0.5)),
        (Fraction(1, 4), Scored(points=0.25)),
        *((value, NO_NUMBER) for value in (None, "4", math.nan, INF, -INF, 10**400, 1j, [4])),
    ],
)
def test_call_function(value: Any, verdict: Verdict) -> None:
    assert call_function(lambda prompt, response: value, "p", "r") == verdict


def test_call_function_passes_prompt_and_response() -> None:
    assert call_function(lambda prompt, response: len(prompt) * 10 + len(response), "ab", "xyz") == Scored(points=23)


@pytest.fixture
def my_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_test_judges.py").write_text(
        "def shorter(prompt, response):\n    return -len(response)\ndef unary(prompt):\n    return 0\nconstant = 3\n"
    )
    (tmp_path / "my_broken_judges.py").write_text("import no_such_module_of_rsrlm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_test_judges"


@pytest.mark.parametrize("separator", [":", "."])
def test_load_function(my_judges: str, separator: str) -> None:
    function: Callable[[str, str], float] = load_function(f"{my_judges}{separator}shorter")
    assert call_function(function, "p", "four") == Scored(points=-4)


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("shorter", "write module:name"),
        (":shorter", "write module:name"),
        ("my_test_judges:", "write module:name"),
        ("no_such_module_of_rsrlm:f", "No module named .*on PYTHONPATH"),
        ("my_broken_judges:f", "No module named 'no_such_module_of_rsrlm'"),
        ("my_test_judges:longer", "has no attribute 'longer'"),
        ("my_test_judges:constant", "must be callable with"),
        ("my_test_judges:unary", "must be callable with"),
    ],
)
def test_load_function_errors(my_judges: str, dotted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"judge.function={dotted}|{message}") as caught:
        load_function(dotted)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda prompt, response: 0, False),
        (lambda prompt, response, *, data=None: 0, False),  # not in the third place
        (lambda *texts: 0, False),
        (lambda prompt, response, weight=1.0: 0, False),  # an argument of its own
        (lambda prompt, response, data=None: 0, True),
        (lambda prompt, response, reference: 0, True),
        (lambda prompt, response, reference, weight=1.0: 0, True),
    ],
)
def test_who_takes_what_a_prompt_carries(function: Callable[..., float], takes: bool) -> None:
    assert takes_data(function) == takes


def test_the_third_argument_is_a_dict_of_its_own() -> None:
    carried = {"reference": "Tea."}

    def spoils(prompt: str, response: str, data: dict[str, str]) -> float:
        return float(len(data.pop("reference")))

    assert call_function(spoils, "p", "r", carried) == Scored(points=4)
    assert carried == {"reference": "Tea."}


def test_a_function_that_does_not_say_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of those in C; and one that needs four arguments is none."""
    with pytest.raises(ConfigError, match=r"judge\.function=builtins:max: must be callable with \(prompt, response\)"):
        load_function("builtins:max")
    monkeypatch.setattr(os, "four", lambda prompt, response, data, more: 0, raising=False)
    with pytest.raises(ConfigError, match=r"judge\.function=os:four: must be callable with .*'more'"):
        load_function("os:four")


def test_a_function_deep_in_packages() -> None:
    assert load_function("os.path.join") is load_function("os.path:join") is os.path.join
