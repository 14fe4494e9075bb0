"""Files of responses: the forms of a line, and what is wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsrlm.data.responses import AnsweredLines, GivenJudgement, GivenResponse, responses
from rsrlm.settings.base import ConfigError


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., AnsweredLines]:
    def read(*rows: dict[str, Any]) -> AnsweredLines:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return responses(str(path))

    return read


TEA = {"id": "tea", "prompt": "Why tea?"}


def test_one_response_and_several(lines: Callable[..., AnsweredLines]) -> None:
    found = lines(
        {**TEA, "response": "a", "finish_reason": "length", "thought": "hm", "good": True, "source": {"at": 1}},
        {"id": "ale", "prompt": "Why ale?", "responses": ["b", "c"], "finish_reasons": ["stop", None]},
    )
    one, two = found
    assert (one.number, one.prompt.id, one.prompt.data) == (0, "tea", {"source": '{"at": 1}'})
    assert one.carried == {"source": {"at": 1}}
    assert one.candidates == (GivenResponse(index=0, text="a", good=True, finish_reason="length", thought="hm"),)
    assert two.candidates == (GivenResponse(index=0, text="b", finish_reason="stop"), GivenResponse(index=1, text="c"))
    assert (len(found), dict(found.sizes)) == (2, {(0,): 1, (0, 0): 1})
    assert [one.number for one in found] == [0, 1]  # again, from the file


def test_lines_of_one_prompt_that_stand_together(lines: Callable[..., AnsweredLines]) -> None:
    """As `rsrlm judge` writes them: what it says of a response goes neither on nor to another judge."""
    judged = {"points": 3.0, "variance": 0.5, "unreadable": None, "refused": False, "judge": "j", "judge_model": "m"}
    found = lines(
        {**TEA, **judged, "index": 2, "response": "a", "judgements": [{"text": "x", "points": 1}, "y"]},
        {**TEA, **judged, "index": 5, "response": "b", "judgements": [{"text": "x", "points": None}]},
        {"id": "ale", "prompt": "Why ale?", "index": 0, "response": "c"},
    )
    tea, ale = found
    assert [(one.index, one.text) for one in tea.candidates] == [(2, "a"), (5, "b")]
    assert (tea.carried, dict(tea.prompt.data)) == ({}, {})
    assert tea.candidates[0].judgements == (GivenJudgement(text="x", points=1), GivenJudgement(text="y"))
    assert [one.readable for response in tea.candidates for one in response.judgements] == [True, True, False]
    assert (ale.number, ale.prompt.id, len(found)) == (1, "ale", 2)
    assert dict(found.sizes) == {(2, 1): 1, (0,): 1}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**TEA, "index": 0, "response": "a"}] * 2, "line 2: id 'tea' has index 0 twice"),
        (
            [{**TEA, "index": 0, "response": "a"}, {**TEA, "prompt": "?", "index": 1, "response": "a"}],
            "line 2: id 'tea' has another prompt than in the line before",
        ),
        (
            [{**TEA, "index": 0, "response": "a"}, {"id": "b", "prompt": "?", "response": "a"},
             {**TEA, "index": 1, "response": "a"}],
            "line 3: id 'tea' comes twice",
        ),
        ([{**TEA, "index": -1, "response": "a"}], "line 1: index=-1 must be the number of one response"),
        ([{**TEA, "index": 1, "responses": ["a"]}], "line 1: index=1 must be the number of one response"),
        ([{**TEA, "responses": ["a", "b"], "thoughts": ["x"]}], "thoughts must be a list, an entry for each of 2"),
        ([{**TEA, "response": "a", "thought": 1}], "a thought must be a text"),
        ([{**TEA, "response": "a", "finish_reason": "end"}], "finish_reason='end' must be stop, length (cut)"),
        ([{**TEA, "response": "a", "judgements": "x"}], "judgements must be a list of texts, or of objects"),
        ([{**TEA, "response": "a", "judgements": [{"points": 1}]}], "judgements must be a list of texts"),
        ([{**TEA, "response": "a", "judgements": [{"text": "x", "points": "1"}]}], "points='1' of a judgement must be"),
        ([{**TEA, "response": "a", "judgements": [{"text": "x", "points": True}]}], "points=True of a judgement"),
    ],
)  # fmt: skip
def test_lines_that_are_wrong(lines: Callable[..., AnsweredLines], rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        lines(*rows)
    assert said in str(error.value)
    assert str(error.value).startswith("--in=")
