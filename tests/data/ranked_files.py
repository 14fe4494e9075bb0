"""Ranked data for tests: files of it, and what was read of them in a form that is easy to compare."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rsrlm.data.ranked import RankedData, RankedPrompt, Reply

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TREES = DATA / "openassistant_en_70_trees.jsonl"
ALPACA = DATA / "alpaca_eval_gpt4_preferences_phi2sft.jsonl"


def real(path: Path) -> Path:
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def written(folder: Path, *records: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def message(identifier: str, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"message_id": identifier, "role": role, "text": f"text of {identifier}", **more}


def tree(identifier: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    prompt = message(identifier, "prompter", **more) | {"replies": list(replies)}
    return {"message_tree_id": identifier, "prompt": prompt}


def flattened(trees: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows, waiting = [], [(one["prompt"], None, one["message_tree_id"]) for one in trees]
    while waiting:
        node, parent, root = waiting.pop()
        own = {name: value for name, value in node.items() if name != "replies"}
        rows.append(own | {"parent_id": parent, "message_tree_id": root})
        waiting += [(reply, node["message_id"], root) for reply in node.get("replies", [])]
    return rows


def as_sets(result: RankedData) -> dict[str, tuple[str, frozenset[Reply]]]:
    return {prompt.id: (prompt.text, frozenset(prompt.replies)) for prompt in result.prompts}


def ranks(prompt: RankedPrompt) -> list[tuple[str, float | None]]:
    return [(reply.text, reply.rank) for reply in prompt.replies]


def balanced(counts: Mapping[str, int]) -> bool:
    def dropped(what: str) -> int:
        return sum(number for reason, number in counts.items() if reason.startswith(f"{what} dropped"))

    return counts["prompts read"] == counts["prompts kept"] + dropped("prompt") and (
        counts["replies read"] == counts["replies kept"] + dropped("reply")
    )


def prompt_of(*ranked_as: float | None, name: str = "p") -> RankedPrompt:
    """Replies are called a, b, c ..."""
    replies = [Reply(id=chr(97 + n), text=f"reply {n}", rank=rank) for n, rank in enumerate(ranked_as)]
    return RankedPrompt(id=name, text="Q?", replies=tuple(replies))
