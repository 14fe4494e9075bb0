"""The iterative clock: M_t makes the items that train M_{t+1}; then the engines hold M_{t+1}.

Nothing here knows a recipe, and every line is durable: a run that is started again passes what is done and goes on. An
iteration is finished when its metrics.json is there.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rsrlm.candidates import Choice, choose, goes_on
from rsrlm.config import Config
from rsrlm.engines import Model
from rsrlm.evaluate import Evaluation, evaluate
from rsrlm.recipes.base import Batch, Item, NoItems, Recipe
from rsrlm.records import PreferencePair, Task
from rsrlm.report import alarms
from rsrlm.report.signs import measure
from rsrlm.report.summary import summary_of
from rsrlm.run import Run
from rsrlm.settings.train import TrainRule
from rsrlm.store.folder import RunFolder
from rsrlm.training import GoesOn, Learner, Training, train

HEEDED = "heeded"  # a note of the last iteration whose signs were looked at


class NoPairs(NoItems):
    """An iteration whose groups gave no preference pair."""


class Stopped(Exception):
    """A sign of trouble is beyond the limit at which the run ends."""


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One iteration as it is planned."""

    name: str  # of the model that it trains
    recipe: Recipe
    tasks: Sequence[Task]

    @property
    def rule(self) -> TrainRule:
        rule: TrainRule = self.recipe.config.train
        return rule


@dataclass(frozen=True, kw_only=True)
class Spine:
    """What the clock is run over."""

    config: Config
    run: Run
    learner: Learner
    store: RunFolder
    heldout: Evaluation
    validation: Evaluation
    endpoints: Callable[[], Mapping[str, Any]]

    async def train(self, training: Training, go_on: GoesOn | None = None) -> dict[str, Any]:
        await self.run.pools.rest()
        return await train(self.learner, self.store, self.run.screen, training, go_on)

    def training(self, **what: Any) -> Training:
        return Training(seed=self.config.seed, workers=self.config.train.workers, **what)

    async def train_aside(
        self, iteration: int, start: Model, items: Sequence[Item], rule: TrainRule, name: str
    ) -> Model:
        """A model within an iteration: what it answers may become items of the iteration."""
        plain = {"candidate_every_steps": None, "choose": "last", "early_stop": False}
        training = self.training(
            iteration=iteration,
            source=start,
            name=name,
            rule=rule.model_copy(update=plain),
            items=items,
            folder=self.store.iteration(iteration) / name,
        )
        trained = await self.train(training)
        return await self.run.pools.model(name, trained.get("files"))


@dataclass
class Stages:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 3)


async def run_iterations(spine: Spine, iterations: Sequence[Iteration]) -> list[dict[str, Any]]:
    """All iterations that are not finished yet; returns the metrics of all. Raises NoItems and Stopped."""
    run, store = spine.run, spine.store
    rows = store.metrics()
    run.names = [run.first.name, *(one.name for one in iterations)]
    heed_last(spine, iterations, rows)
    for number, one in enumerate(iterations[len(rows) :], start=len(rows)):
        clock = Stages()
        run.begin(one.recipe, store.pairs, partial(spine.train_aside, number))
        before = await run.model_at(number)
        if number == 0:
            with clock("evaluate first model"):
                store.fix("heldout_first", await evaluate(run, spine.heldout, before, None, store.write_heldout))
        with clock("produce"):
            batch = await one.recipe.iteration(run, number, before, one.tasks)
            made = await run.aside(keep, store, number, batch, run.prefix_cache_hit_share, one.recipe.trains)
            if one.recipe.trains == "pairs" and not batch.items:
                raise NoPairs(f"iteration {number} has no pairs: {dict(batch.dropped)}")
        trained, files = await train_and_choose(spine, number, one, before, batch.items, clock)
        with clock("publish"):
            after = await run.pools.model(one.name, files)
            published = await run.publish(after)
        with clock("evaluate"):
            heldout = await evaluate(run, spine.heldout, after, before, store.write_heldout)
        found = {**made, **trained, "weight_version": one.name, "published": published, "heldout": heldout}
        await finish(spine, one, number, batch, rows, found, clock)
        heed(spine, one, number, rows[-1]["signs"])
    return rows


async def finish(
    spine: Spine,
    one: Iteration,
    number: int,
    batch: Batch,
    rows: list[dict[str, Any]],
    found: Mapping[str, Any],
    clock: Stages,
) -> None:
    """Add the metrics of an iteration to those before it, `rows`, and write them: with them it is finished."""
    run, store, seen = spine.run, spine.store, bool(batch.groups and batch.items)
    row = {
        "iteration": number,
        **found,
        "seconds": round(time.perf_counter() - clock.started, 3),
        "stage_seconds": clock.seconds,
        "signs": await run.aside(signs_of, number, batch, rows, found["heldout"], one, store) if seen else {},
        **({"endpoints": usage} if (usage := spine.endpoints()) else {}),
    }
    store.write_metrics(number, row)
    store.event("iteration_finished", iteration=number)
    run.finished(number)
    rows.append(row)


async def train_and_choose(
    spine: Spine, number: int, one: Iteration, before: Model, items: Sequence[Item], clock: Stages
) -> tuple[dict[str, Any], Any]:
    """What is said of the training, and the learner's transfer files of the model where it is the last candidate."""
    run, store = spine.run, spine.store
    choice = Choice(config=spine.config, rule=one.rule, evaluation=spine.validation, before=before)
    with clock("train"):
        training = spine.training(
            iteration=number,
            source=before if one.rule.start == "before" else run.first,
            name=one.name,
            rule=one.rule,
            items=items,
            folder=store.iteration(number),
        )
        trained = await spine.train(training, partial(goes_on, run, store, choice, one.name))
    files = trained.pop("files", None)
    if one.rule.choose != "last":
        with clock("choose"):
            trained["choice"] = chosen = await choose(run, store, choice, number, one.name)
        if chosen["chosen"] != one.name:
            run.pools.discard(files)
            files = None
    return trained, files


def keep(store: RunFolder, iteration: int, batch: Batch, cache_share: float | None, trains: str) -> dict[str, Any]:
    """Write the records of an iteration; returns what they come to."""
    pairs = pairs_in(batch, trains)
    store.write_groups(iteration, batch.groups)
    store.write_pairs(iteration, pairs)
    if trains == "examples":
        store.write_examples(iteration, batch.items)  # type: ignore[arg-type]
    reasons = {"no_pair_reasons" if trains == "pairs" else "dropped": dict(batch.dropped)}
    return {
        **summary_of(batch.groups, pairs),
        **reasons,
        "prefix_cache_hit_share": cache_share,
        **batch.measures,
    }


def pairs_in(batch: Batch, trains: str) -> Sequence[PreferencePair]:
    """The items of a recipe that trains on pairs; one that trains on examples has none."""
    return batch.items if trains == "pairs" else ()  # type: ignore[return-value]


def signs_of(
    iteration: int,
    batch: Batch,
    earlier: Sequence[dict[str, Any]],
    heldout: Mapping[str, Any],
    one: Iteration,
    store: RunFolder,
) -> dict[str, float | None]:
    """Signs of trouble of a finished iteration, `earlier` being the metrics of those before it and `heldout` what
    `evaluate` found of its model."""
    return measure(
        batch.groups,
        pairs_in(batch, one.recipe.trains),
        store.steps(iteration).rows,
        earlier=[row["signs"] for row in earlier if row.get("signs")],
        kl_to_first=heldout.get("kl_to_first", {}).get("per_token"),
        form=one.recipe.judge.form,
    )


def heed(spine: Spine, one: Iteration, number: int, found: Mapping[str, float | None], warn: bool = True) -> None:
    """Say which signs of a finished iteration are beyond their limits; without `warn`, only those that end the run.
    Raises Stopped for one."""
    run, limits = spine.run, alarms.limits_of(spine.config, one.recipe.scale)
    raised = [alarm for alarm in alarms.check(found, limits) if warn or alarm.action == "stop"] if found else []
    for alarm in raised:
        run.say(f"iteration {number}: {alarm.message}")
        run.event("alarm", iteration=number, sign=alarm.sign, value=alarm.value, action=alarm.action)
    spine.store.write_note(HEEDED, {"iteration": number})
    if stops := [alarm.message for alarm in raised if alarm.action == "stop"]:
        raise Stopped(f"after iteration {number}: {stops[0]}")


def heed_last(spine: Spine, iterations: Sequence[Iteration], rows: Sequence[Mapping[str, Any]]) -> None:
    """The same of the last finished iteration, where a kill came before it. Raises Stopped."""
    last = len(rows) - 1
    if rows and spine.store.note(HEEDED).get("iteration") != last:
        heed(spine, iterations[last], last, rows[last]["signs"])
