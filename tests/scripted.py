"""Engines that answer by a script, and the fakes around them: a journal in memory, pools, a screen, a run.

`Scripted` goes by which text stands where in a prompt, so that an exchange of two texts changes the outcome; `Seeded`
goes by the seed alone, so that nothing but the request can change an answer.
"""

import asyncio
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rsrlm.engines import Answers, Engines, Model, gather
from rsrlm.judges.base import context_of
from rsrlm.meta_judging import PositionWeights, position_weights
from rsrlm.records import Completion, Group, Prompt, Request, Task
from rsrlm.run import Run

_TAG = re.compile(r"<((?:question|response|judgement)(?: [AB])?)(| [0-9a-f]{8})>\n(.*?)\n</\1\2>", re.DOTALL)
LETTERS = {"A": (math.log(0.7), math.log(0.2)), "B": (math.log(0.2), math.log(0.7)), "tie": (-1.0, -1.0)}


def shown(tokenizer: Any, request: Request) -> dict[str, str]:
    """What stands under each tag of a judge's prompt, such as "response A"; empty for an actor's prompt."""
    return {tag: text for tag, _, text in _TAG.findall(tokenizer.decode(request.prompt_token_ids))}


class Scripted:
    """Holds a model; `answer` gives the text, or "A", "B", "tie" where letters are read, from what is shown, the
    request and the model that is held."""

    slots = 8

    def __init__(self, tokenizer: Any, answer: Callable[[dict[str, str], Request, str], str]) -> None:
        self.tokenizer = tokenizer
        self.answer = answer
        self.held = "M0"
        self.weights = ""  # the digest of what is held, where the pools know it
        self.holds: list[str] = []
        self.requests: list[Request] = []

    async def hold(self, version: str, files: Any = None) -> dict[str, Any]:
        if version != self.held:
            self.holds.append(version)
        self.held = version
        return {"version": version}

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        text = self.answer(shown(self.tokenizer, request), request, self.held)
        scored = request.score_from is not None
        return Completion(
            request_id=request.id, token_ids=(*self.tokenizer.encode(text), 2), text=text, finish_reason="stop",
            weight_version=self.held,
            label_logprobs=LETTERS[text] if request.label_ids else (),
            prompt_logprobs=(-2.0 if self.held == "M0" else -1.0,)
            * (len(request.prompt_token_ids) - (request.score_from or 0))
            if scored
            else (),
        )  # fmt: skip


# The digits "0", "4" and "5" have half of the probability; the other half is on other tokens.
DIGITS = (math.log(0.3), -math.inf, -math.inf, -math.inf, math.log(0.1), math.log(0.1))


class Characters:
    """An encoder whose tokens are characters. A judge's prompt is what it is shown, with bars between."""

    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(map(ord, text)))

    def user(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def encode(self, template: str, fields: Mapping[str, str], prefix: str = "") -> tuple[int, ...]:
        names = ("instruction", "response", "response_a", "response_b", "judgement_a", "judgement_b", "fence")
        return tuple(map(ord, "|".join(fields[name] for name in names if name in fields) + prefix))


class Seeded:
    """The answer is a function of the seed alone; `pause` is awaited before it. `calls` are the ids that were asked of
    it together."""

    def __init__(self, pause: Callable[[Request], Any] | None = None, slots: int = 4, held: str = "M0") -> None:
        self.requests: list[Request] = []
        self.calls: list[list[str]] = []
        self.slots, self.held = slots, held
        self._pause = pause

    async def hold(self, version: str) -> dict[str, Any]:
        self.held = version
        return {"version": version}

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append([request.id for request in requests])
        return await gather(map(self.generate, requests))

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        if self._pause:
            await self._pause(request)
        seed = request.sampling.seed
        return Completion(
            request_id=request.id,
            token_ids=(seed % 50_000, seed % 11),
            text=f"Because.\nScore: {seed % 6}" if "#" in request.id else "word " * (seed % 7),
            finish_reason="length" if seed % 5 == 0 else "stop",
            weight_version=self.held,
            label_logprobs=DIGITS if request.label_ids else (),
        )


class Memory:
    """A journal that lives as long as this object."""

    def __init__(self) -> None:
        self.entries: dict[bytes, dict[str, Any]] = {}
        self.syncs = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.entries

    def get(self, key: bytes) -> dict[str, Any] | None:
        return self.entries.get(key)

    def add(self, key: bytes, payload: Mapping[str, Any]) -> None:
        self.entries.setdefault(key, json.loads(json.dumps(payload)))  # as a file gives it back

    async def sync(self) -> None:
        self.syncs += 1


class Alone:
    """An engine as a pool of its own: requests that come together are answered side by side."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.slots = engine.slots

    async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        if hasattr(self.engine, "generate_all"):
            return list(await self.engine.generate_all(requests))
        return await gather(map(self.engine.generate, requests))


def model(name: str) -> Model:
    return Model(name=name, digest=f"weights of {name}", folder=Path(name))


def engines_of(engine: Any, name: str = "M0", log: Any = None, answers: Answers | None = None) -> Engines:
    """A handle of `engine`, which says that it holds the model of this name."""
    return Engines(Alone(engine), model(name), answers or Answers(Memory() if log is None else log))


class Pools:
    """The pools of a run, as `engine` alone: `hold` loads its models, `judge` and `validator` are other engines.

    With `folder`, which finds a model's folder by its name, weights are told apart by what their file says, as real
    ones are; else by their names.
    """

    def __init__(
        self, engine: Any, judge: Any = None, validator: Any = None, folder: Callable[[str], Path] | None = None
    ) -> None:
        self.engine, self.other_judge, self.validator, self._folder = engine, judge, validator, folder
        self.discarded: list[Any] = []
        self.resting = False  # the learner was about to train, and nothing was asked since
        self.producers: Any = None
        self._held: Model | None = None

    async def model(self, name: str, files: Any = None) -> Model:
        if self._folder is None:
            return model(name)
        folder = self._folder(name)
        return Model(name=name, digest=(folder / "weights").read_text(), folder=folder)

    async def hold(self, model: Model) -> dict[str, Any]:
        self.resting = False
        if self._held != model:
            await self.engine.hold(model.name)
            self._held, self.engine.weights = model, model.digest
        return {"version": model.name}

    async def rest(self) -> None:
        self.resting = True

    def discard(self, files: Any) -> None:
        self.discarded.append(files)

    def engines(self, model: Model, answers: Answers, hold: Any) -> Engines:
        judges = engines_of(self.other_judge, "judge", answers=answers) if self.other_judge else None
        return Engines(Alone(self.engine), model, answers, hold, judges)

    def validators(self, answers: Answers) -> Engines | None:
        return engines_of(self.validator, "validator", answers=answers) if self.validator else None

    async def stats(self) -> dict[str, float]:
        return {}


class Screen:
    """What a run shows."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ticks: list[tuple[str, int, int]] = []
        self.totals: list[tuple[str, dict[str, int]]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def stage(self, title: str, totals: dict[str, int]) -> Iterator[Any]:
        self.totals.append((title, totals))
        yield lambda *tick: self.ticks.append(tick)


def run_of(engine: Any, log: Any = None, **others: Any) -> Run:
    """A run from M0 over one engine; its events are kept in `run.events`, its screen in `run.screen`."""
    events: list[dict[str, Any]] = []
    folder = tempfile.TemporaryDirectory()
    made = Run(
        Pools(engine, **others),
        Answers(Memory() if log is None else log),
        Screen(),
        lambda kind, **fields: events.append({"event": kind, **fields}),
        model("M0"),
        Path(folder.name),
    )
    made.segments = folder  # type: ignore[attr-defined]
    made.events = events  # type: ignore[attr-defined]
    return made


def recipe_of(config: Any, encoder: Any, number: int = 0) -> Any:
    """The recipe of an iteration of a config."""
    step, context = config.planned[number], context_of(config, encoder)
    return step.recipe(step.config, context, context)


def groups_of(recipe: Any, engine: Any, prompts: Sequence[Prompt], iteration: int = 0, log: Any = None) -> list[Group]:
    """The groups that a recipe makes of prompts with one engine."""
    tasks = [Task(iteration=iteration, prompt=prompt) for prompt in prompts]

    async def work() -> list[Group]:
        engines = engines_of(engine, getattr(engine, "held", "M0"), log)
        return await engines.each(lambda task: recipe.group(engines, task), tasks, recipe.width)

    return asyncio.run(asyncio.wait_for(work(), 60))


def judge_pairs(recipe: Any, groups: Sequence[Group]) -> tuple[dict[str, Any], PositionWeights]:
    """The pair of judgements of each group, or the reason why it has none; and the position weights of all."""
    whole = position_weights(one for group in groups for one in group.comparisons)
    return {group.id: recipe.judge_pair(group, whole) for group in groups}, whole
