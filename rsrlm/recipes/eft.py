"""EFT: judgements of people's ranked replies that the current model writes, kept where its scores agree with people
(2401.10020v3, section 3.1.1)."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rsrlm.data import agreement
from rsrlm.data.examples import group_of, reply_as_response
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.engines import Engines
from rsrlm.judges import templates
from rsrlm.judges.base import Judge, Origin
from rsrlm.judges.rubric import Text
from rsrlm.records import Example, Judgement, Prompt, Scored
from rsrlm.settings.base import ConfigError
from rsrlm.settings.data import Data


def replies_in(prompts: Sequence[RankedPrompt]) -> int:
    """Replies that have a rank."""
    return sum(reply.rank is not None for prompt in prompts for reply in prompt.replies)


def check_judge(source: str) -> None:
    """Raise ConfigError for a template that prints what ranked data does not carry."""
    if names := templates.data_names(source):
        raise ConfigError(
            f"judge.template prints {{{{ data.{names[0]} }}}}, which ranked data does not carry: its replies cannot be "
            "judged with it; use a template without it"
        )


async def judge_replies(
    prompts: Sequence[RankedPrompt], judge: Judge, engines: Engines, iteration: int, each: int
) -> dict[str, list[Judgement]]:
    """`each` judgements of every ranked reply, by the reply's id."""

    async def one(prompt: RankedPrompt, reply: Reply, index: int) -> tuple[str, list[Judgement]]:
        group = group_of(iteration, prompt)
        response = reply_as_response(reply, prompt.id, group, index)
        origin = Origin(iteration=iteration, name=f"{group}/{index}")
        return reply.id, list(await judge(engines, Prompt(id=prompt.id, text=prompt.text), response, origin, each))

    replies = [
        (prompt, reply, index)
        for prompt in prompts
        for index, reply in enumerate(prompt.replies)
        if reply.rank is not None
    ]
    return dict(await engines.each(lambda task: one(*task), replies, each))


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A judgement that agrees with people, and what was judged."""

    prompt: RankedPrompt
    reply: Reply
    index: int  # of the reply in its prompt
    judgement: Judgement


def accepted(
    prompts: Sequence[RankedPrompt], judgements: Mapping[str, list[Judgement]], data: Data, seed: int
) -> tuple[list[Accepted], dict[str, int]]:
    """Judgements whose scores agree with the ranks, the most common score thinned; and what was dropped, and why.

    A cut judgement is no target: the model would learn not to end.
    """
    counts: Counter[str] = Counter()
    found = [
        one
        for prompt in sorted(prompts, key=lambda prompt: prompt.id)
        for one in _accepted_of(prompt, judgements, data, counts)
    ]
    counts["judgements accepted"] = len(found)
    kept = agreement.thin([(one.judgement.id, points_of(one.judgement)) for one in found], data.most_common, seed)
    counts["thinned as the most common score"] = len(found) - len(kept)
    found = [one for one in found if one.judgement.id in kept]
    if data.max_eft is not None and len(found) > data.max_eft:
        counts["over data.max_eft"] = len(found) - data.max_eft
        found = random.Random(f"eft {seed}").sample(found, data.max_eft)
    counts["kept"] = len(found)
    return found, dict(counts)


def _accepted_of(
    prompt: RankedPrompt, judgements: Mapping[str, list[Judgement]], data: Data, counts: Counter[str]
) -> list[Accepted]:
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
    agreed = agreement.accept(prompt, scores, data.accept, data.eft_per_reply)
    if isinstance(agreed, agreement.NoneAccepted):
        counts[f"prompts refused: {agreed.reason}"] += 1
        return []
    counts["prompts accepted"] += 1
    by_id = {reply.id: (index, reply) for index, reply in enumerate(prompt.replies)}
    texts: set[tuple[str, str]] = set()
    found = []
    for reply_id, sample in agreed:
        index, reply = by_id[reply_id]
        judgement = judgements[reply_id][sample]
        if (reply_id, judgement.text) in texts:
            counts["repeated texts"] += 1
            continue
        texts.add((reply_id, judgement.text))
        found.append(Accepted(prompt=prompt, reply=reply, index=index, judgement=judgement))
    return found


def points_of(judgement: Judgement) -> float:
    assert isinstance(judgement.verdict, Scored)
    return judgement.verdict.points


def eft(kept: Iterable[Accepted], judge: Text, iteration: int) -> list[Example]:
    """The judge's own prompt and its own tokens."""
    examples = []
    for one in kept:
        group = group_of(iteration, one.prompt)
        response = reply_as_response(one.reply, one.prompt.id, group, one.index)
        asked = Prompt(id=one.prompt.id, text=one.prompt.text)
        origin = Origin(iteration=iteration, name=f"{group}/{one.index}")
        examples.append(
            Example(
                id=one.judgement.id,
                kind="eft",
                prompt_token_ids=judge.prompt_of(asked, response, origin),
                target_token_ids=one.judgement.token_ids,
            )
        )
    return examples
