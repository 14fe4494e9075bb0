"""Questions with replies that people ranked: read from several shapes of data, split by hash, the best for imitation.

See `agreement` for the judgements of these replies that a model may learn from.
"""

import itertools
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rsrlm.data import files, oasst, preferences
from rsrlm.data.shapes import Conversation, Message, digest, writable
from rsrlm.records import wording
from rsrlm.settings.base import ConfigError

TIE = 1e-9  # sums of shares are not exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    id: str
    text: str
    rank: float | None  # lower is better, 0 best, equal is a tie; None: nobody ranked it


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPrompt:
    id: str
    text: str
    replies: tuple[Reply, ...]  # at least one, in the order of the source


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedData:
    prompts: tuple[RankedPrompt, ...]
    counts: dict[str, int]  # what was read, kept, dropped and ignored, see `read`


SHAPES = {
    "tree": oasst.TREE,
    "flat": oasst.FLAT,
    "pair": preferences.PAIR,
    "scored": preferences.SCORED,
    "alpaca": preferences.ALPACA,
}
KNOWN = "known shapes: " + "; ".join(SHAPES.values())
ONE_BY_ONE = {
    "tree": oasst.tree,
    "pair": preferences.pair,
    "scored": preferences.scored,
    "alpaca": preferences.alpaca,
}


def read(source: str, *, language: str | None = "en", key: str = "data.trees") -> RankedData:
    """The ranked first replies to first questions of a file (JSONL, JSON array; .gz) or Hugging Face dataset or folder.

    The first record tells the shape, which all others must have: see `KNOWN`. `key` is the config's, for messages.

    Dropped, and counted by reason as `prompt dropped: ...` and `reply dropped: ...`: messages that state another
    `language` (None keeps any; those that state none are kept), deleted ones, those that failed review, empty ones,
    text that UTF-8 cannot write, roots that are no prompter's and replies that are no assistant's, ids that were seen
    before, questions whose text (but for case and white space) was seen before, so that no question stands in two
    parts of a split, questions left without a reply, and the replies of a dropped prompt. `... read` is `... kept`
    plus these. Kept but counted: replies without rank, and synthetic ones. Ignored but counted: turns below the first
    replies, system messages, and flat messages with a repeated id or without a root.

    Ids are those of the source; where it has none, or an id that record ids cannot hold, a hash of it or of the text.

    Raises ConfigError, with the line or row, for what cannot be read, has a wrong type or fits no known shape.
    """
    counts: Counter[str] = Counter()
    prompts: list[RankedPrompt] = []
    prompt_ids: set[str] = set()
    reply_ids: set[str] = set()
    questions: set[str] = set()
    for question, answers in _conversations(files.records(source, key), f"{key}={source}", counts):
        counts["prompts read"] += 1
        counts["replies read"] += len(answers)
        words = wording(question.text)
        refused = _refusal(question, language, prompt_ids) or ("duplicate text" if words in questions else None)
        if refused:
            counts[f"prompt dropped: {refused}"] += 1
            counts["reply dropped: its prompt is dropped"] += len(answers)
            continue
        replies = tuple(_replies(answers, language, reply_ids, counts))
        if not replies:
            counts["prompt dropped: no reply left"] += 1
            continue
        prompt_ids.add(question.id)
        questions.add(words)
        counts["prompts kept"] += 1
        prompts.append(RankedPrompt(id=question.id, text=question.text, replies=replies))
    always = ("prompts read", "prompts kept", "replies read", "replies kept")
    return RankedData(prompts=tuple(prompts), counts={name: counts[name] for name in sorted({*always, *+counts})})


def _replies(answers: Iterable[Message], language: str | None, seen: set[str], counts: Counter[str]) -> Iterator[Reply]:
    """Those that are kept; their ids are added to `seen`."""
    for answer in answers:
        if refused := _refusal(answer, language, seen):
            counts[f"reply dropped: {refused}"] += 1
            continue
        seen.add(answer.id)
        counts["replies kept"] += 1
        counts["replies kept: without rank"] += answer.rank is None
        counts["replies kept: synthetic"] += answer.synthetic
        yield Reply(id=answer.id, text=answer.text, rank=answer.rank)


def _refusal(message: Message, language: str | None, seen: set[str]) -> str | None:
    if message.refused:
        return message.refused
    if language and message.language and message.language.casefold() != language.casefold():
        return "language"
    if not message.text.strip():
        return "empty text"
    if not writable(message.text):
        return "half a surrogate pair"
    return "duplicate id" if message.id in seen else None


def _conversations(
    records: Iterator[tuple[str, dict[str, Any]]], where: str, counts: Counter[str]
) -> Iterator[Conversation]:
    """Each question with its replies, read as the shape of the first record says. Counts what it ignores."""
    first = next(records, None)
    if first is None:
        raise ConfigError(f"{where}: no records in it; {KNOWN}")
    shape = _shape(first[1])
    if shape is None:
        raise ConfigError(f"{first[0]}: fits no known shape with its keys {reprlib.repr(sorted(first[1]))}; {KNOWN}")

    def alike() -> Iterator[tuple[str, dict[str, Any]]]:
        for place, record in itertools.chain([first], records):
            if _shape(record) != shape:
                raise ConfigError(
                    f"{place}: not of the shape of the first record: {SHAPES[shape]}; has keys "
                    f"{reprlib.repr(sorted(record))}; one shape per file"
                )
            yield place, record

    if shape == "flat":
        yield from oasst.flat(alike(), counts)
    else:
        for place, record in alike():
            yield ONE_BY_ONE[shape](record, place, counts)


def _shape(record: dict[str, Any]) -> str | None:
    keys = record.keys()
    if "message_tree_id" in keys and isinstance(record.get("prompt"), dict):
        return "tree"
    if keys >= {"message_id", "message_tree_id", "role", "text"}:
        return "flat"
    if keys >= {"chosen", "rejected"}:
        return "pair"
    if "responses" in keys and not keys.isdisjoint(preferences.QUESTION_KEYS):
        return "scored"
    return "alpaca" if keys >= {"instruction", "output_1", "output_2", "preference"} else None


def part_of(prompt_id: str, shares: Mapping[str, float], seed: int = 0) -> str:
    """The part of a split (say ift, eft, eval) that a prompt belongs to, whatever other prompts there are.

    A hash of seed and id is uniform in [0, 1), on which the parts lie side by side in the order of their names.
    Raises ValueError unless shares are at least 0 and sum to 1.
    """
    if not all(share >= 0 for share in shares.values()) or abs(math.fsum(shares.values()) - 1) > TIE:
        raise ValueError(f"shares must be at least 0 and sum to 1, not {dict(shares)}")
    names = sorted(name for name, share in shares.items() if share > 0)
    point = int(digest(f"part {seed}", prompt_id)[:13], 16) / 2**52
    ends = itertools.accumulate(shares[name] for name in names)
    return next((name for name, end in zip(names, ends, strict=True) if point < end), names[-1])


def ift_examples(prompts: Iterable[RankedPrompt]) -> tuple[list[tuple[RankedPrompt, Reply]], dict[str, int]]:
    """Each prompt with its best-ranked reply (2401.10020v3, section 3.1.1: human rank 0), and counts.

    Replies without rank do not count; a prompt with no others gives no example. Of several best replies the one with
    the lowest id is taken, whatever their order. Where rank 0 was dropped on reading, the best that is left stands in
    for it. Counted: `examples`, the prompts left out, and among the examples those with a tie for the best, with
    replies without rank beside it, and with a best above rank 0.
    """
    examples: list[tuple[RankedPrompt, Reply]] = []
    counts: Counter[str] = Counter()
    for prompt in prompts:
        ranked = [(reply.rank, reply) for reply in prompt.replies if reply.rank is not None]
        if not ranked:
            counts["left out: no ranked reply"] += 1
            continue
        lowest = min(rank for rank, _ in ranked)
        best = [reply for rank, reply in ranked if rank == lowest]
        examples.append((prompt, min(best, key=lambda reply: reply.id)))
        counts["examples: tie for the best"] += len(best) > 1
        counts["examples: some replies without rank"] += len(ranked) < len(prompt.replies)
        counts["examples: best is not rank 0"] += lowest > 0
    return examples, {"examples": len(examples), **+counts}
