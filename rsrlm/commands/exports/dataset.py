"""A run's records as a folder that Hugging Face `datasets` loads: one config for each kind of record, and a card."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rsrlm.commands.exports import cards
from rsrlm.commands.exports.source import RunSource, batches
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.tables import SCHEMAS

# What the columns mean, by kind of record where the name alone does not say it.
COLUMNS = {
    "id": "names where the record comes from: `00/tea` is a prompt in iteration 0, `00/tea/2` its response 2, "
    "`00/tea/2#1` that one's judgement 1, `00/tea/2>0` the pair that prefers response 2 to 0",
    "iteration": "of the run, from 0 on",
    "text": "what the user, the model or the judge wrote",
    "thought": "what the model wrote before its answer, where it was asked to think",
    "prompt_id": "`id` of the prompt",
    "response_id": "`id` of the response that is judged",
    "chosen_id": "`id` of the response (kind judge: of the judgement) that is preferred",
    "rejected_id": "`id` of the other one",
    "role": "who was asked: actor, judge, meta, data, prompter",
    "kind": "of a pair: actor (two responses) or judge (two judgements of one response); of an example: its source",
    "judge": "template and reading, or the function that judged",
    "index": "place among those of the same group",
    "finish_reason": "stop: the model ended it; length: the limit did; string: a stop string did",
    "weight_version": "model whose weights wrote it; empty for a function",
    "unparsed": "why a judgement could not be read; null where it could",
    "points": "score of a judgement; of a comparison, the share that the text shown first wins; null where unreadable",
    "variance": "of the score, where the judge's reading gives one",
    "chosen_score": "mean points of the preferred one",
    "rejected_score": "mean points of the other one",
    "weight": "factor of the pair's loss",
    "target": "probability that the chosen one is better, 1 where nothing is uncertain",
    "token_ids": "as sampled",
    "prompt_token_ids": "the whole chat prompt that the model read",
    "chosen_token_ids": "what was trained on",
    "rejected_token_ids": "what was trained on",
    "target_token_ids": "what was trained on",
    "sampling": "temperature, top_p, limit, seed and stop strings of the request",
}


def write(source: RunSource, out: Path, report: Report) -> str:
    """A folder for each kind of record, a Parquet file in it for each iteration, and a card."""
    numbers = source.iterations("prompts")
    counts: dict[str, int] = {}
    out.mkdir(parents=True)
    with report.busy("writing the records"):
        for kind in SCHEMAS:
            for number in numbers:
                path = source.table(number, kind)
                if path.is_file():
                    counts[kind] = counts.get(kind, 0) + _copy(path, out / kind / f"{number:02d}.parquet", number)
    counts = {kind: number for kind, number in counts.items() if number}
    if not counts:
        raise ConfigError(f"{source.store.folder}: its iterations have no records, so there is nothing to export")
    columns = {kind: [(one.name, str(one.type), COLUMNS[one.name]) for one in _schema(kind)] for kind in counts}
    cards.write(
        out,
        "dataset.md.jinja",
        cards.dataset_header(
            source, out, {kind: f"{kind}/*.parquet" for kind in counts}, max(counts.values()), "records"
        ),
        source=source,
        iterations=numbers,
        counts=counts,
        columns=columns,
        rows=source.metrics(),
    )
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def _schema(kind: str) -> pa.Schema:
    return SCHEMAS[kind].insert(0, pa.field("iteration", pa.int64()))


def _copy(path: Path, target: Path, iteration: int) -> int:
    """Copy a table as a stream, with its iteration; returns its rows. An empty one is left out."""
    count, writer = 0, None
    for batch in batches(path):
        if not batch.num_rows:
            continue
        fields = [pa.field("iteration", pa.int64()), *batch.schema]
        columns = [pa.array([iteration] * batch.num_rows, pa.int64()), *batch.columns]
        if writer is None:
            target.parent.mkdir(exist_ok=True)
            writer = pq.ParquetWriter(target, pa.schema(fields), compression="zstd")
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=writer.schema))
        count += batch.num_rows
    if writer:
        writer.close()
    return count
