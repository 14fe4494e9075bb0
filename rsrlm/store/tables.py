"""Records as Parquet files that `datasets.load_dataset` reads, written as a stream."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import accumulate, islice
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rsrlm.records import Group, Judgement, Preferred, Sampling, Scored
from rsrlm.store.atomic import sync_path
from rsrlm.store.buffer import ids_of

BATCH = 256  # records that are converted at once, under the GIL: some 2 ms
ROW_GROUP_BYTES = 32 << 20  # held in memory until they are written

_TOKENS = pa.list_(pa.int32())
_STRINGS = pa.list_(pa.string())
_SAMPLING = pa.struct(
    [
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_tokens", pa.int64()),
        ("seed", pa.int64()),
        ("stop", _STRINGS),
    ]
)
# Columns of few different texts: they are stored once in each row group.
_REPEATED = ["role", "judge", "finish_reason", "weight_version", "unparsed", "kind"]


def _schema(text: str, **others: pa.DataType) -> pa.Schema:
    return pa.schema([*((name, pa.string()) for name in text.split()), *others.items()])


SCHEMAS: dict[str, pa.Schema] = {
    "prompts": _schema("id text"),
    "responses": _schema(
        "id prompt_id role text thought finish_reason weight_version",
        index=pa.int64(),
        token_ids=_TOKENS,
        prompt_token_ids=_TOKENS,
        sampling=_SAMPLING,
    ),
    "judgements": _schema(
        "id prompt_id response_id role judge text finish_reason weight_version unparsed",
        index=pa.int64(),
        token_ids=_TOKENS,
        sampling=_SAMPLING,
        points=pa.float64(),
        variance=pa.float64(),
    ),
    "examples": _schema("id kind", prompt_token_ids=_TOKENS, target_token_ids=_TOKENS),
    "pairs": _schema(
        "id prompt_id kind chosen_id rejected_id weight_version",
        prompt_token_ids=_TOKENS,
        chosen_token_ids=_TOKENS,
        rejected_token_ids=_TOKENS,
        chosen_score=pa.float64(),
        rejected_score=pa.float64(),
        weight=pa.float64(),
        target=pa.float64(),
    ),
}
SCHEMAS["comparisons"] = SCHEMAS["judgements"]


class TableWriter:
    """The Parquet file of one kind of records (a key of SCHEMAS), in the order in which they are added.

    Memory holds one row group, whatever the number of records. The file appears under its name, whole and on disk,
    when the `with` block ends; after an exception it does not.

    For threads beside an event loop: the GIL is held for a few milliseconds at a time.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._schema = path, SCHEMAS[kind]
        self._scratch = path.with_name(f".{path.name}.tmp")
        self._records: list[Any] = []
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        repeated = [name for name in _REPEATED if name in self._schema.names]
        self._writer = pq.ParquetWriter(
            str(self._scratch), self._schema, compression="zstd", use_dictionary=repeated or False
        )

    def add(self, records: Iterable[Any]) -> None:
        """Append records of this kind. Raises OSError (a full disk)."""
        source = iter(records)
        while more := list(islice(source, BATCH - len(self._records))):
            self._records += more
            if len(self._records) == BATCH:
                self._convert()

    def _convert(self) -> None:
        batch = batch_of(self._records, self._schema)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        self._records = []
        if self._bytes >= ROW_GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, self._schema))
        self._batches, self._bytes = [], 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._convert()
                self._write()
                self._writer.close()
                sync_path(self._scratch)
                self._scratch.replace(self._path)
        finally:
            self._writer.close()
            self._scratch.unlink(missing_ok=True)


def batch_of(records: Sequence[Any], schema: pa.Schema) -> pa.RecordBatch:
    """The records as columns; the verdict of a judgement is spread over three of them."""
    return pa.record_batch([_column(records, field) for field in schema], schema=schema)


def _column(records: Sequence[Any], field: pa.Field) -> pa.Array:
    get = _VERDICT.get(field.name) or attrgetter(field.name)
    values = [get(record) for record in records]
    if field.type == _TOKENS:
        return tokens_column(values)
    if field.type == _SAMPLING:
        return _sampling_column(values)
    return pa.array(values, field.type)


def tokens_column(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of int32. `struct` packs a tuple of integers in half the time of pyarrow."""
    packed, last, ids = b"", None, []
    for row in rows:
        if row is not last:  # the responses of a group share one prompt
            packed, last = struct.pack(f"={len(row)}i", *row), row
        ids.append(packed)
    offsets = np.fromiter(accumulate(map(len, rows), initial=0), np.int32, len(rows) + 1)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.frombuffer(b"".join(ids), np.int32)))


def _sampling_column(values: Sequence[Sampling | None]) -> pa.StructArray:
    columns = [
        pa.array([None if value is None else getattr(value, field.name) for value in values], field.type)
        for field in _SAMPLING
    ]
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.StructArray.from_arrays(columns, fields=list(_SAMPLING), mask=missing)


def _verdict(judgement: Judgement) -> tuple[float | None, float | None, str | None]:
    """Points, variance, and the reason why there are none."""
    verdict = judgement.verdict
    if isinstance(verdict, Preferred):  # the share that the text shown first wins
        return verdict.first, None, None
    if isinstance(verdict, Scored):
        return verdict.points, verdict.variance, None
    return None, None, verdict.reason


_VERDICT: dict[str, Callable[[Judgement], Any]] = {
    "points": lambda judgement: _verdict(judgement)[0],
    "variance": lambda judgement: _verdict(judgement)[1],
    "unparsed": lambda judgement: _verdict(judgement)[2],
}


def order_of(ids: Iterable[str]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """The indices of the ids in ascending order.

    Arrow sorts them without the GIL, by the bytes of UTF-8, whose order is that of Python's strings.
    """
    source, chunks = iter(ids), []
    while chunk := list(islice(source, 1 << 14)):
        chunks.append(pa.array(chunk, pa.string()))
    return pc.sort_indices(pa.chunked_array(chunks, pa.string())).to_numpy()


def write_table(path: Path, kind: str, records: Iterable[Any]) -> None:
    with TableWriter(path, kind) as table:
        table.add(records)


def write_groups(folder: Path, groups: Sequence[Group]) -> None:
    """Tables of everything that was made for the groups, each ordered by id; without comparisons there is no file of
    them. Memory holds the ids of the groups and a row group of each table.

    What belongs to a group has its id and a slash before its own, and no id of a prompt has a slash. So the tables are
    in order when the groups are, with the slash, and their records within them.
    """
    ids = ids_of(groups)
    order = order_of(f"{identifier}/" for identifier in ids)
    plain = order_of(ids)  # "tea" comes before "tea-2", but "tea/" after "tea-2/"
    with ExitStack() as files:

        @cache
        def table(kind: str) -> TableWriter:
            return files.enter_context(TableWriter(folder / f"{kind}.parquet", kind))

        for kind in ("prompts", "responses", "judgements"):
            table(kind)
        same = bool((order == plain).all())
        if not same:
            table("prompts").add(groups[index].prompt for index in plain)
        for index in order:
            group = groups[index]
            if same:
                table("prompts").add([group.prompt])
            for kind in ("responses", "judgements", "comparisons"):
                if records := getattr(group, kind):
                    table(kind).add(sorted(records, key=attrgetter("id")))


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one of the Parquet files, as a stream."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            yield from batch.to_pylist()
