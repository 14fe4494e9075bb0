"""`rsrlm data`: training data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsrlm import config as configs
from rsrlm.command_line.parts import ConfigPath, Out, Overrides, ended

app = typer.Typer(no_args_is_help=True, help="Make training data: IFT and EFT examples, judgements, prompts.")


@app.command("ift", help="Questions with the reply that people ranked best, from data.trees, as JSONL.")
def data_ift(config: ConfigPath, out: Out, overrides: Overrides = None) -> None:
    _make("data_ift", config, overrides, out)


@app.command(
    "eft",
    help="Judgements of ranked replies, written by the config's model and kept where they agree with people, as JSONL. "
    "The same command goes on after an interruption.",
)
def data_eft(config: ConfigPath, out: Out, overrides: Overrides = None) -> None:
    _make("data_eft", config, overrides, out)


@app.command(
    "judgements",
    help="Right judgements of two answers of which one is bad by construction (recipe self_taught), by the config's "
    "model on all of prompts.path, as JSONL. The same command goes on after an interruption.",
)
def data_judgements(config: ConfigPath, out: Out, overrides: Overrides = None) -> None:
    _make("data_judgements", config, overrides, out)


@app.command(
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
    _make("data_prompts", config, overrides, out, number)


def _make(name: str, config: str, overrides: list[str] | None, out: Path, *more: Any) -> None:
    """Run a command of rsrlm.commands.data."""
    from rsrlm.commands import data as commands_data
    from rsrlm.commands import engines as commands_engines
    from rsrlm.report.progress import Report

    making = getattr(commands_data, name)
    ended(lambda: making(configs.load(config, overrides), *more, commands_engines.check_out(out), Report()))
