"""What supervised fine-tuning trains on: files of examples, and what a run takes from human-ranked data by itself.

IFT are questions with the reply that people ranked best. EFT are judgements of ranked replies that the current model
writes, kept where its scores agree with people (2401.10020v3, section 3.1.1). Positive are the model's own responses
with the highest scores (appendix A.4).
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsrlm.ask import Engines, Judging, gather
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config, ConfigError, Data
from rsrlm.data import ranked
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.produce import mean_verdicts
from rsrlm.records import Example, Group, Judgement, Prompt, Response, Sampling, Scored, group_id, wording
from rsrlm.store.folder import Journal

NOT_SAMPLED = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=0, seed=0)  # people wrote it


class NoExamples(Exception):
    """A source gave fewer examples than data.minimum: the stage has failed."""


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


# -- files -------------------------------------------------------------------------------------------------------------


def read_file(path: str, encoder: ChatEncoder, judge: Judging | None) -> tuple[list[Example], set[str]]:
    """Examples of a JSONL file: {"prompt", "target"}, or {"instruction", "response", "target"} for the judge's prompt;
    and the wordings (`records.wording`) of their questions.

    `judge` writes that prompt for the model in training; None where the config's judge has none that asks for text.
    `id` is optional. Raises ConfigError with the line.
    """
    found = []
    wordings = set()
    seen: dict[str, int] = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"sft.sources path={path}: {error}; give a JSONL file, or one of ift, eft, positive"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"sft.sources path={path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from None
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in _texts(entry)):
            raise ConfigError(
                f'{where}: must be an object such as {{"prompt": "...", "target": "..."}}, or {{"instruction": "...", '
                '"response": "...", "target": "Because ...\\nScore: 4"}'
            )
        identifier = str(entry.get("id", f"{Path(path).name}:{number}"))
        if identifier in seen:
            raise ConfigError(f"{where}: id {identifier!r} stands in line {seen[identifier]} already; ids are unique")
        seen[identifier] = number
        if "instruction" in entry and judge is None:
            raise ConfigError(
                f"{where}: a judgement to imitate, but judge.read asks for none in words; set judge.read to text or "
                "structured"
            )
        if "instruction" in entry and judge:
            tokens = judge.prompt_of(
                Prompt(id=identifier, text=entry["instruction"]),
                reply_as_response(Reply(id=identifier, text=entry["response"], rank=None), identifier, identifier, 0),
                group=identifier,
                iteration=0,
            )
        else:
            tokens = encoder.user(entry["prompt"])
        wordings.add(wording(entry["instruction"] if "instruction" in entry else entry["prompt"]))
        found.append(
            Example(
                id=identifier,
                kind="eft" if "instruction" in entry else "ift",
                prompt_token_ids=tokens,
                target_token_ids=encoder.target(entry["target"]),
            )
        )
    if not found:
        raise ConfigError(f"sft.sources path={path}: no examples in it; write one JSON object per line")
    return found, wordings


def _texts(entry: dict[str, Any]) -> list[Any]:
    names = ("instruction", "response", "target") if "instruction" in entry else ("prompt", "target")
    return [entry.get(name) for name in names]


# -- made by a run -----------------------------------------------------------------------------------------------------


def ift(prompts: Sequence[RankedPrompt], encoder: ChatEncoder, data: Data) -> tuple[list[Example], dict[str, int]]:
    """Questions with their best reply; at most `data.max_ift`, the first by id."""
    chosen, counts = ranked.ift_examples(prompts)
    chosen = sorted(chosen, key=lambda pair: pair[0].id)[: data.max_ift]
    return [
        Example(
            id=f"ift/{reply.id}",
            kind="ift",
            prompt_token_ids=encoder.user(prompt.text),
            target_token_ids=encoder.target(reply.text),
        )
        for prompt, reply in chosen
    ], counts


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
    """A group id that no prompt of the run has: ids of prompts have no ">"."""
    return group_id(iteration, f"ranked>{prompt.id}")


async def judge_replies(
    prompts: Sequence[RankedPrompt],
    judge: Judging,
    engines: Engines,
    journal: Journal,
    iteration: int,
    each: int,
    tick: Callable[[str, int, int], None],
) -> dict[str, list[Judgement]]:
    """`each` judgements of every ranked reply, by the reply's id; what the journal holds is not done again."""

    room = asyncio.Semaphore(max(2, 2 * engines.slots if engines else 2))

    async def one(prompt: RankedPrompt, reply: Reply, index: int, number: int) -> tuple[str, Judgement]:
        group = group_of(iteration, prompt)
        response = reply_as_response(reply, prompt.id, group, index)
        found = journal.judgements.get(f"{response.id}#{number}")
        if found is None:
            asked = Prompt(id=prompt.id, text=prompt.text)
            async with room:
                found = await judge.judge(engines, asked, response, number, group=group, iteration=iteration)
            journal.add(found)
        tick("judge", 1, len(found.token_ids))
        return reply.id, found

    made = await gather(
        [
            one(prompt, reply, index, number)
            for prompt in prompts
            for index, reply in enumerate(prompt.replies)
            if reply.rank is not None
            for number in range(each)
        ]
    )
    found: dict[str, list[Judgement]] = {}
    for reply_id, judgement in made:
        found.setdefault(reply_id, []).append(judgement)
    return found


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A judgement that agrees with people, and what was judged."""

    prompt: RankedPrompt
    reply: Reply
    index: int  # of the reply in its prompt
    judgement: Judgement


def accepted(
    prompts: Sequence[RankedPrompt], judgements: dict[str, list[Judgement]], data: Data, seed: int
) -> tuple[list[Accepted], dict[str, int]]:
    """Judgements whose scores agree with the ranks, the most common score thinned; and what was dropped, and why.

    A cut judgement is no target: the model would learn not to end.
    """
    counts: Counter[str] = Counter()
    found: list[Accepted] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.id):
        scores = {
            reply.id: [
                one.verdict.points if isinstance(one.verdict, Scored) and one.finish_reason == "stop" else None
                for one in judgements.get(reply.id, [])
            ]
            for reply in prompt.replies
            if reply.rank is not None
        }
        counts["judgements"] += sum(len(points) for points in scores.values())
        counts["judgements unreadable or cut"] += sum(points.count(None) for points in scores.values())
        agreed = ranked.accept(prompt, scores, data.accept, data.eft_per_reply)
        if isinstance(agreed, str):
            counts[f"prompts refused: {agreed}"] += 1
            continue
        counts["prompts accepted"] += 1
        by_id = {reply.id: (index, reply) for index, reply in enumerate(prompt.replies)}
        texts: set[tuple[str, str]] = set()
        for reply_id, sample in agreed:
            index, reply = by_id[reply_id]
            if (text := (reply_id, judgements[reply_id][sample].text)) in texts:
                counts["repeated texts"] += 1
                continue
            texts.add(text)
            found.append(Accepted(prompt=prompt, reply=reply, index=index, judgement=judgements[reply_id][sample]))
    counts["judgements accepted"] = len(found)
    kept = ranked.thin([(one.judgement.id, points_of(one.judgement)) for one in found], data.most_common, seed)
    counts["thinned as the most common score"] = len(found) - len(kept)
    found = [one for one in found if one.judgement.id in kept]
    if data.max_eft is not None and len(found) > data.max_eft:
        counts["over data.max_eft"] = len(found) - data.max_eft
        found = random.Random(f"eft {seed}").sample(found, data.max_eft)
    counts["kept"] = len(found)
    return found, dict(counts)


def points_of(judgement: Judgement) -> float:
    assert isinstance(judgement.verdict, Scored)
    return judgement.verdict.points


def eft(found: Iterable[Accepted], judge: Judging, iteration: int) -> list[Example]:
    """The judge's own prompt and its own tokens."""
    examples = []
    for one in found:
        group = group_of(iteration, one.prompt)
        response = reply_as_response(one.reply, one.prompt.id, group, one.index)
        asked = Prompt(id=one.prompt.id, text=one.prompt.text)
        examples.append(
            Example(
                id=one.judgement.id,
                kind="eft",
                prompt_token_ids=judge.prompt_of(asked, response, group=group, iteration=iteration),
                target_token_ids=one.judgement.token_ids,
            )
        )
    return examples


def positive(groups: Sequence[Group], least: float) -> list[Example]:
    """Complete responses whose mean score is at least `least`."""
    examples = []
    for group in groups:
        verdicts = mean_verdicts(group.responses, group.judgements)
        for response in group.responses:
            verdict = verdicts[response.id]
            if (
                isinstance(verdict, Scored)
                and verdict.points >= least - 1e-9
                and response.complete
                and response.text.strip()
            ):
                examples.append(
                    Example(
                        id=response.id,
                        kind="positive",
                        prompt_token_ids=response.prompt_token_ids,
                        target_token_ids=response.token_ids,
                    )
                )
    return examples


def mixed(sources: Sequence[tuple[str, float, Sequence[Example]]], config: Config, iteration: int) -> list[Example]:
    """All sources as (name, weight, examples), each example as often as its source's weight says, in a seeded order.

    Raises NoExamples where a source has fewer than data.minimum.
    """
    items: list[Example] = []
    for name, weight, examples in sources:
        if len(examples) < config.data.minimum:
            raise NoExamples(
                f"iteration {iteration}: source {name} gave {len(examples)} examples, fewer than data.minimum="
                f"{config.data.minimum}; add data, or lower it"
            )
        ordered = sorted(examples, key=lambda example: example.id)
        drawn = random.Random(f"source {config.seed} {iteration} {name}")
        items += ordered * int(weight)
        items += drawn.sample(ordered, round((weight - int(weight)) * len(ordered)))
    if not items:
        raise NoExamples(f"iteration {iteration}: the weights of sft.sources leave no example; raise them")
    random.Random(f"examples {config.seed} {iteration}").shuffle(items)
    return items


def fitting(examples: Sequence[Example], longest: int) -> list[Example]:
    """Those of at most `longest` tokens: a longer one was never seen whole by an engine either."""
    return [one for one in examples if len(one.prompt_token_ids) + len(one.target_token_ids) <= longest]
