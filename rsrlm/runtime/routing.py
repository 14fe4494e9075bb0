"""Which replica gets the next requests."""

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar


class Serves(Protocol):
    """A replica: `ready` is set while it may be given work, and `outstanding` is what it has."""

    index: int
    outstanding: int
    ready: Any


Served = TypeVar("Served", bound=Serves)


def least_busy(replicas: Iterable[Served]) -> Served | None:
    """The ready one with the least outstanding work, of equal ones that with the lowest index; None where none is
    ready. It is asked for at every message, of hundreds: most are passed at one comparison."""
    best: Served | None = None
    for one in replicas:
        if best is not None:
            if one.outstanding > best.outstanding:
                continue
            if one.outstanding == best.outstanding and one.index > best.index:
                continue
        if one.ready.is_set():
            best = one
    return best
