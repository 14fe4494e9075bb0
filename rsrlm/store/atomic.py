"""Files that survive a kill: whole or absent, and append-only ones whose cut-off last line does not count."""

import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """The file appears under its name only when all of it is on disk. Of several processes the last one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def numbered(folder: Path, name: str, suffix: str = "") -> Path:
    """An empty file `<name>-<number><suffix>` that was not there, whoever else makes one at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        with suppress(FileExistsError):
            path = folder / f"{name}-{number}{suffix}"
            path.touch(exist_ok=False)
            return path
    raise AssertionError


def append(file: int, end: int, data: bytes) -> None:
    """Write to a file that ends at `end`. After an OSError (a full disk) it still ends there, not within the data."""
    left = memoryview(data)
    try:
        while left:
            left = left[os.pwrite(file, left, end + len(data) - len(left)) :]
    except OSError:
        with suppress(OSError):  # of a device, which has no length: the first reason counts
            os.ftruncate(file, end)
        raise


def append_line(path: Path, line: bytes) -> None:
    """The file has this line as its last one, or after an OSError nothing of it: the next line starts anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        append(file.fileno(), file.tell(), line + b"\n")


def sync_path(path: Path) -> None:
    """What a file or the list of a folder's files holds is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """On disk before it is renamed: a power cut must not leave a folder that is whole by its name only."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def read_lines(path: Path, take: Callable[[Any], None]) -> str:
    """Call `take` with the JSON value of each whole line; the rest is as in `sift_lines`."""
    return sift_lines(path, lambda line, offset: take(json.loads(line)))


def sift_lines(path: Path, take: Callable[[bytes, int], None], *, mend: bool = True) -> str:
    """Call `take` with each whole line of an append-only file, its newline included, and the offset of the line.

    A last line that a kill cut off was never acknowledged and is removed. Lines that `take` cannot read, as a power cut
    or a failing disk leaves them (ValueError, KeyError, TypeError, RecursionError), are moved to `<name>.bad`: this is
    for files of what can be made again. The file is read as a stream. Returns a message for the user, "" if all went
    well; after a message the offsets are those of before the move.

    Without `mend` the file stays as it is and there is no message: another process may be writing it.
    """
    bad: set[int] = set()
    first, end = "", 0
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                take(line, end)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = (str(error).splitlines() or [""])[0]
                first = first or f"line {number} cannot be read ({type(error).__name__}: {reason})"
                bad.add(end)
            end += len(line)
    if not mend:
        return ""
    if end < path.stat().st_size:
        os.truncate(path, end)
    if not bad:
        return ""
    aside = path.with_name(f"{path.name}.bad")
    _set_aside(path, bad, aside)
    return f"{path}: {first}; {len(bad)} such lines are set aside in {aside.name}, and what they held is made again"


def _set_aside(path: Path, bad: set[int], aside: Path) -> None:
    scratch, offset = path.with_name(f".{path.name}.tmp"), 0
    with path.open("rb", buffering=1 << 20) as file, scratch.open("wb") as good, aside.open("ab") as other:
        for line in file:
            (other if offset in bad else good).write(line)
            offset += len(line)
        for written in (other, good):  # the bad lines first: they leave the file with the rename
            written.flush()
            os.fsync(written.fileno())
    scratch.replace(path)
