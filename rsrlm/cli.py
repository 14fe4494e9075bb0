"""The command line: `rsrlm run | resume | scale | plan | recipes | doctor | data | eval`."""

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.getcwd():
    # `python -m rsrlm.cli` puts the working directory first: a file in it would run in the place of a library.
    del sys.path[0]

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrlm import config as configs
from rsrlm.settings.base import ConfigError, NotYet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Language models that reward themselves: vLLM samplers and judges and a DeepSpeed DPO learner, as Ray actors.",
    epilog="Start with `rsrlm run configs/quickstart.yaml`. Exit codes: 0 finished, 2 a mistake in config or input, "
    "3 no pairs or too few examples, 4 a failure, 5 stopped by a limit of watch, 130 interrupted.",
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="override keys of the file, such as train.lr=1e-5 name=try2"),
]


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
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder, such as runs/quickstart")],
) -> None:
    from rsrlm.commands import running
    from rsrlm.report.progress import Report
    from rsrlm.store.folder import RunFolder

    raise typer.Exit(running.resume(*RunFolder.open(folder), Report()))


@app.command(help="Ask a run for more engines, or fewer, while it runs: `rsrlm scale runs/NAME engines=3 judges=1`.")
def scale(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder, such as runs/quickstart")],
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


data = typer.Typer(no_args_is_help=True, help="Make training data: IFT and EFT examples, judgements, prompts.")
evaluate = typer.Typer(no_args_is_help=True, help="Measure judges against people, and two models against each other.")
app.add_typer(data, name="data")
app.add_typer(evaluate, name="eval")

Out = Annotated[Path, typer.Option("--out", help="file to write; what is in hand meanwhile is kept beside it")]


@data.command("ift", help="Questions with the reply that people ranked best, from data.trees, as JSONL.")
def data_ift(config: ConfigPath, out: Out, overrides: Overrides = None) -> None:
    from rsrlm.commands import data as commands_data
    from rsrlm.commands import engines as commands_engines
    from rsrlm.report.progress import Report

    _ended(lambda: commands_data.data_ift(configs.load(config, overrides), commands_engines.check_out(out), Report()))


@data.command(
    "eft",
    help="Judgements of ranked replies, written by the config's model and kept where they agree with people, as JSONL. "
    "The same command goes on after an interruption.",
)
def data_eft(config: ConfigPath, out: Out, overrides: Overrides = None) -> None:
    from rsrlm.commands import data as commands_data
    from rsrlm.commands import engines as commands_engines
    from rsrlm.report.progress import Report

    _ended(lambda: commands_data.data_eft(configs.load(config, overrides), commands_engines.check_out(out), Report()))


@data.command(
    "judgements",
    help="Right judgements of two answers of which one is bad by construction (recipe self_taught), by the config's "
    "model on all of prompts.path, as JSONL. The same command goes on after an interruption.",
)
def data_judgements(config: ConfigPath, out: Out, overrides: Overrides = None) -> None:
    from rsrlm.commands import data as commands_data
    from rsrlm.commands import engines as commands_engines
    from rsrlm.report.progress import Report

    _ended(
        lambda: commands_data.data_judgements(
            configs.load(config, overrides), commands_engines.check_out(out), Report()
        )
    )


@data.command(
    "prompts",
    help="New prompts by the config's model in the manner of Self-Instruct, from those of prompts.path. The same "
    "command goes on after an interruption.",
)
def data_prompts(
    config: ConfigPath,
    out: Out,
    number: Annotated[int, typer.Option("--number", min=1, help="prompts to make")] = 100,
    overrides: Overrides = None,
) -> None:
    from rsrlm.commands import data as commands_data
    from rsrlm.commands import engines as commands_engines
    from rsrlm.report.progress import Report

    _ended(
        lambda: commands_data.data_prompts(
            configs.load(config, overrides), number, commands_engines.check_out(out), Report()
        )
    )


@evaluate.command(
    "judge",
    help="How well the judge agrees with people: of a config's model, or of all models of a run (its folder). On Open "
    "Assistant trees, chosen/rejected pairs, scored responses or AlpacaEval preferences.",
)
def eval_judge(
    config: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="YAML file, or the folder of a run")],
    source: Annotated[str, typer.Option("--data", help="ranked data: a file or a Hugging Face id")],
    out: Annotated[Path | None, typer.Option("--out", help="folder; default: eval/NAME in the run folder")] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            help="all, ift, eft or evaluation: parts by data.ift_share and data.eft_share; default: all but the "
            "questions that are trained on",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="prompts at most, drawn by seed")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="of a run: only this model, such as M0; may be repeated")
    ] = None,
    pairwise: Annotated[bool, typer.Option("--pairwise", help="the pairwise judge (evaluate.judge)")] = False,
    overrides: Overrides = None,
) -> None:
    from rsrlm.commands import engines as commands_engines
    from rsrlm.commands import judge as commands_judge
    from rsrlm.commands import judge_measures
    from rsrlm.report.progress import Report

    if part not in (None, "all", "ift", "eft", "evaluation"):
        raise ConfigError(f"--part {part}: write all, ift, eft or evaluation")
    resolved, models, store = commands_judge.models_of(config, model or [], overrides)
    report = Report()
    default = (store or resolved).folder / "eval" / Path(source).name.split(".")[0]
    folder = commands_engines.check_out(out or default, folder=True)

    def work() -> None:
        seen = judge_measures.trained_on(resolved, store)
        prompts = judge_measures.rated(resolved, source, part, limit, seen, report)
        commands_judge.eval_judge(resolved, models, prompts, folder, pairwise, report)
        report.line(f"written to {folder}")

    _ended(work)


@evaluate.command(
    "duel",
    help="Two models head to head on the prompts of a file: both answer, a judge compares in both orders. Writes the "
    "answers in AlpacaEval's format too.",
)
def eval_duel(
    config: ConfigPath,
    first: Annotated[str, typer.Argument(metavar="A", help="Hugging Face id or folder of a model")],
    second: Annotated[str, typer.Argument(metavar="B", help="likewise")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    judge: Annotated[
        str | None, typer.Option("--judge", help="model that compares; default: the config's judge")
    ] = None,
    overrides: Overrides = None,
) -> None:
    from rsrlm.commands import duel as commands_duel
    from rsrlm.commands import engines as commands_engines
    from rsrlm.data import prompts as prompt_files
    from rsrlm.report.progress import Report

    resolved = configs.load(config, overrides)
    prompts = prompt_files.read(prompt_files.file_of(resolved.prompts))
    commands_engines.check_out(out, folder=True)
    _ended(lambda: commands_duel.eval_duel(resolved, first, second, judge, prompts, out, Report()))


def _ended(work: Callable[[], Any]) -> None:
    """Run a command; too few examples and an interruption have exit codes of their own."""
    import asyncio

    from rsrlm.runtime.exits import failure

    try:
        work()
    except (Exception, asyncio.CancelledError, KeyboardInterrupt) as error:
        _, code, reason = failure(error)
        print(f"rsrlm: {reason or 'interrupted; the same command goes on'}", file=sys.stderr)
        raise typer.Exit(code) from None


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
