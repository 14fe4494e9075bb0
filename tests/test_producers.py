"""Producers beside the engines: what they make, and what is asked again when one of them dies. Without Ray."""

import asyncio
import json
import pickle
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from scripted import Characters, Pools, Screen, Seeded, groups_of, model, recipe_of

from rsrlm.engines import Answers, Model
from rsrlm.records import Completion, Group, Prompt, Request, Task
from rsrlm.run import Run
from rsrlm.runtime import producer, producers
from rsrlm.runtime.producer import Lent, Loan, Lost, Producer
from rsrlm.runtime.producers import Producers
from rsrlm.runtime.replicas import MOST_RESTARTS, PoolFailed, Replica
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder
from rsrlm.store.journal import CompletionLog, Journals

PROMPTS = [Prompt(id=f"p{number}", text=f"Say {number}.") for number in range(12)]
TASKS = [Task(iteration=0, prompt=prompt) for prompt in PROMPTS]


class Actor:
    """An actor in this event loop. A killed one fails all that it was asked and will be asked."""

    def __init__(self, make: Callable[[], Awaitable[Any]]) -> None:
        self.made = asyncio.ensure_future(make())
        self.death: Exception = RayActorError()
        self.killed = asyncio.Event()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(self._call(method, arguments)))

    async def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        async def done() -> Any:
            return await getattr(await self.made, method)(*arguments)

        work, dying = asyncio.ensure_future(done()), asyncio.ensure_future(self.killed.wait())
        await asyncio.wait({work, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if self.killed.is_set():
            work.cancel()
            raise self.death
        try:
            return work.result()
        except Exception as error:
            raise RayTaskError("make", "a stack trace", error) from None


class Engine:
    """A replica's engine; `gone` makes it fail as one whose process died."""

    def __init__(self, engine: Seeded) -> None:
        self.engine = engine
        self.gone = False

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if self.gone:
            raise RayActorError
        made = await self.engine.generate_all(requests)
        if self.gone:
            raise RayActorError
        return made


class World:
    """A run folder, engines that are lent, and producers that can be killed."""

    def __init__(self, config: Any, monkeypatch: pytest.MonkeyPatch, replicas: int = 3) -> None:
        self.config = config
        self.store = RunFolder.create(config)
        self.events: list[dict[str, Any]] = []
        self.held, self.holds = model("M0"), list[str]()
        self.engines: list[Engine] = []  # those that were replaced as well
        self.actors: list[Actor] = []
        self.pause: Callable[[Request], Awaitable[None]] | None = None
        self.replicas = [Replica(index) for index in range(replicas)]
        self.lost_ones: list[Lost] = []
        monkeypatch.setattr(producer, "recipes_of", lambda *_: [recipe_of(config, Characters())])
        monkeypatch.setattr(producers, "ray", SimpleNamespace(remote=self._remote, kill=lambda one: one.killed.set()))

    def _remote(self, actor_class: type) -> Any:
        async def made(*arguments: Any) -> Any:
            one = actor_class.__new__(actor_class)
            await actor_class.__init__(one, *arguments)
            return one

        def make(*arguments: Any) -> Actor:
            self.actors.append(Actor(lambda: made(*arguments)))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def up(self, replica: Replica) -> None:
        engine = Engine(Seeded(self._paused, held=self.held.name))
        self.engines.append(engine)
        replica.actor = SimpleNamespace(
            generate=SimpleNamespace(remote=lambda requests: asyncio.ensure_future(engine.generate(requests)))
        )
        replica.ready.set()

    async def _paused(self, request: Request) -> None:
        await asyncio.sleep(0)
        if self.pause:
            await self.pause(request)

    # what the pools of a run do for producers

    async def loan(self, number: int, of: int) -> tuple[Loan, list[Replica]]:
        while not (ready := [one for one in self.replicas if one.ready.is_set()]):
            await asyncio.sleep(0.01)
        share = ready[number::of] or ready
        lent = [Lent(index=one.index, generation=one.generation, actor=one.actor) for one in share]
        return Loan(model=self.held, replicas={"engines": lent}, judge_model=None), share

    def lost(self, lost: Lost) -> None:
        self.lost_ones.append(lost)
        replica = self.replicas[lost.index]
        if replica.generation == lost.generation:
            replica.generation += 1
            replica.outstanding = 0
            self.up(replica)

    async def hold(self, wanted: Model) -> None:
        self.held = wanted
        self.holds.append(wanted.name)
        for engine in self.engines:
            engine.engine.held = wanted.name

    def work(
        self, number: int = 2, meant: str | Model = "M0", during: Callable[[], Awaitable[None]] | None = None
    ) -> Any:
        """The groups of all tasks, with so many producers; and what was counted. `during` goes on beside them."""
        counted: Counter[tuple[str, int]] = Counter()

        def count(role: str, requests: int, tokens: int) -> None:
            counted[role, 0] += requests
            counted[role, 1] += tokens

        async def main() -> list[Any]:
            for replica in self.replicas:
                self.up(replica)
            made = Producers(
                self.config, {}, self, lambda kind, **fields: self.events.append({"event": kind, **fields}), number
            )
            beside = asyncio.ensure_future(during()) if during else None
            wanted = meant if isinstance(meant, Model) else model(meant)
            try:
                return await asyncio.gather(*(made.make(wanted, task, self.hold, count) for task in TASKS))
            finally:
                made.close()
                if beside:
                    beside.cancel()

        receipts = asyncio.run(asyncio.wait_for(main(), 30))
        return [read(receipt) for receipt in receipts], counted

    def asked(self) -> list[Request]:
        return [request for engine in self.engines for request in engine.engine.requests]


def read(receipt: Any) -> Group:
    with Path(receipt.segment).open("rb") as file:
        file.seek(receipt.offset)
        group: Group = pickle.loads(file.read(receipt.length))
    return group


@pytest.fixture
def world(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(make_config(sample={"responses": 3, "max_tokens": 24}, engine={"replicas": 3}), monkeypatch)


def expected(world: World) -> list[Group]:
    return groups_of(recipe_of(world.config, Characters()), Seeded(), PROMPTS)


def logged(world: World) -> list[str]:
    """The keys of all journals, one after the other."""
    paths = world.store.folder.glob("journal*.jsonl")
    return [json.loads(line)["k"] for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_producers_make_the_groups_that_the_driver_would(world: World, number: int) -> None:
    """Five of them with three replicas: some share one."""
    found, counted = world.work(number)
    assert found == expected(world)
    # 12 prompts of 3 responses, each judged once; a scripted answer has two tokens
    assert counted == {("actor", 0): 36, ("actor", 1): 72, ("judge", 0): 36, ("judge", 1): 72}
    assert len(world.asked()) == 72
    assert sorted(path.name for path in world.store.folder.glob("journal*")) == [
        f"journal-{one}.jsonl" for one in range(number)
    ]
    assert len(logged(world)) == len(set(logged(world))) == 72
    assert all(replica.outstanding == 0 for replica in world.replicas)


def test_each_asks_its_own_replicas(world: World) -> None:
    world.work(3)
    # Who answered a prompt's responses judges them as well: the prompt's tokens are in that engine's prefix cache.
    asked = [{request.id.split("/")[1] for request in one.engine.requests} for one in world.engines]
    assert set.union(*asked) == {prompt.id for prompt in PROMPTS}
    assert sum(map(len, asked)) == len(PROMPTS)


def test_what_was_answered_is_not_asked_again_by_another_number_of_producers(world: World) -> None:
    first, _ = world.work(3)
    world.engines.clear()
    again, counted = world.work(2)
    assert again == first
    assert world.asked() == []
    assert counted == {("actor", 0): 36, ("actor", 1): 0, ("judge", 0): 36, ("judge", 1): 0}
    # Nor by the driver itself.
    engine, log = Seeded(), Journals(world.store.folder)
    assert groups_of(recipe_of(world.config, Characters()), engine, PROMPTS, log=log) == first
    assert engine.requests == []


@pytest.mark.parametrize(
    "death", [RayActorError(), OutOfMemoryError("too much"), NodeDiedError("gone")], ids=lambda one: type(one).__name__
)
def test_a_producer_that_dies_is_replaced_and_loses_no_answer(world: World, death: Exception) -> None:
    """It is killed in the judging of its third prompt, with everything else in flight."""
    judged: Counter[str] = Counter()

    async def pause(request: Request) -> None:
        if request.role == "judge":
            judged[request.id] += 1
            if len(judged) == 3 and not world.actors[0].killed.is_set():
                world.actors[0].death = death
                world.actors[0].killed.set()
                await asyncio.sleep(0.05)

    world.pause = pause
    found, _ = world.work(2)
    assert found == expected(world)
    assert [(event["event"], event["producer"]) for event in world.events] == [("producer_lost", 0)]
    assert len(world.actors) == 3
    asked = Counter(request.id for request in world.asked())
    twice = {name for name, times in asked.items() if times > 1}
    answered_before = 72 - len(twice)
    assert answered_before >= 36  # the responses of all prompts were known before
    assert len(set(logged(world))) == 72


def test_a_producer_that_hangs_is_replaced_and_loses_no_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the judging of its third prompt, for good."""
    monkeypatch.setattr(producers, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(producers, "SILENCE_S", 0.1)
    stopped = asyncio.Event()
    answers = Producer.alive

    async def alive(self: Producer) -> None:
        if stopped.is_set() and self is world.actors[0].made.result():
            await asyncio.Event().wait()
        await answers(self)

    monkeypatch.setattr(Producer, "alive", alive)

    async def pause(request: Request) -> None:
        if request.role == "judge" and not world.actors[0].killed.is_set():
            stopped.set()
            await asyncio.sleep(0.5)

    world.pause = pause
    found, _ = world.work(1)
    assert found == expected(world)
    said = [(event["event"], event["producer"]) for event in world.events]
    assert said == [("producer_silent", 0), ("producer_lost", 0)]
    assert len(world.actors) == 2
    assert len(set(logged(world))) == 72


def test_a_producer_that_dies_again_and_again_ends_the_run(world: World) -> None:
    async def kill() -> None:
        while True:
            world.actors[-1].killed.set()
            await asyncio.sleep(0)

    with pytest.raises(PoolFailed, match=f"producer 0 died {MOST_RESTARTS + 1} times"):
        world.work(1, during=kill)
    assert len(world.actors) == MOST_RESTARTS + 1


def test_a_replica_that_a_producer_finds_gone_is_replaced(world: World) -> None:
    async def kill() -> None:
        while not world.asked():
            await asyncio.sleep(0)
        world.engines[1].gone = True

    found, _ = world.work(2, during=kill)
    assert found == expected(world)
    assert [(one.pool, one.index, one.generation) for one in world.lost_ones] == [("engines", 1, 0)]
    assert world.replicas[1].generation == 1
    assert len(world.engines) == 4


def test_all_replicas_gone_at_once(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(make_config(sample={"responses": 3, "max_tokens": 24}), monkeypatch, replicas=1)

    async def kill() -> None:
        for number in range(3):
            while len(world.engines) == number or not world.engines[number].engine.requests:
                await asyncio.sleep(0)
            world.engines[number].gone = True

    found, _ = world.work(1, during=kill)
    assert found == expected(world)
    assert len(world.engines) == 4


def test_the_model_that_is_meant_is_loaded_first(world: World) -> None:
    found, _ = world.work(2, meant="M1")
    assert world.held.name == "M1"
    assert {response.weight_version for group in found for response in group.responses} == {"M1"}


def test_the_same_weights_under_another_name_are_loaded_too(world: World) -> None:
    """Such as those of M0 that were chosen as M1."""
    same = Model(name="M1", digest=model("M0").digest, folder=Path("M1"))
    found, _ = world.work(2, meant=same)
    assert {response.weight_version for group in found for response in group.responses} == {"M1"}
    assert set(world.holds) == {"M1"}


def test_a_mistake_in_a_recipe_reaches_the_caller(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        async def group(self, engines: Any, task: Task) -> Group:
            raise ValueError("no such thing")

    monkeypatch.setattr(producer, "recipes_of", lambda *_: [Broken()])
    with pytest.raises(ValueError, match="no such thing"):
        world.work(1)


def test_what_a_producer_cannot_find_on_its_host_is_the_users_to_mend(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise ConfigError("judge.template=mine.j2: no such file")

    monkeypatch.setattr(producer, "recipes_of", missing)
    with pytest.raises(ConfigError, match=r"judge\.template=mine\.j2: no such file"):
        world.work(2)
    assert len(world.actors) == 2


def test_a_run_with_producers_has_the_groups_and_events_of_one_without(world: World) -> None:
    """`Run.groups`, the verb."""
    pools, screen = Pools(Seeded()), Screen()
    events: list[dict[str, Any]] = []
    log = CompletionLog(world.store.folder / "journal.jsonl")
    recipe = recipe_of(world.config, Characters())

    async def main() -> list[Group]:
        for replica in world.replicas:
            world.up(replica)
        pools.producers = Producers(world.config, {}, world, lambda *_, **__: None, 2)
        run = Run(
            pools, Answers(log), screen, lambda kind, **fields: events.append({"event": kind, **fields}), model("M0"),
            world.store.segments,
        )  # fmt: skip
        run.begin(recipe, lambda iteration: (), nobody_trains)
        made = await run.groups(await run.load(model("M0")), recipe, TASKS)
        # Once more in this iteration, and by a recipe that the producers do not know: by the driver.
        again = await run.groups(await run.load(model("M0")), recipe, TASKS)
        other = recipe_of(world.config, Characters())
        by_driver = await run.groups(await run.load(model("M0")), other, TASKS[:2])
        found = list(made)
        assert list(again) == found
        assert list(by_driver) == found[:2]
        run.finished(0)
        return found

    found = asyncio.run(asyncio.wait_for(main(), 30))
    assert found == expected(world)
    assert {event["g"]: event["pairs"] for event in events} == {
        group.id: [pair.id for pair in group.pairs] for group in found
    }
    assert len(log) == 2 * 6  # what the driver asked for itself
    ticks: Counter[str] = Counter()
    for label, items, _ in screen.ticks:
        ticks[label] += items
    assert ticks == {"respond": 36 + 36 + 6, "judge": 36 + 36 + 6}
    assert not (world.store.segments / "00").exists()


async def nobody_trains(*_: Any) -> Model:
    raise AssertionError


def test_a_producer_reads_what_was_answered_when_it_started(world: World) -> None:
    """Answers of another's journal, and of the driver's own."""
    log = CompletionLog(world.store.folder / "journal.jsonl")
    groups_of(recipe_of(world.config, Characters()), Seeded(), PROMPTS[1:2], log=log)
    asyncio.run(_two_producers(world))


async def _two_producers(world: World) -> None:
    for replica in world.replicas:
        world.up(replica)
    loan, _ = await world.loan(0, 1)
    first = Producer.__new__(Producer)
    await first.__init__(world.config, {})  # type: ignore[misc]
    await first.lend(loan)
    made = await first.make(model("M0"), TASKS[0])
    asked = len(world.asked())
    second = Producer.__new__(Producer)
    await second.__init__(world.config, {})  # type: ignore[misc]
    await second.lend(loan)
    again = await second.make(model("M0"), TASKS[0])
    assert made.receipt
    assert again.receipt
    assert read(made.receipt) == read(again.receipt)
    assert len(world.asked()) == asked
    assert made.receipt.segment != again.receipt.segment
    await second.make(model("M0"), TASKS[1])
    assert len(world.asked()) == asked  # the driver's
