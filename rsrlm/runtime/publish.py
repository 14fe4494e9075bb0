"""One version of the weights to every replica of a pool, within a deadline."""

import asyncio
from typing import Any

from rsrlm.runtime.engine import EngineDead
from rsrlm.runtime.replicas import GONE, PoolFailed, Replica, Replicas
from rsrlm.runtime.weights import WeightSet


async def publish(replicas: Replicas, weights: WeightSet) -> list[dict[str, Any]]:
    """Load the weights on every replica. Returns the seconds that each took, by part, and whether it read a copy in the
    memory of its host.

    Each serves again when it holds them. One that dies, or takes longer than weights.deadline_s, is replaced and comes
    up with these weights. Raises PoolFailed where a replica refuses them.
    """
    if replicas.failure:
        raise replicas.failure
    replicas.weights = weights
    ready = replicas.ready
    for replica in ready:
        replica.ready.clear()
    # Generations are taken now: a request in flight may be the first to see that a replica died, and replace it.
    updates = [_update(replicas, replica, replica.generation) for replica in ready]
    reports = await asyncio.gather(*updates, return_exceptions=True)
    for replica, report in zip(ready, reports, strict=True):
        if isinstance(report, BaseException):
            cause = getattr(report, "cause", report)
            where = f"replica {replica.index} of pool {replicas.name}"
            raise PoolFailed(f"{where} refused weights {weights.version}: {cause}") from report
    return [report for report in reports if isinstance(report, dict)]


async def _update(replicas: Replicas, replica: Replica, generation: int) -> dict[str, Any] | None:
    """The report of a replica; None of one that was replaced meanwhile."""
    weights, deadline_s = replicas.weights, replicas.config.weights.deadline_s
    update = replica.actor.update.remote(weights.update_info(replica.node), weights.version)
    try:
        report = await asyncio.wait_for(update, deadline_s)
    except TimeoutError:
        late = f"weights {weights.version} were not loaded within weights.deadline_s={deadline_s:g}"
        replicas.lost(replica, generation, EngineDead(late))
        return None
    except GONE as error:
        replicas.lost(replica, generation, error)
        return None
    if replica.generation != generation:
        return None
    replica.version = weights.version
    replica.ready.set()
    await replicas.wake()
    return {"replica": replica.index, "copy": replica.node in weights.local, **report}
