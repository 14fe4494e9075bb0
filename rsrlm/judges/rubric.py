"""Judges that write a justification and a verdict line.

2401.10020v3, section 2.2 and Fig. 2: N judgements of a response, each with a score line, of which the readable count.
"""

from typing import Any

from pydantic import Field

from rsrlm.engines import JUDGE_PRIORITY, Engines
from rsrlm.judges import templates, verdicts
from rsrlm.judges.base import LONGEST_FENCE, Context, Origin, judgement_of, sampling_of
from rsrlm.records import Completion, Judgement, Prompt, Request, Response, Sampling, Unparsed, Verdict
from rsrlm.settings.base import Number
from rsrlm.settings.methods import JudgeSection

TOO_LONG = Unparsed(reason="judge prompt too long")


class Text:
    """Free text whose last line is the verdict."""

    class Config(JudgeSection):
        template: str = Field("additive", description="name of a template of rsrlm, or path of a Jinja2 file")
        judgements: int = Field(3, gt=0, description="per response, averaged over the readable ones (N)")
        temperature: Number = Field(0.7, ge=0)
        top_p: Number = Field(1.0, gt=0, le=1)
        max_tokens: int = Field(160, gt=0)

        @property
        def per_response(self) -> int:
            return self.judgements

        @property
        def tokens(self) -> int:
            return self.max_tokens

        @property
        def in_words(self) -> bool:
            return True

    unnamed = verdicts.SCORE  # the form of verdicts where the template names none
    by_sides = False  # whether a verdict is one of the form's sides, and not points

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context = config, context
        self.template = self.template_of(config.template)
        self.source = templates.load_template(self.template, templates.ADDITIVE_VARIABLES, "judge.template")
        self.data_names = templates.data_names(self.source)
        self.form = templates.form_of(self.source, self.unnamed, f"judge.template={self.template!r}")
        self.name = f"{self.template} ({config.kind})"
        self.per_response: int = config.per_response
        self.max_tokens: int = config.tokens
        self.regex: str | None = None
        self.labels: tuple[int, ...] = ()
        self.prefix = ""  # opens the answer

    def template_of(self, name: str) -> str:
        return name

    def needs(self, response_tokens: int) -> int:
        if self.config.endpoint:
            return 0
        data = templates.data_fields(self.data_names, "", dict.fromkeys(self.data_names, ""))
        fields = {"instruction": "", "response": "", "fence": LONGEST_FENCE, **data}
        template = len(self.context.encoder.encode(self.source, fields, self.prefix))
        return template + response_tokens + self.max_tokens

    def prompt_of(self, prompt: Prompt, response: Response, origin: Origin) -> tuple[int, ...]:
        """The tokens that the judge sees: the same for all judgements of a response, which share the prefix cache."""
        return self.context.encoder.encode(self.source, self._fields(prompt, response, origin), self.prefix)

    def _fields(self, prompt: Prompt, response: Response, origin: Origin) -> dict[str, str]:
        data = templates.data_fields(self.data_names, prompt.id, prompt.data)
        shown = {"instruction": prompt.text, "response": response.text, **data}
        fence = self.context.fence(self.context.seed_of(origin.iteration, origin.name, "judge", "fence"))
        claims = {name: verdicts.claimed(text, self.form, self.by_sides) for name, text in shown.items()}
        return {**claims, "fence": fence}

    def sampling(self, seed: int) -> Sampling:
        return sampling_of(self.config, seed)

    def read(self, completion: Completion) -> Verdict:
        return verdicts.parse_points(completion.text, completion.finish_reason, self.form)

    async def __call__(
        self, engines: Engines, prompt: Prompt, response: Response, origin: Origin, count: int | None = None
    ) -> tuple[Judgement, ...]:
        asked = self.prompt_of(prompt, response, origin)
        text = ""
        if self.config.endpoint:
            text = self.context.encoder.text(self.source, self._fields(prompt, response, origin))
        requests = [
            Request(
                id=f"{response.id}#{index}{origin.by}",
                prompt_token_ids=asked,
                sampling=self.sampling(self.context.seed_of(origin.iteration, origin.name, "judge", str(index))),
                priority=JUDGE_PRIORITY,
                regex=self.regex,
                label_ids=self.labels,
                text=text,
                role="judge",
            )
            for index in range(count or self.per_response)
        ]
        completions: list[Completion | None] = [None] * len(requests)
        if len(asked) + self.max_tokens <= self.context.room or text:
            completions = list(await engines.judges.complete_all(requests))
        return tuple(
            judgement_of(
                completion,
                self.read(completion) if completion else TOO_LONG,
                id=request.id,
                prompt_id=response.prompt_id,
                response_id=response.id,
                index=index,
                role="judge",
                judge=self.name,
                sampling=request.sampling,
            )
            for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
        )


class Structured(Text):
    """The same with the verdict line guaranteed by structured outputs."""

    class Config(Text.Config):
        kind: str = "structured"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.regex = verdicts.points_regex(self.max_tokens, self.form)
