"""SPaR (2412.11605): a response that misses a part of its instruction against the same response, refined until it does
not; the two differ in little else. One model answers, judges and refines.

The refined text was written behind another prompt than the question, the one that shows the response and what is wrong
with it. It is trained on as the answer to the question: its tokens are those of the text (`ChatEncoder.target`), not
those that were sampled.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines, gather
from rsrlm.judges.base import Context, Origin
from rsrlm.judges.yes_no import YesNo, share_of_yes
from rsrlm.pairing import TIE, Candidate, pair_of
from rsrlm.recipes.base import Batch, Demand
from rsrlm.recipes.parts import Turn, group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Response, Scored, Task
from rsrlm.settings.base import ConfigError, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample
from rsrlm.settings.train import DPO


class Refine(Section):
    """The search for a refined response, breadth first; one try is the least that there is."""

    tries: int = Field(1, gt=0, description="refinements of each response (node) of a level")
    depth: int = Field(1, gt=0, description="levels, at most: the first with an accepted refinement is the last")
    keep: int = Field(1, gt=0, description="of a level without one, the best are refined again")
    template: str = Field("refine", description="a name of rsrlm's or a Jinja2 file")


@dataclass(frozen=True, kw_only=True)
class Voted:
    """A response with the votes on it; `yes` is their share of Yes, None where too few are readable."""

    response: Response
    votes: tuple[Judgement, ...]
    yes: float | None

    @property
    def side(self) -> str:
        """What the majority says."""
        if self.yes is None:
            return "unread" if self.votes else "unusable"
        return "tie" if abs(self.yes - 0.5) <= TIE else "yes" if self.yes > 0.5 else "no"


class Spar(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        refine: Refine = Refine()
        readable: int = Field(2, gt=0, description="votes that must be readable for a response to take part")
        train: DPO

        @model_validator(mode="after")
        def _votes(self) -> Self:
            if self.judge.endpoint:
                raise ValueError("judge.endpoint cannot vote for recipe spar; use judge.model, or leave both out")
            if not isinstance(self.judge, YesNo.Config):
                raise ValueError(
                    f"recipe spar refines what is judged with No, but judge.kind={self.judge.kind}; use "
                    "judge.kind=yes_no, whose judge.judgements are the votes"
                )
            if self.readable > self.judge.judgements:
                raise ValueError(
                    f"readable={self.readable} is more than judge.judgements={self.judge.judgements}; lower it, or "
                    "raise the votes"
                )
            return self

    judge: YesNo

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        if context.marker:
            raise ConfigError("thought is set, but a refined answer of recipe spar has none: leave out thought")
        super().__init__(config, context, judge_context)
        names = frozenset({"instruction", "response", "judgement"})
        self.refine = Turn(context, config.refine.template, names, "refine.template")

    async def group(self, engines: Engines, task: Task) -> Group:
        responses, judgements = await self.scored(engines, task)
        nodes = nodes_of(responses, judgements, self.config.readable)
        original = negative(nodes, task.id, self.context.seed)
        if isinstance(original, NoPair):
            return group_of(task, responses, judgements, original)
        tree = await self.search(engines, task, original)
        made = self.pair_with(task, original, accepted(tree))
        votes = [*judgements, *(vote for node in tree for vote in node.votes)]
        return group_of(task, [*responses, *(node.response for node in tree)], votes, made)

    def pair_with(self, task: Task, original: Voted, refined: Voted | None) -> PreferencePair | NoPair:
        """The refined text as an answer to the question, against the response that it came from."""
        if refined is None:
            return NoPair(reason="no refinement accepted")
        answer = replace(
            refined.response,
            prompt_token_ids=self.context.asked(task.prompt.text),
            token_ids=self.context.encoder.target(refined.response.text),
        )
        chosen = Candidate(response=answer, points=refined.yes or 0.0)
        return pair_of(task.id, chosen, Candidate(response=original.response, points=original.yes or 0.0))

    async def search(self, engines: Engines, task: Task, original: Voted) -> list[Voted]:
        """All refinements that are made, level by level."""
        rule, tree, level = self.config.refine, list[Voted](), [original]
        for _ in range(rule.depth):
            tries = [(node, number) for node in level for number in range(rule.tries)]
            made = await gather(self.refined(engines, task, original, *one) for one in tries)
            tree += made
            if accepted(made):
                break
            level = best(made)[: rule.keep]
        return tree

    async def refined(self, engines: Engines, task: Task, original: Voted, node: Voted, number: int) -> Voted:
        """Try `number` at refining a response, with the votes on it; what was cut, or says the same, gets none."""
        config, response = self.config, node.response
        critique = next(vote for vote in node.votes if isinstance(vote.verdict, Scored) and not vote.verdict.points)
        fields = {"instruction": task.prompt.text, "response": response.text, "judgement": critique.text}
        index = config.sample.responses + response.index * config.refine.tries + number  # no other node has it
        found = await self.refine.ask(engines, task, config.sample, "actor", index, fields)
        known = {"", response.text.strip(), original.response.text.strip()}
        if not found.complete or found.text.strip() in known:
            return Voted(response=found, votes=(), yes=None)
        votes = await self.judge(engines, task.prompt, found, Origin(iteration=task.iteration, name=found.id))
        return Voted(response=found, votes=votes, yes=share_of_yes(votes, config.readable))

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        """Measures what became of the sampled responses and of the refined ones."""
        found: Counter[str] = Counter()
        for group in groups:
            for node in nodes_of(group.responses, group.judgements, self.config.readable):
                who = "sampled" if node.response.index < self.config.sample.responses else "refined"
                found[f"{who}_{node.side}"] += 1
        return replace(super().items(iteration, groups), measures={"spar": dict(found)})

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        rule, nodes, made = config.refine, 1, config.sample.responses
        for _ in range(rule.depth):
            made += nodes * rule.tries
            nodes = min(rule.keep, nodes * rule.tries)
        found, sampled = super().demand_of(config, prompts), config.sample.responses
        return replace(
            found, requests={role: (n // sampled * made, size) for role, (n, size) in found.requests.items()}
        )

    def needs(self) -> dict[str, int]:
        shown = self.config.sample.max_tokens + self.config.judge.tokens
        refiner = self.refine.needs() + shown + self.config.sample.max_tokens
        return {**super().needs(), "the request for a refined response": refiner}

    @property
    def asks(self) -> list[str]:
        return [*super().asks, self.refine.source]


def nodes_of(responses: Sequence[Response], judgements: Sequence[Judgement], least: int) -> list[Voted]:
    votes: dict[str, list[Judgement]] = {response.id: [] for response in responses}
    for vote in judgements:
        votes[vote.response_id].append(vote)
    return [
        Voted(response=one, votes=tuple(votes[one.id]), yes=share_of_yes(votes[one.id], least)) for one in responses
    ]


def negative(nodes: Sequence[Voted], group: str, seed: int) -> Voted | NoPair:
    """The response that is refined: one that most votes are against, by seed. Ties take no part."""
    against = [node for node in nodes if node.side == "no" and node.response.text.strip()]
    if against:
        return random.Random(f"negative {seed} {group}").choice(against)
    unread = all(node.yes is None for node in nodes)
    return NoPair(reason="too few readable votes" if unread else "no response with No")


def best(nodes: Sequence[Voted]) -> list[Voted]:
    """Those with enough readable votes by their share of Yes; of equal ones the lowest index is first."""
    return sorted((n for n in nodes if n.yes is not None), key=lambda n: (-(n.yes or 0.0), n.response.index))


def accepted(nodes: Sequence[Voted]) -> Voted | None:
    """The best of the refinements that most votes are for."""
    return next((node for node in best(nodes) if node.side == "yes"), None)
