"""Meta-Rewarding Language Models (2407.19594v2): the model also compares its own judgements, and learns to judge from
the better against the worse of them.

What the paper leaves open is decided in `rsrlm.meta_judging`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rsrlm import meta_judging
from rsrlm.engines import JUDGE_PRIORITY, Engines
from rsrlm.judges.base import Context, Origin
from rsrlm.judges.pairwise import Match, meta_judge
from rsrlm.judges.rubric import Text
from rsrlm.recipes.base import JUDGE_PROMPT, Batch, Demand
from rsrlm.recipes.self_rewarding import SelfRewarding, in_training_order
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Preferred, Response, Task
from rsrlm.settings.base import Number, Section
from rsrlm.store.buffer import pairs_of, reasons_of


class Meta(Section):
    """The meta-judge: which of two judgements of one response is the better one (section 2.3)."""

    read: Literal["text", "structured", "letters"] = Field(
        "text",
        description="text: reasoning and a winner line; structured: the same with the line guaranteed; letters: the "
        "probabilities of A and B in one decoding step",
    )
    template: str = Field("meta", description="name of a template of rsrlm, or path of a Jinja2 file")
    temperature: Number = Field(0.7, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(300, gt=0)
    weights: Literal["iteration", "prompt", "none"] = Field(
        "iteration",
        description="wins by the judgement shown first or second are weighted against the position's bias, counted "
        "over the iteration or over each prompt alone; none: 0.5 each",
    )
    max_chosen_chars: int | None = Field(None, gt=0, description="drop pairs whose chosen judgement is longer")
    collapse: bool = Field(False, description="judgements with the same text are compared once")


class MetaRewarding(SelfRewarding):
    class Config(SelfRewarding.Config):
        meta: Meta = Meta()

        @model_validator(mode="after")
        def _judgements_can_be_compared(self) -> Self:
            judge = self.judge
            if not judge.in_words or judge.per_response < 2:
                raise ValueError(
                    f"recipe meta_rewarding compares judgements of one response, but judge.kind={judge.kind} gives "
                    f"{judge.per_response}; use judge.kind=text or structured, and judge.judgements of 2 or more"
                )
            if judge.external:
                raise ValueError(
                    f"recipe meta_rewarding trains on the model's own judgements, but {judge.external} judges; use "
                    "recipe: self_rewarding, or leave out judge.model and judge.endpoint"
                )
            if getattr(judge, "temperature", 1.0) == 0:
                raise ValueError(
                    "judge.temperature=0 with recipe meta_rewarding: all judgements of a response would be the same; "
                    "raise it"
                )
            return self

    judge: Text

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.meta = meta_judge(config.meta, context)

    async def comparisons(
        self, engines: Engines, task: Task, responses: Sequence[Response], judgements: Sequence[Judgement]
    ) -> tuple[Judgement, ...]:
        """The meta-judge's verdicts on the judgements of the response that they disagree on most."""
        rule, context = self.config.meta, self.context
        response = meta_judging.most_uncertain(responses, judgements, context.seed)
        if response is None:
            return ()
        origin = f"{task.id}/{response.index}"
        contestants = meta_judging.contestants(meta_judging.readable(judgements, response), rule)
        shown = {"instruction": task.prompt.text, "response": response.text}
        matches = [
            Match(
                id=meta_judging.comparison_id(first, second),
                prompt_id=task.prompt.id,
                response_id=response.id,
                index=first.index,
                role="meta",
                fields={**shown, "judgement_a": first.text, "judgement_b": second.text},
                seed=context.seed_of(task.iteration, origin, "meta", f"{first.index}~{second.index}"),
                fence_seed=context.seed_of(task.iteration, origin, "meta", "fence"),
                priority=JUDGE_PRIORITY,
                data=task.prompt.data,
            )
            for first, second in meta_judging.matches(contestants)
        ]
        return await self.meta(engines, matches)

    async def group(self, engines: Engines, task: Task) -> Group:
        group = await super().group(engines, task)
        return replace(group, comparisons=await self.comparisons(engines, task, group.responses, group.judgements))

    def judge_pair(self, group: Group, whole: meta_judging.PositionWeights) -> PreferencePair | NoPair:
        """The pair of judgements of a group; `whole` are the position weights over all groups (section 2.3)."""
        rule, seed = self.config.meta, self.context.seed
        response = meta_judging.most_uncertain(group.responses, group.judgements, seed)
        if response is None:
            return NoPair(reason="no response with two readable judgements")
        own = meta_judging.position_weights(group.comparisons)
        origin = Origin(iteration=group.iteration, name=f"{group.id}/{response.index}")
        return meta_judging.judge_pair(
            self.judge.prompt_of(group.prompt, response, origin),
            meta_judging.contestants(meta_judging.readable(group.judgements, response), rule),
            group.comparisons,
            {"iteration": whole, "prompt": own, "none": meta_judging.EVEN}[rule.weights],
            rule,
            seed,
        )

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        """Only when all groups are finished: the weights count the wins of the whole iteration."""
        weights = meta_judging.position_weights(one for group in groups for one in group.comparisons)
        dropped = Counter[str]()

        def judge_pairs() -> Iterator[PreferencePair]:
            for group in groups:
                found = self.judge_pair(group, weights)
                if isinstance(found, NoPair):
                    dropped[f"judge: {found.reason}"] += 1
                else:
                    yield found

        pairs = pairs_of(groups, judge_pairs())
        measures = {
            "weights": self.config.meta.weights,
            "position_weights": {"first": weights.first, "second": weights.second},  # of the iteration's totals
            **decided(groups),
        }
        return Batch(
            items=in_training_order(pairs, self.context.seed, iteration),
            groups=groups,
            dropped=reasons_of(groups) + dropped,
            measures={"meta": measures},
        )

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        found = super().demand_of(config, prompts)
        compared = prompts * meta_judging.most_comparisons(config.judge.per_response)
        tokens = 1 if config.meta.read == "letters" else config.meta.max_tokens
        judge_pair = JUDGE_PROMPT + config.sample.max_tokens + 2 * config.judge.tokens
        return Demand(
            requests={
                **found.requests,
                "meta": (compared, tokens),
            },
            items=2 * prompts,  # a pair of responses and one of judgements
            item_tokens=max(found.item_tokens, judge_pair),
        )

    def needs(self) -> dict[str, int]:
        shown = self.config.sample.max_tokens + 2 * self.judge.max_tokens
        return {**super().needs(), "the meta-judge": self.meta.needs(shown)}

    @property
    def asks(self) -> list[str]:
        return [*super().asks, self.meta.source]


def decided(groups: Sequence[Group]) -> dict[str, Any]:
    """How the meta-judge decided: share of decided comparisons that the judgement shown first won, and unreadable."""
    found = Counter(
        one.verdict.winner if isinstance(one.verdict, Preferred) else "unreadable"
        for group in groups
        for one in group.comparisons
    )
    clear = found["A"] + found["B"]
    return {
        "comparisons_decided": clear,
        "comparisons_unreadable": found["unreadable"],
        "first_position_wins": found["A"] / clear if clear else None,
    }
