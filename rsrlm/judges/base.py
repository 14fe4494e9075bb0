"""What the judges share: what they are made with, where their seeds come from, and how a judgement becomes a record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rsrlm.chat import ChatEncoder
from rsrlm.engines import Engines
from rsrlm.judges import templates, verdicts
from rsrlm.records import Completion, Judgement, Prompt, Response, Role, Sampling, Verdict, seed_of
from rsrlm.settings.base import JUDGES, ConfigError, plugin

LONGEST_FENCE = "0" * 8  # tokenizers split digits at least as far as letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all judges and recipes of a run are made with.

    `room` are the tokens of prompt and answer together; `fence_salt` makes fences unguessable. `question` is the
    template that asks for a thought and an answer, `marker` what stands between them; without, a prompt is asked as it
    is.
    """

    encoder: ChatEncoder
    seed: int
    room: int
    fence_salt: str | None = None
    question: str = ""
    marker: str = ""

    def asked(self, text: str) -> tuple[int, ...]:
        """The prompt that asks the model `text`."""
        return self.encoder.encode(self.question, {"instruction": text}) if self.question else self.encoder.user(text)

    def parts_of(self, text: str) -> tuple[str, str]:
        """Thought and answer of what the model wrote."""
        return parts_of(text, self.marker)

    def seed_of(self, iteration: int, name: str, role: Role, index: str) -> int:
        return seed_of(self.seed, iteration, name, role, index)

    def fence(self, seed: int) -> str:
        """The fence of a judge's prompt by its seed; without a salt who knows the seed can compute it."""
        return templates.fence_of(seed_of(seed, 0, self.fence_salt, "judge", "fence") if self.fence_salt else seed)


def parts_of(text: str, marker: str) -> tuple[str, str]:
    """Thought and answer of a text. Without exactly one marker all of it is thought, and with "" for one, answer."""
    if not marker:
        return "", text
    thought, _, answer = text.partition(marker)
    return (text, "") if marker in answer else (thought.strip(), answer.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the seeds and ids of judgements come from: `name` is that of what is judged, `by` stands after the id
    where several judge the same."""

    iteration: int
    name: str
    by: str = ""


class Judge(Protocol):
    """Scores one response at a time."""

    name: str
    form: verdicts.Form
    per_response: int

    @property
    def source(self) -> str:
        """What it asks: the source of a template, or the name of a function."""
        ...

    def needs(self, response_tokens: int) -> int:
        """Tokens of a request beside those of the question, about a response of so many; 0 where no engine is asked."""
        ...

    async def __call__(
        self, engines: Engines, prompt: Prompt, response: Response, origin: Origin, count: int | None = None
    ) -> tuple[Judgement, ...]:
        """`count` judgements of a response (`per_response` by default), in the order of their indices."""
        ...


def context_of(config: Any, encoder: ChatEncoder) -> Context:
    """Of a run with this config. Raises ConfigError for a template that does not ask for a thought."""
    context = Context(
        encoder=encoder, seed=config.seed, room=config.engine.max_model_len, fence_salt=config.judge.fence_salt
    )
    if config.thought is None:
        return context
    template, marker = config.thought.template, config.thought.marker
    source = templates.load_template(template, templates.QUESTION_VARIABLES, "thought.template")
    if marker not in source:
        raise ConfigError(
            f"thought.template={template!r}: does not name thought.marker={marker!r}, so that no answer could be told "
            "from its thought; write it into the template"
        )
    return replace(context, question=source, marker=marker)


def judge_of(config: Any, context: Context) -> Judge:
    """The judge that a config section describes."""
    made: Judge = plugin(config.kind, JUDGES, "judge.kind")(config, context)
    return made


def sampling_of(params: Any, seed: int) -> Sampling:
    """Of a config section with temperature, top_p and max_tokens."""
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        seed=seed,
        stop=tuple(getattr(params, "stop", ())),
    )


def judgement_of(completion: Completion | None, verdict: Verdict, **fields: Any) -> Judgement:
    """The record of an answer; without one, of a judgement that no engine was asked for."""
    return Judgement(
        text=completion.text if completion else "",
        token_ids=completion.token_ids if completion else (),
        finish_reason=completion.finish_reason if completion else "stop",
        weight_version=completion.weight_version if completion else "",
        verdict=verdict,
        **fields,
    )


def mean_verdicts(responses: Sequence[Response], judgements: Sequence[Judgement]) -> dict[str, Verdict]:
    """The mean verdict of each response, by its id. Judgements of what is none of them, such as the beginning of an
    answer, are passed over."""
    of_response: dict[str, list[Judgement]] = {response.id: [] for response in responses}
    for judgement in sorted(judgements, key=lambda judgement: judgement.index):
        if judgement.response_id in of_response:
            of_response[judgement.response_id].append(judgement)
    return {name: verdicts.mean_points(one.verdict for one in of_one) for name, of_one in of_response.items()}
