"""One version of the weights to every replica of a pool, or a failure with its reason within a deadline."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray

from rsrlm.runtime.replicas import GONE, PoolFailed, Replica, Replicas
from rsrlm.runtime.weights import WeightSet

# Sends the files of the weights to all ranks of a gloo group: its address, port and number of ranks.
Broadcast = Callable[[WeightSet, str, int, int], Awaitable[None]]


async def publish(replicas: Replicas, weights: WeightSet, broadcast: Broadcast) -> list[dict[str, Any]]:
    """Load the weights on every replica. Returns the seconds that each took, by part.

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
    if replicas.config.weights.transport == "gloo" and ready:
        reports = await _over_gloo(replicas, ready, weights, broadcast)
    else:
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
            good.append({"replica": replica.index, **report})
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
    update = replica.actor.update.remote(weights.update_info(), weights.version)
    report = await asyncio.wait_for(update, deadline_s)
    replica.version = weights.version
    return report


async def _over_gloo(
    replicas: Replicas, ready: Sequence[Replica], weights: WeightSet, broadcast: Broadcast
) -> list[dict[str, float] | BaseException]:
    """A new group for every version: replicas may have come and gone. Rank 0 is the sender."""
    deadline_s = replicas.config.weights.deadline_s
    address, port = _rendezvous()
    ranks = max(1, replicas.config.engine.gpus)
    world_size = 1 + ranks * len(ready)

    async def receive(place: int, replica: Replica) -> dict[str, float]:
        info = {"master_address": address, "master_port": port, "world_size": world_size}
        await replica.actor.connect.remote({**info, "rank_offset": 1 + place * ranks})
        return await _update(replica, weights, deadline_s)

    sending = asyncio.ensure_future(broadcast(weights, address, port, world_size))
    receiving = (asyncio.wait_for(receive(place, replica), deadline_s) for place, replica in enumerate(ready))
    reports = await asyncio.gather(*receiving, return_exceptions=True)
    try:
        await asyncio.wait_for(sending, deadline_s)
    except Exception as error:
        raise PoolFailed(f"weights {weights.version}: the sender failed: {error!r}") from error
    return reports


def _rendezvous() -> tuple[str, int]:
    """An address of this host that other hosts reach, and a free port on it."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
