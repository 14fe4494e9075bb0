"""Engines that are simulated, behind the interface that the pool's router calls: they answer when real ones would have,
and compute nothing."""

import asyncio
import heapq
import itertools
import math
import os
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

from driver import M0, WORDS

from rsrlm.config import Config
from rsrlm.model import folder_of, load_tokenizer
from rsrlm.records import Completion, FinishReason, Request
from rsrlm.runtime.pool import DECODED, EnginePool
from rsrlm.runtime.pools import EnginePools
from rsrlm.runtime.weights import WeightSet
from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig
from rsrlm.store.folder import RunFolder

TEXTS = 200  # different answers of each kind
WARM = "warm-"  # prompts with such ids are answered at once
ANSWERED = struct.Struct("<3d")  # when a request was begun, finished and heard of, in seconds of the monotonic clock


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of an answer: log-normal, cut at `most`."""

    median: int
    sigma: float
    most: int

    @property
    def drawn(self) -> list[int]:
        """TEXTS lengths, at equal steps of probability."""
        normal = NormalDist(0, self.sigma or 1e-9)
        steps = ((index + 0.5) / TEXTS for index in range(TEXTS))
        return [min(self.most, round(self.median * math.exp(normal.inv_cdf(step)))) for step in steps]


class Script:
    """Who answers what: by the seed of the request alone."""

    def __init__(self, responses: Lengths, judgements: Lengths) -> None:
        tokenizer, rng = load_tokenizer(folder_of(ModelConfig(path=BUILTIN_MODEL))), random.Random(0)
        self._answers: dict[str, list[tuple[str, tuple[int, ...], FinishReason]]] = {}
        for role, lengths in (("actor", responses), ("judge", judgements)):
            self._answers[role] = []
            for tokens in lengths.drawn:
                text = " ".join(rng.choices(WORDS, k=tokens))
                ids = tuple(tokenizer.encode(text, add_special_tokens=False)[:tokens])
                self._answers[role].append((text, ids, "length" if tokens == lengths.most else "stop"))

    def answer(self, request: Request) -> Completion:
        seed = request.sampling.seed
        text, ids, reason = self._answers[request.role][seed % TEXTS]
        if request.role == "judge":
            text, reason = f"{text}\nScore: {seed % 6}", "stop"
        return Completion(
            request_id=request.id, token_ids=ids, text=text, finish_reason=reason, weight_version=M0.name
        )  # fmt: skip


class Simulated:
    """An engine whose decoding step takes the same time whatever its batch is, up to `sequences` requests at once: as
    it is where reading the weights bounds it. A prompt token costs an eighth of a decoded one, as the router has it.

    What comes beyond `sequences` waits here, judgements first, and is begun when a place is free, however late the
    event loop is by then. So an event loop that is too busy delays what the engine hears and is heard of, and not what
    it does.
    """

    def __init__(self, script: Script, sequences: int, seconds_a_token: float, log: Path) -> None:
        """`log` gets a record ANSWERED of each request. With 0 seconds a token all is answered at the next turn of the
        event loop, and there is no log."""
        self._script, self._free, self._seconds, self._log = script, sequences, seconds_a_token, log
        self._file = -1
        self._waiting: list[tuple[int, int, float, float, Completion, _Asked]] = []
        self._numbers = itertools.count()
        self.cpu_s = 0.0  # of the simulation itself
        self.generate, self.stats = SimpleNamespace(remote=self._generate), SimpleNamespace(remote=self._stats)

    async def _stats(self) -> dict[str, float]:
        return {}

    def _generate(self, requests: Sequence[Request]) -> "asyncio.Future[list[Completion]]":
        began = time.thread_time()
        now, asked = asyncio.get_running_loop().time(), _Asked(requests)
        if self._file < 0 and self._seconds:
            self._file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        known: tuple[int, ...] = ()  # requests that come together share the cache of their prompt
        for request in requests:
            completion, prompt = self._script.answer(request), request.prompt_token_ids
            tokens = len(completion.token_ids) + (0 if prompt is known else len(prompt) / DECODED)
            known = prompt
            seconds = 0.0 if WARM in request.id else tokens * self._seconds
            entry = (request.priority, next(self._numbers), now, seconds, completion, asked)
            heapq.heappush(self._waiting, entry)
        while self._free and self._waiting:
            self._free -= 1
            self._begin(now)
        self.cpu_s += time.thread_time() - began
        return asked.done

    def _begin(self, free: float) -> None:
        """The next that waits, in a place that was free from then on."""
        _, _, came, seconds, completion, asked = heapq.heappop(self._waiting)
        at = max(free, came)
        asyncio.get_running_loop().call_at(at + seconds, self._end, at, at + seconds, completion, asked)

    def _end(self, at: float, end: float, completion: Completion, asked: "_Asked") -> None:
        began = time.thread_time()
        if end > at:
            os.write(self._file, ANSWERED.pack(at, end, asyncio.get_running_loop().time()))
        if self._waiting:
            self._begin(end)
        else:
            self._free += 1
        asked.hear(completion)
        self.cpu_s += time.thread_time() - began


class _Asked:
    """Requests that are answered together."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._ids = [request.id for request in requests]
        self._found: dict[str, Completion] = {}
        self.done: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()

    def hear(self, completion: Completion) -> None:
        self._found[completion.request_id] = completion
        if len(self._found) == len(self._ids) and not self.done.done():
            self.done.set_result([self._found[one] for one in self._ids])


class SimulatedPools(EnginePools):
    """The pools of a run, whose engines are simulated and up."""

    def __init__(self, config: Config, store: RunFolder, actors: Sequence[Simulated]) -> None:
        super().__init__(config, store, {})
        weights = WeightSet(version=M0.name, folder="", files=())
        self.samplers = EnginePool(config, weights, "engines", len(actors), self._note)
        self._known[M0.name], self._held, self._following = (M0, weights), M0, [self.samplers]
        for replica, actor in zip(self.samplers.replicas.all, actors, strict=True):
            replica.actor = actor
            replica.ready.set()
