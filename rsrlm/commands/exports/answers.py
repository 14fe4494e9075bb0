"""Models' answers that other tools judge: those to the held-out prompts of a run, or those of `rsrlm eval duel`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rsrlm.commands.exports.source import RunSource, Selection, rows
from rsrlm.records import encodable
from rsrlm.settings.base import ConfigError, first_line

DUEL = ("outputs-a.json", "outputs-b.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`tokens` is the length in tokens of the model, and None where it is not known."""

    prompt_id: str
    prompt: str
    text: str
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnswers:
    """The answers of each model, in the order of training, all in the order of the prompts; `remarks` say what is
    missing."""

    name: str  # of the run or the duel
    models: Mapping[str, list[Answer]]
    remarks: list[str] = field(default_factory=list)
    at: float  # when, in seconds since 1970


def answers_of(folder: Path, wanted: Selection) -> ModelAnswers:
    """Those in the folder of a run or of a duel. Raises ConfigError where there are none."""
    if (folder / DUEL[0]).is_file():
        return _of_duel(folder, wanted)
    return _of_run(RunSource.open(folder, wanted))


def _of_run(source: RunSource) -> ModelAnswers:
    """What its models answered to the held-out prompts, from the tables that evaluations write."""
    names = [source.config.model_name(index) for index in range(source.config.iterations + 1)]
    folders = {name: source.store.heldout(name) for name in names}
    there = [name for name, folder in folders.items() if (folder / "responses.parquet").is_file()]
    if source.wanted.model and source.wanted.model not in there:
        has = f"has those of {', '.join(there)}" if there else "has none"
        raise ConfigError(f"--model {source.wanted.model}: no held-out answers of it; {source.store.folder} {has}")
    if not there:
        why = "prompts.heldout is 0" if not source.config.prompts.heldout else "none has been written yet"
        raise ConfigError(
            f"{source.store.folder}: no answers to held-out prompts ({why}), so there is nothing to export; `rsrlm "
            "eval duel` writes answers to the prompts of any file, and its folder can be exported too"
        )
    chosen = [source.wanted.model] if source.wanted.model else there
    models = {f"{source.config.name}-{name}": _answers(folders[name]) for name in chosen}
    none = [name for name in names if name not in there]
    remarks = [f"no held-out answers of {', '.join(none)}"] if none and not source.wanted.model else []
    at = (folders[chosen[0]] / "responses.parquet").stat().st_mtime
    return ModelAnswers(name=source.config.name, models=models, remarks=remarks, at=at)


def _answers(folder: Path) -> list[Answer]:
    prompts = {row["id"]: row["text"] for row in rows(folder / "prompts.parquet")}
    return [
        Answer(
            prompt_id=row["prompt_id"],
            prompt=prompts[row["prompt_id"]],
            text=row["text"],
            tokens=len(row["token_ids"]),
        )
        for row in rows(folder / "responses.parquet")
    ]


def _of_duel(folder: Path, wanted: Selection) -> ModelAnswers:
    models: dict[str, list[Answer]] = {}
    for name in DUEL:
        path = folder / name
        try:
            outputs = json.loads(path.read_text(encoding="utf-8"))
            generator = Path(outputs[0]["generator"]).name
            answers = [
                Answer(
                    prompt_id=one.get("prompt_id", str(number)),
                    prompt=encodable(one["instruction"]),
                    text=encodable(one["output"]),
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
    return ModelAnswers(name=folder.resolve().name, models=kept, at=(folder / DUEL[0]).stat().st_mtime)
