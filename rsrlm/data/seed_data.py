"""Human-ranked seed data divided into what IFT, EFT and evaluations see, and the questions that a run trains on
(2401.10020v3, section 3.1.1)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rsrlm.data import ranked
from rsrlm.data.ranked import RankedPrompt
from rsrlm.records import Prompt, wording
from rsrlm.settings.data import Data


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Ranked prompts, divided once and for all by a hash of their ids; `counts` is what reading dropped, and why."""

    ift: tuple[RankedPrompt, ...]
    eft: tuple[RankedPrompt, ...]
    evaluation: tuple[RankedPrompt, ...]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The questions that a run trains on: ids of the ranked data, and wordings (`records.wording`) of all of them."""

    ids: frozenset[str] = frozenset()
    wordings: frozenset[str] = frozenset()

    def __contains__(self, prompt: RankedPrompt | Prompt) -> bool:
        return prompt.id in self.ids or wording(prompt.text) in self.wordings


def trained_on(parts: Parts | None, others: Iterable[str] = ()) -> TrainedOn:
    """IFT and EFT questions of `parts`, and `others`, which are wordings."""
    prompts = (*parts.ift, *parts.eft) if parts else ()
    return TrainedOn(
        ids=frozenset(prompt.id for prompt in prompts),
        wordings=frozenset((*(wording(prompt.text) for prompt in prompts), *others)),
    )


def divide(data: Data, key: str = "data.trees") -> Parts:
    """Read `data.trees` and divide it. Raises ConfigError where it cannot be read."""
    assert data.trees is not None
    read = ranked.read(data.trees, language=data.language, key=key)
    counts = Counter(read.counts)
    # In the order of the names: evaluation is always at the end, whatever the other two share among them.
    parts = {"1 eft": data.eft_share, "2 ift": data.ift_share, "3 evaluation": 1 - data.ift_share - data.eft_share}
    parts["3 evaluation"] = max(0.0, parts["3 evaluation"])
    found: dict[str, list[RankedPrompt]] = {"ift": [], "eft": [], "evaluation": []}
    for prompt in read.prompts:
        short = shortened(prompt, data.max_chars)
        if short is None:
            counts["prompts longer than data.max_chars, or without a shorter reply"] += 1
        else:
            found[ranked.part_of(prompt.id, parts).partition(" ")[2]].append(short)
    return Parts(counts=dict(counts), **{name: tuple(prompts) for name, prompts in found.items()})


def shortened(prompt: RankedPrompt, most: int | None) -> RankedPrompt | None:
    """The prompt without replies of more than `most` characters; None where it is longer itself or none is left."""
    if most is None:
        return prompt
    replies = tuple(reply for reply in prompt.replies if len(reply.text) <= most)
    return (
        RankedPrompt(id=prompt.id, text=prompt.text, replies=replies) if replies and len(prompt.text) <= most else None
    )
