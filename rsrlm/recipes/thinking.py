"""Thinking LLMs (2410.10630): the model thinks before it answers; judges see the answer alone, and both are trained.

The run's `thought` section asks for the thought, in training and in evaluations. Of a response without exactly one
marker, or with nothing after it, no answer is known: it takes no part. Length control is a penalty: the normalised
length of the answer, `pair.rho` times, off the normalised score.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from rsrlm.judges.base import Context, mean_verdicts
from rsrlm.pairing import POINTS, Candidate, candidates, pair_of
from rsrlm.recipes.parts import standardised
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Judgement, NoPair, PreferencePair, Response, Task
from rsrlm.settings.base import ConfigError, Number, Section
from rsrlm.settings.methods import JudgeConfig, PerIteration, Sample, TakingPart
from rsrlm.settings.train import DPO


class Penalty(TakingPart):
    rho: Number = Field(0.25, ge=0, description="deviations of the score that one deviation of the length costs")


class Thinking(SelfRewarding):
    class Config(Section):
        prompts: PerIteration
        sample: Sample
        judge: JudgeConfig
        pair: Penalty = Penalty()
        train: DPO

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        if not context.marker:
            raise ConfigError(
                "recipe thinking trains thoughts, but thought is not set: write thought: {} for rsrlm's template, or "
                "thought: {template: FILE, marker: TEXT}; or use recipe self_rewarding"
            )
        super().__init__(config, context, judge_context)

    def pair(
        self, task: Task, responses: Sequence[Response], judgements: Sequence[Judgement]
    ) -> PreferencePair | NoPair:
        answered = [response for response in responses if response.text.strip()]
        if not answered:
            return NoPair(reason="no answer after a thought")
        taking_part = candidates(answered, mean_verdicts(responses, judgements), self.config.pair)
        return pair(task.id, taking_part, self.config.pair.rho)


def pair(group: str, taking_part: Sequence[Candidate], rho: float) -> PreferencePair | NoPair:
    """The response with the highest score after the penalty against the one with the lowest; of equal ones the lowest
    index counts. The pair carries the judge's scores, of which the chosen one's may be the lower."""
    if len(taking_part) < 2 or not any(one.may_win for one in taking_part):
        return NoPair(reason="fewer than two scored responses" if len(taking_part) < 2 else "no complete response")
    after = penalised([one.points for one in taking_part], [len(one.response.text) for one in taking_part], rho)
    ranked = [replace(one, points=points) for one, points in zip(taking_part, after, strict=True)]
    chosen = max((one for one in ranked if one.may_win), key=POINTS)
    rejected = min(ranked, key=POINTS)
    made = pair_of(group, chosen, rejected)
    judged = {one.response.id: one.points for one in taking_part}
    return (
        made
        if isinstance(made, NoPair)
        else replace(made, chosen_score=judged[made.chosen_id], rejected_score=judged[made.rejected_id])
    )


def penalised(points: Sequence[float], lengths: Sequence[int], rho: float) -> list[float]:
    """Each score less rho times the length, both normalised over the group: less their mean, over their population
    deviation."""
    return [score - rho * length for score, length in zip(standardised(points), standardised(lengths), strict=True)]
