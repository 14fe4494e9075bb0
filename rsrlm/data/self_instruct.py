"""New prompts by Self-Instruct (arXiv 2212.10560), as Self-Rewarding uses it (arXiv 2401.10020v3, Sec. 2.2, App. A.5).

A model sees a numbered list of eight prompts and continues it; what it wrote is split, filtered, and kept where it is
not too similar to any prompt before. Everything here depends on texts, seeds and request numbers alone.
"""

import hashlib
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from rsrlm.data.prompt_pool import PromptPool
from rsrlm.engines import gather
from rsrlm.settings.base import ConfigError
from rsrlm.settings.data import SelfInstruct

HEADER = "Continue this numbered list of varied, open-ended tasks that people give to an assistant:"
CUT = "cut off by the length limit"
ROUND = 32  # requests that see the same prompts made before
GIVE_UP_AFTER = 5  # rounds in a row without a new prompt
TOO_SIMILAR = "too similar to another prompt"

# Self-Instruct's, without the space after it: that could be the line break before the next number.
_NUMBER = re.compile(r"\n\d+\s?\.")
# A line that starts with a rule or with a word that announces answers, perhaps as an item of the list.
_SEPARATOR = re.compile(
    r"^[ \t]*+(?:\d+\s?\.[ \t]*+)?"
    r"(?:[-=#*—]{3}|[*_# \t]*+(?:answers?|responses?|solutions?)[ \t]*\d*[*_ \t]*(?::|\r?$))",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a new prompt must not be: Self-Instruct's post-processing. Words are separated by whitespace.

    Of `keywords` only whole words count, in upper or lower case: they ask for what a text model cannot see or do.
    """

    min_words: int = 3  # must have more
    max_words: int = 150  # may have as many
    keywords: tuple[str, ...] = (
        *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
        *("draw", "plot", "go to"),
    )
    forbidden_starts: tuple[str, ...] = ("Write a program",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a model wrote after the text of one request.

    `request` is the number that chose the demonstrations, `cut` says that the length limit ended it, `model` names
    who wrote it and `demonstrations` the ids of the prompts that it was shown, in their order.
    """

    request: int
    text: str
    cut: bool
    model: str
    demonstrations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedPrompt:
    """A new prompt and where it comes from: item `index` (from 0) of what `model` wrote to request `request`."""

    id: str
    text: str
    request: int
    index: int
    model: str
    demonstrations: tuple[str, ...]

    @property
    def row(self) -> dict[str, Any]:
        """A line of a prompt file that says where the prompt comes from."""
        fields = asdict(self)
        return {"id": fields.pop("id"), "prompt": fields.pop("text"), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompts:
    """What a number of requests gave; `reasons` counts what was left out, and why."""

    prompts: list[GeneratedPrompt]
    reasons: Counter[str]
    requests: int


def demonstrations(
    seed_prompts: Sequence[str],
    generated: Sequence[str],
    *,
    seed: int,
    batch: int,
    from_seeds: int = 6,
    from_generated: int = 2,
) -> list[str]:
    """What request number `batch` shows: different seed prompts and generated ones, shuffled.

    Works on texts and on ids alike. While there are too few generated ones, seed prompts take their place. Depends on
    the order of both lists, so give generated ones as `select` ordered them. Raises ConfigError for too few seeds.
    """
    rng = random.Random(f"self-instruct {seed} {batch}")
    new = rng.sample(generated, min(from_generated, len(generated)))
    wanted = from_seeds + from_generated - len(new)
    if wanted > len(seed_prompts):
        raise ConfigError(
            f"prompts.path: {len(seed_prompts)} prompts to write new ones from, but a request shows {wanted} of them; "
            "add prompts"
        )
    chosen = rng.sample(seed_prompts, wanted) + new
    rng.shuffle(chosen)
    return chosen


def request_text(demonstrations: Sequence[str]) -> str:
    """The text to complete: a header, the prompts on numbered lines, and the next number."""
    lines = [f"{n}. {_one_line(text).rstrip(': ')}" for n, text in enumerate(demonstrations, start=1)]
    return "\n".join([HEADER, *lines, f"{len(lines) + 1}."])


def split(completion: str, cut: bool, *, cut_at_separator: bool = False) -> list[str]:
    """The prompts of a continued list: whitespace collapsed, first letter in upper case, empty ones left out.

    With `cut` (by the length limit) the last item is not whole and is left out. `cut_at_separator` is for a model that
    is trained to answer: it tends to write some prompts, then a separator such as `---`, `###`, `===` or `Answer:` on
    a line of its own, then answers (2401.10020v3, App. A.5); only what is before it counts, and that is whole.
    """
    if cut_at_separator and (separator := _SEPARATOR.search(completion)):
        completion, cut = completion[: separator.start()], False
    # The line break is for a model that repeats the number at the end of the request.
    items = _NUMBER.split("\n" + completion.lstrip())
    if cut:
        items.pop()
    return [_capitalised(text) for text in map(_one_line, items) if text]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _capitalised(text: str) -> str:
    """Only the first letter: str.capitalize would turn NASA into nasa. Others than ASCII may become two letters."""
    return (text[0].upper() if text[0].isascii() else text[0]) + text[1:]


def refused(text: str, filters: Filters) -> str:
    """Why a prompt, as `split` returns it, is not good enough: a short text that is counted, or "" if it is."""
    words = len(text.split())
    if words <= filters.min_words:
        return "too short"
    if words > filters.max_words:
        return "too long"
    if (keywords := any_of(filters.keywords)) and keywords.search(text):
        return "asks for what a text model cannot do"
    if text.casefold().startswith(tuple(start.casefold() for start in filters.forbidden_starts)):
        return "forbidden start"
    if text[0] in string.punctuation:
        return "starts with punctuation"
    if not text[0].isascii():
        return "starts with a non-ASCII character"
    if any(character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cs") for character in text):
        return "broken character"  # a byte-level tokenizer can write bytes that are no text
    return ""


@cache
def any_of(keywords: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds any of these, in upper or lower case, as whole words; None where there are none."""
    words = (r"\s+".join(map(re.escape, keyword.split())) for keyword in keywords if keyword.strip())
    either = "|".join(words)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE) if either else None


def select(
    continuations: Iterable[Continuation], pool: PromptPool, filters: Filters, *, cut_at_separator: bool = False
) -> tuple[list[GeneratedPrompt], Counter[str]]:
    """The new prompts, which are in the pool afterwards, and how many items were left out for which reason.

    In order of the request numbers, whatever the order of arrival. Raises ValueError if two have the same number.
    """
    kept: list[GeneratedPrompt] = []
    reasons: Counter[str] = Counter()
    last: int | None = None
    for written in sorted(continuations, key=lambda written: written.request):
        if written.request == last:
            raise ValueError(f"two continuations of request {written.request}")
        last = written.request
        texts = split(written.text, written.cut, cut_at_separator=cut_at_separator)
        if cut := len(split(written.text, False, cut_at_separator=cut_at_separator)) - len(texts):
            reasons[CUT] += cut
        for index, text in enumerate(texts):
            reason = refused(text, filters) or (TOO_SIMILAR if pool.add(text) is not None else "")
            if reason:
                reasons[reason] += 1
                continue
            kept.append(
                GeneratedPrompt(
                    id=id_of(text),
                    text=text,
                    request=written.request,
                    index=index,
                    model=written.model,
                    demonstrations=written.demonstrations,
                )
            )
    return kept, reasons


async def make_prompts(
    complete: Callable[[int, str], Awaitable[tuple[str, bool]]],
    seed_prompts: Mapping[str, str],
    number: int,
    rule: SelfInstruct,
    *,
    seed: int,
    model: str,
    count: Callable[[int], None] = lambda new: None,
) -> NewPrompts:
    """At least `number` new prompts, or fewer where GIVE_UP_AFTER rounds in a row give none.

    `complete(request, text)` returns what `model` writes after the text of a request, and whether the length limit cut
    it. `seed_prompts` are texts by id. `count` is told after each round how many of the prompts wanted came with it.
    """
    texts = dict(seed_prompts)
    pool = PromptPool(texts.values(), max_rouge=rule.max_rouge)
    filters = Filters(min_words=rule.min_words, max_words=rule.max_words)
    prompts: list[GeneratedPrompt] = []
    reasons: Counter[str] = Counter()
    requests = barren = 0

    async def ask(request: int, generated: Sequence[str]) -> Continuation:
        numbers = {"from_seeds": rule.from_seeds, "from_generated": rule.from_generated}
        shown = demonstrations(list(seed_prompts), generated, seed=seed, batch=request, **numbers)
        text, cut = await complete(request, request_text([texts[name] for name in shown]))
        return Continuation(request=request, text=text, cut=cut, model=model, demonstrations=tuple(shown))

    while len(prompts) < number and barren < GIVE_UP_AFTER:
        generated = [prompt.id for prompt in prompts]
        # The size of a round is a constant: what is shown must not depend on the number of engines.
        continuations = await gather([ask(requests + place, generated) for place in range(ROUND)])
        new, refusals = select(continuations, pool, filters, cut_at_separator=rule.cut_at_separator)
        count(min(len(new), number - len(prompts)))
        requests += ROUND
        reasons += refusals
        barren = 0 if new else barren + 1
        texts.update({prompt.id: prompt.text for prompt in new})
        prompts += new
    return NewPrompts(prompts=prompts, reasons=reasons, requests=requests)


def id_of(text: str) -> str:
    """The id of a generated prompt: of the same text the same, in any run."""
    return f"generated-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
