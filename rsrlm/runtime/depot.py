"""What receives weights on a host that has replicas: one actor, whatever their number."""

import os
from dataclasses import replace
from pathlib import Path

import ray
import torch

from rsrlm.runtime import weights
from rsrlm.runtime.gloo import broadcast, group_of_receiver
from rsrlm.runtime.weights import WeightFile


class Depot:
    """Keeps copies of a version's files in the memory of its host, until they are removed."""

    def has_room(self, size: int) -> bool:
        return weights.has_room(size)

    def remove(self, files: tuple[WeightFile, ...], run: Path) -> None:
        weights.remove(files, run)

    def receive(
        self,
        files: tuple[WeightFile, ...],
        run: Path,
        place: tuple[str, int],
        rank: int,
        world_size: int,
        wait_s: float,
    ) -> tuple[WeightFile, ...]:
        """The copies of files that come by broadcast from the sender, who listens at `place`. Those of an earlier
        version go: nobody reads them any more."""
        prefix = f"{weights.file_prefix(run)}copy-{ray.get_runtime_context().get_node_id()[:12]}-"
        for old in weights.SHM.glob(f"{prefix}*"):
            old.unlink(missing_ok=True)
        group = group_of_receiver(place, ray.util.get_node_ip_address(), rank, world_size, wait_s)
        copies = []
        for number, file in enumerate(files):
            path = weights.SHM / f"{prefix}{number}-{Path(file.path).name}"
            copies.append(replace(file, path=str(path)))
            try:
                broadcast(group, _created(path, file.size))
            except BaseException:
                weights.remove(tuple(copies), run)
                raise
        return tuple(copies)


def _created(path: Path, size: int) -> torch.Tensor:
    """The bytes of a new file. Raises OSError where there is no room for them; later it would be a SIGBUS."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
