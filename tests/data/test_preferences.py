"""Flat preference data: AlpacaEval's, pairs, scored responses."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranked_files import ALPACA, balanced, real, written

from rsrlm.data.ranked import read


def test_alpaca_eval_preferences() -> None:
    result = read(str(real(ALPACA)))
    rows = [json.loads(line) for line in ALPACA.open(encoding="utf-8")]
    assert result.counts == {
        "prompts kept": 805,
        "prompts read": 805,
        "replies kept": 1610,
        "replies kept: without rank": 2,
        "replies read": 1610,
    }
    first = sum(prompt.replies[0].rank == 0 for prompt in result.prompts)
    second = sum(prompt.replies[1].rank == 0 for prompt in result.prompts)
    assert (first, second) == (253, 551)  # and one preference is null
    assert [prompt.text for prompt in result.prompts] == [row["instruction"] for row in rows]
    assert result.prompts[0].replies[0].text == rows[0]["output_1"]


def test_scores_become_ranks_with_ties(tmp_path: Path) -> None:
    scores = [3, 5.0, None, 3.0, 1, 5]
    responses = [{"text": f"r{number}", "score": score} for number, score in enumerate(scores)]
    result = read(written(tmp_path, {"prompt": "Q?", "responses": responses}))
    assert [reply.rank for reply in result.prompts[0].replies] == [1.0, 0.0, None, 1.0, 2.0, 0.0]
    assert result.counts["replies kept: without rank"] == 1


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        (1, (0, 1)),
        (2, (1, 0)),
        (1.5, (0, 0)),
        (0, (0, 0)),
        (1.51, (1, 0)),
        (None, (None, None)),
        (float("nan"), (None, None)),
    ],
)
def test_preferences(tmp_path: Path, preference: float | None, expected: object) -> None:
    row = {"instruction": "Q?", "output_1": "one", "output_2": "two", "preference": preference}
    (prompt,) = read(written(tmp_path, row)).prompts
    assert tuple(reply.rank for reply in prompt.replies) == expected


def test_a_task_keeps_its_material(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "input": "Tea is hot.", "chosen": "a", "rejected": "b"}
    assert read(written(tmp_path, row)).prompts[0].text == "Sum up.\n\nTea is hot."


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {
                "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}],
                "chosen": "a",
                "rejected": "b",
            },
            "prompt dropped: not one question and its answer",
        ),
        ({"conversations": [], "chosen": "a", "rejected": "b"}, "prompt dropped: not one question and its answer"),
        (
            {"prompt": "Q?", "chosen": "a", "rejected": [{"role": "tool", "content": "b"}]},
            "reply dropped: not one question and its answer",
        ),
        ({"prompt": "Q?", "chosen": "a", "rejected": []}, "reply dropped: not one question and its answer"),
        (
            {
                "prompt": "Q?",
                "chosen": "a",
                "rejected": [{"role": "user", "content": "R?"}, {"role": "assistant", "content": "b"}],
            },
            "prompt dropped: replies to different questions",
        ),
        ({"prompt": "Q?", "chosen": "a", "rejected": None}, "reply dropped: empty text"),
        ({"prompt": "Q?", "chosen": "a", "rejected": "a"}, "reply dropped: duplicate id"),
        (
            {
                "prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Q?"}],
                "chosen": "a",
                "rejected": "b",
            },
            "system messages ignored",
        ),
        ({"question": "Q?", "system": "Be.", "chosen": "a", "rejected": "b"}, "system messages ignored"),
    ],
)
def test_other_turns_are_counted(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    counts = read(written(tmp_path, record)).counts
    assert counts[reason] == 1
    assert balanced(counts)
