"""A report as one HTML file that needs nothing else, and as Markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape as html_escape
from importlib import resources
from typing import Any

import jinja2
import pyarrow as pa
import yaml

from rsrlm.report.alarms import DEFAULT_LIMITS, Limit
from rsrlm.report.page import contents, samples, timing
from rsrlm.report.page.headline import sentence, standings
from rsrlm.report.page.measured import Measured, measured
from rsrlm.report.page.past import Past
from rsrlm.report.trackers.base import flat as flat_of
from rsrlm.settings.base import first_line

BROKEN = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)  # of a table that is not as it should be
LATE_MODELS = 6  # whose held-out answers stand beside those of the first
Progress = Callable[[str], None]


def sections(
    past: Past, limits: Mapping[str, Limit] = DEFAULT_LIMITS, say: Progress = lambda _: None
) -> dict[str, Any]:
    """All that a page shows of one run, but for its samples."""
    missing = [*past.missing]
    found = []
    for number in past.iterations:
        say(f"tables of iteration {number}")
        found.append(_measured(past, number, missing))
    say("plots")
    return {
        "name": past.name,
        "status": past.status,
        "reason": past.reason,
        "recipes": recipes_of(past),
        "model": model_of(past),
        "started": started_of(past),
        "done": f"{len(past.rows)} of {planned_of(past)} iterations",
        "missing": missing,
        "alarms": contents.alarms(past, limits),
        "better": contents.better(past),
        "training": contents.training(past),
        "pairs": contents.pairs(past, found),
        "judge": contents.judge(past, found),
        "signs": contents.signs(past, limits),
        "times": timing.times(past),
        "config": yaml.safe_dump(past.config, sort_keys=False, allow_unicode=True),
    }


def _measured(past: Past, number: int, missing: list[str]) -> Measured:
    try:
        return measured(past.folder / "iterations" / f"{number:02d}")
    except BROKEN as error:
        missing.append(f"the tables of iteration {number} cannot be read ({first_line(error)[:120]})")
        return Measured()


def sampled(past: Past, missing: list[str], budget: int = samples.MOST_BYTES) -> dict[str, Any]:
    """Prompts to be read, as a page's script wants them."""
    found, of = [], 0
    for number in past.iterations:
        try:
            some, all_of_it = samples.of_iteration(past.folder / "iterations" / f"{number:02d}", number)
        except BROKEN:
            continue  # told with the tables
        found += samples.within(some, 4 * budget // max(4, len(past.iterations)))  # so that not all are held at once
        of += all_of_it
    kept = samples.within(found, budget)
    models = [*past.models[:1], *past.models[1:][-LATE_MODELS:]]
    try:
        heldout = samples.heldout(past.folder, models)
    except BROKEN:
        missing.append("held-out answers cannot be read")
        heldout = []
    if past.models and not heldout and "held-out answers cannot be read" not in missing:
        missing.append("no held-out answers were kept")
    return {"samples": kept, "of": of, "heldout": heldout, "models": models}


def html(title: str, runs: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None = None) -> str:
    """The page. Each run has `sections` and, under "browser", its `sampled`; what models wrote is escaped."""
    return _environment(html=True).get_template("page.html").render(
        title=title, runs=runs, comparison=comparison, made=_now(), css=_asset("page.css"), js=_asset("page.js")
    )  # fmt: skip


def markdown(title: str, runs: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None = None) -> str:
    """The same in short, for a pull request."""
    return _environment(html=False).get_template("page.md").render(
        title=title, runs=runs, comparison=comparison, made=_now()
    )  # fmt: skip


def _environment(html: bool) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"embedded": embedded, "cell": markdown_cell}
    return made


def embedded(value: Any) -> str:
    """JSON that may stand within a <script> element, whatever texts it holds."""
    text = json.dumps(samples.finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode(errors="replace").decode()  # a lone surrogate has no bytes


def markdown_cell(value: Any) -> str:
    """Text that stays in its cell of a Markdown table and shows as it is."""
    text = html_escape(" ".join(str(value).split()), quote=False).replace("\\", "\\\\")
    for character in "*_`[]|~":
        text = text.replace(character, f"\\{character}")
    for character in "@#$":  # that name somebody, link to an issue or begin a formula
        text = text.replace(character, f"&#{ord(character)};")
    return text


def _asset(name: str) -> str:
    return (resources.files("rsrlm") / "assets" / "report" / name).read_text(encoding="utf-8")


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def recipes_of(past: Past) -> str:
    steps = past.config.get("steps") or [{}]
    default = past.config.get("recipe", "self_rewarding")
    named = [step.get("recipe", default) if isinstance(step, dict) else default for step in steps]
    return ", ".join(dict.fromkeys(map(str, named)))


def model_of(past: Past) -> str:
    model = past.config.get("model")
    return str(model.get("path", "") if isinstance(model, dict) else model or "")


def planned_of(past: Past) -> str:
    return str(past.config.get("iterations", "?"))


def started_of(past: Past) -> str:
    at = next((one["t"] for one in past.events if isinstance(one.get("t"), int | float)), None)
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" if at else ""


def compared(pasts: Sequence[Past]) -> dict[str, Any]:
    """Several runs beside each other: where their configs differ, how they stand, the same plots over each other."""
    names = distinct([past.name for past in pasts])
    rows = []
    for name, past in zip(names, pasts, strict=True):
        last = (standings(past) or [None])[-1]  # type: ignore[list-item]
        row = [name, past.status, recipes_of(past), f"{len(past.rows)} of {planned_of(past)}"]
        if last:
            score, judge = contents.with_interval(last.fixed), last.fixed_judge
            row += [last.model, score, judge, contents.shown(last.words, 0), contents.shown(last.kl, 4)]
        rows.append([*row, *[""] * (9 - len(row))])
    return {
        "columns": ["run", "status", "recipes", "iterations", "last model", "score", "by", "words", "KL"],
        "rows": rows,
        "sentences": [f"{name}: {sentence(past, standings(past))}" for name, past in zip(names, pasts, strict=True)],
        "names": names,
        "differing": differing(names, [past.config for past in pasts]),
        "plots": [*contents.over_each_other(names, pasts)],
    }


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [f"{name} ({number + 1})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def differing(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the keys whose values differ, with the value of each run."""
    flat = [{key: value_of(leaf) for key, leaf in flat_of(config).items()} for config in configs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    absent = "-"
    return [
        [key, *(one.get(key, absent) for one in flat)]
        for key in keys
        if len({one.get(key, absent) for one in flat}) > 1 and key not in ("name", "runs")
    ]


def value_of(leaf: Any) -> str:
    return leaf if isinstance(leaf, str) else json.dumps(leaf, ensure_ascii=False, default=str)
