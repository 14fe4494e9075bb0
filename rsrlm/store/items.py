"""What is trained on, by reference: in the files where it was written as it was made.

An item is a frozen dataclass such as PreferencePair or Example. It has a field `id`; all its fields are texts, numbers,
None, and tuples of numbers (integers of 32 bits).
"""

import contextlib
import hashlib
import importlib
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import msgspec
import numpy as np
import xxhash

from rsrlm.settings.base import ConfigError
from rsrlm.store.atomic import append, numbered, sync_path

Item = TypeVar("Item")

SEEN_WITHIN_S = 60.0  # Linux writes back after 35 s, and NFS keeps what it knows of a file for as long as this

_CODES = {"i": 1, "d": 2}
_FORMATS = {code: form for form, code in _CODES.items()}
_PLACE = struct.Struct("<HQIQ")  # number of the file, offset, length, digest
_PLACES = np.dtype([("file", "<u2"), ("offset", "<u8"), ("length", "<u4"), ("digest", "<u8")])
_TRAILER = struct.Struct("<QQ")  # number of items, bytes of the header


def encoded(item: Any) -> bytes:
    """The values of the fields, in order, as msgpack. Tuples are packed as arrays: per number, that is ten times as
    fast to read and write as msgpack's own."""
    return msgspec.msgpack.encode([_packed(getattr(item, one.name)) for one in fields(item)])


def _packed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    form = "d" if value and isinstance(value[0], float) else "i"
    return msgspec.msgpack.Ext(_CODES[form], struct.pack(f"<{len(value)}{form}", *value))


def _unpacked(code: int, data: memoryview) -> tuple[Any, ...]:
    form = _FORMATS[code]
    return struct.unpack(f"<{len(data) // struct.calcsize(form)}{form}", data)


_DECODER = msgspec.msgpack.Decoder(ext_hook=_unpacked)
_LENGTHS = msgspec.msgpack.Decoder(ext_hook=lambda code, data: len(data) // struct.calcsize(_FORMATS[code]))


def decoded(data: bytes | memoryview, kind: type[Item]) -> Item:
    """The item that was encoded; `kind` is its type."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**dict(zip(names, _DECODER.decode(data), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRef:
    """Where an item is in a file: `length` bytes from `offset` on. `digest` is that of these bytes (xxh3, 64 bits)."""

    id: str
    offset: int
    length: int
    digest: int


class Segment:
    """The file that one producer appends to. Others read what it has given references of.

    It is begun anew: references hold within one run of the program.
    """

    @classmethod
    def another(cls, folder: Path, name: str) -> "Segment":
        """One in the folder that nobody else writes to: its name ends with a number of its own."""
        return cls(numbered(folder, name))

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = str(path.resolve())
        self._file = path.open("wb", buffering=0)
        self._end = 0

    def append(self, data: bytes) -> int:
        """The offset of the data. Raises OSError (a full disk), and then it is not there."""
        offset = self._end
        append(self._file.fileno(), offset, data)
        self._end += len(data)
        return offset

    def add(self, item: Any) -> ItemRef:
        data = encoded(item)
        return ItemRef(id=item.id, offset=self.append(data), length=len(data), digest=xxhash.xxh3_64_intdigest(data))

    def close(self) -> None:
        self._file.close()


class Items(Sequence[Item], Generic[Item]):
    """Items of one type by reference, in any order; one becomes an object when it is asked for. Memory holds 22 bytes
    for each, and its id."""

    def __init__(self, kind: type[Item]) -> None:
        self.kind = kind
        self.ids: list[str] = []
        self._files: list[str] = []
        self._places = bytearray()
        self._open: dict[int, int] = {}  # descriptors by the number of a file

    def put(self, segment: str, place: ItemRef) -> None:
        """Add an item of a segment."""
        if segment not in self._files:
            self._files.append(segment)
        self.ids.append(place.id)
        self._places += _PLACE.pack(self._files.index(segment), place.offset, place.length, place.digest)

    def taken(self, order: Sequence[int]) -> "Items[Item]":
        """The items at these places."""
        made = Items(self.kind)
        made.ids, made._files = [self.ids[at] for at in order], self._files
        made._places = bytearray(np.frombuffer(self._places, _PLACES)[list(order)].tobytes())
        return made

    def with_others(self, others: "Items[Item]") -> "Items[Item]":
        """These, and then the others."""
        made = Items(self.kind)
        made.ids, made._files = self.ids + others.ids, self._files + others._files
        moved = np.frombuffer(others._places, _PLACES).copy()
        moved["file"] += len(self._files)
        made._places = self._places + moved.tobytes()
        return made

    def digest(self) -> str:
        """Of what the items hold, and of their order."""
        return hashlib.blake2b(np.frombuffer(self._places, _PLACES)["digest"].tobytes(), digest_size=16).hexdigest()

    @property
    def columns(self) -> bytes:
        """All but the ids, for the file of a training job."""
        name = f"{self.kind.__module__}:{self.kind.__qualname__}"
        header = msgspec.msgpack.encode([name, self._files])
        return bytes(self._places) + header + _TRAILER.pack(len(self), len(header))

    def __len__(self) -> int:
        return len(self._places) // _PLACE.size

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return decoded(self._bytes(index), self.kind)

    def outline(self, index: int) -> dict[str, Any]:
        """The values of an item by the names of its fields, but of each tuple only the length. None of its numbers is
        read."""
        names = [one.name for one in fields(self.kind)]  # type: ignore[arg-type]
        return dict(zip(names, _LENGTHS.decode(self._bytes(index)), strict=True))

    def _bytes(self, index: int) -> bytes:
        """As they were written. Raises ConfigError where they do not come to this host: whoever wrote them did not wait
        until others can see them, and a network file system may take as long as its cache lasts."""
        at = range(len(self))[index]
        number, offset, length, digest = _PLACE.unpack_from(self._places, at * _PLACE.size)
        began = time.monotonic()
        while True:
            with contextlib.suppress(FileNotFoundError):
                if number not in self._open:
                    self._open[number] = os.open(self._files[number], os.O_RDONLY)
                data = os.pread(self._open[number], length, offset)
                if xxhash.xxh3_64_intdigest(data) == digest:
                    return data
            if time.monotonic() - began > SEEN_WITHIN_S:
                raise ConfigError(
                    f"{self._files[number]}: {length} bytes at {offset} are not here as they were written, after "
                    f"{SEEN_WITHIN_S:g} s; runs must be a folder that all hosts share"
                )
            if number in self._open:
                os.close(self._open.pop(number))  # to open a file is to ask its server anew
            time.sleep(0.1)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


class ItemFile(Items[Item]):
    """The items of `write_items`, without their ids."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(-_TRAILER.size, os.SEEK_END)
            count, length = _TRAILER.unpack(file.read())
            file.seek(-_TRAILER.size - length - count * _PLACE.size, os.SEEK_END)
            places = bytearray(file.read(count * _PLACE.size))
            name, files = msgspec.msgpack.decode(file.read(length))
        module, _, kind = name.partition(":")
        super().__init__(getattr(importlib.import_module(module), kind))
        self._places, self._files = places, [one or str(path) for one in files]


def write_items(path: Path, items: Sequence[Any]) -> str:
    """Write the file of a training job: where its items are, all of one type, in training order; returns a digest of
    what they hold. Those that are in no segment are in this file.

    The file appears whole or not at all. Raises ValueError if there are no items.
    """
    kinds = {items.kind} if isinstance(items, Items) else {type(item) for item in items}
    if len(kinds) != 1 or not len(items):
        raise ValueError(f"{path}: {len(items)} items of {len(kinds)} types; a training job has items of one")
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        segment = Segment(scratch)
        if isinstance(items, Items):
            made = items
        else:
            made = Items(*kinds)
            for item in items:
                made.put("", segment.add(item))
        segment.append(made.columns)
        segment.close()
        sync_path(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return made.digest()
