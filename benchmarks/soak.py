"""Does memory stay flat in a long online run? The slope of every process, over ten thousand prompts.

    python benchmarks/soak.py [--rounds 100] [--prompts 100]

A tiny model on the online clock: an engine that samples and judges, a rank, the driver. Every two seconds the memory
that each process has for itself (USS) is read. The slope is a line through the second half of the run; over the first
half, caches fill up.

Real Ray, vLLM and DeepSpeed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import yaml
from common import RESULTS, head, write

ROOT = Path(__file__).resolve().parent.parent
MARK = "RSRLM_SOAK"
# How Ray names the processes of its actors, and its own.
PROCESSES = {
    "driver": "rsrlm.cli",
    "engine": "ray::EngineActor",
    "rank": "RayTrainWorker",
    "controller of the ranks": "TrainController",
    "mailbox": "ray::Mailbox",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}


def made_config(folder: Path, rounds: int, prompts: int) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from small_models import make_tiny

    from rsrlm.model import folder_of
    from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

    model = make_tiny(folder / "model", folder_of(ModelConfig(path=BUILTIN_MODEL)), ends=True)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(rounds * prompts + 10):
            asked = f"What is {number} + {number % 97}?"
            file.write(json.dumps({"id": f"p{number}", "prompt": asked}) + "\n")
    config = {
        "name": "soak", "runs": str(folder / "runs"), "iterations": rounds, "model": str(model),
        "clock": {"kind": "online", "evaluate_every": 20},
        "prompts": {"path": str(folder / "prompts.jsonl"), "per_iteration": prompts, "heldout": 3},
        "sample": {"responses": 3, "max_tokens": 16, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": ""},
        "train": {"lr": 1e-6, "schedule": "constant", "pairs_per_step": 16, "micro_batch": 4, "threads": 1},
        "evaluate": {"max_tokens": 16},
        "engine": {"max_model_len": 768, "max_num_seqs": 32, "kv_cache_gib": 0.25, "threads": 1},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def memory() -> dict[str, float]:
    """MiB of each process of the run, by its name."""
    found: dict[str, float] = {}
    for process in psutil.process_iter():
        try:
            if MARK not in process.environ():
                continue
            command = " ".join(process.cmdline())
            if name := next((name for name, part in PROCESSES.items() if part in command), None):
                found[name] = found.get(name, 0.0) + process.memory_full_info().uss / 2**20
        except psutil.Error:
            continue
    return found


def main(
    rounds: Annotated[int, typer.Option(min=4)] = 100,
    prompts: Annotated[int, typer.Option(min=1, help="of a round")] = 100,
    out: Annotated[Path, typer.Option(help="folder of soak.json")] = RESULTS,
) -> None:
    facts = head("does memory stay flat in a long online run?")
    started, samples = time.monotonic(), list[tuple[int, dict[str, float]]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = made_config(folder, rounds, prompts)
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "rsrlm.cli", "run", str(config)], stdout=log, stderr=log,
                env={**os.environ, MARK: "1"}, cwd=ROOT,
            )  # fmt: skip
            while process.poll() is None:
                time.sleep(2)
                done = len(list((folder / "runs" / "soak" / "iterations").glob("*/metrics.json")))
                samples.append((done * prompts, memory()))
        done = len(list((folder / "runs" / "soak" / "iterations").glob("*/metrics.json")))
        if process.returncode or done < rounds:
            raise SystemExit((folder / "log").read_text()[-3000:])
    late = [(at, found) for at, found in samples if at >= rounds * prompts / 2]
    rows: dict[str, Any] = {}
    for one in PROCESSES:
        known = [(at, found[one]) for at, found in late if one in found]
        if len(known) > 10:
            at, size = np.array(known).T
            slope, _ = np.polyfit(at, size, 1)
            rows[one] = {
                "mib_at_half": round(float(size[0]), 1),
                "mib_at_end": round(float(size[-3:].mean()), 1),
                "most": round(max(found.get(one, 0.0) for _, found in samples), 1),
                "bytes_a_prompt": round(float(slope * 2**20)),
            }
    thinned = samples[:: len(samples) // 50 or 1]
    data = {
        **facts, "prompts": rounds * prompts, "seconds": round(time.monotonic() - started), "processes": rows,
        "samples": [(at, {name: round(size, 1) for name, size in found.items()}) for at, found in thinned],
    }  # fmt: skip
    write(out, "soak", data)
    print(json.dumps({**data, "samples": len(samples)}, indent=1))


if __name__ == "__main__":
    typer.run(main)
