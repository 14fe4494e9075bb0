"""Help, words that mean nothing, and `rsrlm plan`."""

import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command_line import Ended


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


def test_plan_for_gpus_needs_none_and_no_weights(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the prompts, whose number the config gives."""
    monkeypatch.setattr("rsrlm.runtime.setup.prepare", None)
    over = ["model=meta-llama/Meta-Llama-3-8B-Instruct", "model.dtype=bfloat16", "train.zero_stage=3"]
    over += ["engine.gpus=1", "engine.kind=async"]
    ended = rsrlm("plan", config_file, "train.gpus=1", "prompts.path=not-there.jsonl", *over)
    assert (ended.code, ended.err) == (0, "")
    assert "GPU hours" in ended.out
    assert "of 80 GB" in ended.out
    assert "of 141 GB" in rsrlm("plan", config_file, "--gpu-gb", "141", "train.gpus=1", *over).out


def test_plan_for_gpus_needs_the_shape(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    ended = rsrlm("plan", config_file, "model=./mine", "train.gpus=1")
    assert (ended.code, ended.out) == (2, "")
    assert "model.path=./mine: no config.json in that folder; put it there" in ended.err
