"""A whole run in a second, for pages about it: what its models write is meant to break a page."""

import json
import re
from pathlib import Path
from typing import Any

from spine import World, quality

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


def finished(make_config: Any, heldout: int = 34, **changes: Any) -> Path:
    """The folder of a run of two iterations."""
    config = make_config(
        name="made",
        iterations=2,
        sample={"responses": 3, "max_tokens": 400},
        judge={"kind": "text", "judgements": 2, "max_tokens": 200},
        prompts={"per_iteration": 6, "heldout": heldout},
        evaluate={"max_tokens": 400},
        **{"engine": {"max_model_len": 4096}, **changes},
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
