"""Models and a cluster that the tests share. Everything heavy is a session fixture: 2 cores run one thing at a time."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from small_models import make_tiny

# For `make mutants`: the same examples for every mutant, and the first failure is enough. A slow machine kills nobody.
settings.register_profile(
    "mutants",
    max_examples=50,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")


def function_here(dotted: str, timeout_s: float) -> Any:
    """A judge's function in this process, in the place of a pool of others: they take seconds to start."""
    import asyncio

    from rsrlm.judges import function_pool
    from rsrlm.records import Unparsed

    function = function_pool.load_function(dotted)

    async def judge(prompt: str, response: str, data: Any = None) -> Any:
        await asyncio.sleep(0)  # as for another process, others go on
        try:
            return function_pool.call_function(function, prompt, response, data)
        except Exception as error:
            return Unparsed(reason=f"function raised {type(error).__name__}")

    return judge


@pytest.fixture
def functions_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions judge in this process."""
    monkeypatch.setattr("rsrlm.judges.function.pool_of", function_here)


if "MUTANT_UNDER_TEST" in os.environ:
    # The processes of all mutants are forked from one that has loaded the tokenizer: half a second less for each. Other
    # processes would be children that mutmut waits for, and cannot run its code.
    from rsrlm import model
    from rsrlm.judges import function as function_judges

    model.load_tokenizer = functools.cache(model.load_tokenizer)
    function_judges.pool_of = function_here  # type: ignore[assignment]

ORDER = ("plain", "torch", "ray", "full", "gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first; a machine without a GPU says why it leaves the gpu tests out."""

    def tier(item: pytest.Item) -> int:
        return max((ORDER.index(mark.name) for mark in item.iter_markers() if mark.name in ORDER), default=0)

    items.sort(key=tier)
    if not Path("/proc/driver/nvidia").exists():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The built-in model's folder: real weights, tokenizer and chat template."""
    from rsrlm.model import folder_of
    from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

    return folder_of(ModelConfig(path=BUILTIN_MODEL))


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    from rsrlm.model import load_tokenizer

    return load_tokenizer(smollm2)


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> Any:
    """Of the built-in model's chat prompts."""
    from rsrlm.chat import ChatEncoder

    return ChatEncoder(tokenizer)


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that hardly ever ends by itself: greedy outputs are as long as they may be."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny", smollm2, ends=False)


@pytest.fixture(scope="session")
def tiny_chat_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sampled answers mostly end by themselves."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-chat", smollm2, ends=True)


@pytest.fixture(scope="session")
def run_async(request: pytest.FixtureRequest) -> Any:
    """Runs coroutines in one event loop for the session, which pools and their background tasks belong to."""
    import asyncio

    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def cluster() -> Any:
    """One Ray cluster on this machine for all tests that talk to actors themselves."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def make_config(tmp_path: Path) -> Any:
    """A small valid config; keyword arguments replace whole sections or keys of the top level."""
    from rsrlm.config import resolve

    def make(**changes: Any) -> Any:
        data: dict[str, Any] = {
            "name": "test",
            "runs": str(tmp_path / "runs"),
            "iterations": 1,
            "model": {"path": "smollm2-135m-instruct"},
            "prompts": {"path": "builtin", "per_iteration": 4, "heldout": 2},
            "sample": {"responses": 2, "max_tokens": 24, "temperature": 0.8},
            "judge": {"kind": "digits"},
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "engine": {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_gib": 0.25},
            "report": False,
        }
        for key, value in changes.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
        return resolve(data)

    return make
