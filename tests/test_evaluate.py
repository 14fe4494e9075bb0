"""The evaluation's bookkeeping: who won, what is in which mean, and nothing asked twice. The engines are scripted."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Memory, context_of, engines_of, groups_of, recipe_of

from rsrlm.chat import ChatEncoder
from rsrlm.config import Config
from rsrlm.engines import SAMPLE_PRIORITY, Answers, Engines, gather
from rsrlm.evaluate import EVALUATION, Evaluation, kl_per_token, lengths, mean_score
from rsrlm.judges.base import judge_of
from rsrlm.judges.templates import fence_of
from rsrlm.records import Completion, Judgement, Prompt, Request, Response, Sampling, Scored, Unparsed, seed_of
from rsrlm.settings.base import ConfigError
from rsrlm.store.journal import CompletionLog

SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=8, seed=1)
PROMPTS = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk", "water", "beer")]
A, B, EVEN = (math.log(0.7), math.log(0.2)), (math.log(0.2), math.log(0.7)), (math.log(0.4), math.log(0.4))
NEITHER = (math.log(0.01), math.log(0.02))  # less than judge.min_mass=0.05 together


class Answering:
    """Answers by the request's id where `script` knows it, else by the seed. `version` is the weights it holds."""

    slots = 4

    def __init__(self, script: dict[str, Any] | None = None, version: str = "M0", slow: bool = False) -> None:
        self.requests: list[Request] = []
        self.calls: list[list[str]] = []
        self.script = script or {}
        self.version = version
        self._rng = random.Random(0) if slow else None

    @property
    def asked(self) -> list[str]:
        return [request.id for request in self.requests]

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append([request.id for request in requests])
        return await gather(map(self.generate, requests))

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        if self._rng:
            for _ in range(self._rng.randrange(20)):
                await asyncio.sleep(0)
        seed = request.sampling.seed
        answer = self.script.get(request.id)
        text = answer if isinstance(answer, str) else f"Because.\nScore: {seed % 6}"
        return Completion(
            request_id=request.id,
            token_ids=(seed % 40_000, seed % 7),
            text=text,
            finish_reason="stop",
            weight_version=self.version,
            label_logprobs=(answer or A)
            if len(request.label_ids) == 2
            else (math.log(1 / 6),) * len(request.label_ids),
            prompt_logprobs=()
            if request.score_from is None
            else tuple(-token / 10 for token in request.prompt_token_ids[request.score_from :]),
        )


@pytest.fixture
def evaluation(make_config: Any, encoder: ChatEncoder) -> Callable[..., Evaluation]:
    """An evaluation on these prompts; keyword arguments change the config."""

    def make(prompts: list[Prompt] = PROMPTS, **changes: Any) -> Evaluation:
        config: Config = make_config(**{"judge": {"kind": "text", "judgements": 3}, **changes})
        context = context_of(config, encoder)
        judge = judge_of(config.judge, context)
        return Evaluation(config, context, judge, judge, context, prompts)

    return make


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def by(engine: Answering, log: Any = None) -> Engines:
    return engines_of(engine, engine.version, log)


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def response(model: str, prompt: str, tokens: tuple[int, ...] = (5, 6, 2), text: str = "", **changes: Any) -> Response:
    made = Response(
        id=f"{model}/{prompt}/0",
        prompt_id=prompt,
        index=0,
        role="actor",
        text=text or f"The answer of {model}.",
        token_ids=tokens,
        prompt_token_ids=(1,),
        finish_reason="stop",
        weight_version=model,
        sampling=SAMPLING,
    )
    return replace(made, **changes)


def answers_of(model: str, prompts: list[Prompt], token: int) -> list[Response]:
    return [response(model, prompt.id, tokens=(token, 2)) for prompt in prompts]


# -- duels -------------------------------------------------------------------------------------------------------------

# (new shown first, old shown first): the log-probabilities of A and B in either order.
DUELS = {
    "better": (A, B),
    "better-too": (A, B),
    "worse": (B, A),
    "always-first": (A, A),
    "always-second": (B, B),
    "even": (EVEN, EVEN),
    "half-even": (A, EVEN),
    "blind-once": (A, NEITHER),
    "blind-first": (NEITHER, B),
    "blind": (NEITHER, NEITHER),
    "not-a-number": (A, (math.nan, -1.0)),
}
CONTENDERS = [Prompt(id=name, text=f"Say {name}.") for name in DUELS]
NEW, OLD = answers_of("M2", CONTENDERS, 7), answers_of("M1", CONTENDERS, 8)


def script(judge: str = "M0") -> dict[str, Any]:
    found = {}
    for name, (first, second) in DUELS.items():
        found[f"M2/{name}/0>M1/{name}/0@{judge}"] = first
        found[f"M1/{name}/0>M2/{name}/0@{judge}"] = second
    return found


def test_duels_by_hand(evaluation: Callable[..., Evaluation]) -> None:
    engines = Answering(script(), slow=True)
    found, _ = run(evaluation(CONTENDERS).duel(by(engines), "M0", NEW, OLD))
    # 2 wins, 1 loss; the first position twice, the second twice, even and half-even are ties; 4 cannot be read.
    assert found == {
        "judge": "pairwise (letters) by M0, both orders",
        "n": 7,
        "unreadable": 4,
        "win": 2 / 7,
        "tie": 4 / 7,
        "loss": 1 / 7,
    }
    assert sorted(engines.asked) == sorted(script())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("better", (1, 0, "win")),
        ("worse", (1, 0, "loss")),
        ("always-first", (1, 0, "tie")),
        ("always-second", (1, 0, "tie")),
        ("blind-once", (0, 1, None)),
        ("blind-first", (0, 1, None)),
    ],
)
def test_a_duel_of_one(name: str, expected: tuple[int, int, str | None], evaluation: Callable[..., Evaluation]) -> None:
    index = list(DUELS).index(name)
    alone = evaluation(CONTENDERS[index : index + 1])
    found, _ = run(alone.duel(by(Answering(script())), "M0", NEW[index : index + 1], OLD[index : index + 1]))
    n, unreadable, outcome = expected
    assert (found["n"], found["unreadable"]) == (n, unreadable)
    shares = {key: found[key] for key in ("win", "tie", "loss")}
    assert shares == {key: (float(key == outcome) if n else None) for key in shares}


def test_the_other_way_round_the_loser_wins(evaluation: Callable[..., Evaluation]) -> None:
    one, _ = run(evaluation(CONTENDERS).duel(by(Answering(script())), "M0", NEW, OLD))
    other, _ = run(evaluation(CONTENDERS).duel(by(Answering(script())), "M0", OLD, NEW))
    assert (other["win"], other["loss"]) == (one["loss"], one["win"])
    assert {key: other[key] for key in ("n", "unreadable", "tie")} == {
        key: one[key] for key in ("n", "unreadable", "tie")
    }


def test_the_same_tokens_are_a_tie_that_nobody_is_asked_about(evaluation: Callable[..., Evaluation]) -> None:
    """The same text by other tokens is asked about: what counts is what the model wrote."""
    old = [
        response("M1", "tea"),
        response("M1", "milk"),
        response("M1", "water", tokens=(56, 2)),
        response("M1", "beer"),
    ]
    new = [replace(one, id=one.id.replace("M1", "M2"), weight_version="M2") for one in old]
    new[2] = replace(new[2], token_ids=(5, 6, 2))
    engines = Answering({"M2/water/0>M1/water/0@M0": A, "M1/water/0>M2/water/0@M0": B})
    answers, ticks = Answers(Memory()), []
    with answers.counted(lambda *tick: ticks.append(tick)):
        found, _ = run(evaluation().duel(engines_of(engines, answers=answers), "M0", new, old))
    assert sorted(engines.asked) == ["M1/water/0>M2/water/0@M0", "M2/water/0>M1/water/0@M0"]
    # Both orders of all four: the bar comes to its end.
    assert sum(items for role, items, _ in ticks if role == "duel") == 8
    assert found["judge"] == "pairwise (letters) by M0, both orders"
    assert (found["n"], found["unreadable"]) == (4, 0)
    assert (found["win"], found["tie"], found["loss"]) == (0.25, 0.75, 0.0)


def test_without_prompts_there_are_no_shares(evaluation: Callable[..., Evaluation]) -> None:
    found, _ = run(evaluation([]).duel(by(Answering()), "M0", [], []))
    assert {key: found[key] for key in found if key != "judge"} == {
        "n": 0, "unreadable": 0, "win": None, "tie": None, "loss": None,
    }  # fmt: skip


def test_what_the_judge_of_a_duel_is_shown(evaluation: Callable[..., Evaluation], encoder: ChatEncoder) -> None:
    """Both answers whole, in both orders; nothing else differs, the fence included."""
    prompt = PROMPTS[:1]
    new, old = response("M2", "tea", (1,), "It is <|im_end|> hot."), response("M1", "tea", (2,), "It is a leaf.")
    engines = Answering()
    run(evaluation(prompt).duel(by(engines), "M0", [new], [old]))
    tokenizer = encoder.tokenizer
    shown = {request.id: tokenizer.decode(request.prompt_token_ids) for request in engines.requests}
    first, second = shown["M2/tea/0>M1/tea/0@M0"], shown["M1/tea/0>M2/tea/0@M0"]
    assert "Say tea." in first
    assert first.index(new.text) < first.index(old.text)
    assert second.index(old.text) < second.index(new.text)
    swapped = first.replace(new.text, "?").replace(old.text, new.text).replace("?", old.text)
    assert swapped.replace(old.text, "").replace(new.text, "") == second.replace(old.text, "").replace(new.text, "")
    assert first.endswith("Better answer: (")
    for request in engines.requests:
        assert tokenizer.convert_ids_to_tokens(list(request.label_ids)) == ["A", "B"]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.0, 1.0, 1)
        assert request.priority == SAMPLE_PRIORITY
        # The end token that the answer spells is not one.
        assert list(request.prompt_token_ids).count(tokenizer.eos_token_id) == first.count("<|im_end|>") - 1


def test_a_duel_that_does_not_fit_is_unreadable_and_not_asked(evaluation: Callable[..., Evaluation]) -> None:
    prompt, new, old = CONTENDERS[:1], NEW[:1], OLD[:1]
    first = Answering(script())
    run(evaluation(prompt).duel(by(first), "M0", new, old))
    length = len(first.requests[0].prompt_token_ids)
    for room, asked in ((length, 0), (length + 1, 2)):  # the letter is a token as well
        engines = Answering(script())
        made = evaluation(prompt, engine={"max_model_len": room}, judge={"kind": "digits"})
        found, _ = run(made.duel(by(engines), "M0", new, old))
        assert len(engines.requests) == asked
        assert (found["n"], found["unreadable"]) == ((1, 0) if asked else (0, 1))
        (outcome,) = run(made.outcomes(by(engines), "M0", new, old))
        assert outcome == ("first" if asked else Unparsed(reason="judge prompt too long"))


def test_what_is_asked_of_the_judge_of_a_duel(evaluation: Callable[..., Evaluation]) -> None:
    """Both orders in one call to one replica, each with an id and a seed of its own."""
    engines = Answering(script())
    outcomes = run(evaluation(CONTENDERS).outcomes(by(engines), "M0", NEW, OLD))
    asked = {request.id: request for request in engines.requests}
    assert set(asked) == set(script())
    assert {request.role for request in engines.requests} == {"duel"}
    for order in (("M2", "M1"), ("M1", "M2")):
        name = f"{order[0]}/worse/0>{order[1]}/worse/0"
        seed = seed_of(0, EVALUATION, "worse", "duel", name)
        assert asked[f"{name}@M0"].sampling == Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=seed)
    assert sorted(map(sorted, engines.calls)) == sorted(
        sorted(f"{one}/{name}/0>{other}/{name}/0@M0" for one, other in (("M1", "M2"), ("M2", "M1"))) for name in DUELS
    )
    # A judge with too little mass on the letters decides nothing, nor one whose numbers are none.
    assert dict(zip(DUELS, outcomes, strict=True)) == {
        "better": "first",
        "better-too": "first",
        "worse": "second",
        "always-first": "tie",
        "always-second": "tie",
        "even": "tie",
        "half-even": "tie",
        **dict.fromkeys(("blind-once", "blind-first", "blind"), Unparsed(reason="little mass on letters")),
        "not-a-number": outcomes[-1],
    }
    assert isinstance(outcomes[-1], Unparsed)


def test_a_template_of_the_users_own_is_named(evaluation: Callable[..., Evaluation], tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ instruction }} {{ response_a }} {{ response_b }}")
    found, _ = run(evaluation([], evaluate={"judge": {"template": str(file)}}).duel(by(Answering()), "M0", [], []))
    assert found["judge"] == f"{file} (letters) by M0, both orders"
    file.write_text("{{ instruction }} {{ response_a }}")
    with pytest.raises(ConfigError, match=r"evaluate\.judge\.template='.*mine\.jinja': does not use response_b"):
        evaluation(evaluate={"judge": {"template": str(file)}})
    evaluation(evaluate={"judge": {"template": str(file)}, "duel": False})  # not looked at


# -- answers and scores ------------------------------------------------------------------------------------------------


def test_answers_keep_the_order_of_the_prompts(evaluation: Callable[..., Evaluation]) -> None:
    engines = Answering({f"M1/{prompt.id}/0": f"A cup of {prompt.id}." for prompt in PROMPTS}, "M1", slow=True)
    found = run(evaluation(evaluate={"max_tokens": 17, "temperature": 0.3}).answers(by(engines)))
    assert [answer.id for answer in found] == [f"M1/{prompt.id}/0" for prompt in PROMPTS]
    assert [answer.prompt_id for answer in found] == [prompt.id for prompt in PROMPTS]
    assert [answer.text for answer in found] == [f"A cup of {prompt.id}." for prompt in PROMPTS]
    assert {answer.weight_version for answer in found} == {"M1"}
    assert {(r.sampling.max_tokens, r.sampling.temperature) for r in engines.requests} == {(17, 0.3)}
    assert {r.priority for r in engines.requests} == {SAMPLE_PRIORITY}
    assert [r.sampling.seed for r in engines.requests] == [
        seed_of(0, EVALUATION, f"M1/{prompt.id}", "actor", "0") for prompt in PROMPTS
    ]


def test_a_judge_does_not_take_the_judgements_of_another(evaluation: Callable[..., Evaluation]) -> None:
    """M1's own judgements and the frozen M0's stand side by side in one journal."""
    judge, log = evaluation(), Memory()
    answers = answers_of("M1", PROMPTS, 3)
    own = run(judge.scores(judge.judge, by(Answering(version="M1"), log), "M1", answers))
    frozen_engines = Answering(version="M0")
    frozen = run(judge.scores(judge.judge, by(frozen_engines, log), "M0", answers))
    assert len(frozen_engines.requests) == 4 * 3
    assert [j.id for j in own] == [f"M1/{p.id}/0#{index}@M1" for p in PROMPTS for index in range(3)]
    assert [j.id for j in frozen] == [f"M1/{p.id}/0#{index}@M0" for p in PROMPTS for index in range(3)]
    assert ({j.weight_version for j in own}, {j.weight_version for j in frozen}) == ({"M1"}, {"M0"})
    assert {j.response_id for j in own} == {j.response_id for j in frozen} == {answer.id for answer in answers}
    assert sorted(entry["id"] for entry in log.entries.values()) == sorted(j.id for j in [*own, *frozen])


def by_length(prompt: str, response: str) -> float:
    return float(len(response))


def test_a_function_scores_without_engines(evaluation: Callable[..., Evaluation], functions_here: None) -> None:
    engines = Answering()
    judge = evaluation(judge={"kind": "function", "function": f"{__name__}:by_length"})
    answers = [response("M1", prompt.id, text=prompt.id) for prompt in PROMPTS]
    found = run(judge.scores(judge.judge, by(engines), "M0", answers))
    assert [j.verdict for j in found] == [Scored(points=float(len(prompt.id))) for prompt in PROMPTS]
    assert mean_score(answers, found) == {"mean": (3 + 4 + 5 + 4) / 4, "n": 4}
    assert engines.requests == []


# -- seeds and journals ------------------------------------------------------------------------------------------------


async def whole(judge: Evaluation, log: Any) -> tuple[list[Request], list[Any]]:
    """What a run evaluates: M0, M1 and M2 by themselves and by M0, and each against the one before."""
    requests: list[Request] = []
    found: list[Any] = []
    before: list[Response] = []
    for model in ("M0", "M1", "M2"):
        asked, frozen = Answering(version=model), Answering(version="M0")
        engines, first = by(asked, log), by(frozen, log)
        answers = await judge.answers(engines)
        found += [answers, await judge.scores(judge.judge, engines, model, answers)]
        if before:
            found.append(await judge.scores(judge.judge, first, "M0", answers))
            found.append(await judge.duel(first, "M0", answers, before))
        before = answers
        requests += asked.requests + frozen.requests
    return requests, found


def test_no_two_requests_share_a_seed(
    evaluation: Callable[..., Evaluation], make_config: Any, encoder: ChatEncoder
) -> None:
    """Nor with the training of the same prompts, whose texts are all the same here."""
    prompts = [Prompt(id=name, text="Same text.") for name in ("1", "11", "0", "M0", "M1", "duel", "1@M0", "a b")]
    requests, _ = run(whole(evaluation(prompts), Memory()))
    answers, scores, duels = 3 * 8, (1 + 2 + 2) * 8 * 3, 2 * 8 * 2
    assert len(requests) == answers + scores + duels

    config = make_config(judge={"kind": "text", "judgements": 3})
    training = Answering()
    for iteration in (0, 1):
        groups_of(recipe_of(config, encoder), training, prompts, iteration)
    every = [*requests, *training.requests]
    assert len({request.sampling.seed for request in every}) == len(every) == len(requests) + 2 * 8 * 2 * (1 + 3)


def test_fences_are_one_for_a_duel_and_differ_between_prompts(
    evaluation: Callable[..., Evaluation], encoder: ChatEncoder
) -> None:
    engines = Answering()
    run(evaluation().duel(by(engines), "M0", answers_of("M2", PROMPTS, 3), answers_of("M1", PROMPTS, 4)))
    length = len(fence_of(0))
    fences: dict[str, set[str]] = {}
    for request in engines.requests:
        text = encoder.tokenizer.decode(request.prompt_token_ids)
        tags = {word for word in text.replace("<", " ").replace(">", " ").replace("_", " ").replace("-", " ").split()}
        hexes = {tag for tag in tags if len(tag) == length and set(tag) <= set("0123456789abcdef")}
        fences.setdefault(request.id.split("/")[1], set()).update(hexes)
    assert {len(found) for found in fences.values()} == {1}
    assert len(set().union(*fences.values())) == len(PROMPTS)


def test_another_run_seed_samples_anew(evaluation: Callable[..., Evaluation]) -> None:
    one, _ = run(whole(evaluation(seed=0), Memory()))
    other, _ = run(whole(evaluation(seed=1), Memory()))
    assert not {r.sampling.seed for r in one} & {r.sampling.seed for r in other}


def test_what_the_journal_holds_is_not_asked_again(evaluation: Callable[..., Evaluation], journal: Path) -> None:
    judge = evaluation()
    requests, expected = run(whole(judge, CompletionLog(journal)))
    assert requests
    requests, again = run(whole(judge, CompletionLog(journal)))
    assert requests == []
    assert again == expected


@pytest.mark.parametrize("seed", range(6))
def test_after_a_kill_only_what_is_missing_is_asked(
    seed: int, evaluation: Callable[..., Evaluation], journal: Path
) -> None:
    judge = evaluation()
    first, expected = run(whole(judge, CompletionLog(journal)))
    content = journal.read_bytes()
    kept = content[: random.Random(seed).randrange(len(content))]
    journal.write_bytes(kept)
    lost = content.count(b"\n") - kept.count(b"\n")
    second, again = run(whole(judge, CompletionLog(journal)))
    assert len(second) == lost > 0
    assert {request.sampling.seed for request in second} <= {request.sampling.seed for request in first}
    assert again == expected
    assert len(journal.read_bytes()) == len(content)


def test_one_order_of_a_duel_is_enough_to_go_on(evaluation: Callable[..., Evaluation], journal: Path) -> None:
    """Killed between the two: the verdict in the journal counts, whatever the judge would say today."""
    judge = evaluation(CONTENDERS[:1])
    run(judge.duel(by(Answering(script()), CompletionLog(journal)), "M0", NEW[:1], OLD[:1]))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0] + lines[1][:40])
    engines = Answering(dict.fromkeys(script(), B))  # the first order said A
    found, _ = run(judge.duel(by(engines, CompletionLog(journal)), "M0", NEW[:1], OLD[:1]))
    assert engines.asked == ["M1/better/0>M2/better/0@M0"]
    assert found["win"] == 1.0


# -- means -------------------------------------------------------------------------------------------------------------


def judgement(answer: Response, index: int, points: float | None) -> Judgement:
    return Judgement(
        id=f"{answer.id}#{index}@M0",
        prompt_id=answer.prompt_id,
        response_id=answer.id,
        index=index,
        role="judge",
        judge="additive (text)",
        text="",
        token_ids=(),
        finish_reason="stop",
        weight_version="M0",
        sampling=SAMPLING,
        verdict=Unparsed(reason="no score line") if points is None else Scored(points=points),
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # Of the readable judgements of an answer, then of the answers that have any: (3.5 + 1 + 0) / 3.
        ([[5, None, 2], [None, None, None], [1, 1, 1], [0, 0, None]], {"mean": 1.5, "n": 3}),
        # An answer counts once, however many of its judgements can be read: not (4 + 4 + 4 + 1) / 4.
        ([[4, 4, 4], [None, 1, None]], {"mean": 2.5, "n": 2}),
        ([[0, 0, 0]], {"mean": 0.0, "n": 1}),
        ([[None, None, None], [None, None, None]], {"mean": None, "n": 0}),
        ([[]], {"mean": None, "n": 0}),
        ([], {"mean": None, "n": 0}),
    ],
)
def test_mean_scores(points: list[list[float | None]], expected: dict[str, Any]) -> None:
    answers = [response("M1", f"p{number}") for number in range(len(points))]
    judgements = [
        judgement(answer, index, value)
        for answer, values in zip(answers, points, strict=True)
        for index, value in enumerate(values)
    ]
    random.Random(1).shuffle(judgements)
    assert mean_score(answers, judgements) == expected


def test_scores_that_cannot_be_read_are_in_no_mean(evaluation: Callable[..., Evaluation]) -> None:
    """From the judge's text to the mean: 3 judgements for each of 4 answers."""
    answers = answers_of("M1", PROMPTS, 3)
    said = [["Score: 5", "I like it.", "Score: 2"], ["No.", "Score: 9", ""], ["Score: 1"] * 3, ["Score: 0"] * 3]
    texts = {
        f"{answer.id}#{index}@M0": text or " "
        for answer, three in zip(answers, said, strict=True)
        for index, text in enumerate(three)
    }
    made = evaluation()
    found = run(made.scores(made.judge, by(Answering(texts)), "M0", answers))
    assert sum(isinstance(j.verdict, Unparsed) for j in found) == 4
    assert mean_score(answers, found) == {"mean": 1.5, "n": 3}


def test_lengths() -> None:
    answers = [
        response("M1", "a", tokens=(5, 6, 7, 2), text="Tea is\na  drink."),
        response("M1", "b", tokens=(5, 6), text="Milk", finish_reason="length"),
        response("M1", "c", tokens=(2,), text=" "),
        response("M1", "d", tokens=(), text="x y z", finish_reason="length"),
    ]
    assert lengths(answers) == {"tokens": 7 / 4, "words": (4 + 1 + 0 + 3) / 4, "complete": 0.5}
    assert lengths(answers[:1]) == {"tokens": 4.0, "words": 4.0, "complete": 1.0}
    assert lengths([]) == {"tokens": None, "words": None, "complete": None}


def test_kl_per_token_by_hand() -> None:
    """r = log first - log model is -0.5, 0 and ln 2: exp(r) - 1 - r is 0.1065, 0 and 0.3069; their mean 0.1378."""
    found = kl_per_token([(-1.0, -2.0), (-1.0,)], [(-1.5, -2.0), (-1.0 + math.log(2),)])
    assert found == {"per_token": pytest.approx((math.exp(-0.5) - 0.5 + 1 - math.log(2)) / 3), "tokens": 3}
    assert found["per_token"] == pytest.approx(0.1378, abs=1e-4)
    assert kl_per_token([], []) == {"per_token": None, "tokens": 0}


def test_samples_for_the_kl_come_from_the_whole_distribution(evaluation: Callable[..., Evaluation]) -> None:
    """And each is scored where it stands: behind its prompt, its own tokens only, and never beyond the context."""
    engines = Answering(version="M1")
    made = evaluation(evaluate={"temperature": 0.0, "top_p": 0.9, "max_tokens": 7})
    drawn = run(made.samples(by(engines)))
    assert [response.prompt_id for response in drawn] == [prompt.id for prompt in PROMPTS]
    asked = [request.sampling for request in engines.requests]
    assert {(one.temperature, one.top_p, one.max_tokens) for one in asked} == {(1.0, 1.0, 7)}
    own, room = made.config.seed, made.context.room
    assert [one.seed for one in asked] == [seed_of(own, EVALUATION, f"M1/{p.id}", "actor", "kl") for p in PROMPTS]
    again = run(made.samples(by(Answering(version="M1"))))
    assert [one.token_ids for one in again] == [one.token_ids for one in drawn]
    assert [one.id for one in drawn] == [f"M1/{prompt.id}/kl/0" for prompt in PROMPTS]
    scores = run(by(engines).logprobs(drawn, room))
    assert scores == [tuple(-token / 10 for token in one.token_ids) for one in drawn]
    scored = engines.requests[len(PROMPTS) :]
    assert {(one.sampling, one.priority) for one in scored} == {
        (Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=0), SAMPLE_PRIORITY)
    }
    needs = made.needs()
    assert list(needs)[:2] == ["evaluate.max_tokens", "the judge of a held-out answer"]
    assert needs["evaluate.max_tokens"] == len(made.context.encoder.user("")) + 7
    full = replace(drawn[0], prompt_token_ids=(1,) * (room - 2), token_ids=(8, 9))
    assert run(by(engines).logprobs([full], room)) == [(-0.8,)]
