"""A judge that is a Python function of prompt and response, and of what the prompt carries where it takes that."""

import functools
import json
from typing import Any, Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines
from rsrlm.judges import verdicts
from rsrlm.judges.base import Context, Origin, judgement_of
from rsrlm.judges.function_pool import FunctionPool, load_function, takes_data
from rsrlm.records import Judgement, Prompt, Response, Role, Scored, Unparsed, Verdict
from rsrlm.settings.base import Number
from rsrlm.settings.methods import JudgeSection

# One pool of processes for all iterations that judge by the same function.
pool_of = functools.cache(FunctionPool)


class Function:
    class Config(JudgeSection):
        kind: str = "function"
        function: str = Field(description="module:name, called with (prompt, response[, data]), returns a number")
        timeout_s: Number = Field(60.0, gt=0, description="a call that takes longer gives no score")

        @model_validator(mode="after")
        def _no_engine_judges(self) -> Self:
            if self.model or self.replicas:
                raise ValueError(
                    f"judge.kind=function: no engine judges; leave out judge.model={self.model} and "
                    f"judge.replicas={self.replicas}"
                )
            return self

    form = verdicts.SCORE
    per_response = 1
    max_tokens = 0

    def __init__(self, config: Any, context: Context) -> None:
        self._function = pool_of(config.function, config.timeout_s)
        self._takes_data = takes_data(load_function(config.function))
        self.name = self.source = config.function

    def needs(self, response_tokens: int) -> int:
        return 0

    async def __call__(
        self, engines: Engines, prompt: Prompt, response: Response, origin: Origin, count: int | None = None
    ) -> tuple[Judgement, ...]:
        data = (dict(prompt.data),) if self._takes_data else ()

        async def compute() -> dict[str, Any]:
            verdict: Verdict = await self._function(prompt.text, response.text, *data)
            return {name: getattr(verdict, name) for name in ("points", "reason") if hasattr(verdict, name)}

        carried = [json.dumps(one, sort_keys=True) for one in data]
        key = ("function", self.name, prompt.text, response.text, origin.name, origin.by, *carried)
        identifier = f"{response.id}#0{origin.by}"
        value = await engines.remember("judge", identifier, key, compute)
        verdict = Scored(**value) if "points" in value else Unparsed(**value)
        role: Role = "judge"
        return (
            judgement_of(
                None,
                verdict,
                id=identifier,
                prompt_id=response.prompt_id,
                response_id=response.id,
                index=0,
                role=role,
                judge=self.name,
                sampling=None,
            ),
        )
