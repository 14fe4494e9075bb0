"""A pool of engine replicas with the same weights: requests go to the replica with the least outstanding work."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rsrlm.config import Config
from rsrlm.records import Completion, Request
from rsrlm.runtime import publish
from rsrlm.runtime.replicas import GONE, PoolFailed, Replica, Replicas
from rsrlm.runtime.weights import WeightSet

MAX_ATTEMPTS = 3  # of one request: its engine died, or gave no usable answer
DECODED = 8  # a decoded token costs about this many prompt tokens


def _work(request: Request) -> int:
    """What a request may cost, in prompt tokens."""
    return request.sampling.max_tokens * DECODED + len(request.prompt_token_ids)


class Lending(Protocol):
    """Who keeps replicas."""

    config: Config
    all: list[Replica]

    async def least_busy(self) -> Replica: ...
    def lost(self, replica: Replica, generation: int, error: Exception) -> None:
        """A request found that this actor of the replica is gone."""
        ...


class Asking:
    """Requests to replicas. Use it from one event loop."""

    def __init__(self, replicas: Lending) -> None:
        self._replicas = replicas
        self._attempts = 0

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        return len(self._replicas.all) * self._replicas.config.engine.sequences

    async def generate(self, request: Request) -> Completion:
        """`generate_all` of one request."""
        [completion] = await self.generate_all([request])
        return completion

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in the order of the requests. All of them are asked of one replica, in one message: requests
        that share a prompt then share its prefix cache.

        Requests whose engine dies or gives no usable answer are asked again together. Raises PoolFailed when one has
        failed MAX_ATTEMPTS times.
        """
        completions: dict[int, Completion] = {}
        failures: dict[int, Exception] = {}
        for _ in range(MAX_ATTEMPTS):
            missing = [place for place in range(len(requests)) if place not in completions]
            if not missing:
                break
            outcomes = await self._ask_once([requests[place] for place in missing])
            failures = {}
            for place, outcome in zip(missing, outcomes, strict=True):
                if isinstance(outcome, Completion):
                    completions[place] = replace(outcome, request_id=requests[place].id)
                else:
                    failures[place] = outcome
        for place, error in failures.items():
            cause = getattr(error, "cause", error)  # without the actor's stack trace
            raise PoolFailed(f"request {requests[place].id} failed {MAX_ATTEMPTS} times; last: {cause}") from error
        return [completions[place] for place in range(len(requests))]

    async def _ask_once(self, requests: Sequence[Request]) -> Sequence[Completion | Exception]:
        """What the least busy replica makes of each request. If its engine died, it is replaced."""
        replica = await self._replicas.least_busy()
        generation = replica.generation
        work = sum(map(_work, requests))
        replica.outstanding += work
        # vLLM forgets a request's id only when it has finished: an id of its own for each attempt.
        self._attempts += 1
        sent = [replace(request, id=f"{request.id}~{self._attempts}") for request in requests]
        try:
            outcomes: Sequence[Completion | Exception] = await replica.actor.generate.remote(sent)
            replica.last_answer = time.monotonic()
        except GONE as error:
            outcomes = [error] * len(requests)
        finally:
            if replica.generation == generation:
                replica.outstanding -= work
        # After a RequestFailed the engine is well and keeps its other requests.
        if dead := next((outcome for outcome in outcomes if isinstance(outcome, GONE)), None):
            self._replicas.lost(replica, generation, dead)
        return outcomes


class EnginePool(Asking):
    """Replicas with the same weights."""

    def __init__(self, config: Config, weights: WeightSet, name: str, replicas: int, note: Callable[..., None]) -> None:
        """`note` is called with a kind of event ("engine_up", "engine_lost", "engine_restarted") and its fields."""
        self.replicas = Replicas(config, weights, name, replicas, note)
        super().__init__(self.replicas)

    @property
    def nodes(self) -> set[str]:
        """The ids of the Ray nodes that its replicas are on."""
        return {replica.node for replica in self.replicas.ready}

    async def start(self) -> None:
        """All replicas up, each having generated a token. Raises PoolFailed after engine.start_timeout_s."""
        await self.replicas.start()

    async def publish(self, weights: WeightSet) -> list[dict[str, Any]]:
        """Load the weights on every replica (see `rsrlm.runtime.publish`)."""
        return await publish.publish(self.replicas, weights)

    async def stats(self) -> list[dict[str, float]]:
        """Counters of each replica since it started."""
        return await self.replicas.ask("stats")

    async def versions(self) -> list[str]:
        """What each engine itself says it holds."""
        return await self.replicas.ask("version")

    async def close(self) -> None:
        await self.replicas.close()
