"""Files are written whole or not at all, come back to the last bit, and never run code."""

import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

from sklearn_softeq import records
from sklearn_softeq.records import DamagedError, ForeignError, digest, read, write

TREE = {
    "plain": [None, True, 3, 0.1, "é", -float("inf"), 2**80],
    3: (1, ("two", [])),
    "tensors": {"a": torch.arange(6.0).view(2, 3), "none": torch.empty(0, 4)},
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(7),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "record"


def with_digest(body):
    """A file whose digest is right, whatever it says."""
    return records._MAGIC + records._digest([body]).encode() + body


def with_json(plain):
    text = json.dumps(plain).encode()
    return with_digest(len(text).to_bytes(8, "little") + text)


def test_round_trip(path):
    write(path, TREE)
    found = read(path)
    tensors, flags = found.pop("tensors"), found.pop("flags")
    assert found.pop("number").shape == ()
    assert found == {name: TREE[name] for name in ("plain", 3)}
    assert list(tensors) == ["a", "none"]
    torch.testing.assert_close(tensors, TREE["tensors"], rtol=0, atol=0)
    assert flags.tolist() == [True, False]
    assert os.listdir(path.parent) == ["record"]


def test_numbers_that_are_no_numbers(path):
    write(path, [float("nan"), torch.tensor(float("nan"))])
    assert all(math.isnan(value) for value in read(path))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T,
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(3, 4)[:, :1].T,  # a part of a storage
        torch.randn(1, 4, 4).as_strided((1, 4, 4), (5, 1, 4)),
        torch.randn(4, dtype=torch.float64),
        torch.zeros(3).expand(2, 3),
    ],
)
def test_tensors_keep_their_strides_where_they_have_a_storage_of_their_own(tensor, path):
    write(path, tensor)
    found = read(path)
    assert torch.equal(found, tensor)
    assert found.dtype == tensor.dtype
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    assert found.stride() == (tensor if alone else tensor.contiguous()).stride()
    assert found.data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.arange(3, dtype=np.uint16), torch.arange(3)),
        (np.array([0.5], np.float16), torch.tensor([0.5], dtype=torch.float64)),
        (np.array([True]), torch.tensor([True])),
    ],
)
def test_arrays_of_numbers_become_tensors(array, expected, path):
    write(path, array)
    torch.testing.assert_close(read(path), expected, rtol=0, atol=0)


def test_arrays_of_strings_become_lists(path):
    write(path, np.array(["a", "bc"]))
    assert read(path) == ["a", "bc"]


@pytest.mark.parametrize("value", [object(), np.array([object()]), {1, 2}, 1j, torch.zeros(1) * 1j])
def test_what_is_not_plain_is_not_written(value, path):
    write(path, "before")
    with pytest.raises(TypeError, match="written|plain"):
        write(path, [value])
    assert read(path) == "before"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_the_old_one_until_the_new_one_is_complete(step, path, monkeypatch):
    write(path, "before")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        write(path, "after")
    assert read(path) == "before"
    assert os.listdir(path.parent) == ["record"]


def test_a_torn_file_is_not_read(path):
    write(path, TREE)
    whole = path.read_bytes()
    torn = [whole[:length] for length in range(len(whole))]
    torn += [part.ljust(len(whole), b"\0") for part in torn[:40]]
    for content in torn:
        path.write_bytes(content)
        with pytest.raises(DamagedError):
            read(path)


@pytest.mark.parametrize(
    "content",
    [b"notes", bytes(40) + b"1", b"\n", records._MAGIC.replace(b"1", b"2"), b"sklearn\0\0notes"],
)
def test_a_file_of_something_else_is_told_from_a_torn_one(content, path):
    path.write_bytes(content)
    with pytest.raises(ForeignError, match="no record"):
        read(path)


def test_a_file_with_a_changed_bit_is_not_read(path):
    write(path, TREE)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        with pytest.raises(DamagedError if i >= len(records._MAGIC) else ForeignError):
            read(path)


class Payload:
    """Makes a file when it is loaded by pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_code_in_a_file_is_not_run(save, hidden, path):
    done = path.parent / "done"
    with path.open("wb") as file:
        save(Payload(done), file)
    content = path.read_bytes()
    if hidden:  # behind a right digest
        path.write_bytes(with_digest(len(content).to_bytes(8, "little") + content))
    with pytest.raises(DamagedError if hidden else ForeignError):
        read(path)
    assert not done.exists()
    pickle.loads(pickle.dumps(Payload(done)))  # else it would prove nothing
    assert done.exists()


@pytest.mark.parametrize(
    "plain",
    [
        {"tensor": ["float32", [10**12], [1]]},
        {"tensor": ["float32", [-1], [1]]},
        {"tensor": ["load", [0], [1]]},
        {"tensor": ["float32"]},
        {"tensor": [["float32"], 3, 3]},
        {"object": "os.system"},
        {"dict": [[{"dict": []}, 1]]},
        {"dict": 3},
        {"tuple": [], "dict": []},
        {},
    ],
)
def test_what_makes_no_sense_is_not_read(plain, path):
    path.write_bytes(with_json(plain))
    with pytest.raises(DamagedError):
        read(path)


@pytest.mark.parametrize("body", [b"", b"1234", b"\xff" * 20, (200_000).to_bytes(8, "little")])
def test_a_body_that_is_none(body, path):
    path.write_bytes(with_digest(body + b"[" * 200_000 * (len(body) == 8)))
    with pytest.raises(DamagedError):
        read(path)


def test_strides_that_do_not_fit_are_not_taken(path):
    blob = bytes(16)
    text = json.dumps({"tensor": ["float32", [2, 2], [1, 10**9]]}).encode()
    path.write_bytes(with_digest(len(text).to_bytes(8, "little") + text + blob))
    with pytest.raises(DamagedError, match="strides"):
        read(path)


def test_digests_tell_trees_apart():
    trees = [TREE, {**TREE, 3: (1, ["two", []])}, {**TREE, "number": torch.tensor(8)}, [1], (1,)]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest(TREE) == digest(dict(TREE))
