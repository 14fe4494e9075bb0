"""Clusters of Ray's own command line on this machine, each with ports, a token and a folder of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
from waiting import free_port, until

REPOSITORY = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START = ["--block", "--disable-usage-stats", "--object-store-memory=100000000"]


class Head:
    """A head with so many CPUs for work."""

    def __init__(self, cpus: int = 0) -> None:
        self.port, self.dashboard = free_port(), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # short: sockets lie in it
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environ = {
            **environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_worker_niceness": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._start("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--num-cpus={cpus}",
                    f"--temp-dir={self.folder}", f"--ray-client-server-port={free_port()}")  # fmt: skip

    def _start(self, *arguments: str) -> None:
        log = (self.folder / f"start{len(self._started)}.log").open("wb")
        # Jobs' agents listen at one port of a host, which the cluster of other tests may have.
        command = [*RAY, "start", *START, f"--dashboard-agent-listen-port={free_port()}", *arguments]
        self._started.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def add_host(self) -> None:
        self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def ask(self, path: str, method: str = "GET") -> Any:
        """The dashboard's answer about jobs; None where it has none yet."""
        headers = {"Authorization": f"Bearer {self.environ['RAY_AUTH_TOKEN']}"}
        url = f"{self.environ['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}"
        try:
            with urlopen(Request(url, method=method, headers=headers), timeout=20) as answer:
                return json.load(answer)
        except OSError:
            return None

    def submit(self, name: str, entrypoint: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        """As one would from the shell. A head that has just come up has no agent for jobs yet."""
        command = [*RAY, "job", "submit", "--submission-id", name, "--working-dir", str(REPOSITORY), *options, "--"]

        def once() -> subprocess.CompletedProcess[str] | None:
            done = subprocess.run(
                [*command, *entrypoint], env=self.environ, capture_output=True, text=True, timeout=300, check=False
            )
            return None if "No available agent" in done.stderr else done

        return until(once)

    def logs(self, name: str) -> str:
        return str((self.ask(f"{name}/logs") or {}).get("logs", ""))

    def ended(self, name: str) -> str:
        """How a job ended."""
        over = ("STOPPED", "SUCCEEDED", "FAILED")
        return str(until(lambda: (found := (self.ask(name) or {}).get("status")) in over and found, 150))

    def close(self) -> None:
        """At once: in good order it takes half a minute."""
        for started in self._started:
            process = psutil.Process(started.pid)
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            started.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)
