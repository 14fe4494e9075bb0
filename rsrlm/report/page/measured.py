"""What the tables of an iteration come to, by columns: texts and token ids stay on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MOST_ROWS = 400_000  # of a table; beyond it, row groups spread over the table stand for the whole
NONE: Numbers = np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One iteration. `scores` are the mean points of each response with a readable one, `spread` the standard deviation
    between the judgements of a response, mean over those with two readable ones or more. Of `chosen` and `rejected`
    there is an entry for each pair of responses: points and characters. `first_wins` is the share of decided
    comparisons that the text shown first wins, `orders_agree` that of those made in both orders whose orders name the
    same winner, two ties aside; each with its n."""

    scores: Numbers = field(default_factory=lambda: NONE)
    spread: float | None = None
    judgements_each: float | None = None
    chosen: dict[str, Numbers] = field(default_factory=dict)
    rejected: dict[str, Numbers] = field(default_factory=dict)
    first_wins: tuple[float | None, int] = (None, 0)
    orders_agree: tuple[float | None, int] = (None, 0)
    parts: bool = False  # whether tables were longer than MOST_ROWS


def measured(folder: Path) -> Measured:
    """Of the folder of an iteration; what has no table is empty. Raises OSError or pa.ArrowInvalid for a broken one."""
    judged, some = columns(folder / "judgements.parquet", ["response_id", "role", "points"])
    judged = judged.filter(pc.equal(judged["role"], "judge")) if judged.num_rows else judged
    answers, _ = columns(folder / "responses.parquet", ["id", "role"])
    if answers.num_rows and judged.num_rows:  # other judgements are of beginnings of answers
        answers = answers.filter(pc.equal(answers["role"], "actor"))
        judged = judged.filter(pc.is_in(judged["response_id"], answers["id"].combine_chunks()))
    readable = judged.filter(_finite(judged["points"])) if judged.num_rows else judged
    found: dict[str, Any] = {"parts": some}
    if judged.num_rows:
        found["judgements_each"] = judged.num_rows / pc.count_distinct(judged["response_id"]).as_py()
    if readable.num_rows:
        of_one = readable.group_by("response_id").aggregate([("points", "mean"), ("points", "stddev")])
        count = readable.group_by("response_id").aggregate([("points", "count")])["points_count"].to_numpy()
        found["scores"] = of_one["points_mean"].to_numpy()
        if (several := count > 1).any():
            found["spread"] = float(of_one["points_stddev"].to_numpy()[several].mean())
    pairs, some_pairs = columns(
        folder / "pairs.parquet", ["kind", "chosen_id", "rejected_id", "chosen_score", "rejected_score"]
    )
    pairs = pairs.filter(pc.equal(pairs["kind"], "actor")) if pairs.num_rows else pairs
    if pairs.num_rows:
        chars = _chars(
            folder / "responses.parquet", [*pairs["chosen_id"].to_pylist(), *pairs["rejected_id"].to_pylist()]
        )
        for side in ("chosen", "rejected"):
            lengths = np.array([chars.get(name, np.nan) for name in pairs[f"{side}_id"].to_pylist()], dtype=float)
            found[side] = {"points": pairs[f"{side}_score"].to_numpy(), "characters": lengths}
    compared, some_compared = columns(folder / "comparisons.parquet", ["id", "points"])
    first_wins, orders_agree = _positions(compared)
    parts = some or some_pairs or some_compared
    return Measured(**{**found, "parts": parts}, first_wins=first_wins, orders_agree=orders_agree)


def columns(path: Path, names: Sequence[str]) -> tuple[pa.Table, bool]:
    """These columns of a Parquet file, and whether they are of a part of its rows; none where there is no file."""
    if not path.exists():
        return pa.table({name: pa.array([], pa.string()) for name in names}), False
    with pq.ParquetFile(path) as file:
        rows, groups = file.metadata.num_rows, file.metadata.num_row_groups
        kept = max(1, round(groups * min(1.0, MOST_ROWS / max(rows, 1))))
        chosen = [*range(groups)] if kept >= groups else [*np.linspace(0, groups - 1, kept).astype(int).tolist()]
        if not chosen:
            return file.schema_arrow.empty_table().select(names), False
        table = file.read_row_groups(chosen, columns=[*names])
    return table.slice(0, MOST_ROWS), table.num_rows > MOST_ROWS or kept < groups


def _finite(points: Any) -> Any:
    return pc.fill_null(pc.is_finite(points), False)


def _chars(path: Path, wanted: Sequence[str]) -> dict[str, int]:
    """Characters of the responses with these ids."""
    found: dict[str, int] = {}
    if not path.exists():
        return found
    ids = pa.array(sorted(set(wanted)), pa.string())
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(8192, columns=["id", "text"]):
            few = batch.filter(pc.is_in(batch["id"], ids))
            lengths = pc.utf8_length(few["text"])
            found |= dict(zip(few["id"].to_pylist(), lengths.to_pylist(), strict=True))
    return found


def _positions(compared: pa.Table) -> tuple[tuple[float | None, int], tuple[float | None, int]]:
    """Share of the decided comparisons that the text shown first wins; share of those in both orders that agree."""
    decided = first = 0
    by_two: dict[tuple[str, ...], list[str]] = {}
    for name, points in zip(compared["id"].to_pylist(), compared["points"].to_pylist(), strict=True):
        if points is None:
            continue
        winner = "first" if points > 0.5 else "second" if points < 0.5 else ""
        decided += bool(winner)
        first += winner == "first"
        if shown := shown_in(name):
            won = {"first": shown[0], "second": shown[1], "": ""}[winner]
            by_two.setdefault(tuple(sorted(shown)), []).append(won)
    both = [won for won in by_two.values() if len(won) == 2 and any(won)]
    agree = sum(won[0] == won[1] for won in both)
    return (first / decided if decided else None, decided), (agree / len(both) if both else None, len(both))


def shown_in(name: str) -> tuple[str, str] | None:
    """What the comparison of this id shows, first and second: `00/tea/2#1~0` judgements 1 and 0 of response 2,
    `M1/tea/0>M0/tea/0@M0` the answers of M1 and M0."""
    if "~" in name:
        first, _, second = name.rpartition("~")
        slash = first.rfind("/")  # behind it stand numbers: 2, 2#1, or s1.0 of a step
        at = max(slash, first.rfind("#", slash + 1), first.rfind(".", slash + 1))
        return (first, first[: at + 1] + second) if at >= 0 else None
    if ">" in name:
        first, _, second = name.partition(">")
        return first, second.rpartition("@")[0] or second
    return None
