"""Trees as bytes come back to the last bit, and hostile ones do no harm."""

import json
import pickle
import tracemalloc
import zlib

import numpy as np
import pytest

from sklearn_softeq import blobs
from sklearn_softeq.blobs import Blob, from_blob, to_blob

STRANGER = object()

TREE = {
    "plain": [None, True, 3, 0.1, "é", -float("inf"), 2**80, -0.0],
    3: (1, ("two", [])),
    "arrays": {
        "f8": np.arange(6.0).reshape(2, 3),
        "F": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
        "strided": np.arange(12).reshape(3, 4)[:, ::2],
        "empty": np.empty((0, 4), np.int32),
        "number": np.array(7, np.uint8),
        "big": np.arange(3, dtype=">i2"),
        "flags": np.array([True, False]),
        "words": np.array(["a", "bc"]),
        "objects": np.array([["a", "é"]], dtype=object),
        "days": np.array(["2020-01-01"], "M8[D]"),
    },
    ("a", 1): [np.float32(0.1), np.int64(3), np.bool_(True)],
    "others": [STRANGER, {1}, b"bytes", np.array([1, None], dtype=object), np.str_("a")],
}


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected
        assert repr(found) == repr(expected)  # -0.0, and types of NumPy's scalars


@pytest.mark.parametrize("small", [2**20, 0])
def test_round_trip(small, monkeypatch):
    monkeypatch.setattr(blobs, "SMALL", small)
    blob = to_blob(TREE)
    assert blob.content.dtype == np.uint8
    assert blob.content.ndim == 1
    found = from_blob(Blob(*pickle.loads(pickle.dumps(list(to_blob({"a": TREE["arrays"]}))))))
    assert_same(found, {"a": TREE["arrays"]})
    found = from_blob(blob)
    assert_same(found, TREE)
    assert found["others"][0] is STRANGER
    assert found["arrays"]["F"].flags.f_contiguous
    assert all(array.flags.writeable for array in found["arrays"].values())
    assert not any(np.shares_memory(a, blob.content) for a in found["arrays"].values())


def test_little_is_compressed_and_much_is_not():
    few, many = np.zeros(10_000), np.zeros(200_000)
    assert len(to_blob(few).content) < 300
    assert len(to_blob(many).content) > many.nbytes
    for array in (few, many):
        assert_same(from_blob(to_blob(array)), array)


def test_what_was_compressed_does_not_grow_without_end():
    text = b"[" + b" " * 2**26 + b"]"
    content = b"\1" + zlib.compress(len(text).to_bytes(8, "little") + text)
    assert len(content) < 2**17
    tracemalloc.start()
    with pytest.raises(ValueError, match="not what a model was saved as"):
        from_blob(Blob(np.frombuffer(content, np.uint8), []))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_only_what_is_not_plain_is_left_over():
    assert len(to_blob(TREE).others) == 5
    assert to_blob(TREE["arrays"]).others == []


def test_numbers_that_are_no_numbers():
    assert np.isnan(from_blob(to_blob(float("nan"))))


def with_json(plain, rest=b"", others=()):
    text = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    content = b"\0" + len(text).to_bytes(8, "little") + text + rest
    return Blob(np.frombuffer(content, np.uint8), list(others))


@pytest.mark.parametrize(
    "blob",
    [
        Blob(np.empty(0, np.uint8), []),
        Blob(np.frombuffer(b"\xff" * 40, np.uint8), []),
        Blob(np.frombuffer(b"\1" + b"\xff" * 40, np.uint8), []),
        Blob(to_blob(TREE).content[:-30], []),
        Blob(None, []),
        with_json(pickle.dumps(TREE["arrays"])),
        with_json(b"[" * 100_000),
        with_json({"array": ["|O", [1], "C"]}, bytes(8)),
        with_json({"array": [[["a", "O"]], [1], "C"]}, bytes(8)),
        with_json({"array": ["<f8", [2], "C"]}, bytes(8)),
        with_json({"array": ["<f8", [-1], "C"]}, bytes(8)),
        with_json({"array": ["<f8", [0, -1], "C"]}),
        with_json({"array": ["<U0", [10**12], "C"]}),
        with_json({"array": ["<f8", [0, 10**30], "C"]}),
        with_json({"array": ["<f8", [0.5], "C"]}, bytes(8)),
        with_json({"array": ["<f8", [1], "K"]}, bytes(8)),
        with_json({"array": ["nothing", [1], "C"]}, bytes(8)),
        with_json({"array": 3}),
        with_json({"strings": [[2], ["a"]]}),
        with_json({"other": 0}),
        with_json({"other": "a"}),
        with_json({"dict": [[[], 1]]}),
        with_json({"list": [], "tuple": []}),
        with_json({"eval": "1"}),
        with_json({}),
    ],
    ids=str,
)
def test_what_is_no_blob_is_an_error(blob):
    with pytest.raises(ValueError, match="not what a model was saved as"):
        from_blob(blob)
