"""What `rsrlm export` reads of a run's folder, be the run finished, half done or still going on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsrlm.config import Config
from rsrlm.model import PROVENANCE, check_folder, folder_of
from rsrlm.settings.base import ConfigError, first_line
from rsrlm.settings.machine import BUILTIN_MODEL
from rsrlm.store.folder import RunFolder
from rsrlm.store.tables import BATCH


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is to be exported of a run; empty iterations are all of them, and no model the last one."""

    iterations: Sequence[int] = ()
    kinds: Sequence[str] = ("actor",)  # of pairs
    model: str | None = None
    adapter: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSource:
    """A run, and what an export has to say of it: `remarks` are shown when it is written."""

    store: RunFolder
    config: Config
    wanted: Selection
    remarks: list[str]

    @classmethod
    def open(cls, folder: Path, wanted: Selection) -> "RunSource":
        """Raises ConfigError where there is no run, or one of another version."""
        try:
            store, config = RunFolder.open(folder)
        except ValueError as error:
            raise ConfigError(f"{folder}: start.json cannot be read ({first_line(error)}); restore it") from None
        return cls(store=store, config=config, wanted=wanted, remarks=[])

    # -- records -----------------------------------------------------------------------------------------------------

    def iterations(self, table: str) -> list[int]:
        """The iterations that are wanted and have a table of this name; of the others it is remarked what is missing.
        Raises ConfigError where none has."""
        there = range(self.config.iterations)
        numbers = sorted(set(self.wanted.iterations)) or list(there)
        if strange := [one for one in numbers if one not in there]:
            raise ConfigError(f"--iteration {strange[0]}: {self.store.folder} has iterations 0 to {there[-1]}")
        found = [number for number in numbers if self.table(number, table).is_file()]
        if not found:
            raise ConfigError(
                f"{self.store.folder}: no {table} of iteration {listed(numbers)} yet, so there is nothing to export; "
                f"go on with `rsrlm resume {self.store.folder}`"
            )
        if missing := [number for number in numbers if number not in found]:
            self.remarks.append(f"left out, as they have no {table}: iterations {listed(missing)}")
        if begun := [one for one in found if not (self.store.iteration(one) / "metrics.json").is_file()]:
            self.remarks.append(f"not finished, and exported as far as they are: iterations {listed(begun)}")
        return found

    def table(self, iteration: int, name: str) -> Path:
        return self.store.iteration(iteration) / f"{name}.parquet"

    def metrics(self) -> list[dict[str, Any]]:
        """Of the finished iterations. Raises ConfigError for a file that cannot be read."""
        try:
            return self.store.metrics()
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.store.folder}: a metrics.json cannot be read ({first_line(error)})") from None

    # -- models ------------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names of the models that the run has exported, in the order of training."""
        names = [self.config.model_name(index) for index in range(1, self.config.iterations + 1)]
        return [name for name in names if (self.store.model(name) / "config.json").is_file()]

    def model(self) -> tuple[str, Path]:
        """Name and folder of the model that is wanted. Raises ConfigError where it is not there."""
        there = self.models()
        name = self.wanted.model or (there[-1] if there else None)
        if name == "M0":
            return name, folder_of(self.config.model)
        if name not in there:
            has = f"has M0, {', '.join(there)}" if there else "has trained no model yet"
            asked = f"--model {name}: " if name else ""
            raise ConfigError(f"{asked}{self.store.folder} {has}")
        assert name is not None
        check_folder(self.store.model(name), "--model")
        return name, self.store.model(name)

    @property
    def hub_id(self) -> str | None:
        """What the hub calls the model that the run started from; None for a folder."""
        path = self.config.model.path
        if path == BUILTIN_MODEL:
            return PROVENANCE["model"]
        local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).is_dir()
        return None if local else path


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A table of the run as a stream. Raises ConfigError where it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({first_line(error)}); restore it, or choose other iterations with --iteration"
        ) from None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The same, row by row."""
    for batch in batches(path):
        yield from batch.to_pylist()


def write_lines(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def listed(numbers: Sequence[int]) -> str:
    """`0, 2 to 9`: neighbours as a range."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
