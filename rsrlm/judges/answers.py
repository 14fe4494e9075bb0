"""The final answer of a reasoning text: found, put into a form that can be compared, or Unparsed with the reason.

Answers are equal exactly when their values are, so that votes can be counted by value. Numbers are exact fractions:
18, 18.0, $18 and \\frac{36}{2} are one answer. Formulas are compared as text, as in the usual scripts for MATH: 2(x+1)
and 2x+2 are two answers.

Nothing is guessed: two different final answers are none, and so is what a text says that was cut.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rsrlm.engines import Engines
from rsrlm.judges import verdicts
from rsrlm.judges.base import Context, Origin, judgement_of
from rsrlm.records import Judgement, Prompt, Response, Role, Scored, Unparsed, Verdict
from rsrlm.settings.base import ConfigError, Section
from rsrlm.settings.methods import JudgeSection

NO_ANSWER = Unparsed(reason="no final answer")
SEVERAL = Unparsed(reason="several final answers")
NO_NUMBER = Unparsed(reason="final answer is no number")
NOT_KNOWN = Unparsed(reason="the prompt has no answer")
EMPTY = Unparsed(reason="final answer is empty")


class AnswerForm(Section):
    where: Literal["line", "hashes", "boxed", "end"] = Field(
        "line",
        description="line: after 'Final answer:' (IRPO); hashes: after '####' (GSM8K, ScPO); boxed: in \\boxed{} "
        "(MATH, ScPO); end: the last number of the text",
    )
    value: Literal["number", "text"] = Field(
        "number", description="number: the one number of the answer, with or without words around it; text: all of it"
    )

    @model_validator(mode="after")
    def _the_end_is_a_number(self) -> Self:
        if self.where == "end" and self.value == "text":
            raise ValueError("judge.where=end takes the last number of a text: set judge.value=number")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAnswer:
    """`text` is as written, `value` what it is compared by."""

    text: str
    value: str


Found = FinalAnswer | Unparsed


class RightAnswer:
    """1 for a final answer that equals the prompt's own (`data["answer"]`), 0 for another one. It asks no engine."""

    class Config(JudgeSection, AnswerForm):
        kind: str = "answer"

        @model_validator(mode="after")
        def _no_engine_judges(self) -> Self:
            if self.model or self.replicas:
                raise ValueError(
                    f"judge.kind=answer: no engine judges; leave out judge.model={self.model} and "
                    f"judge.replicas={self.replicas}"
                )
            return self

    form = verdicts.Form(label="Verdict on the answer", scale=(0, 1), prefix="")
    per_response = 1
    max_tokens = 0

    def __init__(self, config: Any, context: Context) -> None:
        self.config = config
        self.name = self.source = f"final answer ({config.where}, {config.value})"

    def needs(self, response_tokens: int) -> int:
        return 0

    def read(self, response: Response) -> Found:
        """The final answer of a response; none if the length limit cut it, since it might have gone on."""
        return find(response.text, self.config) if response.complete else verdicts.CUT

    def verdict(self, prompt: Prompt, found: Found) -> Verdict:
        if "answer" not in prompt.data:
            return NOT_KNOWN
        if isinstance(found, Unparsed):
            return Scored(points=0.0)
        return Scored(points=float(found.value == gold(prompt, self.config)))

    def judgement(self, response: Response, verdict: Verdict, found: Found, by: str = "") -> Judgement:
        """A judgement with this verdict; its text is the answer that was found, or why none was, in brackets."""
        role: Role = "judge"
        made = judgement_of(
            None,
            verdict,
            id=f"{response.id}#0{by}",
            prompt_id=response.prompt_id,
            response_id=response.id,
            index=0,
            role=role,
            judge=self.name,
            sampling=None,
        )
        return replace(made, text=found.text if isinstance(found, FinalAnswer) else f"[{found.reason}]")

    async def __call__(
        self, engines: Engines, prompt: Prompt, response: Response, origin: Origin, count: int | None = None
    ) -> tuple[Judgement, ...]:
        found = self.read(response)
        engines.judges.count("judge")
        return (self.judgement(response, self.verdict(prompt, found), found, origin.by),)


def find(text: str, form: AnswerForm) -> Found:
    """The final answer of a finished text. It may be given several times, if it is the same each time."""
    if form.where == "end":
        numbers = list(_numbers(_plain(text)))
        return FinalAnswer(text=str(numbers[-1]), value=str(numbers[-1])) if numbers else NO_ANSWER
    given = list(_boxed(text)) if form.where == "boxed" else _PLACES[form.where].findall(text)
    values = [_value(one, form) for one in given]
    readable = {value: text for text, value in zip(given, values, strict=True) if isinstance(value, str)}
    if len(readable) > 1 or SEVERAL in values:
        return SEVERAL
    for value, written in readable.items():
        return FinalAnswer(text=written.strip(), value=value)
    return next((value for value in values if isinstance(value, Unparsed)), NO_ANSWER)


def gold(prompt: Prompt, form: AnswerForm) -> str:
    """The value of the prompt's own answer (`data["answer"]`). ConfigError if it has none that can be compared."""
    answer = prompt.data.get("answer")
    if answer is None:
        raise ConfigError(
            f'prompt {prompt.id!r} has no answer to compare with; add a field "answer" to its line of prompts.path'
        )
    value = _value(answer, form)
    if isinstance(value, Unparsed):
        raise ConfigError(
            f"prompt {prompt.id!r}: {value.reason}: {answer!r} with judge.value={form.value}; correct its field "
            '"answer", or use judge.value=text'
        )
    return value


# The possessive `*+` keep the time linear whatever a model writes.
_PLACES = {
    "line": re.compile(r"\bfinal answer[*_ \t]*+:[*_\s]*+([^\n]*+)", re.IGNORECASE | re.ASCII),
    "hashes": re.compile(r"^[ \t]*+####(?!#)[ \t]*+([^\n]*+)", re.MULTILINE),
}


def _boxed(text: str) -> Iterator[str]:
    r"""What stands in each \boxed{...} that is closed, but for those within another."""
    end = 0
    for opening in re.finditer(r"\\f?boxed\s*+\{", text):
        if opening.start() < end:
            continue
        depth = 1
        for place in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                end = place
                yield text[opening.end() : place]
                break
        else:
            return  # never closed, and so is none of those that follow


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3}){1,13}|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40}"
_NUMBER = re.compile(
    rf"""
    (?<! [\w.^/\\{{}}+-] ) (?<! \d, ) (?<! [\w)]\* ) (?<! [\w)]\s\* ) (?<! \*\s )
    (?P<sign> [-+]? )
    (?: \\frac \s* \{{ \s* (?P<over> {_UNSIGNED} ) \s* \}} \s* \{{ \s* (?P<under> {_UNSIGNED} ) \s* \}}
      | (?: (?P<whole> \d{{1,40}} ) [ ] )? (?P<a> \d{{1,40}} ) \s? / \s? (?P<b> \d{{1,40}} )
      | (?P<plain> {_UNSIGNED} )
    )
    (?! [\w^\\{{] | [.,]\d | \s?/\s?\d | \s?\*\s?[\w(] )
    """,
    re.VERBOSE | re.ASCII,
)
# A number together with one of these is another number.
_IN_WORDS = re.compile(
    r"\b(?:minus|negative|half|halves|quarters?|thirds?|dozens?|hundreds?|thousands?|[mb]illions?|sqrt|root)\b",
    re.IGNORECASE,
)


def _numbers(plain: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(plain):
        part = match.groupdict()
        over, under = part["over"] or part["a"] or part["plain"], part["under"] or part["b"] or "1"
        below = Fraction(under.replace(",", ""))
        if below:
            size = Fraction(part["whole"] or 0) + Fraction(over.replace(",", "")) / below
            yield -size if part["sign"] == "-" else size


_DROPPED = re.compile(r"\\[!,]|\\left|\\right|\^\{?\\circ\}?|[°$£€¥%]|\\[%$()\[\]]|\*\*|`")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def _plain(text: str) -> str:
    """The text without marks of currency, units of angle, markdown and LaTeX that change no value."""
    text = re.sub(r"\\[ ;:]|~", " ", re.sub(r"[−–]", "-", text).replace("{,}", ","))
    text = re.sub(r"\\[dtc]frac", r"\\frac", _WORDS.sub(r" \1 ", text))
    text = re.sub(r"\\frac\s*(\w)\s*(\w)(?!\w)", r"\\frac{\1}{\2}", text)
    return re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", _DROPPED.sub("", text)).strip()


def _value(text: str, form: AnswerForm) -> str | Unparsed:
    inner = list(_boxed(text))
    plain = _plain(inner[0] if len(inner) == 1 else text)
    if not plain.strip(" .,;:*_"):
        return EMPTY
    if form.value == "text":
        return _text(plain)
    result = re.sub(r"^\s*-\s+", "-", plain.rpartition("=")[2])
    numbers = set(_numbers(result))
    if len(numbers) > 1:
        return SEVERAL
    return str(numbers.pop()) if numbers and not _IN_WORDS.search(result) else NO_NUMBER


def _text(plain: str) -> str:
    """The text without blanks, closing punctuation and "x =". Capitals count in formulas alone."""
    plain = re.sub(r"^[A-Za-z]\s*=", "", plain.strip(" \t\"'*_").rstrip(".,;:")).strip()
    if match := re.fullmatch(r"\(?([A-Za-z])\)", plain):  # a letter of multiple choice
        plain = match[1]
    if (number := _NUMBER.fullmatch(plain)) and (found := list(_numbers(number[0]))):
        return str(found[0])
    plain = re.sub(r"\s", "", plain)
    return plain if "\\" in plain else plain.casefold()
