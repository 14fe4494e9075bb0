"""Is the judge any good? Its scores, or its pairwise verdicts, against replies that people ranked.

The measures of Self-Rewarding (2401.10020v3, section 3.2.2) and Meta-Rewarding (2407.19594v2, section 3.4). And two
models head to head on prompts of a file.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

from rsrlm import seeds
from rsrlm.ask import SAMPLE_PRIORITY, Comparing, Engines, Judging, gather, respond, winner_of
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config
from rsrlm.data.ranked import RankedPrompt
from rsrlm.evaluate import EVALUATION
from rsrlm.judges.verdicts import Preferred, combine_orders, mean_points
from rsrlm.records import Judgement, Prompt, Response, Scored, Unparsed, seed_of
from rsrlm.report import metrics
from rsrlm.store.folder import Journal

Tick = Callable[[str, int, int], None]


def comparable(prompts: Sequence[RankedPrompt]) -> list[RankedPrompt]:
    """Prompts with at least two ranked replies, and those replies only."""
    found = []
    for prompt in prompts:
        replies = tuple(reply for reply in prompt.replies if reply.rank is not None)
        if len(replies) >= 2:
            found.append(RankedPrompt(id=prompt.id, text=prompt.text, replies=replies))
    return found


async def scores(
    prompts: Sequence[RankedPrompt], judge: Judging, engines: Engines, journal: Journal, tick: Tick, seed: int
) -> dict[str, Any]:
    """Measures of a judge that scores one reply at a time; `prompts` as `comparable` gives them."""
    found = await seeds.judge_replies(prompts, judge, engines, journal, EVALUATION, judge.per_response, tick)
    rated = []
    for prompt in prompts:
        means = [mean_points(one.verdict for one in found[reply.id]) for reply in prompt.replies]
        rated.append(
            metrics.Rated(
                id=prompt.id,
                ranks=tuple(float(reply.rank or 0.0) for reply in prompt.replies),
                scores=tuple(mean.points if isinstance(mean, Scored) else None for mean in means),
                lengths=tuple(len(reply.text) for reply in prompt.replies),
            )
        )
    verdicts = [one.verdict for judgements in found.values() for one in judgements]
    read = [verdict.points for verdict in verdicts if isinstance(verdict, Scored)]
    return metrics.judge_metrics(rated, readable=len(read), judgements=len(verdicts), points=read, seed=seed)


async def verdicts(
    prompts: Sequence[RankedPrompt],
    judge: Comparing,
    engines: Engines,
    journal: Journal,
    tick: Tick,
    seed: int,
) -> dict[str, Any]:
    """Measures of a judge that compares two replies, every two of a prompt in both orders."""

    async def shown(prompt: RankedPrompt, a: int, b: int) -> Judgement:
        return await _asked(
            f"{prompt.id}/{a}>{b}", prompt.id, prompt.text, prompt.replies[a].text, prompt.replies[b].text,
            f"{a}>{b}", judge, engines, journal, tick, seed,
        )  # fmt: skip

    async def both(prompt: RankedPrompt, a: int, b: int) -> metrics.Compared:
        first, second = await gather([shown(prompt, a, b), shown(prompt, b, a)])
        one, other = prompt.replies[a].rank or 0.0, prompt.replies[b].rank or 0.0
        human: Literal["first", "second", "tie"] = "tie" if one == other else "first" if one < other else "second"
        return metrics.Compared(prompt_id=prompt.id, first=_winner(first), second=_winner(second), human=human)

    outcomes = await gather(
        [both(prompt, a, b) for prompt in prompts for a, b in combinations(range(len(prompt.replies)), 2)]
    )
    return dict(metrics.pairwise_judge_metrics(outcomes, seed=seed))


async def _asked(
    identifier: str,
    prompt_id: str,
    instruction: str,
    response_a: str,
    response_b: str,
    shown: str,
    judge: Comparing,
    engines: Engines,
    journal: Journal,
    tick: Tick,
    seed: int,
) -> Judgement:
    """The verdict with `response_a` shown as A; `shown` names the order. What the journal holds is not asked."""
    found = journal.judgements.get(identifier)
    if found is None:
        found = await judge.ask(
            engines,
            identifier,
            {"instruction": instruction, "response_a": response_a, "response_b": response_b},
            prompt_id=prompt_id,
            response_id=identifier,
            index=0,
            role="duel",
            seed=seed_of(seed, EVALUATION, prompt_id, "duel", shown),
            fence_seed=seed_of(seed, EVALUATION, prompt_id, "duel", "fence"),
            priority=SAMPLE_PRIORITY,
        )
        journal.add(found)
    tick("compare", 1, len(found.token_ids))
    return found


def _winner(judgement: Judgement) -> Literal["A", "B", "tie"] | None:
    winner = winner_of(judgement)
    return None if isinstance(winner, Unparsed) else winner


# -- two models head to head -------------------------------------------------------------------------------------------


async def answers(
    prompts: Sequence[Prompt],
    engines: Engines,
    encoder: ChatEncoder,
    config: Config,
    journal: Journal,
    tick: Tick,
) -> list[Response]:
    """One answer to each prompt with the config's `evaluate` sampling, in the order of the prompts.

    The seed of an answer does not depend on the model: two models meet with the same luck.
    """

    async def one(prompt: Prompt) -> Response:
        found = journal.responses.get(f"{prompt.id}/0")
        if found is None:
            seed = seed_of(config.seed, EVALUATION, prompt.id, "actor", "0")
            found = await respond(engines, encoder, prompt, 0, config.evaluate, group=prompt.id, seed=seed)
            journal.add(found)
        tick("answers", 1, len(found.token_ids))
        return found

    return await gather([one(prompt) for prompt in prompts])


async def duel(
    prompts: Sequence[Prompt],
    first: Sequence[Response],
    second: Sequence[Response],
    judge: Comparing,
    engines: Engines,
    journal: Journal,
    tick: Tick,
    seed: int,
) -> dict[str, Any]:
    """Wins, ties and losses of the first model's answers in both orders, with intervals, and both models' lengths."""

    async def shown(prompt: Prompt, a: Response, b: Response, order: int) -> Judgement:
        return await _asked(
            f"{prompt.id}#{order}", prompt.id, prompt.text, a.text, b.text, str(order), judge, engines, journal, tick,
            seed,
        )  # fmt: skip

    async def outcome(prompt: Prompt, a: Response, b: Response) -> Preferred | Unparsed:
        if a.text == b.text:
            tick("compare", 2, 0)
            return "tie"
        one, other = await gather([shown(prompt, a, b, 0), shown(prompt, b, a, 1)])
        return combine_orders(winner_of(one), winner_of(other))

    found = await gather([outcome(p, a, b) for p, a, b in zip(prompts, first, second, strict=True)])
    readable: list[Preferred] = [one for one in found if not isinstance(one, Unparsed)]
    return {
        **metrics.win_rate(readable, seed=seed),
        "unreadable": len(found) - len(readable),
        "mean_chars": [sum(len(one.text) for one in side) / len(side) if side else None for side in (first, second)],
    }
