"""The verbs that everything durable lies under: what is asked, what is known, who waits for whom, and which weights
answer."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Memory, Pools, Seeded, model, run_of

from rsrlm.engines import (
    Answers,
    Engines,
    Model,
    NobodyAnswers,
    NotHeld,
    WrongWeights,
    digest_of,
    gather,
    key_of,
)
from rsrlm.records import Completion, Request, Response, Sampling
from rsrlm.store.journal import CompletionLog

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=20, seed=1)
ASKED = Request(id="a", prompt_token_ids=(1, 2, 3), sampling=SAMPLING, priority=3)
M0, M1 = model("M0"), model("M1")


def numbered(seed: int, name: str = "") -> Request:
    return replace(ASKED, id=name or f"r{seed}", sampling=replace(SAMPLING, seed=seed))


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def handle(pool: Any, log: Any = None, of: Model = M0, answers: Answers | None = None) -> Engines:
    return Engines(pool, of, answers or Answers(Memory() if log is None else log))


class Gate(Seeded):
    """Answers when `open` is set; the ids in `failing` fail then."""

    def __init__(self, failing: Sequence[str] = ()) -> None:
        super().__init__(self._wait)
        self.open = asyncio.Event()
        self._failing = failing

    async def _wait(self, request: Request) -> None:
        await self.open.wait()
        if request.id in self._failing:
            raise Broken(request.id)


class Broken(Exception):
    pass


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


# -- what is the same --------------------------------------------------------------------------------------------------

OTHERWISE = {
    "prompt": {"prompt_token_ids": (1, 2, 4)},
    "shorter prompt": {"prompt_token_ids": (1, 2)},
    "seed": {"sampling": replace(SAMPLING, seed=2)},
    "temperature": {"sampling": replace(SAMPLING, temperature=0.8)},
    "top_p": {"sampling": replace(SAMPLING, top_p=0.8)},
    "max_tokens": {"sampling": replace(SAMPLING, max_tokens=21)},
    "stop": {"sampling": replace(SAMPLING, stop=("\n",))},
    "other stop": {"sampling": replace(SAMPLING, stop=("\n\n",))},
    "regex": {"regex": "a+"},
    "labels": {"label_ids": (7, 8)},
    "order of labels": {"label_ids": (8, 7)},
    "scores": {"score_from": 1},
    "text": {"text": "Say tea."},
}


def test_every_part_of_a_request_tells_it_apart() -> None:
    requests = [ASKED, *(replace(ASKED, **changes) for changes in OTHERWISE.values())]  # type: ignore[arg-type]
    keys = [key_of(M0, request) for request in requests]
    assert len(set(keys)) == len(requests)
    assert not set(keys) & {key_of(M1, request) for request in requests}
    assert {len(key) for key in keys} == {16}


@pytest.mark.parametrize("changes", [{"id": "b"}, {"priority": 9}, {"role": "judge"}], ids=["id", "priority", "role"])
def test_what_the_answer_does_not_depend_on_is_no_part_of_the_key(changes: dict[str, Any]) -> None:
    assert key_of(M0, replace(ASKED, **changes)) == key_of(M0, ASKED)


def test_the_same_weights_under_another_name_or_folder_are_the_same() -> None:
    moved = Model(name="best", digest=M0.digest, folder=Path("elsewhere"))
    assert key_of(moved, ASKED) == key_of(M0, ASKED)


def test_keys_of_journals_stay_as_they_are() -> None:
    """Whoever changes them changes `store.folder.LAYOUT` too: a run that goes on would ask everything anew."""
    request = replace(ASKED, regex="x", label_ids=(5,), score_from=2, text="t")
    assert key_of(M0, request).hex() == "cd9d48380ee878b73d85a6bafd9fa5fa"
    assert digest_of("function", "f", "Say tea.", "Tea.").hex() == "ca1c3b69857ecc429ac7561ba00a1e66"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.text(max_size=3), max_size=3), min_size=2, max_size=6, unique_by=tuple))
def test_digests_do_not_run_into_each_other(parts: list[list[str]]) -> None:
    """Such as ("ab", "c") and ("a", "bc")."""
    assert len({digest_of(*one) for one in parts}) == len(parts)


# -- what is known -----------------------------------------------------------------------------------------------------


def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    """Not even by another process, when the journal is opened again: and the answer is the same in every field."""

    class Rich(Seeded):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            return replace(made, label_logprobs=(-1.5, float("-inf")), prompt_logprobs=(-0.1, -2.0), text="ä\ud83d\n")

    requests = [numbered(seed) for seed in range(5)]
    first, second = Rich(), Rich()
    log = CompletionLog(tmp_path / "j.jsonl")
    made = run(handle(first, log).complete_all(requests))
    log.close()
    assert run(handle(second, CompletionLog(tmp_path / "j.jsonl")).complete_all(requests)) == made
    assert (len(first.requests), second.requests) == (5, [])
    assert made[0].label_logprobs == (-1.5, float("-inf"))
    assert {one.weight_version for one in made} == {"M0"}


def test_an_answer_bears_the_id_of_who_asks() -> None:
    engine, log = Seeded(), Memory()
    one = run(handle(engine, log).complete(ASKED))
    other = run(handle(engine, log).complete(replace(ASKED, id="b")))
    assert (one.request_id, other.request_id) == ("a", "b")
    assert replace(other, request_id="a") == one
    assert len(engine.requests) == 1
    moved = Model(name="best", digest=M0.digest)
    assert run(handle(engine, log, moved).complete(ASKED)).weight_version == "best"


def test_only_what_is_missing_is_asked_together() -> None:
    """In one call, and each has its place in the result."""
    engine, log = Seeded(), Memory()
    run(handle(engine, log).complete_all([numbered(2), numbered(4)]))
    made = run(handle(engine, log).complete_all([numbered(seed) for seed in range(6)]))
    assert engine.calls == [["r2", "r4"], ["r0", "r1", "r3", "r5"]]
    assert [one.request_id for one in made] == [f"r{seed}" for seed in range(6)]
    assert [one.token_ids for one in made] == [(seed, seed) for seed in range(6)]


def test_other_weights_are_asked_anew() -> None:
    log, one, other = Memory(), Seeded(held="M0"), Seeded(held="M1")
    run(handle(one, log).complete(ASKED))
    run(handle(other, log, M1).complete(ASKED))
    assert len(one.requests) == len(other.requests) == 1
    assert len(log.entries) == 2


# -- in flight ---------------------------------------------------------------------------------------------------------


def test_equal_requests_in_flight_are_sent_once() -> None:
    async def story() -> list[Completion]:
        engine = Gate()
        engines = handle(engine)
        asking = [
            asyncio.ensure_future(engines.complete(numbered(1, "x"))),
            asyncio.ensure_future(engines.complete_all([numbered(2), numbered(1, "y"), numbered(2, "z")])),
            asyncio.ensure_future(engines.complete(numbered(2, "w"))),
        ]
        await turns()
        engine.open.set()
        one, three, last = await gather(asking)  # type: ignore[arg-type]
        assert Counter(request.sampling.seed for request in engine.requests) == {1: 1, 2: 1}
        return [one, *three, last]

    async def gather(work: Any) -> Any:
        return [await one for one in work]

    made = run(story())
    assert [one.request_id for one in made] == ["x", "r2", "y", "z", "w"]
    assert [one.token_ids for one in made] == [(1, 1), (2, 2), (1, 1), (2, 2), (2, 2)]


def test_tokens_count_once_for_all_who_wait() -> None:
    ticks: list[tuple[str, int, int]] = []

    async def story() -> None:
        answers = Answers(Memory())
        engines = handle(engine := Gate(), answers=answers)
        with answers.counted(lambda *tick: ticks.append(tick)):
            asking = [asyncio.ensure_future(engines.complete(replace(ASKED, id=name, role="judge"))) for name in "abc"]
            await turns()
            engine.open.set()
            for one in asking:
                await one
        await engines.complete(numbered(9))  # nobody counts any more

    run(story())
    assert sorted(ticks) == [("judge", 1, 0), ("judge", 1, 0), ("judge", 1, 2)]


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    log = Memory()

    async def story() -> None:
        engine = Gate(failing=["bad"])
        engines = handle(engine, log)
        asking = [
            asyncio.ensure_future(engines.complete(numbered(1, "bad"))),
            asyncio.ensure_future(engines.complete(numbered(1, "waits"))),
            asyncio.ensure_future(engines.complete_all([numbered(2, "good"), numbered(1, "waits too")])),
            asyncio.ensure_future(engines.complete(numbered(3, "apart"))),
        ]
        await turns()
        engine.open.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        for one in found[:3]:
            assert isinstance(one, Broken | ExceptionGroup), one
        assert isinstance(found[3], Completion)
        assert {entry["id"] for entry in log.entries.values()} == {"good", "apart"}
        # It was no answer: who asks later, asks.
        engine._failing = ()
        assert (await engines.complete(numbered(1, "again"))).token_ids == (1, 1)
        assert [request.id for request in engine.requests][-1] == "again"

    run(story())


def test_a_failure_reaches_who_waits_for_several() -> None:
    """While it waits for the first of two others, the second one fails."""

    async def story() -> None:
        first, second = Gate(), Gate(failing=["bad"])
        answers = Answers(Memory())
        asking = [
            asyncio.ensure_future(handle(first, answers=answers).complete(numbered(1))),
            asyncio.ensure_future(handle(second, answers=answers).complete(numbered(2, "bad"))),
        ]
        await turns()
        both = asyncio.ensure_future(handle(first, answers=answers).complete_all([numbered(1), numbered(2)]))
        await turns()
        second.open.set()
        await turns()
        first.open.set()
        found = await asyncio.gather(*asking, both, return_exceptions=True)
        assert isinstance(found[0], Completion)
        assert all(isinstance(one, Broken | ExceptionGroup) for one in found[1:]), found

    run(story())


def test_who_is_cancelled_takes_nobody_along() -> None:
    """Others wait for the same answer: one of them asks for it then."""
    log = Memory()

    async def story() -> None:
        engine = Gate()
        engines = handle(engine, log)
        owner, waiting, more = (asyncio.ensure_future(engines.complete(numbered(1, name))) for name in "abc")
        await turns()
        owner.cancel()
        await turns()
        engine.open.set()
        assert (await waiting).token_ids == (await more).token_ids == (1, 1)
        assert owner.cancelled()
        assert [request.id for request in engine.requests] == ["a", "b"]

    run(story())
    assert len(log.entries) == 1


def test_who_waits_can_be_cancelled_alone() -> None:
    async def story() -> None:
        engine = Gate()
        engines = handle(engine)
        owner, waiting = (asyncio.ensure_future(engines.complete(numbered(1, name))) for name in "ab")
        await turns()
        waiting.cancel()
        await turns()
        assert waiting.cancelled()
        engine.open.set()
        assert (await owner).token_ids == (1, 1)

    run(story())


def test_cancelled_half_way_and_run_again(tmp_path: Path) -> None:
    """No request that was answered is asked again, and the answers are those of an undisturbed run."""
    requests = [[numbered(seed % 7) for seed in range(at, at + 3)] for at in range(0, 30, 2)]
    expected = run(gather([handle(Seeded()).complete_all(one) for one in requests]))

    async def once(path: Path, rng: random.Random, answered: Counter[int], limit: int) -> list[Any]:
        class Slow(Seeded):
            async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
                await turns(rng.randrange(12))
                made = await super().generate_all(requests)
                answered.update(one.sampling.seed for one in requests)
                return made

        log = CompletionLog(path)
        try:
            engines = handle(Slow(), log)
            work = asyncio.ensure_future(gather([engines.complete_all(one) for one in requests]))
            await turns(limit)
            if limit < 1000:
                work.cancel()
            return list(await work)
        finally:
            log.close()

    half_way = []
    for seed in range(8):
        path, rng, answered = tmp_path / str(seed), random.Random(seed), Counter[int]()
        for limit in (5, 8, 11):
            with contextlib.suppress(asyncio.CancelledError):
                run(once(path, rng, answered, limit))
            half_way.append(len(answered))
        assert run(once(path, rng, answered, 1000)) == expected
        assert answered == dict.fromkeys(range(7), 1)
    assert len({number for number in half_way if 0 < number < 7}) > 2


# -- weights -----------------------------------------------------------------------------------------------------------


def test_a_stale_handle_is_refused_and_asks_nobody() -> None:
    engine = Seeded()

    async def story() -> None:
        over = run_of(engine)
        old = await over.load(M0)
        new = await over.load(M1)
        with pytest.raises(NotHeld, match="these engines are for M0, but M1 was loaded after it"):
            await old.complete(ASKED)
        assert engine.requests == []
        await new.complete(ASKED)
        assert engine.held == "M1"
        # What is known needs no weights; loaded again, the handle is good again.
        known = await over.load(M0)
        await known.complete(ASKED)
        await over.load(M1)
        assert (await known.complete(ASKED)).weight_version == "M0"
        assert engine.held == "M0"

    run(story())


def test_weights_move_when_somebody_must_be_asked() -> None:
    """And once, however many ask at the same time."""

    class Counting(Seeded):
        moves = 0

        async def hold(self, version: str) -> dict[str, Any]:
            await turns(3)
            self.moves += version != self.held
            return await super().hold(version)

    engine = Counting()

    async def story() -> None:
        over = run_of(engine)
        engines = await over.load(M1)
        assert (engine.held, engine.moves) == ("M0", 0)
        await gather([engines.complete(numbered(seed)) for seed in range(6)])
        assert (engine.held, engine.moves) == ("M1", 1)
        await (await over.load(M0)).complete_all([])
        await (await over.load(M1)).complete(numbered(3))
        assert engine.moves == 1
        await over.publish(M0)  # at once
        assert (engine.held, engine.moves) == ("M0", 2)

    run(story())


def test_an_answer_of_other_weights_is_an_error_and_no_record() -> None:
    """A replica that came back with the weights of before."""

    class Behind(Seeded):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            return replace(made, weight_version="M0") if request.id == "r3" else made

    engine, log = Behind(), Memory()
    over = run_of(engine, log)

    async def story() -> None:
        engines = await over.load(M1)
        await engines.complete(numbered(1))
        with pytest.raises(WrongWeights, match="r3 was answered by M0, not M1"):
            await engines.complete_all([numbered(2), numbered(3)])

    run(story())
    assert [entry["id"] for entry in log.entries.values()] == ["r1"]


def test_judges_of_their_own_are_asked_in_the_place_of_the_engines() -> None:
    engine, judge, validator = Seeded(), Seeded(held="judge"), Seeded(held="validator")

    async def story() -> None:
        alone = run_of(engine)
        engines = await alone.load(M1)
        assert engines.judges is engines
        assert (await alone.validator(M0)).model == M0
        over = run_of(engine, judge=judge, validator=validator)
        await (await over.load(M1)).judges.complete(numbered(1))
        await (await over.validator(M0)).complete(numbered(2))
        assert (len(engine.requests), len(judge.requests), len(validator.requests)) == (0, 1, 1)
        # They hold weights of their own: whatever is loaded, their handles are good.
        judges = (await over.load(M1)).judges
        await over.load(M0)
        await judges.complete(numbered(3))
        assert engine.held == "M0"

    run(story())


def test_without_engines_only_what_is_known_is_answered() -> None:
    log = Memory()
    made = run(handle(Seeded(), log).complete(ASKED))
    nobody = handle(None, log)
    assert run(nobody.complete(ASKED)) == made
    with pytest.raises(NobodyAnswers, match="r5 is not known, and no engine was started"):
        run(nobody.complete(numbered(5)))
    assert nobody.slots == 1


# -- other verbs -------------------------------------------------------------------------------------------------------


def test_values_are_remembered_by_their_key(tmp_path: Path) -> None:
    computed: list[str] = []
    path = tmp_path / "j.jsonl"

    def value(of: str, delay: int = 0) -> Callable[[], Any]:
        async def compute() -> Any:
            computed.append(of)
            await turns(delay)
            if of == "bad":
                raise Broken(of)
            return {"points": 1.5, "of": of}

        return compute

    async def story() -> None:
        engines = handle(None, CompletionLog(path))
        same = [engines.remember("judge", "n", ("f", "x"), value("x", 5)) for _ in range(3)]
        assert await gather(same) == [{"points": 1.5, "of": "x"}] * 3
        assert await engines.remember("judge", "n", ("f", "y"), value("y")) == {"points": 1.5, "of": "y"}
        with pytest.raises(Broken):
            await engines.remember("judge", "n", ("f", "z"), value("bad"))
        assert (await engines.remember("judge", "n", ("f", "z"), value("z")))["of"] == "z"

    run(story())
    assert computed == ["x", "y", "bad", "z"]

    async def again() -> Any:
        return await handle(None, CompletionLog(path)).remember("judge", "n", ("f", "x"), value("later"))

    assert run(again()) == {"points": 1.5, "of": "x"}
    assert computed[-1] == "z"


@pytest.mark.parametrize(("slots", "width", "bound"), [(4, 1, 8), (4, 3, 3), (1, 5, 2), (3, 2, 3), (50, 1, 12)])
def test_each_keeps_the_order_and_bounds_what_is_open(slots: int, width: int, bound: int) -> None:
    rng, open_now, most = random.Random(1), 0, 0
    finished: list[int] = []

    async def work(item: int) -> int:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await turns(rng.randrange(1, 9))
        open_now -= 1
        finished.append(item)
        return -item

    engines = handle(Seeded(slots=slots))
    assert run(engines.each(work, range(12), width)) == [-item for item in range(12)]
    assert most == bound
    assert finished != sorted(finished)
    assert run(engines.each(work, [], width)) == []


def test_a_result_is_given_back_when_its_answers_are_on_disk() -> None:
    """And its place is free for the next one only then."""
    order: list[str] = []

    class Disk(Memory):
        async def sync(self) -> None:
            order.append("begin")
            await turns(5)
            order.append("on disk")

    async def work(item: int) -> int:
        order.append(f"work {item}")
        await turns(1)
        return item

    run(handle(Seeded(slots=1), Disk()).each(work, range(3), 9))
    assert order.index("work 2") > order.index("on disk")
    assert order[-1] == "on disk"
    assert order.count("begin") == 3


def test_the_first_failure_of_each_cancels_the_rest() -> None:
    cancelled: list[int] = []

    async def work(item: int) -> None:
        try:
            await turns(3 if item == 1 else 1000)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        raise Broken(item)

    with pytest.raises(ExceptionGroup) as caught:
        run(handle(Seeded(slots=2)).each(work, range(9), 1))
    assert [str(error) for error in caught.value.exceptions] == ["1"]
    assert sorted(cancelled) == [0, 2, 3]  # those that are open when the second one fails; the others never begin


def test_gather_keeps_the_order_and_takes_nothing() -> None:
    async def after(number: int) -> int:
        await turns(number)
        return number

    assert run(gather([after(5), after(0), after(3)])) == [5, 0, 3]
    assert run(gather([])) == []


def test_logprobs_are_of_the_response_alone() -> None:
    """Of its own tokens after its prompt; one that fills the room lacks the last of them."""

    class Scoring(Seeded):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            assert request.score_from is not None
            tokens = request.prompt_token_ids[request.score_from :]
            return replace(made, prompt_logprobs=tuple(-token / 2 for token in tokens))

    def response(prompt: int, tokens: tuple[int, ...]) -> Response:
        return Response(
            id=f"p/{prompt}", prompt_id="p", index=0, role="actor", text="", token_ids=tokens,
            prompt_token_ids=(1,) * prompt, finish_reason="stop", weight_version="M4", sampling=SAMPLING,
        )  # fmt: skip

    engine = Scoring()
    found = run(handle(engine).logprobs([response(3, (4, 6, 8)), response(7, (4, 6, 8))], 10))
    assert found == [(-2.0, -3.0, -4.0), (-2.0, -3.0)]
    assert [(len(one.prompt_token_ids), one.score_from) for one in engine.requests] == [(6, 3), (9, 7)]
    assert {(one.sampling.max_tokens, one.role) for one in engine.requests} == {(1, "data")}


def test_stages_count_what_they_show_while_they_last() -> None:
    engine = Seeded()

    async def story() -> Any:
        over = run_of(engine)
        engines = await over.load(M0)
        with over.stage("outer", {"actor": 2, "duel": 1, "meta": 3, "judge": 0}):
            with over.stage("inner", {"judge": 1}):
                await engines.complete(replace(numbered(1), role="judge"))
                await engines.complete(numbered(2))  # not shown
            await engines.complete(numbered(3))
            await engines.complete(replace(numbered(4), role="meta"))
            await engines.complete(replace(numbered(5), role="judge"))
        await engines.complete(numbered(6))
        return over.screen

    screen = run(story())
    assert screen.totals == [("outer", {"respond": 2, "compare": 4}), ("inner", {"judge": 1})]
    assert screen.ticks == [("judge", 1, 2), ("respond", 1, 2), ("compare", 1, 2)]


def test_the_share_of_the_prefix_cache_is_that_of_the_groups_alone() -> None:
    """A replica that was replaced counts from 0 again: then it is not known."""
    from rsrlm.records import Group, Prompt, Task

    class Counting(Pools):
        counts = iter([(100.0, 10.0), (300.0, 160.0), (400.0, 200.0), (50.0, 20.0)])

        async def stats(self) -> dict[str, float]:
            return dict(zip(("prefix_cache_queries", "prefix_cache_hits"), next(self.counts), strict=True))

    class Nothing:
        width = 1

        async def group(self, engines: Engines, task: Task) -> Group:
            return Group(id=task.id, iteration=0, prompt=task.prompt, responses=())

        def requests(self, prompts: int) -> dict[Any, int]:
            return {}

    async def story() -> list[float | None]:
        over = run_of(Seeded())
        over.pools = Counting(Seeded())
        shares = []
        for _ in range(2):
            await over.groups(await over.load(M0), Nothing(), [Task(iteration=0, prompt=Prompt(id="p", text="?"))])
            shares.append(over.prefix_cache_hit_share)
        return shares

    assert run(story()) == [0.75, None]
