"""`rsrlm judge`: the config's judge over a file of responses, which may be of any model or of people."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsrlm.commands.engines import loaded, on_engines, started, work_folder, write_lines
from rsrlm.config import Config
from rsrlm.data import files
from rsrlm.data.prompts import prompt_of
from rsrlm.judges import templates
from rsrlm.judges.base import Origin, context_of, judge_of, mean_verdicts
from rsrlm.recipes.parts import given
from rsrlm.records import Judgement, Prompt, Response, Scored, Task, Verdict
from rsrlm.report.progress import Report
from rsrlm.report.selective import area, risk_coverage, threshold_for
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.settings.base import ConfigError

RISKS = (0.0, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The responses to a prompt, as texts, and which of them are good where the file says so."""

    prompt: Prompt
    texts: Sequence[str]
    good: Sequence[bool | None]

    @property
    def responses(self) -> list[Response]:
        task = Task(iteration=0, prompt=self.prompt)
        return [given(task, text, (), (), str(index), index) for index, text in enumerate(self.texts)]


def read(source: str) -> list[Given]:
    """Lines with `id`, `prompt`, and `response`, or `responses` as a list; `good` (true or false, or a list of them) is
    optional, other keys are for the judge's template. Raises ConfigError with the line."""
    found: dict[str, Given] = {}
    for place, entry in files.records(source, "--data"):
        prompt = prompt_of(entry, place)
        texts = entry.get("responses", [entry["response"]] if "response" in entry else None)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{place}: needs response, a text, or responses, a list of texts")
        good = entry.get("good", [None] * len(texts))
        good = good if isinstance(good, list) else [good]
        if len(good) != len(texts) or not all(one is None or isinstance(one, bool) for one in good):
            raise ConfigError(f"{place}: good must be true or false for each of {len(texts)} responses")
        if prompt.id in found:
            raise ConfigError(f"{place}: id {prompt.id!r} comes twice; ids are unique, and responses may be several")
        own = {name: text for name, text in prompt.data.items() if name not in ("response", "responses", "good")}
        found[prompt.id] = Given(prompt=Prompt(id=prompt.id, text=prompt.text, data=own), texts=texts, good=good)
    if not found:
        raise ConfigError(f"--data={source}: nothing in it; write one JSON object per line")
    return list(found.values())


def judge_file(
    config: Config, data: Sequence[Given], out: Path, threshold: float | None, best: bool, report: Report
) -> None:
    """Write the scored responses. The same command goes on after a kill."""
    config, drawn = started(config, work_folder(out))
    folder, encoder = loaded(config.model, drawn)
    other, judge_encoder = setup.judge_of(config, encoder)
    judge = judge_of(config.judge, context_of(config, judge_encoder))
    templates.check_data([judge.source], [one.prompt for one in data], "--data")

    async def work(run: Run) -> dict[str, Verdict]:
        engines = await run.load(run.first)
        asked = [(one.prompt, response) for one in data for response in one.responses]

        async def one(about: tuple[Prompt, Response]) -> tuple[Response, tuple[Judgement, ...]]:
            return about[1], await judge(engines, *about, Origin(iteration=0, name=about[1].id))

        with run.stage("judge", {"judge": len(asked) * judge.per_response}):
            made = await engines.each(one, asked, judge.per_response)
        return mean_verdicts([response for response, _ in made], [each for _, found in made for each in found])

    # A judge of no tokens asks nobody, and an endpoint is no engine.
    engines = config.judge.tokens > 0 and config.judge.endpoint is None
    models = {config.model.path: folder}
    verdicts = on_engines(config, work_folder(out), models, work, report, drawn=drawn, judge=other, engines=engines)
    rows = [row for one in data for row in rows_of(one, verdicts, threshold, best)]
    write_lines(out, rows)
    report.line(f"{len(rows)} responses, {sum(row['points'] is None for row in rows)} unreadable: {out}")
    _say_risk(rows, report)


def rows_of(one: Given, verdicts: dict[str, Verdict], threshold: float | None, best: bool) -> list[dict[str, Any]]:
    """A row for each response; with `best` that of the best alone, or one without a response where none is readable."""
    rows = []
    for response, good in zip(one.responses, one.good, strict=True):
        verdict = verdicts[response.id]
        read = verdict if isinstance(verdict, Scored) else None
        row: dict[str, Any] = {
            "id": one.prompt.id, "index": response.index, "prompt": one.prompt.text, "response": response.text,
            "points": read.points if read else None, "variance": read.variance if read else None,
            "unreadable": None if read else getattr(verdict, "reason", ""), "good": good,
        }  # fmt: skip
        if threshold is not None:
            row["refused"] = read is None or read.points < threshold
        rows.append(row)
    if not best:
        return rows
    readable = [row for row in rows if row["points"] is not None]
    return (
        [max(readable, key=lambda row: row["points"])] if readable else [{**rows[0], "index": None, "response": None}]
    )


def _say_risk(rows: Sequence[dict[str, Any]], report: Report) -> None:
    """Where the file says what is good: which thresholds keep how much, at which risk."""
    curve = risk_coverage([(r["points"], r["good"]) for r in rows if None not in (r["points"], r["good"])])
    if not curve:
        return
    table = []
    for risk in RISKS:
        found = threshold_for(curve, risk)
        shown = {name: f"{value:.3f}" for name, value in asdict(found).items()} if found else {}
        # Rounded down: what it is read from must not be refused by it.
        shown["threshold"] = f"{math.floor(found.threshold * 1e4) / 1e4:.4f}" if found else "none"
        table.append({"at most": f"{risk:.0%} bad", **shown})
    columns = {"at most": "at most", "threshold": "threshold", "coverage": "coverage", "risk": "risk"}
    report.table(f"Refusal: risk {curve[-1].risk:.3f} without it, area {area(curve):.3f}", table, columns)
