"""The report of a run over HTTP, on this machine alone: written again while the run goes on, and nothing else of the
run folder."""

import contextlib
import errno
import hashlib
import html
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

from rsrlm.report.heartbeat import changed_at
from rsrlm.settings.base import ConfigError, first_line

HOST = "127.0.0.1"
EVERY_S = 10.0  # between two reports at least, and
SHARE = 5  # times as long as one takes to write
SILENT_CLIENT_S = 30.0
FILES = {"/": "report.html", "/report.html": "report.html", "/report.md": "report.md"}
KINDS = {".html": "text/html; charset=utf-8", ".md": "text/markdown; charset=utf-8"}
NAMES = ("127.0.0.1", "localhost")  # a site whose name is pointed at this machine has another one
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    # What a model wrote can load nothing and send nothing, even if it were run.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
RELOAD = """<script>
setInterval(async () => {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.pathname, {method: "HEAD", cache: "no-store"});
    const tag = answer.headers.get("ETag");
    if (tag && tag !== '%s') location.reload();
  } catch (error) {}
}, 3000);
</script>
"""
Write = Callable[[Sequence[Path], Path], None]


class Pages:
    """The newest report of a run, in memory."""

    def __init__(self, folder: Path, write: Write) -> None:
        self._folder, self._write = folder, write
        self._seen: Any = None
        self._pages = {"report.html": _page("the report is being written"), "report.md": b"being written\n"}
        self._written = False

    def get(self, name: str) -> bytes:
        return self._pages[name]

    def keep(self, done: threading.Event) -> None:
        """Write the report again whenever the run folder has changed, until `done`."""
        wait_s = 0.0
        while not done.wait(wait_s):
            began = time.monotonic()
            self.renew()
            wait_s = max(EVERY_S, SHARE * (time.monotonic() - began))

    def renew(self) -> None:
        """Where a report cannot be written, the one before stays; without one, the page says why."""
        if (seen := _changes(self._folder)) == self._seen:
            return
        self._seen = seen
        with tempfile.TemporaryDirectory(prefix="rsrlm-report-", ignore_cleanup_errors=True) as scratch:
            try:
                self._write([self._folder], Path(scratch))
                self._pages = {name: (Path(scratch) / name).read_bytes() for name in self._pages}
                self._written = True
            except Exception as error:
                if not self._written:
                    self._pages["report.html"] = _page(f"the report cannot be written yet: {first_line(error)}")


def _page(text: str) -> bytes:
    return f"<!doctype html><html><title>rsrlm</title><body><p>{html.escape(text)}</p></body></html>".encode()


def _changes(folder: Path) -> list[tuple[str, float]]:
    """What tells a run folder from what it was; alive.json, which changes always, is left out."""
    paths = [folder / "events.jsonl", folder / "summary.json", *sorted(folder.glob("iterations/*/*"))]
    return [(str(path), changed_at(path)) for path in paths]


class ReportHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the names in FILES."""

    server: "ReportServer"
    protocol_version = "HTTP/1.1"
    timeout = SILENT_CLIENT_S

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        name = FILES.get(self.path.partition("?")[0])
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if host not in NAMES:
            self._send(HTTPStatus.FORBIDDEN, b"open this page as http://127.0.0.1\n", "text/plain", body)
        elif name is None:
            self._send(HTTPStatus.NOT_FOUND, b"there are /report.html and /report.md\n", "text/plain", body)
        else:
            data = self.server.pages.get(name)
            tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            if name.endswith(".html"):
                data = _reloading(data, tag)
            self._send(HTTPStatus.OK, data, KINDS[Path(name).suffix], body, tag)

    def _send(self, status: HTTPStatus, data: bytes, kind: str, body: bool, tag: str = "") -> None:
        self.send_response(status)
        for key, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def version_string(self) -> str:
        return "rsrlm"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the terminal shows the run."""


class ReportServer(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True  # of a server that has ended just now
    block_on_close = False

    def __init__(self, port: int, pages: Pages) -> None:
        self.pages = pages
        super().__init__((HOST, port), ReportHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no matter of ours."""


def _reloading(page: bytes, tag: str) -> bytes:
    """The page with a script that loads it again once there is another one."""
    head, end, tail = page.rpartition(b"</body>")
    script = (RELOAD % tag).encode()
    return head + script + end + tail if end else page + script


@contextlib.contextmanager
def served(folder: Path, port: int, write: Write | None = None) -> Iterator[str]:
    """Serve the report of a run meanwhile; gives its address. Port 0 is any that is free. Raises ConfigError."""
    pages = Pages(folder, write or _write_report)
    try:
        server = ReportServer(port, pages)
    except OSError as error:
        why = {errno.EADDRINUSE: "another program uses this port", errno.EACCES: "this port is reserved"}
        reason = why.get(error.errno or 0, error.strerror)
        raise ConfigError(f"--serve {port}: {reason}; choose another one, or 0 for any that is free") from None
    done = threading.Event()
    threads = [
        threading.Thread(target=pages.keep, args=(done,), name="report", daemon=True),
        threading.Thread(target=server.serve_forever, args=(0.2,), name="serve", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        done.set()
        server.shutdown()
        server.server_close()
        threads[0].join(timeout=5)


def _write_report(folders: Sequence[Path], out: Path) -> None:
    from rsrlm.commands.report import write  # the libraries that draw take a second to load

    write(folders, out)
