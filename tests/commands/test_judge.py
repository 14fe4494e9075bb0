"""Judges against people, with a judge that is a function and one that is scripted."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Memory, Screen, engines_of, model
from scripted import context_of as context

from rsrlm.chat import ChatEncoder
from rsrlm.commands import judge_measures
from rsrlm.commands.judge_measures import comparable, rated, scores, trained_on, verdicts
from rsrlm.config import Config
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.data.seed_data import Parts, TrainedOn
from rsrlm.engines import SAMPLE_PRIORITY, Answers, Engines
from rsrlm.judges.base import Judge, judge_of
from rsrlm.judges.pairwise import Pairwise, duel_judge
from rsrlm.records import Completion, Request, wording
from rsrlm.report import metrics
from rsrlm.settings.base import ConfigError

FUNCTION = {"kind": "function", "function": "test_judge:longer"}


def longer(prompt: str, response: str) -> float | None:
    """A judge that likes length, and cannot read what begins with a question mark."""
    return None if response.startswith("?") else min(5.0, float(len(response)))


class Deciding:
    """Answers a comparison by what it is shown."""

    slots = 4

    @property
    def asked(self) -> int:
        return len(self.requests)

    def __init__(self, decide: Callable[[str], tuple[float, float]], tokenizer: Any) -> None:
        self.requests: list[Request] = []
        self._decide = decide
        self._tokenizer = tokenizer

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        shown = self._tokenizer.decode(request.prompt_token_ids)
        return Completion(
            request_id=request.id, token_ids=(5,), text="A", finish_reason="length", weight_version="M0",
            label_logprobs=self._decide(shown),
        )  # fmt: skip


def likes_good(shown: str) -> tuple[float, float]:
    """A where "good" is shown as A, else B."""
    a, b = shown.index("<response A"), shown.index("<response B")
    return (-0.1, -3.0) if "good" in shown[a:b] else (-3.0, -0.1)


def ranked(name: str, *replies: tuple[str, float | None]) -> RankedPrompt:
    found = tuple(Reply(id=f"{name}-{i}", text=text, rank=rank) for i, (text, rank) in enumerate(replies))
    return RankedPrompt(id=name, text=f"about {name}?", replies=found)


def measured(
    prompts: list[RankedPrompt], judge: Pairwise, engine: Any, log: Any = None, seed: int = 0
) -> dict[str, Any]:
    return asyncio.run(verdicts(prompts, judge, engines_of(engine, log=log), seed))


def judged(prompts: list[RankedPrompt], config: Config, encoder: ChatEncoder, seed: int = 0) -> dict[str, Any]:
    """By a function: there are no engines."""
    judge: Judge = judge_of(config.judge, context(config, encoder))
    return asyncio.run(scores(prompts, judge, Engines(None, model("M0"), Answers(Memory())), seed))


def comparing(config: Config, encoder: ChatEncoder) -> Pairwise:
    return duel_judge(config, context(config, encoder))


def test_only_ranked_replies_are_compared() -> None:
    prompts = [ranked("a", ("x", 0), ("y", None), ("z", 1)), ranked("b", ("x", 0), ("y", None)), ranked("c", ("x", 0))]
    found = comparable(prompts)
    assert [[reply.id for reply in prompt.replies] for prompt in found] == [["a-0", "a-2"]]


def test_measures_of_a_judge_that_scores(make_config: Any, encoder: ChatEncoder, functions_here: None) -> None:
    """40 prompts: people and the judge agree on 20, disagree on 10, tie for the judge on 6, unreadable in 4."""
    prompts = [ranked(f"agree{i}", ("xxx", 0), ("x", 1)) for i in range(20)]
    prompts += [ranked(f"other{i}", ("x", 0), ("xxxxx", 1)) for i in range(10)]
    prompts += [ranked(f"tie{i}", ("xx", 0), ("yy", 1)) for i in range(6)]
    prompts += [ranked(f"unread{i}", ("?x", 0), ("y", 1)) for i in range(4)]
    found = judged(prompts, make_config(judge=FUNCTION), encoder)
    assert (found["pairwise_accuracy"]["value"], found["pairwise_accuracy"]["n"]) == (pytest.approx(20 / 36), 36)
    assert found["agreement"]["value"] == pytest.approx(23 / 36)  # a tie counts one half
    assert (found["agreement_without_ties"]["value"], found["agreement_without_ties"]["n"]) == (
        pytest.approx(20 / 30), 30,
    )  # fmt: skip
    assert found["tie_share"]["value"] == pytest.approx(6 / 36)
    assert found["readable"]["value"] == pytest.approx(76 / 80)
    assert not found["five_best"]["estimable"]  # ten replies with a 5
    assert found["five_best"]["n"] == 10


def test_measures_of_a_judge_that_compares(make_config: Any, encoder: ChatEncoder) -> None:
    """A judge that always says A agrees with itself in no order: nothing but position."""
    prompts = [ranked(f"p{i}", ("good", 0), ("bad", 1), ("bad too", 1)) for i in range(32)]
    engine, log = Deciding(lambda shown: (-0.1, -3.0), encoder.tokenizer), Memory()
    judge = comparing(make_config(), encoder)
    found = measured(prompts, judge, engine, log)
    assert found["first_position"]["value"] == 1.0
    assert found["inconsistent"]["value"] == 1.0
    assert found["agreement"]["n"] == 0
    assert engine.asked == 32 * 6  # three pairs of each prompt in both orders
    assert measured(prompts, judge, engine, log) == found
    assert engine.asked == 32 * 6  # the journal knew them all


@pytest.mark.parametrize(("good", "bad", "agreement"), [(0, 1, 1.0), (1, 0, 0.0)])
def test_agreement_of_a_judge_that_compares(
    good: int, bad: int, agreement: float, make_config: Any, encoder: ChatEncoder
) -> None:
    """The judge takes "good" wherever it stands; people rank it first (0 is the best rank), or last."""
    prompts = [ranked(f"p{i}", ("good", good), ("bad", bad), ("poor", bad)) for i in range(20)]
    prompts += [ranked(f"q{i}", ("bad", bad), ("good", good)) for i in range(20)]
    found = measured(prompts, comparing(make_config(), encoder), Deciding(likes_good, encoder.tokenizer))
    # Of 80 comparisons, people have no preference in the 20 of "bad" and "poor", where the judge says B in both orders.
    assert (found["agreement"]["value"], found["agreement"]["n"]) == (agreement, 60)
    assert found["inconsistent"]["value"] == 20 / 80
    assert found["first_position"]["value"] == 60 / 160  # once per comparison that has a "good" one


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"evaluate": {"judge": {"read": "text"}}, "engine": {"max_model_len": 2048}}],
    ids=["seed", "reading"],
)
def test_answers_to_another_question_are_not_taken(
    changes: dict[str, Any], make_config: Any, encoder: ChatEncoder
) -> None:
    """What was asked under other settings stays for those settings."""
    prompts, log = [ranked(f"p{i}", ("good", 0), ("bad", 1)) for i in range(4)], Memory()
    engine = Deciding(likes_good, encoder.tokenizer)
    before, after = comparing(make_config(), encoder), comparing(make_config(**changes), encoder)
    for judge, asked in ((before, 8), (after, 16), (before, 16), (after, 16)):
        measured(prompts, judge, engine, log)
        assert engine.asked == asked
    # Another reply under the same id is another question.
    measured([ranked("p0", ("good", 0), ("worse", 1))], before, engine, log)
    assert engine.asked == 18


def test_what_a_judge_that_compares_is_asked(make_config: Any, encoder: ChatEncoder) -> None:
    """Both orders share a fence and nothing else; a run that is resumed, or made again, asks the same."""
    engine, ticks = Deciding(likes_good, encoder.tokenizer), []
    answers = Answers(Memory())
    judge = comparing(make_config(seed=5), encoder)
    with answers.counted(lambda *tick: ticks.append(tick)):
        asyncio.run(verdicts([ranked("tea", ("good", 0), ("bad", 1))], judge, engines_of(engine, answers=answers), 5))
    asked = {request.id: request for request in engine.requests}
    assert {name: request.sampling.seed for name, request in asked.items()} == {
        "tea/0>1": 1025022962275589269,
        "tea/1>0": 7081499708531921076,
    }
    for name, first, second in (("tea/0>1", "good", "bad"), ("tea/1>0", "bad", "good")):
        shown = encoder.tokenizer.decode(asked[name].prompt_token_ids)
        assert "about tea?" in shown
        assert f"<response A 415f4a85>\n{first}\n</response A 415f4a85>" in shown
        assert f"<response B 415f4a85>\n{second}\n</response B 415f4a85>" in shown
    assert ticks == [("duel", 1, 1)] * 2
    assert {(request.role, request.priority) for request in engine.requests} == {("duel", SAMPLE_PRIORITY)}


def test_what_is_measured_is_what_people_and_judge_said(
    make_config: Any, encoder: ChatEncoder, functions_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replies that people rank alike, a third below them, which the judge cannot compare with the second."""

    def decide(shown: str) -> tuple[float, float]:
        if "poor" in shown and "fair" in shown:
            return (-20.0, -20.0)
        a = shown[shown.index("<response A") : shown.index("<response B")]
        return (-0.1, -3.0) if "good" in a else (-3.0, -0.1)

    figures: list[Any] = []
    monkeypatch.setattr(
        metrics, "pairwise_judge_metrics", lambda outcomes, seed: figures.append((list(outcomes), seed)) or {}
    )
    prompt = ranked("p", ("good", 0), ("fair", 0), ("poor", 1))
    measured([prompt], comparing(make_config(), encoder), Deciding(decide, encoder.tokenizer), seed=7)
    ((outcomes, seed),) = figures
    assert seed == 7
    assert [(one.first, one.second, one.human) for one in outcomes] == [
        ("A", "B", "tie"), ("A", "B", "first"), (None, None, "first"),
    ]  # fmt: skip
    assert {one.prompt_id for one in outcomes} == {"p"}
    monkeypatch.setattr(metrics, "judge_metrics", lambda rated, **options: figures.append((rated, options)) or {})
    judged([prompt], make_config(judge=FUNCTION), encoder, seed=7)
    rated, options = figures[-1]
    assert options == {"readable": 3, "judgements": 3, "points": [4.0, 4.0, 4.0], "seed": 7}
    assert rated == [metrics.Rated(id="p", ranks=(0.0, 0.0, 1.0), scores=(4.0, 4.0, 4.0), lengths=(4, 4, 4))]


# -- what is measured on -----------------------------------------------------------------------------------------------

PARTS = Parts(
    ift=(ranked("ift", ("a", 0), ("b", 1)),),
    eft=(ranked("eft", ("a", 0), ("b", 1)), ranked("one", ("a", 0))),
    evaluation=(ranked("new", ("a", 0), ("b", 1)), ranked("old", ("a", 0), ("b", 1), ("c", 2))),
    counts={"without ranks": 7},
)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranked data that is read from nowhere. The wording of `old` was trained on in another file."""

    def divide(data: Any, key: str = "data.trees") -> Parts:
        assert (data.trees, key) == ("trees.jsonl", "--data")
        return PARTS

    monkeypatch.setattr(judge_measures.seed_data, "divide", divide)


SEEN = TrainedOn(ids=frozenset(["ift", "eft"]), wordings=frozenset([wording("about old?")]))


@pytest.mark.parametrize(
    ("part", "names", "said"),
    [
        (None, ["new"], "3 prompts are trained on and left out"),
        ("ift", ["ift"], "1 prompts are trained on and measured on all the same"),
        ("eft", ["eft"], "1 prompts are trained on and measured on all the same"),
        ("evaluation", ["new", "old"], "1 prompts are trained on and measured on all the same"),
        ("all", ["eft", "ift", "new", "old"], "3 prompts are trained on and measured on all the same"),
    ],
)
def test_what_was_trained_on_is_left_out(
    divided: None, make_config: Any, part: str | None, names: list[str], said: str
) -> None:
    """By ids and by wording; and so is what has one ranked reply alone."""
    screen: Any = Screen()
    found = rated(make_config(), "trees.jsonl", part, None, SEEN, screen)
    assert sorted(prompt.id for prompt in found.prompts) == names
    assert [prompt.id for prompt in found.all] == ["eft", "ift", "new", "old"]
    assert (found.source, found.part) == ("trees.jsonl", part or "unseen")
    replies = sum(len(prompt.replies) for prompt in found.prompts)
    assert screen.lines == [
        "         7  without ranks",
        said,
        f"{len(names)} of {len(names)} prompts of part {part or 'unseen'} with {replies} ranked replies",
    ]


def test_a_limit_takes_some_by_seed(divided: None, make_config: Any) -> None:
    screen: Any = Screen()
    taken = [
        tuple(one.id for one in rated(make_config(seed=seed), "trees.jsonl", "all", 2, SEEN, screen).prompts)
        for seed in (0, *range(6))
    ]
    assert taken[0] == taken[1]
    assert len(set(taken)) > 1
    assert {len(one) for one in taken} == {2}
    said = r"^--data trees\.jsonl: no prompt with two .* at data\.language and data\.max_chars$"
    everything = TrainedOn(ids=frozenset(["ift", "eft", "new", "old"]))
    with pytest.raises(ConfigError, match=said):
        rated(make_config(), "trees.jsonl", None, None, everything, screen)


def test_what_a_run_trained_on_is_what_it_noted(make_config: Any, tmp_path: Path) -> None:
    noted = tmp_path / "trained_on.json"
    run: Any = SimpleNamespace(trained_on=noted)
    assert trained_on(make_config(), run) == trained_on(make_config(), None) == TrainedOn()
    noted.write_text(json.dumps({"ids": ["a"], "wordings": ["b"]}))
    assert trained_on(make_config(), run) == TrainedOn(ids=frozenset(["a"]), wordings=frozenset(["b"]))
