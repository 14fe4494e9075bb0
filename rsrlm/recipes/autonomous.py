"""Autonomous Learning (2406.00606): a model reads documents, asks itself about them, and learns to answer without them;
`open_book` trains on the answers that it wrote with the text in sight, `closed_book` prefers them to those from memory.

Nobody labels or judges anything. `prompts` are what held-out questions come from, and nothing is trained on them.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from rsrlm.engines import Engines, Model
from rsrlm.pairing import Candidate, pair_of
from rsrlm.recipes.base import JUDGE_PROMPT, Batch, Demand, NoItems, respond
from rsrlm.recipes.parts import given, group_of
from rsrlm.recipes.reading import Reader, Reading
from rsrlm.recipes.self_rewarding import in_training_order
from rsrlm.records import Example, Group, NoPair, PreferencePair, Prompt, Response, Task
from rsrlm.run import Run
from rsrlm.settings.methods import SamplingParams
from rsrlm.settings.train import DPO, TrainRule
from rsrlm.store.buffer import pairs_of, reasons_of

QUESTION = 64  # tokens of one of usual length, with the chat around it


class OpenBook(Reader):
    class Config(Reading):
        on: Literal["questions", "text"] = Field(
            "questions", description="text: the pieces themselves, as a base model is trained on, and no questions"
        )
        keep_asking: bool = Field(True, description="train on asking too: from the piece to the question and answer")
        train: TrainRule

    trains = "examples"

    async def group(self, engines: Engines, task: Task) -> Group:
        written = await self.written(engines, task)
        found = self.asked(task.prompt, written)
        return group_of(task, [written], (), found if isinstance(found, NoPair) else ())

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        if self.config.on == "questions":
            return await super().iteration(run, number, before, tasks)
        return await run.aside(self.of_texts, number)

    def of_texts(self, iteration: int) -> Batch:
        pieces, bare = [task.prompt for task in self.drawn(iteration)], self.context.encoder.bare
        texts = [text_example(piece, bare(piece.text)) for piece in pieces]
        return self.batch(iteration, [text for text in texts if text.target_token_ids], ())

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        return self.batch(iteration, [one for group in groups for one in self.examples(group)], groups)

    def examples(self, group: Group) -> list[Example]:
        """Of the question and the answer that were written about a piece: without the piece in sight, and with it."""
        (written,) = group.responses
        if isinstance(found := self.asked(group.prompt, written), NoPair):
            return []
        encoder = self.context.encoder
        closed = Example(
            id=f"{group.id}/closed",
            kind="closed",
            prompt_token_ids=encoder.user(found.question),
            target_token_ids=encoder.target(found.answer),
        )
        asking = Example(
            id=f"{group.id}/asking",
            kind="asking",
            prompt_token_ids=written.prompt_token_ids,
            target_token_ids=written.token_ids,
        )
        return [closed, asking] if self.config.keep_asking else [closed]

    def batch(self, iteration: int, examples: Sequence[Example], groups: Sequence[Group]) -> Batch:
        """The examples in an order that depends on ids and seed alone. Raises NoItems where there are none."""
        dropped = reasons_of(groups)
        if not examples:
            of = f"documents={self.config.documents}"
            raise NoItems(f"iteration {iteration}: no piece of {of} gave an example: {dict(dropped)}")
        items = sorted(examples, key=lambda example: example.id)
        random.Random(f"examples {self.context.seed} {iteration}").shuffle(items)
        kinds = dict(Counter(one.kind for one in items))
        return Batch(items=items, groups=groups, dropped=dropped, measures={"open_book": kinds})

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        pieces, written = config.per_iteration or prompts, config.write.max_tokens
        if config.on == "text":
            return Demand(requests={}, items=pieces, item_tokens=config.piece_tokens + 1)
        return Demand(
            requests={"prompter": (pieces, written)},
            items=pieces * (2 if config.keep_asking else 1),
            item_tokens=written + (JUDGE_PROMPT + config.piece_tokens if config.keep_asking else QUESTION),
        )

    def needs(self) -> dict[str, int]:
        return super().needs() if self.config.on == "questions" else {"a piece": self.config.piece_tokens + 1}


class ClosedBook(Reader):
    class Config(Reading):
        sample: SamplingParams
        train: DPO

    trains = "pairs"

    async def group(self, engines: Engines, task: Task) -> Group:
        written = await self.written(engines, task)
        if isinstance(found := self.asked(task.prompt, written), NoPair):
            return group_of(task, [written], (), found)
        question = replace(task, prompt=Prompt(id=task.prompt.id, text=found.question))
        memory = await respond(engines, self.context, question, 1, self.config.sample)
        answer = given(task, found.answer, memory.prompt_token_ids, self.context.encoder.target(found.answer))
        opened = replace(answer, weight_version=written.weight_version)  # who wrote it, as a part of that text
        return group_of(task, [written, memory, opened], (), pair(task.id, opened, memory))

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        pairs = in_training_order(pairs_of(groups), self.context.seed, iteration)
        return Batch(items=pairs, groups=groups, dropped=reasons_of(groups))

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        pieces, written, memory = config.per_iteration or prompts, config.write.max_tokens, config.sample.max_tokens
        return Demand(
            requests={"prompter": (pieces, written), "actor": (pieces, memory)},
            items=pieces,
            item_tokens=QUESTION + written + memory,
        )

    def needs(self) -> dict[str, int]:
        answer = len(self.context.encoder.user("")) + self.config.write.max_tokens + self.config.sample.max_tokens
        return {**super().needs(), "an answer from memory": answer}


def text_example(piece: Prompt, tokens: Sequence[int]) -> Example:
    """All tokens of a text but the first, which may be a BOS token, are learnt."""
    first, rest = tuple(tokens[:1]), tuple(tokens[1:])
    return Example(id=piece.id, kind="text", prompt_token_ids=first, target_token_ids=rest)


def pair(group: str, opened: Response, memory: Response) -> PreferencePair | NoPair:
    """The answer with the text in sight over the one from memory, which may be cut. Where they agree, nothing is
    learnt."""
    if opened.text.split() == memory.text.split():
        return NoPair(reason="same text")
    if not opened.complete or not memory.text.strip():
        return NoPair(reason="no text" if opened.complete else "cut")
    return pair_of(group, Candidate(response=opened, points=1.0), Candidate(response=memory, points=0.0))
