"""Pairs of earlier iterations, trained on again beside those of an iteration."""

import random
from collections.abc import Iterator, Sequence
from math import floor
from typing import Annotated

from pydantic import Field

from rsrlm.recipes.base import Batch
from rsrlm.recipes.self_rewarding import in_training_order
from rsrlm.records import Group, PreferencePair, group_id
from rsrlm.run import Run
from rsrlm.settings.base import Number
from rsrlm.store.buffer import pairs_of, reasons_of

Share = Annotated[Number, Field(ge=0, le=1)]


def earlier(run: Run, number: int, shares: Sequence[float], seed: int) -> Iterator[PreferencePair]:
    """`shares[0]` of the pairs that the iteration before made, `shares[1]` of those of the one before it, and so on,
    drawn by seed and ids. Those that an iteration itself trained on again are left out."""
    for age, share in enumerate(shares, start=1):
        before = number - age
        if not share or before < 0:
            continue
        own = sorted(pair.id for pair in run.pairs(before) if pair.id.startswith(group_id(before, "")))
        drawn = set(random.Random(f"replay {seed} {number} {before}").sample(own, floor(share * len(own) + 1e-9)))
        yield from (pair for pair in run.pairs(before) if pair.id in drawn)


def replayed(run: Run, number: int, groups: Sequence[Group], shares: Sequence[float], seed: int) -> Batch:
    """The pairs of the groups and of earlier iterations in one order of training."""
    pairs = pairs_of(groups, earlier(run, number, shares, seed))
    return Batch(
        items=in_training_order(pairs, seed, number),
        groups=groups,
        dropped=reasons_of(groups),
        measures={"replay": {"pairs": len(pairs) - len(pairs_of(groups))}},
    )
