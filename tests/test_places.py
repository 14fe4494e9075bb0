"""What is found out about the hosts of a joined cluster before a run starts, without Ray."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.runtime import places, weights
from rsrlm.settings.base import ConfigError


class Seen:
    """As much of Ray as `check_hosts` uses: one more host, on which `before` runs ahead of the task."""

    def __init__(self, before: Callable[[], Any], cpus: float = 2.0, silent: bool = False, dies: bool = False) -> None:
        self.before = before
        there = {"Alive": True, "NodeManagerHostname": "sampler-1", "NodeManagerAddress": "10.9.0.3"}
        head = {**there, "NodeID": "a" * 56, "Resources": {"CPU": 2.0}}
        gone = {**there, "NodeID": "c" * 56, "Resources": {"CPU": 2.0}, "Alive": False}
        self.listed = [head, {**there, "NodeID": "b" * 56, "Resources": {"CPU": cpus} if cpus else {}}, gone]
        self.asked: list[str] = []
        self.silent, self.dies = silent, dies

    def nodes(self) -> list[dict[str, Any]]:
        return self.listed

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "a" * 56)

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(scheduling_strategy: Any, **_: Any) -> Any:
            self.asked.append(scheduling_strategy.node_id)
            return SimpleNamespace(remote=lambda *arguments: lambda: (self.before(), function(*arguments))[1])

        return SimpleNamespace(options=options)

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], references) if self.silent else (references, [])

    def get(self, reference: Callable[[], Any]) -> Any:
        self.listed[1]["Alive"] = not self.dies
        return reference()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


@pytest.fixture
def check(make_config: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """Checks the hosts after `before` has happened to the other one."""
    monkeypatch.setattr(places, "SHARED_WAIT_S", 0.0)
    config = make_config(ray={"address": "10.9.0.1:6379"})
    config.folder.mkdir(parents=True)

    def run(before: Callable[..., Any] = lambda config: None, **options: Any) -> Seen:
        ray = Seen(lambda: before(config), **options)
        monkeypatch.setattr(places, "ray", ray)
        try:
            places.check_hosts(config, {"model": model, "judge.model": None})
        finally:
            assert list(config.folder.iterdir()) == []
        return ray

    return run


def test_hosts_that_see_all_are_let_in(check: Callable[..., Seen]) -> None:
    assert check().asked == ["b" * 56]


def test_a_host_that_holds_nothing_need_not_see_anything(check: Callable[..., Seen]) -> None:
    """Such as a head without work."""
    assert check(lambda config: shutil.rmtree(config.folder), cpus=0.0).asked == []


def test_a_run_of_its_own_cluster_asks_nobody(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    places.check_hosts(make_config(), {})  # without Ray


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            lambda config, model: (config.folder / places.MARKER).unlink(),
            r"does not see the run folder .*test: set runs",
        ),
        (lambda config, model: (config.folder / places.MARKER).write_text("an older run's"), "does not see the run"),
        (
            lambda config, model: shutil.rmtree(model),
            r"does not see model=\S+: mount that folder there, or set HF_HOME",
        ),
        (lambda config, model: (model / "config.json").write_text("{ }"), r"sees another model under model=\S+: all"),
        (lambda config, model: (model / "model.safetensors").write_bytes(b"1"), "sees another model"),
        (lambda config, model: (model / "model.safetensors").unlink(), "does not see model="),
    ],
)
def test_what_a_host_lacks_is_said_with_its_name(
    check: Callable[..., Seen], model: Path, before: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^host sampler-1 \(10\.9\.0\.3\) {message}") as caught:
        check(lambda config: before(config, model))
    assert "\n" not in str(caught.value)


def test_a_host_that_cannot_write(check: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"cannot write to the run folder .*: mount it for writing there"):
        check()


def test_a_host_without_rsrlm_and_one_that_is_silent(check: Callable[..., Seen]) -> None:
    def raises(config: Any) -> None:
        raise RuntimeError("a trace\nModuleNotFoundError: No module named 'rsrlm'")

    with pytest.raises(ConfigError, match=r"cannot run rsrlm: ModuleNotFoundError.*; install the same version there"):
        check(raises)
    with pytest.raises(ConfigError, match=r"host sampler-1 .* gave no answer within 60 s"):
        check(silent=True)


def test_a_host_that_dies_meanwhile_is_in_nobodys_way(check: Callable[..., Seen]) -> None:
    def fails(config: Any) -> None:
        raise RuntimeError("its node is gone")

    with pytest.raises(ConfigError, match="its node is gone"):
        check(fails)
    check(fails, dies=True)


def test_what_a_killed_run_left_in_the_memory_of_a_host_goes(
    check: Callable[..., Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what other runs have there."""
    monkeypatch.setattr(weights, "SHM", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    other = tmp_path / "shm" / f"{weights.file_prefix(tmp_path / 'other')}M1.safetensors"
    other.touch()

    def before(config: Any) -> None:
        for name in ("M1.safetensors", "copy-b-0-M1.safetensors"):
            (tmp_path / "shm" / f"{weights.file_prefix(config.folder)}{name}").touch()

    check(before)
    assert list((tmp_path / "shm").iterdir()) == [other]
