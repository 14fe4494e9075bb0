"""What recipes share that learn from documents: the model reads them piece by piece, and asks itself about each."""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from rsrlm.data import documents
from rsrlm.data.documents import Asked
from rsrlm.engines import Engines, Model
from rsrlm.judges import templates
from rsrlm.judges.base import Context, judge_of
from rsrlm.recipes.base import Batch, Demand, Recipe
from rsrlm.recipes.parts import Turn
from rsrlm.records import NoPair, Prompt, Response, Task
from rsrlm.run import Run
from rsrlm.settings.base import ConfigError, Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, SamplingParams


class Writing(SamplingParams):
    top_p: Number = Field(0.9, gt=0, le=1)
    max_tokens: int = Field(256, gt=0, description="of a question with its answer")


class Reading(Section):
    """The keys of what is read, and of what becomes of it."""

    documents: str = Field(
        description="what is learnt: JSONL with id and text per line, a .txt or .md file, or a folder of such files"
    )
    piece_tokens: int = Field(512, ge=16, description="documents are cut into pieces of so many tokens at most")
    per_iteration: int | None = Field(None, gt=0, description="pieces that an iteration reads, by seed; null: all")
    write: Writing = Writing()
    template: str = Field("open_book", description="how it is asked: a name of rsrlm's or a Jinja2 file")
    structured: bool = Field(
        False, description="hold the model to the form, a line each, by structured outputs: small models stray from it"
    )
    pointing: list[str] = Field([], description="drop a question with one of these in it, such as 'the passage'")
    least_overlap: Number = Field(
        0.0, ge=0, le=1, description="drop an answer if a smaller share of its words occurs in the piece"
    )
    prompts: PerIteration
    judge: JudgeConfig


class Reader(Recipe):
    """Each piece is the prompt of a task. Nobody judges it: the judge of the config is for held-out answers."""

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.judge = judge_of(config.judge, judge_context)
        self.turn = Turn(context, config.template, frozenset({"document"}), "template")

    @cached_property
    def pieces(self) -> tuple[Prompt, ...]:
        """Raises ConfigError where the documents cannot be read."""
        found = documents.read(self.config.documents)
        return documents.pieces(found, self.config.piece_tokens, self.context.encoder)

    def check(self, prompts: Sequence[Prompt]) -> None:
        config, known = self.config, len(self.pieces)
        if self.context.marker:
            raise ConfigError("thought: an answer that is written with a document in sight has no thought; remove it")
        if (config.per_iteration or 1) > known:
            raise ConfigError(
                f"per_iteration={config.per_iteration} with documents={config.documents}, which make {known} pieces; "
                "lower it, or leave it out to read all"
            )
        templates.check_data(self.asks, self.pieces, f"template={config.template}")
        for what, tokens in self.needs().items():
            if tokens > self.context.room:
                raise ConfigError(
                    f"piece_tokens={config.piece_tokens} with engine.max_model_len={self.context.room}: {what} takes "
                    f"{tokens} tokens; lower piece_tokens or write.max_tokens, or raise engine.max_model_len"
                )

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        groups = await run.groups(await run.load(before), self, self.drawn(number))
        return await self.from_groups(run, number, groups)

    def drawn(self, iteration: int) -> list[Task]:
        """The pieces of an iteration, all or some."""
        draw = random.Random(f"pieces {self.context.seed} {iteration}")
        drawn = draw.sample(self.pieces, self.config.per_iteration or len(self.pieces))
        return [Task(iteration=iteration, prompt=piece) for piece in drawn]

    async def written(self, engines: Engines, task: Task) -> Response:
        """What the model writes about a piece: response 0 of its group."""
        form = documents.FORM if self.config.structured else None
        shown = {"document": task.prompt.text}
        return await self.turn.ask(engines, task, self.config.write, "prompter", 0, shown, form)

    def asked(self, piece: Prompt, written: Response) -> Asked | NoPair:
        """The question with its answer, or why there is none to learn."""
        found = documents.asked(written.text) if written.complete else NoPair(reason="cut")
        if isinstance(found, NoPair):
            return found
        reason = documents.refused(found, piece.text, self.config.pointing, self.config.least_overlap)
        return NoPair(reason=reason) if reason else found

    @classmethod
    def answers_prompts(cls, config: Any) -> bool:
        return False

    def demand(self, prompts: int) -> Demand:
        """Of the pieces; `demand_of` is told of prompts in their place, and goes by `per_iteration` where it is set."""
        return self.demand_of(self.config, len(self.pieces))

    @property
    def width(self) -> int:
        return 1

    @property
    def scale(self) -> tuple[int, int]:
        return (0, 1)

    def needs(self) -> dict[str, int]:
        """Tokens of each kind of request about a piece, at most."""
        return {"the reading of a piece": self.turn.needs() + self.config.piece_tokens + self.config.write.max_tokens}

    @property
    def inputs(self) -> Sequence[Any]:
        return [[piece.id, piece.text] for piece in self.pieces]

    @property
    def asks(self) -> list[str]:
        return [self.turn.source]
