"""The engines of a run: which pool answers for which model, and which weights they hold."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from rsrlm.config import Config
from rsrlm.engines import Answers, Engines, Model
from rsrlm.model import weight_files
from rsrlm.runtime.carrier import Carrier
from rsrlm.runtime.endpoint import EndpointClient, EndpointPool
from rsrlm.runtime.engine import EngineDead
from rsrlm.runtime.pool import EnginePool
from rsrlm.runtime.producer import Lent, Loan, Lost
from rsrlm.runtime.producers import Producers
from rsrlm.runtime.replicas import Replica, Replicas
from rsrlm.runtime.weights import Transfer, WeightFile, WeightSet, describe
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import Endpoint as EndpointConfig
from rsrlm.settings.methods import JudgeSection, Validator
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import SEEN_WITHIN_S


class EnginePools:
    """The sampler pool and, where configured, pools of their own for who judges and who validates."""

    def __init__(
        self,
        config: Config,
        store: RunFolder,
        models: Mapping[str, Path],
        broadcast: Any = None,
        judge: Path | None = None,
        validator: Path | None = None,
        note: Callable[..., None] | None = None,
    ) -> None:
        """`models` are the folders of models that are not in the run folder; the first is M0. `judge` and `validator`
        are those of models that judge and validate in its place. `note` is told what happens to engines (see
        EnginePool), instead of the run folder's events."""
        self._note = note or store.event
        self._config, self._store, self._folders = config, store, models
        self._other = {"judge": judge, "validator": validator}
        self._known: dict[str, tuple[Model, WeightSet]] = {}
        self._checksums: dict[tuple[tuple[str, int, int], ...], tuple[WeightFile, ...]] = {}
        self._transfer: dict[str, Transfer] = {}  # by digest
        self._carrier = Carrier(config, broadcast, self._note)
        self._endpoints: dict[str, tuple[EndpointClient, dict[str, float]]] = {}  # and what earlier starts used of it
        self.samplers: EnginePool | None = None
        self._following: list[EnginePool] = []  # hold the models of the run
        self._frozen: list[EnginePool] = []  # hold other weights, and keep them
        self._held: Model | None = None
        self._judges: tuple[Any, Model | None] = (None, None)  # who judges apart, and with which weights of its own
        self._validators: tuple[Any, Model] | None = None
        self.producers: Producers | None = None
        self._turn = asyncio.Lock()

    @property
    def all(self) -> list[EnginePool]:
        return [*self._following, *self._frozen]

    @property
    def replicas(self) -> dict[str, Replicas]:
        """Of each pool, by its name: engines, judges, validators."""
        return {pool.replicas.name: pool.replicas for pool in self.all}

    def folder(self, name: str) -> Path:
        """Of a model by its name."""
        return self._folders.get(name) or self._store.model(name)

    async def model(self, name: str, files: Transfer | None = None) -> Model:
        """A model by its name; `files` are the learner's of the same weights."""
        folder = self.folder(name)
        described = await self._described(await _files_of(folder))
        digest = digest_of(described)
        if name not in self._known or self._known[name][0].digest != digest:
            model = Model(name=name, digest=digest, folder=folder)
            self._known[name] = model, WeightSet(version=name, folder=str(folder), files=described)
        if files:
            self._transfer[digest] = files
        return self._known[name][0]

    async def _described(self, paths: Sequence[Path]) -> tuple[WeightFile, ...]:
        """With checksums, which are taken once while the files stay as they are."""
        now = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
        if now not in self._checksums:
            self._checksums[now] = await asyncio.to_thread(describe, list(paths))
        return self._checksums[now]

    async def start(self, name: str, engines: bool = True) -> None:
        """All engines up, those that follow the training with the model of this name. Without `engines`, only what is
        asked behind an API."""
        config = self._config
        if not engines:
            if config.judge.endpoint:
                self._judges = self._behind(config.judge.endpoint, "judge")
            return
        model = await self.model(name)
        _, weights = self._known[name]
        self.samplers = EnginePool(config, weights, "engines", config.engine.replicas, self._note)
        self._following = [self.samplers]
        self._held = model
        if config.judge.endpoint:
            self._judges = self._behind(config.judge.endpoint, "judge")
        elif self._other["judge"]:
            self._judges = await self._frozen_pool(self._other["judge"], "judge", config.judge)
        elif config.judge.replicas:
            judges = EnginePool(config, weights, "judges", config.judge.replicas, self._note)
            self._following.append(judges)
            self._judges = judges, None
        if config.evaluate.judge.endpoint:
            self._validators = self._behind(config.evaluate.judge.endpoint, "validator")
        elif self._other["validator"]:
            self._validators = await self._frozen_pool(self._other["validator"], "validator", config.evaluate.judge)
        await asyncio.gather(*(pool.start() for pool in self.all))

    def _behind(self, endpoint: EndpointConfig, name: str) -> tuple[EndpointPool, Model]:
        before = self._store.note(f"endpoint-{name}")
        key = {"judge": "judge.endpoint", "validator": "evaluate.judge.endpoint"}[name]
        made = EndpointClient(endpoint, spent=before.get("cost", 0.0), name=key)
        self._endpoints[name] = (made, before)
        model = Model(name=f"endpoint:{endpoint.model}", digest=f"{endpoint.url} {endpoint.model}")
        return EndpointPool(made, self.endpoint_usage), model

    async def _frozen_pool(self, folder: Path, name: str, who: JudgeSection | Validator) -> tuple[EnginePool, Model]:
        assert who.model is not None
        its_own = self._config.model_copy(update={"model": self._config.model_at(who.model)})
        files = await self._described(weight_files(folder))
        weights = WeightSet(version=name, folder=str(folder), files=files)
        pool = EnginePool(its_own, weights, f"{name}s", who.replicas, self._note)
        self._frozen.append(pool)
        return pool, Model(name=name, digest=digest_of(files), folder=folder)

    def engines(self, model: Model, answers: Answers, hold: Callable[[Model], Awaitable[None]]) -> Engines:
        judges = None
        pool, own = self._judges
        if pool is not None:
            judges = Engines(pool, own, answers, self._wake) if own else Engines(pool, model, answers, hold)
        return Engines(self.samplers, model, answers, hold, judges)

    def validators(self, answers: Answers) -> Engines | None:
        return Engines(*self._validators, answers, self._wake) if self._validators else None

    async def rest(self) -> None:
        """Where GPUs are shared, the engines give them up until something is asked of them or loaded."""
        if self._config.ray.share_gpus:
            async with self._turn:
                await asyncio.gather(*(pool.replicas.sleep() for pool in self.all))

    async def _wake(self, model: Model | None = None) -> None:
        if self._config.ray.share_gpus:
            async with self._turn:
                await asyncio.gather(*(pool.replicas.awake() for pool in self.all))

    async def hold(self, model: Model) -> dict[str, Any]:
        """Every engine that follows the training holds this model when it returns; the seconds of each replica."""
        reports: list[Any] = []
        started = time.perf_counter()
        await self._wake()
        _, weights = self._known[model.name]
        transfer = self._transfer.pop(model.digest, None)
        if self._held != model:
            self._store.event("publishing", version=model.name, bytes=weights.size)
            local = {transfer.node: transfer.files} if transfer else {}
            nodes = {node for pool in self._following for node in pool.nodes}
            sent = replace(weights, local=local)
            try:
                sent = await self._carrier.carried(sent, nodes)
                for pool in self._following:
                    reports += await pool.publish(sent)
            finally:
                # From here on the export serves restarts and later updates: shared memory is free again.
                self._carrier.remove(sent.local)
            self._held = model
            held = {version for pool in self._following for version in await pool.versions()}
            if held - {model.name}:
                raise RuntimeError(f"weights {model.name} were published, but an engine reports {held - {model.name}}")
            self._store.event("published", version=model.name, replicas=reports)
        else:
            self.discard(transfer)
        return {
            "version": model.name,
            "bytes": weights.size,
            "seconds": round(time.perf_counter() - started, 3),
            "replicas": reports,
        }

    def discard(self, files: Transfer | None) -> None:
        """Remove the learner's files of weights that nobody wants."""
        if files:
            self._carrier.remove({files.node: files.files})

    async def loan(self, number: int, of: int) -> tuple[Loan, list[Replica]]:
        """The replicas that producer `number` of `of` asks, as soon as one of each pool is ready: its share of them, or
        all where there are not enough."""
        judges, own = self._judges
        shares, everyone = {}, list[Replica]()
        for name, pool in (("engines", self.samplers), ("judges", judges)):
            if pool is None:
                continue
            await pool.replicas.least_busy()
            ready = pool.replicas.ready
            share = ready[number::of] or ready
            everyone += share
            shares[name] = [Lent(index=one.index, generation=one.generation, actor=one.actor) for one in share]
        assert self._held is not None
        return Loan(model=self._held, replicas=shares, judge_model=own), everyone

    def lost(self, lost: Lost) -> None:
        """A producer found a replica gone: it is replaced."""
        pool = self.samplers if lost.pool == "engines" else self._judges[0]
        assert pool is not None
        for replica in [one for one in pool.replicas.all if one.index == lost.index]:  # none, if it has left
            pool.replicas.lost(replica, lost.generation, EngineDead(lost.reason))

    async def stats(self) -> dict[str, float]:
        """Counters of all engines together, since they started."""
        total: dict[str, float] = {}
        for pool in self.all:
            for counters in await pool.stats():
                for name, value in counters.items():
                    total[name] = total.get(name, 0.0) + value
        return total

    def endpoint_usage(self) -> dict[str, dict[str, float]]:
        """What a judge and a validator behind an API have cost so far; empty without. It is kept for a resume."""
        found = {}
        for name, (endpoint, before) in self._endpoints.items():
            counted = endpoint.stats()
            found[name] = {key: value + before.get(key, 0) for key, value in counted.items()}
            found[name]["cost"] = counted["cost"]  # begins with what was spent before
            self._store.write_note(f"endpoint-{name}", found[name])
        return found

    async def close(self) -> None:
        if self.producers:
            self.producers.close()
        self.endpoint_usage()
        for files in self._transfer.values():
            self.discard(files)
        await self._carrier.close()
        await asyncio.gather(*(pool.close() for pool in self.all))
        for endpoint, _ in self._endpoints.values():
            await endpoint.close()


async def _files_of(folder: Path) -> list[Path]:
    """The weights of a model. Where another host has written them, a network file system may show them late."""
    began = time.monotonic()
    while not (paths := weight_files(folder)) or not all(path.exists() for path in paths):
        if time.monotonic() - began > SEEN_WITHIN_S:
            raise ConfigError(
                f"{folder}: the weights of a model are not there after {SEEN_WITHIN_S:g} s; runs must be a folder that "
                "all hosts share"
            )
        await asyncio.sleep(0.2)
    return paths


def digest_of(files: Sequence[WeightFile]) -> str:
    """Of the weights, whatever the folder that they lie in."""
    return xxhash.xxh3_128_hexdigest(" ".join(sorted(file.checksum for file in files)).encode())
