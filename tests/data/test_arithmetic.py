"""Problems by seed: right answers, no question twice, and the project's own file as it was made."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsrlm.data import prompts
from rsrlm.data.arithmetic import FILE, Level, file_rows, problems
from rsrlm.records import Prompt, wording
from rsrlm.settings.methods import Prompts

LEVELS: tuple[Level, ...] = (1, 2, 3)


def worked_out(text: str) -> int:
    """The answer to a question, by other means."""
    if sum_of := re.fullmatch(r"What is (\d+) ([+*-]) (\d+)(?: - (\d+))?\? Show the calculation in one line\.", text):
        a, sign, b, less = sum_of.groups()
        total = {"+": int(a) + int(b), "*": int(a) * int(b), "-": int(a) - int(b)}[sign]
        return total - int(less or 0)
    bags, each, given, *_ = map(int, re.findall(r"\d+", text))
    return bags * each - given


@given(st.sampled_from(LEVELS), st.integers(0, 1000))
def test_answers_are_right(level: Level, seed: int) -> None:
    for problem in problems(level, 20, seed):
        assert int(problem.data["answer"]) == worked_out(problem.text)
        assert problem.data["level"] == str(level)
        calculation, _, result = problem.data["reference"].partition(" = ")
        assert (eval(calculation), result) == (worked_out(problem.text), problem.data["answer"])


@pytest.mark.parametrize("level", LEVELS)
def test_no_problem_comes_twice(level: Level) -> None:
    found = problems(level, 150, 3)
    assert len({problem.id for problem in found}) == len({wording(problem.text) for problem in found}) == 150
    assert found[:20] == problems(level, 20, 3)
    assert found != problems(level, 150, 4)


def test_a_level_has_so_many_and_no_more() -> None:
    with pytest.raises(ValueError, match=r"level 1 has 1\d\d different problems, fewer than 1000"):
        problems(1, 1000, 0)


def test_another_ending() -> None:
    (one,) = problems(1, 1, 0, ending='End with "Final answer: ".')
    assert re.fullmatch(r'What is \d+ [+*-] \d+\? End with "Final answer: "\.', one.text)


def test_the_file_of_the_project() -> None:
    path = prompts.file_of(Prompts(path="arithmetic", per_iteration=1))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == file_rows()
    found = prompts.read(path)
    assert len(found) == len(prompts.distinct(found)[0]) == sum(FILE.values())
    assert found[0] == problems(1, 1, 0)[0]


def test_what_else_a_line_holds_is_data(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    row = {"id": "a", "prompt": "?", "answer": 7, "solution": "3 + 4", "share": 0.5, "kept": True, "tags": ["x"]}
    path.write_text(json.dumps(row) + "\n")
    data = {"answer": "7", "solution": "3 + 4", "share": "0.5", "kept": "true", "tags": '["x"]'}
    assert prompts.read(path) == [Prompt(id="a", text="?", data=data)]
