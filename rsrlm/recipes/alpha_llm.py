"""AlphaLLM (2404.12253v2): a tree of lines is searched for each prompt, and its best finished answer is imitated.

The model is its own critic: it says whether a line is right, and whether a final answer is. The paper's value head is
left out (beta_v = 0).
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines, Model
from rsrlm.judges import templates
from rsrlm.judges.answers import RightAnswer, gold
from rsrlm.judges.base import Context, Judge, mean_verdicts
from rsrlm.judges.true_false import FORM, TrueFalse
from rsrlm.recipes.base import Batch, Demand, NoItems
from rsrlm.recipes.lines import PARTS, Line, Lines
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.search import is_leaf, kept, ranked_leaves
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.recipes.tree import ATTEMPTS, Search, Searched, Tree, Width
from rsrlm.records import Example, Group, NoPair, Prompt, Task
from rsrlm.run import Run
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, SamplingParams
from rsrlm.settings.train import TrainRule


class AlphaLLM(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: SamplingParams
        line: Line = Line()
        search: Search = Search()
        width: Width = Width()
        judge: JudgeConfig
        outcome: Literal["model", "judge"] = Field(
            "model",
            description="who says whether a final answer is right: the model, or judge (kind answer or function)",
        )
        least: Number = Field(0.9, description="the best leaf is trained on if its outcome is above this (gamma)")
        train: TrainRule

        @model_validator(mode="after")
        def _critics_can_be_asked(self) -> Self:
            if self.judge.endpoint:
                raise ValueError(
                    "judge.endpoint with recipe alpha_llm, which reads the probabilities of True and False; leave it "
                    "out, or use judge.model"
                )
            if self.outcome == "judge" and self.judge.tokens:
                raise ValueError(
                    f"outcome=judge with judge.kind={self.judge.kind}, which asks a model; use judge.kind=answer or "
                    "function, or leave out outcome"
                )
            return self

    trains = "examples"

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.lines = Lines(context, config.sample, config.line)

        def critic(key: str) -> TrueFalse:
            name = getattr(config.search, key)
            templates.load_template(name, key=f"search.{key}")  # refused with the key that names it
            return TrueFalse(TrueFalse.Config(template=name), judge_context)

        self.process = critic("step_template")
        self.outcome: Judge = self.judge if config.outcome == "judge" else critic("answer_template")

    def check(self, prompts: Sequence[Prompt]) -> None:
        if isinstance(self.outcome, RightAnswer):
            for prompt in prompts:
                gold(prompt, self.outcome.config)

    async def search(self, engines: Engines, task: Task) -> Searched:
        """One tree: its finished answers with their outcomes, and the number of tokens that it took."""
        return await Tree(engines, task, self.config, self.lines, (self.process, self.outcome)).grow()

    async def group(self, engines: Engines, task: Task) -> Group:
        found = await self.search(engines, task)
        best = kept(found.responses, found.outcomes, self.config.least)
        return group_of(task, found.responses, found.judgements, best if isinstance(best, NoPair) else ())

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        batch = await super().iteration(run, number, before, tasks)
        if not batch.items:
            best = batch.measures["search"]["best_outcome"]
            raise NoItems(
                f"iteration {number} has nothing to train on: {dict(batch.dropped)}; the best outcome of a tree was "
                f"{best} on average: lower least, or raise search.simulations"
            )
        return batch

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        """The best leaf of each prompt, as the model wrote it; and what the trees came to."""
        examples, dropped, leaves, best = [], Counter[str](), [], []
        for group in groups:
            outcomes = mean_verdicts(group.responses, group.judgements)
            leaves.append(sum(map(is_leaf, group.responses)))
            best += [outcome for _, outcome in ranked_leaves(group.responses, outcomes)[:1]]
            found = kept(group.responses, outcomes, self.config.least)
            if isinstance(found, NoPair):
                dropped[found.reason] += 1
            else:
                prompt, target = found.prompt_token_ids, found.token_ids
                examples.append(Example(id=found.id, kind="search", prompt_token_ids=prompt, target_token_ids=target))
        examples.sort(key=lambda one: one.id)
        random.Random(f"examples {self.context.seed} {iteration}").shuffle(examples)
        means = {name: fmean(found) if found else None for name, found in (("leaves", leaves), ("best_outcome", best))}
        measures = {"search": {"trees": len(groups), "kept": len(examples), **means}}
        return Batch(items=examples, groups=groups, dropped=dropped, measures=measures)

    @property
    def width(self) -> int:
        return 1 + self.config.search.rollouts_wanted

    @property
    def scale(self) -> tuple[int, int]:
        return FORM.scale if self.config.outcome == "model" else self.judge.form.scale

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        """At most: each option sampled as often as may be, and as long as an answer; the two requests for a line share
        its tokens."""
        search, most = config.search, config.sample.max_tokens
        nodes, judged = prompts * search.simulations, bool(search.beta_prm) * 1
        if config.outcome == "model":
            judged = max(1, judged + search.rollouts_wanted)  # of a leaf its outcome alone
        options, rollouts = nodes * ATTEMPTS, nodes * search.rollouts_wanted
        requests = options * PARTS + rollouts
        each = math.ceil(most * (options + rollouts) / requests)
        return Demand(
            requests={"actor": (requests, each), "judge": (nodes * judged, 1)},
            items=prompts,
            item_tokens=most + 64,  # with a prompt of usual length
        )

    def needs(self) -> dict[str, int]:
        answer = self.config.sample.max_tokens
        return {
            "sample.max_tokens": len(self.context.encoder.user("")) + answer,
            "the critic of a line": self.process.needs(answer),
            "the critic of an answer": self.outcome.needs(answer),
        }

    @property
    def asks(self) -> list[str]:
        return [self.process.source, self.outcome.source]
