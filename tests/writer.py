"""An engine that writes as a real one does: token by token, up to a stop string, the end token or the limit.

`write` gives the rest of an answer from the request and what is begun; `critic` the probabilities of True and False, or
the letter of a comparison, from what is shown and the request.
"""

import math
from collections.abc import Callable
from typing import Any

from scripted import LETTERS, shown

from rsrlm.records import Completion, Request


def logs(*probabilities: float) -> tuple[float, ...]:
    return tuple(math.log(one) if one else -math.inf for one in probabilities)


class Writer:
    slots = 8

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[Request, str], str],
        critic: Callable[[dict[str, str], Request], Any] = lambda texts, request: (0.5, 0.5),
    ) -> None:
        self.tokenizer, self.write, self.critic = tokenizer, write, critic
        self.held = "M0"
        self.requests: list[Request] = []

    async def hold(self, version: str, files: Any = None) -> dict[str, Any]:
        self.held = version
        return {"version": version}

    def decode(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def begun(self, request: Request) -> str:
        return str(self.tokenizer.decode(request.prompt_token_ids)).rpartition("<|im_start|>assistant\n")[2]

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        made = {"request_id": request.id, "weight_version": self.held}
        if request.label_ids:
            said = self.critic(shown(self.tokenizer, request), request)
            probabilities = LETTERS[said] if isinstance(said, str) else logs(*said)
            return Completion(**made, token_ids=(5,), text="?", finish_reason="length", label_logprobs=probabilities)  # type: ignore[arg-type]
        text = self.write(request, self.begun(request))
        tokens = (*self.encode(text), self.tokenizer.eos_token_id)
        for number in range(1, min(len(tokens), request.sampling.max_tokens) + 1):
            written = self.decode(tokens[:number])
            ends = [place + len(stop) for stop in request.sampling.stop if (place := written.find(stop)) >= 0]
            if ends:
                return Completion(**made, token_ids=tokens[:number], text=written[: min(ends)], finish_reason="string")  # type: ignore[arg-type]
        kept = tokens[: request.sampling.max_tokens]
        finish = "stop" if len(kept) == len(tokens) else "length"
        return Completion(**made, token_ids=kept, text=self.decode(kept), finish_reason=finish)  # type: ignore[arg-type]
