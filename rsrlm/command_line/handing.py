"""`rsrlm export`: what a run made, in the forms of other tools."""

from pathlib import Path
from typing import Annotated

import typer

from rsrlm.command_line.parts import RunPath

app = typer.Typer()


@app.command(
    help="Write what a run made for another tool: trl, datasets, alpaca_eval, mt_bench, arena_hard, lm_eval or model. "
    "A run that is not finished exports what is there. The answers of an `eval duel` folder can be exported too."
)
def export(
    folder: RunPath,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="one of those above")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder to write; default: exports/FORMAT in the run")
    ] = None,
    iteration: Annotated[
        list[int] | None, typer.Option("--iteration", help="only this one, from 0 on; may be repeated (trl, datasets)")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="of pairs: actor, judge; default: actor; may be repeated (trl)"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="such as M1; default: the last one, or all of which there are answers")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="what train.lora learned, and not the whole model (model)")
    ] = False,
    repo: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="upload it to the hub with the token in HF_TOKEN"),
    ] = None,
) -> None:
    from rsrlm.commands.exports.formats import export as write
    from rsrlm.commands.exports.source import Selection
    from rsrlm.report.progress import Report

    given = {"iteration": iteration, "kind": kind, "model": model, "adapter": adapter}
    wanted = Selection(iterations=iteration or (), kinds=kind or ("actor",), model=model, adapter=adapter)
    write(folder, to, out, wanted, [name for name, value in given.items() if value], repo, Report())
