"""One version of the weights as files that replicas read: written once, checksummed, addressed by version.

The format is safetensors, so an exported model folder is a published version as it stands. Where the bytes lie in the
host's shared memory the transfer is one write and one read; `rsrlm.runtime.vllm_worker` does the reading, and
`rsrlm.runtime.carrier` brings them into the memory of other hosts.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

SHM = Path("/dev/shm")
Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # by name


class WeightsRefused(RuntimeError):
    """The received bytes are not those that were sent; the engine keeps the weights that it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file: its path on this host, size in bytes and checksum (XXH3, 128 bits, hex)."""

    path: str
    size: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What the learner has written of a model: files in the memory of the host of `node` (an id of Ray's)."""

    node: str
    files: tuple[WeightFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSet:
    """One version: `folder` is the exported model it can always be loaded from, `files` its files there.

    `local` has copies of them in the memory of hosts, by the id of the host's Ray node.
    """

    version: str
    folder: str
    files: tuple[WeightFile, ...]
    local: Mapping[str, tuple[WeightFile, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def update_info(self, node: str = "") -> dict[str, Any]:
        """What a replica on this node is told: to read the copy of its own host, or the exported model."""
        return {"files": [asdict(file) for file in self.local.get(node, self.files)]}


def bytes_of(path: str | Path) -> torch.Tensor:
    """The file as a uint8 tensor over a private memory map. Raises FileNotFoundError."""
    size = os.stat(path).st_size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def checksum(data: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(memoryview(data.numpy()))


def tensors_in(data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and zero-copy views of the tensors in the bytes of a safetensors file, in file order."""
    from safetensors.torch import _TYPES

    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    header = json.loads(bytes(data[8 : 8 + length].numpy()))
    header.pop("__metadata__", None)
    body = data[8 + length :].numpy()
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        # By way of numpy each is a storage of its own: who saves them would copy what shares one.
        piece, dtype = torch.from_numpy(body[start:end]), _TYPES[entry["dtype"]]
        if (8 + length + start) % dtype.itemsize:  # some writers do not pad the header
            piece = piece.clone()
        yield name, piece.view(dtype).reshape(entry["shape"])


def header_of(shapes: Shapes) -> tuple[bytes, int]:
    """How a safetensors file of tensors in this order begins, and the bytes that follow."""
    from safetensors.torch import _TYPES

    names, at, entries = {dtype: name for name, dtype in _TYPES.items()}, 0, {}
    for name, (dtype, shape) in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def verified(data: torch.Tensor, file: WeightFile, where: str) -> torch.Tensor:
    """The same bytes. Raises WeightsRefused when their number or their checksum is another one."""
    if data.numel() != file.size:
        raise WeightsRefused(f"{where}: {data.numel()} bytes arrived, {file.size} were sent")
    if (found := checksum(data)) != file.checksum:
        raise WeightsRefused(f"{where}: checksum {found} of the received bytes is not {file.checksum}")
    return data


def describe(paths: list[Path]) -> tuple[WeightFile, ...]:
    """Files that exist already, such as those of an exported model, with their checksums."""
    described = []
    for path in paths:
        data = bytes_of(path)
        described.append(WeightFile(path=str(path), size=data.numel(), checksum=checksum(data)))
    return tuple(described)


def has_room(size: int) -> bool:
    """Whether this host's shared memory takes as many bytes, with a tenth to spare."""
    return SHM.is_dir() and os.access(SHM, os.W_OK) and shutil.disk_usage(SHM).free > 1.1 * size


def transfer_folder(size: int, fallback: Path) -> Path:
    """`/dev/shm` when the bytes fit, else a folder of the run."""
    if has_room(size):
        return SHM
    fallback.mkdir(parents=True, exist_ok=True)
    return fallback


def stale_files(run: Path) -> list[Path]:
    """Transfer files of this run that were not taken away, because it was interrupted or killed."""
    return sorted([*SHM.glob(f"{file_prefix(run)}*"), *(run / "transfer").glob(f"{file_prefix(run)}*")])


def remove_stale(run: Path) -> None:
    """Delete them."""
    for path in stale_files(run):
        path.unlink(missing_ok=True)


def file_prefix(run: Path) -> str:
    return f"rsrlm-{xxhash.xxh3_64_hexdigest(str(run.resolve()).encode())}-"


def write(
    shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]], run: Path, version: str
) -> tuple[WeightFile, ...]:
    """Write one transfer file; it appears under its name only when it is whole.

    The tensors come in the order of `shapes`, from any device, and each goes to its place as it comes: memory holds no
    second model. Raises OSError where there is no room, ValueError where the tensors are not those of `shapes`.
    """
    header, size = header_of(shapes)
    folder = transfer_folder(len(header) + size, run / "transfer")
    path = folder / f"{file_prefix(run)}{version}.safetensors"
    scratch = path.with_suffix(".tmp")
    try:
        with scratch.open("wb") as file:
            # Without room, this says so; a copy into memory that is not there would be a signal that kills.
            os.posix_fallocate(file.fileno(), 0, len(header) + size)
            file.write(header)
        data = torch.from_file(str(scratch), shared=True, size=len(header) + size, dtype=torch.uint8)
        digest, at = xxhash.xxh3_128(header), len(header)
        for (name, (dtype, shape)), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            if (given, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                raise ValueError(f"{given} {tensor.dtype} {tuple(tensor.shape)} came in the place of {name}")
            raw = tensor.reshape(-1).view(torch.uint8)
            place = data[at : at + raw.numel()]
            place.copy_(raw)
            digest.update(memoryview(place.numpy()))
            at += raw.numel()
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    scratch.rename(path)
    return (WeightFile(path=str(path), size=at, checksum=digest.hexdigest()),)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def remove(files: tuple[WeightFile, ...], run: Path) -> None:
    """Delete transfer files of this host (never those of an exported model)."""
    for file in files:
        path = Path(file.path)
        if path.name.startswith(file_prefix(run)):
            path.unlink(missing_ok=True)
