"""A file of JSON lines that another process may be writing, read on from where the last look ended."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class Followed:
    """A file of lines that grows: what is new in it. A line that is being written waits for the next look, one that
    cannot be read is passed over, and a file that another took the place of, or that was cut, is read anew."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """The first look begins `last` bytes before the end at most; None: at the top."""
        self.path = path
        self._last, self._at, self._file = last, 0, -1

    def lines(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as stream:
                data = self._new(stream)
        except OSError:  # it is not there yet, or its disk does not answer now
            return
        for line in data.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    yield row

    def _new(self, stream: IO[bytes]) -> bytes:
        """The whole lines that are new."""
        file, end = os.fstat(stream.fileno()).st_ino, stream.seek(0, os.SEEK_END)
        if file != self._file or end < self._at:
            self._file, self._at = file, 0
            if self._last is not None and end > self._last:
                stream.seek(end - self._last)
                self._at = end - self._last + len(stream.readline())
        stream.seek(self._at)
        data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return whole
