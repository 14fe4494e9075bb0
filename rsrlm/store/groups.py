"""Groups that wait on disk, so that memory does not grow with their number."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from rsrlm.records import Group
from rsrlm.store.atomic import append


class GroupSpool(Sequence[Group]):
    """The groups of given ids, in the order of these ids, added in any order.

    They are in a file that has no name: nobody else can read it, and it is gone when this process ends, however it
    ends. Memory holds the ids and 16 bytes a group. Other threads may read while groups are added.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        """`folder` is where the disk has room. Raises ValueError if an id is there twice."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".groups-", suffix=".tmp")  # noqa: SIM115
        self.ids = ids
        self._places = {identifier: index for index, identifier in enumerate(ids)}
        if len(self._places) < len(ids):
            raise ValueError("two groups have one id")
        self._offsets = array("Q", bytes(8 * len(ids)))
        self._lengths = array("Q", bytes(8 * len(ids)))
        self._end = 0

    def add(self, group: Group) -> int:
        """The index of the group, which can be read from now on; a group that is there already stays as it is.

        Raises KeyError for an id that is none of those given, and OSError (a full disk).
        """
        index = self._places[group.id]
        if self._lengths[index]:
            return index
        data = pickle.dumps(group, protocol=5)
        append(self._file.fileno(), self._end, data)
        self._offsets[index] = self._end
        self._end += len(data)
        self._lengths[index] = len(data)  # last: from here on another thread takes it for whole
        return index

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        """Raises KeyError for a group that has not been added."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        length = self._lengths[index]
        if not length:
            raise KeyError(f"group {self.ids[index]} has not been added")
        return pickle.loads(os.pread(self._file.fileno(), length, self._offsets[index]))

    def __iter__(self) -> Iterator[Group]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        self._file.close()


def ids_of(groups: Sequence[Group]) -> Sequence[str]:
    return groups.ids if isinstance(groups, GroupSpool) else [group.id for group in groups]
