"""An actor that makes groups beside the engines: the driver sends it tasks, and gets receipts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsrlm.config import Config
from rsrlm.engines import Answers, Engines, Model, NotHeld
from rsrlm.recipes.base import Recipe
from rsrlm.records import Task
from rsrlm.runtime.pool import Asking
from rsrlm.runtime.replicas import Replica
from rsrlm.runtime.routing import least_busy
from rsrlm.runtime.setup import recipes_of
from rsrlm.store.buffer import Receipt, receipt_of
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import Segment
from rsrlm.store.journal import Journals


class NoReplica(RuntimeError):
    """All replicas that were lent are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """A replica that a producer may ask: the actor of this generation."""

    index: int
    generation: int
    actor: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """The replicas of each pool ("engines", "judges"), and what they hold. `judge_model` is None where the judges hold
    what the engines do."""

    model: Model
    replicas: Mapping[str, Sequence[Lent]]
    judge_model: Model | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """An actor of a replica that does not answer any more."""

    pool: str
    index: int
    generation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What became of a task. Without a receipt it is to be sent again: once the model is loaded where `not_held`, or
    with other replicas.

    `counts` are requests that were answered since the last such message, as (role, requests, new tokens); `losses` are
    replicas that were found gone.
    """

    receipt: Receipt | None
    not_held: bool
    counts: Sequence[tuple[str, int, int]]
    losses: Sequence[Lost]


class Share:
    """The replicas of one pool that were lent. Whoever lent them keeps them alive and loads their weights."""

    def __init__(self, config: Config, pool: str, losses: list[Lost]) -> None:
        self.config = config
        self.all: list[Replica] = []
        self._pool, self._losses = pool, losses

    def lend(self, lent: Sequence[Lent]) -> None:
        known = {(one.index, one.generation): one for one in self.all}
        self.all = [known.get((one.index, one.generation)) or _replica(one) for one in lent]

    async def least_busy(self) -> Replica:
        if found := least_busy(self.all):
            return found
        raise NoReplica(f"no replica of pool {self._pool} is left")

    def lost(self, replica: Replica, generation: int, error: Exception) -> None:
        if replica.ready.is_set():
            replica.ready.clear()
            lost = Lost(pool=self._pool, index=replica.index, generation=generation, reason=str(error) or repr(error))
            self._losses.append(lost)


def _replica(lent: Lent) -> Replica:
    made = Replica(lent.index)
    made.actor, made.generation = lent.actor, lent.generation
    made.ready.set()
    return made


class Producer:
    """Runs `recipe.group` with a journal and a segment of its own.

    What others had answered when it started is known to it as well. So one that is started in the place of a dead one
    asks for nothing again that was answered before.
    """

    async def __init__(self, config: Config, drawn: Mapping[str, str]) -> None:  # type: ignore[misc]
        """`drawn` is in `rsrlm.runtime.setup.started`."""
        self._config, self._drawn = config, drawn
        self._recipes: Sequence[Recipe] = ()
        self._store = RunFolder(config.folder)
        self._answers = Answers(Journals.another(config.folder))
        self._counts: Counter[tuple[str, int]] = Counter()  # requests by role, and (1) their tokens
        self._counting = self._answers.counted(self._count)
        self._counting.__enter__()  # for good
        self._losses: list[Lost] = []
        self._shares = {name: Share(config, name, self._losses) for name in ("engines", "judges")}
        self._pools = {name: Asking(share) for name, share in self._shares.items()}
        self._segments: dict[int, Segment] = {}
        self._loan: Loan

    def _count(self, role: str, requests: int, tokens: int) -> None:
        self._counts[role, 0] += requests
        self._counts[role, 1] += tokens

    async def lend(self, loan: Loan) -> None:
        """To be called before `make`. Raises ConfigError for what is not to be found on this host."""
        if not self._recipes:
            self._recipes = recipes_of(self._config, self._drawn)
        self._loan = loan
        for name, share in self._shares.items():
            share.lend(loan.replicas.get(name, ()))

    async def alive(self) -> None:
        """Answers at once."""

    async def make(self, model: Model, task: Task) -> Made:
        """Make the group of a task with this model."""
        receipt, not_held = None, False
        try:
            group = await self._recipes[task.iteration].group(self._engines(model), task)
            await self._answers.sync()
            receipt = receipt_of(group, self._segment(task.iteration))
        except Exception as error:
            reasons = list(leaves(error))
            if others := [one for one in reasons if not isinstance(one, NotHeld | NoReplica)]:
                raise others[0] from None
            not_held = any(isinstance(one, NotHeld) for one in reasons)
        counts = [(role, self._counts[role, 0], self._counts[role, 1]) for role in {role for role, _ in self._counts}]
        losses = list(self._losses)
        self._counts.clear()
        self._losses.clear()
        return Made(receipt=receipt, not_held=not_held, counts=counts, losses=losses)

    def _engines(self, model: Model) -> Engines:
        judges = None
        if self._loan.replicas.get("judges"):
            if own := self._loan.judge_model:
                judges = Engines(self._pools["judges"], own, self._answers)
            else:
                judges = Engines(self._pools["judges"], model, self._answers, self._held)
        return Engines(self._pools["engines"], model, self._answers, self._held, judges)

    async def _held(self, model: Model) -> None:
        if model != self._loan.model:
            raise NotHeld(f"the engines hold {self._loan.model.name}, not {model.name}")

    def _segment(self, iteration: int) -> Segment:
        if iteration not in self._segments:
            for done in self._segments.values():
                done.close()
            folder = self._store.segments / f"{iteration:02d}"
            self._segments = {iteration: Segment.another(folder, "groups")}
        return self._segments[iteration]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions within an ExceptionGroup, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error
