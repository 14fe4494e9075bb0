"""`rsrlm data`: IFT and EFT examples from ranked data, judgements that are right by construction, and prompts that a
model makes."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from rsrlm.chat import ChatEncoder
from rsrlm.commands.engines import loaded, on_engines, started, work_folder, write_lines
from rsrlm.config import Config
from rsrlm.data import prompts as prompt_files
from rsrlm.data import ranked, seed_data, self_instruct
from rsrlm.engines import SAMPLE_PRIORITY, Engines
from rsrlm.judges import templates
from rsrlm.judges.base import context_of, judge_of, sampling_of
from rsrlm.recipes.eft import accepted, check_judge, judge_replies, points_of, replies_in
from rsrlm.recipes.self_taught import SelfTaught
from rsrlm.recipes.sft import NoExamples
from rsrlm.records import Example, Judgement, Request, Task
from rsrlm.report.progress import Report
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.settings.base import ConfigError
from rsrlm.settings.data import Data


def parts_of(config: Config) -> seed_data.Parts:
    if config.data.trees is None:
        raise ConfigError("data.trees: missing; give ranked data with data.trees=PATH, such as Open Assistant's trees")
    return seed_data.divide(config.data)


def enough(kept: int, data: Data, counts: Mapping[str, int], report: Report) -> None:
    """Say what was read and dropped. Raises NoExamples."""
    for reason, number in counts.items():
        report.line(f"  {number:>8}  {reason}")
    if kept < data.minimum:
        raise NoExamples(f"{kept} examples are fewer than data.minimum={data.minimum}; add data, or lower it")


def data_ift(config: Config, out: Path, report: Report) -> None:
    """Questions with their best reply, as JSONL."""
    parts = parts_of(config)
    chosen, counts = ranked.ift_examples(parts.ift)
    chosen = sorted(chosen, key=lambda pair: pair[0].id)[: config.data.max_ift]
    rows = [
        {"id": f"ift-{reply.id}", "prompt": prompt.text, "target": reply.text, "tree": prompt.id}
        for prompt, reply in chosen
    ]
    enough(len(rows), config.data, {**parts.counts, **counts}, report)
    write_lines(out, rows)
    report.line(f"{len(rows)} IFT examples: {out}")


def data_eft(config: Config, out: Path, report: Report) -> None:
    """Judgements that agree with people, by the config's model and judge, as JSONL."""
    if not config.judge.in_words:
        raise ConfigError(f"judge.kind={config.judge.kind}: EFT targets are written judgements; use text or structured")
    parts = parts_of(config)
    config, drawn = started(config, work_folder(out))
    folder, encoder = loaded(config.model, drawn)
    other, judge_encoder = setup.judge_of(config, encoder)
    judge = judge_of(config.judge, context_of(config, judge_encoder))
    check_judge(judge.source)
    each, replies = config.data.eft_judgements, replies_in(parts.eft)

    async def work(run: Run) -> dict[str, list[Judgement]]:
        with run.stage("EFT", {"judge": replies * each}):
            return await judge_replies(parts.eft, judge, await run.load(run.first), 0, each)

    report.line(f"{replies} replies of {len(parts.eft)} prompts, {each} judgements each")
    judgements = on_engines(
        config, work_folder(out), {config.model.path: folder}, work, report, drawn=drawn, judge=other
    )
    found, counts = accepted(parts.eft, judgements, config.data, config.seed)
    enough(len(found), config.data, {**parts.counts, **counts}, report)
    write_lines(
        out,
        [
            {
                "id": one.judgement.id,
                "instruction": one.prompt.text,
                "response": one.reply.text,
                "target": one.judgement.text,
                "score": points_of(one.judgement),
                "tree": one.prompt.id,
            }
            for one in found
        ],
    )
    report.line(f"{len(found)} EFT examples: {out}")


def data_judgements(config: Config, out: Path, report: Report) -> None:
    """Right judgements of two answers of which one is bad by construction, by the config's model, as JSONL."""
    steps = [step for step in config.planned if issubclass(step.recipe, SelfTaught)]
    if not steps:
        raise ConfigError(f"recipe={config.recipe}: no step makes such judgements; set recipe=self_taught")
    known, _ = prompt_files.distinct(prompt_files.read(prompt_files.file_of(config.prompts)))
    config, drawn = started(config, work_folder(out))
    folder, encoder = loaded(config.model, drawn)
    context = context_of(config, encoder)
    recipe = SelfTaught(steps[0].config, context, context)
    templates.check_data(recipe.asks, known, f"prompts.path={config.prompts.path}")
    lengths = {prompt.id: len(context.asked(prompt.text)) - len(context.asked("")) for prompt in known}
    prompts, long = prompt_files.usable(known, lengths, recipe.needs(), config)
    tasks = [Task(iteration=0, prompt=prompt) for prompt in prompts]

    async def work(run: Run) -> tuple[list[dict[str, Any]], Mapping[str, Any], Mapping[str, int]]:
        batch = recipe.items(0, await run.groups(await run.load(run.first), recipe, tasks))
        by_id = {one.id: (group, one) for group in batch.groups for one in group.comparisons}
        rows = [recipe.row(*by_id[example.id]) for example in batch.items if isinstance(example, Example)]
        run.finished(0)
        return rows, batch.measures["taught"], batch.dropped

    rows, taught, dropped = on_engines(config, work_folder(out), {config.model.path: folder}, work, report, drawn=drawn)
    for what in ("right_shown_first", "right_shown_second"):
        report.line(f"{what}: {taught[what]}")
    enough(len(rows), config.data, {"prompts too long": len(long), **dropped}, report)
    write_lines(out, rows)
    report.line(f"{len(rows)} judgements: {out}")


def data_prompts(config: Config, number: int, out: Path, report: Report) -> None:
    """New prompts in the manner of Self-Instruct, as a prompt file that says where each one came from."""
    rule = config.self_instruct
    known, repeated = prompt_files.distinct(prompt_files.read(prompt_files.file_of(config.prompts)))
    if repeated:
        report.line(f"{len(repeated)} prompts are repeats of another's wording and left out: {', '.join(repeated[:5])}")
    config, drawn = started(config, work_folder(out))
    folder, encoder = loaded(config.model, drawn)
    texts = {prompt.id: prompt.text for prompt in known}
    # Too few seeds: before anything starts.
    self_instruct.demonstrations(
        list(texts), [], seed=0, batch=0, from_seeds=rule.from_seeds, from_generated=rule.from_generated
    )

    async def work(run: Run) -> self_instruct.NewPrompts:
        complete = _continuing(config, await run.load(run.first), encoder)
        with report.stage("prompts", {"kept": number}) as tick:
            return await self_instruct.make_prompts(
                complete, texts, number, rule, seed=config.seed, model=config.model.path,
                count=lambda new: tick("kept", new, 0),
            )  # fmt: skip

    made = on_engines(config, work_folder(out), {config.model.path: folder}, work, report, drawn=drawn)
    rows = [prompt.row for prompt in made.prompts[:number]]
    for reason, count in sorted(made.reasons.items()):
        report.line(f"  {count:>8}  {reason}")
    if not rows:
        raise NoExamples(f"no prompt in {made.requests} requests passed the filters; try a larger model")
    write_lines(out, rows)
    report.line(f"{len(rows)} prompts from {made.requests} requests: {out}")
    if len(rows) < number:
        report.line(
            f"fewer than the {number} asked for: {self_instruct.GIVE_UP_AFTER} rounds in a row gave nothing new"
        )


def _continuing(
    config: Config, engines: Engines, encoder: ChatEncoder
) -> Callable[[int, str], Awaitable[tuple[str, bool]]]:
    """Asks the model to continue a text outside any chat: what it writes, and whether the length limit cut it."""
    rule = config.self_instruct
    room = config.engine.max_model_len - rule.max_tokens

    async def complete(request: int, text: str) -> tuple[str, bool]:
        tokens = encoder.bare(text)
        if len(tokens) > room:
            raise ConfigError(
                f"the demonstrations of request {request} take {len(tokens)} tokens, engine.max_model_len="
                f"{config.engine.max_model_len} leaves {room} beside self_instruct.max_tokens; raise the first, "
                "lower the second, or leave long prompts out of prompts.path"
            )
        seed = context_of(config, encoder).seed_of(0, str(request), "prompter", "0")
        completion = await engines.complete(
            Request(
                id=f"prompts/{request}",
                prompt_token_ids=tokens,
                sampling=sampling_of(rule, seed),
                priority=SAMPLE_PRIORITY,
                role="prompter",
            )
        )
        return completion.text, completion.finish_reason == "length"

    return complete
