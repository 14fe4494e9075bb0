"""The Ray cluster of a run: joined, or started on this machine and stopped again."""

import atexit
import contextlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from rsrlm.config import Config
from rsrlm.runtime.address import address_of, check_address, ray_address, token_of
from rsrlm.runtime.room import wait_for_room
from rsrlm.settings.base import ConfigError, NotYet
from rsrlm.store.folder import RunFolder

HANDED_ON = ("HF_", "VLLM_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_", "NCCL_", "GLOO_", "RSRLM_")


def check_devices(config: Config) -> None:
    """Raises ConfigError where GPUs are wanted of this machine, and it has none."""
    wanted = config.engine.gpus or config.train.gpus
    if wanted and not address_of(config) and not Path("/proc/driver/nvidia").exists():
        key = "engine.gpus" if config.engine.gpus else "train.gpus"
        raise ConfigError(
            f"{key}={wanted}: this machine has no NVIDIA GPU; set engine.gpus=0 and train.gpus=0, or join a cluster "
            "that has them with ray.address=HOST:PORT"
        )


def begin(config: Config) -> Future[Any]:
    """Start Ray in a thread, for a run that is still being prepared: `ray_cluster` takes it over.

    Where the run does not come about, Ray ends with the process: nobody has to wait for it before.
    """
    _set_environment(address_of(config))
    import ray  # noqa: F401 - here, since two threads that import at once can see modules half made

    begun: Future[Any] = Future()

    def start() -> None:
        try:
            begun.set_result(_init(config))
        except BaseException as error:
            begun.set_exception(error)
        # On Linux Ray's processes end with the thread that started them: this one lasts as long as the driver.
        threading.Event().wait()

    threading.Thread(target=start, name="ray", daemon=True).start()
    atexit.register(wait, [begun])  # before Ray's own end at exit, which must find it started
    return begun


@contextlib.contextmanager
def ray_cluster(
    config: Config, store: RunFolder, begun: Future[Any] | None = None, say: Callable[[str], None] = print
) -> Iterator[None]:
    """A Ray cluster: the one of `ray.address` or RAY_ADDRESS, else one on this machine for this run only.

    `begun` is what `begin` gave, once `joined` found room. Without it the cluster is for engines alone: raises
    ConfigError where it has no room for them.
    """
    if begun is None:
        check_address(config)
    _set_environment(address_of(config))
    import ray

    from rsrlm.runtime.weights import remove_stale

    remove_stale(store.folder)
    try:
        context = begun.result() if begun else _init(config)
        session = context.address_info.get("session_dir")
        store.event("ray", address=address_of(config) or "local", session=session)
        if begun is None:
            wait_for_room(config, 0, say)
        yield
    finally:
        ray.shutdown()
        remove_stale(store.folder)


def joined(config: Config, begun: Future[Any], say: Callable[[str], None]) -> None:
    """Wait for the cluster that `begin` starts or joins, and for its room. Raises ConfigError where it has none."""
    begun.result()
    wait_for_room(config, config.train.workers, say)


def _set_environment(address: str | None) -> None:
    # rsrlm sets every worker's threads itself; Ray's own uv hook would rebuild the environment in each worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not address:
        os.environ.update(token_of_its_own(os.environ))
        # No node of one machine is taken away with notice: one process less.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray's workers run at nice 15: beside any busy process their threads would wait for each other all the time.
        os.environ.setdefault("RAY_worker_niceness", "0")


def token_of_its_own(environ: Mapping[str, str]) -> dict[str, str]:
    """A token for a cluster of the run's own where the user has none; it ends with the run.

    Ray would leave one in the home folder, and clusters that are started there later would ask every host for it.
    """
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled" or token_of(environ):
        return {}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings of this process for the workers of a cluster that was started elsewhere. Secrets stay here, since Ray
    shows what it hands on; so does what the job has set already, which Ray lets nobody set again."""
    job = json.loads(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    already = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(HANDED_ON) and not name.endswith(("_TOKEN", "_KEY")) and name not in already
    }


def _init(config: Config) -> Any:
    import ray

    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = address_of(config)
    if not address:
        return ray.init(
            address="local",  # without it Ray joins any cluster that runs on this machine
            include_dashboard=False,
            object_store_memory=config.ray.object_store_mib * 2**20,
            **arguments,
        )
    ray._raylet.Config.initialize("")  # reads RAY_AUTH_MODE again, where Ray was imported before `check_address` set it
    try:
        return ray.init(address=address, runtime_env={"env_vars": worker_environment(os.environ)}, **arguments)
    except Exception as error:
        address, source = ray_address(config.ray.address, os.environ)
        why = " ".join(str(error).split())
        raise NotYet(f"the cluster of {source}={address} cannot be joined: {why}") from error
