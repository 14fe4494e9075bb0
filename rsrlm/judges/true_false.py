"""A judge that says True or False, read in one decoding step."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rsrlm.judges import verdicts
from rsrlm.judges.base import Context
from rsrlm.judges.rubric import Text
from rsrlm.records import Completion, Preferred, Sampling, Scored, Unparsed, Verdict
from rsrlm.settings.base import Number
from rsrlm.settings.methods import JudgeSection

FORM = verdicts.Form(label="Verdict", scale=(0, 1), sides=("True", "False"), prefix="Verdict: (")
LITTLE_MASS = Unparsed(reason="little mass on True and False")


class TrueFalse(Text):
    """p(True) / (p(True) + p(False)), from 0 to 1 (the critics of AlphaLLM, 2404.12253)."""

    class Config(JudgeSection):
        kind: str = "true_false"
        template: str = Field("answer_true", description="name of a template of rsrlm, or path of a Jinja2 file")
        min_mass: Number = Field(
            verdicts.LEAST_MASS, ge=0, le=1, description="less probability than this on both words is unreadable"
        )

        @property
        def tokens(self) -> int:
            return 1

    unnamed = FORM
    by_sides = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.labels = verdicts.label_ids(context.encoder.tokenizer, self.form.prefix, self.form.sides)
        self.prefix = self.form.prefix

    def sampling(self, seed: int) -> Sampling:
        return Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=seed)

    def read(self, completion: Completion) -> Verdict:
        return p_true(completion.label_logprobs, self.config.min_mass)


def p_true(label_logprobs: Sequence[float], min_mass: float = verdicts.LEAST_MASS) -> Scored | Unparsed:
    """The probability of True beside that of False, out of the natural logs of both; Unparsed where both have less than
    `min_mass`."""
    found = verdicts.preferred_from_distribution(label_logprobs, min_mass)
    if isinstance(found, Preferred):
        return Scored(points=found.first)
    return LITTLE_MASS if found == verdicts.LITTLE_LETTER_MASS else found
