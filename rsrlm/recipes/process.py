"""Process-based self-rewarding (2503.03746): step by step, the model compares its own candidates for the next step.

The best against the worst of them is a pair behind the steps that both follow, and the answer goes on from the best.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

from pydantic import Field

from rsrlm.engines import JUDGE_PRIORITY, Engines, gather
from rsrlm.judges import templates
from rsrlm.judges.base import Context
from rsrlm.judges.pairwise import Match
from rsrlm.recipes.base import Demand
from rsrlm.recipes.comparing import Compares, Comparing, Comparison, win_rates
from rsrlm.recipes.lines import PARTS, Line, Lines
from rsrlm.recipes.parts import group_of
from rsrlm.recipes.steps import pair
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Response, Task
from rsrlm.settings.methods import SamplingParams


class StepComparison(Comparison):
    soft: bool = Field(False, description="go by the judge's probability instead of its verdict, as the paper does not")
    template: str = Field("steps", description="a name of rsrlm's or a Jinja2 file, which also prints steps")


class ProcessBased(Comparing):
    class Config(Compares):
        sample: SamplingParams
        line: Line = Line()
        candidates: int = Field(6, ge=2, description="for each step (w)")
        depth: int = Field(20, gt=0, description="steps of an answer, at most")
        rollbacks: int = Field(3, ge=0, description="of an answer; after one more it ends with the pairs that it has")
        compare: StepComparison = StepComparison()

    shown = templates.PAIRWISE_VARIABLES | {"steps"}

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        self.lines = Lines(context, config.sample, config.line)

    async def group(self, engines: Engines, task: Task) -> Group:
        """Where no candidate is better than another, the step before is taken back with its pair, and sampled anew. At
        the first step the question is given up."""
        path: list[tuple[Response, PreferencePair]] = []  # the answer up to each step, and the step's pair
        steps: list[Response] = []
        compared: list[Judgement] = []
        tries, reason, back = Counter[int](), "", 0
        while len(path) < self.config.depth and back <= self.config.rollbacks:
            begun = path[-1][0] if path else self.lines.start(task, "s")
            if self.lines.is_done(begun):
                break
            number = len(path) + 1
            name = f"s{number}r{tries[number]}" if tries[number] else f"s{number}"
            tries[number] += 1
            names = [f"{name}.{index}" for index in range(self.config.candidates)]
            answers = await gather(self.lines.follow(engines, task, begun, one) for one in names)
            made = [self.lines.step(begun, one, index) for index, one in enumerate(answers)]
            said = await self.compare(engines, self.matches(task, begun.text, made, name))
            steps, compared = [*steps, *made], [*compared, *said]
            rates = win_rates(made, said, self.config.compare.soft)
            found = pair(task.id, made, rates, [self.may_win(one) for one in answers])
            if isinstance(found, PreferencePair):
                path.append((next(one for one in answers if one.id == found.chosen_id), found))
                continue
            reason, back = found.reason, back + 1
            if not path:
                break
            path.pop()
        pairs = [one for _, one in path]
        return replace(group_of(task, steps, (), pairs or NoPair(reason=reason)), comparisons=tuple(compared))

    def may_win(self, answer: Response) -> bool:
        """Something is written, and the length limit did not cut it."""
        return bool(answer.text.strip()) and (answer.complete or not self.lines.is_done(answer))

    def matches(self, task: Task, begun: str, steps: Sequence[Response], name: str) -> list[Match]:
        """All steps two by two in both orders, but for those of the same text."""
        seed = self.context.seed_of
        return [
            Match(
                id=f"{first.id}~{second.index}",
                prompt_id=task.prompt.id,
                response_id=first.id,
                index=first.index,
                role="duel",
                fields={
                    "instruction": task.prompt.text, "steps": begun,
                    "response_a": first.text, "response_b": second.text,
                },
                seed=seed(task.iteration, task.id, "duel", f"{name}.{first.index}~{second.index}"),
                fence_seed=seed(task.iteration, task.id, "duel", f"{name} fence"),
                priority=JUDGE_PRIORITY,
                data=task.prompt.data,
            )
            for first, second in permutations(steps, 2)
            if first.text != second.text
        ]  # fmt: skip

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        """At most: a step that is taken back is made again, as is the one after it. The two requests for a line share
        its tokens."""
        rounds, count = config.depth + 2 * config.rollbacks, config.candidates
        return Demand(
            requests={
                "actor": (prompts * rounds * count * PARTS, -(-config.line.max_tokens // PARTS)),
                "duel": (prompts * rounds * count * (count - 1), config.compare.tokens),
            },
            items=prompts * config.depth,
            item_tokens=config.sample.max_tokens + config.line.max_tokens + 64,  # with a prompt of usual length
        )

    @property
    def width(self) -> int:
        return int(self.config.candidates)

    def needs(self) -> dict[str, int]:
        answer = self.config.sample.max_tokens
        shown = answer + self.config.line.max_tokens  # of two steps, one stands beside the rest
        own = {"sample.max_tokens": len(self.context.asked("")) + answer}
        return {**own, "the judge of two steps": self.compare.needs(shown)}
