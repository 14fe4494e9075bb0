"""vLLM's `AsyncLLM`, whose engine core and workers are processes of their own: the kind for GPUs."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from rsrlm.config import Config
from rsrlm.records import Request
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


class AsyncEngine:
    """vLLM's AsyncLLM. Must be made and used in one event loop."""

    def __init__(self, config: Config, folder: str, version: str, replica: int) -> None:
        os.environ.update(cpu_environment(config.engine))
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self._replica = replica
        self._initial_version: str | None = version
        arguments = AsyncEngineArgs(**engine_arguments(config, folder), **rsrlm_arguments())
        self._engine: Any = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)

    async def _named(self) -> Any:
        if self._initial_version is not None:
            version, self._initial_version = self._initial_version, None
            await self._engine.update_weight_version(version)
        return self._engine

    async def generate(self, requests: Sequence[Request]) -> list[Outcome]:
        return list(await asyncio.gather(*map(self._outcome, requests)))

    async def _outcome(self, request: Request) -> Outcome:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        output = None
        try:
            engine = await self._named()
            async for output in engine.generate(  # noqa: B007 - the last one is the answer
                tokens_input(list(request.prompt_token_ids)),
                sampling_params(request),
                request.id,
                priority=request.priority,
            ):
                pass
            if output is None:
                return EngineDead(f"replica {self._replica}: no output for {request.id}")
            return completion_of(request, output)
        except EngineDeadError as error:
            return EngineDead(f"replica {self._replica}: {error!r}")
        except RequestFailed as error:
            return error
        except Exception as error:  # of this request: the others go on
            return RequestFailed(f"request {request.id} was refused: {error!r}")

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]:
        """Load a version while generation is paused; requests in flight go on with the new weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._updated(WeightTransferUpdateRequest(update_info=update_info), version)
        except EngineDeadError as error:
            raise EngineDead(f"replica {self._replica}: {error!r}") from error

    async def _updated(self, request: Any, version: str) -> dict[str, float]:
        engine = await self._named()
        await engine.pause_generation(mode="keep", clear_cache=True)
        try:
            await engine.start_weight_update()
            await engine.update_weights(request)
            await engine.finish_weight_update(version)
            await engine.reset_prefix_cache(reset_running_requests=True)
        finally:
            await engine.resume_generation()
        return slowest(await engine.collective_rpc("rsrlm_seconds"))

    async def version(self) -> str:
        engine = await self._named()
        return await engine.get_weight_version()

    async def stats(self) -> dict[str, float]:
        from vllm.v1.metrics.reader import get_metrics_snapshot

        return counters(get_metrics_snapshot())

    async def sleep(self) -> None:
        await (await self._named()).sleep()

    async def wake(self) -> None:
        await (await self._named()).wake_up()

    def progress(self) -> int:
        from vllm.v1.metrics.reader import get_metrics_snapshot

        return int(counters(get_metrics_snapshot())["generation_tokens"])

    def close(self) -> None:
        self._engine.shutdown()
