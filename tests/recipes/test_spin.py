"""SPIN: answers of the data against the model's own, and pairs of earlier iterations."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.recipes.replay import earlier
from rsrlm.recipes.spin import pair
from rsrlm.records import NoPair, PreferencePair, Prompt, Request, Task
from rsrlm.run import Run
from rsrlm.settings.base import ConfigError

PROMPTS = [Prompt(id=name, text=f"Say {name}.", data={"reference": f"{name}, please"}) for name in ("tea", "ale")]
TASKS = [Task(iteration=2, prompt=prompt) for prompt in PROMPTS]
REFERENCE = replace(response(9, "tea, please"), id="01/tea/g", role="data")


def made(name: str) -> PreferencePair:
    group = name.rpartition("/")[0]
    return PreferencePair(
        id=name, prompt_id=group[3:], kind="actor", chosen_id=f"{group}/g", rejected_id=f"{group}/0",
        prompt_token_ids=(1,), chosen_token_ids=(2, 3), rejected_token_ids=(4,), chosen_score=1.0, rejected_score=0.0,
        weight_version="",
    )  # fmt: skip


def run_with(pairs: dict[int, list[PreferencePair]], *engine: Any) -> Run:
    run = run_of(*engine or (None,))
    run.begin(None, lambda iteration: iter(pairs.get(iteration, [])))  # type: ignore[arg-type]
    return run


def test_by_where_it_comes_from() -> None:
    found = pair("01/tea", REFERENCE, response(0, "tea"))
    assert isinstance(found, PreferencePair)
    assert (found.id, found.chosen_id, found.rejected_id) == ("01/tea/g>0", "01/tea/g", "01/tea/0")
    assert (found.chosen_score, found.rejected_score) == (1, 0)
    assert isinstance(pair("01/tea", REFERENCE, response(0, "tea", cut=True)), PreferencePair)  # cut: it may lose
    assert pair("01/tea", REFERENCE, response(0, " tea,\nplease ")) == NoPair(reason="same text")
    assert pair("01/tea", REFERENCE, response(0, " ")) == NoPair(reason="no text")


def answer(shown: dict[str, str], request: Request, held: str) -> str:
    return "ale, please" if "/ale/" in request.id else "hm"


def test_an_iteration(make_config: Any, encoder: ChatEncoder) -> None:
    """Ale is answered as the data does. The pairs of the iteration before come again, without what it had replayed."""
    recipe = recipe_of(make_config(recipe="spin"), encoder)
    before = [made("01/rum/g>0"), made("00/gin/g>0")]
    engine, log = Scripted(encoder.tokenizer, answer), Memory()
    batch = asyncio.run(recipe.iteration(run_with({1: before}, engine, log), 2, model("M2"), TASKS))
    assert {pair.id for pair in batch.items} == {"02/tea/g>0", "01/rum/g>0"}
    assert batch.dropped == {"same text": 1}
    assert batch.measures == {"replay": {"pairs": 1}}
    (own,) = [pair for pair in batch.items if pair.prompt_id == "tea"]
    assert own.chosen_token_ids == encoder.target("tea, please")
    assert own.prompt_token_ids == encoder.user("Say tea.")
    assert [request.id for request in engine.requests] == ["02/tea/0", "02/ale/0"]
    again = asyncio.run(recipe.iteration(run_with({1: before}, engine, log), 2, model("M2"), TASKS))
    assert (list(again.items), len(engine.requests)) == (list(batch.items), 2)


def test_how_much_comes_again() -> None:
    """Of each age its own share, drawn by seed and ids: whatever the order."""
    pairs = {at: [made(f"{at:02d}/q{n}/g>0") for n in range(400)] for at in range(3)}
    drawn = [pair.id for pair in earlier(run_with(pairs), 3, [0.3, 0.15], 0)]
    assert sum(name.startswith("02/") for name in drawn) == 120
    assert sum(name.startswith("01/") for name in drawn) == 60
    assert not any(name.startswith("00/") for name in drawn)
    turned = {at: found[::-1] for at, found in pairs.items()}
    assert {pair.id for pair in earlier(run_with(turned), 3, [0.3, 0.15], 0)} == set(drawn)
    assert [pair.id for pair in earlier(run_with(pairs), 3, [0.3, 0.15], 1)] != drawn
    assert list(earlier(run_with(pairs), 0, [1.0], 0)) == []
    assert len(list(earlier(run_with(pairs), 1, [1.0, 1.0], 0))) == 400
    assert list(earlier(run_with({}), 3, [0.0], 0)) == []


def test_prompts_bring_answers(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="spin"), encoder)
    recipe.check(PROMPTS)
    for data in ({}, {"reference": " "}):
        with pytest.raises(ConfigError, match=r"prompt 'rum' has no 'reference', the answer that recipe spin prefers"):
            recipe.check([Prompt(id="rum", text="?", data=data)])


def test_what_a_plan_says(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="spin", replay=[0.5]), encoder)
    demand = recipe.demand(10)
    assert (demand.requests, demand.items) == ({"actor": (10, 24)}, 15)
    assert recipe.needs() == {"sample.max_tokens": len(encoder.user("")) + 24}
    assert (recipe.asks, recipe.scale, recipe.width) == ([], (0, 1), 1)
    with pytest.raises(ConfigError, match=r"replay"):
        make_config(recipe="spin", replay=[1.5])


def test_a_reference_that_leaves_no_room_is_no_target(make_config: Any, encoder: ChatEncoder) -> None:
    recipe = recipe_of(make_config(recipe="spin"), encoder)
    long = Task(iteration=2, prompt=Prompt(id="rum", text="Say rum.", data={"reference": "rum " * 600}))
    run = run_with({}, Scripted(encoder.tokenizer, answer))
    batch = asyncio.run(recipe.iteration(run, 2, model("M2"), [long, TASKS[0]]))
    assert [pair.id for pair in batch.items] == ["02/tea/g>0"]
    assert batch.dropped == {"reference too long": 1}


@pytest.mark.parametrize(
    ("recipe", "keys", "name"),
    [
        ("spin", {}, "reference"),
        ("dno", {}, "reference"),
        ("irpo", {"judge": {"kind": "answer"}}, "solution"),
    ],
)
def test_an_answer_without_a_thought_is_not_preferred(
    recipe: str, keys: dict[str, Any], name: str, make_config: Any, encoder: ChatEncoder
) -> None:
    prompt = Prompt(id="tea", text="?", data={"answer": "7", name: "It is 7."})
    made = recipe_of(make_config(recipe=recipe, thought={}, engine={"max_model_len": 2048}, **keys), encoder)
    with pytest.raises(ConfigError, match=rf"prompt 'tea' has '{name}', an answer without a thought, and thought is"):
        made.check([prompt])
    recipe_of(make_config(recipe=recipe, **keys), encoder).check([prompt])
