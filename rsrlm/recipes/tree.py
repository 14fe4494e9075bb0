"""One tree of lines for a prompt, grown over engines; what it decides by stands in `search`."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines, gather
from rsrlm.judges.base import Judge, Origin, mean_verdicts
from rsrlm.recipes.lines import Lines
from rsrlm.recipes.search import Node, back_up, least_distance, walk, worth
from rsrlm.records import Judgement, Response, Scored, Task, Verdict
from rsrlm.settings.base import Number, Section

ATTEMPTS = 6  # at an option: one, and five more where it is too near to another
CUT = Scored(points=0.0)  # of an answer that has no end, and so no final answer: nobody is asked


class Width(Section):
    """How many options a node has: between least and most, the more the further they are apart in worth."""

    root_least: int = Field(10, gt=0)
    root_most: int = Field(60, gt=0)
    least: int = Field(2, gt=0)
    most: int = Field(10, gt=0)
    alpha: Number = Field(1.0, ge=0, description="options for each point between a node and the furthest of its own")

    @model_validator(mode="after")
    def _least_is_less(self) -> Self:
        for least, most in (("root_least", "root_most"), ("least", "most")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(
                    f"width.{least}={getattr(self, least)} is more than width.{most}={getattr(self, most)}; lower it"
                )
        return self


class Search(Section):
    simulations: int = Field(55, gt=0, description="of a tree; each adds one option, or comes to a finished answer")
    depth: int = Field(10, gt=0, description="lines, of which the last is all the rest of an answer")
    c: Number = Field(1.0, ge=0, description="how far options that were seldom looked at are preferred (UCB)")
    distance: int = Field(50, ge=0, description="edits; an option nearer to another is sampled again, 5 times at most")
    rollouts: int = Field(4, ge=0, description="finished answers that the worth of a new option is estimated by")
    rollout_temperature: Number = Field(1.0, ge=0)
    beta_prm: Number = Field(1.0, ge=0, description="weight of what the critic says of a line; 0 asks it nothing")
    beta_orm: Number = Field(1.0, ge=0, description="weight of what it says of the rollouts; 0 samples none")
    step_template: str = Field("step_true", description="of the critic of lines: a name of rsrlm's or a Jinja2 file")
    answer_template: str = Field("answer_true", description="of the critic of final answers")

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not self.beta_prm and not self.rollouts_wanted:
            raise ValueError(
                f"search.beta_prm=0 with search.beta_orm={self.beta_orm:g} and search.rollouts={self.rollouts}: "
                "nothing scores a line; raise search.beta_prm, or both others"
            )
        return self

    @property
    def rollouts_wanted(self) -> int:
        return self.rollouts if self.beta_orm else 0


@dataclass(kw_only=True)
class Searched:
    """What a tree has given: finished answers, leaves and rollouts; the judgements of them and of lines; and the number
    of tokens that were sampled."""

    responses: list[Response] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    tokens: int = 0

    @property
    def outcomes(self) -> dict[str, Verdict]:
        return mean_verdicts(self.responses, self.judgements)


class Tree:
    """Simulations come one after the other: each goes by what those before it have found."""

    def __init__(self, engines: Engines, task: Task, config: Any, lines: Lines, critics: tuple[Judge, Judge]) -> None:
        """`config` has search and width, and the critics are those of lines and of answers."""
        self.engines, self.task, self.config, self.lines = engines, task, config.search, lines
        self.width, (self.process, self.outcome) = config.width, critics
        self.root = Node(path="t", answer=lines.start(task, "t"))
        self.found = Searched()

    async def grow(self) -> Searched:
        for _ in range(self.config.simulations):
            path = walk(self.root, self.config.c, self.width)
            if not path[-1].done:
                child = await self.child(path[-1], depth=len(path))
                if child is None:
                    continue
                path.append(child)
            back_up(path, path[-1].points)
        self.found.responses.sort(key=lambda one: one.index)
        self.found.judgements.sort(key=lambda one: one.id)  # they came in any order
        return self.found

    async def child(self, parent: Node, depth: int) -> Node | None:
        """One more option after a node; None where its critics cannot be read."""
        path = parent.next_path()
        answer = await self.option(parent, path, whole=depth == self.config.depth)
        parent.tried += 1
        done = self.lines.is_done(answer)
        points = await self.finished(answer) if done else await self.begun(answer, path)
        if points is None:
            return None
        parent.children.append(made := Node(path=path, answer=answer, done=done, points=points))
        return made

    async def option(self, parent: Node, path: str, whole: bool) -> Response:
        """The first one is greedy. One that is too near to another is sampled again, and the furthest one stays."""
        begun = len(parent.answer.text)
        others = [child.answer.text[begun:] for child in parent.children]
        found: list[tuple[float, Response]] = []
        while len(found) < ATTEMPTS:
            temperature = None if parent.tried else 0.0
            made = await self.sampled(parent.answer, f"{path}@{len(found)}", temperature=temperature, whole=whole)
            found.append((least_distance(made.text[begun:], others), made))
            if found[-1][0] >= self.config.distance:
                break
        return max(found, key=lambda one: one[0])[1]

    async def sampled(self, before: Response, name: str, **how: Any) -> Response:
        made = await self.lines.follow(self.engines, self.task, before, name, **how)
        self.found.tokens += len(made.token_ids) - len(before.token_ids)
        return made

    async def finished(self, answer: Response) -> float | None:
        """The worth of a leaf is its outcome."""
        verdict = await self.judged(answer, len(self.found.responses))
        return verdict.points if isinstance(verdict, Scored) else None

    async def begun(self, answer: Response, path: str) -> float | None:
        """The worth of a line, by what the critic says of it and of answers that go on from it."""
        first, warm = len(self.found.responses), self.config.rollout_temperature

        async def rollout(number: int) -> Verdict:
            made = await self.sampled(answer, f"{path}.r{number}", temperature=warm, whole=True)
            return await self.judged(made, first + number)

        asked = [self.verdict(self.process, answer)] if self.config.beta_prm else []
        said = await gather([*asked, *map(rollout, range(self.config.rollouts_wanted))])
        process, outcomes = said[: len(asked)], said[len(asked) :]
        return worth([(self.config.beta_prm, process), (self.config.beta_orm, outcomes)])

    async def judged(self, answer: Response, index: int) -> Verdict:
        """The outcome of a finished answer, which is kept."""
        self.found.responses.append(replace(answer, index=index))
        return await self.verdict(self.outcome, answer) if answer.complete else CUT

    async def verdict(self, critic: Judge, answer: Response) -> Verdict:
        origin = Origin(iteration=self.task.iteration, name=answer.id)
        (judgement,) = await critic(self.engines, self.task.prompt, answer, origin)
        self.found.judgements.append(judgement)
        return judgement.verdict
