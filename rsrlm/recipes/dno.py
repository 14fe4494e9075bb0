"""DNO-Prct (2404.03715): all pairs of a prompt that are far enough apart, an answer of the data among those scored.

The chosen one has at least `floor` points, and the rejected one `margin` fewer, or `own_margin` fewer where the model
itself wrote the chosen one. The answer that came with the prompt (`reference`, a teacher's) may lose too. `soft` trains
with the probability sigmoid(points between them) that the chosen is better, which is the loss of the paper's theory.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from pydantic import Field

from rsrlm.engines import Engines
from rsrlm.judges.base import Origin, mean_verdicts
from rsrlm.pairing import TIE, candidates, pair_of
from rsrlm.recipes.base import Batch, Demand
from rsrlm.recipes.parts import REFERENCE, check_given, given_answer, group_of
from rsrlm.recipes.replay import Share, replayed
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, NoPair, PreferencePair, Prompt, Response, Task, Verdict
from rsrlm.run import Run
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample, TakingPart
from rsrlm.settings.train import DPO


class FarApart(TakingPart):
    floor: Number = Field(4.0, description="points of a chosen response, at least (the paper: 5 of 6)")
    margin: Number = Field(2.0, gt=0, description="points between chosen and rejected, at least")
    own_margin: Number = Field(1.0, gt=0, description="the same where the model itself wrote the chosen response")
    soft: bool = Field(False, description="train with the probability sigmoid(points between) instead of certainty")


class Dno(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: FarApart = FarApart()
        train: DPO
        replay: list[Share] = Field(
            [0.3, 0.15], description="shares of the pairs of the iteration before, of the one before it, and so on"
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_given(self.context, prompts, REFERENCE)

    async def group(self, engines: Engines, task: Task) -> Group:
        responses, judgements = await self.scored(engines, task)
        if reference := given_answer(self.context, task, REFERENCE):
            origin = Origin(iteration=task.iteration, name=reference.id)
            judgements += await self.judge(engines, task.prompt, reference, origin)
            responses += (reference,)
        made = pairs(task.id, responses, mean_verdicts(responses, judgements), self.config.pair)
        return group_of(task, responses, judgements, made)

    async def from_groups(self, run: Run, number: int, groups: Sequence[Group]) -> Batch:
        return await run.aside(replayed, run, number, groups, self.config.replay, self.context.seed)

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        """Each response beats the others at most: of two, one."""
        found, scored = super().demand_of(config, prompts), config.sample.responses + 1
        return Demand(
            requests={**found.requests, "judge": (prompts * scored * config.judge.per_response, config.judge.tokens)},
            items=math.ceil(prompts * math.comb(scored, 2) * (1 + sum(config.replay))),
            item_tokens=found.item_tokens,
        )


def pairs(
    group: str, responses: Sequence[Response], verdicts: Mapping[str, Verdict], rule: FarApart
) -> list[PreferencePair] | NoPair:
    """Every two responses that are far enough apart, by index; one that was cut may lose but not win."""
    taking_part = candidates(responses, verdicts, rule)
    found = []
    for chosen, rejected in permutations(taking_part, 2):
        margin = rule.margin if chosen.response.role == "data" else rule.own_margin
        gap = chosen.points - rejected.points
        if chosen.may_win and chosen.points >= rule.floor - TIE and gap >= margin - TIE:
            made = pair_of(group, chosen, rejected, target=1 / (1 + math.exp(-gap)) if rule.soft else 1.0)
            if isinstance(made, PreferencePair):
                found.append(made)
    if found:
        return found
    if not any(one.may_win and one.points >= rule.floor - TIE for one in taking_part):
        return NoPair(reason="none good enough" if taking_part else "no scored response")
    return NoPair(reason="too near each other")
