"""Judges against people and models against each other, with a judge that is a function and one that is scripted."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsrlm import judge_eval
from rsrlm.ask import SAMPLE_PRIORITY, Judging, duel_judge
from rsrlm.chat import ChatEncoder
from rsrlm.commands import tools
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.evaluate import EVALUATION
from rsrlm.model import load_tokenizer
from rsrlm.records import Completion, Prompt, Request, Response, Sampling, Scored, seed_of
from rsrlm.report import metrics
from rsrlm.store.folder import Journal

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, seed=1)


def longer(prompt: str, response: str) -> float | None:
    """A judge that likes length, and cannot read what begins with a question mark."""
    return None if response.startswith("?") else min(5.0, float(len(response)))


class Scripted:
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
            prompt_tokens=1, cached_tokens=0, replica=0, label_logprobs=self._decide(shown),
        )  # fmt: skip


def likes_good(shown: str) -> tuple[float, float]:
    """A where "good" is shown as A, else B."""
    a, b = shown.index("<response A"), shown.index("<response B")
    return (-0.1, -3.0) if "good" in shown[a:b] else (-3.0, -0.1)


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(smollm2, False))


def ticked(name: str, items: int, tokens: int) -> None:
    pass


def ranked(name: str, *replies: tuple[str, float | None]) -> RankedPrompt:
    found = tuple(Reply(id=f"{name}-{i}", text=text, rank=rank) for i, (text, rank) in enumerate(replies))
    return RankedPrompt(id=name, text=f"about {name}?", replies=found)


def test_only_ranked_replies_are_compared() -> None:
    prompts = [ranked("a", ("x", 0), ("y", None), ("z", 1)), ranked("b", ("x", 0), ("y", None)), ranked("c", ("x", 0))]
    found = judge_eval.comparable(prompts)
    assert [[reply.id for reply in prompt.replies] for prompt in found] == [["a-0", "a-2"]]


def test_measures_of_a_judge_that_scores(
    make_config: Any, encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 prompts: people and the judge agree on 20, disagree on 10, tie for the judge on 6, unreadable in 4."""
    config = make_config(judge={"read": "function", "function": "test_judge_eval:longer"})
    prompts = [ranked(f"agree{i}", ("xxx", 0), ("x", 1)) for i in range(20)]
    prompts += [ranked(f"other{i}", ("x", 0), ("xxxxx", 1)) for i in range(10)]
    prompts += [ranked(f"tie{i}", ("xx", 0), ("yy", 1)) for i in range(6)]
    prompts += [ranked(f"unread{i}", ("?x", 0), ("y", 1)) for i in range(4)]
    journal = Journal(tmp_path / "journal.jsonl")
    found = asyncio.run(
        judge_eval.scores(prompts, Judging(config, encoder), None, journal, ticked, 0)  # type: ignore[arg-type]
    )
    assert (found["pairwise_accuracy"]["value"], found["pairwise_accuracy"]["n"]) == (pytest.approx(20 / 36), 36)
    assert found["agreement"]["value"] == pytest.approx(23 / 36)  # a tie counts one half
    assert (found["agreement_without_ties"]["value"], found["agreement_without_ties"]["n"]) == (
        pytest.approx(20 / 30), 30,
    )  # fmt: skip
    assert found["tie_share"]["value"] == pytest.approx(6 / 36)
    assert found["readable"]["value"] == pytest.approx(76 / 80)
    assert not found["five_best"]["estimable"]  # ten replies with a 5
    assert found["five_best"]["n"] == 10


def test_measures_of_a_judge_that_compares(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    """A judge that always says A agrees with itself in no order: nothing but position."""
    config = make_config()
    prompts = [ranked(f"p{i}", ("good", 0), ("bad", 1), ("bad too", 1)) for i in range(32)]
    engine = Scripted(lambda shown: (-0.1, -3.0), encoder.tokenizer)

    def measured() -> dict[str, Any]:
        journal = Journal(tmp_path / "journal.jsonl")
        work = judge_eval.verdicts(prompts, duel_judge(config, encoder), engine, journal, ticked, 0)
        return asyncio.run(work)

    found = measured()
    assert found["first_position"]["value"] == 1.0
    assert found["inconsistent"]["value"] == 1.0
    assert found["agreement"]["n"] == 0
    assert engine.asked == 32 * 6  # three pairs of each prompt in both orders
    assert measured() == found
    assert engine.asked == 32 * 6  # the journal knew them all


@pytest.mark.parametrize(("good", "bad", "agreement"), [(0, 1, 1.0), (1, 0, 0.0)])
def test_agreement_of_a_judge_that_compares(
    good: int, bad: int, agreement: float, make_config: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    """The judge takes "good" wherever it stands; people rank it first (0 is the best rank), or last."""
    prompts = [ranked(f"p{i}", ("good", good), ("bad", bad), ("poor", bad)) for i in range(20)]
    prompts += [ranked(f"q{i}", ("bad", bad), ("good", good)) for i in range(20)]
    found = asyncio.run(
        judge_eval.verdicts(
            prompts, duel_judge(make_config(), encoder), Scripted(likes_good, encoder.tokenizer),
            Journal(tmp_path / "journal.jsonl"), ticked, 0,
        )
    )  # fmt: skip
    # Of 80 comparisons, people have no preference in the 20 of "bad" and "poor", where the judge says B in both orders.
    assert (found["agreement"]["value"], found["agreement"]["n"]) == (agreement, 60)
    assert found["inconsistent"]["value"] == 20 / 80
    assert found["first_position"]["value"] == 60 / 160  # once per comparison that has a "good" one


def test_a_duel_counts_both_orders_and_equal_answers(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    def answer(prompt: str, text: str) -> Response:
        return Response(
            id=f"{prompt}/0", prompt_id=prompt, index=0, role="actor", text=text, token_ids=(5,),
            prompt_token_ids=(1,), finish_reason="stop", weight_version="M0", sampling=SAMPLING,
        )  # fmt: skip

    prompts = [Prompt(id=f"p{i}", text="?") for i in range(40)]
    first = [answer(p.id, "same" if i < 10 else "good") for i, p in enumerate(prompts)]
    second = [answer(p.id, "same" if i < 10 else "bad") for i, p in enumerate(prompts)]
    engine = Scripted(likes_good, encoder.tokenizer)
    found = asyncio.run(
        judge_eval.duel(
            prompts, first, second, duel_judge(make_config(), encoder), engine, Journal(tmp_path / "j.jsonl"), ticked, 0
        )
    )
    assert (found["win"]["value"], found["tie"]["value"], found["loss"]["value"]) == (0.75, 0.25, 0.0)
    assert found["win_rate"]["value"] == 0.875
    assert engine.asked == 60  # equal answers need no judge
    assert found["mean_chars"] == [4.0, pytest.approx(3.25)]


def test_answers_of_another_question_are_not_taken(tmp_path: Path) -> None:
    from rsrlm.config import ConfigError

    tools.begun_with(tmp_path, "judge", {"seed": 1, "judge": {"read": "text"}})
    tools.begun_with(tmp_path, "judge", {"seed": 1, "judge": {"read": "text"}})
    with pytest.raises(ConfigError, match=r"begun with other settings \(judge=.*text.*, now .*digits.*\); restore"):
        tools.begun_with(tmp_path, "judge", {"seed": 1, "judge": {"read": "digits"}})


def test_what_a_judge_that_compares_is_asked(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    """Both orders share a fence and nothing else; a run that is resumed, or made again, asks the same."""
    config = make_config()
    engine, ticks = Scripted(likes_good, encoder.tokenizer), []
    journal = Journal(tmp_path / "journal.jsonl")
    work = judge_eval.verdicts(
        [ranked("tea", ("good", 0), ("bad", 1))], duel_judge(config, encoder), engine, journal,
        lambda *tick: ticks.append(tick), 5,
    )  # fmt: skip
    asyncio.run(work)
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
    assert ticks == [("compare", 1, 1)] * 2
    for name in asked:
        found = journal.judgements[name]
        assert (found.prompt_id, found.response_id, found.index, found.role) == ("tea", name, 0, "duel")
        assert found.verdict == Scored(points=1.0 if name == "tea/0>1" else 0.0)


def test_two_models_answer_with_the_same_luck(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    """One answer to each prompt, in their order, with the seed of the prompt; what the journal holds is not asked."""
    config = make_config(evaluate={"temperature": 0.3, "max_tokens": 17})
    prompts = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk")]
    ticks: list[tuple[str, int, int]] = []

    def of(engine: Scripted, name: str) -> list[Response]:
        journal = Journal(tmp_path / name)
        work = judge_eval.answers(prompts, engine, encoder, config, journal, lambda *tick: ticks.append(tick))
        return asyncio.run(work)

    one, other, none = (Scripted(lambda shown: (0.0, 0.0), encoder.tokenizer) for _ in range(3))
    answers = of(one, "one")
    assert [(found.id, found.prompt_id, found.index, found.role) for found in answers] == [
        ("tea/0", "tea", 0, "actor"), ("milk/0", "milk", 0, "actor"),
    ]  # fmt: skip
    assert ticks == [("answers", 1, 1)] * 2
    assert [request.prompt_token_ids for request in one.requests] == [encoder.user(prompt.text) for prompt in prompts]
    assert {(r.sampling.temperature, r.sampling.max_tokens) for r in one.requests} == {(0.3, 17)}
    assert [request.sampling.seed for request in one.requests] == [3951183676720834804, 412244639712059126]
    of(other, "other")
    assert other.requests == one.requests
    assert of(none, "one") == answers
    assert none.requests == []


def test_a_duel_is_seeded_ticked_and_kept(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    """40 prompts, of which five have equal answers and five cannot be read in one order."""
    prompts = [Prompt(id=f"p{i}", text=f"number {i}?") for i in range(40)]

    def answer(prompt: Prompt, text: str) -> Response:
        return Response(
            id=f"{prompt.id}/0", prompt_id=prompt.id, index=0, role="actor", text=text, token_ids=(5,),
            prompt_token_ids=(1,), finish_reason="stop", weight_version="M0", sampling=SAMPLING,
        )  # fmt: skip

    first = [answer(p, "same" if i < 5 else f"good {i}") for i, p in enumerate(prompts)]
    second = [answer(p, "same" if i < 5 else f"bad {i}") for i, p in enumerate(prompts)]

    def likes_good(shown: str) -> tuple[float, float]:
        a = shown[shown.index("<response A") : shown.index("<response B")]
        if "bad" in a and any(f"number {i}?" in shown for i in range(5, 10)):
            return (-20.0, -20.0)
        return (-0.1, -3.0) if "good" in a else (-3.0, -0.1)

    engine = Scripted(likes_good, encoder.tokenizer)
    seeds_asked: list[int] = []
    priorities: set[int] = set()
    generate = engine.generate

    async def noted(request: Request) -> Completion:
        seeds_asked.append(request.sampling.seed)
        priorities.add(request.priority)
        return await generate(request)

    engine.generate = noted  # type: ignore[method-assign]
    ticks: list[tuple[str, int, int]] = []
    journal = Journal(tmp_path / "j.jsonl")
    judge = duel_judge(make_config(), encoder)
    found = asyncio.run(
        judge_eval.duel(prompts, first, second, judge, engine, journal, lambda *tick: ticks.append(tick), 7)
    )
    assert found["unreadable"] == 5
    assert priorities == {SAMPLE_PRIORITY}
    outcomes: list[Any] = ["tie"] * 5 + ["first"] * 30
    assert {key: found[key] for key in ("win", "tie", "loss", "win_rate")} == metrics.win_rate(outcomes, seed=7)
    assert found["win"] != metrics.win_rate(outcomes, seed=8)["win"]
    assert set(ticks) == {("compare", 2, 0), ("compare", 1, 1)}
    assert sum(items for _, items, _ in ticks) == 80
    assert set(journal.judgements) == {f"p{i}#{order}" for i in range(5, 40) for order in (0, 1)}
    assert set(seeds_asked) == {
        seed_of(7, EVALUATION, f"p{i}", "duel", order) for i in range(5, 40) for order in ("0", "1")
    }
    nobody = asyncio.run(judge_eval.duel([], [], [], judge, engine, journal, ticked, 7))
    assert nobody["mean_chars"] == [None, None]


def test_what_is_measured_is_what_people_and_judge_said(
    make_config: Any, encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replies that people rank alike, a third below them, which the judge cannot compare with the second."""

    def decide(shown: str) -> tuple[float, float]:
        if "poor" in shown and "fair" in shown:
            return (-20.0, -20.0)
        a = shown[shown.index("<response A") : shown.index("<response B")]
        return (-0.1, -3.0) if "good" in a else (-3.0, -0.1)

    measured: list[Any] = []
    monkeypatch.setattr(
        metrics, "pairwise_judge_metrics", lambda outcomes, seed: measured.append((list(outcomes), seed)) or {}
    )
    prompt = ranked("p", ("good", 0), ("fair", 0), ("poor", 1))
    judge, engine = duel_judge(make_config(), encoder), Scripted(decide, encoder.tokenizer)
    asyncio.run(judge_eval.verdicts([prompt], judge, engine, Journal(tmp_path / "v.jsonl"), ticked, 7))
    ((outcomes, seed),) = measured
    assert seed == 7
    assert [(one.first, one.second, one.human) for one in outcomes] == [
        ("A", "B", "tie"), ("A", "B", "first"), (None, None, "first"),
    ]  # fmt: skip
    monkeypatch.setattr(metrics, "judge_metrics", lambda rated, **options: measured.append(options) or {})
    config = make_config(judge={"read": "function", "function": "test_judge_eval:longer"})
    work = judge_eval.scores([prompt], Judging(config, encoder), engine, Journal(tmp_path / "s.jsonl"), ticked, 7)
    asyncio.run(work)
    assert measured[-1] == {"readable": 3, "judgements": 3, "points": [4.0, 4.0, 4.0], "seed": 7}
