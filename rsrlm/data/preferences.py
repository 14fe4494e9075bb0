"""Flat preference data: a question in each record, with a chosen and a rejected reply, scored ones, or two outputs."""

import reprlib
from collections import Counter
from typing import Any

from rsrlm.data.shapes import Conversation, Message, digest, number, typed
from rsrlm.records import wording
from rsrlm.settings.base import ConfigError

QUESTION_KEYS = ("prompt", "instruction", "question", "conversations")
PAIR = f"pairs ({' or '.join(QUESTION_KEYS)}; chosen, rejected: text or messages)"
SCORED = f"scored responses ({' or '.join(QUESTION_KEYS)}; responses: [{{text or response, score or rating}}])"
ALPACA = "AlpacaEval preferences (instruction, output_1, output_2, preference from 1 to 2)"
ROLES = {"user": "prompter", "human": "prompter", "gpt": "assistant"}  # others' names for Open Assistant's
NOT_ONE_TURN = "not one question and its answer"


def pair(record: dict[str, Any], where: str, counts: Counter[str]) -> Conversation:
    """Ranks 0 and 1. The question may also stand in the messages of both replies."""
    questions, refused = _question(record, where, counts)
    answers = []
    for name in ("chosen", "rejected"):
        value, why = record[name], None
        if value is not None and not isinstance(value, str):
            turns = _turns(value, f"{where}: {name}", counts)
            if [role for role, _ in turns] not in (["assistant"], ["prompter", "assistant"]):
                why = NOT_ONE_TURN
            questions += [text for role, text in turns[:1] if role == "prompter"]
            value = turns[-1][1] if turns else ""
        answers.append((value or "", why))
    if not questions:
        raise ConfigError(f"{where}: has no question; {PAIR}")
    if len({wording(text) for text in questions}) > 1:
        refused = refused or "replies to different questions"
    prompt = Message(id=digest(questions[0]), text=questions[0], refused=refused)
    return prompt, [
        Message(id=digest(prompt.text, text), text=text, rank=float(rank), refused=why)
        for rank, (text, why) in enumerate(answers)
    ]


def scored(record: dict[str, Any], where: str, counts: Counter[str]) -> Conversation:
    """A reply's rank is the number of different scores above its own."""
    questions, refused = _question(record, where, counts)
    if not questions:
        raise ConfigError(f"{where}: has no question; {SCORED}")
    answers: list[tuple[str, float | None]] = []
    for place, response in enumerate(typed(record, "responses", list, where), start=1):
        at = f"{where}: response {place}"
        text_key = "text" if isinstance(response, dict) and "text" in response else "response"
        text = typed(response, text_key, str, at, null=True) or ""
        answers.append((text, number(response.get("score", response.get("rating")), f"{at}: score")))
    levels = sorted({score for _, score in answers if score is not None}, reverse=True)
    prompt = Message(id=digest(questions[0]), text=questions[0], refused=refused)
    return prompt, [
        Message(id=digest(prompt.text, text), text=text, rank=None if score is None else float(levels.index(score)))
        for text, score in answers
    ]


def alpaca(record: dict[str, Any], where: str, counts: Counter[str]) -> Conversation:
    """Below 1.5 the first output is better, above it the second; 1.5 and, as in AlpacaEval's own code, 0 are a tie."""
    preference = number(record["preference"], f"{where}: preference")
    ranks: tuple[float | None, float | None]
    if preference is None:
        ranks = (None, None)
    elif preference in (0, 1.5):
        ranks = (0.0, 0.0)
    elif 1 <= preference <= 2:
        ranks = (0.0, 1.0) if preference < 1.5 else (1.0, 0.0)
    else:
        raise ConfigError(f"{where}: preference {preference} must be from 1 (first is better) to 2 (second), or null")
    question = typed(record, "instruction", str, where, null=True) or ""
    outputs = [typed(record, name, str, where, null=True) or "" for name in ("output_1", "output_2")]
    return Message(id=digest(question), text=question), [
        Message(id=digest(question, text), text=text, rank=rank) for text, rank in zip(outputs, ranks, strict=True)
    ]


def _question(record: dict[str, Any], where: str, counts: Counter[str]) -> tuple[list[str], str | None]:
    """The question as a list of one, or none, and why the record is left out, if it is."""
    counts["system messages ignored"] += bool(record.get("system"))
    name = next((name for name in QUESTION_KEYS if record.get(name) is not None), None)
    if name is None:
        return [], None
    value = record[name]
    if isinstance(value, str):
        # Alpaca's form keeps the material of a task apart from the task.
        material = typed(record, "input", str, where, optional=True)
        return [f"{value}\n\n{material}" if name == "instruction" and material else value], None
    turns = _turns(value, f"{where}: {name}", counts)
    refused = None if [role for role, _ in turns] == ["prompter"] else NOT_ONE_TURN
    return [turns[0][1] if turns else ""], refused


def _turns(value: Any, where: str, counts: Counter[str]) -> list[tuple[str, str]]:
    """(role, text) of one message or several, named as Open Assistant does; system messages are left out."""
    turns = []
    for message in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        if not isinstance(message, dict):
            raise ConfigError(f"{where}: must be a text or messages with role and content, not {reprlib.repr(value)}")
        role = typed(message, "role" if "role" in message else "from", str, where)
        text = typed(message, "content" if "content" in message else "value", str, where, null=True) or ""
        if role == "system":
            counts["system messages ignored"] += 1
        else:
            turns.append((ROLES.get(role, role), text))
    return turns
