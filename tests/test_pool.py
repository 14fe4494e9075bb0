"""What the pool and the in-process engine do about faults: with engines that fail on command, and no model."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rsrlm.records import Completion, Request, Sampling
from rsrlm.runtime import actors, engine
from rsrlm.runtime.actors import MAX_ATTEMPTS, EnginePool, PoolFailed
from rsrlm.runtime.engine import EngineDead, InProcessEngine, RequestFailed
from rsrlm.runtime.weights import WeightSet

M0, M1 = (WeightSet(version=name, folder=f"/{name}", files=()) for name in ("M0", "M1"))


def request(name: str, **more: Any) -> Request:
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=4, seed=0)
    return Request(id=name, prompt_token_ids=(1, 2), sampling=sampling, priority=0, **more)


def completion(request: Request, version: str, replica: int) -> Completion:
    return Completion(
        request_id=request.id,
        token_ids=(1,),
        text="a",
        finish_reason="stop",
        weight_version=version,
        prompt_tokens=2,
        cached_tokens=0,
        replica=replica,
    )


# -- the pool, without Ray ---------------------------------------------------------------------------------------------

Answer = Callable[["Actor", Request], Awaitable[Completion]]


class Actor:
    """An engine actor in this event loop. A killed one fails all that it was asked and will be asked."""

    def __init__(self, ray: "Ray", version: str, replica: int) -> None:
        self.ray = ray
        self.held = version
        self.replica = replica
        self.killed = asyncio.Event()
        self.steps: Callable[[], int] = lambda: 0

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(self._call(method, *arguments)))

    async def _call(self, method: str, *arguments: Any) -> Any:
        work = asyncio.ensure_future(getattr(self, f"do_{method}")(*arguments))
        dying = asyncio.ensure_future(self.killed.wait())
        done, _ = await asyncio.wait({work, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if work not in done:
            work.cancel()
            raise RayActorError
        return work.result()

    async def do_generate(self, request: Request) -> Completion:
        if request.id.startswith("health"):
            return completion(request, self.held, self.replica)
        return await self.ray.answer(self, request)

    async def do_generate_all(self, requests: list[Request]) -> list[Any]:
        self.ray.calls.append([one.id for one in requests])
        return list(await asyncio.gather(*map(self.do_generate, requests), return_exceptions=True))

    async def do_update(self, info: dict[str, Any], version: str) -> dict[str, float]:
        await self.ray.updating.wait()
        self.held = version
        return {"total": 0.0}

    async def do_version(self) -> str:
        return self.held

    async def do_progress(self) -> int:
        return self.steps()

    async def do_close(self) -> None:
        pass


class Ray:
    """As much of Ray as the pool uses. `answer` is what engines do; updates wait until `updating` is set."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer or self._at_once
        self.updating = asyncio.Event()
        self.updating.set()
        self.made: list[Actor] = []
        self.calls: list[list[str]] = []
        self.util = SimpleNamespace()

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
    replicas: int = 2,
) -> Any:
    async def main() -> Any:
        ray = Ray(answer)
        monkeypatch.setattr(actors, "ray", ray)
        pool = EnginePool(make_config(), M0, "test", replicas, note)
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
        while not all(replica.outstanding for replica in pool._replicas):
            await asyncio.sleep(0)
        update = asyncio.ensure_future(pool.publish(M1, None))  # type: ignore[arg-type]
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


def test_requests_that_come_together_go_to_one_engine_in_one_call(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(pool: EnginePool, ray: Ray) -> Any:
        requests = [request(str(number)) for number in range(5)]
        found = await pool.generate_all(requests)
        assert [one.request_id for one in found] == [one.id for one in requests]
        assert len({one.replica for one in found}) == 1
        assert [len(call) for call in ray.calls] == [5]
        assert [replica.outstanding for replica in pool._replicas] == [0, 0]

    faults(work, make_config, monkeypatch)


def test_a_request_that_fails_among_others_is_asked_again_alone(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def answer(actor: Actor, request: Request) -> Completion:
        asked.append(request.id.partition("~")[0])
        if asked.count("1") == 1 and asked[-1] == "1":
            raise RequestFailed("no usable answer")
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        found = await pool.generate_all([request(str(number)) for number in range(3)])
        assert [one.request_id for one in found] == ["0", "1", "2"]
        assert len(ray.made) == 2  # the engine is kept

    faults(work, make_config, monkeypatch, answer)
    assert sorted(asked) == ["0", "1", "1", "2"]


@pytest.mark.parametrize("dies", ["actor", "engine"])
def test_an_engine_that_dies_under_many_requests_is_replaced_once(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    lost: list[str] = []

    async def answer(actor: Actor, request: Request) -> Completion:
        if actor is actor.ray.made[0]:
            if dies == "engine":
                raise EngineDead("out of memory")
            actor.killed.set()
            await asyncio.Event().wait()
        return completion(request, actor.held, actor.replica)

    async def work(pool: EnginePool, ray: Ray) -> Any:
        found = await pool.generate_all([request(str(number)) for number in range(4)])
        assert [one.request_id for one in found] == ["0", "1", "2", "3"]

    faults(work, make_config, monkeypatch, answer, lambda kind, **_: lost.append(kind))
    assert lost.count("engine_lost") == 1


def watched(pool: EnginePool) -> None:
    """The pool's own watcher in the place of the one that looks every 15 seconds."""
    for task in list(pool._tasks):
        task.cancel()
    pool._spawn(pool._watch(every_s=0.01, silence_s=0.02))


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

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    async def work(pool: EnginePool, ray: Ray) -> None:
        watched(pool)
        for _ in range(2):
            with pytest.raises(PoolFailed, match=r"pool test: its engines cannot be watched .*No space left on device"):
                await pool.generate(request("a"))
        with pytest.raises(PoolFailed, match="cannot be watched"):
            await pool.publish(M1, None)  # type: ignore[arg-type]

    faults(work, make_config, monkeypatch, waits, full)


# -- the same with Ray's own actors ------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sigkill_in_an_update_with_requests_in_flight(
    cluster: Any, run_async: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slow_engine

    monkeypatch.setattr(actors, "EngineActor", slow_engine.SlowEngine)
    lost: list[Any] = []

    def note(event: str, **fields: Any) -> None:
        if event == "engine_lost":
            lost.append(fields["replica"])

    async def work() -> Any:
        pool = EnginePool(make_config(engine={"cpus": 0.1}), M0, "test", 2, note)
        await pool.start()
        try:
            pid = await pool._replicas[0].actor.pid.remote()
            asked = [asyncio.ensure_future(pool.generate(request(str(number)))) for number in range(4)]
            while not all(replica.outstanding for replica in pool._replicas):
                await asyncio.sleep(0.05)
            update = asyncio.ensure_future(pool.publish(M1, None))  # type: ignore[arg-type]
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            await update
            answers = await asyncio.gather(*asked)
            while not all(replica.ready.is_set() for replica in pool._replicas):
                await pool.generate(request("while it comes up"))  # raises where the pool has failed
            return len(answers), await pool.versions()
        finally:
            await pool.close()

    assert run_async(work()) == (4, ["M1", "M1"])
    assert lost == [0]


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
        answer = {"finish_reason": "stop", "token_ids": [5], "text": "a", "logprobs": None, "weight_versions": []}
        output = {"finished": True, "request_id": name, "prompt_token_ids": [1], "num_cached_tokens": 0}
        output["prompt_logprobs"] = None
        return [SimpleNamespace(outputs=[SimpleNamespace(**{**answer, **self.outputs.get(name, {})})], **output)]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    inputs = ModuleType("vllm.inputs")
    inputs.tokens_input = lambda ids: ids  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.setattr(engine, "sampling_params", lambda request: None)
    found = Core()
    monkeypatch.setattr(InProcessEngine, "_make", lambda self, *_: setattr(self, "_engine", found))
    return found


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
    ],
)
def test_an_answer_that_is_none_fails_its_request_alone(
    core: Core, output: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    core.outputs["bad"] = output

    async def work(made: InProcessEngine) -> Any:
        good, bad = await asyncio.gather(
            made.generate(request("good")), made.generate(request("bad", **asked)), return_exceptions=True
        )
        return good, bad, await made.generate(request("after"))

    good, bad, after = asking(work)
    assert isinstance(bad, RequestFailed)
    assert message in str(bad)
    assert (good.request_id, after.request_id) == ("good", "after")


def test_nobody_waits_for_an_engine_that_died(core: Core) -> None:
    """Neither a request in flight, nor a call that comes in its last step, nor one that comes afterwards."""
    stepping, go_on = threading.Event(), threading.Event()

    def step() -> list[Any]:
        stepping.set()
        go_on.wait(10)
        raise RuntimeError("a broken step")

    core.step = step  # type: ignore[method-assign]

    async def work(made: InProcessEngine) -> Any:
        in_flight = asyncio.ensure_future(made.generate(request("a")))
        while not stepping.is_set():
            await asyncio.sleep(0.01)
        late = [asyncio.ensure_future(made.generate(request("b"))), asyncio.ensure_future(made._between_steps(dict))]
        await asyncio.sleep(0)  # both are in the engine's queue
        go_on.set()
        found = await asyncio.gather(in_flight, *late, return_exceptions=True)
        return found, await asyncio.gather(made.generate(request("c")), return_exceptions=True)

    errors = [error for found in asking(work) for error in found]
    assert [type(error) for error in errors] == [EngineDead] * 4
    assert {str(error) for error in errors} == {"replica 0: RuntimeError('a broken step')"}


def test_an_answer_that_nobody_waits_for_does_not_end_the_engine(core: Core) -> None:
    async def work(made: InProcessEngine) -> Completion:
        left = asyncio.ensure_future(made.generate(request("left")))
        await asyncio.sleep(0)
        left.cancel()
        return await made.generate(request("after"))

    assert asking(work).request_id == "after"
