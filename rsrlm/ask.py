"""What engines are asked for, and the records that come of it: answers, judgements, comparisons.

Every request has a seed of its own, so neither the order of requests nor the load of the engines matters.
"""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rsrlm.chat import ChatEncoder
from rsrlm.config import Config, ConfigError, Judge, Meta, SamplingParams, Validator
from rsrlm.judges import verdicts as judging
from rsrlm.judges.function import FunctionJudge
from rsrlm.records import (
    Completion,
    Judgement,
    Prompt,
    Request,
    Response,
    Role,
    Sampling,
    Scored,
    Unparsed,
    Verdict,
    seed_of,
)

SAMPLE_PRIORITY = 10
JUDGE_PRIORITY = 0
LONGEST_FENCE = "0" * 8  # tokenizers split digits at least as far as letters


def fence_of(seed: int, salt: str | None) -> str:
    """The fence of a prompt by its seed and the run's salt (judge.fence_salt); without a salt who knows the seed can
    compute it. A run that starts has a salt (`launch.started`)."""
    return judging.fence_of(seed_of(seed, 0, salt, "judge", "fence") if salt else seed)


class Engines(Protocol):
    """A pool of engines with one set of weights."""

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        ...

    async def generate(self, request: Request) -> Completion: ...


def sampling_of(params: SamplingParams | Judge | Meta | Validator, seed: int) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        seed=seed,
    )


async def respond(
    engines: Engines,
    encoder: ChatEncoder,
    prompt: Prompt,
    index: int,
    params: SamplingParams,
    *,
    group: str,
    seed: int,
    role: Role = "actor",
) -> Response:
    """One sampled answer to a prompt."""
    token_ids = encoder.user(prompt.text)
    identifier = f"{group}/{index}"
    sampling = sampling_of(params, seed)
    request = Request(id=identifier, prompt_token_ids=token_ids, sampling=sampling, priority=SAMPLE_PRIORITY)
    completion = await engines.generate(request)
    return Response(
        id=identifier,
        prompt_id=prompt.id,
        index=index,
        role=role,
        text=completion.text,
        token_ids=completion.token_ids,
        prompt_token_ids=token_ids,
        finish_reason=completion.finish_reason,
        weight_version=completion.weight_version,
        sampling=sampling,
    )


# One pool of processes for all iterations that judge by the same function.
function_judge = functools.cache(FunctionJudge)


class Judging:
    """The judge of a config: what it asks an engine about a response, and how it reads the answer."""

    def __init__(self, config: Config, encoder: ChatEncoder) -> None:
        self._judge = config.judge
        self._room = config.engine.max_model_len
        self._seed = config.seed
        self._salt = config.judge.fence_salt
        self.encoder = encoder
        self._function: FunctionJudge | None = None
        self._template = ""
        self.form = judging.SCORE
        self._labels: tuple[int, ...] = ()
        self._regex: str | None = None
        judge = config.judge
        if judge.read == "function":
            assert judge.function is not None
            self._function = function_judge(judge.function, judge.timeout_s)
            self.name = judge.function
            return
        template = judge.template
        if judge.read == "digits":
            template = "additive_digits" if template == "additive" else template
        self._template = judging.load_template(template, judging.ADDITIVE_VARIABLES, "judge.template")
        self.form = judging.form_of(self._template, judging.SCORE, f"judge.template={template!r}")
        if judge.read == "digits":
            self._labels = judging.label_ids(encoder.tokenizer, self.form.prefix, self.form.labels)
        elif judge.read == "structured":
            self._regex = judging.points_regex(judge.max_tokens, self.form)
        self.name = f"{template} ({judge.read})"

    @property
    def source(self) -> str:
        """What the judge asks: a template's source or a function's name."""
        return self._template or self.name

    @property
    def per_response(self) -> int:
        return self._judge.per_response

    @property
    def max_tokens(self) -> int:
        """Tokens that one judgement may generate."""
        return {"function": 0, "digits": 1}.get(self._judge.read, self._judge.max_tokens)

    def needs(self, response_tokens: int) -> int:
        """Tokens of a request beside those of the question, about a response of so many; 0 where no engine is asked."""
        if self._function is not None or self._judge.endpoint:
            return 0
        fields = {"instruction": "", "response": "", "fence": LONGEST_FENCE}
        prefix = self.form.prefix if self._labels else ""
        return len(self.encoder.encode(self._template, fields, prefix)) + response_tokens + self.max_tokens

    def prompt_of(self, prompt: Prompt, response: Response, *, group: str, iteration: int) -> tuple[int, ...]:
        """The tokens that the judge sees: the same for all judgements of a response, which share the prefix cache."""
        fields = self._fields(prompt, response, group, iteration)
        return self.encoder.encode(self._template, fields, self.form.prefix if self._labels else "")

    def _fields(self, prompt: Prompt, response: Response, group: str, iteration: int) -> dict[str, str]:
        shown = {"instruction": prompt.text, "response": response.text}
        seed = seed_of(self._seed, iteration, f"{group}/{response.index}", "judge", "fence")
        views = {name: judging.claimed(text, self.form) for name, text in shown.items()}
        return {**views, "fence": fence_of(seed, self._salt)}

    async def judge(
        self, engines: Engines, prompt: Prompt, response: Response, index: int, *, group: str, iteration: int
    ) -> Judgement:
        """Judgement `index` of a response."""
        identifier = f"{response.id}#{index}"
        if self._function is not None:
            verdict = await self._function(prompt.text, response.text)
            return self._record(identifier, response, index, verdict, None, None)
        own = f"{group}/{response.index}"
        token_ids = self.prompt_of(prompt, response, group=group, iteration=iteration)
        text = ""
        if self._judge.endpoint:
            text = self.encoder.text(self._template, self._fields(prompt, response, group, iteration))
        sampling = Sampling(
            temperature=0.0 if self._labels else self._judge.temperature,
            top_p=1.0 if self._labels else self._judge.top_p,
            top_k=0 if self._labels else self._judge.top_k,
            max_tokens=self.max_tokens,
            seed=seed_of(self._seed, iteration, own, "judge", str(index)),
        )
        if len(token_ids) + self.max_tokens > self._room and not text:
            return self._record(identifier, response, index, Unparsed(reason="judge prompt too long"), None, sampling)
        request = Request(
            id=identifier,
            prompt_token_ids=token_ids,
            sampling=sampling,
            priority=JUDGE_PRIORITY if self._judge.priority else SAMPLE_PRIORITY,
            regex=self._regex,
            label_ids=self._labels,
            text=text,
        )
        completion = await engines.generate(request)
        verdict = (
            judging.read_distribution(completion.label_logprobs, self._judge.min_mass, self.form)
            if self._labels
            else judging.parse_points(completion.text, completion.finish_reason, self.form)
        )
        return self._record(identifier, response, index, verdict, completion, sampling)

    def _record(
        self,
        identifier: str,
        response: Response,
        index: int,
        verdict: Verdict,
        completion: Completion | None,
        sampling: Sampling | None,
    ) -> Judgement:
        return _judgement(
            completion,
            id=identifier,
            prompt_id=response.prompt_id,
            response_id=response.id,
            index=index,
            role="judge",
            judge=self.name,
            sampling=sampling,
            verdict=verdict,
        )


def _judgement(completion: Completion | None, **fields: Any) -> Judgement:
    """The record of an answer; without one, of a judgement that no engine was asked for."""
    return Judgement(
        text=completion.text if completion else "",
        token_ids=completion.token_ids if completion else (),
        finish_reason=completion.finish_reason if completion else "stop",
        weight_version=completion.weight_version if completion else "",
        **fields,
    )


class Comparing:
    """A pairwise judge: which of A and B is better, of two answers (a duel) or two judgements (the meta-judge).

    `read` letters takes the likelier letter in one decoding step; text and structured parse a winner line.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        config: Config,
        rule: Meta | Validator,
        variables: frozenset[str],
        key: str,
        form: judging.Form,
    ) -> None:
        read = rule.read
        other = {"pairwise": "pairwise_text"} if read != "letters" else {"meta": "meta_letters"}
        self.name = f"{other.get(rule.template, rule.template)} ({read})"
        self._encoder = encoder
        self._room = config.engine.max_model_len
        self._salt = config.judge.fence_salt
        self._rule = rule
        template = other.get(rule.template, rule.template)
        self._template = judging.load_template(template, variables, f"{key}.template")
        self._fields = {**dict.fromkeys(variables, ""), "fence": LONGEST_FENCE}
        self._form = form = judging.form_of(self._template, form, f"{key}.template={template!r}")
        self._letters = judging.label_ids(encoder.tokenizer, form.prefix, form.sides) if read == "letters" else ()
        self._by_text = config.validator.endpoint is not None and isinstance(rule, Validator)
        self._regex = judging.winner_regex(rule.max_tokens, form) if read == "structured" else None

    @property
    def source(self) -> str:
        """The template's source."""
        return self._template

    def needs(self, shown_tokens: int) -> int:
        """Tokens of a request beside those of the question, about texts of so many; 0 where no engine is asked."""
        if self._by_text:
            return 0
        prefix = self._form.prefix if self._letters else ""
        template = len(self._encoder.encode(self._template, self._fields, prefix))
        return template + shown_tokens + (1 if self._letters else self._rule.max_tokens)

    async def ask(
        self,
        engines: Engines,
        identifier: str,
        fields: Mapping[str, str],
        *,
        prompt_id: str,
        response_id: str,
        index: int,
        role: Role,
        seed: int,
        fence_seed: int,
        priority: int,
    ) -> Judgement:
        """The verdict with one of them shown as A. Its points are the share that A wins: 1, 0.5 for a tie, 0."""
        # One fence for both orders: nothing but the order differs between them.
        shown = {name: judging.claimed(text, self._form, pairwise=True) for name, text in fields.items()}
        fields = {**shown, "fence": fence_of(fence_seed, self._salt)}
        token_ids = self._encoder.encode(self._template, fields, self._form.prefix if self._letters else "")
        sampling = (
            Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, seed=seed)
            if self._letters
            else sampling_of(self._rule, seed)
        )
        completion = None
        verdict: Verdict = Unparsed(reason="judge prompt too long")
        if len(token_ids) + sampling.max_tokens <= self._room or self._by_text:
            completion = await engines.generate(
                Request(
                    id=identifier,
                    prompt_token_ids=token_ids,
                    sampling=sampling,
                    priority=priority,
                    regex=self._regex,
                    label_ids=self._letters,
                    text=self._encoder.text(self._template, fields) if self._by_text else "",
                )
            )
            winner = (
                judging.winner_from_distribution(completion.label_logprobs, self._rule.min_mass)
                if self._letters
                else judging.parse_winner(completion.text, completion.finish_reason, self._form)
            )
            verdict = winner if isinstance(winner, Unparsed) else Scored(points=POINTS[winner])
        return _judgement(
            completion,
            id=identifier,
            prompt_id=prompt_id,
            response_id=response_id,
            index=index,
            role=role,
            judge=self.name,
            sampling=sampling,
            verdict=verdict,
        )


POINTS: dict[judging.Winner, float] = {"A": 1.0, "tie": 0.5, "B": 0.0}


def winner_of(comparison: Judgement) -> judging.Winner | Unparsed:
    """A, B, tie or Unparsed of a pairwise judgement."""
    verdict = comparison.verdict
    if isinstance(verdict, Unparsed):
        return verdict
    return next(winner for winner, points in POINTS.items() if points == verdict.points)


def meta_judge(config: Config, encoder: ChatEncoder) -> Comparing:
    """The meta-judge of a config (2407.19594v2, section 2.3)."""
    return Comparing(encoder, config, config.meta, judging.META_VARIABLES, "meta", judging.META_WINNER)


def duel_judge(config: Config, encoder: ChatEncoder) -> Comparing:
    """The judge of two answers to one prompt. ConfigError where letters are to be read of a model behind an API."""
    if config.validator.endpoint and config.evaluate.judge.read == "letters":
        raise ConfigError("evaluate.judge.read=letters: an endpoint compares in text; set evaluate.judge.read=text")
    return Comparing(
        encoder, config, config.evaluate.judge, judging.PAIRWISE_VARIABLES, "evaluate.judge", judging.WINNER
    )


def validating(config: Config, encoder: ChatEncoder) -> Judging:
    """How the validator scores an answer."""
    return Judging(config.model_copy(update={"judge": config.validating}), encoder)


async def gather(work: Sequence[Any]) -> list[Any]:
    """All results in order; the first failure cancels the rest (asyncio.gather would leave them running)."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    return [task.result() for task in running]
