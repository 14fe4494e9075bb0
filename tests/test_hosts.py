"""Runs over several hosts, with real Ray, vLLM and DeepSpeed: a head without work and the driver, a learner's host, an
engine's host. Each has its own address, name and /dev/shm (see hosts.py)."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import Hosts, why_not
from test_run import assert_same_as, summary
from waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

RSRLM = [sys.executable, "-m", "rsrlm.cli"]
HEAD, LEARNER, SAMPLER, LATE_SAMPLER, LATE_LEARNER = "head", "learner", "sampler", "late-sampler", "late-learner"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    made = Hosts(HEAD, LEARNER, SAMPLER, LATE_SAMPLER, LATE_LEARNER)
    try:
        made.join({HEAD: 0, LEARNER: 2, SAMPLER: 3})
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def config_file(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations."""
    folder = tmp_path_factory.mktemp("over-hosts")
    config = {
        "name": "alone",
        "runs": str(folder / "runs"),
        "iterations": 2,
        "model": str(tiny_chat_model),
        "prompts": {"path": "builtin", "per_iteration": 10, "heldout": 3},
        "sample": {"responses": 3, "max_tokens": 24, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": ""},
        "train": {"lr": 1e-3, "pairs_per_step": 3, "micro_batch": 2, "checkpoint_every_steps": 2},
        "evaluate": {"max_tokens": 16},
        "report": False,
        "engine": {"max_model_len": 768, "max_num_seqs": 4, "kv_cache_gib": 0.25},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def over_hosts(hosts: Hosts, config_file: Path, *overrides: str) -> list[str]:
    placed = (f"ray.address={hosts.head}", f"ray.hosts.engines.role={SAMPLER}", f"ray.hosts.learner.role={LEARNER}")
    return [*RSRLM, "run", str(config_file), *placed, *overrides]


@pytest.fixture(scope="module")
def alone(config_file: Path) -> Path:
    """The same run on one host."""
    done = subprocess.run([*RSRLM, "run", str(config_file)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return config_file.parent / "runs" / "alone"


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def assert_no_transfer_files(hosts: Hosts) -> None:
    """In the memory of any host."""
    assert [found for name in hosts.addresses for found in hosts.files(name, "/dev/shm/rsrlm*")] == []


@pytest.mark.full
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_run_over_hosts_is_the_run_on_one(transport: str, hosts: Hosts, config_file: Path, alone: Path) -> None:
    """Tokens, pairs and training are those of one host, so the engines held what the learner had trained."""
    name = f"over-{transport}"
    done = hosts.run(HEAD, *over_hosts(hosts, config_file, f"name={name}", f"weights.transport={transport}"))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = config_file.parent / "runs" / name
    assert_same_as(folder, alone)
    published = events(folder, "published")
    assert [one["version"] for one in published][:2] == ["M1", "M0"]
    # A copy of its own host, that came over the network, or the exported model.
    assert {report["copy"] for one in published for report in one["replicas"]} == {transport == "gloo"}
    assert events(folder, "weights_not_sent") == []
    assert_no_transfer_files(hosts)


@pytest.mark.parametrize("what", ["runs", "model"])
def test_a_host_that_does_not_see_a_folder_is_named(what: str, hosts: Hosts, config_file: Path) -> None:
    """Before anything starts."""
    config = yaml.safe_load(config_file.read_text())
    hidden = config[what]
    Path(config["runs"]).mkdir(exist_ok=True)
    assert hosts.run(SAMPLER, "mount", "-t", "tmpfs", "tmpfs", hidden).returncode == 0
    began = time.monotonic()
    try:
        done = hosts.run(HEAD, *over_hosts(hosts, config_file, f"name=without-{what}"))
    finally:
        hosts.run(SAMPLER, "umount", hidden)
    seconds = time.monotonic() - began
    assert done.returncode == 2, done.stdout + done.stderr
    folder = config_file.parent / "runs" / f"without-{what}"
    reason = summary(folder)["reason"]
    assert reason.startswith(f"host {SAMPLER} ({hosts.addresses[SAMPLER]}) does not see ")
    assert hidden in reason
    assert reason in " ".join(done.stdout.split())
    assert events(folder, "engine_up") == []
    assert seconds < 60
    print(f"{what}: {seconds:.0f} s: {reason}")


@pytest.mark.full
def test_ranks_on_two_hosts_train_together(hosts: Hosts, config_file: Path) -> None:
    """Though the hosts' own names are those of addresses that no other host reaches."""
    hosts.join({LATE_LEARNER: 2})
    try:
        overrides = ("name=two-ranks", "train.workers=2", "iterations=1", "prompts.heldout=0")
        done = hosts.run(HEAD, *over_hosts(hosts, config_file, *overrides))
    finally:
        hosts.lose(LATE_LEARNER)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(config_file.parent / "runs" / "two-ranks")["iterations"][0]
    assert found["pairs_trained"] == found["pairs"] > 0
    assert_no_transfer_files(hosts)


@pytest.mark.full
def test_hosts_that_die_are_replaced(hosts: Hosts, config_file: Path, alone: Path, tmp_path: Path) -> None:
    """First the engine's, in the middle of its answers, then the learner's, in the middle of its steps. The hosts that
    take their places join later. Nothing is lost, and nothing done twice but steps after the last checkpoint."""
    folder = config_file.parent / "runs" / "lost"
    process = hosts.start(
        HEAD,
        *over_hosts(hosts, config_file, "name=lost", "weights.transport=gloo", "weights.deadline_s=60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = folder / "journal.jsonl"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b'"id":"00/') >= 5, process)
    began = time.monotonic()
    hosts.lose(SAMPLER)
    hosts.join({LATE_SAMPLER: 3})
    wait_for(lambda: events(folder, "engine_restarted"), process)
    print(f"engine on another host after {time.monotonic() - began:.0f} s")
    steps = folder / "iterations" / "01" / "steps.jsonl"
    wait_for(steps.exists, process)
    began = time.monotonic()
    hosts.lose(LEARNER)
    hosts.join({LATE_LEARNER: 2})
    printed, errors = process.communicate(timeout=600)
    print(f"finished {time.monotonic() - began:.0f} s after the learner's host was lost")
    assert process.returncode == 0, printed + errors
    assert_same_as(folder, alone)
    assert len(events(folder, "engine_lost")) == 1
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({line["k"] for line in lines}) == len(lines)
    assert_no_transfer_files(hosts)
