"""How ranks of several hosts find each other, without Ray."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.torch.config import _TorchBackend

from rsrlm.runtime import group, network


@pytest.fixture
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that others reach at 10.9.0.2, and that calls itself 127.0.1.1."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is taken back afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    there = {"lo": ["127.0.0.1"], "eth0": ["fe80::1", "10.9.0.2"]}
    found = {name: [SimpleNamespace(address=one) for one in addresses] for name, addresses in there.items()}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: "10.9.0.2")


@pytest.mark.usefixtures("two_networks")
def test_every_rank_names_its_network_before_the_group_meets(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(_TorchBackend, "on_start", lambda *_: done.append(os.environ["GLOO_SOCKET_IFNAME"]))
    trainer = group._trainer(make_config(), None, make_config().folder)
    config = trainer.backend_config
    config.backend_cls().on_start(SimpleNamespace(execute=lambda function: function()), config)
    assert done == ["eth0"]
    assert config.backend == "gloo"


@pytest.mark.usefixtures("two_networks")
def test_a_network_that_the_user_has_named_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    network.name_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.usefixtures("two_networks")
def test_an_address_of_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a translation of addresses: gloo finds its own way."""
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: "203.0.113.7")
    network.name_network()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
