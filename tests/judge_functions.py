"""Judges of the tests, in a module that a worker imports fast."""

import os
import re
import sys
import time
from pathlib import Path


def by_length(prompt: str, response: str) -> float:
    return float(len(response))


def failing(prompt: str, response: str) -> float:
    raise RuntimeError("no such judge")


def by_order(prompt: str, response: str) -> float:
    """Does what the response says; else its length."""
    if response == "hang":
        while True:
            pass
    if response == "hang in C":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "sleep":
        time.sleep(1000)
    if response == "raise":
        raise ValueError(f"what is \x1b[31m{prompt}?")
    if response == "leave":
        sys.exit(0)
    if response == "die":
        os._exit(3)
    if response == "pid":
        return os.getpid()
    if response == "wait":
        while not Path(prompt).exists():
            time.sleep(0.01)
    return float(len(response))


def long_or_short(prompt: str, response: str) -> float:
    return 1.0 if len(response) > 12 else 0.0


def by_reference(prompt: str, response: str, reference: dict[str, str]) -> float:
    return float(len(reference["reference"]))


def by_optional_data(prompt: str, response: str, data: dict[str, str] | None = None) -> float:
    return float(len((data or {})["reference"]))


def with_a_weight(prompt: str, response: str, weight: float = 0.5) -> float:
    return weight
