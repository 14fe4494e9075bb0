"""A driver whose judge never returns. Started by test_functions.py: function_run.py JOURNAL RESPONSE; prints "judging"
when it does."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rsrlm.ask import Judging
from rsrlm.config import resolve
from rsrlm.produce import Producer
from rsrlm.records import Completion, Group, Prompt, Request
from rsrlm.runtime.launch import interruptible
from rsrlm.store.folder import Journal

CONFIG = {
    "name": "x",
    "iterations": 1,
    "model": "a/b",
    "prompts": {"path": "builtin", "per_iteration": 4},
    "sample": {"responses": 2, "max_tokens": 24},
    "judge": {"read": "function", "function": "judge_functions:by_order"},
    "train": {"lr": 1e-3, "pairs_per_step": 2},
}


class Engines:
    slots = 4

    async def generate(self, request: Request) -> Completion:
        return Completion(
            request_id=request.id,
            token_ids=(1,),
            text=sys.argv[2],
            finish_reason="stop",
            weight_version="M0",
            prompt_tokens=1,
            cached_tokens=0,
            replica=0,
        )


async def main() -> None:
    async def put(group: Group) -> None:
        print("judged", flush=True)

    config = resolve(CONFIG)
    encoder: Any = SimpleNamespace(tokenizer=None, user=lambda text: (1, 2))
    judge = Judging(config, encoder)
    ready = Path(sys.argv[1] + ".ready")
    ready.touch()
    await judge._function(str(ready), "wait")  # type: ignore[misc]
    print("judging", flush=True)
    journal = Journal(Path(sys.argv[1]))
    producer = Producer(config, encoder, Engines(), Engines(), judge, journal, 0, lambda *_: None)
    await producer.all([Prompt(id="a", text="x")], put)


if __name__ == "__main__":
    interruptible(main())
