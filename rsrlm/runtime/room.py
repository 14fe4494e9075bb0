"""Room for a run on a cluster: what its engines and ranks take, and waiting for hosts that have not joined yet."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsrlm.config import Config
from rsrlm.runtime.address import address_of
from rsrlm.settings.base import NotYet

Resources = Mapping[str, float]  # such as {"CPU": 4, "GPU": 1}
LOOK_EVERY_S = 2.0
SAY_EVERY_S = 30.0
JOINED_WAIT_S = 60.0  # where ray.wait_s says nothing; a cluster of the run's own is complete when it is there


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Alike places that a run takes, each whole on one host that has the labels."""

    what: str
    number: int
    each: Resources
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        section = "train" if self.what == "rank" else "engine"
        takes = " ".join(f"{section}.{name.lower()}s={amount:g}" for name, amount in self.each.items()) or "no Ray CPU"
        where = f" on hosts labelled {_labelled(self.labels)}" if self.labels else ""
        return f"{counted(self.number, self.what)} of {takes}{where}"


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of a cluster: its CPUs and GPUs, used or not."""

    name: str
    has: Resources
    labels: Mapping[str, str] = field(default_factory=dict)

    def places(self, wanted: Wanted) -> bool:
        """Whether its labels are those that are wanted."""
        return all(self.labels.get(name) == value for name, value in wanted.labels.items())


def total(wanted: Sequence[Wanted]) -> dict[str, float]:
    names = sorted({name for one in wanted for name in one.each})
    sums = {name: sum(one.number * one.each.get(name, 0) for one in wanted) for name in names}
    return {name: amount for name, amount in sums.items() if amount}


def _labelled(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def counted(number: float, what: str) -> str:
    return f"{number:g} {what}" + "s" * (number != 1)


def amounts(resources: Resources) -> str:
    """Such as "5 Ray CPUs and 1 Ray GPU"."""
    return " and ".join(counted(amount, f"Ray {name}") for name, amount in resources.items()) or "nothing"


def pools_of(config: Config) -> dict[str, int]:
    """How many engines a run starts, by the name of their pool."""
    validators = config.evaluate.judge.replicas if config.evaluate.judge.model else 0
    return {"engines": config.engine.replicas, "judges": config.judge.replicas, "validators": validators}


def engines_of(config: Config) -> int:
    """How many engines a run starts."""
    return sum(pools_of(config).values())


def wait_of(config: Config) -> float:
    """Seconds to wait for hosts."""
    if config.ray.wait_s is not None:
        return config.ray.wait_s
    return JOINED_WAIT_S if address_of(config) else 0.0


def wanted_of(config: Config, ranks: int) -> list[Wanted]:
    """What a run with this many ranks takes to begin; engines with the same labels together."""
    hosts = config.ray.hosts
    engine = _each({"CPU": config.engine.cpus, "GPU": config.engine.gpus})
    alike: Counter[tuple[tuple[str, str], ...]] = Counter()
    for pool, number in pools_of(config).items():
        alike[tuple(sorted(hosts.of(pool).items()))] += config.engine.least(number)
    found = [Wanted(what="engine", number=n, each=engine, labels=dict(labels)) for labels, n in alike.items() if n]
    if ranks:
        # One that shares its GPU has room wherever an engine has.
        rank = _each({"CPU": config.train.cpus, "GPU": 0 if config.ray.share_gpus else config.train.gpus})
        found.append(Wanted(what="rank", number=ranks, each=rank, labels=hosts.learner))
    return found


def _each(resources: Resources) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if amount}


def fit(wanted: Sequence[Wanted], hosts: Iterable[Host]) -> bool:
    """Whether there is a way to place everything on these hosts."""
    *before, last = wanted
    # Numbers of each kind but the last that are placed -> the most of the last that fit beside them.
    most = {(0,) * len(before): 0}
    for host in hosts:
        now: dict[tuple[int, ...], int] = {}
        for placed, beside in most.items():
            for more, left in _ways(before, placed, host, host.has):
                sums = tuple(map(sum, zip(placed, more, strict=True)))
                now[sums] = max(beside + _number(host, left, last, last.number), now.get(sums, 0))
        most = now
    return most.get(tuple(one.number for one in before), -1) >= last.number


def _ways(
    wanted: Sequence[Wanted], placed: Sequence[int], host: Host, left: Resources
) -> Iterator[tuple[tuple[int, ...], Resources]]:
    """How many more of each kind the host may take, and what is left of it then."""
    if not wanted:
        yield (), left
        return
    one, *others = wanted
    for more in range(_number(host, left, one, one.number - placed[0]) + 1):
        rest = {name: there - more * one.each.get(name, 0) for name, there in left.items()}
        for beside, remains in _ways(others, placed[1:], host, rest):
            yield (more, *beside), remains


def _number(host: Host, left: Resources, wanted: Wanted, most: int) -> int:
    """How many more of this kind the host has room for, `most` at most."""
    if not host.places(wanted):
        return 0
    return max(0, min([most, *(int((left.get(name, 0) + 1e-6) // amount) for name, amount in wanted.each.items())]))


def host_of(node: Mapping[str, Any]) -> Host:
    """That of an entry of `ray.nodes()`."""
    return Host(
        name=f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})",
        has={name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")},
        labels=node.get("Labels") or {},
    )


def hosts_there() -> list[Host]:
    """The hosts of the cluster."""
    import ray

    return [host_of(node) for node in ray.nodes() if node["Alive"]]


def wait_for_room(config: Config, ranks: int, say: Callable[[str], None]) -> None:
    """Wait until the cluster that was joined has room for all engines and this many ranks; an autoscaler is told what
    is needed. Raises NotYet when it still has none after ray.wait_s."""
    wanted, wait_s = wanted_of(config, ranks), wait_of(config)
    started, said, before = time.monotonic(), -SAY_EVERY_S, ""
    asked = False
    try:
        while not fit(wanted, hosts := hosts_there()):
            waited = time.monotonic() - started
            if waited >= wait_s:
                raise NotYet(_no_room(wanted, hosts, wait_s))
            if not asked:
                _tell_autoscaler(wanted)
                asked = True
            there = _there(wanted, hosts)
            now = " and ".join(f"{there[name]:g} of {counted(n, f'Ray {name}')}" for name, n in total(wanted).items())
            if now != before or waited - said >= SAY_EVERY_S:
                say(f"waiting for hosts: the cluster has {now}, {waited:.0f} s of ray.wait_s={wait_s:g}")
                said, before = waited, now
            time.sleep(min(LOOK_EVERY_S, wait_s - waited))
    finally:
        if asked:
            _tell_autoscaler([])  # or it would keep the hosts for ever


def _tell_autoscaler(wanted: Sequence[Wanted]) -> None:
    from ray.autoscaler.sdk import request_resources

    each = [one for one in wanted for _ in range(one.number)]
    request_resources(
        bundles=[dict(one.each) for one in each], bundle_label_selectors=[dict(one.labels) for one in each]
    )


def _there(wanted: Sequence[Wanted], hosts: Iterable[Host]) -> dict[str, float]:
    return {name: sum(host.has.get(name, 0.0) for host in hosts) for name in total(wanted)}


def _no_room(wanted: Sequence[Wanted], hosts: Sequence[Host], wait_s: float) -> str:
    needs, there = total(wanted), _there(wanted, hosts)
    lacking = {name: amount - there[name] for name, amount in needs.items() if amount > there[name] + 1e-6}
    missing = f"{amounts(lacking)} missing" if lacking else "no way to place each of them whole on one host"
    named = sorted({name for one in wanted for name in one.labels})
    each = []
    for host in hosts[:10]:
        labels = {name: host.labels[name] for name in named if name in host.labels}
        each.append(
            ", ".join([f"{host.name}: {amounts(_there(wanted, [host]))}", *([_labelled(labels)] * bool(labels))])
        )
    change = "these keys or the number of engines and ranks"
    if named:
        change = f"ray.hosts, {change}"
    return (
        f"the run needs {' and '.join(map(str, wanted))}, which make {amounts(needs)}; the cluster has "
        f"{amounts(there)} on {counted(len(hosts), 'host')} ({'; '.join(each)}): {missing} after "
        f"ray.wait_s={wait_s:g}; add hosts, raise ray.wait_s, or {'change' if named else 'lower'} {change}"
    )
