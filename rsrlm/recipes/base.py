"""What a method is: how a prompt becomes a group, and how groups become what is trained on.

A recipe is straight-line code over the verbs of `rsrlm.run`; it may be run again from its top at any time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsrlm.engines import SAMPLE_PRIORITY, Engines, Model
from rsrlm.judges.base import Context, Judge, sampling_of
from rsrlm.records import Example, Group, PreferencePair, Prompt, Request, Response, Role, Task, TwoViews
from rsrlm.run import Run

Item = PreferencePair | Example | TwoViews
JUDGE_PROMPT = 400  # tokens of a judge's template, of usual length


class NoItems(Exception):
    """An iteration gave nothing to train on."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an iteration trains on, in training order; the groups that it comes from; what was left out and why, and
    what the recipe measured."""

    items: Sequence[Item]
    groups: Sequence[Group] = ()
    dropped: Counter[str] = field(default_factory=Counter)
    measures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What an iteration comes to, at most: for each role the number of requests and the tokens that each may generate;
    items that are trained on, and the tokens of a long one."""

    requests: Mapping[Role, tuple[int, int]]
    items: int
    item_tokens: int


class Recipe:
    """One method. `group` makes what is made for one prompt, `items` what is trained on; `iteration` is both over all
    prompts, with the model that the iteration starts from."""

    trains: str  # what its items are: "pairs" or "examples"
    judge: Judge

    def __init__(self, config: Any, context: Context, judge_context: Context) -> None:
        """`judge_context` is that of who judges, for recipes that have a judge: another model has another tokenizer."""
        self.config, self.context = config, context

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError for a prompt that it cannot use."""

    async def group(self, engines: Engines, task: Task) -> Group:
        raise NotImplementedError

    def items(self, iteration: int, groups: Sequence[Group]) -> Batch:
        raise NotImplementedError

    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        engines = await run.load(before)
        return await self.from_groups(run, number, await run.groups(engines, self, tasks))

    async def from_groups(self, run: Run, number: int, groups: Sequence[Group]) -> Batch:
        """`items` in a thread: it may be long, and an interruption must be heard meanwhile."""
        return await run.aside(self.items, number, groups)

    @property
    def scale(self) -> tuple[int, int]:
        """Of the scores on its pairs."""
        return self.judge.form.scale

    @classmethod
    def asks_one_model(cls) -> bool:
        """Whether an iteration asks one model alone, trains none, and gives pairs: the online clock takes no other
        recipe, since a round may have nothing to train on."""
        return cls.iteration is Recipe.iteration and cls.trains == "pairs"

    @property
    def width(self) -> int:
        """Requests that one group makes at once."""
        return int(self.config.sample.responses)

    @classmethod
    def answers_prompts(cls, config: Any) -> bool:
        """Whether an iteration of this config samples for prompts at all."""
        return True

    @classmethod
    def demand_of(cls, config: Any, prompts: int) -> Demand:
        """What an iteration of this config over this number of prompts comes to, at most."""
        raise NotImplementedError

    def demand(self, prompts: int) -> Demand:
        """The same, with what data is there."""
        return self.demand_of(self.config, prompts)

    def requests(self, prompts: int) -> dict[Role, int]:
        """Requests about this number of prompts, at most, by what they are counted as."""
        return {role: number for role, (number, _) in self.demand(prompts).requests.items()}

    def needs(self) -> dict[str, int]:
        """Tokens of each kind of request beside those of the question."""
        raise NotImplementedError

    @property
    def inputs(self) -> Sequence[Any]:
        """What it takes from files that its config names, as plain JSON: a run keeps it to its end."""
        return ()

    @property
    def asks(self) -> list[str]:
        """Sources of the templates and names of the functions that it asks with: a run keeps them to its end."""
        return []


async def respond(
    engines: Engines,
    context: Context,
    task: Task,
    index: int,
    params: Any,
    *,
    group: str | None = None,
    seed: int | None = None,
) -> Response:
    """One sampled answer to a task's prompt: response `index` of its group. `group` and `seed` are those of the task,
    unless what is asked is no part of an iteration."""
    tokens = context.asked(task.prompt.text)
    identifier = f"{task.id if group is None else group}/{index}"
    if seed is None:
        seed = context.seed_of(task.iteration, task.prompt.id, "actor", str(index))
    sampling = sampling_of(params, seed)
    completion = await engines.complete(
        Request(id=identifier, prompt_token_ids=tokens, sampling=sampling, priority=SAMPLE_PRIORITY)
    )
    thought, text = context.parts_of(completion.text)
    return Response(
        id=identifier,
        prompt_id=task.prompt.id,
        index=index,
        role="actor",
        text=text,
        thought=thought,
        token_ids=completion.token_ids,
        prompt_token_ids=tokens,
        finish_reason=completion.finish_reason,
        weight_version=completion.weight_version,
        sampling=sampling,
    )
