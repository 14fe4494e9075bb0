"""Judges of two texts: the meta-judge of two judgements (2407.19594v2, section 2.3), the judge of two answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsrlm.config import Config
from rsrlm.engines import Engines
from rsrlm.judges import templates, verdicts
from rsrlm.judges.base import LONGEST_FENCE, Context, judgement_of, sampling_of
from rsrlm.judges.rubric import TOO_LONG
from rsrlm.records import Completion, Judgement, Preferred, Request, Role, Sampling, Scored, Unparsed, Verdict
from rsrlm.settings.base import ConfigError

WITHOUT_LETTERS = {"pairwise": "pairwise_text"}
WITH_LETTERS = {"meta": "meta_letters"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Two texts in the order in which they are shown; `fields` are what the template prints, and `data` what the prompt
    carries, of which it may print more."""

    id: str
    prompt_id: str
    response_id: str
    index: int
    role: Role
    fields: Mapping[str, str]
    seed: int
    fence_seed: int
    priority: int
    data: Mapping[str, str] = field(default_factory=dict)


class Pairwise:
    """Which of A and B is better. `read` letters takes the likelier letter in one decoding step; text and structured
    parse a winner line."""

    def __init__(
        self, rule: Any, context: Context, variables: frozenset[str], key: str, form: verdicts.Form, by_text: bool
    ) -> None:
        """`key` is the config section of `rule`; `by_text` where a server is asked, which tokenises for itself."""
        read = rule.read
        template = (WITH_LETTERS if read == "letters" else WITHOUT_LETTERS).get(rule.template, rule.template)
        self.name = f"{template} ({read})"
        self.source = templates.load_template(template, variables, f"{key}.template")
        self._rule, self.context, self._by_text = rule, context, by_text
        self._names = variables
        self.data_names = templates.data_names(self.source)
        self._form = form = templates.form_of(self.source, form, f"{key}.template={template!r}")
        self._letters: tuple[int, ...] = ()
        if read == "letters":
            self._letters = verdicts.label_ids(context.encoder.tokenizer, form.prefix, form.sides)
        self._prefix = form.prefix if self._letters else ""
        self._regex = verdicts.winner_regex(rule.max_tokens, form) if read == "structured" else None

    def needs(self, shown_tokens: int) -> int:
        """Tokens of a request beside those of the question, about texts of so many; 0 where no engine is asked."""
        if self._by_text:
            return 0
        data = templates.data_fields(self.data_names, "", dict.fromkeys(self.data_names, ""))
        fields = {**dict.fromkeys(self._names, ""), "fence": LONGEST_FENCE, **data}
        template = len(self.context.encoder.encode(self.source, fields, self._prefix))
        return template + shown_tokens + (1 if self._letters else self._rule.max_tokens)

    def _fields(self, match: Match) -> dict[str, str]:
        # One fence for both orders: nothing but the order differs between them.
        texts = {**match.fields, **templates.data_fields(self.data_names, match.prompt_id, match.data)}
        shown = {name: verdicts.claimed(text, self._form, pairwise=True) for name, text in texts.items()}
        return {**shown, "fence": self.context.fence(match.fence_seed)}

    def prompt_of(self, match: Match) -> tuple[int, ...]:
        """The tokens that the judge sees."""
        return self.context.encoder.encode(self.source, self._fields(match), self._prefix)

    def text_of(self, match: Match) -> str:
        """The user turn as text, for a model that another program asks or trains."""
        return self.context.encoder.text(self.source, self._fields(match))

    def _request(self, match: Match) -> Request:
        letters = Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=match.seed)
        return Request(
            id=match.id,
            prompt_token_ids=self.prompt_of(match),
            sampling=letters if self._letters else sampling_of(self._rule, match.seed),
            priority=match.priority,
            regex=self._regex,
            label_ids=self._letters,
            text=self.text_of(match) if self._by_text else "",
            role=match.role,
        )

    def read(self, completion: Completion) -> Verdict:
        if self._letters:
            return verdicts.preferred_from_distribution(completion.label_logprobs)
        winner = verdicts.parse_winner(completion.text, completion.finish_reason, self._form)
        return winner if isinstance(winner, Unparsed) else Preferred(winner=winner)

    async def __call__(self, engines: Engines, matches: Sequence[Match]) -> tuple[Judgement, ...]:
        """The verdict on each match, in order."""
        requests = [self._request(match) for match in matches]
        fits = [
            self._by_text or len(one.prompt_token_ids) + one.sampling.max_tokens <= self.context.room
            for one in requests
        ]
        asked = [request for request, fit in zip(requests, fits, strict=True) if fit]
        answered = dict(zip((one.id for one in asked), await engines.judges.complete_all(asked), strict=True))
        return tuple(
            judgement_of(
                answered.get(match.id),
                self.read(answered[match.id]) if match.id in answered else TOO_LONG,
                id=match.id,
                prompt_id=match.prompt_id,
                response_id=match.response_id,
                index=match.index,
                role=match.role,
                judge=self.name,
                sampling=request.sampling,
            )
            for match, request in zip(matches, requests, strict=True)
        )


def winner_of(comparison: Judgement) -> verdicts.Winner | Unparsed:
    """A, B, tie or Unparsed of a pairwise judgement."""
    verdict = comparison.verdict
    assert not isinstance(verdict, Scored)
    return verdict.winner if isinstance(verdict, Preferred) else verdict


def meta_judge(rule: Any, context: Context) -> Pairwise:
    return Pairwise(rule, context, templates.META_VARIABLES, "meta", verdicts.META_WINNER, by_text=False)


def duel_judge(config: Config, context: Context) -> Pairwise:
    """The judge of two answers to one prompt. ConfigError where letters are to be read of a model behind an API."""
    by_text = config.validator.endpoint is not None
    if by_text and config.evaluate.judge.read == "letters":
        raise ConfigError("evaluate.judge.read=letters: an endpoint compares in text; set evaluate.judge.read=text")
    return Pairwise(
        config.evaluate.judge, context, templates.PAIRWISE_VARIABLES, "evaluate.judge", verdicts.WINNER, by_text
    )
