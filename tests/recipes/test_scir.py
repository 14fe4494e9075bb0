"""SCIR's filter: pairs that judge and likelihood agree on."""

import asyncio
from typing import Any

from scripted import Memory, model, recipe_of, run_of
from test_methods import Written

from rsrlm.chat import ChatEncoder
from rsrlm.records import Prompt, Task

TASKS = [Task(iteration=1, prompt=Prompt(id=name, text=f"Say {name}.")) for name in ("tea", "ale")]
# Log pi_1 - log pi_0 of responses 0, 1 and 2: the judge likes 2 best and 0 least.
REWARDS = {"tea": [1.0, 5.0, 2.0], "ale": [2.0, 0.0, 2.0]}


def engine_of(encoder: ChatEncoder) -> Written:
    class OfPrompts(Written):
        async def generate(self, request: Any) -> Any:
            self.prompt = request.id.split("/")[1]
            return await super().generate(request)

    made = OfPrompts(encoder, lambda index, *_: f"points={index}")
    made.logprob = lambda index, held: -30.0 + (REWARDS[made.prompt][index] if held == "M1" else 0)
    return made


def test_a_pair_that_the_likelihood_contradicts_is_left_out(make_config: Any, encoder: ChatEncoder) -> None:
    """Of tea 2 is likelier than 0 as well; of ale they are equally likely, which is no agreement."""
    recipe, engine, log = (
        recipe_of(make_config(recipe="scir", sample={"responses": 3}), encoder),
        engine_of(encoder),
        Memory(),
    )
    for _ in range(2):
        run = run_of(engine, log)
        run.names = ["M0", "M1"]
        batch = asyncio.run(recipe.iteration(run, 1, model("M1"), TASKS))
        assert [pair.id for pair in batch.items] == ["01/tea/2>0"]
        assert batch.dropped == {"judge and likelihood disagree": 1}
        assert batch.measures == {"agreement": {"kept": 1, "of": 2}}
        asked = len(engine.requests)
    assert len(engine.requests) == asked == 2 * (3 + 3 + 2 * 3)


def test_in_the_first_iteration_every_pair_is_kept(make_config: Any, encoder: ChatEncoder) -> None:
    recipe, engine = recipe_of(make_config(recipe="scir", sample={"responses": 3}), encoder), engine_of(encoder)
    batch = asyncio.run(recipe.iteration(run_of(engine), 0, model("M0"), TASKS))
    assert {pair.id for pair in batch.items} == {"01/tea/2>0", "01/ale/2>0"}
    assert len(engine.requests) == 2 * (3 + 3)
