"""DICE (2406.09760): the model's implicit reward, less a price per character that makes chosen as long as rejected.

The reward of a response is log pi_t - log pi_0, summed over its tokens. Alpha times the number of its characters is
taken off, with the alpha that makes the chosen responses of all prompts on average as long as the rejected. The paper
starts from a model that DPO has trained, so another recipe comes first: M0 has no such reward, and in the first
iteration the mean log-likelihood of a token stands in, as in CREAM.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from rsrlm.engines import Model
from rsrlm.pairing import POINTS, Candidate, candidates, pair_of
from rsrlm.recipes.base import Batch
from rsrlm.recipes.cream import Cream, Likelihoods, likelihoods, reward_of, rewards
from rsrlm.recipes.parts import group_of
from rsrlm.records import Group, NoPair, PreferencePair, Task
from rsrlm.run import Run
from rsrlm.settings.base import Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample, TakingPart
from rsrlm.settings.train import DPO

GRID = np.arange(1001) / 1000  # of alpha


class LengthFree(TakingPart):
    least_chars: int = Field(4, ge=0, description="of a response that takes part, which also must have ended by itself")
    most_chars: int = Field(6699, gt=0)
    least: int = Field(8, ge=2, description="responses that take part, below which a prompt gives no pair")


class Dice(Cream):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: LengthFree = LengthFree()
        train: DPO

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        groups = await run.groups(await run.load(before), self, tasks)
        own = await likelihoods(run, before, groups, self)
        first = None if before.digest == run.first.digest else await likelihoods(run, run.first, groups, self)
        return await run.aside(self.paired, number, groups, before, own, first)

    def paired(
        self, number: int, groups: Sequence[Group], model: Model, own: Likelihoods, first: Likelihoods | None
    ) -> Batch:
        rule, found = self.config.pair, rewards(own, first)
        taking_part = [
            [
                one
                for one in candidates(group.responses, found, rule)
                if one.may_win and rule.least_chars <= len(one.response.text) <= rule.most_chars
            ]
            for group in groups
        ]
        alpha, difference = price([ranked for ranked in taking_part if len(ranked) >= rule.least])
        made = []
        for group, ranked in zip(groups, taking_part, strict=True):
            judged = [reward_of(response, found[response.id], model) for response in group.responses]
            enough = len(ranked) >= rule.least
            pair = best_and_worst(group.id, ranked, alpha) if enough else NoPair(reason="too few whole responses")
            made.append(group_of(Task(iteration=number, prompt=group.prompt), group.responses, judged, pair))
        measured = {"alpha": alpha, "chars_chosen_less_rejected": difference}
        return replace(self.items(number, made), measures={"length": measured})


def price(groups: Sequence[Sequence[Candidate]]) -> tuple[float, float | None]:
    """Points off per character, out of 0, .001, ... 1, with which the mean difference of the lengths of chosen and
    rejected, in characters, is nearest to 0; and that difference. The lowest price of equally good ones."""
    if not groups:
        return 0.0, None
    differences = np.zeros(len(GRID))
    for ranked in groups:
        points, chars = (np.array(column, float) for column in zip(*map(_figures, ranked), strict=True))
        after = points - GRID[:, None] * chars
        differences += chars[after.argmax(1)] - chars[after.argmin(1)]
    means = differences / len(groups)
    best = int(np.abs(means).argmin())
    return float(GRID[best]), float(means[best])


def best_and_worst(group: str, ranked: Sequence[Candidate], alpha: float) -> PreferencePair | NoPair:
    """By points less alpha a character, which are the scores of the pair; of equal ones the lowest index counts."""
    after = [replace(one, points=one.points - alpha * len(one.response.text)) for one in ranked]
    return pair_of(group, max(after, key=POINTS), min(after, key=POINTS))


def _figures(one: Candidate) -> tuple[float, int]:
    return one.points, len(one.response.text)
