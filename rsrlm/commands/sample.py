"""`rsrlm sample`: answers to the prompts of a file, and the best of them by the config's judge."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rsrlm.commands.batch import Asker, LineWork, Row, beside, cost_of, say_cost, through
from rsrlm.commands.engines import without_judge, write_json
from rsrlm.commands.refusing import Choosing, Refusal
from rsrlm.commands.score import Scoring, finish, head, judge_model
from rsrlm.config import Config
from rsrlm.data.responses import Answered, AnsweredLines, GivenResponse
from rsrlm.engines import Engines, gather
from rsrlm.judges import templates
from rsrlm.judges.base import Context, context_of, judge_of
from rsrlm.recipes.base import respond
from rsrlm.records import Role, Task
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.settings.methods import SamplingParams

SHOWN = 5  # ids of prompts that are left out


@dataclass(frozen=True, kw_only=True)
class Respondent:
    """Who answers: the model's name, how it is asked, and how often; `scoring` judges the answers, if anybody does.
    `left_out` are ids of prompts that are too long."""

    name: str
    context: Context
    params: SamplingParams
    number: int
    scoring: Scoring | None
    left_out: set[str] = field(default_factory=set)

    async def rows(self, engines: Engines, line: Answered) -> list[Row]:
        """A row with all answers, or the rows of who judges them."""
        if len(self.context.asked(line.prompt.text)) + self.params.max_tokens > self.context.room:
            self.left_out.add(line.prompt.id)
            return []
        task = Task(iteration=0, prompt=line.prompt)
        made = await gather(respond(engines, self.context, task, index, self.params) for index in range(self.number))
        carried = {**line.carried, "model": self.name}
        if self.scoring:
            candidates = tuple(
                GivenResponse(index=one.index, text=one.text, finish_reason=one.finish_reason, thought=one.thought)
                for one in made
            )
            return await self.scoring.rows(engines, replace(line, candidates=candidates, carried=carried))
        row = {
            **head(line),
            "responses": [one.text for one in made],
            "finish_reasons": [one.finish_reason for one in made],
            "model": self.name,
        }
        return [row | ({"thoughts": [one.thought for one in made]} if self.context.marker else {})]


def sample(
    config: Config, lines: AnsweredLines, out: Path, number: int | None, choosing: Choosing, report: Report
) -> dict[str, Any]:
    """Write the answers to each prompt, `number` of them (sample.responses by default), in the form that `rsrlm judge`
    reads; or the judge's rows about them. The same command goes on after a kill."""
    asker = Asker.of(config if choosing.judges else without_judge(config), out)
    config, context = asker.config, context_of(asker.config, asker.encoder)
    room = context.room - config.sample.max_tokens - len(context.asked(""))
    if room <= 0:
        raise ConfigError(
            f"sample.max_tokens={config.sample.max_tokens} leaves no room for a prompt in engine.max_model_len="
            f"{context.room}; lower the first or raise the second"
        )
    scoring = _scoring(asker, context, lines, choosing, report)
    number = number or config.sample.responses
    asked = Respondent(name=config.model.path, context=context, params=config.sample, number=number, scoring=scoring)
    requests: dict[Role, int] = {"actor": number * len(lines)}
    if scoring:
        requests["judge"] = number * scoring.judge.per_response * len(lines)
    done = through(asker, lines, LineWork(title="sample", rows=asked.rows, requests=requests, width=number), report)
    if asked.left_out:
        first = ", ".join(sorted(asked.left_out)[:SHOWN])
        report.line(f"{len(asked.left_out)} prompts are too long and left out: {first}")
    said = {"model": asked.name, "prompts": len(lines), "too_long": len(asked.left_out), "responses_per_prompt": number}
    if scoring:
        by = {"judge_model": scoring.by, "judge": scoring.judge.name}
        return finish(asker, done, {**said, **by}, scoring.refusal, report)
    cost = cost_of(asker, done)
    report.line(f"answers to {done.tally.rows} prompts, {number} each: {out}")
    say_cost(cost, report)
    write_json(beside(out, ".summary.json"), {**said, **cost})
    return {**said, **cost}


def _scoring(
    asker: Asker, context: Context, lines: AnsweredLines, choosing: Choosing, report: Report
) -> Scoring | None:
    """Who judges the answers, if the user wants to choose among them."""
    if not choosing.judges:
        return None
    judge = judge_of(asker.config.judge, replace(context, encoder=asker.judge_encoder))
    templates.check_data([judge.source], lines.prompts, "--in")
    by = judge_model(asker.config)
    refusal = Refusal.of(choosing, judge.name, by, report)
    return Scoring(judge=judge, by=by, best=choosing.best, refusal=refusal)
