"""What both kinds of vLLM engines share: their interface, their arguments, and how requests and answers are translated.

`inprocess_engine` drives vLLM's `LLMEngine` in a thread of the actor and updates weights between two steps: 2.3 GB and
seconds to start for a 135M model. `async_engine` wraps `AsyncLLM`, whose engine core runs in further processes: tensor
parallel, GPUs.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from rsrlm.config import Config
from rsrlm.records import Completion, Request
from rsrlm.settings.machine import Engine as EngineConfig

EXTENSION = "rsrlm.runtime.vllm_worker.WorkerExtension"


class EngineDead(RuntimeError):
    """The engine cannot serve any more; the actor that holds it must be replaced."""


class RequestFailed(RuntimeError):
    """An engine that goes on serving gave no usable answer to this request."""


Outcome = Completion | RequestFailed | EngineDead  # of one request


class ServingEngine(Protocol):
    """One vLLM engine with the weights that it holds."""

    async def generate(self, requests: Sequence[Request]) -> list[Outcome]:
        """What became of each request, in their order, when all of them have ended."""
        ...

    async def update(self, update_info: dict[str, Any], version: str) -> dict[str, float]:
        """Load a version; requests in flight go on with the new weights. Returns the seconds of each part."""
        ...

    async def version(self) -> str: ...

    async def stats(self) -> dict[str, float]:
        """Counters since it started; see `counters`."""
        ...

    def progress(self) -> int:
        """Grows with every step of the engine."""
        ...

    async def sleep(self) -> None:
        """Give up its GPU until `wake`: the weights go to the memory of the host, the cache is dropped. Only where
        GPUs are shared, and with no request in flight."""
        ...

    async def wake(self) -> None: ...

    def close(self) -> None: ...


def cpu_environment(config: EngineConfig) -> dict[str, str]:
    """Environment of a process with one engine, to be set before vLLM is imported; of GPUs it says little.

    Cores are not pinned: vLLM's own choice gives every replica of a host the same ones, less a reserved one.
    """
    own_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if config.kind == "inprocess" else {}
    if config.gpus:
        return own_process
    return {
        **own_process,
        "OMP_NUM_THREADS": str(config.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.cpu_cache_gib))),
        "VLLM_CPU_CI_ENV": "0",
    }


def engine_arguments(config: Config, folder: str) -> dict[str, Any]:
    """The engine arguments, the same for both kinds (and for a benchmark's plain vLLM engine)."""
    engine = config.engine
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.sequences,
        "enforce_eager": not engine.gpus if engine.enforce_eager is None else engine.enforce_eager,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": False,
    }
    if not engine.gpus:
        cache = engine.cpu_cache_gib
        # vLLM 0.32 takes back the draw of a prompt that a step computes in part, which generators on CPUs cannot: with
        # a seed, the engine would die. So a prompt waits until it fits into a step whole.
        arguments["enable_chunked_prefill"] = False
        return {**arguments, "kv_cache_memory_bytes": int(cache * 2**30), "block_size": 32}  # or a multiple of 32
    arguments["tensor_parallel_size"] = engine.gpus
    arguments["gpu_memory_utilization"] = engine.gpu_share
    # vLLM would pick Ray inside a placement group; a replica is one node here, and one GPU needs no further process.
    arguments["distributed_executor_backend"] = "mp" if engine.gpus > 1 else "uni"
    arguments["enable_sleep_mode"] = config.ray.share_gpus
    if engine.kv_cache_gib:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    return arguments


def rsrlm_arguments() -> dict[str, Any]:
    """What rsrlm adds to plain engine arguments: priorities and the way that weights come in."""
    from vllm.config import WeightTransferConfig

    from rsrlm.runtime.vllm_worker import BACKEND

    return {
        "scheduling_policy": "priority",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
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
        max_tokens=sampling.max_tokens,
        seed=sampling.seed if sampling.temperature > 0 else None,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(regex=request.regex) if request.regex else None,
        logprob_token_ids=list(request.label_ids) or None,
        prompt_logprobs=None if request.score_from is None else 0,  # of the tokens themselves and no others
    )


def completion_of(request: Request, output: Any) -> Completion:
    """The record of a finished output of vLLM's engine. The oldest token's weight version counts.

    Raises RequestFailed where the engine gave up on the request or left out what it asked for.
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
    if not answer.weight_versions:
        raise RequestFailed(f"request {request.id} came back without the version of its weights")
    return Completion(
        request_id=request.id,
        token_ids=tuple(answer.token_ids),
        text=answer.text,
        finish_reason="string" if isinstance(answer.stop_reason, str) else answer.finish_reason,
        weight_version=answer.weight_versions[0].version,
        label_logprobs=label_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def slowest(per_worker: list[dict[str, float]]) -> dict[str, float]:
    """The largest value of each key."""
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
