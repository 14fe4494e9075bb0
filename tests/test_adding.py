"""The examples of docs/adding.md are run as they stand there."""

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, groups_of, recipe_of

from rsrlm.chat import ChatEncoder
from rsrlm.records import Prompt, Request, Unparsed

DOCS = Path(__file__).parent.parent / "docs" / "adding.md"
POINTS = (1, 5, 4)  # of the three responses to a prompt


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        name = re.match(r"# (\w+)\.py", code)[1]  # type: ignore[index]
        module = types.ModuleType(name)
        exec(code, module.__dict__)
        monkeypatch.setitem(__import__("sys").modules, name, module)
        assert len(code.splitlines()) < 20


@pytest.fixture
def group(encoder: ChatEncoder, make_config: Any, modules: None) -> Callable[..., Any]:

    def answer(shown: dict[str, str], request: Request, held: str) -> str:
        if "response" not in shown:
            return f"Response {request.id[-1]}."
        return f"{'Why not. ' * 5}\nScore: {POINTS[int(shown['response'].split()[1][0])]}"

    def make(**changes: Any) -> Any:
        config = make_config(
            **{"sample": {"responses": 3}, "judge": {"kind": "text", "judgements": 1}, **changes},
            engine={"max_model_len": 2048},
        )
        recipe = recipe_of(config, encoder)
        return groups_of(recipe, Scripted(encoder.tokenizer, answer), [Prompt(id="tea", text="Why tea?")])[0]

    return make


def test_a_recipe_of_ones_own(group: Callable[..., Any]) -> None:
    made = group(recipe="my_methods:Close")
    assert [(pair.chosen_id, pair.rejected_id) for pair in made.pairs] == [("00/tea/1", "00/tea/2")]
    assert group(recipe="my_methods:Close", least=5.0).no_pair_reason == "fewer than two good responses"


def test_a_judge_of_ones_own(group: Callable[..., Any]) -> None:
    verdicts = {one.verdict for one in group(judge={"kind": "my_judges:Strict", "judgements": 1}).judgements}
    assert verdicts == {Unparsed(reason="justification too short")}
    kept = group(judge={"kind": "my_judges:Strict", "judgements": 1, "least": 20}).judgements
    assert [one.verdict.points for one in kept] == [1.0, 5.0, 4.0]
