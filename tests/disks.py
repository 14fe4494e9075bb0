"""Disks that fill up, and disks that lose what was not synced."""

import os
import resource
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def small_disk(size: int = 1000) -> Any:
    """Files stop growing at so many bytes: a real write that fails half-way, as on a full disk.

    Around the write alone: pytest's own output may be a larger file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Disk:
    """Stands in for os.fsync: what a power cut leaves of each file. `gate` holds a sync up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.safe: dict[str, bytes] = {}
        self.folders: list[Path] = []
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr("os.fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.folders.append(path)
            return
        self.calls += 1
        data = path.read_bytes()
        assert self.gate.wait(10)
        self.safe[path.name] = data
