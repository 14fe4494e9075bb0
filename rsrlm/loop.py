"""The iterative clock: M_t answers, judges and pairs; its pairs train M_{t+1}; the weights go back to the engines.

Every stage takes up what an earlier attempt at the same iteration has finished, so that a resumed run and an
undisturbed one go through the same code. An iteration is finished when its metrics.json is there.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rsrlm import seeds
from rsrlm.ask import Comparing, Engines, Judging
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config, Train
from rsrlm.evaluate import (
    Evaluation,
    gain_of_duels,
    gain_of_scores,
    is_better,
    kl_per_token,
    lengths,
    mean_score,
    named,
    validates,
)
from rsrlm.meta_judging import most_comparisons, result
from rsrlm.produce import Producer, judge_pairs, mean_verdicts
from rsrlm.records import Example, Group, Judgement, PreferencePair, Prompt, Response, Scored, Unparsed
from rsrlm.report import metrics
from rsrlm.report import signs as watch
from rsrlm.report.progress import Report
from rsrlm.seeds import Parts, TrainedOn
from rsrlm.store.folder import Journal, RunFolder

DONE_SECONDS = ("train_seconds", "decide_seconds", "write_seconds", "export_seconds")
CACHE_COUNTERS = ("prefix_cache_queries", "prefix_cache_hits")


class NoPairs(Exception):
    """An iteration whose groups gave no preference pair: nothing to train on."""


class Stopped(Exception):
    """A sign of trouble is beyond the limit at which the run ends."""


class Pools(Protocol):
    """The engines of a run and the weights they hold."""

    @property
    def samplers(self) -> Engines: ...

    @property
    def judges(self) -> Engines: ...

    @property
    def validators(self) -> Engines:
        """Who judges held-out answers and candidates: the judges unless the config names another validator."""
        ...

    def folder(self, version: str) -> Path:
        """Of a model by its name."""
        ...

    async def hold(self, version: str, files: Any = None) -> dict[str, Any]:
        """Every engine holds this model (M0, M1, ...) when it returns. `files` are fresh ones, else the export's."""
        ...

    async def stats(self) -> dict[str, float]: ...

    def endpoint_usage(self) -> dict[str, dict[str, float]]:
        """What judges behind an API have cost so far, by what they are for; empty without one."""
        ...

    def forget(self, version: str, files: Any = None) -> None:
        """The folder of this model holds other weights now; `files` of the former ones are removed."""
        ...


class Buffer(Protocol):
    async def call(self, method: str, *arguments: Any) -> Any: ...


class Learner(Protocol):
    def train(
        self,
        iteration: int,
        source: str,
        version: str,
        train: Train,
        items: Sequence[PreferencePair] | Sequence[Example],
    ) -> AsyncIterator[dict[str, Any]]: ...

    async def decide(self, step: int, go_on: bool) -> None:
        """Whether the training that waits behind its candidate of this step goes on."""
        ...


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
class Step:
    """One iteration as it is planned: its own config, judges and prompts."""

    config: Config
    model: str  # name of the model that it trains
    judging: Judging
    meta: Comparing | None
    prompts: Sequence[Prompt]
    files: Mapping[str, Sequence[Example]]  # examples of each source that is a file


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known before anything starts."""

    encoder: ChatEncoder
    judging: Judging  # of held-out answers: the same in all iterations
    validating: Judging  # by who validates
    heldout: Sequence[Prompt]
    validation: Sequence[Prompt]  # what candidates are chosen by
    steps: Sequence[Step]
    parts: Parts | None  # of the ranked data
    trained_on: TrainedOn


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
    """All iterations that are not finished yet; returns the metrics of all. Raises NoPairs, NoExamples and Stopped."""
    evaluation, choosing = (
        Evaluation(config, inputs.encoder, inputs.judging, prompts, inputs.validating)
        for prompts in (inputs.heldout, inputs.validation)
    )
    rows = ports.store.metrics()
    for iteration in range(len(rows), config.iterations):
        step, before = inputs.steps[iteration], config.model_name(iteration)
        clock = Clock()
        started = time.perf_counter()
        if iteration == 0:
            with clock("evaluate first model"):
                await evaluate(evaluation, before, None, config, ports)
        with clock("produce"):
            items, groups, made = await collect(iteration, before, step, inputs, ports)
        with clock("train"):
            trained = await train(choosing, iteration, before, step, items, ports)
        if step.config.train.choose != "last":
            with clock("choose"):
                trained |= await choose(choosing, iteration, before, step, trained, ports)
        with clock("publish"):
            published = await ports.pools.hold(step.model, trained.pop("files", None))
        with clock("evaluate"):
            heldout = await evaluate(evaluation, step.model, before, config, ports)
        row = {
            "iteration": iteration,
            **made,
            **trained,
            "weight_version": step.model,
            "seconds": round(time.perf_counter() - started, 3),
            "stage_seconds": clock.seconds,
            "published": published,
            "heldout": heldout,
            "signs": signs_of(iteration, groups, items, rows, heldout, step, ports.store) if groups else {},
            **({"endpoints": usage} if (usage := ports.pools.endpoint_usage()) else {}),
        }
        ports.store.write_metrics(iteration, row)
        ports.store.event("iteration_finished", iteration=iteration)
        ports.log(row)
        rows.append(row)
        heed(iteration, row["signs"], watch.limits_of(step.config, step.judging.form.scale), ports)
    return rows


def signs_of(
    iteration: int,
    groups: Sequence[Group],
    items: Sequence[PreferencePair] | Sequence[Example],
    earlier: Sequence[dict[str, Any]],
    heldout: Mapping[str, Any],
    step: Step,
    store: RunFolder,
) -> dict[str, float | None]:
    """Signs of trouble of a finished iteration, `earlier` being the metrics of those before it and `heldout` what
    `evaluate` found of its model."""
    _, responses, judgements, _ = records_of(groups)
    return watch.signs(
        groups,
        mean_verdicts(responses, judgements),
        [item for item in items if isinstance(item, PreferencePair)],
        store.steps(iteration).rows,
        comparisons=watch.comparisons_of(groups),
        earlier=[row["signs"] for row in earlier if row.get("signs")],
        kl_to_first=heldout.get("kl_to_first", {}).get("per_token"),
        form=step.judging.form,
    )


def heed(iteration: int, signs: Mapping[str, float | None], limits: Mapping[str, watch.Limit], ports: Ports) -> None:
    """Say which signs are beyond their limits. Raises Stopped where one is beyond that at which the run ends."""
    raised = watch.alarms(signs, limits) if signs else []
    for alarm in raised:
        ports.report.line(f"iteration {iteration}: {alarm.message}")
        ports.store.event("alarm", iteration=iteration, sign=alarm.sign, value=alarm.value, action=alarm.action)
    if stops := [alarm.message for alarm in raised if alarm.action == "stop"]:
        raise Stopped(f"after iteration {iteration}: {stops[0]}")


async def collect(
    iteration: int, before: str, step: Step, inputs: Inputs, ports: Ports
) -> tuple[Sequence[PreferencePair] | Sequence[Example], list[Group], dict[str, Any]]:
    """What the iteration trains on, in training order; the groups that it comes from, and the metrics of how it was
    made. Everything is on disk."""
    config, store = step.config, ports.store
    await ports.pools.hold(before)
    groups: list[Group] = []
    cache = None
    if step.prompts:
        groups, cache = await produce(iteration, step, inputs, ports)
    if config.train.method == "sft":
        examples, counts = await targets(iteration, step, groups, inputs, ports)
        store.write_records(iteration, *records_of(groups), [])
        store.write_examples(iteration, examples)
        return examples, groups, {**summary_of(groups, []), "examples": counts, "prefix_cache_hit_share": cache}
    reasons = Counter(group.no_pair_reason for group in groups if group.no_pair_reason)
    meta: dict[str, Any] = {}
    if "judge" in config.pair.kinds:
        # Thousands of fits: in a thread, so that an interruption is heard meanwhile.
        found, weights = await asyncio.to_thread(judge_pairs, groups, step.judging, config)
        for key, pair in found.items():
            reason = pair if isinstance(pair, str) else ""
            await put(ports, key, iteration, None if isinstance(pair, str) else pair, reason)
            store.event("judge_pair", g=key, pair=None if isinstance(pair, str) else pair.id, reason=reason or None)
        reasons += Counter(f"judge: {pair}" for pair in found.values() if isinstance(pair, str))
        meta = {
            "weights": config.meta.weights,
            "position_weights": {"first": weights.first, "second": weights.second},  # of the iteration's totals
            **comparing_of(groups),
        }
    pairs: list[PreferencePair] = await ports.buffer.call("pairs", iteration, config.seed)
    store.write_records(iteration, *records_of(groups), pairs)
    if not pairs:
        raise NoPairs(f"iteration {iteration} has no pairs: {dict(reasons)}")
    return (
        pairs,
        groups,
        {
            **summary_of(groups, pairs),
            "no_pair_reasons": dict(reasons),
            "prefix_cache_hit_share": cache,
            **({"meta": meta} if meta else {}),
        },
    )


async def put(ports: Ports, key: str, iteration: int, pair: PreferencePair | None, reason: str) -> None:
    """Into the buffer; an event tells where it keeps another pair, which was put before records were lost."""
    if await ports.buffer.call("put", key, iteration, pair, reason):
        ports.store.event("pair_kept", g=key, instead_of=pair.id if pair else None)


async def produce(iteration: int, step: Step, inputs: Inputs, ports: Ports) -> tuple[list[Group], float | None]:
    """The iteration's groups, each in the buffer; and the share of prompt tokens that the prefix cache held."""
    config, store = step.config, ports.store
    responses = len(step.prompts) * config.sample.responses
    before = await ports.pools.stats()
    journal = store.journal(iteration)
    known = len(journal.responses) + len(journal.judgements)
    if known:
        ports.report.line(
            f"iteration {iteration}: {len(journal.responses)} responses and {len(journal.judgements)} judgements "
            "are done already"
        )

    async def finished(group: Group) -> None:
        if config.train.method == "dpo":
            await put(ports, group.id, iteration, group.pair, group.no_pair_reason)
        store.event(
            "group", g=group.id, pair=group.pair.id if group.pair else None, reason=group.no_pair_reason or None
        )

    totals = {"respond": responses, "judge": responses * step.judging.per_response}
    if step.meta:
        totals["compare"] = len(step.prompts) * most_comparisons(config)
    try:
        with ports.report.stage(f"iteration {iteration}", totals) as tick:
            producer = Producer(
                config,
                inputs.encoder,
                ports.pools.samplers,
                ports.pools.judges,
                step.judging,
                journal,
                iteration,
                tick,
                step.meta,
            )
            groups = await producer.all(step.prompts, finished)
    finally:
        journal.close()
    after = await ports.pools.stats()
    queries, hits = (after.get(name, 0.0) - before.get(name, 0.0) for name in CACHE_COUNTERS)
    # A replaced engine counts from 0 again: then the share is not known.
    return groups, round(hits / queries, 4) if queries > 0 and 0 <= hits <= queries else None


async def targets(
    iteration: int, step: Step, groups: Sequence[Group], inputs: Inputs, ports: Ports
) -> tuple[list[Example], dict[str, Any]]:
    """The examples of all sources, mixed; and for each source how many there were and what was dropped, and why."""
    config, store = step.config, ports.store
    counts: dict[str, Any] = {}
    sources = []
    for source in config.sft.sources:
        if source.path == "ift":
            assert inputs.parts is not None
            found, counts["ift"] = seeds.ift(inputs.parts.ift, inputs.encoder, config.data)
        elif source.path == "eft":
            assert inputs.parts is not None
            found, counts["eft"] = await judged_replies(iteration, step, inputs.parts, ports)
        elif source.path == "positive":
            found = seeds.positive(groups, config.sft.positive_score)
            counts["positive"] = {"responses": sum(len(group.responses) for group in groups)}
        else:
            found = list(step.files[source.path])
            counts[source.path] = {}
        fitting = seeds.fitting(found, config.engine.max_model_len)
        counts[source.path] |= {"longer than engine.max_model_len": len(found) - len(fitting), "used": len(fitting)}
        ports.report.line(f"iteration {iteration}: source {source.path}: {counts[source.path]}")
        sources.append((source.path, source.weight, fitting))
    store.event("examples", iteration=iteration, sources=counts)
    return seeds.mixed(sources, config, iteration), counts


async def judged_replies(
    iteration: int, step: Step, parts: Parts, ports: Ports
) -> tuple[list[Example], dict[str, int]]:
    """EFT: people's replies, judged by the model that the engines hold; judgements that agree with people."""
    config = step.config
    journal = ports.store.journal(iteration)
    replies = sum(reply.rank is not None for prompt in parts.eft for reply in prompt.replies)
    try:
        with ports.report.stage(f"iteration {iteration}", {"judge": replies * config.data.eft_judgements}) as tick:
            judgements = await seeds.judge_replies(
                parts.eft, step.judging, ports.pools.judges, journal, iteration, config.data.eft_judgements, tick
            )
    finally:
        journal.close()
    found, counts = seeds.accepted(parts.eft, judgements, config.data, config.seed)
    return seeds.eft(found, step.judging, iteration), counts


async def train(
    choosing: Evaluation,
    iteration: int,
    before: str,
    step: Step,
    items: Sequence[PreferencePair] | Sequence[Example],
    ports: Ports,
) -> dict[str, Any]:
    """Train the next model on the items, or take the result of an earlier attempt that got so far."""
    store, rule = ports.store, step.config.train
    finished = store.iteration(iteration) / "training.json"
    if finished.exists():
        return json.loads(finished.read_text(encoding="utf-8"))
    log = store.steps(iteration)
    files = None
    done: dict[str, Any] = {}
    replayed = 0
    pairs = rule.method == "dpo"
    what = "pairs" if pairs else "examples"
    ports.report.line(f"iteration {iteration}: training {step.model} on {len(items)} {what}")
    per_rank = -(-len(items) // rule.workers)
    rounds = -(-per_rank // rule.micro_batch) if pairs else 0
    source = starts_from(rule, before)

    async def mark(row: dict[str, Any]) -> None:
        if pairs:
            await ports.buffer.call("mark_trained", row["pair_ids"], row["step"])

    with ports.report.stage(
        f"iteration {iteration}", {**({"reference": rounds} if pairs else {}), "steps": rule.steps(len(items))}
    ) as tick:
        async for event in ports.learner.train(iteration, source, step.model, rule, items):
            if event["event"] == "reference":
                tick("reference", 1, 0)
            elif event["event"] == "resumed":
                lost = [row for row in log.rows if row["step"] >= event["step"]]
                known = {row["step"] for row in log.rows}
                for row in (row for row in event["rows"] if row["step"] not in known):
                    await mark(row)
                    log.add(row)
                if event["step"]:
                    if pairs:
                        tick("reference", rounds, 0)
                    tick("steps", event["step"], 0)
                if lost:
                    replayed += len(lost)
                    ports.report.line(f"replaying {len(lost)} optimizer steps after the last checkpoint")
                    if pairs:
                        await ports.buffer.call("forget_trained_from", iteration, event["step"])
                    store.event("replay", iteration=iteration, steps=len(lost), after=event["step"])
                log.keep_before(event["step"])
            elif event["event"] == "step":
                row = event["row"]
                await mark(row)
                log.add(row)
                store.event("step", iteration=iteration, step=row["step"], loss=row["loss"], pairs=row["pair_ids"])
                tick("steps", 1, int(row["tokens"]))
            elif event["event"] == "candidate" and rule.early_stop:
                better = await goes_on(choosing, iteration, before, step, event["step"], ports)
                await ports.learner.decide(event["step"], better)
            elif event["event"] == "done":
                files = event["files"]
                done = {key: round(event[key], 3) for key in DONE_SECONDS}
    trained = {
        **steps_of(log.rows, "dpo_loss" if pairs else "sft_loss"),
        "steps_replayed": replayed,
        "learner": {**done, "memory_gib": max(row["memory_gib"] for row in log.rows)},
    }
    store.write_json(finished, trained)
    store.drop_checkpoints()  # the next iteration starts from the exported model
    return {**trained, "files": files}


def starts_from(rule: Train, before: str) -> str:
    """The model that an iteration's training starts from."""
    return before if rule.start == "before" else "M0"


def steps_of(rows: Sequence[dict[str, Any]], loss: str) -> dict[str, Any]:
    """What the optimizer steps of an iteration come to. `loss` names the key of the loss without additional terms."""
    first, last = rows[0], rows[-1]
    found = {
        f"{'pairs' if loss == 'dpo_loss' else 'examples'}_trained": len(
            {one for row in rows for one in row["pair_ids"]}
        ),
        "optimizer_steps": len(rows),
        f"{loss}_first": first[loss],
        f"{loss}_last": last[loss],
    }
    if loss == "dpo_loss":
        found |= {"accuracy_last": last["accuracy"], "margin_last": last["margin"]}
        for kind in ("actor", "judge"):
            of_kind = [row for row in rows if f"{kind}/margin" in row]
            if of_kind:
                found |= {f"{kind}_{name}_last": of_kind[-1][f"{kind}/{name}"] for name in ("accuracy", "margin")}
    return found


async def choose(
    choosing: Evaluation, iteration: int, before: str, step: Step, trained: dict[str, Any], ports: Ports
) -> dict[str, Any]:
    """Make one of the iteration's candidates its model, or keep the model before."""
    store = ports.store
    finished = store.iteration(iteration) / "chosen.json"
    if not finished.exists():
        names = store.candidates(step.model)
        best, found = await best_of(names, choosing, iteration, before, step, ports)
        store.write_json(finished, {"candidates": names, "found": found, "chosen": best})
        ports.report.line(f"iteration {iteration}: {best} of {', '.join([before, *names])} becomes {step.model}")
    chosen = json.loads(finished.read_text(encoding="utf-8"))
    await ports.pools.hold(before)
    if store.take_candidate(step.model, chosen["chosen"], ports.pools.folder(before)):
        ports.pools.forget(step.model, trained.pop("files", None))
    return {"choice": chosen}


async def best_of(
    names: Sequence[str], choosing: Evaluation, iteration: int, before: str, step: Step, ports: Ports
) -> tuple[str, dict[str, Any]]:
    """The best of the model before and the candidates in the order of training; and what each gained on the best
    before it: their answers to the validation prompts decide, and the validator, or else the judge with the weights
    that the iteration started from (2401.10020v3, section 3.1.3).

    One that is not better beyond the interval of its gain is passed over; with early stopping it is the last one that
    is looked at. What is in the journals is not asked again.
    """
    rule, pools = step.config.train, ports.pools
    external = step.config.validator.external
    judge = validates(external) if external else before
    answers: dict[str, list[Response]] = {}
    judged: dict[str, list[Judgement]] = {}

    @contextmanager
    def journal(name: str) -> Iterator[Journal]:
        opened = ports.store.validation(iteration, name)
        try:
            yield opened
        finally:
            opened.close()

    async def answer(name: str) -> None:
        with journal(name) as kept:
            if len(kept.responses) < len(choosing.prompts):
                await pools.hold(name)
            answers[name] = await choosing.answers(pools.samplers, name, kept)

    async def gain(name: str, best: str) -> list[float]:
        if not external:
            await pools.hold(before)
        if rule.choose == "duel":
            with journal(name) as kept:
                return gain_of_duels(
                    await choosing.outcomes(pools.validators, judge, answers[name], answers[best], kept)
                )
        for one in (name, best):
            if one not in judged:
                with journal(one) as kept:
                    judged[one] = await choosing.scores(
                        choosing.validating, pools.validators, judge, answers[one], kept
                    )
        return gain_of_scores(answers[name], judged[name], answers[best], judged[best])

    best, found = before, {}
    # Without early stopping all are looked at, and every engine loads each model once.
    for name in [before] if rule.early_stop else [before, *names]:
        await answer(name)
    for name in names:
        if name not in answers:
            await answer(name)
        figure = metrics.mean_figure(await gain(name, best), seed=step.config.seed)
        found[name] = {"over": best, "by": rule.choose, "judge": named(judge), **figure}
        ports.report.line(f"{name} over {best} by {named(judge)} ({rule.choose}): {shown_gain(figure)}")
        if is_better(figure):
            best = name
        elif rule.early_stop:
            break
    return best, found


def shown_gain(gain: metrics.Figure) -> str:
    """A mean gain with its interval and denominator."""
    if not gain["estimable"]:
        return f"cannot be told apart: {gain['n']} prompts are readable for both, {metrics.MIN_N} are needed"
    return f"gain {gain['value']:.3f} ({gain['low']:.3f} to {gain['high']:.3f}, n={gain['n']})"


async def goes_on(choosing: Evaluation, iteration: int, before: str, step: Step, steps: int, ports: Ports) -> bool:
    """Early stopping: whether the candidate of so many steps is better than those before it and the model before."""
    names = ports.store.candidates(step.model)[:-1]
    names = [name for name in names if int(name.rpartition("@")[2]) <= steps]
    best, _ = await best_of(names, choosing, iteration, before, step, ports)
    if best != names[-1]:
        ports.report.line(f"{names[-1]} is not better than {best}: training ends")
    return best == names[-1]


async def evaluate(
    evaluation: Evaluation, model: str, before: str | None, config: Config, ports: Ports
) -> dict[str, Any]:
    """A model on the held-out prompts: its own judgement, that of the validator or else of the frozen M0, and a duel
    with the model before it."""
    if not config.prompts.heldout:
        return {}
    pools, heldout = ports.pools, config.prompts.heldout
    current = config.judge.external or model
    first = config.validator.external or "M0"
    # The same judgements where the judge of the rewards validates.
    by = validates(first) if config.evaluate.judge.external else first
    journal = ports.store.evaluation(model)
    try:
        duels = 2 * heldout if before and config.evaluate.duel else 0
        with ports.report.stage(
            f"held-out {model}", {"answers": heldout, "scores": heldout * evaluation.judge.per_response}
        ) as tick:
            await pools.hold(model)
            answers = await evaluation.answers(pools.samplers, model, journal)
            tick("answers", len(answers), 0)
            drawn = await evaluation.samples(pools.samplers, model) if before and config.evaluate.kl else []
            own_logprobs = await evaluation.logprobs(pools.samplers, drawn)
            own = await evaluation.scores(evaluation.judge, pools.judges, current, answers, journal)
            tick("scores", len(own), 0)
        found = {
            "model": model,
            "answers": lengths(answers),
            "score_by_current": {"judge": current, **mean_score(answers, own)},
            "score_by_first": {"judge": first, **mean_score(answers, own)},
        }
        if before or by != current:
            scores = heldout * evaluation.validating.per_response
            with ports.report.stage(f"held-out {model} by {first}", {"judgements": scores + duels}) as tick:
                if not config.validator.external:
                    await pools.hold(first)
                frozen = await evaluation.scores(evaluation.validating, pools.validators, by, answers, journal)
                tick("judgements", len(frozen), 0)
                found["score_by_first"] = {"judge": first, **mean_score(answers, frozen)}
                if before and config.evaluate.duel:
                    earlier = ports.store.evaluation(before)
                    by_prompt = {response.prompt_id: response for response in earlier.responses.values()}
                    found[f"duel_with_{before}"] = await evaluation.duel(
                        pools.validators, by, answers, [by_prompt[a.prompt_id] for a in answers], journal
                    )
                    earlier.close()
                    tick("judgements", duels, 0)
        if drawn:
            await pools.hold("M0")
            first_logprobs = await evaluation.logprobs(pools.samplers, drawn)
            found["kl_to_first"] = kl_per_token(own_logprobs, first_logprobs)
    finally:
        journal.close()
    ports.store.event("evaluated", **found)
    if before is None:
        ports.store.fix("heldout_first", found)
    return found


def records_of(groups: Sequence[Group]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    return (
        [group.prompt for group in groups],
        [response for group in groups for response in group.responses],
        [judgement for group in groups for judgement in group.judgements],
        [comparison for group in groups for comparison in group.comparisons],
    )


def summary_of(groups: Sequence[Group], pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Counts and means of what was made. `mean_score` is over the responses with a readable score."""
    prompts, responses, judgements, comparisons = records_of(groups)
    unread = Counter(j.verdict.reason for j in judgements if isinstance(j.verdict, Unparsed))
    points = [v.points for v in mean_verdicts(responses, judgements).values() if isinstance(v, Scored)]
    actor = [pair for pair in pairs if pair.kind == "actor"]
    return {
        "prompts": len(prompts),
        "responses": len(responses),
        "responses_cut": sum(not response.complete for response in responses),
        "responses_empty": sum(not response.text.strip() for response in responses),
        "judgements": len(judgements),
        "judgements_unreadable": sum(unread.values()),
        "unreadable_reasons": dict(unread),
        "comparisons": len(comparisons),
        "pairs": len(pairs),
        "pairs_of_kind": dict(Counter(pair.kind for pair in pairs)),
        "mean_score": fmean(points) if points else None,
        "responses_scored": len(points),
        "mean_response_tokens": fmean(len(response.token_ids) for response in responses) if responses else None,
        "mean_margin": fmean(pair.chosen_score - pair.rejected_score for pair in actor) if actor else None,
    }


def comparing_of(groups: Sequence[Group]) -> dict[str, Any]:
    """How the meta-judge decided: share of decided comparisons that the judgement shown first won, and unreadable."""
    comparisons = [one for group in groups for one in group.comparisons]
    decided = [won for one in comparisons if (won := result(one))]
    return {
        "comparisons_decided": len(decided),
        "comparisons_unreadable": sum(isinstance(one.verdict, Unparsed) for one in comparisons),
        "first_position_wins": decided.count(1) / len(decided) if decided else None,
    }
