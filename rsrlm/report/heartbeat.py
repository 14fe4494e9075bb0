"""Whether a run is alive, by its alive.json alone: nothing is locked, and the clocks of two hosts may differ."""

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from rsrlm.report.pulse import Pulse

SILENT_S = 60.0  # without a new alive.json: a network file system keeps what it knows for as long as this
LOOK_S = 5.0  # before a run is taken for dead by the clock of its host
STARTS_S = 900.0  # for a run to begin after its config was written
GOES_ON = ("starting", "running", "silent")


class Heartbeat:
    """Looks at a run again and again. Once alive.json was seen to change, our own clock alone counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened = time.monotonic()
        self._said: dict[str, Any] | None = None
        self._since = self._opened  # when that was new to us
        self._changed = False
        self.pulse: Pulse | None = None

    def look(self) -> None:
        said = json_of(self._folder / "alive.json")
        if said != self._said:
            self._changed, self._since = self._said is not None, time.monotonic()
            self._said, self.pulse = said, _pulse(said)

    @property
    def silent_s(self) -> float:
        """Seconds since the run was heard of."""
        ours = time.monotonic() - self._since
        if self._changed:
            return ours
        written = max(changed_at(self._folder / name) for name in ("config.yaml", "summary.json"))
        return max(ours, time.time() - (self.pulse.at if self.pulse else written))

    def status(self, said: str) -> str:
        """That in summary.json, which is `said`, but for a run that cannot write one any more."""
        if said not in ("", "running"):
            return said
        if not said:
            return "starting" if self.silent_s < STARTS_S else "killed"
        if self.silent_s < SILENT_S:
            return "running"
        return "silent" if time.monotonic() - self._opened < LOOK_S else "killed"

    def now(self) -> float:
        """Seconds since 1970 by the clock of the run: its last sign of life, and what passed since."""
        if self._changed and self.pulse:
            return self.pulse.at + time.monotonic() - self._since
        return time.time()


def _pulse(said: dict[str, Any]) -> Pulse | None:
    """What a run of another version, or a hand, has written may lack all but the first three fields."""
    for fields in (said, {name: said.get(name) for name in ("host", "pid", "at")}):
        try:
            return msgspec.convert(fields, Pulse)
        except msgspec.ValidationError:
            continue
    return None


def json_of(path: Path) -> dict[str, Any]:
    """What a file holds; empty where it is not there, or cannot be read now."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def changed_at(path: Path) -> float:
    """When a file was last changed, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
