"""Where does an iteration's time go, what is idle meanwhile, and does `rsrlm plan` estimate memory and disk rightly?

    .venv/bin/python benchmarks/iteration.py [CONFIG] [KEY.SUB=VALUE]... [--rounds 1]

Runs the real command line (`rsrlm run CONFIG`, configs/quickstart.yaml by default) in a process of its own and a
temporary run folder, and looks at its whole process tree every half second. Two iterations are in one run, so that one
round is the default. Stages come from metrics.json and events.jsonl:

- start: process to Ray; then engines and learner until the first iteration begins.
- evaluate first model, produce, train, choose, publish, evaluate: as the run timed them itself (`stage_seconds`).
  Writing the records is part of produce.
- records: what is left between produce and train; teardown: from the last iteration to the end of the process.

Cores per stage are CPU seconds over wall seconds, by kind of process: engine (an engine actor with vLLM's processes),
learner (a rank), driver (the command line), ray (all the rest of the tree: raylet, GCS, agents, mailbox, Ray Train's
fit, idle workers); other is the rest of the machine, idle what nobody used.

Memory: `rss` is the largest resident set seen of the largest process of a kind, shared pages such as libraries and
mapped weight files included (for ray the sum over its processes, which counts such pages many times); `private` leaves
those out, and `uss` is the kernel's own count of pages that nobody else maps, taken when the resident set has grown by
3 %. The ratio is each over the plan's estimate. What bounds the figures: peaks between two looks are not seen, nor is a
process that lives for less; CPU time is counted in ticks of 10 ms, and the half second in which a stage ends is divided
by time.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from common import RESULTS, cpu_seconds, head, machine_seconds, processes, shown, spread, write

from rsrlm import config as configs
from rsrlm.commands import plan as planning
from rsrlm.commands.plan import plan_of
from rsrlm.config import Config
from rsrlm.report.progress import Report
from rsrlm.runtime import setup

QUESTION = "share of wall time by stage, cores used by whom meanwhile, and peak memory and disk over rsrlm plan's"
EVERY_S = 0.5
# `execute` is what a RayTrainWorker is called while it does what its controller asks.
TITLES = {"ray::EngineActor": "engine", "ray::RayTrainWorker": "learner", "ray::execute": "learner"}
KINDS = ("engine", "learner", "driver", "ray")
GIB = 2**30

Unit = tuple[str, int]  # kind, and process id of the one at its root


@dataclass(kw_only=True)
class Sample:
    """What was used since the sample before, and what is resident now."""

    t: float
    seconds: float
    cpu: dict[str, float]
    total_private: int


@dataclass
class Watcher:
    """Looks at a process tree until told to stop."""

    root: int
    samples: list[Sample] = field(default_factory=list)
    peaks: dict[Unit, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    seen: dict[tuple[int, float], float] = field(default_factory=dict)
    measured: dict[Unit, int] = field(default_factory=dict)
    ray_parts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        last, busy = time.time(), machine_seconds()
        while not self.stop.wait(EVERY_S):
            now, busy_now = time.time(), machine_seconds()
            cpu, private = self._look()
            cpu["other"] = max(busy_now - busy - sum(cpu.values()), 0.0)
            self.samples.append(Sample(t=now, seconds=now - last, cpu=cpu, total_private=private))
            last, busy = now, busy_now

    def _look(self) -> tuple[dict[str, float], int]:
        cpu: dict[str, float] = defaultdict(float)
        resident: dict[Unit, int] = defaultdict(int)
        private: dict[Unit, int] = defaultdict(int)
        members: dict[Unit, list[psutil.Process]] = defaultdict(list)
        units: dict[int, Unit] = {}
        for process in processes(self.root):
            try:
                unit = units[process.pid] = self._unit(process, units)
                total = cpu_seconds(process)
                memory = process.memory_info()
            except (psutil.Error, IndexError):  # it ended meanwhile
                continue
            key = process.pid, process.create_time()
            cpu[unit[0]] += max(total - self.seen.get(key, 0.0), 0.0)
            self.seen[key] = total
            resident[unit] += memory.rss
            private[unit] += memory.rss - memory.shared
            members[unit].append(process)
            if unit[0] == "ray":
                part = name_of(process)
                self.ray_parts[part] = max(self.ray_parts[part], memory.rss - memory.shared)
        for unit in members:
            self._note(unit, resident[unit], private[unit], members[unit])
        return cpu, sum(private.values())

    def _unit(self, process: psutil.Process, units: dict[int, Unit]) -> Unit:
        """Engines and ranks own their descendants; everything else that the driver started is Ray's."""
        if process.pid == self.root:
            return "driver", self.root
        title = process.cmdline()[0]
        kind = next((kind for start, kind in TITLES.items() if title.startswith(start)), None)
        if kind:
            return kind, process.pid
        parent = units.get(process.ppid(), ("ray", self.root))
        return parent if parent[0] in TITLES.values() else ("ray", self.root)

    def _note(self, unit: Unit, resident: int, private: int, members: list[psutil.Process]) -> None:
        peak = self.peaks[unit]
        peak["rss"] = max(peak["rss"], resident)
        peak["private"] = max(peak["private"], private)
        if resident > 1.03 * self.measured.get(unit, 0):
            self.measured[unit] = resident
            peak["uss"] = max(peak["uss"], sum(map(uss, members)))

    def memory(self) -> dict[str, dict[str, int]]:
        """The largest peak of each kind."""
        found: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            peaks = [peak for unit, peak in self.peaks.items() if unit[0] == kind]
            if peaks:
                found[kind] = {name: max(peak[name] for peak in peaks) for name in ("rss", "private", "uss")}
        return found


def name_of(process: psutil.Process) -> str:
    """Short name of one of Ray's processes: its title, its script or its program."""
    try:
        words = process.cmdline()
    except psutil.Error:
        words = []
    if not words:
        return "ended"
    if words[0].startswith("ray::"):
        return words[0].split(".")[0]
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return Path(script).name


def uss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


# -- the run -----------------------------------------------------------------------------------------------------------


def watched_run(command: list[str], log: Path) -> tuple[Watcher, float, float]:
    """Run a command to its end under a watcher. Raises RuntimeError with the end of its output when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("wb") as output:
        started = time.time()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        watcher = Watcher(process.pid)
        thread = threading.Thread(target=watcher.run, daemon=True)
        thread.start()
        try:
            code = process.wait()
        finally:
            end(process)
            watcher.stop.set()
            thread.join()
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"exit code {code} of {' '.join(command)}\n{tail}")
    return watcher, started, time.time()


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM lets the run take its actors down; what is left after a minute is killed."""
    if process.poll() is not None:
        return
    tree = processes(process.pid)
    process.terminate()
    for left in psutil.wait_procs(tree, timeout=60)[1]:
        left.kill()


# -- stages ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Span:
    stage: str
    iteration: int | None
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def spans_of(run: Path, started: float, ended: float) -> list[Span]:
    """The stages of a run in order of time, without gaps."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    at = next(event["t"] for event in events if event["event"] == "ray")
    finished = {event["iteration"]: event["t"] for event in events if event["event"] == "iteration_finished"}
    spans = [Span(stage="start: process and Ray", iteration=None, start=started, end=at)]
    for iteration, row in enumerate(json.loads((run / "summary.json").read_text())["iterations"]):
        begin = finished[iteration] - row["seconds"]
        stage = "between iterations" if iteration else "start: engines and learner"
        spans.append(Span(stage=stage, iteration=None, start=at, end=begin))
        spans += stages_of(iteration, row["stage_seconds"], begin, finished[iteration])
        at = finished[iteration]
    return [*spans, Span(stage="teardown", iteration=None, start=at, end=ended)]


def stages_of(iteration: int, seconds: dict[str, float], begin: float, end: float) -> list[Span]:
    """The first stages follow the beginning, the last ones lead to the end; what no stage timed is between them."""
    first: list[Span] = []
    last: list[Span] = []
    for name in ("evaluate first model", "produce"):
        first.append(Span(stage=name, iteration=iteration, start=begin, end=begin + seconds.get(name, 0.0)))
        begin = first[-1].end
    for name in ("evaluate", "publish", "choose", "train"):  # nothing is chosen where there are no candidates
        last.insert(0, Span(stage=name, iteration=iteration, start=end - seconds.get(name, 0.0), end=end))
        end = last[0].start
    between = Span(stage="records", iteration=iteration, start=begin, end=end)
    return [span for span in (*first, between, *last) if span.seconds > 0]


def swaps_in(run: Path, span: Span) -> int:
    """Weight updates of the engines within a stage: evaluation asks M0, too."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return sum(event["event"] == "published" and span.start <= event["t"] <= span.end for event in events)


def cpu_within(span: Span, samples: list[Sample]) -> dict[str, float]:
    """CPU seconds by kind; a sample that lies partly in the span counts for that part."""
    found: dict[str, float] = dict.fromkeys((*KINDS, "other"), 0.0)
    for sample in samples:
        overlap = min(sample.t, span.end) - max(sample.t - sample.seconds, span.start)
        if overlap > 0:
            for kind, seconds in sample.cpu.items():
                found[kind] += seconds * overlap / sample.seconds
    return found


def profile(run: Path, spans: list[Span], samples: list[Sample]) -> list[dict[str, Any]]:
    wall = spans[-1].end - spans[0].start
    cores = os.cpu_count() or 1
    found = []
    for span in spans:
        used = {kind: seconds / max(span.seconds, 1e-9) for kind, seconds in cpu_within(span, samples).items()}
        used["idle"] = max(cores - sum(used.values()), 0.0)
        found.append(
            {
                "stage": span.stage,
                "iteration": span.iteration,
                "seconds": round(span.seconds, 3),
                "share": span.seconds / wall,
                "weight_updates": swaps_in(run, span),
                "cores": {kind: round(value, 3) for kind, value in used.items()},
            }
        )
    return found


def by_stage(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same over all iterations: seconds and shares add up, cores are means over the time."""
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        seconds = sum(row["seconds"] for row in mine)
        cores = {
            kind: round(sum(row["cores"][kind] * row["seconds"] for row in mine) / max(seconds, 1e-9), 3)
            for kind in mine[0]["cores"]
        }
        found.append(
            {
                "stage": stage,
                "seconds": round(seconds, 3),
                "share": sum(row["share"] for row in mine),
                "weight_updates": sum(row["weight_updates"] for row in mine),
                "cores": cores,
            }
        )
    return found


# -- memory and disk ---------------------------------------------------------------------------------------------------


def estimate_of(kind: str, memory: dict[str, float]) -> float:
    return next(size for name, size in memory.items() if kind in name)


def compared_memory(found: dict[str, dict[str, int]], config: Config, memory: dict[str, float]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind, sizes in found.items():
        estimate = estimate_of(kind, memory)
        ratios = {f"{name}_over_plan": size / estimate for name, size in sizes.items()}
        rows[kind] = {**sizes, "plan": estimate, **ratios}
    return rows


def disk_of(run: Path) -> dict[str, int]:
    """Bytes of the run folder by the plan's kinds."""
    found = {"models": 0, "checkpoint": 0, "records": 0}
    for path in run.rglob("*"):
        if path.is_file() and not path.is_symlink():
            top = path.relative_to(run).parts[0]
            found[{"models": "models", "checkpoints": "checkpoint"}.get(top, "records")] += path.stat().st_size
    return found


def compared_disk(found: dict[str, int], estimates: dict[str, float]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind, size in found.items():
        estimate = estimates.get(kind, 0.0)
        rows[kind] = {"bytes": size, "plan": estimate, "over_plan": size / estimate if estimate else None}
    return rows


# -- rounds ------------------------------------------------------------------------------------------------------------


def one_round(number: int, path: str, overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rsrlm-iteration-") as scratch:
        overrides = [*overrides, f"runs={scratch}/runs"]
        config = configs.load(path, overrides)
        planned = plan_of(setup.prepare(config))
        command = [str(Path(sys.executable).with_name("rsrlm")), "run", path, *overrides]
        watcher, started, ended = watched_run(command, Path(scratch) / "output.txt")
        rows = profile(config.folder, spans_of(config.folder, started, ended), watcher.samples)
        peak = max(sample.total_private for sample in watcher.samples)
        total = planning.total_memory(planned.memory)
        return {
            "round": number,
            "wall_s": round(ended - started, 3),
            "stages": by_stage(rows),
            "spans": rows,
            "memory": compared_memory(watcher.memory(), config, {one.name: one.size for one in planned.memory}),
            "ray_parts_private": dict(sorted(watcher.ray_parts.items(), key=lambda item: -item[1])),
            "memory_all": {"private": peak, "plan": total, "private_over_plan": peak / total},
            "disk": compared_disk(disk_of(config.folder), planned.disk),
            "metrics": json.loads((config.folder / "summary.json").read_text())["iterations"],
        }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    shares: dict[str, list[float]] = defaultdict(list)
    for one in rounds:
        for row in one["stages"]:
            shares[row["stage"]].append(row["share"])
    return {
        "wall_s": spread([one["wall_s"] for one in rounds]),
        "share": {stage: spread(values) for stage, values in shares.items()},
        "memory_over_plan": {
            kind: {
                name: spread([one["memory"][kind][f"{name}_over_plan"] for one in rounds]) for name in ("rss", "uss")
            }
            for kind in rounds[0]["memory"]
        },
    }


def show(rounds: list[dict[str, Any]]) -> None:
    report = Report()
    report.line(f"wall seconds: {shown([one['wall_s'] for one in rounds], 1)}; medians of {len(rounds)} rounds")
    stages = [
        {
            "stage": row["stage"],
            "seconds": row["seconds"],
            "share": f"{100 * row['share']:.1f} %",
            "updates": row["weight_updates"],
            **row["cores"],
        }
        for row in medians(rounds)
    ]
    columns = {name: name for name in ("stage", "seconds", "share", "updates", *KINDS, "other", "idle")}
    report.table(f"Stages, and cores used of {os.cpu_count()}", stages, columns)
    show_sizes(report, rounds[0])


def show_sizes(report: Report, one: dict[str, Any]) -> None:
    def gib(size: float) -> str:
        return f"{size / GIB:.3f}"

    names = ("rss", "private", "uss", "plan")
    memory = [
        {"what": kind, **{name: gib(row[name]) for name in names}, "a": row["rss_over_plan"], "b": row["uss_over_plan"]}
        for kind, row in one["memory"].items()
    ]
    together = one["memory_all"]
    memory.append({"what": "all at once", "private": gib(together["private"]), "plan": gib(together["plan"])})
    headings = {
        "what": "",
        "rss": "peak RSS",
        "private": "private",
        "uss": "USS",
        "plan": "plan",
        "ratio": "RSS / plan",
    }
    report.table("Memory in GiB, round 0", memory, headings)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in list(one["ray_parts_private"].items())[:8])
    report.line(f"largest of ray, private GiB of one process: {parts}")
    disk = [
        {"what": kind, "size": gib(row["bytes"]), "plan": gib(row["plan"]), "ratio": row["over_plan"]}
        for kind, row in one["disk"].items()
    ]
    report.table("Disk in GiB, round 0", disk, {"what": "", "size": "size", "plan": "plan", "ratio": "size / plan"})


def medians(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median over the rounds of every figure of a stage."""
    found = []
    for stage in [row["stage"] for row in rounds[0]["stages"]]:
        rows = [row for one in rounds for row in one["stages"] if row["stage"] == stage]
        middle = {name: statistics.median(row[name] for row in rows) for name in ("seconds", "share", "weight_updates")}
        cores = {kind: statistics.median(row["cores"][kind] for row in rows) for kind in rows[0]["cores"]}
        found.append({"stage": stage, **middle, "cores": cores})
    return found


def main(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]")] = "configs/quickstart.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = f"iteration_{Path(config).stem}"
    data = head(QUESTION)
    done: list[dict[str, Any]] = []
    for number in range(rounds):
        done.append(one_round(number, config, overrides or []))
        write(out, name, {**data, "summary": summary(done), "rounds": done})
    show(done)
    Report().line(f"result: {out / (name + '.json')}")


if __name__ == "__main__":
    typer.run(main)
