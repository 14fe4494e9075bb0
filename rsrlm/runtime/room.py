"""Room for a run on a cluster: what its engines and ranks take, and waiting for hosts that have not joined yet."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rsrlm.config import Config
from rsrlm.runtime.address import address_of
from rsrlm.settings.base import NotYet

Resources = Mapping[str, float]  # such as {"CPU": 4, "GPU": 1}
LOOK_EVERY_S = 2.0
SAY_EVERY_S = 30.0
JOINED_WAIT_S = 60.0  # where ray.wait_s says nothing; a cluster of the run's own is complete when it is there


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Places that a run takes, each whole on one host. Engines are alike, and so are ranks."""

    engines: int
    engine: Resources
    ranks: int
    rank: Resources

    @property
    def total(self) -> dict[str, float]:
        names = {*self.engine, *self.rank}
        sums = {n: self.engines * self.engine.get(n, 0) + self.ranks * self.rank.get(n, 0) for n in sorted(names)}
        return {name: amount for name, amount in sums.items() if amount}

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [dict(self.engine)] * self.engines + [dict(self.rank)] * self.ranks

    def __str__(self) -> str:
        parts = [f"{counted(self.engines, 'engine')} of {_keys('engine', self.engine)}"]
        if self.ranks:
            parts.append(f"{counted(self.ranks, 'rank')} of {_keys('train', self.rank)}")
        return f"{' and '.join(parts)}, which make {amounts(self.total)}"


def _keys(section: str, resources: Resources) -> str:
    return " ".join(f"{section}.{name.lower()}s={amount:g}" for name, amount in resources.items()) or "no Ray CPU"


def counted(number: float, what: str) -> str:
    return f"{number:g} {what}" + "s" * (number != 1)


def amounts(resources: Resources) -> str:
    """Such as "5 Ray CPUs and 1 Ray GPU"."""
    return " and ".join(counted(amount, f"Ray {name}") for name, amount in resources.items()) or "nothing"


def engines_of(config: Config) -> int:
    """How many engines a run starts."""
    validators = config.evaluate.judge.replicas if config.evaluate.judge.model else 0
    return config.engine.replicas + config.judge.replicas + validators


def wait_of(config: Config) -> float:
    """Seconds to wait for hosts."""
    if config.ray.wait_s is not None:
        return config.ray.wait_s
    return JOINED_WAIT_S if address_of(config) else 0.0


def wanted_of(config: Config, ranks: int) -> Wanted:
    engine = {"CPU": config.engine.cpus, "GPU": config.engine.gpus}
    rank = {"CPU": config.train.cpus, "GPU": config.train.gpus}
    return Wanted(
        engines=engines_of(config),
        engine={name: amount for name, amount in engine.items() if amount},
        ranks=ranks,
        rank={name: amount for name, amount in rank.items() if amount},
    )


def fit(wanted: Wanted, hosts: Iterable[Resources]) -> bool:
    """Whether there is a way to place all engines and ranks on these hosts."""
    most = {0: 0}  # number of engines that are placed -> the most ranks that fit beside them
    for host in hosts:
        now: dict[int, int] = {}
        for engines, ranks in most.items():
            for more in range(_number(host, wanted.engine, wanted.engines - engines) + 1):
                left = {name: there - more * wanted.engine.get(name, 0) for name, there in host.items()}
                beside = ranks + _number(left, wanted.rank, wanted.ranks)
                now[engines + more] = max(beside, now.get(engines + more, 0))
        most = now
    return most.get(wanted.engines, -1) >= wanted.ranks


def _number(there: Resources, each: Resources, most: int) -> int:
    """How many places of this size there are, `most` at most."""
    return max(0, min([most, *(int((there.get(name, 0) + 1e-6) // amount) for name, amount in each.items())]))


def hosts_there() -> dict[str, Resources]:
    """CPUs and GPUs of each host of the cluster, by its address."""
    import ray

    return {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": {
            name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")
        }
        for node in ray.nodes()
        if node["Alive"]
    }


def wait_for_room(config: Config, ranks: int, say: Callable[[str], None]) -> None:
    """Wait until the cluster that was joined has room for all engines and this many ranks; an autoscaler is told what
    is needed. Raises NotYet when it still has none after ray.wait_s."""
    wanted, wait_s = wanted_of(config, ranks), wait_of(config)
    started, said, before = time.monotonic(), -SAY_EVERY_S, ""
    asked = False
    try:
        while not fit(wanted, (hosts := hosts_there()).values()):
            waited = time.monotonic() - started
            if waited >= wait_s:
                raise NotYet(_no_room(wanted, hosts, wait_s))
            if not asked:
                _tell_autoscaler(wanted.bundles)
                asked = True
            there = _total(wanted, hosts)
            now = " and ".join(f"{there[name]:g} of {counted(n, f'Ray {name}')}" for name, n in wanted.total.items())
            if now != before or waited - said >= SAY_EVERY_S:
                say(f"waiting for hosts: the cluster has {now}, {waited:.0f} s of ray.wait_s={wait_s:g}")
                said, before = waited, now
            time.sleep(min(LOOK_EVERY_S, wait_s - waited))
    finally:
        if asked:
            _tell_autoscaler([])  # or it would keep the hosts for ever


def _tell_autoscaler(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _total(wanted: Wanted, hosts: Mapping[str, Resources]) -> dict[str, float]:
    return {name: sum(there.get(name, 0.0) for there in hosts.values()) for name in wanted.total}


def _no_room(wanted: Wanted, hosts: Mapping[str, Resources], wait_s: float) -> str:
    there = _total(wanted, hosts)
    lacking = {name: amount - there[name] for name, amount in wanted.total.items() if amount > there[name] + 1e-6}
    missing = f"{amounts(lacking)} missing" if lacking else "no way to place each of them whole on one host"
    each = ", ".join(f"{host}: {amounts(_total(wanted, {host: has}))}" for host, has in list(hosts.items())[:10])
    return (
        f"the run needs {wanted}; the cluster has {amounts(there)} on {counted(len(hosts), 'host')} ({each}): "
        f"{missing} after ray.wait_s={wait_s:g}; add hosts, raise ray.wait_s, or lower these keys or the number of "
        "engines and ranks"
    )
