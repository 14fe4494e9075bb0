"""The configuration of a run: YAML, dotted overrides, and nothing repaired in silence.

What an iteration does is a step: it names its recipe, and holds only that recipe's keys. What a step leaves out it
takes from the sections of the same name at the top, then from the recipe's defaults.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from rsrlm.settings.base import JUDGES, NAME, ConfigError, Section, plugin
from rsrlm.settings.data import Data, SelfInstruct
from rsrlm.settings.machine import Clock, Engine, ModelConfig, Ray, Watched, Weights
from rsrlm.settings.methods import (
    WHO_JUDGES,
    Evaluate,
    JudgeConfig,
    JudgeSection,
    Prompts,
    Sample,
    Thought,
    Validator,
    judge_section,
)
from rsrlm.settings.source import message_of, override_key, parse
from rsrlm.settings.steps import RANKS, Step, dotted, refuse_moved, resolved, unknown_keys
from rsrlm.settings.together import fits_online, shares_gpus
from rsrlm.settings.trackers import Trackers
from rsrlm.settings.train import Train

LEAST_VALIDATION = 30  # prompts below which report.metrics estimates nothing


class Config(Section):
    """One run. `name` is the run folder under `runs`. Keys that are not known here are defaults of the steps."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=f"^{NAME}$", max_length=200)
    runs: str = "runs"
    seed: int = Field(0, ge=0)
    iterations: int = Field(gt=0)
    recipe: str = Field("self_rewarding", description="of steps that name none")
    model: ModelConfig
    prompts: Prompts
    sample: Sample
    thought: Thought | None = Field(None, description="the model thinks before it answers; null: it only answers")
    judge: JudgeConfig
    train: Train
    data: Data = Data()
    self_instruct: SelfInstruct = SelfInstruct()
    watch: dict[str, Watched | None] = Field(
        {}, description="limits of the signs of trouble, by name, in the place of the defaults; null switches one off"
    )
    steps: list[dict[str, Any]] = Field(
        [], description="what each iteration does, in order; empty: all iterations are alike"
    )
    clock: Clock = Clock()
    engine: Engine = Engine()
    weights: Weights = Weights()
    evaluate: Evaluate = Evaluate()
    trackers: Trackers = Trackers()
    ray: Ray = Ray()
    report: bool = Field(True, description="report.html and report.md in the run folder, at the end and meanwhile")

    _steps: list[Step] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        """`model: some/id` is short for `model: {path: some/id}`; the number of steps is that of iterations."""
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("model"), str):
            data = {**data, "model": {"path": data["model"]}}
        if isinstance(data.get("clock"), str):
            data = {**data, "clock": {"kind": data["clock"]}}
        if isinstance(data.get("steps"), list) and data["steps"] and "iterations" not in data:
            data = {**data, "iterations": len(data["steps"])}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps and len(self.steps) != self.iterations:
            raise ValueError(
                f"steps has {len(self.steps)} entries for iterations={self.iterations}; write one for each, or leave "
                "out iterations"
            )
        if self.engine.producers and (self.judge.endpoint or self.evaluate.judge.endpoint):
            raise ValueError(
                f"engine.producers={self.engine.producers} with a judge behind an API, whose requests and cost are "
                "counted in one place: set engine.producers=0"
            )
        if self.ray.share_gpus:
            shares_gpus(self)
        if self.train.gpus == 0 and self.engine.gpus == 0 and self.model.dtype == "bfloat16":
            raise ValueError("model.dtype=bfloat16 without GPUs is slow and untested; use model.dtype=float32")
        self._fits_engine("evaluate.max_tokens", self.evaluate.max_tokens)
        self._fits_engine("judge.max_tokens", self.judge.tokens)
        if self.evaluate.judge.read == "text":
            self._fits_engine("evaluate.judge.max_tokens", self.evaluate.judge.max_tokens)
        return self

    @property
    def gpus_of_engine(self) -> float:
        """Of Ray's GPUs. Two engines, or two ranks beside an engine, do not fit on one that is shared."""
        return 0.6 if self.ray.share_gpus else self.engine.gpus

    @property
    def gpus_of_rank(self) -> float:
        return 0.4 if self.ray.share_gpus else self.train.gpus

    def _fits_engine(self, key: str, tokens: int) -> None:
        if tokens >= self.engine.max_model_len:
            raise ValueError(
                f"{key}={tokens} leaves no room for a prompt in engine.max_model_len={self.engine.max_model_len}; "
                "lower the first or raise the second"
            )

    def step_fits(self, step: Any) -> None:
        """Raises ValueError where a request leaves no room for a prompt, and where candidates could not be told apart
        or compared."""
        for name in ("sample", "meta"):
            if section := getattr(step, name, None):
                self._fits_engine(f"{name}.max_tokens", section.max_tokens)
        self._fits_engine("judge.max_tokens", step.judge.tokens)
        if (compare := getattr(step, "compare", None)) and compare.read != "letters":
            self._fits_engine("compare.max_tokens", compare.max_tokens)
        if self.clock.kind == "online":
            fits_online(self, step)
        if self.ray.share_gpus and step.train.early_stop:
            raise ValueError(
                "train.early_stop=true with ray.share_gpus=true: candidates are judged while the learner keeps its "
                "memory; set one of them to false"
            )
        if self.model.dtype == "bfloat16" and not step.train.zero_stage:
            raise ValueError(
                "model.dtype=bfloat16 with train.zero_stage=0: weights that are bfloat16 alone lose what small steps "
                "add to them; set train.zero_stage=1, 2 or 3, which keep them in float32 beside"
            )
        if step.train.choose != "last" and self.prompts.validation < LEAST_VALIDATION:
            raise ValueError(
                f"train.choose={step.train.choose} with prompts.validation={self.prompts.validation}: candidates are "
                f"chosen by prompts of their own, and fewer than {LEAST_VALIDATION} cannot tell them apart; raise it"
            )
        compares = self.evaluate.duel or step.train.choose == "duel"
        if self.validator.endpoint and compares and self.evaluate.judge.read != "text":
            key = "evaluate.judge" if self.evaluate.judge.endpoint else "judge"
            raise ValueError(
                f"{key}.endpoint compares in text: set evaluate.judge.read=text, or evaluate.duel=false and no "
                "train.choose=duel"
            )

    @property
    def planned(self) -> list[Step]:
        """All iterations, in order."""
        if self.steps or len(self._steps) == self.iterations:
            return self._steps
        alike = self._steps[0]
        return [replace(alike, name=f"M{number}") for number in range(1, self.iterations + 1)]

    @property
    def models_kept(self) -> int:
        """Exported models in the run folder at its end, at most."""
        if self.clock.kind == "iterative":
            return self.iterations
        others = 2 if self.clock.sync_every == 1 else 3
        return min(self.iterations, -(-self.iterations // self.clock.evaluate_every) + others)

    @property
    def validator(self) -> JudgeSection | Validator:
        """Who validates: `evaluate.judge` if it names somebody, else the judge of the rewards."""
        return self.evaluate.judge if self.evaluate.judge.external else self.judge

    @property
    def validating(self) -> JudgeSection:
        """How the validator scores an answer: as the judge of the rewards does, but in text where that judge asks no
        engine, or where the validator stands behind an API."""
        own = self.evaluate.judge
        if not own.external:
            return self.judge
        update: dict[str, Any] = {"model": own.model, "endpoint": own.endpoint}
        if own.endpoint and self.judge.kind == "yes_no":
            return self.judge.model_copy(update={**update, "structured": False})
        if own.endpoint or not self.judge.tokens:
            written = judge_section({"fence_salt": self.judge.fence_salt})
            # A template that asks for one of two words has no points for a judge that reads them.
            by_sides = getattr(plugin(self.judge.kind, JUDGES, "judge.kind"), "by_sides", False)
            apart = {"kind", "template"} if by_sides else {"kind"}
            known = {key: value for key, value in self.judge if key in type(written).model_fields.keys() - apart}
            return written.model_copy(update={**known, **update})
        return self.judge.model_copy(update=update)

    @property
    def compares(self) -> bool:
        """Whether answers are compared two by two."""
        return self.evaluate.duel or any(step.config.train.choose == "duel" for step in self._steps)

    def model_at(self, path: str) -> ModelConfig:
        """Another model, loaded like the config's own. Code that comes with it is run only where its key says so."""
        own = path == self.model.path and self.model.trust_remote_code
        others = any(path == who.model and who.trust_remote_code for who in (self.judge, self.evaluate.judge))
        return self.model.model_copy(update={"path": path, "trust_remote_code": own or others})

    def model_name(self, index: int) -> str:
        """M0, which the run starts from, and from 1 on what each iteration trains."""
        if not index:
            return "M0"
        return self._steps[index - 1].name if self.steps else f"M{index}"

    @property
    def folder(self) -> Path:
        try:
            runs = Path(self.runs).expanduser()
        except RuntimeError:
            raise ConfigError(f"runs={self.runs}: that user has no home folder here; write the folder out") from None
        if in_a_job(runs.resolve()):
            if instead := os.environ.get("RSRLM_RUNS"):
                return Path(instead).resolve() / self.name
            raise ConfigError(
                f"runs={self.runs} lies in the files that Ray keeps of this job ({Path.cwd()}) and deletes after it: "
                "write runs=/FOLDER, or set RSRLM_RUNS=/FOLDER, on a disk that all hosts share"
            )
        return runs.resolve() / self.name


def in_a_job(folder: Path) -> bool:
    """Whether a folder lies in what `ray job submit --working-dir` unpacks on the host of the driver."""
    return any(part.startswith("_ray_pkg_") for part in folder.parts)


def resolve(data: dict[str, Any], source: str = "config") -> Config:
    """Validated config from plain data, its steps included. Raises ConfigError."""
    data = {"judge": {}, **data}
    refuse_moved(data, source)
    unknown = unknown_keys(data, Config.model_fields)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join([message_of(error, source, Config), *unknown])) from None
    if unknown:
        raise ConfigError(f"{source}: " + "\n".join(unknown))
    config._steps = resolved(config, data, source)
    return config


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Config from a YAML file and `key.sub=value` overrides, whose values are YAML too. Raises ConfigError."""
    file = Path(path)
    try:
        data = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a YAML config") from None
    except ValueError as error:  # UnicodeDecodeError is one, and so is that of an impossible date
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: must be a mapping of keys, such as those of configs/quickstart.yaml")
    for override in overrides or []:
        override_key(data, override)
    return resolve(data, str(file))


def without_steps(config: Config, overrides: list[str] | None) -> Config:
    """The same models and judge without any steps, with overrides on top. Raises ConfigError."""
    data = {key: value for key, value in _plain(config).items() if key in Config.model_fields}
    data |= {"steps": [], "recipe": "self_rewarding"}
    # Of what trains, which nobody does: another recipe's keys and loss are none of this one's.
    data["train"] = {key: value for key, value in data["train"].items() if key in Train.model_fields and key != "loss"}
    for override in overrides or []:
        if override.startswith("judge.kind="):  # another judge has other keys
            data["judge"] = {key: data["judge"][key] for key in WHO_JUDGES}
        override_key(data, override)
    return resolve(data, "the run's config")


def _plain(config: Config) -> dict[str, Any]:
    """Plain data that gives the same config: every default is written out, and every step in full."""
    data = config.model_dump(mode="json")
    # Of what steps share, their own sections hold the defaults, which differ from recipe to recipe.
    own = config.train.model_dump(mode="json", exclude_unset=True)
    data["train"] = {**{name: getattr(config.train, name) for name in RANKS}, **own}
    steps = [
        {"name": step.name, "recipe": dotted(step.recipe), **step.config.model_dump(mode="json")}
        for step in config._steps
    ]
    if config.steps:
        return {**data, "steps": steps}
    # All iterations are alike: what they share stands at the top.
    alike = {key: value for key, value in steps[0].items() if key not in ("name", "prompts")}
    over = {key: value for key, value in alike.items() if key not in data or not isinstance(value, dict)}
    for key in alike.keys() - over.keys():
        # What else the recipe's section has is as it is by default. A section that only the recipe knows is a mapping.
        known = getattr(type(getattr(config, key)), "model_fields", alike[key])
        over[key] = {**data[key], **{name: value for name, value in alike[key].items() if name in known}}
    return {**data, **over}


def differences(first: Config, second: Config, apart: Iterable[str] = ()) -> list[str]:
    """Keys in which two configs differ, as "key: one -> other"; keys of the top level that are named `apart` may."""

    def flat(value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict | list) or not value:
            return {key: value}
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            name: leaf for part, inner in items for name, leaf in flat(inner, f"{key}.{part}" if key else part).items()
        }

    old, new = (
        flat({key: value for key, value in _plain(config).items() if key not in apart}, "")
        for config in (first, second)
    )
    absent = object()
    keys = [key for key in {**old, **new} if old.get(key, absent) != new.get(key, absent)]
    return [f"{key}: {old.get(key, 'not there')} -> {new.get(key, 'not there')}" for key in keys]


def dump(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
