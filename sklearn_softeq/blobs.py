"""A tree of plain values and arrays as one array of bytes, and back.

What saves estimators spends a few hundred bytes on each value and each array that it meets, which
for a small network is more than its weights. Here values and shapes are JSON, and behind it lie the
numbers of all arrays, in the order in which they are named. Where that is little it is compressed:
the history of a long training is much of it, and says some things twice. Nothing in it is ever
executed, whoever made it.
"""

import math
import zlib
from typing import Any, NamedTuple

import numpy as np

from .trees import from_json, opened, packed, to_json

__all__ = ["Blob", "from_blob", "to_blob"]

#: Content of so many bytes at most is compressed. Of more nearly all are weights, which hardly get
#: smaller and would take long.
SMALL = 2**20

#: The first byte says which it is.
PLAIN, COMPRESSED = b"\0", b"\1"

#: Kinds of arrays whose bytes say all: numbers, times; and strings, but for NumPy's scalars.
NUMBERS, STRINGS = "biufcmM", "SU"


class Blob(NamedTuple):
    """A tree taken apart.

    Parameters
    ----------
    content : ndarray of uint8, of one dimension
        Whether the rest is compressed; the length of the JSON, the JSON, and the bytes of the
        arrays.
    others : list
        What is neither plain nor an array of plain values, as it was.
    """

    content: np.ndarray
    others: list[Any]


def to_blob(tree: Any) -> Blob:
    """Take a tree apart.

    Parameters
    ----------
    tree : object
        None, bool, int, float, str, arrays and scalars of NumPy's, and lists, tuples and
        dictionaries of them, but for subclasses, are plain; anything may stand between them.
    """
    found = _Found()
    plain = to_json(tree, found)
    content = b"".join(packed(plain, found.parts))
    small = len(content) <= SMALL
    content = COMPRESSED + zlib.compress(content) if small else PLAIN + content
    return Blob(np.frombuffer(content, np.uint8), found.others)


def from_blob(blob: Blob) -> Any:
    """The tree again; its arrays can be written to, and share no memory with those of the blob.

    Raises
    ------
    ValueError
        If it is none of :func:`to_blob`'s.
    """
    try:
        plain, numbers = opened(_inflated(np.asarray(blob.content, np.uint8).tobytes()))
        return from_json(plain, _Leaves(numbers, blob.others))
    except (ValueError, TypeError, LookupError, RecursionError, zlib.error) as error:
        raise ValueError(f"This is not what a model was saved as: {error}") from error


def _inflated(content: bytes) -> memoryview:
    """What has been compressed, or has not, without its first byte."""
    if content[:1] == COMPRESSED:
        # No more than was ever put in, whatever a file says.
        return memoryview(zlib.decompressobj().decompress(content[1:], SMALL))
    return memoryview(content)[1:]


class _Found:
    """The bytes of arrays on the way into JSON, and what it does not take."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.others: list[Any] = []

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind is np.ndarray and value.dtype.kind in NUMBERS + STRINGS:
            order = "C" if value.flags.c_contiguous or not value.flags.f_contiguous else "F"
            self.parts.append(value.tobytes(order))
            return {"array": [value.dtype.str, value.shape, order]}
        if kind is np.ndarray and all(type(item) is str for item in value.flat):
            return {"strings": [value.shape, value.ravel().tolist()]}
        if isinstance(value, np.generic) and value.dtype.kind in NUMBERS:
            self.parts.append(value.tobytes())
            return {"scalar": value.dtype.str}
        self.others.append(value)
        return {"other": len(self.others) - 1}


class _Leaves:
    """Arrays, from their bytes in the order in which they are met, and what stood beside."""

    def __init__(self, numbers: memoryview, others: list[Any]):
        self.numbers = numbers
        self.others = others

    def __call__(self, kind: str, found: Any) -> Any:
        match kind:
            case "array":
                return self._array(*found)
            case "strings":
                return np.array(found[1], dtype=object).reshape(found[0])
            case "scalar":
                return self._array(found, [], "C")[()]
            case "other":
                return self.others[found]
        raise KeyError(kind)

    def _array(self, name: str, shape: list[int], order: Any) -> np.ndarray:
        dtype, count = np.dtype(name), math.prod(shape)
        size = count * dtype.itemsize
        known = dtype.kind in NUMBERS + STRINGS and dtype.itemsize
        if not known or min(shape, default=0) < 0 or size > len(self.numbers):
            raise ValueError(f"there is no array of {name} and the shape {shape}")
        content, self.numbers = self.numbers[:size], self.numbers[size:]
        flat = np.frombuffer(content, dtype) if count else np.empty(0, dtype)
        return flat.reshape(shape, order=order).copy(order="K")
