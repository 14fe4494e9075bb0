"""What a page says of one run: its tables and plots, section by section."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rsrlm.report.alarms import DEFAULT_LIMITS, Limit, check
from rsrlm.report.page import charts
from rsrlm.report.page.headline import Standing, sentence, standings
from rsrlm.report.page.measured import Measured
from rsrlm.report.page.past import Past, number_of
from rsrlm.report.signs import SIGNS

Cell = str
Plot = dict[str, str]
# Rows of the learner that a plot of each step shows, where they are there, with their titles.
BY_STEP = {
    "loss": "loss", "margin": "margin of the implicit rewards", "accuracy": "share of pairs ranked right",
    "chosen_logp": "log-probability, nats per text", "kl_per_token": "KL from the reference, nats per token",
    "grad_norm": "gradient norm",
}  # fmt: skip
# Measures of judges against people that a page shows.
PEOPLE = {
    "pairwise_accuracy": "pairwise accuracy", "agreement": "agreement", "tie_share": "ties", "spearman": "Spearman",
    "score_length": "score and length", "first_position": "first one wins", "inconsistent": "orders disagree",
}  # fmt: skip
MOST_HISTOGRAMS = 6


def shown(value: Any, digits: int = 3) -> Cell:
    """A cell of a table; empty for what is not there."""
    if value is None or value == "":
        return ""
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 1000 else digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def with_interval(figure: Mapping[str, Any], percent: bool = False) -> Cell:
    """Such as `2.57 (2.41 to 2.72)`, or the value alone."""
    form = (lambda value: f"{value:.0%}") if percent else (lambda value: f"{value:.2f}")
    if figure.get("value") is None:
        return "" if figure.get("count") is None else f"{figure['count']:g} of {figure['n']}"
    low, high = figure.get("low"), figure.get("high")
    interval = f" ({form(low)} to {form(high)})" if low is not None and high is not None else ""
    return f"{form(figure['value'])}{interval}"


def filled(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """A table without the columns in which nothing stands."""
    kept = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    return {
        "columns": [columns[number] for number in kept],
        "rows": [[row[number] for number in kept] for row in rows],
    }


def plot(title: str, svg: str, note: str = "") -> list[Plot]:
    """None where there is nothing to see."""
    return [{"title": title, "svg": svg, "note": note}] if svg else []


def better(past: Past) -> dict[str, Any]:
    """The first section: did it get better?"""
    found = standings(past)
    return {
        "sentence": sentence(past, found),
        **filled(better_columns(found), [_standing_row(one) for one in found]),
        "plots": [
            *plot(f"Score of held-out answers{intervals(found)}", _scores_plot(found)),
            *plot("Against the model before it, both orders", _duels_plot(found)),
            *plot("Words of held-out answers", _single(found, "words", "words")),
            *plot(f"KL from {found[0].model if found else 'M0'}", _single(found, "kl", "nats per token")),
        ],
    }


def intervals(found: Sequence[Standing]) -> str:
    return ", 95 % intervals" if any(one.fixed.get("low") is not None for one in found) else ""


def better_columns(found: Sequence[Standing]) -> list[str]:
    fixed = found[-1].fixed_judge if found else "M0"
    return ["model", f"score by {fixed}", "by its own judge", "prompts", "win", "tie", "loss", "over", "words",
            "complete", "KL"]  # fmt: skip


def _standing_row(one: Standing) -> list[Cell]:
    own = f"{with_interval(one.own)} by {one.own_judge}" if one.own.get("value") is not None else ""
    shares = [with_interval(one.duel.get(name, {}), percent=True) for name in ("win", "tie", "loss")]
    return [
        one.model, with_interval(one.fixed), own, shown(one.fixed.get("n")), *shares, one.rival,
        shown(one.words, 0), "" if one.complete is None else f"{one.complete:.0%}", shown(one.kl, 4),
    ]  # fmt: skip


def _scores_plot(found: Sequence[Standing]) -> str:
    rows = []
    for one in found:
        for series, figure in (
            (f"by {one.fixed_judge}, who stays", one.fixed),
            ("by the judge of the rewards", one.own),
        ):
            if figure is one.own and (not one.own_judge or one.own_judge == one.fixed_judge != one.model):
                continue
            rows.append({"x": one.model, "y": figure["value"], "series": series, **_ends(figure)})
    return charts.lines(rows, "", "points", ordinal=True) if len(found) > 1 else ""


def _ends(figure: Mapping[str, Any]) -> dict[str, float]:
    return {name: figure[name] for name in ("low", "high") if figure.get(name) is not None}


def _duels_plot(found: Sequence[Standing]) -> str:
    rows = [
        {"label": f"{one.model} over {one.rival}", "series": name, "x": one.duel[name]["value"]}
        for one in found
        for name in ("win", "tie", "loss")
        if one.duel
    ]
    return charts.stacked(rows, "share of the prompts", ("win", "tie", "loss"), charts.OUTCOMES, share=True)


def _single(found: Sequence[Standing], name: str, title: str) -> str:
    rows = [{"x": one.model, "y": getattr(one, name), "series": name} for one in found]
    return charts.lines(rows, "", title, ordinal=True) if sum(row["y"] is not None for row in rows) > 1 else ""


def training(past: Past) -> list[Plot]:
    """Plots by the learner's step, which goes on over the iterations."""
    return [
        one for name, title in BY_STEP.items() for one in plot(f"{title[:1].upper()}{title[1:]}", by_step(past, name))
    ]


def by_step(past: Past, name: str) -> str:
    """One value of the learner's rows, each iteration a series; of chosen texts beside rejected ones."""
    names = {"chosen_logp": "chosen", "rejected_logp": "rejected"} if name == "chosen_logp" else {name: ""}
    return charts.lines([row for key, label in names.items() for row in step_rows(past, key, label)], "step", name)


def step_rows(past: Past, name: str, series: str = "") -> list[dict[str, Any]]:
    """`x` is the number of the step over all iterations."""
    found, before = [], 0
    for number, steps in enumerate(past.steps):
        for index, step in enumerate(steps):
            if (value := number_of(step.get(name))) is not None:
                found.append({"x": before + index + 1, "y": value, "series": series or f"iteration {number}"})
        before += len(steps)
    if len({row["series"] for row in found}) > len(charts.COLOURS):
        return [{**row, "series": "all iterations"} for row in found]
    return found


def pairs(past: Past, found: Sequence[Measured]) -> dict[str, Any]:
    """Scores, pairs, and why prompts gave none."""
    columns = ["iteration", "answered by", "trained", "prompts", "responses", "score", "pairs", "why others gave none",
               "chosen score", "rejected score", "chosen characters", "rejected characters"]  # fmt: skip
    rows = []
    for row in past.rows:
        one = found[row["iteration"]] if row["iteration"] < len(found) else Measured()
        reasons = row.get("no_pair_reasons") or row.get("dropped") or {}
        rows.append(
            [
                shown(row["iteration"]), answered_by(past, row), str(row.get("weight_version") or ""),
                shown(row.get("prompts")),
                shown(row.get("responses")), shown(number_of(row.get("mean_score")), 2), shown(row.get("pairs")),
                "; ".join(f"{why}: {count}" for why, count in reasons.items()),
                *(_mean(side.get("points"), 2) for side in (one.chosen, one.rejected)),
                *(_mean(side.get("characters"), 0) for side in (one.chosen, one.rejected)),
            ]
        )  # fmt: skip
    last = [number for number, one in enumerate(found) if len(one.scores)][-MOST_HISTOGRAMS:]
    scores = {f"iteration {number}": found[number].scores for number in last}
    kinds = [number for number, one in enumerate(found) if one.chosen][-MOST_HISTOGRAMS:]
    gaps = {f"iteration {n}": found[n].chosen["points"] - found[n].rejected["points"] for n in kinds}
    note = "Of a part of the rows: the tables are long." if any(one.parts for one in found) else ""
    return {
        **filled(columns, rows),
        "plots": [
            *plot("Scores of responses", charts.histogram(scores, "points"), note),
            *plot("Chosen less rejected, in points", charts.histogram(gaps, "points")),
        ],
    }


def answered_by(past: Past, row: Mapping[str, Any]) -> str:
    """The model whose responses an iteration has: that of the iteration before, but for the online clock."""
    before = [one for one in past.rows if one["iteration"] < row["iteration"]]
    held = before[-1].get("weight_version") if before else past.first.get("model") or "M0"
    return str(row.get("actor") or held or "")


def _mean(values: Any, digits: int) -> Cell:
    kept = [value for value in (values if values is not None else ()) if value == value]
    return shown(float(sum(kept) / len(kept)), digits) if kept else ""


def judge(past: Past, found: Sequence[Measured]) -> dict[str, Any]:
    """How the judge judges: what it could not say, how far it agrees with itself."""
    columns = ["iteration", "judgements", "each", "unreadable", "spread within a response", "comparisons",
               "unreadable ones", "first one wins", "orders agree", "why unreadable"]  # fmt: skip
    rows = []
    for row in past.rows:
        one = found[row["iteration"]] if row["iteration"] < len(found) else Measured()
        asked, unread = row.get("judgements") or 0, row.get("judgements_unreadable") or 0
        reasons = row.get("unreadable_reasons") or {}
        compared, lost = row.get("comparisons") or 0, row.get("comparisons_unreadable") or 0
        rows.append(
            [
                shown(row["iteration"]), shown(asked), shown(one.judgements_each, 1),
                f"{unread / asked:.0%} of {asked}" if asked else "", shown(one.spread, 2),
                shown(compared or None), f"{lost / compared:.0%} of {compared}" if compared else "",
                *("" if share is None else f"{share:.0%} of {n}" for share, n in (one.first_wins, one.orders_agree)),
                "; ".join(f"{why}: {count}" for why, count in reasons.items()),
            ]
        )  # fmt: skip
    return {**filled(columns, rows), "people": people(past)}


def people(past: Past) -> list[dict[str, Any]]:
    """What `rsrlm eval judge` found: agreement with people."""
    found = []
    for path in sorted((past.folder / "eval").glob("*/*judge.json")) + sorted(past.folder.glob("eval/*/pairwise.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            models = result["models"]
            rows = [
                [model, *(with_interval(measures.get(name) or {}) for name in PEOPLE)]
                for model, measures in models.items()
            ]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
        if not rows:
            continue
        title = f"{result.get('judge', '')} on {result.get('prompts', '')} prompts of {result.get('data', '')}"
        found.append({"title": title, **filled(["model", *PEOPLE.values()], rows)})
    return found


def alarms(past: Past, limits: Mapping[str, Limit] = DEFAULT_LIMITS) -> list[str]:
    """The alarms that the run raised, in words."""
    found = []
    for one in past.alarms:
        name, value, limit = str(one.get("sign")), number_of(one.get("value")), limits.get(str(one.get("sign")))
        said = f"iteration {one.get('iteration')}: {name} is {shown(value)}"
        bound = None if limit is None else limit.stop if one.get("action") == "stop" else limit.warn
        if limit and bound is not None:
            said += f", {limit.direction} {bound:g}: {SIGNS[name].remedy}"
        found.append(f"{said} (ended the run)" if one.get("action") == "stop" else said)
    return list(dict.fromkeys(found))


def signs(past: Past, limits: Mapping[str, Limit] = DEFAULT_LIMITS) -> dict[str, Any]:
    """Signs of trouble by iteration, with their limits; `flags` are the cells for which the run raised an alarm."""
    rows_of = [row for row in past.rows if row.get("signs")]
    raised = {(one.get("sign"), one.get("iteration")) for one in past.alarms}
    # Rounds of the online clock that are not evaluated announce nothing. Limits on points depend on the recipe's scale.
    raised |= {
        (one.sign, row["iteration"])
        for row in rows_of
        for one in check({name: number_of(value) for name, value in row["signs"].items()}, limits)
        if not SIGNS[one.sign].on_points
    }
    rows, flags = [], []
    for name, limit in limits.items():
        values = [number_of(row["signs"].get(name)) for row in rows_of]
        if all(value is None for value in values):
            continue
        bound = next((one for one in (limit.warn, limit.stop) if one is not None), None)
        said = "" if bound is None else f"{limit.direction} {bound:g}"
        rows.append([name, said, *(shown(value) for value in values)])
        flags.append([False, False, *((name, row["iteration"]) in raised for row in rows_of)])
    return {
        "columns": ["sign", "limit", *(f"iteration {row['iteration']}" for row in rows_of)],
        "rows": rows,
        "flags": flags,
    }


def over_each_other(names: Sequence[str], pasts: Sequence[Past]) -> list[Plot]:
    """Plots in which every run is a series."""
    each = list(zip(names, map(standings, pasts), strict=True))
    found = []
    for title, y, value in (
        ("Score of held-out answers by the judge that stays", "points", lambda one: one.fixed["value"]),
        ("Words of held-out answers", "words", lambda one: one.words),
        ("KL from the first model", "nats per token", lambda one: one.kl),
    ):
        rows = [
            {"x": one.after, "y": value(one), "series": name, **(_ends(one.fixed) if y == "points" else {})}
            for name, of_run in each
            for one in of_run
        ]
        found += plot(title, charts.lines(rows, "iterations", y))
    for key, title in BY_STEP.items():
        rows = [row for name, past in zip(names, pasts, strict=True) for row in step_rows(past, key, name)]
        found += plot(f"{title[:1].upper()}{title[1:]}", charts.lines(rows, "step", key))
    return found
