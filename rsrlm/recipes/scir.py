"""SCIR's agreement of signs (2502.08922): pairs of the judge that the model's own likelihood does not contradict.

The judge prefers one response, and so does the implicit reward log pi_t - log pi_0, summed over the tokens. A pair on
which the two differ is left out. M0 has no such reward: in the first iteration every pair is kept. The paper also
trains the two to agree; what was read of it does not say how.
"""

from collections.abc import Sequence
from dataclasses import replace

from rsrlm.engines import Model
from rsrlm.recipes.base import Batch
from rsrlm.recipes.cream import Likelihoods, likelihoods
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import Group, PreferencePair, Task
from rsrlm.run import Run


class Scir(SelfRewarding):
    async def iteration(self, run: Run, number: int, before: Model, tasks: Sequence[Task]) -> Batch:
        groups: Sequence[Group] = await run.groups(await run.load(before), self, tasks)
        if before.digest == run.first.digest:
            return await self.from_groups(run, number, groups)
        own, first = [await likelihoods(run, model, groups, self) for model in (before, run.first)]
        return await run.aside(self.agreeing, number, groups, own, first)

    def agreeing(self, number: int, groups: Sequence[Group], own: Likelihoods, first: Likelihoods) -> Batch:
        made = [without_contradictions(group, own, first) for group in groups]
        found, kept = (sum(len(group.pairs) for group in some) for some in (groups, made))
        return replace(self.items(number, made), measures={"agreement": {"kept": kept, "of": found}})


def without_contradictions(group: Group, own: Likelihoods, first: Likelihoods) -> Group:
    """The group without the pairs whose rejected response has the greater implicit reward, or as great a one."""

    def reward(identifier: str) -> float:
        return own[identifier].logprob - first[identifier].logprob

    def agrees(pair: PreferencePair) -> bool:
        return reward(pair.chosen_id) > reward(pair.rejected_id)

    kept = tuple(pair for pair in group.pairs if agrees(pair))
    reason = "judge and likelihood disagree" if group.pairs and not kept else group.no_pair_reason
    return replace(group, pairs=kept, no_pair_reason=reason)
