"""What does the driver spend on a prompt, and what does it keep of it? With engines that answer at once.

Self-Rewarding with one written judgement on each of four responses: the groups, then the tables and the signs of
trouble of the iteration. With `--producers` they run as Ray actors, and what is measured is the driver alone.
"""

import asyncio
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from common import RESULTS, cluster, forget_peak, head, peak_mib, write

from rsrlm.config import Config, resolve
from rsrlm.engines import Answers, Engines, Model
from rsrlm.iterative import keep
from rsrlm.model import folder_of, load_tokenizer
from rsrlm.records import Completion, Prompt, Request, Task
from rsrlm.report.signs import measure
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.runtime.producer import Lent, Loan
from rsrlm.runtime.replicas import Replica
from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig
from rsrlm.store.folder import RunFolder
from rsrlm.store.journal import Journals

M0 = Model(name="M0", digest="of no weights")
TEXTS = 200  # different responses
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps", "under", "trees"]


class Instant:
    """Engines that have all responses ready. The judge goes by the seed."""

    slots = 64

    def __init__(self, tokens: int) -> None:
        tokenizer, rng = load_tokenizer(folder_of(ModelConfig(path=BUILTIN_MODEL))), random.Random(0)
        texts = [" ".join(rng.choices(WORDS, k=tokens)) for _ in range(TEXTS)]
        self._answers = [(text, tuple(tokenizer.encode(text, add_special_tokens=False)[:tokens])) for text in texts]

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._answer(request) for request in requests]

    generate_all = generate

    def _answer(self, request: Request) -> Completion:
        seed = request.sampling.seed
        judgement = f"Fine.\nScore: {seed % 6}", tuple(range(8))
        text, ids = judgement if request.role == "judge" else self._answers[seed % TEXTS]
        return Completion(
            request_id=request.id, token_ids=ids, text=text, finish_reason="stop", weight_version=M0.name
        )  # fmt: skip


class Pools:
    """The pools of a run, and of its producers."""

    def __init__(self, engine: Any) -> None:
        self.producers: Any = None
        self._engine = engine
        self.replicas: list[Replica] = []

    async def hold(self, model: Model) -> dict[str, Any]:
        return {}

    async def stats(self) -> dict[str, float]:
        return {}

    def engines(self, model: Model, answers: Answers, hold: Any) -> Engines:
        return Engines(self._engine, model, answers, hold)

    async def loan(self, number: int, of: int) -> tuple[Loan, list[Replica]]:
        own = self.replicas[number::of]
        lent = [Lent(index=one.index, generation=0, actor=one.actor) for one in own]
        return Loan(model=M0, replicas={"engines": lent}, judge_model=None), own


class Quiet:
    """Shows nothing."""

    def line(self, text: str) -> None: ...

    @contextmanager
    def stage(self, title: str, totals: dict[str, int]) -> Iterator[Any]:
        yield lambda *_: None


def config_of(folder: Path, prompts: int, tokens: int) -> Config:
    return resolve(
        {
            "name": "driver", "runs": str(folder), "iterations": 1, "model": BUILTIN_MODEL,
            "prompts": {"path": "builtin", "per_iteration": prompts},
            "sample": {"responses": 4, "max_tokens": tokens}, "judge": {"kind": "text", "max_tokens": 64},
            "engine": {"max_model_len": 2048, "replicas": 2}, "train": {"lr": 1e-6, "pairs_per_step": 16},
        }
    )  # fmt: skip


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Stage:
    """CPU time of this process by group, and what it holds afterwards over what it held before the first."""

    def __init__(self, prompts: int) -> None:
        self._prompts, self._before, self._at_first = prompts, resident(), forget_peak()
        self.figures: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.figures[f"{name}: CPU ms a group"] = (time.process_time() - cpu) / self._prompts * 1e3
        self.figures[f"{name}: seconds"] = time.perf_counter() - wall
        self.figures[f"{name}: bytes kept of a group"] = (resident() - self._before) / self._prompts
        self.figures["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.figures["peak MiB over what was there before"] = peak_mib() - self._at_first
        print(name, {key: round(value, 3) for key, value in self.figures.items()}, flush=True)


async def measured(config: Config, store: RunFolder, prompts: int, tokens: int, producers: int) -> dict[str, float]:
    drawn = {"date": "2026-01-01T00:00:00", "fence_salt": "salt"}
    config, drawn = setup.started(config, {"drawn": drawn})
    [recipe] = setup.recipes_of(config, drawn)
    pools = Pools(None if producers else Instant(tokens))
    if producers:
        import ray

        from rsrlm.runtime.producers import Producers

        for index in range(producers):
            replica = Replica(index)
            replica.actor = ray.remote(Instant).options(num_cpus=0).remote(tokens)
            pools.replicas.append(replica)
        pools.producers = Producers(config, drawn, pools, lambda *_, **__: None, producers)
    answers = Journals(store.folder)
    run = Run(pools, Answers(answers), Quiet(), store.event, M0, store.segments)
    engines = await run.load(M0)
    run.begin(recipe, store.pairs)
    few = [Task(iteration=0, prompt=Prompt(id=f"warm-{index}", text="Warm up.")) for index in range(32)]
    if producers:
        engines = SimpleNamespace(model=M0, each=Engines(Instant(tokens), M0, run.answers).each)
    await run.groups(engines, recipe, few)
    stage = Stage(prompts)
    asked = (Prompt(id=f"prompt-{index:07d}", text=f"Question {index}?") for index in range(prompts))
    tasks = [Task(iteration=0, prompt=prompt) for prompt in asked]
    with stage("groups"):
        groups = await run.groups(engines, recipe, tasks)
    batch = await recipe.from_groups(run, 0, groups)
    with stage("tables"):
        keep(store, 0, batch, None, "pairs")
    with stage("signs"):
        measure(batch.groups, batch.items, [], form=recipe.judge.form)
    if pools.producers:
        pools.producers.close()
    answers.close()
    return stage.figures


def main(
    prompts: Annotated[int, typer.Option(help="1,000,000 take an hour, and 7 GB of disk")] = 5000,
    tokens: Annotated[int, typer.Option(help="of a response")] = 300,
    producers: Annotated[int, typer.Option(help="0: the driver makes the groups itself")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rsrlm-driver-"))
    try:
        config = config_of(folder, prompts, tokens)
        with cluster(256) if producers else nullcontext():
            figures = asyncio.run(measured(config, RunFolder.create(config), prompts, tokens, producers))
    finally:
        shutil.rmtree(folder)
    name = f"driver_{prompts}" + (f"_producers_{producers}" if producers else "")
    write(out, name, {**head(__doc__.splitlines()[0]), "prompts": prompts, "tokens": tokens, "figures": figures})


if __name__ == "__main__":
    typer.run(main)
