"""What EFT, length control and position weights do, in small: Meta-Rewarding with the 135M model on 2 cores.

    .venv/bin/python benchmarks/papers.py --trees TREES.jsonl --preferences ALPACA.jsonl --work FOLDER

Stages, each of which a second start of the command finds finished: a run of configs/meta_rewarding_smollm2_cpu.yaml;
the judges of M0 and SFT (and of M1, M2 with --all-models) on trees that no part of the run has seen, once in free text
(who writes a score at all?) and once from the digits; the same on --pairs GPT-4 preferences; and from the run's own
records, without any model: pairs at every rho, and the meta-judge's position bias before and after the weights.
A word like prompts.per_iteration=36 at the end goes to the run.
Results: benchmarks/results/papers.json.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import scipy.stats

from rsrlm import meta_judging
from rsrlm.commands.engines import figure
from rsrlm.data.examples import NOT_SAMPLED
from rsrlm.judges.verdicts import mean_points
from rsrlm.pairing import best_against_worst
from rsrlm.recipes.meta_rewarding import Meta
from rsrlm.records import (
    Group,
    Judgement,
    PreferencePair,
    Preferred,
    Prompt,
    Response,
    Scored,
    Unparsed,
    Verdict,
    group_id,
)
from rsrlm.settings.methods import Pair
from rsrlm.store.folder import RunFolder
from rsrlm.store.tables import rows as rows_of

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "meta_rewarding_smollm2_cpu.yaml"
NAME = "meta-rewarding-cpu"
RHOS = (0.0, 0.1, 0.2, 0.3, 0.4)
DIGITS = ("judge.kind=digits",)


def rsrlm(*arguments: str) -> None:
    print("rsrlm", *arguments, flush=True)
    code = subprocess.run([sys.executable, "-m", "rsrlm.cli", *arguments], check=False).returncode
    if code:
        raise SystemExit(f"exit code {code}; the same command goes on")


def in_text(judge: Any) -> tuple[str, ...]:
    """Overrides for 4 judgements in free text, sampled as those of the run's judge: another judge.kind starts from its
    own defaults."""
    sampled = (f"judge.{name}={getattr(judge, name)}" for name in ("temperature", "top_p", "max_tokens"))
    return ("judge.kind=text", "judge.judgements=4", *sampled)


def judges(
    run: Path, names: tuple[str, ...], out: Path, data: str, part: str, limit: int | None, reading: tuple[str, ...]
) -> dict[str, Any]:
    """Measures of the run's judges on ranked data; read from the result where they are there."""
    path = out / "judge.json"
    if not path.exists() or not json.loads(path.read_text())["models"].keys() >= set(names):
        options = ["--limit", str(limit)] if limit else []
        options += [word for name in names for word in ("--model", name)]
        rsrlm("eval", "judge", str(run), "--data", data, "--part", part, "--out", str(out), *options, *reading)
    return json.loads(path.read_text())["models"]


def interval(values: list[float], seed: int = 0) -> dict[str, Any]:
    """Mean with a percentile bootstrap interval of 95 %, where there are 2 values or more."""
    if len(values) < 2:
        return {"mean": fmean(values) if values else None, "low": None, "high": None, "n": len(values)}
    found = scipy.stats.bootstrap((values,), fmean, method="percentile", random_state=seed, vectorized=False)
    low, high = found.confidence_interval
    return {"mean": fmean(values), "low": float(low), "high": float(high), "n": len(values)}


def groups(run: RunFolder, iteration: int) -> list[Group]:
    """What the run made for each prompt, from its Parquet files."""
    responses: dict[str, list[Response]] = defaultdict(list)
    judgements: dict[str, list[Judgement]] = defaultdict(list)
    comparisons: dict[str, list[Judgement]] = defaultdict(list)
    for row in records(run, iteration, "responses"):
        tokens = {name: tuple(row.pop(name)) for name in ("token_ids", "prompt_token_ids")}
        responses[row["prompt_id"]].append(Response(**row, **tokens, sampling=NOT_SAMPLED))
    for name, into in (("judgements", judgements), ("comparisons", comparisons)):
        for row in records(run, iteration, name):
            points, variance, reason = (row.pop(field) for field in ("points", "variance", "unparsed"))
            verdict: Verdict = Unparsed(reason=reason) if reason else Scored(points=points, variance=variance)
            if name == "comparisons" and reason is None:
                verdict = Preferred(winner={1.0: "A", 0.5: "tie", 0.0: "B"}[points])
            tokens = tuple(row.pop("token_ids"))
            into[row["prompt_id"]].append(Judgement(**row, token_ids=tokens, sampling=None, verdict=verdict))
    return [
        Group(
            id=group_id(iteration, name),
            iteration=iteration,
            prompt=Prompt(id=name, text=""),
            responses=tuple(sorted(responses[name], key=lambda one: one.index)),
            judgements=tuple(judgements[name]),
            comparisons=tuple(comparisons[name]),
        )
        for name in sorted(responses)
    ]


def records(run: RunFolder, iteration: int, name: str) -> list[dict[str, Any]]:
    path = run.iteration(iteration) / f"{name}.parquet"
    found = rows_of(path) if path.exists() else []
    return [{key: value for key, value in row.items() if key != "sampling"} for row in found]


def share(counts: list[tuple[float, float]], seed: int = 0) -> dict[str, Any]:
    """The sum of the first over the sum of both, with an interval over the groups that they come from."""

    def ratio(first: Any, second: Any) -> float:
        return float(sum(first) / (sum(first) + sum(second)))

    if len(counts) < 2:
        return {
            "share": ratio(*zip(*counts, strict=True)) if counts else None,
            "low": None,
            "high": None,
            "n": len(counts),
        }
    first, second = zip(*counts, strict=True)
    found = scipy.stats.bootstrap(
        (first, second), ratio, paired=True, method="percentile", random_state=seed, vectorized=False
    )
    low, high = found.confidence_interval
    return {"share": ratio(first, second), "low": float(low), "high": float(high), "n": len(counts)}


def rho_study(made: list[Group], rule: Pair, seed: int) -> dict[str, Any]:
    """The same scored groups paired at every rho: characters of chosen and rejected, and their score gap; and how much
    longer the chosen is than the same group's at rho 0. Of equal scores the shortest is chosen at every rho."""
    chosen: dict[float, dict[str, tuple[int, int, float]]] = {}
    for rho in RHOS:
        rho_rule = rule.model_copy(update={"rho": rho, "ties": "length", "max_chosen_chars": None})
        chosen[rho] = {}
        for group in made:
            verdicts = {
                one.id: mean_points([j.verdict for j in group.judgements if j.response_id == one.id])
                for one in group.responses
            }
            pair = best_against_worst(group.responses, verdicts, rho_rule, group.iteration, seed)
            if isinstance(pair, PreferencePair):
                chars = {one.id: len(one.text) for one in group.responses}
                gap = pair.chosen_score - pair.rejected_score
                chosen[rho][group.id] = (chars[pair.chosen_id], chars[pair.rejected_id], gap)
    return {
        str(rho): {
            "chosen_chars": interval([float(one[0]) for one in pairs.values()]),
            "rejected_chars": interval([float(one[1]) for one in pairs.values()]),
            "score_gap": interval([one[2] for one in pairs.values()]),
            "chosen_chars_more_than_at_0": interval(
                [float(pairs[id][0] - chosen[0.0][id][0]) for id in sorted(pairs.keys() & chosen[0.0].keys())]
            ),
        }
        for rho, pairs in chosen.items()
    }


def position_bias(made: list[Group], rule: Meta, seed: int) -> dict[str, Any]:
    """How often the judgement shown first wins, and what the weights do about it.

    The share after the weights is one half over the comparisons that the weights were counted on, by construction;
    here each prompt's wins are weighed by the wins of the other prompts.
    """
    wins = {group.id: [meta_judging.result(one) for one in group.comparisons] for group in made}
    wins = {id: [won for won in found if won] for id, found in wins.items()}
    wins = {id: found for id, found in wins.items() if found}
    if not wins:
        return {"decided": 0}
    counts = [(found.count(1), found.count(-1)) for found in wins.values()]
    first, second = (sum(column) for column in zip(*counts, strict=True))
    weighed = []
    for a, b in counts:
        others = first + second - a - b
        weighed.append(((second - b) / others * a, (first - a) / others * b) if others else (a / 2, b / 2))
    winners: dict[tuple[str, frozenset[str]], list[str]] = defaultdict(list)
    for group in made:
        for one in group.comparisons:
            shown = one.id.rpartition("#")[2].split("~")
            if meta_judging.result(one):
                winners[group.id, frozenset(shown)].append(shown[meta_judging.result(one) < 0])
    both = [found for found in winners.values() if len(found) == 2]
    weights = meta_judging.position_weights(one for group in made for one in group.comparisons)
    return {
        "decided": first + second,
        "first_position_wins": share(counts),
        "weights": {"first": weights.first, "second": weights.second},
        "first_position_wins_weighted_by_the_others": share(weighed),
        "both_orders_agree": sum(a == b for a, b in both) / len(both) if both else None,
        "matches_decided_in_both_orders": len(both),
        "judge_pairs": pairs_by_weights(made, weights, rule, seed),
    }


def pairs_by_weights(made: list[Group], weights: meta_judging.PositionWeights, rule: Meta, seed: int) -> dict[str, int]:
    """Judge pairs with the iteration's weights and with even ones, and how many of those of both are the same."""
    found = []
    for weighed in (weights, meta_judging.EVEN):
        pairs = {}
        for group in made:
            response = meta_judging.most_uncertain(group.responses, group.judgements, seed)
            if response is not None:
                shown = meta_judging.contestants(meta_judging.readable(group.judgements, response), rule)
                pair = meta_judging.judge_pair((), shown, group.comparisons, weighed, rule, seed)
                if isinstance(pair, PreferencePair):
                    pairs[group.id] = pair
        found.append(pairs)
    weighted, even = found
    shared = weighted.keys() & even.keys()
    return {
        "with_weights": len(weighted),
        "with_even_weights": len(even),
        "in_both": len(shared),
        "with_the_same_chosen": sum(weighted[id].chosen_id == even[id].chosen_id for id in shared),
        "with_the_same_chosen_and_rejected": sum(weighted[id].id == even[id].id for id in shared),
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
    folder, config = RunFolder.open(run)
    text = in_text(config.judge)
    names = ("M0", "SFT", "M1", "M2") if arguments.all_models else ("M0", "SFT")
    measures = {
        "held_out_trees_text": judges(run, names, work / "trees-text", arguments.trees, "evaluation", None, text),
        "held_out_trees_digits": judges(run, names, work / "trees-digits", arguments.trees, "evaluation", None, DIGITS),
    }
    if arguments.preferences:
        measures["gpt4_preferences_digits"] = judges(
            run, names, work / "preferences-digits", arguments.preferences, "all", arguments.pairs, DIGITS
        )
    first, second = (groups(folder, iteration) for iteration in (1, 2))
    result = {
        "question": "what do EFT, rho and the position weights do with a 135M model?",
        "command": " ".join(["benchmarks/papers.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "machine": common.machine(),
        "config": CONFIG.read_text(),
        "judges": measures,
        "iterations": yields(run),
        "rho": rho_study([*first, *second], config.planned[1].config.pair, config.seed),
        "position_bias": position_bias(first, config.planned[1].config.meta, config.seed),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "papers.json").write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def show(result: dict[str, Any]) -> None:
    for where, models in result["judges"].items():
        for model, found in models.items():
            names = (
                "readable",
                "pair_yield",
                "pairwise_accuracy",
                "agreement",
                "tie_share",
                "spearman",
                "score_length",
            )
            figures = {name: figure(found[name]) for name in names}
            print(where, model, figures)
    for rho, found in result["rho"].items():
        print("rho", rho, {name: value for name, value in found.items()})
    print("position bias", result["position_bias"])
    for row in result["iterations"]:
        print(row)


if __name__ == "__main__":
    main()
