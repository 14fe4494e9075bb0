"""The learner with real DeepSpeed ranks: the loss and the gradients do not depend on how pairs are split."""

import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.runtime import exits, learner
from rsrlm.runtime.actors import LearnerFailed
from rsrlm.runtime.learner import newest_checkpoint, share_of, steps_of
from rsrlm.settings.train import Train

SCRIPT = Path(__file__).parent / "learner_rank.py"
OPTIONS = {"nll_scale": 0.5, "beta": 0.3}
SFT = {"method": "sft"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(model: Path, output: Path, world_size: int, cases: list[Any]) -> list[dict[str, Any]]:
    import torch

    port = str(free_port())
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(SCRIPT), str(model), str(output), json.dumps(cases)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for rank in ranks:
        out, _ = rank.communicate(timeout=400)
        assert rank.returncode == 0, out.decode()[-3000:]
    return torch.load(output, weights_only=False)


@pytest.mark.ray
def test_loss_and_gradients_do_not_depend_on_the_split(tiny_model: Path, tmp_path: Path) -> None:
    """Five pairs of unequal length on 1 and 2 ranks, micro-batch 1, 2, 5, ZeRO 0-3, packed and padded, NLL term on; and
    five examples likewise."""
    one = run_ranks(
        tiny_model,
        tmp_path / "one.pt",
        1,
        [
            [0, 5, OPTIONS],
            [0, 1, OPTIONS],
            [0, 2, OPTIONS],
            [0, 2, {**OPTIONS, "packed": False}],
            [2, 2, OPTIONS],
            [0, 2, {**OPTIONS, "mixed": True}],
            [0, 5, SFT],
            [0, 2, {**SFT, "packed": False}],
        ],
    )
    two = run_ranks(
        tiny_model,
        tmp_path / "two.pt",
        2,
        [
            [0, 1, OPTIONS],
            [0, 2, OPTIONS],
            [0, 5, OPTIONS],
            [1, 2, OPTIONS],
            [2, 1, OPTIONS],
            [3, 2, OPTIONS],
            [0, 1, SFT],
            [2, 2, SFT],
        ],
    )

    reference = one[0]
    assert reference["packed"]
    assert not one[3]["packed"]
    # Before the first update every margin is 0: the DPO part of the loss is ln 2.
    assert reference["first"]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert reference["first"]["grad_norm"] > 0.1
    assert reference["summed"]["pairs"] == 5
    # Chosen 7 + 1 + 14 + 6 + 4 and rejected 3 + 9 + 14 + 2 + 25 tokens.
    assert reference["summed"]["kl_tokens"] == 85
    for other in one[1:6] + two[:6]:
        assert_same_step(other, reference)
    mixed = one[5]["summed"]
    assert (mixed["actor/pairs"], mixed["judge/pairs"]) == (3, 2)
    for name in ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "nll"):
        assert mixed[f"actor/{name}"] + mixed[f"judge/{name}"] == pytest.approx(mixed[name], rel=1e-4, abs=1e-4)
    means = one[5]["first"]
    assert means["actor/dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (means["pairs"], means["actor/pairs"], means["judge/pairs"]) == (5, 3, 2)

    # Supervised fine-tuning: the mean over all 7 + 1 + 14 + 6 + 4 target tokens, not over examples or ranks.
    sft = one[6]
    assert sft["summed"]["tokens_trained"] == 32
    assert sft["first"]["sft_loss"] == pytest.approx(sft["first"]["loss"])
    assert sft["first"]["sft_loss"] > 5  # random targets
    assert sft["summed"]["loss"] / 32 < sft["first"]["sft_loss"]  # one step in
    for other in (one[7], *two[6:]):
        assert_same_step(other, sft)


def assert_same_step(other: dict[str, Any], reference: dict[str, Any]) -> None:
    import torch

    assert other["summed"]["loss"] == pytest.approx(reference["summed"]["loss"], rel=1e-4)
    assert other["first"]["grad_norm"] == pytest.approx(reference["first"]["grad_norm"], rel=1e-4)
    assert other["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        scale = gradient.abs().max()
        assert torch.allclose(other["gradients"][name], gradient, atol=float(1e-3 * scale), rtol=0), name


def pairs_of(count: int) -> list[Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    from dataclasses import replace

    from rsrlm.records import PreferencePair

    base = PreferencePair(
        id="",
        prompt_id="p",
        kind="actor",
        chosen_id="c",
        rejected_id="r",
        prompt_token_ids=(1,),
        chosen_token_ids=(2,),
        rejected_token_ids=(3,),
        chosen_score=1.0,
        rejected_score=0.0,
        weight_version="M0",
    )
    return [replace(base, id=str(number)) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "world_size", "micro_batch", "rounds"),
    [(5, 1, 2, 3), (5, 2, 1, 3), (5, 2, 5, 1), (1, 3, 2, 1), (8, 2, 2, 2)],
)
def test_shares_cover_a_batch_once_and_keep_ranks_in_step(
    count: int, world_size: int, micro_batch: int, rounds: int
) -> None:
    batch = pairs_of(count)
    shares = [share_of(batch, rank, world_size, micro_batch) for rank in range(world_size)]
    assert {len(share) for share in shares} == {rounds}
    counted = [p.id for share in shares for pairs, weights in share for p, w in zip(pairs, weights, strict=True) if w]
    assert sorted(counted) == sorted(pair.id for pair in batch)
    assert all(1 <= len(pairs) <= micro_batch for share in shares for pairs, _ in share)


def test_steps_use_every_pair_once_per_epoch() -> None:
    train = Train(lr=1e-3, pairs_per_step=4, epochs=3)
    steps = steps_of(pairs_of(10), train, 0, 0)
    ids = [[pair.id for pair in step] for step in steps]
    assert [len(step) for step in ids] == [4, 4, 2] * 3
    assert ids[:3] == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]
    epochs = [[pair for step in ids[i : i + 3] for pair in step] for i in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[1] != epochs[0] != epochs[2] != epochs[1]
    assert steps_of(pairs_of(10), train, 0, 0) == steps


def test_the_newest_checkpoint_of_the_model_counts(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, "M2") is None
    for name in ("M1-s000008", "M2-s000002", "M2-s000010", "M2-s000012.tmp", "M2-s1-s000020", "M2.ahead-s000030"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path, "M2") == (tmp_path / "checkpoints" / "M2-s000010", 10)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_checkpoint_with_a_file_of_another_user_is_not_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "i00-s000002"
    (path / "state").mkdir(parents=True)
    file = path / "state" / "mp_rank_00_model_states.pt"
    file.write_bytes(b"a pickle")
    read: list[str] = []

    def load_checkpoint(folder: str, tag: str) -> Any:
        read.append(folder)
        return None, {"rsrlm_reference": {}, "rsrlm_rows": []}

    policy: Any = SimpleNamespace(
        engine=SimpleNamespace(load_checkpoint=load_checkpoint), train=SimpleNamespace(zero_stage=0)
    )
    assert learner.load_checkpoint(policy, path) == ({}, [])
    assert read == [str(path)]
    if what == "link":
        file.rename(tmp_path / "theirs")
        file.symlink_to(tmp_path / "theirs")
    os.chown(path if what == "folder" else file, 65534, 65534)
    with pytest.raises(learner.TrainingFailed, match="belongs to another user"):
        learner.load_checkpoint(policy, path)
    assert read == [str(path)]


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def serve_one(folder: Path, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a rank says when `work` is its training job."""
    events: list[dict[str, Any]] = []
    # The second answer is for the rank's look at what waits beside its job.
    jobs = iter([(0, "a job"), (0, None), (1, "stop")])
    names = {"next": lambda *_: next(jobs), "emit": lambda number, event: events.append(event)}
    remote = {name: SimpleNamespace(remote=call) for name, call in names.items()}
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(learner, "run_job", lambda *_: work())
    train = Train(lr=1e-3, pairs_per_step=1)
    learner.serve({"model": None, "train": train, "mailbox": SimpleNamespace(**remote), "folder": str(folder)})
    return events


def test_an_export_on_a_full_disk_is_the_users_to_mend(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors removes what it wrote: afterwards there is room again."""
    import numpy as np
    from safetensors.numpy import save_file

    (event,) = serve_one(
        small_disk, lambda: save_file({"a": np.zeros(120 << 20, np.uint8)}, small_disk / "m"), monkeypatch
    )
    assert shutil.disk_usage(small_disk).free > learner.FULL_BYTES
    status, code, reason = exits.failure(LearnerFailed(event["message"]))
    assert (event["event"], status, code) == ("failed", "failed", 2)
    assert reason.startswith("the disk is full (No space left on device (")


def test_a_checkpoint_on_a_full_disk_is_the_users_to_mend(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (event,) = serve_one(
        small_disk, lambda: torch.save({"a": torch.zeros(120 << 20, dtype=torch.uint8)}, small_disk / "m"), monkeypatch
    )
    assert exits.failure(LearnerFailed(event["message"]))[1] == 2


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), OSError(errno.EIO, "Input/output error"), KeyError("x")])
def test_another_failure_rebuilds_the_group(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    with pytest.raises(type(error)):
        serve_one(tmp_path, fail, monkeypatch)


@pytest.mark.parametrize(
    ("items", "epochs", "stop", "steps"), [(10, 3, None, 9), (10, 3, 2, 6), (10, 3, 3, 9), (1, 10, 6, 6)]
)
def test_training_stops_after_an_epoch(items: int, epochs: int, stop: int | None, steps: int) -> None:
    train = Train(lr=1e-3, pairs_per_step=4, epochs=epochs, stop_after_epoch=stop)
    assert train.steps(items) == steps
