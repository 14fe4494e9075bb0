"""Commands that need engines and no learner: EFT targets, prompts that a model makes, judges against people, duels.

Each writes its answers to a journal beside its result as they come, so that the same command goes on after a kill.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from rsrlm import judge_eval, seeds
from rsrlm.ask import SAMPLE_PRIORITY, Judging, duel_judge, gather, sampling_of
from rsrlm.chat import ChatEncoder, check_tokenizer
from rsrlm.config import Config, ConfigError, Data, Model
from rsrlm.data import prompts as prompt_files
from rsrlm.data import ranked, self_instruct
from rsrlm.data.ranked import RankedPrompt
from rsrlm.model import folder_of, load_tokenizer
from rsrlm.records import Prompt, Request, seed_of
from rsrlm.report.progress import Report
from rsrlm.runtime import launch
from rsrlm.seeds import NoExamples
from rsrlm.store.atomic import read_lines, write_whole
from rsrlm.store.folder import Journal, RunFolder

Work = Callable[[launch.Pools], Awaitable[Any]]


def on_engines(
    config: Config,
    folder: Path,
    models: Mapping[str, Path],
    work: Work,
    judge: Path | None = None,
    engines: bool = True,
) -> Any:
    """Run `work` with engines that hold the first of `models`, and everything down again; notes go to `folder`.

    `judge` is the folder of another model that judges (see `launch.judge_of`). Without `engines` nothing starts, for
    judges that need none.
    """
    # No learner, so nobody who could send over gloo: every engine loads from its folder.
    config = config.model_copy(update={"weights": config.weights.model_copy(update={"transport": "shm"})})
    folder.mkdir(parents=True, exist_ok=True)
    store = RunFolder(folder)
    first = next(iter(models))

    async def main() -> Any:
        pools = launch.Pools(by_judge(config), store, models[first], first, None, judge, others=models)
        try:
            if engines:
                await pools.start()
            return await work(pools)
        finally:
            await pools.close()

    if not engines:
        return launch.interruptible(main())
    with launch.ray_cluster(config, store, learner=False):
        return launch.interruptible(main())


def started(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """The config with its fence salt, and what was drawn when a command began in `folder` (see `launch.started`)."""
    return launch.started(config, RunFolder(folder).note("start"))


def loaded(model: Model, drawn: Mapping[str, str] | None = None) -> tuple[Path, ChatEncoder]:
    """The model's folder and its encoder, with the date that was drawn. Raises ConfigError."""
    folder = folder_of(model)
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    check_tokenizer(tokenizer, model.path)
    return folder, ChatEncoder(tokenizer, datetime.fromisoformat(drawn["date"]) if drawn else None)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def begun_with(folder: Path, name: str, settings: dict[str, Any], drawn: dict[str, str] | None = None) -> None:
    """Note the settings under which answers in `folder` are made. Raises ConfigError where it was begun with others:
    journals of one question are no answers to another. `drawn` is noted before, in start.json."""
    path = folder / f"{name}.settings.json"
    plain = json.loads(json.dumps(settings))
    if path.exists():
        noted = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in {*noted, *plain} if noted.get(key) != plain.get(key))
        if changed:
            listed = ", ".join(f"{key}={noted.get(key)}, now {plain.get(key)}" for key in changed)
            raise ConfigError(
                f"{folder} was begun with other settings ({listed}); restore them, remove the folder, or choose "
                "another with --out"
            )
    else:
        if drawn:
            folder.mkdir(parents=True, exist_ok=True)
            RunFolder(folder).fix("drawn", drawn)
        write_json(path, plain)


def asked_of(config: Config, *sections: str) -> dict[str, Any]:
    """What answers depend on, apart from what they answer, by dotted key."""
    found: dict[str, Any] = {
        "seed": config.seed,
        "engine.max_model_len": config.engine.max_model_len,
        "judge.fence_salt": config.judge.fence_salt,
    }
    keys = {
        "judge": "model read template function judgements temperature top_p top_k max_tokens min_mass",
        "evaluate": "temperature top_p top_k max_tokens",
        "evaluate.judge": "template read temperature top_p top_k max_tokens min_mass",
    }
    for section in sections:
        values = attrgetter(section)(config)
        found |= {f"{section}.{key}": getattr(values, key) for key in keys[section].split()}
    if config.judge.endpoint:
        found |= {"judge.endpoint.url": config.judge.endpoint.url, "judge.endpoint.model": config.judge.endpoint.model}
    return found


def digest_of(prompts: Sequence[RankedPrompt]) -> str:
    """Of all that a judge is shown, and of where it stands."""
    return digest(
        text
        for prompt in prompts
        for text in (prompt.id, prompt.text, *(r.id + "\x1e" + r.text for r in prompt.replies))
    )


def check_out(out: Path, folder: bool = False) -> Path:
    """The path, or ConfigError where it can be none."""
    if not out.name or out.name == ".." or (out.is_file() if folder else out.is_dir()):
        raise ConfigError(f"--out {out}: give the path of a {'folder' if folder else 'file'} to write")
    return out


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
        {"id": f"ift-{reply.id}", "prompt": prompt.text, "target": reply.text, "tree": prompt.id}
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
    config, drawn = started(config, beside(out))
    folder, encoder = loaded(config.model, drawn)
    other, judge_encoder = launch.judge_of(config, encoder)
    judge = Judging(config, judge_encoder)
    each = config.data.eft_judgements
    begun_with(
        beside(out),
        "eft",
        {
            **asked_of(config, "judge"),
            "model": config.model.path,
            "judge.template's text": digest([judge.source]),
            "data.eft_judgements": each,
            "what is judged (data.*)": digest_of(parts.eft),
        },
        drawn,
    )
    replies = sum(reply.rank is not None for prompt in parts.eft for reply in prompt.replies)
    journal = Journal(beside(out) / "journal.jsonl")

    async def work(pools: launch.Pools) -> Any:
        with report.stage("EFT", {"judge": replies * each}) as tick:
            return await seeds.judge_replies(parts.eft, judge, pools.judges, journal, 0, each, tick)

    report.line(f"{replies} replies of {len(parts.eft)} prompts, {each} judgements each; starting engines")
    try:
        judgements = on_engines(config, beside(out), {config.model.path: folder}, work, other)
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
    known, repeated = prompt_files.distinct(prompt_files.read(prompt_files.file_of(config.prompts)))
    if repeated:
        report.line(f"{len(repeated)} prompts are repeats of another's wording and left out: {', '.join(repeated[:5])}")
    folder, encoder = loaded(config.model)
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
    # Too few seeds: before anything starts.
    self_instruct.demonstrations(
        [p.id for p in known], [], seed=0, batch=0, from_seeds=rule.from_seeds, from_generated=rule.from_generated
    )
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
            asked = encoder.bare(self_instruct.request_text([texts[name] for name in shown]))
            room = config.engine.max_model_len - rule.max_tokens
            if len(asked) > room:
                raise ConfigError(
                    f"the demonstrations of request {request} take {len(asked)} tokens, engine.max_model_len="
                    f"{config.engine.max_model_len} leaves {room} beside self_instruct.max_tokens; raise the first, "
                    "lower the second, or leave long prompts out of prompts.path"
                )
            completion = await pools.samplers.generate(
                Request(
                    id=f"prompts/{request}",
                    prompt_token_ids=asked,
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

    kept, reasons, requests = on_engines(config, work_folder, {config.model.path: folder}, work)
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
    found = {}

    def take(entry: dict[str, Any]) -> None:
        made = self_instruct.Continuation(**{**entry, "demonstrations": tuple(entry["demonstrations"])})
        found[made.request] = made

    if path.exists() and (warning := read_lines(path, take)):
        logging.getLogger("rsrlm").warning(warning)
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
    "pair_yield": "pair yield",
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


@dataclass(frozen=True, kw_only=True)
class RatedData:
    """Prompts with ranked replies to evaluate on; `all` are those of the source, of which the others were drawn."""

    prompts: list[RankedPrompt]
    all: list[RankedPrompt]
    source: str
    part: str


def trained_on(config: Config, run: RunFolder | None) -> seeds.TrainedOn:
    """The questions that a run trained on; without one, those that the config's ranked data has for training."""
    if run and run.trained_on.exists():
        noted = json.loads(run.trained_on.read_text(encoding="utf-8"))
        return seeds.TrainedOn(ids=frozenset(noted["ids"]), wordings=frozenset(noted["wordings"]))
    return seeds.trained_on(seeds.divide(config.data) if config.data.trees else None)


def rated(
    config: Config, source: str, part: str | None, limit: int | None, seen: seeds.TrainedOn, report: Report
) -> RatedData:
    """Read `--data`. Without a part, questions in `seen` are left out, by their ids and by their wording, whatever file
    they stand in here; how many is said in any case.

    Raises ConfigError where nothing is left.
    """
    parts = seeds.divide(config.data.model_copy(update={"trees": source}), "--data")
    sets = {"ift": parts.ift, "eft": parts.eft, "evaluation": parts.evaluation}
    everything = sorted(
        judge_eval.comparable([prompt for prompts in sets.values() for prompt in prompts]), key=lambda prompt: prompt.id
    )
    inside = {prompt.id for name, prompts in sets.items() if part in (name, "all", None) for prompt in prompts}
    found = [prompt for prompt in everything if prompt.id in inside]
    trained = sum(prompt in seen for prompt in found)
    if part is None:
        found = [prompt for prompt in found if prompt not in seen]
    random.Random(f"limit {config.seed}").shuffle(found)
    for reason, number in parts.counts.items():
        report.line(f"  {number:>8}  {reason}")
    if trained:
        report.line(
            f"{trained} prompts are trained on and {'left out' if part is None else 'measured on all the same'}"
        )
    if not found:
        raise ConfigError(
            f"--data {source}: no prompt with two ranked replies in part {part or 'unseen'}; try --part all, and look "
            "at data.language and data.max_chars"
        )
    chosen = found[:limit]
    replies = sum(len(prompt.replies) for prompt in chosen)
    report.line(f"{len(chosen)} of {len(found)} prompts of part {part or 'unseen'} with {replies} ranked replies")
    return RatedData(prompts=chosen, all=everything, source=source, part=part or "unseen")


def eval_judge(
    config: Config, models: dict[str, Path], data: RatedData, out: Path, pairwise: bool, report: Report
) -> dict[str, Any]:
    """Measures of the config's judge with the weights of each model, or of another judge that the config names."""
    if pairwise:
        config = by_validator(config)
    first = next(iter(models.values()))
    config, drawn = started(config, out)
    _, encoder = loaded(replace_path(config.model, first), drawn)
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
            **asked_of(config, "evaluate.judge" if pairwise else "judge"),
            "judge.model": config.judge.model,
            "template's text": digest([comparing.source if comparing else judge.source]),
            "--data and data.*": digest_of(data.all),
        },
        drawn,
    )

    async def work(pools: launch.Pools) -> Any:
        for model in models:
            if engines:
                await pools.hold(model)
            journal = Journal(out / f"{model}{'-pairwise' if comparing else ''}.jsonl")
            try:
                if comparing:
                    comparisons = sum(len(prompt.replies) * (len(prompt.replies) - 1) for prompt in data.prompts)
                    with report.stage(model, {"compare": comparisons}) as tick:
                        found[model] = await judge_eval.verdicts(
                            data.prompts, comparing, pools.judges, journal, tick, config.seed
                        )
                else:
                    replies = sum(len(prompt.replies) for prompt in data.prompts)
                    with report.stage(model, {"judge": replies * judge.per_response}) as tick:
                        found[model] = await judge_eval.scores(
                            data.prompts, judge, pools.judges, journal, tick, config.seed
                        )
            finally:
                journal.close()

    engines = pairwise or config.judge.read != "function"
    engines = engines and config.judge.endpoint is None
    on_engines(config, out, models, work, other, engines)
    columns = PAIRWISE_COLUMNS if pairwise else JUDGE_COLUMNS
    asked = comparing.name if comparing else f"{judge.name}, {judge.per_response} judgements of each reply"
    result = {
        "judge": asked + (f" by {config.judge.external}" if config.judge.external else ""),
        "data": Path(data.source).name,
        "part": data.part,
        "prompts": len(data.prompts),
        "of": len(data.all),
        "seed": config.seed,
    }
    path = out / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = {key: before.get(key) for key in result} == result
    measured = {**(before["models"] if same else {}), **found}
    rows = [
        {"measure": heading, **{model: figure(measures[key]) for model, measures in measured.items()}}
        for key, heading in columns.items()
    ]
    report.table(f"Judge: {result['judge']}", rows, {"measure": "", **{model: model for model in measured}})
    write_json(path, {**result, "models": measured})
    return found


def by_validator(config: Config) -> Config:
    """A config in which who validates is the judge: nobody else is asked to compare."""
    own = config.evaluate.judge
    if not own.external:
        return config
    who = {name: getattr(own, name) for name in ("model", "trust_remote_code", "endpoint")}
    who["replicas"] = own.replicas if own.model else 0
    return by_judge(config.model_copy(update={"judge": config.judge.model_copy(update=who)}))


def by_judge(config: Config) -> Config:
    """A config in which nobody validates: no engines of their own are started."""
    own = config.evaluate.judge.model_copy(update={"model": None, "endpoint": None})
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"judge": own})})


def replace_path(model: Model, path: Path) -> Model:
    return model.model_copy(update={"path": str(path)})


def eval_duel(
    config: Config, first: str, second: str, judge: str | None, prompts: Sequence[Prompt], out: Path, report: Report
) -> dict[str, Any]:
    """Two models' answers to the same prompts, compared by a third (or one of them) in both orders.

    `judge` is a model that compares; None is the config's judge.model or judge.endpoint, else its model.
    """
    config = by_validator(config)
    # Neither the models of the command line nor another judge are those that model.trust_remote_code speaks of.
    of = {name: config.model_at(name) for name in (first, second, judge or config.judge.external or config.model.path)}
    if judge:
        update = {"model": None, "endpoint": None, "replicas": 0}
        config = config.model_copy(update={"judge": config.judge.model_copy(update=update)})
    config, drawn = started(config, out)
    by = judge or config.judge.external or config.model.path
    models = {name: loaded(of[name], drawn) for name in dict.fromkeys((first, second))}
    endpoint = config.judge.endpoint
    folder, encoder = loaded(config.model if endpoint else of[by], drawn)
    # The pool that compares is the only one of its stage: no engines of another judge beside it.
    alone = config.model_copy(update={"judge": config.judge.model_copy(update={"model": None, "replicas": 0})})
    comparing = duel_judge(config, encoder)
    chat = max(len(one.user("")) for _, one in models.values())
    lengths = {prompt.id: max(len(one.user(prompt.text)) for _, one in models.values()) - chat for prompt in prompts}
    longest = config.evaluate.max_tokens
    needs = {"evaluate.max_tokens": chat + longest, "the judge of two answers": comparing.needs(2 * longest)}
    kept, long = prompt_files.usable(list(prompts), lengths, needs, config)
    if long:
        report.line(f"{len(long)} prompts are too long and left out: {', '.join(long[:5])}")
    asked = digest(text for prompt in kept for text in (prompt.id, prompt.text))
    sampling = {key: value for key, value in asked_of(config, "evaluate").items() if "judge" not in key}
    sides = []
    for side, name in (("a", first), ("b", second)):
        begun_with(out, f"answers-{side}", {**sampling, "model": name, "prompts": asked}, drawn)
        journal = Journal(out / f"answers-{side}.jsonl")
        where, own = models[name]

        async def answer(
            pools: launch.Pools, own: ChatEncoder = own, journal: Journal = journal, side: str = side
        ) -> Any:
            with report.stage(f"answers of {side.upper()}", {"answers": len(kept)}) as tick:
                return await judge_eval.answers(kept, pools.samplers, own, config, journal, tick)

        try:
            missing = any(f"{prompt.id}/0" not in journal.responses for prompt in kept)
            with_its_code = alone.model_copy(update={"model": of[name]})
            sides.append(on_engines(with_its_code, out, {name: where}, answer, engines=missing))
        finally:
            journal.close()
        outputs = [
            {"instruction": prompt.text, "output": response.text, "generator": name, "dataset": "prompts"}
            for prompt, response in zip(kept, sides[-1], strict=True)
        ]
        write_json(out / f"outputs-{side}.json", outputs)
    begun_with(
        out,
        "comparisons",
        {
            **asked_of(config, "evaluate", "evaluate.judge"), "a": first, "b": second, "judge": by, "prompts": asked,
            "template's text": digest([comparing.source]),
        },
    )  # fmt: skip
    journal = Journal(out / "comparisons.jsonl")

    async def compare(pools: launch.Pools) -> Any:
        with report.stage("duel", {"compare": 2 * len(kept)}) as tick:
            return await judge_eval.duel(kept, sides[0], sides[1], comparing, pools.judges, journal, tick, config.seed)

    try:
        asking = config if endpoint else alone.model_copy(update={"model": of[by]})
        found = on_engines(asking, out, {by: folder}, compare, engines=endpoint is None)
    finally:
        journal.close()
    result = {"a": first, "b": second, "judge": f"{comparing.name} by {by}", **found}
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
