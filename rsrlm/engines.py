"""Engines that are asked, and the journal under every answer.

Everything asked of an engine goes through `Engines`, and is journalled by what was asked: the weights' digest, the
prompt's tokens, the sampling with its seed, the constraints. Whatever kills a run, its recipe runs again from the top
and passes what is done. So nobody else mentions a journal, and nobody resumes anything.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from rsrlm.records import Completion, Request, Response, Role, Sampling

Result = TypeVar("Result")
Tick = Callable[[str, int, int], None]  # (counter, items, tokens), as a stage of report.progress.Report gives it

SAMPLE_PRIORITY = 10
JUDGE_PRIORITY = 0


class NotHeld(RuntimeError):
    """The engines hold other weights than the caller means: a mistake in the program."""


class NobodyAnswers(RuntimeError):
    """Something must be asked, and there are no engines."""


class WrongWeights(RuntimeError):
    """A completion came from other weights than those that were meant."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weights by name. `digest` tells them apart whatever their name; `folder` is where they can be loaded from, None
    for a model that a server holds."""

    name: str
    digest: str
    folder: Path | None = None


class Pool(Protocol):
    """Replicas that answer requests with whatever weights they hold."""

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        ...

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order; one replica answers all of them."""
        ...


class Log(Protocol):
    """A journal by 16-byte keys; the first entry of a key counts."""

    def __contains__(self, key: bytes) -> bool: ...
    def get(self, key: bytes) -> dict[str, Any] | None: ...
    def add(self, key: bytes, payload: Mapping[str, Any]) -> None: ...
    async def sync(self) -> None: ...


class Many(Protocol):
    """Items that can be gone through, and their number; they need not be in memory."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass(slots=True, kw_only=True)
class Spent:
    """What requests came to. A model behind an API counts its tokens itself."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def add(self, request: Request, completion: Completion) -> None:
        self.requests += 1
        self.prompt_tokens += 0 if request.text else len(request.prompt_token_ids)
        self.generated_tokens += len(completion.token_ids)


class Answers:
    """What was asked and answered. What is known is not asked again; equal requests in flight are sent once."""

    def __init__(self, log: Log) -> None:
        """`spent` counts all that is asked of engines through it, `new` what of that was not known before."""
        self._log = log
        self.spent, self.new = Spent(), Spent()
        self._waiting: dict[bytes, asyncio.Future[dict[str, Any]]] = {}
        self._tick: Tick | None = None
        self.sync = log.sync

    @contextmanager
    def counted(self, tick: Tick) -> Iterator[None]:
        """`tick` is called with the role of each request that is answered meanwhile; tokens count when they are new."""
        before, self._tick = self._tick, tick
        try:
            yield
        finally:
            self._tick = before

    def count(self, role: str, items: int, tokens: int = 0) -> None:
        if self._tick:
            self._tick(role, items, tokens)

    async def through(
        self,
        keys: Sequence[bytes],
        work: Callable[[list[int]], Awaitable[Sequence[Mapping[str, Any]]]],
    ) -> list[tuple[dict[str, Any], bool]]:
        """The payload of each key, and whether it is new. `work` makes those of the places that it is given."""
        mine: dict[bytes, int] = {}
        others: dict[bytes, asyncio.Future[dict[str, Any]]] = {}
        for place, key in enumerate(keys):
            if key in self._waiting:
                others[key] = self._waiting[key]
            elif key not in mine and key not in self._log:
                mine[key] = place
        made = {key: asyncio.get_running_loop().create_future() for key in mine}
        self._waiting |= made
        try:
            if mine:
                for key, payload in zip(mine, await work(list(mine.values())), strict=True):
                    self._log.add(key, payload)
                    made[key].set_result(dict(payload))
        except BaseException as error:
            for future in made.values():
                if isinstance(error, asyncio.CancelledError):
                    future.cancel()
                elif not future.done():
                    future.set_exception(error)
                    future.exception()  # nobody else may be waiting for it
            raise
        finally:
            for key in mine:
                del self._waiting[key]
        found: list[tuple[dict[str, Any], bool]] = []
        for place, key in enumerate(keys):
            if key in mine:
                found.append((made[key].result(), mine[key] == place))
            elif key in others:
                found.append(await self._of_another(others[key], key, partial(work, [place])))
            else:
                known = self._log.get(key)
                assert known is not None
                found.append((known, False))
        return found

    async def _of_another(
        self, other: asyncio.Future[dict[str, Any]], key: bytes, work: Callable[[], Awaitable[Any]]
    ) -> tuple[dict[str, Any], bool]:
        """What somebody else is asking for; where they were cancelled, and we are not, we ask for it ourselves."""
        try:
            return await asyncio.shield(other), False
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not other.cancelled() or (task is not None and task.cancelling()):
                raise
        return (await self.through([key], lambda _: work()))[0]


def digest_of(*parts: Any) -> bytes:
    """16 bytes that tell what was asked apart from all else."""
    try:
        plain = msgspec.json.encode(parts)
    except UnicodeEncodeError:  # half of a surrogate pair, in text
        plain = json.dumps(parts, default=asdict).encode()
    return hashlib.blake2b(plain, digest_size=16).digest()


def key_of(model: Model, request: Request) -> bytes:
    """Two requests of one key have one answer. Neither ids nor priorities make a difference."""
    return digest_of(
        model.digest,
        request.prompt_token_ids,
        request.sampling,
        request.regex,
        request.label_ids,
        request.score_from,
        request.text,
    )


async def nothing(model: Model) -> None:
    """The pool holds this model always."""


class Engines:
    """A pool while it holds `model`: a handle for one version of the weights."""

    def __init__(
        self,
        pool: Pool | None,
        model: Model,
        answers: Answers,
        hold: Callable[[Model], Awaitable[None]] = nothing,
        judges: "Engines | None" = None,
    ) -> None:
        """`hold` makes sure that the pool holds the model, and raises NotHeld where another is wanted by now. `judges`
        are the engines that judge where these do not. Without a pool nobody can be asked: for judges that ask nobody.
        """
        self._pool, self.model, self._answers, self._hold = pool, model, answers, hold
        self.judges = judges or self

    @property
    def slots(self) -> int:
        return self._pool.slots if self._pool else 1

    async def complete_all(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request, in order. Those that are not known yet go to one replica together, which
        computes a prompt that they share once."""

        async def ask(places: list[int]) -> list[dict[str, Any]]:
            if self._pool is None:
                raise NobodyAnswers(f"{requests[0].id} is not known, and no engine was started")
            await self._hold(self.model)
            made = await self._pool.generate_all([requests[place] for place in places])
            for completion in made:
                if completion.weight_version != self.model.name:
                    raise WrongWeights(
                        f"{completion.request_id} was answered by {completion.weight_version}, not {self.model.name}"
                    )
            return [_payload(completion) for completion in made]

        keys = [key_of(self.model, request) for request in requests]
        found = await self._answers.through(keys, ask)
        completions = []
        for request, (payload, new) in zip(requests, found, strict=True):
            completion = _completion(request.id, self.model.name, payload)
            for spent in (self._answers.spent, *([self._answers.new] if new else [])):
                spent.add(request, completion)
            self._answers.count(request.role, 1, len(completion.token_ids) if new else 0)
            completions.append(completion)
        return completions

    async def complete(self, request: Request) -> Completion:
        return (await self.complete_all([request]))[0]

    async def remember(self, role: str, name: str, key: Sequence[Any], compute: Callable[[], Awaitable[Any]]) -> Any:
        """The value of `compute`, which is plain JSON, computed once for a key: for what no engine is asked. `name` is
        for those who look into the journal."""

        async def work(_: list[int]) -> list[dict[str, Any]]:
            return [{"id": name, "value": await compute()}]

        payload, _ = (await self._answers.through([digest_of(*key)], work))[0]
        self._answers.count(role, 1)
        return payload["value"]

    def count(self, role: Role, items: int = 1) -> None:
        """Requests of this role are answered, though no engine was asked."""
        self._answers.count(role, items)

    async def logprobs(self, responses: Sequence[Response], room: int) -> list[tuple[float, ...]]:
        """Log-probabilities of each response's tokens after its prompt, in nats, at temperature 1.

        `room` is engine.max_model_len: a response that fills it to its last token lacks that token, since one is
        generated for every request.
        """
        requests = [
            Request(
                id=f"{response.id}/logprobs",
                prompt_token_ids=(response.prompt_token_ids + response.token_ids)[: room - 1],
                sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=0),
                priority=SAMPLE_PRIORITY,
                score_from=len(response.prompt_token_ids),
                role="data",
            )
            for response in responses
        ]
        return [completion.prompt_logprobs for completion in await gather(map(self.complete, requests))]

    async def each(self, work: Callable[[Any], Coroutine[Any, Any, Result]], items: Many, width: int) -> list[Result]:
        """`work` of each item, in order; `width` is the number of requests that one makes at once.

        Enough are open at a time to keep the engines' queues filled, and no more. A result is given back when the
        answers that it rests on are on disk, since it must not outlive them.
        """
        results: list[Any] = [None] * len(items)
        left = iter(enumerate(items))

        async def some() -> None:
            for index, item in left:
                result = await work(item)
                await self._answers.sync()
                results[index] = result

        # Not a task for each item: a million of them would take gigabytes.
        await gather(some() for _ in range(min(len(items), max(2, math.ceil(2 * self.slots / width)))))
        return results


_FIELDS = ("token_ids", "text", "finish_reason", "label_logprobs", "prompt_logprobs")


def _payload(completion: Completion) -> dict[str, Any]:
    fields = {name: getattr(completion, name) for name in _FIELDS}
    return {"id": completion.request_id, **{name: value for name, value in fields.items() if value != ()}}


def _completion(request_id: str, version: str, payload: Mapping[str, Any]) -> Completion:
    known: dict[str, Any] = {name: payload.get(name, ()) for name in _FIELDS}
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return Completion(request_id=request_id, weight_version=version, **fields)


async def gather(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order; the first failure cancels the rest (asyncio.gather would leave them running)."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    return [task.result() for task in running]
