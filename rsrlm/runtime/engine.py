"""One vLLM replica behind five verbs: generate, update, version, stats, close.

Two kinds with the same interface. `InProcessEngine` drives vLLM's `LLMEngine` from a thread of its own and lets
weight updates in between two steps: 2.3 GB and seconds to start for a 135M model. `AsyncEngine` wraps `AsyncLLM`,
whose engine core runs in further processes: tensor parallel, GPUs.
"""

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from rsrlm.config import Config
from rsrlm.records import Completion, Request
from rsrlm.settings.machine import Engine as EngineConfig

EXTENSION = "rsrlm.runtime.vllm_worker.WorkerExtension"


class EngineDead(RuntimeError):
    """The engine cannot serve any more; the actor that holds it must be replaced."""


class RequestFailed(RuntimeError):
    """An engine that goes on serving gave no usable answer to this request."""


class Engine(Protocol):
    async def generate(self, request: Request) -> Completion: ...

    async def connect(self, init_info: dict[str, Any]) -> None: ...

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]: ...

    async def version(self) -> str: ...

    async def stats(self) -> dict[str, float]: ...

    def progress(self) -> int: ...

    def close(self) -> None: ...


def cpu_environment(config: EngineConfig) -> dict[str, str]:
    """Environment of a process that holds one CPU engine. vLLM reads it at import, so it is set before.

    Cores are not pinned: vLLM's own choice gives every replica of a host the same ones, less a reserved one.
    """
    if config.gpus:
        return {}
    environment = {
        "OMP_NUM_THREADS": str(config.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.kv_cache_gib))),
        "VLLM_CPU_CI_ENV": "0",
    }
    if config.kind == "inprocess":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def engine_arguments(config: Config, folder: str) -> dict[str, Any]:
    """The engine arguments, the same for both kinds (and for a benchmark's plain vLLM engine)."""
    engine = config.engine
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "block_size": engine.block_size,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": False,
    }
    if engine.gpus:
        arguments["tensor_parallel_size"] = engine.gpus
        # vLLM would pick Ray inside a placement group; a replica is one node here.
        arguments["distributed_executor_backend"] = "mp"
    else:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    return arguments


def rsrlm_arguments(config: Config) -> dict[str, Any]:
    """What rsrlm adds to plain engine arguments: priorities and the way that weights come in."""
    from vllm.config import WeightTransferConfig

    from rsrlm.runtime.vllm_worker import BACKENDS

    return {
        "scheduling_policy": "priority",
        "weight_transfer_config": WeightTransferConfig(backend=BACKENDS[config.weights.transport]),
        "worker_extension_cls": EXTENSION,
    }


def sampling_params(request: Request) -> Any:
    """vLLM's SamplingParams of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling = request.sampling
    return SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed if sampling.temperature > 0 else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(regex=request.regex) if request.regex else None,
        logprob_token_ids=list(request.label_ids) or None,
        prompt_logprobs=None if request.score_from is None else 0,  # of the tokens themselves and no others
    )


def completion_of(request: Request, output: Any, replica: int) -> Completion:
    """The record of a finished vLLM output. The oldest token's weight version counts.

    Raises RequestFailed where the engine gave up on the request or left out a log-probability that it asked for.
    """
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise RequestFailed(f"request {request.id} ended with finish reason {answer.finish_reason!r}")
    label_logprobs: tuple[float, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    try:
        if request.label_ids:
            first = answer.logprobs[0]
            label_logprobs = tuple(float(first[token].logprob) for token in request.label_ids)
        if request.score_from is not None:
            places = range(request.score_from, len(request.prompt_token_ids))
            prompt_logprobs = tuple(
                float(output.prompt_logprobs[place][request.prompt_token_ids[place]].logprob) for place in places
            )
    except (LookupError, TypeError) as error:
        raise RequestFailed(f"request {request.id} came back without a log-probability: {error!r}") from None
    spans = answer.weight_versions or []
    return Completion(
        request_id=request.id,
        token_ids=tuple(answer.token_ids),
        text=answer.text,
        finish_reason=answer.finish_reason,
        weight_version=spans[0].version if spans else "",
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
        replica=replica,
        label_logprobs=label_logprobs,
        prompt_logprobs=prompt_logprobs,
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

        arguments = EngineArgs(**engine_arguments(config, folder), **rsrlm_arguments(config))
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
                            answer.set_result(completion_of(request, output, self._replica))
                        except Exception as error:  # of this request: the engine goes on
                            answer.set_exception(error)
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

    async def generate(self, request: Request) -> Completion:
        from vllm.inputs import tokens_input

        answer: Future[Completion] = Future()
        answer.set_running_or_notify_cancel()

        def add() -> None:
            self._engine.add_request(
                request.id,
                tokens_input(list(request.prompt_token_ids)),
                sampling_params(request),
                priority=request.priority,
            )
            self._waiting[request.id] = (request, answer)

        await self._between_steps(add)
        return await asyncio.wrap_future(answer)

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the sender's group (gloo) or do nothing (shm)."""
        await self._between_steps(
            lambda: self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})
        )

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

    def progress(self) -> int:
        """Steps so far."""
        return self._steps

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=10)


class AsyncEngine:
    """vLLM's AsyncLLM. Must be made and used in one event loop."""

    def __init__(self, config: Config, folder: str, version: str, replica: int) -> None:
        os.environ.update(cpu_environment(config.engine))
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self._replica = replica
        self._initial_version: str | None = version
        arguments = AsyncEngineArgs(**engine_arguments(config, folder), **rsrlm_arguments(config))
        self._engine: Any = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)

    async def _named(self) -> Any:
        if self._initial_version is not None:
            version, self._initial_version = self._initial_version, None
            await self._engine.update_weight_version(version)
        return self._engine

    async def generate(self, request: Request) -> Completion:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = await self._named()
        output = None
        try:
            async for output in engine.generate(  # noqa: B007 - the last one is the answer
                tokens_input(list(request.prompt_token_ids)),
                sampling_params(request),
                request.id,
                priority=request.priority,
            ):
                pass
        except EngineDeadError as error:
            raise EngineDead(f"replica {self._replica}: {error!r}") from error
        if output is None:
            raise EngineDead(f"replica {self._replica}: no output for {request.id}")
        return completion_of(request, output, self._replica)

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the sender's group (gloo) or do nothing (shm)."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        engine = await self._named()
        await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

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

    def progress(self) -> int:
        """Generated tokens so far."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        return int(counters(get_metrics_snapshot())["generation_tokens"])

    def close(self) -> None:
        self._engine.shutdown()


def slowest(per_worker: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(report[key] for report in per_worker) for key in per_worker[0]}


def counters(metrics: list[Any]) -> dict[str, float]:
    """The counters that the run reports, by vLLM's names without their prefix; prompt and cached tokens are totals."""
    names = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "num_preemptions")
    found = dict.fromkeys(names, 0.0)
    for metric in metrics:
        name = metric.name.removeprefix("vllm:")
        if name in found:
            found[name] += float(getattr(metric, "value", 0.0))
    return found


def make_engine(config: Config, folder: str, version: str, replica: int) -> Engine:
    kinds: dict[str, type[InProcessEngine] | type[AsyncEngine]] = {"inprocess": InProcessEngine, "async": AsyncEngine}
    return kinds[config.engine.kind](config, folder, version, replica)
