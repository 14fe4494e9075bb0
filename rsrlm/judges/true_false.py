"""A judge that says True or False, read in one decoding step."""

from collections.abc import Sequence

from pydantic import Field

from rsrlm.judges import verdicts
from rsrlm.judges.digits import Digits
from rsrlm.records import Completion, Preferred, Scored, Unparsed, Verdict

FORM = verdicts.Form(label="Verdict", scale=(0, 1), sides=("True", "False"), prefix="Verdict: (")
LITTLE_MASS = Unparsed(reason="little mass on True and False")


class TrueFalse(Digits):
    """p(True) / (p(True) + p(False)), from 0 to 1 (the critics of AlphaLLM, 2404.12253)."""

    class Config(Digits.Config):
        kind: str = "true_false"
        template: str = Field("answer_true", description="name of a template of rsrlm, or path of a Jinja2 file")

    unnamed = FORM
    by_sides = True

    def read(self, completion: Completion) -> Verdict:
        return p_true(completion.label_logprobs, self.config.min_mass)


def p_true(label_logprobs: Sequence[float], min_mass: float = verdicts.LEAST_MASS) -> Scored | Unparsed:
    """The probability of True beside that of False, out of the natural logs of both; Unparsed where both have less than
    `min_mass`."""
    found = verdicts.preferred_from_distribution(label_logprobs, min_mass)
    if isinstance(found, Preferred):
        return Scored(points=found.first)
    return LITTLE_MASS if found == verdicts.LITTLE_LETTER_MASS else found
