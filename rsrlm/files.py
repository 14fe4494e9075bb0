"""Files that survive a kill: whole or not there, and append-only ones whose cut-off last line does not count."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """The file appears under its name only when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of an append-only file; a last one that a kill cut off was never acknowledged and is removed."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()
