"""What a run prints where there is no terminal, with a clock of the test's own."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rsrlm.report import progress
from rsrlm.report.progress import Report, shown


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def report(screen: io.StringIO, every_s: float = 5.0) -> Report:
    return Report(Console(file=screen, width=200, soft_wrap=True, highlight=False), plain_every_s=every_s)


def test_lines_with_totals_rates_and_the_time_left(clock: Clock, screen: io.StringIO) -> None:
    with report(screen).stage("iteration 0", {"respond": 4, "judge": 8}) as tick:
        clock.now += 4
        tick("respond", 1, 100)
        clock.now += 1
        tick("judge", 2, 0)
        clock.now += 5
        tick("respond", 3, 300)
        tick("judge", 6, 30)
    assert screen.getvalue().splitlines() == [
        # 100 tokens in 5 s; a quarter of the responses and a quarter of the judgements: 15 s more.
        "iteration 0: respond 1/4 (20 tok/s), judge 2/8, 5 s, about 15 s left",
        # 400 tokens in 10 s; the judgements are behind with 2/8.
        "iteration 0: respond 4/4 (40 tok/s), judge 2/8, 10 s, about 30 s left",
        "iteration 0: respond 4/4 (40 tok/s), judge 8/8 (3 tok/s), 10 s",
    ]


def test_no_time_left_is_told_before_there_is_something_to_go_by(clock: Clock, screen: io.StringIO) -> None:
    with report(screen).stage("x", {"a": 100, "nothing": 0}) as tick:
        for _ in range(6):
            clock.now += 5
            tick("a", 1, 0)
    # 5 of 100 are not enough, 6 are: 30 s / 0.06 - 30 s.
    lines = screen.getvalue().splitlines()
    assert [line for line in lines if "left" in line] == ["x: a 6/100, nothing 0/0, 30 s, about 470 s left"]
    assert lines[-1] == "x: a 6/100, nothing 0/0, 30 s"
    assert len(lines) == 7


@pytest.mark.parametrize(("every_s", "lines"), [(10.0, 10), (7.0, 14), (1000.0, 0), (0.0, 100)])
def test_no_line_comes_more_often_than_the_interval(
    clock: Clock, screen: io.StringIO, every_s: float, lines: int
) -> None:
    """100 ticks, one in a second: a line on the first tick that is at least the interval after the last line."""
    with report(screen, every_s).stage("x", {"a": 100}) as tick:
        for _ in range(100):
            clock.now += 1
            tick("a", 1, 1)
    assert len(screen.getvalue().splitlines()) == lines + 1  # and the final one


def test_a_stage_without_ticks_says_that_it_is_over(clock: Clock, screen: io.StringIO) -> None:
    with report(screen).stage("held-out M0", {"answers": 3}):
        clock.now += 60
    assert screen.getvalue() == "held-out M0: answers 0/3, 60 s\n"


def test_a_failed_stage_does_not_look_finished(clock: Clock, screen: io.StringIO) -> None:
    def fails() -> None:
        with report(screen).stage("x", {"a": 1}) as tick:
            tick("a", 1, 1)
            raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        fails()
    assert screen.getvalue() == ""


def test_a_counter_that_the_stage_does_not_have_is_an_error(screen: io.StringIO) -> None:
    with report(screen).stage("x", {"a": 1}) as tick, pytest.raises(KeyError):
        tick("b", 1, 1)


def test_texts_are_printed_as_they_are(screen: io.StringIO) -> None:
    """Rich would take [/b] for markup, and wrap long lines for a terminal that is not there."""
    text = "[bold]a[/b] " + "x" * 500
    report(screen).line(text)
    assert screen.getvalue() == text + "\n"


def test_bars_on_a_terminal(screen: io.StringIO) -> None:
    console = Console(file=screen, force_terminal=True, width=200, highlight=False)
    with Report(console).stage("iteration 1", {"respond": 4, "judge": 8}) as tick:
        tick("respond", 3, 90)
        tick("judge", 8, 0)
    last = screen.getvalue()
    assert "iteration 1 · respond" in last
    assert "3/4" in last
    assert "8/8" in last
    assert "tok/s" in last


def test_tables_show_a_dash_for_what_is_not_there(screen: io.StringIO) -> None:
    rows = [{"i": 0, "loss": 0.69315, "win": None}, {"i": 1, "loss": 123.4}]
    report(screen).table("Summary", rows, {"i": "iteration", "loss": "loss", "win": "win rate"})
    cells = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in screen.getvalue().splitlines()
    ]
    assert ["iteration", "loss", "win rate"] in cells
    assert ["0", "0.693", "-"] in cells
    assert ["1", "123", "-"] in cells


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (-0.5, "-0.500"),
        (99.99949, "99.999"),
        (100.0, "100"),
        (-1234.5678, "-1235"),
        (7, "7"),
        (12345, "12345"),
        ("M1", "M1"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert shown(value) == text


def after(timers: list[Any]) -> Any:
    """threading.Timer that goes off when the test says so."""

    def timer(seconds: float, call: Any, arguments: list[Any]) -> Any:
        made = SimpleNamespace(start=lambda: timers.append(lambda: call(*arguments)), cancel=timers.clear, daemon=False)
        assert seconds == progress.SHOWN_AFTER_S
        return made

    return timer


def test_what_takes_long_has_a_line_and_its_seconds(
    clock: Clock, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[Any] = []
    monkeypatch.setattr(progress.threading, "Timer", after(timers))
    shown_on = report(screen)
    with shown_on.busy("loading"):
        [goes_off] = timers
        goes_off()
        clock.now += 7.4
    with shown_on.busy("short"):
        clock.now += 1.9
    assert timers == []

    def fails() -> None:
        with shown_on.busy("reading"):
            clock.now += 60
            raise ValueError("no file")

    with pytest.raises(ValueError, match="no file"):
        fails()
    assert screen.getvalue().splitlines() == ["loading ...", "loading: 7 s"]


def test_a_terminal_shows_all_that_goes_on_in_one_live_line(clock: Clock) -> None:
    file = io.StringIO()
    shown_on = Report(Console(file=file, width=100, force_terminal=True, highlight=False))
    with shown_on.busy("starting Ray"):
        clock.now += 1
        with shown_on.busy("checking prompts"):
            clock.now += 2
            assert shown_on._doing() == "starting Ray 3 s, checking prompts 2 s"
            assert shown_on._live
            shown_on._live.refresh()
        clock.now += 4
        assert shown_on._doing() == "starting Ray 7 s"
    assert shown_on._live is None
    assert "starting Ray 3 s, checking prompts 2 s" in file.getvalue()
    assert file.getvalue().count("checking prompts: 2 s") == 1
    assert file.getvalue().rstrip("\n").endswith("starting Ray: 7 s")
