"""A whole iteration of rsrlm beside the scripts that people chain for one: seconds by stage.

    make bench-env                                                # TRL 1.16 and vLLM in .venv-bench
    .venv/bin/python benchmarks/chain.py [CONFIG [KEY.SUB=VALUE]...] [--rounds 3]

rsrlm's side is its command line, `rsrlm run CONFIG` over one iteration without held-out prompts, in a process of its
own. The other side is four processes of .venv-bench one after the other (chain_stages.py): generate with vLLM's
`LLM.generate`; judge with it, and pair; TRL's `DPOTrainer` with references computed beforehand, and save; load what was
saved into vLLM. Both end when an engine holds the new weights.

Both have the same prompts, K, N, limits of tokens, seeds, model, precision, threads and engine arguments (prefix caches
on), so that the same answers, scores and pairs come out; how far they do is said, and how far the losses of the steps
are apart. The chain has vLLM in the process of each script, cores unpinned and no optimizer saved: all of that is
faster than the defaults. rsrlm keeps its journal, tables and report, which the chain has nothing of.

`with start-ups` is the wall time of everything. `without` leaves out, on either side, everything before a process works
and after it has: imports, Ray, engines, loading the model that is trained, and the end. Loading the new weights is a
start to the chain, so that it costs the chain nothing there, while rsrlm's `load` counts.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as parquet
import typer
from common import ENVIRONMENT, RESULTS, head, shown, spread, write
from iteration import GIB, Watcher, watched_run

from rsrlm import config as configs
from rsrlm.config import Config
from rsrlm.report.progress import Report
from rsrlm.runtime.engine import cpu_environment, engine_arguments
from rsrlm.runtime.setup import Prepared, prepare

QUESTION = "seconds of a whole iteration of rsrlm over those of the scripts that people chain for one, by stage"
HERE = Path(__file__).resolve().parent
STAGES = ("generate", "judge", "train", "load")
WORK = ("generate", "judge", "pair", "references", "steps", "save", "load")
STARTS = ("start", "end")
IMPORTS = "import datasets, torch, transformers, vllm"
DEFAULTS = ("prompts.per_iteration=12",)
FIXED = (
    "name=chain",
    "iterations=1",
    "prompts.heldout=0",
    "judge.fence_salt=''",
    "train.checkpoint_every_steps=1000000",
)


def resolved(path: str, overrides: Sequence[str], runs: str) -> tuple[Config, list[str]]:
    """The config, and the overrides that make it."""
    everything = [*DEFAULTS, *overrides, *FIXED, f"runs={runs}"]
    config = configs.load(path, everything)
    if config.judge.kind not in ("digits", "structured", "text") or config.judge.external:
        raise SystemExit(f"judge.kind={config.judge.kind}: the chain judges by digits, structured or text, by itself")
    if config.steps or config.recipe != "self_rewarding":
        raise SystemExit(f"{path}: the chain knows one method; take a config without steps and recipe")
    return config, everything


def work_of(prepared: Prepared, micro_batch: int) -> dict[str, Any]:
    """What the chain is to do: plain data."""
    config, one = prepared.config, prepared.iterations[0]
    recipe: Any = one.recipe
    judge, context = recipe.judge, recipe.context
    sampling = judge.sampling(0)
    prompts = []
    for task in one.tasks:
        responses = []
        for index in range(config.sample.responses):
            name = f"{task.id}/{index}"
            seeds = [context.seed_of(0, name, "judge", str(number)) for number in range(judge.per_response)]
            fence = context.fence(context.seed_of(0, name, "judge", "fence"))
            seed = context.seed_of(0, task.prompt.id, "actor", str(index))
            responses.append({"seed": seed, "judge_seeds": seeds, "fence": fence})
        prompts.append({"id": task.id, "text": task.prompt.text, "responses": responses})
    return {
        "model": str(prepared.model),
        "engine": engine_arguments(config, str(prepared.model)),
        "sampling": {key: getattr(config.sample, key) for key in ("temperature", "top_p", "max_tokens")},
        "judge": {
            "template": judge.source,
            "prefix": judge.prefix,
            "labels": list(judge.form.labels) if judge.labels else [],
            "min_mass": getattr(config.judge, "min_mass", 0.0),
            "regex": judge.regex,
            "sampling": {key: getattr(sampling, key) for key in ("temperature", "top_p", "max_tokens")},
        },
        "prompts": prompts,
        "order": f"pairs {config.seed} 0",
        "train": {
            **{key: getattr(config.train, key) for key in ("lr", "lr_final", "beta", "epochs", "pairs_per_step")},
            "micro_batch": micro_batch,
        },
    }  # fmt: skip


# -- the two sides -----------------------------------------------------------------------------------------------------


class Moments:
    """When the first path of each pattern was there, in seconds since 1970."""

    def __init__(self, folder: Path, patterns: Mapping[str, str]) -> None:
        self.found: dict[str, float] = {}
        self._folder, self._patterns = folder, patterns
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            for name, pattern in self._patterns.items():
                if name not in self.found and any(self._folder.glob(pattern)):
                    self.found[name] = time.time()

    def __enter__(self) -> "Moments":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def rsrlm_side(path: str, overrides: list[str], folder: Path, log: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "rsrlm.cli", "run", path, *overrides]
    # The ranks have the model, and begin, when the folder of the reference's log-probabilities is there.
    patterns = {"begun": "checkpoints/*-reference.tmp", "referred": "checkpoints/*-reference"}
    with Moments(folder, patterns) as moments:
        watcher, started, ended = watched_run(command, log)
    row = json.loads((folder / "summary.json").read_text())["iterations"][0]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    begin = next(one["t"] for one in events if one["event"] == "iteration_finished") - row["seconds"]
    spent, learner = row["stage_seconds"], row["learner"]
    produced = begin + spent["produce"]
    trained = produced + spent["train"]
    begun, referred = moments.found["begun"], moments.found["referred"]
    seconds = {
        "start": begin - started + begun - produced,
        "generate": spent["produce"],  # judging and pairing go on beside it
        "references": referred - begun,
        "steps": learner["train_seconds"],
        "save": trained - referred - learner["train_seconds"],
        "load": spent["publish"],
        "end": ended - trained - spent["publish"],
    }
    steps = [json.loads(line) for line in (folder / "iterations/00/steps.jsonl").read_text().splitlines()]
    answers = parquet.read_table(folder / "iterations/00/responses.parquet", columns=["id", "token_ids"]).to_pylist()
    pairs = parquet.read_table(folder / "iterations/00/pairs.parquet", columns=["id"]).to_pylist()
    return {
        **figures(seconds, ended - started, [watcher]),
        "learner start": begun - produced,
        "answers": {one["id"]: one["token_ids"] for one in answers},
        "pairs": [one["id"] for one in pairs],
        "losses": [one["loss"] for one in steps],
    }


def chain_side(python: Path, work: Mapping[str, Any], environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    file = folder / "WORK.json"
    file.write_text(json.dumps(work))
    seconds: dict[str, float] = defaultdict(float)
    stages, watchers, wall = {}, [], 0.0
    facts: dict[str, Any] = {}
    settings = [f"{name}={value}" for name, value in environment.items()]
    for stage in STAGES:
        command = ["env", *settings, str(python), str(HERE / "chain_stages.py"), stage, str(file)]
        watcher, started, ended = watched_run(command, folder / f"{stage}.log")
        said = json.loads((folder / f"{stage}.json").read_text())
        marks, before = said.pop("marks"), started
        own: dict[str, float] = defaultdict(float)
        for what, at in [*marks, ("end", ended)]:
            own[what] += at - before
            before = at
        for what, value in own.items():
            seconds[what] += value
        stages[stage] = {what: round(value, 3) for what, value in own.items()}
        facts |= said
        watchers.append(watcher)
        wall += ended - started
    answers = json.loads((folder / "responses.json").read_text())
    return {
        **figures(seconds, wall, watchers),
        "processes": stages,
        "answers": {one["id"]: one["token_ids"] for one in answers},
        "pairs": facts["pairs"],
        "losses": facts["losses"],
    }


def figures(seconds: Mapping[str, float], wall: float, watchers: Sequence[Watcher]) -> dict[str, Any]:
    samples = [sample for watcher in watchers for sample in watcher.samples]
    return {
        "wall_s": round(wall, 3),
        "work_s": round(sum(seconds.get(what, 0.0) for what in WORK), 3),
        "seconds": {what: round(seconds.get(what, 0.0), 3) for what in (*WORK, *STARTS)},
        "private_gib": max(sample.total_private for sample in samples) / GIB,
        "other_cores": sum(sample.cpu["other"] for sample in samples) / sum(sample.seconds for sample in samples),
    }


# -- rounds ------------------------------------------------------------------------------------------------------------


def one_round(number: int, path: str, overrides: Sequence[str], peer: Path, micro_batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rsrlm-chain-") as scratch:
        config, everything = resolved(path, overrides, f"{scratch}/runs")
        chained = Path(scratch) / "chain"
        chained.mkdir()
        work = work_of(prepare(config), micro_batch)
        environment = {**ENVIRONMENT, **cpu_environment(config.engine), "HF_HUB_OFFLINE": "1"}
        sides = {
            "rsrlm": lambda: rsrlm_side(path, everything, config.folder, Path(scratch) / "rsrlm.log"),
            "chain": lambda: chain_side(peer, work, environment, chained),
        }
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        found = {name: sides[name]() for name in order}
    ours, theirs = found["rsrlm"], found["chain"]
    return {
        "round": number,
        "order": order,
        "ratio with start-ups": theirs["wall_s"] / ours["wall_s"],
        "ratio without": theirs["work_s"] / ours["work_s"],
        **agreement(ours, theirs),
        **found,
    }


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Whether both did the same; their answers are not kept."""
    mine, other = ours.pop("answers"), theirs.pop("answers")
    if mine.keys() != other.keys():
        raise SystemExit("the two sides answered other prompts")
    both = set(ours["pairs"]) & set(theirs["pairs"])
    return {
        "answers": len(mine),
        "answers equal": sum(mine[key] == other[key] for key in mine) / len(mine),
        "pairs": [len(ours["pairs"]), len(theirs["pairs"])],
        "pairs equal": len(both) / max(len(ours["pairs"]), len(theirs["pairs"])),
        "largest difference of losses": max(
            abs(one - another) for one, another in zip(ours["losses"], theirs["losses"], strict=False)
        ),
    }


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    both = ("rsrlm", "chain")
    return {
        **{name: spread([one[name] for one in rounds]) for name in ("ratio with start-ups", "ratio without")},
        "answers equal": min(one["answers equal"] for one in rounds),
        "pairs equal": min(one["pairs equal"] for one in rounds),
        "seconds": {
            side: {
                what: spread([one[side]["seconds"][what] for one in rounds]) for what in (*WORK, *STARTS)
            } for side in both
        },
        "private_gib": {side: spread([one[side]["private_gib"] for one in rounds]) for side in both},
        "other_cores": spread([one[side]["other_cores"] for one in rounds for side in both]),
    }  # fmt: skip


def show(rounds: Sequence[Mapping[str, Any]]) -> None:
    def column(side: str, whats: Iterable[str]) -> str:
        return shown([sum(one[side]["seconds"][what] for what in whats) for one in rounds], 1)

    table = {
        "generate, judge, pair": WORK[:3],
        "references": ["references"],
        "steps": ["steps"],
        "save": ["save"],
        "load again": ["load"],
        "all of these": WORK,
        "starts and ends": STARTS,
        "everything": (*WORK, *STARTS),
    }
    rows = [{"what": name, **{side: column(side, of) for side in ("rsrlm", "chain")}} for name, of in table.items()]
    report = Report()
    headings = {"what": "", "rsrlm": "rsrlm, s", "chain": "the chain, s"}
    report.table(f"Median of {len(rounds)} rounds (range)", rows, headings)
    for name in ("ratio with start-ups", "ratio without", "answers equal", "pairs equal"):
        report.line(f"{name}: {shown([one[name] for one in rounds], 2)}")
    report.line(f"largest difference of losses: {max(one['largest difference of losses'] for one in rounds):.1e}")
    others = [one[side]["other_cores"] for one in rounds for side in ("rsrlm", "chain")]
    report.line(f"cores of others: {shown(others, 2)}")


def main(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]")] = "configs/quickstart.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    micro_batch: Annotated[int, typer.Option(help="TRL's")] = 1,
    peer: Annotated[Path, typer.Option(help="Python that has TRL and vLLM")] = HERE.parent / ".venv-bench/bin/python",
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    if not peer.exists():
        raise SystemExit(f"{peer} is not there: make bench-env")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = f"chain_{Path(config).stem}"
    data = {**head(QUESTION), "config": config, "micro_batch": micro_batch}
    for python, more in ((sys.executable, ", deepspeed, ray"), (str(peer), ", trl")):
        subprocess.run([python, "-c", IMPORTS + more], check=True, capture_output=True)  # into the page cache
    done: list[dict[str, Any]] = []
    for number in range(rounds):
        done.append(one_round(number, config, overrides or [], peer, micro_batch))
        write(out, name, {**data, "summary": summary(done), "rounds": done})
        ratios = [f"{key} {done[-1][key]:.2f}" for key in ("ratio with start-ups", "ratio without")]
        Report().line(f"round {number}: {', '.join(ratios)}")
    show(done)
    Report().line(f"result: {out / (name + '.json')}")


if __name__ == "__main__":
    typer.run(main)
