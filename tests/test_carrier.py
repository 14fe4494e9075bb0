"""Weights between hosts: which copy a replica reads, how the copies come and go, and what happens when one does not."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.runtime import carrier, depot, session, weights
from rsrlm.runtime.carrier import Carrier
from rsrlm.runtime.export import send
from rsrlm.runtime.group import LearnerFailed
from rsrlm.runtime.mailbox import BroadcastJob, Failed, Finished, Listening
from rsrlm.runtime.weights import WeightFile, WeightSet

LEARNER, SAMPLER, JUDGE = (letter * 56 for letter in "abc")  # nodes; the driver is on another


class FakeRay:
    """Depots in threads of this process. `broken` are the nodes whose depots fail, by the method and the error."""

    def __init__(self) -> None:
        self.broken: dict[tuple[str, str], Exception] = {}
        self.killed: list[str] = []
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "d" * 56)

    def remote(self, made: type[depot.Depot]) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda: self._actor(made(), **options)))

    def _actor(self, made: depot.Depot, num_cpus: float, scheduling_strategy: Any) -> Any:
        node = scheduling_strategy.node_id
        assert num_cpus == 0
        assert not scheduling_strategy.soft

        def method(name: str) -> Any:
            def call(*arguments: Any) -> Any:
                if error := self.broken.get((node, name)):
                    raise error
                return getattr(made, name)(*arguments)

            return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(asyncio.to_thread(call, *arguments)))

        names = ("has_room", "receive", "remove")
        return SimpleNamespace(node=node, **{name: method(name) for name in names})

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.node)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of every host's /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(weights, "SHM", folder)
    return folder


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setattr(carrier, "ray", made)
    monkeypatch.setattr(depot, "ray", made)
    return made


class Trial:
    """A version whose transfer file is on the learner's host, and what was noted of its way."""

    def __init__(self, config: Any, memory: Path) -> None:
        self.notes: list[dict[str, Any]] = []
        export = config.folder / "models" / "M1" / "model.safetensors"
        export.parent.mkdir(parents=True)
        export.write_bytes(bytes(range(256)) * 1000)
        transfer = memory / f"{weights.file_prefix(config.folder)}M1.safetensors"
        transfer.write_bytes(export.read_bytes())
        self.exported, self.written = weights.describe([export]), weights.describe([transfer])
        self.weights = WeightSet(
            version="M1", folder=str(export.parent), files=self.exported, local={LEARNER: self.written}
        )
        self.jobs: list[BroadcastJob] = []
        self.config = config

    def note(self, kind: str, **fields: Any) -> None:
        self.notes.append({"event": kind, **fields})

    async def broadcast(self, job: BroadcastJob, listening: Callable[[Listening], None]) -> None:
        """As the learner's first rank does it, on another host than the driver's."""
        self.jobs.append(job)
        loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(send, job, "127.0.0.1", lambda said: loop.call_soon_threadsafe(listening, said))
        except RuntimeError as error:
            raise LearnerFailed(str(error)) from error

    def carried(self, nodes: list[str], work: Callable[[Carrier, WeightSet], Awaitable[Any]] | None = None) -> Any:
        async def main() -> Any:
            made = Carrier(self.config, self.broadcast, self.note)
            try:
                found = await made.carried(self.weights, nodes)
                return await work(made, found) if work else found
            finally:
                await made.close()

        return asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def trial(make_config: Any, memory: Path) -> Callable[..., Trial]:
    return lambda **options: Trial(make_config(weights={"deadline_s": 10, **options}), memory)


def test_a_replica_reads_the_copy_of_its_own_host_or_the_export(trial: Callable[..., Trial]) -> None:
    """By shared memory nothing is sent to another host: it has the run folder."""
    made = trial(transport="shm")
    found = made.carried([LEARNER, SAMPLER])
    assert made.jobs == []
    assert found.update_info(LEARNER)["files"] == [vars_of(made.written[0])]
    assert found.update_info(SAMPLER)["files"] == [vars_of(made.exported[0])]


def vars_of(file: WeightFile) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "checksum": file.checksum}


def test_over_gloo_a_copy_arrives_once_on_each_host(
    trial: Callable[..., Trial], ray: FakeRay, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the learner's own file, at an address that the learner gives. It is gone when it was loaded."""
    made = trial(transport="gloo")

    async def work(carrier: Carrier, found: WeightSet) -> WeightSet:
        assert len(list(memory.iterdir())) == 2
        data = weights.bytes_of(found.local[SAMPLER][0].path)
        assert weights.verified(data, found.local[SAMPLER][0], "here").numel() == 256000
        carrier.remove(found.local)
        return found

    found = made.carried([SAMPLER, SAMPLER, LEARNER], work)
    assert set(found.local) == {LEARNER, SAMPLER}
    assert made.jobs == [BroadcastJob(paths=(made.written[0].path,), world_size=2, deadline_s=10)]
    assert found.update_info(SAMPLER) != found.update_info(LEARNER) != found.update_info("a late host")
    assert list(memory.iterdir()) == []
    assert made.notes == []


def test_a_model_without_a_file_of_the_learner_is_sent_from_its_export(
    trial: Callable[..., Trial], ray: FakeRay, memory: Path
) -> None:
    made = trial(transport="gloo")
    made.weights = replace(made.weights, local={})
    found = made.carried([SAMPLER])
    assert set(found.local) == {SAMPLER}
    assert made.jobs[0].paths == (made.exported[0].path,)


def test_a_host_that_cannot_receive_reads_the_export(
    trial: Callable[..., Trial], ray: FakeRay, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose depot does not come up takes no part; the other gets its copy."""
    made = trial(transport="gloo")
    ray.broken[JUDGE, "has_room"] = RuntimeError("its node is gone")
    found = made.carried([SAMPLER, JUDGE])
    assert set(found.local) == {LEARNER, SAMPLER}
    assert made.jobs[0].world_size == 2
    [note] = made.notes
    assert note == {"event": "weights_not_sent", "version": "M1", "node": JUDGE, "error": "its node is gone"}
    assert ray.killed[0] == JUDGE


def test_a_host_without_room_in_memory_reads_the_export(
    trial: Callable[..., Trial], ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trial(transport="gloo")
    monkeypatch.setattr(weights, "has_room", lambda size: False)
    found = made.carried([SAMPLER])
    assert set(found.local) == {LEARNER}
    assert made.jobs == []
    assert "no room for 256000 bytes in /dev/shm" in made.notes[0]["error"]


def test_a_receiver_that_dies_holds_nobody_up(trial: Callable[..., Trial], ray: FakeRay, memory: Path) -> None:
    """The sender and the other host wait for weights.deadline_s, and then all of them read the export."""
    made = trial(transport="gloo", deadline_s=2)
    ray.broken[JUDGE, "receive"] = RuntimeError("its host died")
    found = made.carried([SAMPLER, JUDGE])
    assert set(found.local) == {LEARNER}
    assert {note["node"] for note in made.notes} == {SAMPLER, JUDGE}
    assert [path.name for path in memory.iterdir()] == [Path(made.written[0].path).name]


def test_a_learner_that_does_not_listen_holds_nobody_up(
    trial: Callable[..., Trial], ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trial(transport="gloo", deadline_s=0.2)

    async def silent(self: Trial, job: BroadcastJob, listening: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(Trial, "broadcast", silent)
    assert set(made.carried([SAMPLER]).local) == {LEARNER}
    [note] = made.notes
    assert note["error"] == "the learner did not listen within weights.deadline_s=0.2"


def test_a_rank_says_where_it_listens_and_survives_that_nobody_comes(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "dist", SimpleNamespace(get_rank=lambda: 0))
    desk = session.Desk(make_config().model, session.Place(node="n", address="127.0.0.1"))
    said: list[Any] = []
    desk.do(BroadcastJob(paths=(), world_size=2, deadline_s=0.5), said.append)
    listening, failed = said
    assert listening.address == "127.0.0.1"
    assert isinstance(failed, Failed)
    assert failed.message.startswith("weights were not sent: ")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((listening.address, listening.port), timeout=1).close()
    said.clear()
    desk.do(BroadcastJob(paths=(), world_size=1, deadline_s=5), said.append)
    assert [type(one) for one in said] == [Listening, Finished]
