"""Room for a run on a cluster: engines and ranks whole on one host each, and hosts that join later."""

from typing import Any

import pytest

from rsrlm.runtime import room
from rsrlm.runtime.group import train_settings
from rsrlm.runtime.room import Host, Wanted, fit, wait_for_room, wanted_of
from rsrlm.settings.base import ConfigError


def engines(number: int, labels: dict[str, str] | None = None, **each: float) -> Wanted:
    return Wanted(what="engine", number=number, each=each, labels=labels or {})


def ranks(number: int, labels: dict[str, str] | None = None, **each: float) -> Wanted:
    return Wanted(what="rank", number=number, each=each, labels=labels or {})


def gpus(*numbers: float) -> list[Host]:
    return [host(CPU=8, GPU=number) for number in numbers]


def host(role: str = "", **has: float) -> Host:
    return Host(name="h", has=has, labels={"role": role, "zone": "a"} if role else {})


SAMPLER, LEARNER = {"role": "sampler"}, {"role": "learner"}


@pytest.mark.parametrize(
    ("what", "hosts", "room"),
    [
        ([engines(1, GPU=4)], gpus(2, 2), False),  # enough in all, and on no host
        ([engines(1, GPU=4)], gpus(2, 4), True),
        ([engines(3, GPU=2), ranks(1, GPU=3)], gpus(6, 3), True),  # only where the rank takes the smaller host
        ([engines(3, GPU=2), ranks(1, GPU=3)], gpus(3, 6), True),
        ([engines(3, GPU=2), ranks(1, GPU=4)], gpus(6, 3), False),
        ([engines(2, CPU=0.5), ranks(1, CPU=1)], [host(CPU=2)], True),
        ([engines(10, CPU=0.1)], [host(CPU=1)], True),  # ten tenths
        ([engines(2, CPU=0.5), ranks(1, CPU=1)], [host(CPU=1)], False),
        ([engines(5)], [host(CPU=0)], True),
        ([engines(1, CPU=0.5)], [], False),
        ([engines(1, SAMPLER, CPU=1)], [host(CPU=1)], False),
        ([engines(1, SAMPLER, CPU=1)], [host("learner", CPU=1)], False),
        ([engines(1, {**SAMPLER, "zone": "b"}, CPU=1)], [host("sampler", CPU=1)], False),
        ([engines(1, SAMPLER, CPU=1), ranks(1, CPU=1)], [host("sampler", CPU=2)], True),
        ([engines(1, SAMPLER, CPU=1), ranks(1, LEARNER, CPU=1)], [host("sampler", CPU=2)], False),
        # The engines that go anywhere leave the samplers' host to those that must be there.
        ([engines(2, CPU=1), engines(2, SAMPLER, CPU=1)], [host("sampler", CPU=2), host(CPU=2)], True),
        ([engines(3, CPU=1), engines(2, SAMPLER, CPU=1)], [host("sampler", CPU=2), host(CPU=2)], False),
        ([engines(2, CPU=1), engines(1, SAMPLER, CPU=1), ranks(1, CPU=1)], [host("sampler", CPU=2), host(CPU=2)], True),
    ],
)
def test_room(what: list[Wanted], hosts: list[Host], room: bool) -> None:
    assert fit(what, hosts) == room
    assert fit(what[::-1], hosts[::-1]) == room


def test_what_a_run_takes(make_config: Any) -> None:
    config = make_config(
        engine={"replicas": 3, "cpus": 1},
        judge={"replicas": 2},
        train={"workers": 2, "cpus": 0},
        ray={"hosts": {"learner": LEARNER}},
    )
    assert wanted_of(config, 2) == [engines(5, CPU=1), ranks(2, LEARNER)]
    assert wanted_of(config, 0) == [engines(5, CPU=1)]
    apart = make_config(engine={"replicas": 3}, judge={"replicas": 2}, ray={"hosts": {"judges": SAMPLER}})
    assert wanted_of(apart, 0) == [engines(3, CPU=0.5), engines(2, SAMPLER, CPU=0.5)]


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

    def hosts(self) -> list[Host]:
        joined = [there for at, there in self.joining.items() if at <= self.now]
        return [Host(name=f"10.0.0.{i}", has=there, labels={"zone": "a"}) for i, there in enumerate(joined)]

    def tell(self, wanted: list[Wanted]) -> None:
        self.told.append(sum(one.number for one in wanted))


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
        "has 2 Ray CPUs on 2 hosts (10.0.0.0: 0 Ray CPUs; 10.0.0.1: 2 Ray CPUs): 1.5 Ray CPUs missing after "
        "ray.wait_s=20; add hosts, raise ray.wait_s, or lower these keys or the number of engines and ranks"
    )
    assert cluster.now == 20
    assert cluster.told == [4, 0]


def test_no_host_is_large_enough(joining: Any, make_config: Any) -> None:
    cluster = joining({0: {"CPU": 2.0, "GPU": 2.0}, 1: {"CPU": 2.0, "GPU": 2.0}})
    config = make_config(ray={"wait_s": 4, "address": "a:1"}, engine={"gpus": 4, "kind": "async"})
    with pytest.raises(ConfigError, match="no way to place each of them whole on one host"):
        wait_for_room(config, 0, cluster.said.append)


def test_labels_that_no_host_has(joining: Any, make_config: Any) -> None:
    cluster = joining({0: {"CPU": 2.0}})
    config = make_config(ray={"wait_s": 0, "address": "a:1", "hosts": {"engines": {"zone": "b"}}})
    with pytest.raises(ConfigError) as refused:
        wait_for_room(config, 0, cluster.said.append)
    assert "1 engine of engine.cpus=0.5 on hosts labelled zone=b" in str(refused.value)
    assert "(10.0.0.0: 2 Ray CPUs, zone=a): no way to place" in str(refused.value)
    assert str(refused.value).endswith("change ray.hosts, these keys or the number of engines and ranks")


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
