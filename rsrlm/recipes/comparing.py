"""Recipes whose responses are compared two by two, each two in both orders."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rsrlm.engines import JUDGE_PRIORITY, Engines, gather
from rsrlm.judges import templates, verdicts
from rsrlm.judges.base import Context
from rsrlm.judges.pairwise import Match, Pairwise
from rsrlm.recipes.base import Demand, respond
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Judgement, Preferred, Response, Scored, Task, Unparsed, Verdict
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample
from rsrlm.settings.train import DPO

NOT_COMPARED = Unparsed(reason="no comparison that can be read")


class Comparison(Section):
    """How two texts are compared."""

    read: Literal["letters", "text", "structured"] = Field(
        "letters",
        description="letters: the probabilities of A and B in one decoding step; text, structured: a written winner",
    )
    template: str = Field("pairwise", description="a name of rsrlm's or a Jinja2 file")
    temperature: Number = Field(0.0, ge=0, description="of a written verdict")
    top_p: Number = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(300, gt=0, description="of a written verdict")
    soft: bool = Field(True, description="go by the judge's probability instead of its verdict")

    @property
    def tokens(self) -> int:
        """Of one verdict, at most."""
        return 1 if self.read == "letters" else self.max_tokens


class Compares(Section):
    """The keys of every recipe that compares."""

    prompts: PerIteration
    judge: JudgeConfig
    compare: Comparison = Comparison()
    train: DPO

    @model_validator(mode="after")
    def _an_endpoint_writes(self) -> Self:
        if self.judge.endpoint and self.compare.read != "text":
            raise ValueError(
                f"compare.read={self.compare.read}: judge.endpoint compares in text; set compare.read=text"
            )
        return self


class Comparing(SelfRewarding):
    class Config(Compares):
        sample: Sample

    shown = templates.PAIRWISE_VARIABLES  # what the template of a comparison prints

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        by_text = config.judge.endpoint is not None
        self.compare = Pairwise(config.compare, judge_context, self.shown, "compare", verdicts.WINNER, by_text)

    async def sampled(self, engines: Engines, task: Task) -> list[Response]:
        sample = self.config.sample
        return await gather(respond(engines, self.context, task, index, sample) for index in range(sample.responses))

    async def compared(self, engines: Engines, task: Task, responses: Sequence[Response]) -> tuple[Judgement, ...]:
        """The verdicts on every two responses in both orders, by the first of them and then the second."""
        return await self.compare(engines, [self.match(task, *two) for two in permutations(responses, 2)])

    def match(self, task: Task, first: Response, second: Response) -> Match:
        """The two responses in this order."""
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
        responses = config.sample.responses
        return Demand(
            requests={
                "actor": (responses * prompts, config.sample.max_tokens),
                "duel": (responses * (responses - 1) * prompts, config.compare.tokens),
            },
            items=prompts,
            item_tokens=2 * config.sample.max_tokens + 64,  # with a prompt of usual length
        )

    @property
    def scale(self) -> tuple[int, int]:
        return (0, 1)

    def needs(self) -> dict[str, int]:
        needs = super().needs()
        answer = self.config.sample.max_tokens
        return {
            "sample.max_tokens": needs["sample.max_tokens"],
            "the judge of two responses": self.compare.needs(2 * answer),
        }

    @property
    def asks(self) -> list[str]:
        return [self.compare.source]


def preference(first: Verdict, second: Verdict, soft: bool) -> float | Unparsed:
    """P(one is better than the other), the mean over both orders: `first` shows the one first, `second` the other.

    Of the judge's probabilities if `soft`, else of its verdicts, of which a tie is a half.
    """
    if not isinstance(first, Preferred) or not isinstance(second, Preferred):
        return NOT_COMPARED
    shown, turned = (verdict.first if soft else replace(verdict, share=None).first for verdict in (first, second))
    return (shown + 1 - turned) / 2


def win_rates(responses: Sequence[Response], compared: Sequence[Judgement], soft: bool) -> dict[str, Verdict]:
    """The mean of P(response is better than another), by its id: over the responses of the group, itself among them
    with a half, that it was readably compared with."""
    found = {(one.response_id, int(one.id.rpartition("~")[2])): one.verdict for one in compared}

    def against(one: Response, other: Response) -> float | Unparsed:
        first, second = found.get((one.id, other.index)), found.get((other.id, one.index))
        return preference(first, second, soft) if first and second else NOT_COMPARED

    beaten = {
        one.id: [
            share for other in responses if other is not one and not isinstance(share := against(one, other), Unparsed)
        ]
        for one in responses
    }
    return {name: Scored(points=fmean([0.5, *shares])) if shares else NOT_COMPARED for name, shares in beaten.items()}
