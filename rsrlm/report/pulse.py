"""What a run says of itself while it goes on, in alive.json: for those who watch it, on whatever host they are."""

from dataclasses import dataclass
from math import isfinite

from rsrlm.judges.base import mean_verdicts
from rsrlm.records import Group, Scored

SHOWN_CHARS = 600  # of a prompt or a response


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How much of one kind of work of a stage is done, and the new tokens of it."""

    what: str
    done: int
    of: int
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Work that goes on, or did until `ended`. Times are of the run's clock, in seconds since 1970."""

    title: str
    bars: tuple[Bar, ...]
    began: float
    ended: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPulse:
    """The replicas of a pool: `lost` counts those that died since the run was started or resumed, `queued` the tokens
    that the requests in flight may still take, and `held` names the models that the ready ones hold."""

    name: str
    ready: int
    wanted: int
    lost: int = 0
    queued: int = 0
    held: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """The preference buffer of an iteration that is not finished: `groups` of its `of` prompts are done, with `pairs`,
    by the answers of the model `by`."""

    iteration: int
    by: str
    groups: int
    of: int
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A response to a prompt: the chosen one of the group's first pair, or its first, and then `reason` says why there
    is no pair. `rejected` is the score of the other one of the pair."""

    group: str
    prompt: str
    response: str
    score: float | None
    rejected: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Who runs, when it was there last, and what it does. A run of an older version tells the first three alone."""

    host: str
    pid: int
    at: float
    stages: tuple[Stage, ...] = ()  # those that have ended come first
    engines: tuple[PoolPulse, ...] = ()
    buffer: tuple[Filling, ...] = ()
    sample: Sampled | None = None


def sample_of(group: Group) -> Sampled | None:
    """What is shown of a group; None where nobody answered its prompt."""
    responses = {response.id: response for response in group.answers}
    pair = next((pair for pair in group.pairs if pair.chosen_id in responses), None)
    if not responses:
        return None
    response = responses[pair.chosen_id] if pair else next(iter(responses.values()))
    verdict = mean_verdicts(group.answers, group.judgements)[response.id]
    points = pair.chosen_score if pair else verdict.points if isinstance(verdict, Scored) else None
    return Sampled(
        group=group.id,
        prompt=shortened(group.prompt.text),
        response=shortened(response.text),
        score=_number(points),
        rejected=_number(pair.rejected_score if pair else None),
        reason=group.no_pair_reason,
    )


def shortened(text: str) -> str:
    """The first SHOWN_CHARS characters, of which UTF-8 can write each."""
    cut = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."
    return cut.encode(errors="replace").decode()


def _number(points: float | None) -> float | None:
    return None if points is None or not isfinite(points) else round(points, 4)
