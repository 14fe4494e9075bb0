"""Files that survive a kill: whole or not there, and append-only ones whose cut-off last line does not count."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """The file appears under its name only when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def sync_files(folder: Path) -> None:
    """On disk before it is renamed: a power cut must not leave a folder that is whole by its name only."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of an append-only file; a last one that a kill cut off was never acknowledged and is removed."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


def read_lines(path: Path, take: Callable[[Any], None]) -> str:
    """Give `take` what the JSON of each whole line says; returns a message for the user, "" where all went well.

    A power cut or a failing disk leaves lines that are no JSON, or none that `take` knows (ValueError, KeyError,
    TypeError). They are moved to a file beside, `<name>.bad`: for files of what can be made again.
    """
    good, bad, first = [], [], ""
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            take(json.loads(line))
            good.append(line)
        except (ValueError, KeyError, TypeError) as error:
            first = (
                first
                or f"line {number} cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            )
            bad.append(line)
    if not bad:
        return ""
    aside = path.with_name(f"{path.name}.bad")
    with aside.open("ab") as file:
        file.writelines(line + b"\n" for line in bad)
        file.flush()
        os.fsync(file.fileno())
    write_whole(path, b"".join(line + b"\n" for line in good))
    return f"{path}: {first}; {len(bad)} such lines are set aside in {aside.name}, and what they held is made again"
