"""The config of a command that is given a model: defaults by the machine, and what the user sets over them."""

import json
import os
from pathlib import Path

import pytest

from rsrlm.commands import standalone
from rsrlm.commands.standalone import config_of
from rsrlm.settings.base import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of which only the shape is looked at: a token keeps 2 * 32 layers * 8 heads * 128 * 4 bytes, 256 KiB."""
    shape = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    monkeypatch.setattr(standalone, "folder_of", lambda model: Path(model.path))
    monkeypatch.setattr(standalone, "has_gpu", lambda: False)
    return tmp_path / "model"


def test_on_a_machine_without_gpus(folder: Path) -> None:
    config = config_of(str(folder), [])
    assert (config.model.path, config.model.dtype, config.judge.kind) == (str(folder), "float32", "digits")
    engine = config.engine
    assert (engine.kind, engine.gpus, engine.max_model_len) == ("inprocess", 0, 4096)
    assert engine.kv_cache_gib == 2.0  # two requests of 4,096 tokens
    assert engine.threads == len(os.sched_getaffinity(0))


def test_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "has_gpu", lambda: True)
    config = config_of(str(folder), [])
    assert (config.model.dtype, config.engine.kind, config.engine.gpus) == ("bfloat16", "async", 1)
    assert (config.engine.max_model_len, config.engine.kv_cache_gib) == (8192, None)
    config = config_of(str(folder), ["engine.gpus=0"])
    assert (config.model.dtype, config.engine.kind, config.engine.max_model_len) == ("float32", "inprocess", 4096)


def test_what_is_set_stands(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("131072", "2048"))
    assert config_of(str(folder), []).engine.max_model_len == 2048
    over = ["judge.kind=text", "judge.judgements=5", "engine.max_model_len=1024", "engine.kv_cache_gib=3", "seed=7"]
    config = config_of(str(folder), [*over, "sample.max_tokens=64", "model.dtype=float32"])
    assert (config.judge.per_response, config.seed, config.sample.max_tokens) == (5, 7, 64)
    assert (config.engine.max_model_len, config.engine.kv_cache_gib) == (1024, 3.0)


def test_who_judges_in_text_where_digits_cannot_be_read(folder: Path) -> None:
    endpoint = "judge.endpoint={url: 'http://localhost:1/v1', model: m}"
    config = config_of(str(folder), [endpoint])
    assert (config.judge.kind, config.evaluate.judge.read) == ("text", "text")
    config = config_of(str(folder), [f"evaluate.{endpoint}"])
    assert (config.judge.kind, config.evaluate.judge.read) == ("digits", "text")
    assert config_of(str(folder), [], "meta_rewarding").judge.kind == "text"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.gpu=1"], "engine.gpu: unknown key"),
        (["engine=1"], "engine=1"),
        (["engine.gpus=many"], "engine.gpus='many'"),
        (["judge.judgements=3"], "judge.judgements: unknown key"),
        (["sample.max_tokens=9000"], "sample.max_tokens=9000 leaves no room for a prompt"),
        (["threshold"], "'threshold': overrides are written key.sub=value"),
    ],
)
def test_overrides_that_are_wrong(folder: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        config_of(str(folder), overrides)


def test_a_run_is_no_model(folder: Path) -> None:
    (folder / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="the folder of a run, and not of a model; give one of its models"):
        config_of(str(folder), [])


def test_a_config_is_a_file_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        config_of(str(tmp_path / "nowhere.yaml"), [])
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert config_of(str(quickstart), ["seed=3"]).name == "quickstart"
