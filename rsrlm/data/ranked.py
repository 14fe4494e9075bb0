"""Replies that people ranked, and their selection into training examples (Self-Rewarding, 2401.10020v3, section 3.1.1).

IFT examples are questions with their best reply. EFT examples are judgements that the model itself sampled and that
agree with people's ranks; the targets are not in the data, so acceptance works on scores by reply id.
"""

import codecs
import gzip
import hashlib
import itertools
import json
import math
import os
import reprlib
import statistics
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rsrlm.records import wording
from rsrlm.settings.base import ConfigError

TIE = 1e-9  # means are not exact: a smaller difference is a tie
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
QUESTION_KEYS = ("prompt", "instruction", "question", "conversations")
ROLES = {"user": "prompter", "human": "prompter", "gpt": "assistant"}  # others' names for Open Assistant's
NOT_ONE_TURN = "not one question and its answer"


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
class Read:
    prompts: tuple[RankedPrompt, ...]
    counts: dict[str, int]


class _Message(NamedTuple):
    id: str
    text: str
    rank: float | None = None
    language: str | None = None
    synthetic: bool = False
    refused: str | None = None  # why it is left out, as far as its shape can tell


_Group = tuple[_Message, list[_Message]]


def read(source: str, *, language: str | None = "en", key: str = "data.trees") -> Read:
    """The ranked first replies to first questions of a file (JSONL, JSON array; .gz) or Hugging Face dataset or folder.

    The first record tells the shape, which all others must have: see `KNOWN`. Of a Hugging Face dataset the split
    `train` is read, or the only one there is. `key` is the config's, for messages.

    Dropped, and counted by reason as `prompt dropped: ...` and `reply dropped: ...`: messages that state another
    `language` (None: any goes; those that state none are kept), deleted ones, those that failed review, empty ones,
    text that UTF-8 cannot write, roots that are no prompter's and replies that are no assistant's, ids that were seen
    before, questions whose text (but for case and white space) was seen before, so that no question stands in two
    parts of a split, questions left without a reply, and the replies of a dropped prompt. `... read` is `... kept`
    plus these. Kept but counted: replies without rank, and synthetic ones. Ignored but counted: turns below the first
    replies, system messages, and flat messages that repeat an id or hang on no root.

    Ids are those of the source; where it has none, or one that record ids cannot hold, a hash of it or of the text.

    Raises ConfigError, with the line or row, for what cannot be read, has a wrong type or fits no known shape.
    """
    counts: Counter[str] = Counter()
    prompts: list[RankedPrompt] = []
    prompt_ids: set[str] = set()
    reply_ids: set[str] = set()
    questions: set[str] = set()
    for question, answers in _groups(_records(source, key), counts):
        counts["prompts read"] += 1
        counts["replies read"] += len(answers)
        asked = wording(question.text)
        refused = _refusal(question, language, prompt_ids) or ("duplicate text" if asked in questions else None)
        if refused:
            counts[f"prompt dropped: {refused}"] += 1
            counts["reply dropped: its prompt is dropped"] += len(answers)
            continue
        replies: list[Reply] = []
        for answer in answers:
            if refused := _refusal(answer, language, reply_ids):
                counts[f"reply dropped: {refused}"] += 1
                continue
            reply_ids.add(answer.id)
            counts["replies kept"] += 1
            counts["replies kept: without rank"] += answer.rank is None
            counts["replies kept: synthetic"] += answer.synthetic
            replies.append(Reply(id=answer.id, text=answer.text, rank=answer.rank))
        if not replies:
            counts["prompt dropped: no reply left"] += 1
            continue
        prompt_ids.add(question.id)
        questions.add(asked)
        counts["prompts kept"] += 1
        prompts.append(RankedPrompt(id=question.id, text=question.text, replies=tuple(replies)))
    always = ("prompts read", "prompts kept", "replies read", "replies kept")
    return Read(prompts=tuple(prompts), counts={name: counts[name] for name in sorted({*always, *+counts})})


def _refusal(message: _Message, language: str | None, seen: set[str]) -> str | None:
    if message.refused:
        return message.refused
    if language and message.language and message.language.casefold() != language.casefold():
        return "language"
    if not message.text.strip():
        return "empty text"
    if not _writable(message.text):
        return "half a surrogate pair"
    return "duplicate id" if message.id in seen else None


def _records(source: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with the words that say where it stands."""
    path = os.path.expanduser(source)
    empty = True
    if os.path.isfile(path):
        entries = _from_file(path, f"{key}={source}")
    elif not os.path.isdir(path) and (not source or path.lower().endswith(SUFFIXES) or source[0] in "/.~"):
        raise ConfigError(f"{key}={source}: no such file or folder")
    else:
        entries = _from_datasets(path, f"{key}={source}")
    for where, record in entries:
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: must be a JSON object, not {reprlib.repr(record)}")
        empty = False
        yield where, record
    if empty:
        raise ConfigError(f"{key}={source}: no records in it; {KNOWN}")


def _from_file(path: str, where: str) -> Iterator[tuple[str, Any]]:
    if not path.lower().endswith(SUFFIXES):
        raise ConfigError(f"{where}: not one of {', '.join(SUFFIXES)}; of a Parquet data set, give the folder")
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            blank = True
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                if blank and line.lstrip().startswith(b"["):
                    array = _parsed(line + file.read(), where, number)
                    yield from ((f"{where}, item {item}", record) for item, record in enumerate(array, start=1))
                    return
                blank = False
                yield f"{where}, line {number}", _parsed(line, where, number)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{where}: cannot be read: {error}; is it whole, and as its name says?") from None


def _parsed(data: bytes, where: str, line: int) -> Any:
    try:
        return json.loads(data.rstrip().decode("utf-8"))  # a line end would count as one more line
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ConfigError(f"{where}, line {line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        at = f"{where}, line {line + error.lineno - 1}"
        raise ConfigError(f"{at}: not JSON ({error.msg} at column {error.colno}); one object per line") from None
    except RecursionError:
        raise ConfigError(f"{where}, line {line}: nested too deeply to be a conversation; remove it") from None
    except ValueError as error:  # whole numbers of thousands of digits
        raise ConfigError(f"{where}, line {line}: not readable JSON ({error})") from None


def _from_datasets(source: str, where: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ConfigError(
            f"{where}: neither a file here nor a data set that loads ({reason}); give a file ({', '.join(SUFFIXES)}), "
            "a folder, or the id of a Hugging Face data set, which without network must be in the cache already"
        ) from None
    split = "train" if "train" in found else next(iter(found))
    if split != "train" and len(found) > 1:
        raise ConfigError(
            f"{where}: has the splits {', '.join(found)} and none called train; save the one to read as JSONL "
            "(`datasets.load_dataset(..., split=...).to_json(...)`) and give that file"
        )
    yield from ((f"{where}, row {number}", row) for number, row in enumerate(found[split], start=1))


# --- shapes -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "tree": "Open Assistant trees (message_tree_id, prompt: {message_id, role, text, replies})",
    "flat": "flat Open Assistant messages (message_id, parent_id, message_tree_id, role, text, rank)",
    "pair": f"pairs ({' or '.join(QUESTION_KEYS)}; chosen, rejected: text or messages)",
    "scored": f"scored responses ({' or '.join(QUESTION_KEYS)}; responses: [{{text or response, score or rating}}])",
    "alpaca": "AlpacaEval preferences (instruction, output_1, output_2, preference from 1 to 2)",
}
KNOWN = "known shapes: " + "; ".join(SHAPES.values())


def _shape(record: dict[str, Any]) -> str | None:
    keys = record.keys()
    if "message_tree_id" in keys and isinstance(record.get("prompt"), dict):
        return "tree"
    if keys >= {"message_id", "message_tree_id", "role", "text"}:
        return "flat"
    if keys >= {"chosen", "rejected"}:
        return "pair"
    if "responses" in keys and not keys.isdisjoint(QUESTION_KEYS):
        return "scored"
    return "alpaca" if keys >= {"instruction", "output_1", "output_2", "preference"} else None


def _groups(records: Iterator[tuple[str, dict[str, Any]]], counts: Counter[str]) -> Iterator[_Group]:
    """Each question with its replies. Counts what it ignores."""
    first_where, first = next(records)
    shape = _shape(first)
    if shape is None:
        raise ConfigError(f"{first_where}: fits no known shape with its keys {reprlib.repr(sorted(first))}; {KNOWN}")

    def alike() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, record in itertools.chain([(first_where, first)], records):
            if _shape(record) != shape:
                raise ConfigError(
                    f"{where}: not of the shape of the first record: {SHAPES[shape]}; has keys "
                    f"{reprlib.repr(sorted(record))}; one shape per file"
                )
            yield where, record

    if shape == "flat":
        yield from _flat(alike(), counts)
    else:
        group_of: Callable[[dict[str, Any], str, Counter[str]], _Group]
        group_of = {"tree": _tree, "pair": _pair, "scored": _scored, "alpaca": _alpaca}[shape]
        for where, record in alike():
            yield group_of(record, where, counts)


def _tree(record: dict[str, Any], where: str, counts: Counter[str]) -> _Group:
    identifier = _typed(record, "message_tree_id", str, where)
    prompt = _message(record["prompt"], where, "prompter", identifier)
    first = _below(record["prompt"], where)
    deeper = [turn for reply in first for turn in _below(reply, where)]
    while deeper:
        counts["deeper turns ignored"] += 1
        deeper.extend(_below(deeper.pop(), where))
    return prompt, [_message(reply, where, "assistant") for reply in first]


def _flat(records: Iterable[tuple[str, dict[str, Any]]], counts: Counter[str]) -> Iterator[_Group]:
    """Rows may stand in any order, so all are held until the last is read."""
    prompts: dict[str, _Message] = {}
    below: defaultdict[str, dict[str, _Message]] = defaultdict(dict)  # replies by their parent's id and their own
    seen: set[str] = set()
    for where, record in records:
        parent = _typed(record, "parent_id", str, where, optional=True)
        tree = _typed(record, "message_tree_id", str, where)
        message = _message(record, where, *(("prompter", tree) if parent is None else ("assistant",)))
        identifier = record["message_id"]
        if identifier in seen:
            counts["messages ignored: duplicate id"] += 1
            continue
        seen.add(identifier)
        if parent is None:
            prompts[identifier] = message
        else:
            below[parent][identifier] = message
    reached = len(prompts)
    for identifier, prompt in prompts.items():
        replies = below[identifier]
        deeper = [reply for reply in replies for reply in below.get(reply, ())]
        reached += len(replies)
        while deeper:
            reached += 1
            counts["deeper turns ignored"] += 1
            deeper.extend(below.get(deeper.pop(), ()))
        yield prompt, list(replies.values())
    counts["messages ignored: no root"] += len(seen) - reached


def _message(record: Any, where: str, role: str, identifier: str | None = None) -> _Message:
    """One of Open Assistant's. `role` is the one that it must have, `identifier` its id if that is another's."""
    own = _typed(record, "message_id", str, where)
    refused = None
    if _typed(record, "role", str, where) != role:
        refused = "odd role"
    elif _typed(record, "deleted", bool, where, optional=True):
        refused = "deleted"
    elif _typed(record, "review_result", bool, where, optional=True) is False:
        refused = "review not passed"
    return _Message(
        id=_id(identifier or own),
        text=_typed(record, "text", str, where, null=True) or "",
        rank=_number(record.get("rank"), f"{where}: rank of {own!r}"),
        language=_typed(record, "lang", str, where, optional=True),
        synthetic=bool(_typed(record, "synthetic", bool, where, optional=True)),
        refused=refused,
    )


def _below(record: Any, where: str) -> list[Any]:
    if not isinstance(record, dict) or not isinstance(replies := record.get("replies") or [], list):
        raise ConfigError(f"{where}: replies must be a list of messages, not {reprlib.repr(record)}")
    return replies


def _pair(record: dict[str, Any], where: str, counts: Counter[str]) -> _Group:
    """Ranks 0 and 1. The question may also stand in the messages of both replies."""
    asked, refused = _question(record, where, counts)
    answers = []
    for name in ("chosen", "rejected"):
        value, why = record[name], None
        if value is not None and not isinstance(value, str):
            turns = _turns(value, f"{where}: {name}", counts)
            if [role for role, _ in turns] not in (["assistant"], ["prompter", "assistant"]):
                why = NOT_ONE_TURN
            asked += [text for role, text in turns[:1] if role == "prompter"]
            value = turns[-1][1] if turns else ""
        answers.append((value or "", why))
    if not asked:
        raise ConfigError(f"{where}: has no question; {SHAPES['pair']}")
    if len({wording(text) for text in asked}) > 1:
        refused = refused or "replies to different questions"
    prompt = _Message(id=_digest(asked[0]), text=asked[0], refused=refused)
    return prompt, [
        _Message(id=_digest(prompt.text, text), text=text, rank=float(rank), refused=why)
        for rank, (text, why) in enumerate(answers)
    ]


def _scored(record: dict[str, Any], where: str, counts: Counter[str]) -> _Group:
    """Rank: how many different scores are higher."""
    asked, refused = _question(record, where, counts)
    if not asked:
        raise ConfigError(f"{where}: has no question; {SHAPES['scored']}")
    answers: list[tuple[str, float | None]] = []
    for number, response in enumerate(_typed(record, "responses", list, where), start=1):
        at = f"{where}: response {number}"
        text_key = "text" if isinstance(response, dict) and "text" in response else "response"
        text = _typed(response, text_key, str, at, null=True) or ""
        answers.append((text, _number(response.get("score", response.get("rating")), f"{at}: score")))
    levels = sorted({score for _, score in answers if score is not None}, reverse=True)
    prompt = _Message(id=_digest(asked[0]), text=asked[0], refused=refused)
    return prompt, [
        _Message(id=_digest(prompt.text, text), text=text, rank=None if score is None else float(levels.index(score)))
        for text, score in answers
    ]


def _alpaca(record: dict[str, Any], where: str, counts: Counter[str]) -> _Group:
    """Below 1.5 the first output is better, above it the second; 1.5 and, as in AlpacaEval's own code, 0 are a tie."""
    preference = _number(record["preference"], f"{where}: preference")
    ranks: tuple[float | None, float | None]
    if preference is None:
        ranks = (None, None)
    elif preference in (0, 1.5):
        ranks = (0.0, 0.0)
    elif 1 <= preference <= 2:
        ranks = (0.0, 1.0) if preference < 1.5 else (1.0, 0.0)
    else:
        raise ConfigError(f"{where}: preference {preference} must be from 1 (first is better) to 2 (second), or null")
    question = _typed(record, "instruction", str, where, null=True) or ""
    outputs = [_typed(record, name, str, where, null=True) or "" for name in ("output_1", "output_2")]
    return _Message(id=_digest(question), text=question), [
        _Message(id=_digest(question, text), text=text, rank=rank) for text, rank in zip(outputs, ranks, strict=True)
    ]


def _question(record: dict[str, Any], where: str, counts: Counter[str]) -> tuple[list[str], str | None]:
    """The question in a list, or an empty one, and why the record is left out if it is."""
    counts["system messages ignored"] += bool(record.get("system"))
    name = next((name for name in QUESTION_KEYS if record.get(name) is not None), None)
    if name is None:
        return [], None
    value = record[name]
    if isinstance(value, str):
        # Alpaca's form keeps the material of a task apart from the task.
        more = _typed(record, "input", str, where, optional=True)
        return [f"{value}\n\n{more}" if name == "instruction" and more else value], None
    turns = _turns(value, f"{where}: {name}", counts)
    refused = None if [role for role, _ in turns] == ["prompter"] else NOT_ONE_TURN
    return [turns[0][1] if turns else ""], refused


def _turns(value: Any, where: str, counts: Counter[str]) -> list[tuple[str, str]]:
    """(role, text) of one message or several, named as Open Assistant does; system messages are left out."""
    turns = []
    for message in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        if not isinstance(message, dict):
            raise ConfigError(f"{where}: must be a text or messages with role and content, not {reprlib.repr(value)}")
        role = _typed(message, "role" if "role" in message else "from", str, where)
        text = _typed(message, "content" if "content" in message else "value", str, where, null=True) or ""
        if role == "system":
            counts["system messages ignored"] += 1
        else:
            turns.append((ROLES.get(role, role), text))
    return turns


def _typed(record: Any, name: str, kind: type, where: str, *, optional: bool = False, null: bool = False) -> Any:
    """A field, which may be null where `null` says so, and also absent where `optional` does."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: must be an object with {name}, not {reprlib.repr(record)}")
    if name not in record and not optional:
        raise ConfigError(f"{where}: has no {name}; its keys are {reprlib.repr(sorted(record))}")
    value = record.get(name)
    if not isinstance(value, kind) and not ((optional or null) and value is None):
        kinds = {str: "a text", bool: "true or false", list: "a list"}
        raise ConfigError(f"{where}: {name} must be {kinds[kind]}, not {reprlib.repr(value)}")
    return value


def _number(value: Any, what: str) -> float | None:
    """NaN is what pandas makes of null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    except OverflowError:
        pass
    raise ConfigError(f"{what} must be a finite number or null, not {reprlib.repr(value)}")


def _id(raw: str) -> str:
    fits = raw and _writable(raw) and not any(c in "/#>" or unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in raw)
    return raw if fits else _digest(raw)


def _writable(text: str) -> bool:
    """Whether UTF-8 can write it; JSON can hold half a surrogate pair, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\x1f".join(texts).encode(errors="surrogatepass"), digest_size=12).hexdigest()


# --- selection --------------------------------------------------------------------------------------------------------


def part_of(prompt_id: str, shares: Mapping[str, float], seed: int = 0) -> str:
    """The part of a split (say ift, eft, eval) that a prompt belongs to, whatever other prompts there are.

    A hash of seed and id is uniform in [0, 1), on which the parts lie side by side in the order of their names.
    Raises ValueError unless shares are at least 0 and sum to 1.
    """
    if not all(share >= 0 for share in shares.values()) or abs(math.fsum(shares.values()) - 1) > TIE:
        raise ValueError(f"shares must be at least 0 and sum to 1, not {dict(shares)}")
    names = sorted(name for name, share in shares.items() if share > 0)
    point = int(_digest(f"part {seed}", prompt_id)[:13], 16) / 2**52
    ends = itertools.accumulate(shares[name] for name in names)
    return next((name for name, end in zip(names, ends, strict=True) if point < end), names[-1])


def ift_examples(prompts: Iterable[RankedPrompt]) -> tuple[list[tuple[RankedPrompt, Reply]], dict[str, int]]:
    """Each prompt with its best-ranked reply (2401.10020v3, section 3.1.1: human rank 0), and counts.

    Replies without rank do not count; a prompt that has no other gives no example. Of several best ones it is that
    with the lowest id, which does not hang on their order. Where rank 0 was dropped on reading, the best that is left
    stands in for it. Counted: `examples`, the prompts left out, and among the examples those with a tie for the best,
    with replies without rank beside it, and with a best above rank 0.
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


def accept(
    prompt: RankedPrompt,
    scores: Mapping[str, Sequence[float | None]],
    rule: Literal["order", "pairs"] = "order",
    most: int = 1,
) -> list[tuple[str, int]] | str:
    """The sampled judgements of a prompt that agree with people's ranks, or why none does (a text that is counted).

    `scores` holds the scores of the judgements sampled for each reply by its id, None where one is unreadable; it may
    hold other prompts' too. Returns (reply id, index of the sample), at most `most` per ranked reply, in the order of
    the replies. A reply's own score is the mean of its readable samples. Replies without rank take no part, equal
    ranks impose nothing, and where ranks differ, equal scores (within 1e-9) disagree.

    order: all or none (2401.10020v3, section 3.1.1, which leaves the number of samples and ties open). Every ranked
    reply has a readable sample, the means agree with every pair of different ranks, and so do the samples taken: of
    all choices of one readable sample per reply that agree, the one with the least sum of distances to the means.

    pairs: reply by reply. Over the pairs of different ranks whose replies both have a readable sample, a reply is
    accepted if the means agree in more of its pairs than they disagree in, and so does the sample taken with the other
    replies' means: of those that do, the one nearest to the mean. Both replies of a pair gain or lose by it.

    Above one sample per reply, the choice is made again from the samples that are not yet taken; the means stay.
    At the same distance the lowest index is taken, of the first reply first.
    """
    if rule not in ("order", "pairs"):
        raise ValueError(f"rule must be order or pairs, not {rule!r}")
    ranks = {reply.id: reply.rank for reply in prompt.replies if reply.rank is not None}
    if len(ranks) < 2:
        return "fewer than two ranked replies"
    pairs = [(better, worse) for better, worse in itertools.permutations(ranks, 2) if ranks[better] < ranks[worse]]
    if not pairs:
        return "all ranks are equal"
    samples = {reply: [(i, s) for i, s in enumerate(scores.get(reply, ())) if s is not None] for reply in ranks}
    means = {reply: statistics.fmean(score for _, score in found) for reply, found in samples.items() if found}
    compared = [(pair, means[pair[0]] - means[pair[1]]) for pair in pairs if means.keys() >= set(pair)]
    if rule == "pairs":
        why = "no reply agrees more than it disagrees"

        def agrees(reply: str, score: float) -> bool:
            own = means | {reply: score}
            leads = [own[one] - own[other] for (one, other), _ in compared if reply in (one, other)]
            return sum(1 if lead > TIE else -1 for lead in leads) > 0

        samples = {
            reply: [(i, s) for i, s in found if agrees(reply, means[reply]) and agrees(reply, s)]
            for reply, found in samples.items()
        }

        def choose(left: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, int]:
            return {reply: _nearest(found, means[reply])[1] for reply, found in left.items() if found}

    else:
        if len(means) < len(ranks):
            return "a ranked reply without readable judgement"
        if any(lead < -TIE for _, lead in compared):
            return "scores in another order"
        if any(lead <= TIE for _, lead in compared):
            return "equal scores for different ranks"
        why = "no samples in this order"

        def choose(left: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, int]:
            return _in_order(ranks, left, means) or {}

    taken: dict[str, list[int]] = {reply: [] for reply in ranks}
    for _ in range(most):
        left = {reply: [(i, s) for i, s in found if i not in taken[reply]] for reply, found in samples.items()}
        for reply, index in choose(left).items():
            taken[reply].append(index)
    return [(reply, index) for reply in ranks for index in taken[reply]] or why


def _nearest(samples: Iterable[tuple[int, float]], mean: float) -> tuple[float, int]:
    """Distance, of which rounding errors are no part, and index."""
    return min((round(abs(score - mean), 9), index) for index, score in samples)


def _in_order(
    ranks: Mapping[str, float], samples: Mapping[str, Sequence[tuple[int, float]]], means: Mapping[str, float]
) -> dict[str, int] | None:
    """The choice of `accept`'s rule `order`, rank by rank from the worst, for each highest score taken so far."""
    replies = list(ranks)
    best: dict[float, tuple[float, list[tuple[int, int]]]] = {-math.inf: (0.0, [])}  # distance, (reply, sample) taken
    for rank in sorted(set(ranks.values()), reverse=True):
        level = [position for position, reply in enumerate(replies) if ranks[reply] == rank]
        tops = sorted({score for position in level for _, score in samples[replies[position]]})
        reached: dict[float, tuple[float, list[tuple[int, int]]]] = {}
        for (floor, (distance, taken)), top in itertools.product(best.items(), tops):
            inside = [[(i, s) for i, s in samples[replies[position]] if floor + TIE < s <= top] for position in level]
            if not all(inside):
                continue
            nearest = [_nearest(some, means[replies[position]]) for position, some in zip(level, inside, strict=True)]
            more = [(position, index) for position, (_, index) in zip(level, nearest, strict=True)]
            choice = (round(distance + sum(away for away, _ in nearest), 9), sorted(taken + more))
            reached[top] = min(choice, reached.get(top, choice))
        best = reached
    return {replies[position]: index for position, index in min(best.values())[1]} if best else None


def thin(examples: Sequence[tuple[str, float]], most: float, seed: int) -> set[str]:
    """Ids that are kept of (id, score) examples, so that the most common score does not drown the others.

    As many examples with that score stay as make at most `most` (above 0, at most 1: all stay) of what is kept; those
    with other scores all stay (2401.10020v3, section 3.1.1, which does not say how many go). Scores are compared as
    they are, 3.5 is not 4; of two equally common ones the higher is thinned. Which go depends on seed and ids alone.
    Where all scores are the same and `most` is below 1, none is kept. Raises ValueError for another `most` or an id
    that is there twice.
    """
    if not 0 < most <= 1:
        raise ValueError(f"most must be above 0 and at most 1, not {most}")
    kept = {identifier for identifier, _ in examples}
    if len(kept) < len(examples):
        raise ValueError("ids must be unique")
    if most == 1 or not examples:
        return kept
    numbers = Counter(score for _, score in examples)
    common = max(numbers, key=lambda score: (numbers[score], score))
    room = math.floor(most * (len(kept) - numbers[common]) / (1 - most) + TIE)
    crowd = (identifier for identifier, score in examples if score == common)
    return kept - set(sorted(crowd, key=lambda identifier: _digest(f"thin {seed}", identifier))[room:])
