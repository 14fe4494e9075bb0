"""The online clock: one long training over rounds of prompts. While the learner trains on a round, the engines answer
the prompts of the next with the weights that they hold; every so many rounds they get the new ones.

A round is an iteration of the run folder, and every line is durable, as in `rsrlm.iterative`. Which weights answer a
round is fixed beforehand, so a run that was killed and goes on has the same answers, pairs and weights.
"""

import asyncio
import shutil
from collections.abc import Sequence
from typing import Any

from rsrlm.config import Config
from rsrlm.evaluate import evaluate
from rsrlm.iterative import Iteration, Spine, Stages, finish, heed, heed_last, keep
from rsrlm.jobs import Course
from rsrlm.recipes.base import Batch
from rsrlm.settings.machine import Clock


def intervals(config: Config, steps: int) -> list[str]:
    """When weights move on this clock, a sentence each; `steps` are the optimizer steps of a round at most."""
    clock = config.clock
    if clock.kind != "online":
        return []
    many, beside = clock.sync_every, "beside the training on the one before it"
    if not clock.lag:
        waits = "when the learner is done with the one before it"
        beside = waits if many == 1 else f"{beside}; the first after new weights, {waits}"
    return [
        "the engines, judges included, get new weights after "
        f"{f'every {many} rounds' if many > 1 else 'each round'} of "
        f"{config.prompts.per_iteration} prompts: {many * steps} optimizer steps at most",
        f"a round is answered by the weights that the engines hold, {beside}",
        "the reference is the first model for the whole run"
        if clock.reference == "first"
        else "the reference is the model that the engines got last",
    ]


async def run_rounds(spine: Spine, rounds: Sequence[Iteration]) -> list[dict[str, Any]]:
    """All rounds that are not finished yet; returns the metrics of all. Raises NoItems and Stopped."""
    run, store, rule = spine.run, spine.store, spine.config.clock
    rows = store.metrics()
    run.names = [run.first.name, *(row["weight_version"] for row in rows)]
    heed_last(spine, rounds, rows)
    if not rows:
        store.fix("heldout_first", await evaluate(run, spine.heldout, run.first, None, store.write_heldout))
    ahead: asyncio.Task[tuple[Batch, dict[str, Any]]] | None = None
    try:
        for number, one in enumerate(rounds[len(rows) :], start=len(rows)):
            clock = Stages()
            with clock("produce"):
                batch, made = await (ahead or produce(spine, rounds, number))
            more = one is not rounds[-1] and rule.answers(number + 1) <= number  # by weights that are there
            ahead = asyncio.create_task(produce(spine, rounds, number + 1)) if more else None
            with clock("train"):
                trained, files = await learn(spine, rounds, number, batch)
            run.names.append(trained["weight_version"])
            if is_synced(rule, rounds, number):
                with clock("wait for answers"):
                    if ahead:
                        await ahead  # weights move between two rounds alone
                with clock("publish"):
                    after = await run.pools.model(trained["weight_version"], files)
                    trained["published"] = await run.publish(after)
            due = (number + 1) % rule.evaluate_every == 0 or one is rounds[-1]  # of what the engines have just got
            with clock("evaluate"):
                heldout: dict[str, Any] = {}
                if due:
                    last = await earlier(spine, number)
                    heldout = await evaluate(run, spine.heldout, after, last, store.write_heldout)
            found = {**made, **trained, "heldout": heldout}
            await finish(spine, one, number, batch, rows, found, clock)
            forget(spine)
            heed(spine, one, number, rows[-1]["signs"], warn=due)
    finally:
        if ahead:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
    store.drop_checkpoints()
    return rows


def is_synced(rule: Clock, rounds: Sequence[Iteration], number: int) -> bool:
    """Whether the engines get the weights after this round."""
    return rule.holds(number + 1) == number + 1 or number + 1 == len(rounds)


async def produce(spine: Spine, rounds: Sequence[Iteration], number: int) -> tuple[Batch, dict[str, Any]]:
    """The pairs of a round, by the weights that the engines hold then."""
    run, one = spine.run, rounds[number]
    actor = await run.model_at(spine.config.clock.answers(number))
    run.begin(one.recipe, spine.store.pairs)
    batch = await one.recipe.iteration(run, number, actor, one.tasks)
    made = await run.aside(keep, spine.store, number, batch, run.prefix_cache_hit_share, one.recipe.trains)
    return batch, {**made, "actor": actor.name}


async def learn(spine: Spine, rounds: Sequence[Iteration], number: int, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Train on the pairs of a round; what is said of it, and the transfer files of the weights, None where
    there was nothing to learn from or the engines get none."""
    run, one, rule = spine.run, rounds[number], spine.config.clock
    before = await run.model_at(number)
    if not batch.items:
        return {"weight_version": before.name, "pairs_trained": 0}, None
    reference = await run.model_at(0 if rule.reference == "first" else rule.holds(number))
    planned = [each.rule.steps(each.recipe.demand(len(each.tasks)).items) for each in rounds]
    training = spine.training(
        iteration=number,
        source=before,
        name=one.name,
        rule=one.rule,
        items=batch.items,
        folder=spine.store.iteration(number),
        course=Course(
            after="" if before.name == run.first.name else before.name,
            step=sum(planned[:number]),
            of=sum(planned),
            reference=str(reference.folder),
            publish=is_synced(rule, rounds, number),
        ),
    )
    trained = await spine.train(training)
    files = trained.pop("files", None)
    return {**trained, "weight_version": one.name}, files


async def earlier(spine: Spine, number: int) -> Any:
    """The model of the evaluation before that of a round."""
    rule = spine.config.clock
    return await spine.run.model_at(number // rule.evaluate_every * rule.evaluate_every)


def forget(spine: Spine) -> None:
    """Remove the optimizers before the last round, and exported models that no round to come starts from, answers with,
    or is compared with."""
    names, rule = spine.run.names, spine.config.clock
    spine.store.drop_checkpoints(but={f"{names[-1]}-end"})
    to_come = len(names) - 1
    kept = {*names[:: rule.evaluate_every], names[rule.answers(to_come)], names[rule.holds(to_come)], names[-1]}
    for name in set(names) - kept:
        shutil.rmtree(spine.store.model(name), ignore_errors=True)
