"""A tree of plain values and tensors in a file that is written whole or not at all.

A file is a line that names the format, the SHA-256 of all that follows, and then the tree as JSON
with the bytes of its tensors behind. Nothing in it is ever executed: what is read are numbers,
strings and containers of them, whoever wrote the file.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .trees import from_json, opened, packed, to_json

__all__ = ["DamagedError", "ForeignError", "digest", "read", "write"]

_MAGIC = b"sklearn_softeq record 1\n"
_DIGEST = 64  # bytes of SHA-256 in hexadecimal digits

#: The types of tensors by their names in a file.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
}

#: What instances of subclasses are written as.
_BASES: tuple[type, ...] = (int, float, str, list, tuple, dict)


class DamagedError(ValueError):
    """A file is not what was written."""


class ForeignError(ValueError):
    """A file has been written by something else."""


def digest(tree: Any) -> str:
    """SHA-256 of a tree, in hexadecimal digits."""
    return _digest(_parts(tree))


def write(path: Path, tree: Any) -> None:
    """Put a tree in the place of a file, which is the old one until the new one is complete.

    Parameters
    ----------
    path : Path
    tree : object
        None, bool, int, float, str, tensors, NumPy arrays of numbers, which come back as tensors,
        or of strings, which come back as lists; and lists, tuples and dictionaries of them.

    Raises
    ------
    OSError
        If it cannot be written; then the file is as it was.
    TypeError
        If there is something else in the tree.
    """
    parts = _parts(tree)
    with _replacing(path) as file:
        file.write(_MAGIC + _digest(parts).encode())
        file.writelines(parts)


def read(path: Path) -> Any:
    """The tree of a file, its tensors on the CPU with the strides that they had.

    Raises
    ------
    DamagedError
        If the file is torn or has been changed.
    ForeignError
        If it has never been one of these.
    OSError
        If it cannot be read.
    """
    content = memoryview(path.read_bytes())
    begin = len(_MAGIC) + _DIGEST
    if content[: len(_MAGIC)] != _MAGIC and not _torn(content):
        raise ForeignError(f"{path} is no record of sklearn_softeq.")
    body = content[begin:]
    if _digest([body]).encode() != content[len(_MAGIC) : begin]:
        raise DamagedError(f"{path} is not complete, or has been changed.")
    try:
        plain, blobs = opened(body)
        return from_json(plain, _Leaves(blobs))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, RuntimeError) as error:
        raise DamagedError(f"{path} has no record that can be read: {error}") from error


def _torn(content: memoryview) -> bool:
    """Whether content that does not begin as a record does can be what is left of one.

    A file that breaks off holds a beginning of it, and zeros where nothing has reached the disk.
    """
    return _MAGIC.startswith(bytes(content[: len(_MAGIC)]).rstrip(b"\0")) and not any(
        content[len(_MAGIC) :]
    )


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of another one once its content has reached the disk."""
    handle, part = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _parts(tree: Any) -> list[Any]:
    """What is written, as bytes or views of them."""
    blobs: list[Any] = []

    def leaf(value: Any) -> Any:
        match value:
            case torch.Tensor():
                return {"tensor": _plain_tensor(value.detach().cpu(), blobs)}
            case np.ndarray() if value.dtype.kind == "U":
                return to_json(value.tolist(), leaf)
            case np.ndarray():
                return leaf(_tensor(value))
        for base in _BASES:
            if isinstance(value, base):
                return to_json(base(value), leaf)
        raise TypeError(f"{type(value).__name__} is neither a plain value nor a tensor.")

    return packed(to_json(tree, leaf), blobs)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """An array in one of the types that there are."""
    kind = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}.get(array.dtype.kind)
    if array.dtype == np.float32:
        kind = np.float32
    if kind is None:
        raise TypeError(f"Arrays of {array.dtype} are not written.")
    return torch.from_numpy(np.array(array, dtype=kind))


def _plain_tensor(tensor: torch.Tensor, blobs: list[Any]) -> list[Any]:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"Tensors of {name} are not written.")
    dense = tensor.contiguous()
    if dense.numel():
        blobs.append(dense.flatten().view(torch.uint8).numpy().data)
    # Products may be rounded otherwise where strides differ.
    strides = tensor.stride() if _fills(tensor.shape, tensor.stride()) else dense.stride()
    return [name, list(tensor.shape), list(strides)]


def _fills(shape: Iterable[int], strides: Iterable[int]) -> bool:
    """Whether a tensor has all numbers of its storage."""
    shape = list(shape)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return 0 in shape or last + 1 == math.prod(shape)


class _Leaves:
    """Tensors, from their bytes in the order in which they are met."""

    def __init__(self, blobs: memoryview):
        self.blobs = blobs

    def __call__(self, kind: str, found: Any) -> torch.Tensor:
        if kind != "tensor":
            raise KeyError(kind)
        return self._tensor(*found)

    def _tensor(self, name: str, shape: list[int], strides: list[int]) -> torch.Tensor:
        dtype = _DTYPES[name]
        size = math.prod(shape) * dtype.itemsize
        if min([*shape, *strides], default=0) < 0 or size > len(self.blobs):
            raise ValueError("a tensor is larger than what there is of it")
        if not size:
            return torch.empty(shape, dtype=dtype)
        if not _fills(shape, strides):
            raise ValueError("strides do not fit a shape")
        content, self.blobs = self.blobs[:size], self.blobs[size:]
        flat = torch.frombuffer(bytearray(content), dtype=dtype)
        # Not the buffer itself: it may begin anywhere, and alignment decides about rounding, too.
        found = torch.empty_strided(shape, strides, dtype=dtype)
        return found.copy_(flat.view(shape))
