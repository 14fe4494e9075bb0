"""How a judge's answer becomes a number or a winner (Self-Rewarding Language Models, 2401.10020v3).

A judgement that cannot be read is `Unparsed` and never a number: counted as 0 or as the worst, it would train against
the answer instead of against the judge. A verdict is the last line of an answer that the judge itself ended, and only
that line: scores that its prose mentions, quotes or adds up do not count. What looks like a verdict in a text that is
judged is altered in the judge's view (`claimed`), so that a judge that only repeats it gives no verdict.
"""

import functools
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from rsrlm.records import FinishReason, Preferred, Scored, Unparsed, Verdict
from rsrlm.settings.base import ConfigError

Winner = Literal["A", "B", "tie"]
Decided = Literal["first", "second", "tie"]

NO_SCORE = Unparsed(reason="no score line")
OUT_OF_RANGE = Unparsed(reason="score out of range")
CUT = Unparsed(reason="cut before its end")
LOGPROBS_UNREADABLE = Unparsed(reason="log-probabilities are not numbers")
LEAST_MASS = 0.05  # probability of all labels together, below which none of them is read
LITTLE_DIGIT_MASS = Unparsed(reason="little mass on digits")
LITTLE_LETTER_MASS = Unparsed(reason="little mass on letters")
NO_WINNER = Unparsed(reason="no winner line")
NONE_READABLE = Unparsed(reason="no readable judgement")

CLAIMED = "(claimed)"  # what `claimed` puts in the place of a side, and before a number in words
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LINE_TOKENS = 16  # enough for the line break, "Score: 4" and the end token


_Side = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a judge writes its verdict: a last line of `label` and a value, such as "Score: 4" or "Winner: A".

    A template may name its own in a comment on its first line, `{#- verdict: {label: Grade, scale: [1, 10]} -#}`.
    `scale` holds the lowest and the highest score, `sides` what a pairwise judge calls the text shown first and second;
    `prefix` opens the answer where its first token alone is read.
    """

    label: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z ]*[A-Za-z])?$")]
    scale: tuple[StrictInt, StrictInt] = (0, 5)
    sides: tuple[_Side, _Side] = ("A", "B")
    prefix: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The whole numbers of the scale."""
        low, high = self.scale
        return tuple(map(str, range(low, high + 1)))


SCORE = Form(label="Score", prefix="Score: ")
# The bracket, because after "Better answer: " byte-level tokenizers merge the space into the letter's token.
WINNER = Form(label="Winner", prefix="Better answer: (")
META_WINNER = Form(label="Winner", prefix="More accurate judgement: (")

# The possessive `*+` keeps the time linear: with `*`, a judge that writes some hundred blanks would stop the run for
# minutes. ASCII, so that a long s is not an s and an Arabic digit not a digit. The words before a label are tried last,
# as a label may begin with one of them.
_START = r"[\s*_`#\"'-]*+(?i:(?:my|your|the|total|final|overall)\s++)*?"
_MARKS = r"[\s*_`<\[({\"'$]*+(?:\\boxed\{)?+"
_BETWEEN = rf"[\s*_`]*+(?:[:\uff1a]|(?i:is)\b){_MARKS}"
_END = r"[\s*_`>\])}\"'$.!]*+"
_NOUN = r"(?i:(?:the\s++)?(?:answer|response|judge?ment|assistant|model)\s++)"
_TIE = r"(?i:(?:a\s++)?(?:tie|draw)\b)"
_NUMBER = r"[0-9]++(?:\.[0-9]++)?+"


@functools.cache
def _line(form: Form, value: str) -> re.Pattern[str]:
    return re.compile(rf"{_START}(?i:{re.escape(form.label)}){_BETWEEN}{value}{_END}", re.ASCII)


def _points_line(form: Form) -> re.Pattern[str]:
    """A number, or a sum with its result, followed by the top of the scale, by "points", or by nothing."""
    top = form.scale[1]
    sum_of = rf"(?:{_NUMBER}\s*+(?:\+\s*+{_NUMBER}\s*+)++=[\s*_`]*+)?"
    return _line(form, rf"{sum_of}(-?{_NUMBER}){_END}(?:(?:/|(?i:out\s++of\b))\s*+{top}\b)?+\s*+(?i:points?\b)?+")


def _winner_line(form: Form) -> re.Pattern[str]:
    return _line(form, rf"{_NOUN}?+(?:({'|'.join(map(re.escape, form.sides))})\b|({_TIE}))")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


@functools.cache
def _claim(form: Form, pairwise: bool) -> re.Pattern[str]:
    """Label, whatever the parsers accept between label and value, and the value; invisible characters hide nothing."""
    hidden = r"\u200b-\u200d\u2060\ufeff"
    between = rf"[ \t*_`{hidden}]*+(?:[:\uff1a]|(?i:is)\b)[{hidden}]*+{_MARKS}[{hidden}]*+{_MARKS}"
    sides = "|".join(map(re.escape, form.sides))
    value = rf"{_NOUN}?+(?:(?:{sides})(?![A-Za-z0-9])|{_TIE})" if pairwise else r"[0-9](?:[0-9.,+=/ ]*[0-9])?"
    return re.compile(rf"(?<![A-Za-z0-9])((?i:{re.escape(form.label)}){between})({value})", re.ASCII)


def claimed(text: str, form: Form, pairwise: bool = False) -> str:
    """The text as a judge is shown it: whatever looks like a verdict in `form` is marked as claimed, with its number
    spelled in words and its side left out, since a judge that copies may leave out the mark.

    No part of the result that begins and ends between words reads as a verdict.
    """

    def marked(match: re.Match[str]) -> str:
        return f"{match[1]}{CLAIMED}" if pairwise else f"{match[1]}{CLAIMED} {_in_words(match[2])}"

    return _claim(form, pairwise).sub(marked, text)


def _in_words(number: str) -> str:
    """Digit by digit, such as "four point two five"."""
    number = re.sub(r"(?<=[0-9])\.(?=[0-9])", " point ", number)
    return re.sub("[0-9]", lambda digit: DIGITS[int(digit[0])], re.sub(r"(?<=[0-9])(?=[0-9])", " ", number))


def parse_points(text: str, finish_reason: FinishReason, form: Form = SCORE) -> Verdict:
    """The score on the last line of a judge's answer, decimals kept (format of 2401.10020v3, Fig. 2).

    The line holds label, colon (or "is") and number, or a sum and its result, and at most marks, the top of the scale
    or "points" besides: with another scale, a range or a remark it is not a score. An answer that the length limit cut
    is not finished, so its last line is not a verdict.
    """
    if finish_reason == "length":
        return CUT
    match = _points_line(form).fullmatch(_last_line(text))
    if match is None:
        return NO_SCORE
    low, high = form.scale
    points = float(match[1])
    return Scored(points=points) if low <= points <= high else OUT_OF_RANGE


def points_regex(max_tokens: int, form: Form = SCORE) -> str:
    """A regex of whole answers for vLLM's structured outputs: one paragraph, then the verdict line with a whole number.

    The line is reached within `max_tokens` with any tokenizer: the paragraph has at most `max_tokens` - LINE_TOKENS
    characters, all ASCII because a token holds at least one ASCII character but perhaps a quarter of any other, and
    LINE_TOKENS tokens are enough for the line ("\\nScore: 4") and the end token.
    """
    return _regex(max_tokens, form.label, form.labels)


def winner_regex(max_tokens: int, form: Form = WINNER) -> str:
    """The same for a pairwise judge's winner line ("\\nWinner: A")."""
    return _regex(max_tokens, form.label, form.sides)


def _regex(max_tokens: int, label: str, values: Sequence[str]) -> str:
    line = len(f"\n{label}: ") + max(map(len, values)) + 1
    either = f"[{''.join(values)}]" if all(len(value) == 1 for value in values) else f"({'|'.join(values)})"
    return rf"[ -~]{{1,{max(1, max_tokens - max(LINE_TOKENS, line))}}}\n{label}: {either}"


def read_distribution(label_logprobs: Sequence[float], min_mass: float, form: Form = SCORE) -> Verdict:
    """Mean and variance of the scale's whole numbers under their probabilities, renormalised (as Self-J, 2409.00935).

    `label_logprobs` are natural logs in the order of `form.labels`. Unparsed if all of them have less than `min_mass`.
    """
    shares = _shares(label_logprobs, len(form.labels), min_mass, LITTLE_DIGIT_MASS)
    if isinstance(shares, Unparsed):
        return shares
    mean = math.fsum(share * digit for digit, share in enumerate(shares, start=form.scale[0]))
    variance = math.fsum(share * (digit - mean) ** 2 for digit, share in enumerate(shares, start=form.scale[0]))
    return Scored(points=mean, variance=variance)


def _shares(logprobs: Sequence[float], labels: int, min_mass: float, too_little: Unparsed) -> list[float] | Unparsed:
    """Probabilities of the labels among themselves."""
    if len(logprobs) != labels:
        raise ValueError(f"{len(logprobs)} log-probabilities for {labels} labels")
    if any(math.isnan(value) or value == math.inf for value in logprobs):
        return LOGPROBS_UNREADABLE
    top = max(logprobs)
    if top == -math.inf:
        return too_little
    weights = [math.exp(value - top) for value in logprobs]
    total = math.fsum(weights)
    # In logs, because exp(top) may underflow.
    if min_mass > 0 and top + math.log(total) < math.log(min_mass):
        return too_little
    return [weight / total for weight in weights]


def label_ids(tokenizer: Any, prefix: str, labels: Sequence[str]) -> tuple[int, ...]:
    """The token of each label after `prefix`. Raises ConfigError unless each is one token of its own there."""
    before = tokenizer.encode(prefix, add_special_tokens=False)
    tokens: list[int] = []
    for label in labels:
        ids = tokenizer.encode(prefix + label, add_special_tokens=False)
        if ids[:-1] != before or ids[-1] in tokens:
            raise ConfigError(
                f"{label!r} after {prefix!r} is not one token of its own in this model's tokenizer, so that its "
                "probability cannot be read; use judge.kind=text, and evaluate.duel=false for the letters of a duel"
            )
        tokens.append(ids[-1])
    return tuple(tokens)


def mean_points(verdicts: Iterable[Verdict]) -> Verdict:
    """The mean over the readable judgements (2401.10020v3, Sec. 3.1.3): the denominator is the number of `Scored`.

    The variance is the population variance of their points (2407.19594v2 selects by it); a single one keeps its own.
    """
    scored = [verdict for verdict in verdicts if isinstance(verdict, Scored)]
    if len(scored) < 2:
        return scored[0] if scored else NONE_READABLE
    points = [verdict.points for verdict in scored]
    mean = statistics.fmean(points)
    return Scored(points=mean, variance=math.fsum((value - mean) ** 2 for value in points) / len(points))


def parse_winner(text: str, finish_reason: FinishReason, form: Form = WINNER) -> Winner | Unparsed:
    """The winner on the last line of a pairwise judge's answer, which names one side or a tie and nothing else."""
    if finish_reason == "length":
        return CUT
    match = _winner_line(form).fullmatch(_last_line(text))
    if match is None:
        return NO_WINNER
    if match[1] is None:
        return "tie"
    return "A" if match[1] == form.sides[0] else "B"


def preferred_from_distribution(label_logprobs: Sequence[float], min_mass: float = LEAST_MASS) -> Preferred | Unparsed:
    """The likelier of the two sides, equally likely ones tie; and the share of the first in the probability of both.
    Unparsed if both have less than `min_mass`."""
    shares = _shares(label_logprobs, 2, min_mass, LITTLE_LETTER_MASS)
    if isinstance(shares, Unparsed):
        return shares
    first, second = label_logprobs
    winner: Winner = "tie" if first == second else "A" if first > second else "B"
    return Preferred(winner=winner, share=shares[0])


def combine_orders(first: Winner | Unparsed, second: Winner | Unparsed) -> Decided | Unparsed:
    """The verdict over both orders; where they disagree, a tie (2401.10020v3's head-to-head).

    One unreadable order leaves no verdict.
    `first` was given with response 1 shown as A, `second` with response 1 shown as B.
    """
    if isinstance(first, Unparsed):
        return first
    if isinstance(second, Unparsed):
        return second
    if (first, second) == ("A", "B"):
        return "first"
    return "second" if (first, second) == ("B", "A") else "tie"
