"""`rsrlm judge`: scores of a file of responses, what is refused, and what is wrong with a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Answering, Ended

from rsrlm.records import Request

ROWS = [
    {"id": "tea", "prompt": "Why tea?", "responses": ["two", "four", "none"], "good": [False, True, False]},
    {"id": "ale", "prompt": "Why ale?", "response": "five", "good": True},
]
POINTS = {"tea/0": 2, "tea/1": 4, "ale/0": 5}


@pytest.fixture
def judge(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, engines: Answering) -> Any:
    """The command on these rows; a judge that writes what `POINTS` says, and no score of the third."""

    def text(version: str, request: Request) -> str:
        name = request.id.split("#")[0].removeprefix("00/")
        return f"Because.\nScore: {POINTS[name]}" if name in POINTS else "Hm."

    engines.text = text

    def run(rows: list[dict[str, Any]], *options: str) -> Ended:
        (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "scored.jsonl"
        data = ("--data", tmp_path / "responses.jsonl", "--out", out, "judge.kind=text", "judge.judgements=2")
        return rsrlm("judge", config_file, *data, *options)

    return run


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]


def test_every_response_is_scored(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    ended = judge(ROWS, "--threshold", "3")
    assert ended.code == 0, ended
    assert (len(engines.take()), engines.clusters) == (8, 1)
    found = [(row["id"], row["index"], row["points"], row["refused"]) for row in written(tmp_path)]
    assert found == [("tea", 0, 2, True), ("tea", 1, 4, False), ("tea", 2, None, True), ("ale", 0, 5, False)]
    assert written(tmp_path)[2]["unreadable"] == "no readable judgement"
    assert "4 responses, 1 unreadable" in ended.out
    assert "risk 0.333 without it" in ended.out  # of three readable ones, one is bad
    assert judge(ROWS, "--threshold", "3").code == 0
    assert engines.take() == []  # all of it is known


def test_the_best_of_each_prompt(judge: Callable[..., Ended], tmp_path: Path) -> None:
    assert judge(ROWS, "--best").code == 0
    assert [(row["id"], row["response"], row["points"]) for row in written(tmp_path)] == [
        ("tea", "four", 4),
        ("ale", "five", 5),
    ]


def test_no_best_where_nothing_is_readable(judge: Callable[..., Ended], tmp_path: Path) -> None:
    ended = judge([{"id": "gin", "prompt": "Why gin?", "responses": ["a", "b"]}], "--best", "--threshold", "1")
    assert "1 responses, 1 unreadable" in ended.out
    (row,) = written(tmp_path)
    assert (row["id"], row["response"], row["points"], row["refused"]) == ("gin", None, None, True)


def test_where_nobody_says_what_is_good(judge: Callable[..., Ended], tmp_path: Path) -> None:
    ended = judge([{"id": "ale", "prompt": "Why ale?", "response": "five"}])
    assert (ended.code, "Refusal" in ended.out) == (0, False)
    assert "refused" not in written(tmp_path)[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a", "prompt": "?"}, "needs response, a text, or responses, a list of texts"),
        ({"id": "a", "prompt": "?", "responses": []}, "needs response, a text, or responses, a list of texts"),
        ({"id": "a", "prompt": "?", "responses": [1]}, "needs response, a text, or responses, a list of texts"),
        ({"id": "a", "prompt": "?", "response": "x", "good": 1}, "good must be true or false for each of 1 responses"),
        ({"id": "a", "prompt": "?", "response": "x", "good": [True, True]}, "good must be true or false for each of 1"),
        ({"id": "a/b", "prompt": "?", "response": "x"}, "id 'a/b' must be a text without / # >"),
        ({"id": "ale", "prompt": "?", "response": "x"}, "id 'ale' comes twice"),
    ],
)
def test_lines_that_are_wrong(judge: Callable[..., Ended], row: dict[str, Any], said: str, engines: Answering) -> None:
    ended = judge([ROWS[1], row])
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert "line 2" in ended.err
    assert engines.take() == []


def test_a_file_with_nothing_in_it(judge: Callable[..., Ended]) -> None:
    assert "nothing in it; write one JSON object per line" in judge([]).err
