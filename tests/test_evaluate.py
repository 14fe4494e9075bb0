"""The evaluation's bookkeeping: who won, what is in which mean, and nothing asked twice. The engines are scripted."""

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsrlm.ask import SAMPLE_PRIORITY, Judging, winner_of
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config, ConfigError
from rsrlm.evaluate import EVALUATION, Evaluation, kl_per_token, lengths, mean_score
from rsrlm.judges.verdicts import fence_of
from rsrlm.model import load_tokenizer
from rsrlm.produce import Producer
from rsrlm.records import Completion, Judgement, Prompt, Request, Response, Sampling, Scored, Unparsed, seed_of
from rsrlm.store.folder import Journal

SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, seed=1)
PROMPTS = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk", "water", "beer")]
A, B, EVEN = (math.log(0.7), math.log(0.2)), (math.log(0.2), math.log(0.7)), (math.log(0.4), math.log(0.4))
NEITHER = (math.log(0.01), math.log(0.02))  # less than judge.min_mass=0.05 together


class Engines:
    """Answers by the request's id where `script` knows it, else by the seed. `version` is the weights it holds."""

    slots = 4

    def __init__(self, script: dict[str, Any] | None = None, version: str = "M0", slow: bool = False) -> None:
        self.requests: list[Request] = []
        self.script = script or {}
        self.version = version
        self._rng = random.Random(0) if slow else None

    @property
    def asked(self) -> list[str]:
        return [request.id for request in self.requests]

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
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,
            replica=0,
            label_logprobs=(answer or A)
            if len(request.label_ids) == 2
            else (math.log(1 / 6),) * len(request.label_ids),
            prompt_logprobs=()
            if request.score_from is None
            else tuple(-token / 10 for token in request.prompt_token_ids[request.score_from :]),
        )


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(smollm2))


@pytest.fixture
def evaluation(make_config: Any, encoder: ChatEncoder) -> Callable[..., Evaluation]:
    """An evaluation on these prompts; keyword arguments change the config."""

    def make(prompts: list[Prompt] = PROMPTS, **changes: Any) -> Evaluation:
        config: Config = make_config(**{"judge": {"read": "text", "judgements": 3}, **changes})
        return Evaluation(config, encoder, Judging(config, encoder), prompts)

    return make


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "M1.jsonl")
    yield opened
    opened.close()


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


def test_duels_by_hand(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    engines = Engines(script(), slow=True)
    found = run(evaluation(CONTENDERS).duel(engines, "M0", NEW, OLD, journal))
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
def test_a_duel_of_one(
    name: str, expected: tuple[int, int, str | None], evaluation: Callable[..., Evaluation], journal: Journal
) -> None:
    index = list(DUELS).index(name)
    alone = evaluation(CONTENDERS[index : index + 1])
    found = run(alone.duel(Engines(script()), "M0", NEW[index : index + 1], OLD[index : index + 1], journal))
    n, unreadable, outcome = expected
    assert (found["n"], found["unreadable"]) == (n, unreadable)
    shares = {key: found[key] for key in ("win", "tie", "loss")}
    assert shares == {key: (float(key == outcome) if n else None) for key in shares}


def test_the_other_way_round_the_loser_wins(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    one = run(evaluation(CONTENDERS).duel(Engines(script()), "M0", NEW, OLD, journal))
    other = run(evaluation(CONTENDERS).duel(Engines(script()), "M0", OLD, NEW, journal))
    assert (other["win"], other["loss"]) == (one["loss"], one["win"])
    assert {key: other[key] for key in ("n", "unreadable", "tie")} == {
        key: one[key] for key in ("n", "unreadable", "tie")
    }


def test_the_same_tokens_are_a_tie_that_nobody_is_asked_about(
    evaluation: Callable[..., Evaluation], journal: Journal
) -> None:
    """The same text by other tokens is asked about: what counts is what the model wrote."""
    old = [
        response("M1", "tea"),
        response("M1", "milk"),
        response("M1", "water", tokens=(56, 2)),
        response("M1", "beer"),
    ]
    new = [replace(one, id=one.id.replace("M1", "M2"), weight_version="M2") for one in old]
    new[2] = replace(new[2], token_ids=(5, 6, 2))
    engines = Engines({"M2/water/0>M1/water/0@M0": A, "M1/water/0>M2/water/0@M0": B})
    found = run(evaluation().duel(engines, "M0", new, old, journal))
    assert sorted(engines.asked) == ["M1/water/0>M2/water/0@M0", "M2/water/0>M1/water/0@M0"]
    assert (found["n"], found["unreadable"]) == (4, 0)
    assert (found["win"], found["tie"], found["loss"]) == (0.25, 0.75, 0.0)
    assert len(journal.judgements) == 2


def test_without_prompts_there_are_no_shares(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    found = run(evaluation([]).duel(Engines(), "M0", [], [], journal))
    assert {key: found[key] for key in found if key != "judge"} == {
        "n": 0, "unreadable": 0, "win": None, "tie": None, "loss": None,
    }  # fmt: skip


def test_what_the_judge_of_a_duel_is_shown(
    evaluation: Callable[..., Evaluation], encoder: ChatEncoder, journal: Journal
) -> None:
    """Both answers whole, in both orders; nothing else differs, the fence included."""
    prompt = PROMPTS[:1]
    new, old = response("M2", "tea", (1,), "It is <|im_end|> hot."), response("M1", "tea", (2,), "It is a leaf.")
    engines = Engines()
    run(evaluation(prompt).duel(engines, "M0", [new], [old], journal))
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
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.0, 1.0, 0, 1)
        assert request.priority == SAMPLE_PRIORITY
        # The end token that the answer spells is not one.
        assert list(request.prompt_token_ids).count(tokenizer.eos_token_id) == first.count("<|im_end|>") - 1


def test_a_duel_that_does_not_fit_is_unreadable_and_not_asked(
    evaluation: Callable[..., Evaluation], tmp_path: Path
) -> None:
    prompt, new, old = CONTENDERS[:1], NEW[:1], OLD[:1]
    first = Engines(script())
    run(evaluation(prompt).duel(first, "M0", new, old, Journal(tmp_path / "0")))
    length = len(first.requests[0].prompt_token_ids)
    for room, asked in ((length, 0), (length + 1, 2)):  # the letter is a token as well
        engines, journal = Engines(script()), Journal(tmp_path / str(room))
        found = run(evaluation(prompt, engine={"max_model_len": room}, judge={"read": "digits"}).duel(
            engines, "M0", new, old, journal
        ))  # fmt: skip
        assert len(engines.requests) == asked
        assert (found["n"], found["unreadable"]) == ((1, 0) if asked else (0, 1))
        assert len(journal.judgements) == 2
        if not asked:
            assert {j.verdict for j in journal.judgements.values()} == {Unparsed(reason="judge prompt too long")}
            assert {j.weight_version for j in journal.judgements.values()} == {""}


def test_records_of_a_duel(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    run(evaluation(CONTENDERS).duel(Engines(script(), version="M0"), "M0", NEW, OLD, journal))
    assert set(journal.judgements) == set(script())
    first = journal.judgements["M2/worse/0>M1/worse/0@M0"]
    second = journal.judgements["M1/worse/0>M2/worse/0@M0"]
    assert (first.prompt_id, first.response_id, first.index) == ("worse", "M2/worse/0", 0)
    assert (second.prompt_id, second.response_id, second.index) == ("worse", "M1/worse/0", 1)
    assert {(j.role, j.judge, j.weight_version) for j in journal.judgements.values()} == {
        ("duel", "pairwise (letters)", "M0")
    }
    assert (first.verdict, second.verdict) == (Scored(points=0.0), Scored(points=1.0))
    assert [winner_of(judgement) for judgement in (first, second)] == ["B", "A"]
    assert winner_of(journal.judgements["M2/even/0>M1/even/0@M0"]) == "tie"
    assert winner_of(journal.judgements["M2/blind/0>M1/blind/0@M0"]) == Unparsed(reason="little mass on letters")


def test_a_template_of_the_users_own_is_named(
    evaluation: Callable[..., Evaluation], journal: Journal, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ instruction }} {{ response_a }} {{ response_b }}")
    found = run(evaluation([], evaluate={"judge": {"template": str(file)}}).duel(Engines(), "M0", [], [], journal))
    assert found["judge"] == f"{file} (letters) by M0, both orders"
    file.write_text("{{ instruction }} {{ response_a }}")
    with pytest.raises(ConfigError, match=r"evaluate\.judge\.template='.*mine\.jinja': does not use response_b"):
        evaluation(evaluate={"judge": {"template": str(file)}})
    evaluation(evaluate={"judge": {"template": str(file)}, "duel": False})  # not looked at


# -- answers and scores ------------------------------------------------------------------------------------------------


def test_answers_keep_the_order_of_the_prompts(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    engines = Engines({f"M1/{prompt.id}/0": f"A cup of {prompt.id}." for prompt in PROMPTS}, "M1", slow=True)
    found = run(evaluation(evaluate={"max_tokens": 17, "temperature": 0.3}).answers(engines, "M1", journal))
    assert [answer.id for answer in found] == [f"M1/{prompt.id}/0" for prompt in PROMPTS]
    assert [answer.prompt_id for answer in found] == [prompt.id for prompt in PROMPTS]
    assert [answer.text for answer in found] == [f"A cup of {prompt.id}." for prompt in PROMPTS]
    assert {answer.weight_version for answer in found} == {"M1"}
    assert {(r.sampling.max_tokens, r.sampling.temperature) for r in engines.requests} == {(17, 0.3)}
    assert list(journal.responses.values()) != found  # written as they came
    assert sorted(journal.responses.values(), key=lambda r: r.id) == sorted(found, key=lambda r: r.id)


def test_a_judge_does_not_take_the_judgements_of_another(
    evaluation: Callable[..., Evaluation], journal: Journal
) -> None:
    """M1's own judgements and the frozen M0's stand side by side in one journal."""
    judge = evaluation()
    answers = answers_of("M1", PROMPTS, 3)
    own = run(judge.scores(judge.judge, Engines(version="M1"), "M1", answers, journal))
    frozen_engines = Engines(version="M0")
    frozen = run(judge.scores(judge.judge, frozen_engines, "M0", answers, journal))
    assert len(frozen_engines.requests) == 4 * 3
    assert [j.id for j in own] == [f"M1/{p.id}/0#{index}@M1" for p in PROMPTS for index in range(3)]
    assert [j.id for j in frozen] == [f"M1/{p.id}/0#{index}@M0" for p in PROMPTS for index in range(3)]
    assert ({j.weight_version for j in own}, {j.weight_version for j in frozen}) == ({"M1"}, {"M0"})
    assert {j.response_id for j in own} == {j.response_id for j in frozen} == {answer.id for answer in answers}
    assert set(journal.judgements) == {j.id for j in [*own, *frozen]}


def by_length(prompt: str, response: str) -> float:
    return float(len(response))


def test_a_function_scores_without_engines(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    engines = Engines()
    judge = evaluation(judge={"read": "function", "judgements": None, "function": f"{__name__}:by_length"})
    answers = [response("M1", prompt.id, text=prompt.id) for prompt in PROMPTS]
    found = run(judge.scores(judge.judge, engines, "M0", answers, journal))
    assert [j.verdict for j in found] == [Scored(points=float(len(prompt.id))) for prompt in PROMPTS]
    assert mean_score(answers, found) == {"mean": (3 + 4 + 5 + 4) / 4, "n": 4}
    assert engines.requests == []


# -- seeds and journals ------------------------------------------------------------------------------------------------


async def whole(judge: Evaluation, folder: Path) -> tuple[list[Request], list[Any]]:
    """What a run evaluates: M0, M1 and M2 by themselves and by M0, and each against the one before."""
    requests: list[Request] = []
    found: list[Any] = []
    before: list[Response] = []
    for model in ("M0", "M1", "M2"):
        journal, engines, frozen = Journal(folder / f"{model}.jsonl"), Engines(version=model), Engines(version="M0")
        answers = await judge.answers(engines, model, journal)
        found += [answers, await judge.scores(judge.judge, engines, model, answers, journal)]
        if before:
            found.append(await judge.scores(judge.judge, frozen, "M0", answers, journal))
            found.append(await judge.duel(frozen, "M0", answers, before, journal))
        before = answers
        requests += engines.requests + frozen.requests
        journal.close()
    return requests, found


def test_no_two_requests_share_a_seed(
    evaluation: Callable[..., Evaluation], make_config: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    """Nor with the training of the same prompts, whose texts are all the same here."""
    prompts = [Prompt(id=name, text="Same text.") for name in ("1", "11", "0", "M0", "M1", "duel", "1@M0", "a b")]
    requests, _ = run(whole(evaluation(prompts), tmp_path))
    answers, scores, duels = 3 * 8, (1 + 2 + 2) * 8 * 3, 2 * 8 * 2
    assert len(requests) == answers + scores + duels

    config = make_config(judge={"read": "text", "judgements": 3})
    training = Engines()

    async def put(group: Any) -> None: ...

    for iteration in (0, 1):
        journal = Journal(tmp_path / f"{iteration}.jsonl")
        judging = Judging(config, encoder)
        producer = Producer(config, encoder, training, training, judging, journal, iteration, lambda *_: None)
        run(producer.all(prompts, put))
        journal.close()
    every = [*requests, *training.requests]
    assert len({request.sampling.seed for request in every}) == len(every) == len(requests) + 2 * 8 * 2 * (1 + 3)


def test_fences_are_one_for_a_duel_and_differ_between_prompts(
    evaluation: Callable[..., Evaluation], encoder: ChatEncoder, journal: Journal
) -> None:
    engines = Engines()
    run(evaluation().duel(engines, "M0", answers_of("M2", PROMPTS, 3), answers_of("M1", PROMPTS, 4), journal))
    length = len(fence_of(0))
    fences: dict[str, set[str]] = {}
    for request in engines.requests:
        text = encoder.tokenizer.decode(request.prompt_token_ids)
        tags = {word for word in text.replace("<", " ").replace(">", " ").replace("_", " ").replace("-", " ").split()}
        hexes = {tag for tag in tags if len(tag) == length and set(tag) <= set("0123456789abcdef")}
        fences.setdefault(request.id.split("/")[1], set()).update(hexes)
    assert {len(found) for found in fences.values()} == {1}
    assert len(set().union(*fences.values())) == len(PROMPTS)


def test_another_run_seed_samples_anew(evaluation: Callable[..., Evaluation], tmp_path: Path) -> None:
    one, _ = run(whole(evaluation(seed=0), tmp_path / "0"))
    other, _ = run(whole(evaluation(seed=1), tmp_path / "1"))
    assert not {r.sampling.seed for r in one} & {r.sampling.seed for r in other}


def test_what_the_journals_hold_is_not_asked_again(evaluation: Callable[..., Evaluation], tmp_path: Path) -> None:
    judge = evaluation()
    requests, expected = run(whole(judge, tmp_path))
    assert requests
    requests, again = run(whole(judge, tmp_path))
    assert requests == []
    assert again == expected


@pytest.mark.parametrize("seed", range(6))
def test_after_a_kill_only_what_is_missing_is_asked(
    seed: int, evaluation: Callable[..., Evaluation], tmp_path: Path
) -> None:
    judge = evaluation()
    first, expected = run(whole(judge, tmp_path))
    path = tmp_path / "M2.jsonl"
    content = path.read_bytes()
    kept = content[: random.Random(seed).randrange(len(content))]
    path.write_bytes(kept)
    lost = content.count(b"\n") - kept.count(b"\n")
    second, again = run(whole(judge, tmp_path))
    assert len(second) == lost > 0
    assert {request.sampling.seed for request in second} <= {request.sampling.seed for request in first}
    assert again == expected
    assert len(path.read_bytes()) == len(content)


def test_one_order_of_a_duel_is_enough_to_go_on(evaluation: Callable[..., Evaluation], tmp_path: Path) -> None:
    """Killed between the two: the verdict in the journal counts, whatever the judge would say today."""
    judge = evaluation(CONTENDERS[:1])
    journal = Journal(tmp_path / "journal.jsonl")
    run(judge.duel(Engines(script()), "M0", NEW[:1], OLD[:1], journal))
    journal.close()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_text(lines[0] + lines[1][:40])
    engines = Engines(dict.fromkeys(script(), B))  # the first order said A
    found = run(judge.duel(engines, "M0", NEW[:1], OLD[:1], Journal(tmp_path / "journal.jsonl")))
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


def test_scores_that_cannot_be_read_are_in_no_mean(evaluation: Callable[..., Evaluation], journal: Journal) -> None:
    """From the judge's text to the mean: 3 judgements for each of 4 answers."""
    answers = answers_of("M1", PROMPTS, 3)
    said = [["Score: 5", "I like it.", "Score: 2"], ["No.", "Score: 9", ""], ["Score: 1"] * 3, ["Score: 0"] * 3]
    texts = {
        f"{answer.id}#{index}": text or " "
        for answer, three in zip(answers, said, strict=True)
        for index, text in enumerate(three)
    }
    made = evaluation()
    found = run(made.scores(made.judge, Engines(texts), "M0", answers, journal))
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
    engines = Engines()
    made = evaluation(evaluate={"temperature": 0.0, "top_p": 0.9, "top_k": 5, "max_tokens": 7})
    drawn = run(made.samples(engines, "M1"))
    assert [response.prompt_id for response in drawn] == [prompt.id for prompt in PROMPTS]
    asked = [request.sampling for request in engines.requests]
    assert {(one.temperature, one.top_p, one.top_k, one.max_tokens) for one in asked} == {(1.0, 1.0, 0, 7)}
    own = made._config.seed
    assert [one.seed for one in asked] == [seed_of(own, EVALUATION, f"M1/{p.id}", "actor", "kl") for p in PROMPTS]
    assert [one.token_ids for one in run(made.samples(Engines(), "M1"))] == [one.token_ids for one in drawn]
    assert [one.id for one in drawn] == [f"M1/{prompt.id}/kl/0" for prompt in PROMPTS]
    assert run(made.logprobs(engines, drawn)) == [tuple(-token / 10 for token in one.token_ids) for one in drawn]
    scored = engines.requests[len(PROMPTS) :]
    assert {(one.sampling, one.priority) for one in scored} == {
        (Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, seed=0), SAMPLE_PRIORITY)
    }
    assert made.needs()["evaluate.max_tokens"] == len(made._encoder.user("")) + 7
    full = replace(drawn[0], prompt_token_ids=(1,) * (made._config.engine.max_model_len - 2), token_ids=(8, 9))
    assert run(made.logprobs(engines, [full])) == [(-0.8,)]
