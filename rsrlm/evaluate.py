"""Held-out prompts: what a model answers, how the judges score it, and whether it beats the model before it.

Two judges are kept apart and always named: the current model, whose taste moves with training, and one that stays: the
config's validator, or the frozen first model M0. Which of two models wins is asked of the latter in both orders; orders
that disagree are a tie. Answers of two models are compared prompt by prompt, where both could be read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from rsrlm.ask import SAMPLE_PRIORITY, Engines, Judging, duel_judge, gather, respond, winner_of
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config, SamplingParams
from rsrlm.judges import verdicts as judging
from rsrlm.produce import mean_verdicts
from rsrlm.records import Judgement, Prompt, Request, Response, Sampling, Scored, Unparsed, seed_of
from rsrlm.report import metrics
from rsrlm.store.folder import Journal

EVALUATION = 1_000_000  # an iteration number of its own: no seed of an evaluation meets one of the training


class Evaluation:
    """Evaluates one model after the other on the same prompts."""

    def __init__(
        self,
        config: Config,
        encoder: ChatEncoder,
        judge: Judging,
        prompts: Sequence[Prompt],
        validating: Judging | None = None,
    ) -> None:
        """`judge` gives the rewards, `validating` scores where somebody else validates."""
        self._config = config
        self._encoder = encoder
        self.judge = judge
        self.validating = validating or judge
        self.prompts = prompts
        compared = any(step.compares for step, _ in config.distinct)
        self._pairwise = duel_judge(config, self.validating.encoder) if compared else None

    def needs(self) -> dict[str, int]:
        """Tokens of each kind of request beside those of the question."""
        answer = self._config.evaluate.max_tokens
        return {
            "evaluate.max_tokens": len(self._encoder.user("")) + answer,
            "the judge of a held-out answer": max(self.judge.needs(answer), self.validating.needs(answer)),
            "the judge of two held-out answers": self._pairwise.needs(2 * answer) if self._pairwise else 0,
        }

    async def answers(self, engines: Engines, model: str, journal: Journal) -> list[Response]:
        """The answers of the model that the engines hold, in the order of the prompts."""

        async def one(prompt: Prompt) -> Response:
            group = f"{model}/{prompt.id}"
            found = journal.responses.get(f"{group}/0")
            if found is None:
                seed = seed_of(self._config.seed, EVALUATION, group, "actor", "0")
                found = await respond(engines, self._encoder, prompt, 0, self._config.evaluate, group=group, seed=seed)
                journal.add(found)
            return found

        return await gather([one(prompt) for prompt in self.prompts])

    async def samples(self, engines: Engines, model: str) -> list[Response]:
        """An answer of the model that the engines hold to each prompt, drawn from its whole distribution: temperature
        1, without top_p and top_k. Deterministic, and not kept."""
        params = SamplingParams(temperature=1.0, max_tokens=self._config.evaluate.max_tokens)
        work = []
        for prompt in self.prompts:
            group = f"{model}/{prompt.id}"
            seed = seed_of(self._config.seed, EVALUATION, group, "actor", "kl")
            group = f"{group}/kl"
            work.append(respond(engines, self._encoder, prompt, 0, params, group=group, seed=seed))
        return await gather(work)

    async def logprobs(self, engines: Engines, answers: Sequence[Response]) -> list[tuple[float, ...]]:
        """Log-probabilities of each answer's tokens under the model that the engines hold, in nats, at temperature 1.

        An answer that fills the context to its last token lacks that token: one is generated for every request.
        """
        room = self._config.engine.max_model_len - 1
        requests = [
            Request(
                id=f"{answer.id}/logprobs",
                prompt_token_ids=(answer.prompt_token_ids + answer.token_ids)[:room],
                sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, seed=0),
                priority=SAMPLE_PRIORITY,
                score_from=len(answer.prompt_token_ids),
            )
            for answer in answers
        ]
        return [found.prompt_logprobs for found in await gather([engines.generate(one) for one in requests])]

    async def scores(
        self, judge: Judging, engines: Engines, judge_model: str, answers: Sequence[Response], journal: Journal
    ) -> list[Judgement]:
        """Judgements of the answers by `judge` with the weights of `judge_model`, which the engines hold."""

        async def one(prompt: Prompt, answer: Response, index: int) -> Judgement:
            identifier = f"{answer.id}#{index}@{judge_model}"
            found = journal.judgements.get(identifier)
            if found is None:
                made = await judge.judge(
                    engines,
                    prompt,
                    answer,
                    index,
                    group=f"{answer.id}@{judge_model}",
                    iteration=EVALUATION,
                )
                found = replace(made, id=identifier)
                journal.add(found)
            return found

        return await gather(
            [
                one(prompt, answer, index)
                for prompt, answer in zip(self.prompts, answers, strict=True)
                for index in range(judge.per_response)
            ]
        )

    async def duel(
        self, engines: Engines, judge_model: str, new: Sequence[Response], old: Sequence[Response], journal: Journal
    ) -> dict[str, Any]:
        """Share of the prompts that the new answers win, tie and lose, by the pairwise judge in both orders."""
        outcomes = await self.outcomes(engines, judge_model, new, old, journal)
        readable = [outcome for outcome in outcomes if not isinstance(outcome, Unparsed)]
        return {
            "judge": f"{self._pairwise.name if self._pairwise else 'none'} by {named(judge_model)}, both orders",
            "n": len(readable),
            "unreadable": len(outcomes) - len(readable),
            "win": share(readable, "first"),
            "tie": share(readable, "tie"),
            "loss": share(readable, "second"),
        }

    async def outcomes(
        self, engines: Engines, judge_model: str, new: Sequence[Response], old: Sequence[Response], journal: Journal
    ) -> list[judging.Preferred | Unparsed]:
        """Which answer to each prompt is better, "first" being the new one; orders that disagree are a tie."""
        return await gather(
            [
                self._outcome(engines, judge_model, prompt, a, b, journal)
                for prompt, a, b in zip(self.prompts, new, old, strict=True)
            ]
        )

    async def _outcome(
        self, engines: Engines, judge_model: str, prompt: Prompt, new: Response, old: Response, journal: Journal
    ) -> judging.Preferred | Unparsed:
        if new.token_ids == old.token_ids:
            return "tie"
        first, second = await gather(
            [
                self._shown(engines, judge_model, prompt, new, old, 0, journal),
                self._shown(engines, judge_model, prompt, old, new, 1, journal),
            ]
        )
        return judging.combine_orders(winner_of(first), winner_of(second))

    async def _shown(
        self,
        engines: Engines,
        judge_model: str,
        prompt: Prompt,
        a: Response,
        b: Response,
        order: int,
        journal: Journal,
    ) -> Judgement:
        """The pairwise verdict with `a` shown first. Its points are the share that A wins: 1, 0.5 or 0."""
        identifier = f"{a.id}>{b.id}@{judge_model}"
        if (found := journal.judgements.get(identifier)) is not None:
            return found
        assert self._pairwise is not None
        judgement = await self._pairwise.ask(
            engines,
            identifier,
            {"instruction": prompt.text, "response_a": a.text, "response_b": b.text},
            prompt_id=prompt.id,
            response_id=a.id,
            index=order,
            role="duel",
            seed=seed_of(self._config.seed, EVALUATION, prompt.id, "duel", f"{a.id}>{b.id}"),
            fence_seed=seed_of(self._config.seed, EVALUATION, prompt.id, "duel", "fence"),
            priority=SAMPLE_PRIORITY,
        )
        journal.add(judgement)
        return judgement


def kl_per_token(
    of_model: Sequence[Sequence[float]], of_first: Sequence[Sequence[float]]
) -> dict[str, float | int | None]:
    """KL(model || first) in nats per token, from the log-probabilities of the model's own samples under both.

    The mean of exp(r) - 1 - r with r = log first - log model (the k3 estimator): no term is negative, and the
    expectation is the divergence if the tokens were drawn at temperature 1 without top_p and top_k. None without
    tokens, and where a model gives no finite number.
    """
    ratios = [
        first - own for model, m0 in zip(of_model, of_first, strict=True) for own, first in zip(model, m0, strict=True)
    ]
    finite = bool(ratios) and all(map(math.isfinite, ratios))
    return {
        # Beyond exp(50) the number says no more than that the models have nothing in common.
        "per_token": fmean(math.expm1(min(r, 50.0)) - r for r in ratios) if finite else None,
        "tokens": len(ratios),
    }


def gain_of_scores(
    new: Sequence[Response], new_judged: Sequence[Judgement], old: Sequence[Response], old_judged: Sequence[Judgement]
) -> list[float]:
    """New mean score less old one, in points, of each prompt with a readable score on both sides."""
    scores = [
        {answer.prompt_id: verdicts[answer.id] for answer in answers}
        for answers, verdicts in ((new, mean_verdicts(new, new_judged)), (old, mean_verdicts(old, old_judged)))
    ]
    return [
        one.points - other.points
        for prompt, one in scores[0].items()
        if isinstance(one, Scored) and isinstance(other := scores[1][prompt], Scored)
    ]


def gain_of_duels(outcomes: Sequence[judging.Preferred | Unparsed]) -> list[float]:
    """1 for a prompt that the new answer wins, 0 for a tie, -1 for a loss; unreadable ones are left out."""
    worth = {"first": 1.0, "tie": 0.0, "second": -1.0}
    return [worth[outcome] for outcome in outcomes if not isinstance(outcome, Unparsed)]


def is_better(gain: metrics.Figure) -> bool:
    """Whether a mean gain is above 0 beyond its interval; one that cannot be estimated is not."""
    return bool(gain["estimable"]) and gain["low"] > 0


def validates(name: str) -> str:
    """In the ids of judgements: the validator is another judge than that of the rewards, though names be the same."""
    return f"validator {name}"


def named(judge_model: str) -> str:
    return judge_model.removeprefix("validator ")


def share(outcomes: Sequence[str], outcome: str) -> float | None:
    return outcomes.count(outcome) / len(outcomes) if outcomes else None


def mean_score(answers: Sequence[Response], judgements: Sequence[Judgement]) -> dict[str, float | int | None]:
    """Mean over the answers with a readable score, and their number."""
    verdicts: Mapping[str, Any] = mean_verdicts(answers, judgements)
    points = [verdict.points for verdict in verdicts.values() if isinstance(verdict, Scored)]
    return {"mean": fmean(points) if points else None, "n": len(points)}


def lengths(answers: Sequence[Response]) -> dict[str, float | None]:
    """Mean length of the answers, and the share that ended by themselves."""
    if not answers:
        return {"tokens": None, "words": None, "complete": None}
    return {
        "tokens": fmean(len(answer.token_ids) for answer in answers),
        "words": fmean(len(answer.text.split()) for answer in answers),
        "complete": fmean(answer.complete for answer in answers),
    }
