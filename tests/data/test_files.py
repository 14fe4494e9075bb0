"""Files and folders that hold records, and those that do not."""

import gzip
import json
from pathlib import Path

import pytest
from ranked_files import message, tree, written

from rsrlm.data.ranked import read
from rsrlm.settings.base import ConfigError

GOOD = json.dumps(tree("t", message("r"))).encode()
NESTED = b'{"message_tree_id": "u", "prompt": ' + b'{"replies": [' * 5000 + b"]}" * 5000 + b"}"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no records in it; known shapes: Open Assistant trees"),
        (b"\n \n", "no records in it"),
        (b"[]", "no records in it"),
        (b"[\n1]", "item 1: must be a JSON object, not 1"),
        (b'[{"a": 1},\n{"b" 2}]', r"line 2: not JSON \(Expecting ':' delimiter at column 6\)"),
        (b'{"message', "line 1: not JSON"),
        (GOOD + b'\n\n{"broken"\n', "line 3: not JSON"),
        (GOOD + b"\n\xff\xfe\n", "line 2: not UTF-8"),
        (b"[1,\n2,\n\xff]", "line 3: not UTF-8"),
        (GOOD + b"\n" + NESTED, "line 2: nested too deeply"),
        (b'{"rank": ' + b"9" * 5000 + b"}", "line 1: not readable JSON"),
        (b"3\n", "line 1: must be a JSON object, not 3"),
        (b'"text"\n', "line 1: must be a JSON object"),
        (b'{"text": "only"}', r"line 1: fits no known shape with its keys \['text'\]; known shapes: .*AlpacaEval"),
        (b'{"responses": []}', "line 1: fits no known shape"),
        (GOOD + b'\n{"prompt": "Q?", "chosen": "a", "rejected": "b"}', "line 2: not of the shape of the first record"),
        (b'{"message_tree_id": "t", "prompt": {}}', "line 1: has no message_id"),
        (b'{"message_tree_id": 7, "prompt": {}}', "line 1: message_tree_id must be a text, not 7"),
        (b'{"chosen": "a", "rejected": "b"}', "line 1: has no question"),
        (b'{"prompt": null, "responses": []}', "line 1: has no question"),
        (b'{"prompt": "Q?", "responses": {}}', "responses must be a list, not {}"),
        (b'{"prompt": "Q?", "responses": ["a"]}', "response 1: must be an object with response, not 'a'"),
        (b'{"prompt": "Q?", "responses": [{"score": 1}]}', "response 1: has no response"),
        (b'{"prompt": "Q?", "responses": [{"text": "a", "score": "4"}]}', "response 1: score must be a finite number"),
        (b'{"prompt": "Q?", "responses": [{"text": "a", "score": 1e999}]}', "score must be a finite number or null"),
        (b'{"prompt": "Q?", "responses": [{"text": "a", "score": true}]}', "finite number or null, not True"),
        (
            b'{"prompt": "Q?", "responses": [{"text": "a", "score": 1' + b"0" * 400 + b"}]}",
            "response 1: score must be a finite number",
        ),
        (b'{"prompt": 5, "chosen": "a", "rejected": "b"}', "prompt: must be a text or messages with role and content"),
        (b'{"prompt": "Q?", "chosen": 5, "rejected": "b"}', "chosen: must be a text or messages"),
        (b'{"prompt": "Q?", "chosen": [{}], "rejected": "b"}', "chosen: has no from"),
        (b'{"instruction": "Q?", "output_1": "a", "output_2": "b", "preference": 3}', "preference 3.0 must be from 1"),
        (b'{"instruction": "Q?", "output_1": 1, "output_2": "b", "preference": 1}', "output_1 must be a text, not 1"),
    ],
)
def test_broken_files(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=complaint) as error:
        read(str(path), key="eft.trees")
    assert str(error.value).startswith(f"eft.trees={path}")
    assert len(str(error.value)) < 900


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    for data in (GOOD, gzip.compress(GOOD * 9)[:-9], gzip.compress(GOOD)[:12] + b"\x07" * 99):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"cannot be read: .*is it whole, and as its name says"):
            read(str(path))
    (tmp_path / "data.csv").write_text("prompt,chosen")
    with pytest.raises(ConfigError, match=r"data\.csv: not one of \.jsonl, "):
        read(str(tmp_path / "data.csv"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        read(str(tmp_path / "other.jsonl"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        read("")
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "no-such-owner/no-such-data-set", "a\x00b"):
        with pytest.raises(ConfigError, match="neither a file here nor a data set that loads"):
            read(source)


def test_splits_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
    for folder, names in {"both": ("train", "test"), "one": ("test",), "neither": ("test", "validation")}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            written(tmp_path / folder, row | {"prompt": name}, name=f"{name}.jsonl")
    assert [prompt.text for prompt in read(str(tmp_path / "both")).prompts] == ["train"]
    assert [prompt.text for prompt in read(str(tmp_path / "one")).prompts] == ["test"]
    with pytest.raises(ConfigError, match=r"has the splits (test, validation|validation, test) and none called train"):
        read(str(tmp_path / "neither"))


def test_windows_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n")
    assert len(read(str(path)).prompts) == 1
