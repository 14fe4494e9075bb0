"""What a judge is measured by: its scores, or its pairwise verdicts, against replies that people ranked.

The measures of Self-Rewarding (2401.10020v3, section 3.2.2) and Meta-Rewarding (2407.19594v2, section 3.4).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from rsrlm.commands.duel import match
from rsrlm.config import Config
from rsrlm.data import seed_data
from rsrlm.data.ranked import RankedPrompt
from rsrlm.engines import Engines
from rsrlm.evaluate import EVALUATION
from rsrlm.judges.base import Judge
from rsrlm.judges.pairwise import Pairwise, winner_of
from rsrlm.judges.verdicts import mean_points
from rsrlm.recipes.eft import judge_replies
from rsrlm.records import Judgement, Prompt, Scored, Unparsed
from rsrlm.report import metrics
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder


def comparable(prompts: Sequence[RankedPrompt]) -> list[RankedPrompt]:
    """Prompts with at least two ranked replies, and those replies only."""
    found = []
    for prompt in prompts:
        replies = tuple(reply for reply in prompt.replies if reply.rank is not None)
        if len(replies) >= 2:
            found.append(RankedPrompt(id=prompt.id, text=prompt.text, replies=replies))
    return found


async def scores(prompts: Sequence[RankedPrompt], judge: Judge, engines: Engines, seed: int) -> dict[str, Any]:
    """Measures of a judge that scores one reply at a time; `prompts` as `comparable` gives them."""
    judged = await judge_replies(prompts, judge, engines, EVALUATION, judge.per_response)
    rated = []
    for prompt in prompts:
        means = [mean_points(one.verdict for one in judged[reply.id]) for reply in prompt.replies]
        rated.append(
            metrics.Rated(
                id=prompt.id,
                ranks=tuple(float(reply.rank or 0.0) for reply in prompt.replies),
                scores=tuple(mean.points if isinstance(mean, Scored) else None for mean in means),
                lengths=tuple(len(reply.text) for reply in prompt.replies),
            )
        )
    verdicts = [one.verdict for judgements in judged.values() for one in judgements]
    read = [verdict.points for verdict in verdicts if isinstance(verdict, Scored)]
    return metrics.judge_metrics(rated, readable=len(read), judgements=len(verdicts), points=read, seed=seed)


async def verdicts(prompts: Sequence[RankedPrompt], judge: Pairwise, engines: Engines, seed: int) -> dict[str, Any]:
    """Measures of a judge that compares two replies, every two of a prompt in both orders."""

    async def both(asked: tuple[RankedPrompt, int, int]) -> metrics.Compared:
        prompt, a, b = asked
        question = Prompt(id=prompt.id, text=prompt.text)
        orders = [
            match(
                judge.context,
                question,
                (prompt.replies[one].text, prompt.replies[other].text),
                f"{prompt.id}/{one}>{other}",
                f"{one}>{other}",
            )
            for one, other in ((a, b), (b, a))
        ]
        first, second = await judge(engines, orders)
        one, other = prompt.replies[a].rank or 0.0, prompt.replies[b].rank or 0.0
        human: Literal["first", "second", "tie"] = "tie" if one == other else "first" if one < other else "second"
        return metrics.Compared(prompt_id=prompt.id, first=_winner(first), second=_winner(second), human=human)

    pairs = [(prompt, a, b) for prompt in prompts for a, b in combinations(range(len(prompt.replies)), 2)]
    return dict(metrics.pairwise_judge_metrics(await engines.each(both, pairs, 2), seed=seed))


def _winner(judgement: Judgement) -> Literal["A", "B", "tie"] | None:
    winner = winner_of(judgement)
    return None if isinstance(winner, Unparsed) else winner


@dataclass(frozen=True, kw_only=True)
class RatedData:
    """Prompts with ranked replies to evaluate on; `all` are those of the source, of which the others were drawn."""

    prompts: list[RankedPrompt]
    all: list[RankedPrompt]
    source: str
    part: str


def trained_on(config: Config, run: RunFolder | None) -> seed_data.TrainedOn:
    """The questions that a run trained on; without one, those that the config's ranked data has for training."""
    if run and run.trained_on.exists():
        noted = json.loads(run.trained_on.read_text(encoding="utf-8"))
        return seed_data.TrainedOn(ids=frozenset(noted["ids"]), wordings=frozenset(noted["wordings"]))
    return seed_data.trained_on(seed_data.divide(config.data) if config.data.trees else None)


def rated(
    config: Config, source: str, part: str | None, limit: int | None, seen: seed_data.TrainedOn, report: Report
) -> RatedData:
    """Read `--data`. Without a part, questions in `seen` are left out, by their ids and by their wording, whatever file
    they stand in here; how many is said in any case.

    Raises ConfigError where nothing is left.
    """
    parts = seed_data.divide(config.data.model_copy(update={"trees": source}), "--data")
    sets = {"ift": parts.ift, "eft": parts.eft, "evaluation": parts.evaluation}
    everything = sorted(
        comparable([prompt for prompts in sets.values() for prompt in prompts]), key=lambda prompt: prompt.id
    )
    inside = {prompt.id for name, prompts in sets.items() if part in (name, "all", None) for prompt in prompts}
    found = [prompt for prompt in everything if prompt.id in inside]
    trained = sum(prompt in seen for prompt in found)
    if part is None:
        found = [prompt for prompt in found if prompt not in seen]
    random.Random(f"limit {config.seed}").shuffle(found)
    for reason, number in parts.counts.items():
        report.line(f"  {number:>8}  {reason}")
    if trained:
        report.line(
            f"{trained} prompts are trained on and {'left out' if part is None else 'measured on all the same'}"
        )
    if not found:
        raise ConfigError(
            f"--data {source}: no prompt with two ranked replies in part {part or 'unseen'}; try --part all, and look "
            "at data.language and data.max_chars"
        )
    chosen = found[:limit]
    replies = sum(len(prompt.replies) for prompt in chosen)
    report.line(f"{len(chosen)} of {len(found)} prompts of part {part or 'unseen'} with {replies} ranked replies")
    return RatedData(prompts=chosen, all=everything, source=source, part=part or "unseen")
