"""What is made for a prompt does not depend on who finishes first, nor on what was made before a kill."""

import asyncio
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Characters, Memory, Seeded, context_of, model, run_of

from rsrlm.config import Config, resolve
from rsrlm.engines import JUDGE_PRIORITY, SAMPLE_PRIORITY
from rsrlm.judges.base import mean_verdicts, sampling_of
from rsrlm.pairing import best_against_worst
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Completion, Group, Judgement, NoPair, Prompt, Request, Response, Scored, Task, Unparsed
from rsrlm.run import Run
from rsrlm.store.journal import CompletionLog

PROMPTS = [Prompt(id=name, text=f"Say {name}.") for name in ("tea", "milk", "t", "1", "water")]
TEXT = {"kind": "text", "judgements": 3}
FUNCTION = {"kind": "function", "function": "judge_functions:by_length"}
FAILING = {**FUNCTION, "function": "judge_functions:failing"}


def config(
    judge: dict[str, Any], *, responses: int = 3, seed: int = 0, max_model_len: int = 512, **others: Any
) -> Config:
    return resolve(
        {
            "name": "produce",
            "seed": seed,
            "iterations": 1,
            "model": "some/id",
            "prompts": {"path": "builtin", "per_iteration": 4},
            "sample": {"responses": responses, "max_tokens": 24, "temperature": 0.9, "top_p": 0.8},
            "judge": judge,
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "engine": {"max_model_len": max_model_len},
            **others,
        }
    )


def produce(
    made_by: Config,
    engine: Any,
    log: Any = None,
    prompts: list[Prompt] = PROMPTS,
    iteration: int = 0,
    run: Run | None = None,
) -> list[Group]:
    """The groups of the prompts by model M4; `run` is given where its events or its screen are looked at."""
    context = context_of(made_by, Characters())
    recipe = SelfRewarding(made_by.planned[0].config, context, context)
    over = run or run_of(engine, log)
    tasks = [Task(iteration=iteration, prompt=prompt) for prompt in prompts]

    async def work() -> list[Group]:
        return list(await over.groups(await over.load(model("M4")), recipe, tasks))

    return asyncio.run(asyncio.wait_for(work(), 60))


def finished(run: Run) -> list[str]:
    """Ids of the groups in the order in which they were finished."""
    return [event["g"] for event in cast(Any, run).events if event["event"] == "group"]


# -- order does not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [TEXT, FUNCTION], ids=["text", "function"])
def test_groups_do_not_depend_on_who_finishes_first(judge: dict[str, Any], functions_here: None) -> None:
    chosen = config(judge)
    expected = produce(chosen, Seeded())
    assert [group.prompt for group in expected] == PROMPTS
    orders = set()
    for number in range(6):
        rng = random.Random(number)

        async def pause(request: Request, rng: random.Random = rng) -> None:
            for _ in range(rng.randrange(30)):
                await asyncio.sleep(0)

        engine = Seeded(pause, slots=8)
        run = run_of(engine)
        assert produce(chosen, engine, run=run) == expected
        assert sorted(finished(run)) == sorted(group.id for group in expected)
        orders.add(tuple(finished(run)))
    assert len(orders) > 1  # they did overtake each other


def test_a_group_carries_all_that_was_made() -> None:
    chosen = config(TEXT, seed=3)
    engines = Seeded()
    group = produce(chosen, engines, iteration=2)[1]
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
        assert (response.sampling.temperature, response.sampling.top_p) == (0.9, 0.8)
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
    assert (not group.pairs) == (group.no_pair_reason != "")


def test_the_pair_is_made_of_mean_scores() -> None:
    """Of all groups: chosen and rejected have the means over their readable judgements."""
    groups = produce(config(TEXT, responses=4), Seeded(), prompts=PROMPTS)
    pairs = [(group, pair) for group in groups for pair in group.pairs]
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


def test_ties_between_responses_are_drawn_by_the_seed_of_the_run(functions_here: None) -> None:
    judge = {"kind": "function", "function": "judge_functions:long_or_short"}
    made_by = config(judge, responses=8, seed=3, pair={"ties": "random"})
    groups = produce(made_by, Seeded(), iteration=2)
    expected = [
        best_against_worst(
            group.responses, mean_verdicts(group.responses, group.judgements), made_by.planned[0].config.pair, 2, seed=3
        )
        for group in groups
    ]
    assert [one for group in groups for one in group.pairs or (NoPair(reason=group.no_pair_reason),)] == expected
    assert len({pair.id.rpartition("/")[2] for group in groups for pair in group.pairs}) > 1


def test_mean_verdicts_by_hand() -> None:
    group = produce(config(TEXT), Seeded())[0]
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


def test_no_two_requests_share_a_seed() -> None:
    """Over iterations, prompts, responses and judgements; ids that look alike included."""
    engines = Seeded()
    chosen = config(TEXT, responses=12)
    prompts = [Prompt(id=name, text="Same text.") for name in ("1", "11", "0", "judge", "actor", "a b", "0.1")]
    for iteration in (0, 1, 10):
        produce(chosen, engines, prompts=prompts, iteration=iteration)
    asked = 3 * 7 * (12 + 12 * 3)
    assert len(engines.requests) == asked
    assert len({request.sampling.seed for request in engines.requests}) == asked
    assert len({request.id for request in engines.requests}) == asked


def test_another_run_seed_samples_anew() -> None:
    one, other = Seeded(), Seeded()
    produce(config(TEXT, seed=0), one)
    produce(config(TEXT, seed=1), other)
    assert {r.id for r in one.requests} == {r.id for r in other.requests}
    assert not {r.sampling.seed for r in one.requests} & {r.sampling.seed for r in other.requests}


def test_judging_goes_first() -> None:
    assert JUDGE_PRIORITY < SAMPLE_PRIORITY  # vLLM serves the lower number first
    engines = Seeded()
    produce(config(TEXT), engines)
    assert {r.priority for r in engines.requests if "#" in r.id} == {JUDGE_PRIORITY}
    assert {r.priority for r in engines.requests if "#" not in r.id} == {SAMPLE_PRIORITY}


def test_judgements_of_a_response_share_their_prompt() -> None:
    """And go to one replica in one call, or the prefix cache would compute it N times. The fence differs from response
    to response."""
    engines = Seeded()
    produce(config(TEXT), engines)
    prompts: dict[str, set[tuple[int, ...]]] = {}
    for request in engines.requests:
        if "#" in request.id:
            prompts.setdefault(request.id.split("#")[0], set()).add(request.prompt_token_ids)
    assert {len(found) for found in prompts.values()} == {1}
    fences = {"".join(map(chr, next(iter(found))))[-8:] for found in prompts.values()}
    assert len(prompts) == len(fences) == len(PROMPTS) * 3
    judged = [call for call in engines.calls if "#" in call[0]]
    assert sorted(judged) == sorted([f"{name}#{index}" for index in range(3)] for name in prompts)


def test_a_structured_judge_sends_its_regex_and_others_none() -> None:
    for kind in ("text", "structured"):
        engines = Seeded()
        produce(config({"kind": kind}), engines)
        regexes = {request.regex for request in engines.requests if "#" in request.id}
        assert (regexes == {None}) == (kind == "text")
        assert {request.regex for request in engines.requests if "#" not in request.id} == {None}


def test_a_digits_judge_decodes_one_token_greedily() -> None:
    engines = Seeded()
    groups = produce(config({"kind": "digits"}), engines)
    asked = [request for request in engines.requests if "#" in request.id]
    assert len(asked) == len(PROMPTS) * 3
    for request in asked:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.0, 1.0, 1)
        assert request.label_ids == tuple(map(ord, "012345"))
        assert "".join(map(chr, request.prompt_token_ids)).endswith("Score: ")
    # Renormalised 0.6, 0.2, 0.2: the mean is 0.8 + 1.0, the variance 0.6 * 1.8^2 + 0.2 * 2.2^2 + 0.2 * 3.2^2.
    verdict = groups[0].judgements[0].verdict
    assert isinstance(verdict, Scored)
    assert verdict.points == pytest.approx(1.8)
    assert verdict.variance == pytest.approx(4.96)
    assert not [pair for group in groups for pair in group.pairs]  # all the same


def test_a_judge_prompt_that_does_not_fit_is_unread_and_not_sent() -> None:
    """The encoder's judge prompt of "Say t." is 16 characters (with bars and fence) and the response."""
    engines = Seeded()
    # 160 tokens for the judge; of 196, 36 are left: 16 and 20 characters, which is 4 words.
    group = produce(config(TEXT, responses=8, max_model_len=196), engines, prompts=[PROMPTS[2]])[0]
    asked = {request.id.split("#")[0] for request in engines.requests if "#" in request.id}
    assert asked == {response.id for response in group.responses if len(response.text) <= 20}
    assert 0 < len(asked) < 8
    for judgement in group.judgements:
        unsent = judgement.verdict == Unparsed(reason="judge prompt too long")
        assert unsent == (judgement.response_id not in asked)
        assert (judgement.weight_version == "") == unsent


def test_a_function_judges_without_an_engine() -> None:
    engines = Seeded()
    groups = produce(config(FUNCTION), engines)
    assert len(engines.requests) == len(PROMPTS) * 3
    assert not [request for request in engines.requests if "#" in request.id]
    for group in groups:
        assert [j.verdict for j in group.judgements] == [Scored(points=len(r.text)) for r in group.responses]
        assert {(j.sampling, j.weight_version, j.judge) for j in group.judgements} == {
            (None, "", "judge_functions:by_length")
        }


@pytest.mark.parametrize(("judge", "judgements", "tokens"), [(TEXT, 45, 90), (FUNCTION, 15, 0)])
def test_ticks_add_up(judge: dict[str, Any], judgements: int, tokens: int, functions_here: None) -> None:
    log = Memory()

    def counted() -> dict[str, tuple[int, int]]:
        engine = Seeded()
        run = run_of(engine, log)
        produce(config(judge), engine, run=run)
        screen = cast(Any, run.screen)
        assert screen.totals == [("iteration 0", {"respond": 15, "judge": judgements})]
        return {
            stage: (sum(t[1] for t in screen.ticks if t[0] == stage), sum(t[2] for t in screen.ticks if t[0] == stage))
            for stage in ("respond", "judge")
        }

    # 5 prompts, 3 responses, 3 judgements or one; two tokens each.
    assert counted() == {"respond": (15, 30), "judge": (judgements, tokens)}
    # All of it from the journal: the bars are filled again, but no token was generated.
    assert counted() == {"respond": (15, 0), "judge": (judgements, 0)}


# -- after a kill ------------------------------------------------------------------------------------------------------


def ids_in(journal: Path) -> list[str]:
    return [json.loads(line)["id"] for line in journal.read_bytes().splitlines()]


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_what_the_journal_holds_is_not_generated_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chosen, prompts = config(TEXT, responses=2), PROMPTS[:3]
    journal = tmp_path_factory.mktemp("produce") / "journal.jsonl"
    first = Seeded()
    expected = produce(chosen, first, CompletionLog(journal), prompts=prompts)
    everything = {request.id for request in first.requests}
    assert len(everything) == 3 * 2 * (1 + 3)

    whole = journal.read_bytes()
    journal.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    log = CompletionLog(journal)  # drops what the cut left of a line
    kept = set(ids_in(journal))
    second = Seeded()
    run = run_of(second, log)
    assert produce(chosen, second, prompts=prompts, run=run) == expected
    again = [request.id for request in second.requests]
    assert sorted(again) == sorted(everything - kept)
    assert sorted(finished(run)) == ["00/milk", "00/t", "00/tea"]
    assert sorted(ids_in(journal)) == sorted(everything)


def test_verdicts_of_functions_are_kept_as_well(
    functions_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The journal's verdict counts, even where the function would say something else today."""
    journal = tmp_path / "journal.jsonl"
    groups = produce(config(FUNCTION), Seeded(), CompletionLog(journal))
    asked: list[str] = []

    def otherwise(function: str, timeout_s: float) -> Any:
        async def verdict(prompt: str, response: str) -> Scored:
            asked.append(response)
            return Scored(points=-1.0)

        return verdict

    monkeypatch.setattr("rsrlm.judges.function.pool_of", otherwise)
    assert produce(config(FUNCTION), Seeded(), CompletionLog(journal)) == groups
    assert asked == []
    # Another function's verdict is not taken for this one's.
    other = produce(config(FAILING), Seeded(), CompletionLog(journal))
    assert {judgement.verdict for group in other for judgement in group.judgements} == {Scored(points=-1.0)}


def test_answers_of_the_journal_count_whatever_the_engines_say_today(tmp_path: Path) -> None:
    """The journal lost its end and the engines answer differently, as on GPUs: groups that were whole are as before,
    and every pair is of what its own group holds."""

    class Others(Seeded):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(replace(request, sampling=replace(request.sampling, seed=1)))
            return replace(made, text=f"{made.text}{request.id}", token_ids=(9, len(self.requests)))

    path = tmp_path / "journal"
    first = {group.id: group for group in produce(config(TEXT, responses=4), Seeded(), CompletionLog(path))}
    data = path.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3])
    log = CompletionLog(path)
    kept = set(ids_in(path))
    again = produce(config(TEXT, responses=4), Others(), log)
    same = [group.id for group in again if group == first[group.id]]
    whole = [group.id for group in first.values() if {one.id for one in (*group.responses, *group.judgements)} <= kept]
    assert same == whole
    assert 0 < len(whole) < len(first)
    for group in again:
        of = {response.id: response.token_ids for response in group.responses}
        for pair in group.pairs:
            tokens = pair.chosen_token_ids, pair.rejected_token_ids
            assert tokens == (of[pair.chosen_id], of[pair.rejected_id])


# -- power cuts --------------------------------------------------------------------------------------------------------


def test_groups_are_given_back_when_their_records_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And many groups for one fsync."""
    journal = tmp_path / "journal.jsonl"
    log = CompletionLog(journal)
    safe, syncs = [b""], 0

    def fsync(descriptor: int) -> None:
        nonlocal syncs
        data = journal.read_bytes()
        time.sleep(0.01)  # others finish meanwhile
        safe[0] = data
        syncs += 1

    monkeypatch.setattr("rsrlm.store.journal.os.fsync", fsync)
    prompts = [Prompt(id=f"p{number}", text="x") for number in range(40)]
    groups = produce(config(TEXT), Seeded(slots=60), log, prompts)
    assert len(groups) == 40
    kept = safe[0].decode()
    assert [
        one.id for group in groups for one in (*group.responses, *group.judgements) if f'"{one.id}"' not in kept
    ] == []
    assert 0 < syncs < 40


# -- failures and bounds -----------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def leaves(group: BaseExceptionGroup) -> list[BaseException]:
    return [one for e in group.exceptions for one in (leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


@pytest.mark.parametrize("failing_id", ["00/milk/1", "00/milk/1#2"])
def test_a_failing_call_cancels_the_others_and_is_told(failing_id: str) -> None:
    cancelled = []

    async def pause(request: Request) -> None:
        if request.id == failing_id:
            raise Broken(request.id)
        if not request.id.startswith("00/milk/1"):
            try:
                await asyncio.Event().wait()  # for ever
            except asyncio.CancelledError:
                cancelled.append(request.id)
                raise

    engine = Seeded(pause, slots=100)
    run = run_of(engine)
    with pytest.raises(ExceptionGroup) as caught:
        produce(config(TEXT), engine, run=run)
    assert [str(error) for error in leaves(caught.value) if isinstance(error, Broken)] == [failing_id]
    assert [type(error) for error in leaves(caught.value)] == [Broken]
    waiting = {request.id for request in engine.requests if not request.id.startswith("00/milk/1")}
    assert set(cancelled) == waiting
    assert len(waiting) >= 14  # the other responses of all 5 groups
    assert finished(run) == []


def test_an_event_that_cannot_be_written_ends_the_production() -> None:
    engine = Seeded()
    run = run_of(engine)

    def full(kind: str, **fields: Any) -> None:
        raise Broken(kind)

    run.event = full
    with pytest.raises(ExceptionGroup) as caught:
        produce(config(TEXT), engine, run=run)
    assert {type(error) for error in leaves(caught.value)} == {Broken}


def test_a_judge_that_raises_gives_no_score(functions_here: None) -> None:
    log = Memory()
    groups = produce(config(FAILING), Seeded(), log)
    verdicts = {judgement.verdict for group in groups for judgement in group.judgements}
    assert verdicts == {Unparsed(reason="function raised RuntimeError")}
    assert [group.pairs for group in groups] == [()] * len(PROMPTS)
    # It is a verdict like any other: kept, and not asked for again.
    known = dict(log.entries)
    assert produce(config(FAILING), Seeded(), log) == groups
    assert log.entries == known


@pytest.mark.parametrize(
    ("slots", "responses", "bound"),
    [
        (3, 2, 3),  # twice the slots over the responses of a group
        (4, 3, 3),  # 8/3, rounded up
        (1, 8, 2),  # but always two: one is judged while the next is sampled
        (64, 2, 20),  # more than there are prompts
    ],
)
def test_open_groups_are_bounded(slots: int, responses: int, bound: int) -> None:
    open_now: set[str] = set()
    most = 0

    async def pause(request: Request) -> None:
        nonlocal most
        open_now.add(request.id.split("/")[1])
        most = max(most, len(open_now))
        for _ in range(request.sampling.seed % 9):
            await asyncio.sleep(0)

    engine = Seeded(pause, slots)
    run = run_of(engine)
    run.event = lambda kind, **fields: open_now.discard(fields["g"].split("/")[1])
    prompts = [Prompt(id=f"p{number}", text="x") for number in range(20)]
    produce(config(TEXT, responses=responses), engine, prompts=prompts, run=run)
    assert most == bound
    assert not open_now


def test_judgements_wait_for_their_own_response_only() -> None:
    """A response is judged while its siblings are still being sampled."""
    judged = asyncio.Event()

    async def pause(request: Request) -> None:
        if request.id == "00/tea/0#0":
            judged.set()
        if request.id == "00/tea/1":
            await judged.wait()

    groups = produce(config(TEXT, responses=2), Seeded(pause), prompts=PROMPTS[:1])
    assert isinstance(groups[0].judgements[0], Judgement)
    assert judged.is_set()
