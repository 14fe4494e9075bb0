"""The journal under every answer: what was asked, as a digest, and what was answered."""

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rsrlm.store.atomic import append, numbered, sift_lines, sync_path

KEY_BYTES = 16


class CompletionLog:
    """Append-only JSON lines `{"k": <32 hex digits>, ...payload}`, found by the 16-byte digest `k`.

    Memory holds the digests and where their lines stand, about 30 bytes a line; payloads are read when asked for.
    A line that a kill cut off is dropped when the log is opened, lines that cannot be read are set aside in
    `<name>.bad` with a warning, and of several lines with one digest the first counts.

    One process writes a log. Others may open it with `readonly`: they see the lines that were whole at that moment,
    skip those that cannot be read, and change nothing. A log that does not exist is then an empty one.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._readonly = readonly
        self._index = _Index()
        if not readonly:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        self._file = -1
        if not readonly:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            sync_path(path.parent)  # else a power cut could lose the file with all its synced lines
        elif path.exists():
            self._file = os.open(path, os.O_RDONLY)
        self._end = os.fstat(self._file).st_size if self._file >= 0 else 0
        # After a kill the lines are with the operating system, but not necessarily on disk.
        self._added, self._synced = len(self._index), 0
        self._syncing = asyncio.Lock()

    def _read(self) -> None:
        if warning := sift_lines(self.path, self._take, mend=not self._readonly):
            logging.getLogger("rsrlm").warning(warning)
            self._index = _Index()  # the lines have moved
            sift_lines(self.path, self._take)

    def _take(self, line: bytes, offset: int) -> None:
        key = _key_of(line)
        if self._index.find(key) is None:
            self._index.add(key, offset, len(line))

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return self._index.find(key) is not None

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The payload that was added under this digest, tuples as lists; None if there is none."""
        place = self._index.find(key)
        if place is None:
            return None
        offset, length = place
        payload = _decoded(os.pread(self._file, length, offset))
        if payload.pop("k") != key.hex():
            raise OSError(f"{self.path}: another line stands where {key.hex()} was; did somebody else write to it?")
        return payload

    def add(self, key: bytes, payload: Mapping[str, Any]) -> None:
        """Append what JSON can hold, without a field "k"; nothing happens if the digest is there already.

        Once this returns, the line survives the death of this process, and after `sync` that of the machine. Raises
        OSError (a full disk), and then the log is as it was before.
        """
        if len(key) != KEY_BYTES or "k" in payload:
            raise ValueError(f"key {key.hex()}: a digest has {KEY_BYTES} bytes, and the payload no field 'k'")
        if self._index.find(key) is not None:
            return
        line = _encoded({"k": key.hex(), **payload}) + b"\n"
        append(self._file, self._end, line)
        self._index.add(key, self._end, len(line))
        self._end += len(line)
        self._added += 1

    async def sync(self) -> None:
        """Return when all that was added before is on disk. One fsync serves all who wait for it."""
        wanted = self._added
        async with self._syncing:
            if self._synced < wanted:
                added = self._added
                await asyncio.to_thread(os.fsync, self._file)
                self._synced = added

    def close(self) -> None:
        """Put everything on disk and close the file. May be called twice."""
        if self._file < 0:
            return
        if not self._readonly:
            os.fsync(self._file)
        os.close(self._file)
        self._file = -1


class Journals:
    """A journal of one's own in a run folder, and what other processes have written to theirs by now."""

    @classmethod
    def another(cls, folder: Path) -> "Journals":
        """With a new journal of one's own, `journal-N.jsonl`."""
        return cls(folder, numbered(folder, "journal", ".jsonl").stem)

    def __init__(self, folder: Path, name: str = "journal") -> None:
        self._own = CompletionLog(folder / f"{name}.jsonl")
        paths = sorted(set(folder.glob("journal*.jsonl")) - {self._own.path})
        self._others = [CompletionLog(path, readonly=True) for path in paths]
        self.add, self.sync = self._own.add, self._own.sync

    def __len__(self) -> int:
        return sum(map(len, (self._own, *self._others)))

    def __contains__(self, key: bytes) -> bool:
        return any(key in one for one in (self._own, *self._others))

    def get(self, key: bytes) -> dict[str, Any] | None:
        return next((one.get(key) for one in (self._own, *self._others) if key in one), None)

    def close(self) -> None:
        for one in (self._own, *self._others):
            one.close()


class _Index:
    """Offset and length of the line of each digest, in 24 bytes.

    The first two bytes of a digest choose one of 65,536 tables, in which the others are searched: of 8 million lines
    each table holds about 120. Nothing is sorted or moved, so adding never pauses and needs no second copy.
    """

    _TAIL, _ENTRY = KEY_BYTES - 2, KEY_BYTES - 2 + 10

    def __init__(self) -> None:
        self._tables: dict[bytes, bytearray] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, key: bytes) -> tuple[int, int] | None:
        table = self._tables.get(key[:2])
        if table is None:
            return None
        tail = key[2:]
        at = table.find(tail)
        while at >= 0 and at % self._ENTRY:  # the bytes of two neighbours that look like this digest
            at = table.find(tail, at + 1)
        if at < 0:
            return None
        place = int.from_bytes(table[at + self._TAIL : at + self._ENTRY], "big")
        return place >> 32, place & 0xFFFFFFFF

    def add(self, key: bytes, offset: int, length: int) -> None:
        table = self._tables.setdefault(key[:2], bytearray())
        table += key[2:] + (offset << 32 | length).to_bytes(10, "big")
        self._count += 1


class _Head(msgspec.Struct):
    k: str


_HEAD = msgspec.json.Decoder(_Head)


def _key_of(line: bytes) -> bytes:
    """The digest of a line. Raises ValueError or KeyError if the line cannot be read as a whole."""
    line.decode()  # msgspec does not look into the strings that it skips
    try:
        key = bytes.fromhex(_HEAD.decode(line).k)
    except msgspec.DecodeError:
        key = bytes.fromhex(_decoded(line)["k"])
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes in place of {KEY_BYTES}")
    return key


# msgspec is ten times as fast as json, which takes over for what msgspec refuses or changes: halves of surrogate pairs
# (an endpoint's JSON can carry one), and numbers that are not finite, which it would write as null.


def _encoded(entry: dict[str, Any]) -> bytes:
    try:
        line = msgspec.json.encode(entry)
    except UnicodeEncodeError:
        return json.dumps(entry).encode()
    return json.dumps(entry).encode() if b"null" in line else line


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        return json.loads(line)
