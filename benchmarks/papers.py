"""What EFT, length control and position weights do, in small: Meta-Rewarding with the 135M model on 2 cores.

    .venv/bin/python benchmarks/papers.py --trees TREES.jsonl --preferences ALPACA.jsonl --work FOLDER

Stages, each of which a second start of the command finds finished: a run of configs/meta_rewarding_smollm2_cpu.yaml;
the judges of M0 and SFT (and of M1, M2 with --all-models) on trees that no part of the run has seen, once in free text
(who writes a score at all?) and once from the digits; the same on --pairs GPT-4 preferences; and from the run's own
records, without any model: pairs at every rho, and the meta-judge's position bias before and after the weights.
Results: benchmarks/results/papers.json.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import pyarrow.parquet as pq
import scipy.stats

from rsrlm.config import Pair
from rsrlm.pairing import best_against_worst
from rsrlm.records import PreferencePair, Response, Sampling, Scored
from rsrlm.runtime.tools import figure

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "meta_rewarding_smollm2_cpu.yaml"
NAME = "meta-rewarding-cpu"
RHOS = (0.0, 0.1, 0.2, 0.3, 0.4)
TEXT = ("judge.read=text", "judge.judgements=4")
DIGITS = ("judge.read=digits", "judge.judgements=null")


def rsrlm(*arguments: str) -> None:
    print("rsrlm", *arguments, flush=True)
    code = subprocess.run([sys.executable, "-m", "rsrlm.cli", *arguments], check=False).returncode
    if code:
        raise SystemExit(f"exit code {code}; the same command goes on")


def judges(
    run: Path, names: tuple[str, ...], out: Path, data: str, part: str, limit: int | None, reading: tuple[str, ...]
) -> dict[str, Any]:
    """Measures of the run's judges on ranked data; read from the result where it is there."""
    if not (out / "judge.json").exists():
        options = ["--limit", str(limit)] if limit else []
        options += [word for name in names for word in ("--model", name)]
        rsrlm("eval", "judge", str(run), "--data", data, "--part", part, "--out", str(out), *options, *reading)
    return json.loads((out / "judge.json").read_text())["models"]


def interval(values: list[float], seed: int = 0) -> dict[str, Any]:
    """Mean over groups with a percentile bootstrap interval of 95 %, where there are 2 or more."""
    if len(values) < 2:
        return {"mean": fmean(values) if values else None, "low": None, "high": None, "n": len(values)}
    found = scipy.stats.bootstrap((values,), fmean, method="percentile", random_state=seed, vectorized=False)
    low, high = found.confidence_interval
    return {"mean": fmean(values), "low": float(low), "high": float(high), "n": len(values)}


def table(run: Path, iteration: int, name: str) -> list[dict[str, Any]]:
    path = run / "iterations" / f"{iteration:02d}" / f"{name}.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


def rho_study(run: Path, iterations: tuple[int, ...]) -> dict[str, Any]:
    """The same scored groups paired at every rho: characters of chosen and rejected, and their score gap."""
    groups: dict[tuple[int, str], list[Response]] = defaultdict(list)
    points: dict[str, list[float]] = defaultdict(list)
    for iteration in iterations:
        for row in table(run, iteration, "responses"):
            row["sampling"] = Sampling(**row["sampling"])
            for name in ("token_ids", "prompt_token_ids"):
                row[name] = tuple(row[name])
            groups[iteration, row["prompt_id"]].append(Response(**row))
        for row in table(run, iteration, "judgements"):
            if row["points"] is not None:
                points[f"{iteration}:{row['response_id']}"].append(row["points"])
    found = {}
    for rho in RHOS:
        pairs: list[tuple[PreferencePair, dict[str, Response]]] = []
        for (iteration, _), responses in sorted(groups.items()):
            verdicts = {
                one.id: Scored(points=fmean(scores)) for one in responses if (scores := points[f"{iteration}:{one.id}"])
            }
            pair = best_against_worst(responses, verdicts, Pair(rho=rho), iteration)
            if isinstance(pair, PreferencePair):
                pairs.append((pair, {one.id: one for one in responses}))
        found[str(rho)] = {
            "chosen_chars": interval([float(len(by_id[pair.chosen_id].text)) for pair, by_id in pairs]),
            "rejected_chars": interval([float(len(by_id[pair.rejected_id].text)) for pair, by_id in pairs]),
            "score_gap": interval([pair.chosen_score - pair.rejected_score for pair, _ in pairs]),
        }
    return found


def position_bias(run: Path, iteration: int) -> dict[str, Any]:
    """Share of decided comparisons that the judgement shown first won: as counted, with the iteration's weights, and
    by prompt with an interval; and how often both orders name the same judgement."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    by_match: dict[tuple[str, frozenset[str]], list[str]] = defaultdict(list)
    for row in table(run, iteration, "comparisons"):
        first, second = row["id"].rpartition("#")[2].split("~")
        if row["points"] in (0.0, 1.0):
            by_prompt[row["prompt_id"]].append(int(row["points"]))
            winner = first if row["points"] else second
            by_match[row["response_id"], frozenset((first, second))].append(winner)
    decided = [won for wins in by_prompt.values() for won in wins]
    if not decided:
        return {"decided": 0}
    first, second = sum(decided), len(decided) - sum(decided)
    weights = {"first": second / len(decided), "second": first / len(decided)}
    weighted = weights["first"] * first + weights["second"] * second
    both = [winners for winners in by_match.values() if len(winners) == 2]
    return {
        "decided": len(decided),
        "first_position_wins": interval([fmean(wins) for wins in by_prompt.values()]),
        "first_position_share": first / len(decided),
        "weights": weights,
        "first_position_share_weighted": weights["first"] * first / weighted if weighted else None,
        "both_orders_agree": fmean(a == b for a, b in both) if both else None,
        "matches_in_both_orders": len(both),
    }


def yields(run: Path) -> list[dict[str, Any]]:
    """Of each iteration: pairs by kind out of prompts, readable share, scores."""
    rows = json.loads((run / "summary.json").read_text())["iterations"]
    keys = [
        "weight_version",
        "prompts",
        "responses",
        "judgements",
        "judgements_unreadable",
        "comparisons",
        "pairs",
        "pairs_of_kind",
        "no_pair_reasons",
        "mean_score",
        "mean_response_tokens",
        "examples",
        "seconds",
    ]
    return [{key: row.get(key) for key in keys} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", required=True, help="Open Assistant message trees")
    parser.add_argument("--preferences", help="AlpacaEval preferences; left out without it")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; a second start goes on in it")
    parser.add_argument("--all-models", action="store_true", help="judges of M1 and M2 too")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("overrides", nargs="*", help="config overrides of the run")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    run = work / NAME
    summary = run / "summary.json"
    if not summary.exists():
        rsrlm("run", str(CONFIG), f"data.trees={Path(arguments.trees).resolve()}", f"runs={work}", *arguments.overrides)
    elif json.loads(summary.read_text())["status"] != "completed":
        rsrlm("resume", str(run))
    names = ("M0", "SFT", "M1", "M2") if arguments.all_models else ("M0", "SFT")
    measures = {
        "held_out_trees_text": judges(run, names, work / "trees-text", arguments.trees, "evaluation", None, TEXT),
        "held_out_trees_digits": judges(run, names, work / "trees-digits", arguments.trees, "evaluation", None, DIGITS),
    }
    if arguments.preferences:
        measures["gpt4_preferences_digits"] = judges(
            run, names, work / "preferences-digits", arguments.preferences, "all", arguments.pairs, DIGITS
        )
    result = {
        "question": "what do EFT, rho and the position weights do with a 135M model?",
        "command": " ".join(["benchmarks/papers.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "machine": common.machine(),
        "config": CONFIG.read_text(),
        "judges": measures,
        "iterations": yields(run),
        "rho": rho_study(run, (1, 2)),
        "position_bias": {"M1": position_bias(run, 1)},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "papers.json").write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def show(result: dict[str, Any]) -> None:
    for where, models in result["judges"].items():
        for model, found in models.items():
            names = ("readable", "pairwise_accuracy", "agreement", "tie_share", "spearman", "score_length")
            figures = {name: figure(found[name]) for name in names}
            print(where, model, figures)
    for rho, found in result["rho"].items():
        print("rho", rho, {name: value for name, value in found.items()})
    print("position bias", result["position_bias"])
    for row in result["iterations"]:
        print(row)


if __name__ == "__main__":
    random.seed(0)
    main()
