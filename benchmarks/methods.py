"""Which method helps? Every recipe beside the base model and plain self-rewarding, on generated arithmetic.

    .venv/bin/python benchmarks/methods.py                               # all methods, three seeds: hours on 2 cores
    .venv/bin/python benchmarks/methods.py --seeds 1 --methods irpo scpo # some of them
    .venv/bin/python benchmarks/methods.py --runs FOLDER                 # keeps the runs, and goes on with them

Every method samples the same number of answers to train on, with the same model, problems, learning rate and
sampling; what it asks its judge for and what it trains on come on top and are reported. One iteration each, but for
those that need one before it. Measured: the share of right answers (the last number of an answer) to held-out problems,
greedily, and its gain over the base model on the same problems, with a bootstrapped 95 % interval over the problems of
all seeds. Methods marked with * know the answers or have worked references: they are no peers of the others.

Results: benchmarks/results/methods.json, to which every call adds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from common import machine
from learning import outputs

from rsrlm.data.arithmetic import Level, problems
from rsrlm.judges.answers import AnswerForm, FinalAnswer, find
from rsrlm.records import Prompt
from rsrlm.report.metrics import mean_figure

RESULTS = Path(__file__).parent / "results" / "methods.json"
ANSWERS = 192  # sampled for training, by each method
HELDOUT = 96
PROBLEMS: dict[Level, int] = {1: 100, 2: 260}
READ = AnswerForm(where="end", value="number")
KNOWS = {"kind": "answer", "where": "end", "value": "number"}
SELF = {"kind": "digits"}

BASE: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "prompts": {"heldout": HELDOUT},
    "sample": {"responses": 4, "temperature": 0.8, "max_tokens": 48},
    "judge": {**KNOWS, "fence_salt": ""},  # of held-out answers, whoever gives the rewards
    "train": {
        "lr": 2.0e-5, "lr_final": 2.0e-6, "pairs_per_step": 4, "micro_batch": 4, "checkpoint_every_steps": 1000,
    },
    "engine": {"max_model_len": 1024, "max_num_seqs": 48},
    "evaluate": {"temperature": 0.0, "max_tokens": 48, "duel": False},
}  # fmt: skip

# The steps of each method, and how many answers it samples to a problem over all of them.
METHODS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "self_rewarding": ([{"recipe": "self_rewarding"}], 4),
    "sppo": ([{"recipe": "sppo"}], 4),
    "oaif": ([{"recipe": "oaif", "sample": {"responses": 2}}], 2),
    "temporal": ([{"recipe": "temporal", "future": False}], 8),
    "cream": ([{"recipe": "cream"}], 4),
    "dice": ([{"recipe": "self_rewarding"}, {"recipe": "dice", "pair": {"least": 2, "least_chars": 1}}], 8),
    "scir": ([{"recipe": "self_rewarding"}, {"recipe": "scir"}], 8),
    "scpo": ([{"recipe": "scpo", "judge": KNOWS, "sample": {"responses": 8}, "least": 0.5}], 8),
    "irpo*": ([{"recipe": "irpo", "judge": KNOWS, "sample": {"responses": 8}, "pairs": 4}], 8),
    "sft on right answers*": ([{"recipe": "sft", "sources": ["positive"], "positive_score": 1.0, "judge": KNOWS}], 4),
    "spin*": ([{"recipe": "spin"}], 1),
    "dno*": (
        [{"recipe": "dno", "judge": KNOWS, "pair": {"floor": 1.0, "margin": 1.0, "own_margin": 1.0}}],
        4,
    ),
    "self_j, then self_rewarding*": (
        [{"recipe": name, "judge": {"template": "self_j"}} for name in ("self_j", "self_rewarding")],
        5,
    ),
}  # fmt: skip


def config_of(method: str, seed: int, runs: Path) -> dict[str, Any]:
    steps, each = METHODS[method]
    prompts = {**BASE["prompts"], "path": str(runs / "problems.jsonl"), "per_iteration": ANSWERS // each}
    judged = [{**step, "judge": {**SELF, **step.get("judge", {})}} for step in steps]
    return {**BASE, "name": name_of(method, seed), "runs": str(runs), "seed": seed, "prompts": prompts, "steps": judged}


def name_of(method: str, seed: int) -> str:
    return f"{''.join(c if c.isalnum() else '-' for c in method).strip('-')}-{seed}"


def run(method: str, seed: int, runs: Path) -> Path:
    """The folder of the method's run, which is begun, resumed or left as it is."""
    folder, path = runs / name_of(method, seed), runs / f"{name_of(method, seed)}.yaml"
    path.write_text(yaml.safe_dump(config_of(method, seed, runs), sort_keys=False))
    command = [sys.executable, "-m", "rsrlm.cli", "run", str(path), "--or-resume", "--final-is-success"]
    print(" ".join(command), flush=True)
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
        subprocess.run(command, check=False)
    return folder


def right(folder: Path, model: int, known: Mapping[str, str]) -> dict[str, float]:
    """1 or 0 for each held-out problem."""
    found = {one["id"].split("/")[1]: one for one in outputs(folder, model)}
    return {
        name: float(
            one["finish_reason"] == "stop"
            and isinstance(answer := find(one["text"], READ), FinalAnswer)
            and answer.value == known[name]
        )
        for name, one in found.items()
    }


def measure(method: str, folder: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """What one run comes to. A method without pairs leaves the base model as it is."""
    summary = json.loads((folder / "summary.json").read_text())
    rows, models = summary["iterations"], len(METHODS[method][0])
    first = right(folder, 0, known)
    last = right(folder, models, known) if summary["status"] == "completed" else first
    logs = sorted(folder.glob("iterations/*/steps.jsonl"))
    steps = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    return {
        "status": summary["status"],
        "base": sum(first.values()) / len(first),
        "right": sum(last.values()) / len(last),
        "gains": [last[name] - first[name] for name in sorted(first)],
        "answers": sum(row["responses"] for row in rows),
        "judged": sum(row["judgements"] + row["comparisons"] for row in rows),
        "items": sum(row.get("pairs_trained", 0) + row.get("examples_trained", 0) for row in rows),
        "tokens_trained": sum(step["tokens"] for step in steps),
        "kl": rows[-1]["heldout"].get("kl_to_first", {}).get("per_token") if rows else None,
        "seconds": sum(row["seconds"] for row in rows),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| method | right, base -> after | gain [95 %] | seeds | answers | judged | items | tokens | KL to M0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, seeds in found.items():
        runs = list(seeds.values())
        gain = mean_figure([gain for one in runs for gain in one["gains"]])
        mean = {
            name: sum(one[name] or 0 for one in runs) / len(runs) for name in runs[0] if name not in ("status", "gains")
        }
        lines.append(
            f"| {method} | {mean['base']:.3f} -> {mean['right']:.3f} | {gain['value']:+.3f} "
            f"[{gain['low']:+.3f}, {gain['high']:+.3f}] | {len(runs)} | {mean['answers']:.0f} | {mean['judged']:.0f} | "
            f"{mean['items']:.0f} | {mean['tokens_trained']:.0f} | {mean['kl']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    runs = (arguments.runs or Path(tempfile.mkdtemp(prefix="rsrlm-methods-"))).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    asked: list[Prompt] = [one for level, number in PROBLEMS.items() for one in problems(level, number, seed=11)]
    lines = [json.dumps({"id": one.id, "prompt": one.text, **one.data}) + "\n" for one in asked]
    (runs / "problems.jsonl").write_text("".join(lines))
    known = {one.id: one.data["answer"] for one in asked}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found: dict[str, dict[str, Any]] = before.get("methods", {})
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            found.setdefault(method, {})[str(seed)] = measure(method, run(method, seed, runs), known)
            result = {
                "question": "which method helps, with the same number of answers to train on?",
                "command": " ".join(["benchmarks/methods.py", *sys.argv[1:]]),
                "date": date.today().isoformat(),
                "machine": machine(),
                "base": BASE,
                "steps": {name: steps for name, (steps, _) in METHODS.items()},
                "methods": found,
            }
            RESULTS.write_text(json.dumps(result, indent=2) + "\n")
            print(table(found), flush=True)


if __name__ == "__main__":
    main()
