"""SPPO (2405.00675): win rates over the responses of a prompt, which the loss has as goals of the log-ratios.

The model compares every two of its responses in both orders. The one that wins most against the one that wins least is
a pair, and the loss draws log pi / log pi_t of each towards (win rate - 1/2) / beta.
"""

from dataclasses import replace

from rsrlm.engines import Engines
from rsrlm.pairing import best_against_worst
from rsrlm.recipes.comparing import Comparing, win_rates
from rsrlm.recipes.parts import group_of
from rsrlm.records import Group, Task
from rsrlm.settings.methods import Pair
from rsrlm.settings.train import SPPO


class Sppo(Comparing):
    class Config(Comparing.Config):
        pair: Pair = Pair()
        train: SPPO

    async def group(self, engines: Engines, task: Task) -> Group:
        responses = await self.sampled(engines, task)
        answers = [response for response in responses if response.text.strip()]
        compared = await self.compared(engines, task, answers)
        wins = win_rates(answers, compared, self.config.compare.soft)
        made = best_against_worst(responses, wins, self.config.pair, task.iteration, self.context.seed)
        return replace(group_of(task, responses, (), made), comparisons=compared)
