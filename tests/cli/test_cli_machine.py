"""Memory, disk, folders and GPUs: what a run needs and the machine does not have."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Ended, Started

from rsrlm.store.folder import RunFolder

NO_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="needs a machine without an NVIDIA GPU")


def test_more_than_the_memory(refused: Callable[..., str]) -> None:
    message = refused("engine.kv_cache_gib=10000")
    need, have = map(float, re.findall(r"([\d.]+)(?: GiB of memory|; use)", message))
    assert need > 10000 > have
    assert "use a smaller model.path, engine.kv_cache_gib or train.micro_batch" in message


def test_more_than_the_disk(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**30))
    message = refused("iterations=30", "prompts.reuse=true", "model=smollm2-135m-instruct")
    assert message.startswith(f"rsrlm: runs={tmp_path / 'runs'}: the run needs about ")
    assert re.search(r"GiB of disk, [\d.]+ are free at ", message)
    assert "runs=FOLDER" in message


def test_a_place_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    for runs in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert refused(f"runs={runs}") == (
            f"rsrlm: run folder {runs / 'mine'}: Not a directory; choose a folder that you can write with runs=FOLDER\n"
        )
    assert (tmp_path / "file").read_text() == "theirs"


@pytest.mark.parametrize("key", ["runs", "model"])
def test_paths_that_the_system_refuses(key: str, refused: Callable[..., str]) -> None:
    """Too long here; a folder that the user may not enter is the same."""
    message = refused(f"{key}=./{'x' * 300}")
    assert "xxx" in message
    assert "File name too long; give a path that you can use" in message


def test_a_run_that_is_there(refused: Callable[..., str], make_config: Any, tmp_path: Path) -> None:
    store = RunFolder.create(make_config(name="mine", seed=5))
    before = (store.folder / "config.yaml").read_text()
    assert refused() == (
        f"rsrlm: {store.folder} holds a run already; go on with `rsrlm resume {store.folder}`, or choose another name "
        "with name=NAME\n"
    )
    assert (store.folder / "config.yaml").read_text() == before


def test_a_folder_of_something_else(refused: Callable[..., str], tmp_path: Path) -> None:
    """A run removes half-written files under its folder: it must be its own."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.tmp").write_text("years of work")
    assert refused() == (
        f"rsrlm: {tmp_path / 'runs' / 'mine'} holds other files (thesis.tmp); choose another name with name=NAME\n"
    )


def test_a_folder_that_an_earlier_attempt_left_empty(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / ".config.yaml.123.tmp").write_text("name: mi")
    with pytest.raises(Started):
        rsrlm("run", config_file)


@NO_GPU
@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.gpus=1", "engine.kind=async"],
        ["train.gpus=1"],
        ["engine.gpus=1", "ray.address=local"],  # Ray's word for a cluster of the run's own
    ],
)
def test_gpus_on_a_machine_without(overrides: list[str], refused: Callable[..., str]) -> None:
    message = refused(*overrides, "model.dtype=bfloat16", "train.zero_stage=1")
    assert message.startswith(f"rsrlm: {overrides[0]}: this machine has no NVIDIA GPU; set engine.gpus=0 and train.gp")
    assert "ray.address=HOST:PORT" in message
