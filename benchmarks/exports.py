"""Does each export of a run open in the tool that it is for?

Every format of `rsrlm export` is written by the command line, and read by the real tool in the environment of
`make bench-env`: TRL trains on the pairs, `datasets` loads the records, alpaca_eval, FastChat and Arena-Hard judge the
answers with a judge that is a fixed text, lm-evaluation-harness runs a task that is made here, transformers and peft
load the model. Nothing is downloaded.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, head, write
from rich.console import Console
from rich.table import Table

from rsrlm.store.folder import RunFolder
from rsrlm.store.tables import rows

HERE = Path(__file__).parent
TOOLS = {
    "trl": "trl", "datasets": "datasets", "alpaca_eval": "alpaca-eval", "mt_bench": "fschat",
    "arena_hard": "arena-hard-auto", "lm_eval": "lm-eval", "model": "transformers", "adapter": "peft",
}  # fmt: skip


def cases(run: Path) -> Iterator[tuple[str, list[str]]]:
    """What is exported of a run, with the options of the command: pairs of all kinds, and an adapter if it has one."""
    tables = sorted(run.glob("iterations/*/pairs.parquet"))
    kinds = sorted({row["kind"] for path in tables for row in rows(path)})
    for name in TOOLS:
        if name == "adapter":
            if list(run.glob("models/*/adapter")):
                yield name, ["--to", "model", "--adapter"]
        else:
            yield name, ["--to", name, *(f"--kind={kind}" for kind in kinds if name == "trl")]


def said(command: list[str], **environment: str) -> tuple[str, float]:
    """What a command prints, and its seconds."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout, time.perf_counter() - started


def opened(
    run: Path, peer: Path, scratch: Path, arena_hard: Path | None, backends: list[str]
) -> Iterator[dict[str, Any]]:
    _, config = RunFolder.open(run)
    scratch = scratch / run.name
    scratch.mkdir()
    for name, options in cases(run):
        out = scratch / f"to-{name}"
        _, exporting = said([sys.executable, "-m", "rsrlm.cli", "export", str(run), "--out", str(out), *options])
        row: dict[str, Any] = {"run": run.name, "format": name, "export_s": round(exporting, 1)}
        if name == "arena_hard" and arena_hard is None:
            yield {**row, "opened": False, "found": "no checkout (--arena-hard)"}
            continue
        for backend in backends if name == "lm_eval" else [""]:
            asked = {
                "export": str(out), "run": str(run.resolve()), "scratch": str(scratch),
                "arena_hard": str(arena_hard or ""), "base": _base(config), "backend": backend,
            }  # fmt: skip
            text, seconds = said(
                [str(peer), str(HERE / "exports_open.py"), name, json.dumps(asked)],
                PATH=f"{peer.parent}:{os.environ['PATH']}",
                HF_HUB_OFFLINE="1",
                HF_DATASETS_OFFLINE="1",
                HF_HOME=str(scratch / "home"),
                OPENAI_API_KEY="none",
                PYTHONPATH="",
            )
            found = next(json.loads(line[5:]) for line in text.splitlines() if line.startswith("SAID "))
            label = {"backend": backend} if backend else {}
            yield {**row, **label, "opened": True, "open_s": round(seconds, 1), **found}


def _base(config: Any) -> str:
    from rsrlm.model import folder_of

    return str(folder_of(config.model))


def main(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished runs; nothing is written into them")],
    arena_hard: Annotated[Path | None, typer.Option(help="a clone of lmarena/arena-hard-auto")] = None,
    backend: Annotated[list[str], typer.Option(help="of lm_eval")] = ["hf"],  # noqa: B006
    peer: Annotated[Path, typer.Option(help="Python of the tools")] = HERE.parent / ".venv-bench/bin/python",
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    if not peer.exists():
        raise SystemExit(f"{peer} is not there: make bench-env")
    versions, _ = said([str(peer), str(HERE / "exports_open.py"), "versions", json.dumps(TOOLS)])
    data: dict[str, Any] = {**head(__doc__.splitlines()[0]), "tools": json.loads(versions), "exports": []}
    table = Table("run", "format", "tool", "found", "seconds")
    with tempfile.TemporaryDirectory(prefix="rsrlm-exports-") as scratch:
        for run in runs:
            for row in opened(run, peer, Path(scratch), arena_hard, backend):
                data["exports"].append(row)
                write(out, "exports", data)
                tool = f"{TOOLS[row['format']]} {data['tools'].get(row['format'], '')}".strip()
                table.add_row(row["run"], row["format"], tool, json.dumps(row["found"]), str(row.get("open_s", "-")))
                print(json.dumps(row), flush=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
