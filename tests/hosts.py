"""Several hosts on one machine, as network namespaces: each has its own address, host name and /dev/shm, and its own
raylet. All of them see the same disk, but for what a test hides on one."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(__file__).parent / "hosts.sh"
PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
STORE = "--object-store-memory=100000000"


def why_not() -> str:
    """Why this machine cannot have such hosts; empty where it can."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "hostname") if not shutil.which(tool)]
    if missing:
        return f"hosts as network namespaces need {', '.join(missing)}"
    probe = "ip link add br0 type bridge && mount -t tmpfs tmpfs /dev/shm && hostname probe"
    tried = subprocess.run(["unshare", "-mnpuf", "sh", "-c", probe], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"network namespaces are not permitted here: {tried.stderr.strip()}"


class Hosts:
    """Hosts by name; the first is Ray's head. Close them, and every process on them is gone."""

    def __init__(self, *names: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))  # short: Ray's sockets lie in it
        self.addresses = {name: f"10.9.0.{number}" for number, name in enumerate(names, 1)}
        (self.folder / "home").mkdir()
        specs = [f"{name}={address}" for name, address in self.addresses.items()]
        self._holder = subprocess.Popen(
            ["unshare", "-mnpf", "--mount-proc", "--kill-child", "bash", str(SCRIPT), str(self.folder), *specs],
            stdout=(self.folder / "hosts.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        self._raylets: dict[str, subprocess.Popen[bytes]] = {}
        deadline = time.monotonic() + 30
        while not (self.folder / "ready").exists():
            if self._holder.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "hosts.log").read_text())
            time.sleep(0.05)
        self._inside = psutil.Process(self._holder.pid).children()[0].pid

    @property
    def head(self) -> str:
        return f"{next(iter(self.addresses.values()))}:{PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process on the hosts: without a token of Ray's that this machine may have."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        root = Path.home() / ".cache"
        return {
            **kept,
            "HF_HOME": os.environ.get("HF_HOME", str(root / "huggingface")),
            "RSRLM_CACHE": os.environ.get("RSRLM_CACHE", str(root / "rsrlm")),
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(SCRIPT.parent.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",
        }

    def command(self, name: str, *command: str) -> list[str]:
        """The command line that runs this command on a host."""
        holder = (self.folder / f"{name}.pid").read_text().strip()
        return [
            *("nsenter", "-t", str(self._inside), "-m", "-n", "-p"),
            *("nsenter", "-t", holder, "-m", "-n", "-u", *command),
        ]

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(self.command(name, *command), env=self.environment, **options)

    def run(self, name: str, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *command),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment,
        )

    def join(self, cpus: dict[str, float]) -> None:
        """`ray start` on these hosts, with so many CPUs each. The head must be the first."""
        head = next(iter(self.addresses))
        if head in cpus:
            self._up([head], cpus)
        self._up([name for name in cpus if name != head], cpus)

    def _up(self, names: list[str], cpus: dict[str, float]) -> None:
        for _ in range(5):  # a raylet that is not there within 30 s gives up: too little for a busy machine
            logs = {name: self.folder / f"{name}.log" for name in names}
            for name, log in logs.items():
                self._raylets[name] = self.start(
                    name, *self._ray(name, cpus[name]), stdout=log.open("wb"), stderr=subprocess.STDOUT
                )
            waiting = set(names)
            while any(self._raylets[name].poll() is None for name in waiting):
                waiting -= {name for name in waiting if "Ray runtime started" in logs[name].read_text()}
                time.sleep(0.2)
            names = sorted(waiting)
            if not names:
                return
        raise RuntimeError("\n".join(log.read_text()[-2000:] for log in logs.values()))

    def _ray(self, name: str, cpus: float) -> list[str]:
        address = self.addresses[name]
        place = [f"--node-ip-address={address}", f"--num-cpus={cpus:g}", f"--temp-dir={self.folder}/{name}"]
        place.append(f"--labels=role={name.rpartition('-')[2]}")  # late-sampler is a sampler too
        if self.head.startswith(f"{address}:"):
            return [*RAY, "--head", f"--port={PORT}", "--include-dashboard=false", *place, STORE, "--block"]
        return [*RAY, f"--address={self.head}", *place, STORE, "--block"]

    def processes(self, name: str) -> list[psutil.Process]:
        """All on a host but the one that holds it."""
        network = self.run(name, "readlink", "/proc/self/ns/net").stdout.strip()
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                here = os.readlink(f"/proc/{process.pid}/ns/net") == network
            except OSError:
                continue
            if here and process.info["cmdline"] != ["sleep", "infinity"]:
                found.append(process)
        return found

    def lose(self, name: str) -> None:
        """The host dies with all that runs on it."""
        for process in self.processes(name):
            if process.is_running():
                process.kill()

    def files(self, name: str, pattern: str) -> list[str]:
        """What is there of this pattern on a host."""
        done = self.run(name, "bash", "-c", f"compgen -G '{pattern}' || true")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def close(self) -> None:
        self._holder.kill()  # and with it all that is in its namespaces
        self._holder.wait()
        for raylet in self._raylets.values():
            raylet.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
