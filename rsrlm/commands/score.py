"""`rsrlm judge`: a judge over a file of responses, which may be of any model or of people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rsrlm.commands.batch import Asker, Done, LineWork, Row, beside, cost_of, say_cost, through, total
from rsrlm.commands.engines import judge_alone, write_json
from rsrlm.commands.refusing import Choosing, Refusal, refused, show
from rsrlm.config import Config
from rsrlm.data.responses import Answered, AnsweredLines, GivenResponse
from rsrlm.engines import Engines, gather
from rsrlm.judges import templates
from rsrlm.judges.base import Judge, Origin, context_of, judge_of, mean_verdicts
from rsrlm.recipes.parts import given
from rsrlm.records import Judgement, Prompt, Response, Scored, Task
from rsrlm.report.progress import Report


def judge_model(config: Config) -> str | None:
    """Whose judgements they are: None where a function judges."""
    if not config.judge.tokens:
        return None
    return config.judge.external or config.model.path


def response_of(prompt: Prompt, candidate: GivenResponse) -> Response:
    """The record that judges take; its tokens are not known."""
    made = given(Task(iteration=0, prompt=prompt), candidate.text, (), (), str(candidate.index), candidate.index)
    return replace(made, finish_reason=candidate.finish_reason or "stop")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A judge that scores, whose model `by` is, and what is chosen by its scores."""

    judge: Judge
    by: str | None
    best: bool
    refusal: Refusal | None

    async def rows(self, engines: Engines, line: Answered) -> list[Row]:
        """A row for each response, or that of the best."""
        shown = [response_of(line.prompt, one) for one in line.candidates]
        judged = await gather(self.judge(engines, line.prompt, one, Origin(iteration=0, name=one.id)) for one in shown)
        rows = [
            self._row(line, candidate, response, judgements)
            for candidate, response, judgements in zip(line.candidates, shown, judged, strict=True)
        ]
        return [best_of(rows)] if self.best else rows

    def _row(
        self, line: Answered, candidate: GivenResponse, response: Response, judgements: Sequence[Judgement]
    ) -> Row:
        verdict = mean_verdicts([response], judgements)[response.id]
        points = verdict.points if isinstance(verdict, Scored) else None
        each = [judgement_row(one) for one in judgements]
        why = ", ".join(sorted({str(one["unreadable"]) for one in each}))
        return {
            **head(line), **of_response(candidate),
            "points": points,
            "variance": verdict.variance if isinstance(verdict, Scored) else None,
            "unreadable": why if points is None else None,
            **refused(points, self.refusal),
            "judge": self.judge.name, "judge_model": self.by, "judgements": each,
        }  # fmt: skip


def head(line: Answered) -> Row:
    """What a row says of its line."""
    return {"id": line.prompt.id, "prompt": line.prompt.text, **line.carried}


def of_response(candidate: GivenResponse) -> Row:
    """What a row says of its response, but for what judges say."""
    known: Mapping[str, Any] = {"finish_reason": candidate.finish_reason, "thought": candidate.thought}
    said = {name: value for name, value in known.items() if value}
    return {"index": candidate.index, "response": candidate.text, **said, "good": candidate.good}


def text_of(one: Judgement) -> str:
    """What the judge wrote; nothing where the probabilities of its first token were read, whatever that became."""
    return "" if one.sampling and one.sampling.max_tokens == 1 else one.text


def judgement_row(one: Judgement) -> Row:
    verdict = one.verdict
    scored = isinstance(verdict, Scored)
    return {
        "text": text_of(one),
        "points": verdict.points if isinstance(verdict, Scored) else None,
        "unreadable": None if scored else getattr(verdict, "reason", ""),
    }


def best_of(rows: Sequence[Row]) -> Row:
    """The row with the most points, of complete responses before those that were cut; where no judgement can be read,
    the first one, which says so."""
    readable = [row for row in rows if row["points"] is not None]
    if not readable:
        return rows[0]
    return max(readable, key=lambda row: (row.get("finish_reason", "stop") != "length", row["points"]))


def judge_file(config: Config, lines: AnsweredLines, out: Path, choosing: Choosing, report: Report) -> dict[str, Any]:
    """Write the scored responses, and a summary beside them. The same command goes on after a kill."""
    config, key = judge_alone(config)
    asker = Asker.of(config, out, key)
    config = asker.config
    judge = judge_of(config.judge, context_of(config, asker.judge_encoder))
    templates.check_data([judge.source], lines.prompts, "--in")
    by = judge_model(config)
    scoring = Scoring(judge=judge, by=by, best=choosing.best, refusal=Refusal.of(choosing, judge.name, by, report))
    responses = total(lines, len)
    work = LineWork(
        title="judge",
        rows=scoring.rows,
        requests={"judge": responses * judge.per_response},
        width=judge.per_response * -(-responses // len(lines)),
        engines=config.judge.tokens > 0 and config.judge.endpoint is None,
    )
    done = through(asker, lines, work, report)
    said = {"model": by, "judge": judge.name, "prompts": len(lines), "responses": responses}
    return finish(asker, done, said, scoring.refusal, report)


def finish(
    asker: Asker, done: Done, said: Mapping[str, Any], refusal: Refusal | None, report: Report
) -> dict[str, Any]:
    """Say what scoring came to, and write it beside the result."""
    tally, out = done.tally, asker.out
    unreadable, cost = tally.counts["unreadable"], cost_of(asker, done)
    refusing = f", {tally.counts['refused']} refused" if refusal else ""
    report.line(f"{tally.rows} responses, {unreadable} unreadable{refusing}: {out}")
    summary = {**said, "rows": tally.rows, "unreadable": unreadable, "mean_points": tally.mean_points}
    if found := show(refusal, tally, out, report):
        summary["refusal"] = found
    say_cost(cost, report)
    write_json(beside(out, ".summary.json"), {**summary, **cost})
    return {**summary, **cost}
