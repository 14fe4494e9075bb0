"""`rsrlm watch`: a run as it goes on."""

from typing import Annotated

import typer

from rsrlm.command_line.parts import RunPath

app = typer.Typer()


@app.command(
    help="Show a run as it goes on, here or on another host that shares its folder: stages, rates, engines, buffer, "
    "loss, the last alarm and the last response. q or Ctrl-C ends the view, not the run. Without a terminal, a line "
    "for each change.",
)
def watch(
    folder: RunPath,
    serve: Annotated[
        int | None,
        typer.Option(
            "--serve", min=0, max=65535, metavar="PORT", help="serve its report on 127.0.0.1 as well; 0: any free port"
        ),
    ] = None,
) -> None:
    from rsrlm.commands import watch as watching

    watching.watch(folder, serve)
