"""A judge behind an OpenAI-compatible server, for runs that take their rewards from another model.

Papers compare with such a judge, such as 2407.19594v2 with Starling-RM-34B. Retries and their backoff are the openai
library's, which waits as long as the server's Retry-After says (up to two minutes).
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rsrlm.records import Completion, Request, Sampling
from rsrlm.runtime.endpoint_http import ChatAnswer, Tokens, check_endpoint, key_of, no_openai_variables, whole_answer
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import Endpoint as EndpointConfig

NOTED_EVERY_S = 5.0
SHORTEST_SECRET = 8  # shorter keys, such as EMPTY, are placeholders, and may well be words of a message
# Statuses that the library tries again: the server's state and not the request's fault.
PASSING = frozenset({408, 409, 429})
# A refusal of this one text, in the words of OpenAI, Azure, Anthropic, vLLM and llama.cpp.
ABOUT_THE_TEXT = re.compile(
    r"(?i)context[ _](length|size|window)|prompt is too long|content[ _](filter|management|policy)|invalid_prompt"
)


class EndpointFailed(Exception):
    """The server gave no usable answer, however often it was asked. Resuming asks again."""


class BudgetSpent(Exception):
    """`max_cost` is used up; nothing more is sent."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """What was used so far. `requests` counts all that was sent, `retries` those of them that repeat another.

    `unmetered` answers came without token counts: the token sums lack them, and `cost` charges them one token per
    byte of the prompt and all of max_tokens, so that max_cost still holds. `withheld` answers are those that the
    server kept back: filtered, cut off by anything but the length limit, or refused because of their text.
    Attempts without a usable answer are free here; a server may bill them nevertheless.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    unmetered: int = 0
    withheld: int = 0


class EndpointClient:
    """Answers of one model. Use it in one event loop, and `close` it at the end."""

    def __init__(self, config: EndpointConfig, spent: float = 0.0, name: str = "judge.endpoint") -> None:
        """`spent` is what earlier starts of the run have cost, `name` the config's key, for messages. Raises
        ConfigError; sends nothing."""
        import openai

        self._config = config
        self._name = name
        check_endpoint(config, name)
        self._key = key_of(config.key_env, name)
        self.usage = Usage(cost=spent)
        self._running = asyncio.Semaphore(config.max_concurrent)
        self._next_turn = 0.0
        self._limit = "max_tokens"  # the name that every server knows; OpenAI's newer models refuse it
        attempt = self._attempt

        class Client(openai.DefaultAsyncHttpxClient):
            async def send(self, request: Any, **options: Any) -> Any:
                return await attempt(super().send, request)

        with no_openai_variables():
            self._client = openai.AsyncOpenAI(
                api_key=self._key or "EMPTY",
                base_url=config.url,
                timeout=config.timeout_s,
                max_retries=config.max_retries,
                http_client=Client(),
            )

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        return self._config.max_concurrent

    def stats(self) -> dict[str, float]:
        """The fields of `Usage`."""
        return asdict(self.usage)

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, identifier: str, text: str, sampling: Sampling) -> Completion:
        """The answer to one user message. It has no token ids, and its weight version is "endpoint:<model>".

        Only an answer that the model itself ended is "stop". One that was withheld (see `Usage`) is an empty text
        cut by "length", which no judge's parser can read. The key is masked wherever the server repeats it.

        Raises ConfigError where the server refuses key, model or parameters, EndpointFailed where it gives no usable
        answer, and BudgetSpent before the first request after max_cost is reached. Requests that run at that moment
        still finish, so up to `slots` answers may come on top.
        """
        import openai

        async with self._running:
            try:
                answer = await self._send(text, sampling)
            except openai.APIStatusError as error:
                if error.status_code != 400 or not ABOUT_THE_TEXT.search(f"{error.code} {error.message}"):
                    raise self._refused(error) from None
                self.usage.withheld += 1
                return self._completion(identifier, "", "length")
            except openai.APITimeoutError:
                raise self._failed(
                    f"no whole answer in {self._name}.timeout_s={self._config.timeout_s:g} seconds"
                ) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__
                raise self._failed(str(cause) or type(cause).__name__ if cause else error.message) from None
        self._charge(answer.usage or Tokens(), text, sampling)
        choice = answer.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            self.usage.withheld += 1
            return self._completion(identifier, "", "length")
        return self._completion(identifier, choice.message.content or "", choice.finish_reason)

    async def _send(self, text: str, sampling: Sampling) -> ChatAnswer:
        import openai

        while True:
            limit = self._limit
            # Some servers refuse what is off.
            extra: dict[str, Any] = {limit: sampling.max_tokens}
            if sampling.top_p != 1:
                extra["top_p"] = sampling.top_p
            if sampling.stop:
                extra["stop"] = list(sampling.stop)
            try:
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": text}],
                    temperature=sampling.temperature,
                    seed=sampling.seed,
                    extra_body=extra,
                )
            except openai.BadRequestError as error:
                if limit != "max_tokens" or "max_completion_tokens" not in error.message:
                    raise
                self._limit = "max_completion_tokens"
                continue
            return ChatAnswer.model_validate_json(response.http_response.content)

    async def _before(self, request: Any) -> None:
        """Before every request, retries included: wait for its turn, and stop at max_cost.

        Turns are evenly spaced. A bucket that holds a minute's worth would let twice the limit pass in one minute.
        """
        if self._config.requests_per_minute:
            now = asyncio.get_running_loop().time()
            turn = max(now, self._next_turn)
            self._next_turn = turn + 60 / self._config.requests_per_minute
            await asyncio.sleep(turn - now)
        limit = self._config.max_cost
        if limit is not None and self.usage.cost >= limit:
            raise BudgetSpent(
                f"{self._name}.max_cost={limit:g}: {self.usage.cost:.6g} spent after {self.usage.requests} requests of "
                f"this start, so no more are sent; raise {self._name}.max_cost and resume, which keeps every "
                "answer so far"
            )
        self.usage.requests += 1
        self.usage.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    async def _attempt(self, send: Any, request: Any) -> Any:
        """One request and its whole answer, within timeout_s from its turn on, however slowly the bytes come."""
        await self._before(request)
        return await whole_answer(send, request, self._config.timeout_s, self._masked)

    def _charge(self, tokens: Tokens, text: str, sampling: Sampling) -> None:
        prompt, completion = tokens.prompt_tokens, tokens.completion_tokens
        self.usage.prompt_tokens += prompt or 0
        self.usage.completion_tokens += completion or 0
        self.usage.unmetered += prompt is None or completion is None
        prompt = len(text.encode()) if prompt is None else prompt
        completion = sampling.max_tokens if completion is None else completion
        self.usage.cost += (prompt * self._config.price_in + completion * self._config.price_out) / 1e6

    def _completion(self, identifier: str, text: str, finish_reason: Any) -> Completion:
        return Completion(
            request_id=identifier,
            token_ids=(),
            text=self._masked(text),
            finish_reason=finish_reason,
            weight_version=f"endpoint:{self._config.model}",
        )

    def _refused(self, error: Any) -> Exception:
        """What to raise for a status that is no success."""
        config, status = self._config, error.status_code
        # The library's message leaves out bodies in another format than OpenAI's.
        said = self._shown(
            f"{error.message} {error.body or ''}" if error.message.endswith(str(status)) else error.message
        )
        said = said[:400]
        if status >= 500 or status in PASSING:
            hint = f"; if this is its rate limit, lower {self._name}.requests_per_minute" if status == 429 else ""
            return self._failed(said + hint)
        if status in (401, 403):
            return ConfigError(
                f"{self._name}.key_env={config.key_env or 'null'}: {config.url} refuses its key for {config.model!r}: "
                f"{said}; set {self._name}.key_env to the name of an environment variable with a key for this server "
                "and model"
            )
        if status == 404:
            return ConfigError(
                f"{self._name}.model={config.model!r}: not found at {self._name}.url={config.url}: {said}; the url "
                "ends before /chat/completions, such as http://localhost:8000/v1, and the model is one of those under "
                "url/models"
            )
        return ConfigError(
            f"{self._name}: {config.url} refuses the request to {config.model!r}: {said}; change the judge's sampling "
            "parameters or the model accordingly"
        )

    def _failed(self, reason: str) -> EndpointFailed:
        config = self._config
        return EndpointFailed(
            f"{self._name}.url={config.url}: no usable answer with {self._name}.max_retries={config.max_retries}: "
            f"{self._shown(reason)}; check the server, then resume"
        )

    def _shown(self, text: str) -> str:
        """What a server said, for a terminal: neither the key nor characters that control it."""
        return "".join(character if character.isprintable() else " " for character in self._masked(text))

    def _masked(self, text: str) -> str:
        """`text` without the key. Mask before cutting: a part of a key is hard to find."""
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text


class EndpointPool:
    """A server in the form of an engine pool. `note` is called every few seconds, so that what was spent survives a
    kill."""

    def __init__(self, client: EndpointClient, note: Callable[[], Any]) -> None:
        self._client = client
        self._note = note
        self._noted = time.monotonic()

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        return self._client.slots

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        return list(await asyncio.gather(*map(self._generate, requests)))

    async def _generate(self, request: Request) -> Completion:
        try:
            return await self._client.ask(request.id, request.text, request.sampling)
        finally:
            if time.monotonic() - self._noted > NOTED_EVERY_S:
                self._noted = time.monotonic()
                self._note()
