"""`rsrlm judge --mode pairwise` and `--mode meta`: who wins, what both orders say, and what is compared at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Answering, Ended

from rsrlm.records import Request

ROWS = [
    {"id": "tea", "prompt": "Why tea?", "responses": ["a", "b", "c"], "good": [True, None, False], "source": "tests"},
    {"id": "ale", "prompt": "Why ale?", "responses": ["d", "d"]},
]


@pytest.fixture
def judge(rsrlm: Callable[..., Ended], small_model: Path, tmp_path: Path, engines: Answering) -> Any:
    """The command on these rows, by a judge that goes by the numbers in the ids: the higher one wins, and of 1 and 2
    the one that is shown first."""

    def text(version: str, request: Request) -> str:
        if "~" not in request.id:
            return f"Because {request.id[-1]}.\nScore: 3"
        first, second = (int(number[-1]) for number in request.id.split("~"))
        wins = first > second or {first, second} == {1, 2}
        return f"Because {request.id}.\nWinner: {'A' if wins else 'B'}"

    engines.text = text

    def run(rows: list[dict[str, Any]], mode: str, *options: object) -> Ended:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ("--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
        return rsrlm("judge", small_model, *files, "--mode", mode, *options)

    return run


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_every_two_responses_in_both_orders(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    ended = judge(ROWS, "pairwise", "evaluate.judge.read=text")
    assert ended.code == 0, ended
    asked = ["0~1", "0~2", "1~0", "1~2", "2~0", "2~1"]
    assert engines.take() == [f"00/tea/{two}" for two in asked]  # equal responses are a tie by themselves
    rows = written(tmp_path)
    found = [(row["id"], row["first"], row["second"], row["winner"], row["share"]) for row in rows]
    assert found == [
        ("tea", 0, 1, "second", 0.0), ("tea", 0, 2, "second", 0.0), ("tea", 1, 2, "tie", 0.5),
        ("ale", 0, 1, "tie", 0.5),
    ]  # fmt: skip
    assert (rows[0]["responses"], rows[0]["source"], rows[0]["judge"]) == (["a", "b"], "tests", "pairwise_text (text)")
    orders = [(order["winner"], order["text"].splitlines()[0]) for order in rows[2]["orders"]]
    assert orders == [("A", "Because 00/tea/1~2."), ("A", "Because 00/tea/2~1.")]
    assert "first 0, second 2, tie 2 (orders disagree: 1); the text shown first wins 0.667 of 6" in ended.out
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert {name: summary[name] for name in ("rows", "first", "second", "tie", "unreadable", "orders_disagree")} == {
        "rows": 4, "first": 0, "second": 2, "tie": 2, "unreadable": 0, "orders_disagree": 1,
    }  # fmt: skip
    assert judge(ROWS, "pairwise", "evaluate.judge.read=text").code == 0
    assert engines.take() == []


def test_the_letters_of_a_judge(judge: Callable[..., Ended], tmp_path: Path) -> None:
    """It always prefers the first with .7 against .2: in both orders that is no preference at all."""
    assert judge(ROWS[:1], "pairwise").code == 0
    row = written(tmp_path)[0]
    assert (row["winner"], row["share"]) == ("tie", pytest.approx(0.5))
    assert [order["share"] for order in row["orders"]] == pytest.approx([7 / 9, 7 / 9])
    assert [order["text"] for order in row["orders"]] == ["", ""]  # what the first token became says nothing


def test_the_best_by_win_rate(judge: Callable[..., Ended], tmp_path: Path) -> None:
    """Response 1 beats 0, ties with 2 and with itself: (1 + .5 + .5) / 3, and so does 2."""
    assert judge(ROWS, "pairwise", "--best", "evaluate.judge.read=text").code == 0
    best = [(row["id"], row["index"], row["response"], row["points"]) for row in written(tmp_path)]
    assert best == [("tea", 1, "b", pytest.approx(2 / 3)), ("ale", 0, "d", 0.5)]


def test_comparisons_that_cannot_be_read(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    engines.text = lambda version, request: "Hm."
    ended = judge(ROWS[:1], "pairwise", "evaluate.judge.read=text")
    assert {(row["winner"], row["share"], row["unreadable"]) for row in written(tmp_path)} == {
        (None, None, "no winner line")
    }
    assert "3 rows, 3 unreadable" in ended.out
    assert judge(ROWS[:1], "pairwise", "--best", "evaluate.judge.read=text").code == 0
    (row,) = written(tmp_path)
    assert (row["response"], row["points"], row["unreadable"]) == ("a", None, "no comparison that can be read")


def test_one_response_cannot_be_compared(judge: Callable[..., Ended], engines: Answering) -> None:
    ended = judge([ROWS[0], {"id": "gin", "prompt": "?", "response": "x"}], "pairwise")
    assert ended.code == 2
    assert "id 'gin' has one response, and --mode pairwise compares two or more" in ended.err
    assert engines.take() == []


def test_judgements_that_come_along(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    """As texts, and as `rsrlm judge` writes them, of which unreadable ones take no part; a single one is not
    compared."""
    points = [{"text": "x", "points": 1}, {"text": "y", "points": None}, {"text": "z", "points": 2}]
    rows = [
        {"id": "tea", "prompt": "Why tea?", "response": "a", "judgements": ["p", "q"]},
        {"id": "ale", "prompt": "Why ale?", "index": 0, "response": "b", "judgements": points},
        {"id": "ale", "prompt": "Why ale?", "index": 3, "response": "c", "judgements": ["p"]},
    ]
    ended = judge(rows, "meta")
    assert ended.code == 0, ended
    assert engines.take() == ["00/ale/0#0~2", "00/ale/0#2~0", "00/tea/0#0~1", "00/tea/0#1~0"]
    found = [
        (row["id"], row["index"], row.get("first"), row.get("second"), row["winner"], row["unreadable"])
        for row in written(tmp_path)
    ]
    assert found == [
        ("tea", 0, 0, 1, "second", None),
        ("ale", 0, 0, 2, "second", None),
        ("ale", 3, None, None, None, "fewer than two readable judgements"),
    ]
    row = written(tmp_path)[1]
    assert row["judgements"] == [{"text": "x", "points": 1}, {"text": "z", "points": 2}]
    assert (row["judge"], "Because 00/ale/0#0~2." in row["orders"][0]["text"]) == ("meta (text)", True)


def test_judgements_that_are_made_first(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    ended = judge(ROWS[1:], "meta", "judge.judgements=2")
    assert ended.code == 0, ended
    made = [f"00/ale/{response}#{number}" for response in (0, 1) for number in (0, 1)]
    compared = [f"00/ale/{response}#{two}" for response in (0, 1) for two in ("0~1", "1~0")]
    assert engines.take() == sorted(made + compared)
    row = written(tmp_path)[0]
    assert [one["text"] for one in row["judgements"]] == ["Because 0.\nScore: 3", "Because 1.\nScore: 3"]
    assert (row["first"], row["second"], row["winner"]) == (0, 1, "second")


def test_a_config_without_a_meta_judge(
    rsrlm: Callable[..., Ended], config_file: Path, judge: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    files = ("--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    ended = rsrlm("judge", config_file, *files, "--mode", "meta")
    assert (ended.code, "no step has a meta-judge; set recipe=meta_rewarding" in ended.err) == (2, True)
    ended = rsrlm("judge", config_file, *files, "--mode", "meta", "recipe=meta_rewarding", "judge.kind=text")
    assert ended.code == 0, ended
