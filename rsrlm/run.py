"""The verbs of one run, which recipes and evaluations are written with: `load`, `groups`, `publish`, `validator`.

A recipe is run again from its top after a kill; what lies under the verbs lets it pass what is done.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rsrlm.engines import Answers, Engines, Model, NotHeld
from rsrlm.records import Group, PreferencePair, Role, Task
from rsrlm.store.buffer import Buffer, Receipt, receipt_of
from rsrlm.store.items import Segment

Result = TypeVar("Result")
Trainer = Callable[[Model, Sequence[Any], Any, str], Awaitable[Model]]
Earlier = Callable[[int], Iterable[PreferencePair]]


class Makers(Protocol):
    """Processes beside the engines that make groups by themselves."""

    async def make(
        self,
        model: Model,
        task: Task,
        hold: Callable[[Model], Awaitable[None]],
        count: Callable[[str, int, int], None],
    ) -> Receipt:
        """Make the group of a task. `hold` loads the model on the engines; `count` is told of answered requests."""
        ...


class Pools(Protocol):
    """The engines of a run and the weights that they hold."""

    @property
    def producers(self) -> Makers | None:
        """Who makes groups; None: the run itself."""
        ...

    async def model(self, name: str, files: Any = None) -> Model:
        """A model of the run by its name; `files` are the learner's transfer files of the same weights."""
        ...

    async def hold(self, model: Model) -> dict[str, Any]:
        """Load the model on every engine that follows the training, unless they hold it. Returns the seconds of each
        replica."""
        ...

    async def rest(self) -> None:
        """The learner is about to train: where it shares GPUs with the engines, they give them up until they are
        asked again."""
        ...

    def discard(self, files: Any) -> None:
        """Remove transfer files of weights that nobody wants."""
        ...

    def engines(self, model: Model, answers: Answers, hold: Callable[[Model], Awaitable[None]]) -> Engines: ...
    def validators(self, answers: Answers) -> Engines | None:
        """Who validates in the place of the models of the run: None where nobody does."""
        ...

    async def stats(self) -> dict[str, float]: ...


class Screen(Protocol):
    def line(self, text: str) -> None: ...
    def stage(self, title: str, totals: dict[str, int]) -> Any: ...


class MakesGroups(Protocol):
    """What `Run.groups` asks of a recipe."""

    @property
    def width(self) -> int:
        """Requests that one group makes at once."""
        ...

    async def group(self, engines: Engines, task: Task) -> Group: ...
    def requests(self, prompts: int) -> dict[Role, int]: ...


LABELS: dict[Role, str] = {
    "actor": "respond",
    "prompter": "write",
    "judge": "judge",
    "meta": "compare",
    "duel": "compare",
}
CACHE_COUNTERS = ("prefix_cache_queries", "prefix_cache_hits")


class Run:
    """The verbs of one run."""

    def __init__(
        self, pools: Pools, answers: Answers, screen: Screen, event: Callable[..., None], first: Model, segments: Path
    ) -> None:
        """`segments` is a folder for what is made, until its iteration is finished."""
        self.pools, self.answers, self.screen, self.event, self.first = pools, answers, screen, event, first
        self._segments = segments
        self.names = [first.name]  # of the models that the iterations start from, in order
        self.buffers: dict[int, tuple[str, Buffer]] = {}  # of iterations that are not finished, and whose answers
        self._wanted = first
        self._holding = asyncio.Lock()
        self._recipe: MakesGroups | None = None
        self._trainer: Trainer | None = None
        self._earlier: Earlier | None = None
        self.prefix_cache_hit_share: float | None = None  # of the last groups

    def say(self, text: str) -> None:
        self.screen.line(text)

    async def model_at(self, iteration: int) -> Model:
        """The model that an iteration starts from."""
        return await self.pools.model(self.names[iteration])

    async def load(self, model: Model) -> Engines:
        """Engines of that model; those of another are stale from now on. The weights move with the first request whose
        answer is not known yet."""
        self._wanted = model
        return self.pools.engines(model, self.answers, self._hold)

    async def _hold(self, model: Model) -> None:
        if model.digest != self._wanted.digest:
            raise NotHeld(f"these engines are for {model.name}, but {self._wanted.name} was loaded after it")
        async with self._holding:
            await self.pools.hold(model)

    async def publish(self, model: Model) -> dict[str, Any]:
        """Load a model at once; returns the seconds of each replica."""
        await self.load(model)
        async with self._holding:
            return await self.pools.hold(model)

    async def validator(self, model: Model) -> Engines:
        """Engines that judge held-out answers: those of the validator if there is one, else of `model`'s judges."""
        external = self.pools.validators(self.answers)
        return external or (await self.load(model)).judges

    @contextmanager
    def stage(self, title: str, totals: Mapping[Role, int]) -> Iterator[None]:
        """Show how many requests of each role are answered meanwhile."""
        shown: dict[str, int] = {}
        for role, total in totals.items():
            shown[LABELS[role]] = shown.get(LABELS[role], 0) + total
        with self.screen.stage(title, {label: total for label, total in shown.items() if total}) as tick:

            def count(role: str, items: int, tokens: int) -> None:
                if shown.get(label := LABELS.get(role, "")):  # type: ignore[call-overload]
                    tick(label, items, tokens)

            with self.answers.counted(count):
                yield

    async def groups(self, engines: Engines, recipe: MakesGroups, tasks: Sequence[Task]) -> Buffer:
        """The group of each task, in order."""
        before = await self.pools.stats()
        folder = self._segments / f"{tasks[0].iteration:02d}"
        buffer, segment = Buffer([task.id for task in tasks], folder), Segment.another(folder, "groups")
        self.buffers[tasks[0].iteration] = engines.model.name, buffer

        async def made(task: Task) -> Receipt:
            if self.pools.producers and recipe is self._recipe:  # they know no other
                return await self.pools.producers.make(engines.model, task, self._hold, self.answers.count)
            return receipt_of(await recipe.group(engines, task), segment)

        async def one(index: int) -> None:
            task = tasks[index]
            receipt = await made(task)
            self.event("group", g=task.id, pairs=[pair.id for pair in receipt.pairs], reason=receipt.reason or None)
            buffer.put(index, receipt)

        with self.stage(f"iteration {tasks[0].iteration}", recipe.requests(len(tasks))):
            await engines.each(one, range(len(tasks)), recipe.width)
        segment.close()
        after = await self.pools.stats()
        queries, hits = (after.get(name, 0.0) - before.get(name, 0.0) for name in CACHE_COUNTERS)
        # A replaced engine counts from 0 again: then the share is not known.
        self.prefix_cache_hit_share = round(hits / queries, 4) if queries > 0 and 0 <= hits <= queries else None
        return buffer

    def finished(self, iteration: int) -> None:
        """What was made in the iteration is in its tables and trained on."""
        self.buffers.pop(iteration, None)
        shutil.rmtree(self._segments / f"{iteration:02d}", ignore_errors=True)

    def begin(self, recipe: MakesGroups, earlier: Earlier, trainer: Trainer | None = None) -> None:
        """The recipe of the iteration that follows, where the pairs of those before it are, and what `train` does in
        it, if anything."""
        self._recipe, self._earlier, self._trainer = recipe, earlier, trainer

    def pairs(self, iteration: int) -> Iterable[PreferencePair]:
        """The pairs that an earlier iteration trained on, in its order of training."""
        assert self._earlier, "`begin` comes before an iteration"
        return self._earlier(iteration)

    async def train(self, start: Model, items: Sequence[Any], rule: Any, name: str) -> Model:
        """The model `name`, trained from `start` on items within an iteration; `rule` is a TrainRule."""
        assert self._trainer, "`begin` comes before an iteration"
        return await self._trainer(start, items, rule, name)

    async def aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Long work in a thread, so that an interruption is heard meanwhile."""
        return await asyncio.to_thread(work, *arguments)
