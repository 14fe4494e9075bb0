"""Open Assistant's trees and flat messages."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from ranked_files import TREES, as_sets, flattened, message, ranks, real, tree, written

from rsrlm.data.ranked import ift_examples, read
from rsrlm.settings.base import ConfigError


def test_open_assistant_trees() -> None:
    trees = [json.loads(line) for line in real(TREES).open(encoding="utf-8")]
    result = read(str(TREES))
    assert result.counts == {
        "deeper turns ignored": len(flattened(trees)) - 70 - 236,
        "prompts kept": 70,
        "prompts read": 70,
        "replies kept": 236,
        "replies kept: synthetic": 13,
        "replies kept: without rank": 3,
        "replies read": 236,
    }
    examples, counts = ift_examples(result.prompts)
    # One tree has replies that nobody ranked.
    assert counts == {"examples": 69, "left out: no ranked reply": 1}
    best = {
        (one["message_tree_id"], reply["text"])
        for one in trees
        for reply in one["prompt"]["replies"]
        if reply.get("rank") == 0
    }
    assert {(prompt.id, reply.text) for prompt, reply in examples} == best


def test_compressed_and_flat_files_and_folders_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = real(TREES).read_bytes()
    trees = [json.loads(line) for line in data.splitlines()]
    rows = flattened(trees)
    random.Random(0).shuffle(rows)  # replies before their questions
    expected = read(str(TREES))
    (tmp_path / "trees.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "trees.json").write_text(json.dumps(trees, indent=1), encoding="utf-8")
    assert read(str(tmp_path / "trees.jsonl.gz")) == expected
    assert read(str(tmp_path / "trees.json")) == expected
    flat = read(written(tmp_path, *rows, name="flat.jsonl"))
    assert as_sets(flat) == as_sets(expected)
    assert flat.counts == expected.counts

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list([{"rank": None} | row for row in rows]).to_parquet(tmp_path / "hub/train-0.parquet")
    assert as_sets(read(str(tmp_path / "hub"))) == as_sets(expected)
    datasets.Dataset.from_list([row | {"lang": 1} for row in rows]).to_parquet(tmp_path / "hub/train-0.parquet")
    with pytest.raises(ConfigError, match=r"hub, row 1: lang must be a text"):
        read(str(tmp_path / "hub"))


def test_flat_messages_without_a_root(tmp_path: Path) -> None:
    def row(identifier: str, parent: str | None, **more: Any) -> dict[str, Any]:
        role = "prompter" if parent is None else "assistant"
        return message(identifier, role, parent_id=parent, message_tree_id="t") | more

    rows = [
        row("r1", "t"),
        row("lost", "nowhere"),
        row("c1", "c2"),  # a circle
        row("c2", "c1"),
        row("me", "me"),
        row("deep", "r1"),
        row("deeper", "deep"),
        row("t", None, rank=None),
        row("r1", "t", text="again"),
    ]
    result = read(written(tmp_path, *rows))
    assert [(prompt.id, ranks(prompt)) for prompt in result.prompts] == [("t", [("text of r1", None)])]
    assert result.counts["messages ignored: no root"] == 4
    assert result.counts["messages ignored: duplicate id"] == 1
    assert result.counts["deeper turns ignored"] == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", 1),
        ("role", None),
        ("message_id", None),
        ("rank", "0"),
        ("deleted", "yes"),
        ("review_result", 1),
        ("lang", ["en"]),
        ("replies", "none"),
        ("replies", [3]),
    ],
)
def test_wrong_types_in_a_tree(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"line 2: .*{field}|line 2: replies must be a list of messages"):
        read(written(tmp_path, tree("a", message("r")), tree("b", message("s") | {field: value})))


def test_long_conversations_are_no_deep_recursion(tmp_path: Path) -> None:
    """Trees nest as deep as JSON can be read; flat messages have no such limit."""
    rows = [message("m0", "prompter", parent_id=None, message_tree_id="m0")]
    rows += [message(f"m{n}", parent_id=f"m{n - 1}", message_tree_id="m0") for n in range(1, 5000)]
    assert read(written(tmp_path, *rows)).counts["deeper turns ignored"] == 4998
