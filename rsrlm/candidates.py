"""Which of an iteration's candidates becomes its model: the validation prompts decide (2401.10020v3, section 3.1.3)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsrlm.config import Config
from rsrlm.engines import Model
from rsrlm.evaluate import Evaluation, gain_of_duels, gain_of_scores, is_better, named, validates
from rsrlm.records import Judgement, Response
from rsrlm.report import metrics
from rsrlm.run import Run
from rsrlm.settings.train import TrainRule
from rsrlm.store.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the candidates of an iteration are judged."""

    config: Config
    rule: TrainRule
    evaluation: Evaluation
    before: Model

    async def best_of(self, run: Run, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """The best of the model before and the candidates in the order of training; and what each gained on the best
        before it.

        A candidate that is not better beyond the interval of its gain is passed over; with early stopping it is the
        last that is looked at.
        """
        rule = self.rule
        best, gains = self.before.name, {}
        # Without early stopping all are looked at, and every engine loads each model once.
        looked_at = [self.before.name] if rule.early_stop else [self.before.name, *names]
        answers = {name: await self._answers(run, name) for name in looked_at}
        judged: dict[str, list[Judgement]] = {}
        for name in names:
            if name not in answers:
                answers[name] = await self._answers(run, name)
            gain = await self._gain(run, answers, judged, name, best)
            figure = metrics.mean_figure(gain, seed=self.config.seed)
            gains[name] = {"over": best, "by": rule.choose, "judge": named(self._by), **figure}
            run.say(f"{name} over {best} by {named(self._by)} ({rule.choose}): {shown_gain(figure)}")
            if is_better(figure):
                best = name
            elif rule.early_stop:
                break
        return best, gains

    @property
    def _by(self) -> str:
        """The validator, or else the judge with the weights that the iteration started from."""
        external = self.config.validator.external
        return validates(external) if external else self.before.name

    async def _answers(self, run: Run, name: str) -> list[Response]:
        return await self.evaluation.answers(await run.load(await run.pools.model(name)))

    async def _gain(
        self, run: Run, answers: dict[str, list[Response]], judged: dict[str, list[Judgement]], name: str, best: str
    ) -> list[float]:
        evaluation, by = self.evaluation, self._by
        validators = await run.validator(self.before)
        if self.rule.choose == "duel":
            return gain_of_duels(await evaluation.outcomes(validators, by, answers[name], answers[best]))
        for one in (name, best):
            if one not in judged:
                judged[one] = await evaluation.scores(evaluation.validating, validators, by, answers[one])
        return gain_of_scores(answers[name], judged[name], answers[best], judged[best])


async def choose(run: Run, store: RunFolder, choice: Choice, iteration: int, name: str) -> dict[str, Any]:
    """Make one of the iteration's candidates its model, or keep the model before. Returns what was found."""
    finished = store.iteration(iteration) / "chosen.json"
    if not finished.exists():
        names = store.candidates(name)
        best, gains = await choice.best_of(run, names)
        store.write_json(finished, {"candidates": names, "found": gains, "chosen": best})
        run.say(f"iteration {iteration}: {best} of {', '.join([choice.before.name, *names])} becomes {name}")
    chosen: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    await run.publish(choice.before)  # a replica that restarts meanwhile must not look for a folder that goes
    before = choice.before.folder
    assert before is not None
    store.take_candidate(name, chosen["chosen"], before)
    return chosen


async def goes_on(run: Run, store: RunFolder, choice: Choice, name: str, steps: int) -> bool:
    """Early stopping: whether the candidate of this step is better than those before it and the model before."""
    names = [one for one in store.candidates(name)[:-1] if int(one.rpartition("@")[2]) <= steps]
    best, _ = await choice.best_of(run, names)
    if best != names[-1]:
        run.say(f"{names[-1]} is not better than {best}: training ends")
    return best == names[-1]


def shown_gain(gain: metrics.Figure) -> str:
    """A mean gain with its interval and denominator."""
    if not gain["estimable"]:
        return f"cannot be told apart: {gain['n']} prompts are readable for both, {metrics.MIN_N} are needed"
    return f"gain {gain['value']:.3f} ({gain['low']:.3f} to {gain['high']:.3f}, n={gain['n']})"
