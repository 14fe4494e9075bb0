"""A judge that says Yes or No: whether a response does all that was asked for (SPaR, 2412.11605)."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pydantic import Field

from rsrlm.judges import verdicts
from rsrlm.judges.base import Context
from rsrlm.judges.rubric import Text
from rsrlm.records import Completion, Judgement, Scored, Unparsed, Verdict


class YesNo(Text):
    """Votes of 1 and 0 points: the mean of a response's readable ones is its share of Yes.

    The last line is "Verdict: Yes" or "Verdict: No", or what the form of the template has as sides, the first being
    Yes. Anything else, a tie too, is no vote.
    """

    class Config(Text.Config):
        kind: str = "yes_no"
        template: str = Field("yes_no", description="name of a template of rsrlm, or path of a Jinja2 file")
        judgements: int = Field(5, gt=0, description="votes per response")
        structured: bool = Field(
            False, description="one paragraph, then the verdict line, which structured outputs guarantee"
        )

    unnamed = verdicts.Form(label="Verdict", scale=(0, 1), sides=("Yes", "No"), prefix="Verdict: ")
    by_sides = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        if config.structured:
            self.regex = verdicts.winner_regex(self.max_tokens, self.form)

    def read(self, completion: Completion) -> Verdict:
        side = verdicts.parse_winner(completion.text, completion.finish_reason, self.form)
        if isinstance(side, Unparsed):
            return side
        return verdicts.NO_WINNER if side == "tie" else Scored(points=1.0 if side == "A" else 0.0)


def share_of_yes(votes: Sequence[Judgement], least: int) -> float | None:
    """Among the readable votes; None where they are fewer than `least`."""
    points = [vote.verdict.points for vote in votes if isinstance(vote.verdict, Scored)]
    return fmean(points) if len(points) >= least else None
