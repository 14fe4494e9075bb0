"""What `rsrlm watch` shows of a run, on terminals and elsewhere, and what it serves."""

import fcntl
import http.client
import io
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rsrlm.commands import serving, watch
from rsrlm.report import live
from rsrlm.report.state import RunReader, State
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

BEGAN = 1_700_000_000.0
CONFIG = "name: tea\niterations: 3\nrecipe: {}\nclock: {{kind: {}}}\n"
EVIL = 'a\x1b]0;owned\x07b\x1b[2J\x9b31mc\u202ed [red]e[/red] [link=x]f \x00\n g" \ud800'


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    (tmp_path / "tea").mkdir()
    (tmp_path / "tea" / "config.yaml").write_text(CONFIG.format("self_rewarding", "iterative"))
    return RunFolder(tmp_path / "tea")


def stage(title: str, began: float, ended: float | None = None, **bars: Sequence[int]) -> dict[str, Any]:
    named = [{"what": what, "done": done, "of": of, "tokens": tokens} for what, (done, of, tokens) in bars.items()]
    return {"title": title, "bars": named, "began": began, "ended": ended}


def runs(store: RunFolder, **doing: Any) -> None:
    """It does this now, and has done it for a minute."""
    now = time.time()
    doing = {"engines": [], "stages": [stage("iteration 0", now - 60, respond=(16, 64, 600), judge=(8, 64, 0))]} | doing
    store.write_summary({"status": "running", "iterations": []})
    store.write_note("alive", {"host": "head", "pid": 12, "at": now, **doing})


def pool(**changes: Any) -> dict[str, Any]:
    return {"name": "engines", "ready": 2, "wanted": 2, "lost": 0, "queued": 42_000, "held": ["M0"], **changes}


def sample(text: str) -> dict[str, Any]:
    return {"group": "00/tea", "prompt": text, "response": text, "score": 2.5, "rejected": 1.25, "reason": ""}


def look(store: RunFolder) -> State:
    return RunReader(store.folder).look()


def shown(state: State, width: int = 80, **options: Any) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width, height=40, **options).print(live.view(state, "q ends"))
    return screen.getvalue()


def row(state: State, label: str) -> str:
    """The line that begins with a label."""
    return next(line for line in shown(state, 120).splitlines() if line.startswith(label)).removeprefix(label).strip()


# -- one screen ------------------------------------------------------------------------------------------------------


def test_a_run_in_the_middle(store: RunFolder) -> None:
    store.write_metrics(0, {"weight_version": "M1"})
    store.event("alarm", iteration=0, sign="score_length", value=0.5561, action="warn")
    store.steps(1).add({"step": 0, "loss": 0.7, "margin": 0.0, "accuracy": 0.0})
    store.steps(1).add({"step": 1, "loss": 0.6, "margin": 0.25, "accuracy": 0.75, "tokens_per_s": 98.4})
    now = time.time()
    ended = stage("held-out M1", now - 200, now - 180, respond=(8, 8, 90), judge=(8, 8, 9))
    trains = stage("iteration 1", now - 100, reference=(6, 6, 0), steps=(2, 4, 500))
    filling = {"iteration": 1, "by": "M1", "groups": 12, "of": 16, "pairs": 1}
    runs(store, stages=[ended, trains], engines=[pool()], buffer=[filling], sample=sample("Tea?"))
    state = look(store)
    text = shown(state)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("tea self_rewarding running iteration 1 (1 of 3 done), 0 s")
    assert lines[1] == "process 12 on head"
    assert "held-out M1 judge done 8/8 20 s" in lines
    assert re.search(r"^iteration 1 reference ━+ 6/6 1 min 40 s left$", "\n".join(lines), re.M)
    assert re.search(r"^steps ━+.* 2/4 5 tok/s$", "\n".join(lines), re.M)
    assert row(state, "engines") == "2/2 ready, hold M0, 42 k tokens queued"
    assert row(state, "buffer") == "iteration 1: 12/16 prompts done, 1 pair, answered by M1"
    assert row(state, "last step") == "2 of 4, loss 0.600, margin 0.250, accuracy 0.750, 98 tok/s"
    assert row(state, "loss") == "█▁ 0.700 to 0.600"
    alarm = "after iteration 0: score_length is 0.556: raise pair.rho (docs/alarms.md#score_length)"
    assert row(state, "alarm") == alarm
    assert row(state, "sample") == "00/tea, score 2.500 against 1.250"
    assert row(state, "response") == "Tea?"
    assert lines[-1] == "q ends"
    assert max(map(len, text.splitlines())) <= 80


def test_rounds_and_their_lag(store: RunFolder) -> None:
    (store.folder / "config.yaml").write_text(CONFIG.format("oaif", "online"))
    store.write_metrics(0, {"weight_version": "M1", "actor": "M0"})
    fillings = [
        {"iteration": number, "by": "M0", "groups": 8 - number, "of": 8, "pairs": 5 - number} for number in (1, 2)
    ]
    runs(store, buffer=fillings)
    state = look(store)
    assert row(state, "buffer") == "round 1: 7/8 prompts done, 4 pairs, answered by M0, lag 1"
    assert "round 2: 6/8 prompts done, 3 pairs, answered by M0, lag 2" in shown(state, 120)
    store.write_summary({"status": "interrupted"})
    assert row(look(store), "lag") == "0 in the last round"


def test_engines_that_died_and_others_that_were_asked_for(store: RunFolder) -> None:
    (store.folder / "logs").mkdir()
    (store.folder / "logs" / "engines-1-head-99.err").touch()
    store.write_note("scale", {"engines": 3})
    runs(store, engines=[pool(ready=1, lost=2, queued=0, held=["M0", "M1"]), pool(name="producers", held=[], queued=0)])
    state = look(store)
    died = "2 lost (logs/engines-1-head-99.err), 3 asked for"
    assert row(state, "engines") == f"1/2 ready, hold M0 and M1, {died}"
    assert row(state, "producers") == "2/2 ready"


def test_between_two_stages_the_last_event_is_named(store: RunFolder) -> None:
    store.event("publishing", version="M1", bytes=5)
    runs(store, stages=[stage("iteration 0", BEGAN, BEGAN + 5, steps=(1, 1, 0))])
    assert "process 12 on head; 0 s ago: publishing M1" in shown(look(store))


def test_ends(store: RunFolder) -> None:
    store.event("evaluated", model="M2", score_by_first={"judge": "M0", "mean": 2.5, "n": 8},
                score_by_current={"judge": "M2", "mean": 3.0, "n": 8},
                duel_with_M1={"n": 8, "win": 0.125, "tie": 0.875, "loss": 0.0})  # fmt: skip
    store.write_summary({"status": "failed", "reason": "the disk is full"})
    text = shown(look(store), 100)
    assert "tea  self_rewarding  failed  0 of 3 iterations done" in text
    assert "the disk is full" in text
    found = "M2: score 2.500 by M0, 3.000 by M2, won / tied / lost against the one before 12 % / 88 % / 0 %"
    assert row(look(store), "held-out") == found
    store.write_summary({"status": "running"})
    store.write_note("alive", {"host": "head", "pid": 12, "at": time.time() - 7200})
    reader = RunReader(store.folder)
    assert "silent" in shown(reader.look())
    assert "last heard of 2 h 0 min ago" in shown(reader.look())


def everything(store: RunFolder, text: str) -> State:
    """A run that has this text wherever it may have come from somebody else."""
    runs(
        store,
        host=text,
        stages=[stage(text, time.time(), **{text: (1, 2, 3)}), stage(text, BEGAN, BEGAN + 1, **{text: (1, 1, 1)})],
        engines=[pool(name=text, held=[text])],
        buffer=[{"iteration": 0, "by": text, "groups": 1, "of": 2, "pairs": 1}],
        sample={**sample(text), "group": text, "reason": text},
    )
    store.event("alarm", iteration=text, sign=text, value=1.0, action="warn")
    store.event("engine_lost", pool=text, error=text)
    store.event("evaluated", model=text, score_by_first={"judge": text, "mean": text})
    store.steps(0).add({"step": 0, "loss": 0.5, "margin": text})
    return look(store)


def test_texts_of_models_are_shown_and_not_obeyed(store: RunFolder) -> None:
    state = everything(store, EVIL.replace("\ud800", ""))
    text = shown(state, 200)
    for line in live.lines(None, state, counts=True), live.lines(state, state, counts=True):
        text += "\n".join(line)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert 'a\\x1b]0;owned\\x07b\\x1b[2J\\x9b31mcd [red]e[/red] [link=x]f \\x00 g"' in row(state, "response")
    assert "after iteration a\\x1b]0;owned" in text
    assert "\ud800" not in live.printable(EVIL)


def test_what_a_terminal_gets_is_nothing_but_colours(store: RunFolder) -> None:
    text = shown(everything(store, EVIL.replace("\ud800", "")), force_terminal=True, color_system="truecolor")
    assert "\x1b[" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.parametrize("width", [1, 5, 12, 20, 40, 79])
def test_narrow_terminals(store: RunFolder, width: int) -> None:
    text = shown(everything(store, "word " * 40), width)
    assert max(map(len, text.splitlines())) <= width


def test_wide_characters_keep_to_the_width(store: RunFolder) -> None:
    text = shown(everything(store, "中文🙂 नमस्ते " * 30), 40)
    from rich.cells import cell_len

    assert max(map(cell_len, text.splitlines())) <= 40
    assert "नमस्ते" in live.printable("नमस्ते")  # with its vowel signs


def test_sparklines() -> None:
    assert live.sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert live.sparkline([2.0, 2.0]) == "▁▁"
    assert live.sparkline([0.0, float("nan"), 1.0, float("inf")]) == "▁?█?"
    assert live.sparkline([float("nan")]) == "?"
    assert live.sparkline([0.0, 2.0, 4.0, 6.0, 8.0], width=3) == "▁▅█"  # means 1, 5 and 8
    assert len(live.sparkline([1.0] * 1000)) <= live.CURVE


def test_numbers() -> None:
    shown = [live.number(value) for value in (None, "x", 0, 0.6931, -12.5, 1e-5, 123456.0, float("nan"))]
    assert shown == ["-", "-", "0.000", "0.693", "-12.500", "1e-05", "1.23e+05", "nan"]
    assert [live.duration(seconds) for seconds in (-1, 59.4, 61, 7260)] == ["0 s", "59 s", "1 min 1 s", "2 h 1 min"]
    assert [live.many(tokens) for tokens in (9999, 10_000, 2_500_000)] == ["9999", "10 k", "2.5 M"]


# -- lines -----------------------------------------------------------------------------------------------------------


def test_a_line_for_each_change(store: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=30)
    moments: Iterator[Any] = iter(
        [
            lambda: store.event("engine_lost", pool="engines", replica=1, error="gone"),
            lambda: store.event("group", g="00/a", pairs=[]),
            lambda: store.event("alarm", iteration=0, sign="score_length", value=0.6, action="warn"),
            lambda: (store.event("run_ended", status="completed"), store.write_summary({"status": "completed"})),
        ]
    )

    def key(seconds: float) -> str:
        next(moments)()
        return ""

    runs(store)
    left = watch.in_lines(RunReader(store.folder), console, key)
    first, counted, *others = screen.getvalue().splitlines()
    assert not left
    assert first == "tea: running, iteration 0 (0 of 3 done)"
    assert re.fullmatch(r"iteration 0: respond 16/64 \(\d+ tok/s\), judge 8/64, 7 min \d+ s left", counted)
    assert others == [
        "engine lost engines 1 gone",
        "after iteration 0: score_length is 0.600: raise pair.rho (docs/alarms.md#score_length)",
        "tea: completed, 0 of 3 iterations done, 0 s",
        f"more: rsrlm report {store.folder}",
    ]


def test_a_finished_run_is_shown_at_once(store: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    store.write_summary({"status": "interrupted"})
    watch.watch(store.folder, None)
    said = capsys.readouterr().out
    assert "tea: interrupted, 0 of 3 iterations done" in said
    assert f"go on with: rsrlm resume {store.folder}" in said
    screen = io.StringIO()
    watch.watch(store.folder, None, Console(file=screen, force_terminal=True, width=80))
    assert "interrupted" in screen.getvalue()
    assert "\x1b[?1049h" not in screen.getvalue()  # it stays below the command


def test_ctrl_c_ends_the_view(store: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(store)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "time", type("T", (), {"sleep": interrupted, "monotonic": time.monotonic}))
    monkeypatch.setattr(sys, "stdin", None)
    screen = io.StringIO()
    watch.watch(store.folder, None, Console(file=screen, force_terminal=True, width=80))
    assert re.findall(r"\x1b\[\?(?:1049|25).", screen.getvalue())[-2:] in (
        ["\x1b[?25h", "\x1b[?1049l"],
        ["\x1b[?1049l", "\x1b[?25h"],  # the cursor is back, and the screen
    )


def test_the_command_in_a_terminal(store: RunFolder) -> None:
    """It draws, hears q, ends well and leaves the terminal as it was."""
    runs(store, sample=sample(EVIL.replace("\ud800", "")))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "rsrlm.cli", "watch", str(store.folder)]
    watching = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    try:
        seen = b""
        while b"response" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, b"xq")
        assert watching.wait(60) == 0
    finally:
        watching.kill()
    assert termios.tcgetattr(theirs) == before
    assert b"\x1b[?1049h" in seen
    assert b"\x1b]0;owned" not in seen
    os.close(theirs)
    os.close(ours)


# -- the report ------------------------------------------------------------------------------------------------------

PAGE = "<html><body><h1>Report {}</h1></body></html>"


class Written:
    """In the place of what writes reports."""

    def __init__(self) -> None:
        self.times = 0
        self.folders: list[Path] = []
        self.failing: Exception | None = None

    def __call__(self, folders: Sequence[Path], out: Path) -> None:
        self.times, self.folders = self.times + 1, list(folders)
        if self.failing:
            raise self.failing
        (out / "report.html").write_text(PAGE.format(self.times))
        (out / "report.md").write_text(f"# Report {self.times}\n")


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def port(store: RunFolder, written: Written, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(serving, "EVERY_S", 0.05)
    monkeypatch.setattr(serving, "RELOAD", serving.RELOAD.replace("3000", "100"))
    with serving.served(store.folder, 0, written) as url:
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)
        assert found
        until(lambda: written.times > 0 and b"Report" in get(int(found[1]), "/")[2])
        yield int(found[1])


def until(true: Any) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def get(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{port}" if host is None else host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_the_report_is_served(port: int, store: RunFolder, written: Written) -> None:
    status, headers, page = get(port, "/")
    assert (status, headers["Cache-Control"], headers["Content-Type"]) == (200, "no-store", "text/html; charset=utf-8")
    assert page.startswith(b"<html><body><h1>Report 1</h1><script>")
    assert page.endswith(b"</script>\n</body></html>")
    assert headers["ETag"].encode() in page
    assert written.folders == [store.folder]
    assert not (store.folder / "report.html").exists()
    assert get(port, "/report.html?x=1")[2] == page
    status, headers, text = get(port, "/report.md")
    assert (status, headers["Content-Type"], text) == (200, "text/markdown; charset=utf-8", b"# Report 1\n")
    status, headers, nothing = get(port, "/", "HEAD")
    assert (status, int(headers["Content-Length"]), nothing) == (200, len(page), b"")


def test_it_is_written_again_when_the_run_went_on(port: int, store: RunFolder, written: Written) -> None:
    tag = get(port, "/", "HEAD")[1]["ETag"]
    store.write_note("alive", {"at": 1})
    time.sleep(0.3)
    assert (written.times, get(port, "/", "HEAD")[1]["ETag"]) == (1, tag)
    store.event("step")
    until(lambda: b"Report 2" in get(port, "/")[2])
    assert get(port, "/", "HEAD")[1]["ETag"] != tag
    store.write_metrics(0, {})
    until(lambda: b"Report 3" in get(port, "/")[2])
    written.failing = ValueError("half a run")
    store.event("step")
    until(lambda: written.times == 4)
    assert b"Report 3" in get(port, "/")[2]  # the last one that could be written


@pytest.mark.parametrize(
    "path",
    [
        "/events.jsonl", "/config.yaml", "/../tea/config.yaml", "/report.html/../../tea/config.yaml",
        "/%2e%2e/config.yaml", "/..%2fconfig.yaml", "/report%2ehtml", "/./report.md", "/report.html%00", "/\\report.md",
        "/etc/passwd", "/report.html/", "http://127.0.0.1/events.jsonl", "*",
    ],
)  # fmt: skip
def test_nothing_else_is_served(port: int, path: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.split()[1] in (b"404", b"400")
    assert b"self_rewarding" not in answer


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1]:80", "0.0.0.0"]
)
def test_another_name_of_this_machine_is_refused(port: int, host: str) -> None:
    status, _, page = get(port, "/", host=host)
    assert (status, b"Report" in page) == (403, False)


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1"])
def test_a_port_that_is_forwarded_is_served(port: int, host: str) -> None:
    assert get(port, "/", host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(port: int, method: str) -> None:
    assert get(port, "/", method)[0] == 501


def test_before_there_is_a_report(store: RunFolder, written: Written) -> None:
    written.failing = ValueError("<script>no groups yet</script>")
    with serving.served(store.folder, 0, written) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        until(lambda: b"cannot be written yet" in get(port, "/")[2])
        page = get(port, "/")[2]
        assert b"&lt;script&gt;no groups yet&lt;/script&gt;" in page
        assert b"location.reload" in page
    with pytest.raises(ConnectionRefusedError):
        get(port, "/")


def test_only_this_machine_is_answered(port: int) -> None:
    bound = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if f":{port:04X} " in line]
    assert f"0100007F:{port:04X}" in bound  # 127.0.0.1
    assert not [address for address in bound if address.startswith("00000000")]


def test_a_port_that_is_taken(store: RunFolder, written: Written) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--serve {number}: another program uses this port; choose another one"):
            watch.watch(store.folder, number)


def test_the_page_loads_itself_again(port: int, store: RunFolder, written: Written) -> None:
    """In a browser, with nothing to complain of."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        assert page.inner_text("h1") == "Report 1"
        store.event("step")
        page.locator("h1", has_text="Report 2").wait_for(timeout=60_000)
        assert complaints == []


@contextmanager
def reported(written: Written, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module: Any = type(sys)("rsrlm.commands.report")
    module.write = written
    monkeypatch.setitem(sys.modules, "rsrlm.commands.report", module)
    yield


def test_after_the_end_of_the_run_it_is_still_served(
    store: RunFolder, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_summary({"status": "completed"})
    screen, pressed = io.StringIO(), threading.Event()

    @contextmanager
    def keys(stdin: Any) -> Iterator[Any]:
        yield lambda seconds: "q" if pressed.wait(0.02) else ""

    monkeypatch.setattr(watch, "keys", keys)
    with reported(written, monkeypatch):
        watching = threading.Thread(target=watch.watch, args=(store.folder, 0, Console(file=screen, width=200)))
        watching.start()
        until(lambda: "until Ctrl-C" in screen.getvalue())
        found = re.search(r"the report stays at http://127\.0\.0\.1:(\d+)/", screen.getvalue())
        assert found
        until(lambda: b"Report 1" in get(int(found[1]), "/")[2])
        pressed.set()
        watching.join(30)
    assert not watching.is_alive()
