"""What a run shows while it goes on: live bars on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_WIDTH = 140  # of tables in a log file
SHOWN_AFTER_S = 0.5  # without a terminal: what is shorter goes on unseen
WORTH_A_LINE_S = 2.0
Tick = Callable[[str, int, int], None]


class Report:
    """The screen of one run."""

    def __init__(self, console: Console | None = None, plain_every_s: float = 5.0) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, PLAIN_WIDTH)
        self._every_s = plain_every_s
        self._lock = threading.Lock()
        self._running: dict[object, tuple[str, float]] = {}  # what `busy` shows, and since when
        self._live: Live | None = None

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def busy(self, title: str) -> Iterator[None]:
        """Show that something goes on whose end cannot be foretold; several may at once, in threads or tasks.

        On a terminal a live line names them all, elsewhere each has a line once it has lasted SHOWN_AFTER_S. A line
        says how long it took, when it ends well after WORTH_A_LINE_S or more.
        """
        key, started = object(), time.monotonic()
        timer = threading.Timer(SHOWN_AFTER_S, self.line, [f"{title} ..."])
        timer.daemon = True
        with self._lock:
            self._running[key] = (title, started)
            if not self.console.is_terminal:
                timer.start()
            elif self._live is None:
                self._live = Live(console=self.console, get_renderable=self._doing, transient=True)
                self._live.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                del self._running[key]
                if self._live and not self._running:
                    self._live.stop()
                    self._live = None
        seconds = time.monotonic() - started
        if seconds >= WORTH_A_LINE_S:
            self.line(f"{title}: {seconds:.0f} s")

    def _doing(self) -> str:
        now = time.monotonic()
        return ", ".join(f"{title} {now - started:.0f} s" for title, started in [*self._running.values()])

    @contextmanager
    def stage(self, title: str, totals: dict[str, int]) -> Iterator[Tick]:
        """Progress of a stage with one or more counters; yields tick(counter, items, tokens)."""
        if self.console.is_terminal:
            yield from self._bars(title, totals)
        else:
            yield from self._lines(title, totals)

    def _bars(self, title: str, totals: dict[str, int]) -> Iterator[Tick]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>12}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        tokens = dict.fromkeys(totals, 0)
        with Progress(*columns, console=self.console) as bars:
            started = time.monotonic()
            tasks = {name: bars.add_task(f"{title} · {name}", total=total, rate="") for name, total in totals.items()}

            def tick(name: str, items: int, token_count: int) -> None:
                tokens[name] += token_count
                speed = tokens[name] / max(time.monotonic() - started, 1e-9)
                bars.update(tasks[name], advance=items, rate=f"{speed:.0f} tok/s" if tokens[name] else "")

            yield tick

    def _lines(self, title: str, totals: dict[str, int]) -> Iterator[Tick]:
        started = shown = time.monotonic()
        done = dict.fromkeys(totals, 0)
        tokens = dict.fromkeys(totals, 0)

        def show(left: bool) -> None:
            elapsed = time.monotonic() - started
            parts = []
            for name, total in totals.items():
                part = f"{name} {done[name]}/{total}"
                if tokens[name]:
                    part += f" ({tokens[name] / max(elapsed, 1e-9):.0f} tok/s)"
                parts.append(part)
            worst = min((done[name] / total for name, total in totals.items() if total), default=1.0)
            rest = f", about {elapsed / worst - elapsed:.0f} s left" if left and worst > 0.05 else ""
            self.line(f"{title}: {', '.join(parts)}, {elapsed:.0f} s{rest}")

        def tick(name: str, items: int, token_count: int) -> None:
            nonlocal shown
            done[name] += items
            tokens[name] += token_count
            if time.monotonic() - shown >= self._every_s:
                shown = time.monotonic()
                show(left=True)

        yield tick
        show(left=False)

    def table(self, title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
        """Rows as a table; `columns` maps keys to headings."""
        table = Table(title=title, title_justify="left")
        for key, heading in columns.items():
            sentences = any(len(str(row.get(key))) > SENTENCE for row in rows)
            table.add_column(heading, justify="left" if sentences else "right")
        for row in rows:
            table.add_row(*(shown(row.get(key)) for key in columns))
        self.console.print(table)


SENTENCE = 60  # characters: longer values are read from the left, figures from the right


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
