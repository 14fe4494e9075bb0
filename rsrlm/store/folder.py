"""The run folder: what is where, written whole or not at all.

A journal per iteration takes each response and judgement as it finishes, so that a killed run does none of them again;
when the iteration's pairs are complete it becomes Parquet files that `datasets.load_dataset` reads.
"""

import asyncio
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from rsrlm.config import Config, ConfigError, dump, load
from rsrlm.records import Example, Judgement, PreferencePair, Prompt, Response, Scored
from rsrlm.store.atomic import read_lines, sync_files, write_whole

_RESPONSE = TypeAdapter(Response)
_JUDGEMENT = TypeAdapter(Judgement)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


class RunFolder:
    """Paths and files of one run. See the README for the layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.buffer_path = folder / "buffer.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.trained_on = folder / "trained_on.json"  # questions that evaluations leave out

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """A new run folder with its config. Raises ConfigError when it exists or cannot be written."""
        folder = config.folder
        cls.check_new(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.yaml", dump(config).encode())
        except OSError as error:
            raise ConfigError(
                f"run folder {folder}: {error.strerror}; choose a folder that you can write with runs=FOLDER"
            ) from None
        return cls(folder)

    @staticmethod
    def check_new(folder: Path) -> None:
        """Raises ConfigError where the folder of a new run holds something: a run, or files that are none of ours."""
        if (folder / "config.yaml").exists():
            raise ConfigError(
                f"{folder} holds a run already; go on with `rsrlm resume {folder}`, or choose another name "
                "with name=NAME"
            )
        if folder.is_dir() and (others := {path.name for path in folder.iterdir()} - {".config.yaml.tmp", "eval"}):
            raise ConfigError(f"{folder} holds other files ({min(others)}); choose another name with name=NAME")

    @classmethod
    def open(cls, folder: Path) -> tuple["RunFolder", Config]:
        """An existing run and the config it was started with. Raises ConfigError when there is none."""
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run here (no config.yaml); give the folder of a run, such as runs/NAME")
        config = load(folder / "config.yaml")
        # The folder may have been moved since.
        config = config.model_copy(update={"runs": str(folder.resolve().parent), "name": folder.resolve().name})
        return cls(folder.resolve()), config

    def lock(self) -> IO[bytes]:
        """Held until it is closed. Raises ConfigError when another process runs in this folder."""
        file = (self.folder / ".lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{self.folder}: another process is running it; wait for it or stop it first") from None
        return file

    def iteration(self, iteration: int) -> Path:
        return self.folder / "iterations" / f"{iteration:02d}"

    def model(self, name: str) -> Path:
        """The exported model of this name; M0 is the model the run started from and is not copied."""
        return self.folder / "models" / name

    def candidates(self, name: str) -> list[str]:
        """Models among which the one of this name is chosen, in the order of training; the last is that name's own."""
        found = sorted(
            self.model(name).parent.glob(f"{name}@*[0-9]"), key=lambda path: int(path.name.rpartition("@")[2])
        )
        return [*(path.name for path in found), name]

    def take_candidate(self, name: str, chosen: str, before: Path) -> bool:
        """Put the chosen candidate in the place of the model and remove the others; whether the model changed.

        A choice that is none of them is the model before, which is copied from the folder `before`. May be repeated
        after a kill at any point.
        """
        path, candidate, old = self.model(name), self.model(chosen), self.model(f"{name}.old")
        if not chosen.startswith(f"{name}@") and chosen != name:
            candidate = self.model(f"{name}.tmp")
            shutil.rmtree(candidate, ignore_errors=True)
            shutil.copytree(before, candidate)
            sync_files(candidate)
        if chosen != name and candidate.exists():
            if path.exists() and not old.exists():
                path.rename(old)
            shutil.rmtree(path, ignore_errors=True)
            candidate.rename(path)
        for other in [*path.parent.glob(f"{name}@*"), old]:
            shutil.rmtree(other, ignore_errors=True)
        return chosen != name

    def note(self, name: str) -> dict[str, Any]:
        """What was last noted under this name; empty if nothing was."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_note(self, name: str, data: dict[str, Any]) -> None:
        self.write_json(self.folder / f"{name}.json", data)

    # -- facts of the start that a resume must keep ------------------------------------------------------------------

    def fix(self, name: str, value: Any) -> Any:
        """The value noted under this name when the run started, or this one from now on."""
        path = self.folder / "start.json"
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if name not in noted:
            noted[name] = value
            self.write_json(path, noted)
        return noted[name]

    # -- records ---------------------------------------------------------------------------------------------------

    def journal(self, iteration: int) -> "Journal":
        return Journal(self.iteration(iteration) / "journal.jsonl")

    def evaluation(self, model: str) -> "Journal":
        """Held-out answers of a model and the judgements on them."""
        return Journal(self.folder / "evaluation" / f"{model}.jsonl")

    def validation(self, iteration: int, model: str) -> "Journal":
        """Answers of a candidate to the validation prompts and the judgements on them."""
        return Journal(self.iteration(iteration) / "validation" / f"{model}.jsonl")

    def steps(self, iteration: int) -> "StepLog":
        return StepLog(self.iteration(iteration) / "steps.jsonl")

    def write_records(
        self,
        iteration: int,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        judgements: Sequence[Judgement],
        comparisons: Sequence[Judgement],
        pairs: Sequence[PreferencePair],
    ) -> None:
        """Parquet of a complete iteration; `pairs` keeps training order, the others are ordered by id.

        A pair carries the tokens and scores that are trained on. Those of the responses that it names can differ, where
        a response was lost after the buffer had the pair and was sampled anew (event "pair_kept").

        `comparisons` are the meta-judge's, and have a file only where there are any.
        """
        folder = self.iteration(iteration)
        tables: dict[str, list[dict[str, Any]]] = {
            "prompts": [asdict(prompt) for prompt in sorted(prompts, key=lambda p: p.id)],
            "responses": [asdict(response) for response in sorted(responses, key=lambda r: r.id)],
            "judgements": [_flat(judgement) for judgement in sorted(judgements, key=lambda j: j.id)],
            **({"comparisons": [_flat(one) for one in sorted(comparisons, key=lambda c: c.id)]} if comparisons else {}),
            "pairs": [asdict(pair) for pair in pairs],
        }
        for name, rows in tables.items():
            _write_table(folder / f"{name}.parquet", rows, _SCHEMAS[name])

    def write_examples(self, iteration: int, examples: Sequence[Example]) -> None:
        """Parquet of what an iteration of supervised fine-tuning trains on, in training order."""
        rows = [asdict(example) for example in examples]
        _write_table(self.iteration(iteration) / "examples.parquet", rows, _SCHEMAS["examples"])

    def records_complete(self, iteration: int) -> bool:
        return (self.iteration(iteration) / "pairs.parquet").exists()

    # -- results ---------------------------------------------------------------------------------------------------

    def write_json(self, path: Path, data: Any) -> None:
        write_whole(path, _json(data))

    def write_metrics(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.write_json(self.iteration(iteration) / "metrics.json", metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """Metrics of the finished iterations, in order."""
        found: list[dict[str, Any]] = []
        while (path := self.iteration(len(found)) / "metrics.json").exists():
            found.append(json.loads(path.read_text(encoding="utf-8")))
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        self.write_json(self.folder / "summary.json", summary)

    def drop_checkpoints(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl. `g` in the fields is the id of a group or of what was made for it."""
        line = json.dumps({"t": round(time.time(), 3), "event": kind, **fields}, ensure_ascii=False)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def remove_scratch(self) -> None:
        """What a kill left half-written: nothing refers to it."""
        for path in [*self.folder.rglob("*.tmp"), *self.folder.rglob(".*.tmp")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    write_whole(path, sink.getvalue().to_pybytes())


class StepLog:
    """Metrics of an iteration's optimizer steps, in order: `steps.jsonl`.

    To go on without a line that cannot be read is safe: steps before the checkpoint come back with it, and later ones
    are replayed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            _tell(read_lines(path, self._take))

    def _take(self, row: dict[str, Any]) -> None:
        _ = row["step"]  # KeyError or TypeError where this is no row
        self.rows.append(row)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")

    def keep_before(self, step: int) -> None:
        """Forget the steps from `step` on: they were lost and come again. Those before are put in order."""
        kept = sorted((row for row in self.rows if row["step"] < step), key=lambda row: row["step"])
        if kept != self.rows:
            self.rows = kept
            write_whole(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))


def _tell(warning: str) -> None:
    if warning:
        logging.getLogger("rsrlm").warning(warning)


class Journal:
    """Append-only JSON lines of responses and judgements.

    When it is opened, a last line that a kill cut off is dropped, and lines that cannot be read are set aside.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.responses: dict[str, Response] = {}
        self.judgements: dict[str, Judgement] = {}
        if path.exists():
            _tell(read_lines(path, self._take))
        self._file = path.open("ab")
        # What was there may be no further than in the memory of this machine, as after a kill.
        self._added, self._synced = len(self.responses) + len(self.judgements), 0
        self._syncing = asyncio.Lock()

    def _take(self, entry: dict[str, Any]) -> None:
        if "response" in entry:
            response = _RESPONSE.validate_python(entry["response"])
            self.responses[response.id] = response
        else:
            judgement = _JUDGEMENT.validate_python(entry["judgement"])
            self.judgements[judgement.id] = judgement

    def add(self, record: Response | Judgement) -> None:
        """Write a finished record; it survives the death of this process, and with `sync` that of the machine."""
        if isinstance(record, Response):
            self.responses[record.id] = record
            entry = {"response": _RESPONSE.dump_python(record, mode="json")}
        else:
            self.judgements[record.id] = record
            entry = {"judgement": _JUDGEMENT.dump_python(record, mode="json")}
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._added += 1

    async def sync(self) -> None:
        """Returns when all that was added before is on disk. Of those who wait meanwhile, one does it for all."""
        wanted = self._added
        async with self._syncing:
            if self._synced < wanted:
                added = self._added
                await asyncio.to_thread(os.fsync, self._file.fileno())
                self._synced = added

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


_IDS = pa.list_(pa.int32())
_SAMPLING = pa.struct(
    [
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int64()),
        ("max_tokens", pa.int64()),
        ("seed", pa.int64()),
        ("stop", pa.list_(pa.string())),
    ]
)


def _schema(text: str, **others: pa.DataType) -> pa.Schema:
    return pa.schema([*((name, pa.string()) for name in text.split()), *others.items()])


_SCHEMAS: dict[str, pa.Schema] = {
    "prompts": _schema("id text"),
    "responses": _schema(
        "id prompt_id role text finish_reason weight_version",
        index=pa.int64(),
        token_ids=_IDS,
        prompt_token_ids=_IDS,
        sampling=_SAMPLING,
    ),
    "judgements": _schema(
        "id prompt_id response_id role judge text finish_reason weight_version unparsed",
        index=pa.int64(),
        token_ids=_IDS,
        sampling=_SAMPLING,
        points=pa.float64(),
        variance=pa.float64(),
    ),
    "examples": _schema("id kind", prompt_token_ids=_IDS, target_token_ids=_IDS),
    "pairs": _schema(
        "id prompt_id kind chosen_id rejected_id weight_version",
        prompt_token_ids=_IDS,
        chosen_token_ids=_IDS,
        rejected_token_ids=_IDS,
        chosen_score=pa.float64(),
        rejected_score=pa.float64(),
        weight=pa.float64(),
        target=pa.float64(),
    ),
}


_SCHEMAS["comparisons"] = _SCHEMAS["judgements"]


def _flat(judgement: Judgement) -> dict[str, Any]:
    row = asdict(judgement)
    del row["verdict"]
    verdict = judgement.verdict
    if isinstance(verdict, Scored):
        return {**row, "points": verdict.points, "variance": verdict.variance, "unparsed": None}
    return {**row, "points": None, "variance": None, "unparsed": verdict.reason}


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one of the Parquet files."""
    yield from pq.read_table(path).to_pylist()
