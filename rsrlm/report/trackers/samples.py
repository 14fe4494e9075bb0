"""Some prompts of an iteration with what was answered, how it was judged and what was chosen, for people to read."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rsrlm.records import group_id
from rsrlm.store import tables

PROMPTS = 8  # of an iteration
CHARS = 4000  # of a text
COLUMNS = ("iteration", "prompt_id", "prompt", "response", "text", "score", "used", "judgement")
FILES = ("prompts", "responses", "judgements", "pairs")


def samples_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    """A row of COLUMNS for each response to a few prompts, those of pairs first. None where files are gone or damaged.

    `score` is the mean of what could be read, `used` "chosen" or "rejected" where a pair has the response, and
    `judgement` the text of the first one.
    """
    try:
        return _samples({name: folder / f"{name}.parquet" for name in FILES}, iteration)
    except (OSError, ValueError):
        return []


def _samples(files: Mapping[str, Path], iteration: int) -> list[dict[str, Any]]:
    own = group_id(iteration, "")  # pairs of earlier iterations may be trained on again
    pairs = (row for row in tables.rows(files["pairs"]) if row["kind"] == "actor" and row["id"].startswith(own))
    wanted = first(
        chain((row["prompt_id"] for row in pairs), (row["id"] for row in tables.rows(files["prompts"]))), PROMPTS
    )
    if not wanted:  # an iteration that answers no prompts
        return []
    prompts = {row["id"]: row["text"] for row in _read(files["prompts"], "id", wanted, "id text")}
    used: dict[str, str] = {}
    for row in _read(files["pairs"], "prompt_id", wanted, "prompt_id kind chosen_id rejected_id"):
        if row["kind"] == "actor":
            used |= {row["chosen_id"]: "chosen", row["rejected_id"]: "rejected"}
    judged: dict[str, list[dict[str, Any]]] = {}
    for row in _read(files["judgements"], "prompt_id", wanted, "prompt_id response_id role text points"):
        judged.setdefault(row["response_id"], []).append(row)
    rows = [
        _row(iteration, prompts[row["prompt_id"]], row, judged.get(row["id"], []), used.get(row["id"], ""))
        for row in _read(files["responses"], "prompt_id", wanted, "prompt_id id role text")
        if row["role"] == "actor"
    ]
    return sorted(rows, key=lambda row: wanted.index(row["prompt_id"]))


def first(ids: Iterable[str], number: int) -> list[str]:
    """So many different ones; no more of them are looked at."""
    found: dict[str, None] = {}
    for one in ids:
        if len(found) == number:
            break
        found[one] = None
    return list(found)


def _read(file: Path, key: str, values: list[str], columns: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(
        file, columns=columns.split(), filters=[(key, "in", values)]
    ).to_pylist()
    return found


def _row(
    iteration: int, prompt: str, response: dict[str, Any], judgements: list[dict[str, Any]], used: str
) -> dict[str, Any]:
    points = [one["points"] for one in judgements if one["points"] is not None]
    return {
        "iteration": iteration,
        "prompt_id": response["prompt_id"],
        "prompt": prompt[:CHARS],
        "response": response["id"],
        "text": response["text"][:CHARS],
        "score": sum(points) / len(points) if points else None,
        "used": used,
        "judgement": judgements[0]["text"][:CHARS] if judgements else "",
    }
