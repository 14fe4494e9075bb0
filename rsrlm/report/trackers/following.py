"""The trackers of a run, each in a thread of its own that looks at the run folder: none can hold up a run or end it."""

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import islice

import yaml

from rsrlm.config import Config, dump
from rsrlm.report.progress import Report
from rsrlm.report.trackers.base import Tracked, Tracker
from rsrlm.report.trackers.mlflow import MlflowTracker
from rsrlm.report.trackers.rows import Rows
from rsrlm.report.trackers.tensorboard import TensorBoardTracker
from rsrlm.report.trackers.wandb import WandbTracker
from rsrlm.settings.base import ConfigError, first_line
from rsrlm.store.folder import RunFolder

EVERY_S = 5.0
AGAIN_S = 60.0  # after a failure
END_S = 20.0  # for what is left when a run ends
ROWS = 200  # that are logged at once
PASSWORD = r"//\S*@"  # and name, in an address


def check(config: Config) -> None:
    """Raises ConfigError where a tracker's package is missing."""
    for name, section in config.trackers:
        if section and not find_spec(name):
            raise ConfigError(
                f"trackers.{name}: {name} is not installed; pip install 'rsrlm[trackers]', or leave it out"
            )


def opened(config: Config, store: RunFolder) -> list[Tracker]:
    """Those that are configured."""
    own = config.trackers
    if not (own.wandb or own.tensorboard or own.mlflow):
        return []
    data = yaml.safe_load(dump(config))
    del data["trackers"]  # an address may hold a password
    for judge in (data["judge"], data["evaluate"]["judge"]):
        if endpoint := judge.get("endpoint"):
            endpoint["url"] = re.sub(PASSWORD, "//", endpoint["url"]).partition("?")[0]
    run = Tracked(id=store.fix("tracker_id", secrets.token_hex(4)), name=config.name, folder=store.folder, config=data)
    found: list[Tracker] = []
    if own.wandb:
        found.append(WandbTracker(run, own.wandb))
    if own.tensorboard:
        found.append(TensorBoardTracker(run, own.tensorboard))
    if own.mlflow:
        found.append(MlflowTracker(run, own.mlflow))
    return found


class Follower:
    """Gives a tracker what comes into a run folder. What it cannot take now it gets later: the folder has it all."""

    def __init__(self, tracker: Tracker, store: RunFolder, say: Callable[[str], None]) -> None:
        self.tracker, self._store, self._say = tracker, store, say
        self._rows: Rows | None = None  # None: the tracker is to be opened
        self._held = 0  # the position after the last row that the tracker has
        self._again_at = 0.0
        self._told: set[str] = set()
        self.closed = False

    def look(self, ended: str = "") -> None:
        """Send what is new. `ended` is the status of the run, once it is over."""
        if time.monotonic() < self._again_at and not ended:
            return
        try:
            self._send()
            if ended:
                self.tracker.close(ended)
                self.closed = True
        except Exception as error:  # whatever a library raises
            self._rows = None
            self._again_at = time.monotonic() + AGAIN_S
            self._once("failed", f"{first_line(error)}; the run goes on, and it is tried again")

    def _send(self) -> None:
        if self._rows is None:
            self._held = self.tracker.open()
            self._rows = Rows(self._store, self._held)
            self._once("open", self.tracker.where)
        missing = (row for row in self._rows.new() if row.position >= self._held)
        while rows := list(islice(missing, ROWS)):
            self.tracker.log(rows)
            self._held = rows[-1].position + 1

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._say(f"{self.tracker.name}: {re.sub(PASSWORD, '//', text)}")


class Following:
    """Followers, each in its own thread."""

    def __init__(
        self, followers: Sequence[Follower], store: RunFolder, report: Report, every_s: float = EVERY_S
    ) -> None:
        self._followers, self._store, self._report = followers, store, report
        self._over, self._status = threading.Event(), ""
        self._threads = [
            threading.Thread(target=self._follow, args=[one, every_s], name=one.tracker.name, daemon=True)
            for one in followers
        ]
        for thread in self._threads:
            thread.start()

    def _follow(self, follower: Follower, every_s: float) -> None:
        while not self._over.is_set():
            follower.look()
            self._over.wait(every_s)
        follower.look(self._status)

    def end(self, status: str, limit_s: float | None = END_S) -> None:
        """Send what is left of a run that has ended, for so many seconds at most."""
        if not self._followers:
            return
        self._status = status
        self._over.set()
        until = None if limit_s is None else time.monotonic() + limit_s
        names = ", ".join(one.tracker.name for one in self._followers)
        with self._report.busy(f"sending the last numbers to {names}"), contextlib.suppress(KeyboardInterrupt):
            for thread in self._threads:
                thread.join(None if until is None else max(until - time.monotonic(), 0.0))
        for one in self._followers:
            if not one.closed:
                self._report.line(
                    f"{one.tracker.name} lacks rows of this run; `rsrlm resume {self._store.folder}` sends them"
                )


def follow(config: Config, store: RunFolder, report: Report) -> Following:
    """Keep the trackers that are configured up with a run, from now until `end`."""
    return Following([Follower(one, store, report.line) for one in opened(config, store)], store, report)
