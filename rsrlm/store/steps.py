"""The optimizer steps of an iteration."""

import json
import logging
from pathlib import Path
from typing import Any

from rsrlm.store.atomic import append_line, read_lines, write_whole


class StepLog:
    """Metrics of an iteration's optimizer steps, in order: `steps.jsonl`.

    To go on without a line that cannot be read is safe: steps before the checkpoint come back with it, and later ones
    are replayed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists() and (warning := read_lines(path, self._take)):
            logging.getLogger("rsrlm").warning(warning)

    def _take(self, row: dict[str, Any]) -> None:
        _ = row["step"]  # KeyError or TypeError where this is no row
        self.rows.append(row)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        append_line(self._path, json.dumps(row).encode())

    def keep_before(self, step: int) -> None:
        """Forget the steps from `step` on: they were lost and come again. Those before are put in order."""
        kept = sorted((row for row in self.rows if row["step"] < step), key=lambda row: row["step"])
        if kept != self.rows:
            self.rows = kept
            write_whole(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))
