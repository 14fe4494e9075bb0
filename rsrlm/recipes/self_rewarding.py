"""Self-Rewarding Language Models (2401.10020v3): K responses to each prompt, judged by the model itself; the best
against the worst of them is a pair."""

import random
from collections.abc import Sequence
from typing import Any

from rsrlm.engines import Engines, gather
from rsrlm.judges.base import Context, Origin, judge_of, mean_verdicts
from rsrlm.pairing import best_against_worst
from rsrlm.recipes.base import Batch, Demand, Recipe, respond
from rsrlm.recipes.parts import group_of
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Response, Task
from rsrlm.settings.base import Section
from rsrlm.settings.methods import JudgeConfig, Pair, PerIteration, Sample
from rsrlm.settings.train import DPO
from rsrlm.store.buffer import in_order, pairs_of, reasons_of


def in_training_order(pairs: Sequence[PreferencePair], seed: int, iteration: int) -> Sequence[PreferencePair]:
    """Depends on ids and seed alone."""

    def shuffled(ids: list[str]) -> list[int]:
        order = sorted(range(len(ids)), key=ids.__getitem__)
        random.Random(f"pairs {seed} {iteration}").shuffle(order)
        return order

    return in_order(pairs, shuffled)


class SelfRewarding(Recipe):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: Pair = Pair()
        train: DPO

    trains = "pairs"

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.judge = judge_of(config.judge, judge_context)

    async def scored(self, engines: Engines, task: Task) -> tuple[tuple[Response, ...], tuple[Judgement, ...]]:
        """The responses to a prompt, each judged as soon as it is finished."""

        async def one(index: int) -> tuple[Response, tuple[Judgement, ...]]:
            response = await respond(engines, self.context, task, index, self.config.sample)
            origin = Origin(iteration=task.iteration, name=f"{task.id}/{index}")
            return response, await self.judge(engines, task.prompt, response, origin)

        made = await gather([one(index) for index in range(self.config.sample.responses)])
        return tuple(response for response, _ in made), tuple(one for _, judged in made for one in judged)

    def pair(
        self, task: Task, responses: Sequence[Response], judgements: Sequence[Judgement]
    ) -> PreferencePair | NoPair:
        means = mean_verdicts(responses, judgements)
        return best_against_worst(responses, means, self.config.pair, task.iteration, self.context.seed)

    async def group(self, engines: Engines, task: Task) -> Group:
        responses, judgements = await self.scored(engines, task)
        return group_of(task, responses, judgements, self.pair(task, responses, judgements))

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        return Batch(
            items=in_training_order(pairs_of(groups), self.context.seed, iteration),
            groups=groups,
            dropped=reasons_of(groups),
        )

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        responses = prompts * config.sample.responses
        return Demand(
            requests={
                "actor": (responses, config.sample.max_tokens),
                "judge": (responses * config.judge.per_response, config.judge.tokens),
            },
            items=prompts,
            item_tokens=2 * config.sample.max_tokens + 64,  # with a prompt of usual length
        )

    def needs(self) -> dict[str, int]:
        answer = self.config.sample.max_tokens
        return {
            "sample.max_tokens": len(self.context.asked("")) + answer,
            "the judge of a response": self.judge.needs(answer),
        }

    @property
    def asks(self) -> list[str]:
        return [self.judge.source]
