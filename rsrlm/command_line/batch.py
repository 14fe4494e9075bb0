"""`rsrlm judge` and `rsrlm sample`: a judge, or a model, over a file."""

from typing import Annotated, Literal

import typer

from rsrlm.command_line.parts import Out, ended

app = typer.Typer()

Model = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL [KEY.SUB=VALUE]",
        help="a model (Hugging Face id, folder, or smollm2-135m-instruct, which comes along) or a YAML config; then "
        "keys of the config, such as judge.kind=text engine.max_model_len=2048",
    ),
]
Best = Annotated[bool, typer.Option("--best", help="write the best response to each prompt alone")]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="responses with fewer points are marked as refused")
]
Risk = Annotated[
    float | None,
    typer.Option("--risk", help="refuse such that at most this share of what is kept of --held-out is bad"),
]
HeldOut = Annotated[
    str | None,
    typer.Option("--held-out", help="responses that this judge has scored, with good (true or false) on each line"),
]


@app.command(
    "judge",
    help="Judge a file of responses: lines with id, prompt, and response or responses. Scores by the judge of judge.*; "
    "--mode pairwise compares the responses to a prompt two by two, --mode meta the judgements of a response. The same "
    "command goes on after an interruption.",
)
def judge_file(
    model: Model,
    source: Annotated[str, typer.Option("--in", help="responses: a file or a Hugging Face id")],
    out: Out,
    mode: Annotated[Literal["score", "pairwise", "meta"], typer.Option("--mode", help="what is judged")] = "score",
    best: Best = False,
    threshold: Threshold = None,
    risk: Risk = None,
    held_out: HeldOut = None,
) -> None:
    from rsrlm.commands import compare, score
    from rsrlm.commands.engines import check_out
    from rsrlm.commands.refusing import Choosing
    from rsrlm.commands.standalone import config_of
    from rsrlm.data import responses
    from rsrlm.report.progress import Report
    from rsrlm.settings.base import ConfigError

    choosing = Choosing(best=best, threshold=threshold, risk=risk, held_out=held_out)
    if mode != "score" and choosing.refuses:
        raise ConfigError(f"--mode {mode} compares, and has no points to refuse by; leave out --threshold and --risk")
    if mode == "meta" and best:
        raise ConfigError("--mode meta compares judgements, and --best is a response; leave out one of them")
    path, report = check_out(out, also=(source, held_out)), Report()
    with report.busy(f"looking for {model[0]}"):
        config = config_of(model[0], model[1:], "meta_rewarding" if mode == "meta" else "self_rewarding")
    with report.busy(f"reading {source}"):
        lines = responses.responses(source)
    work = {
        "score": lambda: score.judge_file(config, lines, path, choosing, report),
        "pairwise": lambda: compare.compare_responses(config, lines, path, best, report),
        "meta": lambda: compare.compare_judgements(config, lines, path, report),
    }
    ended(work[mode])


@app.command(
    "sample",
    help="Answer a file of prompts, lines with id and prompt, in the form that `rsrlm judge` reads. With --best, "
    "--threshold or --risk the judge of judge.* scores the answers. The same command goes on after an interruption.",
)
def sample_file(
    model: Model,
    source: Annotated[str, typer.Option("--in", help="prompts: a file or a Hugging Face id, or builtin")],
    out: Out,
    number: Annotated[
        int | None, typer.Option("--responses", min=1, help="answers to each prompt; default: sample.responses")
    ] = None,
    best: Best = False,
    threshold: Threshold = None,
    risk: Risk = None,
    held_out: HeldOut = None,
) -> None:
    from rsrlm.commands import sample
    from rsrlm.commands.engines import check_out
    from rsrlm.commands.refusing import Choosing
    from rsrlm.commands.standalone import config_of
    from rsrlm.data import responses
    from rsrlm.report.progress import Report

    choosing = Choosing(best=best, threshold=threshold, risk=risk, held_out=held_out)
    path, report = check_out(out, also=(source, held_out)), Report()
    with report.busy(f"looking for {model[0]}"):
        config = config_of(model[0], model[1:])
    with report.busy(f"reading {source}"):
        lines = responses.prompts(source)
    ended(lambda: sample.sample(config, lines, path, number, choosing, report))
