"""The preference buffer: where producers put what they have finished, and where the learner finds what it trains on."""

import os
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from rsrlm.records import Group, PreferencePair
from rsrlm.store.items import ItemRef, Items, Segment

_PLACE = struct.Struct("<HQQ")  # number of the file and 1, offset, length


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """For a finished group, which is in a segment, as are its pairs; without pairs `reason` says why."""

    group: str
    segment: str
    offset: int
    length: int
    pairs: tuple[ItemRef, ...]
    reason: str


def receipt_of(group: Group, segment: Segment) -> Receipt:
    """Write a finished group to the segment."""
    data = pickle.dumps(group, protocol=5)
    return Receipt(
        group=group.id,
        segment=segment.path,
        offset=segment.append(data),
        length=len(data),
        pairs=tuple(segment.add(pair) for pair in group.pairs),
        reason=group.no_pair_reason,
    )


class Buffer(Sequence[Group]):
    """The groups of an iteration in the order of their tasks, whoever finishes which when, and their pairs.

    Token ids do not pass through it: a group is read from its segment when it is asked for. Memory holds the ids and 18
    bytes of a group. Another thread may read while receipts are put.
    """

    def __init__(self, ids: Sequence[str], folder: Path) -> None:
        """`folder` is for segments of those who make pairs of all groups."""
        self.ids, self.folder = ids, folder
        self.pairs = Items(PreferencePair)
        self.reasons = Counter[str]()  # why groups have no pairs
        self.finished = 0  # groups
        self.last: Receipt | None = None  # that was put
        self._files: list[str] = []
        self._places = bytearray(_PLACE.size * len(ids))
        self._open: dict[int, int] = {}  # descriptors by the number of a file

    def put(self, index: int, receipt: Receipt) -> None:
        """Add the receipt of the group with this index."""
        at = index * _PLACE.size
        if receipt.segment not in self._files:
            self._files.append(receipt.segment)
        if receipt.reason:
            self.reasons[receipt.reason] += 1
        for pair in receipt.pairs:
            self.pairs.put(receipt.segment, pair)
        number = self._files.index(receipt.segment) + 1
        self._places[at : at + _PLACE.size] = _PLACE.pack(number, receipt.offset, receipt.length)
        self.finished += 1
        self.last = receipt

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        """Raises KeyError for a group that is not finished."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        number, offset, length = _PLACE.unpack_from(self._places, at * _PLACE.size)
        if not number:
            raise KeyError(f"group {self.ids[at]} is not finished")
        if number not in self._open:
            self._open[number] = os.open(self._files[number - 1], os.O_RDONLY)
        group: Group = pickle.loads(os.pread(self._open[number], length, offset))
        return group

    def __iter__(self) -> Iterator[Group]:
        return (self[index] for index in range(len(self)))

    def and_more(self, pairs: Iterable[PreferencePair]) -> Items[PreferencePair]:
        """The pairs of the groups, and others, which are written to a segment."""
        segment, more = Segment.another(self.folder, "pairs"), Items(PreferencePair)
        for pair in pairs:
            more.put(segment.path, segment.add(pair))
        segment.close()
        return self.pairs.with_others(more)

    def close(self) -> None:
        self.pairs.close()
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def ids_of(groups: Sequence[Group]) -> Sequence[str]:
    return groups.ids if isinstance(groups, Buffer) else [group.id for group in groups]


def pairs_of(groups: Sequence[Group], more: Iterable[PreferencePair] = ()) -> Sequence[PreferencePair]:
    """The pairs of all groups, and more. Of a buffer none is read or held in memory."""
    if isinstance(groups, Buffer):
        return groups.and_more(more) if more else groups.pairs
    return [*(pair for group in groups for pair in group.pairs), *more]


def reasons_of(groups: Sequence[Group]) -> Counter[str]:
    """How many groups have no pairs for which reason."""
    if isinstance(groups, Buffer):
        return groups.reasons
    return Counter(group.no_pair_reason for group in groups if group.no_pair_reason)


def in_order(pairs: Sequence[PreferencePair], order: Callable[[list[str]], list[int]]) -> Sequence[PreferencePair]:
    """The pairs in the order that `order` gives to their ids."""
    if isinstance(pairs, Items):
        return pairs.taken(order(pairs.ids))
    return [pairs[at] for at in order([pair.id for pair in pairs])]
