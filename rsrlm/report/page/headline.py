"""Did it get better? What the held-out prompts say of each model, and of the last against the first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsrlm.report.metrics import MIN_N, Figure, mean_figure, win_rate
from rsrlm.report.page.past import Past, number_of
from rsrlm.store import tables

LONGER = 1.25  # times as many words: then a judge may have preferred length
FAR = 0.5  # nats per token from the first model, the limit of the sign kl_to_first


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One model on the held-out prompts, `after` so many iterations. `own` is its score by the judge that trains,
    `fixed` that by a judge who stays the same; `duel` has win, tie and loss against `rival`, the model measured before
    it. Where prompts are too few for an interval a figure has a value alone."""

    model: str
    after: int
    own: Mapping[str, Any]
    fixed: Mapping[str, Any]
    own_judge: str
    fixed_judge: str
    rival: str
    duel: Mapping[str, Mapping[str, Any]]
    duel_judge: str
    words: float | None
    tokens: float | None
    complete: float | None
    kl: float | None


def standings(past: Past) -> list[Standing]:
    """Of each model that was measured, in order."""
    entries = [(0, past.first), *((row["iteration"] + 1, row.get("heldout") or {}) for row in past.rows)]
    return [_standing(past.folder, after, entry) for after, entry in entries if entry.get("model")]


def _standing(folder: Path, after: int, entry: Mapping[str, Any]) -> Standing:
    own, fixed = entry.get("score_by_current") or {}, entry.get("score_by_first") or {}
    model, answers = str(entry["model"]), entry.get("answers") or {}
    by_judge = scores_of(folder, model)
    if nobody := function_of(folder, model):  # whatever the model, the same function scores
        own, fixed = {}, {**fixed, "judge": nobody}
    key = next((name for name in entry if name.startswith("duel_with_")), "")
    duel = entry.get(key) or {}
    return Standing(
        model=model,
        after=after,
        own=_score(own, by_judge),
        fixed=_score(fixed, by_judge, validates=True),
        own_judge=str(own.get("judge", "")),
        fixed_judge=str(fixed.get("judge", "")),
        rival=key.removeprefix("duel_with_"),
        duel=_shares(duel),
        duel_judge=str(duel.get("judge", "")),
        words=number_of(answers.get("words")),
        tokens=number_of(answers.get("tokens")),
        complete=number_of(answers.get("complete")),
        kl=number_of((entry.get("kl_to_first") or {}).get("per_token")),
    )


def _score(
    found: Mapping[str, Any], by_judge: Mapping[str, Mapping[str, float]], validates: bool = False
) -> dict[str, Any]:
    """Value, n and, where prompts suffice, the interval."""
    figure = mean_figure([*of_judge(by_judge, str(found.get("judge")), validates).values()])
    return {**figure, "value": number_of(found.get("mean")), "n": int(found.get("n") or 0)}


def _shares(duel: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Win, tie and loss, each with its interval where there are prompts enough."""
    n = int(duel.get("n") or 0)
    shares = {name: number_of(duel.get(name)) for name in ("win", "tie", "loss")}
    if not n or None in shares.values():
        return {}
    counts = [round((shares[name] or 0.0) * n) for name in ("win", "tie", "loss")]
    outcomes = [one for one, count in zip(("first", "tie", "second"), counts, strict=True) for _ in range(count)]
    figures: dict[str, Figure] = win_rate(outcomes)  # type: ignore[arg-type]
    return {name: {**figures[name], "value": value, "n": n} for name, value in shares.items()}


def scores_of(folder: Path, model: str) -> Mapping[str, Mapping[str, float]]:
    """Mean points of each held-out answer of a model, by prompt, for each judge by its name; empty where the run kept
    none."""
    path = folder / "heldout" / model / "judgements.parquet"
    points: dict[str, dict[str, list[float]]] = {}
    if not path.exists():
        return {}
    try:
        for row in tables.rows(path):
            if (value := number_of(row["points"])) is not None:
                judge = judge_in(row["id"])
                points.setdefault(judge, {}).setdefault(row["prompt_id"], []).append(value)
    except (OSError, ValueError, KeyError):  # a broken table, which the samples tell of
        return {}
    return {
        judge: {prompt: sum(values) / len(values) for prompt, values in of_one.items()}
        for judge, of_one in points.items()
    }


def judge_in(name: str) -> str:
    """Who judged, in the id of a held-out judgement: `M1/tea/0#1@M0` is M0's."""
    found = re.match(r".*/\d+#\d+@(.+)$", name)
    return found[1] if found else ""


def of_judge(by_judge: Mapping[str, Mapping[str, float]], judge: str, validates: bool = False) -> Mapping[str, float]:
    """The scores by the judge of this name; a validator of the same name as the judge of the rewards is another one."""
    names = (f"validator {judge}", judge) if validates else (judge,)
    return next((by_judge[name] for name in names if name in by_judge), {})


def function_of(folder: Path, model: str) -> str:
    """The name of the judge where no model judges; else empty."""
    path = folder / "heldout" / model / "judgements.parquet"
    try:
        row = next(iter(tables.rows(path)), None) if path.exists() else None
    except (OSError, ValueError, KeyError):
        return ""
    return str(row["judge"]) if row and not row["weight_version"] else ""


def gain(past: Past, last: Standing) -> Figure | None:
    """Points of the last model's answers less those of the first's, by the judge that stays, prompt by prompt."""
    first = past.models[0]
    by_model = [scores_of(past.folder, model) for model in (first, last.model)]
    if function_of(past.folder, last.model):
        before, after = (next(iter(by_judge.values()), {}) for by_judge in by_model)
    else:
        before, after = (of_judge(by_judge, last.fixed_judge, validates=True) for by_judge in by_model)
    shared = sorted(before.keys() & after.keys())
    return mean_figure([after[prompt] - before[prompt] for prompt in shared]) if shared else None


def sentence(past: Past, found: Sequence[Standing]) -> str:
    """One or two sentences in words: whether the last model is better than the first, as far as can be said."""
    if len(found) < 2:
        if not found:
            return "Nothing can be said yet: no model was measured on held-out prompts (prompts.heldout)."
        return f"Nothing can be said yet: {found[0].model} alone was measured on held-out prompts."
    first, last = found[0], found[-1]
    judge, n = last.fixed_judge or "nobody", int(last.fixed.get("n") or 0)
    if first.fixed["value"] is None or last.fixed["value"] is None:
        return f"Nothing can be said: no readable score by {judge} for both {first.model} and {last.model}."
    scores = (
        f"by {judge}, {last.model} has {last.fixed['value']:.2f} points and {first.model} {first.fixed['value']:.2f}"
    )
    if n < MIN_N:
        return (
            f"Nothing can be said: {n} held-out prompts with a readable score are too few, and {MIN_N} the least for "
            f"an interval (prompts.heldout). For what it is worth, {scores}."
        )
    figure = gain(past, last)
    if figure is None or not figure["estimable"]:
        why = f"only {figure['n']} have both scores" if figure else "the scores prompt by prompt are missing"
        return f"Nothing can be said: for an interval {why}. {_capital(scores)}, on {n} held-out prompts."
    interval = f"95 % interval {figure['low']:+.2f} to {figure['high']:+.2f}, n = {figure['n']}"
    change = f"{figure['value']:+.2f} points ({interval})"
    if figure["low"] > 0:
        said = f"{last.model} is better than {first.model} for the judge that stays ({judge}): {change}."
    elif figure["high"] < 0:
        said = f"{last.model} is worse than {first.model} for the judge that stays ({judge}): {change}."
    else:
        said = f"No difference between {last.model} and {first.model} can be shown: {change} by {judge}."
    return said + "".join(f" {one}" for one in cautions(first, last))


def cautions(first: Standing, last: Standing) -> list[str]:
    """What else may explain a better score."""
    found = []
    if first.words and last.words and last.words / first.words > LONGER:
        found.append(f"Its answers are {last.words / first.words:.1f} times as long, which judges tend to like.")
    if last.fixed_judge == first.model:
        found.append(
            "That judge is the model it started from: agreement with people is measured by `rsrlm eval judge`."
        )
    if last.kl is not None and last.kl > FAR:
        found.append(f"It has moved far from {first.model}: KL {last.kl:.2f} nats per token.")
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
