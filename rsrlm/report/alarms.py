"""Alarms: the signs of an iteration that are past their limits.

Default limits only warn, because most of them are our own guesses: they ask for a look. docs/alarms.md says more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rsrlm.config import Config, ConfigError
from rsrlm.report.signs import SIGNS, Direction

Action = Literal["warn", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A value strictly `direction` of `warn` or `stop` raises an alarm; None never does."""

    direction: Direction
    warn: float | None = None
    stop: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A sign past its limit."""

    sign: str
    value: float
    limit: float
    direction: Direction
    action: Action

    @property
    def message(self) -> str:
        """One short line: what, value, limit, what to do, where to read on."""
        value = f"{float(f'{self.value:.4g}'):g}"  # four digits, and no exponent for thousands of characters
        remedy = SIGNS[self.sign].remedy
        return f"{self.sign} is {value}, {self.direction} {self.limit:g}: {remedy} (docs/alarms.md#{self.sign})"


DEFAULT_LIMITS: dict[str, Limit] = {
    name: Limit(direction=sign.direction, warn=sign.warn) for name, sign in SIGNS.items()
}


def limits_of(config: Config, scale: tuple[int, int] = (0, 5)) -> dict[str, Limit]:
    """The defaults with the changes in the config's `watch`. Raises ConfigError for a name that is no sign.

    Limits on points suppose a judge that scores from 0 to 5: another `scale`, and a function, which may return any
    number, have none by default.
    """
    if unknown := [repr(name) for name in config.watch if name not in SIGNS]:
        raise ConfigError(f"watch: no sign {', '.join(unknown)}; the signs are {', '.join(SIGNS)}")
    limits = dict(DEFAULT_LIMITS)
    if config.judge.tokens == 0 or scale != (0, 5):
        limits |= {name: replace(limits[name], warn=None) for name, sign in SIGNS.items() if sign.on_points}
    for name, changes in config.watch.items():
        chosen = {"warn": None, "stop": None} if changes is None else changes.model_dump(exclude_unset=True)
        limits[name] = replace(limits[name], **chosen)
    return limits


def check(found: Mapping[str, float | None], limits: Mapping[str, Limit] = DEFAULT_LIMITS) -> list[Alarm]:
    """At most one alarm per sign, in the order of `limits`; past both limits it is a stop.

    A sign that is None raises none.
    """
    raised: list[Alarm] = []
    actions: tuple[Action, Action] = ("stop", "warn")
    for name, limit in limits.items():
        value = found.get(name)
        for action, bound in zip(actions, (limit.stop, limit.warn), strict=True):
            if value is None or bound is None:
                continue
            if value > bound if limit.direction == "above" else value < bound:
                raised.append(Alarm(sign=name, value=value, limit=bound, direction=limit.direction, action=action))
                break
    return raised
