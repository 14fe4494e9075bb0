"""Which replica gets the next requests."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.runtime.routing import least_busy


def replica(index: int, outstanding: int, ready: bool = True) -> Any:
    made = SimpleNamespace(index=index, outstanding=outstanding, ready=asyncio.Event())
    if ready:
        made.ready.set()
    return made


@pytest.mark.parametrize(
    ("replicas", "index"),
    [
        ([(0, 5, True), (1, 3, True), (2, 4, True)], 1),
        ([(0, 0, False), (1, 7, True), (2, 6, True)], 2),  # the idle one may not be given work
        ([(3, 2, True), (1, 2, True), (2, 2, True)], 1),  # equal: the lowest index, wherever it stands
        ([(1, 2, True), (0, 2, False), (2, 1, False)], 1),
        ([(0, 0, False), (1, 0, False)], None),
        ([], None),
    ],
)
def test_least_busy(replicas: list[tuple[int, int, bool]], index: int | None) -> None:
    found = least_busy([replica(*one) for one in replicas])
    assert (found and found.index) == index


def test_least_busy_of_many() -> None:
    rng = random.Random(0)
    for _ in range(300):
        many = [replica(index, rng.randrange(3), rng.random() < 0.6) for index in range(rng.randrange(1, 9))]
        rng.shuffle(many)
        ready = [one for one in many if one.ready.is_set()]
        assert least_busy(many) is min(ready, key=lambda one: (one.outstanding, one.index), default=None)
