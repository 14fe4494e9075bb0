"""How a run stands, by the files of its folder alone: from any host that sees them, while it runs and after it.

Nothing is locked or written, and what grows is read on from where the last look ended.
"""

import json
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rsrlm.report.heartbeat import GOES_ON, Heartbeat, changed_at, json_of
from rsrlm.report.pulse import Pulse, Sampled, shortened
from rsrlm.settings.base import ConfigError, first_line
from rsrlm.store.folder import LAYOUT
from rsrlm.store.followed import Followed

LAST_BYTES = 16 << 20  # of events.jsonl and steps.jsonl at the first look
FIRST_LINE = 1 << 16  # bytes
LOSSES = 200  # of the last steps
QUIET = ("group", "step")  # events that are counted elsewhere


@dataclass(frozen=True, kw_only=True)
class State:
    """What can be said of a run now. Times are of the run's clock, in seconds since 1970."""

    folder: Path
    name: str
    recipe: str
    iterations: int
    online: bool
    status: str  # that of summary.json, or "starting", "silent" (perhaps dead), "killed"
    reason: str
    silent_s: float  # since the run was heard of
    began: float | None
    now: float
    pulse: Pulse | None
    models: tuple[str, ...]  # M0, and what each finished iteration left
    lag: int | None  # of the last finished round: models between who answered it and who learnt from it
    training: int | None  # the iteration that `step` is of
    step: Mapping[str, Any]  # the last row of its steps.jsonl
    losses: tuple[float, ...]  # of the last steps
    alarm: Mapping[str, Any]  # the last event of its kind, as `evaluated`
    evaluated: Mapping[str, Any]
    event: Mapping[str, Any]  # the last of all
    asked: Mapping[str, int]  # engines by pool, by scale.json
    log: str  # the newest one of an engine that died
    sample: Sampled | None
    news: tuple[Mapping[str, Any], ...]  # events since the last look, but for those of groups and steps

    @property
    def goes_on(self) -> bool:
        return self.status in GOES_ON

    @property
    def finished(self) -> int:
        """Iterations."""
        return len(self.models) - 1

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the training that `step` is of, where it goes on."""
        for stage in self.pulse.stages if self.pulse else ():
            if stage.title == f"iteration {self.training}":
                return next((bar.of for bar in stage.bars if bar.what == "steps"), None)
        return None

    def behind(self, iteration: int, by: str) -> int:
        """How many models the one that answers a round is behind the one that is to learn from it."""
        return _behind(self.models[: iteration + 1], iteration, by)


def _behind(models: tuple[str, ...], iteration: int, by: str) -> int:
    return iteration - max((at for at, name in enumerate(models) if name == by), default=iteration)


class RunReader:
    """Looks at a run again and again."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where there is no run, or one of another layout."""
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{folder}: no run here (no config.yaml); give the folder of a run, such as runs/NAME, which is there "
                "once the run has checked its prompts, model and data"
            )
        layout = json_of(folder / "start.json").get("layout", LAYOUT)
        if layout != LAYOUT:
            raise ConfigError(
                f"{folder}: this run was begun with another version of rsrlm, which keeps it in another way; use "
                "that version"
            )
        self._folder = folder
        self._config = _config(folder / "config.yaml")
        self._heart = Heartbeat(folder)
        self._events = Followed(folder / "events.jsonl", LAST_BYTES)
        self._last: dict[str, dict[str, Any]] = {}  # events by kind
        self._event: dict[str, Any] = {}
        self._began: float | None = None
        self._models: tuple[str, ...] = ("M0",)
        self._lag: int | None = None
        self._steps = Steps(folder, self.online)
        self._sampled: Sampled | None = None
        self._sampled_of = -1

    @property
    def online(self) -> bool:
        clock = self._config.get("clock")
        return isinstance(clock, dict) and clock.get("kind") == "online"

    def look(self) -> State:
        self._heart.look()
        summary, pulse = json_of(self._folder / "summary.json"), self._heart.pulse
        status = self._heart.status(str(summary.get("status", "")))
        news = self._news()
        self._take_up()
        self._steps.look(len(self._models) - 1)
        self._began = self._began or _time_of(_first(self._folder / "events.jsonl"))
        goes_on = status in GOES_ON
        ended = self._event.get("t") or changed_at(self._folder / "summary.json")
        asked = json_of(self._folder / "scale.json")
        return State(
            folder=self._folder,
            **self._about(),
            status=status,
            reason=str(summary.get("reason", "")),
            silent_s=self._heart.silent_s,
            began=self._began,
            now=self._heart.now() if goes_on else ended,
            pulse=pulse if goes_on else None,
            models=self._models,
            lag=self._lag,
            training=self._steps.iteration,
            step=self._steps.last,
            losses=tuple(loss for _, _, loss in self._steps.losses),
            alarm=self._last.get("alarm", {}),
            evaluated=self._last.get("evaluated", {}),
            event=self._event,
            asked={name: number for name, number in asked.items() if type(number) is int},
            log=_newest(self._folder / "logs"),
            sample=(pulse.sample if pulse else None) or self._last_sample(),
            news=news,
        )

    def _about(self) -> dict[str, Any]:
        """What the config says, which a run does not change."""
        steps, config = self._config.get("steps"), self._config
        listed = [one for one in steps if isinstance(one, dict)] if isinstance(steps, list) else []
        step = listed[min(len(self._models), len(listed)) - 1] if listed else {}
        iterations = config.get("iterations")
        return {
            "name": self._folder.resolve().name,
            "recipe": str(step.get("recipe") or config.get("recipe") or "?"),
            "iterations": iterations if isinstance(iterations, int) else len(listed),
            "online": self.online,
        }

    def _news(self) -> tuple[dict[str, Any], ...]:
        news = []
        for event in self._events.lines():
            if not isinstance(event.get("event"), str) or _time_of(event) is None:
                continue
            self._event = event
            if event["event"] not in QUIET:
                self._last[event["event"]] = event
                news.append(event)
        return tuple(news)

    def _take_up(self) -> None:
        """Of iterations that have been finished since."""
        while row := json_of(_iteration(self._folder, number := len(self._models) - 1) / "metrics.json"):
            actor = row.get("actor")
            self._lag = _behind(self._models, number, actor) if isinstance(actor, str) else None
            self._models = (*self._models, str(row.get("weight_version", f"M{number + 1}")))

    def _last_sample(self) -> Sampled | None:
        """Of the last iteration whose records are written, which are read once."""
        number = len(self._models) - 1
        for one in (number, number - 1):
            if one > self._sampled_of and (sampled := recorded(_iteration(self._folder, one))):
                self._sampled, self._sampled_of = sampled, one
        return self._sampled


class Steps:
    """The optimizer steps of the newest training; on the online clock also those before, which are of one curve."""

    def __init__(self, folder: Path, online: bool) -> None:
        self._folder, self._online = folder, online
        self._file: Followed | None = None
        self.iteration: int | None = None
        self.last: dict[str, Any] = {}
        self.losses: deque[tuple[int, int, float]] = deque(maxlen=LOSSES)  # iteration, step, loss

    def look(self, iteration: int) -> None:
        """`iteration` is the one that is not finished."""
        found = next(filter(None, map(self._newest, (iteration, iteration - 1))), None)
        if found and (self._file is None or self._file.path != found[1]):
            if not self._online:
                self.losses.clear()
            elif self._file is None:
                for number in range(max(0, found[0] - LOSSES), found[0]):
                    self._read(number, Followed(_iteration(self._folder, number) / "steps.jsonl", LAST_BYTES))
            self.iteration, self._file = found[0], Followed(found[1], LAST_BYTES)
        if self._file and self.iteration is not None:
            self._read(self.iteration, self._file)

    def _newest(self, number: int) -> tuple[int, Path] | None:
        """The file of an iteration, which may train several models."""
        folder = _iteration(self._folder, number)
        paths = [path for path in (folder / "steps.jsonl", *folder.glob("*/steps.jsonl")) if path.is_file()]
        return (number, max(paths, key=changed_at)) if paths else None

    def _read(self, number: int, file: Followed) -> None:
        for row in file.lines():
            step, loss = row.get("step"), row.get("loss")
            if type(step) is not int or not isinstance(loss, int | float):
                continue
            while self.losses and self.losses[-1][:2] >= (number, step):  # they were lost, and are done again
                self.losses.pop()
            self.losses.append((number, step, float(loss)))
            self.last = row


def recorded(folder: Path) -> Sampled | None:
    """The last response of the last prompt in the tables of an iteration; None where there are none."""
    with suppress(OSError, KeyError, pa.ArrowException):
        responses = _last_rows(folder / "responses.parquet", ["id", "prompt_id", "text", "role"])
        response = next((row for row in reversed(responses) if row["role"] == "actor"), None)
        if response is None:
            return None
        judgements = _last_rows(folder / "judgements.parquet", ["response_id", "points"])
        found = [one["points"] for one in judgements if one["response_id"] == response["id"]]
        points = [one for one in found if one is not None and isfinite(one)]
        prompts = {row["id"]: row["text"] for row in _last_rows(folder / "prompts.parquet", ["id", "text"])}
        return Sampled(
            group=str(response["id"]).rpartition("/")[0],
            prompt=shortened(prompts.get(response["prompt_id"], "")),
            response=shortened(response["text"]),
            score=round(sum(points) / len(points), 4) if points else None,
        )
    return None


def _last_rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Of the last row group: its tables have the same order, but for few prompts."""
    with pq.ParquetFile(path) as file:
        rows: list[dict[str, Any]] = file.read_row_group(file.num_row_groups - 1, columns=columns).to_pylist()
    return rows


def _config(path: Path) -> dict[str, Any]:
    """As plain data: what a recipe of one's own knows is of no matter here, and its code is not run."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); is the folder still being copied?") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no config; is the folder still being copied?")
    return found


def _iteration(folder: Path, number: int) -> Path:
    return folder / "iterations" / f"{number:02d}"


def _first(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError), path.open("rb") as file:
        found = json.loads(file.readline(FIRST_LINE))
        return found if isinstance(found, dict) else {}
    return {}


def _time_of(event: Mapping[str, Any]) -> float | None:
    time = event.get("t")
    return float(time) if isinstance(time, int | float) else None


def _newest(folder: Path) -> str:
    return max((path for path in folder.glob("*.err")), key=changed_at, default=Path()).name
