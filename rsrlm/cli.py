"""The command line of rsrlm: what is there, `rsrlm --help` says."""

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.getcwd():
    # `python -m rsrlm.cli` puts the working directory first: a file in it would run in the place of a library.
    del sys.path[0]

import logging
import signal
from pathlib import Path
from typing import Annotated

import typer

from rsrlm import config as configs
from rsrlm.command_line import batch, handing, looking, making, measuring, watching
from rsrlm.command_line.parts import ConfigPath, Overrides, RunPath
from rsrlm.settings.base import ConfigError, NotYet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Language models that reward themselves: vLLM samplers and judges and a DeepSpeed DPO learner, as Ray actors.",
    epilog="Start with `rsrlm run configs/quickstart.yaml`. Exit codes: 0 finished, 2 a mistake in config or input, "
    "3 no pairs or too few examples, 4 a failure, 5 stopped by a limit of watch, 130 interrupted.",
)

app.add_typer(making.app, name="data")
app.add_typer(measuring.app)
app.add_typer(looking.app)
app.add_typer(watching.app)
app.add_typer(batch.app)
app.add_typer(handing.app)


@app.command(help="Run a config to its end. The run folder is runs/NAME; a folder that exists is never overwritten.")
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    or_resume: Annotated[
        bool,
        typer.Option(
            "--or-resume", help="go on with the run of this name where it has begun, as a job that is tried again"
        ),
    ] = False,
    final_is_success: Annotated[
        bool,
        typer.Option("--final-is-success", help="end with 0 instead of 2, 3 or 5, which no further try could mend"),
    ] = False,
) -> None:
    from rsrlm.commands import running
    from rsrlm.report.progress import Report

    try:
        code = running.run(configs.load(config, overrides), Report(), or_resume)
    except ConfigError as error:
        if not final_is_success or isinstance(error, NotYet):
            raise
        print(f"rsrlm: {error}", file=sys.stderr)
        code = 2
    raise typer.Exit(0 if final_is_success and code in (2, 3, 5) else code)


@app.command(help="Go on with a run that was interrupted or killed. Nothing that is finished is done again.")
def resume(
    folder: RunPath,
) -> None:
    from rsrlm.commands import running
    from rsrlm.report.progress import Report
    from rsrlm.store.folder import RunFolder

    raise typer.Exit(running.resume(*RunFolder.open(folder), Report()))


@app.command(help="Ask a run for more engines, or fewer, while it runs: `rsrlm scale runs/NAME engines=3 judges=1`.")
def scale(
    folder: RunPath,
    wanted: Annotated[list[str], typer.Argument(metavar="POOL=NUMBER", help="engines, judges or validators")],
) -> None:
    from rsrlm.commands import running
    from rsrlm.report.progress import Report
    from rsrlm.store.folder import RunFolder

    running.scale(*RunFolder.open(folder), wanted, Report())


@app.command(
    help="Print what a run would do, before anything starts: config, actors, requests and tokens, memory, disk. For "
    "GPUs the hours too, by formulas: neither a GPU nor the model's weights need be here."
)
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_gb: Annotated[
        float, typer.Option("--gpu-gb", min=1, help="memory of each GPU, where the config has any")
    ] = 80.0,
) -> None:
    from rsrlm.commands import plan as planning
    from rsrlm.report.progress import Report

    resolved = configs.load(config, overrides)
    if resolved.engine.gpus or resolved.train.gpus:
        from rsrlm.commands import plan_gpu

        return plan_gpu.show(resolved, gpu_gb, Report())
    from rsrlm.runtime import setup

    prepared = setup.prepare(resolved)
    planning.show(planning.plan_of(prepared), resolved, Report())


@app.command(help="The recipes that are there, with a line and the paper of each.")
def recipes() -> None:
    from importlib import import_module

    from rsrlm.report.progress import Report
    from rsrlm.settings.base import RECIPES

    rows = []
    for name, path in RECIPES.items():
        said = (import_module(path.partition(":")[0]).__doc__ or "").split("\n\n")[0]
        rows.append({"recipe": name, "what": " ".join(said.split())})
    Report().table("Recipes", rows, {"recipe": "recipe", "what": "what it does"})


@app.command(help="Check what a run needs on this machine, and say how to mend what is not right.")
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="check for this config")] = None,
    overrides: Overrides = None,
) -> None:
    from rich.console import Console

    from rsrlm.commands import doctor as checks

    findings = checks.diagnose(configs.load(config, overrides) if config else None)
    console = Console()
    console.print(checks.render(findings, console.is_terminal), soft_wrap=not console.is_terminal, highlight=False)
    raise typer.Exit(checks.exit_code(findings))


def main() -> None:
    """Entry point. A user's mistake is a message on stderr and exit code 2, never a stack trace."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it looked for a GPU
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is stopped ends as with Ctrl-C
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except ConfigError as error:
        print(f"rsrlm: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # before a run starts, all that can fail is reading the user's files
        if error.filename is None:
            raise
        print(f"rsrlm: {error.filename}: {error.strerror}; give a path that you can use", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
