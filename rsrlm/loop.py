"""The iterative clock: M_t answers, judges and pairs; its pairs train M_{t+1}; the weights go back to the engines.

Every stage takes up what an earlier attempt at the same iteration has finished, so that a resumed run and an
undisturbed one go through the same code. An iteration is finished when its metrics.json is there.
"""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

from rsrlm.chat import ChatEncoder
from rsrlm.config import Config
from rsrlm.evaluate import Evaluation, lengths, mean_score
from rsrlm.produce import Engines, Judging, Producer, mean_verdicts
from rsrlm.progress import Report
from rsrlm.records import Group, PreferencePair, Prompt, Scored, Unparsed
from rsrlm.store import RunFolder

CACHE_COUNTERS = ("prefix_cache_queries", "prefix_cache_hits")


class NoPairs(Exception):
    """An iteration whose groups gave no preference pair: nothing to train on."""


class Pools(Protocol):
    """The engines of a run and the weights they hold."""

    @property
    def samplers(self) -> Engines: ...

    @property
    def judges(self) -> Engines: ...

    async def hold(self, version: str, files: Any = None) -> dict[str, Any]:
        """Every engine holds this model (M0, M1, ...) when it returns. `files` are fresh ones, else the export's."""
        ...

    async def stats(self) -> dict[str, float]: ...


class Buffer(Protocol):
    async def call(self, method: str, *arguments: Any) -> Any: ...


class Learner(Protocol):
    def train(
        self, iteration: int, source: str, version: str, pairs: Sequence[PreferencePair]
    ) -> AsyncIterator[dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True)
class Ports:
    """What the loop is run over."""

    pools: Pools
    buffer: Buffer
    learner: Learner
    store: RunFolder
    report: Report
    log: Callable[[dict[str, Any]], None]  # metrics of a finished iteration, for a tracker


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known before anything starts."""

    encoder: ChatEncoder
    judging: Judging
    heldout: Sequence[Prompt]
    hands: Sequence[Sequence[Prompt]]  # prompts of each iteration


@dataclass
class Clock:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 3)


async def run(config: Config, inputs: Inputs, ports: Ports) -> list[dict[str, Any]]:
    """All iterations that are not finished yet; returns the metrics of all. Raises NoPairs."""
    evaluation = Evaluation(config, inputs.encoder, inputs.judging, inputs.heldout)
    rows = ports.store.metrics()
    for iteration in range(len(rows), config.iterations):
        clock = Clock()
        started = time.perf_counter()
        if iteration == 0:
            with clock("evaluate first model"):
                await evaluate(evaluation, 0, config, ports)
        with clock("produce"):
            groups, cache = await produce(iteration, config, inputs, ports)
        pairs = await ports.buffer.call("pairs", iteration, config.seed)
        ports.store.write_records(iteration, *records_of(groups), pairs)
        if not pairs:
            raise NoPairs(f"iteration {iteration} has no pairs: {dict(Counter(g.no_pair_reason for g in groups))}")
        with clock("train"):
            trained = await train(iteration, config, pairs, ports)
        with clock("publish"):
            published = await ports.pools.hold(f"M{iteration + 1}", trained.pop("files", None))
        with clock("evaluate"):
            heldout = await evaluate(evaluation, iteration + 1, config, ports)
        row = {
            **summary_of(iteration, groups, pairs),
            **trained,
            "weight_version": f"M{iteration + 1}",
            "seconds": round(time.perf_counter() - started, 3),
            "stage_seconds": clock.seconds,
            "prefix_cache_hit_share": cache,
            "published": published,
            "heldout": heldout,
        }
        ports.store.write_metrics(iteration, row)
        ports.store.event("iteration_finished", iteration=iteration)
        ports.log(row)
        rows.append(row)
    return rows


async def produce(iteration: int, config: Config, inputs: Inputs, ports: Ports) -> tuple[list[Group], float | None]:
    """The iteration's groups, each in the buffer; and the share of prompt tokens that the prefix cache held."""
    prompts = inputs.hands[iteration]
    responses = len(prompts) * config.sample.responses
    store = ports.store
    await ports.pools.hold(f"M{iteration}")
    before = await ports.pools.stats()
    journal = store.journal(iteration)
    known = len(journal.responses) + len(journal.judgements)
    if known:
        ports.report.line(
            f"iteration {iteration}: {len(journal.responses)} responses and {len(journal.judgements)} judgements "
            "are done already"
        )

    async def put(group: Group) -> None:
        await ports.buffer.call("put", group.id, iteration, group.pair, group.no_pair_reason)
        store.event(
            "group", g=group.id, pair=group.pair.id if group.pair else None, reason=group.no_pair_reason or None
        )

    totals = {"respond": responses, "judge": responses * inputs.judging.per_response}
    try:
        with ports.report.stage(f"iteration {iteration}", totals) as tick:
            producer = Producer(
                config,
                inputs.encoder,
                ports.pools.samplers,
                ports.pools.judges,
                inputs.judging,
                journal,
                iteration,
                tick,
            )
            groups = await producer.all(prompts, put)
    finally:
        journal.close()
    after = await ports.pools.stats()
    queries, hits = (after.get(name, 0.0) - before.get(name, 0.0) for name in CACHE_COUNTERS)
    # A replaced engine counts from 0 again: then the share is not known.
    return groups, round(hits / queries, 4) if queries > 0 and 0 <= hits <= queries else None


async def train(iteration: int, config: Config, pairs: Sequence[PreferencePair], ports: Ports) -> dict[str, Any]:
    """Train M_{t+1} on the pairs, or take the result of an earlier attempt that got so far."""
    store = ports.store
    finished = store.iteration(iteration) / "training.json"
    if finished.exists():
        return json.loads(finished.read_text(encoding="utf-8"))
    log = store.steps(iteration)
    files = None
    done: dict[str, Any] = {}
    replayed = 0
    ports.report.line(f"iteration {iteration}: training M{iteration + 1} on {len(pairs)} pairs")
    total = -(-len(pairs) // config.train.pairs_per_step) * config.train.epochs
    per_rank = -(-len(pairs) // config.train.workers)
    rounds = -(-per_rank // config.train.micro_batch)
    with ports.report.stage(f"iteration {iteration}", {"reference": rounds, "steps": total}) as tick:
        async for event in ports.learner.train(iteration, f"M{iteration}", f"M{iteration + 1}", pairs):
            if event["event"] == "reference":
                tick("reference", 1, 0)
            elif event["event"] == "resumed":
                lost = [row for row in log.rows if row["step"] >= event["step"]]
                known = {row["step"] for row in log.rows}
                for row in (row for row in event["rows"] if row["step"] not in known):
                    await ports.buffer.call("mark_trained", row["pair_ids"], row["step"])
                    log.add(row)
                if event["step"]:
                    tick("reference", rounds, 0)
                    tick("steps", event["step"], 0)
                if lost:
                    replayed += len(lost)
                    ports.report.line(f"replaying {len(lost)} optimizer steps after the last checkpoint")
                    await ports.buffer.call("forget_trained_from", iteration, event["step"])
                    store.event("replay", iteration=iteration, steps=len(lost), after=event["step"])
                log.keep_before(event["step"])
            elif event["event"] == "step":
                row = event["row"]
                await ports.buffer.call("mark_trained", row["pair_ids"], row["step"])
                log.add(row)
                store.event("step", iteration=iteration, step=row["step"], loss=row["loss"], pairs=row["pair_ids"])
                tick("steps", 1, int(row["tokens"]))
            elif event["event"] == "done":
                files = event["files"]
                done = {key: round(event[key], 3) for key in ("train_seconds", "write_seconds", "export_seconds")}
    rows = log.rows
    trained = {
        "pairs_trained": len({pair for row in rows for pair in row["pair_ids"]}),
        "optimizer_steps": len(rows),
        "steps_replayed": replayed,
        "dpo_loss_first": rows[0]["dpo_loss"],
        "dpo_loss_last": rows[-1]["dpo_loss"],
        "accuracy_last": rows[-1]["accuracy"],
        "margin_last": rows[-1]["margin"],
        "learner": {**done, "memory_gib": max(row["memory_gib"] for row in rows)},
    }
    store.write_json(finished, trained)
    store.drop_checkpoints()  # the next iteration starts from the exported model
    return {**trained, "files": files}


async def evaluate(evaluation: Evaluation, index: int, config: Config, ports: Ports) -> dict[str, Any]:
    """M{index} on the held-out prompts: its own judgement, the frozen M0's, and a duel with the model before it."""
    if not config.prompts.heldout:
        return {}
    model, first, before = f"M{index}", "M0", f"M{index - 1}"
    engines = ports.pools.samplers
    journal = ports.store.evaluation(model)
    try:
        duels = 2 * config.prompts.heldout if index and config.evaluate.duel else 0
        totals = {"answers": config.prompts.heldout, "scores": config.prompts.heldout * config.judge.per_response}
        with ports.report.stage(f"held-out {model}", totals) as tick:
            await ports.pools.hold(model)
            answers = await evaluation.answers(engines, model, journal)
            tick("answers", len(answers), 0)
            own = await evaluation.scores(ports.pools.judges, model, answers, journal)
            tick("scores", totals["scores"], 0)
        found = {
            "model": model,
            "answers": lengths(answers),
            "score_by_current": {"judge": model, **mean_score(answers, own)},
            "score_by_first": {"judge": first, **mean_score(answers, own)},
        }
        if index:
            with ports.report.stage(f"held-out {model} by {first}", {"judgements": len(own) + duels}) as tick:
                await ports.pools.hold(first)
                frozen = await evaluation.scores(ports.pools.judges, first, answers, journal)
                tick("judgements", len(frozen), 0)
                found["score_by_first"] = {"judge": first, **mean_score(answers, frozen)}
                if config.evaluate.duel:
                    earlier = ports.store.evaluation(before)
                    old = sorted(earlier.responses.values(), key=lambda response: response.prompt_id)
                    by_prompt = {response.prompt_id: response for response in old}
                    found[f"duel_with_{before}"] = await evaluation.duel(
                        ports.pools.judges, first, answers, [by_prompt[a.prompt_id] for a in answers], journal
                    )
                    earlier.close()
                    tick("judgements", duels, 0)
    finally:
        journal.close()
    ports.store.event("evaluated", **found)
    if index == 0:
        ports.store.fix("heldout_first", found)
    return found


def records_of(groups: Sequence[Group]) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        [group.prompt for group in groups],
        [response for group in groups for response in group.responses],
        [judgement for group in groups for judgement in group.judgements],
    )


def summary_of(iteration: int, groups: Sequence[Group], pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Counts and means of what was made. `mean_score` is over the responses with a readable score."""
    prompts, responses, judgements = records_of(groups)
    unread = Counter(j.verdict.reason for j in judgements if isinstance(j.verdict, Unparsed))
    points = [v.points for v in mean_verdicts(responses, judgements).values() if isinstance(v, Scored)]
    return {
        "iteration": iteration,
        "prompts": len(prompts),
        "responses": len(responses),
        "responses_cut": sum(not response.complete for response in responses),
        "responses_empty": sum(not response.text.strip() for response in responses),
        "judgements": len(judgements),
        "judgements_unreadable": sum(unread.values()),
        "unreadable_reasons": dict(unread),
        "pairs": len(pairs),
        "no_pair_reasons": dict(Counter(group.no_pair_reason for group in groups if group.no_pair_reason)),
        "mean_score": fmean(points) if points else None,
        "responses_scored": len(points),
        "mean_response_tokens": fmean(len(response.token_ids) for response in responses),
        "mean_margin": fmean(pair.chosen_score - pair.rejected_score for pair in pairs) if pairs else None,
    }
