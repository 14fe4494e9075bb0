"""From a prompt to a group: K responses, each judged as soon as it is finished, and at most one pair.

The order of events does not matter: every request has a seed of its own and everything is keyed by id. What a journal
already holds is taken from there and not done again.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rsrlm import judging
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config, Judge, SamplingParams
from rsrlm.pairing import best_against_worst
from rsrlm.records import (
    Completion,
    Group,
    Judgement,
    Prompt,
    Request,
    Response,
    Role,
    Sampling,
    Unparsed,
    Verdict,
    group_id,
    seed_of,
)
from rsrlm.store import Journal

SAMPLE_PRIORITY = 10
JUDGE_PRIORITY = 0


class Engines(Protocol):
    """A pool of engines with one set of weights."""

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        ...

    async def generate(self, request: Request) -> Completion: ...


def sampling_of(params: SamplingParams | Judge, seed: int, max_tokens: int | None = None) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=max_tokens or params.max_tokens,
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


class Judging:
    """The judge of a config: what it asks an engine about a response, and how it reads the answer."""

    def __init__(self, config: Config, encoder: ChatEncoder) -> None:
        self._judge = config.judge
        self._room = config.engine.max_model_len
        self._seed = config.seed
        self._encoder = encoder
        self._function: Callable[[str, str], float] | None = None
        self._template = ""
        self._labels: tuple[int, ...] = ()
        self._regex: str | None = None
        judge = config.judge
        if judge.read == "function":
            assert judge.function is not None
            self._function = judging.load_function(judge.function)
            self.name = judge.function
            return
        template = judge.template
        if judge.read == "digits":
            template = "additive_digits" if template == "additive" else template
            self._labels = judging.label_ids(encoder.tokenizer, judging.ANSWER_PREFIX, judging.SCORES)
        elif judge.read == "structured":
            self._regex = judging.points_regex(judge.max_tokens)
        self._template = judging.load_template(template, judging.ADDITIVE_VARIABLES, "judge.template")
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

    def prompt_of(self, prompt: Prompt, response: Response, fence_seed: int) -> tuple[int, ...]:
        fields = {"instruction": prompt.text, "response": response.text, "fence": judging.fence_of(fence_seed)}
        prefix = judging.ANSWER_PREFIX if self._labels else ""
        return self._encoder.encode(self._template, fields, prefix)

    async def judge(
        self, engines: Engines, prompt: Prompt, response: Response, index: int, *, group: str, iteration: int
    ) -> Judgement:
        """Judgement `index` of a response."""
        identifier = f"{response.id}#{index}"
        if self._function is not None:
            verdict = judging.call_function(self._function, prompt.text, response.text)
            return self._record(identifier, response, index, verdict, None, None)
        own = f"{group}/{response.index}"
        # All judgements of a response share their prompt, and with it the prefix cache.
        token_ids = self.prompt_of(prompt, response, seed_of(self._seed, iteration, own, "judge", "fence"))
        sampling = Sampling(
            temperature=0.0 if self._labels else self._judge.temperature,
            top_p=1.0 if self._labels else self._judge.top_p,
            top_k=0 if self._labels else self._judge.top_k,
            max_tokens=self.max_tokens,
            seed=seed_of(self._seed, iteration, own, "judge", str(index)),
        )
        if len(token_ids) + self.max_tokens > self._room:
            return self._record(identifier, response, index, Unparsed(reason="judge prompt too long"), None, sampling)
        request = Request(
            id=identifier,
            prompt_token_ids=token_ids,
            sampling=sampling,
            priority=JUDGE_PRIORITY if self._judge.priority else SAMPLE_PRIORITY,
            regex=self._regex,
            label_ids=self._labels,
        )
        completion = await engines.generate(request)
        verdict = (
            judging.read_distribution(completion.label_logprobs, self._judge.min_mass)
            if self._labels
            else judging.parse_points(completion.text, completion.finish_reason)
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
        return Judgement(
            id=identifier,
            prompt_id=response.prompt_id,
            response_id=response.id,
            index=index,
            role="judge",
            judge=self.name,
            text=completion.text if completion else "",
            token_ids=completion.token_ids if completion else (),
            finish_reason=completion.finish_reason if completion else "stop",
            weight_version=completion.weight_version if completion else "",
            sampling=sampling,
            verdict=verdict,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made for a prompt, before it is a group."""

    responses: tuple[Response, ...]
    judgements: tuple[Judgement, ...]


def mean_verdicts(responses: Sequence[Response], judgements: Sequence[Judgement]) -> dict[str, Verdict]:
    """The mean verdict of each response, by its id."""
    of_response: dict[str, list[Judgement]] = {response.id: [] for response in responses}
    for judgement in sorted(judgements, key=lambda judgement: judgement.index):
        of_response[judgement.response_id].append(judgement)
    return {response: judging.mean_points(j.verdict for j in found) for response, found in of_response.items()}


class Producer:
    """Makes the groups of one iteration."""

    def __init__(
        self,
        config: Config,
        encoder: ChatEncoder,
        samplers: Engines,
        judges: Engines,
        judging: Judging,
        journal: Journal,
        iteration: int,
        tick: Callable[[str, int, int], None],
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._samplers = samplers
        self._judges = judges
        self._judging = judging
        self._journal = journal
        self._iteration = iteration
        self._tick = tick  # (stage, items, tokens)

    async def _scored_response(self, prompt: Prompt, index: int) -> Made:
        config, iteration, journal = self._config, self._iteration, self._journal
        group = group_id(iteration, prompt.id)
        response = journal.responses.get(f"{group}/{index}")
        if response is None:
            seed = seed_of(config.seed, iteration, prompt.id, "actor", str(index))
            response = await respond(
                self._samplers, self._encoder, prompt, index, config.sample, group=group, seed=seed
            )
            journal.add(response)
            self._tick("respond", 1, len(response.token_ids))
        else:
            self._tick("respond", 1, 0)

        async def judgement(number: int) -> Judgement:
            found = journal.judgements.get(f"{response.id}#{number}")
            if found is None:
                found = await self._judging.judge(
                    self._judges, prompt, response, number, group=group, iteration=iteration
                )
                journal.add(found)
                self._tick("judge", 1, len(found.token_ids))
            else:
                self._tick("judge", 1, 0)
            return found

        judgements = await gather([judgement(number) for number in range(self._judging.per_response)])
        return Made(responses=(response,), judgements=tuple(judgements))

    async def group(self, prompt: Prompt) -> Group:
        """The prompt's responses, judgements and pair."""
        made = await gather([self._scored_response(prompt, index) for index in range(self._config.sample.responses)])
        responses = tuple(response for one in made for response in one.responses)
        judgements = tuple(judgement for one in made for judgement in one.judgements)
        pair = best_against_worst(responses, mean_verdicts(responses, judgements), self._config.pair, self._iteration)
        return Group(
            id=group_id(self._iteration, prompt.id),
            iteration=self._iteration,
            prompt=prompt,
            responses=responses,
            judgements=judgements,
            pair=None if isinstance(pair, str) else pair,
            no_pair_reason=pair if isinstance(pair, str) else "",
        )

    async def all(self, prompts: Sequence[Prompt], put: Callable[[Group], Any]) -> list[Group]:
        """All groups, in the order of the prompts. `put` is awaited with each as it is finished.

        Enough groups are open at a time to keep the engines' queues filled, and no more.
        """
        open_groups = asyncio.Semaphore(max(2, math.ceil(2 * self._samplers.slots / self._config.sample.responses)))

        async def one(prompt: Prompt) -> Group:
            async with open_groups:
                group = await self.group(prompt)
                await put(group)
                return group

        return await gather([one(prompt) for prompt in prompts])


async def gather(work: Sequence[Any]) -> list[Any]:
    """All results in order; the first failure cancels the rest (asyncio.gather would leave them running)."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    return [task.result() for task in running]
