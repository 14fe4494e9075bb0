"""Prompts with all that was made for them, to be read: those worth a look first, within a budget of bytes."""

import difflib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rsrlm.report.page.headline import judge_in
from rsrlm.report.page.measured import columns
from rsrlm.report.page.past import number_of
from rsrlm.store import tables

EACH = 12  # prompts of an iteration that stand out in each way, and twice as many drawn from all
MOST_CHARS = 6000  # of one text
MOST_BYTES = 2_400_000  # of the samples of a page
DIFF_WORDS = 1500  # a longer pair of texts is shown without its differences

Found = dict[str, dict[str, float]]


def of_iteration(folder: Path, iteration: int, seed: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Prompts of an iteration with responses, judgements and the pairs that were chosen; and how many prompts it has.
    Each says how it stands out: `gap` between the best and the worst score, `unreadable` judgements, `chars` of the
    longest response, `spread` of the judgements of one response."""
    path = folder / "prompts.parquet"
    if not path.exists():
        return [], 0
    ids = columns(path, ["id"])[0]["id"].to_pylist()
    out = outstanding(folder)
    chosen = chosen_of(ids, out, random.Random(f"{seed}/{iteration}"))
    prompts = _of(path, "id", chosen)
    made = {
        name: _grouped(_of(folder / f"{name}.parquet", "prompt_id", chosen), "prompt_id")
        for name in ("responses", "judgements", "comparisons", "pairs")
    }
    found = [
        {
            "iteration": iteration,
            "id": prompt["id"],
            "prompt": clipped(prompt["text"]),
            **{way: values.get(prompt["id"]) for way, values in out.items()},
            **_shown({name: of_all.get(prompt["id"], []) for name, of_all in made.items()}),
        }
        for prompt in prompts
    ]
    return found, len(ids)


def outstanding(folder: Path) -> Found:
    """How much each prompt of an iteration stands out, in each way."""
    found: Found = {"gap": {}, "unreadable": {}, "chars": {}, "spread": {}}
    judged, _ = columns(folder / "judgements.parquet", ["prompt_id", "response_id", "role", "points"])
    judged = judged.filter(pc.equal(judged["role"], "judge")) if judged.num_rows else judged
    if judged.num_rows:
        unread = judged.filter(pc.is_null(judged["points"])).group_by("prompt_id").aggregate([("role", "count")])
        found["unreadable"] = _as_dict(unread, "role_count")
        mean = judged.group_by(["prompt_id", "response_id"]).aggregate([("points", "mean"), ("points", "stddev")])
        by_prompt = mean.group_by("prompt_id").aggregate(
            [("points_mean", "max"), ("points_mean", "min"), ("points_stddev", "max")]
        )
        gap = pc.subtract(by_prompt["points_mean_max"], by_prompt["points_mean_min"])
        found["gap"] = _as_dict(by_prompt.append_column("gap", gap), "gap")
        found["spread"] = _as_dict(by_prompt, "points_stddev_max")
    for name, chars in _lengths(folder / "responses.parquet"):
        found["chars"][name] = max(chars, found["chars"].get(name, 0))
    return found


def _lengths(path: Path) -> Iterator[tuple[str, int]]:
    """Prompt and characters of each response; the texts are held for a moment only."""
    if not path.exists():
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(4096, columns=["prompt_id", "text"]):
            yield from zip(batch["prompt_id"].to_pylist(), pc.utf8_length(batch["text"]).to_pylist(), strict=True)


def _as_dict(table: pa.Table, value: str) -> dict[str, float]:
    pairs = zip(table["prompt_id"].to_pylist(), table[value].to_pylist(), strict=True)
    return {name: found for name, found in pairs if number_of(found) is not None}


def chosen_of(ids: Sequence[str], out: Found, rng: random.Random) -> list[str]:
    """The ids that stand out most in each way, and some drawn from all."""
    most = [
        name
        for values in out.values()
        for name, value in sorted(values.items(), key=lambda item: (-item[1], item[0]))[:EACH]
        if value > 0
    ]
    drawn = rng.sample([*ids], min(2 * EACH, len(ids)))
    return list(dict.fromkeys([*drawn, *most]))


def _of(path: Path, key: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """The rows whose `key` is among those wanted, without token ids."""
    if not path.exists():
        return []
    ids, found = pa.array(wanted, pa.string()), []
    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if not name.endswith("token_ids") and name != "sampling"]
        for batch in file.iter_batches(4096, columns=names):
            found += batch.filter(pc.is_in(batch[key], ids)).to_pylist()
    return found


def _grouped(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _shown(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What a page shows of a prompt: responses, best first, each with its judgements, and the pairs."""
    judged = _grouped(made["judgements"], "response_id")
    pairs = [one for one in made["pairs"] if one["kind"] != "judge"]
    taken = {one[f"{side}_id"]: side for one in pairs for side in ("rejected", "chosen")}
    responses = [
        {
            "id": one["id"],
            "text": clipped(one["text"]),
            "chars": len(one["text"]),
            "thought": clipped(one.get("thought") or ""),
            "role": one["role"],
            "finish": one["finish_reason"],
            "model": one["weight_version"],
            "score": score_of(judged.get(one["id"], [])),
            "side": taken.get(one["id"], ""),
            "judgements": [_judgement(each) for each in judged.get(one["id"], [])],
        }
        for one in made["responses"]
    ]
    responses.sort(key=lambda one: (one["score"] is None, -(one["score"] or 0.0), one["id"]))
    return {
        "responses": responses,
        "comparisons": [{"id": one["id"], **_judgement(one)} for one in made["comparisons"]],
        "pairs": [
            {
                "chosen": one["chosen_id"],
                "rejected": one["rejected_id"],
                "kind": one["kind"],
                "gap": number_of(_less(one["chosen_score"], one["rejected_score"])),
            }
            for one in made["pairs"]
        ],
    }


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _judgement(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "judge": one["judge"],
        "model": one["weight_version"],
        "points": number_of(one["points"]),
        "unreadable": one["unparsed"] or "",
        "text": clipped(one["text"]),
    }


def score_of(judged: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean of the readable points."""
    points = [value for one in judged if (value := number_of(one["points"])) is not None]
    return sum(points) / len(points) if points else None


def clipped(text: str) -> str:
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} [... {len(text) - MOST_CHARS} more characters]"


def heldout(folder: Path, models: Sequence[str], most: int = 60) -> list[dict[str, Any]]:
    """Held-out prompts with each model's answer, its score by each judge, and how it differs from the first model's."""
    answers = {model: _answers(folder / "heldout" / model, most) for model in models}
    first = next(iter(answers.values()), {})
    return [
        {
            "id": name,
            "prompt": clipped(str(row["prompt"])),
            "answers": [
                {
                    **{key: of_all[name][key] for key in ("text", "finish", "scores")},
                    "model": model,
                    "diff": difference(row["text"], of_all[name]["text"]) if model != models[0] else None,
                }
                for model, of_all in answers.items()
                if name in of_all
            ],
        }
        for name, row in first.items()
    ]


def _answers(folder: Path, most: int) -> dict[str, dict[str, Any]]:
    path = folder / "prompts.parquet"
    if not path.exists():
        return {}
    prompts = {row["id"]: row["text"] for row, _ in zip(tables.rows(path), range(most), strict=False)}
    judged = _grouped(_of(folder / "judgements.parquet", "prompt_id", [*prompts]), "prompt_id")
    found = {}
    for row in _of(folder / "responses.parquet", "prompt_id", [*prompts]):
        by_judge = _grouped(({**one, "by": judge_in(one["id"])} for one in judged.get(row["prompt_id"], [])), "by")
        found[row["prompt_id"]] = {
            "prompt": prompts[row["prompt_id"]],
            "text": clipped(row["text"]),
            "finish": row["finish_reason"],
            "scores": {judge: score_of(given) for judge, given in by_judge.items()},
        }
    return found


def difference(before: str, after: str) -> list[tuple[str, str]] | None:
    """Pieces of both texts in order: " " in both, "-" in the first alone, "+" in the second; None for long ones."""
    old, new = (re.findall(r"\s+|\S+", text) for text in (before, after))
    if len(old) + len(new) > 2 * DIFF_WORDS:
        return None
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append((" ", "".join(old[a:b])))
            continue
        found += [("-", "".join(old[a:b]))] * (b > a) + [("+", "".join(new[c:d]))] * (d > c)
    return found


def within(samples: Sequence[dict[str, Any]], budget: int = MOST_BYTES) -> list[dict[str, Any]]:
    """As many as fit the budget, taken from all iterations in turn."""
    turn: dict[int, int] = {}
    for one in samples:
        one["_turn"] = turn[one["iteration"]] = turn.get(one["iteration"], -1) + 1
    kept, size = [], 0
    for one in sorted(samples, key=lambda one: (one["_turn"], one["iteration"])):
        more = len(json.dumps(one))
        if size + more <= budget:  # else it is passed over: a smaller one may fit
            size += more
            kept.append(one)
    kept.sort(key=lambda one: (one["iteration"], one["_turn"]))
    for one in samples:
        del one["_turn"]
    return kept


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no name for."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
