"""ScPO (2411.04109v3): the most frequent final answer against the least frequent one, weighted by the votes between.

No answers need to be known. Where a prompt has one and `use_answers` is set, it decides in the place of the votes, with
weight 1 (semi-supervised ScPO). The loss is DPO plus the negative log-likelihood of the chosen, both weighted.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines, gather
from rsrlm.judges.answers import FinalAnswer, Found, RightAnswer, gold
from rsrlm.judges.base import Context
from rsrlm.pairing import TIE, Candidate, pair_of
from rsrlm.recipes import irpo
from rsrlm.recipes.base import Batch, Demand, respond
from rsrlm.recipes.irpo import WithLikelihood
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, NoPair, PreferencePair, Prompt, Response, Scored, Task, Verdict
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample


class Scpo(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        train: WithLikelihood
        least: Number = Field(0.5, gt=0, le=1, description="share of the votes that the most frequent answer must have")
        more: int = Field(
            0,
            ge=0,
            description="responses sampled at more_temperature beside those that vote: they may lose but never win",
        )
        more_temperature: Number = Field(1.2, gt=0)
        use_answers: bool = Field(
            False, description="where a prompt has an answer, right against wrong in the place of votes, with weight 1"
        )

        @model_validator(mode="after")
        def _answers_are_read(self) -> Self:
            if self.judge.kind != "answer":
                raise ValueError(
                    f"recipe scpo counts final answers, but judge.kind={self.judge.kind}; use judge.kind=answer, whose "
                    "judge.where and judge.value say how they are read"
                )
            return self

    judge: RightAnswer

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        assert isinstance(self.judge, RightAnswer)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if self.config.use_answers and "answer" in prompt.data:
                gold(prompt, self.judge.config)

    async def group(self, engines: Engines, task: Task) -> Group:
        config, judge = self.config, self.judge
        voters = config.sample.responses
        hotter = config.sample.model_copy(update={"temperature": config.more_temperature})
        responses = await gather(
            respond(engines, self.context, task, index, config.sample if index < voters else hotter)
            for index in range(voters + config.more)
        )
        found = {response.id: judge.read(response) for response in responses}
        verdicts = votes(found, responses[:voters])
        if config.use_answers and "answer" in task.prompt.data:
            verdicts = {identifier: judge.verdict(task.prompt, one) for identifier, one in found.items()}
            made: list[PreferencePair] | PreferencePair | NoPair = irpo.pairs(task.id, responses, verdicts, 1)
        else:
            made = pair(task.id, responses, verdicts, config.least, self.context.seed)
        judged = [judge.judgement(one, verdicts[one.id], found[one.id]) for one in responses]
        return group_of(task, responses, judged, made)

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        """Measures what the votes say, and how often the most frequent answer is right where that is known."""
        batch = super().items(iteration, groups)
        shares, right = [], []
        for group in groups:
            found = {response.id: self.judge.read(response) for response in group.responses}
            verdicts = votes(found, group.responses[: self.config.sample.responses])
            best, identifier = max(
                ((verdict.points, name) for name, verdict in verdicts.items() if isinstance(verdict, Scored)),
                default=(0.0, ""),
                key=lambda entry: entry[0],
            )
            shares.append(best)
            if identifier and isinstance(truth := self.judge.verdict(group.prompt, found[identifier]), Scored):
                right.append(truth.points)
        votes_of = {
            "largest_share": fmean(shares) if shares else None,
            "majority_right": fmean(right) if right else None,
            "majority_known": len(right),
        }
        return Batch(items=batch.items, groups=groups, dropped=batch.dropped, measures={"votes": votes_of})

    @classmethod
    def demand_of(cls, config: Config, prompts: int) -> Demand:
        responses = config.sample.responses + config.more
        return Demand(
            requests={"actor": (prompts * responses, config.sample.max_tokens)},
            items=prompts,
            item_tokens=2 * config.sample.max_tokens + 64,  # with a prompt of usual length
        )


def votes(found: Mapping[str, Found], voters: Sequence[Response]) -> dict[str, Verdict]:
    """V / k of the paper, by response id: the share of the `voters` that gave the same final answer.

    A response without a final answer votes for nothing, and nothing is known about it. One that does not vote itself
    may have no votes.
    """
    count = Counter(answer.value for one in voters if isinstance(answer := found[one.id], FinalAnswer))
    return {
        identifier: Scored(points=count[answer.value] / len(voters)) if isinstance(answer, FinalAnswer) else answer
        for identifier, answer in found.items()
    }


def pair(
    group: str, responses: Sequence[Response], verdicts: Mapping[str, Verdict], least: float, seed: int
) -> PreferencePair | NoPair:
    """A response with the most votes against one with the fewest, each drawn by `seed` (footnote 1 of the paper).

    Its weight is the difference of their shares of the votes. There is no pair where the larger share is less than
    `least`, or where all answers have the same share.
    """
    taking_part = [
        Candidate(response=response, points=verdict.points)
        for response in sorted(responses, key=lambda response: response.index)
        if isinstance(verdict := verdicts[response.id], Scored)
    ]
    if not taking_part:
        return NoPair(reason="no final answer")
    best = max(candidate.points for candidate in taking_part)
    worst = min(candidate.points for candidate in taking_part)
    if best < least - TIE:
        return NoPair(reason="too few votes")
    if best - worst <= TIE:
        return NoPair(reason="equal votes")
    draw = random.Random(f"votes {seed} {group}")
    chosen = draw.choice([candidate for candidate in taking_part if candidate.points == best])
    rejected = draw.choice([candidate for candidate in taking_part if candidate.points == worst])
    return pair_of(group, chosen, rejected, weight=best - worst)
