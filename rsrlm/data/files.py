"""JSON in files and Hugging Face data sets, each record with where it stands."""

import codecs
import gzip
import json
import os
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsrlm.settings.base import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def text(path: Path, key: str, remedy: str) -> str:
    """The text of a file. Raises ConfigError, which begins with `key` and the path; `remedy` is for a file that cannot
    be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={path}: {getattr(error, 'strerror', None) or error}; {remedy}") from None


def jsonl(path: Path, key: str, remedy: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines; blank lines are skipped. Raises as `text` does."""
    # Not splitlines: JSON texts may hold U+2028 and its like as they are.
    for number, line in enumerate(text(path, key, remedy).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{key}={path}, line {number}"
                raise ConfigError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise ConfigError(f"{key}={path}, line {number}: not readable JSON ({error})") from None


def records(source: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a file (JSONL or a JSON array, also as .gz) or a data set, with words that say where it stands.

    `key` is the config's, for messages. Of a Hugging Face data set the split `train` is read, or the only one that it
    has. Raises ConfigError.
    """
    path = os.path.expanduser(source)
    where = f"{key}={source}"
    if os.path.isfile(path):
        if not path.lower().endswith(SUFFIXES):
            raise ConfigError(f"{where}: not one of {', '.join(SUFFIXES)}; of a Parquet data set, give the folder")
        entries = from_file(path, where)
    elif not os.path.isdir(path) and (not source or path.lower().endswith(SUFFIXES) or source[0] in "/.~"):
        raise ConfigError(f"{where}: no such file or folder")
    else:
        entries = _from_datasets(path, where)
    for place, record in entries:
        if not isinstance(record, dict):
            raise ConfigError(f"{place}: must be a JSON object, not {reprlib.repr(record)}")
        yield place, record


def from_file(path: str, where: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, or the items of the JSON array that the file is; `.gz` is decompressed."""
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            blank = True
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                if blank and line.lstrip().startswith(b"["):
                    array = _parsed(line + file.read(), where, number)
                    yield from ((f"{where}, item {item}", record) for item, record in enumerate(array, start=1))
                    return
                blank = False
                yield f"{where}, line {number}", _parsed(line, where, number)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{where}: cannot be read: {error}; is it whole, and as its name says?") from None


def _parsed(data: bytes, where: str, line: int) -> Any:
    try:
        return json.loads(data.rstrip().decode("utf-8"))  # a line end would count as one more line
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ConfigError(f"{where}, line {line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        at = f"{where}, line {line + error.lineno - 1}"
        raise ConfigError(f"{at}: not JSON ({error.msg} at column {error.colno}); one object per line") from None
    except RecursionError:
        raise ConfigError(f"{where}, line {line}: nested too deeply to be a conversation; remove it") from None
    except ValueError as error:  # whole numbers of thousands of digits
        raise ConfigError(f"{where}, line {line}: not readable JSON ({error})") from None


def _from_datasets(source: str, where: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        splits = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ConfigError(
            f"{where}: neither a file here nor a data set that loads ({reason}); give a file ({', '.join(SUFFIXES)}), "
            "a folder, or the id of a Hugging Face data set, which without network must be in the cache already"
        ) from None
    name = "train" if "train" in splits else next(iter(splits))
    if name != "train" and len(splits) > 1:
        raise ConfigError(
            f"{where}: has the splits {', '.join(splits)} and none called train; save the one to read as JSONL "
            "(`datasets.load_dataset(..., split=...).to_json(...)`) and give that file"
        )
    yield from ((f"{where}, row {number}", row) for number, row in enumerate(splits[name], start=1))
