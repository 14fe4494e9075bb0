"""Metrics of a run, exported by Ray: every node of a cluster serves them to Prometheus (cluster/monitoring).

They come from what the run writes into its folder, from its engines and from what its screen counts: a thread looks
every few seconds, and nothing in the run waits for it.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rsrlm.config import Config
from rsrlm.store.folder import RunFolder
from rsrlm.store.followed import Followed

EVERY_S = 5.0
STATS_S = 5.0  # for what the engines count; a busy one is asked again at the next look
COUNTERS = {  # Prometheus sees ray_NAME_total
    "rsrlm_answers": ("answers and judgements that came in, and items trained on", "what"),
    "rsrlm_tokens": ("tokens of them", "what"),
    "rsrlm_groups": ("prompts that are done, with or without a pair", "paired"),
    "rsrlm_pairs": ("preference pairs made", ""),
    "rsrlm_steps": ("optimizer steps", ""),
    "rsrlm_engines_up": ("engines that came up", "pool"),
    "rsrlm_engines_lost": ("engines that died or were given up", "pool"),
    "rsrlm_engines_restarted": ("engines that replaced one", "pool"),
    "rsrlm_alarms": ("signs of trouble beyond their limits", "sign"),
}
GAUGES = {  # Prometheus sees ray_NAME
    "rsrlm_running": ("1 while the run goes on", ""),
    "rsrlm_iteration": ("iterations that are finished", ""),
    "rsrlm_engines_wanted": ("engines of a pool", "pool"),
    "rsrlm_engines_ready": ("engines that may be given work", "pool"),
    "rsrlm_queue_tokens": ("tokens that the requests in flight may still take", "pool"),
    "rsrlm_engine_weights": ("number of the model that an engine holds: 0 for M0, 1 for the next", "engine"),
    "rsrlm_engine_counter": ("counters of vLLM, of all engines together", "counter"),
    "rsrlm_publish_seconds": ("the last update of an engine's weights", "engine"),
    "rsrlm_step": ("numbers of the last optimizer step, such as loss, margin, accuracy and seconds", "number"),
    "rsrlm_stage_seconds": ("stages of the last finished iteration", "stage"),
    "rsrlm_result": ("numbers of the last finished iteration", "number"),
    "rsrlm_sign": ("signs of trouble of the last finished iteration", "sign"),
    "rsrlm_endpoint": ("use of a judge or validator behind an API, such as its cost", "number"),
}
RESULTS = ("mean_score", "mean_margin", "mean_response_tokens", "prefix_cache_hit_share", "pairs_trained", "seconds")


def _with_ray(name: str, text: str, tags: tuple[str, ...], counts: bool) -> Any:
    from ray.util.metrics import Counter, Gauge

    return (Counter if counts else Gauge)(name, text, tags)


class Meters:
    """The metrics of one run. `made` makes a metric, for tests."""

    def __init__(self, run: str, made: Callable[..., Any] = _with_ray) -> None:
        self._run = run
        self._metrics = {
            name: (made(name, text, ("run", tag) if tag else ("run",), names is COUNTERS), tag)
            for names in (COUNTERS, GAUGES)
            for name, (text, tag) in names.items()
        }

    def count(self, name: str, number: float, tag: str = "") -> None:
        if number > 0:
            metric, key = self._metrics[name]
            metric.inc(number, tags=self._tags(key, tag))

    def set(self, name: str, number: Any, tag: str = "") -> None:
        """Anything but a number is left out: what was not measured is null."""
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            metric, key = self._metrics[name]
            metric.set(float(number), tags=self._tags(key, tag))

    def each(self, name: str, numbers: Mapping[str, Any]) -> None:
        for tag, number in numbers.items():
            self.set(name, number, tag)

    def _tags(self, key: str, tag: str) -> dict[str, str]:
        return {"run": self._run, **({key: tag} if key else {})}


class Watcher:
    """Looks at a run, and sets its meters."""

    def __init__(self, meters: Meters, config: Config, store: RunFolder) -> None:
        self._meters, self._store = meters, store
        self._numbers = {config.model_name(index): index for index in range(config.iterations + 1)}
        self._events = Followed(store.folder / "events.jsonl")
        self._steps: Followed | None = None
        self._finished = 0
        self._pools: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def follow(self, pools: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Look at these engines from now on; `pools` are EnginePools, used in `loop` alone."""
        self._pools, self._loop = pools, loop

    def look(self) -> None:
        for event in self._events.lines():
            self._heard(event)
        self._iterations()
        for name in ("judge", "validator"):
            used = self._store.note(f"endpoint-{name}")
            self._meters.each("rsrlm_endpoint", {f"{name}/{key}": value for key, value in used.items()})
        if self._loop is not None and self._loop.is_running():
            self._engines()
            stats = asyncio.run_coroutine_threadsafe(self._pools.stats(), self._loop)
            self._meters.each("rsrlm_engine_counter", stats.result(timeout=STATS_S))

    def _heard(self, event: Mapping[str, Any]) -> None:
        meters, kind = self._meters, event["event"]
        if kind == "group":
            meters.count("rsrlm_groups", 1, "yes" if event["pairs"] else "no")
            meters.count("rsrlm_pairs", len(event["pairs"]))
        elif kind == "step":
            meters.count("rsrlm_steps", 1)
        elif kind in ("engine_up", "engine_lost", "engine_restarted"):
            meters.count(f"rsrlm_engines_{kind.removeprefix('engine_')}", 1, event["pool"])
        elif kind == "alarm":
            meters.count("rsrlm_alarms", 1, event["sign"])
        elif kind == "published":
            for report in event["replicas"]:
                meters.set("rsrlm_publish_seconds", report.get("total"), str(report.get("replica")))

    def _iterations(self) -> None:
        rows = self._store.metrics()
        self._meters.set("rsrlm_iteration", len(rows))
        for row in rows[self._finished :]:
            self._meters.each("rsrlm_stage_seconds", row.get("stage_seconds", {}))
            self._meters.each("rsrlm_sign", row.get("signs", {}))
            self._meters.each("rsrlm_result", {name: row.get(name) for name in RESULTS} | _derived(row))
        self._finished = len(rows)
        path = self._store.iteration(len(rows)) / "steps.jsonl"
        if self._steps is None or self._steps.path != path:
            self._steps = Followed(path)
        for step in self._steps.lines():
            self._meters.each("rsrlm_step", step)

    def _engines(self) -> None:
        for pool in self._pools.all:
            replicas = pool.replicas
            self._meters.set("rsrlm_engines_wanted", len(replicas.all), replicas.name)
            self._meters.set("rsrlm_engines_ready", len(replicas.ready), replicas.name)
            self._meters.set("rsrlm_queue_tokens", sum(one.outstanding for one in replicas.all), replicas.name)
            held = {f"{replicas.name}/{one.index}": self._numbers.get(one.version) for one in replicas.all}
            self._meters.each("rsrlm_engine_weights", held)


def _derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of an iteration that its metrics.json has in parts."""
    heldout = row.get("heldout") or {}
    judged = row.get("judgements")
    return {
        "unreadable_share": row.get("judgements_unreadable", 0) / judged if judged else None,
        "kl_to_first": (heldout.get("kl_to_first") or {}).get("per_token"),
        "heldout_score_by_itself": (heldout.get("score_by_current") or {}).get("mean"),
        "heldout_score_by_first": (heldout.get("score_by_first") or {}).get("mean"),
        "train_seconds": (row.get("learner") or {}).get("train_seconds"),
        "publish_seconds": (row.get("published") or {}).get("seconds"),
    }


class Counting:
    """A screen whose stages are counted as well."""

    def __init__(self, screen: Any, meters: Meters) -> None:
        self._screen, self._meters = screen, meters

    def line(self, text: str) -> None:
        self._screen.line(text)

    @contextlib.contextmanager
    def stage(self, title: str, totals: dict[str, int]) -> Iterator[Callable[[str, int, int], None]]:
        with self._screen.stage(title, totals) as tick:

            def counted(what: str, items: int, tokens: int) -> None:
                tick(what, items, tokens)
                self._meters.count("rsrlm_answers", items, what)
                self._meters.count("rsrlm_tokens", tokens, what)

            yield counted


@contextlib.contextmanager
def exported(meters: Meters, watcher: Watcher, every_s: float = EVERY_S) -> Iterator[None]:
    """Look every so many seconds, and once more at the end. What goes wrong with a look is no matter of the run."""
    done = threading.Event()

    def watch() -> None:
        ended = False
        while not ended:
            ended = done.wait(every_s)
            with contextlib.suppress(Exception):
                watcher.look()

    meters.set("rsrlm_running", 1)
    thread = threading.Thread(target=watch, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        with contextlib.suppress(Exception):
            meters.set("rsrlm_running", 0)
