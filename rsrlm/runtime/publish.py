"""One version of the weights to every replica of a pool, or a failure with its reason within a deadline."""

import asyncio
from typing import Any

from rsrlm.runtime.replicas import GONE, PoolFailed, Replica, Replicas
from rsrlm.runtime.weights import WeightSet


async def publish(replicas: Replicas, weights: WeightSet) -> list[dict[str, Any]]:
    """Load the weights on every replica. Returns the seconds that each took, by part, and whether it read a copy in the
    memory of its host.

    Replicas serve again once all have answered; those that died are replaced and come up with these weights. Raises
    PoolFailed where a replica refuses them, or takes longer than weights.deadline_s.
    """
    if replicas.failure:
        raise replicas.failure
    replicas.weights = weights
    ready = replicas.ready
    # Taken now: a request in flight may be the first to see that a replica died, and replace it.
    generations = [replica.generation for replica in ready]
    for replica in ready:
        replica.ready.clear()
    deadline_s = replicas.config.weights.deadline_s
    updates = (_update(replica, weights, deadline_s) for replica in ready)
    reports = await asyncio.gather(*updates, return_exceptions=True)
    good = []
    for replica, generation, report in zip(ready, generations, reports, strict=True):
        if replica.generation != generation:
            continue  # replaced meanwhile, by an actor that comes up with this version
        if isinstance(report, GONE):
            replicas.lost(replica, generation, report)
        elif isinstance(report, BaseException):
            raise _failed(replicas, replica, weights, report) from report
        else:
            good.append({"replica": replica.index, "copy": replica.node in weights.local, **report})
            replica.ready.set()
    await replicas.wake()
    return good


def _failed(replicas: Replicas, replica: Replica, weights: WeightSet, error: BaseException) -> PoolFailed:
    where = f"replica {replica.index} of pool {replicas.name}"
    if isinstance(error, TimeoutError):
        deadline_s = replicas.config.weights.deadline_s
        return PoolFailed(f"weights {weights.version} did not reach {where} within weights.deadline_s={deadline_s}")
    return PoolFailed(f"{where} refused weights {weights.version}: {getattr(error, 'cause', error)}")


async def _update(replica: Replica, weights: WeightSet, deadline_s: float) -> dict[str, float]:
    update = replica.actor.update.remote(weights.update_info(replica.node), weights.version)
    report = await asyncio.wait_for(update, deadline_s)
    replica.version = weights.version
    return report
