"""`rsrlm judge`: scores of a file of responses, what is refused, what is known after a kill, and what is wrong with a
file."""

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

    def run(
        rows: list[dict[str, Any]], *options: object, judge: Sequence[str] = ("judge.kind=text", "judge.judgements=2")
    ) -> Ended:
        (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ("--in", tmp_path / "responses.jsonl", "--out", tmp_path / "scored.jsonl")
        return rsrlm("judge", config_file, *files, *judge, *options)

    return run


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]


def test_every_response_is_scored(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    ended = judge(ROWS, "--threshold", "3")
    assert ended.code == 0, ended
    assert (len(engines.take()), engines.clusters) == (8, 1)
    found = [(row["id"], row["index"], row["points"], row["refused"]) for row in written(tmp_path)]
    assert found == [("tea", 0, 2, True), ("tea", 1, 4, False), ("tea", 2, None, True), ("ale", 0, 5, False)]
    assert written(tmp_path)[2]["unreadable"] == "no score line"
    assert "4 responses, 1 unreadable, 2 refused" in ended.out
    assert "of 2 kept here that say so, 0.000 are bad" in ended.out
    assert "risk 0.333 without it" in ended.out  # of three readable ones, one is bad
    assert judge(ROWS, "--threshold", "3").code == 0
    assert engines.take() == []  # all of it is known


def test_every_row_says_who_judged_and_how(judge: Callable[..., Ended], tmp_path: Path, small_model: Path) -> None:
    rows = [{**ROWS[0], "source": "tests", "answer": 42}]
    assert judge(rows).code == 0
    row = written(tmp_path)[1]
    each = {"text": "Because.\nScore: 4", "points": 4.0, "unreadable": None}
    assert row == {
        "id": "tea", "prompt": "Why tea?", "source": "tests", "answer": 42, "index": 1, "response": "four",
        "good": True,
        "points": 4.0, "variance": 0.0, "unreadable": None, "judge": "additive (text)", "judge_model": str(small_model),
        "judgements": [each, each],
    }  # fmt: skip


def test_what_it_came_to(judge: Callable[..., Ended], engines: Answering, tmp_path: Path) -> None:
    """Of both starts the answers behind the file are the same; the second has asked for none of them."""
    asked = 0
    for start in range(2):
        assert judge(ROWS).code == 0
        summary = json.loads((tmp_path / "scored.summary.json").read_text())
        asked = asked or sum(len(request.prompt_token_ids) for _, request in engines.requests)
        assert summary["asked"] == {"requests": 8, "prompt_tokens": asked, "generated_tokens": 8}
        assert summary["this_start"]["requests"] == (0 if start else 8)
        assert summary["this_start"]["prompt_tokens"] == (0 if start else asked)
    assert (summary["prompts"], summary["responses"], summary["unreadable"]) == (2, 4, 1)
    assert summary["mean_points"] == pytest.approx(11 / 3)
    assert summary["refusal"]["labelled"]["risk"] == pytest.approx(1 / 3)


def test_a_model_in_the_place_of_a_config(
    rsrlm: Callable[..., Ended], small_model: Path, tmp_path: Path, engines: Answering
) -> None:
    """Digits are read where nothing else is said: of six that differ in probability."""
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    ended = rsrlm("judge", small_model, "--in", tmp_path / "in.jsonl", "--out", tmp_path / "scored.jsonl")
    assert ended.code == 0, ended
    (row,) = written(tmp_path)
    assert (row["judge"], row["judge_model"]) == ("additive_digits (digits)", str(small_model))
    assert row["variance"] > 0


def test_another_judge_is_the_only_one_that_starts(
    judge: Callable[..., Ended], other_model: Path, engines: Answering, tmp_path: Path
) -> None:
    ended = judge(ROWS, f"judge.model={other_model}", "judge.replicas=1")
    assert ended.code == 0, ended
    assert {version for version, _ in engines.requests} == {str(other_model)}
    assert written(tmp_path)[0]["judge_model"] == str(other_model)


def test_a_judge_that_asks_nobody(
    judge: Callable[..., Ended], engines: Answering, tmp_path: Path, functions_here: None
) -> None:
    (tmp_path / "length_taste.py").write_text("def longer(prompt, response):\n    return len(response)\n")
    ended = judge(ROWS[1:], "judge.kind=function", "judge.function=length_taste:longer", "--best", judge=())
    assert ended.code == 0, ended
    (row,) = written(tmp_path)
    assert (row["points"], row["judge"], row["judge_model"], engines.clusters) == (4.0, "length_taste:longer", None, 0)


class Says(BaseHTTPRequestHandler):
    """A server that answers every chat with a score, for 100 prompt tokens and 10 of its own."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes.\nScore: 4"}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        about = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        body = json.dumps({**about, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def test_what_a_server_costs(
    rsrlm: Callable[..., Ended], small_model: Path, tmp_path: Path, engines: Answering
) -> None:
    """8 answers of 100 and 10 tokens at 1 and 5 for a million: .0012. No engine starts, and a second start asks for
    nothing."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Says)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    endpoint = f"judge.endpoint={{url: '{url}', model: m, price_in: 1, price_out: 5}}"
    files = ("--in", tmp_path / "in.jsonl", "--out", tmp_path / "scored.jsonl")
    try:
        for _ in range(2):
            ended = rsrlm("judge", small_model, *files, endpoint, "judge.judgements=2")
            assert ended.code == 0, ended
            assert "all starts: 8 requests, 800 prompt and 80 generated tokens, cost 0.0012" in ended.out
    finally:
        server.shutdown()
        server.server_close()
    assert engines.clusters == 0
    row = written(tmp_path)[0]
    assert (row["points"], row["judge_model"], row["judgements"][0]["text"]) == (4.0, "m", "Yes.\nScore: 4")


def killed(call: Callable[[], Any]) -> None:
    """`call` in another process, which SIGKILL ends."""
    child = os.fork()
    if not child:
        try:
            call()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_nothing_is_asked_twice_after_a_kill(
    judge: Callable[..., Ended], engines: Answering, tmp_path: Path, rsrlm: Callable[..., Ended]
) -> None:
    rows = [{"id": f"r{number}", "prompt": f"Why {number}?", "response": "four"} for number in range(12)]
    answered = engines.text

    def dies(version: str, request: Request) -> str:
        if len(engines.requests) == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return "Because.\nScore: 4"

    engines.text = dies
    killed(lambda: judge(rows))
    assert not (tmp_path / "scored.jsonl").exists()
    journal = tmp_path / "scored.jsonl.work" / "journal.jsonl"
    known = {json.loads(line)["id"] for line in journal.read_text().splitlines()}
    assert 0 < len(known) < 15
    engines.text = lambda version, request: "Because.\nScore: 4"
    assert judge(rows).code == 0
    assert known.isdisjoint(again := engines.take())
    assert len(known) + len(again) == 24
    whole = (tmp_path / "scored.jsonl").read_bytes()
    assert [row["id"] for row in written(tmp_path)] == [row["id"] for row in rows]
    (tmp_path / "scored.jsonl").unlink()
    journal.unlink()
    assert judge(rows).code == 0
    assert (tmp_path / "scored.jsonl").read_bytes() == whole
    # Of a file that has changed, the new lines alone are asked about.
    engines.take()
    assert judge([*rows[1:], {**rows[0], "response": "five"}, {**rows[0], "id": "new"}]).code == 0
    assert engines.take() == ["00/new/0#0", "00/new/0#1", "00/r0/0#0", "00/r0/0#1"]
    engines.text = answered


def test_two_at_once_on_one_file(judge: Callable[..., Ended], tmp_path: Path) -> None:
    from rsrlm.store.folder import RunFolder

    work = tmp_path / "scored.jsonl.work"
    work.mkdir()
    with RunFolder(work).lock():
        ended = judge(ROWS)
    assert (ended.code, "another process is running it" in ended.err) == (2, True)


HELD_OUT = [  # points, good: at 3 points 1 of 4 that are kept is bad, at 4 none of 2
    (5.0, True), (4.0, True), (3.0, False), (3.0, True), (1.0, False), (None, True),
]  # fmt: skip


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    rows = [{"points": points, "good": good, "judge": "additive (text)"} for points, good in HELD_OUT]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"points": 2.0, "good": None}]))
    return path


def test_a_threshold_from_held_out_responses(judge: Callable[..., Ended], held_out: Path, tmp_path: Path) -> None:
    ended = judge(ROWS, "--risk", "0.25", "--held-out", held_out)
    assert ended.code == 0, ended
    assert "threshold 3.0000: of 6 held-out responses it keeps 4 (0.667), and 0.250 of these are bad [" in ended.out
    assert [row["refused"] for row in written(tmp_path)] == [True, False, True, False]
    found = json.loads((tmp_path / "scored.summary.json").read_text())["refusal"]
    assert (found["threshold"], found["refused"], found["risk_of_kept"]) == (3.0, 2, 0.0)
    assert found["held_out"]["coverage"] == pytest.approx(4 / 6)
    assert (tmp_path / "scored.curve.csv").read_text().splitlines() == [
        "threshold,coverage,risk,kept", "5.0,0.166667,0.000000,1", "4.0,0.333333,0.000000,2", "3.0,0.666667,0.250000,4",
        "1.0,0.833333,0.400000,5",
    ]  # fmt: skip
    assert (tmp_path / "scored.curve.svg").read_text().startswith("<svg")
    assert judge(ROWS, "--risk", "0.2", "--held-out", held_out).code == 0
    assert json.loads((tmp_path / "scored.summary.json").read_text())["refusal"]["threshold"] == 4.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--risk", "0.1"), "--risk SHARE and --held-out FILE: the threshold is chosen by both; give both"),
        (("--held-out", "HELD"), "give both"),
        (("--risk", "1", "--held-out", "HELD"), "--risk 1: give a share of bad responses"),
        (("--risk", "0.1", "--held-out", "HELD", "--threshold", "2"), "leave out --threshold 2"),
        (("--threshold", "nan"), "--threshold nan: give a number of points"),
        (("--risk", "0.1", "--held-out", "nowhere.jsonl"), "--held-out=nowhere.jsonl: no such file or folder"),
        (
            ("--risk", "0.1", "--held-out", "HELD", "judge.template=buckets"),
            "scored by additive (text), and now buckets",
        ),
        (("--out", "responses.jsonl"), "--out responses.jsonl is a file that is read; give another one"),
        (("--mode", "pairwise", "--threshold", "2"), "--mode pairwise compares, and has no points to refuse by"),
        (("--mode", "meta", "--best"), "--mode meta compares judgements, and --best is a response"),
    ],
)
def test_choices_that_cannot_be(
    judge: Callable[..., Ended], held_out: Path, options: tuple[str, ...], said: str, engines: Answering
) -> None:
    ended = judge(ROWS, *(str(held_out) if option == "HELD" else option for option in options))
    assert ended.code == 2, ended
    assert said in ended.err
    assert engines.take() == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"points": NaN, "good": true}', "line 1: needs points, a finite number or null, and good, true or false"),
        ('{"points": 1, "good": 1}', "line 1: needs points"),
        ('{"good": true}', "line 1: needs points"),
        ('{"points": 1, "good": null}', "no line has points and says whether its response is good"),
        ('{"points": 1, "good": false}', "no threshold keeps the risk of HELD so low; the lowest is 1.000, at 1.0000"),
    ],
)
def test_held_out_files_that_are_wrong(
    judge: Callable[..., Ended], held_out: Path, row: str, said: str, engines: Answering
) -> None:
    held_out.write_text(row + "\n")
    ended = judge(ROWS, "--risk", "0.1", "--held-out", held_out)
    assert ended.code == 2, ended
    assert said.replace("HELD", str(held_out)) in ended.err
    assert engines.take() == []


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
    assert (row["id"], row["response"], row["points"], row["refused"]) == ("gin", "a", None, True)


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
        ({"id": "a", "prompt": "?", "response": "\ud800"}, "response 0 has half a surrogate pair"),
        ({"id": "a", "prompt": "?", "response": "x", "note": [math.nan]}, "note holds NaN or an infinite number"),
    ],
)
def test_lines_that_are_wrong(judge: Callable[..., Ended], row: dict[str, Any], said: str, engines: Answering) -> None:
    ended = judge([ROWS[1], row])
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert "line 2" in ended.err
    assert engines.take() == []


def test_a_line_that_is_not_utf8(judge: Callable[..., Ended], rsrlm: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "prompt": "?", "response": "x"}\n{"id": "b\xe9"}\n')
    ended = judge(ROWS, "--in", tmp_path / "latin.jsonl")
    assert (ended.code, "latin.jsonl, line 2: not UTF-8" in ended.err) == (2, True)


def test_a_file_with_nothing_in_it(judge: Callable[..., Ended]) -> None:
    assert "nothing in it; write one JSON object per line" in judge([]).err
