"""Commands that need engines and no learner: EFT targets, prompts that a model makes, judges against people, duels.

Each writes its answers to a journal beside its result as they come, so that the same command goes on after a kill.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rsrlm import judge_eval, ranked, seeds, self_instruct
from rsrlm import prompts as prompt_files
from rsrlm.ask import SAMPLE_PRIORITY, Judging, duel_judge, gather, sampling_of
from rsrlm.chat import ChatEncoder, check_tokenizer
from rsrlm.config import Config, ConfigError, Data, Model
from rsrlm.files import write_whole
from rsrlm.model import folder_of, load_tokenizer
from rsrlm.progress import Report
from rsrlm.ranked import RankedPrompt
from rsrlm.records import Prompt, Request, seed_of
from rsrlm.runtime import launch
from rsrlm.seeds import NoExamples
from rsrlm.store import Journal, RunFolder

Work = Callable[[launch.Pools], Awaitable[Any]]


def on_engines(config: Config, folder: Path, model: Path, work: Work, judge: Path | None = None) -> Any:
    """Run `work` with engines that hold `model` as M0, and everything down again; notes go to `folder`'s events.

    `judge` is the folder of another model that judges (see `launch.judge_of`).
    """
    # No learner, so nobody who could send over gloo: every engine loads from its folder.
    config = config.model_copy(update={"weights": config.weights.model_copy(update={"transport": "shm"})})
    folder.mkdir(parents=True, exist_ok=True)
    store = RunFolder(folder)

    async def main() -> Any:
        pools = launch.Pools(config, store, model, "M0", None, judge)
        try:
            await pools.start()
            return await work(pools)
        finally:
            await pools.close()

    with launch.ray_cluster(config, store, learner=False):
        return launch.interruptible(main())


def loaded(model: Model) -> tuple[Path, ChatEncoder]:
    """The model's folder and its encoder. Raises ConfigError."""
    folder = folder_of(model)
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    check_tokenizer(tokenizer, model.path)
    return folder, ChatEncoder(tokenizer)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def begun_with(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Note the settings under which answers in `folder` are made. Raises ConfigError where it was begun with others:
    journals of one question are no answers to another."""
    path = folder / f"{name}.settings.json"
    plain = json.loads(json.dumps(settings))
    if path.exists():
        noted = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in {*noted, *plain} if noted.get(key) != plain.get(key))
        if changed:
            raise ConfigError(
                f"{folder} was begun with other settings ({', '.join(changed)}); restore them, remove the folder, or "
                "choose another with --out"
            )
    else:
        write_json(path, plain)


def asked_of(config: Config) -> dict[str, Any]:
    """What answers depend on, apart from their prompts."""
    return {
        "seed": config.seed,
        "model": config.model.model_dump(),
        "judge": config.judge.model_dump(),
        "evaluate": config.evaluate.model_dump(),
        "max_model_len": config.engine.max_model_len,
    }


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\x1f".join(texts).encode(errors="replace")).hexdigest()[:16]


def beside(out: Path) -> Path:
    """The folder of what a command has in hand while it works on `out`."""
    return out.with_name(out.name + ".work")


# -- rsrlm data --------------------------------------------------------------------------------------------------------


def parts_of(config: Config) -> seeds.Parts:
    if config.data.trees is None:
        raise ConfigError("data.trees: missing; give ranked data with data.trees=PATH, such as Open Assistant's trees")
    return seeds.divide(config.data)


def enough(kept: int, data: Data, counts: dict[str, int], report: Report) -> None:
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
        {"id": f"ift/{reply.id}", "prompt": prompt.text, "target": reply.text, "tree": prompt.id}
        for prompt, reply in chosen
    ]
    enough(len(rows), config.data, {**parts.counts, **counts}, report)
    write_lines(out, rows)
    report.line(f"{len(rows)} IFT examples: {out}")


def data_eft(config: Config, out: Path, report: Report) -> None:
    """Judgements that agree with people, by the config's model and judge, as JSONL."""
    if config.judge.read not in ("text", "structured"):
        raise ConfigError(f"judge.read={config.judge.read}: EFT targets are written judgements; use text or structured")
    parts = parts_of(config)
    folder, encoder = loaded(config.model)
    other, judge_encoder = launch.judge_of(config, encoder)
    judge = Judging(config, judge_encoder)
    each = config.data.eft_judgements
    begun_with(
        beside(out),
        "eft",
        {**asked_of(config), "template": digest([judge.source]), "trees": digest(p.id for p in parts.eft)},
    )
    replies = sum(reply.rank is not None for prompt in parts.eft for reply in prompt.replies)
    journal = Journal(beside(out) / "journal.jsonl")

    async def work(pools: launch.Pools) -> Any:
        with report.stage("EFT", {"judge": replies * each}) as tick:
            return await seeds.judge_replies(parts.eft, judge, pools.judges, journal, 0, each, tick)

    report.line(f"{replies} replies of {len(parts.eft)} prompts, {each} judgements each; starting engines")
    try:
        judgements = on_engines(config, beside(out), folder, work, other)
    finally:
        journal.close()
    found, counts = seeds.accepted(parts.eft, judgements, config.data, config.seed)
    enough(len(found), config.data, {**parts.counts, **counts}, report)
    write_lines(
        out,
        [
            {
                "id": one.judgement.id,
                "instruction": one.prompt.text,
                "response": one.reply.text,
                "target": one.judgement.text,
                "score": seeds.points_of(one.judgement),
                "tree": one.prompt.id,
            }
            for one in found
        ],
    )
    report.line(f"{len(found)} EFT examples: {out}")


def data_prompts(config: Config, number: int, out: Path, report: Report) -> None:
    """New prompts in the manner of Self-Instruct, as a prompt file that says where each one came from."""
    rule = config.self_instruct
    known = prompt_files.read(prompt_files.file_of(config.prompts))
    folder, encoder = loaded(config.model)
    tokenizer = encoder.tokenizer
    filters = self_instruct.Filters(min_words=rule.min_words, max_words=rule.max_words)
    work_folder = beside(out)
    work_folder.mkdir(parents=True, exist_ok=True)
    journal = work_folder / "continuations.jsonl"
    settings = {
        "seed": config.seed,
        "model": config.model.path,
        **rule.model_dump(),
        "prompts.path": digest(p.text for p in known),
    }
    begun_with(work_folder, "prompts", settings)
    done = _continuations(journal)
    texts = {prompt.id: prompt.text for prompt in known}

    async def work(pools: launch.Pools) -> Any:
        pool = self_instruct.Pool(texts.values(), max_rouge=rule.max_rouge)
        kept: list[self_instruct.GeneratedPrompt] = []
        reasons: Counter[str] = Counter()

        async def one(request: int, generated: Sequence[str]) -> self_instruct.Continuation:
            if request in done:
                return done[request]
            shown = self_instruct.demonstrations(
                list(texts)[: len(known)],
                generated,
                seed=config.seed,
                batch=request,
                from_seeds=rule.from_seeds,
                from_generated=rule.from_generated,
            )
            asked = tokenizer.encode(self_instruct.request_text([texts[name] for name in shown]))
            room = config.engine.max_model_len - rule.max_tokens
            completion = await pools.samplers.generate(
                Request(
                    id=f"prompts/{request}",
                    prompt_token_ids=tuple(asked[-room:]),
                    sampling=sampling_of(rule, seed_of(config.seed, 0, str(request), "prompter", "0")),
                    priority=SAMPLE_PRIORITY,
                )
            )
            made = self_instruct.Continuation(
                request=request,
                text=completion.text,
                cut=completion.finish_reason == "length",
                model=config.model.path,
                demonstrations=tuple(shown),
            )
            with journal.open("ab") as file:
                file.write(json.dumps(asdict(made), ensure_ascii=False).encode() + b"\n")
            return made

        with report.stage("prompts", {"kept": number}) as tick:
            request = barren = 0
            while len(kept) < number and barren < rule.give_up_after:
                generated = [prompt.id for prompt in kept]
                # The size of a round is a setting: what is shown must not depend on the number of engines.
                found = await gather([one(request + place, generated) for place in range(rule.round)])
                request += rule.round
                new, refused = self_instruct.select(found, pool, filters, cut_at_separator=rule.cut_at_separator)
                reasons += refused
                barren = 0 if new else barren + 1
                texts.update({prompt.id: prompt.text for prompt in new})
                kept += new
                tick("kept", min(len(new), number - len(kept) + len(new)), 0)
        return kept, reasons, request

    kept, reasons, requests = on_engines(config, work_folder, folder, work)
    rows = []
    for prompt in kept[:number]:
        row = asdict(prompt)
        rows.append({"id": row.pop("id"), "prompt": row.pop("text"), **row})
    for reason, count in sorted(reasons.items()):
        report.line(f"  {count:>8}  {reason}")
    if not rows:
        raise NoExamples(f"no prompt in {requests} requests passed the filters; try a larger model")
    write_lines(out, rows)
    report.line(f"{len(rows)} prompts from {requests} requests: {out}")
    if len(rows) < number:
        report.line(f"fewer than the {number} asked for: {rule.give_up_after} rounds in a row gave nothing new")


def _continuations(path: Path) -> dict[int, self_instruct.Continuation]:
    from rsrlm.files import whole_lines

    found = {}
    for line in whole_lines(path) if path.exists() else ():
        entry = json.loads(line)
        entry["demonstrations"] = tuple(entry["demonstrations"])
        found[entry["request"]] = self_instruct.Continuation(**entry)
    return found


# -- rsrlm eval --------------------------------------------------------------------------------------------------------

JUDGE_COLUMNS = {
    "pairwise_accuracy": "pairwise",
    "tie_share": "ties",
    "agreement": "agreement",
    "agreement_without_ties": "without ties",
    "five_best": "5-best",
    "exact_match": "exact",
    "spearman": "Spearman",
    "kendall_tau": "Kendall",
    "readable": "readable",
    "score_length": "score~length",
}
PAIRWISE_COLUMNS = {
    "agreement": "agreement",
    "first_position": "first position",
    "inconsistent": "inconsistent",
    "tie": "ties",
    "unreadable": "unreadable",
}


def figure(found: dict[str, Any]) -> str:
    """A figure with its interval and denominator; "not estimable" below 30."""
    if not found["estimable"]:
        return f"not estimable (n={found['n']})"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] n={found['n']}"


def rated(config: Config, source: str, part: str, limit: int | None, report: Report) -> list[RankedPrompt]:
    """Prompts with ranked replies to evaluate on. Raises ConfigError where there are none."""
    data = config.data.model_copy(update={"trees": source})
    parts = seeds.divide(data, "--data")
    sets = {"ift": parts.ift, "eft": parts.eft, "evaluation": parts.evaluation}
    found = [prompt for name, prompts in sets.items() if part in (name, "all") for prompt in prompts]
    found = sorted(judge_eval.comparable(found), key=lambda prompt: prompt.id)
    random.Random(f"limit {config.seed}").shuffle(found)
    if not found:
        raise ConfigError(f"--data {source}: no prompt with two ranked replies in part {part}: {parts.counts}")
    chosen = found[:limit]
    report.line(f"{len(chosen)} of {len(found)} prompts with {sum(len(p.replies) for p in chosen)} ranked replies")
    return chosen


def eval_judge(
    config: Config,
    models: dict[str, Path],
    prompts: Sequence[RankedPrompt],
    out: Path,
    pairwise: bool,
    report: Report,
    run: Path | None = None,
) -> dict[str, Any]:
    """Measures of the config's judge with the weights of each model; M0 is the first. `run` holds the others."""
    first = next(iter(models.values()))
    _, encoder = loaded(replace_path(config.model, first))
    found: dict[str, Any] = {}
    other, judge_encoder = launch.judge_of(config, encoder)
    judge, comparing = Judging(config, judge_encoder), duel_judge(config, judge_encoder) if pairwise else None
    if config.judge.external and len(models) > 1:
        raise ConfigError(
            f"judge.model={config.judge.external} judges in the place of {', '.join(models)}: all would measure the "
            "same; choose one with --model M0, or let them judge: judge.model=null judge.endpoint=null judge.replicas=0"
        )
    name = "pairwise" if pairwise else "judge"
    begun_with(
        out,
        name,
        {
            **asked_of(config),
            "template": digest([comparing.source if comparing else judge.source]),
            "data": digest(text for prompt in prompts for text in (prompt.id, *(reply.id for reply in prompt.replies))),
        },
    )

    async def work(pools: launch.Pools) -> Any:
        for name in models:
            await pools.hold(name)
            journal = Journal(out / f"{name}{'-pairwise' if comparing else ''}.jsonl")
            try:
                if comparing:
                    comparisons = sum(len(prompt.replies) * (len(prompt.replies) - 1) for prompt in prompts)
                    with report.stage(name, {"compare": comparisons}) as tick:
                        found[name] = await judge_eval.verdicts(
                            prompts, comparing, pools.judges, journal, tick, config.seed
                        )
                else:
                    replies = sum(len(prompt.replies) for prompt in prompts)
                    with report.stage(name, {"judge": replies * judge.per_response}) as tick:
                        found[name] = await judge_eval.scores(prompts, judge, pools.judges, journal, tick, config.seed)
            finally:
                journal.close()

    on_engines(config, run or out, first, work, other)
    columns = PAIRWISE_COLUMNS if pairwise else JUDGE_COLUMNS
    rows = [
        {"measure": heading, **{name: figure(measures[key]) for name, measures in found.items()}}
        for key, heading in columns.items()
    ]
    asked = comparing.name if comparing else f"{judge.name}, {judge.per_response} judgements of each reply"
    report.table(f"Judge: {asked}", rows, {"measure": "", **{name: name for name in found}})
    write_json(out / f"{name}.json", {"judge": asked, "models": found})
    return found


def replace_path(model: Model, path: Path) -> Model:
    return model.model_copy(update={"path": str(path)})


def eval_duel(
    config: Config, first: str, second: str, judge: str, prompts: Sequence[Prompt], out: Path, report: Report
) -> dict[str, Any]:
    """Two models' answers to the same prompts, compared by a third (or one of them) in both orders."""
    settings = {**asked_of(config), "a": first, "b": second, "by": judge}
    begun_with(out, "duel", {**settings, "prompts": digest(text for p in prompts for text in (p.id, p.text))})
    sides = []
    for place, path in enumerate((first, second)):
        folder, encoder = loaded(config.model.model_copy(update={"path": path}))
        journal = Journal(out / f"answers-{'ab'[place]}.jsonl")
        title = f"answers of {'AB'[place]}"

        async def work(
            pools: launch.Pools, encoder: ChatEncoder = encoder, journal: Journal = journal, title: str = title
        ) -> Any:
            with report.stage(title, {"answers": len(prompts)}) as tick:
                return await judge_eval.answers(prompts, pools.samplers, encoder, config, journal, tick)

        try:
            known = len(journal.responses) >= len(prompts)
            sides.append(
                [journal.responses[f"{prompt.id}/0"] for prompt in prompts]
                if known
                else on_engines(config, out, folder, work)
            )
        finally:
            journal.close()
        outputs = [
            {"instruction": prompt.text, "output": answer.text, "generator": path, "dataset": "prompts"}
            for prompt, answer in zip(prompts, sides[-1], strict=True)
        ]
        write_json(out / f"outputs-{'ab'[place]}.json", outputs)
    folder, encoder = loaded(config.model.model_copy(update={"path": judge}))
    comparing = duel_judge(config, encoder)
    journal = Journal(out / "comparisons.jsonl")

    async def compare(pools: launch.Pools) -> Any:
        with report.stage("duel", {"compare": 2 * len(prompts)}) as tick:
            return await judge_eval.duel(
                prompts, sides[0], sides[1], comparing, pools.judges, journal, tick, config.seed
            )

    try:
        found = on_engines(config, out, folder, compare)
    finally:
        journal.close()
    result = {"a": first, "b": second, "judge": f"{comparing.name} by {judge}", **found}
    write_json(out / "duel.json", result)
    rows = [
        {"what": heading, "value": figure(found[key])}
        for key, heading in (
            ("win", "A wins"),
            ("tie", "ties"),
            ("loss", "B wins"),
            ("win_rate", "win rate of A, ties count half"),
        )
    ]
    rows.append({"what": "mean characters, A / B", "value": " / ".join(f"{n:.0f}" for n in found["mean_chars"])})
    rows.append({"what": "unreadable", "value": str(found["unreadable"])})
    report.table(f"A: {first}   B: {second}   judge: {result['judge']}", rows, {"what": "", "value": ""})
    return result
