"""Files of examples for supervised fine-tuning, and replies of people in the form that judges take."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rsrlm.chat import ChatEncoder
from rsrlm.data import files
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.judges.base import Origin
from rsrlm.records import Example, Prompt, Response, Sampling, group_id, wording
from rsrlm.settings.base import ConfigError

NOT_SAMPLED = Sampling(temperature=0.0, top_p=1.0, max_tokens=0, seed=0)  # people wrote it


class AsksInWords(Protocol):
    """A judge that writes what it thinks."""

    def prompt_of(self, prompt: Prompt, response: Response, origin: Origin) -> tuple[int, ...]: ...


def reply_as_response(reply: Reply, prompt_id: str, group: str, index: int) -> Response:
    """A person's reply in the form that a judge takes."""
    return Response(
        id=f"{group}/{index}",
        prompt_id=prompt_id,
        index=index,
        role="data",
        text=reply.text,
        token_ids=(),
        prompt_token_ids=(),
        finish_reason="stop",
        weight_version="",
        sampling=NOT_SAMPLED,
    )


def group_of(iteration: int, prompt: RankedPrompt) -> str:
    """A group id distinct from every prompt's: ids of prompts have no ">"."""
    return group_id(iteration, f"ranked>{prompt.id}")


def read_examples(path: str, encoder: ChatEncoder, judge: AsksInWords | None) -> tuple[list[Example], set[str]]:
    """Examples of a JSONL file: {"prompt", "target"}, or {"instruction", "response", "target"} for the judge's prompt;
    and the wordings (`records.wording`) of their questions.

    `judge` writes that prompt for the model in training; None where the config's judge has none that asks for text.
    `id` is optional. Raises ConfigError with the line.
    """
    examples = []
    wordings = set()
    seen: dict[str, int] = {}
    for number, entry in _entries(path):
        where = f"sources path={path}, line {number}"
        identifier = str(entry.get("id", f"{Path(path).name}:{number}"))
        if identifier in seen:
            raise ConfigError(f"{where}: id {identifier!r} stands in line {seen[identifier]} already; ids are unique")
        seen[identifier] = number
        judged = "instruction" in entry
        if judged and judge is None:
            raise ConfigError(
                f"{where}: a judgement to imitate, but judge.kind asks for none in words; set judge.kind to text or "
                "structured"
            )
        question = entry["instruction" if judged else "prompt"]
        wordings.add(wording(question))
        tokens = _judge_prompt(judge, entry, identifier) if judged and judge else encoder.user(question)
        examples.append(
            Example(
                id=identifier,
                kind="eft" if judged else "ift",
                prompt_token_ids=tokens,
                target_token_ids=encoder.target(entry["target"]),
            )
        )
    if not examples:
        raise ConfigError(f"sources path={path}: no examples in it; write one JSON object per line")
    return examples, wordings


def _judge_prompt(judge: AsksInWords, entry: dict[str, Any], identifier: str) -> tuple[int, ...]:
    reply = Reply(id=identifier, text=entry["response"], rank=None)
    return judge.prompt_of(
        Prompt(id=identifier, text=entry["instruction"]),
        reply_as_response(reply, identifier, identifier, 0),
        Origin(iteration=0, name=f"{identifier}/0"),
    )


def _entries(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of the file with their line numbers."""
    remedy = "give a JSONL file, or one of ift, eft, positive"
    for number, entry in files.jsonl(Path(os.path.expanduser(path)), "sources path", remedy):
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in _texts(entry)):
            raise ConfigError(
                f'sources path={path}, line {number}: must be an object such as {{"prompt": "...", "target": "..."}}, '
                'or {"instruction": "...", "response": "...", "target": "Because ...\\nScore: 4"}'
            )
        yield number, entry


def _texts(entry: dict[str, Any]) -> list[Any]:
    names = ("instruction", "response", "target") if "instruction" in entry else ("prompt", "target")
    return [entry.get(name) for name in names]
