"""Iterative RPO (2404.19733v3): responses whose final answer is right against responses whose answer is wrong.

The loss is DPO plus the negative log-likelihood of the chosen per token of it (`train.nll_scale`, alpha of the paper).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines
from rsrlm.judges.answers import RightAnswer, gold
from rsrlm.judges.base import mean_verdicts
from rsrlm.pairing import Candidate, pair_of
from rsrlm.recipes.base import Demand
from rsrlm.recipes.parts import check_given, given_answer, group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, NoPair, PreferencePair, Prompt, Response, Scored, Task, Verdict
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample
from rsrlm.settings.train import DPO

RIGHT, WRONG = 1.0, 0.0


class WithLikelihood(DPO):
    nll_scale: Number = Field(1.0, ge=0, description="times the per-token negative log-likelihood of the chosen")


class Irpo(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        train: WithLikelihood
        pairs: int = Field(10, gt=0, description="of a prompt, at most (K)")

        @model_validator(mode="after")
        def _right_or_wrong(self) -> Self:
            if self.judge.tokens:
                raise ValueError(
                    f"recipe irpo takes right from wrong answers, but judge.kind={self.judge.kind} gives scores; use "
                    "judge.kind=answer, or judge.kind=function with a function that returns 1 and 0"
                )
            return self

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_given(self.context, prompts, "solution")
        if isinstance(self.judge, RightAnswer):
            for prompt in prompts:
                gold(prompt, self.judge.config)

    async def group(self, engines: Engines, task: Task) -> Group:
        responses, judgements = await self.scored(engines, task)
        verdicts = mean_verdicts(responses, judgements)
        made = pairs(task.id, responses, verdicts, self.config.pairs, self.solution(task))
        return group_of(task, responses, judgements, made)

    def solution(self, task: Task) -> Response | None:
        """The solution that came with the prompt (`data["solution"]`), if there is one."""
        return given_answer(self.context, task, "solution")

    @classmethod
    def demand_of(cls, config: Config, prompts: int) -> Demand:
        return Demand(
            requests={"actor": (prompts * config.sample.responses, config.sample.max_tokens)},
            items=prompts * config.pairs,
            item_tokens=2 * config.sample.max_tokens + 64,  # with a prompt of usual length
        )


def pairs(
    group: str,
    responses: Sequence[Response],
    verdicts: Mapping[str, Verdict],
    most: int,
    solution: Response | None = None,
) -> list[PreferencePair] | NoPair:
    """At most `most` pairs of a prompt, right against wrong, each pair once (section 2 of the paper, footnote 2).

    `solution`, which came with the prompt, is one more winner. Responses without text or without a verdict take no
    part, and of those with the same tokens only the first does.
    """
    winners: list[Response] = []
    losers: list[Response] = []
    seen: set[tuple[int, ...]] = set()
    for response in sorted(responses, key=lambda response: response.index):
        verdict = verdicts[response.id]
        if response.token_ids not in seen and response.text.strip() and isinstance(verdict, Scored):
            seen.add(response.token_ids)
            (winners if verdict.points >= RIGHT else losers).append(response)
    if solution is not None and solution.token_ids not in seen:
        winners.append(solution)
    if not winners or not losers:
        return NoPair(reason="no wrong answer" if winners else "no right answer" if losers else "no readable answer")
    return [_pair(group, winner, loser) for winner, loser in cycled(winners, losers, most)]


def cycled(winners: Sequence[Response], losers: Sequence[Response], most: int) -> list[tuple[Response, Response]]:
    """Walks through both lists at once, and each starts again at its end; ends before a pair comes again."""
    both = zip(cycle(winners), cycle(losers), strict=False)
    return list(islice(both, min(most, math.lcm(len(winners), len(losers)))))


def _pair(group: str, winner: Response, loser: Response) -> PreferencePair:
    made = pair_of(group, Candidate(response=winner, points=RIGHT), Candidate(response=loser, points=WRONG))
    assert isinstance(made, PreferencePair), made  # their tokens and points differ
    return made
