"""What the commands share: their arguments, and how they end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="override keys of the file, such as train.lr=1e-5 name=try2"),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder, such as runs/quickstart")]
Out = Annotated[Path, typer.Option("--out", help="file to write; what is in hand meanwhile is kept beside it")]


def ended(work: Callable[[], Any]) -> None:
    """Run a command; too few examples and an interruption have exit codes of their own."""
    import asyncio

    from rsrlm.runtime.exits import failure

    try:
        work()
    except (Exception, asyncio.CancelledError, KeyboardInterrupt) as error:
        _, code, reason = failure(error)
        print(f"rsrlm: {reason or 'interrupted; the same command goes on'}", file=sys.stderr)
        raise typer.Exit(code) from None
