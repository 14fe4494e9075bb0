"""OAIF (2402.04792): two responses of the model as it is now, and a judge that prefers one of them.

The judge sees both orders. With `compare.soft`, the better response is preferred with the probability that the judge
gives it (`PreferencePair.target`); without, it is simply preferred. It is made for `clock: online`, where the model
that answers is the one that learns, or a round behind it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rsrlm.engines import JUDGE_PRIORITY, Engines, gather
from rsrlm.judges import templates, verdicts
from rsrlm.judges.base import Context
from rsrlm.judges.pairwise import Match, Pairwise
from rsrlm.pairing import TIE, Candidate, pair_of
from rsrlm.recipes.base import Demand, respond
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Preferred, Response, Task
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample
from rsrlm.settings.train import DPO


class Reading(Section):
    """How two texts are compared."""

    read: Literal["letters", "text", "structured"] = Field(
        "letters",
        description="letters: the probabilities of A and B in one decoding step; text, structured: a written winner",
    )
    template: str = Field("pairwise", description="a name of rsrlm's or a Jinja2 file")
    temperature: Number = Field(0.0, ge=0, description="of a written verdict")
    top_p: Number = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(300, gt=0, description="of a written verdict")


class Comparison(Reading):
    soft: bool = Field(True, description="train on the judge's probability instead of its verdict")


class Oaif(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        compare: Comparison = Comparison()
        train: DPO

        @model_validator(mode="after")
        def _two_are_compared(self) -> Self:
            if self.sample.responses != 2:
                raise ValueError(f"sample.responses={self.sample.responses} with recipe oaif, which compares 2; set it")
            if self.judge.endpoint and self.compare.read != "text":
                raise ValueError(
                    f"compare.read={self.compare.read}: judge.endpoint compares in text; set compare.read=text"
                )
            return self

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        by_text = config.judge.endpoint is not None
        self.compare = Pairwise(
            config.compare, judge_context, templates.PAIRWISE_VARIABLES, "compare", verdicts.WINNER, by_text
        )

    async def group(self, engines: Engines, task: Task) -> Group:
        sample = self.config.sample
        responses = await gather(respond(engines, self.context, task, index, sample) for index in range(2))
        if responses[0].text == responses[1].text:
            return group_of(task, responses, (), NoPair(reason="same text"))
        compared = await self.compare(engines, [self.match(task, responses, order) for order in ((0, 1), (1, 0))])
        made = pair(task.id, responses, compared, self.config.compare.soft)
        return replace(group_of(task, responses, (), made), comparisons=compared)

    def match(self, task: Task, responses: Sequence[Response], order: tuple[int, int]) -> Match:
        """The two responses in this order."""
        first, second = (responses[index] for index in order)
        seed = self.context.seed_of
        return Match(
            id=f"{first.id}~{second.index}",
            prompt_id=task.prompt.id,
            response_id=first.id,
            index=first.index,
            role="duel",
            fields={"instruction": task.prompt.text, "response_a": first.text, "response_b": second.text},
            seed=seed(task.iteration, task.id, "duel", f"{first.index}~{second.index}"),
            fence_seed=seed(task.iteration, task.id, "duel", "fence"),
            priority=JUDGE_PRIORITY,
            data=task.prompt.data,
        )

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        tokens = 1 if config.compare.read == "letters" else config.compare.max_tokens
        return Demand(
            requests={"actor": (2 * prompts, config.sample.max_tokens), "duel": (2 * prompts, tokens)},
            items=prompts,
            item_tokens=2 * config.sample.max_tokens + 64,  # with a prompt of usual length
        )

    @property
    def scale(self) -> tuple[int, int]:
        return (0, 1)

    def needs(self) -> dict[str, int]:
        answer = self.config.sample.max_tokens
        own = {"sample.max_tokens": len(self.context.encoder.user("")) + answer}
        return {**own, "the judge of two responses": self.compare.needs(2 * answer)}

    @property
    def asks(self) -> list[str]:
        return [self.compare.source]


def pair(
    group: str, responses: Sequence[Response], compared: Sequence[Judgement], soft: bool
) -> PreferencePair | NoPair:
    """The preferred response against the other one; `compared` are the verdicts on (0, 1) and on (1, 0).

    P(0 is better) is the mean over both orders: of the judge's probabilities if `soft`, else of its verdicts, of which
    a tie is a half. A cut response may lose and never wins.
    """
    one, other = (judgement.verdict for judgement in compared)
    if not isinstance(one, Preferred) or not isinstance(other, Preferred):
        return NoPair(reason="a comparison that cannot be read")
    first, second = (verdict.first if soft else replace(verdict, share=None).first for verdict in (one, other))
    share = (first + 1 - second) / 2
    if abs(share - 0.5) <= TIE:
        return NoPair(reason="equal preference")
    points = (share, 1 - share)
    best = 0 if share > 0.5 else 1
    if not responses[best].complete or not responses[best].text.strip():
        return NoPair(reason="no complete response")
    chosen, rejected = (Candidate(response=responses[at], points=points[at]) for at in (best, 1 - best))
    return pair_of(group, chosen, rejected, target=points[best] if soft else 1.0)
