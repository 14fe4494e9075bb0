"""What `rsrlm data` and `rsrlm eval` have in common: what they refuse before anything starts, and that they go on."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Answering, Ended

from rsrlm import config as configs
from rsrlm.commands import engines as commands


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

    before = sorted(tmp_path.rglob("*"))
    ended = rsrlm(*placed(arguments).split(" "))
    assert ended.code == 2, ended
    assert ended.err.startswith("rsrlm: ")
    assert placed(message) in ended.err
    assert "Traceback" not in ended.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "answered"),
    [
        ("data eft CONFIG --out out data.trees=RANKED data.eft_share=1 data.ift_share=0 judge.kind=structured", 0),
        ("data prompts CONFIG --out out self_instruct.from_seeds=4 self_instruct.max_tokens=64", 0),
        ("eval judge CONFIG --out out --data RANKED judge.kind=structured", 0),
        ("eval judge CONFIG --out out --data RANKED --pairwise", 0),
        ("eval duel CONFIG MODEL OTHER --out out", 0),
        ("eval duel CONFIG MODEL OTHER --out out", 14),  # killed among the comparisons
    ],
)
def test_a_command_that_goes_on_asks_with_the_same_prompts(
    rsrlm: Callable[..., Ended],
    config_file: Path,
    ranked: Path,
    clock: Path,
    other_model: Path,
    tmp_path: Path,
    engines: Answering,
    command: str,
    answered: int,
) -> None:
    names = {"CONFIG": config_file, "RANKED": ranked, "MODEL": clock, "OTHER": other_model}
    for word, value in names.items():
        command = command.replace(word, str(value))
    seen = []
    for most in (answered, 0):
        engines.most = most
        assert "killed" in rsrlm(*command.split(), f"model={clock}", "engine.max_model_len=8192").err
        seen.append([(one.id, one.prompt_token_ids) for _, one in engines.requests])
        engines.take()
    assert seen[1]
    assert seen[0][answered:] == seen[1]
    drawn = json.loads(next(tmp_path.glob("out*/start.json")).read_text())["drawn"]
    assert commands.started(configs.load(config_file), tmp_path / "another")[1]["fence_salt"] != drawn["fence_salt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
def test_an_interrupted_command_says_how_to_go_on(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, engines: Answering, error: type[BaseException]
) -> None:
    def interrupted(*_: object) -> str:
        raise error

    engines.text = interrupted
    ended = rsrlm("eval", "judge", config_file, "--data", ranked)
    assert (ended.code, ended.err) == (130, "rsrlm: interrupted; the same command goes on\n")
