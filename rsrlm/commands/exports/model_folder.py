"""A model of a run as a folder that is ready for the hub: weights, tokenizer, chat template and a card."""

import os
import shutil
from pathlib import Path
from typing import Any

from rsrlm.commands.exports import cards
from rsrlm.commands.exports.source import RunSource
from rsrlm.model import INDEX, PROVENANCE, folder_of, weight_files
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import BUILTIN_MODEL

ADAPTER = "adapter"  # of an exported model: see rsrlm.runtime.lora


def write(source: RunSource, out: Path, report: Report) -> str:
    """The whole model, or with `--adapter` what train.lora has learned on top of the first one."""
    name, folder = source.model()
    if name == "M0":
        raise ConfigError(f"--model M0: the run has not trained it; its folder is {folder}")
    out.mkdir(parents=True)
    rank = 0
    if source.wanted.adapter:
        rank = _adapter(source, name, out)
        skipped = {path.name for path in weight_files(folder)} | {INDEX, "config.json", "generation_config.json"}
        form = f"adapter of rank {rank}"
    else:
        skipped, form = set(), "whole model"
    weights = weight_files(folder)  # people edit the other files
    with report.busy(f"copying {name}"):
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in skipped and path.suffix != ".md":
                (link_or_copy if path in weights else shutil.copy)(path, out / path.name)
        if source.config.model.path == BUILTIN_MODEL:
            licence = folder_of(source.config.model) / "LICENSE"
            if licence.is_file():
                shutil.copy(licence, out)
    cards.write(
        out,
        "model.md.jinja",
        _header(source, name),
        source=source,
        model=name,
        rank=rank,
        figures=cards.figures(source),
        rows=[row for row in source.metrics() if row.get("pairs") or row.get("optimizer_steps")],
        trouble=cards.trouble(source),
    )
    return f"{name}, {form}"


def link_or_copy(path: Path, target: Path) -> None:
    """A hard link where the file system has them: exported weights never change in place."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy(path, target)


def _header(source: RunSource, name: str) -> object:
    from huggingface_hub import ModelCardData

    relation: Any = {"base_model_relation": "adapter" if source.wanted.adapter else "finetune"} if source.hub_id else {}
    builtin = source.config.model.path == BUILTIN_MODEL
    return ModelCardData(
        base_model=source.hub_id,
        library_name="peft" if source.wanted.adapter else "transformers",
        license=PROVENANCE["licence"].lower() if builtin else None,
        pipeline_tag="text-generation",
        tags=cards.tags(source),
        model_name=f"{source.config.name}-{name}",
        **relation,
    )


def _adapter(source: RunSource, name: str, out: Path) -> int:
    """Write the adapter that makes the model out of the first one; returns its rank. Raises ConfigError where there is
    none."""
    from rsrlm.runtime import lora

    chain: list[Path] = []
    model = name
    while model != "M0":
        folder = source.store.model(model) / ADAPTER
        if not (folder / lora.FILE).is_file():
            raise ConfigError(
                f"--adapter: {model} of {source.store.folder} has no adapter (train.lora was not set, or {folder} is "
                f"gone); leave out --adapter and export {name} whole"
            )
        chain.insert(0, folder)
        model = lora.base_of(folder)
    scratch = out / "stacked"
    rank = lora.stack(chain, scratch, "M0", source.hub_id or source.config.model.path)
    for path in scratch.iterdir():
        path.rename(out / path.name)
    scratch.rmdir()
    return rank
