"""What does an update of the weights cost? Writing and transfer over one copy of the bytes in memory; and is it flat?

    .venv/bin/python benchmarks/weight_sync.py [--transport shm|gloo] [--rounds 5] [--model PATH]

The weights of a real model folder, in the dtype of the config as the learner holds them, are changed in every element,
written with `rsrlm.runtime.weights.write` and published with `EnginePool.publish` to a pool of one replica and to a
pool of two. All three engines are resident and idle. Each measured update follows an unmeasured one of the same pool.

- write: the safetensors file in /dev/shm and its checksum, in this process (in a run: in the learner's rank 0).
- transfer: arrival and checksum, by the engine's own report; of two replicas the slower one. With gloo, before that, a
  copy by `LearnerGroup.broadcast`, from rank 0 of a Ray Train group to the host's depot, with their rendezvous.
- load, repack: what vLLM does with the bytes, reported apart; the slower replica.
- publish: wall time of the whole call, with Ray, rendezvous, loading and repacking.
- copy: the same number of bytes from one touched buffer to another one, median of 3: `memcpy` is numpy in one thread
  (as the file is written and checked), `torch` is `copy_` with the engine's number of threads.

Ratio: (write + transfer) / memcpy of the same round, and transfer / memcpy. Flat: two replicas over one, for
write + transfer and for transfer alone. What bounds it: writing a fresh file in shared memory costs page faults beside
the copy, and the bytes are read once by the checksum of the writer and once by that of every replica, which run at the
same time if there are cores.
"""

import asyncio
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import ENVIRONMENT, RESULTS, Load, cluster, head, interleaved, shown, spread, write

from rsrlm import config as configs
from rsrlm.config import Config
from rsrlm.model import folder_of, weight_files
from rsrlm.report.progress import Report
from rsrlm.runtime import weights
from rsrlm.runtime.weights import WeightSet
from rsrlm.store.folder import RunFolder

QUESTION = "seconds of writing and transferring one version of the weights over one copy of the bytes in memory"
REPLICAS = (1, 2)
FACTOR = 1.02  # changes every element but zeros, in bfloat16 too
PARTS = ("write", "transfer", "load", "repack", "publish")


def tensors_of(folder: Path, dtype: str) -> dict[str, torch.Tensor]:
    """The model's tensors in the dtype that the learner holds them in."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        found |= load_file(path)
    return {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in found.items()}


class Sync:
    """A pool for each number of replicas, and one set of weights that changes with every update."""

    def __init__(self, config: Config, folder: Path, store: RunFolder) -> None:
        from rsrlm.runtime.carrier import Carrier
        from rsrlm.runtime.group import LearnerGroup
        from rsrlm.runtime.pool import EnginePool

        self._folder = str(folder)
        self._run = store.folder
        self._updates = 0
        self._tensors = tensors_of(folder, config.model.dtype)
        first = WeightSet(version="M0", folder=self._folder, files=weights.describe(weight_files(folder)))
        self._pools = {n: EnginePool(config, first, f"of-{n}", n, store.event) for n in REPLICAS}
        self._learner = LearnerGroup(config, store.folder / ".train")
        self._carrier = Carrier(config, self._learner.broadcast, store.event)
        self._needs_learner = config.weights.transport == "gloo"

    async def start(self) -> None:
        if self._needs_learner:
            await self._learner.start()
        for pool in self._pools.values():
            await pool.start()

    def _change(self) -> str:
        self._updates += 1
        for tensor in self._tensors.values():
            tensor.mul_(FACTOR if self._updates % 2 else 1 / FACTOR)
        return f"V{self._updates}"

    async def update(self, replicas: int) -> dict[str, Any]:
        """Write and publish a new version; the seconds of each part."""
        pool, version = self._pools[replicas], self._change()
        started = time.perf_counter()
        files = weights.write(weights.shapes_of(self._tensors), self._tensors.items(), self._run, version)
        written = time.perf_counter()
        try:
            published = WeightSet(version=version, folder=self._folder, files=files)
            sent = await self._carrier.carried(published, pool.nodes)
            sending = time.perf_counter() - written if self._needs_learner else 0.0
            reports = await pool.publish(sent)
            seconds = time.perf_counter() - written
            self._carrier.remove(sent.local)
            if len(reports) != replicas or set(await pool.versions()) != {version}:
                raise RuntimeError(f"{version} did not reach {replicas} replicas: {reports}")
        finally:
            weights.remove(files, self._run)
        slowest = {part: max(report[part] for report in reports) for part in ("transfer", "load", "repack")}
        return {
            "bytes": published.size,
            "file": files[0].path,
            "write": written - started,
            **slowest,
            "transfer": sending + slowest["transfer"],
            "publish": seconds,
            "replicas": reports,
        }

    async def measured(self, replicas: int, number: int) -> dict[str, Any]:
        """The second of two updates of a pool; every round does the same."""
        await self.update(replicas)
        with Load() as load:
            found = await self.update(replicas)
        return {**found, **load.figures()}

    async def close(self) -> None:
        await self._carrier.close()
        await asyncio.gather(self._learner.close(), *(pool.close() for pool in self._pools.values()))


class Copy:
    """One copy of so many bytes between two buffers whose pages are there already."""

    def __init__(self, size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._source = np.full(size, 1, dtype=np.uint8)
        self._target = np.full(size, 2, dtype=np.uint8)

    def seconds(self, repeats: int = 3) -> dict[str, float]:
        source, target = torch.from_numpy(self._source), torch.from_numpy(self._target)
        ways = {"memcpy": lambda: np.copyto(self._target, self._source), "torch": lambda: target.copy_(source)}
        found = {}
        for name, way in ways.items():
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                way()
                times.append(time.perf_counter() - started)
            found[name] = statistics.median(times)
        return found


def ratios(one: dict[str, Any]) -> dict[str, float]:
    """Of one round; the key says how many replicas."""
    sent = {n: one[f"to_{n}"]["write"] + one[f"to_{n}"]["transfer"] for n in REPLICAS}
    few, many = REPLICAS
    return {
        **{f"to_{n}_over_memcpy": sent[n] / one["copy"]["memcpy"] for n in REPLICAS},
        **{f"to_{n}_over_torch": sent[n] / one["copy"]["torch"] for n in REPLICAS},
        **{f"transfer_to_{n}_over_memcpy": one[f"to_{n}"]["transfer"] / one["copy"]["memcpy"] for n in REPLICAS},
        "flat_write_and_transfer": sent[many] / sent[few],
        "flat_transfer": one[f"to_{many}"]["transfer"] / one[f"to_{few}"]["transfer"],
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "bytes": rounds[0]["to_1"]["bytes"],
        **{name: spread([one["ratios"][name] for one in rounds]) for name in rounds[0]["ratios"]},
        "copy": {way: spread([one["copy"][way] for one in rounds]) for way in rounds[0]["copy"]},
        "seconds": {
            f"to_{n}": {part: spread([one[f"to_{n}"][part] for one in rounds]) for part in PARTS} for n in REPLICAS
        },
        "other_cores": spread([one[f"to_{n}"]["other_cores"] for one in rounds for n in REPLICAS]),
    }


def show(rounds: list[dict[str, Any]]) -> None:
    report = Report()
    report.line(f"{rounds[0]['to_1']['bytes']:,} bytes; median (range) of {len(rounds)} rounds")
    rows = [
        {"part": part, **{f"to_{n}": shown([one[f"to_{n}"][part] for one in rounds]) for n in REPLICAS}}
        for part in PARTS
    ]
    rows += [
        {"part": f"copy: {way}", **dict.fromkeys(("to_1", "to_2"), shown([one["copy"][way] for one in rounds]))}
        for way in ("memcpy", "torch")
    ]
    report.table("Seconds", rows, {"part": "", "to_1": "1 replica", "to_2": "2 replicas"})
    table = [{"name": name, "value": shown([one["ratios"][name] for one in rounds])} for name in rounds[0]["ratios"]]
    report.table("Ratios within a round", table, {"name": "", "value": "ratio"})


async def measure(config: Config, folder: Path, rounds: int, out: Path, name: str) -> None:
    from rsrlm.runtime.engine import engine_arguments

    store = RunFolder.create(config)
    sync = Sync(config, folder, store)
    data = {
        **head(QUESTION),
        "transport": config.weights.transport,
        "engine_threads": config.engine.threads,
        "arguments": engine_arguments(config, str(folder)),
    }
    done: list[dict[str, Any]] = []
    try:
        await sync.start()
        copy: Copy | None = None
        for number in range(rounds):
            one = await interleaved(number, {f"to_{n}": partial(sync.measured, n) for n in REPLICAS})
            copy = copy or Copy(one["to_1"]["bytes"], config.engine.threads)
            one["copy"] = copy.seconds()
            one["ratios"] = ratios(one)
            done.append(one)
            write(out, name, {**data, "summary": summary(done), "rounds": done})
            Report().line(f"round {number}: 1 replica {one['ratios']['to_1_over_memcpy']:.2f} x memcpy")
        show(done)
    finally:
        await sync.close()


def resolve(path: str, runs: str, overrides: dict[str, Any]) -> Config:
    """The config with what the benchmark fixes; Ray CPUs only place actors."""
    fixed = {"name": "benchmark", "runs": runs, "engine.replicas": 1, "engine.cpus": 0.25, "train.cpus": 0.25}
    settings = {**fixed, **{key: value for key, value in overrides.items() if value is not None}}
    return configs.load(path, [f"{key}={value}" for key, value in settings.items()])


def main(
    config: Annotated[str, typer.Option(help="engine and dtype are taken from it")] = "configs/quickstart.yaml",
    model: Annotated[str | None, typer.Option(help="instead of the config's")] = None,
    transport: Annotated[str, typer.Option(help="shm or gloo")] = "shm",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    kind: Annotated[str, typer.Option(help="inprocess or async engines")] = "inprocess",
    threads: Annotated[int | None, typer.Option(help="of every engine, instead of the config's")] = None,
    kv_cache_gib: Annotated[float, typer.Option(help="small: three engines are up at once")] = 0.25,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    overrides = {
        "model": model,
        "weights.transport": transport,
        "engine.kind": kind,
        "engine.threads": threads,
        "engine.kv_cache_gib": kv_cache_gib,
    }
    name = f"weight_sync_{transport}" + ("" if kind == "inprocess" else f"_{kind}")
    with tempfile.TemporaryDirectory(prefix="rsrlm-weights-") as runs:
        resolved = resolve(config, runs, overrides)
        with cluster(resolved.ray.object_store_mib):
            asyncio.run(measure(resolved, folder_of(resolved.model), rounds, out, name))
    Report().line(f"result: {out / (name + '.json')}")


if __name__ == "__main__":
    typer.run(main)
