"""The learner with real DeepSpeed ranks: the loss and the gradients do not depend on how pairs are split."""

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from samples import PAIR
from small_models import make_tiny
from waiting import free_port

from rsrlm.jobs import ReferenceBatch, Resumed, StepTrained, Trained, TrainJob
from rsrlm.runtime import exits
from rsrlm.runtime.checkpoints import TrainingFailed, load_checkpoint, newest_checkpoint
from rsrlm.runtime.export import FULL_BYTES
from rsrlm.runtime.group import LearnerFailed
from rsrlm.runtime.mailbox import Failed, Stop
from rsrlm.runtime.rank import serve
from rsrlm.runtime.reference import Reference, write_share
from rsrlm.runtime.session import Desk, Place
from rsrlm.runtime.shares import Outline, micro_batches, outline, share_of, steps_of
from rsrlm.runtime.weights import stale_files
from rsrlm.settings.machine import ModelConfig
from rsrlm.settings.train import Train
from rsrlm.store.items import ItemFile, write_items

SCRIPT = Path(__file__).parent / "learner_rank.py"
SESSION = Path(__file__).parent / "session_rank.py"
OPTIONS = {"nll_scale": 0.5, "beta": 0.3}
SFT = {"method": "sft"}
LORA = {**OPTIONS, "lora": {"rank": 4, "alpha": 16, "targets": ["q_proj", "down_proj"]}}
RULE = Train(lr=1e-3, pairs_per_step=1)


@contextmanager
def ranks(script: Path, world_size: int, arguments: list[Any]) -> Iterator[None]:
    """The script as this number of ranks of one process group; all must end well."""
    port = str(free_port())
    started = []
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
        command = [sys.executable, str(script), *map(str, arguments)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    yield
    for rank in started:
        out, _ = rank.communicate(timeout=400)
        assert rank.returncode == 0, out.decode()[-3000:]


def run_ranks(model: Path, output: Path, world_size: int, cases: list[Any]) -> list[dict[str, Any]]:
    import torch

    with ranks(SCRIPT, world_size, [model, output, json.dumps(cases)]):
        pass
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
            [0, 5, LORA],
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
            [2, 2, {**OPTIONS, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}],
            [0, 1, SFT],
            [2, 2, SFT],
            [0, 2, LORA],
            [2, 1, LORA],
            [3, 2, LORA],
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
    for other in one[1:6] + two[:7]:
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
    for other in (one[7], *two[7:9]):
        assert_same_step(other, sft)

    # Adapters alone learn, and do nothing before the first step.
    adapters = one[8]
    layers = [f"layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert set(adapters["gradients"]) == {
        f"model.{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"
    }
    assert adapters["first"]["loss"] == pytest.approx(reference["first"]["loss"], rel=1e-5)
    for other in two[9:]:
        assert_same_step(other, adapters)


@pytest.mark.ray
@pytest.mark.full
def test_precision_checkpointing_and_divided_weights(smollm2: Path, tmp_path: Path) -> None:
    """Weights that are large enough to be divided under ZeRO 3, in float32 and in bfloat16, made again in the backward
    pass or kept, against one float32 rank."""
    import torch

    wide = make_tiny(
        tmp_path / "wide",
        smollm2,
        ends=False,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        vocab_size=49200,
        initializer_range=0.05,
    )
    again = {**OPTIONS, "gradient_checkpointing": True}
    half = {**again, "dtype": "bfloat16"}
    [reference] = run_ranks(wide, tmp_path / "one.pt", 1, [[0, 5, OPTIONS]])
    exact = [[0, 2, again], [2, 2, again], [3, 2, OPTIONS], [3, 2, again]]
    rounded = [[1, 2, half], [2, 1, half], [3, 2, half], [3, 2, {**half, "gradient_checkpointing": False}]]
    found = run_ranks(wide, tmp_path / "two.pt", 2, exact + rounded)

    whole = 2 * 49200 * 256
    for case, other in zip(exact + rounded, found, strict=True):
        assert (other["held"] < whole / 2) == (case[0] == 3)  # what DeepSpeed leaves whole is small
        assert abs(other["left"]) < 4 * whole / 100  # nothing stays when a training is given up
        assert other["packed"]
    for other in found[: len(exact)]:
        assert_same_step(other, reference)
    for other in found[len(exact) :]:
        assert other["first"]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
        # Eight bits of mantissa: 0.4 % for a number, less for a sum of many.
        assert other["first"]["grad_norm"] == pytest.approx(reference["first"]["grad_norm"], rel=0.02)
        assert other["summed"]["loss"] == pytest.approx(reference["summed"]["loss"], rel=0.02)
        for name, gradient in reference["gradients"].items():
            likeness = torch.cosine_similarity(other["gradients"][name].flatten(), gradient.flatten(), dim=0)
            assert likeness > 0.98, name


def assert_same_step(other: dict[str, Any], reference: dict[str, Any]) -> None:
    import torch

    assert other["summed"]["loss"] == pytest.approx(reference["summed"]["loss"], rel=1e-4)
    assert other["first"]["grad_norm"] == pytest.approx(reference["first"]["grad_norm"], rel=1e-4)
    assert other["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        scale = gradient.abs().max()
        assert torch.allclose(other["gradients"][name], gradient, atol=float(1e-3 * scale), rtol=0), name


@pytest.mark.parametrize(
    ("count", "world_size", "micro_batch", "rounds"),
    [(5, 1, 2, 3), (5, 2, 1, 3), (5, 2, 5, 1), (1, 3, 2, 1), (8, 2, 2, 2)],
)
def test_shares_cover_a_batch_once_and_keep_ranks_in_step(
    count: int, world_size: int, micro_batch: int, rounds: int
) -> None:
    batch = [10 + place for place in range(count)]
    shares = [share_of(batch, rank, world_size, micro_batch) for rank in range(world_size)]
    assert {len(share) for share in shares} == {rounds} == {micro_batches(count, world_size, micro_batch)}
    counted = [
        place for share in shares for places, counts in share for place, one in zip(places, counts, strict=True) if one
    ]
    assert sorted(counted) == batch
    assert all(1 <= len(places) <= micro_batch for share in shares for places, _ in share)


def test_steps_use_every_pair_once_per_epoch() -> None:
    train = Train(lr=1e-3, pairs_per_step=4, epochs=3)
    steps = [list(step) for step in steps_of(10, train, 0, 0)]
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    assert steps[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    epochs = [[place for step in steps[i : i + 3] for place in step] for i in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[1] != epochs[0] != epochs[2] != epochs[1]
    assert [list(step) for step in steps_of(10, train, 0, 0)] == steps
    # The order is that of the seed and the iteration, whatever has changed since.
    assert epochs[1] == [4, 6, 3, 8, 9, 0, 2, 5, 7, 1]


def test_what_all_ranks_know_of_a_step(tmp_path: Path) -> None:
    pairs = [replace(PAIR, id=str(n), kind="ab"[n % 2], chosen_token_ids=(1,) * n) for n in range(3)]
    write_items(tmp_path / "items", pairs)
    items: ItemFile[Any] = ItemFile(tmp_path / "items")
    found = outline(items, [2, 0], ("chosen_token_ids", "rejected_token_ids"))
    rejected = len(PAIR.rejected_token_ids)
    assert found == Outline(ids=["2", "0"], kinds=["a", "a"], response_tokens=[2 + rejected, rejected])


def job_of(run: Path, **changes: Any) -> TrainJob:
    made = TrainJob(
        run=str(run), iteration=0, seed=0, model="m", output=str(run / "models/M2"), name="M2",
        train=Train(lr=1e-3, pairs_per_step=1), items="i", digest="0123456789ab",
    )  # fmt: skip
    return replace(made, **changes)


def test_the_newest_checkpoint_of_the_training_counts(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert newest_checkpoint(job) is None
    names = (
        "M1-01234567-s000008", "M2-01234567-s000002", "M2-01234567-s000010", "M2-01234567-s000012.tmp",
        "M2-01234567-s1-s000020", "M2.ahead-01234567-s000030", "M2-ffffffff-s000040", "M2-01234567-reference",
    )  # fmt: skip
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(job) == (tmp_path / "checkpoints" / "M2-01234567-s000010", 10)
    # A job that ends before it cannot start from it.
    assert newest_checkpoint(replace(job, until=10)) == newest_checkpoint(job)
    assert newest_checkpoint(replace(job, until=9)) == (tmp_path / "checkpoints" / "M2-01234567-s000002", 2)
    assert newest_checkpoint(replace(job, until=1)) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_checkpoint_with_a_file_of_another_user_is_not_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "M1-01234567-s000002"
    (path / "state").mkdir(parents=True)
    file = path / "state" / "mp_rank_00_model_states.pt"
    file.write_bytes(b"a pickle")
    read: list[str] = []

    def load(folder: str, **_: Any) -> Any:
        read.append(folder)
        return None, {"rsrlm_rows": []}

    engine: Any = SimpleNamespace(load_checkpoint=load)
    assert load_checkpoint(engine, path, RULE) == []
    assert read == [str(path)]
    if what == "link":
        file.rename(tmp_path / "theirs")
        file.symlink_to(tmp_path / "theirs")
    os.chown(path if what == "folder" else file, 65534, 65534)
    with pytest.raises(TrainingFailed, match="belongs to another user"):
        load_checkpoint(engine, path, RULE)
    assert read == [str(path)]


@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes"])
def test_a_checkpoint_that_is_not_whole_is_named(damage: str, tmp_path: Path) -> None:
    """With what to do; a group that is built anew could read it no better."""
    import torch

    path = tmp_path / "M1-01234567-s000002"
    (path / "state").mkdir(parents=True)
    file = path / "state" / "mp_rank_00_model_states.pt"
    torch.save({"module": torch.zeros(1000)}, file)
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-500], "empty": b"", "other bytes": b"\x00" * len(whole)}[damage])
    engine: Any = SimpleNamespace(load_checkpoint=lambda *_, **__: torch.load(file, weights_only=False))
    with pytest.raises(TrainingFailed, match=rf"checkpoint {path} cannot be read: .*; delete the checkpoint"):
        load_checkpoint(engine, path, RULE)


def test_a_rank_that_dies_while_a_checkpoint_is_read_rebuilds_the_group(tmp_path: Path) -> None:
    def dies(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    path = tmp_path / "M1-01234567-s000002"
    path.mkdir()
    engine: Any = SimpleNamespace(load_checkpoint=dies)
    with pytest.raises(RuntimeError, match="Connection closed") as caught:
        load_checkpoint(engine, path, RULE)
    assert not isinstance(caught.value, TrainingFailed)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_disk_that_gives_all_files_to_one_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does with root_squash: what we write belongs to nobody, as the checkpoint does."""
    path = tmp_path / "M1-01234567-s000002"
    path.mkdir()
    engine: Any = SimpleNamespace(load_checkpoint=lambda folder, **_: (None, {"rsrlm_rows": [{"step": 0}]}))
    made = tempfile.NamedTemporaryFile

    def squashed(**where: Any) -> Any:
        file = made(**where)
        os.chown(file.name, 65534, 65534)
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", squashed)
    with pytest.raises(TrainingFailed, match="belongs to another user"):
        load_checkpoint(engine, path, RULE)
    os.chown(path, 65534, 65534)
    with pytest.raises(TrainingFailed, match="M0-end is gone, and with it the optimizer"):
        load_checkpoint(engine, tmp_path / "M0-end", RULE)
    assert load_checkpoint(engine, path, RULE) == [{"step": 0}]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# -- log-probabilities before the first update -------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_each_rank_reads_what_all_have_written(world_size: int, tmp_path: Path) -> None:
    lengths = [3, 1, 4, 2, 5]
    values = [np.arange(length, dtype=np.float32) + 10 * place for place, length in enumerate(lengths)]
    for rank in range(world_size):
        write_share(tmp_path, rank, world_size, values[rank::world_size])
    reference = Reference(tmp_path, lengths)
    assert reference.of([4, 0, 1]).tolist() == [*values[4], *values[0], *values[1]]
    assert str(reference.of([2]).dtype) == "torch.float32"
    assert all(reference.of([place]).tolist() == list(values[place]) for place in range(5))


def test_a_share_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    write_share(tmp_path, 0, 1, [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="3 log-probabilities in a file that should have 4"):
        Reference(tmp_path, [2, 2])


# -- jobs in parts -----------------------------------------------------------------------------------------------------


def run_sessions(model: Path, run: Path, world_size: int, jobs: list[Any]) -> list[list[Any]]:
    """What the first rank says of each job; see session_rank.py."""
    with ranks(SESSION, world_size, [model, run, json.dumps(jobs)]):
        pass
    for left in stale_files(run):  # a driver would remove them
        left.unlink()
    return pickle.loads((run / "said").read_bytes())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("world_size", "zero_stage", "ways"),
    [
        (1, 0, ["kept", "anew", "torn"]),
        pytest.param(2, 2, ["kept", "anew"], marks=pytest.mark.full),
        pytest.param(2, 3, ["kept", "anew"], marks=pytest.mark.full),
    ],
)
def test_a_training_in_parts_is_the_training_in_one(
    tiny_model: Path, tmp_path: Path, world_size: int, zero_stage: int, ways: list[str]
) -> None:
    """Whatever lies between the parts: nothing, a new process, or another training."""
    common = {"zero_stage": zero_stage, "epochs": 2, "dropout": 0.1}
    whole = tmp_path / "whole"
    (said,) = run_sessions(tiny_model, whole, world_size, [common])
    rows = [event.row for event in said if isinstance(event, StepTrained)]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert isinstance(said[-1], Trained)
    assert [Path(file.path).name.endswith("M1.safetensors") for file in said[-1].files.files] == [True]
    assert said[-1].files.node == "node of rank 0"
    weights = (whole / "models/M1/model.safetensors").read_bytes()
    parts = [{**common, "until": 2}, {**common, "until": 3}, common]
    other = {**common, "name": "other", "until": 1}
    for way in ways:
        run = tmp_path / way
        if way == "anew":
            found = [run_sessions(tiny_model, run, world_size, [part])[0] for part in parts]
        else:
            jobs = parts if way == "kept" else [parts[0], other, *parts[1:]]
            found = run_sessions(tiny_model, run, world_size, jobs)
            found = found if way == "kept" else [found[0], *found[2:]]
        assert [part[-1].steps for part in found] == [2, 3, 6]
        assert [part[-1].files is None for part in found] == [True, True, False]
        resumed = [event for part in found for event in part if isinstance(event, Resumed)]
        assert [(one.step, len(one.rows), one.of) for one in resumed] == [(0, 0, 6), (2, 2, 6), (3, 3, 6)]
        again = [event.row for part in found for event in part if isinstance(event, StepTrained)]
        for row, expected in zip(again, rows, strict=True):
            exact = [name for name in expected if name not in ("seconds", "tokens_per_s", "memory_gib")]
            assert {name: row[name] for name in exact} == {name: expected[name] for name in exact}
        assert (run / "models/M1/model.safetensors").read_bytes() == weights
        candidates = [(run / f"models/M1@{step}/model.safetensors").read_bytes() for step in (2, 3)]
        assert len({*candidates, weights}) == 3
        # The log-probabilities before the first update are made once.
        assert not any(isinstance(event, ReferenceBatch) for part in found[1:] for event in part)


@pytest.mark.ray
@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.full)])
def test_a_training_goes_on_with_its_optimizer(
    tiny_model: Path, tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    """Three rounds of three steps; one that a group anew goes on with has the same steps and weights. The reference
    stays with the first model, or moves with the rounds. Rounds over the parts of a training are all of it."""
    rule = {"zero_stage": zero_stage, "schedule": "linear", "checkpoint_every_steps": 2}

    def rounds(reference: str, of: int = 9, name: str = "M") -> list[dict[str, Any]]:
        course, steps = {"of": of, "reference": reference}, of // 3
        afters = ["", f"{name}1", f"{name}2"]
        return [
            {**rule, "name": f"{name}{n + 1}", "course": {**course, "step": steps * n, "after": after}}
            for n, after in enumerate(afters)
        ]

    whole, other = tmp_path / "whole", tmp_path / "other"
    together = [steps_in(said) for said in run_sessions(tiny_model, whole, world_size, rounds("first"))]
    rates = [row["lr"] for rows in together for row in rows]
    assert rates == pytest.approx([1e-2 * (1 - step / 8) for step in range(9)])
    assert sorted(path.name for path in (whole / "checkpoints").glob("*-end")) == ["M1-end", "M2-end", "M3-end"]
    for left in (whole / "checkpoints").iterdir():
        if left.name != "M1-end":
            shutil.rmtree(left)
    weights = (whole / "models/M2/model.safetensors").read_bytes()
    (again,) = run_sessions(tiny_model, whole, world_size, rounds("first")[1:2])
    exact = [name for name in together[1][0] if name not in ("seconds", "tokens_per_s", "memory_gib")]
    assert [[row[name] for name in exact] for row in steps_in(again)] == [
        [row[name] for name in exact] for row in together[1]
    ]
    assert (whole / "models/M2/model.safetensors").read_bytes() == weights

    parts = [{**one, "items": (2 * n, 2 * n + 2)} for n, one in enumerate(rounds("first", 3, "D"))]
    for one in parts[:2]:
        one["course"]["publish"] = False
    jobs = [*rounds("before")[:2], {**rule, "name": "all"}, *parts]
    said = run_sessions(tiny_model, other, world_size, jobs)
    assert [events[-1].files is None for events in said] == [False, False, False, True, True, False]
    *moved, at_once, one, two, three = map(steps_in, said)
    for found, at_reference in ((together, [True, False, False]), (moved, [True, True])):
        assert [abs(rows[0]["dpo_loss"] - math.log(2)) < 1e-5 for rows in found] == at_reference
    seen = [[(row["pair_ids"], row["loss"], row["lr"]) for row in rows] for rows in (at_once, [*one, *two, *three])]
    assert seen[0] == seen[1]
    models = [(other / "models" / name / "model.safetensors").read_bytes() for name in ("all", "D3")]
    assert models[0] == models[1]


def steps_in(said: list[Any]) -> list[dict[str, Any]]:
    return [event.row for event in said if isinstance(event, StepTrained)]


@pytest.mark.ray
@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.full)])
def test_adapters_are_added_to_the_weights(tiny_model: Path, tmp_path: Path, world_size: int, zero_stage: int) -> None:
    """What comes out of a training in two processes is that of one, and differs from what went in by rank 4 where there
    are adapters, and nowhere else."""
    import torch
    from safetensors.torch import load_file

    common = {"zero_stage": zero_stage, "epochs": 2, "lora": {**LORA["lora"], "dropout": 0.1}}
    (said,) = run_sessions(tiny_model, tmp_path / "whole", world_size, [common])
    for part in ({**common, "until": 3}, common):
        (again,) = run_sessions(tiny_model, tmp_path / "parts", world_size, [part])
    losses = [[one.row["loss"] for one in events if isinstance(one, StepTrained)] for events in (said, again)]
    assert losses[0][3:] == losses[1]
    path = "models/M1/model.safetensors"
    assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "parts" / path).read_bytes()
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "whole" / path)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        change = after[name] - weight
        rank = int(torch.linalg.matrix_rank(change, atol=1e-4)) if change.any() else 0
        assert rank == (4 if "q_proj" in name or "down_proj" in name else 0), name
    assert_adapter_makes(tmp_path / "whole/models/M1/adapter", tiny_model, after)
    if not zero_stage:
        # Adapters and their two moments; of the frozen weights the head, which DeepSpeed knows by its other name.
        saved = sum(file.stat().st_size for file in (tmp_path / "parts/checkpoints").rglob("*.pt"))
        learning = 3 * 4 * ((64 + 64) + (160 + 64))
        assert saved < 4 * 49152 * 64 + 2 * 3 * 4 * learning


def assert_adapter_makes(adapter: Path, base: Path, merged: dict[str, Any]) -> None:
    """peft adds the adapter to the base model, and has the weights of the whole model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rsrlm.runtime import lora

    assert lora.base_of(adapter) == "M0"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.ray
@pytest.mark.full
def test_another_number_of_ranks_takes_a_training_up(tiny_model: Path, tmp_path: Path) -> None:
    """Without ZeRO: two ranks go on with what one has begun, log-probabilities before the first update included."""
    common = {"epochs": 2, "pairs_per_step": 2}
    (said,) = run_sessions(tiny_model, tmp_path / "whole", 1, [common])
    run_sessions(tiny_model, tmp_path / "parts", 1, [{**common, "until": 2}])
    (after,) = run_sessions(tiny_model, tmp_path / "parts", 2, [common])
    assert not any(isinstance(event, ReferenceBatch) for event in after)
    rows = [event.row for event in said if isinstance(event, StepTrained)][2:]
    again = [event.row for event in after if isinstance(event, StepTrained)]
    assert [row["pair_ids"] for row in again] == [row["pair_ids"] for row in rows]
    for name in ("loss", "margin", "chosen_logp", "grad_norm"):
        assert [row[name] for row in again] == pytest.approx([row[name] for row in rows], rel=1e-3, abs=1e-5)


@pytest.mark.ray
def test_a_rank_does_without_vllm(tmp_path: Path, tiny_model: Path) -> None:
    """It trains beside the engines, and sends weights to them: their library would cost it seconds and memory."""
    code = (
        "import sys, runpy\n"
        "import rsrlm.runtime.rank, rsrlm.runtime.group\n"
        f"sys.path.insert(0, {str(SESSION.parent)!r})\n"
        "runpy.run_path(sys.argv[1])['main']()\n"
        "assert 'rsrlm.runtime.gloo' in sys.modules\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'vllm']\n"
    )
    script = tmp_path / "rank.py"
    script.write_text(code.replace("sys.argv[1]", repr(str(SESSION))))
    with ranks(script, 1, [tiny_model, tmp_path / "run", json.dumps([{"until": 1}])]):
        pass


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


def serve_one(folder: Path, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a rank says when `work` is its training job."""
    events: list[Any] = []
    jobs = iter([(0, job_of(folder)), (0, None), (1, Stop())])
    names = {"next": lambda *_: next(jobs), "emit": lambda number, event: events.append(event)}
    remote = {name: SimpleNamespace(remote=call) for name, call in names.items()}
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("rsrlm.runtime.session.Session", lambda *_: work())
    train = Train(lr=1e-3, pairs_per_step=1)
    serve({"model": None, "train": train, "mailbox": SimpleNamespace(**remote), "folder": str(folder)})
    return events


@pytest.mark.parametrize("until", [None, 1])
def test_the_end_is_told_when_the_memory_is_free(until: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that share the GPUs of all ranks wake with it. What another job goes on from is kept."""
    happened: list[str] = []
    trained = Trained(steps=1, files=None, train_seconds=0.0, write_seconds=0.0, export_seconds=0.0)
    made = SimpleNamespace(
        do=lambda job, say: trained, close=lambda: happened.append("given up"), ends_before=lambda job: False
    )
    monkeypatch.setattr("rsrlm.runtime.session.Session", lambda *_: made)
    monkeypatch.setattr("torch.distributed.barrier", lambda: happened.append("all ranks"))
    job = replace(job_of(Path()), until=until)
    Desk(ModelConfig(path="x"), Place()).do(job, lambda said: happened.append(type(said).__name__))
    assert happened == [*(["given up"] if until is None else []), "all ranks", "Trained"]


def test_what_the_user_must_mend_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TrainingFailed("the loss is nan")

    assert serve_one(tmp_path, fail, monkeypatch) == [Failed(message="the loss is nan")]


def test_an_export_on_a_full_disk_is_the_users_to_mend(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors removes what it wrote: afterwards there is room again."""
    import numpy as np
    from safetensors.numpy import save_file

    (event,) = serve_one(
        small_disk, lambda: save_file({"a": np.zeros(120 << 20, np.uint8)}, small_disk / "m"), monkeypatch
    )
    assert shutil.disk_usage(small_disk).free > FULL_BYTES
    status, code, reason = exits.failure(LearnerFailed(event.message))
    assert (status, code) == ("failed", 2)
    assert reason.startswith("the disk is full (No space left on device (")


def test_a_checkpoint_on_a_full_disk_is_the_users_to_mend(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (event,) = serve_one(
        small_disk, lambda: torch.save({"a": torch.zeros(120 << 20, dtype=torch.uint8)}, small_disk / "m"), monkeypatch
    )
    assert exits.failure(LearnerFailed(event.message))[1] == 2


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
