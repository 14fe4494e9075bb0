"""`rsrlm watch`: a run as it goes on, by its files alone."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from rsrlm.commands.serving import served
from rsrlm.report.live import lines, printable, view
from rsrlm.report.state import RunReader, State

LOOK_EVERY_S = 1.0
LINE_EVERY_S = 10.0  # without a terminal, of numbers that change all the time


def watch(folder: Path, port: int | None, console: Console | None = None) -> None:
    """Show a run until it ends or the user has seen enough; with `port`, serve its report until then, and after the end
    of the run too. Raises ConfigError."""
    console = console or Console(highlight=False)
    reader = RunReader(folder)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        url = stack.enter_context(served(folder, port)) if port is not None else ""
        if url:
            console.print(f"the report is at {url}", soft_wrap=True, markup=False)
        key = stack.enter_context(keys(sys.stdin))
        if console.is_terminal and not console.is_dumb_terminal:
            left = on_terminal(reader, console, key, url)
        else:
            left = in_lines(reader, console, key)
        if url and not left:
            console.print(f"the report stays at {url} until Ctrl-C", soft_wrap=True)
            while key(LOOK_EVERY_S) != "q":
                pass


def on_terminal(reader: RunReader, console: Console, key: Callable[[float], str], url: str) -> bool:
    """Whether the user left before the end of the run. What was last shown stays on the screen."""
    state, pressed = reader.look(), ""
    if state.goes_on:
        with Live(view(state, _hint(state, url)), console=console, screen=True, auto_refresh=False) as live:
            while state.goes_on and pressed != "q":
                pressed = key(LOOK_EVERY_S)
                state = reader.look()
                live.update(view(state, _hint(state, url)), refresh=True)
    console.print(view(state, _hint(state, url)))
    return pressed == "q"


def in_lines(reader: RunReader, console: Console, key: Callable[[float], str]) -> bool:
    """The same as plain lines."""
    before: State | None = None
    counted = -LINE_EVERY_S
    while True:
        state, now = reader.look(), time.monotonic()
        counts = now - counted >= LINE_EVERY_S or not state.goes_on
        counted = now if counts else counted
        for line in lines(before, state, counts):
            console.print(line, markup=False, soft_wrap=True)
        if not state.goes_on:
            console.print(_hint(state, ""), markup=False, soft_wrap=True)
            return False
        before = state
        if key(LOOK_EVERY_S) == "q":
            return True


def _hint(state: State, url: str) -> str:
    folder = printable(str(state.folder))
    report = f"report: {url}" if url else f"more: rsrlm report {folder}"
    if state.goes_on:
        return f"q ends the view, not the run; {report}"
    return report if state.status == "completed" else f"go on with: rsrlm resume {folder}; {report}"


@contextlib.contextmanager
def keys(stdin: Any) -> Iterator[Callable[[float], str]]:
    """Waits so many seconds for a key, and gives it; nothing where there is no keyboard."""

    def asleep(seconds: float) -> str:
        time.sleep(seconds)
        return ""

    if stdin is None or not stdin.isatty():
        yield asleep
        return
    import termios
    import tty

    file = stdin.fileno()
    before = termios.tcgetattr(file)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([file], [], [], seconds)
        return os.read(file, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(file)
        yield pressed
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
