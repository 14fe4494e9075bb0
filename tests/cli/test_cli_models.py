"""Model folders that lack something, and the Python code that a model brings along."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, Started, edit

from rsrlm.config import Config, load
from rsrlm.model import folder_of
from rsrlm.settings.machine import ModelConfig
from rsrlm.store.folder import RunFolder


def test_a_model_that_is_not_there(refused: Callable[..., str]) -> None:
    message = refused("model=./nowhere")
    assert message.startswith("rsrlm: model.path=./nowhere: no such folder; give a folder, a Hugging Face id")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model.safetensors", "no *.safetensors; save the model with save_pretrained first"),
        ("config.json", "no config.json; give the folder of a Hugging Face model"),
        ("tokenizer.json", "no tokenizer files; save the tokenizer into the same folder"),
        ("chat_template.jinja", "its tokenizer has no chat template; use an instruction-tuned model, or add"),
    ],
)
def test_a_model_folder_that_lacks_something(missing: str, said: str, model: Path, refused: Callable[..., str]) -> None:
    (model / missing).unlink()
    assert refused(f"model={model}").startswith(f"rsrlm: model.path={model}: {said}")


def test_a_tokenizer_without_an_end_token(model: Path, refused: Callable[..., str]) -> None:
    edit(model / "tokenizer_config.json", eos_token=None)
    message = refused(f"model={model}")
    assert message.startswith(f"rsrlm: model.path={model}: its tokenizer has no end token")
    assert "set eos_token in tokenizer_config.json" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "the tokenizer cannot be read (KeyError: "),
        ("tokenizer.json", '{"version": "1.0", "model', "the tokenizer cannot be read ("),
        ("tokenizer_config.json", "{", "the tokenizer cannot be read ("),
        ("config.json", "{", "config.json cannot be read ("),
        ("config.json", "[]", "config.json cannot be read ("),
        ("config.json", "{}", "config.json cannot be read ("),
        ("config.json", '{"model_type": "brandnew"}', "config.json cannot be read ("),
    ],
)
def test_broken_files(name: str, content: str, said: str, model: Path, refused: Callable[..., str]) -> None:
    (model / name).write_text(content)
    message = refused(f"model={model}")
    assert message.startswith(f"rsrlm: model.path={model}: {said}")
    assert "download the model again" in message
    assert message.count("\n") == 1


def test_a_model_that_is_none_of_language(model: Path, refused: Callable[..., str]) -> None:
    edit(model / "config.json", model_type="vit")
    message = refused(f"model={model}")
    assert message.startswith(f"rsrlm: model.path={model}: model_type=vit of its config.json is no causal language")
    assert "use another model" in message


def test_dropout_of_an_architecture_without(model: Path, refused: Callable[..., str]) -> None:
    (model / "config.json").write_text('{"model_type": "mamba"}')
    assert refused(f"model={model}", "train.dropout=0.1") == (
        "rsrlm: train.dropout=0.1: the architecture mamba has no dropout; set train.dropout=0\n"
    )


# -- code that comes with a model --------------------------------------------------------------------------------------


@pytest.fixture
def marker(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model brings `remote.py`, which leaves this file behind when it is imported."""
    found = tmp_path / "executed"
    (model / "remote.py").write_text(
        f"open({str(found)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'remote'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    # Where transformers would copy it to.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return found


CONFIG_MAP = {"AutoConfig": "remote.Config"}
TOKENIZER_MAP = {"AutoTokenizer": ["remote.Tokenizer", None]}
MODEL_MAP = {"AutoModelForCausalLM": "remote.Model"}


@pytest.fixture(params=["config and model", "config", "model", "tokenizer"])
def needing(request: pytest.FixtureRequest, model: Path, marker: Path) -> Path:
    """The model cannot be used without its code."""
    if request.param == "tokenizer":
        with_code_of_its_own(model)
    elif request.param == "model":
        # An encoder's config, which transformers knows, with a language model's class.
        edit(model / "config.json", model_type="vit", auto_map=MODEL_MAP)
    else:
        auto_map = {**CONFIG_MAP, **(MODEL_MAP if "model" in request.param else {})}
        edit(model / "config.json", model_type="remote", auto_map=auto_map)
    return model


def test_code_of_a_model_is_not_executed(needing: Path, marker: Path, refused: Callable[..., str]) -> None:
    assert refused(f"model={needing}") == (
        f"rsrlm: model.path={needing}: the model brings Python code of its own; read it, then set "
        "model.trust_remote_code=true\n"
    )
    assert not marker.exists()


def with_code_of_its_own(folder: Path) -> Path:
    edit(folder / "tokenizer_config.json", tokenizer_class="RemoteTokenizer", auto_map=TOKENIZER_MAP)
    return folder


def test_trust_in_the_model_is_none_in_its_judge(
    rsrlm: Callable[..., Ended], config_file: Path, model: Path, marker: Path
) -> None:
    judge = [f"judge.model={with_code_of_its_own(model)}", "judge.replicas=1"]
    ended = rsrlm("plan", config_file, *judge, "model.trust_remote_code=true")
    assert (ended.code, ended.err) == (
        2,
        f"rsrlm: judge.model={model}: the model brings Python code of its own; read it, then set "
        "judge.trust_remote_code=true\n",
    )
    assert not marker.exists()
    ended = rsrlm("plan", config_file, *judge, "judge.trust_remote_code=true")
    assert marker.exists(), ended.err


def test_engines_run_the_code_of_the_model_that_is_trusted(
    config_file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsrlm.runtime import pools

    made = {}

    class Pool:
        def __init__(self, config: Config, weights: Any, name: str, *_: Any) -> None:
            made[name] = (config.model.path, config.model.trust_remote_code)

        async def start(self) -> None: ...

    monkeypatch.setattr(pools, "EnginePool", Pool)
    for own, judges in ((True, False), (False, True)):
        config = load(
            config_file,
            [
                *(f"judge.model={model}", "judge.replicas=1"),
                *(f"model.trust_remote_code={own}".lower(), f"judge.trust_remote_code={judges}".lower()),
            ],
        )
        asyncio.run(pools.EnginePools(config, RunFolder(tmp_path / "run"), {"M0": model}, None, model).start("M0"))
        assert made == {"engines": (config.model.path, own), "judges": (str(model), judges)}


def test_trust_in_the_model_is_none_in_those_of_a_duel(
    rsrlm: Callable[..., Ended],
    config_file: Path,
    small_model: Path,
    model: Path,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def on_engines(config: Config, *_: Any, **__: Any) -> None:
        asked.append((config.model.path, config.model.trust_remote_code))
        raise Started

    monkeypatch.setattr("rsrlm.commands.duel.on_engines", on_engines)
    other = Path(shutil.copytree(small_model, tmp_path / "other"))
    command = ("eval", "duel", config_file)
    with pytest.raises(Started):
        rsrlm(*command, other, small_model, "--out", tmp_path / "a", "model.trust_remote_code=true")
    with pytest.raises(Started):
        rsrlm(*command, small_model, other, "--out", tmp_path / "b", "model.trust_remote_code=true")
    assert asked == [(str(other), False), (str(small_model), True)]
    with_code_of_its_own(model)
    named = {
        "A": [model, small_model],
        "B": [small_model, model],
        "--judge": [small_model, other, "--judge", model],
        "judge.model": [small_model, other, f"judge.model={model}", "judge.replicas=1"],
        "evaluate.judge.model": [small_model, other, f"evaluate.judge.model={model}"],
    }
    for key, duel in named.items():
        ended = rsrlm(*command, *duel, "--out", tmp_path / "c", "model.trust_remote_code=true")
        assert ended.code == 2
        assert ended.err.startswith(
            f"rsrlm: {key}={model}: the model brings Python code of its own; read it, then set "
        )
    assert not marker.exists()


def test_code_of_a_model_that_is_trusted(
    rsrlm: Callable[..., Ended], config_file: Path, model: Path, marker: Path
) -> None:
    """And would have left its mark above."""
    edit(model / "config.json", model_type="remote", auto_map={**CONFIG_MAP, **MODEL_MAP})
    ended = rsrlm("plan", config_file, f"model={model}", "model.trust_remote_code=true")
    assert ended.code == 0, ended.err
    assert marker.exists()


def test_code_that_transformers_has_itself_is_not_needed(
    rsrlm: Callable[..., Ended], config_file: Path, model: Path, marker: Path
) -> None:
    """Many models still carry the files from before their architecture was taken into transformers."""
    edit(model / "config.json", auto_map={**CONFIG_MAP, **MODEL_MAP})
    assert rsrlm("plan", config_file, f"model={model}").code == 0
    assert not marker.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_downloaded_only_where_it_is_trusted(
    trusted: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    patterns: list[str] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert folder_of(ModelConfig(path="owner/model", trust_remote_code=trusted)) == model
    assert ("*.py" in patterns) == trusted
