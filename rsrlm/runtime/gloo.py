"""A gloo group between the learner's first rank and the workers of all engines, and the broadcast over it."""

from typing import Any

import torch
import torch.distributed as dist

BUCKET_BYTES = 64 << 20


def gloo_group(address: str, port: int, rank: int, world_size: int) -> Any:
    """A process group of its own, beside the one that torch.distributed may already hold. Rank 0 listens."""
    timeout = dist.default_pg_timeout
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return dist.ProcessGroupGloo(dist.PrefixStore("rsrlm", store), rank, world_size, timeout)


def broadcast(group: Any, data: torch.Tensor) -> None:
    """Broadcast a uint8 tensor from rank 0 in buckets; both sides cut at the same places."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    for start in range(0, data.numel(), BUCKET_BYTES):
        group.broadcast([data[start : start + BUCKET_BYTES]], options).wait()
