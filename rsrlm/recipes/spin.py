"""SPIN (2401.01335): the answer that came with a prompt against the model's own, until the two cannot be told apart.

Nobody judges: the answer of the data (`reference` of a prompt) is preferred by where it comes from. A model that writes
as the data does has nothing left to learn, so this is a better supervised fine-tuning, and no way beyond the data.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

from pydantic import Field

from rsrlm.engines import Engines
from rsrlm.pairing import Candidate, pair_of
from rsrlm.recipes.base import Batch, Demand, respond
from rsrlm.recipes.parts import REFERENCE, check_carried, check_given, given_answer, group_of
from rsrlm.recipes.replay import Share, replayed
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, NoPair, PreferencePair, Prompt, Response, Task
from rsrlm.run import Run
from rsrlm.settings.base import Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, SamplingParams
from rsrlm.settings.train import DPO


class Spin(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: SamplingParams
        judge: JudgeConfig
        train: DPO
        replay: list[Share] = Field(
            [1.0], description="shares of the pairs of the iteration before, of the one before it, and so on"
        )

    width = 1

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_given(self.context, prompts, REFERENCE)
        check_carried(prompts, REFERENCE, "the answer that recipe spin prefers to the model's")

    async def group(self, engines: Engines, task: Task) -> Group:
        own = await respond(engines, self.context, task, 0, self.config.sample)
        reference = given_answer(self.context, task, REFERENCE)
        made = pair(task.id, reference, own) if reference else NoPair(reason="reference too long")
        return group_of(task, [own], (), made)

    async def from_groups(self, run: Run, number: int, groups: Sequence[Group]) -> Batch:
        return await run.aside(replayed, run, number, groups, self.config.replay, self.context.seed)

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        return Demand(
            requests={"actor": (prompts, config.sample.max_tokens)},
            items=ceil(prompts * (1 + sum(config.replay))),
            item_tokens=2 * config.sample.max_tokens + 64,  # with a prompt of usual length
        )

    @property
    def scale(self) -> tuple[int, int]:
        return (0, 1)

    def needs(self) -> dict[str, int]:
        return {"sample.max_tokens": super().needs()["sample.max_tokens"]}

    @property
    def asks(self) -> list[str]:
        return []


def pair(group: str, reference: Response, own: Response) -> PreferencePair | NoPair:
    """The answer of the data against the model's own, which may be cut; their scores say which is which."""
    if not own.text.strip():
        return NoPair(reason="no text")
    if own.text.split() == reference.text.split():
        return NoPair(reason="same text")
    return pair_of(group, Candidate(response=reference, points=1.0), Candidate(response=own, points=0.0))
