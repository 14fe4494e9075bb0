"""How much of the shorter one of answering and training does an overlapped iteration hide?

Two real runs of the built-in model with one core for the engine and one for the learner: on the iterative clock, where
they take turns, and overlapped (`clock: {kind: online, lag: 0, sync_every: N}`), where the learner begins with the
first of N rounds. The figure is the overlapped iteration's time over the longer one of answering and training in turns.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
import yaml
from common import RESULTS, head, write


def config_of(runs: str, prompts: int, iterations: int, rounds: int) -> dict[str, Any]:
    """`rounds` of an iteration; 0: the iterative clock."""
    common = {
        "runs": runs, "model": "smollm2-135m-instruct", "prompts": {"path": "builtin", "heldout": 2},
        "sample": {"responses": 4, "max_tokens": 64, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0.0, "fence_salt": ""},
        "train": {"lr": 1e-6, "schedule": "constant", "pairs_per_step": 4, "threads": 1},
        "evaluate": {"max_tokens": 16, "duel": False},
        "engine": {"max_model_len": 768, "max_num_seqs": 32, "kv_cache_gib": 0.5, "threads": 1},
    }  # fmt: skip
    common["prompts"]["per_iteration"] = prompts // (rounds or 1)  # type: ignore[index]
    if not rounds:
        return {**common, "name": "iterative", "iterations": iterations}
    clock = {"kind": "online", "lag": 0, "sync_every": rounds, "reference": "before", "evaluate_every": rounds}
    return {**common, "name": "overlapped", "iterations": iterations * rounds, "clock": clock}


def run(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of its iterations."""
    folder = Path(config["runs"])
    file = folder / f"{config['name']}.yaml"
    file.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "rsrlm.cli", "run", str(file)], check=True)
    summary = json.loads((folder / config["name"] / "summary.json").read_text())
    found: list[dict[str, Any]] = summary["iterations"]
    return found


def spent(rows: list[dict[str, Any]], *stages: str) -> float:
    return sum(row["stage_seconds"].get(stage, 0.0) for row in rows for stage in stages)


def main(
    prompts: Annotated[int, typer.Option(help="of an iteration")] = 40,
    iterations: int = 2,
    rounds: Annotated[int, typer.Option(help="of an overlapped iteration")] = 5,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    with tempfile.TemporaryDirectory(prefix="rsrlm-online-") as runs:
        turns = run(config_of(runs, prompts, iterations, 0))
        rows = run(config_of(runs, prompts, iterations, rounds))
    found = []
    for number in range(iterations):
        alone, beside = turns[number], rows[number * rounds : (number + 1) * rounds]
        produce, train = spent([alone], "produce"), spent([alone], "train")
        overlapped = spent(beside, "produce", "train", "wait for answers")
        found.append(
            {
                "produce_s": produce, "train_s": train, "overlapped_s": overlapped,
                "pairs": [alone["pairs"], sum(row["pairs"] for row in beside)],
                "over_the_longer": overlapped / max(produce, train),
                "in_turns_over_overlapped": (produce + train) / overlapped,
                "rounds": [row["stage_seconds"] for row in beside],
            }
        )  # fmt: skip
        print(json.dumps({name: value for name, value in found[-1].items() if name != "rounds"}), flush=True)
    data = {**head(__doc__.splitlines()[0]), "prompts": prompts, "rounds": rounds, "iterations": found}
    data["mean_over_the_longer"] = fmean(one["over_the_longer"] for one in found)
    write(out, "online", data)


if __name__ == "__main__":
    typer.run(main)
