"""What `rsrlm watch` shows of a run: one screen on a terminal, or a line for each change.

All that comes from a run's files passes `printable`: a model's text must not move the cursor or set a title.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rsrlm.report.pulse import Bar, PoolPulse, Sampled, Stage
from rsrlm.report.signs import SIGNS
from rsrlm.report.state import State

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 40  # characters
ENDED_SHOWN = 2  # stages: all of it fits a terminal of 24 lines
COLOURS = {"running": "green", "completed": "green", "starting": "cyan", "silent": "yellow", "killed": "red"}
LABEL = 10  # characters of the left column


def printable(text: str) -> str:
    """Text on one line; control characters are written out (`\\x1b`), so that a terminal obeys none."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if character in "\n\r\t" or kind in ("Zl", "Zp"):
        return " "
    if kind in ("Cc", "Cs", "Co"):
        return character.encode("unicode_escape", "surrogatepass").decode()
    return "" if kind == "Cf" else character  # such as those that turn the direction of a line


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: Any) -> str:
    """Three digits behind the point where there are few before it."""
    if not isinstance(value, int | float):
        return "-"
    if not isfinite(value):
        return str(value)
    return f"{value:.3f}" if 1e-3 <= abs(value) < 100 or not value else f"{value:.3g}"


def many(tokens: int) -> str:
    return f"{tokens / 1e6:.1f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k" if tokens >= 1e4 else str(tokens)


def sparkline(values: Sequence[float], width: int = CURVE) -> str:
    """The values as blocks from the lowest to the highest; of many, means of neighbours. `?` is none that is finite."""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    finite = [one for one in means if isfinite(one)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((one - low) * scale)] if isfinite(one) else "?" for one in means)


# -- one screen ------------------------------------------------------------------------------------------------------


def view(state: State, hint: str) -> RenderableType:
    """All of it; what matters most comes first, for a low terminal. `hint` is the last line."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL, style="dim", no_wrap=True)
    table.add_column(ratio=1)
    for label, what in _rows(state):
        table.add_row(Text(label), what)
    parts = [_header(state), *([_stages(state)] if state.pulse and state.pulse.stages else []), table]
    spaced = [line for part in parts for line in (part, Text())]
    return Group(*spaced, Text(printable(hint), style="dim"))


def _header(state: State) -> RenderableType:
    first = Text(overflow="ellipsis", no_wrap=True)
    first.append(printable(state.name), style="bold")
    first.append(f"  {printable(state.recipe)}  ")
    first.append(printable(state.status), style=f"bold {COLOURS.get(state.status, 'yellow')}")
    first.append(f"  {progress(state)}")
    second = Text(_where(state), style="dim")
    return Group(first, second, Text(printable(state.reason), style="red")) if state.reason else Group(first, second)


def progress(state: State) -> str:
    """Of the whole run."""
    unit = "round" if state.online else "iteration"
    if not state.goes_on or state.finished >= state.iterations:
        done = f"{state.finished} of {state.iterations} {unit}s done"
    else:
        done = f"{unit} {state.finished} ({state.finished} of {state.iterations} done)"
    return f"{done}, {duration(state.now - state.began)}" if state.began else done


def _where(state: State) -> str:
    if not state.goes_on:
        lasted = f"no sign of life for {duration(state.silent_s)}; " if state.status == "killed" else ""
        return f"{lasted}{printable(str(state.folder))}"
    who = (
        f"process {state.pulse.pid} on {printable(state.pulse.host)}" if state.pulse else "nobody has said who runs it"
    )
    if not state.pulse and state.status == "starting":
        return "it has not begun yet: prompts, model and data are checked"
    quiet = f", last heard of {duration(state.silent_s)} ago" if state.silent_s > 10 else ""
    event = state.event
    last = f"; {duration(state.now - event['t'])} ago: {said(event)}" if event and not _open(state) else ""
    return f"{who}{quiet}{last}"


def _open(state: State) -> list[Stage]:
    return [stage for stage in state.pulse.stages if stage.ended is None] if state.pulse else []


def _stages(state: State) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(max_width=24, no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(max_width=16)  # on a narrow terminal it is the first to shrink
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    stages = state.pulse.stages if state.pulse else ()
    ended = [stage for stage in stages if stage.ended is not None]
    for stage in [*ended[-ENDED_SHOWN:], *_open(state)]:
        if stage.ended is not None:
            table.add_row(*map(Text, _ended(stage)), style="dim")
            continue
        left = eta(stage, state.now)
        for at, bar in enumerate(stage.bars):
            shown = ProgressBar(total=max(1, bar.of), completed=bar.done)
            title, rest = ("", "") if at else (printable(stage.title), left)
            counts = f"{bar.done}/{bar.of}", rate(bar, stage, state.now), rest
            table.add_row(Text(title), Text(printable(bar.what)), shown, *map(Text, counts))
    return table


def _ended(stage: Stage) -> tuple[str, ...]:
    assert stage.ended is not None
    last = stage.bars[-1] if stage.bars else Bar(what="", done=0, of=0)
    took = duration(stage.ended - stage.began)
    return printable(stage.title), printable(last.what), "done", f"{last.done}/{last.of}", "", took


def rate(bar: Bar, stage: Stage, now: float) -> str:
    seconds = (stage.ended or now) - stage.began
    return f"{bar.tokens / seconds:.0f} tok/s" if bar.tokens and seconds > 0 else ""


def eta(stage: Stage, now: float) -> str:
    """When the work that is furthest behind would end; nothing before there is something to go by."""
    worst = min((bar.done / bar.of for bar in stage.bars if bar.of), default=1.0)
    elapsed = now - stage.began
    return f"{duration(elapsed / worst - elapsed)} left" if worst > 0.05 else f"{duration(elapsed)} so far"


def _rows(state: State) -> Iterator[tuple[str, RenderableType]]:
    yield from _engines(state)
    yield from _buffer(state)
    if state.step:
        yield "last step", Text(last_step(state))
    if state.losses:
        finite = [loss for loss in state.losses if isfinite(loss)]
        ends = f"{number(finite[0])} to {number(finite[-1])}" if finite else "no finite number"
        yield "loss", Text.assemble((sparkline(state.losses), "cyan"), f" {ends}")
    if state.evaluated:
        yield "held-out", Text(evaluated(state.evaluated))
    if state.alarm:
        yield "alarm", Text(alarm(state.alarm), style="yellow")
    if state.sample:
        yield from _sample(state.sample)


def _engines(state: State) -> Iterator[tuple[str, RenderableType]]:
    for pool in state.pulse.engines if state.pulse else ():
        style = "" if pool.ready == pool.wanted and not pool.lost else "yellow"
        yield printable(pool.name), Text(printable(engines(pool, state)), style=style)


def engines(pool: PoolPulse, state: State) -> str:
    parts = [f"{pool.ready}/{pool.wanted} ready"]
    if pool.held:
        parts.append("hold " + " and ".join(pool.held))
    if pool.queued:
        parts.append(f"{many(pool.queued)} tokens queued")
    if pool.lost:
        parts.append(f"{pool.lost} lost" + (f" (logs/{state.log})" if state.log else ""))
    if (asked := state.asked.get(pool.name, pool.wanted)) != pool.wanted:
        parts.append(f"{asked} asked for")
    return ", ".join(parts)


def _buffer(state: State) -> Iterator[tuple[str, RenderableType]]:
    for at, one in enumerate(state.pulse.buffer if state.pulse else ()):
        text = f"{'round' if state.online else 'iteration'} {one.iteration}: {one.groups}/{one.of} prompts done"
        text += f", {one.pairs} pair{'' if one.pairs == 1 else 's'}, answered by {one.by}"
        if state.online:
            text += f", lag {state.behind(one.iteration, one.by)}"
        yield "" if at else "buffer", Text(printable(text))
    if state.lag is not None and not (state.pulse and state.pulse.buffer):
        yield "lag", Text(f"{state.lag} in the last round")


def last_step(state: State) -> str:
    step = state.step
    of = f" of {state.steps}" if state.steps else ""
    parts = [f"{step['step'] + 1}{of}"]
    for key in ("loss", "margin", "accuracy"):
        if key in step:
            parts.append(f"{key} {number(step[key])}")
    if isinstance(step.get("tokens_per_s"), int | float):
        parts.append(f"{step['tokens_per_s']:.0f} tok/s")
    return ", ".join(parts)


def evaluated(event: Mapping[str, Any]) -> str:
    """What was found of a model on the held-out prompts."""
    parts = []
    for key in ("score_by_first", "score_by_current"):
        if isinstance(score := event.get(key), Mapping):
            parts.append(f"{number(score.get('mean'))} by {score.get('judge')}")
    duel = next((value for key, value in event.items() if key.startswith("duel_with_")), None)
    if isinstance(duel, Mapping) and duel.get("n"):
        shares = " / ".join(f"{100 * duel[key]:.0f} %" for key in ("win", "tie", "loss"))
        parts.append(f"won / tied / lost against the one before {shares}")
    return printable(f"{event.get('model')}: score {', '.join(dict.fromkeys(parts))}")


def alarm(event: Mapping[str, Any]) -> str:
    name = str(event.get("sign"))
    known = f": {SIGNS[name].remedy} (docs/alarms.md#{name})" if name in SIGNS else ""
    stops = ", which ends the run" if event.get("action") == "stop" else ""
    return printable(f"after iteration {event.get('iteration')}: {name} is {number(event.get('value'))}{stops}{known}")


def _sample(sample: Sampled) -> Iterator[tuple[str, RenderableType]]:
    yield "sample", Text(printable(sample_line(sample)))
    yield "prompt", Text(clipped(sample.prompt, 140), style="dim")
    yield "response", Text(clipped(sample.response, 280))


def sample_line(sample: Sampled) -> str:
    points = f", score {number(sample.score)}" if sample.score is not None else ""
    other = f" against {number(sample.rejected)}" if sample.rejected is not None else ""
    reason = f", no pair: {sample.reason}" if sample.reason else ""
    return f"{sample.group}{points}{other}{reason}"


def clipped(text: str, most: int) -> str:
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= most else shown[: most - 4] + " ..."


# -- lines -----------------------------------------------------------------------------------------------------------


NAMED = ("version", "model", "pool", "replica", "producer", "iteration", "error")  # fields of events that tell most


def said(event: Mapping[str, Any]) -> str:
    """An event in words."""
    kind = event.get("event")
    if kind == "alarm":
        return alarm(event)
    if kind == "evaluated":
        return evaluated(event)
    if kind == "ray":
        return "Ray started"
    what = " ".join(str(event[name]) for name in NAMED if name in event)
    return printable(f"{str(kind).replace('_', ' ')} {what}".strip())[:200]


def lines(before: State | None, now: State, counts: bool) -> Iterator[str]:
    """A line for each change. Numbers that change all the time are in it where `counts`."""
    changed = before is None or before.status != now.status
    reason = f": {printable(now.reason)}" if now.reason else ""
    status = f"{printable(now.name)}: {printable(now.status)}, {progress(now)}{reason}"
    if changed and now.goes_on:
        yield status
    for event in now.news if before else ():
        if event["event"] != "run_ended":  # the status says so
            yield said(event)
    for stage in _open(now) if counts else ():
        bars = ", ".join(_counted(bar, stage, now.now) for bar in stage.bars)
        yield f"{printable(stage.title)}: {printable(bars)}, {eta(stage, now.now)}"
    if counts and now.step and (before is None or before.step != now.step):
        yield f"step {last_step(now)}"
    if changed and not now.goes_on:
        yield status


def _counted(bar: Bar, stage: Stage, now: float) -> str:
    speed = rate(bar, stage, now)
    return f"{bar.what} {bar.done}/{bar.of}" + (f" ({speed})" if speed else "")
