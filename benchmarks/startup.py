"""How long does a user wait at the start? Seconds until `rsrlm run` shows something, has engines, has an answer.

    python benchmarks/startup.py                   # benchmarks/results/startup.json
    python benchmarks/startup.py --rounds 1        # a first look

Each round starts `rsrlm run` on the quickstart's config in a process group of its own and interrupts it at the first
answer. `cold` is the first run on a machine: the built-in model must be made, and neither Python's environment nor the
model is in the page cache (as far as no other process has it mapped). `warm` is a run after another.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, Load, head, processes, shown, spread, write

QUESTION = "seconds from the start of `rsrlm run` to its first line, Ray, the engines and the first answer"
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
MOMENTS = ("first_line", "ray", "engines", "first_answer", "longest_silence")
LONGEST_S = 900.0


class Start:
    """One start of rsrlm, and the seconds at which things happened."""

    def __init__(self, command: list[str], folder: Path, cache: Path) -> None:
        self.folder = folder / "startup"
        self.began = time.perf_counter()
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [*command, f"runs={folder}", "name=startup"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            env={**os.environ, "RSRLM_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((time.perf_counter() - self.began, line.rstrip()))

    def to_first_answer(self) -> dict[str, Any]:
        """Waits for the first answer in the journal, then interrupts the run."""
        journal = self.folder / "journal.jsonl"
        try:
            while not (journal.exists() and journal.stat().st_size):
                if self.process.poll() is not None or time.perf_counter() - self.began > LONGEST_S:
                    raise RuntimeError("no answer: " + "\n".join(line for _, line in self.lines[-20:]))
                time.sleep(0.05)
            answered = time.perf_counter() - self.began
        finally:
            self._end()
        ended = time.perf_counter() - self.began
        seconds = {event: t for t, event in self._events()}
        moments = [0.0, *(at for at, _ in self.lines if at < answered), answered]
        return {
            "first_line": moments[1],
            "ray": seconds["ray"],
            "engines": next((at for at, line in self.lines if line.startswith("engines are up")), 0.0)
            or seconds["engine_up"],
            "first_answer": answered,
            "longest_silence": max(after - before for before, after in pairwise(moments)),
            "interruption": ended - answered,
            "exit_code": self.process.returncode,
            "lines": [f"{at:6.1f}  {line}" for at, line in self.lines if at <= answered],
        }

    def _events(self) -> list[tuple[float, str]]:
        """The last event of each kind, in seconds from the start."""
        begun = time.time() - (time.perf_counter() - self.began)
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [(event["t"] - begun, event["event"]) for event in map(json.loads, lines)]

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for process in reversed(processes(self.process.pid)):
                process.kill()
            self.process.wait()
        self._reader.join()


def evict(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(case: str, command: list[str], environment: Path, warm_cache: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        cache = warm_cache
        if case == "cold":
            cache = Path(scratch) / "cache"
            evict(environment)
        with Load() as load:
            found = Start(command, Path(scratch) / "runs", cache).to_first_answer()
        return {**found, **load.figures()}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    rsrlm: Annotated[str, typer.Option(help="another rsrlm to measure, such as that of another checkout")] = "",
    name: Annotated[str, typer.Option(help="of the result")] = "startup",
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    program = Path(rsrlm) if rsrlm else Path(sys.executable).parent / "rsrlm"
    command = [str(program), "run", str(CONFIG)]
    data: dict[str, Any] = {**head(QUESTION), "started": shlex.join(command), "rounds": []}
    with tempfile.TemporaryDirectory() as folder:
        measure("warm", command, program.parent.parent, Path(folder))  # makes the model that warm starts find
        for number in range(rounds):
            for case in ("cold", "warm") if number % 2 == 0 else ("warm", "cold"):
                found = measure(case, command, program.parent.parent, Path(folder))
                data["rounds"].append({"round": number, "case": case, **found})
                print(f"round {number}, {case}: " + ", ".join(f"{name} {found[name]:.1f}" for name in MOMENTS))
                data["figures"] = {
                    f"{case}_{moment}": spread([one[moment] for one in data["rounds"] if one["case"] == case])
                    for case in {one["case"] for one in data["rounds"]}
                    for moment in MOMENTS
                }
                write(out, name, data)
    for case in ("cold", "warm"):
        for moment in MOMENTS:
            print(f"{case} {moment}: {shown([one[moment] for one in data['rounds'] if one['case'] == case], 1)} s")
    if statistics.median([one["other_cores"] for one in data["rounds"]]) > 0.1:
        print("others used the machine meanwhile: look at other_cores before you believe these")


if __name__ == "__main__":
    typer.run(main)
