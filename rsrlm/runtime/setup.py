"""What a run needs before anything starts: a checked config, the model, prompts dealt to iterations, recipes."""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rsrlm.chat import ChatEncoder, check_tokenizer
from rsrlm.config import Config
from rsrlm.data import prompts as prompt_files
from rsrlm.data import seed_data
from rsrlm.data.examples import read_examples
from rsrlm.evaluate import Evaluation
from rsrlm.iterative import Iteration
from rsrlm.judges import templates
from rsrlm.judges.base import Context, context_of
from rsrlm.judges.base import judge_of as judge_of_section
from rsrlm.model import folder_of, load_config, load_tokenizer, weight_files
from rsrlm.recipes.base import Recipe
from rsrlm.recipes.sft import MADE, SFT
from rsrlm.records import Example, Prompt, Task, wording
from rsrlm.report import alarms
from rsrlm.runtime.cluster import check_devices
from rsrlm.runtime.dropout import set_dropout
from rsrlm.runtime.endpoint import EndpointClient
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import BUILTIN_MODEL
from rsrlm.settings.methods import JudgeSection, Validator
from rsrlm.settings.steps import Step
from rsrlm.store.folder import RunFolder

Busy = Callable[[str], contextlib.AbstractContextManager[None]]  # such as `Report.busy`


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can start: everything that a user may have got wrong has been looked at."""

    config: Config
    drawn: dict[str, str]  # see `started`
    model: Path
    judge: Path | None  # other weights that judge
    validator: Path | None  # other weights that validate
    iterations: Sequence[Iteration]
    heldout: Evaluation
    validation: Evaluation  # what candidates are chosen by
    parts: seed_data.Parts | None  # of the ranked data
    trained_on: seed_data.TrainedOn
    left_out: list[str]  # ids of prompts that are too long
    repeated: list[str]  # ids of prompts whose wording another one has

    @property
    def remarks(self) -> list[str]:
        """What a user should know about the prompts, a line each."""
        reasons = (("too long", self.left_out), ("repeats of another's wording", self.repeated))
        return [f"{len(ids)} prompts are {why} and left out: {', '.join(ids[:5])}" for why, ids in reasons if ids]


def started(config: Config, noted: Mapping[str, Any]) -> tuple[Config, dict[str, str]]:
    """The config with its fence salt, and what a start draws and a resume must keep, since prompts depend on it: `date`
    (ISO 8601, what chat templates print) and `fence_salt`. They are those of `noted`, a start.json, or new ones.

    Raises ConfigError where answers were begun without them.
    """
    if noted and "drawn" not in noted:
        raise ConfigError(
            "start.json: no date and fence salt in it, so that its prompts cannot be made again; it was begun with "
            "another version of rsrlm: start anew under another name"
        )
    fresh = {"date": datetime.now().isoformat(timespec="seconds"), "fence_salt": secrets.token_hex(8)}
    drawn = {**fresh, **noted.get("drawn", {})}
    if config.judge.fence_salt is not None:
        drawn["fence_salt"] = config.judge.fence_salt
    judge = config.judge.model_copy(update={"fence_salt": drawn["fence_salt"]})
    return config.model_copy(update={"judge": judge}), drawn


def _nothing_shown(title: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def prepare(
    config: Config,
    noted: Mapping[str, Any] | None = None,
    busy: Busy = _nothing_shown,
    read: list[Prompt] | None = None,
) -> Prepared:
    """Check and load what a run needs; `noted` is the start.json of one that goes on, `busy` shows what takes long, and
    `read` are the prompts of its file where they have been read. Raises ConfigError before any engine starts."""
    config, drawn = started(config, noted or {})
    check_devices(config)
    path = prompt_files.file_of(config.prompts)
    prompts, repeated = prompt_files.distinct(read or prompt_files.read(path))
    model, shape, encoder = _model_of(config, drawn, busy)
    judge, judge_encoder = judge_of(config, encoder)
    validator, validator_encoder = validator_of(config, encoder, judge_encoder)
    with busy("reading ranked data"):
        parts = _parts(config)
    context, judging = _contexts(config, encoder, judge_encoder)
    alarms.limits_of(config)  # refuses a sign that is not known
    for step in config.planned:
        set_dropout(shape, step.config.train.dropout)  # refuses what the model has not
    recipes, wordings = _recipes(config, context, judging, parts)
    validator_context = replace(context, encoder=validator_encoder)
    judges = judge_of_section(config.judge, judging), judge_of_section(config.validating, validator_context)
    evaluation_of = partial(Evaluation, config, context, *judges, validator_context)
    evaluation = evaluation_of(())  # refuses a template that it cannot use
    needs = _needs(recipes) | (evaluation.needs() if config.prompts.heldout or config.prompts.validation else {})
    with busy(f"checking {len(prompts)} prompts"):
        asks = [*evaluation.asks, *_asks(recipes)]
        usable, left_out = _usable(config, context, prompts, asks, needs)
    dealt = prompt_files.deal(usable, config, seed_data.trained_on(parts, wordings).wordings)
    templates.check_data(evaluation.asks, [*dealt.heldout, *dealt.validation], f"prompts.path={path}")
    for recipe, hand in zip(recipes, dealt.hands, strict=True):
        templates.check_data(recipe.asks, hand, f"prompts.path={path}")
        recipe.check(hand)
    asked = (wording(prompt.text) for hand in dealt.hands for prompt in hand)
    return Prepared(
        config=config,
        drawn=drawn,
        model=model,
        judge=judge,
        validator=validator,
        iterations=_iterations(config, recipes, dealt.hands),
        heldout=evaluation_of(dealt.heldout),
        validation=evaluation_of(dealt.validation),
        parts=parts,
        trained_on=seed_data.trained_on(parts, (*wordings, *asked)),
        left_out=left_out,
        repeated=repeated,
    )


def _model_of(config: Config, drawn: Mapping[str, str], busy: Busy) -> tuple[Path, Any, ChatEncoder]:
    """The folder of M0, its transformers config, and the encoder of its prompts."""
    made = config.model.path == BUILTIN_MODEL
    with busy("making the built-in model, once" if made else f"looking for {config.model.path}"):
        model = folder_of(config.model)
    with busy("loading transformers and the tokenizer"):
        shape = load_config(model, config.model.trust_remote_code)
        tokenizer = load_tokenizer(model, config.model.trust_remote_code)
        check_tokenizer(tokenizer, config.model.path)
        encoder = ChatEncoder(tokenizer, datetime.fromisoformat(drawn["date"]))
    return model, shape, encoder


def _recipes(
    config: Config, context: Context, judging: Context, parts: seed_data.Parts | None
) -> tuple[list[Recipe], set[str]]:
    """The recipe of each iteration, and the wordings of the questions in files of examples."""
    recipes: list[Recipe] = []
    wordings: set[str] = set()
    for step in config.planned:
        if recipes and step.config is recipes[-1].config:  # without steps all iterations are alike
            recipes.append(recipes[-1])
            continue
        recipe, questions = recipe_of(step, context, judging, parts)
        recipes.append(recipe)
        wordings |= questions
    return recipes, wordings


def _needs(recipes: Sequence[Recipe]) -> dict[str, int]:
    """Tokens beside a prompt that the recipes need, by what needs them."""
    needs: dict[str, int] = {}
    for recipe in recipes:
        for name, tokens in recipe.needs().items() if recipe.answers_prompts(recipe.config) else ():
            needs[name] = max(tokens, needs.get(name, 0))
    return needs


def _iterations(config: Config, recipes: Sequence[Recipe], hands: Sequence[Sequence[Prompt]]) -> list[Iteration]:
    return [
        Iteration(name=step.name, recipe=recipe, tasks=[Task(iteration=number, prompt=prompt) for prompt in hand])
        for number, (step, recipe, hand) in enumerate(zip(config.planned, recipes, hands, strict=True))
    ]


def _asks(recipes: Sequence[Recipe]) -> list[str]:
    return [source for recipe in recipes for source in recipe.asks]


def _usable(
    config: Config, context: Context, prompts: list[Prompt], asks: Sequence[str], needs: Mapping[str, int]
) -> tuple[list[Prompt], list[str]]:
    """Usable prompts and ids of the others, where the length of a prompt is that of its text and of those of its data
    that the templates in `asks` print."""
    user, chat, asked = context.encoder.user, len(context.encoder.user("")), len(context.asked(""))
    names = {name for source in asks for name in templates.data_names(source)}

    def tokens(prompt: Prompt) -> int:
        data = sum(len(user(prompt.data.get(name, ""))) - chat for name in names)
        return data + max(len(user(prompt.text)) - chat, len(context.asked(prompt.text)) - asked)

    lengths = {prompt.id: tokens(prompt) for prompt in prompts}
    return prompt_files.usable(prompts, lengths, needs or {"a chat prompt": chat}, config)


def recipe_of(step: Step, context: Context, judging: Context, parts: seed_data.Parts | None) -> tuple[Recipe, set[str]]:
    """The recipe of an iteration, and the wordings of the questions in its files of examples."""
    if not issubclass(step.recipe, SFT):
        return step.recipe(step.config, context, judging), set()
    files: dict[str, list[Example]] = {}
    wordings: set[str] = set()
    own: Any = judge_of_section(step.config.judge, context) if step.config.judge.in_words else None
    for source in step.config.sources:
        if source.path not in MADE:
            files[source.path], questions = read_examples(source.path, context.encoder, own)
            wordings |= questions
    return step.recipe(step.config, context, judging, parts, files), wordings


def recipes_of(config: Config, drawn: Mapping[str, str]) -> list[Recipe]:
    """The recipe of each iteration as a producer needs it, without what only its iteration as a whole needs."""
    _, _, encoder = _model_of(config, drawn, _nothing_shown)
    _, judge_encoder = judge_of(config, encoder)
    context, judging = _contexts(config, encoder, judge_encoder)
    made: list[Recipe] = []
    for step in config.planned:
        again = bool(made) and step.config is made[-1].config
        made.append(made[-1] if again else step.recipe(step.config, context, judging))
    return made


def _contexts(config: Config, encoder: ChatEncoder, judge_encoder: ChatEncoder) -> tuple[Context, Context]:
    """Of the model, and of who judges."""
    context = context_of(config, encoder)
    return context, replace(context, encoder=judge_encoder)


def _parts(config: Config) -> seed_data.Parts | None:
    """The ranked data, where an iteration trains on it. Raises ConfigError where it has nothing for one."""
    wanted = [step.config for step in config.planned if issubclass(step.recipe, SFT)]
    sources = {source.path for one in wanted for source in one.sources} & {"ift", "eft"}
    if not sources:
        return None
    parts = seed_data.divide(config.data)
    for made in sorted(sources):
        if not getattr(parts, made):
            raise ConfigError(
                f"data.trees={config.data.trees}: nothing in it for source {made}: {parts.counts}; raise "
                f"data.{made}_share, or look at data.language and data.max_chars"
            )
    return parts


def judge_of(config: Config, encoder: ChatEncoder) -> tuple[Path | None, ChatEncoder]:
    """The folder of another model that judges, and the encoder of its prompts; else None and the model's own."""
    return _other(config, "judge", config.judge, encoder)


def validator_of(config: Config, encoder: ChatEncoder, judge_encoder: ChatEncoder) -> tuple[Path | None, ChatEncoder]:
    """The same for another model that validates; where nobody else does, the judge of the rewards does."""
    if not config.evaluate.judge.external:
        return None, judge_encoder
    return _other(config, "evaluate.judge", config.evaluate.judge, encoder)


def _other(
    config: Config, key: str, who: JudgeSection | Validator, encoder: ChatEncoder
) -> tuple[Path | None, ChatEncoder]:
    if who.endpoint:
        EndpointClient(who.endpoint, name=f"{key}.endpoint")  # refuses what it cannot use
    if who.model is None:
        return None, encoder
    model = config.model_at(who.model)
    named = f"{key}.model"
    folder = folder_of(model, named)
    tokenizer = load_tokenizer(folder, model.trust_remote_code, named)
    check_tokenizer(tokenizer, who.model, named)
    return folder, ChatEncoder(tokenizer, encoder.date)


def check_inputs(prepared: Prepared, store: RunFolder) -> None:
    """Raises ConfigError when prompts, templates, training data or model are no longer those that the run started with;
    records what the start drew, and how the ranked data was divided."""
    store.fix("drawn", prepared.drawn)  # before any other fact: see `started`
    tasks = [[task.prompt for task in one.tasks] for one in prepared.iterations]
    hands = (prepared.heldout.prompts, prepared.validation.prompts, *tasks)
    dealt = [[(prompt.id, prompt.text, dict(prompt.data)) for prompt in hand] for hand in hands]
    recipes = [one.recipe for one in prepared.iterations]
    judges = [source for recipe in recipes for source in recipe.asks]
    files = [one for recipe in recipes for one in recipe.inputs]
    parts = (prepared.parts.ift, prepared.parts.eft) if prepared.parts else ()
    ranked = [[p.id, p.text, [(r.text, r.rank) for r in p.replies]] for part in parts for p in part]
    now = {
        "prompts": _digest(json.dumps(dealt)),
        "judge": _digest(json.dumps([prepared.heldout.judge.source, judges, *prepared.heldout.questions])),
        "training data": _digest(json.dumps([files, ranked])),
        "model": [[file.name, file.stat().st_size] for file in weight_files(prepared.model)],
        **{
            f"{name}'s model": [[file.name, file.stat().st_size] for file in weight_files(folder)] if folder else []
            for name, folder in (("judge", prepared.judge), ("validator", prepared.validator))
        },
    }
    for name, value in store.fix("inputs", now).items():
        if value != now[name]:
            raise ConfigError(
                f"{store.folder}: the {name} of this run changed since it was started; restore the former, or start a "
                "new run with another name"
            )
    seen = prepared.trained_on
    store.write_json(store.trained_on, {"ids": sorted(seen.ids), "wordings": sorted(seen.wordings)})
    if prepared.parts:
        names = ("ift", "eft", "evaluation")
        ids = {name: [prompt.id for prompt in getattr(prepared.parts, name)] for name in names}
        store.write_json(store.folder / "split.json", {**ids, "counts": prepared.parts.counts})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
