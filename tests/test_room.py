"""Room for a run on a cluster: engines and ranks whole on one host each, and hosts that join later."""

from typing import Any

import pytest

from rsrlm.runtime import room
from rsrlm.runtime.group import train_settings
from rsrlm.runtime.room import Wanted, fit, wait_for_room
from rsrlm.settings.base import ConfigError


def wanted(engines: int, engine: dict[str, float], ranks: int = 0, rank: dict[str, float] | None = None) -> Wanted:
    return Wanted(engines=engines, engine=engine, ranks=ranks, rank=rank or {})


def gpus(*numbers: float) -> list[dict[str, float]]:
    return [{"CPU": 8, "GPU": number} for number in numbers]


@pytest.mark.parametrize(
    ("what", "hosts", "room"),
    [
        (wanted(1, {"GPU": 4}), gpus(2, 2), False),  # enough in all, and on no host
        (wanted(1, {"GPU": 4}), gpus(2, 4), True),
        (wanted(3, {"GPU": 2}, 1, {"GPU": 3}), gpus(6, 3), True),  # only where the rank takes the smaller host
        (wanted(3, {"GPU": 2}, 1, {"GPU": 3}), gpus(3, 6), True),
        (wanted(3, {"GPU": 2}, 1, {"GPU": 4}), gpus(6, 3), False),
        (wanted(2, {"CPU": 0.5}, 1, {"CPU": 1}), [{"CPU": 2}], True),
        (wanted(10, {"CPU": 0.1}), [{"CPU": 1}], True),  # ten tenths
        (wanted(2, {"CPU": 0.5}, 1, {"CPU": 1}), [{"CPU": 1}], False),
        (wanted(5, {}), [{"CPU": 0}], True),
        (wanted(1, {"CPU": 0.5}), [], False),
    ],
)
def test_room(what: Wanted, hosts: list[dict[str, float]], room: bool) -> None:
    assert fit(what, hosts) == room


class Cluster:
    """Hosts that join at their second, on a clock that goes on while the run sleeps."""

    def __init__(self, joining: dict[float, dict[str, float]]) -> None:
        self.now, self.joining = 0.0, joining
        self.told: list[int] = []
        self.said: list[str] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def hosts(self) -> dict[str, Any]:
        return {f"10.0.0.{i}": there for i, (at, there) in enumerate(self.joining.items()) if at <= self.now}

    def tell(self, bundles: list[dict[str, float]]) -> None:
        self.told.append(len(bundles))


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(joining: dict[float, dict[str, float]]) -> Cluster:
        cluster = Cluster(joining)
        monkeypatch.setattr(room, "time", cluster)
        monkeypatch.setattr(room, "hosts_there", cluster.hosts)
        monkeypatch.setattr(room, "_tell_autoscaler", cluster.tell)
        return cluster

    return start


HEAD = {"CPU": 0.0, "GPU": 0.0}
WORKER = {"CPU": 2.0, "GPU": 0.0}


def test_hosts_that_join_later_are_waited_for(joining: Any, make_config: Any) -> None:
    cluster = joining({0: HEAD, 31: WORKER})
    wait_for_room(make_config(ray={"address": "10.0.0.0:6379"}, train={"cpus": 1}), 1, cluster.said.append)
    assert 31 <= cluster.now < 34
    assert cluster.told == [2, 0]  # an engine and a rank; and nothing any more, or the hosts would never go
    assert cluster.said == [
        "waiting for hosts: the cluster has 0 of 1.5 Ray CPUs, 0 s of ray.wait_s=60",
        "waiting for hosts: the cluster has 0 of 1.5 Ray CPUs, 30 s of ray.wait_s=60",
    ]


def test_hosts_that_do_not_join(joining: Any, make_config: Any) -> None:
    cluster = joining({0: HEAD, 5: WORKER, 90: WORKER})
    config = make_config(ray={"address": "10.0.0.0:6379", "wait_s": 20}, engine={"replicas": 3}, train={"cpus": 2})
    with pytest.raises(ConfigError) as refused:
        wait_for_room(config, 1, cluster.said.append)
    assert str(refused.value) == (
        "the run needs 3 engines of engine.cpus=0.5 and 1 rank of train.cpus=2, which make 3.5 Ray CPUs; the cluster "
        "has 2 Ray CPUs on 2 hosts (10.0.0.0: 0 Ray CPUs, 10.0.0.1: 2 Ray CPUs): 1.5 Ray CPUs missing after "
        "ray.wait_s=20; add hosts, raise ray.wait_s, or lower these keys or the number of engines and ranks"
    )
    assert cluster.now == 20
    assert cluster.told == [4, 0]


def test_no_host_is_large_enough(joining: Any, make_config: Any) -> None:
    cluster = joining({0: {"CPU": 2.0, "GPU": 2.0}, 1: {"CPU": 2.0, "GPU": 2.0}})
    config = make_config(ray={"wait_s": 4, "address": "a:1"}, engine={"gpus": 4, "kind": "async"})
    with pytest.raises(ConfigError, match="no way to place each of them whole on one host"):
        wait_for_room(config, 0, cluster.said.append)


def test_a_cluster_of_the_runs_own_is_complete(joining: Any, make_config: Any) -> None:
    cluster = joining({0: WORKER, 1: WORKER})
    with pytest.raises(ConfigError, match=r"after ray\.wait_s=0; add hosts"):
        wait_for_room(make_config(train={"cpus": 3}), 1, cluster.said.append)
    assert (cluster.now, cluster.told, cluster.said) == (0, [], [])


def test_the_learner_waits_as_long_for_its_ranks(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train gives up after four times its own limit, which is a minute."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    environ = {"RAY_TRAIN_V2_ENABLED": "1", "HOME": "/root"}
    assert train_settings(make_config(), environ) == {"RAY_TRAIN_V2_ENABLED": "1", name: "60"}
    patient = make_config(ray={"address": "a:1", "wait_s": 1800})
    assert train_settings(patient, environ)[name] == "1800"
    assert train_settings(patient, {name: "5"})[name] == "5"
