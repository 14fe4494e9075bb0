"""The report of a run while it goes on: written by a process of its own, so that the run never waits for it."""

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from rsrlm.report.progress import Report
from rsrlm.store.folder import RunFolder

EVERY_S = 60.0  # at most: rounds of the online clock may take seconds
LOOK_S = 2.0
SHARE = 10  # times as long as one takes to write
WAIT_S = 300.0  # for the last one


class Reporter:
    """Writes report.html and report.md again, as iterations are finished."""

    def __init__(self, store: RunFolder) -> None:
        nice = ["nice", "-n", "10"] if shutil.which("nice") else []
        self._command = [*nice, sys.executable, "-m", "rsrlm.cli", "report", str(store.folder)]
        self._process: subprocess.Popen[str] | None = None
        self._due = False
        self._next = 0.0  # not before that

    def refresh(self, more: bool) -> None:
        """Begin to write, now or at a later call, where there is `more` to write about; a report that takes long is
        written less often."""
        self._due |= more
        if self._process is not None and self._process.poll() is None:
            self._next = time.monotonic() + max(EVERY_S, SHARE * (time.monotonic() - self._began))
        elif self._due and time.monotonic() >= self._next:
            with contextlib.suppress(OSError):  # no memory or no process to spare: the next time, or at the end
                self._begin(subprocess.DEVNULL)
                self._due, self._next = False, time.monotonic() + EVERY_S

    def _begin(self, errors: int) -> None:
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, text=True
        )

    def finish(self) -> str:
        """Write once more and wait; what went wrong, if anything. Raises OSError where no process can be started."""
        self.stop()
        self._begin(subprocess.PIPE)
        assert self._process
        try:
            _, said = self._process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            self.stop()
            return f"it took more than {WAIT_S:.0f} s"
        return "" if self._process.returncode == 0 else (said.strip().splitlines() or ["no reason was given"])[-1]

    def stop(self) -> None:
        """End a process that is writing; files are whole or as they were."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._process is not None:
            self._process.communicate()


@contextlib.contextmanager
def refreshed(store: RunFolder, on: bool) -> Iterator[None]:
    """Write again whenever an iteration was finished; nothing is left running behind the block."""
    reporter, done = Reporter(store), threading.Event()

    def look() -> None:
        seen = -1
        while not done.wait(LOOK_S):
            number = max(seen, 0)
            while (store.iteration(number) / "metrics.json").exists():
                number += 1
            reporter.refresh(more=number > seen >= 0)
            seen = number

    thread = threading.Thread(target=look, name="report", daemon=True)
    if on:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if on:
            thread.join()
        reporter.stop()


def finish(store: RunFolder, report: Report) -> None:
    """The report of a run that has ended."""
    reporter = Reporter(store)
    with report.busy("writing the report"):
        try:
            failed = reporter.finish()
        except OSError as error:
            failed = str(error)
        except KeyboardInterrupt:  # the run has ended, and its exit code stays
            reporter.stop()
            failed = "interrupted"
    again = f"rsrlm report {store.folder}"
    report.line(f"no report was written: {failed}; try {again}" if failed else f"report: {store.folder}/report.html")
