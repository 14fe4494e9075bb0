"""`rsrlm ARGUMENTS` in this process, a config that could run, and no run that starts."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import PROMPTS, Answering, AnsweringPool, Ended, Started, write_prompts, write_weights

from rsrlm import cli
from rsrlm.report import progress
from rsrlm.runtime import cluster, launch


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*arguments: Any) -> int:
        raise Started(*arguments)

    monkeypatch.setattr(launch, "execute", execute)
    monkeypatch.setattr(cluster, "begin", lambda config: None)
    monkeypatch.setattr(cluster, "joined", lambda config, begun, say: None)
    for name in ("SHOWN_AFTER_S", "WORTH_A_LINE_S"):  # what a run prints must not depend on the machine's load
        monkeypatch.setattr(progress, name, 3600.0)
    monkeypatch.setattr(sys, "path", list(sys.path))  # judges of one's own put the working directory there
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def rsrlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`rsrlm ARGUMENTS` in this process."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["rsrlm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        out, err = (re.sub(r"\x1b\[[0-9;]*m", "", text) for text in said)
        return Ended(ended.value.code, out, err)

    return call


@pytest.fixture(scope="session")
def small_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with zeros for weights, and a real tokenizer cut down to single bytes, which loads at once."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(smollm2 / name, folder)
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text())
    added = {token["content"] for token in tokenizer["added_tokens"]}
    kept = [token for token in tokenizer["model"]["vocab"] if token in added or len(token) == 1]
    tokenizer["model"] |= {"vocab": {token: number for number, token in enumerate(kept)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_weights(folder / "model.safetensors", rows=10)
    return folder


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A folder of one's own to break."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def other_model(small_model: Path, tmp_path: Path) -> Path:
    """Other weights with the same tokenizer."""
    folder = Path(shutil.copytree(small_model, tmp_path / "other"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    return folder


@pytest.fixture
def config_file(tmp_path: Path, small_model: Path) -> Path:
    """A config that could run, with a prompt file of seven."""
    data = {
        "name": "mine",
        "runs": str(tmp_path / "runs"),
        "iterations": 1,
        "model": str(small_model),
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_iteration": 4, "heldout": 2},
        "sample": {"responses": 2, "max_tokens": 24},
        "judge": {"kind": "digits"},
        "train": {"lr": 1e-3, "pairs_per_step": 2},
        "engine": {"max_model_len": 4096, "kv_cache_gib": 0.25},
    }
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def refused(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path) -> Callable[..., str]:
    """The message on a `run` with these overrides, which ends with 2 and leaves nothing behind."""

    def call(*overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        ended = rsrlm("run", config_file, *overrides)
        assert ended.code == 2
        assert ended.out == ""
        assert ended.err.startswith("rsrlm: ")
        assert "Traceback" not in ended.err
        assert sorted(tmp_path.rglob("*")) == before
        return ended.err

    return call


CLOCK = "{% for m in messages %}{{ strftime_now('%H:%M:%S.%f') }} {{ m.content }}{% endfor %}"


@pytest.fixture
def clock(model: Path) -> Path:
    """A model whose chat template prints the time: no two renderings are the same by themselves."""
    (model / "chat_template.jinja").write_text(CLOCK)
    return model


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    path = tmp_path / "ranked.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Answering:
    """A cluster and engines that cost nothing; everything else of a command is its own."""
    from rsrlm.runtime import pools

    made = Answering()

    @contextmanager
    def cluster(*_: Any, **__: Any) -> Iterator[None]:
        made.clusters += 1
        yield

    monkeypatch.setattr("rsrlm.commands.engines.ray_cluster", cluster)
    monkeypatch.setattr(pools, "EnginePool", lambda config, weights, *_: AnsweringPool(made, weights))
    return made
