"""Words for values: the same in another process, and other ones for other values."""

import enum
import functools
import operator
import os
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

from sklearn_softeq.descriptions import IndescribableError, described

K = 3


def shift(batch, k=1, *, axis=-1):
    return batch.roll(k, axis)


def shifted(k):
    return lambda batch: shift(batch, k)


def by_a_constant(batch):
    return batch * K


def to_itself(batch, n=2):
    return batch if n == 0 else to_itself(batch, n - 1)


def class_with(k):
    class Local:
        def __call__(self, batch):
            return batch * k

    return Local


def made_with(k):
    return type("Made", (), {"k": k, "__call__": lambda self, batch: batch * self.k})


class Shift:
    def __init__(self, k):
        self.k = k

    def __call__(self, batch):
        return batch.roll(self.k, -1)

    def other(self, batch):
        return batch

    @staticmethod
    def nothing(batch):
        return batch


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = k


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def convolution(seed):
    torch.manual_seed(seed)
    return torch.nn.Conv2d(1, 2, 3)


def with_attribute(k):
    def function(batch):
        return batch

    function.k = k
    return function


#: Values of which no two have the same words.
DIFFERENT = {
    "plain": [None, True, 1, 1.0, 1j, "1", b"1", np.int64(1), np.float32(1), np.str_("1")],
    "zeros": [0.0, -0.0],
    "containers": [(), [], {}, set(), frozenset(), (1,), [1], {1}, frozenset({1}), {1: 1}, [(1,)]],
    "sets": [{1, 2}, {1, 3}, {"a", "b"}, {"a", "b, c"}, {"a, b", "c"}],
    "lambdas": [lambda b: b, lambda b: b * 0, lambda b: b * 1, lambda b: b.flip(-1)],
    "names": [lambda b: b.sin(), lambda b: b.cos(), lambda b: torch.sin(b)],
    "nested code": [
        lambda b: [x + 2 for x in b],
        lambda b: [x + 1 for x in b],
        lambda b: lambda: 1,
    ],
    "closures": [shifted(1), shifted(2), shifted("1")],
    "defaults": [lambda b, k=1: b, lambda b, k=2: b, lambda b, *, k=1: b, lambda b, *, k=2: b],
    "attributes": [with_attribute(1), with_attribute(2)],
    "partials": [
        functools.partial(shift),
        functools.partial(shift, k=1),
        functools.partial(shift, k=3),
        functools.partial(shift, axis=1),
        functools.partial(shift, None, 1),
        functools.partial(to_itself, k=1),
        functools.partial(shifted(1), k=1),
        functools.partial(shifted(2), k=1),
        functools.partial(shift, torch.zeros(2)),
        functools.partial(shift, torch.ones(2)),
    ],
    "instances": [Shift(1), Shift(2), Shift([1]), Shift(lambda b: b), Shift(lambda b: b + 1)],
    "more instances": [Slotted(1), Slotted(2), Colour.RED, Colour.BLUE, object()],
    "methods": [Shift(1).other, Shift(2).other, Shift(1).__call__, Shift.other, Shift.nothing],
    "classes": [Shift, Slotted, int, class_with(1), class_with(2), made_with(1), made_with(2)],
    "of local classes": [class_with(1)(), class_with(2)(), made_with(1)(), made_with(2)()],
    "of C": [torch.flip, torch.sin, torch.Tensor.sin, np.sin, np.cos, np.flip, len, str.upper],
    "bound": ["a".join, "b".join, [1].index, operator.itemgetter(1), operator.itemgetter(2)],
    "arrays": [
        np.zeros(2),
        np.ones(2),
        np.zeros((2, 1)),
        np.zeros(2, int),
        np.array(["a"], object),
        np.array(["b"], object),
        np.ma.array([1, 2], mask=[0, 1]),
        np.ma.array([1, 2], mask=[1, 0]),
    ],
    "tensors": [
        torch.zeros(2),
        torch.ones(2),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.zeros(2)),
    ],
    "modules": [convolution(0), convolution(1), torch.nn.ReLU(), torch.nn.SiLU()],
    "of torch": [torch.float32, torch.float64, torch.device("cpu"), torch.Size([1])],
    "generators": [
        np.random.RandomState(0),
        np.random.RandomState(1),
        np.random.default_rng(0),
        np.random.default_rng(1),
        torch.Generator().manual_seed(0),
        torch.Generator().manual_seed(1),
    ],
    "others": [slice(1), slice(2), range(1), range(2), re.compile("a"), re.compile("b"), ...],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_has_other_words(kind):
    found = list(map(described, DIFFERENT[kind]))
    assert len(set(found)) == len(found), found
    assert not any("0x" in words for words in found)
    assert found == list(map(described, DIFFERENT[kind]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: shifted(2),
        lambda: functools.partial(shift, k=[1, {2}]),
        lambda: Shift({"a": torch.zeros(3), "b": shifted(3)}),
        lambda: class_with(3)(),
        lambda: convolution(4),
    ],
)
def test_what_is_equal_has_the_same_words(make):
    assert described(make()) == described(make())


def test_a_dictionary_has_no_order():
    assert described({"b": 1, "a": 2}) == described({"a": 2, "b": 1})


def test_constants_of_the_module_count(monkeypatch):
    before = described(by_a_constant), described(lambda b: by_a_constant(b))
    monkeypatch.setitem(globals(), "K", 4)
    after = described(by_a_constant), described(lambda b: by_a_constant(b))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_what_holds_itself():
    listed = [1]
    listed.append(listed)
    assert described(listed) == "[1, <1 above>]"
    assert described(to_itself) == described(to_itself)


def test_pandas():
    pandas = pytest.importorskip("pandas")
    one, two = described(pandas.Series([1, 2])), described(pandas.Series([1, 3]))
    assert one != two
    assert one == described(pandas.Series([1, 2]))


def deep():
    found = []
    for _ in range(10_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: (i for i in ()),
        lambda: open(os.devnull),
        lambda: memoryview(b""),
        lambda: Shift(threading.Lock()),
        lambda: functools.partial(shift, threading.Lock()),
        lambda: functools.lru_cache(lambda b: b),
        lambda: np.frompyfunc(lambda b: b, 1, 1),
        deep,
    ],
)
def test_what_has_no_words_is_an_error(make):
    with pytest.raises(IndescribableError):
        described(make())


SCRIPT = """
    import functools, sys
    import torch
    from sklearn_softeq.descriptions import described

    K = 3

    def shift(batch, k=1):
        return batch.roll(k * K, -1) if "a" in {"a", "b", "c"} else batch

    class Shift:
        names = frozenset({"x", "y", "z"})

        def __init__(self, k):
            self.k = k

        def __call__(self, batch):
            return shift(batch, self.k) if self.k in {1, 2, 3, "a", "b"} else batch

    torch.manual_seed(0)
    for value in (
        lambda b: b * K,
        lambda b: b if b in {"a", "b", "c", "d"} else (lambda: shift(b)),
        functools.partial(shift, k={"a", "b", "c"}),
        Shift({"p", "q", "r"}),
        Shift(1).__call__,
        torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()),
        {frozenset({"a", "b"}), frozenset({"c", "d"})},
        torch.flip,
    ):
        print(described(value))
"""


def test_words_are_the_same_in_another_process(tmp_path):
    path = tmp_path / "script.py"
    found = []
    for seed, above in (("1", ""), ("2", "\n\n\n# moved")):
        path.write_text(above + textwrap.dedent(SCRIPT))
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, path], env=environment, capture_output=True, text=True, check=True
        )
        found.append(run.stdout.splitlines())
    assert len(set(found[0])) == 8
    assert found[0] == found[1]
