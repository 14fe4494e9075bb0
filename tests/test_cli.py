"""A user's mistake is told before anything starts: what is wrong, where, and the remedy. No stack trace, no files."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from scripted import run_of

from rsrlm import cli
from rsrlm import config as configs
from rsrlm.commands import engines as commands
from rsrlm.config import Config, load
from rsrlm.data import prompts
from rsrlm.data.examples import reply_as_response
from rsrlm.data.ranked import Reply
from rsrlm.iterative import NoPairs
from rsrlm.judges.base import Origin
from rsrlm.model import folder_of
from rsrlm.records import Completion, Prompt
from rsrlm.report.progress import Report
from rsrlm.runtime import launch
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import Model
from rsrlm.store.folder import RunFolder

PROMPTS = [{"id": f"p{number}", "prompt": f"Say {number}."} for number in range(7)]
EXECUTE = launch.execute
NO_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="needs a machine without an NVIDIA GPU")


@dataclass(frozen=True)
class Ended:
    code: Any
    out: str
    err: str


class Started(BaseException):
    """Instead of a run: the arguments of `launch.execute`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__("a run was started")
        self.arguments = arguments


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*arguments: Any) -> int:
        raise Started(*arguments)

    monkeypatch.setattr(launch, "execute", execute)
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
    header = json.dumps({"embed": {"dtype": "BF16", "shape": [10, 4], "data_offsets": [0, 80]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(80))
    return folder


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A folder of one's own to break."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


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


def write_prompts(path: Path, entries: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


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


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


# -- what is right -----------------------------------------------------------------------------------------------------


def test_what_is_right_starts(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, smollm2: Path) -> None:
    """Or every refusal below could be one of something else."""
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, "model=smollm2-135m-instruct", "seed=7")
    prepared, store, _ = started.value.arguments
    assert prepared.config.seed == 7
    assert prepared.model == smollm2
    assert prepared.left_out == []
    assert (len(prepared.heldout.prompts), [len(one.tasks) for one in prepared.iterations]) == (2, [4])
    assert store.folder == tmp_path / "runs" / "mine"
    assert sorted(path.name for path in store.folder.iterdir()) == ["config.yaml", "start.json", "trained_on.json"]


CLOCK = "{% for m in messages %}{{ strftime_now('%H:%M:%S.%f') }} {{ m.content }}{% endfor %}"


@pytest.fixture
def clock(model: Path) -> Path:
    """A model whose chat template prints the time: no two renderings are the same by themselves."""
    (model / "chat_template.jinja").write_text(CLOCK)
    return model


def started_with(call: Callable[[], Any]) -> tuple[Any, Any]:
    with pytest.raises(Started) as started:
        call()
    return started.value.arguments[:2]


def judge_prompt_of(prepared: Any) -> tuple[int, ...]:
    response = reply_as_response(Reply(id="r", text="A drink.", rank=0), "tea", "00/tea", 0)
    judge, origin = prepared.iterations[0].recipe.judge, Origin(iteration=0, name="00/tea/0")
    found: tuple[int, ...] = judge.prompt_of(Prompt(id="tea", text="What is tea?"), response, origin)
    return found


def test_a_resume_makes_the_prompts_that_the_engines_saw(
    rsrlm: Callable[..., Ended], config_file: Path, clock: Path, tmp_path: Path
) -> None:
    """Whatever the chat template prints, and whatever was drawn for the fences."""
    first, store = started_with(lambda: rsrlm("run", config_file, f"model={clock}"))
    second, _ = started_with(lambda: rsrlm("resume", tmp_path / "runs" / "mine"))
    assert first.heldout.context.encoder.user("x") == second.heldout.context.encoder.user("x")
    assert judge_prompt_of(first) == judge_prompt_of(second)
    assert store.note("start")["drawn"] == first.drawn == second.drawn
    assert first.config.judge.fence_salt == first.drawn["fence_salt"] == second.config.judge.fence_salt
    assert len(first.drawn["fence_salt"]) == 16


def test_no_seed_tells_the_fences_of_a_run(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    def prompt(*options: str) -> tuple[int, ...]:
        name = f"name=n{len(made)}"
        made.append(judge_prompt_of(started_with(lambda: rsrlm("run", config_file, name, *options))[0]))
        return made[-1]

    made: list[tuple[int, ...]] = []
    assert prompt() != prompt()
    assert prompt("judge.fence_salt=mine") == prompt("judge.fence_salt=mine") != prompt("judge.fence_salt=yours")
    # The prompts' author may know seed, ids and program, and compute the fence of a run without a salt.
    public = prompt("judge.fence_salt=''")
    assert public == prompt("judge.fence_salt=''")
    assert public not in made[:-2]


def test_a_run_without_notes_of_its_start_is_not_resumed(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    _, store = started_with(lambda: rsrlm("run", config_file))
    noted = store.note("start")
    del noted["drawn"]
    store.write_note("start", noted)
    ended = rsrlm("resume", tmp_path / "runs" / "mine")
    assert ended.code == 2
    assert "no date and fence salt in it" in ended.err
    assert "start anew under another name" in ended.err
    # Killed before anything was noted: nothing was asked yet.
    (store.folder / "start.json").unlink()
    started_with(lambda: rsrlm("resume", tmp_path / "runs" / "mine"))


@pytest.mark.parametrize("code", [0, 3, 4, 130])
def test_the_exit_code_is_that_of_the_run(
    code: int, rsrlm: Callable[..., Ended], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "prepare", lambda config: SimpleNamespace(model=None))
    monkeypatch.setattr(cli, "_check_room", lambda prepared: None)
    monkeypatch.setattr(launch, "check_inputs", lambda *_: None)
    monkeypatch.setattr(launch, "execute", lambda *_: code)
    assert rsrlm("run", config_file).code == code


def test_an_interruption_while_preparing(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "prepare", prepare)
    ended = rsrlm("run", config_file)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_resume_refuses_other_prompts(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line more in the prompt file would deal other prompts to every iteration."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"p{number}", "prompt": f"Name {number} colours."}) for number in range(8)]
    prompts.write_text("\n".join(lines))
    with pytest.raises(Started):
        rsrlm("run", config_file, "model=smollm2-135m-instruct", f"prompts.path={prompts}")
    prompts.write_text("\n".join([*lines, json.dumps({"id": "new", "prompt": "One more."})]))
    ended = rsrlm("resume", tmp_path / "runs" / "mine")
    assert ended.code == 2
    assert "the prompts of this run changed since it was started" in ended.err


# -- config ------------------------------------------------------------------------------------------------------------


def test_a_mistake_in_a_process_of_its_own(config_file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rsrlm.cli", "run", str(config_file), "prompts.path=nowhere.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "rsrlm: prompts.path=nowhere.jsonl: No such file or directory; give a JSONL file with id and prompt per line, "
        "or 'builtin'\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_not_there(rsrlm: Callable[..., Ended], tmp_path: Path) -> None:
    for command in ("run", "plan", "doctor"):
        ended = rsrlm(command, "nowhere.yaml")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err == "rsrlm: nowhere.yaml: No such file or directory; give the path of a YAML config\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=1e-5", ["train.learning_rate: unknown key; known here: ", " lr, "]),
        ("trian.lr=1e-5", ["trian: unknown key; known here: ", " train, "]),
        ("train.lr=fast", ["train.lr='fast': ", "number"]),
        ("prompts.per_iteration=4.5", ["prompts.per_iteration=4.5: ", "integer"]),
        ("sample.responses=1", ["sample.responses=1: ", "greater than or equal to 2"]),
        ("judge.kind=oracle", ["judge.kind='oracle': ", "digits"]),
        ("lr", ["'lr': overrides are written key.sub=value, such as train.lr=1e-5"]),
        ("name=a/b", ["name='a/b': "]),
        (f"name={'x' * 300}", ["at most 200 characters"]),
    ],
)
def test_keys_and_values(override: str, said: list[str], refused: Callable[..., str]) -> None:
    message = refused(override)
    for part in said:
        assert part in message


def test_every_command_that_reads_a_config_refuses_it_alike(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    told = [rsrlm(command, config_file, "train.learning_rate=1") for command in ("run", "plan", "doctor")]
    assert {(ended.code, ended.out) for ended in told} == {(2, "")}
    assert len({ended.err for ended in told}) == 1


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, ": No such file or directory; give a JSONL file with id and prompt per line, or 'builtin'"),
        (["", " "], ": no prompts in it; write one JSON object with id and prompt per line"),
        (['{"id": "a", "prompt": "x"}', "", '{"id": "b", "pro'], ", line 3: not JSON ("),
        (['{"id": "a", "prompt": "x"}', '{"id": "b"}'], ', line 2: must be an object such as {"id": "tea", '),
        (
            ['{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "y"}', '{"id": "a", "prompt": "z"}'],
            ", line 3: id 'a' stands in line 1 already; ids are unique",
        ),
    ],
    ids=["missing", "empty", "malformed", "no-prompt", "duplicate"],
)
def test_prompt_files(lines: list[str] | None, said: str, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines))
    assert f"prompts.path={path}{said}" in refused(f"prompts.path={path}")


def test_too_few_prompts(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("iterations=2") == (
        f"rsrlm: prompts.path={tmp_path / 'prompts.jsonl'}: 7 usable prompts, but 10 are needed (2 held out, 4 for "
        "each of 2 iterations); add prompts, lower prompts.per_iteration or set prompts.reuse=true\n"
    )


def with_a_long_one(path: Path) -> None:
    write_prompts(path, [*PROMPTS[:6], {"id": "long", "prompt": "tea " * 4200}])


def test_a_prompt_that_is_too_long_stops_the_run(refused: Callable[..., str], tmp_path: Path) -> None:
    with_a_long_one(tmp_path / "prompts.jsonl")
    message = refused("prompts.overlong=error")
    # 4096 less what the judge of a held-out answer of 96 takes: the prompt itself would fit beside the answer.
    found = re.match(
        r"rsrlm: prompt 'long' has (\d+) tokens, more than the (\d+) that engine.max_model_len=4096 leaves beside the "
        r"(\d+) of the judge of a held-out answer", message,
    )  # fmt: skip
    assert found
    assert int(found[1]) > int(found[2]) == 4096 - int(found[3])
    assert "prompts.overlong=drop" in message


def test_a_prompt_that_is_too_long_is_left_out(
    rsrlm: Callable[..., Ended], refused: Callable[..., str], config_file: Path, tmp_path: Path
) -> None:
    with_a_long_one(tmp_path / "prompts.jsonl")
    assert "6 usable prompts, but 7 are needed" in refused("prompts.heldout=3")  # the default is drop
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, "prompts.overlong=drop")
    prepared = started.value.arguments[0]
    assert prepared.left_out == ["long"]
    dealt = [*prepared.heldout.prompts, *(task.prompt for task in prepared.iterations[0].tasks)]
    assert {prompt.id for prompt in dealt} == {f"p{number}" for number in range(6)}


def test_a_question_is_not_both_held_out_and_trained_on(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    again = [{"id": f"again{place}", "prompt": f" {one['prompt'].upper()}"} for place, one in enumerate(PROMPTS)]
    write_prompts(tmp_path / "prompts.jsonl", [*PROMPTS, *again])
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, "prompts.heldout=3")
    prepared = started.value.arguments[0]
    assert prepared.repeated == [one["id"] for one in again]
    dealt = [*prepared.heldout.prompts, *(task.prompt for task in prepared.iterations[0].tasks)]
    assert sorted(prompt.id for prompt in dealt) == sorted(one["id"] for one in PROMPTS)


def test_whatever_is_sampled_can_be_judged(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path) -> None:
    """Of prompts of 10 to 200 tokens, those are left out whose longest responses the judge could not read."""
    prompts = [{"id": f"p{n}", "prompt": "tea " * n} for n in range(10, 201, 10)]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    options = ("model=smollm2-135m-instruct", "judge.kind=text", "judge.max_tokens=60", "sample.max_tokens=300")
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, *options, "engine.max_model_len=850", "evaluate.duel=false")
    prepared = started.value.arguments[0]
    assert 0 < len(prepared.left_out) < len(prompts)
    judge, tokenizer = prepared.iterations[0].recipe.judge, prepared.heldout.context.encoder.tokenizer
    text = tokenizer.decode(tokenizer.encode(" word" * 400)[:300])
    response = reply_as_response(Reply(id="r", text=text, rank=0), "p", "00/p", 0)

    def asked(prompt: dict[str, str]) -> int:
        shown = Prompt(id=prompt["id"], text=prompt["prompt"])
        return len(judge.prompt_of(shown, response, Origin(iteration=0, name=f"00/{shown.id}/0"))) + 60

    room = {prompt["id"]: 850 - asked(prompt) for prompt in prompts}
    assert all((room[name] < 0) == (name in prepared.left_out) for name in room if abs(room[name]) > 16)
    assert all(room[prompt["id"]] >= 0 for prompt in prompts if prompt["id"] not in prepared.left_out)


@pytest.mark.parametrize("key", ["judge", "evaluate.judge"])
def test_an_endpoint_is_named_by_its_key(refused: Callable[..., str], key: str) -> None:
    endpoint = 'endpoint={url: "ftp://host", model: m}'
    options = ["judge.kind=text", "evaluate.judge.read=text", f"{key}.{endpoint}"]
    assert refused(*options).startswith(f"rsrlm: {key}.endpoint.url='ftp://host': no http url")


# -- models ------------------------------------------------------------------------------------------------------------


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
    assert folder_of(Model(path="owner/model", trust_remote_code=trusted)) == model
    assert ("*.py" in patterns) == trusted


# -- judges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["judge.template", "evaluate.judge.template"])
def test_a_template_that_is_missing(key: str, refused: Callable[..., str]) -> None:
    message = refused(f"{key}=mine.jinja")
    assert message.startswith(f"rsrlm: {key}='mine.jinja': neither one of rsrlm's (additive, ")
    assert message.endswith("give one of these names or a path\n")


def test_a_template_for_something_else(refused: Callable[..., str]) -> None:
    assert "evaluate.judge.template='additive': does not use response_a, response_b; add" in refused(
        "evaluate.judge.template=additive"
    )


@pytest.mark.parametrize("key", ["judge.template", "evaluate.judge.template"])
def test_what_a_template_prints_is_carried_by_each_prompt(
    key: str, rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    texts = "{{ response_a }}{{ response_b }}" if "evaluate" in key else "{{ response }}"
    (tmp_path / "mine.jinja").write_text("{{ instruction }} {{ data.reference }}" + texts)
    ended = rsrlm("plan", config_file, f"{key}={tmp_path / 'mine.jinja'}")
    assert ended.code == 2
    assert re.fullmatch(
        rf"rsrlm: prompts.path={tmp_path / 'prompts.jsonl'}: prompt '\w+' has no 'reference', which the judge's "
        r"template prints as \{\{ data.reference \}\}; add it to the line of the prompt, or take it out of the "
        r"template\n",
        ended.err,
    )
    write_prompts(tmp_path / "prompts.jsonl", [{**prompt, "reference": "Tea."} for prompt in PROMPTS])
    assert rsrlm("plan", config_file, f"{key}={tmp_path / 'mine.jinja'}").code == 0
    # A reference takes room too: one that leaves none is left out, as a long prompt is.
    long = [{**prompt, "reference": "Tea. " * (0 if number else 900)} for number, prompt in enumerate(PROMPTS)]
    write_prompts(tmp_path / "prompts.jsonl", long)
    ended = rsrlm("plan", config_file, f"{key}={tmp_path / 'mine.jinja'}", "prompts.overlong=error")
    assert (ended.code, f"prompt {PROMPTS[0]['id']!r} has " in ended.err) == (2, True)


def test_ranked_data_carries_nothing_for_templates(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text("{{ instruction }} {{ data.reference }} {{ response }}")
    judge = (f"judge.template={tmp_path / 'mine.jinja'}", "judge.kind=text", f"data.trees={ranked}")
    said = "judge.template prints {{ data.reference }}, which ranked data does not carry"
    for command in (
        ("eval", "judge", config_file, "--data", ranked),
        ("data", "eft", config_file, "--out", tmp_path / "eft.jsonl"),
    ):
        ended = rsrlm(*command, *judge)
        assert (ended.code, said in ended.err) == (2, True), ended


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("their_judge:longer", "=their_judge:longer: cannot be imported: AttributeError: "),
        ("no_such_module:shorter", "=no_such_module:shorter: cannot be imported: ModuleNotFoundError: "),
        (
            "their_judge:alone",
            "=their_judge:alone: must be callable with (prompt, response) or (prompt, response, data): ",
        ),
        ("shorter", "='shorter': write module:name, such as my_judges:shorter"),
    ],
)
def test_functions_that_cannot_judge(
    function: str, said: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "their_judge", raising=False)
    (tmp_path / "their_judge.py").write_text("def alone(prompt):\n    return 1\n")
    message = refused("judge.kind=function", f"judge.function={function}")
    assert message.startswith(f"rsrlm: judge.function{said}")


def test_a_function_beside_the_working_directory_is_found(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "my_judge", raising=False)
    (tmp_path / "my_judge.py").write_text("def shorter(prompt, response):\n    return -len(response)\n")
    assert rsrlm("plan", config_file, "judge.kind=function", "judge.function=my_judge:shorter").code == 0
    assert sys.path[-1] == str(tmp_path)  # and hides nothing that is installed


SCRIPT, MODULE = [str(Path(sys.executable).parent / "rsrlm")], [sys.executable, "-m", "rsrlm.cli"]


@pytest.mark.parametrize(
    ("command", "does"),
    [
        (SCRIPT, "doctor"),
        (MODULE, "doctor"),
        pytest.param(SCRIPT, "plan", marks=pytest.mark.ray),  # imports Ray, torch and transformers
    ],
)
def test_a_file_of_the_working_directory_is_no_library(
    command: list[str], does: str, config_file: Path, tmp_path: Path
) -> None:
    """A judge of one's own comes last too: it does not stand in for what is installed."""
    for name in ("psutil", "typer", "logging", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory')\n")
    (tmp_path / "my_judge.py").write_text("def shorter(prompt, response):\n    return -len(response)\n")
    arguments = [does, str(config_file), "judge.kind=function", "judge.function=my_judge:shorter"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0 or (does == "doctor" and "\nfail  " in done.stdout)  # a machine may lack something


# -- the machine -------------------------------------------------------------------------------------------------------


def test_more_than_the_memory(refused: Callable[..., str]) -> None:
    message = refused("engine.kv_cache_gib=10000")
    need, have = map(float, re.findall(r"([\d.]+)(?: GiB of memory|; use)", message))
    assert need > 10000 > have
    assert "use a smaller model.path, engine.kv_cache_gib or train.micro_batch" in message


def test_more_than_the_disk(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("iterations=30000", "prompts.reuse=true", "model=smollm2-135m-instruct")
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
    (tmp_path / "runs" / "mine" / ".config.yaml.tmp").write_text("name: mi")
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
    message = refused(*overrides, "model.dtype=bfloat16")
    assert message.startswith(f"rsrlm: {overrides[0]}: this machine has no NVIDIA GPU; set engine.gpus=0 and train.gp")
    assert "ray.address=HOST:PORT" in message


# -- resume ------------------------------------------------------------------------------------------------------------


def test_resume_of_what_is_no_run(rsrlm: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        ended = rsrlm("resume", folder)
        assert (ended.code, ended.out) == (2, "")
        assert (
            ended.err == f"rsrlm: {folder}: no run here (no config.yaml); give the folder of a run, such as runs/NAME\n"
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_resume_looks_at_the_inputs_again(rsrlm: Callable[..., Ended], make_config: Any, tmp_path: Path) -> None:
    store = RunFolder.create(make_config(prompts={"path": str(tmp_path / "gone.jsonl")}))
    ended = rsrlm("resume", store.folder)
    assert (ended.code, ended.out) == (2, "")
    assert f"prompts.path={tmp_path / 'gone.jsonl'}: No such file" in ended.err
    assert [path.name for path in store.folder.iterdir()] == ["config.yaml"]


def test_resume_of_a_finished_run_does_nothing(
    rsrlm: Callable[..., Ended], make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunFolder.create(make_config(iterations=2, model={"path": "./gone"}))
    for iteration in range(2):
        store.write_metrics(iteration, {})
    ended = rsrlm("resume", store.folder)
    assert ended.code == 0
    assert f"{store.folder} is finished: 2 iterations" in ended.out


# -- help and plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("run", ["CONFIG", "KEY.SUB=VALUE"]),
        ("resume", ["RUN"]),
        ("plan", ["CONFIG", "KEY.SUB=VALUE"]),
        ("doctor", ["CONFIG", "KEY.SUB=VALUE"]),
    ],
)
def test_help_of_a_command(command: str, arguments: list[str], rsrlm: Callable[..., Ended]) -> None:
    ended = rsrlm(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    usage, _, rest = ended.out.partition("Arguments")
    for argument in arguments:
        assert argument in usage
        assert argument in rest


def test_help_lists_the_commands(rsrlm: Callable[..., Ended]) -> None:
    ended = rsrlm("--help")
    assert ended.code == 0
    for command in ("run", "resume", "plan", "doctor"):
        assert re.search(rf"^\W*{command}\b", ended.out, re.MULTILINE)
    assert "Exit codes" in ended.out


def test_no_arguments_print_help(rsrlm: Callable[..., Ended]) -> None:
    ended = rsrlm()
    assert ended.code in (0, 2)  # Click changed its mind in 8.2
    said = ended.out + ended.err
    assert "Usage" in said
    assert "resume" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["train"], "No such command 'train'"), (["run"], "Missing argument"), (["run", "a", "--fast"], "No such option")],
)
def test_words_that_mean_nothing(arguments: list[str], said: str, rsrlm: Callable[..., Ended]) -> None:
    ended = rsrlm(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_plan_prints_the_bounds_and_starts_nothing(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    files, children = sorted(tmp_path.rglob("*")), psutil.Process().children()
    ended = rsrlm("plan", config_file, "train.lr=2e-5")
    assert (ended.code, ended.err) == (0, "")
    assert "lr: 2.0e-05" in ended.out
    rows = {
        cells[0].strip(): cells[1].strip()
        for line in ended.out.splitlines()
        if len(cells := line.strip("│ ").split("│")) == 2
    }
    assert rows["responses"] == "8"  # 4 prompts, 2 each
    assert rows["judgements"] == "8"
    assert rows["held-out answers"] == "6"  # of M0, of M1, and of M1 at temperature 1
    assert rows["held-out duels"] == "4"  # in both orders
    assert rows["optimizer steps"] == "2"
    assert {"memory: all", "disk: models"} <= set(rows)
    assert f"run folder: {tmp_path / 'runs' / 'mine'}" in ended.out
    assert sorted(tmp_path.rglob("*")) == files
    assert psutil.Process().children() == children


def test_plan_shows_what_does_not_fit(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    ended = rsrlm("plan", config_file, "engine.kv_cache_gib=10000")
    assert ended.code == 0
    assert re.search(r"memory: engine │ 10\d{3}\.\d\d GiB", ended.out)


# -- a run that fails --------------------------------------------------------------------------------------------------

FULL = "[Errno 28] No space left on device"


def of_an_actor(error: Exception) -> BaseException:
    """The error as Ray raises it in the driver."""
    from ray.exceptions import RayTaskError

    return RayTaskError("put", "Traceback of the actor", error).as_instanceof_cause()


def of_the_learner(message: str) -> Exception:
    from rsrlm.runtime.actors import LearnerFailed

    return LearnerFailed(message)


def of_a_pool(message: str) -> Exception:
    from rsrlm.runtime.actors import PoolFailed

    return PoolFailed(message)


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (full, FULL),
        (lambda: full(errno.EDQUOT), "[Errno 122] Disk quota exceeded"),
        (lambda: of_an_actor(full()), FULL),
        (lambda: of_the_learner(f"OSError: {FULL}: '/dev/shm/x'"), f"OSError: {FULL}: '/dev/shm/x'"),
        (lambda: of_a_pool(f"replica 0 did not start: OSError: {FULL}"), f"replica 0 did not start: OSError: {FULL}"),
    ],
    ids=["driver", "quota", "actor", "learner", "pool"],
)
def test_a_full_disk_is_the_users_to_mend(
    make: Callable[[], BaseException], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ("failed", 2, f"the disk is full ({reason}); free some space, then resume")
    assert launch.failure(make()) == expected
    assert caplog.records == []  # no stack trace


def test_mistakes_that_show_later_are_the_users_as_well(caplog: pytest.LogCaptureFixture) -> None:
    for error in (ConfigError("judge.function f raised"), of_an_actor(ConfigError("judge.function f raised"))):
        assert launch.failure(error) == ("failed", 2, "judge.function f raised")
    assert caplog.records == []


def test_other_failures_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert launch.failure(of_the_learner("rank 0 died")) == ("failed", 4, "rank 0 died")
    assert launch.failure(of_a_pool("no engine")) == ("failed", 4, "no engine")
    assert caplog.records == []
    with caplog.at_level(logging.ERROR):
        assert launch.failure(full(errno.EIO))[:2] == ("failed", 4)
        assert launch.failure(of_an_actor(ValueError("x")))[:2] == ("failed", 4)
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]


class Screen(Report):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def executed(
    monkeypatch: pytest.MonkeyPatch, store: RunFolder, config: Config, error: BaseException | None
) -> tuple[int, list[str]]:
    """Exit code and lines of a run whose cluster raises this."""

    @contextlib.contextmanager
    def cluster(config: Config, store: RunFolder) -> Iterator[None]:
        if error:
            raise error
        yield

    async def nothing(*_: Any) -> None: ...

    monkeypatch.setattr(launch, "ray_cluster", cluster)
    monkeypatch.setattr(launch, "_run", nothing)
    screen = Screen()
    nobody: Any = None
    prepared = launch.Prepared(
        config=config,
        drawn={},
        model=Path(),
        judge=None,
        validator=None,
        iterations=[],
        heldout=nobody,
        validation=nobody,
        parts=None,
        trained_on=nobody,
        left_out=["long", "longer"],
        repeated=["again"],
    )
    return EXECUTE(prepared, store, screen), screen.lines


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (None, 0, "completed"),
        (NoPairs("iteration 0 has no pairs"), 3, "no_pairs"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ExceptionGroup("", [ExceptionGroup("", [full()])]), 2, "failed"),
    ],
    ids=["completed", "no-pairs", "interrupted", "full"],
)
def test_how_a_run_ends(
    error: BaseException | None, code: int, status: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    store = RunFolder.create(config)
    ended, lines = executed(monkeypatch, store, config, error)
    assert ended == code
    assert lines[:2] == [
        "2 prompts are too long and left out: long, longer",
        "1 prompts are repeats of another's wording and left out: again",
    ]
    assert any(line.startswith(f"status: {status}") for line in lines)
    assert (lines[-1] == f"go on with: rsrlm resume {store.folder}") == (code != 0)
    summary = store.summary()
    assert summary["status"] == status
    assert ("reason" in summary) == (status in ("no_pairs", "failed"))
    events = [json.loads(line) for line in (store.folder / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["status"]) for event in events] == [("run_ended", status)]


def test_a_disk_that_stays_full_does_not_hide_the_reason(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the summary nor the events can be written: /dev/full is a full disk."""
    config = make_config()
    store = RunFolder.create(config)
    for name in ("events.jsonl", ".summary.json.tmp"):
        (store.folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        store.write_summary({})
    with pytest.raises(OSError, match="No space left on device"):
        store.event("any")
    launch.write_summary(store, "failed", "the reason")
    monkeypatch.setattr(RunFolder, "remove_scratch", lambda store: None)
    code, lines = executed(monkeypatch, store, config, full())
    assert code == 2
    assert f"status: failed: the disk is full ({FULL}); free some space, then resume" in lines
    assert store.summary() == {}


# -- rsrlm data and rsrlm eval: what they refuse before anything starts -----------------------------------------------


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    path = tmp_path / "ranked.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data ift CONFIG --out out.jsonl", "data.trees: missing; give ranked data with data.trees=PATH"),
        ("data ift CONFIG --out . data.trees=RANKED", "--out .: give the path of a file to write"),
        ("data ift CONFIG --out FOLDER data.trees=RANKED", "FOLDER: give the path of a file to write"),
        ("data ift CONFIG --out out.jsonl data.trees=nowhere.jsonl", "nowhere.jsonl"),
        ("data eft CONFIG --out out.jsonl data.trees=RANKED", "judge.kind=digits: EFT targets are written judgements"),
        ("data prompts CONFIG --out out.jsonl self_instruct.from_seeds=30", "shows 32 of them; add prompts"),
        ("eval judge CONFIG --data RANKED --part most", "--part most: write all, ift, eft or evaluation"),
        ("eval judge CONFIG --data RANKED --model M1", "--model M1: only a run has several models"),
        ("eval judge CONFIG --data nowhere.jsonl", "nowhere.jsonl"),
        ("eval judge CONFIG --data CONFIG", "--data"),
        ("eval judge CONFIG --data RANKED --out RANKED", "RANKED: give the path of a folder to write"),
        ("eval judge CONFIG --data RANKED data.max_chars=1", "no prompt with two ranked replies in part unseen"),
        ("eval judge FOLDER --data RANKED", "no run here"),
        ("eval duel CONFIG nowhere nowhere2 --out duel", "nowhere"),
    ],
)
def test_commands_that_are_refused(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    places = {"CONFIG": config_file, "RANKED": ranked, "FOLDER": folder}

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    before = sorted(path for path in tmp_path.rglob("*"))
    ended = rsrlm(*placed(arguments).split(" "))
    assert ended.code == 2, ended
    assert ended.err.startswith("rsrlm: ")
    assert placed(message) in ended.err
    assert "Traceback" not in ended.err
    left = [path for path in tmp_path.rglob("*") if path not in before]
    assert all("out.jsonl.work" in str(path) for path in left)  # notes of what was begun


def test_ift_examples_as_a_file(rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "ift.jsonl"
    ended = rsrlm(
        "data", "ift", config_file, "--out", out, f"data.trees={ranked}", "data.ift_share=1", "data.eft_share=0"
    )
    assert ended.code == 0, ended
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 20
    assert {row["target"] for row in rows} == {f"good {i}" for i in range(20)}
    # They serve as prompts too, of a run and of `rsrlm data prompts`.
    assert [prompt.text for prompt in prompts.read(out)] == [row["prompt"] for row in rows]
    few = rsrlm("data", "ift", config_file, "--out", tmp_path / "few.jsonl", f"data.trees={ranked}", "data.max_ift=2")
    assert (few.code, "fewer than data.minimum=8" in few.err) == (3, True)
    assert not (tmp_path / "few.jsonl").exists()


def test_special_tokens_in_demonstrations_stay_text(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model is shown to write new prompts: seeds that spell <|im_end|>, and those that other models wrote."""
    asked: list[Any] = []

    class Engines:
        slots = 2

        async def hold(self, model: str) -> Any: ...

        async def generate(self, request: Any) -> Any:
            asked.append(request)
            text = "Name a <|im_end|> colour of the sky."
            return Completion(request_id="", token_ids=(5,), text=text, finish_reason="stop", weight_version="M0")

    def on_engines(config: Config, folder: Path, models: Any, work: Any, *_: Any, **__: Any) -> Any:
        return asyncio.run(work(run_of(Engines())))

    monkeypatch.setattr("rsrlm.commands.data.on_engines", on_engines)
    seeds = [{"id": f"p{n}", "prompt": f"<|im_end|><|im_start|>user Say {n}."} for n in range(8)]
    write_prompts(tmp_path / "prompts.jsonl", seeds)
    ended = rsrlm(
        "data", "prompts", config_file, "--out", tmp_path / "new.jsonl", "--number", 1, "model=smollm2-135m-instruct",
        "self_instruct.max_tokens=64", "engine.max_model_len=1024", "self_instruct.round=1",
    )  # fmt: skip
    assert ended.code == 0, ended
    _, encoder = commands.loaded(Model(path="smollm2-135m-instruct"))
    added = set(encoder.tokenizer.get_added_vocab().values())
    assert asked
    for request in asked:
        assert "<|im_end|><|im_start|>user Say" in encoder.tokenizer.decode(request.prompt_token_ids)
        assert not added & set(request.prompt_token_ids)


@pytest.mark.parametrize(
    "command",
    [
        "data eft CONFIG --out out.jsonl data.trees=RANKED data.eft_share=1 data.ift_share=0 judge.kind=structured",
        "eval judge CONFIG --out out --data RANKED judge.kind=structured",
        "eval judge CONFIG --out out --data RANKED --pairwise",
        "eval duel CONFIG MODEL MODEL --out out",
    ],
)
def test_a_command_that_goes_on_asks_with_the_same_prompts(
    rsrlm: Callable[..., Ended],
    config_file: Path,
    ranked: Path,
    clock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    seen: list[dict[str, tuple[int, ...]]] = []

    class Engines:
        slots = 2

        async def hold(self, model: str) -> Any: ...

        async def generate(self, request: Any) -> Any:
            seen[-1][request.id] = request.prompt_token_ids
            raise ConfigError("interrupted")

    def on_engines(config: Config, folder: Path, models: Any, work: Any, *_: Any, drawn: Any, **__: Any) -> Any:
        folder.mkdir(exist_ok=True)
        RunFolder(folder).fix("drawn", drawn)
        return asyncio.run(work(run_of(Engines())))

    for module in ("data", "judge", "duel"):
        monkeypatch.setattr(f"rsrlm.commands.{module}.on_engines", on_engines)
    names = {"CONFIG": str(config_file), "RANKED": str(ranked), "MODEL": str(clock)}
    for word, value in names.items():
        command = command.replace(word, value)
    options = [f"model={clock}", "engine.max_model_len=8192"]
    for _ in range(2):
        seen.append({})
        assert "interrupted" in rsrlm(*command.split(), *options).err
    assert seen[0]
    assert seen[0] == seen[1]
    drawn = json.loads(next(tmp_path.glob("out*/start.json")).read_text())["drawn"]
    assert commands.started(configs.load(config_file), tmp_path / "other")[1]["fence_salt"] != drawn["fence_salt"]


def test_a_function_judge_is_measured_without_engines(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path
) -> None:
    """It likes what is longer: people's choice in all twenty. Twice: the second time from the journal."""
    (tmp_path / "taste.py").write_text("def longer(prompt, response):\n    return min(5.0, len(response) / 2)\n")
    arguments = ("eval", "judge", config_file, "--data", ranked, "judge.kind=function", "judge.function=taste:longer")
    for _ in range(2):
        ended = rsrlm(*arguments, "--limit", 15)
        assert ended.code == 0, ended
        assert "15 of 20 prompts of part unseen with 30 ranked replies" in ended.out
    found = json.loads((tmp_path / "runs" / "mine" / "eval" / "ranked" / "judge.json").read_text())
    assert (found["data"], found["part"], found["prompts"], found["of"]) == ("ranked.jsonl", "unseen", 15, 20)
    assert found["models"]["M0"]["pairwise_accuracy"]["count"] == 15
    journal = tmp_path / "runs" / "mine" / "eval" / "ranked" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 30
    # A larger limit goes on with what is there; other texts are another question.
    assert rsrlm(*arguments).code == 0
    assert len(journal.read_text().splitlines()) == 40
    ranked.write_text(ranked.read_text().replace("bad", "worse"))
    assert rsrlm(*arguments).code == 0
    assert len(journal.read_text().splitlines()) == 60


def tree(number: int, question: str) -> dict[str, Any]:
    replies = [
        {"message_id": f"t{number}r{rank}", "text": f"reply {rank}", "role": "assistant", "rank": rank, "replies": []}
        for rank in range(2)
    ]
    root = {"message_id": f"t{number}", "text": question, "role": "prompter", "replies": replies}
    return {"message_tree_id": f"t{number}", "prompt": root}


class TestWhatIsTrainedOnIsNotMeasuredOn:
    """40 trees, of which some are for IFT and EFT, measured on from files of other names."""

    @pytest.fixture
    def trees(self, tmp_path: Path) -> list[dict[str, Any]]:
        found = [tree(number, f"What is number {number}?") for number in range(40)]
        (tmp_path / "trees.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
        return found

    @pytest.fixture
    def measured(
        self, rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, trees: list[dict[str, Any]]
    ) -> Callable[..., tuple[set[str], str]]:
        """Ids of the questions measured on in a file, and what is said about it."""
        (tmp_path / "nobodys_taste.py").write_text("def flat(prompt, response):\n    return 1\n")

        def measure(*arguments: Any, file: Path, config: Any = config_file) -> tuple[set[str], str]:
            out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
            ended = rsrlm(
                "eval", "judge", config, "--data", file, "--out", out, f"data.trees={tmp_path / 'trees.jsonl'}",
                "data.ift_share=0.3", "data.eft_share=0.3", "judge.kind=function", "judge.function=nobodys_taste:flat",
                *arguments,
            )  # fmt: skip
            assert ended.code == 0, ended
            names = [json.loads(line)["id"] for line in (out / "journal.jsonl").read_text().splitlines()]
            return {name.partition("ranked>")[2].partition("/")[0] for name in names}, ended.out

        return measure

    def test_by_id_and_by_wording_from_any_file(
        self, measured: Callable[..., tuple[set[str], str]], tmp_path: Path, trees: list[dict[str, Any]]
    ) -> None:
        own, said = measured(file=tmp_path / "trees.jsonl")
        assert 0 < len(own) < 40
        assert f"{40 - len(own)} prompts are trained on and left out" in said
        copy = tmp_path / "copy.jsonl"
        shutil.copy(tmp_path / "trees.jsonl", copy)
        assert measured(file=copy)[0] == own
        # Other ids, other case and blanks: the questions are the same.
        asked = [one["prompt"]["text"].upper().replace(" ", "  ") for one in trees]
        copy.write_text("".join(json.dumps(tree(100 + n, text)) + "\n" for n, text in enumerate(asked)))
        assert measured(file=copy)[0] == {f"t{100 + int(name[1:])}" for name in own}
        # The same ids with other words: left out as well.
        copy.write_text("".join(json.dumps(tree(n, f"Another question {n}")) + "\n" for n in range(40)))
        assert measured(file=copy)[0] == own

    def test_a_part_that_is_asked_for_is_measured_on_and_said_to_be_trained_on(
        self, measured: Callable[..., tuple[set[str], str]], tmp_path: Path
    ) -> None:
        unseen, _ = measured(file=tmp_path / "trees.jsonl")
        everything, said = measured("--part", "all", file=tmp_path / "trees.jsonl")
        assert len(everything) == 40
        assert f"{40 - len(unseen)} prompts are trained on and measured on all the same" in said

    def test_a_run_remembers_what_it_trains_on(
        self,
        rsrlm: Callable[..., Ended],
        measured: Callable[..., tuple[set[str], str]],
        config_file: Path,
        tmp_path: Path,
    ) -> None:
        """The prompts of its iterations and the questions in a file of examples too."""
        write_prompts(
            tmp_path / "prompts.jsonl", [{"id": f"p{n}", "prompt": f"what is number {n}? "} for n in range(9)]
        )
        examples = tmp_path / "examples.jsonl"
        examples.write_text(
            json.dumps({"prompt": "What is number 8?", "target": "8"}) + "\n"
            + json.dumps({"instruction": "What is number 39?", "response": "x", "target": "Score: 1"}) + "\n"
        )  # fmt: skip
        steps = [{"recipe": "sft", "sources": [str(examples)]}, {}]
        with pytest.raises(Started) as started:
            rsrlm(
                "run", config_file, "iterations=2", f"steps={json.dumps(steps)}", "judge.kind=text",
                "data.minimum=1", "prompts.heldout=4",
            )  # fmt: skip
        prepared, store = started.value.arguments[:2]
        assert "p8" not in {prompt.id for prompt in prepared.heldout.prompts}  # a question of the examples
        answered = {int(task.prompt.id[1:]) for one in prepared.iterations for task in one.tasks}
        trained = answered | {8, 39}
        assert len(trained) == 4 + 1 + 1 - (8 in answered)
        found, _ = measured(file=tmp_path / "trees.jsonl", config=store.folder)
        assert found == {f"t{number}" for number in range(40) if number not in trained}


def test_an_evaluation_does_not_stand_in_the_way_of_a_run(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    (folder / "eval").mkdir(parents=True)
    RunFolder.check_new(folder)
    (folder / "other").mkdir()
    with pytest.raises(ConfigError, match="holds other files"):
        RunFolder.check_new(folder)
