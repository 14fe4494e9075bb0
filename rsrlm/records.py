"""Every record that travels: frozen, born complete, keyed by ids and never by position.

Ids name where a record comes from, so that `grep '"00/tea-vs-coffee'` over a run folder follows one prompt group:
`00/tea-vs-coffee` is a group (iteration, prompt), `00/tea-vs-coffee/2` its response 2, `00/tea-vs-coffee/2#1` that
response's judgement 1, `00/tea-vs-coffee/2#1~0` the comparison that shows judgement 1 before judgement 0,
`00/tea-vs-coffee/2>0` the pair that prefers response 2 to response 0, and `00/tea-vs-coffee/2#1>0` the one that prefers
judgement 1 to judgement 0.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "string"]  # the model ended it, the limit did, or a stop string
Role = Literal["actor", "judge", "meta", "duel", "data", "prompter", "learner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One user prompt. `id` is unique within its file and seeds all that is sampled for it.

    `data` is what judges, functions and recipes may see and the actor does not: `answer`, `reference`, `document`, ...
    """

    id: str
    text: str
    data: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt in an iteration: where the ids and seeds of what is sampled for it come from."""

    iteration: int
    prompt: Prompt

    @property
    def id(self) -> str:
        """Of the prompt's group, `00/tea-vs-coffee`."""
        return group_id(self.iteration, self.prompt.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of one request. `top_p` 1 means off; `seed` is a 63-bit integer.

    The text ends with the first of the `stop` strings that the model writes ("string").
    """

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One single-sample generation request.

    `regex` constrains the text with vLLM's structured outputs. `label_ids` asks for the log-probabilities of these
    tokens at the first decoding step, `score_from` for those of the prompt's own tokens from this position on (1 or
    more). Lower `priority` is served first. `text` is the user turn where a model behind an API is asked, which
    tokenises for itself. `role` is what it is counted as.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    priority: int
    regex: str | None = None
    label_ids: tuple[int, ...] = ()
    score_from: int | None = None
    text: str = ""
    role: Role = "actor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine answers to a `Request`.

    `token_ids` are as sampled: an end token is the last one only if the model wrote it, and where a stop string ended
    the text the last one may say more than that. `weight_version` is the one that the engine held when it sampled the
    oldest token. `label_logprobs` are natural logs, one per `label_ids`; `prompt_logprobs` one per token of the prompt
    from `score_from` on.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    weight_version: str
    label_logprobs: tuple[float, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A judgement that could be read. `variance` is None where the reading gives one number only."""

    points: float
    variance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unparsed:
    """A judgement that could not be read: counted, never a number."""

    reason: str


Winner = Literal["A", "B", "tie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferred:
    """The verdict of a pairwise judge: the text shown first (A), the one shown second (B), or neither. `share` is the
    probability of A beside B, where the judge's letters are read."""

    winner: Winner
    share: float | None = None

    @property
    def first(self) -> float:
        """How far the text shown first is preferred, from 0 to 1."""
        return {"A": 1.0, "tie": 0.5, "B": 0.0}[self.winner] if self.share is None else self.share


Verdict = Scored | Preferred | Unparsed


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPair:
    """Why something gave no pair: a short text that is counted."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A sampled answer. `prompt_token_ids` is the whole chat prompt that the engine saw. `text` is what judges see, and
    `thought` what the model wrote before it; `token_ids` are of both."""

    id: str
    prompt_id: str
    index: int
    role: Role
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    weight_version: str
    sampling: Sampling
    thought: str = ""

    @property
    def complete(self) -> bool:
        """The model ended the answer by itself; False when the length limit cut it."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One verdict on one response, or on two of its judgements (role "meta"), or on two responses (role "duel"): then
    it is `Preferred`. `judge` names template and reading, or the function.

    A function judge has no tokens, no sampling parameters and the weight version of nobody: "".
    """

    id: str
    prompt_id: str
    response_id: str
    index: int
    role: Role
    judge: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    weight_version: str
    sampling: Sampling | None
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt, or (kind "judge") two judgements of one response, whose prompt is the judge's.

    The learner trains on the token ids as sampled. `weight` multiplies the pair's loss; `target` is the probability
    that `chosen` is the better one, 1 where nothing is uncertain.
    """

    id: str
    prompt_id: str
    kind: str  # "actor", "judge", or what a recipe calls it: measures are told apart by it
    chosen_id: str
    rejected_id: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    chosen_score: float
    rejected_score: float
    weight_version: str
    weight: float = 1.0
    target: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A target to imitate: supervised fine-tuning trains on its tokens and not on those of the prompt."""

    id: str
    kind: str  # "ift", "eft", "positive", or what a recipe calls it
    prompt_token_ids: tuple[int, ...]
    target_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoViews:
    """A judgement to learn, asked with what a teacher sees and with what a student sees (Self-J, 2409.00935): which of
    `label_token_ids` is the answer."""

    id: str
    kind: str
    teacher_token_ids: tuple[int, ...]
    student_token_ids: tuple[int, ...]
    label_token_ids: tuple[int, ...]
    label: int

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """As an example: of the student's view, which is how the judge is asked later."""
        return self.student_token_ids

    @property
    def target_token_ids(self) -> tuple[int, ...]:
        return (self.label_token_ids[self.label],)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt with everything made for it. `no_pair_reason` says why there are no pairs, if there are none.

    `comparisons` are pairwise verdicts: the meta-judge's on judgements of one of the responses, or on the responses.
    """

    id: str
    iteration: int
    prompt: Prompt
    responses: tuple[Response, ...]
    judgements: tuple[Judgement, ...] = ()
    comparisons: tuple[Judgement, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()
    no_pair_reason: str = ""

    @property
    def answers(self) -> tuple[Response, ...]:
        """The responses that a model wrote to the prompt: texts of the data and prompts that were written are none."""
        return tuple(one for one in self.responses if one.role == "actor")


def group_id(iteration: int, prompt_id: str) -> str:
    return f"{iteration:02d}/{prompt_id}"


def wording(text: str) -> str:
    """A digest of the text but for case and white space: two prompts that share it ask the same."""
    plain = " ".join(text.casefold().split())
    return hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=12).hexdigest()


def seed_of(run_seed: int, iteration: int, prompt_id: str, role: Role, index: str) -> int:
    """63-bit seed from who asks for what: no two samples of a run share one, and neither order nor load matters.

    `index` is the sample's own index within (iteration, prompt, role), such as "2" for a response and "2#1" for its
    judgement.
    """
    text = "\x1f".join((str(run_seed), str(iteration), prompt_id, role, index))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and neither UTF-8 nor a tokenizer."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
