"""The formats of `rsrlm export`, and how one is written: whole or not at all, into a folder that was not there."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rsrlm.commands.engines import check_out
from rsrlm.commands.exports import dataset, leaderboards, lm_eval, model_folder, push, trl
from rsrlm.commands.exports.answers import ModelAnswers, answers_of
from rsrlm.commands.exports.source import RunSource, Selection
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.atomic import sync_files

OfRun = Callable[[RunSource, Path, Report], str]
OfAnswers = Callable[[ModelAnswers, Path, Report], str]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How it is written, from the run or from the answers to its held-out prompts; the options that it heeds, and what
    the hub calls such a repository, if it takes it."""

    run: OfRun | None = None
    answers: OfAnswers | None = None
    options: Sequence[str] = ()
    repo: str = ""


FORMATS = {
    "trl": Format(run=trl.write, options=("iteration", "kind"), repo="dataset"),
    "datasets": Format(run=dataset.write, options=("iteration",), repo="dataset"),
    "alpaca_eval": Format(answers=leaderboards.alpaca_eval, options=("model",)),
    "mt_bench": Format(answers=leaderboards.mt_bench, options=("model",)),
    "arena_hard": Format(answers=leaderboards.arena_hard, options=("model",)),
    "lm_eval": Format(run=lm_eval.write, options=("model",)),
    "model": Format(run=model_folder.write, options=("model", "adapter"), repo="model"),
}


def export(
    folder: Path, to: str, out: Path | None, wanted: Selection, named: Sequence[str], repo: str | None, report: Report
) -> Path:
    """Export a run, or the folder of a duel; `named` are the options that the user has given, and `repo` is where the
    hub gets it. Raises ConfigError."""
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: no such format; there are {', '.join(FORMATS)}")
    form = FORMATS[to]
    if stray := [name for name in named if name not in form.options]:
        heeding = [name for name, one in FORMATS.items() if stray[0] in one.options]
        raise ConfigError(f"--{stray[0]} is for --to {', '.join(heeding)}; leave it out with --to {to}")
    if repo and not form.repo:
        able = [name for name, one in FORMATS.items() if one.repo]
        raise ConfigError(f"--push {repo}: the hub takes --to {', '.join(able)}; leave it out with --to {to}")
    target = check_out(out or folder / "exports" / to, folder=True)
    if target.exists():
        raise ConfigError(f"--out {target} is there already; choose another folder, or remove it first")
    if repo:
        push.check(repo)
    with report.busy(f"reading {folder}"):
        remarks, write = _of(form, folder, wanted)
    said = whole(target, lambda scratch: write(scratch, report))
    for remark in remarks:
        report.line(remark)
    report.line(f"written to {target}: {said}")
    if repo:
        report.line(f"uploaded to {push.upload(target, repo, form.repo, report)}")
    return target


def _of(form: Format, folder: Path, wanted: Selection) -> tuple[list[str], Callable[[Path, Report], str]]:
    """What is to be remarked when it is written, and how to write it."""
    if form.answers:
        answered = answers_of(folder, wanted)
        return answered.remarks, partial(form.answers, answered)
    assert form.run
    source = RunSource.open(folder, wanted)
    return source.remarks, partial(form.run, source)


def whole(target: Path, write: Callable[[Path], str]) -> str:
    """What `write` makes in a folder that it is given appears as `target` when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        said = write(scratch)
        sync_files(scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return said
