"""A gloo group between the learner's first rank and the hosts of replicas, and the broadcast over it."""

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BUCKET_BYTES = 64 << 20


def group_of_sender(server: socket.socket, address: str, world_size: int, deadline_s: float) -> Any:
    """The group of rank 0, beside the one that torch.distributed may already hold. The others meet at the server; it is
    closed."""
    port, timeout = server.getsockname()[1], timedelta(seconds=deadline_s)
    store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )
    return _group(store, address, 0, world_size, timeout)


def group_of_receiver(place: tuple[str, int], own: str, rank: int, world_size: int, deadline_s: float) -> Any:
    """The group of another rank: `place` is where the sender listens, `own` the address of this host."""
    timeout = timedelta(seconds=deadline_s)
    store = dist.TCPStore(*place, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    return _group(store, own, rank, world_size, timeout)


def _group(store: Any, address: str, rank: int, world_size: int, timeout: timedelta) -> Any:
    # The device by its address: by default gloo asks for the host's name, and many hosts call themselves 127.0.0.1.
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(dist.PrefixStore("rsrlm", store), rank, world_size, options)


def broadcast(group: Any, data: torch.Tensor) -> None:
    """Broadcast a uint8 tensor from rank 0 in buckets; both sides cut at the same places."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    for start in range(0, data.numel(), BUCKET_BYTES):
        group.broadcast([data[start : start + BUCKET_BYTES]], options).wait()
