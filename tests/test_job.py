"""`ray job submit` on a cluster with a token, whose host for work joins after the job has begun. It is stopped and
submitted again, and once more when it is finished."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START = ["--block", "--disable-usage-stats", "--object-store-memory=100000000"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def until(happened: Callable[[], Any], within_s: float = 90.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := happened()):
        assert time.monotonic() < deadline, "nothing of this happened"
        time.sleep(0.2)
    return found


class Head:
    """A head that works on nothing itself."""

    def __init__(self) -> None:
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
        self._start("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--num-cpus=0",
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


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    made = Head()
    yield made
    made.close()


@pytest.fixture(scope="module")
def config_file(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    config = {
        "name": "job",
        "runs": str(folder / "runs"),
        "iterations": 1,
        "model": str(tiny_chat_model),
        "prompts": {"path": "builtin", "per_iteration": 4, "heldout": 0},
        "sample": {"responses": 3, "max_tokens": 100, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": ""},
        "train": {"lr": 1e-3, "pairs_per_step": 3, "micro_batch": 2},
        "evaluate": {"max_tokens": 16},
        "engine": {"max_model_len": 768, "max_num_seqs": 2, "kv_cache_gib": 0.25},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_job(head: Head, config_file: Path) -> None:
    runs = config_file.parent / "runs"
    rsrlm = [sys.executable, "-m", "rsrlm.cli", "run", str(config_file), "--or-resume"]
    until(lambda: head.ask("") is not None)

    # Nothing is made before there is room; then it is stopped in the middle.
    assert head.submit("first", [*rsrlm, "ray.wait_s=90"], "--no-wait").returncode == 0
    # Ray deletes the folder that the driver starts in.
    assert head.submit("relative", [*rsrlm, "runs=runs"], "--no-wait").returncode == 0
    until(lambda: "waiting for hosts: the cluster has 0 of 1 Ray CPU, 0 s of ray.wait_s=90" in head.logs("first"))
    assert not runs.exists()
    head.add_host()
    journal = runs / "job" / "journal.jsonl"
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3, 120)
    assert json.loads((runs / "job" / "alive.json").read_text())["host"] == socket.gethostname()
    head.ask("first/stop", "POST")
    assert head.ended("first") == "STOPPED"
    assert json.loads((runs / "job" / "summary.json").read_text())["status"] == "interrupted"
    known = journal.read_bytes().count(b"\n")
    assert head.ended("relative") == "FAILED"
    assert "rsrlm: runs=runs lies in the files that Ray keeps of this job" in head.logs("relative")

    # The same again goes on.
    done = head.submit("again", rsrlm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on with {runs / 'job'}, which was interrupted" in done.stdout
    assert int(re.search(r"(\d+) answers are known already", done.stdout)[1]) >= known  # type: ignore[index]
    assert "status: completed" in done.stdout
    assert json.loads((runs / "job" / "summary.json").read_text())["status"] == "completed"

    assert head.submit("finished", rsrlm, "--no-wait").returncode == 0
    assert head.ended("finished") == "SUCCEEDED"
    assert "is finished: 1 iterations" in head.logs("finished")


JOINING = """
import sys
import ray
from rsrlm.config import load
from rsrlm.runtime import address, cluster
config = load(sys.argv[1], [f"ray.address={sys.argv[2]}"])
address.check_address(config)
cluster._init(config)
print(len(ray.nodes()))
"""


def test_a_driver_takes_the_mode_that_the_cluster_has(head: Head, config_file: Path) -> None:
    """Ray leaves the token aside at an explicit address, and has read the mode when it is imported."""
    until(lambda: head.ask("") is not None)
    environ = {name: value for name, value in head.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", JOINING, str(config_file), f"127.0.0.1:{head.port}"],
        env=environ, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert int(done.stdout) >= 1, done.stderr
