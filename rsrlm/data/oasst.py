"""Open Assistant's messages, as trees or as flat rows: the first replies to first questions."""

import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from rsrlm.data.shapes import Conversation, Message, number, record_id, typed
from rsrlm.settings.base import ConfigError

TREE = "Open Assistant trees (message_tree_id, prompt: {message_id, role, text, replies})"
FLAT = "flat Open Assistant messages (message_id, parent_id, message_tree_id, role, text, rank)"


def tree(record: dict[str, Any], where: str, counts: Counter[str]) -> Conversation:
    """The root and its replies; turns below are counted."""
    identifier = typed(record, "message_tree_id", str, where)
    prompt = _message(record["prompt"], where, "prompter", identifier)
    replies = _replies(record["prompt"], where)
    deeper = [turn for reply in replies for turn in _replies(reply, where)]
    while deeper:
        counts["deeper turns ignored"] += 1
        deeper.extend(_replies(deeper.pop(), where))
    return prompt, [_message(reply, where, "assistant") for reply in replies]


def flat(records: Iterable[tuple[str, dict[str, Any]]], counts: Counter[str]) -> Iterator[Conversation]:
    """Conversations of rows in any order, for which all rows are held in memory. Rows without a root are counted."""
    prompts: dict[str, Message] = {}
    replies: defaultdict[str, dict[str, Message]] = defaultdict(dict)  # by their parent's id and their own
    seen: set[str] = set()
    for where, record in records:
        parent = typed(record, "parent_id", str, where, optional=True)
        root = typed(record, "message_tree_id", str, where)
        message = _message(record, where, *(("prompter", root) if parent is None else ("assistant",)))
        identifier = record["message_id"]
        if identifier in seen:
            counts["messages ignored: duplicate id"] += 1
            continue
        seen.add(identifier)
        if parent is None:
            prompts[identifier] = message
        else:
            replies[parent][identifier] = message
    reached = len(prompts)
    for identifier, prompt in prompts.items():
        answers = replies[identifier]
        deeper = [turn for answer in answers for turn in replies.get(answer, ())]
        reached += len(answers)
        while deeper:
            reached += 1
            counts["deeper turns ignored"] += 1
            deeper.extend(replies.get(deeper.pop(), ()))
        yield prompt, list(answers.values())
    counts["messages ignored: no root"] += len(seen) - reached


def _message(record: Any, where: str, role: str, identifier: str | None = None) -> Message:
    """`role` is what it must be; `identifier` its id where that is not its own `message_id`."""
    own = typed(record, "message_id", str, where)
    refused = None
    if typed(record, "role", str, where) != role:
        refused = "odd role"
    elif typed(record, "deleted", bool, where, optional=True):
        refused = "deleted"
    elif typed(record, "review_result", bool, where, optional=True) is False:
        refused = "review not passed"
    return Message(
        id=record_id(identifier or own),
        text=typed(record, "text", str, where, null=True) or "",
        rank=number(record.get("rank"), f"{where}: rank of {own!r}"),
        language=typed(record, "lang", str, where, optional=True),
        synthetic=bool(typed(record, "synthetic", bool, where, optional=True)),
        refused=refused,
    )


def _replies(record: Any, where: str) -> list[Any]:
    if not isinstance(record, dict) or not isinstance(replies := record.get("replies") or [], list):
        raise ConfigError(f"{where}: replies must be a list of messages, not {reprlib.repr(record)}")
    return replies
