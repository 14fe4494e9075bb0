"""Supervised fine-tuning: files of examples, and what a run takes from human-ranked data by itself.

IFT are questions with the reply that people ranked best. EFT are judgements of ranked replies that the current model
writes, kept where its scores agree with people (2401.10020v3, section 3.1.1). Positive are the model's own responses
with the highest scores (appendix A.4).
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from rsrlm.chat import ChatEncoder
from rsrlm.data import ranked
from rsrlm.data.ranked import RankedPrompt
from rsrlm.data.seed_data import Parts
from rsrlm.engines import Engines, Model
from rsrlm.judges.base import Context, mean_verdicts
from rsrlm.judges.rubric import Text
from rsrlm.recipes.base import JUDGE_PROMPT, Batch, Demand, NoItems
from rsrlm.recipes.eft import accepted, check_judge, eft, judge_replies, replies_in
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Example, Group, Scored, Task
from rsrlm.run import Run
from rsrlm.settings.base import Number, Section
from rsrlm.settings.data import Data, Source
from rsrlm.settings.methods import JudgeConfig, Pair, PerIteration, Sample
from rsrlm.settings.train import TrainRule

MADE = ("ift", "eft", "positive")  # sources that a run makes by itself


class NoExamples(NoItems):
    """A source gave fewer examples than data.minimum: the stage has failed."""


class SFT(SelfRewarding):
    class Config(Section):
        sources: list[Source] = Field(min_length=1, description="what is trained on")
        positive_score: Number = Field(5.0, description="minimum mean score of a response for source 'positive'")
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: Pair = Pair()
        data: Data = Data()
        train: TrainRule

        @field_validator("sources", mode="before")
        @classmethod
        def _short_sources(cls, value: Any) -> Any:
            """`ift` is short for `{path: ift}`."""
            return (
                [{"path": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value
            )

        @model_validator(mode="after")
        def _sources_can_be_made(self) -> Self:
            paths = {source.path for source in self.sources}
            if (made := paths & {"ift", "eft"}) and self.data.trees is None:
                raise ValueError(
                    f"sources names {', '.join(sorted(made))}, which is made from ranked data: set data.trees=PATH, "
                    "such as the message trees of Open Assistant (2023-04-12_oasst_ready.trees.jsonl.gz from "
                    "huggingface.co/datasets/OpenAssistant/oasst1), or data.trees=OpenAssistant/oasst1"
                )
            if "eft" in paths and self.judge.external:
                raise ValueError(
                    f"sources names eft, the model's own judgements, but {self.judge.external} judges; make a file "
                    "with `rsrlm data eft`, and name that"
                )
            if "eft" in paths and not self.judge.in_words:
                raise ValueError(
                    f"sources names eft, whose targets are written judgements, but judge.kind={self.judge.kind}; use "
                    "judge.kind=text or structured"
                )
            if "positive" in paths and self.judge.kind == "digits" and self.positive_score >= 5:
                raise ValueError(
                    f"positive_score={self.positive_score} with judge.kind=digits, whose mean never reaches it; lower "
                    "it"
                )
            return self

    trains = "examples"

    def __init__(
        self,
        config: Any,
        context: Context,
        judge_context: Context,
        parts: Parts | None = None,
        files: Mapping[str, Sequence[Example]] | None = None,
    ) -> None:
        """`parts` is the divided ranked data, `files` holds the examples of each source that is a file."""
        super().__init__(config, context, judge_context)
        self._parts, self.files = parts, files or {}
        if "eft" in self.sources:
            check_judge(self.judge.source)

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        """The examples of all sources, mixed; for each source how many there were and what was dropped, and why."""
        engines = await run.load(before)
        groups = await run.groups(engines, self, tasks) if tasks else []
        config, counts = self.config, dict[str, Any]()
        sources = []
        for source in config.sources:
            if source.path == "ift":
                assert self._parts is not None
                found, counts["ift"] = ift(self._parts.ift, self.context.encoder, config.data)
            elif source.path == "eft":
                found, counts["eft"] = await self._judged_replies(run, engines, number)
            elif source.path == "positive":
                found = await run.aside(positive, groups, config.positive_score)
                counts["positive"] = {"responses": len(groups) * config.sample.responses}
            else:
                found, counts[source.path] = list(self.files[source.path]), {}
            fitting = [one for one in found if length(one) <= self.context.room]
            counts[source.path] |= {"longer than engine.max_model_len": len(found) - len(fitting), "used": len(fitting)}
            run.say(f"iteration {number}: source {source.path}: {counts[source.path]}")
            sources.append((source.path, source.weight, fitting))
        run.event("examples", iteration=number, sources=counts)
        items = mixed(sources, config.data.minimum, self.context.seed, number)
        return Batch(items=items, groups=groups, measures={"examples": counts})

    async def _judged_replies(self, run: Run, engines: Engines, iteration: int) -> tuple[list[Example], dict[str, int]]:
        """EFT: people's replies, judged by the model in training; judgements that agree with people."""
        parts, data = self._parts, self.config.data
        assert parts is not None
        assert isinstance(self.judge, Text)
        with run.stage(f"iteration {iteration}", {"judge": replies_in(parts.eft) * data.eft_judgements}):
            judgements = await judge_replies(parts.eft, self.judge, engines, iteration, data.eft_judgements)
        kept, counts = accepted(parts.eft, judgements, data, self.context.seed)
        return eft(kept, self.judge, iteration), counts

    @classmethod
    def answers_prompts(cls, config: Any) -> bool:
        return any(source.path == "positive" for source in config.sources)

    def demand(self, prompts: int) -> Demand:
        config = self.config
        found = super().demand(prompts if self.answers_prompts(config) else 0)
        eft = self._parts is not None and "eft" in self.sources
        judged, tokens = found.requests["judge"]
        judged += replies_in(self._parts.eft) * config.data.eft_judgements if eft and self._parts else 0
        positive = sum(source.weight for source in config.sources if source.path == "positive")
        reply = (config.data.max_chars or 4 * self.context.room) // 4
        return Demand(
            requests={**found.requests, "judge": (judged, tokens)},
            items=self.examples() + math.ceil(prompts * config.sample.responses * positive),
            item_tokens=max(found.item_tokens, JUDGE_PROMPT + reply + config.judge.tokens),
        )

    def examples(self) -> int:
        """Of an epoch, at most: responses to prompts are left out."""
        data, parts = self.config.data, self._parts
        known = {name: len(found) for name, found in self.files.items()}
        if parts:
            known["ift"] = min(len(parts.ift), data.max_ift or len(parts.ift))
            judged = replies_in(parts.eft) * data.eft_per_reply
            known["eft"] = min(judged, data.max_eft or judged)
        return sum(math.ceil(known.get(source.path, 0) * source.weight) for source in self.config.sources)

    @property
    def inputs(self) -> Sequence[Any]:
        found = (example for examples in self.files.values() for example in examples)
        return [[example.prompt_token_ids, example.target_token_ids] for example in found]

    @property
    def sources(self) -> set[str]:
        return {source.path for source in self.config.sources}


def length(example: Example) -> int:
    """Tokens: an example longer than the engines' room was never seen whole by one either."""
    return len(example.prompt_token_ids) + len(example.target_token_ids)


def ift(prompts: Sequence[RankedPrompt], encoder: ChatEncoder, data: Data) -> tuple[list[Example], dict[str, int]]:
    """Questions with their best reply; at most `data.max_ift`, the first by id."""
    chosen, counts = ranked.ift_examples(prompts)
    chosen = sorted(chosen, key=lambda pair: pair[0].id)[: data.max_ift]
    return [
        Example(
            id=f"ift/{reply.id}",
            kind="ift",
            prompt_token_ids=encoder.user(prompt.text),
            target_token_ids=encoder.target(reply.text),
        )
        for prompt, reply in chosen
    ], counts


def positive(groups: Sequence[Group], least: float) -> list[Example]:
    """Complete responses whose mean score is at least `least`."""
    examples = []
    for group in groups:
        means = mean_verdicts(group.responses, group.judgements)
        for response in group.responses:
            mean = means[response.id]
            good = isinstance(mean, Scored) and mean.points >= least - 1e-9
            if good and response.complete and response.text.strip():
                examples.append(
                    Example(
                        id=response.id,
                        kind="positive",
                        prompt_token_ids=response.prompt_token_ids,
                        target_token_ids=response.token_ids,
                    )
                )
    return examples


def mixed(
    sources: Sequence[tuple[str, float, Sequence[Example]]], least: int, seed: int, iteration: int
) -> list[Example]:
    """All sources as (name, weight, examples), each example as often as its source's weight says, in a seeded order.

    Raises NoExamples where a source has fewer than `least`.
    """
    items: list[Example] = []
    for name, weight, examples in sources:
        if len(examples) < least:
            raise NoExamples(
                f"iteration {iteration}: source {name} gave {len(examples)} examples, fewer than data.minimum={least}; "
                "add data, or lower it"
            )
        ordered = sorted(examples, key=lambda example: example.id)
        drawn = random.Random(f"source {seed} {iteration} {name}")
        items += ordered * int(weight)
        items += drawn.sample(ordered, round((weight - int(weight)) * len(ordered)))
    if not items:
        raise NoExamples(f"iteration {iteration}: the weights of sources leave no example; raise them")
    random.Random(f"examples {seed} {iteration}").shuffle(items)
    return items
