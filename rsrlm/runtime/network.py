"""The process group of ranks that are on several hosts."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class NetworkConfig(TorchConfig):
    """Of a group whose ranks tell gloo the network to use. By itself it takes the address of the host's name, which is
    127.0.1.1 on many hosts: no other one reaches it."""

    @property
    def backend_cls(self) -> type["NetworkBackend"]:
        return NetworkBackend


class NetworkBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: NetworkConfig) -> None:
        worker_group.execute(name_network)
        super().on_start(worker_group, backend_config)


def name_network() -> None:
    """On the way to Ray's own address of this host, unless the user has named another."""
    if found := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)


def interface_of(address: str) -> str | None:
    """The name of this host's network interface with that address."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in {one.address for one in addresses}:
            return name
    return None
