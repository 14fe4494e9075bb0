"""Do 256 engines have something to do all the time? And what does the driver spend and keep?

    python benchmarks/scale.py                     # benchmarks/results/scale_256.json
    python benchmarks/scale.py --producers 2       # benchmarks/results/scale_256_producers_2.json

Self-Rewarding as in the paper, four responses and three judgements on each, through the real recipe, router, buffer,
segments and journals. The engines are simulated: each as fast as one of an 8B model at 10,000 tokens a second, 64
requests at once, answers of a long-tailed length. Time is stretched, so that two cores can do in it what the driver and
the producers of 256 engines have cores of their own for.

Then, without engines: what is kept of a prompt in the driver and the buffer where producers make the groups, how many
receipts the driver takes in a second, and how many answers the journal has on disk in a second.
"""

import asyncio
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from common import RESULTS, Load, cluster, cpu_seconds, forget_peak, head, peak_mib, processes, write
from driver import M0, Quiet
from simulated import ANSWERED, WARM, Lengths, Script, Simulated, SimulatedPools
from storage import group, pair_of, resident

from rsrlm.config import Config, resolve
from rsrlm.engines import Answers, Engines
from rsrlm.records import Completion, Prompt, Request, Sampling, Task
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.settings.machine import BUILTIN_MODEL
from rsrlm.store.buffer import Buffer, Receipt, receipt_of
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import Segment
from rsrlm.store.journal import Journals

RATE, SEQUENCES = 10_000, 64  # of an engine: tokens a second, requests at once
RESPONSES = Lengths(median=300, sigma=0.7, most=2048)
JUDGEMENTS = Lengths(median=120, sigma=0.5, most=512)
DRAWN = {"date": "2026-01-01T00:00:00", "fence_salt": "salt"}
SHOWN_EVERY_S = 10.0


def config_of(
    folder: Path, prompts: int, replicas: int, producers: int, sequences: int = SEQUENCES, **others: Any
) -> Config:
    config = resolve(
        {
            "name": "scale", "runs": str(folder), "iterations": 1, "model": BUILTIN_MODEL,
            "prompts": {"path": "builtin", "per_iteration": prompts},
            "sample": {"responses": 4, "max_tokens": RESPONSES.most},
            "judge": {"kind": "text", "judgements": 3, "max_tokens": JUDGEMENTS.most},
            "engine": {
                "max_model_len": 8192, "replicas": replicas, "producers": producers, "max_num_seqs": sequences,
            },
            "train": {"lr": 1e-6, "pairs_per_step": 16},
        }
    )  # fmt: skip
    return setup.started(config, {"drawn": DRAWN})[0]


def tasks_of(prompts: int) -> Iterator[Task]:
    for number in range(prompts):
        yield Task(iteration=0, prompt=Prompt(id=f"prompt-{number:07d}", text=f"What is {number} times seven?"))


WARM_UP = [Task(iteration=0, prompt=Prompt(id=f"{WARM}{number}", text="Warm up.")) for number in range(32)]


async def opened(
    config: Config, store: RunFolder, actors: Sequence[Simulated], event: Callable[..., None]
) -> tuple[Run, Any, Engines]:
    """A run over simulated engines, its recipe, and the engines of its first model."""
    [recipe] = setup.recipes_of(config, DRAWN)
    pools = SimulatedPools(config, store, actors)
    run = Run(pools, Answers(Journals(store.folder)), Quiet(), event, M0, store.segments)
    run.begin(recipe, store.pairs)
    return run, recipe, await run.load(M0)


# -- engines that are kept busy ----------------------------------------------------------------------------------------


class Handed(list[Task]):
    """Tasks; `last` is when one was begun."""

    last = 0.0

    def __getitem__(self, at: Any) -> Any:
        self.last = time.monotonic()
        return super().__getitem__(at)


def answered(logs: Path) -> dict[int, np.ndarray]:
    """By engine: rows of when a request was begun, finished and heard of."""
    found = {}
    for path in logs.glob("*"):
        data = path.read_bytes()
        found[int(path.name)] = np.frombuffer(data[: len(data) // ANSWERED.size * ANSWERED.size]).reshape(-1, 3)
    return found


def use(rows: Sequence[np.ndarray], engines: int, sequences: int, since: float, until: float) -> tuple[float, float]:
    """Of what is possible in that time: work done, and time of engines with at least one request."""
    done = busy = 0.0
    for one in rows:
        starts, ends = (np.clip(one[:, column], since, until) for column in (0, 1))
        done += float((ends - starts).sum())
        times, steps = np.concatenate([starts, ends]), np.repeat([1, -1], len(one))
        order = np.argsort(times, kind="stable")
        open_ = np.cumsum(steps[order])
        busy += float(np.diff(times[order])[open_[:-1] > 0].sum())
    possible = engines * (until - since)
    return done / sequences / possible, busy / possible


class Measured:
    """Engines at work: what is known of it at any time."""

    def __init__(self, config: Config, folder: Path, slowdown: float) -> None:
        self.config, self.slowdown, self.logs = config, slowdown, folder / "engines"
        self.logs.mkdir()
        self.finished: list[float] = []
        self.tasks = Handed()
        self._script = Script(RESPONSES, JUDGEMENTS)
        seconds = config.engine.sequences / RATE * slowdown
        self.engines = [
            Simulated(self._script, config.engine.sequences, seconds, self.logs / str(index))
            for index in range(config.engine.replicas)
        ]
        self._since = self._until = self._now()

    def _now(self) -> dict[str, float]:
        simulation = sum(one.cpu_s for one in self.engines)  # in this process, where there are no producers
        return {
            "wall": time.monotonic(),
            "driver": time.process_time() - simulation,
            "loop": time.thread_time() - simulation,
            "producers": producers_cpu(),
        }

    def begin(self, tasks: Sequence[Task]) -> None:
        self.tasks = Handed(tasks)
        self.finished.clear()
        self._since = self._now()

    def end(self) -> None:
        """While the producers are there."""
        self._until = self._now()

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "group":
            self.finished.append(time.monotonic())

    def figures(self) -> dict[str, Any]:
        """Steady: from when a quarter of the groups that are begun until the last is finished, so that no engine has
        just begun, until the last is begun, when engines begin to have nothing more to do."""
        config, done, since = self.config, len(self.finished), self._since["wall"]
        if not done:
            return {"groups": 0}
        until, last = max(self.finished), self.tasks.last
        cpu = {name: (self._until[name] - self._since[name]) / done for name in ("driver", "loop", "producers")}
        rows = list(answered(self.logs).values())
        place = config.engine.replicas, config.engine.sequences
        whole, busy = use(rows, *place, since, until)
        begun = sum(one < last for one in self.finished)
        found: dict[str, Any] = {
            "groups": done,
            "seconds": until - since,
            "efficiency, ramps included": whole,
            "engine busy, ramps included": busy,
        }
        if begun > 4:
            steady = self.finished[begun // 4]
            found["efficiency, steady"], found["engine busy, steady"] = use(rows, *place, steady, last)
            found["steady seconds"] = last - steady
        late = np.concatenate([one[:, 2] - one[:, 1] for one in rows])
        work = sum(float((one[:, 1] - one[:, 0]).sum()) for one in rows) / config.engine.sequences / self.slowdown
        asked_a_second = config.engine.replicas * done / work  # groups, at full speed
        return {
            **found,
            "engine seconds a group, unstretched": work / done,
            "groups a second of all engines, unstretched": asked_a_second,
            "driver CPU ms a group": cpu["driver"] * 1e3,
            "driver CPU ms a group, of its event loop": cpu["loop"] * 1e3,
            "producers CPU ms a group": cpu["producers"] * 1e3,
            "engines that the driver's event loop keeps up with, unstretched": config.engine.replicas
            / (asked_a_second * cpu["loop"]),
            "answer waits to be heard ms, median": float(np.median(late)) * 1e3,
            "answer waits to be heard ms, 99 %": float(np.quantile(late, 0.99)) * 1e3,
            "requests": len(late),
            "peak MiB of the driver": peak_mib(),
        }


def producers_cpu() -> float:
    """CPU seconds of all producers that live."""
    total = 0.0
    for process in processes(os.getpid()):
        try:
            if "ray::Producer" in "".join(process.cmdline()[:1]):
                total += cpu_seconds(process)
        except psutil.Error:
            continue
    return total


async def at_work(measured: Measured, store: RunFolder, prompts: int) -> None:
    """Make the groups of so many prompts. What was measured is there also where this is interrupted."""

    def event(kind: str, **fields: Any) -> None:
        measured.event(kind, **fields)
        store.event(kind, **fields)

    run, recipe, engines = await opened(measured.config, store, measured.engines, event)
    pools: Any = run.pools
    config = measured.config
    if config.engine.producers:
        from rsrlm.runtime.producers import Producers

        pools.producers = Producers(config, DRAWN, pools, store.event, config.engine.producers)
    await run.groups(engines, recipe, WARM_UP)
    measured.begin(list(tasks_of(prompts)))
    showing = asyncio.get_running_loop().create_task(_show(measured, prompts))
    try:
        await run.groups(engines, recipe, measured.tasks)
    finally:
        showing.cancel()
        measured.end()
        if pools.producers:
            pools.producers.close()


async def _show(measured: Measured, prompts: int) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(SHOWN_EVERY_S)
        print(f"{time.monotonic() - began:5.0f} s: {len(measured.finished)} of {prompts} groups", flush=True)


# -- the driver alone --------------------------------------------------------------------------------------------------


class Receipts:
    """In the place of the producers: a receipt for each task, of a group that is in the segment already."""

    def __init__(self, folder: Path) -> None:
        segment, made = Segment(folder / "made"), group(0)
        self._receipt = replace(receipt_of(made, segment), reason="")
        self._pair = segment.add(pair_of(made))

    async def make(self, model: Any, task: Task, hold: Any, count: Callable[[str, int, int], None]) -> Receipt:
        await asyncio.sleep(0)
        count("actor", 4, 1200)
        count("judge", 12, 1500)
        return replace(self._receipt, group=task.id, pairs=(replace(self._pair, id=f"{task.id}/1>0"),))


def kept(prompts: int, replicas: int = 256) -> dict[str, float]:
    """What the driver holds of a prompt, and what it takes to hear of its group. In a process of its own."""
    with tempfile.TemporaryDirectory(prefix="rsrlm-scale-") as name:
        folder = Path(name)
        config = config_of(folder, prompts, replicas, 1)
        store = RunFolder.create(config)
        figures: dict[str, float] = {}

        async def work() -> None:
            idle = [Simulated(Script(RESPONSES, JUDGEMENTS), 1, 0, folder)] * replicas
            run, recipe, engines = await opened(config, store, idle, store.event)
            pools: Any = run.pools
            pools.producers = Receipts(folder)
            (await run.groups(engines, recipe, WARM_UP)).close()
            forget_peak()
            before = resident()
            tasks = list(tasks_of(prompts))
            asked = resident()
            cpu, wall = time.process_time(), time.perf_counter()
            groups = await run.groups(engines, recipe, tasks)
            figures["receipts a second"] = prompts / (time.perf_counter() - wall)
            figures["driver CPU ms a receipt"] = (time.process_time() - cpu) / prompts * 1e3
            made = resident()
            cpu = time.process_time()
            batch = await recipe.from_groups(run, 0, groups)
            figures["training order CPU ms a prompt"] = (time.process_time() - cpu) / prompts * 1e3
            figures["bytes of prompts and tasks"] = asked - before
            figures["bytes of groups and pairs"] = made - asked
            figures["bytes of the training order"] = resident() - made
            figures["peak MiB over what was there before"] = peak_mib() - before / 2**20
            assert isinstance(groups, Buffer)
            assert len(batch.items) == prompts

        asyncio.run(work())
        return figures


def of_a_prompt(found: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Bytes that one prompt more takes, from the fewest to the most: what is open at a time is in both."""
    few, many = min(found), max(found)
    if few == many:
        return {}
    kinds = [one for one in found[few] if one.startswith("bytes of")]
    return {one: (found[many][one] - found[few][one]) / (many - few) for one in kinds}


class Ready:
    """An engine that has its answer ready, of the length that RESPONSES has in the median."""

    slots = 1024

    def __init__(self) -> None:
        self._ids = tuple(range(1000, 1000 + RESPONSES.median))

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        return [
            Completion(
                request_id=one.id, token_ids=self._ids, text="word " * len(self._ids), finish_reason="stop",
                weight_version=M0.name,
            )
            for one in requests
        ]  # fmt: skip


def journalled(answers: int) -> dict[str, float]:
    """Answers that come to the disk. In a process of its own."""
    with tempfile.TemporaryDirectory(prefix="rsrlm-scale-") as name:
        folder = Path(name)
        prompt = tuple(range(60))

        async def work() -> float:
            journals = Journals(folder)
            engines = Engines(Ready(), M0, Answers(journals))

            async def one(number: int) -> None:
                sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=2048, seed=number)
                await engines.complete(
                    Request(id=f"00/prompt-{number:07d}/0", prompt_token_ids=prompt, sampling=sampling, priority=10)
                )

            began = time.perf_counter()
            await engines.each(one, range(answers), 1)
            seconds = time.perf_counter() - began
            journals.close()
            return seconds

        seconds = asyncio.run(work())
        size = (folder / "journal.jsonl").stat().st_size
        return {"answers on disk a second": answers / seconds, "bytes on disk of an answer": size / answers}


def apart(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def shown(name: str, figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        print(f"{name:12} {key:62} {value:12.4g}", flush=True)


def main(
    replicas: Annotated[int, typer.Option(min=1, help="engines")] = 256,
    producers: Annotated[int, typer.Option(help="0: the driver makes the groups itself")] = 0,
    groups: Annotated[int, typer.Option(help="of an engine; 32 are open at a time")] = 64,
    slowdown: Annotated[float, typer.Option(help="seconds for one of the engines")] = 8.0,
    prompts: Annotated[list[int], typer.Option(help="kept by the driver alone; 1,000,000 take minutes")] = [  # noqa: B006
        10_000,
        100_000,
    ],
    answers: Annotated[int, typer.Option(help="that come to the journal")] = 50_000,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    name = f"scale_{replicas}" + (f"_producers_{producers}" if producers else "")
    data: dict[str, Any] = {
        **head(__doc__.splitlines()[0]), "replicas": replicas, "producers": producers, "slowdown": slowdown,
        "rate": RATE, "sequences": SEQUENCES, "responses": str(RESPONSES), "judgements": str(JUDGEMENTS),
    }  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="rsrlm-scale-"))
    try:
        with cluster(256) if producers else nullcontext():
            config = config_of(folder, groups * replicas, replicas, producers)
            measured = Measured(config, folder, slowdown)
            with Load() as load, _interruptible(data):
                asyncio.run(at_work(measured, RunFolder.create(config), groups * replicas))
            data["engines"] = {**measured.figures(), **load.figures()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shown("engines", data["engines"])
    write(out, name, data)
    data["kept"] = {}
    for count in [] if "interrupted" in data else prompts:
        data["kept"][count] = apart(kept, count, replicas)
        shown(f"{count}", data["kept"][count])
        data["bytes a prompt"] = of_a_prompt(data["kept"])
        write(out, name, data)
    shown("a prompt", data.get("bytes a prompt", {}))
    if "interrupted" not in data:
        data["journal"] = apart(journalled, answers)
        shown("journal", data["journal"])
        write(out, name, data)


@contextmanager
def _interruptible(data: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        data["interrupted"] = True


if __name__ == "__main__":
    typer.run(main)
