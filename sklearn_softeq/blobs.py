"""A tree of plain values and arrays as one array of bytes, and back.

What saves estimators spends a few hundred bytes on each value and each array that it meets, which
for a small network is more than its weights. Here values and shapes are JSON, and behind it lie the
numbers of all arrays, in the order in which they are named. Where that is little it is compressed:
the history of a long training is much of it, and says some things twice. Nothing in it is ever
executed, whoever made it.
"""

import json
import math
import zlib
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Blob", "from_blob", "to_blob"]

#: Bytes that say how long the JSON is.
LENGTH = 8

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
    encoder = _Encoder()
    # Each dictionary of the JSON has one key, which says what it stands for.
    text = json.dumps(encoder(tree), separators=(",", ":")).encode()
    content = b"".join([len(text).to_bytes(LENGTH, "little"), text, *encoder.parts])
    small = len(content) <= SMALL
    content = COMPRESSED + zlib.compress(content) if small else PLAIN + content
    return Blob(np.frombuffer(content, np.uint8), encoder.others)


def from_blob(blob: Blob) -> Any:
    """The tree again; its arrays can be written to, and share no memory with those of the blob.

    Raises
    ------
    ValueError
        If it is none of :func:`to_blob`'s.
    """
    try:
        content = _opened(np.asarray(blob.content, np.uint8).tobytes())
        begin = LENGTH + int.from_bytes(content[:LENGTH], "little")
        plain = json.loads(bytes(content[LENGTH:begin]))
        return _Decoder(content[begin:], blob.others)(plain)
    except (ValueError, TypeError, LookupError, RecursionError, zlib.error) as error:
        raise ValueError(f"This is not what a model was saved as: {error}") from error


def _opened(content: bytes) -> memoryview:
    """What has been compressed, or has not, without its first byte."""
    if content[:1] == COMPRESSED:
        # No more than was ever put in, whatever a file says.
        return memoryview(zlib.decompressobj().decompress(content[1:], SMALL))
    return memoryview(content)[1:]


class _Encoder:
    """From a tree to what JSON takes, with what it does not take beside it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.others: list[Any] = []

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is list:
            return [self(item) for item in value]
        if kind is tuple:
            return {"tuple": [self(item) for item in value]}
        if kind is dict:
            return {"dict": [[self(k), self(v)] for k, v in value.items()]}
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


class _Decoder:
    """The way back."""

    def __init__(self, numbers: memoryview, others: list[Any]):
        self.numbers = numbers
        self.others = others

    def __call__(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        ((kind, found),) = plain.items()
        match kind:
            case "tuple":
                return tuple(self(item) for item in found)
            case "dict":
                return {self(key): self(value) for key, value in found}
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
