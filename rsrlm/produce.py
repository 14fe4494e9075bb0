"""From a prompt to a group: K responses, each judged as soon as it is finished, and at most one pair of them.

The order of events does not matter: every request has a seed of its own and everything is keyed by id. What a journal
already holds is taken from there and not done again.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rsrlm import meta_judging
from rsrlm.ask import JUDGE_PRIORITY, Comparing, Engines, Judging, gather, respond
from rsrlm.chat import ChatEncoder
from rsrlm.config import Config
from rsrlm.judges import verdicts as judging
from rsrlm.pairing import best_against_worst
from rsrlm.records import Group, Judgement, PreferencePair, Prompt, Response, Verdict, group_id, seed_of
from rsrlm.store.folder import Journal


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made for a prompt, before it is a group."""

    responses: tuple[Response, ...]
    judgements: tuple[Judgement, ...]


def mean_verdicts(responses: Sequence[Response], judgements: Sequence[Judgement]) -> dict[str, Verdict]:
    """The mean verdict of each response, by its id."""
    of_response: dict[str, list[Judgement]] = {response.id: [] for response in responses}
    for judgement in sorted(judgements, key=lambda judgement: judgement.index):
        of_response[judgement.response_id].append(judgement)
    return {response: judging.mean_points(j.verdict for j in found) for response, found in of_response.items()}


class Producer:
    """Makes the groups of one iteration."""

    def __init__(
        self,
        config: Config,
        encoder: ChatEncoder,
        samplers: Engines,
        judges: Engines,
        judging: Judging,
        journal: Journal,
        iteration: int,
        tick: Callable[[str, int, int], None],
        meta: Comparing | None = None,
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._samplers = samplers
        self._judges = judges
        self._judging = judging
        self._meta = meta  # compares judgements where pairs of them are trained on
        self._journal = journal
        self._iteration = iteration
        self._tick = tick  # (stage, items, tokens)

    async def _scored_response(self, prompt: Prompt, index: int) -> Made:
        config, iteration, journal = self._config, self._iteration, self._journal
        group = group_id(iteration, prompt.id)
        response = journal.responses.get(f"{group}/{index}")
        if response is None:
            seed = seed_of(config.seed, iteration, prompt.id, "actor", str(index))
            response = await respond(
                self._samplers, self._encoder, prompt, index, config.sample, group=group, seed=seed
            )
            journal.add(response)
            self._tick("respond", 1, len(response.token_ids))
        else:
            self._tick("respond", 1, 0)

        async def judgement(number: int) -> Judgement:
            found = journal.judgements.get(f"{response.id}#{number}")
            if found is None:
                found = await self._judging.judge(
                    self._judges, prompt, response, number, group=group, iteration=iteration
                )
                journal.add(found)
                self._tick("judge", 1, len(found.token_ids))
            else:
                self._tick("judge", 1, 0)
            return found

        judgements = await gather([judgement(number) for number in range(self._judging.per_response)])
        return Made(responses=(response,), judgements=tuple(judgements))

    async def _comparisons(self, prompt: Prompt, made: Made) -> tuple[Judgement, ...]:
        """The meta-judge's verdicts on the judgements of the response that they disagree on most."""
        config, meta, iteration = self._config, self._meta, self._iteration
        if meta is None:
            return ()
        group = group_id(iteration, prompt.id)
        response = meta_judging.most_uncertain(made.responses, made.judgements, config.seed)
        if response is None:
            return ()
        found = meta_judging.contestants(meta_judging.readable(made.judgements, response), config.meta)
        own = f"{group}/{response.index}"

        async def comparison(first: Judgement, second: Judgement) -> Judgement:
            identifier = meta_judging.comparison_id(first, second)
            done = self._journal.judgements.get(identifier)
            if done is None:
                done = await meta.ask(
                    self._judges,
                    identifier,
                    {
                        "instruction": prompt.text,
                        "response": response.text,
                        "judgement_a": first.text,
                        "judgement_b": second.text,
                    },
                    prompt_id=prompt.id,
                    response_id=response.id,
                    index=first.index,
                    role="meta",
                    seed=seed_of(config.seed, iteration, own, "meta", f"{first.index}~{second.index}"),
                    fence_seed=seed_of(config.seed, iteration, own, "meta", "fence"),
                    priority=JUDGE_PRIORITY,
                )
                self._journal.add(done)
            self._tick("compare", 1, len(done.token_ids))
            return done

        matches = meta_judging.matches(found, config.meta, config.seed)
        return tuple(await gather([comparison(first, second) for first, second in matches]))

    async def group(self, prompt: Prompt) -> Group:
        """The prompt's responses, judgements, comparisons, and pair of responses."""
        config, iteration = self._config, self._iteration
        made = await gather([self._scored_response(prompt, index) for index in range(config.sample.responses)])
        whole = Made(
            responses=tuple(response for one in made for response in one.responses),
            judgements=tuple(judgement for one in made for judgement in one.judgements),
        )
        comparisons = await self._comparisons(prompt, whole)
        pair: PreferencePair | str = "no pairs of responses wanted"
        if "actor" in config.pair.kinds:
            verdicts = mean_verdicts(whole.responses, whole.judgements)
            pair = best_against_worst(whole.responses, verdicts, config.pair, iteration, config.seed)
        return Group(
            id=group_id(iteration, prompt.id),
            iteration=iteration,
            prompt=prompt,
            responses=whole.responses,
            judgements=whole.judgements,
            comparisons=comparisons,
            pair=None if isinstance(pair, str) else pair,
            no_pair_reason=pair if isinstance(pair, str) else "",
        )

    async def all(self, prompts: Sequence[Prompt], put: Callable[[Group], Any]) -> list[Group]:
        """All groups, in the order of the prompts. `put` is awaited with each as it is finished and its records are on
        disk: what rests on a group must not outlive it.

        Enough groups are open at a time to keep the engines' queues filled, and no more.
        """
        open_groups = asyncio.Semaphore(max(2, math.ceil(2 * self._samplers.slots / self._config.sample.responses)))

        async def one(prompt: Prompt) -> Group:
            async with open_groups:
                group = await self.group(prompt)
                await self._journal.sync()
                await put(group)
                return group

        return await gather([one(prompt) for prompt in prompts])


def judge_pairs(
    groups: Sequence[Group], judge: Judging, config: Config
) -> tuple[dict[str, PreferencePair | str], meta_judging.Weights]:
    """The pair of judgements of each group, or the reason why it has none, by the group's id with `#judge` behind it;
    and the position weights over all groups (2407.19594v2, section 2.3).

    Only when all groups are finished: the weights count the wins of the whole iteration.
    """
    whole = meta_judging.position_weights(one for group in groups for one in group.comparisons)
    found: dict[str, PreferencePair | str] = {}
    for group in groups:
        response = meta_judging.most_uncertain(group.responses, group.judgements, config.seed)
        if response is None:
            found[f"{group.id}#judge"] = "no response with two readable judgements"
            continue
        own = meta_judging.position_weights(group.comparisons)
        found[f"{group.id}#judge"] = meta_judging.judge_pair(
            judge.prompt_of(group.prompt, response, group=group.id, iteration=group.iteration),
            meta_judging.contestants(meta_judging.readable(group.judgements, response), config.meta),
            group.comparisons,
            {"iteration": whole, "prompt": own, "none": meta_judging.EVEN}[config.meta.weights],
            config.meta,
            config.seed,
        )
    return found, whole
