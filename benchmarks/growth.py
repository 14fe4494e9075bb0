"""How do time and memory grow with prompts, with engines, with the length of responses and with the pairs of a step?

    python benchmarks/growth.py                    # benchmarks/results/growth.json, growth.png
    python benchmarks/growth.py --only responses   # one part, beside those of the others in growth.json

Engines answer at once, the learner has a tiny model, and every size is a process of its own. Time is CPU time of the
driver, wall time of the learner. Memory is the peak over what was there before: what a process takes for its libraries
is left out. The slope is that of a line through the upper half of the sizes, both in logarithms: 1 is proportional, 0
does not grow.
"""

import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import driver
import numpy as np
import scale
import typer
from common import RESULTS, Load, forget_peak, head, peak_mib, write
from learner import Side
from learner_sides import Work
from simulated import Lengths, Script, Simulated

from rsrlm.store.folder import RunFolder

QUESTION = "how do time and memory grow with prompts, engines, the length of responses and the pairs of a step?"
ROUNDS = 3  # of the learner's step
PORT = 29710
VOCABULARY = 8192

Figures = dict[str, float]  # seconds, mib


# -- the driver --------------------------------------------------------------------------------------------------------


def made_by_the_driver(prompts: int) -> Figures:
    """Groups, tables and signs of an iteration. Responses have 16 tokens, as in driver.py."""
    with tempfile.TemporaryDirectory(prefix="rsrlm-growth-") as name:
        config = driver.config_of(Path(name), prompts, 16)
        found = asyncio.run(driver.measured(config, RunFolder.create(config), prompts, 16, 0))
    seconds = sum(value for key, value in found.items() if key.endswith("CPU ms a group")) * prompts / 1e3
    return {"seconds": seconds, "mib": found["peak MiB over what was there before"]}


def made_by_producers(prompts: int) -> Figures:
    found = scale.kept(prompts)
    each = found["driver CPU ms a receipt"] + found["training order CPU ms a prompt"]
    return {"seconds": each * prompts / 1e3, "mib": found["peak MiB over what was there before"]}


def routed(engines: int, groups: int, tokens: int = 64) -> Figures:
    """Groups that the driver makes over so many engines of 16 requests at once, which answer at the next turn of the
    event loop: so as many are open as in a run."""
    with tempfile.TemporaryDirectory(prefix="rsrlm-growth-") as name:
        folder = Path(name)
        config = scale.config_of(folder, groups, engines, 0, 16)
        store = RunFolder.create(config)
        script = Script(Lengths(median=tokens, sigma=0, most=tokens + 1), Lengths(median=32, sigma=0, most=33))
        actors = [Simulated(script, 16, 0, folder) for _ in range(engines)]

        async def work() -> Figures:
            run, recipe, handle = await scale.opened(config, store, actors, store.event)
            await run.groups(handle, recipe, scale.WARM_UP)
            before, tasks = forget_peak(), list(scale.tasks_of(groups))
            cpu = time.process_time() - sum(one.cpu_s for one in actors)
            await run.groups(handle, recipe, tasks)
            seconds = time.process_time() - sum(one.cpu_s for one in actors) - cpu
            return {"seconds": seconds, "mib": peak_mib() - before}

        return asyncio.run(work())


# -- the learner -------------------------------------------------------------------------------------------------------


def stepped(folder: Path, pairs: int, tokens: int) -> Figures:
    """An optimizer step and the references of its pairs, in micro-batches of one. Memory is over that of a step of one
    pair of 8 tokens."""
    seconds, mib = trained(folder, pairs, tokens)
    return {"seconds": seconds, "mib": mib - trained(folder, 1, 8)[1]}


@cache
def trained(folder: Path, pairs: int, tokens: int) -> tuple[float, float]:
    """Seconds and peak MiB of the learner."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from small_models import make_tiny

    from rsrlm.model import folder_of
    from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

    model = folder / "model"
    if not model.exists():
        source = folder_of(ModelConfig(path=BUILTIN_MODEL))
        make_tiny(model, source, ends=False, max_position_embeddings=8192, vocab_size=VOCABULARY)

    def some(count: int, number: int) -> list[int]:
        return [20 + (number * 7919 + at * 104729) % (VOCABULARY - 20) for at in range(count)]

    made = [(some(32, one), some(tokens, 2 * one), some(tokens, 2 * one + 1)) for one in range(pairs)]
    work = Work(str(model), made, 1, ROUNDS, "cpu", "float32", tempfile.mkdtemp(dir=folder))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # threads of a model so small would but wait for each other
    side = Side(sys.executable, "rsrlm", work, 1, PORT)
    os.sched_setaffinity(0, cores)
    try:
        side.answer()
        rounds = [side.round() for _ in range(ROUNDS)]
    finally:
        side.close()
    seconds = statistics.median(one["reference_s"] + one["step_s"] for one in rounds)
    return seconds, rounds[-1]["memory_gib"] * 1024


# -- all of them -------------------------------------------------------------------------------------------------------


Curve = tuple[Callable[[int], Figures], Sequence[int]]  # what is measured, and at which sizes

AXES = {
    "prompts": "prompts",
    "replicas": "engines",
    "responses": "tokens of a response",
    "pairs": "pairs of an optimizer step",
}


def curves_of(part: str, folder: Path, most: int) -> dict[str, Curve]:
    """By whose time and memory it is."""
    apart, lengths = scale.apart, [2**power for power in range(6, 12)]
    decades = [10**power for power in range(2, round(math.log10(most)) + 1)]
    own, receipts = partial(apart, made_by_the_driver), partial(apart, made_by_producers)
    parts: dict[str, dict[str, Curve]] = {
        "prompts": {
            "driver, producers make the groups": (receipts, decades),
            "driver, which makes the groups": (own, [*decades[:-1], 3 * decades[-2]]),
        },
        "replicas": {
            "driver, 2,048 groups": (lambda size: apart(routed, size, 2048), [2**power for power in range(9)]),
        },
        "responses": {
            "driver, 256 groups": (lambda size: apart(routed, 4, 256, size), lengths),
            "learner, 4 pairs": (lambda size: stepped(folder, 4, size), lengths),
        },
        "pairs": {
            "learner, responses of 128 tokens": (
                lambda size: stepped(folder, size, 128),
                [2**power for power in range(8)],
            ),
        },
    }
    return parts[part]


def slope(points: Sequence[Mapping[str, float]], what: str) -> float | None:
    """Of a line through the upper half of the sizes, both in logarithms; None where there is nothing to see."""
    seen = [(one["size"], one[what]) for one in points if one[what] > 0]
    upper = seen[min(len(seen) // 2, max(len(seen) - 3, 0)) :]
    if len(upper) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(upper).T), 1)[0])


def measured(name: str, curve: Curve) -> Iterator[dict[str, Any]]:
    """What is known of the curve after each size."""
    work, sizes = curve
    points: list[dict[str, float]] = []
    for size in sizes:
        with Load() as load:
            found = work(size)
        points.append({"size": size, **found, "other_cores": load.figures()["other_cores"]})
        print(f"{name}: {size}: {found['seconds']:.3g} s, {found['mib']:.1f} MiB", flush=True)
        yield {"points": points, "slopes": {what: slope(points, what) for what in ("seconds", "mib")}}


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(16, 7), squeeze=False)
    for column, (part, axis) in enumerate(AXES.items()):
        for row, (what, unit) in enumerate((("seconds", "seconds"), ("mib", "MiB over what was there before"))):
            panel = axes[row][column]
            for name, curve in data.get(part, {}).items():
                found = curve["slopes"][what]
                said = "" if found is None else f", slope {found:.2f}"
                seen = [(one["size"], one[what]) for one in curve["points"] if one[what] > 0]
                if seen:
                    panel.plot(*zip(*seen, strict=True), marker="o", label=name + said)
                    panel.legend(fontsize=8)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, high / 100), 3 * high)  # what does not grow is to look flat
            panel.grid(alpha=0.3)
    figure.suptitle("How time and memory grow: engines that answer at once, a tiny model for the learner")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(AXES)}")] = None,
    most: Annotated[int, typer.Option(help="prompts; where the driver makes the groups, three tenths of it")] = 100_000,
    out: Annotated[
        Path, typer.Option(help="folder of growth.json and growth.png; parts that are there stay")
    ] = RESULTS,
) -> None:
    if wrong := set(only or ()) - set(AXES):
        raise SystemExit(f"--only {', '.join(sorted(wrong))}: must be of {', '.join(AXES)}")
    before = out / "growth.json"
    data: dict[str, Any] = json.loads(before.read_text()) if before.exists() else {}
    try:
        with tempfile.TemporaryDirectory(prefix="rsrlm-growth-") as name:
            for part in only or AXES:
                data = {**data, **head(QUESTION), part: {}}
                for curve, made in curves_of(part, Path(name), most).items():
                    for found in measured(curve, made):
                        data[part][curve] = found
                        write(out, "growth", data)
    finally:
        plot(data, out / "growth.png")
    for part in AXES:
        for curve, found in data.get(part, {}).items():
            said = {what: None if one is None else round(one, 2) for what, one in found["slopes"].items()}
            print(f"{AXES[part]}, {curve}: slopes {said}")


if __name__ == "__main__":
    typer.run(main)
