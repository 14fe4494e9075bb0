"""What the pool and the in-process engine do about faults: with engines that fail on command, and no model."""

import asyncio
import functools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rsrlm.records import Completion, Request, Sampling
from rsrlm.runtime import inprocess_engine, replicas
from rsrlm.runtime.engine import EngineDead, RequestFailed, engine_arguments
from rsrlm.runtime.inprocess_engine import InProcessEngine
from rsrlm.runtime.pool import MAX_ATTEMPTS, EnginePool
from rsrlm.runtime.replicas import PoolFailed
from rsrlm.runtime.weights import WeightFile, WeightSet

M0, M1 = (WeightSet(version=name, folder=f"/{name}", files=()) for name in ("M0", "M1"))


def request(name: str, **more: Any) -> Request:
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=4, seed=0)
    return Request(id=name, prompt_token_ids=(1, 2), sampling=sampling, priority=0, **more)


def completion(request: Request, version: str, replica: int) -> Completion:
    return Completion(
        request_id=request.id,
        token_ids=(replica,),
        text="a",
        finish_reason="stop",
        weight_version=version,
    )


# -- the pool, without Ray ---------------------------------------------------------------------------------------------

Answer = Callable[["Actor", Request], Awaitable[Completion]]


class Actor:
    """An engine actor in this event loop. A killed one fails all that it was asked and will be asked."""

    def __init__(self, ray: "Ray", version: str, replica: int) -> None:
        self.ray = ray
        self.held = version
        self.told: dict[str, Any] = {}  # of the last update
        self.replica = replica
        self.killed = asyncio.Event()
        self.steps: Callable[[], int] = lambda: 0
        self.calls: list[list[str]] = []  # the requests of each call
        self.asleep = False

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(self._call(method, *arguments)))

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self.killed.is_set():
            raise RayActorError
        work = asyncio.ensure_future(getattr(self, f"do_{method}")(*arguments))
        dying = asyncio.ensure_future(self.killed.wait())
        done, _ = await asyncio.wait({work, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if work not in done:
            work.cancel()
            raise RayActorError
        return work.result()

    async def do_generate(self, requests: list[Request]) -> list[Any]:
        if requests[0].id.startswith("health"):
            return [completion(requests[0], self.held, self.replica)]
        self.calls.append([request.id.partition("~")[0] for request in requests])
        return await asyncio.gather(*(self._outcome(request) for request in requests))

    async def _outcome(self, request: Request) -> Completion | Exception:
        try:
            return await self.ray.answer(self, request)
        except (RequestFailed, EngineDead) as error:
            return error

    async def do_update(self, info: dict[str, Any], version: str) -> dict[str, float]:
        await self.ray.updating.wait()
        self.held, self.told = version, info
        return {"total": 0.0}

    async def do_version(self) -> str:
        return self.held

    async def do_place(self) -> tuple[str, str, int]:
        return f"node {self.replica}", f"host-{self.replica}", len(self.ray.made)

    async def do_progress(self) -> int:
        return self.steps()

    async def do_sleep(self) -> None:
        self.asleep = True

    async def do_wake(self) -> None:
        self.asleep = False

    async def do_close(self) -> None:
        pass


class Ray:
    """As much of Ray as the pool uses. `answer` is what engines do; updates wait until `updating` is set."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer or self._at_once
        self.updating = asyncio.Event()
        self.updating.set()
        self.made: list[Actor] = []

    @staticmethod
    async def _at_once(actor: Actor, request: Request) -> Completion:
        return completion(request, actor.held, actor.replica)

    def remote(self, _: Any) -> Any:
        def make(config: Any, folder: str, version: str, replica: int) -> Actor:
            self.made.append(Actor(self, version, replica))
            return self.made[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def kill(self, actor: Actor) -> None:
        actor.killed.set()


def faults(
    work: Callable[[EnginePool, Ray], Awaitable[Any]],
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer | None = None,
    note: Callable[..., None] = lambda *_, **__: None,
    number: int = 2,
) -> Any:
    async def main() -> Any:
        ray = Ray(answer)
        monkeypatch.setattr(replicas, "ray", ray)
        pool = EnginePool(make_config(), M0, "test", number, note)
        await pool.start()
        try:
            return await asyncio.wait_for(work(pool, ray), 20)
        finally:
            await pool.close()

    return asyncio.run(main())


async def waits(actor: Actor, request: Request) -> Completion:
    """The first engines never answer; those that replace them do."""
    if actor in actor.ray.made[:2]:
        await asyncio.Event().wait()
    return completion(request, actor.held, actor.replica)


def test_an_engine_that_dies_in_an_update_is_replaced_once(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request in flight is the first to see it."""

    async def work(pool: EnginePool, ray: Ray) -> Any:
        ray.updating.clear()
        asked = [asyncio.ensure_future(pool.generate(request(str(number)))) for number in range(2)]
        while not all(replica.outstanding for replica in pool.replicas.all):
            await asyncio.sleep(0)
        update = asyncio.ensure_future(pool.publish(M1))
        await asyncio.sleep(0)
        ray.kill(ray.made[0])
        while len(ray.made) < 3:
            await asyncio.sleep(0)
        ray.updating.set()
        reports = await update
        ray.kill(ray.made[1])  # its request is done again as well
        answers = await asyncio.gather(*asked)
        more = await pool.generate(request("later"))
        return reports, answers, more, await pool.versions(), len(ray.made)

    reports, answers, more, versions, made = faults(work, make_config, monkeypatch, waits)
    assert [report["replica"] for report in reports] == [1]
    assert {answer.weight_version for answer in [*answers, more]} == {"M1"}
    assert versions == ["M1", "M1"]
    assert made == 4  # two, and one for each that died


def test_an_engine_that_hangs_in_an_update_is_replaced(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others serve as soon as they hold the weights."""
    notes: list[str] = []
    done = Actor.do_update

    async def update(actor: Actor, info: dict[str, Any], version: str) -> dict[str, float]:
        if actor.ray.made[0] is actor:
            await asyncio.Event().wait()
        return await done(actor, info, version)

    monkeypatch.setattr(Actor, "do_update", update)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        publishing = asyncio.ensure_future(pool.publish(M1))
        await asyncio.sleep(0)
        early = await pool.generate(request("early"))
        assert not publishing.done()
        reports = await publishing
        while len(pool.replicas.ready) < 2:
            await asyncio.sleep(0)
        return early.weight_version, [one["replica"] for one in reports], await pool.versions(), len(ray.made)

    hurried = functools.partial(make_config, weights={"deadline_s": 0.2})
    said = faults(work, hurried, monkeypatch, note=lambda kind, **what: notes.append(f"{kind} {what.get('error', '')}"))
    assert said == ("M1", [1], ["M1", "M1"], 3)
    assert "engine_lost weights M1 were not loaded within weights.deadline_s=0.2" in notes


def test_each_replica_is_told_of_the_copy_on_its_own_host(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the exported model where there is none."""
    exported, copy = (WeightFile(path=path, size=1, checksum="c") for path in ("/runs/M1", "/dev/shm/M1"))
    weights = WeightSet(version="M1", folder="/runs", files=(exported,), local={"node 1": (copy,)})

    async def work(pool: EnginePool, ray: Ray) -> Any:
        nodes = pool.nodes
        reports = await pool.publish(weights)
        return nodes, reports, [[file["path"] for file in actor.told["files"]] for actor in ray.made]

    nodes, reports, told = faults(work, make_config, monkeypatch)
    assert nodes == {"node 0", "node 1"}
    assert [report["copy"] for report in reports] == [False, True]
    assert told == [["/runs/M1"], ["/dev/shm/M1"]]


def test_what_an_engine_cannot_answer_is_asked_again_and_the_engine_kept(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def fails_twice(actor: Actor, request: Request) -> Completion:
        asked.append(request.id.partition("~")[0])
        if request.id.startswith("bad") or asked.count("unlucky") < 3:
            raise RequestFailed(f"request {request.id} ended with finish reason 'error'")
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        found = await pool.generate(request("unlucky"))
        with pytest.raises(PoolFailed, match=r"request bad failed 3 times; last: request bad~\d+ ended with finish r"):
            await pool.generate(request("bad"))
        return found, await pool.generate(request("unlucky")), len(ray.made)

    found, again, made = faults(work, make_config, monkeypatch, fails_twice)
    assert found.request_id == again.request_id == "unlucky"
    assert asked == ["unlucky"] * MAX_ATTEMPTS + ["bad"] * MAX_ATTEMPTS + ["unlucky"]
    assert made == 2


def test_requests_of_one_call_go_to_one_replica(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one message, and the answers come in the order of the requests, whichever is ready first."""

    async def last_first(actor: Actor, request: Request) -> Completion:
        await asyncio.sleep(0.05 - int(request.id.partition("~")[0]) / 200)
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        found = await asyncio.gather(
            pool.generate_all([request(str(number)) for number in range(5)]),
            pool.generate_all([request(str(number)) for number in range(5, 8)]),
            pool.generate_all([]),
        )
        return found, [actor.calls for actor in ray.made], [replica.outstanding for replica in pool.replicas.all]

    found, calls, outstanding = faults(work, make_config, monkeypatch, last_first)
    assert [[one.request_id for one in answers] for answers in found] == [list("01234"), list("567"), []]
    assert [{one.token_ids for one in answers} for answers in found] == [{(0,)}, {(1,)}, set()]
    assert calls == [[list("01234")], [list("567")]]
    assert outstanding == [0, 0]


def test_a_slow_replica_gets_less(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes ten times as long answers about a tenth as much, while the same number is always in flight."""

    async def by_replica(actor: Actor, request: Request) -> Completion:
        await asyncio.sleep(0.02 if actor.replica else 0.002)
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> list[int]:
        left = iter(range(300))

        async def some() -> None:
            for number in left:
                await pool.generate(request(str(number)))

        await asyncio.gather(*(some() for _ in range(8)))
        return [len(actor.calls) for actor in ray.made]

    fast, slow = faults(work, make_config, monkeypatch, by_replica)
    assert fast + slow == 300
    assert slow < 100  # half as much as by turns; the machine may be busy


def test_only_what_failed_is_asked_again(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one request of a call fails, the answers to the others are kept."""
    tries: Counter[str] = Counter()

    async def at_the_third_try(actor: Actor, request: Request) -> Completion:
        name = request.id.partition("~")[0]
        tries[name] += 1
        if name == "bad" or (name == "unlucky" and tries[name] < MAX_ATTEMPTS):
            raise RequestFailed(f"request {request.id} ended with finish reason 'error'")
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        found = await pool.generate_all([request("a"), request("unlucky"), request("b")])
        with pytest.raises(PoolFailed, match=r"request bad failed 3 times; last: request bad~\d+ ended with finish r"):
            await pool.generate_all([request("c"), request("bad")])
        return found, len(ray.made)

    found, made = faults(work, make_config, monkeypatch, at_the_third_try)
    assert [one.request_id for one in found] == ["a", "unlucky", "b"]
    assert tries == {"a": 1, "unlucky": 3, "b": 1, "c": 1, "bad": 3}
    assert made == 2


@pytest.mark.parametrize("says_so", [True, False])
def test_a_call_whose_engine_dies_goes_to_another(
    says_so: bool, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it where the process is gone. An actor that can say that its engine died gives what was finished too."""

    async def dies(actor: Actor, request: Request) -> Completion:
        if actor is actor.ray.made[0] and not request.id.startswith("quick"):
            if says_so:
                raise EngineDead("replica 0: RuntimeError('a broken step')")
            await asyncio.Event().wait()
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        asked = asyncio.ensure_future(pool.generate_all([request(name) for name in ("quick", "a", "b")]))
        while not ray.made[0].calls:
            await asyncio.sleep(0)
        if not says_so:
            ray.kill(ray.made[0])
        found = await asked
        while not all(replica.ready.is_set() for replica in pool.replicas.all):
            await asyncio.sleep(0)
        return found, [actor.calls for actor in ray.made], [replica.outstanding for replica in pool.replicas.all]

    found, calls, outstanding = faults(work, make_config, monkeypatch, dies)
    assert [one.request_id for one in found] == ["quick", "a", "b"]
    assert calls == [[["quick", "a", "b"]], [["a", "b"] if says_so else ["quick", "a", "b"]], []]
    assert outstanding == [0, 0]


def test_an_engine_that_does_not_come_back_is_tried_again_while_another_serves(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody serves, only as long as its hosts die under it; else the pool fails."""
    monkeypatch.setattr(replicas, "RETRY_AFTER_S", 0.01)
    notes: list[str] = []

    async def work(pool: EnginePool, ray: Ray) -> Any:
        async def lose_and_kill(index: int, times: int) -> None:
            replica = pool.replicas.all[index]
            pool.replicas.lost(replica, replica.generation, EngineDead("its host is gone"))
            for _ in range(times):
                made = len(ray.made)
                while len(ray.made) == made:
                    await asyncio.sleep(0)
                ray.kill(ray.made[-1])

        await lose_and_kill(0, 3)
        answers = [await pool.generate(request(str(number))) for number in range(3)]
        while len(pool.replicas.ready) < 2:
            await asyncio.sleep(0)
        pool.replicas.all[1].ready.clear()
        await lose_and_kill(0, 2)  # Ray has placed it on the dead host
        assert (await pool.generate(request("later"))).token_ids == (0,)
        monkeypatch.setattr(replicas, "_vanished", lambda error: False)  # it has failed by itself
        await lose_and_kill(0, 1)
        with pytest.raises(PoolFailed, match="replica 0 of pool test did not start"):
            await pool.generate(request("nobody"))
        return answers

    answers = faults(work, make_config, monkeypatch, note=lambda kind, **_: notes.append(kind))
    assert {answer.token_ids for answer in answers} == {(1,)}
    tried = [["engine_lost", *["engine_not_up"] * times, "engine_restarted"] for times in (3, 2)]
    assert notes[2:] == [*tried[0], *tried[1], "engine_lost"]


def test_replicas_join_as_their_hosts_do(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four begin. No host comes for the third, but much later; without it nothing fails."""
    monkeypatch.setattr(replicas, "RETRY_AFTER_S", 0.01)
    notes: list[tuple[str, int]] = []
    hosts = asyncio.Event()

    async def work(pool: EnginePool, ray: Ray) -> Any:
        assert [replica.index for replica in pool.replicas.ready] == [0, 1]
        while [index for kind, index in notes if kind == "engine_not_up"].count(2) < 2:
            await asyncio.sleep(0)
        for replica in pool.replicas.all[:2]:  # it is not of the third's doing that nobody serves for a while
            replica.ready.clear()
        while [index for kind, index in notes if kind == "engine_not_up"].count(2) < 4:
            await asyncio.sleep(0)
        assert pool.replicas.failure is None
        for replica in pool.replicas.all[:2]:
            replica.ready.set()
        hosts.set()
        while len(pool.replicas.ready) < 4:
            await asyncio.sleep(0)
        return [(await pool.generate(request(str(number)))).token_ids for number in range(2)]

    async def place(actor: Actor) -> tuple[str, str, int]:
        if actor.replica == 2:
            await asyncio.wait_for(hosts.wait(), 0.01)
        return f"node {actor.replica}", f"host-{actor.replica}", 1

    monkeypatch.setattr(Actor, "do_place", place)
    joining = functools.partial(make_config, engine={"replicas": 4, "min_replicas": 2})
    faults(work, joining, monkeypatch, note=lambda kind, **fields: notes.append((kind, fields["replica"])), number=4)
    assert sorted(index for kind, index in notes if kind == "engine_up") == [0, 1, 2, 3]


def test_an_engine_that_dies_asleep_is_replaced_when_the_others_wake(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner has the memory of its GPU meanwhile."""

    async def work(pool: EnginePool, ray: Ray) -> Any:
        await pool.replicas.sleep()
        slept = [actor.asleep for actor in ray.made]
        replica = pool.replicas.all[0]
        pool.replicas.lost(replica, replica.generation, EngineDead("killed in its sleep"))
        for _ in range(50):
            await asyncio.sleep(0)
        while_asleep = len(ray.made)
        await pool.replicas.awake()
        while not replica.ready.is_set():
            await asyncio.sleep(0)
        return slept, while_asleep, [actor.asleep for actor in ray.made[1:]], (await pool.generate(request("a"))).text

    assert faults(work, make_config, monkeypatch) == ([True, True], 2, [False, False], "a")


@pytest.mark.parametrize("method", ["do_sleep", "do_wake"])
def test_an_engine_that_cannot_sleep_or_wake_is_replaced(
    method: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(Actor, method)

    async def fails(actor: Actor) -> None:
        if actor.replica == 0:
            raise RuntimeError("CUDA Error: out of memory")
        await done(actor)

    monkeypatch.setattr(Actor, method, fails)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        await pool.replicas.sleep()
        await pool.replicas.awake()
        while len(pool.replicas.ready) < 2:
            await asyncio.sleep(0)
        answers = [await pool.generate(request(name)) for name in "ab"]
        return [actor.killed.is_set() for actor in ray.made], [answer.text for answer in answers]

    assert faults(work, make_config, monkeypatch) == ([True, False, False], ["a", "a"])


def test_an_engine_that_starts_when_the_others_sleep_starts_anew(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the memory in which the learner trains."""
    monkeypatch.setattr(replicas, "RETRY_AFTER_S", 0.01)
    begun = asyncio.Event()

    async def place(actor: Actor) -> tuple[str, str, int]:
        if len(actor.ray.made) == 3:
            begun.set()
            await asyncio.Event().wait()
        return f"node {actor.replica}", "host", 1

    monkeypatch.setattr(Actor, "do_place", place)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        replica = pool.replicas.all[0]
        pool.replicas.lost(replica, replica.generation, EngineDead("killed"))
        await begun.wait()
        await pool.replicas.sleep()
        await asyncio.sleep(0.05)
        while_asleep = [actor.killed.is_set() for actor in ray.made]
        await pool.replicas.awake()
        while not replica.ready.is_set():
            await asyncio.sleep(0)
        return while_asleep, [actor.killed.is_set() for actor in ray.made], [actor.asleep for actor in ray.made]

    while_asleep, killed, asleep = faults(work, make_config, monkeypatch)
    assert while_asleep == [True, False, True]
    assert killed == [True, False, True, False]
    assert asleep == [False] * 4


def test_more_replicas_join_and_others_end_what_they_were_asked(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "LEAVING_S", 0.01)
    go_on = asyncio.Event()
    notes: list[tuple[str, int]] = []

    async def slow(actor: Actor, request: Request) -> Completion:
        if request.id.startswith("long"):
            await go_on.wait()
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        pool.replicas.resize(3)
        while len(pool.replicas.ready) < 3:
            await asyncio.sleep(0)
        long = [asyncio.ensure_future(pool.generate(request(f"long{number}"))) for number in range(3)]
        while not all(replica.outstanding for replica in pool.replicas.all):
            await asyncio.sleep(0)
        pool.replicas.resize(1)
        short = [await pool.generate(request(name)) for name in "abc"]
        alive = [not actor.killed.is_set() for actor in ray.made]
        go_on.set()
        answered = [one.token_ids for one in await asyncio.gather(*long)]
        while sum(actor.killed.is_set() for actor in ray.made) < 2:
            await asyncio.sleep(0)
        pool.replicas.resize(2)
        while len(pool.replicas.ready) < 2:
            await asyncio.sleep(0)
        return {one.token_ids for one in short}, alive, answered, len(ray.made), pool.slots

    short, alive, answered, made, slots = faults(
        work, make_config, monkeypatch, slow, note=lambda kind, **what: notes.append((kind, what["replica"]))
    )
    assert short == {(0,)}  # the others are given nothing new
    assert alive == [True, True, True]  # but may end what they have
    assert answered == [(0,), (1,), (2,)]
    assert (made, slots) == (4, 16)
    assert [one for one in notes if one[0] == "engine_left"] == [("engine_left", 1), ("engine_left", 2)]
    assert [one for one in notes if one[0] == "engine_lost"] == []


def test_a_replica_that_dies_while_it_leaves_is_not_replaced(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was asked goes to another."""
    monkeypatch.setattr(replicas, "LEAVING_S", 0.01)

    async def hangs(actor: Actor, request: Request) -> Completion:
        if actor.replica == 1:
            await asyncio.Event().wait()
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        asked = [asyncio.ensure_future(pool.generate(request(name))) for name in "ab"]
        while not all(replica.outstanding for replica in pool.replicas.all):
            await asyncio.sleep(0)
        pool.replicas.resize(1)
        ray.kill(ray.made[1])
        return [one.token_ids for one in await asyncio.gather(*asked)], len(ray.made)

    assert faults(work, make_config, monkeypatch, hangs) == ([(0,), (0,)], 2)


def test_those_that_do_not_serve_leave_first(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an index that is free is taken again."""
    monkeypatch.setattr(replicas, "LEAVING_S", 0.01)
    monkeypatch.setattr(replicas, "RETRY_AFTER_S", 0.01)
    away, hang = True, asyncio.Event()

    async def place(actor: Actor) -> tuple[str, str, int]:
        if actor.replica == 0 and len(actor.ray.made) > 2 and away:
            await hang.wait()  # its host is gone
        return f"node {actor.replica}", "host", 1

    monkeypatch.setattr(Actor, "do_place", place)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        nonlocal away
        replica = pool.replicas.all[0]
        pool.replicas.lost(replica, replica.generation, EngineDead("its host is gone"))
        pool.replicas.resize(1)
        left = [one.index for one in pool.replicas.all]
        served = (await pool.generate(request("a"))).token_ids
        away = False
        pool.replicas.resize(2)
        while len(pool.replicas.ready) < 2:
            await asyncio.sleep(0.01)
        return left, served, sorted(one.index for one in pool.replicas.all)

    assert faults(work, make_config, monkeypatch) == ([1], (1,), [0, 1])


def test_one_that_leaves_while_all_sleep_never_starts(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LEAVING_S", 0.01)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        await pool.replicas.sleep()
        pool.replicas.resize(3)
        await asyncio.sleep(0.02)
        pool.replicas.resize(2)
        await asyncio.sleep(0.05)
        await pool.replicas.awake()
        await asyncio.sleep(0.05)
        return len(ray.made), [actor.killed.is_set() for actor in ray.made]

    assert faults(work, make_config, monkeypatch) == (2, [False, False])


def test_a_replica_that_leaves_while_it_starts_does_not_come(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LEAVING_S", 0.01)
    notes: list[str] = []
    started = asyncio.Event()

    async def place(actor: Actor) -> tuple[str, str, int]:
        if actor.replica == 2:
            started.set()
            await asyncio.Event().wait()
        return f"node {actor.replica}", "host", 1

    monkeypatch.setattr(Actor, "do_place", place)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        pool.replicas.resize(3)
        await started.wait()
        pool.replicas.resize(2)
        while "engine_left" not in notes:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        return len(ray.made), len(pool.replicas.ready)

    assert faults(work, make_config, monkeypatch, note=lambda kind, **_: notes.append(kind)) == (3, 2)
    assert "engine_not_up" not in notes


def test_deaths_count_for_an_hour(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(replicas, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def work(pool: EnginePool, ray: Ray) -> None:
        async def dies() -> None:
            replica = pool.replicas.all[0]
            pool.replicas.lost(replica, replica.generation, EngineDead("a spot node went"))
            while not replica.ready.is_set() and not pool.replicas.failure:
                await asyncio.sleep(0)

        for number in range(30):
            now[0] = number * 600.0
            await dies()
        assert pool.replicas.failure is None
        for _ in range(replicas.MOST_RESTARTS * 2):
            await dies()
        with pytest.raises(PoolFailed, match="pool test: engines died 11 times in an hour; last: a spot node went"):
            await pool.generate(request("a"))

    faults(work, make_config, monkeypatch)


def watched(pool: EnginePool) -> None:
    """The pool's own watcher in the place of the one that looks every 15 seconds."""
    for task in list(pool.replicas._tasks):
        task.cancel()
    pool.replicas.spawn(pool.replicas.watch(every_s=0.01, silence_s=0.02))


def test_an_engine_that_cannot_say_what_it_does_is_replaced(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise ValueError("no counters")

    async def work(pool: EnginePool, ray: Ray) -> Any:
        ray.made[0].steps = ray.made[1].steps = broken
        watched(pool)
        first = await pool.generate(request("a"))  # of an engine that never answers
        ray.made[2].steps = broken
        ray.made[0] = ray.made[2]  # it never answers either, and the watcher still looks
        return first, await pool.generate(request("b"))

    first, second = faults(work, make_config, monkeypatch, waits)
    assert (first.request_id, second.request_id) == ("a", "b")


def test_a_watcher_that_cannot_go_on_fails_the_pool(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in flight end with its reason too: nobody would notice that they hang."""

    def full(event: str, **_: Any) -> None:
        if event == "engine_lost":
            raise OSError(28, "No space left on device")

    async def work(pool: EnginePool, ray: Ray) -> None:
        watched(pool)
        for _ in range(2):
            with pytest.raises(PoolFailed, match=r"pool test: its engines cannot be watched .*No space left on device"):
                await pool.generate(request("a"))
        with pytest.raises(PoolFailed, match="cannot be watched"):
            await pool.publish(M1)

    faults(work, make_config, monkeypatch, waits, full)


# -- the same with Ray's own actors ------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sigkill_in_an_update_with_requests_in_flight(
    cluster: Any, run_async: Any, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote is kept in the run folder."""
    import slow_engine

    monkeypatch.setattr(replicas, "EngineActor", slow_engine.SlowEngine)
    lost: list[Any] = []
    logs: list[Any] = []

    def note(event: str, **fields: Any) -> None:
        if event == "engine_lost":
            lost.append(fields["replica"])
        if event == "engine_log":
            logs.append(fields)

    async def work() -> Any:
        pool = EnginePool(make_config(engine={"cpus": 0.1}), M0, "test", 2, note)
        await pool.start()
        try:
            pid = await pool.replicas.all[0].actor.pid.remote()
            asked = [asyncio.ensure_future(pool.generate(request(str(number)))) for number in range(4)]
            while not all(replica.outstanding for replica in pool.replicas.all):
                await asyncio.sleep(0.05)
            update = asyncio.ensure_future(pool.publish(M1))
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            await update
            answers = await asyncio.gather(*asked)
            while not all(replica.ready.is_set() for replica in pool.replicas.all) or not logs:
                await pool.generate(request("while it comes up"))  # raises where the pool has failed
            return len(answers), await pool.versions()
        finally:
            await pool.close()

    assert run_async(work()) == (4, ["M1", "M1"])
    assert lost == [0]
    [kept] = (tmp_path / "runs" / "test" / "logs").iterdir()
    assert kept.name.startswith("test-0-here-")
    assert "an engine's last words" in kept.read_text().splitlines()


# -- the in-process engine, without vLLM -------------------------------------------------------------------------------


class Core:
    """As much of vLLM's engine as InProcessEngine uses: finishes one request in each step, with `outputs[id]`."""

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.outputs: dict[str, dict[str, Any]] = {}

    def has_unfinished_requests(self) -> bool:
        return bool(self.queue)

    def add_request(self, name: str, *_: Any, **__: Any) -> None:
        self.queue.append(name)

    def step(self) -> list[Any]:
        name = self.queue.pop(0)
        answer = {"finish_reason": "stop", "token_ids": [5], "text": "a", "logprobs": None}
        answer["weight_versions"] = [SimpleNamespace(version="M0")]
        answer["stop_reason"] = None
        output = {"finished": True, "request_id": name, "prompt_logprobs": None}
        return [SimpleNamespace(outputs=[SimpleNamespace(**{**answer, **self.outputs.get(name, {})})], **output)]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    inputs = ModuleType("vllm.inputs")
    inputs.tokens_input = lambda ids: ids  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.setattr(inprocess_engine, "sampling_params", lambda request: None)
    found = Core()
    monkeypatch.setattr(InProcessEngine, "_make", lambda self, *_: setattr(self, "_engine", found))
    return found


async def ask(made: InProcessEngine, *requests: Request) -> Any:
    """What became of one request, or of each of several in one call."""
    outcomes = await made.generate(requests)
    return outcomes if len(requests) > 1 else outcomes[0]


def asking(work: Callable[[InProcessEngine], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        made = InProcessEngine(None, "", "M0", 0)  # type: ignore[arg-type]
        try:
            return await asyncio.wait_for(work(made), 10)
        finally:
            made.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("output", "asked", "message"),
    [
        ({"finish_reason": "error"}, {}, "request bad ended with finish reason 'error'"),
        ({"finish_reason": "abort"}, {}, "request bad ended with finish reason 'abort'"),
        ({"logprobs": None}, {"label_ids": (7,)}, "request bad came back without a log-probability"),
        ({"logprobs": [{}]}, {"label_ids": (7,)}, "request bad came back without a log-probability: KeyError"),
        ({}, {"score_from": 1}, "request bad came back without a log-probability"),
        ({"weight_versions": None}, {}, "request bad came back without the version of its weights"),
    ],
)
def test_an_answer_that_is_none_fails_its_request_alone(
    core: Core, output: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    core.outputs["bad"] = output

    async def work(made: InProcessEngine) -> Any:
        good, bad, late = await ask(made, request("good"), request("bad", **asked), request("late"))
        return good, bad, late, await ask(made, request("after"))

    good, bad, late, after = asking(work)
    assert isinstance(bad, RequestFailed)
    assert message in str(bad)
    assert [one.request_id for one in (good, late, after)] == ["good", "late", "after"]


def test_a_request_that_the_engine_refuses_fails_alone(core: Core) -> None:
    def add(name: str, *_: Any, **__: Any) -> None:
        if name == "long":
            raise ValueError("the prompt is longer than max_model_len")
        core.queue.append(name)

    core.add_request = add  # type: ignore[method-assign]

    async def work(made: InProcessEngine) -> Any:
        return await ask(made, request("a"), request("long"), request("b"))

    first, refused, second = asking(work)
    assert (first.request_id, second.request_id) == ("a", "b")
    assert isinstance(refused, RequestFailed)
    assert str(refused) == "request long was refused: ValueError('the prompt is longer than max_model_len')"


def test_nobody_waits_for_an_engine_that_died(core: Core) -> None:
    """Neither a request in flight, nor a call that comes in its last step, nor one that comes afterwards."""
    stepping, go_on = threading.Event(), threading.Event()

    def step() -> list[Any]:
        stepping.set()
        go_on.wait(10)
        raise RuntimeError("a broken step")

    core.step = step  # type: ignore[method-assign]

    async def work(made: InProcessEngine) -> Any:
        in_flight = asyncio.ensure_future(ask(made, request("a")))
        while not stepping.is_set():
            await asyncio.sleep(0.01)
        late = [asyncio.ensure_future(ask(made, request("b"))), asyncio.ensure_future(made._between_steps(dict))]
        await asyncio.sleep(0)  # both are in the engine's queue
        go_on.set()
        found = await asyncio.gather(in_flight, *late, return_exceptions=True)
        return found, await asyncio.gather(ask(made, request("c")), return_exceptions=True)

    errors = [error for found in asking(work) for error in found]
    assert [type(error) for error in errors] == [EngineDead] * 4
    assert {str(error) for error in errors} == {"replica 0: RuntimeError('a broken step')"}


def test_an_answer_that_nobody_waits_for_does_not_end_the_engine(core: Core) -> None:
    async def work(made: InProcessEngine) -> Completion:
        left = asyncio.ensure_future(ask(made, request("left"), request("left too")))
        await asyncio.sleep(0)
        left.cancel()
        return await ask(made, request("after"))

    assert asking(work).request_id == "after"


# -- what vLLM is given ------------------------------------------------------------------------------------------------


def test_arguments_of_an_engine_go_by_its_device(make_config: Any) -> None:
    def arguments(**engine: Any) -> dict[str, Any]:
        defaults = {"max_num_seqs": None, "kv_cache_gib": None}
        return engine_arguments(make_config(engine={**defaults, **engine}), "/model")

    cpu = arguments()
    assert (cpu["max_num_seqs"], cpu["enforce_eager"], cpu["kv_cache_memory_bytes"]) == (32, True, 2**30)
    assert cpu["enable_chunked_prefill"] is False  # a seeded prompt in two parts would end the engine
    assert not {"gpu_memory_utilization", "tensor_parallel_size", "distributed_executor_backend"} & cpu.keys()
    gpu = arguments(gpus=1, kind="async")
    assert (gpu["max_num_seqs"], gpu["enforce_eager"], gpu["gpu_memory_utilization"]) == (256, False, 0.92)
    assert gpu["distributed_executor_backend"] == "uni"
    assert not {"kv_cache_memory_bytes", "block_size", "enable_chunked_prefill"} & gpu.keys()
    own = arguments(gpus=2, kind="async", kv_cache_gib=20, max_num_seqs=7, enforce_eager=True, gpu_share=0.5)
    assert (own["max_num_seqs"], own["enforce_eager"], own["gpu_memory_utilization"]) == (7, True, 0.5)
    assert (own["kv_cache_memory_bytes"], own["tensor_parallel_size"]) == (20 * 2**30, 2)
    assert own["distributed_executor_backend"] == "mp"
