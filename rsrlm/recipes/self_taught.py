"""Self-Taught Evaluators (2408.02666): the model learns to judge from two answers of which one is bad by construction;
self_taught imitates judgements that found it, self_taught_dpo prefers them to those that did not.

The good answer to an instruction is the one that came with it (`reference`), or a sampled one. The bad one answers
another instruction, which the model has written to resemble the first. So nobody has to say which is which.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rsrlm.engines import JUDGE_PRIORITY, Engines
from rsrlm.judges import templates, verdicts
from rsrlm.judges.base import Context
from rsrlm.judges.pairwise import Match, Pairwise
from rsrlm.judges.rubric import TOO_LONG
from rsrlm.recipes.base import JUDGE_PROMPT, Batch, Demand, NoItems, respond
from rsrlm.recipes.irpo import WithLikelihood
from rsrlm.recipes.labelled import EVENED, WORSE, evenly, pair, position, right_one
from rsrlm.recipes.parts import REFERENCE, Turn, given_answer, group_of
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Example, Group, Judgement, NoPair, PreferencePair, Response, Task, wording
from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, SamplingParams
from rsrlm.settings.train import TrainRule
from rsrlm.store.buffer import in_order, pairs_of, reasons_of

OTHER = 2  # index of the other instruction, among what is written for a prompt
Made = PreferencePair | NoPair | tuple[()]


class TaughtJudge(SamplingParams):
    """How the two responses are judged."""

    read: Literal["text", "structured"] = Field("text", description="a written winner, or one that is guaranteed")
    template: str = Field("taught", description="a name of rsrlm's or a Jinja2 file")
    judgements: int = Field(15, gt=0, description="of the two responses to a prompt")
    top_p: Number = Field(0.9, gt=0, le=1)
    max_tokens: int = Field(400, gt=0)


class SelfTaught(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: SamplingParams
        judge: JudgeConfig
        compare: TaughtJudge = TaughtJudge()
        similar: str = Field("similar", description="template that asks for another instruction: a name or a file")
        train: TrainRule

        @model_validator(mode="after")
        def _judges_itself(self) -> Self:
            if self.judge.external:
                raise ValueError(
                    f"recipe self_taught trains on the model's own judgements, but {self.judge.external} judges; leave "
                    "out judge.model and judge.endpoint, and name who judges held-out answers in evaluate.judge"
                )
            if not self.compare.temperature and self.compare.judgements > 1:
                raise ValueError(
                    f"compare.temperature=0 with compare.judgements={self.compare.judgements}: all judgements of a "
                    "prompt would be the same; raise it, or set compare.judgements=1"
                )
            return self

    trains = "examples"

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.similar = Turn(context, config.similar, frozenset({"instruction"}), "similar")
        names, form = templates.PAIRWISE_VARIABLES, verdicts.WINNER
        self.compare = Pairwise(config.compare, context, names, "compare", form, by_text=False)

    async def group(self, engines: Engines, task: Task) -> Group:
        context, sample, fields = self.context, self.config.sample, {"instruction": task.prompt.text}
        good = self.reference(task) or await respond(engines, context, task, 0, sample)
        if not good.complete or not good.text.strip():
            return group_of(task, (good,), (), NoPair(reason="good response empty or cut"))
        written = await self.similar.ask(engines, task, sample, "prompter", OTHER, fields)
        other = instruction_of(written, task.prompt.text)
        if not isinstance(other, NoPair) and len(context.asked(other)) + sample.max_tokens > context.room:
            other = NoPair(reason="other instruction too long")
        if isinstance(other, NoPair):
            return group_of(task, (good,), (), other)
        bad = await respond(engines, context, replace(task, prompt=replace(task.prompt, text=other)), WORSE, sample)
        if not bad.text.strip() or bad.text.strip() == good.text.strip():
            reason = "bad response the same" if bad.text.strip() else "bad response empty"
            return group_of(task, (good, bad), (), NoPair(reason=reason))
        compared = await self.compare(engines, self.matches(task, (good, bad)))
        unread = NoPair(reason=TOO_LONG.reason) if compared[0].verdict == TOO_LONG else None
        made = unread or self.made(task, (good, bad), compared)
        return replace(group_of(task, (good, bad), (), made), comparisons=compared)

    def reference(self, task: Task) -> Response | None:
        """The good answer that came with the prompt, if there is one."""
        return given_answer(self.context, task, REFERENCE)

    def matches(self, task: Task, responses: Sequence[Response]) -> list[Match]:
        """The two responses for each judgement, always in the same order, which is drawn by seed."""
        turned = random.Random(f"shown {self.context.seed} {task.id}").random() < 0.5
        first, second = reversed(responses) if turned else responses
        seed = partial(self.context.seed_of, task.iteration, task.id, "duel")
        return [
            Match(
                id=f"{first.id}~{second.id.rpartition('/')[2]}#{number}",
                prompt_id=task.prompt.id,
                response_id=first.id,
                index=number,
                role="duel",
                fields={"instruction": task.prompt.text, "response_a": first.text, "response_b": second.text},
                seed=seed(str(number)),
                fence_seed=seed("fence"),
                priority=JUDGE_PRIORITY,
                data=task.prompt.data,
            )
            for number in range(self.config.compare.judgements)
        ]

    def prompt_of(self, task: Task, responses: Sequence[Response]) -> tuple[int, ...]:
        """What the judge saw, which is the same for all judgements of a group."""
        return self.compare.prompt_of(self.matches(task, responses)[0])

    def made(self, task: Task, responses: Sequence[Response], compared: Sequence[Judgement]) -> Made:
        """What a group gives beside its judgements: no pairs, and the reason where none is imitated."""
        found = right_one(compared, self.context.seed)
        return found if isinstance(found, NoPair) else ()

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        examples = [self.example(group) for group in groups if not group.no_pair_reason]
        order = evenly([one.id for one in examples], self.context.seed, iteration)
        dropped = reasons_of(groups) + Counter({EVENED: len(examples) - len(order)})
        if not order:
            raise NoItems(f"iteration {iteration} has no judgement to imitate: {dict(dropped)}")
        items = [examples[at] for at in order]
        return Batch(items=items, groups=groups, dropped=dropped, measures={"taught": position(groups)})

    def example(self, group: Group) -> Example:
        chosen = right_one(group.comparisons, self.context.seed)
        assert isinstance(chosen, Judgement), chosen
        asked = self.prompt_of(Task(iteration=group.iteration, prompt=group.prompt), group.responses)
        return Example(id=chosen.id, kind="judge", prompt_token_ids=asked, target_token_ids=chosen.token_ids)

    def row(self, group: Group, judgement: Judgement) -> dict[str, str]:
        """A judgement to imitate as a line of a file for source `path` of recipe sft."""
        match = self.matches(Task(iteration=group.iteration, prompt=group.prompt), group.responses)[0]
        return {"id": judgement.id, "prompt": self.compare.text_of(match), "target": judgement.text}

    @property
    def width(self) -> int:
        return int(self.config.compare.judgements)

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        compare, answer = config.compare, config.sample.max_tokens
        return Demand(
            requests={
                "prompter": (prompts, answer),
                "actor": (2 * prompts, answer),
                "duel": (prompts * compare.judgements, compare.max_tokens),
            },
            items=prompts,
            item_tokens=JUDGE_PROMPT + 2 * answer + (2 if cls.trains == "pairs" else 1) * compare.max_tokens,
        )

    def needs(self) -> dict[str, int]:
        answer = self.config.sample.max_tokens
        return {
            "sample.max_tokens": len(self.context.asked("")) + answer,
            "the request for another instruction": self.similar.needs() + answer,
            "the judge of two responses": self.compare.needs(2 * answer),
        }

    @property
    def asks(self) -> list[str]:
        return [self.similar.source, self.compare.source]


class SelfTaughtDPO(SelfTaught):
    class Config(SelfTaught.Config):
        train: WithLikelihood

    trains = "pairs"

    def made(self, task: Task, responses: Sequence[Response], compared: Sequence[Judgement]) -> Made:
        return pair(compared, self.prompt_of(task, responses), self.context.seed)

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        pairs = pairs_of(groups)
        kept = in_order(pairs, lambda ids: evenly(ids, self.context.seed, iteration))
        dropped = reasons_of(groups) + Counter({EVENED: len(pairs) - len(kept)})
        return Batch(items=kept, groups=groups, dropped=dropped, measures={"taught": position(groups)})


def instruction_of(written: Response, question: str) -> str | NoPair:
    """The instruction that was written, or why it is of no use."""
    text = written.text.strip()
    if not written.complete:
        return NoPair(reason="other instruction cut")
    if not text:
        return NoPair(reason="other instruction empty")
    return NoPair(reason="other instruction the same") if wording(text) == wording(question) else text
