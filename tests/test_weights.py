"""Transfer files: any safetensors reader finds in them what was written, and nothing is held twice."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rsrlm.runtime import weights

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
SHAPES = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=3).map(tuple))


@given(shapes=st.dictionaries(st.text("abc._é", min_size=1), SHAPES, max_size=6))
def test_what_is_written_is_read(shapes: weights.Shapes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By the library and by the engines' workers, whatever types and lengths are beside each other."""
    run = tmp_path_factory.mktemp("run")
    tensors = {
        name: torch.arange(shape.numel()).reshape(shape).to(dtype) * 1.5 + 0.25
        for name, (dtype, shape) in ((name, (dtype, torch.Size(shape))) for name, (dtype, shape) in shapes.items())
    }
    tensors = {name: tensor.to(shapes[name][0]) for name, tensor in tensors.items()}
    (file,) = weights.write(shapes, tensors.items(), run, "M1")
    try:
        assert weights.describe([Path(file.path)]) == (file,)
        data = weights.verified(weights.bytes_of(file.path), file, "here")
        for found in (load_file(file.path), dict(weights.tensors_in(data))):
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)
        assert weights.stale_files(run) == [Path(file.path)]  # no scratch file beside it
    finally:
        weights.remove_stale(run)


def test_tensors_are_taken_one_by_one(tmp_path: Path) -> None:
    """One that was taken may be changed, or given up, before the next is made."""

    def made() -> object:
        buffer = torch.empty(4)
        for number in range(3):
            yield f"w{number}", buffer.fill_(number)

    shapes = {f"w{number}": (torch.float32, (4,)) for number in range(3)}
    (file,) = weights.write(shapes, made(), tmp_path, "M1")
    found = load_file(file.path)
    weights.remove_stale(tmp_path)
    assert [found[f"w{number}"].tolist() for number in range(3)] == [[number] * 4 for number in range(3)]


def test_a_read_tensor_shares_its_storage_with_no_other(tmp_path: Path) -> None:
    """Else save_pretrained copies the whole model before it writes it."""
    tensors = {"a": torch.zeros(3), "b": torch.ones(3)}
    (file,) = weights.write(weights.shapes_of(tensors), tensors.items(), tmp_path, "M1")
    data = weights.bytes_of(file.path)
    weights.remove_stale(tmp_path)
    sizes = [tensor.untyped_storage().nbytes() for _, tensor in weights.tensors_in(data)]
    assert sizes == [12, 12]


def test_no_room_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        weights.write({"a": (torch.float32, (3,))}, [("a", torch.zeros(3))], tmp_path, "M1")
    assert not weights.stale_files(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        [("a", torch.zeros(2)), ("b", torch.zeros(3))],
        [("a", torch.zeros(3).half()), ("b", torch.zeros(3))],
        [("b", torch.zeros(3)), ("a", torch.zeros(3))],
        [("a", torch.zeros(3))],
        [(name, torch.zeros(3)) for name in "abc"],
    ],
    ids=["shape", "type", "order", "too few", "too many"],
)
def test_tensors_that_are_not_those_are_refused(given: list[tuple[str, torch.Tensor]], tmp_path: Path) -> None:
    """And leave nothing in memory."""
    with pytest.raises(ValueError, match=r"came in the place of|zip"):
        weights.write({"a": (torch.float32, (3,)), "b": (torch.float32, (3,))}, given, tmp_path, "M1")
    assert not weights.stale_files(tmp_path)
