"""Arithmetic with answers, by seed: what right answers and votes can be tried on with a small model.

The project's own file, prompts.path=arithmetic, has `FILE` problems of each level. A model of 135M parameters answers
some of levels 1 and 2 rightly, where the last number that it writes counts (judge.where=end), and few of level 3.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from rsrlm.records import Prompt

Level = Literal[1, 2, 3]

ENDING = "Show the calculation in one line."
FILE: dict[Level, int] = {1: 100, 2: 100, 3: 40}
FILE_SEED = 0

NAMES = ("Lena", "Tom", "Mia", "Omar", "Ines", "Paul", "Aiko", "Nils")
THINGS = ("apples", "pencils", "stamps", "marbles", "buttons", "shells")


def problems(level: Level, number: int, seed: int, ending: str = ENDING) -> list[Prompt]:
    """`number` different problems of a level, each with its answer and a reference, the calculation in one line, in
    `data`; those of a smaller number come first.

    Level 1 is one operation on numbers below 10, level 2 one or two on numbers below 100, level 3 two steps in words.
    `ending` stands after each question. Raises ValueError where the level has fewer problems.
    """
    found = list(islice(_distinct(level, seed, ending), number))
    if len(found) < number:
        raise ValueError(f"level {level} has {len(found)} different problems, fewer than {number}")
    return found


def file_rows() -> list[dict[str, str]]:
    """The rows of the project's own file, as `rsrlm.data.prompts` reads them."""
    return [
        {"id": one.id, "prompt": one.text, **one.data}
        for level, number in FILE.items()
        for one in problems(level, number, FILE_SEED)
    ]


def _distinct(level: Level, seed: int, ending: str) -> Iterator[Prompt]:
    draw = random.Random(f"arithmetic {level} {seed}")
    seen: set[str] = set()
    since = 0  # draws without a new problem: then there are hardly any left
    while since < 1000:
        identifier, question, calculation, answer = {1: _small, 2: _larger, 3: _in_words}[level](draw)
        since += 1
        if identifier not in seen:
            seen.add(identifier)
            since = 0
            text = f"{question} {ending}".strip()
            reference = f"{calculation} = {answer}"
            yield Prompt(
                id=identifier, text=text, data={"answer": str(answer), "reference": reference, "level": str(level)}
            )


def _small(draw: random.Random) -> tuple[str, str, str, int]:
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    return draw.choice((_asked(a, "plus", b), _asked(a, "times", b), _asked(a + b, "minus", b)))


def _larger(draw: random.Random) -> tuple[str, str, str, int]:
    if draw.random() < 0.5:
        a, b = draw.randint(11, 49), draw.randint(11, 49)
        return draw.choice((_asked(a, "plus", b), _asked(a + b, "minus", b)))
    a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 9)
    calculation = f"{a} + {b} - {c}"
    return f"{a}-plus-{b}-minus-{c}", f"What is {calculation}?", calculation, a + b - c


def _in_words(draw: random.Random) -> tuple[str, str, str, int]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    bags, each = draw.randint(2, 9), draw.randint(2, 9)
    given = draw.randint(1, bags * each - 1)
    return (
        f"{name.lower()}-{thing}-{bags}x{each}-{given}",
        f"{name} buys {bags} bags with {each} {thing} each and gives {given} {thing} away. How many {thing} are left?",
        f"{bags} * {each} - {given}",
        bags * each - given,
    )


def _asked(a: int, word: str, b: int) -> tuple[str, str, str, int]:
    sign, answer = {"plus": ("+", a + b), "times": ("*", a * b), "minus": ("-", a - b)}[word]
    return f"{a}-{word}-{b}", f"What is {a} {sign} {b}?", f"{a} {sign} {b}", answer
