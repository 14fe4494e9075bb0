"""Files of prompts, and of prompts with responses to judge: read line by line, as often as they are gone through, so
that their length takes no memory."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsrlm.data import files
from rsrlm.data.prompts import OWN, file_named, prompt_of
from rsrlm.records import FinishReason, Prompt
from rsrlm.settings.base import ConfigError

# What is written beside what a line carries: where it is read again no judge sees it, and new rows have their own.
OF_RESPONSES = ("responses", "finish_reasons", "thoughts", "response", "index", "good", "finish_reason", "thought")
OF_JUDGES = (
    "points", "variance", "unreadable", "refused", "judgements", "judge", "judge_model",
    "first", "second", "winner", "share", "orders",
)  # fmt: skip
EACH = {"good": None, "finish_reason": None, "thought": "", "judgements": ()}  # of a response, where nothing is said
SEVERAL = {"finish_reason": "finish_reasons", "thought": "thoughts"}  # of several responses, as lists
NEEDS = "needs response, a text, or responses, a list of texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenJudgement:
    """A judgement as a text, with its points where somebody says what it came to."""

    text: str
    points: float | None = None
    readable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenResponse:
    """A response to judge. `good` is what somebody says of it; where nothing is known of its end, it counts as
    complete."""

    index: int
    text: str
    good: bool | None = None
    finish_reason: FinishReason | None = None  # not known
    thought: str = ""
    judgements: tuple[GivenJudgement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt with its responses. `carried` is what else the line says, as it stands there; `number` is its place in
    the file, from 0."""

    number: int
    prompt: Prompt
    candidates: tuple[GivenResponse, ...]
    carried: Mapping[str, Any]


class AnsweredLines:
    """What a file holds, which is checked when this is made, and read again whenever it is gone through.

    `sizes` counts how many items have which numbers of judgements, one number for each response.
    """

    def __init__(self, source: str, read: Callable[[], Iterator[Answered]]) -> None:
        """Raises ConfigError for a line that is wrong, and where there is none."""
        self._read = read
        sizes = (tuple(len(response.judgements) for response in item.candidates) for item in read())
        self.sizes: Counter[tuple[int, ...]] = Counter(sizes)
        if not self.sizes:
            raise ConfigError(f"--in={source}: nothing in it; write one JSON object per line")

    def __len__(self) -> int:
        return self.sizes.total()

    def __iter__(self) -> Iterator[Answered]:
        return self._read()

    @property
    def prompts(self) -> Iterator[Prompt]:
        return (item.prompt for item in self)


def prompts(source: str) -> AnsweredLines:
    """Lines with `id` and `prompt`; other keys are carried on. The project's own files are known by their names. Raises
    ConfigError with the line."""
    path = str(file_named(source)) if source in OWN else source

    def read() -> Iterator[Answered]:
        seen: set[str] = set()
        for number, (place, entry) in enumerate(files.records(path, "--in")):
            prompt, carried = _prompt(entry, place)
            _new(prompt.id, seen, place)
            yield Answered(number=number, prompt=prompt, candidates=(), carried=carried)

    return AnsweredLines(source, read)


def responses(source: str) -> AnsweredLines:
    """Lines with `id`, `prompt`, and `response`, or `responses` as a list. Lines that stand together and share an id
    are of one prompt if each has an `index`, as in what `rsrlm judge` writes. Raises ConfigError with the line.

    `good` (true or false), `finish_reason` and `judgements` of a response are optional, and lists of them where there
    are several; what else a line has is for the judge's template, and carried on.
    """

    def read() -> Iterator[Answered]:
        seen: set[str] = set()
        one: Answered | None = None
        number = 0
        for place, entry in files.records(source, "--in"):
            prompt, carried = _prompt(entry, place)
            found = _candidates(entry, place)
            if one and one.prompt.id == prompt.id and "index" in entry:
                one = _joined(one, prompt, found, place)
                continue
            if one:
                yield one
            _new(prompt.id, seen, place)
            one = Answered(number=number, prompt=prompt, candidates=tuple(found), carried=carried)
            number += 1
        if one:
            yield one

    return AnsweredLines(source, read)


def _new(identifier: str, seen: set[str], place: str) -> None:
    if identifier in seen:
        raise ConfigError(
            f"{place}: id {identifier!r} comes twice; ids are unique, and several responses to one prompt are a list "
            "(responses), or lines that stand together and have an index each"
        )
    seen.add(identifier)


def _joined(one: Answered, prompt: Prompt, found: Sequence[GivenResponse], place: str) -> Answered:
    if prompt.text != one.prompt.text:
        raise ConfigError(f"{place}: id {prompt.id!r} has another prompt than in the line before")
    both = (*one.candidates, *found)
    if len({response.index for response in both}) < len(both):
        raise ConfigError(f"{place}: id {prompt.id!r} has index {found[0].index} twice")
    return Answered(number=one.number, prompt=one.prompt, candidates=both, carried=one.carried)


def _prompt(entry: dict[str, Any], place: str) -> tuple[Prompt, dict[str, Any]]:
    """The prompt of a line, which carries neither responses nor what is said of them; and what the line carries."""
    carried = {name: value for name, value in entry.items() if name not in OF_RESPONSES + OF_JUDGES}
    for name, value in carried.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ConfigError(f"{place}: {name} holds NaN or an infinite number; write null in its place") from None
        except TypeError as error:
            raise ConfigError(f"{place}: {name} is nothing that JSON has ({error}); leave the column out") from None
    prompt = prompt_of(carried, place)
    return prompt, {name: value for name, value in carried.items() if name not in ("id", "prompt")}


def _candidates(entry: dict[str, Any], place: str) -> list[GivenResponse]:
    several = "responses" in entry
    texts = entry["responses"] if several else [entry.get("response")]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place}: {NEEDS}")
    columns = {name: _column(entry, name, several, len(texts), place) for name in EACH}
    first = entry.get("index", 0)
    if type(first) is not int or first < 0 or (several and "index" in entry):
        raise ConfigError(f"{place}: index={first!r} must be the number of one response, from 0")
    found = []
    for at, text in enumerate(texts):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{place}: response {first + at} has half a surrogate pair; write the whole character")
        said = {name: column[at] for name, column in columns.items()}
        found.append(GivenResponse(index=first + at, text=text, **_checked(said, place, len(texts))))
    return found


def _column(entry: dict[str, Any], name: str, several: bool, number: int, place: str) -> list[Any]:
    """What a line says under this name of each response."""
    key = SEVERAL.get(name, name) if several else name
    value = entry.get(key)
    if value is None:
        return [EACH[name]] * number
    if not several:
        return [value]
    if not isinstance(value, list) or len(value) != number:
        if name == "good":
            raise ConfigError(f"{place}: good must be true or false for each of {number} responses")
        raise ConfigError(f"{place}: {key} must be a list, an entry for each of {number} responses")
    return [EACH[name] if one is None else one for one in value]


def _checked(said: dict[str, Any], place: str, number: int) -> dict[str, Any]:
    if said["good"] not in (True, False, None) or type(said["good"]) is int:
        raise ConfigError(f"{place}: good must be true or false for each of {number} responses")
    if said["finish_reason"] not in (None, "stop", "length", "string"):
        raise ConfigError(f"{place}: finish_reason={said['finish_reason']!r} must be stop, length (cut) or string")
    if not isinstance(said["thought"], str):
        raise ConfigError(f"{place}: a thought must be a text")
    return {**said, "judgements": _judgements(said["judgements"], place)}


def _judgements(given: Any, place: str) -> tuple[GivenJudgement, ...]:
    """Texts, or objects with text and points as `rsrlm judge` writes them."""
    if not isinstance(given, list | tuple):
        raise ConfigError(f"{place}: judgements must be a list of texts, or of objects with text and points")
    found = []
    for one in given:
        said = {"text": one} if isinstance(one, str) else one
        if not isinstance(said, dict) or not isinstance(said.get("text"), str):
            raise ConfigError(f"{place}: judgements must be a list of texts, or of objects with text and points")
        points = said.get("points")
        if not (points is None or _is_number(points)):
            raise ConfigError(f"{place}: points={points!r} of a judgement must be a number, or null")
        readable = points is not None or "points" not in said
        found.append(GivenJudgement(text=said["text"], points=points, readable=readable))
    return tuple(found)


def labelled(source: str, judge: str) -> tuple[list[tuple[float | None, bool]], set[str]]:
    """Points and goodness of the lines of a scored file that say what is good, and the models that gave the points.

    Raises ConfigError for a file that another judge than `judge` has scored, or of which no line says what is good.
    """
    key, found, models = "--held-out", list[tuple[float | None, bool]](), set[str]()
    for place, row in files.records(source, key):
        if row.get("good") is None:
            continue
        points, good = row.get("points"), row["good"]
        if "points" not in row or not (points is None or _is_number(points)) or not isinstance(good, bool):
            raise ConfigError(f"{place}: needs points, a finite number or null, and good, true or false")
        if row.get("judge") not in (None, judge):
            raise ConfigError(
                f"{place}: scored by {row['judge']}, and now {judge} judges: points of one are no measure for the "
                "other; score the held-out responses with this judge"
            )
        models |= {row["judge_model"]} if isinstance(row.get("judge_model"), str) else set()
        found.append((points, good))
    if not any(points is not None for points, _ in found):
        raise ConfigError(
            f"{key}={source}: no line has points and says whether its response is good; add good (true or false) to "
            "the responses, and score them with `rsrlm judge`"
        )
    return found, models


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
