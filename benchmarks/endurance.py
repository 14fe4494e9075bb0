"""Does a run come to the same end whatever is killed, and when? At least so many SIGKILLs, at random.

    python benchmarks/endurance.py [--kills 200] [--seed 0]

A run of two iterations of a tiny model: an engine that samples, one that judges, a producer, a rank. Again and again
one of its processes is killed, chosen by the seed, after a time of which the mean is three seconds: in the start,
between two bytes of a journal, in a step, in a publish. Where the run ends with that, it is resumed. After the kills
of a run it is let be, and its end is held against that of an undisturbed one: every prompt once, the same responses,
pairs and order of training, the same weights; no process, and nothing in /dev/shm. Then comes the next run.

Real Ray, vLLM and DeepSpeed. A run that writes nothing for three minutes hangs, and counts as a failure.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.parquet as pq
import typer
import yaml
from common import RESULTS, head, write

ROOT = Path(__file__).resolve().parent.parent
MARK = "RSRLM_ENDURANCE"
ENGINES = 2
PER_RUN, MEAN_S, IN_START, HANGS_AFTER_S, LEFT_AFTER_S = 20, 3.0, 0.15, 180.0, 30.0
# How Ray names the processes of its actors, and its own.
VICTIMS = {
    "driver": "rsrlm.cli",
    "engine": "ray::EngineActor",
    "producer": "ray::Producer",
    "rank": "RayTrainWorker",
    "controller of the ranks": "TrainController",
    "mailbox": "ray::Mailbox",
}
# They outlive a raylet that ends while it starts by minutes, and end by themselves.
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
WEIGHTS = {"driver": 1, "engine": 4, "producer": 3, "rank": 3}  # others: a half


def marked() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if MARK in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def left_over() -> list[str]:
    """What still lives half a minute after a run has ended."""
    deadline = time.monotonic() + LEFT_AFTER_S
    while found := list(marked()):
        if time.monotonic() > deadline:
            return [" ".join(one.cmdline())[:100] for one in found]
        time.sleep(0.2)
    return []


def victims() -> dict[str, list[psutil.Process]]:
    found: dict[str, list[psutil.Process]] = {}
    for process in marked():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for name, part in VICTIMS.items():
            if part in command:
                found.setdefault(name, []).append(process)
                break
    return found


def stage(folder: Path, since: float) -> str:
    """The last event of a run that was started then; "start" until its engines are up."""
    try:
        events = [json.loads(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    except (OSError, ValueError):
        return "start"
    names = [str(event["event"]) for event in events if event["t"] > since]
    return names[-1] if names.count("engine_up") >= ENGINES else "start"


class Hangs(Exception):
    """Nothing was written for too long."""


class Disturbed:
    """One run, started and resumed until it has ended."""

    def __init__(self, config: Path, name: str) -> None:
        self.folder = config.parent / "runs" / name
        self._first = ["run", str(config), f"name={name}"]
        self._log = (config.parent / f"{name}.log").open("a")
        self.process: subprocess.Popen[bytes] | None = None
        self.ends: list[int] = []
        self.left: list[str] = []
        self.started = time.time()
        self._seen, self._since = 0, time.monotonic()

    def go_on(self) -> bool:
        """Start it, or again where it has ended otherwise than well. Whether it is still to be waited for."""
        if self.process is None or (code := self.process.poll()) is not None:
            if self.process:
                self.ends.append(code)
                self.left += left_over()
                if code == 0:
                    return False
            begun = (self.folder / "config.yaml").exists()
            command = ["resume", str(self.folder)] if begun else self._first
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rsrlm.cli", *command], stdout=self._log, stderr=self._log,
                env={**os.environ, MARK: "1"}, cwd=ROOT,
            )  # fmt: skip
            self._since, self.started = time.monotonic(), time.time()
        written = sum(path.stat().st_size for path in self.folder.glob("*.jsonl"))
        written += sum(path.stat().st_size for path in self.folder.glob("iterations/*/steps.jsonl"))
        if written != self._seen:
            self._seen, self._since = written, time.monotonic()
        if time.monotonic() - self._since > HANGS_AFTER_S:
            for one in marked():
                one.kill()
            raise Hangs(f"{self.folder.name}: nothing for {HANGS_AFTER_S:g} s after {stage(self.folder, self.started)}")
        return True


def disturb(config: Path, name: str, kills: int, rng: random.Random) -> tuple[Disturbed, list[tuple[str, str]]]:
    """A run with so many kills, to its end; what was killed, and after which event."""
    run, done = Disturbed(config, name), list[tuple[str, str]]()
    at, spared = time.monotonic() + rng.expovariate(1 / MEAN_S), False
    while run.go_on():
        if spared and stage(run.folder, run.started) == "start":  # or few would come further
            at = time.monotonic() + rng.expovariate(1 / MEAN_S)
        elif len(done) < kills and time.monotonic() > at:
            there = victims()
            if there:
                names = sorted(there)
                (what,) = rng.choices(names, [WEIGHTS.get(one, 0.5) for one in names])
                victim = rng.choice(sorted(there[what], key=lambda one: one.pid))
                before = stage(run.folder, run.started)
                try:
                    victim.send_signal(signal.SIGKILL)
                    done.append((what, before))
                except psutil.Error:
                    pass
            at, spared = time.monotonic() + rng.expovariate(1 / MEAN_S), rng.random() > IN_START
        time.sleep(0.05)
    return run, done


SCORES = ("points", "variance", "chosen_score", "rejected_score")  # float32 sums in another order differ a little


def differences(folder: Path, whole: Path) -> list[str]:
    """Between a run and the undisturbed one."""
    found = []
    for number in range(2):
        ours, theirs = (one / "iterations" / f"{number:02d}" for one in (folder, whole))
        for name in ("prompts", "responses", "judgements", "pairs"):
            rows = [pq.read_table(one / f"{name}.parquet").to_pylist() for one in (ours, theirs)]
            if len(rows[0]) != len(rows[1]):
                found.append(f"{name} of {number}: {len(rows[0])} rows for {len(rows[1])}")
                continue
            for one, other in zip(*rows, strict=True):
                for key, value in one.items():
                    near = key in SCORES and abs(value - other[key]) < 1e-3
                    if value != other[key] and not near:
                        found.append(f"{name} of {number}: {key} of {one.get('id')}")
        orders = [[json.loads(line)["pair_ids"] for line in (one / "steps.jsonl").open()] for one in (ours, theirs)]
        if orders[0] != orders[1]:
            found.append(f"order of training in {number}")
        model = f"models/M{number + 1}/model.safetensors"
        if (folder / model).read_bytes() != (whole / model).read_bytes():
            found.append(f"weights of M{number + 1}")
    keys = [json.loads(line)["k"] for path in folder.glob("journal*.jsonl") for line in path.open()]
    if (status := json.loads((folder / "summary.json").read_text())["status"]) != "completed":
        found.append(f"status {status}")
    return [*found, *([f"{len(keys) - len(set(keys))} answers twice"] if len(keys) != len(set(keys)) else [])]


def made_config(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from small_models import make_tiny

    from rsrlm.model import folder_of
    from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

    model = make_tiny(folder / "model", folder_of(ModelConfig(path=BUILTIN_MODEL)), ends=True)
    config = {
        "name": "whole", "runs": str(folder / "runs"), "iterations": 2, "model": str(model),
        "prompts": {"path": "builtin", "per_iteration": 150, "heldout": 3, "reuse": True},
        "sample": {"responses": 3, "max_tokens": 24, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": "", "replicas": 1},
        "train": {"lr": 1e-3, "pairs_per_step": 2, "micro_batch": 1, "checkpoint_every_steps": 3, "threads": 1},
        "evaluate": {"max_tokens": 16},
        "engine": {"max_model_len": 768, "max_num_seqs": 4, "kv_cache_gib": 0.25, "producers": 1, "threads": 1},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def main(
    kills: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="folder of endurance.json")] = RESULTS,
    keep: Annotated[Path | None, typer.Option(help="a folder for the runs; it stays")] = None,
) -> None:
    started, rng = time.monotonic(), random.Random(seed)
    facts = head("does a run come to the same end whatever is killed, and when?")
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        memory = set(os.listdir("/dev/shm"))
        config = made_config(folder)
        whole, _ = disturb(config, "whole", 0, rng)
        rows: list[dict[str, Any]] = []
        while sum(len(row["killed"]) for row in rows) < kills:
            begun, name = time.monotonic(), f"run-{len(rows)}"
            try:
                run, killed = disturb(config, name, PER_RUN, rng)
                agents = [one for one in run.left if one.strip() in RAYS_AGENTS]
                left = [f"left: {one}" for one in run.left if one.strip() not in RAYS_AGENTS]
                wrong, ends = [*differences(run.folder, whole.folder), *left], run.ends
            except Hangs as error:
                killed, wrong, ends, agents = [("", "")], [str(error)], [], []
            wrong += [f"in /dev/shm: {one}" for one in sorted(set(os.listdir("/dev/shm")) - memory)]
            memory = set(os.listdir("/dev/shm"))
            rows.append(
                {
                    "killed": killed,
                    "ends": ends,
                    "wrong": wrong,
                    "agents_of_ray_left": len(agents),
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            print(
                name, dict(Counter(what for what, _ in killed)), ends, f"{rows[-1]['seconds']:.0f} s", wrong, flush=True
            )
            every = [one for row in rows for one in row["killed"]]
            write(
                out,
                "endurance",
                {
                    **facts,
                    "kills": len(every),
                    "killed": dict(Counter(what for what, _ in every).most_common()),
                    "after": dict(Counter(before for _, before in every).most_common()),
                    "runs": len(rows),
                    "runs_that_differ": sum(bool(row["wrong"]) for row in rows),
                    "seconds": round(time.monotonic() - started),
                    "each": rows,
                },
            )


if __name__ == "__main__":
    typer.run(main)
