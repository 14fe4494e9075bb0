"""CREAM (2410.12735): the model's own likelihood ranks its responses, and counts as far as two models agree on it.

The reward of a response is log pi_t - log pi_0, summed over its tokens. The best is preferred to the worst with the
probability C (`PreferencePair.target`): C = (tau + 1) / 2 with Kendall's tau between the rewards of the model and those
of the model before. C = 1/2 teaches a margin of 0, and below it the pair is turned around.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from rsrlm.engines import Engines, Model, gather
from rsrlm.judges import verdicts
from rsrlm.judges.base import Context, Origin, judgement_of
from rsrlm.pairing import Candidate, candidates, pair_of
from rsrlm.recipes.base import Batch, Demand, Recipe, respond
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Prompt, Response, Scored, Task, Verdict
from rsrlm.run import Run
from rsrlm.settings.base import Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample, TakingPart
from rsrlm.settings.train import DPO


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Of a response under one model: the sum of its tokens' log-probabilities, in nats, and their number."""

    logprob: float
    tokens: int


Likelihoods = Mapping[str, Likelihood]  # by response id


class LogRatio:
    """What stands for the judge: it takes several models to score a response, so that none is judged alone."""

    name = source = "log-likelihood ratio to M0"
    form = verdicts.Form(label="Reward", scale=(0, 0), prefix="")
    per_response = 1
    max_tokens = 0

    def needs(self, response_tokens: int) -> int:
        return 0

    async def __call__(
        self, engines: Engines, prompt: Prompt, response: Response, origin: Origin, count: int | None = None
    ) -> tuple[Judgement, ...]:
        return ()


class Cream(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: TakingPart = TakingPart()
        train: DPO
        consistency: Literal["iteration", "prompt"] = Field(
            "iteration", description="C is the mean over the iteration's prompts, or that of each prompt alone"
        )

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.judge = LogRatio()

    async def group(self, engines: Engines, task: Task) -> Group:
        indices = range(self.config.sample.responses)
        responses = await gather(respond(engines, self.context, task, i, self.config.sample) for i in indices)
        return group_of(task, responses, (), ())

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        groups = await run.groups(await run.load(before), self, tasks)
        earlier = await run.model_at(max(0, number - 1))
        of_model = {}
        for model in (before, earlier, run.first):
            if model.digest not in of_model:
                of_model[model.digest] = await likelihoods(run, model, groups, self)
        first = of_model[run.first.digest]
        now, then = (
            rewards(of_model[model.digest], None if model.digest == run.first.digest else first)
            for model in (before, earlier)
        )
        return await run.aside(self.ranked, number, groups, before, now, then)

    def ranked(
        self,
        iteration: int,
        groups: Sequence[Group],
        before: Model,
        now: Mapping[str, Verdict],
        then: Mapping[str, Verdict],
    ) -> Batch:
        """The pairs of all groups, once it is known how far the rewards of two models agree."""
        taking_part = {group.id: candidates(group.responses, now, self.config.pair) for group in groups}
        agreed = {
            name: consistency({one.response.id: now[one.response.id] for one in ranked}, then)
            for name, ranked in taking_part.items()
        }
        mean = mean_consistency(agreed)
        made = []
        for group in groups:
            target = mean if self.config.consistency == "iteration" else agreed[group.id]
            judged = [reward_of(response, now[response.id], before) for response in group.responses]
            task = Task(iteration=iteration, prompt=group.prompt)
            made.append(group_of(task, group.responses, judged, pair(group.id, taking_part[group.id], target)))
        known = sum(value is not None for value in agreed.values())
        return replace(self.items(iteration, made), measures={"consistency": {"mean": mean, "prompts": known}})

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        found = super().demand_of(config, prompts)
        return replace(found, requests={"actor": found.requests["actor"]})


async def likelihoods(run: Run, model: Model, groups: Sequence[Group], recipe: Recipe) -> Likelihoods:
    """Of all responses under a model. A response that fills the context to its last token lacks that token."""
    engines = await run.load(model)

    async def one(group: Group) -> dict[str, Likelihood]:
        found = await engines.logprobs(group.responses, recipe.context.room)
        return {
            response.id: Likelihood(logprob=math.fsum(values), tokens=len(values))
            for response, values in zip(group.responses, found, strict=True)
        }

    responses = len(groups) * recipe.config.sample.responses
    run.say(f"log-probabilities of {responses} responses under {model.name}")
    return {name: value for found in await engines.each(one, groups, recipe.width) for name, value in found.items()}


def reward_of(response: Response, reward: Verdict, model: Model) -> Judgement:
    """A reward as a judgement, for tables and signs."""
    return replace(
        judgement_of(
            None,
            reward,
            id=f"{response.id}#0",
            prompt_id=response.prompt_id,
            response_id=response.id,
            index=0,
            role="judge",
            judge=LogRatio.name,
            sampling=None,
        ),
        weight_version=model.name,
    )


def rewards(own: Likelihoods, first: Likelihoods | None) -> dict[str, Verdict]:
    """log pi_t - log pi_0 of each response, summed over its tokens; `first` are its likelihoods under M0.

    M0 has no such reward of its own (it would be 0 for every response). With `first` None, the mean log-probability of
    a token takes its place, as in the authors' code.
    """
    found: dict[str, Verdict] = {}
    for identifier, one in own.items():
        if first is not None:
            reward = one.logprob - first[identifier].logprob
        else:
            reward = one.logprob / one.tokens if one.tokens else math.nan
        found[identifier] = Scored(points=reward) if math.isfinite(reward) else verdicts.LOGPROBS_UNREADABLE
    return found


def consistency(now: Mapping[str, Verdict], before: Mapping[str, Verdict]) -> float | None:
    """C of one prompt, between 0 and 1: (tau + 1) / 2 over the responses that both models rank.

    Kendall's tau-b: two responses that tie under one model say nothing against the other. None where a model ranks
    fewer than two, or all alike.
    """
    both = [
        (one.points, other.points)
        for identifier in now
        if isinstance(one := now[identifier], Scored) and isinstance(other := before.get(identifier), Scored)
    ]
    if not both or any(len(set(ranked)) < 2 for ranked in zip(*both, strict=True)):
        return None
    from scipy.stats import kendalltau

    return (float(kendalltau(*zip(*both, strict=True)).statistic) + 1) / 2


def mean_consistency(found: Mapping[str, float | None]) -> float | None:
    """C of an iteration: the mean over the prompts that have one, by group id; None if none has."""
    known = [value for value in found.values() if value is not None]
    return math.fsum(known) / len(known) if known else None


def pair(group: str, ranked: Sequence[Candidate], target: float | None) -> PreferencePair | NoPair:
    """The best response against the worst, with the probability `target` that this is the right way around."""
    winners = [candidate for candidate in ranked if candidate.may_win]
    if len(ranked) < 2 or not winners:
        return NoPair(reason="no complete response" if ranked and not winners else "fewer than two scored responses")
    if target is None:
        return NoPair(reason="no ranking to compare with")
    chosen = max(winners, key=lambda candidate: candidate.points)
    rejected = min(ranked, key=lambda candidate: candidate.points)
    return pair_of(group, chosen, rejected, target=target)
