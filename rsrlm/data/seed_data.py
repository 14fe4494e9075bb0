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
    source = ranked.read(data.trees, language=data.language, key=key)
    counts = Counter(source.counts)
    # Parts are laid out by name: "unseen", for evaluations, is the last, however the other two are shared out.
    unseen = max(0.0, 1 - data.ift_share - data.eft_share)
    shares = {"eft": data.eft_share, "ift": data.ift_share, "unseen": unseen}
    prompts: dict[str, list[RankedPrompt]] = {name: [] for name in shares}
    for prompt in source.prompts:
        short = shortened(prompt, data.max_chars)
        if short is None:
            counts["prompts longer than data.max_chars, or without a shorter reply"] += 1
        else:
            prompts[ranked.part_of(prompt.id, shares)].append(short)
    eft, ift, evaluation = (tuple(prompts[name]) for name in shares)
    return Parts(eft=eft, ift=ift, evaluation=evaluation, counts=dict(counts))


def shortened(prompt: RankedPrompt, most: int | None) -> RankedPrompt | None:
    """The prompt without replies of more than `most` characters; None if it is longer itself or no reply is left."""
    if most is None:
        return prompt
    replies = tuple(reply for reply in prompt.replies if len(reply.text) <= most)
    return (
        RankedPrompt(id=prompt.id, text=prompt.text, replies=replies) if replies and len(prompt.text) <= most else None
    )
