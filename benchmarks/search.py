"""Is search worth its tokens? AlphaLLM's tree beside sampling, on generated arithmetic, before and after training.

    .venv/bin/python benchmarks/search.py                    # 48 problems; a quarter of an hour on 2 cores
    .venv/bin/python benchmarks/search.py --runs FOLDER      # keeps the run and the answers, and goes on with them

The model answers problems greedily; by the majority of N samples; by the best of N samples according to its own
critic (p(True) of the final answer); and by the best leaf of a search with the same critic. N is what the tokens of
the searches buy. Then it is trained on the searches of other problems (recipe alpha_llm), and all of it comes again.
The shares of right answers are of the last number of an answer.

Results: benchmarks/results/search.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from common import RESULTS, machine

from rsrlm.commands.engines import loaded, on_engines, started
from rsrlm.config import Config, load
from rsrlm.data.arithmetic import problems
from rsrlm.engines import Engines, gather
from rsrlm.judges.answers import AnswerForm, FinalAnswer, find
from rsrlm.judges.base import Context, Origin, context_of
from rsrlm.recipes.alpha_llm import AlphaLLM
from rsrlm.recipes.base import respond
from rsrlm.recipes.search import ranked_leaves
from rsrlm.records import Prompt, Response, Scored, Task
from rsrlm.report.metrics import mean_figure
from rsrlm.report.progress import Report
from rsrlm.run import Run
from rsrlm.settings.methods import SamplingParams

ASKED = 900_000  # an iteration number of its own: no seed meets one of the training
READ = AnswerForm(where="end", value="number")
CONFIG: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "recipe": "alpha_llm",
    "iterations": 1,
    "prompts": {"per_iteration": 48, "heldout": 0},
    "sample": {"temperature": 0.8, "max_tokens": 64},
    "line": {"max_tokens": 32},
    "search": {"simulations": 12, "distance": 8, "rollouts": 2},
    "width": {"root_least": 4, "least": 2, "most": 4},
    "judge": {"kind": "true_false", "min_mass": 0.0},
    "least": 0.5,
    "train": {"lr": 5.0e-6, "lr_final": 5.0e-7, "pairs_per_step": 8, "micro_batch": 4},
    "engine": {"max_model_len": 1024, "max_num_seqs": 48},
    "evaluate": {"duel": False},
}


def value(response: Response) -> str | None:
    found = find(response.text, READ) if response.complete else None
    return found.value if isinstance(found, FinalAnswer) else None


def majority(responses: Sequence[Response]) -> str | None:
    """The most frequent final answer, of equally frequent ones the first."""
    votes = Counter(found for one in responses if (found := value(one)) is not None)
    return votes.most_common(1)[0][0] if votes else None


async def judged(engines: Engines, recipe: AlphaLLM, task: Task, responses: Sequence[Response]) -> str | None:
    """The answer that the critic thinks most of."""

    async def one(response: Response) -> float:
        if not response.complete:
            return -1.0
        (found,) = await recipe.outcome(engines, task.prompt, response, Origin(iteration=ASKED, name=response.id))
        return found.verdict.points if isinstance(found.verdict, Scored) else -1.0

    points = await gather(map(one, responses))
    return value(responses[points.index(max(points))])


async def compared(run: Run, name: str, recipe: AlphaLLM, context: Context, asked: Sequence[Prompt]) -> dict[str, Any]:
    """Each way's answers with the weights of one model, and what they took."""
    engines = await run.load(await run.pools.model(name))
    tasks = [Task(iteration=ASKED, prompt=prompt) for prompt in asked]
    greedy = SamplingParams(temperature=0.0, max_tokens=recipe.config.sample.max_tokens)
    first = await engines.each(lambda task: respond(engines, context, task, 0, greedy), tasks, 1)
    searched = await engines.each(lambda task: recipe.search(engines, task), tasks, recipe.width)
    tokens = fmean(one.tokens for one in searched)
    number = max(1, round(tokens / fmean(len(one.token_ids) for one in first)))

    async def samples(task: Task) -> list[Response]:
        indices = range(1, number + 1)
        return await gather(respond(engines, context, task, index, recipe.config.sample) for index in indices)

    sampled = await engines.each(samples, tasks, number)
    best = [await judged(engines, recipe, task, found) for task, found in zip(tasks, sampled, strict=True)]
    leaves = [ranked_leaves(one.responses, one.outcomes)[:1] for one in searched]
    answers = {
        "greedy": [value(one) for one in first],
        "one sample": [value(found[0]) for found in sampled],
        "majority of N": [majority(found) for found in sampled],
        "best of N by the critic": best,
        "search": [value(leaf[0][0]) if leaf else None for leaf in leaves],
        "any of N (no critic could do better)": [
            prompt.data["answer"] if prompt.data["answer"] in map(value, found) else None
            for prompt, found in zip(asked, sampled, strict=True)
        ],
    }
    right = {
        way: [float(one == prompt.data["answer"]) for one, prompt in zip(given, asked, strict=True)]
        for way, given in answers.items()
    }
    return {"N": number, "tokens_of_a_search": tokens, "right": {way: mean_figure(each) for way, each in right.items()}}


def table(found: dict[str, dict[str, Any]]) -> str:
    ways = next(iter(found.values()))["right"]
    lines = [f"| right answers | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for way in ways:
        figures = [one["right"][way] for one in found.values()]
        lines.append(
            f"| {way} | " + " | ".join(f"{f['value']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for f in figures) + " |"
        )
    return "\n".join(lines) + f"\nN: {', '.join(str(one['N']) for one in found.values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--problems", type=int, default=48)
    arguments = parser.parse_args()
    runs = (arguments.runs or Path(tempfile.mkdtemp(prefix="rsrlm-search-"))).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    every = [*problems(1, 80, seed=21), *problems(2, 200, seed=21)]
    asked, trained = every[::3][: arguments.problems], [one for at, one in enumerate(every) if at % 3]
    lines = [json.dumps({"id": one.id, "prompt": one.text, **one.data}) + "\n" for one in trained]
    (runs / "problems.jsonl").write_text("".join(lines))
    prompts = {**CONFIG["prompts"], "path": str(runs / "problems.jsonl")}
    path = runs / "search.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "name": "search", "runs": str(runs), "prompts": prompts}))
    subprocess.run(
        [sys.executable, "-m", "rsrlm.cli", "run", str(path), "--or-resume", "--final-is-success"], check=True
    )
    plain = load(path)
    config, drawn = started(plain, runs / "asked")
    folder, encoder = loaded(config.model, drawn)
    found = on_engines(
        config, runs / "asked", {"M0": folder, "M1": runs / "search" / "models" / "M1"},
        lambda run: both(run, config, context_of(config, encoder), asked), Report(), drawn=drawn,
    )  # fmt: skip
    print(table(found))
    result = {
        "question": "is search worth its tokens?", "command": " ".join(["benchmarks/search.py", *sys.argv[1:]]),
        "date": date.today().isoformat(), "machine": machine(), "config": CONFIG, "problems": len(asked),
        "training": json.loads((runs / "search" / "summary.json").read_text())["iterations"][0]["search"],
        "models": found,
    }  # fmt: skip
    (RESULTS / "search.json").write_text(json.dumps(result, indent=2) + "\n")


async def both(run: Run, config: Config, context: Context, asked: Sequence[Prompt]) -> dict[str, Any]:
    recipe = AlphaLLM(config.planned[0].config, context, context)
    found = {}
    for name in ("M0", "M1"):
        with run.stage(name, {}):
            found[name] = await compared(run, name, recipe, context, asked)
        print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
