"""The run folder: what is where, each file whole or absent.

Answers go into a journal as they come, so that a killed run asks for none of them again; when an iteration's items are
complete, its records become Parquet files that `datasets.load_dataset` reads.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rsrlm.config import Config, dump, load
from rsrlm.records import Example, Group, PreferencePair
from rsrlm.settings.base import ConfigError
from rsrlm.store import tables
from rsrlm.store.atomic import append_line, sync_files, write_whole
from rsrlm.store.steps import StepLog

LAYOUT = 3  # of a run folder, noted when the run starts: a run of another one cannot go on here


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


class RunFolder:
    """Paths and files of one run. See the README for the layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.segments = folder / "segments"  # what is made, until its iteration is finished
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
        others = {path.name for path in folder.iterdir()} - {"eval"} if folder.is_dir() else set()
        if others := {name for name in others if not (name.startswith(".config.yaml.") and name.endswith(".tmp"))}:
            raise ConfigError(f"{folder} holds other files ({min(others)}); choose another name with name=NAME")

    @classmethod
    def open(cls, folder: Path) -> tuple["RunFolder", Config]:
        """An existing run and the config it was started with. Raises ConfigError when there is none, or when it was
        begun with a version that keeps runs in another way."""
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run here (no config.yaml); give the folder of a run, such as runs/NAME")
        start = cls(folder).note("start")
        if start and start.get("layout") != LAYOUT:
            raise ConfigError(
                f"{folder}: this run was begun with another version of rsrlm, which keeps its answers in another way; "
                "finish it with that version, or start anew under another name"
            )
        config = load(folder / "config.yaml")
        # The folder may have been moved since.
        config = config.model_copy(update={"runs": str(folder.resolve().parent), "name": folder.resolve().name})
        return cls(folder.resolve()), config

    def lock(self) -> IO[bytes]:
        """Held until it is closed. Raises ConfigError when another process runs in this folder."""
        file = (self.folder / ".lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.folder}: another process is running it; wait for it or stop it first") from None
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: its file system cannot lock files ({error.strerror}); choose another with runs=FOLDER"
            ) from None
        return file

    def iteration(self, iteration: int) -> Path:
        return self.folder / "iterations" / f"{iteration:02d}"

    def model(self, name: str) -> Path:
        """The exported model of this name; M0 is the model the run started from and is not copied."""
        return self.folder / "models" / name

    def heldout(self, model: str) -> Path:
        """Tables of what a model answered to the held-out prompts."""
        return self.folder / "heldout" / model

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
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"layout": LAYOUT}
        if name not in noted:
            noted[name] = value
            self.write_json(path, noted)
        return noted[name]

    # -- records ---------------------------------------------------------------------------------------------------

    def steps(self, iteration: int) -> "StepLog":
        return StepLog(self.iteration(iteration) / "steps.jsonl")

    # What takes long may run in a thread: an event loop beside it is never held up for more than some 10 ms.

    def write_groups(self, iteration: int, groups: Sequence[Group]) -> None:
        """Parquet of everything that was made for the prompts of an iteration, ordered by id."""
        tables.write_groups(self.iteration(iteration), groups)

    def write_heldout(self, model: str, groups: Sequence[Group]) -> None:
        """Parquet of a model's held-out answers and what was said of them."""
        tables.write_groups(self.heldout(model), groups)

    def write_pairs(self, iteration: int, pairs: Iterable[PreferencePair]) -> None:
        """Parquet of the pairs that an iteration trains on, in training order."""
        tables.write_table(self.iteration(iteration) / "pairs.parquet", "pairs", pairs)

    def pairs(self, iteration: int) -> Iterator[PreferencePair]:
        """Those pairs, as a stream."""
        for row in tables.rows(self.iteration(iteration) / "pairs.parquet"):
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
            yield PreferencePair(**fields)

    def write_examples(self, iteration: int, examples: Iterable[Example]) -> None:
        """Parquet of what an iteration of supervised fine-tuning trains on, in training order."""
        tables.write_table(self.iteration(iteration) / "examples.parquet", "examples", examples)

    # -- results ---------------------------------------------------------------------------------------------------

    def write_json(self, path: Path, data: Any) -> None:
        write_whole(path, _json(data))

    def write_metrics(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.write_json(self.iteration(iteration) / "metrics.json", metrics)

    def metrics_of(self, iteration: int) -> dict[str, Any]:
        """Metrics of an iteration; empty until it is finished."""
        path = self.iteration(iteration) / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """Metrics of the finished iterations, in order."""
        found: list[dict[str, Any]] = []
        while row := self.metrics_of(len(found)):
            found.append(row)
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        self.write_json(self.folder / "summary.json", summary)

    def drop_checkpoints(self, but: Collection[str] = ()) -> None:
        """All, but for those with these names. What another process still reads may stay until the next time."""
        for path in self.checkpoints.glob("*"):
            if path.name not in but:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl. `g` in the fields is the id of a group or of what was made for it."""
        line = json.dumps({"t": round(time.time(), 3), "event": kind, **fields}, ensure_ascii=False)
        append_line(self.folder / "events.jsonl", line.encode())

    def remove_scratch(self) -> None:
        """What a kill left half-written: nothing refers to it. Evaluations in `eval` may be running and keep theirs."""
        shutil.rmtree(self.segments, ignore_errors=True)
        for path in [*self.folder.rglob("*.tmp"), *self.folder.rglob(".*.tmp")]:
            if path.relative_to(self.folder).parts[0] == "eval":
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
