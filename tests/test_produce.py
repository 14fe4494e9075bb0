"""What is made for a prompt does not depend on who finishes first, nor on what was made before a kill."""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm import loop
from rsrlm.ask import JUDGE_PRIORITY, SAMPLE_PRIORITY, Judging, gather, meta_judge, sampling_of
from rsrlm.buffer import PreferenceBuffer
from rsrlm.config import Config, resolve
from rsrlm.meta_judging import EVEN, comparison_id, matches, most_uncertain, readable
from rsrlm.pairing import best_against_worst
from rsrlm.produce import Producer, judge_pairs, mean_verdicts
from rsrlm.records import Completion, Group, Judgement, PreferencePair, Prompt, Request, Response, Scored, Unparsed
from rsrlm.store.folder import Journal, RunFolder

PROMPTS = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk", "t", "1", "water")]
TEXT = {"read": "text", "judgements": 3}
# The digits "0", "4" and "5" have half of the probability; the other half is on other tokens.
DIGITS = (math.log(0.3), -math.inf, -math.inf, -math.inf, math.log(0.1), math.log(0.1))
FUNCTION = {"read": "function", "function": "judge_functions:by_length"}
FAILING = {**FUNCTION, "function": "judge_functions:failing"}


class Encoder:
    """Tokens are characters."""

    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(map(ord, text)))

    def user(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def encode(self, template: str, fields: Mapping[str, str], prefix: str = "") -> tuple[int, ...]:
        return tuple(map(ord, f"{fields['instruction']}|{fields['response']}|{fields['fence']}{prefix}"))


class Engines:
    """The answer is a function of the seed alone; `pause` is awaited before it."""

    def __init__(self, pause: Callable[[Request], Any] | None = None, slots: int = 4) -> None:
        self.requests: list[Request] = []
        self.slots = slots
        self._pause = pause

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        if self._pause:
            await self._pause(request)
        seed = request.sampling.seed
        text = f"Because.\nScore: {seed % 6}" if "#" in request.id else "word " * (seed % 7)
        return Completion(
            request_id=request.id,
            token_ids=(seed % 50_000, seed % 11),
            text=text,
            finish_reason="length" if seed % 5 == 0 else "stop",
            weight_version="M4",
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,
            replica=0,
            label_logprobs=DIGITS if request.label_ids else (),
        )


def config(judge: dict[str, Any], *, responses: int = 3, seed: int = 0, max_model_len: int = 512) -> Config:
    return resolve(
        {
            "name": "produce",
            "seed": seed,
            "iterations": 1,
            "model": "some/id",
            "prompts": {"path": "builtin", "per_iteration": 4},
            "sample": {"responses": responses, "max_tokens": 24, "temperature": 0.9, "top_p": 0.8, "top_k": 50},
            "judge": judge,
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "engine": {"max_model_len": max_model_len},
        }
    )


def produce(
    made_by: Config,
    engines: Any,
    journal: Path,
    put: Callable[[Group], Any] | None = None,
    prompts: list[Prompt] = PROMPTS,
    iteration: int = 0,
    tick: Callable[[str, int, int], None] = lambda stage, items, tokens: None,
) -> list[Group]:
    async def nothing(group: Group) -> None:
        pass

    encoder: Any = Encoder()
    producer = Producer(
        made_by, encoder, engines, engines, Judging(made_by, encoder), Journal(journal), iteration, tick
    )
    return asyncio.run(asyncio.wait_for(producer.all(prompts, put or nothing), 60))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


# -- order does not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [TEXT, FUNCTION], ids=["text", "function"])
def test_groups_do_not_depend_on_who_finishes_first(judge: dict[str, Any], tmp_path: Path) -> None:
    chosen = config(judge)
    expected = produce(chosen, Engines(), tmp_path / "undisturbed")
    assert [group.prompt for group in expected] == PROMPTS
    finished = set()
    for number in range(6):
        rng = random.Random(number)

        async def pause(request: Request, rng: random.Random = rng) -> None:
            for _ in range(rng.randrange(30)):
                await asyncio.sleep(0)

        order: list[str] = []

        async def put(group: Group, order: list[str] = order) -> None:
            order.append(group.id)

        assert produce(chosen, Engines(pause, slots=8), tmp_path / str(number), put) == expected
        assert sorted(order) == sorted(group.id for group in expected)
        finished.add(tuple(order))
    assert len(finished) > 1  # they did overtake each other


def test_a_group_carries_all_that_was_made(journal: Path) -> None:
    chosen = config(TEXT, seed=3)
    engines = Engines()
    group = produce(chosen, engines, journal, iteration=2)[1]
    assert (group.id, group.iteration, group.prompt) == ("02/milk", 2, PROMPTS[1])
    assert [response.id for response in group.responses] == ["02/milk/0", "02/milk/1", "02/milk/2"]
    assert [judgement.id for judgement in group.judgements] == [
        f"02/milk/{response}#{number}" for response in range(3) for number in range(3)
    ]
    asked = {request.id: request for request in engines.requests}
    for response in group.responses:
        seed = asked[response.id].sampling.seed
        assert response == Response(
            id=f"02/milk/{response.index}",
            prompt_id="milk",
            index=response.index,
            role="actor",
            text="word " * (seed % 7),
            token_ids=(seed % 50_000, seed % 11),
            prompt_token_ids=tuple(map(ord, "Say milk.")),
            finish_reason="length" if seed % 5 == 0 else "stop",
            weight_version="M4",
            sampling=sampling_of(chosen.sample, seed),
        )
        assert (response.sampling.temperature, response.sampling.top_p, response.sampling.top_k) == (0.9, 0.8, 50)
    read = []
    for number, judged in enumerate(group.judgements):
        of, index = divmod(number, 3)
        assert (judged.response_id, judged.index, judged.role) == (f"02/milk/{of}", index, "judge")
        assert judged.judge == "additive (text)"
        seed = asked[judged.id].sampling.seed
        assert judged.sampling == sampling_of(chosen.judge, seed)
        assert judged.sampling.max_tokens == 160
        # A cut answer that ends in its score is not read: it could have gone on.
        assert judged.verdict == (Unparsed(reason="cut before its end") if seed % 5 == 0 else Scored(points=seed % 6))
        read.append(isinstance(judged.verdict, Scored))
    assert {True, False} == set(read)  # some were cut, some were not
    assert (group.pair is None) == (group.no_pair_reason != "")


def test_the_pair_is_made_of_mean_scores(journal: Path) -> None:
    """Of all groups: chosen and rejected have the means over their readable judgements."""
    groups = produce(config(TEXT, responses=4), Engines(), journal, prompts=PROMPTS)
    pairs = [(group, group.pair) for group in groups if group.pair]
    assert pairs
    assert {group.no_pair_reason for group, _ in pairs} == {""}
    for group, pair in pairs:
        points = {
            response.id: [
                j.verdict.points
                for j in group.judgements
                if j.response_id == response.id and isinstance(j.verdict, Scored)
            ]
            for response in group.responses
        }
        assert pair.chosen_score == pytest.approx(sum(points[pair.chosen_id]) / len(points[pair.chosen_id]))
        assert pair.rejected_score == pytest.approx(sum(points[pair.rejected_id]) / len(points[pair.rejected_id]))


def test_ties_between_responses_are_drawn_by_the_seed_of_the_run(journal: Path) -> None:
    plain = config({"read": "function", "function": "judge_functions:long_or_short"}, responses=8, seed=3)
    made_by = resolve({**plain.model_dump(mode="json", exclude_defaults=True), "pair": {"ties": "random"}})
    groups = produce(made_by, Engines(), journal, iteration=2)
    expected = [
        best_against_worst(group.responses, mean_verdicts(group.responses, group.judgements), made_by.pair, 2, seed=3)
        for group in groups
    ]
    assert [group.pair or group.no_pair_reason for group in groups] == expected
    assert len({group.pair.id.rpartition("/")[2] for group in groups if group.pair}) > 1


def test_mean_verdicts_by_hand(journal: Path) -> None:
    group = produce(config(TEXT), Engines(), journal)[0]
    verdicts = [
        [Scored(points=1.0), Unparsed(reason="x"), Scored(points=4.0)],
        [Unparsed(reason="x")] * 3,
        [Scored(points=3.0), Unparsed(reason="x"), Unparsed(reason="x")],
    ]
    judgements = [replace(j, verdict=verdicts[number // 3][number % 3]) for number, j in enumerate(group.judgements)]
    found = mean_verdicts(group.responses, judgements[::-1])
    assert found == {
        "00/tea/0": Scored(points=2.5, variance=2.25),  # of two, not of three
        "00/tea/1": Unparsed(reason="no readable judgement"),
        "00/tea/2": Scored(points=3.0),
    }


# -- requests ----------------------------------------------------------------------------------------------------------


def test_no_two_requests_share_a_seed(tmp_path: Path) -> None:
    """Over iterations, prompts, responses and judgements; ids that look alike included."""
    engines = Engines()
    chosen = config(TEXT, responses=12)
    prompts = [Prompt(id=name, text="Same text.") for name in ("1", "11", "0", "judge", "actor", "a b", "0.1")]
    for iteration in (0, 1, 10):
        produce(chosen, engines, tmp_path / str(iteration), prompts=prompts, iteration=iteration)
    asked = 3 * 7 * (12 + 12 * 3)
    assert len(engines.requests) == asked
    assert len({request.sampling.seed for request in engines.requests}) == asked
    assert len({request.id for request in engines.requests}) == asked


def test_another_run_seed_samples_anew(tmp_path: Path) -> None:
    one, other = Engines(), Engines()
    produce(config(TEXT, seed=0), one, tmp_path / "0")
    produce(config(TEXT, seed=1), other, tmp_path / "1")
    assert {r.id for r in one.requests} == {r.id for r in other.requests}
    assert not {r.sampling.seed for r in one.requests} & {r.sampling.seed for r in other.requests}


@pytest.mark.parametrize(("priority", "expected"), [(True, JUDGE_PRIORITY), (False, SAMPLE_PRIORITY)])
def test_judging_goes_first_where_the_config_says_so(priority: bool, expected: int, journal: Path) -> None:
    assert JUDGE_PRIORITY < SAMPLE_PRIORITY  # vLLM serves the lower number first
    engines = Engines()
    produce(config({**TEXT, "priority": priority}), engines, journal)
    assert {r.priority for r in engines.requests if "#" in r.id} == {expected}
    assert {r.priority for r in engines.requests if "#" not in r.id} == {SAMPLE_PRIORITY}


def test_judgements_of_a_response_share_their_prompt(journal: Path) -> None:
    """Or the prefix cache would compute it N times. The fence differs from response to response."""
    engines = Engines()
    produce(config(TEXT), engines, journal)
    prompts: dict[str, set[tuple[int, ...]]] = {}
    for request in engines.requests:
        if "#" in request.id:
            prompts.setdefault(request.id.split("#")[0], set()).add(request.prompt_token_ids)
    assert {len(found) for found in prompts.values()} == {1}
    fences = {"".join(map(chr, next(iter(found))))[-8:] for found in prompts.values()}
    assert len(prompts) == len(fences) == len(PROMPTS) * 3


def test_a_structured_judge_sends_its_regex_and_others_none(tmp_path: Path) -> None:
    for read in ("text", "structured"):
        engines = Engines()
        produce(config({"read": read}), engines, tmp_path / read)
        regexes = {request.regex for request in engines.requests if "#" in request.id}
        assert (regexes == {None}) == (read == "text")
        assert {request.regex for request in engines.requests if "#" not in request.id} == {None}


def test_a_digits_judge_decodes_one_token_greedily(journal: Path) -> None:
    engines = Engines()
    groups = produce(config({"read": "digits", "temperature": 0.7, "top_p": 0.5, "top_k": 9}), engines, journal)
    asked = [request for request in engines.requests if "#" in request.id]
    assert len(asked) == len(PROMPTS) * 3
    for request in asked:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.0, 1.0, 0, 1)
        assert request.label_ids == tuple(map(ord, "012345"))
        assert "".join(map(chr, request.prompt_token_ids)).endswith("Score: ")
    # Renormalised 0.6, 0.2, 0.2: the mean is 0.8 + 1.0, the variance 0.6 * 1.8^2 + 0.2 * 2.2^2 + 0.2 * 3.2^2.
    verdict = groups[0].judgements[0].verdict
    assert isinstance(verdict, Scored)
    assert verdict.points == pytest.approx(1.8)
    assert verdict.variance == pytest.approx(4.96)
    assert not [group.pair for group in groups if group.pair]  # all the same


def test_a_judge_prompt_that_does_not_fit_is_unread_and_not_sent(journal: Path) -> None:
    """The encoder's judge prompt of "Say t." is 16 characters (with bars and fence) and the response."""
    engines = Engines()
    # 160 tokens for the judge; of 196, 36 are left: 16 and 20 characters, which is 4 words.
    group = produce(config(TEXT, responses=8, max_model_len=196), engines, journal, prompts=[PROMPTS[2]])[0]
    asked = {request.id.split("#")[0] for request in engines.requests if "#" in request.id}
    assert asked == {response.id for response in group.responses if len(response.text) <= 20}
    assert 0 < len(asked) < 8
    for judgement in group.judgements:
        unsent = judgement.verdict == Unparsed(reason="judge prompt too long")
        assert unsent == (judgement.response_id not in asked)
        assert (judgement.weight_version == "") == unsent


def test_a_function_judges_without_an_engine(journal: Path) -> None:
    engines = Engines()
    groups = produce(config(FUNCTION), engines, journal)
    assert len(engines.requests) == len(PROMPTS) * 3
    assert not [request for request in engines.requests if "#" in request.id]
    for group in groups:
        assert [j.verdict for j in group.judgements] == [Scored(points=len(r.text)) for r in group.responses]
        assert {(j.sampling, j.weight_version, j.judge) for j in group.judgements} == {
            (None, "", "judge_functions:by_length")
        }


def test_ticks_add_up(journal: Path) -> None:
    counts: dict[str, list[int]] = {"respond": [0, 0], "judge": [0, 0]}

    def tick(stage: str, items: int, tokens: int) -> None:
        counts[stage][0] += items
        counts[stage][1] += tokens

    produce(config(TEXT), Engines(), journal, tick=tick)
    # 5 prompts, 3 responses, 3 judgements; two tokens each.
    assert counts == {"respond": [15, 30], "judge": [45, 90]}
    produce(config(TEXT), Engines(), journal, tick=tick)  # all of it from the journal: the bars are filled again
    assert counts == {"respond": [30, 30], "judge": [90, 90]}  # but no token was generated


# -- after a kill ------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_what_the_journal_holds_is_not_generated_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chosen, prompts = config(TEXT, responses=2), PROMPTS[:3]
    journal = tmp_path_factory.mktemp("produce") / "journal.jsonl"
    first = Engines()
    expected = produce(chosen, first, journal, prompts=prompts)
    everything = {request.id for request in first.requests}
    assert len(everything) == 3 * 2 * (1 + 3)

    journal.write_bytes(journal.read_bytes()[: data.draw(st.integers(0, journal.stat().st_size))])
    held = Journal(journal)
    second = Engines()
    put: list[str] = []

    async def note(group: Group) -> None:
        put.append(group.id)

    assert produce(chosen, second, journal, note, prompts=prompts) == expected
    again = [request.id for request in second.requests]
    assert sorted(again) == sorted(everything - set(held.responses) - set(held.judgements))
    assert sorted(put) == ["00/milk", "00/t", "00/tea"]
    complete = Journal(journal)
    assert set(complete.responses) | set(complete.judgements) == everything


def test_a_function_that_judged_is_not_called_again(journal: Path) -> None:
    groups = produce(config(FUNCTION), Engines(), journal)
    # The journal's verdict counts, even where the function would say something else today.
    again = produce(config(FAILING), Engines(), journal)
    assert again == groups


# -- power cuts --------------------------------------------------------------------------------------------------------


def test_a_group_is_handed_on_when_its_records_are_on_disk(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And many groups for one fsync."""
    safe, syncs = [b""], 0

    def fsync(descriptor: int) -> None:
        nonlocal syncs
        data = journal.read_bytes()
        time.sleep(0.01)  # others finish meanwhile
        safe[0] = data
        syncs += 1

    monkeypatch.setattr("rsrlm.store.folder.os.fsync", fsync)
    lost: list[str] = []

    async def put(group: Group) -> None:
        kept = safe[0].decode()
        lost.extend(one.id for one in (*group.responses, *group.judgements) if f'"{one.id}"' not in kept)

    prompts = [Prompt(id=f"p{number}", text="x") for number in range(40)]
    groups = produce(config(TEXT), Engines(slots=60), journal, put, prompts)
    assert len(groups) == 40
    assert lost == []
    assert 0 < syncs < 40


def test_a_resume_that_samples_otherwise_keeps_the_pairs_of_the_buffer(tmp_path: Path) -> None:
    """The journal lost its end and the engines answer differently, as on GPUs: the run goes on all the same."""

    class Others(Engines):
        async def generate(self, request: Request) -> Completion:
            found = await super().generate(replace(request, sampling=replace(request.sampling, seed=1)))
            return replace(found, text=f"{found.text}{request.id}", token_ids=(9, 9, 9))

    def start(engines: Engines) -> tuple[list[Group], dict[str, bool], PreferenceBuffer]:
        buffer = PreferenceBuffer(tmp_path / "buffer.jsonl")
        told = {}

        async def put(group: Group) -> None:
            told[group.id] = buffer.put(group.id, 0, group.pair, group.no_pair_reason)

        return produce(config(TEXT, responses=4), engines, tmp_path / "journal", put), told, buffer

    groups, told, buffer = start(Engines())
    assert not any(told.values())
    first = buffer.pairs(0, 0)
    assert first
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])

    groups, told, buffer = start(Others())
    assert any(told.values())
    assert buffer.pairs(0, 0) == first
    there = {response.id for group in groups for response in group.responses}
    assert all({pair.chosen_id, pair.rejected_id} <= there for pair in first)  # the records have what pairs name


def test_a_pair_that_the_buffer_keeps_is_an_event(tmp_path: Path) -> None:
    store = RunFolder(tmp_path)

    async def call(method: str, key: str, *_: Any) -> bool:
        return key == "00/tea"

    ports: Any = SimpleNamespace(buffer=SimpleNamespace(call=call), store=store)
    for key in ("00/tea", "00/milk"):
        asyncio.run(loop.put(ports, key, 0, None, "equal scores"))
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert '"event": "pair_kept", "g": "00/tea", "instead_of": null' in line


# -- failures and bounds -----------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def leaves(group: BaseExceptionGroup) -> list[BaseException]:
    return [one for e in group.exceptions for one in (leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


@pytest.mark.parametrize("failing_id", ["00/milk/1", "00/milk/1#2"])
def test_a_failing_call_cancels_the_others_and_is_told(failing_id: str, journal: Path) -> None:
    cancelled, put = [], []

    async def pause(request: Request) -> None:
        if request.id == failing_id:
            raise Broken(request.id)
        if not request.id.startswith("00/milk/1"):
            try:
                await asyncio.Event().wait()  # for ever
            except asyncio.CancelledError:
                cancelled.append(request.id)
                raise

    async def note(group: Group) -> None:
        put.append(group)

    engines = Engines(pause, slots=100)
    with pytest.raises(ExceptionGroup) as caught:
        produce(config(TEXT), engines, journal, note)
    assert [str(error) for error in leaves(caught.value) if isinstance(error, Broken)] == [failing_id]
    assert [type(error) for error in leaves(caught.value)] == [Broken]
    waiting = {request.id for request in engines.requests if not request.id.startswith("00/milk/1")}
    assert set(cancelled) == waiting
    assert len(waiting) >= 14  # the other responses of all 5 groups
    assert put == []


def test_a_put_that_fails_ends_the_production(journal: Path) -> None:
    async def put(group: Group) -> None:
        raise Broken(group.id)

    with pytest.raises(ExceptionGroup) as caught:
        produce(config(TEXT), Engines(), journal, put)
    assert {type(error) for error in leaves(caught.value)} == {Broken}


def test_a_judge_that_raises_gives_no_score(journal: Path) -> None:
    groups = produce(config(FAILING), Engines(), journal)
    verdicts = {judgement.verdict for group in groups for judgement in group.judgements}
    assert verdicts == {Unparsed(reason="function raised RuntimeError")}
    assert [group.pair for group in groups] == [None] * len(PROMPTS)
    # It is a verdict like any other: kept, and not asked for again.
    assert produce(config(FUNCTION), Engines(), journal) == groups


def test_gather_keeps_order_and_takes_nothing() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(gather([after(5), after(0), after(3)])) == [5, 0, 3]
    assert asyncio.run(gather([])) == []


@pytest.mark.parametrize(
    ("slots", "responses", "bound"),
    [
        (3, 2, 3),  # twice the slots over the responses of a group
        (4, 3, 3),  # 8/3, rounded up
        (1, 8, 2),  # but always two: one is judged while the next is sampled
        (64, 2, 20),  # more than there are prompts
    ],
)
def test_open_groups_are_bounded(slots: int, responses: int, bound: int, journal: Path) -> None:
    open_now: set[str] = set()
    most = 0

    async def pause(request: Request) -> None:
        nonlocal most
        open_now.add(request.id.split("/")[1])
        most = max(most, len(open_now))
        for _ in range(request.sampling.seed % 9):
            await asyncio.sleep(0)

    async def put(group: Group) -> None:
        await asyncio.sleep(0)  # a group is open until the buffer has it
        open_now.discard(group.prompt.id)

    prompts = [Prompt(id=f"p{number}", text="x") for number in range(20)]
    produce(config(TEXT, responses=responses), Engines(pause, slots), journal, put, prompts)
    assert most == bound
    assert not open_now


# -- comparisons of judgements -----------------------------------------------------------------------------------------


class Shown(Encoder):
    """Prompts of a meta-judge are all that it is shown."""

    def encode(self, template: str, fields: Mapping[str, str], prefix: str = "") -> tuple[int, ...]:
        if "judgement_a" not in fields:
            return super().encode(template, fields, prefix)
        names = ("instruction", "response", "judgement_a", "judgement_b", "fence")
        return tuple(map(ord, "|".join(fields[name] for name in names)))


def judge_pair_config(judgements: int = 3, **meta: Any) -> Config:
    plain = config({**TEXT, "judgements": judgements}, responses=2, seed=5)
    changed = plain.model_dump(mode="json", exclude_defaults=True)
    return resolve({**changed, "pair": {"kinds": ["judge"]}, "meta": meta})


def compare(
    journal: Path,
    engines: Any,
    ticks: list[tuple[str, int, int]],
    meta: bool = True,
    prompts: list[Prompt] = PROMPTS[:2],
    made_by: Config | None = None,
) -> list[Group]:
    """Two responses to each prompt, with three judgements each unless `made_by` says otherwise."""
    made_by, encoder = made_by or judge_pair_config(), cast(Any, Shown())

    async def put(group: Group) -> None:
        pass

    producer = Producer(
        made_by, encoder, engines, engines, Judging(made_by, encoder), Journal(journal), 1,
        lambda *tick: ticks.append(tick), meta_judge(made_by, encoder) if meta else None,
    )  # fmt: skip
    return asyncio.run(asyncio.wait_for(producer.all(prompts, put), 20))


def test_judgements_are_compared_in_both_orders(journal: Path) -> None:
    """Those of the response whose scores differ most; all comparisons of a prompt share a fence, and none a seed."""
    engines, ticks = Engines(), []
    groups = compare(journal, engines, ticks)
    asked = {request.id: request for request in engines.requests}
    for group in groups:
        assert group.pair is None
        assert group.no_pair_reason == "no pairs of responses wanted"
        response = most_uncertain(group.responses, group.judgements, 5)
        assert response is not None
        readable = [j for j in group.judgements if j.response_id == response.id and isinstance(j.verdict, Scored)]
        expected = {(a.id, b.index): (a, b) for a, b in itertools.permutations(readable, 2)}
        assert {one.id for one in group.comparisons} == {f"{of}~{other}" for of, other in expected}
        fences = set()
        for one in group.comparisons:
            of, other = one.id.split("~")
            first, second = expected[of, int(other)]
            request = asked[one.id]
            *shown, fence = "".join(map(chr, request.prompt_token_ids)).split("|")
            assert shown == [group.prompt.text, response.text, first.text, second.text]
            fences.add(fence)
            assert request.priority == JUDGE_PRIORITY
            assert (one.prompt_id, one.response_id, one.index, one.role, one.judge) == (
                group.prompt.id, response.id, first.index, "meta", "meta (text)",
            )  # fmt: skip
            assert one.sampling == request.sampling
        assert len(fences) == 1
    assert len({request.sampling.seed for request in engines.requests}) == len(engines.requests)

    made = [one for group in groups for one in group.comparisons]
    assert [tick for tick in ticks if tick[0] == "compare"] == [("compare", 1, 2)] * len(made)
    again = Engines()
    assert compare(journal, again, ticks) == groups
    assert again.requests == []


def test_who_meets_whom_is_the_seeds_say(tmp_path: Path) -> None:
    """Of seven judgements each meets two; the same ones in a run that is made again."""
    made_by = judge_pair_config(judgements=7, opponents=2)
    one, other = (compare(tmp_path / name, Engines(), [], prompts=PROMPTS, made_by=made_by) for name in "ab")
    assert one == other
    for group in one:
        response = most_uncertain(group.responses, group.judgements, 5)
        assert response is not None
        met = matches(readable(group.judgements, response), made_by.meta, 5)
        assert [comparison.id for comparison in group.comparisons] == [comparison_id(a, b) for a, b in met]
    assert max(len(group.comparisons) for group in one) > 6


def test_without_a_meta_judge_nothing_is_compared(journal: Path) -> None:
    engines = Engines()
    assert [group.comparisons for group in compare(journal, engines, [], meta=False)] == [(), ()]
    assert not [request for request in engines.requests if "~" in request.id]


class Opinionated(Engines):
    """Scores 1, 3 and 5 for every response, and judgements 1 and 2 beat judgement 0. Nothing about milk is readable."""

    async def generate(self, request: Request) -> Completion:
        own = request.id.rpartition("#")[2]
        text = {"0": "Score: 1", "1": "Score: 3", "2": "Score: 5"}.get(own, "")
        if "~" in own:
            text = {"0": "Winner: B", "1": "Winner: A", "2": "Winner: A"}[own[0]] if "0" in own else "Neither."
        made = await super().generate(request)
        return replace(made, text="" if "milk" in request.id else text or made.text, finish_reason="stop")


@pytest.mark.parametrize("weights", ["iteration", "prompt", "none"])
def test_judge_pairs_are_of_the_judgements_that_were_compared(weights: str, journal: Path) -> None:
    """All responses are as uncertain as each other: which one is taken, and which judgement wins, is the seed's say."""
    engines = Opinionated()
    groups = compare(journal, engines, [], prompts=PROMPTS)
    made_by, encoder = judge_pair_config(weights=weights), cast(Any, Shown())
    found, over_all = judge_pairs(groups, Judging(made_by, encoder), made_by)
    assert list(found) == [f"01/{prompt.id}#judge" for prompt in PROMPTS]
    assert found.pop("01/milk#judge") == "no response with two readable judgements"
    asked = {request.id: request for request in engines.requests}
    winners, responses = set(), set()
    for name, pair in found.items():
        group = next(group for group in groups if group.id == name.removesuffix("#judge"))
        compared = {one.response_id for one in group.comparisons}
        assert isinstance(pair, PreferencePair)
        winner, _, loser = pair.id.rpartition("#")[2].partition(">")
        assert compared == {pair.id.rpartition("#")[0]}
        assert (pair.chosen_id, loser) == (f"{compared.pop()}#{winner}", "0")
        assert pair.prompt_token_ids == asked[pair.chosen_id].prompt_token_ids  # what the judge itself was shown
        winners.add(winner)
        responses.add(pair.chosen_id[-3])
    assert (winners, responses) == ({"1", "2"}, {"0", "1"})
    ids = [pair.id for pair in found.values() if isinstance(pair, PreferencePair)]
    assert ids == ["01/tea/1#1>0", "01/t/0#1>0", "01/1/1#1>0", "01/water/0#2>0"]  # resumed runs rely on it
    assert judge_pairs(groups, Judging(made_by, encoder), made_by)[0].items() >= found.items()
    assert over_all == EVEN  # each win was seen in both orders


def test_a_resumed_run_asks_as_before(journal: Path) -> None:
    """Seeds and fences of everything that is asked: no release may change them while runs go on."""
    engines = Engines()
    compare(journal, engines, [])
    asked = {request.id: request for request in engines.requests}
    seeds = {name: asked[name].sampling.seed for name in ("01/tea/0", "01/tea/0#1", "01/tea/0#2~0")}
    assert seeds == {
        "01/tea/0": 3913104472571874090,
        "01/tea/0#1": 8962293754405235360,
        "01/tea/0#2~0": 2811300901876898492,
    }
    fences = ["".join(map(chr, asked[name].prompt_token_ids)).split("|")[-1] for name in ("01/tea/0#1", "01/tea/0#2~0")]
    assert fences == ["9949cdb9", "d93484ef"]


def test_judgements_wait_for_their_own_response_only(journal: Path) -> None:
    """A response is judged while its siblings are still being sampled."""
    judged = asyncio.Event()

    async def pause(request: Request) -> None:
        if request.id == "00/tea/0#0":
            judged.set()
        if request.id == "00/tea/1":
            await judged.wait()

    groups = produce(config(TEXT, responses=2), Engines(pause), journal, prompts=PROMPTS[:1])
    assert isinstance(groups[0].judgements[0], Judgement)
    assert judged.is_set()
