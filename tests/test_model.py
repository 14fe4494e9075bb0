"""Model folders that can and cannot be used. Nothing is downloaded here."""

import json
import socket
import struct
from pathlib import Path

import pytest

from rsrlm.model import (
    cache_folder,
    check_folder,
    folder_of,
    load_config,
    load_tokenizer,
    num_parameters,
    weight_files,
)
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig


def safetensors(path: Path, shapes: dict[str, list[int]], metadata: bool = True) -> None:
    """A file of zeros, written by hand: 8 bytes of header length, the header, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A complete folder of one file."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    safetensors(folder / "model.safetensors", {"embed": [10, 4]})
    return folder


def shard(folder: Path) -> None:
    """Two files and their index instead."""
    (folder / "model.safetensors").unlink()
    safetensors(folder / "model-00001-of-00002.safetensors", {"embed": [10, 4], "norm": [4]})
    safetensors(folder / "model-00002-of-00002.safetensors", {"head": [10, 4], "scale": []})
    places = {"head": 2, "embed": 1, "norm": 1, "scale": 2}
    index = {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        folder_of(ModelConfig(path=str(path)))
    return str(caught.value)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_complete_folder_is_used_as_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(model)
    assert folder_of(ModelConfig(path=str(model))) == model
    monkeypatch.chdir(model.parent)
    assert folder_of(ModelConfig(path="model")) == model  # absolute, for processes that start elsewhere
    monkeypatch.setenv("HOME", str(model.parent))
    assert folder_of(ModelConfig(path="~/model")) == model
    shard(model)
    assert folder_of(ModelConfig(path="./model")) == model


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_any_kind_of_tokenizer_will_do(model: Path, tokenizer: str) -> None:
    (model / "tokenizer.json").rename(model / tokenizer)
    assert folder_of(ModelConfig(path=str(model))) == model


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no config.json; give the folder of a Hugging Face model"),
        ("model.safetensors", "no *.safetensors; save the model with save_pretrained first"),
        ("tokenizer.json", "no tokenizer files; save the tokenizer into the same folder"),
    ],
)
def test_a_folder_that_lacks_something(model: Path, missing: str, said: str) -> None:
    (model / missing).unlink()
    assert refused(model) == f"model.path={model}: {said}"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_errors_begin_with_the_key_that_names_the_model(model: Path, missing: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ConfigError, match=rf"^judge.model={model}: no "):
        folder_of(ModelConfig(path=str(model)), "judge.model")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("model.path", "set model.trust_remote_code=true"),
        ("judge.model", "set judge.trust_remote_code=true"),
        ("evaluate.judge.model", "set evaluate.judge.trust_remote_code=true"),
        ("A", "set it as model.path, with model.trust_remote_code=true"),
    ],
)
def test_the_key_that_allows_code_is_that_of_the_model(model: Path, key: str, remedy: str) -> None:
    auto_map = {"AutoConfig": "remote.Config", "AutoTokenizer": ["remote.Tokenizer", None]}
    (model / "config.json").write_text(json.dumps({"model_type": "remote", "auto_map": auto_map}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Remote", "auto_map": auto_map}))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ConfigError) as caught:
            load(model, False, key)
        assert str(caught.value).startswith(f"{key}={model}: the model brings Python code of its own")
        assert str(caught.value).endswith(remedy)


def test_pickled_weights_are_none(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "no *.safetensors" in refused(model)


def test_a_shard_that_is_missing(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    assert refused(model) == (
        f"model.path={model}: model-00002-of-00002.safetensors of its index is missing; download the model again"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 5000) + b'{"embed": {"dtype"',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n",
    ],
    ids=["empty", "cut-off", "git-lfs-pointer"],
)
def test_weights_that_are_none_are_refused_before_anything_starts(model: Path, content: bytes) -> None:
    """As an interrupted download leaves them, or `git clone` without git-lfs."""
    (model / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not a whole safetensors file" in refused(model)


@pytest.mark.parametrize("header", [b"{", b"[]", b'"text"', b'{"embed": {"shape": [1]}}', b'{"embed": 7}', b"\xff"])
def test_headers_that_are_none(model: Path, header: bytes) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "model.safetensors is not a whole safetensors file" in refused(model)


def test_weights_that_end_too_early_or_too_late(model: Path) -> None:
    shard(model)
    last = model / "model-00002-of-00002.safetensors"
    whole = last.read_bytes()
    for content in (whole[:-1], whole + b"\0"):
        last.write_bytes(content)
        assert f"{last.name} is not a whole safetensors file" in refused(model)
    last.write_bytes(whole)
    check_folder(model)


@pytest.mark.parametrize("content", ["", '{"weight_map": {"embed": "mod', "{}", "[]", '{"weight_map": [1]}'])
def test_an_index_that_is_none(model: Path, content: str) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json cannot be read; download the model again" in refused(model)


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "no"), "./no", "~/no", "../models/no", "no", "models/of/mine", "gpt2"):
        assert refused(path) == (
            f"model.path={path}: no such folder; give a folder, a Hugging Face id (owner/name) or {BUILTIN_MODEL}"
        )


def test_a_home_that_is_not_there() -> None:
    assert "model.path=~nobody-of-this-name/model: " in refused("~nobody-of-this-name/model")


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Offline, and with a witness: every attempt to connect or to look up a name is noted and fails."""
    from huggingface_hub import constants

    attempts: list[object] = []

    def attempt(*arguments: object, **_: object) -> None:
        attempts.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment at the import
    monkeypatch.setattr(socket.socket, "connect", attempt)
    monkeypatch.setattr(socket, "getaddrinfo", attempt)
    return attempts


def test_an_id_that_is_not_in_the_cache_while_offline(no_network: list[object]) -> None:
    message = refused("rsrlm-tests/no-such-model")
    assert message.startswith(
        "model.path=rsrlm-tests/no-such-model: not in the local cache and could not be downloaded"
    )
    assert "hf auth login" in message
    assert "the path of a folder" in message
    assert "\n" not in message
    assert no_network == []


@pytest.mark.parametrize("repo", ["models/", "a b/c", "owner/na..me", "owner/-"])
def test_an_id_that_is_none(repo: str, no_network: list[object]) -> None:
    assert refused(repo).startswith(f"model.path={repo}: not in the local cache and could not be downloaded")
    assert no_network == []


def test_a_failure_without_a_text_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs of HTTP clients often have no message."""
    import huggingface_hub

    def download(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "TimeoutError" in refused("rsrlm-tests/no-such-model")


# -- weights -----------------------------------------------------------------------------------------------------------


def test_parameters_of_one_file(model: Path) -> None:
    safetensors(model / "model.safetensors", {"embed": [49, 4], "norm": [4], "scale": [], "none": [0, 7]})
    assert num_parameters(model) == 49 * 4 + 4 + 1 + 0
    safetensors(model / "model.safetensors", {"embed": [3]}, metadata=False)
    assert num_parameters(model) == 3


def test_parameters_of_shards(model: Path) -> None:
    shard(model)
    assert num_parameters(model) == 40 + 4 + 40 + 1
    # A file that the index does not name is no part of the model.
    safetensors(model / "adapter.safetensors", {"lora": [1000]})
    assert num_parameters(model) == 85


def test_weight_files_have_a_fixed_order(model: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shard(model)
    assert weight_files(model) == [model / name for name in names]
    (model / names[0]).unlink()
    assert weight_files(model) == [model / name for name in names]  # the index says what must be there
    (model / "model.safetensors.index.json").unlink()
    for name in ("c", "a", "b"):
        safetensors(model / f"{name}.safetensors", {})
    assert [file.name for file in weight_files(model)] == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
        "model-00002-of-00002.safetensors",
    ]


# -- cache -------------------------------------------------------------------------------------------------------------


def test_where_the_built_in_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for name in ("RSRLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path("/home/ann/.cache/rsrlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/rsrlm")
    monkeypatch.setenv("RSRLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    # What is converted once is taken from there, and not looked at again.
    (tmp_path / BUILTIN_MODEL).mkdir()
    (tmp_path / BUILTIN_MODEL / "config.json").write_text("{}")
    assert folder_of(ModelConfig(path=BUILTIN_MODEL)) == tmp_path / BUILTIN_MODEL
