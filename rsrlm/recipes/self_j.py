"""Self-J (2409.00935): a judge of one's own answers, trained without anybody's scores.

The model answers prompts that come with a reference and rates its answers with the reference in view. That rating, and
how similar answer and reference are, give each answer a grade: the grades are equally frequent. The model then learns
to give them with the reference in view and without, where it is also taught by what it says with it.

Afterwards it judges without references: `judge.kind: digits` with the template `self_j`, whose score is the expected
grade. The paper's measure of similarity is a cosine of embeddings; here it is ROUGE-L.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from rsrlm.data.prompt_pool import rouge_l
from rsrlm.engines import Engines
from rsrlm.judges.base import Context, Origin, judge_of
from rsrlm.judges.digits import Digits
from rsrlm.recipes.base import JUDGE_PROMPT, Batch, Demand, NoItems, respond
from rsrlm.recipes.parts import REFERENCE, check_carried, group_of, standardised
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, Prompt, Scored, Task, TwoViews, Unparsed
from rsrlm.settings.base import ConfigError, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, SamplingParams
from rsrlm.settings.train import Distillation


class SelfJ(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: SamplingParams
        judge: JudgeConfig
        teacher: str = Field(
            "self_j_reference", description="template that shows {{ data.reference }} beside the answer"
        )
        train: Distillation

        @model_validator(mode="after")
        def _one_token(self) -> Self:
            if self.judge.kind != "digits" or self.judge.external:
                raise ValueError(
                    f"recipe self_j trains the model itself to grade with one digit, but judge.kind={self.judge.kind} "
                    f"by {self.judge.external or 'the model'}; set judge: {{kind: digits, template: self_j}}"
                )
            return self

    trains = "examples"
    width = 1
    judge: Digits

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        super().__init__(config, context, judge_context)
        teacher = judge_of(config.judge.model_copy(update={"template": config.teacher}), judge_context)
        assert isinstance(teacher, Digits)
        self.teacher = teacher
        if teacher.form != self.judge.form:
            raise ConfigError(
                f"teacher={config.teacher!r} and judge.template={config.judge.template!r}: their verdicts differ "
                f"({teacher.form} and {self.judge.form}); give both the same first line"
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_carried(prompts, REFERENCE, "which recipe self_j compares the model's answer with")

    async def group(self, engines: Engines, task: Task) -> Group:
        response = await respond(engines, self.context, task, 0, self.config.sample)
        judged = await self.teacher(engines, task.prompt, response, origin_of(task))
        return group_of(task, [response], judged, ())

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        dropped: Counter[str] = Counter()
        rated: dict[str, tuple[float, float]] = {}
        for group in groups:
            (response,), (judgement,) = group.responses, group.judgements
            if not response.text.strip():
                dropped["no text"] += 1
            elif isinstance(judgement.verdict, Unparsed):
                dropped[judgement.verdict.reason] += 1
            elif isinstance(judgement.verdict, Scored):
                similarity = rouge_l(response.text, group.prompt.data[REFERENCE])
                rated[group.id] = judgement.verdict.points, similarity
        grades = grades_of(rated, len(self.judge.labels))
        made = [self.views(group, grades[group.id]) for group in groups if group.id in grades]
        if not made:
            raise NoItems(f"iteration {iteration}: no answer could be rated: {dict(dropped)}")
        random.Random(f"views {self.context.seed} {iteration}").shuffle(made)
        return Batch(items=made, groups=groups, dropped=dropped)

    def views(self, group: Group, grade: int) -> TwoViews:
        task, (response,) = Task(iteration=group.iteration, prompt=group.prompt), group.responses
        teacher, student = (
            judge.prompt_of(group.prompt, response, origin_of(task)) for judge in (self.teacher, self.judge)
        )
        return TwoViews(
            id=response.id,
            kind="self_j",
            teacher_token_ids=teacher,
            student_token_ids=student,
            label_token_ids=self.judge.labels,
            label=grade,
        )

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        return Demand(
            requests={"actor": (prompts, config.sample.max_tokens), "judge": (prompts, 1)},
            items=prompts,
            item_tokens=2 * (JUDGE_PROMPT + config.sample.max_tokens),
        )

    def needs(self) -> dict[str, int]:
        answer = self.config.sample.max_tokens
        return {**super().needs(), "the judge that sees the reference": self.teacher.needs(answer)}

    @property
    def asks(self) -> list[str]:
        return [self.teacher.source, self.judge.source]


def origin_of(task: Task) -> Origin:
    return Origin(iteration=task.iteration, name=f"{task.id}/0")


def grades_of(rated: Mapping[str, tuple[float, float]], grades: int) -> dict[str, int]:
    """The grade of each (rating, similarity), from 0 to `grades` - 1, as many of each as can be.

    Both are standardised over all (less their mean, over their population deviation) and added; equal sums are in the
    order of their ids.
    """
    columns = [standardised([values[place] for values in rated.values()]) for place in range(2)]
    sums = {name: one + other for name, one, other in zip(rated, *columns, strict=True)}
    ranked = sorted(sums, key=lambda name: (sums[name], name))
    return {name: grades * rank // len(ranked) for rank, name in enumerate(ranked)}
