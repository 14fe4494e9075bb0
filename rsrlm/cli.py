"""The command line: `rsrlm run | resume | plan | doctor`."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrlm import config as configs
from rsrlm.config import ConfigError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Language models that reward themselves: vLLM samplers and judges, a preference buffer and a DeepSpeed DPO "
    "learner, as Ray actors.",
    epilog="Start with `rsrlm run configs/quickstart.yaml`. Exit codes: 0 finished, 2 a mistake in config or input, "
    "3 an iteration without pairs, 4 a failure, 130 interrupted.",
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="override keys of the file, such as train.lr=1e-5 name=try2"),
]


@app.command(help="Run a config to its end. The run folder is runs/NAME; a folder that exists is never overwritten.")
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    from rsrlm.progress import Report
    from rsrlm.runtime import launch
    from rsrlm.store import RunFolder

    resolved = configs.load(config, overrides)
    RunFolder.check_new(resolved.folder)
    report = Report()
    prepared = launch.prepare(resolved)
    _check_room(prepared)
    store = RunFolder.create(resolved)
    launch.check_inputs(prepared, store)
    raise typer.Exit(launch.execute(prepared, store, report))


@app.command(help="Go on with a run that was interrupted or killed. Nothing that is finished is done again.")
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder, such as runs/quickstart")],
) -> None:
    from rsrlm.progress import Report
    from rsrlm.runtime import launch
    from rsrlm.store import RunFolder

    store, resolved = RunFolder.open(folder)
    report = Report()
    if len(store.metrics()) >= resolved.iterations:
        launch.write_summary(store, "completed")  # a kill may have come between the last iteration and the summary
        report.line(f"{folder} is finished: {resolved.iterations} iterations, see {store.folder / 'summary.json'}")
        raise typer.Exit(0)
    prepared = launch.prepare(resolved)
    launch.check_inputs(prepared, store)
    raise typer.Exit(launch.execute(prepared, store, report))


@app.command(
    help="Print what a run would do, before anything starts: config, actors, requests and tokens, memory, disk."
)
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    from rsrlm import plan as planning
    from rsrlm.progress import Report
    from rsrlm.runtime import launch

    resolved = configs.load(config, overrides)
    prepared = launch.prepare(resolved)
    planning.show(launch.planned(prepared), resolved, Report())


@app.command(help="Check what a run needs on this machine, and say how to mend what is not right.")
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="check for this config")] = None,
    overrides: Overrides = None,
) -> None:
    from rich.console import Console

    from rsrlm import doctor as checks

    findings = checks.diagnose(configs.load(config, overrides) if config else None)
    console = Console()
    console.print(checks.render(findings, console.is_terminal), soft_wrap=not console.is_terminal, highlight=False)
    raise typer.Exit(checks.exit_code(findings))


def _check_room(prepared: Any) -> None:
    """Refuse a run that cannot fit, before anything starts. Raises ConfigError."""
    from rsrlm import plan as planning
    from rsrlm.runtime import launch

    planning.check(launch.planned(prepared), prepared.config)


def main() -> None:
    """Entry point. A user's mistake is a message on stderr and exit code 2, never a stack trace."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.path.insert(0, os.getcwd())  # judges of the user's own, by dotted path
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
