"""More engines for a run, or fewer, while it runs: what `rsrlm scale` asks for, and the pools that follow it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from rsrlm.config import Config
from rsrlm.runtime.room import pools_of
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

NOTE = "scale"  # scale.json: engines wanted, by the name of their pool
LOOK_EVERY_S = 2.0


class Resized(Protocol):
    """The replicas of a pool."""

    all: list[Any]

    def resize(self, number: int) -> None: ...


def ask(store: RunFolder, config: Config, wanted: Mapping[str, int]) -> None:
    """Ask the run for these numbers of engines; they hold for a resume too. Raises ConfigError."""
    there = {name: number for name, number in pools_of(config).items() if number}
    for name, number in wanted.items():
        if name not in there:
            raise ConfigError(f"{name}={number}: {store.folder} has no such engines; it has {', '.join(there)}")
        if number < 1:
            raise ConfigError(f"{name}={number}: at least one must be left; `rsrlm resume` goes on with a stopped run")
    store.write_note(NOTE, {**asked(store), **wanted})


def asked(store: RunFolder) -> dict[str, int]:
    """The numbers that were asked for last; a hand that wrote them may have erred, and asks for nothing then."""
    try:
        note: Any = store.note(NOTE)
    except (OSError, ValueError):
        return {}
    found = note.items() if isinstance(note, dict) else ()
    return {name: number for name, number in found if type(number) is int and number > 0}


def scaled(config: Config, store: RunFolder) -> Config:
    """The config of a run that goes on, with the numbers that were asked for last."""
    wanted = asked(store)
    engine, judge, validator = config.engine, config.judge, config.evaluate.judge
    engine = engine.model_copy(update={"replicas": wanted.get("engines", engine.replicas)})
    judge = judge.model_copy(update={"replicas": wanted.get("judges", judge.replicas)})
    validator = validator.model_copy(update={"replicas": wanted.get("validators", validator.replicas)})
    evaluate = config.evaluate.model_copy(update={"judge": validator})
    return config.model_copy(update={"engine": engine, "judge": judge, "evaluate": evaluate})


async def follow(store: RunFolder, pools: Mapping[str, Resized], note: Callable[..., None]) -> None:
    """Bring each pool to the number that was asked for last, again and again."""
    while True:
        for name, number in (await asyncio.to_thread(asked, store)).items():
            if (pool := pools.get(name)) and len(pool.all) != number:
                note("scaled", pool=name, before=len(pool.all), after=number)
                pool.resize(number)
        await asyncio.sleep(LOOK_EVERY_S)


@contextlib.asynccontextmanager
async def followed(store: RunFolder, pools: Mapping[str, Resized], note: Callable[..., None]) -> AsyncIterator[None]:
    """The pools follow for a while."""
    following = asyncio.create_task(follow(store, pools, note))
    try:
        yield
    finally:
        following.cancel()
