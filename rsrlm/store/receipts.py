"""The preference buffer: where what is trained on is, in training order, and why the rest gave nothing."""

import random
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rsrlm.store.atomic import append, sift_lines
from rsrlm.store.items import ItemRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """For a finished group: its items, or the reason why there are none."""

    group: str
    iteration: int
    items: tuple[ItemRef, ...] = ()
    reason: str = ""


@dataclass
class _Shelf:
    """The receipts of an iteration, as columns: as objects they would take twice the memory."""

    groups: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    segments: array = field(default_factory=lambda: array("H"))
    offsets: array = field(default_factory=lambda: array("Q"))
    lengths: array = field(default_factory=lambda: array("I"))
    tokens: array = field(default_factory=lambda: array("I"))


class ReceiptBuffer:
    """What producers have finished, for the learner. Token ids do not pass through it: they stay in segments.

    A plain class, which can be made a Ray actor. Everything put is in its file before `put` returns, so a buffer that
    is opened on that file after the death of its process lacks nothing. A resumed run begins with a new file and new
    segments: its recipes pass what is journalled and put every group again.
    """

    def __init__(self, path: str | Path) -> None:
        self._shelves: dict[int, _Shelf] = {}
        self._segments: list[str] = []  # the names of files, which receipts share
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        decoder = msgspec.json.Decoder(Receipt)
        if path.exists() and (warning := sift_lines(path, lambda line, offset: self._keep(decoder.decode(line)))):
            raise OSError(warning)  # items would be missing without a word
        self._file = path.open("ab", buffering=0)
        self._end = path.stat().st_size

    def put(self, receipt: Receipt) -> bool:
        """Add the receipt of a finished group; may be repeated. False if the group has one already, which stays."""
        if receipt.group in self._shelf(receipt.iteration).groups:
            return False
        line = msgspec.json.encode(receipt) + b"\n"
        append(self._file.fileno(), self._end, line)
        self._end += len(line)
        self._keep(receipt)
        return True

    def _shelf(self, iteration: int) -> _Shelf:
        return self._shelves.setdefault(iteration, _Shelf())

    def _keep(self, receipt: Receipt) -> None:
        shelf = self._shelf(receipt.iteration)
        shelf.groups.add(receipt.group)
        if not receipt.items:
            shelf.reasons[receipt.reason] += 1
        for item in receipt.items:
            if item.segment not in self._segments:
                self._segments.append(item.segment)
            shelf.ids.append(item.id)
            shelf.segments.append(self._segments.index(item.segment))
            shelf.offsets.append(item.offset)
            shelf.lengths.append(item.length)
            shelf.tokens.append(item.tokens)

    def items(self, iteration: int, seed: int, kind: str = "pairs") -> list[ItemRef]:
        """The iteration's items in training order, which depends on ids, seed and `kind` alone."""
        shelf = self._shelf(iteration)
        order = sorted(range(len(shelf.ids)), key=shelf.ids.__getitem__)
        random.Random(f"{kind} {seed} {iteration}").shuffle(order)
        return [
            ItemRef(
                id=shelf.ids[at],
                segment=self._segments[shelf.segments[at]],
                offset=shelf.offsets[at],
                length=shelf.lengths[at],
                tokens=shelf.tokens[at],
            )
            for at in order
        ]

    def counts(self, iteration: int) -> dict[str, Any]:
        """Groups, items and tokens of an iteration, and how many groups have no items for which `reasons`."""
        shelf = self._shelf(iteration)
        return {
            "groups": len(shelf.groups),
            "items": len(shelf.ids),
            "tokens": sum(shelf.tokens),
            "reasons": dict(shelf.reasons),
        }

    def drop(self, iteration: int) -> None:
        """Free the memory of an iteration that has been trained on."""
        self._shelves.pop(iteration, None)
