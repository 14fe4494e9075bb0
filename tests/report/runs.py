"""A whole run in a second, for pages about it: what its models write is meant to break a page."""

import json
import re
from pathlib import Path
from typing import Any

from spine import World, quality

from rsrlm.config import resolve
from rsrlm.records import Prompt, Request
from rsrlm.runtime.exits import write_summary

HOSTILE = (
    "<script>document.title='owned'</script></script><img src=x onerror=\"document.title='owned'\"> | `a` \x1b[31m"
)
HELDOUT = [Prompt(id=f"h{number}", text=f"Tell {number} {HOSTILE}") for number in range(34)]


def answer(request: Request, weights: str) -> str:
    """Answers are worth their index and how often their model was trained; judges read that, whoever they are."""
    shown = "".join(map(chr, request.prompt_token_ids))
    if request.role == "judge":
        worth = [int(index) + quality(by) for by, index in re.findall(r"(M0\S*) number (\d+)", shown)]
        if "unreadable" in shown:
            return f"No points. {HOSTILE}"
        return f"{HOSTILE} Because.\nScore: {min(5, worth[-1])}"
    if request.role == "duel":
        first, second = (quality(by) for by, _ in re.findall(r"(M0\S*) number (\d+)", shown)[-2:])
        return "tie" if first == second else "A" if first > second else "B"
    if request.role == "meta":
        return f"{HOSTILE} Winner: A"
    return f"{HOSTILE} {weights} number {request.id.rpartition('/')[2]} of many words."


def finished(where: Path, heldout: int = 34) -> Path:
    """The folder of a run of two iterations, within the folder `where`."""
    config = resolve(
        {
            "name": "made",
            "runs": str(where),
            "iterations": 2,
            "model": "smollm2-135m-instruct",
            "prompts": {"path": "builtin", "per_iteration": 6, "heldout": heldout},
            "sample": {"responses": 3, "max_tokens": 400},
            "judge": {"kind": "text", "judgements": 2, "max_tokens": 200},
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "evaluate": {"max_tokens": 400},
            "engine": {"max_model_len": 4096},
        }
    )
    prompts = [
        Prompt(id=f"p{number}", text=f"{'unreadable' if number % 6 == 5 else 'Say'} {number} {HOSTILE}")
        for number in range(12)
    ]
    world = World(config, prompts, HELDOUT[:heldout], answer=answer)
    world.start()
    write_summary(world.store, "completed")
    return world.store.folder


def rewrite(path: Path, **changes: Any) -> None:
    """Other values in a JSON file of a run."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
