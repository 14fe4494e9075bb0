"""What a judge is asked, and how its answer becomes a number (Self-Rewarding Language Models, 2401.10020v3).

A judgement that cannot be read is `Unparsed` and never a number: counted as 0 or as the worst, it would train against
the answer instead of against the judge. Parsers see the judge's own answer only, so nothing that a response says can
be read as its score.
"""

import hashlib
import importlib
import inspect
import math
import numbers
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rsrlm.chat import template_variables
from rsrlm.config import ConfigError
from rsrlm.records import FinishReason, Scored, Unparsed, Verdict

SCORES = ("0", "1", "2", "3", "4", "5")
ANSWER_PREFIX = "Score: "
WINNERS = ("A", "B")
META_PREFIX = "More accurate judgement: ("
# The bracket, because after "Better answer: " byte-level tokenizers merge the space into the letter's token.
PAIRWISE_PREFIX = "Better answer: ("

ADDITIVE_VARIABLES = frozenset({"instruction", "response"})
PAIRWISE_VARIABLES = frozenset({"instruction", "response_a", "response_b"})
META_VARIABLES = frozenset({"instruction", "response", "judgement_a", "judgement_b"})
OPTIONAL_VARIABLES = frozenset({"fence"})
TEMPLATES = Path(__file__).parent / "assets" / "templates"

Winner = Literal["A", "B", "tie"]
Preferred = Literal["first", "second", "tie"]

NO_SCORE = Unparsed(reason="no score line")
OUT_OF_RANGE = Unparsed(reason="score out of range")
CUT_SCORE = Unparsed(reason="cut before a score")
LOGPROBS_UNREADABLE = Unparsed(reason="log-probabilities are not numbers")
LITTLE_DIGIT_MASS = Unparsed(reason="little mass on digits")
LITTLE_LETTER_MASS = Unparsed(reason="little mass on letters")
NO_WINNER = Unparsed(reason="no winner line")
CUT_WINNER = Unparsed(reason="cut before a winner")
NONE_READABLE = Unparsed(reason="no readable judgement")
NO_NUMBER = Unparsed(reason="function returned no number")

# "Score", the marks that models put around it, then a number or the end of the text. The possessive
# `*+` keep the time linear: with `*`, a judge that writes some hundred blanks would stop the run for minutes.
_MARKS = r"\s*+[:=]?+[\*_`\s]*+[:=]?+"
_SCORE = re.compile(rf"(?i)\bscore\b{_MARKS}[\*_`<\[\(\s]*+(?:(-?\d++(?:\.\d++)?+)(?![\d.]*\d)|-?\Z)")
# A and B are capitals, so that "a tie" is none of them; "A or B" repeats the question and is no verdict.
_SIDE = "answer|response|judge?ment"
_WINNER = re.compile(
    rf"(?i:\bwinner\b){_MARKS}[\*_`<\[\(\"'\s]*+(?i:(?:{_SIDE})\b\s*+)?+"
    rf"(?:((?i:a\s++tie|tie)\b|[AB]\b(?![ \t]*+(?:[|/&]|or\b|and\b)[ \t]*+(?i:(?:{_SIDE})\s++)?+[AB]\b))|\w*+\Z)"
)


def load_template(name: str, variables: frozenset[str] = ADDITIVE_VARIABLES, key: str = "template") -> str:
    """The source of a judge template: the name of one of rsrlm's, or the path of a Jinja2 file. `key` is the config's.

    It must print all of `variables` and may print `fence` (see `fence_of`); anything else is a ConfigError.
    """
    own = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    path = own.get(name.removesuffix(".jinja"), Path(os.path.expanduser(name)))
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={name!r}: neither one of rsrlm's ({', '.join(own)}) nor a readable Jinja2 file: {error}; "
            "give one of these names or a path"
        ) from None
    try:
        used = template_variables(source)
    except ConfigError as error:
        raise ConfigError(f"{key}={name!r}: {error}") from None
    if missing := variables - used:
        raise ConfigError(f"{key}={name!r}: does not use {_listed(missing)}; add {{{{ {min(missing)} }}}}")
    if unknown := used - variables - OPTIONAL_VARIABLES:
        known = _listed(variables | OPTIONAL_VARIABLES)
        raise ConfigError(f"{key}={name!r}: uses {_listed(unknown)}, which nobody fills; known here: {known}")
    return source


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def fence_of(seed: int) -> str:
    """Eight hex digits for the tags around a response, which its author cannot guess and so cannot close.

    Pass one seed per response, not per judgement: the N judgements of a response then share their whole prompt, and
    the engine's prefix cache computes it once.
    """
    return hashlib.blake2b(f"fence\x1f{seed}".encode(), digest_size=4).hexdigest()


def parse_points(text: str, finish_reason: FinishReason) -> Verdict:
    """The last score of a judge's answer, 0 to 5 with decimals kept (format of 2401.10020v3, Fig. 2).

    In an answer cut by the length limit, a score that touches the end is unreadable: "Score: 1" may have become
    "Score: 10" or "Score: 1.5".
    """
    matches = list(_SCORE.finditer(text))
    if finish_reason == "length" and (not matches or _touches_end(matches[-1])):
        return CUT_SCORE
    numbers_written = [match[1] for match in matches if match[1]]
    if not numbers_written:
        return NO_SCORE
    points = float(numbers_written[-1])
    return Scored(points=points) if 0 <= points <= 5 else OUT_OF_RANGE


def _touches_end(match: re.Match[str]) -> bool:
    return not match.string[match.end() :].strip(".")


def points_regex(max_tokens: int) -> str:
    """A regex of whole answers for vLLM's structured outputs: a paragraph, then the verdict line.

    The line is reached within `max_tokens` whatever the tokenizer: the paragraph has at most `max_tokens` - 16
    characters, all ASCII because a token is at least one ASCII character but may be a quarter of another one, and 16
    tokens are enough for the line ("\\nScore: 4") and the end token.
    """
    return rf"[ -~]{{1,{max(1, max_tokens - 16)}}}\nScore: [0-5]"


def winner_regex(max_tokens: int) -> str:
    """The same for a pairwise judge's winner line ("\\nWinner: A")."""
    return rf"[ -~]{{1,{max(1, max_tokens - 16)}}}\nWinner: [AB]"


def read_distribution(label_logprobs: Sequence[float], min_mass: float) -> Verdict:
    """Mean and variance of the digits 0 to 5 under their probabilities, renormalised (as Self-J, 2409.00935).

    `label_logprobs` are natural logs in the order of `SCORES`. Unparsed if the six digits have less than `min_mass`.
    """
    shares = _shares(label_logprobs, len(SCORES), min_mass, LITTLE_DIGIT_MASS)
    if isinstance(shares, Unparsed):
        return shares
    mean = math.fsum(share * digit for digit, share in enumerate(shares))
    variance = math.fsum(share * (digit - mean) ** 2 for digit, share in enumerate(shares))
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
    """The token of each label where it follows `prefix`. ConfigError unless each is one token of its own there."""
    before = tokenizer.encode(prefix, add_special_tokens=False)
    found: dict[int, str] = {}
    for label in labels:
        ids = tokenizer.encode(prefix + label, add_special_tokens=False)
        if ids[:-1] != before or ids[-1] in found:
            raise ConfigError(
                f"{label!r} after {prefix!r} is not one token of its own in this model's tokenizer, so that its "
                "probability cannot be read; use judge.read=text, and evaluate.duel=false for the letters of a duel"
            )
        found[ids[-1]] = label
    return tuple(found)


def mean_points(verdicts: Iterable[Verdict]) -> Verdict:
    """The mean over the readable judgements (2401.10020v3, Sec. 3.1.3): the denominator is the number of `Scored`.

    The variance is the population variance of their points (2407.19594v2 selects by it); a lone one keeps its own.
    """
    scored = [verdict for verdict in verdicts if isinstance(verdict, Scored)]
    if len(scored) < 2:
        return scored[0] if scored else NONE_READABLE
    points = [verdict.points for verdict in scored]
    mean = statistics.fmean(points)
    return Scored(points=mean, variance=math.fsum((value - mean) ** 2 for value in points) / len(points))


def parse_winner(text: str, finish_reason: FinishReason) -> Winner | Unparsed:
    """The last winner line of a pairwise judge's answer; one that touches the end of a cut answer is unreadable."""
    matches = list(_WINNER.finditer(text))
    if finish_reason == "length" and (not matches or _touches_end(matches[-1])):
        return CUT_WINNER
    written = [match[1] for match in matches if match[1]]
    if not written:
        return NO_WINNER
    if written[-1] == "A":
        return "A"
    return "B" if written[-1] == "B" else "tie"


def winner_from_distribution(label_logprobs: Sequence[float], min_mass: float) -> Winner | Unparsed:
    """The likelier letter of `WINNERS`; equally likely ones tie. Unparsed if both have less than `min_mass`."""
    shares = _shares(label_logprobs, len(WINNERS), min_mass, LITTLE_LETTER_MASS)
    if isinstance(shares, Unparsed):
        return shares
    first, second = label_logprobs
    if first == second:
        return "tie"
    return "A" if first > second else "B"


def combine_orders(first: Winner | Unparsed, second: Winner | Unparsed) -> Preferred | Unparsed:
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


def load_function(dotted: str) -> Callable[[str, str], float]:
    """The function that `module:name` or `pkg.module.name` names, to be called with (prompt, response)."""
    module, colon, name = dotted.partition(":")
    if not colon:
        module, _, name = dotted.rpartition(".")
    if not module or not name:
        raise ConfigError(f"judge.function={dotted!r}: write module:name, such as my_judges:shorter")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f"judge.function={dotted}: cannot be imported: {_described(error)}; put the folder of its module on "
            "PYTHONPATH, on every machine"
        ) from error
    try:
        inspect.signature(function).bind("prompt", "response")
    except TypeError as error:
        raise ConfigError(
            f"judge.function={dotted}: must be callable with (prompt, response): {error}; change it accordingly"
        ) from None
    return function


def call_function(function: Callable[[str, str], float], prompt: str, response: str) -> Verdict:
    """A verifiable reward: any finite number, where True and False are 1 and 0. ConfigError if the function raises."""
    try:
        value = function(prompt, response)
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        raise ConfigError(
            f"judge.function {name} raised {_described(error)} for the prompt {prompt[:200]!r}; correct it, or let it "
            "return None for a response that it cannot judge"
        ) from error
    if not isinstance(value, numbers.Real):
        return NO_NUMBER
    try:
        points = float(value)
    except OverflowError:
        return NO_NUMBER
    return Scored(points=points) if math.isfinite(points) else NO_NUMBER


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
