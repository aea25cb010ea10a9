"""Every container and every mistake: what arrives, and what the message says."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state

from sklearn_softeq.validation import (
    check_classes,
    check_images,
    check_incremental_class_weight,
    check_names,
    check_same_shape,
    check_weights,
    distinct_rows,
    encode,
    resolve_device,
    resolve_image_shape,
    warn_of_shares,
)

N, SHAPE = 5, (2, 3, 4)
VALUES = check_random_state(0).randint(0, 200, size=(N, *SHAPE))
ROWS = VALUES.reshape(N, -1)


class Classifier(ClassifierMixin, BaseEstimator):
    """What check_images sees of ours: its tags, and where n_features_in_ is set."""


def read_only_memmap(tmp_path):
    np.save(tmp_path / "X.npy", VALUES.astype(np.float32))
    return np.load(tmp_path / "X.npy", mmap_mode="r")


# ── containers: what is passed → dtype and shape of the images found in it

CONTAINERS = {
    "float64": (lambda: ROWS.astype(np.float64), np.float64, None),
    "float32": (lambda: ROWS.astype(np.float32), np.float32, None),
    "float16": (lambda: ROWS.astype(np.float16), np.float32, None),
    "uint8": (lambda: ROWS.astype(np.uint8), np.float32, None),
    "int64": (lambda: ROWS.astype(np.int64), np.float64, None),
    "int16-4d": (lambda: VALUES.astype(np.int16), np.float64, SHAPE),
    "uint8-4d": (lambda: VALUES.astype(np.uint8), np.float32, SHAPE),
    "float16-4d": (lambda: VALUES.astype(np.float16), np.float32, SHAPE),
    "float64-4d": (lambda: VALUES.astype(np.float64), np.float64, SHAPE),
    "float32-3d": (
        lambda: VALUES.reshape(N, 6, 4).astype(np.float32),
        np.float32,
        (1, 6, 4),
    ),
    "fortran": (lambda: np.asfortranarray(ROWS, np.float32), np.float32, None),
    "fortran-4d": (lambda: np.asfortranarray(VALUES, np.float32), np.float32, SHAPE),
    "strided-4d": (
        lambda: np.repeat(VALUES.astype(np.float64), 2, 0)[::2, ::1],
        np.float64,
        SHAPE,
    ),
    "channels-last-view": (
        lambda: np.ascontiguousarray(VALUES.transpose(0, 2, 3, 1), np.float32).transpose(
            0, 3, 1, 2
        ),
        np.float32,
        SHAPE,
    ),
    "big-endian": (lambda: ROWS.astype(">f8"), np.float64, None),
    "list": (lambda: ROWS.tolist(), np.float64, None),
    "list-of-arrays": (lambda: list(ROWS.astype(np.float32)), None, None),
    "nested-list": (lambda: VALUES.tolist(), np.float64, SHAPE),
    "tuple-of-images": (lambda: tuple(VALUES.astype(np.float32)), np.float32, SHAPE),
    "list-of-uint8-images": (lambda: list(VALUES.astype(np.uint8)), np.float32, SHAPE),
    "frame": (lambda: pd.DataFrame(ROWS.astype(np.float64)), np.float64, None),
    "frame-float32": (lambda: pd.DataFrame(ROWS.astype(np.float32)), np.float32, None),
    "frame-uint8": (lambda: pd.DataFrame(ROWS.astype(np.uint8)), np.float64, None),
    "tensor": (lambda: torch.tensor(ROWS, dtype=torch.float32), np.float32, None),
    "tensor-4d": (lambda: torch.tensor(VALUES, dtype=torch.float64), np.float64, SHAPE),
    "tensor-uint8": (lambda: torch.tensor(VALUES, dtype=torch.uint8), np.float32, SHAPE),
    "tensor-bfloat16": (
        lambda: torch.tensor(VALUES, dtype=torch.bfloat16),
        np.float32,
        SHAPE,
    ),
    "tensor-half": (lambda: torch.tensor(VALUES, dtype=torch.float16), np.float32, SHAPE),
    "tensor-grad": (
        lambda: torch.tensor(VALUES, dtype=torch.float32).requires_grad_(),
        np.float32,
        SHAPE,
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name):
    make, dtype, shape = CONTAINERS[name]
    estimator = Classifier()
    X, y, found = check_images(estimator, make(), reset=True)
    assert y is None
    assert isinstance(X, np.ndarray)
    assert X.dtype in ((np.float32, np.float64) if dtype is None else (dtype,))
    np.testing.assert_array_equal(X, ROWS)
    assert found == shape
    assert estimator.n_features_in_ == 24


def test_memmaps_that_cannot_be_written_to(tmp_path):
    X, _, found = check_images(Classifier(), read_only_memmap(tmp_path), reset=True)
    assert (X.dtype, found) == (np.float32, SHAPE)
    np.testing.assert_array_equal(X, ROWS)


def test_booleans_are_numbers():
    X, _, found = check_images(Classifier(), VALUES > 100, reset=True)
    assert (X.dtype, found) == (np.float32, SHAPE)
    np.testing.assert_array_equal(X, ROWS > 100)


def test_what_is_passed_is_not_changed():
    values = VALUES.astype(np.float64)
    check_images(Classifier(), values, reset=True)
    assert values.shape == (N, *SHAPE)
    np.testing.assert_array_equal(values, VALUES)


def test_column_names_are_kept():
    estimator = Classifier()
    frame = pd.DataFrame(ROWS.astype(float), columns=[f"p{i}" for i in range(24)])
    check_images(estimator, frame, reset=True)
    assert list(estimator.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names should match"):
        check_images(estimator, frame.rename(columns={"p0": "q"}), reset=False)


@pytest.mark.parametrize(
    "y",
    [
        [0, 1, 0, 1, 2],
        np.array(["a", "b", "a", "b", "c"]),
        pd.Series(list("ababc")),
        torch.tensor([0, 1, 0, 1, 2]),
        [True, False, True, False, True],
    ],
    ids=["list", "strings", "series", "tensor", "bool"],
)
def test_labels_of_every_kind(y):
    X, found, _ = check_images(Classifier(), VALUES, y, reset=True)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [*(y.tolist() if isinstance(y, torch.Tensor) else y)]
    assert X.shape == (N, 24)


# ── bad data


def changed(value, dtype=float):
    X = VALUES.astype(dtype)
    X[1, 1, 2, 3] = value
    return X


BAD_DATA = {
    "nan": (lambda: changed(np.nan), ValueError, "contains NaN"),
    "nan-float16": (lambda: changed(np.nan, np.float16), ValueError, "contains NaN"),
    "inf": (lambda: changed(-np.inf), ValueError, "infinity"),
    "tensor-nan": (lambda: torch.tensor(changed(np.nan)), ValueError, "contains NaN"),
    "complex": (lambda: ROWS + 1j, ValueError, "Complex data not supported"),
    "complex-4d": (lambda: VALUES + 1j, ValueError, "Complex data not supported"),
    "sparse": (lambda: scipy.sparse.csr_matrix(ROWS), TypeError, "[Ss]parse data was passed"),
    "object": (lambda: changed("dog", object), (ValueError, TypeError), "dog"),
    "strings": (lambda: [["dog"] * 24] * N, ValueError, "dog"),
    "no-rows": (lambda: VALUES[:0].astype(float), ValueError, "0 sample"),
    "no-pixels": (lambda: np.empty((N, 2, 0, 3)), ValueError, "0 feature"),
    "empty-list": (lambda: [], ValueError, "Expected 2D array"),
    "a-vector": (lambda: ROWS[:, 0].astype(float), ValueError, "Reshape your data"),
    "a-number": (lambda: 3.0, ValueError, "Expected 2D array"),
    "5d": (lambda: np.zeros((N, 1, 2, 3, 4)), ValueError, "5 dimensions; .*slices can be passed"),
    "array-of-images": (
        lambda: np.array([np.ones((2, 2)), np.ones((3, 3))], dtype=object),
        ValueError,
        "np.stack",
    ),
    "ragged": (lambda: [[1.0, 2.0], [3.0]], ValueError, "inhomogeneous"),
    "ragged-images": (lambda: [np.ones((2, 2)), np.ones((3, 3))], ValueError, "dim|inhomog"),
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("reset", [True, False])
def test_bad_data(name, reset):
    make, error, message = BAD_DATA[name]
    estimator = Classifier()
    estimator.n_features_in_ = 24
    with pytest.raises(error, match=message):
        check_images(estimator, make(), reset=reset)


@pytest.mark.parametrize("X", [ROWS[:, :-1].astype(float), VALUES[:, :, :-1]], ids=["2d", "4d"])
def test_wrong_number_of_features(X):
    estimator = Classifier()
    check_images(estimator, ROWS.astype(float), reset=True)
    message = rf"X has {X[0].size} features, but Classifier is expecting 24 features as input"
    with pytest.raises(ValueError, match=message):
        check_images(estimator, X, reset=False)


def test_one_image_is_not_taken_for_its_rows():
    estimator = Classifier()
    check_images(estimator, np.ones((N, 4, 6)), reset=True)
    estimator.image_shape_ = (1, 4, 6)
    with pytest.raises(ValueError, match=r"the shape \(4, 6\) of one image.*X\[None\]"):
        check_images(estimator, np.ones((4, 6)), reset=False)
    assert len(check_images(estimator, np.ones((4, 24)), reset=False)[0]) == 4
    with pytest.raises(ValueError, match="X has 6 features, but Classifier is expecting 24"):
        check_images(estimator, np.ones((5, 6)), reset=False)
    estimator = Classifier()
    check_images(estimator, np.ones((N, 1, 24)), reset=True)
    estimator.image_shape_ = (1, 1, 24)
    assert len(check_images(estimator, np.ones((1, 24)), reset=False)[0]) == 1  # a row is an image


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed, but the target y is None"),
        ([0.1, 0.7, 1.3, 2.2, 0.4], "Unknown label type: continuous"),
        ([0, 1, 0, np.nan, 1], "contains NaN"),
        ([0, 1, 0, 1], "inconsistent numbers of samples"),
        (np.eye(N), "y should be a 1d array"),
        ([], "inconsistent numbers of samples|0 sample"),
    ],
    ids=["none", "continuous", "nan", "short", "2d", "empty"],
)
def test_bad_labels(y, message):
    with pytest.raises(ValueError, match=message):
        check_images(Classifier(), VALUES, y, reset=True)


# ── the shape of an image


@pytest.mark.parametrize(
    ("requested", "found", "n_features", "expected"),
    [
        (None, None, 784, (1, 28, 28)),
        (None, None, 64, (1, 8, 8)),
        (None, None, 3072, (3, 32, 32)),
        (None, None, 12, (3, 2, 2)),
        (None, None, 3, (3, 1, 1)),
        (None, None, 1, (1, 1, 1)),
        (None, None, 2, (1, 1, 2)),
        (None, None, 20, (1, 1, 20)),
        (None, None, 783, (1, 1, 783)),
        (None, None, 10**8, (1, 10**4, 10**4)),
        (None, (2, 3, 5), 30, (2, 3, 5)),
        (None, (3, 32, 3), 288, (3, 32, 3)),
        (None, (1, 7, 4), 28, (1, 7, 4)),
        (None, (1, 1, 9), 9, (1, 1, 9)),
        ((2, 3, 4), None, 24, (2, 3, 4)),
        ((4, 6), None, 24, (1, 4, 6)),
        ((4, 6), (1, 4, 6), 24, (1, 4, 6)),
        ([2, 3, 4], None, 24, (2, 3, 4)),
        (np.array([2, 3, 4]), None, 24, (2, 3, 4)),
        ((1, 1, 64), None, 64, (1, 1, 64)),
    ],
)
def test_image_shape(requested, found, n_features, expected):
    guessed = requested is None and found is None and expected == (1, 1, n_features)
    warns = pytest.warns(UserWarning, match=rf"image_shape=\(1, 1, {n_features}\) if that is meant")
    with warns if guessed and n_features > 1 else warnings.catch_warnings():
        if not guessed:
            warnings.simplefilter("error")
        shape = resolve_image_shape(requested, found, n_features)
    assert shape == expected
    assert all(type(side) is int for side in shape)


@pytest.mark.parametrize(
    ("requested", "found", "messages"),
    [
        ((2, 3, 5), None, ["(2, 3, 5) has 30 values", "24 features"]),
        ((3, 8), (2, 3, 4), ["image_shape=(3, 8)", "images of shape (2, 3, 4)", "None"]),
        ((4, 3, 2), (2, 3, 4), ["image_shape=(4, 3, 2)", "images of shape (2, 3, 4)"]),
        ((24,), None, ["(24,) is not allowed", "(channels, height, width)"]),
        ((), None, ["not allowed"]),
        ((1, 2, 3, 4), None, ["not allowed"]),
        (None, (8, 3, 1), ["(height, width, channels)", "X.transpose(0, 3, 1, 2)"]),
        (None, (2, 4, 3), ["(2, 4, 3)", "image_shape=(2, 4, 3) if"]),
        (("2", 3, 4), None, ["not allowed"]),
        ((0, 3, 8), None, ["not allowed", "positive integers"]),
        ((-1, 3, -8), None, ["not allowed"]),
        ((1.5, 4, 4), None, ["not allowed"]),
    ],
)
def test_image_shape_that_does_not_fit(requested, found, messages):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        resolve_image_shape(requested, found, 24)
    assert all(message in str(error.value) for message in messages)


def test_images_of_another_shape_at_predict():
    assert check_same_shape(None, SHAPE) == SHAPE
    assert check_same_shape(SHAPE, SHAPE) == SHAPE
    with pytest.raises(ValueError, match=r"\(4, 3, 2\).*fitted on images of shape.*rows of 24"):
        check_same_shape((4, 3, 2), SHAPE)
    with pytest.raises(ValueError, match=r"rows of 192 features. Channels come first: X.transpose"):
        check_same_shape((8, 8, 3), (3, 8, 8))
    with pytest.raises(ValueError, match=r"rows of 24 features\.$"):
        check_same_shape((2, 4, 3), SHAPE)


# ── classes


def test_classes_of_partial_fit():
    known = np.array(["a", "b", "c"])
    assert check_classes(["c", "a", "b", "a"], None).tolist() == ["a", "b", "c"]
    assert check_classes(None, known) is known
    assert check_classes(["c", "a", "b"], known).tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        check_classes(None, None)
    with pytest.raises(ValueError, match="not the same as on the last call"):
        check_classes(["a", "b"], known)


@pytest.mark.parametrize("labels", [["b", "d", "a"], [5, -1, 3], [0.5, 2.0, 1.5], [True, False]])
def test_codes_stand_for_the_labels(labels):
    y = np.array(labels * 2)
    classes = np.unique(y)
    codes = encode(y, classes)
    assert codes.dtype.kind == "i"
    np.testing.assert_array_equal(classes[codes], y)


def test_labels_that_are_no_class():
    with pytest.raises(ValueError, match=r"not among the classes: \[2, 9\].*\[0, 1, 5\]"):
        encode(np.array([0, 9, 5, 2, 9]), np.array([0, 1, 5]))


# ── weights

Y = np.array(["a", "b", "b", "c", "b"])
CLASSES = np.array(["a", "b", "c", "d"])


def weights_of(sample_weight=None, class_weight=None, y=Y):
    return check_weights(sample_weight, ROWS.astype(np.float32), y, CLASSES, class_weight)


def test_weights_that_sum_to_next_to_nothing_are_noticed():
    with pytest.warns(UserWarning, match="weights of 20 rows sum to 1. Weights are counts"):
        warn_of_shares(np.full(20, 0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shares(np.full(20, 0.1))
        warn_of_shares(np.eye(20)[0])  # a single row that is there


def test_no_weights_are_ones():
    found = weights_of()
    assert found.dtype == np.float64
    assert found.tolist() == [1.0] * N


@pytest.mark.parametrize(
    "weights",
    [[1, 0, 2, 0.5, 3], np.array([1, 0, 2, 0.5, 3], np.float32), torch.tensor([1, 0, 2, 0.5, 3])],
    ids=["list", "float32", "tensor"],
)
def test_weights_of_every_kind(weights):
    assert weights_of(weights).tolist() == [1, 0, 2, 0.5, 3]
    assert weights_of(weights).dtype == np.float64


def test_one_number_for_all():
    assert weights_of(2.5).tolist() == [2.5] * N


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1, -0.1, 1, 1], "[Nn]egative"),
        ([0, 0, 0, 0, 0], "at least one non-zero number"),
        ([1, 2], r"shape == \(2,\), expected \(5,\)"),
        (np.ones((N, 2)), "1D array or scalar"),
        ([1, np.nan, 1, 1, 1], "NaN"),
        ([1, np.inf, 1, 1, 1], "infinity"),
    ],
    ids=["negative", "zero", "short", "2d", "nan", "inf"],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        weights_of(weights)


def test_class_weights_multiply_sample_weights():
    found = weights_of([1, 2, 3, 4, 5], {"a": 10.0, "b": 0.5})  # c keeps 1
    assert found.tolist() == [10, 1, 1.5, 4, 2.5]


def test_the_weights_passed_are_not_changed():
    weights = np.array([1.0, 2.0, 0.0, 4.0, 5.0])
    for class_weight in ({"a": 10.0, "b": 0.5}, "balanced"):
        weights_of(weights, class_weight)
        assert weights.tolist() == [1.0, 2.0, 0.0, 4.0, 5.0]


def test_balanced_classes_have_equal_weights():
    found = weights_of(class_weight="balanced")
    np.testing.assert_allclose(found, [5 / 3, 5 / 9, 5 / 9, 5 / 3, 5 / 9])


def test_balanced_counts_sample_weights_as_repetitions():
    counts = np.array([3, 1, 2, 1, 0])
    weighted = weights_of(counts, "balanced")
    repeated = check_weights(
        None, np.repeat(ROWS, counts, 0), np.repeat(Y, counts), CLASSES, "balanced"
    )
    per_row = [repeated[np.repeat(np.arange(N), counts) == i].sum() for i in range(N)]
    np.testing.assert_allclose(weighted, per_row)
    totals = [weighted[c == Y].sum() for c in "abc"]
    np.testing.assert_allclose(totals, 7 / 3)


@pytest.mark.filterwarnings("error")
def test_balanced_leaves_out_rows_of_weight_zero():
    # c stands in a row of no weight only: as if that row were absent.
    found = weights_of([1, 1, 1, 0, 2], "balanced")
    np.testing.assert_allclose(found, [2.5, 0.625, 0.625, 0, 1.25])


def test_a_dict_may_name_a_class_that_is_not_in_this_chunk():
    found = weights_of([1, 2, 3, 4, 5], {"a": 10.0, "d": 0.5})
    assert found.tolist() == [10, 2, 3, 4, 5]


def test_class_weight_of_a_class_that_does_not_exist():
    with pytest.raises(ValueError, match="not in class_weight"):
        weights_of(class_weight={"a": 1.0, "z": 2.0})


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_class_weights_that_are_none(value):
    with pytest.raises(ValueError, match="class_weight={'a'.*negative or not finite"):
        weights_of(class_weight={"a": value})


def test_a_chunk_is_not_balanced():
    with pytest.raises(ValueError, match="'balanced' is not supported for partial_fit"):
        check_incremental_class_weight("balanced")
    check_incremental_class_weight({"a": 2.0})
    check_incremental_class_weight(None)


def test_class_weights_of_zero_are_no_data():
    with pytest.raises(ValueError, match="All sample weights are zero.*positive weight"):
        weights_of(class_weight={"a": 0, "b": 0, "c": 0})


# ── names and devices


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("conv", ("conv",)),
        (("conv", "fc"), ("conv", "fc")),
        (["fc", "conv"], ("fc", "conv")),
        (np.array(["fc"]), ("fc",)),
    ],
)
def test_names(names, expected):
    assert check_names(names, {"conv": 1, "fc": 2}, "pathways") == expected


@pytest.mark.parametrize(
    ("names", "messages"),
    [
        ((), ["pathways=()", "one or more", "['conv', 'fc']"]),
        ("", ["unknown: ['']"]),
        (("conv", "conv"), ["different names"]),
        (("conv", "cnov"), ["unknown: ['cnov']", "['conv', 'fc']"]),
        ("cnov", ["pathways='cnov'", "unknown: ['cnov']"]),
        ((3,), ["unknown: [3]"]),
        ((["conv"],), ["unknown: [['conv']]"]),
    ],
)
def test_names_that_are_not_allowed(names, messages):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_names(names, {"conv": 1, "fc": 2}, "pathways")
    assert all(message in str(error.value) for message in messages)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected


def test_a_device_may_be_one_of_torch():
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["toaster", "", "meta", "mps", "cpu:x"])
def test_devices_that_are_not_supported(device):
    with pytest.raises(ValueError, match="is not supported; use 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        resolve_device(device)


def test_a_gpu_that_is_not_there():
    with pytest.warns(UserWarning, match="'cuda:99' was asked for.*the CPU is used"):
        assert resolve_device("cuda:99") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_no_gpu(device):
    with pytest.warns(UserWarning, match="this machine has 0 CUDA devices; the CPU is used"):
        assert resolve_device(device) == torch.device("cpu")


# ── distinct rows


def canonical(X, codes, weights):
    return distinct_rows(np.asarray(X, dtype=float), np.array(codes), np.asarray(weights, float))


def test_equal_rows_become_one_with_the_sum_of_their_weights():
    X, codes, weights = canonical([[1], [2], [1], [1], [3]], [0, 0, 0, 1, 0], [1, 2, 0.5, 4, 0])
    found = sorted(zip(X[:, 0], codes, weights, strict=True))
    assert found == [(1, 0, 1.5), (1, 1, 4), (2, 0, 2)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_of_another_sign_are_the_same(dtype):
    X = np.array([[0.0, 1.0], [-0.0, 1.0], [2.0, 0.0]], dtype)
    codes, weights = np.array([0, 0, 1]), np.ones(3)
    found, expected = distinct_rows(X, codes, weights), distinct_rows(X + 0, codes, weights)
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()
    assert sorted(found[2]) == [1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_order_and_repetition_of_rows_say_nothing(dtype):
    rng = np.random.default_rng(0)
    X, codes, counts = rng.normal(size=(50, 4)).astype(dtype), np.arange(50) % 3, np.arange(50) % 4
    expected = distinct_rows(X, codes, counts.astype(float))
    assert len(expected[0]) == (counts > 0).sum()
    rows = rng.permutation(np.repeat(np.arange(50), counts))
    found = distinct_rows(X[rows], codes[rows], np.ones(len(rows)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
