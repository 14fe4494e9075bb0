"""What is trained on, by reference: segments that producers append to, and the file of a training job.

An item is a frozen dataclass such as PreferencePair or Example. It has a field `id`; all its fields are texts, numbers,
None, and tuples of numbers (integers of 32 bits).
"""

import hashlib
import importlib
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import msgspec

from rsrlm.store.atomic import append, sync_path

Item = TypeVar("Item")

_CODES = {"i": 1, "d": 2}
_FORMATS = {code: form for form, code in _CODES.items()}
_TRAILER = struct.Struct("<QQ")  # number of items, bytes of the name of their type


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


def decoded(data: bytes | memoryview, kind: type[Item]) -> Item:
    """The item that was encoded; `kind` is its type."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**dict(zip(names, _DECODER.decode(data), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRef:
    """Where an item is: `length` bytes from `offset` on in the file `segment`. `tokens` counts the numbers that its
    tuples hold."""

    id: str
    segment: str
    offset: int
    length: int
    tokens: int


class ItemSegment:
    """Items in the order in which one producer finishes them. Others read what it has given references of.

    The file is begun anew: references hold within one run of the program.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = str(path.resolve())
        self._file = path.open("wb", buffering=0)
        self._end = 0

    def add(self, item: Any) -> ItemRef:
        """Raises OSError (a full disk), and then the item is not there."""
        data = encoded(item)
        append(self._file.fileno(), self._end, data)
        tokens = sum(len(value) for one in fields(item) if isinstance(value := getattr(item, one.name), tuple))
        place = ItemRef(id=item.id, segment=self._path, offset=self._end, length=len(data), tokens=tokens)
        self._end += len(data)
        return place

    def close(self) -> None:
        self._file.close()


def write_items(path: Path, items: Iterable[Any]) -> str:
    """Write the items of a training job, all of one type, in training order; returns a digest of what they hold.

    The file appears whole or not at all. Memory holds one item, and 8 bytes for each. Raises ValueError if there are
    none.
    """
    kinds: set[type] = set()

    def payloads() -> Iterator[bytes]:
        for item in items:
            kinds.add(type(item))
            yield encoded(item)

    return _write(path, payloads(), kinds)


def gather_items(path: Path, kind: type, places: Iterable[ItemRef]) -> str:
    """`write_items` of the items, which are of this type, at these places: their bytes are copied as they are."""

    def payloads() -> Iterator[bytes]:
        files: dict[str, int] = {}
        try:
            for place in places:
                if place.segment not in files:
                    files[place.segment] = os.open(place.segment, os.O_RDONLY)
                yield os.pread(files[place.segment], place.length, place.offset)
        finally:
            for file in files.values():
                os.close(file)

    return _write(path, payloads(), {kind})


def _write(path: Path, payloads: Iterable[bytes], kinds: set[type]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    digest, ends = hashlib.blake2b(digest_size=16), array("Q")
    try:
        with scratch.open("wb", buffering=1 << 20) as file:
            for payload in payloads:
                file.write(payload)
                digest.update(payload)
                ends.append((ends[-1] if ends else 0) + len(payload))
            if len(kinds) != 1 or not ends:
                raise ValueError(f"{path}: {len(ends)} items of {len(kinds)} types; a training job has items of one")
            (kind,) = kinds
            name = f"{kind.__module__}:{kind.__qualname__}".encode()
            file.write(ends.tobytes() + name + _TRAILER.pack(len(ends), len(name)))
        sync_path(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return digest.hexdigest()


class ItemFile(Sequence[Item], Generic[Item]):
    """The items of `write_items`, whose type is `kind`. The file is mapped into memory, which processes of one host
    share; an item becomes an object when it is asked for."""

    kind: type[Item]

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        rest, trailer = self._data[: -_TRAILER.size], self._data[-_TRAILER.size :]
        count, length = _TRAILER.unpack(trailer)
        module, _, name = bytes(rest[len(rest) - length :]).decode().partition(":")
        self.kind = getattr(importlib.import_module(module), name)
        start = len(rest) - length - 8 * count
        self._ends = array("Q", bytes(rest[start : start + 8 * count]))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return decoded(self._data[start : self._ends[index]], self.kind)
