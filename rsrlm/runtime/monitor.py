"""What a run does now, for its alive.json: the stages on its screen, its engines and its preference buffer."""

import contextlib
import os
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rsrlm.report.pulse import Bar, Filling, PoolPulse, Sampled, Stage, sample_of
from rsrlm.run import Run
from rsrlm.store.buffer import Receipt

ENDED_SHOWN = 4  # stages


@dataclass
class _Work:
    """A stage while it counts."""

    title: str
    totals: dict[str, int]
    began: float
    ended: float | None = None
    done: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def stage(self) -> Stage:
        bars = [
            Bar(what=what, done=self.done[what], of=of, tokens=self.tokens[what]) for what, of in self.totals.items()
        ]
        return Stage(title=self.title, bars=tuple(bars), began=round(self.began, 1), ended=self.ended)


class Monitor:
    """A screen whose stages are remembered. `doing` is for a thread beside the run, which waits for nobody."""

    def __init__(self, screen: Any) -> None:
        self.line = screen.line
        self._screen = screen
        self._open: list[_Work] = []
        self._ended: deque[Stage] = deque(maxlen=ENDED_SHOWN)
        self._lost: Counter[str] = Counter()  # replicas by pool
        self._pools: Any = None
        self._run: Run | None = None
        self._shown: tuple[Receipt | None, Sampled | None] = (None, None)

    @contextlib.contextmanager
    def stage(self, title: str, totals: dict[str, int]) -> Iterator[Callable[[str, int, int], None]]:
        work = _Work(title=title, totals=dict(totals), began=time.time())
        self._open.append(work)

        def counted(what: str, items: int, tokens: int) -> None:
            tick(what, items, tokens)
            work.done[what] += items
            work.tokens[what] += tokens

        try:
            with self._screen.stage(title, totals) as tick:
                yield counted
        finally:
            work.ended = round(time.time(), 1)
            self._ended.append(work.stage())
            self._open.remove(work)

    def heard(self, note: Callable[..., None]) -> Callable[..., None]:
        """What takes the events of engines and producers; those that are lost are counted."""

        def noted(kind: str, **fields: Any) -> None:
            note(kind, **fields)
            if kind in ("engine_lost", "producer_lost"):
                self._lost[fields.get("pool", "producers")] += 1

        return noted

    def follow(self, pools: Any, run: Run | None = None) -> None:
        """Tell of these engines, and of this run's buffer, from now on; `pools` are EnginePools."""
        self._pools, self._run = pools, run

    def doing(self) -> dict[str, Any]:
        """Plain data: the fields of `rsrlm.report.pulse.Pulse` that say what goes on."""
        stages = [*self._ended, *(work.stage() for work in list(self._open))]
        found: dict[str, Any] = {"stages": [asdict(stage) for stage in stages]}
        if self._pools:
            found["engines"] = [asdict(pool) for pool in self._engines()]
        if self._run:
            found["buffer"] = [asdict(filling) for filling in self._buffer(self._run)]
            found["sample"] = asdict(sample) if (sample := self._sample(self._run)) else None
        return found

    def _engines(self) -> Iterator[PoolPulse]:
        for name, replicas in self._pools.replicas.items():
            ready = replicas.ready
            yield PoolPulse(
                name=name,
                ready=len(ready),
                wanted=len(replicas.all),
                lost=self._lost[name],
                queued=sum(one.outstanding for one in list(replicas.all)),
                held=tuple(sorted({one.version for one in ready})),
            )
        if self._pools.producers:
            number = self._pools.producers.number
            yield PoolPulse(name="producers", ready=number, wanted=number, lost=self._lost["producers"])

    def _buffer(self, run: Run) -> Iterator[Filling]:
        for iteration, (by, buffer) in sorted(run.buffers.copy().items()):
            pairs = len(buffer.pairs)
            yield Filling(iteration=iteration, by=by, groups=buffer.finished, of=len(buffer), pairs=pairs)

    def _sample(self, run: Run) -> Sampled | None:
        """Of the group that was finished last. Its file may be gone by now, or come late from another host."""
        last = next(
            (buffer.last for _, (_, buffer) in sorted(run.buffers.copy().items(), reverse=True) if buffer.last), None
        )
        if last and last is not self._shown[0]:
            with contextlib.suppress(Exception):
                self._shown = last, sample_of(_group_of(last)) or self._shown[1]
        return self._shown[1]


def _group_of(receipt: Receipt) -> Any:
    with open(receipt.segment, "rb") as file:
        return pickle.loads(os.pread(file.fileno(), receipt.length, receipt.offset))
