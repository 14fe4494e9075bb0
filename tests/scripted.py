"""Engines that answer by which text stands where in a prompt, so that an exchange of two texts changes the outcome."""

import math
import re
from collections.abc import Callable
from typing import Any

from rsrlm.records import Completion, Request

_TAG = re.compile(r"<((?:question|response|judgement)(?: [AB])?)(| [0-9a-f]{8})>\n(.*?)\n</\1\2>", re.DOTALL)
LETTERS = {"A": (math.log(0.7), math.log(0.2)), "B": (math.log(0.2), math.log(0.7)), "tie": (-1.0, -1.0)}


def shown(tokenizer: Any, request: Request) -> dict[str, str]:
    """What stands under each tag of a judge's prompt, such as "response A"; empty for an actor's prompt."""
    return {tag: text for tag, _, text in _TAG.findall(tokenizer.decode(request.prompt_token_ids))}


class Scripted:
    """Holds a model; `answer` gives the text, or "A", "B", "tie" where letters are read, from what is shown, the
    request and the model that is held."""

    slots = 8

    def __init__(self, tokenizer: Any, answer: Callable[[dict[str, str], Request, str], str]) -> None:
        self.tokenizer = tokenizer
        self.answer = answer
        self.held = "M0"
        self.holds: list[str] = []
        self.requests: list[Request] = []

    async def hold(self, version: str, files: Any = None) -> dict[str, Any]:
        if version != self.held:
            self.holds.append(version)
        self.held = version
        return {"version": version}

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        text = self.answer(shown(self.tokenizer, request), request, self.held)
        scored = request.score_from is not None
        return Completion(
            request_id=request.id, token_ids=(*self.tokenizer.encode(text), 2), text=text, finish_reason="stop",
            weight_version=self.held, prompt_tokens=len(request.prompt_token_ids), cached_tokens=0, replica=0,
            label_logprobs=LETTERS[text] if request.label_ids else (),
            prompt_logprobs=(-2.0 if self.held == "M0" else -1.0,)
            * (len(request.prompt_token_ids) - (request.score_from or 0))
            if scored
            else (),
        )  # fmt: skip
