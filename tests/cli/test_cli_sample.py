"""`rsrlm sample`: answers in the form that `rsrlm judge` reads, the best of them, and prompts that cannot be asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Answering, Ended

from rsrlm.records import Request

ROWS = [{"id": "tea", "prompt": "Why tea?", "answer": 42}, {"id": "ale", "prompt": "Why ale?"}]


@pytest.fixture
def sample(rsrlm: Callable[..., Ended], small_model: Path, tmp_path: Path, engines: Answering) -> Any:
    """The command on these rows: response 1 is the best of each prompt."""

    def text(version: str, request: Request) -> str:
        if "#" not in request.id:
            return f"Answer {request.id[3:]}"
        return f"Because.\nScore: {'242'[int(request.id.split('#')[0][-1])]}"

    engines.text = text

    def run(rows: list[dict[str, Any]], *options: object) -> Ended:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ("--in", tmp_path / "prompts.jsonl", "--out", tmp_path / "answers.jsonl")
        return rsrlm("sample", small_model, *files, "--responses", 3, "judge.kind=text", "judge.judgements=1", *options)

    return run


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_what_the_judge_reads(
    sample: Callable[..., Ended], rsrlm: Callable[..., Ended], engines: Answering, tmp_path: Path, small_model: Path
) -> None:
    ended = sample(ROWS)
    assert ended.code == 0, ended
    assert engines.take() == [f"00/{name}/{number}" for name in ("ale", "tea") for number in range(3)]
    assert written(tmp_path / "answers.jsonl")[0] == {
        "id": "tea", "prompt": "Why tea?", "answer": 42, "responses": [f"Answer tea/{number}" for number in range(3)],
        "finish_reasons": ["stop"] * 3, "model": str(small_model),
    }  # fmt: skip
    files = ("--in", tmp_path / "answers.jsonl", "--out", tmp_path / "scored.jsonl")
    ended = rsrlm("judge", small_model, *files, "judge.kind=text", "judge.judgements=1", "--best")
    assert ended.code == 0, ended
    apart = written(tmp_path / "scored.jsonl")
    # In one command the same is asked, and the same comes out.
    asked = engines.take()
    assert sample(ROWS, "--best").code == 0
    assert [one for one in engines.take() if "#" in one] == asked
    assert written(tmp_path / "answers.jsonl") == apart
    assert [(row["id"], row["index"], row["points"], row["answer"]) for row in apart[:1]] == [("tea", 1, 4.0, 42)]


def test_refused_answers_are_kept_and_marked(sample: Callable[..., Ended], tmp_path: Path) -> None:
    ended = sample(ROWS[:1], "--threshold", "3")
    assert ended.code == 0, ended
    assert [(row["index"], row["refused"]) for row in written(tmp_path / "answers.jsonl")] == [
        (0, True), (1, False), (2, True),
    ]  # fmt: skip
    assert "3 responses, 0 unreadable, 2 refused" in ended.out


def test_a_cut_answer_is_the_best_only_among_its_like(
    rsrlm: Callable[..., Ended], small_model: Path, tmp_path: Path, engines: Answering
) -> None:
    """Whatever its points: it may win where all are cut."""
    engines.text = lambda version, request: f"Because.\nScore: {'53'[int(request.id.split('#')[0][-1])]}"
    rows = [
        {"id": "tea", "prompt": "?", "responses": ["a", "b"], "finish_reasons": ["length", "stop"]},
        {"id": "ale", "prompt": "?", "responses": ["a", "b"], "finish_reasons": ["length", "length"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert rsrlm("judge", small_model, *files, "judge.kind=text", "judge.judgements=1", "--best").code == 0
    assert [(row["id"], row["response"]) for row in written(tmp_path / "out.jsonl")] == [("tea", "b"), ("ale", "a")]


def test_long_prompts_are_left_out_and_said(sample: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    long = {"id": "long", "prompt": "word " * 2000}
    ended = sample([long, *ROWS], "engine.max_model_len=1024", "sample.max_tokens=64")
    assert ended.code == 0, ended
    assert "1 prompts are too long and left out: long" in ended.out
    assert [row["id"] for row in written(tmp_path / "answers.jsonl")] == ["tea", "ale"]
    ended = sample(
        ROWS, "engine.max_model_len=64", "sample.max_tokens=63", "evaluate.max_tokens=8", "judge.max_tokens=8"
    )
    assert (ended.code, "sample.max_tokens=63 leaves no room for a prompt" in ended.err) == (2, True)


def test_nobody_judges_where_nothing_is_chosen(
    sample: Callable[..., Ended], other_model: Path, engines: Answering
) -> None:
    assert sample(ROWS, f"judge.model={other_model}", "judge.replicas=1").code == 0
    assert all("#" not in request.id for _, request in engines.requests)
    engines.take()
    assert sample(ROWS, f"judge.model={other_model}", "judge.replicas=1", "--best").code == 0
    assert {version for version, request in engines.requests if "#" in request.id} == {"judge"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing in it; write one JSON object per line"),
        ('{"id": "a"}', 'line 1: must be an object such as {"id": "tea"'),
        ('{"id": "a", "prompt": "?"}\n{"id": "a", "prompt": "!"}', "line 2: id 'a' comes twice"),
        ('{"id": "a", "prompt": NaN}', "line 1: prompt holds NaN"),
        ("[1]", "item 1: must be a JSON object, not 1"),
    ],
)
def test_prompt_files_that_are_wrong(
    rsrlm: Callable[..., Ended], small_model: Path, tmp_path: Path, text: str, said: str, engines: Answering
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    ended = rsrlm("sample", small_model, "--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert engines.take() == []
