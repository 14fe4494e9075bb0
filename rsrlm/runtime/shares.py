"""Which items each optimizer step trains on, and which of them each rank takes. Items are places in the job's file."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsrlm.settings.train import TrainRule
from rsrlm.store.items import ItemFile


def steps_of(items: int, config: TrainRule, seed: int, iteration: int) -> list[Sequence[int]]:
    """The places of the items of every optimizer step, of all epochs. The first epoch keeps the given order, later ones
    shuffle it by seed.

    The last step of an epoch takes what is left, even a single pair: every pair counts once in every epoch, and more in
    a small step, since a step's loss is the mean over its pairs.
    """
    steps: list[Sequence[int]] = []
    for epoch in range(config.epochs):
        order: Any = range(items)
        if epoch:
            order = list(order)
            random.Random(f"epoch {seed} {iteration} {epoch}").shuffle(order)
        steps += [order[i : i + config.pairs_per_step] for i in range(0, items, config.pairs_per_step)]
    return steps


def share_of(
    places: Sequence[int], rank: int, world_size: int, micro_batch: int
) -> list[tuple[list[int], list[float]]]:
    """This rank's micro-batches: the places, and for each 1, or 0 where it only keeps the ranks in step and counts
    nothing. Every rank gets the same number of micro-batches."""
    mine = list(places[rank::world_size])
    shares = []
    for i in range(micro_batches(len(places), world_size, micro_batch)):
        found = mine[i * micro_batch : (i + 1) * micro_batch]
        shares.append((found, [1.0] * len(found)) if found else ([places[0]], [0.0]))
    return shares


def micro_batches(items: int, world_size: int, micro_batch: int) -> int:
    """Of each rank."""
    return math.ceil(math.ceil(items / world_size) / micro_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What every rank knows of the items of a step, those of other ranks included."""

    ids: list[str]
    kinds: list[str]
    response_tokens: list[int]


def outline(items: ItemFile[Any], places: Sequence[int], responses: Sequence[str]) -> Outline:
    """`responses` are the fields with the tokens of an item's responses. No token is read."""
    found = [items.outline(place) for place in places]
    return Outline(
        ids=[one["id"] for one in found],
        kinds=[one["kind"] for one in found],
        response_tokens=[sum(one[name] for name in responses) for one in found],
    )
