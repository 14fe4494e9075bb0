"""Judgements of two responses of which one is better by construction: which are right, and what they teach.

The ids tell which: that of the worse response ends with WORSE, and `01/tea/1~0#4`, which shows it first, is right with
B.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rsrlm.pairing import pair_of_judgements
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Preferred, Unparsed

WORSE = 1  # index of the worse response
EVENED = "left out, so that A is right as often as B"


def right_side(identifier: str) -> Literal["A", "B"]:
    """The side of the better response, by the id of a judgement, or of what was made of one."""
    return "B" if identifier.rpartition("/")[2].startswith(f"{WORSE}~") else "A"


def is_right(judgement: Judgement) -> bool:
    """A tie is wrong, as what cannot be read is; and what was cut cannot be read."""
    verdict = judgement.verdict
    return isinstance(verdict, Preferred) and verdict.winner == right_side(judgement.id)


def right_one(judgements: Sequence[Judgement], seed: int) -> Judgement | NoPair:
    """One of the right judgements of a group, by seed."""
    right = [one for one in judgements if is_right(one)]
    return random.Random(f"right {seed} {right[0].id}").choice(right) if right else NoPair(reason="no right verdict")


def pair(judgements: Sequence[Judgement], prompt_token_ids: Sequence[int], seed: int) -> PreferencePair | NoPair:
    """The right judgement of `right_one` against a wrong or unreadable one, by seed; all of them saw this prompt."""
    chosen, wrong = right_one(judgements, seed), [one for one in judgements if not is_right(one)]
    if isinstance(chosen, NoPair):
        return chosen
    if not wrong:
        return NoPair(reason="no wrong verdict")
    rejected = random.Random(f"wrong {seed} {wrong[0].id}").choice(wrong)
    return pair_of_judgements(chosen, rejected, prompt_token_ids, (1.0, 0.0))


def evenly(ids: Sequence[str], seed: int, iteration: int) -> list[int]:
    """Places in the order of training, by ids and seed alone: as many that are right with A as with B."""
    draw = random.Random(f"labelled {seed} {iteration}")
    places = sorted(range(len(ids)), key=ids.__getitem__)
    sides = [[at for at in places if right_side(ids[at]) == side] for side in ("A", "B")]
    kept = [at for side in sides for at in draw.sample(side, min(map(len, sides)))]
    draw.shuffle(kept)
    return kept


def position(groups: Iterable[Group]) -> dict[str, Any]:
    """Share of the readable judgements that are right where the better response is shown first, and second."""
    found: Counter[str] = Counter()
    for group in groups:
        for one in group.comparisons:
            readable = not isinstance(one.verdict, Unparsed)
            found[right_side(one.id) if readable else "unreadable"] += 1
            found[f"right {right_side(one.id)}"] += is_right(one)
    return {
        "right_shown_first": found["right A"] / found["A"] if found["A"] else None,
        "right_shown_second": found["right B"] / found["B"] if found["B"] else None,
        "readable_shown_first": found["A"],
        "readable_shown_second": found["B"],
        "unreadable": found["unreadable"],
    }
