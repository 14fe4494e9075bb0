"""Log-probabilities of what is trained on under the model before the first update.

Each rank writes those of its share into a file of its own, and reads from all files what it needs later: nothing is
sent, or kept in memory or in checkpoints, and any number of ranks can go on with them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch


def write_share(folder: Path, rank: int, world_size: int, values: Iterable[np.ndarray]) -> None:
    """The values, float32, of the items `rank`, `rank` + `world_size`, ... of a job, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{rank}-of-{world_size}.f32").open("wb") as file:
        for one in values:
            file.write(one.astype("<f4", copy=False).tobytes())


class Reference:
    """The shares of all ranks. `response_tokens` are those of each item of the job."""

    def __init__(self, folder: Path, response_tokens: Sequence[int]) -> None:
        found = dict(_shares(folder))
        self._ranks = len(found)
        lengths = np.asarray(response_tokens, dtype=np.int64)
        self._starts = [np.concatenate(([0], np.cumsum(lengths[rank :: self._ranks]))) for rank in range(self._ranks)]
        self._files = [found[rank, self._ranks] for rank in range(self._ranks)]
        for file, starts in zip(self._files, self._starts, strict=True):
            if len(file) != starts[-1]:
                raise ValueError(f"{folder}: {len(file)} log-probabilities in a file that should have {starts[-1]}")

    def of(self, places: Sequence[int]) -> torch.Tensor:
        """Float32 [R], those of the response tokens of the items at these places, in order."""
        found = []
        for place in places:
            number, rank = divmod(place, self._ranks)
            start, end = self._starts[rank][number : number + 2]
            found.append(self._files[rank][start:end])
        return torch.from_numpy(np.concatenate(found).astype(np.float32))


def _shares(folder: Path) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    for path in folder.glob("*.f32"):
        if named := re.fullmatch(r"(\d+)-of-(\d+)\.f32", path.name):
            size = path.stat().st_size
            data = np.memmap(path, dtype="<f4", mode="r") if size else np.empty(0, dtype="<f4")
            yield (int(named[1]), int(named[2])), data
