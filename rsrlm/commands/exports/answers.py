"""Models' answers that other tools judge: those to the held-out prompts of a run, or those of `rsrlm eval duel`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsrlm.commands.exports.source import RunSource, Selection, plain, rows
from rsrlm.data import prompts as prompt_files
from rsrlm.judges.base import parts_of
from rsrlm.records import Prompt
from rsrlm.settings.base import ConfigError, first_line
from rsrlm.store.atomic import sift_lines

DUEL = ("outputs-a.json", "outputs-b.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`tokens` is the length in tokens of the model, and None where it is not known."""

    prompt_id: str
    prompt: str
    text: str
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answers of each model, in the order of training, all in the order of the prompts; `remarks` say what is
    missing."""

    name: str  # of the run or the duel
    models: Mapping[str, list[Answer]]
    remarks: list[str] = field(default_factory=list)
    at: float  # when, in seconds since 1970


def answers_of(folder: Path, wanted: Selection) -> Answered:
    """Those in the folder of a run or of a duel. Raises ConfigError where there are none."""
    if (folder / DUEL[0]).is_file():
        return _of_duel(folder, wanted)
    return _of_run(RunSource.open(folder, wanted))


def _of_run(source: RunSource) -> Answered:
    """From the journal, where an answer stands under MODEL/PROMPT/0; the prompts' texts are in the file that the run
    took them from."""
    names = ["M0", *(source.config.model_name(index + 1) for index in range(source.config.iterations))]
    found = _in_journals(source, names)
    said: dict[str, dict[str, dict[str, Any]]] = {name: found[name] for name in names if found[name]}
    if source.wanted.model and source.wanted.model not in said:
        has = f"has those of {', '.join(said)}" if said else "has none"
        raise ConfigError(f"--model {source.wanted.model}: no held-out answers of it; {source.store.folder} {has}")
    if not said:
        why = "prompts.heldout is 0" if not source.config.prompts.heldout else "none has been written yet"
        raise ConfigError(
            f"{source.store.folder}: no answers to held-out prompts ({why}), so there is nothing to export; `rsrlm "
            "eval duel` writes answers to the prompts of any file, and its folder can be exported too"
        )
    prompts = _prompts(source)
    # M0 answers the held-out prompts before anything else is asked: what comes later was set aside to choose by.
    held = set(list(said["M0"])[: source.config.prompts.heldout]) if "M0" in said else set().union(*said.values())
    if unknown := sorted(held - prompts.keys()):
        raise ConfigError(
            f"prompts.path={source.config.prompts.path}: no prompt {unknown[0]!r} in it any more, which the run held "
            "out; restore the file"
        )
    order = [prompt for prompt in prompts.values() if prompt.id in held]
    marker = source.config.thought.marker if source.config.thought else ""
    models, remarks = {}, []
    for name in [source.wanted.model] if source.wanted.model else said:
        answers = [_answer(prompt, said[name][prompt.id], marker) for prompt in order if prompt.id in said[name]]
        if len(answers) < len(order):
            remarks.append(f"{name} has answered {len(answers)} of {len(order)} held-out prompts")
        models[f"{source.config.name}-{name}"] = answers
    if none := [name for name in names if name not in said]:
        remarks.append(f"no held-out answers of {', '.join(none)}")
    at = (source.store.folder / "journal.jsonl").stat().st_mtime
    return Answered(name=source.config.name, models=models, remarks=remarks, at=at)


def _answer(prompt: Prompt, entry: dict[str, Any], marker: str) -> Answer:
    text = parts_of(plain(entry["text"]), marker)[1]
    return Answer(prompt_id=prompt.id, prompt=prompt.text, text=text, tokens=len(entry["token_ids"]))


def _in_journals(source: RunSource, names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each of these models answered, by prompt, in the order of the journal."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}

    def take(line: bytes, _: int) -> None:
        if b'/0"' not in line:  # most are of the training: they need not be read
            return
        entry = json.loads(line)
        model, _, rest = entry["id"].partition("/")
        prompt, _, index = rest.partition("/")
        if index == "0" and model in found:
            found[model].setdefault(prompt, {"text": entry["text"], "token_ids": entry["token_ids"]})

    for path in sorted(source.store.folder.glob("journal*.jsonl")):
        sift_lines(path, take, mend=False)
    return found


def _prompts(source: RunSource) -> dict[str, Prompt]:
    """The prompts of the run's file by id. Raises ConfigError where the file is not the one that the run was given: a
    prompt of its first iteration reads otherwise."""
    path = prompt_files.file_of(source.config.prompts)
    prompts = {prompt.id: prompt for prompt in prompt_files.read(path)}
    trained = next(
        (one for n in range(source.config.iterations) if (one := source.table(n, "prompts")).is_file()), None
    )
    for row in rows(trained) if trained else ():
        if row["id"] not in prompts or prompts[row["id"]].text != row["text"]:
            raise ConfigError(
                f"prompts.path={source.config.prompts.path}: prompt {row['id']!r} is not what the run was given; "
                "restore the file as it was then"
            )
    return prompts


def _of_duel(folder: Path, wanted: Selection) -> Answered:
    models: dict[str, list[Answer]] = {}
    for name in DUEL:
        path = folder / name
        try:
            outputs = json.loads(path.read_text(encoding="utf-8"))
            generator = Path(outputs[0]["generator"]).name
            answers = [
                Answer(
                    prompt_id=one.get("prompt_id", str(number)),
                    prompt=plain(one["instruction"]),
                    text=plain(one["output"]),
                    tokens=None,
                )
                for number, one in enumerate(outputs, start=1)
            ]
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise ConfigError(
                f"{path}: no outputs of a duel ({first_line(error)}); run `rsrlm eval duel` again"
            ) from None
        models[generator if generator not in models else f"{generator}-b"] = answers
    if wanted.model and wanted.model not in models:
        raise ConfigError(f"--model {wanted.model}: {folder} has answers of {', '.join(models)}")
    kept = {name: models[name] for name in models if wanted.model in (None, name)}
    return Answered(name=folder.resolve().name, models=kept, at=(folder / DUEL[0]).stat().st_mtime)
