"""`rsrlm eval`: judges against people, and models against each other."""

from pathlib import Path
from typing import Annotated

import typer

from rsrlm import config as configs
from rsrlm.command_line.parts import ConfigPath, Overrides, ended
from rsrlm.settings.base import ConfigError

app = typer.Typer()
evaluate = typer.Typer(no_args_is_help=True, help="Measure judges against people, and two models against each other.")
app.add_typer(evaluate, name="eval")


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

    ended(work)


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
    ended(lambda: commands_duel.eval_duel(resolved, first, second, judge, prompts, out, Report()))
