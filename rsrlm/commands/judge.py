"""`rsrlm eval judge`: is the judge any good? Its measures with the weights of each model of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsrlm import config as configs
from rsrlm.commands.engines import by_validator, figure, loaded, on_engines, started, write_json
from rsrlm.commands.judge_measures import RatedData, scores, verdicts
from rsrlm.config import Config
from rsrlm.judges.base import context_of, judge_of
from rsrlm.judges.pairwise import duel_judge
from rsrlm.recipes.eft import check_judge
from rsrlm.report.progress import Report
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

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


def models_of(
    place: str, wanted: Sequence[str], overrides: list[str] | None
) -> tuple[Config, dict[str, Path], RunFolder | None]:
    """The config of a file, its model, and None; or of a run's folder, the models that it has (of those that are
    wanted, if any are), and the run. Raises ConfigError."""
    if not Path(place).is_dir():
        if wanted:
            raise ConfigError(f"--model {wanted[0]}: only a run has several models; give the run's folder")
        config = configs.load(place, overrides)
        return config, {"M0": loaded(config.model)[0]}, None
    store, config = RunFolder.open(Path(place))
    names = [config.model_name(index) for index in range(config.iterations + 1)]
    models = {"M0": loaded(config.model)[0]}
    models |= {name: store.model(name) for name in names[1:] if store.model(name).exists()}
    if missing := [name for name in wanted if name not in models]:
        raise ConfigError(f"--model {missing[0]}: {place} has {', '.join(models)}")
    # One judge for all of them: that of the run, without what its steps change.
    of_all = configs.without_steps(config, overrides)
    return of_all, {name: path for name, path in models.items() if not wanted or name in wanted}, store


def eval_judge(
    config: Config, models: dict[str, Path], data: RatedData, out: Path, pairwise: bool, report: Report
) -> dict[str, Any]:
    """Measures of the config's judge with the weights of each model, or of another judge that the config names."""
    if pairwise:
        config = by_validator(config)
    config, drawn = started(config, out)
    first = config.model.model_copy(update={"path": str(next(iter(models.values())))})
    _, encoder = loaded(first, drawn)
    other, judge_encoder = setup.judge_of(config, encoder)
    context = context_of(config, judge_encoder)
    judge = judge_of(config.judge, context)
    comparing = duel_judge(config, context) if pairwise else None
    check_judge((comparing or judge).source)
    if config.judge.external and len(models) > 1:
        raise ConfigError(
            f"judge.model={config.judge.external} judges in the place of {', '.join(models)}: all would measure the "
            "same; choose one with --model M0, or let them judge: judge.model=null judge.endpoint=null judge.replicas=0"
        )

    async def work(run: Run) -> dict[str, Any]:
        measured = {}
        for name in models:
            engines = await run.load(await run.pools.model(name))
            if comparing:
                comparisons = sum(len(prompt.replies) * (len(prompt.replies) - 1) for prompt in data.prompts)
                with run.stage(name, {"duel": comparisons}):
                    measured[name] = await verdicts(data.prompts, comparing, engines.judges, config.seed)
            else:
                replies = sum(len(prompt.replies) for prompt in data.prompts)
                with run.stage(name, {"judge": replies * judge.per_response}):
                    measured[name] = await scores(data.prompts, judge, engines, config.seed)
        return measured

    engines = (pairwise or config.judge.tokens > 0) and config.judge.endpoint is None
    found: dict[str, Any] = on_engines(config, out, models, work, report, drawn=drawn, judge=other, engines=engines)
    asked = comparing.name if comparing else f"{judge.name}, {judge.per_response} judgements of each reply"
    result = {
        "judge": asked + (f" by {config.judge.external}" if config.judge.external else ""),
        "data": Path(data.source).name,
        "part": data.part,
        "prompts": len(data.prompts),
        "of": len(data.all),
        "seed": config.seed,
    }
    _show(result, found, out / f"{'pairwise' if pairwise else 'judge'}.json", pairwise, report)
    return found


def _show(result: dict[str, Any], found: Mapping[str, Any], path: Path, pairwise: bool, report: Report) -> None:
    """Print the measures beside those of other models that were measured in the same way, and write them all."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = {key: before.get(key) for key in result} == result
    measured = {**(before["models"] if same else {}), **found}
    rows = [
        {"measure": heading, **{model: figure(measures[key]) for model, measures in measured.items()}}
        for key, heading in (PAIRWISE_COLUMNS if pairwise else JUDGE_COLUMNS).items()
    ]
    report.table(f"Judge: {result['judge']}", rows, {"measure": "", **{model: model for model in measured}})
    write_json(path, {**result, "models": measured})
