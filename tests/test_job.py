"""`ray job submit` on a cluster with a token, whose host for work joins after the job has begun. It is stopped and
submitted again, and once more when it is finished."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from heads import REPOSITORY, Head
from waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    made = Head()
    yield made
    made.close()


@pytest.fixture(scope="module")
def config_file(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    config = {
        "name": "job",
        "runs": str(folder / "runs"),
        "iterations": 1,
        "model": str(tiny_chat_model),
        "prompts": {"path": "builtin", "per_iteration": 4, "heldout": 0},
        "sample": {"responses": 3, "max_tokens": 100, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": ""},
        "train": {"lr": 1e-3, "pairs_per_step": 3, "micro_batch": 2},
        "evaluate": {"max_tokens": 16},
        "report": False,
        "engine": {"max_model_len": 768, "max_num_seqs": 2, "kv_cache_gib": 0.25},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_job(head: Head, config_file: Path) -> None:
    runs = config_file.parent / "runs"
    rsrlm = [sys.executable, "-m", "rsrlm.cli", "run", str(config_file), "--or-resume"]
    until(lambda: head.ask("") is not None)

    # Nothing is made before there is room; then it is stopped in the middle.
    assert head.submit("first", [*rsrlm, "ray.wait_s=90"], "--no-wait").returncode == 0
    # Ray deletes the folder that the driver starts in.
    assert head.submit("relative", [*rsrlm, "runs=runs"], "--no-wait").returncode == 0
    until(lambda: "waiting for hosts: the cluster has 0 of 1 Ray CPU, 0 s of ray.wait_s=90" in head.logs("first"))
    assert not runs.exists()
    head.add_host()
    journal = runs / "job" / "journal.jsonl"
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3, 120)
    assert json.loads((runs / "job" / "alive.json").read_text())["host"] == socket.gethostname()
    head.ask("first/stop", "POST")
    assert head.ended("first") == "STOPPED"
    assert json.loads((runs / "job" / "summary.json").read_text())["status"] == "interrupted"
    known = journal.read_bytes().count(b"\n")
    assert head.ended("relative") == "FAILED"
    assert "rsrlm: runs=runs lies in the files that Ray keeps of this job" in head.logs("relative")

    # The same again goes on.
    done = head.submit("again", rsrlm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on with {runs / 'job'}, which was interrupted" in done.stdout
    assert int(re.search(r"(\d+) answers are known already", done.stdout)[1]) >= known  # type: ignore[index]
    assert "status: completed" in done.stdout
    assert json.loads((runs / "job" / "summary.json").read_text())["status"] == "completed"

    assert head.submit("finished", rsrlm, "--no-wait").returncode == 0
    assert head.ended("finished") == "SUCCEEDED"
    assert "is finished: 1 iterations" in head.logs("finished")


JOINING = """
import sys
import ray
from rsrlm.config import load
from rsrlm.runtime import address, cluster
config = load(sys.argv[1], [f"ray.address={sys.argv[2]}"])
address.check_address(config)
cluster._init(config)
print(len(ray.nodes()))
"""


def test_a_driver_takes_the_mode_that_the_cluster_has(head: Head, config_file: Path) -> None:
    """Ray leaves the token aside at an explicit address, and has read the mode when it is imported."""
    until(lambda: head.ask("") is not None)
    environ = {name: value for name, value in head.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", JOINING, str(config_file), f"127.0.0.1:{head.port}"],
        env=environ, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert int(done.stdout) >= 1, done.stderr
