"""OAIF (2402.04792): two responses of the model as it is now, and a judge that prefers one of them.

The judge sees both orders. With `compare.soft`, the better response is preferred with the probability that the judge
gives it (`PreferencePair.target`); without, it is simply preferred. It is made for `clock: online`, where the model
that answers is the one that learns, or a round behind it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from pydantic import model_validator

from rsrlm.engines import Engines
from rsrlm.pairing import TIE, Candidate, pair_of
from rsrlm.recipes.comparing import Comparing, preference
from rsrlm.recipes.parts import group_of
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Response, Task, Unparsed


class Oaif(Comparing):
    class Config(Comparing.Config):
        @model_validator(mode="after")
        def _two_are_compared(self) -> Self:
            if self.sample.responses != 2:
                raise ValueError(f"sample.responses={self.sample.responses} with recipe oaif, which compares 2; set it")
            return self

    async def group(self, engines: Engines, task: Task) -> Group:
        responses = await self.sampled(engines, task)
        if not all(response.text.strip() for response in responses):
            return group_of(task, responses, (), NoPair(reason="no text"))
        if responses[0].text == responses[1].text:
            return group_of(task, responses, (), NoPair(reason="same text"))
        compared = await self.compared(engines, task, responses)
        made = pair(task.id, responses, compared, self.config.compare.soft)
        return replace(group_of(task, responses, (), made), comparisons=compared)


def pair(
    group: str, responses: Sequence[Response], compared: Sequence[Judgement], soft: bool
) -> PreferencePair | NoPair:
    """The preferred response against the other one; `compared` are the verdicts on (0, 1) and on (1, 0).

    A cut response may lose and never wins.
    """
    one, other = compared
    share = preference(one.verdict, other.verdict, soft)
    if isinstance(share, Unparsed):
        return NoPair(reason="a comparison that cannot be read")
    if abs(share - 0.5) <= TIE:
        return NoPair(reason="equal preference")
    points = (share, 1 - share)
    best = 0 if share > 0.5 else 1
    if not responses[best].complete or not responses[best].text.strip():
        return NoPair(reason="no complete response")
    chosen, rejected = (Candidate(response=responses[at], points=points[at]) for at in (best, 1 - best))
    return pair_of(group, chosen, rejected, target=points[best] if soft else 1.0)
