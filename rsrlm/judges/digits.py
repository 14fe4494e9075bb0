"""A judge that is read in one decoding step."""

from typing import Any

from pydantic import Field

from rsrlm.judges import verdicts
from rsrlm.judges.base import Context
from rsrlm.judges.rubric import Text
from rsrlm.records import Completion, Sampling, Verdict
from rsrlm.settings.base import Number
from rsrlm.settings.methods import JudgeSection


class Digits(Text):
    """The probabilities of the scale's digits (as Self-J, 2409.00935): mean and variance."""

    class Config(JudgeSection):
        kind: str = "digits"
        template: str = Field("additive", description="name of a template of rsrlm, or path of a Jinja2 file")
        min_mass: Number = Field(
            verdicts.LEAST_MASS, ge=0, le=1, description="less probability than this on all labels is unreadable"
        )

        @property
        def tokens(self) -> int:
            return 1

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        labels = self.form.sides if self.by_sides else self.form.labels
        self.labels = verdicts.label_ids(context.encoder.tokenizer, self.form.prefix, labels)
        self.prefix = self.form.prefix

    def template_of(self, name: str) -> str:
        return "additive_digits" if name == "additive" else name

    def sampling(self, seed: int) -> Sampling:
        return Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=seed)

    def read(self, completion: Completion) -> Verdict:
        return verdicts.read_distribution(completion.label_logprobs, self.config.min_mass, self.form)
