"""`rsrlm report` and `rsrlm compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsrlm.command_line.parts import ended
from rsrlm.settings.base import ConfigError

app = typer.Typer()

RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, such as runs/quickstart")]


@app.command(
    help="A run as one page to look at (report.html, which needs nothing else) and as Markdown (report.md): whether it "
    "got better, curves, signs of trouble, where the time went, samples to read. Works while it runs."
)
def report(
    folders: RunPaths,
    out: Annotated[Path | None, typer.Option("--out", help="folder; default: that of the only run, else here")] = None,
) -> None:
    from rsrlm.commands import report as commands_report
    from rsrlm.report.progress import Report

    screen, where = Report(), out or (folders[0] if len(folders) == 1 else Path())
    with screen.busy("writing the report"):
        commands_report.write(folders, where)
    for name in commands_report.FILES:
        screen.line(str(where / name))


@app.command(
    help="Runs beside each other (compare.html, compare.md): the same plots over each other, and where the configs "
    "differ."
)
def compare(
    folders: RunPaths,
    out: Annotated[Path, typer.Option("--out", help="folder to write; default: here")] = Path(),
    duel: Annotated[
        bool, typer.Option("--duel", help="let the last models meet on the held-out prompts that the runs share")
    ] = False,
    judge: Annotated[
        str | None, typer.Option("--judge", help="model that compares; default: the first run's judge")
    ] = None,
) -> None:
    from rsrlm.commands import report as commands_report
    from rsrlm.report.progress import Report

    if len(folders) < 2:
        raise ConfigError(f"compare {folders[0]}: name two runs or more; `rsrlm report` is for one")
    if judge and not duel:
        raise ConfigError(f"--judge={judge} is who compares in a duel; add --duel")
    screen = Report()
    duels: list[Any] = []
    if duel:
        ended(lambda: duels.append(commands_report.duels(folders, out, judge, screen)))
    with screen.busy("writing the comparison"):
        found = commands_report.compare(folders, out, duels[0] if duels else None)
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    screen.table("Runs", rows, {column: column for column in found["columns"]})
    for sentence in found["sentences"]:
        screen.line(sentence)
    screen.line(f"{out / 'compare.html'}, {out / 'compare.md'}")
