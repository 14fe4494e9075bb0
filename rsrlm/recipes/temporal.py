"""Temporal Self-Rewarding (2508.06026v1): rejected responses of the first model, chosen ones of a model trained ahead.

Chosen and rejected of one improving model become ever more alike. So the rejected response is the worst of the first
model's if that is worse than the model's own ("anchored rejection"), and the chosen one the best of a model that is
trained on these pairs and then given up, if that is better ("future-guided chosen"). The model scores all of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from rsrlm.engines import Engines, Model, gather
from rsrlm.judges.base import Origin, mean_verdicts
from rsrlm.pairing import POINTS, TIE, Candidate, candidates, pair_of
from rsrlm.recipes.base import Batch, Demand, respond
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Response, Role, Task
from rsrlm.run import Run
from rsrlm.settings.base import Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample, TakingPart
from rsrlm.settings.train import DPO


class Temporal(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: TakingPart = TakingPart()
        train: DPO
        future: bool = Field(True, description="train a model ahead, and choose among its responses too")

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        count = self.config.sample.responses
        past = await self.sampled(run, run.first, tasks, count)
        engines = await run.load(before)
        own = await run.groups(engines, self, tasks)
        groups = await self.joined(run, engines, tasks, own, past)
        batch = await self.from_groups(run, number, groups)
        if not self.config.future or not batch.items:
            return batch
        ahead = await run.train(before, batch.items, self.config.train, f"{before.name}.ahead")
        future = await self.sampled(run, ahead, tasks, 2 * count)
        return await self.from_groups(
            run, number, await self.joined(run, await run.load(before), tasks, groups, future)
        )

    async def sampled(self, run: Run, model: Model, tasks: Sequence[Task], start: int) -> list[list[Response]]:
        """Another model's responses to each task, numbered from `start`: no two of a group share an id or a seed."""
        engines, sample = await run.load(model), self.config.sample

        async def one(task: Task) -> list[Response]:
            indices = range(start, start + sample.responses)
            return await gather(respond(engines, self.context, task, index, sample) for index in indices)

        with run.stage(f"{model.name} answers", {"actor": len(tasks) * sample.responses}):
            return await engines.each(one, tasks, self.width)

    async def joined(
        self,
        run: Run,
        engines: Engines,
        tasks: Sequence[Task],
        groups: Sequence[Group],
        others: Sequence[list[Response]],
    ) -> list[Group]:
        """The groups with another model's responses, judged by `engines`, and the pair of all."""

        async def one(place: int) -> Group:
            task, group, more = tasks[place], groups[place], others[place]
            judged = await gather(
                self.judge(engines, task.prompt, response, Origin(iteration=task.iteration, name=response.id))
                for response in more
            )
            responses = (*group.responses, *more)
            judgements = (*group.judgements, *(one for found in judged for one in found))
            made = group_of(task, responses, judgements, self.pair(task, responses, judgements))
            run.event("group", g=made.id, pairs=[pair.id for pair in made.pairs], reason=made.no_pair_reason or None)
            return made

        asked = sum(map(len, others)) * self.judge.per_response
        with run.stage(f"{engines.model.name} judges", {"judge": asked}):
            return await engines.each(one, range(len(tasks)), self.width)

    def pair(
        self, task: Task, responses: Sequence[Response], judgements: Sequence[Judgement]
    ) -> PreferencePair | NoPair:
        """Whose response it is says its index: first those of the model, then of the first model, then of the one
        ahead."""
        means, count = mean_verdicts(responses, judgements), self.config.sample.responses
        own, past, future = (
            candidates([one for one in responses if one.index // count == who], means, self.config.pair)
            for who in range(3)
        )
        found = chosen_and_rejected(own, past, future)
        return found if isinstance(found, NoPair) else pair_of(task.id, *found)

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        batch, count = super().items(iteration, groups), self.config.sample.responses
        index = {response.id: response.index // count for group in groups for response in group.responses}
        pairs = [pair for group in groups for pair in group.pairs]
        whose = {
            "rejected_of_first": sum(index[pair.rejected_id] == 1 for pair in pairs),
            "chosen_of_ahead": sum(index[pair.chosen_id] == 2 for pair in pairs),
        }
        return replace(batch, measures={"temporal": whose})

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        found, models = super().demand_of(config, prompts), 3 if config.future else 2
        return replace(found, requests={role: (models * n, tokens) for role, (n, tokens) in found.requests.items()})

    def requests(self, prompts: int) -> dict[Role, int]:
        """Of the model's own responses: the others are counted where they are made."""
        return {role: number for role, (number, _) in super().demand_of(self.config, prompts).requests.items()}


def chosen_and_rejected(
    present: Sequence[Candidate], past: Sequence[Candidate], future: Sequence[Candidate] = ()
) -> tuple[Candidate, Candidate] | NoPair:
    """The two responses of a pair, out of those of the model, of the first model, and of the model trained ahead.

    Another model's response takes the place of the model's own only if its score is strictly worse (past) or strictly
    better (future). Without `future` this is the pair that the model ahead is trained on. Of equal scores the lowest
    index counts.
    """
    winners = [candidate for candidate in present if candidate.may_win]
    if not winners:
        return NoPair(reason="no complete response" if present else "no scored response")
    chosen, rejected = max(winners, key=POINTS), min(present, key=POINTS)
    better = max((candidate for candidate in future if candidate.may_win), key=POINTS, default=chosen)
    worse = min(past, key=POINTS, default=rejected)
    return (
        better if better.points > chosen.points + TIE else chosen,
        worse if worse.points < rejected.points - TIE else rejected,
    )
