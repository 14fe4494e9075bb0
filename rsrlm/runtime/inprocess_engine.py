"""vLLM's `LLMEngine` in the process of its actor: the kind for CPUs and tests."""

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from rsrlm.config import Config
from rsrlm.records import Completion, Request
from rsrlm.runtime.engine import (
    EngineDead,
    Outcome,
    RequestFailed,
    completion_of,
    counters,
    cpu_environment,
    engine_arguments,
    rsrlm_arguments,
    sampling_params,
    slowest,
)


class InProcessEngine:
    """vLLM's LLMEngine in this process. Everything that touches it runs in one thread, between two steps."""

    def __init__(self, config: Config, folder: str, version: str, replica: int) -> None:
        self._replica = replica
        self._engine: Any = None
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._waiting: dict[str, tuple[Request, Future[Completion]]] = {}
        self._steps = 0
        made: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(config, folder, version, made), name="engine", daemon=True
        )
        self._thread.start()
        made.result()

    def _make(self, config: Config, folder: str, version: str) -> None:
        os.environ.update(cpu_environment(config.engine))
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        arguments = EngineArgs(**engine_arguments(config, folder), **rsrlm_arguments())
        # The context of vLLM's LLM: with another one, vLLM would choose a smaller token budget for a step.
        self._engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        self._engine.set_weight_version(version)

    def _serve(self, config: Config, folder: str, version: str, made: Future[None]) -> None:
        try:
            # In the thread that steps it: OpenMP keeps a pool of threads for each thread that computes.
            self._make(config, folder, version)
            made.set_result(None)
        except Exception as error:
            made.set_exception(error)
            return
        try:
            while True:
                idle = not self._engine.has_unfinished_requests()
                while idle or not self._inbox.empty():
                    item = self._inbox.get()
                    if item is None:
                        return
                    call, done = item
                    try:
                        done.set_result(call())
                    except Exception as error:
                        done.set_exception(error)
                    idle = not self._engine.has_unfinished_requests()
                self._steps += 1
                for output in self._engine.step():
                    if output.finished and output.request_id in self._waiting:
                        request, answer = self._waiting.pop(output.request_id)
                        try:
                            answer.set_result(completion_of(request, output))
                        except RequestFailed as error:  # the engine goes on
                            answer.set_exception(error)
                        except Exception as error:
                            answer.set_exception(RequestFailed(f"request {request.id} cannot be read: {error!r}"))
        except Exception as error:
            dead = EngineDead(f"replica {self._replica}: {error!r}")
            for _, answer in self._waiting.values():
                answer.set_exception(dead)
            # This thread stays to tell whoever has asked or will ask: none of them may wait for ever.
            while (item := self._inbox.get()) is not None:
                item[1].set_exception(dead)

    async def _between_steps(self, call: Callable[[], Any]) -> Any:
        if not self._thread.is_alive():
            raise EngineDead(f"replica {self._replica} is closed")
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()  # whoever stops waiting must not take the engine's answer back
        self._inbox.put((call, done))
        return await asyncio.wrap_future(done)

    async def generate(self, requests: Sequence[Request]) -> list[Outcome]:
        from vllm.inputs import tokens_input

        answers: list[Future[Completion]] = [Future() for _ in requests]
        for answer in answers:
            answer.set_running_or_notify_cancel()

        def add() -> None:
            for request, answer in zip(requests, answers, strict=True):
                try:
                    self._engine.add_request(
                        request.id,
                        tokens_input(list(request.prompt_token_ids)),
                        sampling_params(request),
                        priority=request.priority,
                    )
                    self._waiting[request.id] = (request, answer)
                except Exception as error:  # of this request: the others go on
                    answer.set_exception(RequestFailed(f"request {request.id} was refused: {error!r}"))

        await self._between_steps(add)
        return await asyncio.gather(*map(asyncio.wrap_future, answers), return_exceptions=True)  # type: ignore[return-value]

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]:
        """Load a version between two steps; requests in flight go on with the new weights."""

        def load() -> dict[str, float]:
            rpc = self._engine.collective_rpc
            rpc("start_weight_update")
            rpc("update_weights", kwargs={"update_info": update_info})
            rpc("finish_weight_update")
            if not self._engine.reset_prefix_cache(reset_running_requests=True):
                raise EngineDead(f"replica {self._replica}: the prefix cache could not be reset")
            self._engine.set_weight_version(version)
            return slowest(rpc("rsrlm_seconds"))

        return await self._between_steps(load)

    async def version(self) -> str:
        return await self._between_steps(self._engine.get_weight_version)

    async def stats(self) -> dict[str, float]:
        return counters(await self._between_steps(self._engine.get_metrics))

    async def sleep(self) -> None:
        await self._between_steps(self._engine.sleep)

    async def wake(self) -> None:
        await self._between_steps(self._engine.wake_up)

    def progress(self) -> int:
        return self._steps

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=10)
