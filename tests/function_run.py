"""A driver whose judge never returns, for judges/test_function_processes.py: function_run.py JOURNAL RESPONSE.

Prints "judging" when it does."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripted import context_of, model, run_of

from rsrlm.config import resolve
from rsrlm.judges.function import Function
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Completion, Prompt, Request, Task
from rsrlm.runtime.exits import interruptible
from rsrlm.store.journal import CompletionLog

CONFIG = {
    "name": "x",
    "iterations": 1,
    "model": "a/b",
    "prompts": {"path": "builtin", "per_iteration": 4},
    "sample": {"responses": 2, "max_tokens": 24},
    "judge": {"kind": "function", "function": "judge_functions:by_order"},
    "train": {"lr": 1e-3, "pairs_per_step": 2},
}


class Engine:
    slots = 4

    async def hold(self, version: str) -> dict[str, str]:
        return {}

    async def generate(self, request: Request) -> Completion:
        return Completion(
            request_id=request.id, token_ids=(1,), text=sys.argv[2], finish_reason="stop", weight_version="M0"
        )


async def main() -> None:
    context = context_of(config := resolve(CONFIG), SimpleNamespace(tokenizer=None, user=lambda text: (1, 2)))
    recipe = SelfRewarding(config.planned[0].config, context, context)
    ready = Path(sys.argv[1] + ".ready")
    ready.touch()
    judge: Any = recipe.judge
    assert isinstance(judge, Function)
    await judge._function(str(ready), "wait")
    print("judging", flush=True)
    run = run_of(Engine(), CompletionLog(Path(sys.argv[1])))
    await run.groups(await run.load(model("M0")), recipe, [Task(iteration=0, prompt=Prompt(id="a", text="x"))])
    print("judged", flush=True)


if __name__ == "__main__":
    interruptible(main())
