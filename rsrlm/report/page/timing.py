"""Where the time of a run went, and what happened when."""

from collections.abc import Mapping
from typing import Any

from rsrlm.report.page import charts
from rsrlm.report.page.contents import Cell, filled, plot, shown
from rsrlm.report.page.past import Past, number_of

STAGES = ("evaluate first model", "produce", "train", "wait for answers", "choose", "publish", "evaluate")
EVENTS = {
    "engine_up": "engine up", "published": "weights", "iteration_finished": "iteration done", "alarm": "alarm",
    "engine_lost": "engine lost", "engine_restarted": "engine restarted", "engine_left": "engine left",
    "engine_not_up": "engine not up", "producer_lost": "producer lost", "producer_silent": "producer silent",
    "replay": "steps replayed", "run_ended": "end",
}  # fmt: skip
MOST_EVENTS = 400


def times(past: Past) -> dict[str, Any]:
    """Seconds of the stages, tokens per second, and what happened when."""
    bars = [
        {"label": f"iteration {row['iteration']}", "series": stage, "x": number_of(seconds)}
        for row in past.rows[-12:]
        for stage, seconds in (row.get("stage_seconds") or {}).items()
    ]
    others = sorted({bar["series"] for bar in bars} - {*STAGES})
    rows = [
        [
            shown(row["iteration"]), shown(number_of(row.get("seconds")), 1), rate_of(past, row),
            shown(training_rate(past, row["iteration"]), 0), _share(row.get("prefix_cache_hit_share")),
            shown(number_of((row.get("published") or {}).get("seconds")), 2), lag_of(past, row),
        ]
        for row in past.rows
    ]  # fmt: skip
    columns = ["iteration", "seconds", "sampled tokens/s", "trained tokens/s", "prefix cache hits", "publish s"]
    return {
        **filled([*columns, "answered by"], rows),
        "plots": plot("Seconds of each stage", charts.stacked(bars, "seconds", [*STAGES, *others])),
        "timeline": plot("What happened when", charts.timeline(event_rows(past), "minutes since the start")),
    }


def _share(value: Any) -> Cell:
    return "" if number_of(value) is None else f"{value:.0%}"


def rate_of(past: Past, row: Mapping[str, Any]) -> Cell:
    """Tokens of responses in each second of producing: judgements go on meanwhile. On the online clock that stage is
    only what is left to wait for."""
    clock = past.config.get("clock")
    if isinstance(clock, dict) and clock.get("kind") == "online":
        return ""
    tokens, seconds = row.get("mean_response_tokens"), (row.get("stage_seconds") or {}).get("produce")
    return shown(tokens * row["responses"] / seconds, 0) if tokens and seconds and row.get("responses") else ""


def training_rate(past: Past, iteration: int) -> float | None:
    steps = past.steps[iteration] if iteration < len(past.steps) else ()
    tokens, seconds = (sum(number_of(one.get(name)) or 0.0 for one in steps) for name in ("tokens", "seconds"))
    return tokens / seconds if seconds else None


def lag_of(past: Past, row: Mapping[str, Any]) -> Cell:
    """The model that answered; on the online clock it may be behind the learner by some models."""
    actor = str(row.get("actor") or "")
    if not actor:
        return ""
    trained = (str(one.get("weight_version")) for one in past.rows if one["iteration"] < row["iteration"])
    models = [*dict.fromkeys([str(past.first.get("model") or "M0"), *trained])]  # a round without pairs trains none
    behind = len(models) - 1 - models.index(actor) if actor in models else 0
    return f"{actor}, {behind} behind" if behind else actor


def event_rows(past: Past) -> list[dict[str, Any]]:
    started = next((one["t"] for one in past.events if number_of(one.get("t")) is not None), None)
    if started is None:
        return []
    told = [one for one in past.events if one["event"] in EVENTS and number_of(one.get("t")) is not None]
    order = [*EVENTS]
    told = sorted(told[-MOST_EVENTS:], key=lambda one: order.index(one["event"]))
    named = len(told) <= 40
    return [
        {
            "x": (one["t"] - started) / 60,
            "series": EVENTS[one["event"]],
            "label": _said(one, started),
            "short": str(one.get("version") or "") if named else "",
        }
        for one in told
    ]


def _said(one: Mapping[str, Any], started: float) -> str:
    about = [f"{key} {one[key]}" for key in ("version", "iteration", "sign", "pool", "replica", "error", "status") if
             one.get(key) not in (None, "")]  # fmt: skip
    return f"{EVENTS[one['event']]}: {', '.join(about)}, after {(one['t'] - started) / 60:.1f} min"
