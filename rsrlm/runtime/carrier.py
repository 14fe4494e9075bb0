"""Weights on their way from the learner's host to the memory of the hosts that have replicas, and out of it again."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import ray

from rsrlm.config import Config
from rsrlm.runtime.depot import Depot
from rsrlm.runtime.mailbox import BroadcastJob, Listening
from rsrlm.runtime.places import on_node
from rsrlm.runtime.weights import WeightFile, WeightSet, remove
from rsrlm.settings.base import last_line

# Does a job of the learner's first rank, and tells where it listens.
Broadcast = Callable[[BroadcastJob, Callable[[Listening], None]], Awaitable[None]]
ROOM_WAIT_S = 60.0  # for a host's depot to come up and answer


class Carrier:
    """Brings copies of a version to hosts. What does not arrive is no loss: the exported model is in the run folder,
    which all hosts share. Use it from one event loop."""

    def __init__(self, config: Config, broadcast: Broadcast | None, note: Callable[..., None]) -> None:
        self._config, self._broadcast, self._note = config, broadcast, note
        self._depots: dict[str, Any] = {}  # by node
        self._removing: set[asyncio.Task[None]] = set()

    async def carried(self, weights: WeightSet, nodes: Iterable[str]) -> WeightSet:
        """The same version, with copies in the memory of those of these nodes that could be reached.

        Over gloo a copy arrives once on each host. The learner sends its own copy if it has one, else the export.
        """
        others = sorted(set(nodes) - weights.local.keys())
        if self._config.weights.transport != "gloo" or not self._broadcast or not others:
            return weights
        if self._config.clock.kind == "online" and not weights.local:
            return weights  # loaded again while the learner trains, which sends nothing then
        files = next(iter(weights.local.values()), weights.files)
        try:
            copies = await self._over_gloo(weights.version, files, others)
        except Exception as error:
            self._not_sent(weights.version, ", ".join(others), error)
            return weights
        return replace(weights, local={**weights.local, **copies})

    def _not_sent(self, version: str, node: str, error: BaseException) -> None:
        self._note("weights_not_sent", version=version, node=node, error=last_line(error))

    async def _over_gloo(
        self, version: str, files: tuple[WeightFile, ...], nodes: list[str]
    ) -> dict[str, tuple[WeightFile, ...]]:
        """The copies that arrived, by node. Raises what the sender failed of, if it does so before it listens."""
        assert self._broadcast
        wait_s, run = self._config.weights.deadline_s, self._config.folder
        size = sum(file.size for file in files)
        has_room = await asyncio.gather(*(self._has_room(version, node, size) for node in nodes))
        nodes = [node for node, room in zip(nodes, has_room, strict=True) if room]
        if not nodes:
            return {}
        world_size = 1 + len(nodes)
        job = BroadcastJob(paths=tuple(file.path for file in files), world_size=world_size, deadline_s=wait_s)
        place: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()

        def heard(said: Listening) -> None:
            if not place.done():  # a group that is built anew listens once more
                place.set_result((said.address, said.port))

        sending = asyncio.ensure_future(self._broadcast(job, heard))
        try:
            await _first_of(place, sending, wait_s)
            receiving = (
                self._depot(node).receive.remote(files, run, place.result(), rank, world_size, wait_s)
                for rank, node in enumerate(nodes, 1)
            )
            found = await asyncio.wait_for(asyncio.gather(*receiving, return_exceptions=True), 2 * wait_s)
            await asyncio.wait({sending}, timeout=wait_s)
        finally:
            sending.cancel()
        copies = {}
        for node, arrived in zip(nodes, found, strict=True):
            if isinstance(arrived, BaseException):
                self._not_sent(version, node, arrived)
            else:
                copies[node] = arrived
        return copies

    def _depot(self, node: str) -> Any:
        if node not in self._depots:
            self._depots[node] = ray.remote(Depot).options(**on_node(node)).remote()
        return self._depots[node]

    async def _has_room(self, version: str, node: str, size: int) -> bool:
        try:
            room: bool = await asyncio.wait_for(self._depot(node).has_room.remote(size), ROOM_WAIT_S)
        except Exception as error:  # its host is gone, or does not answer: another depot the next time
            self._not_sent(version, node, error)
            ray.kill(self._depots.pop(node))
            return False
        if not room:
            self._not_sent(version, node, OSError(f"no room for {size} bytes in /dev/shm"))
        return room

    def remove(self, local: Mapping[str, tuple[WeightFile, ...]]) -> None:
        """Delete copies on the hosts where they are, in the background."""
        for node, files in local.items():
            task = asyncio.ensure_future(self._remove(node, files))
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    async def _remove(self, node: str, files: tuple[WeightFile, ...]) -> None:
        if not node or node == ray.get_runtime_context().get_node_id():
            remove(files, self._config.folder)
            return
        with contextlib.suppress(Exception):  # with its host, its memory is gone
            await self._depot(node).remove.remote(files, self._config.folder)

    async def close(self) -> None:
        if self._removing:
            await asyncio.wait(set(self._removing), timeout=10)
        for depot in self._depots.values():
            with contextlib.suppress(Exception):
                ray.kill(depot)


async def _first_of(place: asyncio.Future[tuple[str, int]], sending: asyncio.Future[None], wait_s: float) -> None:
    """Until the sender listens. Raises what it failed of."""
    waiting: set[asyncio.Future[Any]] = {place, sending}
    await asyncio.wait(waiting, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
    if place.done():
        return
    if sending.done():
        sending.result()
    raise TimeoutError(f"the learner did not listen within weights.deadline_s={wait_s}")
