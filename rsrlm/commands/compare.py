"""`rsrlm judge --mode pairwise` and `--mode meta`: responses to a prompt, or judgements of a response, compared two by
two in both orders."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rsrlm import meta_judging
from rsrlm.commands.batch import Asker, LineWork, Row, beside, cost_of, say_cost, through, total
from rsrlm.commands.engines import by_validator, judge_alone, write_json
from rsrlm.commands.score import best_of, head, judge_model, of_response, response_of, text_of
from rsrlm.config import Config
from rsrlm.data.responses import Answered, AnsweredLines, GivenResponse
from rsrlm.engines import JUDGE_PRIORITY, Engines, gather
from rsrlm.judges import templates
from rsrlm.judges.base import Judge, Origin, context_of, judge_of
from rsrlm.judges.pairwise import Match, Pairwise, duel_judge, meta_judge, winner_of
from rsrlm.judges.verdicts import combine_orders
from rsrlm.recipes.comparing import preference
from rsrlm.records import Judgement, Preferred, Prompt, Role, Scored, Unparsed
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError

TOO_FEW = "fewer than two readable judgements"


class Side(NamedTuple):
    """A text that is compared with another: the id of what it is, its number, and its points where it has any."""

    id: str
    number: int
    text: str
    points: float | None = None


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What two texts are compared about. `name` is the id of what they answer or judge, `called` how the template calls
    them, and `fields` what else it prints."""

    judge: Pairwise
    prompt: Prompt
    name: str
    role: Role
    called: tuple[str, str]
    fields: Mapping[str, str]

    def match(self, first: Side, second: Side) -> Match:
        """The two in this order."""
        seed_of = self.judge.context.seed_of
        return Match(
            id=f"{first.id}~{second.number}",
            prompt_id=self.prompt.id,
            response_id=self.name if self.role == "meta" else first.id,
            index=first.number,
            role=self.role,
            fields={**self.fields, self.called[0]: first.text, self.called[1]: second.text},
            seed=seed_of(0, self.name, self.role, f"{first.number}~{second.number}"),
            fence_seed=seed_of(0, self.name, self.role, "fence"),
            priority=JUDGE_PRIORITY,
            data=self.prompt.data,
        )

    async def outcome(self, engines: Engines, one: Side, other: Side) -> Row:
        """Who won, "first", "second" or "tie", which orders that disagree are; how far the first is preferred, from 0
        to 1; and the verdict on each order. Of equal texts nobody is asked."""
        row: Row = {"first": one.number, "second": other.number, "winner": "tie", "share": 0.5, "unreadable": None}
        if one.text == other.text:
            engines.judges.count(self.role, 2)
            return {**row, "orders": []}
        found = await self.judge(engines, [self.match(one, other), self.match(other, one)])
        decided = combine_orders(winner_of(found[0]), winner_of(found[1]))
        share = preference(found[0].verdict, found[1].verdict, soft=True)
        row["winner"], row["unreadable"] = (None, decided.reason) if isinstance(decided, Unparsed) else (decided, None)
        row["share"] = None if isinstance(share, Unparsed) else share
        return {**row, "orders": [order_row(verdict) for verdict in found]}


def order_row(one: Judgement) -> Row:
    """The verdict on two texts in one order, of which A is the one shown first."""
    verdict = one.verdict
    won = (verdict.winner, verdict.share) if isinstance(verdict, Preferred) else (None, None)
    reason = verdict.reason if isinstance(verdict, Unparsed) else None
    return {"text": text_of(one), "winner": won[0], "share": won[1], "unreadable": reason}


@dataclass(frozen=True, kw_only=True)
class OfResponses:
    """The judge of two responses, whose model `by` is."""

    judge: Pairwise
    by: str
    best: bool

    async def rows(self, engines: Engines, line: Answered) -> list[Row]:
        """A row for every two responses, or that of the response with the highest win rate."""
        responses = {one.index: response_of(line.prompt, one) for one in line.candidates}
        sides = [Side(id=responses[one.index].id, number=one.index, text=one.text) for one in line.candidates]
        contest = Contest(
            judge=self.judge, prompt=line.prompt, name=f"00/{line.prompt.id}", role="duel",
            called=("response_a", "response_b"), fields={"instruction": line.prompt.text},
        )  # fmt: skip
        two_by_two = list(combinations(sides, 2))
        found = await gather(contest.outcome(engines, one, other) for one, other in two_by_two)
        by = {"judge": self.judge.name, "judge_model": self.by}
        if not self.best:
            return [
                {**head(line), "responses": [one.text, other.text], **row, **by}
                for (one, other), row in zip(two_by_two, found, strict=True)
            ]
        rates = win_rates(found)
        none = "no comparison that can be read"
        return [
            best_of(
                [
                    {
                        **head(line), **of_response(one), "points": rates.get(one.index), "variance": None,
                        "unreadable": None if one.index in rates else none, **by,
                    }
                    for one in line.candidates
                ]
            )
        ]  # fmt: skip


def win_rates(rows: Iterable[Row]) -> dict[int, float]:
    """By the numbers of the responses: the mean of how far each is preferred to those that it was readably compared
    with, and to itself by a half."""
    shares: dict[int, list[float]] = {}
    for row in rows:
        if row["share"] is not None:
            shares.setdefault(row["first"], [0.5]).append(row["share"])
            shares.setdefault(row["second"], [0.5]).append(1 - row["share"])
    return {index: fmean(found) for index, found in shares.items()}


@dataclass(frozen=True, kw_only=True)
class OfJudgements:
    """The meta-judge of two judgements of a response (2407.19594), and the judge that makes them where a line has
    none."""

    judge: Judge
    meta: Pairwise
    by: str
    collapse: bool

    async def rows(self, engines: Engines, line: Answered) -> list[Row]:
        """A row for every two judgements of each response."""
        found = await gather(self._of(engines, line, candidate) for candidate in line.candidates)
        return [row for rows in found for row in rows]

    async def _of(self, engines: Engines, line: Answered, candidate: GivenResponse) -> list[Row]:
        response = response_of(line.prompt, candidate)
        sides = self._given(candidate, response.id)
        if not candidate.judgements:
            made = await self.judge(engines, line.prompt, response, Origin(iteration=0, name=response.id))
            sides = [
                Side(id=one.id, number=one.index, text=one.text, points=one.verdict.points)
                for one in meta_judging.readable(made, response)
                if isinstance(one.verdict, Scored)
            ]
        if self.collapse:
            sides = list({side.text: side for side in reversed(sides)}.values())[::-1]
        about = {**head(line), **of_response(candidate)}
        by = {"judge": self.meta.name, "judge_model": self.by}
        if len(sides) < 2:
            return [{**about, "winner": None, "share": None, "unreadable": TOO_FEW, "orders": [], **by}]
        contest = Contest(
            judge=self.meta, prompt=line.prompt, name=response.id, role="meta", called=("judgement_a", "judgement_b"),
            fields={"instruction": line.prompt.text, "response": candidate.text},
        )  # fmt: skip
        two_by_two = list(combinations(sides, 2))
        rows = await gather(contest.outcome(engines, one, other) for one, other in two_by_two)
        shown = [[{"text": side.text, "points": side.points} for side in two] for two in two_by_two]
        return [{**about, "judgements": texts, **row, **by} for texts, row in zip(shown, rows, strict=True)]

    @staticmethod
    def _given(candidate: GivenResponse, response: str) -> list[Side]:
        """Those of the line, but for unreadable ones."""
        return [
            Side(id=f"{response}#{index}", number=index, text=one.text, points=one.points)
            for index, one in enumerate(candidate.judgements)
            if one.readable
        ]


def compare_responses(config: Config, lines: AnsweredLines, out: Path, best: bool, report: Report) -> dict[str, Any]:
    """Write who wins of every two responses to a prompt, or the response with the highest win rate. The same command
    goes on after a kill."""
    if min(map(len, lines.sizes)) < 2:
        alone = next(line for line in lines if len(line.candidates) < 2)
        raise ConfigError(f"--in: id {alone.prompt.id!r} has one response, and --mode pairwise compares two or more")
    config, key = judge_alone(by_validator(config))
    asker = Asker.of(config, out, key)
    judge = duel_judge(asker.config, context_of(asker.config, asker.judge_encoder))
    templates.check_data([judge.source], lines.prompts, "--in")
    comparing = OfResponses(judge=judge, by=config.judge.external or config.model.path, best=best)
    requests = total(lines, lambda size: len(size) * (len(size) - 1))
    work = LineWork(
        title="compare", rows=comparing.rows, requests={"duel": requests}, width=-(-requests // len(lines)),
        engines=config.judge.endpoint is None,
    )  # fmt: skip
    return _through(asker, lines, work, comparing.by, judge.name, report)


def compare_judgements(config: Config, lines: AnsweredLines, out: Path, report: Report) -> dict[str, Any]:
    """Write which of every two judgements of a response is the better one. The same command goes on after a kill."""
    step = next((step.config for step in config.planned if hasattr(step.config, "meta")), None)
    if step is None:
        raise ConfigError(f"recipe={config.recipe}: no step has a meta-judge; set recipe=meta_rewarding")
    asker = Asker.of(judge_alone(config)[0], out)
    context = context_of(asker.config, asker.judge_encoder)
    judge, meta = judge_of(step.judge, context), meta_judge(step.meta, context)
    templates.check_data([judge.source, meta.source], lines.prompts, "--in")
    by = judge_model(asker.config) or asker.config.model.path
    comparing = OfJudgements(judge=judge, meta=meta, by=by, collapse=step.meta.collapse)
    each = judge.per_response

    def compared(size: Sequence[int]) -> int:
        return sum((given or each) * ((given or each) - 1) for given in size)

    made, requests = total(lines, lambda size: each * size.count(0)), total(lines, compared)
    work = LineWork(
        title="compare judgements",
        rows=comparing.rows,
        requests={"judge": made, "meta": requests},
        width=max(1, -(-max(made, requests) // len(lines))),
    )
    return _through(asker, lines, work, by, meta.name, report)


def _through(asker: Asker, lines: AnsweredLines, work: LineWork, by: str, judge: str, report: Report) -> dict[str, Any]:
    done = through(asker, lines, work, report)
    counts, cost = done.tally.counts, cost_of(asker, done)
    won = {side: counts[f"winner {side}"] for side in ("first", "second", "tie")}
    clear = counts["order A"] + counts["order B"]
    summary = {
        "model": by, "judge": judge, "prompts": len(lines), "rows": done.tally.rows,
        "unreadable": counts["unreadable"], **won,
        "orders_disagree": counts["orders disagree"],
        "first_position_wins": counts["order A"] / clear if clear else None,
    }  # fmt: skip
    report.line(f"{done.tally.rows} rows, {counts['unreadable']} unreadable: {asker.out}")
    if clear:
        report.line(
            f"first {won['first']}, second {won['second']}, tie {won['tie']} (orders disagree: "
            f"{counts['orders disagree']}); the text shown first wins {counts['order A'] / clear:.3f} of {clear}"
        )
    say_cost(cost, report)
    write_json(beside(asker.out, ".summary.json"), {**summary, **cost})
    return {**summary, **cost}
