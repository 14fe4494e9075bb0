"""The online clock with real Ray, vLLM and DeepSpeed: rounds that overlap, and a driver that is killed in one."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

RSRLM = [sys.executable, "-m", "rsrlm.cli"]
ROUNDS = 4


@pytest.fixture(scope="module")
def config_file(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    config = {
        "name": "whole",
        "runs": str(folder),
        "model": str(tiny_chat_model),
        "clock": {"kind": "online", "evaluate_every": 3},
        "iterations": ROUNDS,
        "prompts": {"path": "builtin", "per_iteration": 8, "heldout": 2},
        "sample": {"responses": 3, "max_tokens": 24, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0.0, "fence_salt": ""},  # runs are compared
        "train": {"lr": 1e-4, "pairs_per_step": 4, "micro_batch": 2},
        "evaluate": {"max_tokens": 16, "duel": False},
        "report": False,
        "engine": {"max_model_len": 768, "max_num_seqs": 4, "kv_cache_gib": 0.25},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def whole(config_file: Path) -> Path:
    done = subprocess.run([*RSRLM, "run", str(config_file)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return config_file.parent / "whole"


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())["iterations"]
    return found


def table(folder: Path, number: int, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / f"iterations/{number:02d}/{name}.parquet").to_pylist()
    return found


def test_rounds_overlap(whole: Path) -> None:
    """Each is answered by the weights that the one before it began with, while that one is trained on."""
    found = rows(whole)
    assert [row["actor"] for row in found] == ["M0", "M0", "M1", "M2"]
    for number, row in enumerate(found):
        assert {one["weight_version"] for one in table(whole, number, "responses")} == {row["actor"]}
        assert {one["weight_version"] for one in table(whole, number, "judgements")} == {row["actor"]}
        assert row["pairs_trained"] == row["pairs"] == len(table(whole, number, "pairs")) > 0
    losses = [row["dpo_loss_first"] for row in found]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert all(abs(loss - losses[0]) > 1e-4 for loss in losses[1:])  # the reference stays M0
    rates = [
        json.loads(line)["lr"] for n in range(ROUNDS) for line in (whole / f"iterations/{n:02d}/steps.jsonl").open()
    ]
    assert rates == sorted(rates, reverse=True)  # one schedule over all rounds
    assert [bool(row["heldout"]) for row in found] == [False, False, True, True]
    assert sorted(path.name for path in (whole / "models").iterdir()) == ["M3", "M4"]
    assert not list((whole / "checkpoints").iterdir())
    events = [json.loads(line) for line in (whole / "events.jsonl").open()]
    kinds = [(event["event"], str(event.get("g", event.get("iteration")))[:2]) for event in events]
    last_step = len(kinds) - 1 - kinds[::-1].index(("step", "0"))
    assert kinds.index(("group", "01")) < last_step


@pytest.mark.full
def test_a_killed_driver_is_resumed(whole: Path, config_file: Path) -> None:
    """In the third round, with its optimizer behind it: the same pairs, and weights equal up to rounding."""
    import torch
    from safetensors.torch import load_file

    folder = config_file.parent / "killed"
    command = [*RSRLM, "run", str(config_file), f"name={folder.name}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (folder / "iterations/02/steps.jsonl").exists(), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*RSRLM, "resume", str(folder)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for number in range(ROUNDS):
        for name in ("responses", "pairs"):
            ours, theirs = (
                [(one["id"], one.get("token_ids")) for one in table(f, number, name)] for f in (folder, whole)
            )
            assert ours == theirs
    one, other = (load_file(f / "models/M4/model.safetensors") for f in (folder, whole))
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-5), name
