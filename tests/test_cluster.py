"""The Ray cluster of a run: who is admitted to it, and what its workers get to know of the driver's settings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rsrlm.runtime.cluster import _init, token_of_its_own, worker_environment
from rsrlm.settings.base import NotYet


def test_a_cluster_of_the_runs_own_has_a_token_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "token"
    nothing = {"RAY_AUTH_TOKEN_PATH": str(file)}
    own = token_of_its_own(nothing)
    assert list(own) == ["RAY_AUTH_TOKEN"]
    assert len(own["RAY_AUTH_TOKEN"]) == 64
    assert token_of_its_own(nothing) != own
    assert token_of_its_own({**nothing, "RAY_AUTH_TOKEN": "mine"}) == {}
    assert token_of_its_own({**nothing, "RAY_AUTH_MODE": "disabled"}) == {}
    file.write_text("mine")
    assert token_of_its_own(nothing) == {}


def test_what_workers_get_to_know() -> None:
    environ = {
        "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "secret", "VLLM_API_KEY": "secret", "DS_ACCELERATOR": "cpu", "PATH": "/bin", "WANDB_API_KEY": "x",
    }  # fmt: skip
    handed = {name: environ[name] for name in list(environ)[:4]}
    assert worker_environment(environ) == handed
    job = {"runtime_env": {"env_vars": {"NCCL_DEBUG": "WARN"}, "working_dir": "gcs://x.zip"}, "metadata": {}}
    del handed["NCCL_DEBUG"]  # Ray refuses what is set in two places
    assert worker_environment({**environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}) == handed
    assert "NCCL_DEBUG" in worker_environment({**environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}}'})


def test_what_ray_refuses_is_said_in_a_line(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.7\nThis")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(NotYet) as refused:
        _init(make_config(ray={"address": "head:6379"}))
    assert str(refused.value) == (
        "the cluster of ray.address=head:6379 cannot be joined: Version mismatch: The cluster was started with: "
        "Ray: 2.59.0 Python: 3.11.7 This"
    )


CLUSTER = """
import os, sys
from rsrlm.config import load
from rsrlm.runtime import cluster
config = load(sys.argv[1], ["model=any"])
cluster._set_environment(None)
import ray
cluster._init(config)
print(ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()))
"""


@pytest.mark.ray
def test_a_local_cluster_leaves_no_token_behind(tmp_path: Path) -> None:
    """Ray writes one to the home folder, and every `ray start --head` of that user would ask all hosts for it."""
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(config)], capture_output=True, text=True, timeout=120, check=False,
        env={**environ, "HOME": str(tmp_path)}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.strip() == "token", done.stderr
    assert not (tmp_path / ".ray").exists()
