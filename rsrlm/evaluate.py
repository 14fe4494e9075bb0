"""Held-out prompts: what a model answers, how the judges score it, and whether it beats the model before it.

Two judges are kept apart and always named: the current model, whose preferences change as it trains, and one that
stays: the config's validator, or the frozen first model M0. Which of two models wins is asked of the latter in both
orders; orders that disagree are a tie. Answers of two models are compared prompt by prompt, where both could be read.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rsrlm.config import Config
from rsrlm.engines import SAMPLE_PRIORITY, Engines, Model, gather
from rsrlm.judges import verdicts
from rsrlm.judges.base import Context, Judge, Origin, mean_verdicts
from rsrlm.judges.pairwise import Match, duel_judge, winner_of
from rsrlm.recipes.base import respond
from rsrlm.records import Group, Judgement, Prompt, Response, Scored, Task, Unparsed
from rsrlm.report import metrics
from rsrlm.run import Run
from rsrlm.settings.methods import SamplingParams

EVALUATION = 1_000_000  # an iteration number of its own: no seed of an evaluation meets one of the training


Keep = Callable[[str, Sequence[Group]], None]


class Evaluation:
    """Evaluates one model after the other on the same prompts."""

    def __init__(
        self, config: Config, context: Context, judge: Judge, validating: Judge, validator_context: Context,
        prompts: Sequence[Prompt],
    ) -> None:  # fmt: skip
        """`judge` gives the rewards, `validating` scores where somebody else validates."""
        self.config, self.context, self.judge, self.validating, self.prompts = (
            config, context, judge, validating, prompts,
        )  # fmt: skip
        self._pairwise = duel_judge(config, validator_context) if config.compares else None

    @property
    def asks(self) -> list[str]:
        """Sources of the templates and names of the functions that it asks with."""
        comparing = [self._pairwise.source] if self._pairwise else []
        return [*self.questions, self.judge.source, self.validating.source, *comparing]

    @property
    def questions(self) -> list[str]:
        """The template that prompts are asked with, if they are not asked as they are."""
        return [self.context.question] if self.context.question else []

    def needs(self) -> dict[str, int]:
        """Tokens of each kind of request beside those of the question."""
        answer = self.config.evaluate.max_tokens
        return {
            "evaluate.max_tokens": len(self.context.asked("")) + answer,
            "the judge of a held-out answer": max(self.judge.needs(answer), self.validating.needs(answer)),
            "the judge of two held-out answers": self._pairwise.needs(2 * answer) if self._pairwise else 0,
        }

    async def answers(self, engines: Engines) -> list[Response]:
        """The model's answers, in the order of the prompts."""
        return await self._asked(engines, self.config.evaluate, "0", "")

    async def samples(self, engines: Engines) -> list[Response]:
        """An answer to each prompt, drawn from the model's whole distribution: temperature 1, without top_p."""
        params = SamplingParams(temperature=1.0, max_tokens=self.config.evaluate.max_tokens)
        return await self._asked(engines, params, "kl", "/kl")

    async def _asked(self, engines: Engines, params: SamplingParams, index: str, suffix: str) -> list[Response]:
        async def one(prompt: Prompt) -> Response:
            group = f"{engines.model.name}/{prompt.id}"
            task = Task(iteration=EVALUATION, prompt=prompt)
            seed = self.context.seed_of(EVALUATION, group, "actor", index)
            return await respond(engines, self.context, task, 0, params, group=group + suffix, seed=seed)

        return await gather(map(one, self.prompts))

    async def scores(self, judge: Judge, engines: Engines, by: str, answers: Sequence[Response]) -> list[Judgement]:
        """Judgements of the answers by `judge`; `by` names it in their ids."""

        async def one(prompt: Prompt, answer: Response) -> tuple[Judgement, ...]:
            name = f"{answer.id}@{by}/{answer.index}"
            origin = Origin(iteration=EVALUATION, name=name, by=f"@{by}")
            return await judge(engines, prompt, answer, origin)

        found = await gather([one(prompt, answer) for prompt, answer in zip(self.prompts, answers, strict=True)])
        return [judgement for judged in found for judgement in judged]

    async def duel(
        self, engines: Engines, by: str, new: Sequence[Response], old: Sequence[Response]
    ) -> tuple[dict[str, Any], list[Judgement]]:
        """Share of the prompts that the new answers win, tie and lose, by the pairwise judge in both orders; and what
        it said."""
        compared = await self._compared(engines, by, new, old)
        outcomes = [outcome_of(orders) for orders in compared]
        readable = [outcome for outcome in outcomes if not isinstance(outcome, Unparsed)]
        found = {
            "judge": f"{self._pairwise.name if self._pairwise else 'none'} by {named(by)}, both orders",
            "n": len(readable),
            "unreadable": len(outcomes) - len(readable),
            "win": share(readable, "first"),
            "tie": share(readable, "tie"),
            "loss": share(readable, "second"),
        }
        return found, [one for orders in compared for one in orders]

    async def outcomes(
        self, engines: Engines, by: str, new: Sequence[Response], old: Sequence[Response]
    ) -> list[verdicts.Decided | Unparsed]:
        """Which answer to each prompt is better, "first" being the new one; orders that disagree are a tie."""
        return [outcome_of(orders) for orders in await self._compared(engines, by, new, old)]

    async def _compared(
        self, engines: Engines, by: str, new: Sequence[Response], old: Sequence[Response]
    ) -> list[Sequence[Judgement]]:
        """Both orders of each prompt, the new answer shown first in the first of them; none where the answers are the
        same."""

        async def one(prompt: Prompt, a: Response, b: Response) -> Sequence[Judgement]:
            if a.token_ids == b.token_ids:
                engines.count("duel", 2)
                return ()
            assert self._pairwise is not None
            matches = [self._match(prompt, a, b, 0, by), self._match(prompt, b, a, 1, by)]
            return await self._pairwise(engines, matches)

        return await gather([one(prompt, a, b) for prompt, a, b in zip(self.prompts, new, old, strict=True)])

    def _match(self, prompt: Prompt, a: Response, b: Response, order: int, by: str) -> Match:
        return Match(
            id=f"{a.id}>{b.id}@{by}",
            prompt_id=prompt.id,
            response_id=a.id,
            index=order,
            role="duel",
            fields={"instruction": prompt.text, "response_a": a.text, "response_b": b.text},
            seed=self.context.seed_of(EVALUATION, prompt.id, "duel", f"{a.id}>{b.id}"),
            fence_seed=self.context.seed_of(EVALUATION, prompt.id, "duel", "fence"),
            priority=SAMPLE_PRIORITY,
            data=prompt.data,
        )


async def evaluate(
    run: Run, evaluation: Evaluation, model: Model, before: Model | None, keep: Keep | None = None
) -> dict[str, Any]:
    """A model on the held-out prompts: its own judgement, that of the validator or else of the frozen M0, and a duel
    with the model before it. `keep` is given what was made, by model."""
    config, prompts = evaluation.config, len(evaluation.prompts)
    if not prompts:
        return {}
    current = config.judge.external or model.name
    first = config.validator.external or run.first.name
    # The same judgements where the judge of the rewards validates.
    by = validates(first) if config.evaluate.judge.external else first
    judged = prompts * evaluation.judge.per_response
    sampled = prompts if before and config.evaluate.kl else 0
    with run.stage(f"held-out {model.name}", {"actor": prompts + sampled, "judge": judged}):
        engines = await run.load(model)
        answers = await evaluation.answers(engines)
        drawn = await evaluation.samples(engines) if before and config.evaluate.kl else []
        own_logprobs = await engines.logprobs(drawn, evaluation.context.room)
        own = await evaluation.scores(evaluation.judge, engines, current, answers)
    frozen: list[Judgement] = []
    compared: list[Judgement] = []
    found = {
        "model": model.name,
        "answers": lengths(answers),
        "score_by_current": {"judge": current, **mean_score(answers, own)},
        "score_by_first": {"judge": first, **mean_score(answers, own)},
    }
    if before or by != current:
        duels = 2 * prompts if before and config.evaluate.duel else 0
        totals = {"judge": prompts * evaluation.validating.per_response, "duel": duels}
        with run.stage(f"held-out {model.name} by {first}", totals):  # type: ignore[arg-type]
            earlier = await evaluation.answers(await run.load(before)) if before and duels else []
            validators = await run.validator(run.first)
            frozen = await evaluation.scores(evaluation.validating, validators, by, answers)
            found["score_by_first"] = {"judge": first, **mean_score(answers, frozen)}
            if before and duels:
                found[f"duel_with_{before.name}"], compared = await evaluation.duel(validators, by, answers, earlier)
    if drawn:
        engines = await run.load(run.first)
        first_logprobs = await engines.logprobs(drawn, evaluation.context.room)
        found["kl_to_first"] = kl_per_token(own_logprobs, first_logprobs)
    if keep:
        await run.aside(keep, model.name, groups_of(evaluation.prompts, answers, [*own, *frozen], compared))
    run.event("evaluated", **found)
    return found


def groups_of(
    prompts: Sequence[Prompt], answers: Sequence[Response], judged: Sequence[Judgement], compared: Sequence[Judgement]
) -> list[Group]:
    """What one model answered and what was said of it, by prompt."""
    judgements: dict[str, list[Judgement]] = defaultdict(list)
    comparisons: dict[str, list[Judgement]] = defaultdict(list)
    for kept, found in ((judgements, judged), (comparisons, compared)):
        for one in found:
            kept[one.prompt_id].append(one)
    return [
        Group(
            id=answer.id.rpartition("/")[0],
            iteration=EVALUATION,
            prompt=prompt,
            responses=(answer,),
            judgements=tuple(judgements[prompt.id]),
            comparisons=tuple(comparisons[prompt.id]),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def outcome_of(orders: Sequence[Judgement]) -> verdicts.Decided | Unparsed:
    """Of a comparison in both orders, or in none: the same answers are a tie."""
    return verdicts.combine_orders(*map(winner_of, orders)) if orders else "tie"


def kl_per_token(
    of_model: Sequence[Sequence[float]], of_first: Sequence[Sequence[float]]
) -> dict[str, float | int | None]:
    """KL(model || first) in nats per token, from the log-probabilities of the model's own samples under both.

    The mean of exp(r) - 1 - r with r = log first - log model (the k3 estimator): no term is negative, and the
    expectation is the divergence if the tokens were drawn at temperature 1 without top_p. None without
    tokens, and where a model gives no finite number.
    """
    ratios = [
        first - own for model, m0 in zip(of_model, of_first, strict=True) for own, first in zip(model, m0, strict=True)
    ]
    finite = bool(ratios) and all(map(math.isfinite, ratios))
    return {
        # Beyond exp(50) the number says no more than that the models have nothing in common.
        "per_token": fmean(math.expm1(min(r, 50.0)) - r for r in ratios) if finite else None,
        "tokens": len(ratios),
    }


def gain_of_scores(
    new: Sequence[Response], new_judged: Sequence[Judgement], old: Sequence[Response], old_judged: Sequence[Judgement]
) -> list[float]:
    """New mean score less old one, in points, of each prompt with a readable score on both sides."""
    scores = [
        {answer.prompt_id: verdicts[answer.id] for answer in answers}
        for answers, verdicts in ((new, mean_verdicts(new, new_judged)), (old, mean_verdicts(old, old_judged)))
    ]
    return [
        one.points - other.points
        for prompt, one in scores[0].items()
        if isinstance(one, Scored) and isinstance(other := scores[1][prompt], Scored)
    ]


def gain_of_duels(outcomes: Sequence[verdicts.Decided | Unparsed]) -> list[float]:
    """1 for a prompt that the new answer wins, 0 for a tie, -1 for a loss; unreadable ones are left out."""
    worth = {"first": 1.0, "tie": 0.0, "second": -1.0}
    return [worth[outcome] for outcome in outcomes if not isinstance(outcome, Unparsed)]


def is_better(gain: metrics.Figure) -> bool:
    """Whether a mean gain is above 0 beyond its interval; one that cannot be estimated is not."""
    return bool(gain["estimable"]) and gain["low"] > 0


def validates(name: str) -> str:
    """In the ids of judgements: the validator is another judge than that of the rewards, though names be the same."""
    return f"validator {name}"


def named(judge_model: str) -> str:
    return judge_model.removeprefix("validator ")


def share(outcomes: Sequence[str], outcome: str) -> float | None:
    return outcomes.count(outcome) / len(outcomes) if outcomes else None


def mean_score(answers: Sequence[Response], judgements: Sequence[Judgement]) -> dict[str, float | int | None]:
    """Mean over the answers with a readable score, and their number."""
    verdicts: Mapping[str, Any] = mean_verdicts(answers, judgements)
    points = [verdict.points for verdict in verdicts.values() if isinstance(verdict, Scored)]
    return {"mean": fmean(points) if points else None, "n": len(points)}


def lengths(answers: Sequence[Response]) -> dict[str, float | None]:
    """Mean length of the answers, and the share that ended by themselves."""
    if not answers:
        return {"tokens": None, "words": None, "complete": None}
    return {
        "tokens": fmean(len(answer.token_ids) for answer in answers),
        "words": fmean(len(answer.text.split()) for answer in answers),
        "complete": fmean(answer.complete for answer in answers),
    }
