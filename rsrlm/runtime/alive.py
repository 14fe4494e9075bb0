"""Whether somebody runs in a run folder, and who did last: a note that is written again every few seconds."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rsrlm.settings.base import ConfigError, NotYet
from rsrlm.store.folder import RunFolder

NOTE = "alive"  # alive.json: host, process, when it was there last, and what it did then
EVERY_S = 2.0


@contextlib.contextmanager
def noted_alive(store: RunFolder, doing: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
    """Note every EVERY_S seconds that this process runs here, and what it is `doing`. A note that grows old is that of
    a killed run."""
    done = threading.Event()

    def note() -> None:
        while True:
            who = {"host": socket.gethostname(), "pid": os.getpid(), "at": round(time.time(), 1)}
            for said in (doing, dict):  # what cannot be said of a run must not make it look dead
                with contextlib.suppress(Exception):  # a full disk ends the run elsewhere, with its reason
                    store.write_note(NOTE, {**who, **said()})
                    break
            if done.wait(EVERY_S):
                return

    thread = threading.Thread(target=note, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        (store.folder / f"{NOTE}.json").unlink(missing_ok=True)


def held(store: RunFolder) -> bool:
    """Whether another process runs in this folder. Raises ConfigError where that cannot be told."""
    try:
        store.lock().close()
    except ConfigError as error:
        if isinstance(error.__context__, BlockingIOError):
            return True
        raise
    return False


def last_seen(store: RunFolder) -> str:
    """Who ran here last, such as " by process 12 of host a, seen 5 s ago"; empty if nobody noted it."""
    note = store.note(NOTE)
    if not note:
        return ""
    return f" by process {note['pid']} of host {note['host']}, seen {max(0.0, time.time() - note['at']):.0f} s ago"


def wait_until_free(store: RunFolder, wait_s: float, say: Callable[[str], None]) -> None:
    """Wait for the end of another process in this folder, which may have been told to stop. Raises NotYet when it
    still runs after `wait_s` seconds. A killed host's hold on a shared folder ends by itself, but late."""
    deadline = time.monotonic() + wait_s
    told = False
    while held(store):
        if time.monotonic() >= deadline:
            raise NotYet(
                f"{store.folder}: still run{last_seen(store)}, {wait_s:g} s later; stop it first, or wait for its end"
            )
        if not told:
            say(f"{store.folder} is being run{last_seen(store)}: waiting up to {wait_s:g} s for its end")
            told = True
        time.sleep(1.0)


def how_it_ended(store: RunFolder) -> str:
    """The status in the summary, but for that of a run that was killed, which could not write one."""
    status = store.summary().get("status", "")
    if status == "running" and not held(store):
        return f"killed{', last run' + last_seen(store) if last_seen(store) else ''}"
    return str(status)
