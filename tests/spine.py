"""A whole run in milliseconds: a real run folder and journal, engines that answer by the weights that they hold, and a
learner whose weights are a line that says what they come from. Anything that happens may be where the run is killed."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
from scripted import LETTERS, Characters, Pools, Screen, context_of

from rsrlm.engines import Answers, Model, key_of
from rsrlm.evaluate import Evaluation
from rsrlm.iterative import Iteration, Spine, run_iterations
from rsrlm.jobs import ReferenceBatch, Resumed, StepTrained, Trained, TrainJob, follow
from rsrlm.judges.base import judge_of
from rsrlm.online import run_rounds
from rsrlm.recipes.sft import SFT
from rsrlm.records import Completion, Prompt, Request, Task
from rsrlm.run import Run
from rsrlm.settings.train import DPO
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import ItemFile
from rsrlm.store.journal import CompletionLog
from rsrlm.store.steps import StepLog

SLOTS = 4


class Killed(BaseException):
    """The process is gone."""


def quality(weights: str) -> int:
    """Times that the weights were trained since M0, whose weights are "M0"."""
    return weights.count("+")


def answer(request: Request, weights: str) -> str:
    """A response names the weights that it comes from. A judge gives a point for its index and one for each training
    behind it, and from M1 on two more; M0 prefers the better trained of two, and other judges the worse. Judgement 0
    is a point below the others; of two judgements the one with the lower index is the better one. A reply of people
    says what it is worth."""
    shown = "".join(map(chr, request.prompt_token_ids)).split("|")
    if request.role == "judge":
        by, _, index = shown[1].removesuffix(".").partition(" as ")
        number = request.id.rpartition("#")[2]
        points = int(index or by.split()[-1]) + quality(by) + 2 * (quality(weights) > 0) - number.startswith("0")
        return f"Number {number}.\nScore: {max(0, min(5, points))}"
    if request.role == "duel":
        ours, theirs = (quality(text.partition(" as ")[0]) for text in shown[1:3])
        better = "A" if ours > theirs else "B"
        return "tie" if ours == theirs else better if weights == "M0" else {"A": "B", "B": "A"}[better]
    if request.role == "meta":
        first, second = (int(text.split()[1].removesuffix(".")) for text in shown[2:4])
        return f"Winner: {'A' if first < second else 'B'}"
    return f"{weights} as {request.id.rpartition('/')[2]}."


class Engine:
    """Answers by the weights that it holds, some of them late."""

    slots = SLOTS

    def __init__(self, world: "World", seed: int) -> None:
        self.world, self.held, self.weights = world, "", ""
        self._rng = random.Random(seed)

    async def hold(self, version: str) -> None:
        self.world.happens(f"hold {version}")
        self.held = version

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(0)
        self.world.happens(f"ask {requests[0].role} {requests[0].id}")
        self.world.asked += [(self.weights, request) for request in requests]
        return [self._completion(request) for request in requests]

    def _completion(self, request: Request) -> Completion:
        text = self.world.answer(request, self.weights)
        scored = len(request.prompt_token_ids) - (request.score_from or len(request.prompt_token_ids))
        return Completion(
            request_id=request.id,
            token_ids=tuple(map(ord, text)),
            text=text,
            finish_reason="stop",
            weight_version=self.held,
            label_logprobs=LETTERS[text] if request.label_ids else (),
            prompt_logprobs=(-2.0 + 0.5 * quality(self.weights),) * scored,
        )


class Learner:
    """Trains by writing down what the weights come from. Checkpoints and candidates are as the real learner's."""

    def __init__(self, world: "World") -> None:
        self.world, self.store = world, world.store

    async def train(self, job: TrainJob, log: StepLog, on_event: Callable[[Any], None]) -> Trained:
        return await follow(self._said(job), log, on_event)

    async def forget(self) -> None:
        self.world.happens("learner forget")

    async def _said(self, job: TrainJob) -> AsyncIterator[Any]:
        items: Sequence[Any] = list(ItemFile(Path(job.items)))
        source, rule = next(name for name in self.world.names if str(self.world.folder(name)) == job.model), job.train
        self.world.jobs.append(
            SimpleNamespace(
                iteration=job.iteration,
                source=source,
                version=job.name,
                rule=rule,
                items=items,
                until=job.until,
                course=job.course,
            )
        )
        early = rule.early_stop or job.course  # candidates are judged in between, or engines never rest
        assert early or self.world.pools.resting, "the engines have the GPUs that this may share with them"
        weights = (Path(job.model) / "weights").read_text()
        ids = [item.id for item in items]
        steps = [ids[at : at + rule.pairs_per_step] for at in range(0, len(ids), rule.pairs_per_step)] * rule.epochs
        checkpoint = self.store.checkpoints / f"{job.name}-{job.digest}.json"
        rows = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
        if job.course and job.course.after:
            assert (self.store.checkpoints / f"{job.course.after}-end").exists(), "the optimizer before is gone"
        if not rows and isinstance(rule, DPO):
            yield self._tell("reference", ReferenceBatch(done=1, of=1))
        last = rule.steps(len(items))
        yield self._tell("resumed", Resumed(step=len(rows), of=last, packed=True, rows=list(rows)))
        end = job.until or last
        for number in range(len(rows), end):
            rows.append(self._row(number, steps[number], rule))
            yield self._tell("step", StepTrained(row=rows[-1]))
            if ((number + 1) % rule.checkpoint_every_steps == 0 and number + 1 < end) or number + 1 == job.until:
                self.store.checkpoints.mkdir(exist_ok=True)
                checkpoint.write_text(json.dumps(rows))
        if job.course:
            self.store.checkpoints.mkdir(exist_ok=True)
            (self.store.checkpoints / f"{job.name}-end").write_text("the optimizer")
        self._export(Path(f"{job.output}@{end}" if job.until else job.output), f"{weights}+{end}")
        seconds = dict.fromkeys(("train_seconds", "write_seconds", "export_seconds"), 1.0)
        files = None if job.until else f"files of {job.name}"
        yield self._tell("done", Trained(steps=end, files=files, **seconds))

    def _tell(self, what: str, event: Any) -> Any:
        self.world.happens(f"learner {what}")
        return event

    def _row(self, number: int, ids: list[str], rule: Any) -> dict[str, Any]:
        losses = {"dpo_loss": 0.7 - 0.1 * number, "accuracy": 0.5, "margin": 0.1}
        kind = losses if isinstance(rule, DPO) else {"sft_loss": 2.0 - 0.1 * number}
        return {
            "step": number, "pair_ids": ids, "loss": 1.0, "tokens": 10, "memory_gib": 1.5, "chosen_logp": -5.0,
            "kl_per_token": 0.01, **kind,
        }  # fmt: skip

    def _export(self, folder: Path, weights: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(weights)


class World:
    """A run of `config` over `prompts`, which are dealt to its iterations in order. `kill` of what happens says whether
    the process dies just before it. `files` and `parts` are data of steps of supervised fine-tuning."""

    def __init__(
        self, config: Any, prompts: Sequence[Prompt], heldout: Sequence[Prompt] = (), validation: Sequence[Prompt] = (),
        pools: Callable[..., Pools] = Pools, answer: Callable[[Request, str], str] = answer, **data: Any,
    ) -> None:  # fmt: skip
        self.config, self.prompts, self.heldout, self.validation = config, prompts, heldout, validation
        self.answer, self._make_pools, self._data = answer, pools, data
        self.store = RunFolder.create(config)
        self._first = self.store.folder / "first"
        self._first.mkdir()
        (self._first / "weights").write_text("M0")
        self.kill: Callable[[str], bool] = lambda _: False
        self.happened: list[str] = []
        self.asked: list[tuple[str, Request]] = []  # over all starts, with the weights that answered
        self.jobs: list[Any] = []
        self.endpoints: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Of the models that there are."""
        return ["M0", *(path.name for path in self.store.folder.glob("models/*"))]

    def folder(self, name: str) -> Path:
        return self._first if name == "M0" else self.store.model(name)

    def happens(self, what: str) -> None:
        if self.kill(what):
            raise Killed(what)
        self.happened.append(what)

    def start(self, seed: int = 0) -> list[dict[str, Any]]:
        """Everything anew but the run folder; the rows of all iterations."""
        return asyncio.run(asyncio.wait_for(self._run(seed), 60))

    async def _run(self, seed: int) -> list[dict[str, Any]]:
        config, context = self.config, context_of(self.config, Characters())
        self.store = store = RunFolder(config.folder)
        store.event = self._told("event", store.event)  # type: ignore[method-assign]
        store.write_json = self._told("write", store.write_json)  # type: ignore[method-assign]
        store.take_candidate = self._told("take", store.take_candidate)  # type: ignore[method-assign]
        self.screen = screen = Screen()
        self.pools = self._make_pools(Engine(self, seed), folder=self.folder)
        log = CompletionLog(store.folder / "journal.jsonl")
        judge = judge_of(config.judge, context)
        heldout, validation = (
            Evaluation(config, context, judge, judge_of(config.validating, context), context, prompts)
            for prompts in (self.heldout, self.validation)
        )
        run = Run(self.pools, Answers(log), screen, store.event, await self.pools.model("M0"), store.segments)
        spine = Spine(
            config=config, run=run, learner=Learner(self), store=store, heldout=heldout, validation=validation,
            endpoints=lambda: self.endpoints,
        )  # fmt: skip
        try:
            clock = run_rounds if config.clock.kind == "online" else run_iterations
            return await clock(spine, self._iterations(context))
        finally:
            log.close()

    def _told(self, kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which happens under the name of its kind and its first argument."""

        def told(first: Any, *others: Any, **fields: Any) -> Any:
            self.happens(f"{kind} {first.name if isinstance(first, Path) else first}")
            return work(first, *others, **fields)

        return told

    def _iterations(self, context: Any) -> list[Iteration]:
        found, dealt = [], iter(self.prompts)
        for number, step in enumerate(self.config.planned):
            many = step.config.prompts.per_iteration if step.recipe.answers_prompts(step.config) else 0
            data = self._data if issubclass(step.recipe, SFT) else {}
            recipe = step.recipe(step.config, context, context, **data)
            tasks = [Task(iteration=number, prompt=next(dealt)) for _ in range(many)]
            found.append(Iteration(name=step.name, recipe=recipe, tasks=tasks))
        return found

    def repeated(self) -> list[str]:
        """What was asked of the same weights more than once, over all starts."""
        keys = [key_of(Model(name="", digest=weights), request) for weights, request in self.asked]
        times = Counter(keys)
        return [request.id for key, (_, request) in zip(keys, self.asked, strict=True) if times[key] > 1]

    def weights(self) -> dict[str, str]:
        """Of every model that is there, by name."""
        return {path.parent.name: path.read_text() for path in sorted(self.store.folder.glob("models/*/weights"))}

    def table(self, iteration: int, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.store.iteration(iteration) / f"{name}.parquet").to_pylist()
        return rows


def plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what depends on the machine, or on how often the run was started."""
    left_out = ("seconds", "stage_seconds", "steps_replayed", "learner", "published")
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def sections(defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes of a config over defaults, section by section."""
    whole = {name: of for name, of in defaults.items() if isinstance(of, dict)}
    return {**defaults, **changes, **{name: {**of, **changes.get(name, {})} for name, of in whole.items()}}
