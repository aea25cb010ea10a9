"""Data at the edge of what there is: a fit ends in a finite model or in an error that says why."""

import copy
import re

import joblib
import numpy as np
import pytest
import torch

from sklearn_softeq import SoftEquivariantClassifier

SHORT = {"max_epochs": 3, "burn_in": 1, "evidence_every": 1, "width": 2, "random_state": 0}

#: What an error of training says: which part left the finite numbers, and what to do.
SAID = "became (nan|inf|infinite).*Lower lr, keep standardize=True, or look for values of extreme"

#: The default one is asked in the quick tests.
each_optimizer = pytest.mark.parametrize(
    "optimizer",
    [
        "kfac",
        pytest.param("adam", marks=pytest.mark.slow),
        pytest.param("sgd", marks=pytest.mark.slow),
    ],
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def images_of(n=40, shape=(4, 4), dtype=np.float32, n_classes=2):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % n_classes
    images = rng.normal(size=(n, *shape)) + labels.reshape(-1, *[1] * len(shape))
    return images.astype(dtype), labels


def assert_finite(clf, X):
    """A fitted model all of whose numbers are finite."""
    assert all(torch.isfinite(weight).all() for weight in clf.module_.parameters())
    for name in ("log_marginal_likelihood_value_", "evidence_linear_term_", "loss_curve_"):
        assert np.isfinite(getattr(clf, name)).all(), name
    assert np.isfinite(clf.effective_dimensions_).all()
    np.testing.assert_allclose(clf.symmetry_.sum(1), 1.0)
    for predictive in {"map", clf.predictive}:
        proba = clf.set_params(predictive=predictive).predict_proba(X)
        assert np.isfinite(proba).all()
        assert (proba >= 0).all()
        np.testing.assert_allclose(proba.sum(1), 1.0)
        assert set(clf.predict(X)) <= set(clf.classes_)


def assert_finite_or_refused(clf, X, y, refused=True):
    """Either of them, if the data may be refused."""
    try:
        clf.fit(X, y)
    except ValueError as error:
        if not refused or not re.search(SAID, str(error)):
            raise
        assert not clf.__sklearn_is_fitted__()
    else:
        assert_finite(clf, X)


@each_optimizer
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scales_of_the_images(scale, dtype, standardize, optimizer):
    X, y = images_of(dtype=dtype)
    X = X * dtype(scale)
    settings = {**SHORT, "standardize": standardize, "optimizer": optimizer}
    clf = SoftEquivariantClassifier(**settings, predictive="laplace")
    if standardize or scale < 1:
        assert_finite(clf.fit(X, y), X)
    else:
        assert_finite_or_refused(clf, X, y)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scales_make_no_difference_to_standardised_images(scale):
    X, y = images_of(dtype=np.float64)
    proba = [
        SoftEquivariantClassifier(**SHORT).fit(c * X, y).predict_proba(c * X) for c in (1, scale)
    ]
    np.testing.assert_allclose(*proba, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e12, 1e-30])
@pytest.mark.parametrize("standardize", [True, False])
def test_constant_images(value, standardize):
    X, y = images_of()
    X[:] = value
    clf = SoftEquivariantClassifier(**{**SHORT, "standardize": standardize}, predictive="laplace")
    assert_finite_or_refused(clf, X, y, refused=not standardize and abs(value) > 1)
    if clf.__sklearn_is_fitted__():
        assert len(np.unique(clf.predict_proba(X), axis=0)) == 1


def test_constant_channels_beside_others():
    X, y = images_of(shape=(3, 4, 4))
    X[:, 1] = 7.0
    clf = SoftEquivariantClassifier(**SHORT).fit(X, y)
    assert_finite(clf, X)
    assert clf.channel_scale_[1] == 1.0
    with pytest.warns(UserWarning, match="a channel of the images did not vary"):
        clf = SoftEquivariantClassifier(**SHORT).partial_fit(X, y, np.unique(y))
    assert clf.channel_scale_[1] == 7.0  # the size of what may vary later


@pytest.mark.parametrize("conflicting", [False, True])
def test_rows_that_are_all_the_same(conflicting):
    X, y = images_of()
    X[:] = X[0]
    y = y if conflicting else np.zeros_like(y)
    clf = SoftEquivariantClassifier(**SHORT).fit(X, y)
    assert_finite(clf, X)
    assert clf.n_observations_ == 40


@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 1), (1,)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_images_of_a_pixel(shape, n):
    X, y = images_of(n, shape)
    clf = SoftEquivariantClassifier(**SHORT, predictive="laplace").fit(X, y)
    assert_finite(clf, X)


@pytest.mark.parametrize("n_classes", [1, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_two_images_and_one(n, n_classes):
    X, y = images_of(n, n_classes=n_classes)
    assert_finite(SoftEquivariantClassifier(**SHORT, predictive="laplace").fit(X, y), X)


@pytest.mark.parametrize("y", ["one", 3, True, -1.0], ids=repr)
def test_labels_of_one_class(y):
    X, _ = images_of()
    clf = SoftEquivariantClassifier(**SHORT).fit(X, [y] * len(X))
    assert_finite(clf, X)
    np.testing.assert_array_equal(clf.predict(X), [y] * len(X))
    assert clf.log_marginal_likelihood_value_ <= 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%:UserWarning")
def test_a_thousand_classes_of_an_image_or_two_each():
    X, y = images_of(1200, n_classes=1000)
    clf = SoftEquivariantClassifier(**{**SHORT, "max_epochs": 1, "burn_in": 1}).fit(X, y)
    assert_finite(clf, X[:50])
    assert clf.predict_proba(X[:3]).shape == (3, 1000)


@each_optimizer
@pytest.mark.parametrize("weights", [(1e-12, 1e12), (1e12, 1e12), (1e-12, 1e-12), (0.0, 1e12)])
def test_class_weights_of_any_size(weights, optimizer):
    X, y = images_of()
    settings = {**SHORT, "optimizer": optimizer, "class_weight": dict(enumerate(weights))}
    clf = SoftEquivariantClassifier(**settings).fit(X, y)
    assert_finite(clf, X)
    assert clf.n_observations_ == pytest.approx(20 * sum(weights))


@each_optimizer
def test_sample_weights_of_all_sizes(optimizer):
    X, y = images_of()
    weights = np.geomspace(1e-12, 1e12, len(X))
    clf = SoftEquivariantClassifier(**SHORT, optimizer=optimizer).fit(X, y, weights)
    assert_finite(clf, X)


# ── arrays in any place


def read_only(X, folder):
    X = X.copy()
    X.flags.writeable = False
    return X


def memory_mapped(X, folder):
    joblib.dump(X, folder / "X.joblib")
    found = joblib.load(folder / "X.joblib", mmap_mode="r")
    assert isinstance(found, np.memmap)
    return found


ARRAYS = {
    "read-only": read_only,
    "memory-mapped": memory_mapped,
    "Fortran": lambda X, folder: np.asfortranarray(X),
    "strided": lambda X, folder: np.repeat(X, 2, axis=0)[::2],
    "reversed": lambda X, folder: X[:, ::-1].copy()[:, ::-1],
    "big-endian": lambda X, folder: X.astype(X.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_layout(tmp_path, make):
    X, y = images_of()
    expected = SoftEquivariantClassifier(**SHORT).fit(X, y)
    given = make(X, tmp_path)
    weights = read_only(np.ones(len(X)), tmp_path)
    clf = SoftEquivariantClassifier(**SHORT).fit(given, read_only(y, tmp_path), weights)
    np.testing.assert_array_equal(clf.predict_proba(given), expected.predict_proba(X))


# ── many fits at once


def fitted_proba(seed):
    X, y = images_of()
    settings = {**SHORT, "random_state": seed, "batch_size": 16}
    return SoftEquivariantClassifier(**settings).fit(X, y).predict_proba(X)


@pytest.mark.parametrize(
    "backend",
    ["threading", pytest.param("loky", marks=pytest.mark.slow)],  # new processes
)
def test_fits_at_once_are_those_one_after_the_other(backend):
    jobs = [joblib.delayed(fitted_proba)(seed % 2) for seed in range(4)]
    expected = [fitted_proba(seed % 2) for seed in range(2)] * 2
    for found, proba in zip(joblib.Parallel(2, backend=backend)(jobs), expected, strict=True):
        np.testing.assert_allclose(found, proba, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pathways", ["conv", ("conv", "sparse_conv", "sparse_fc")], ids=str)
def test_one_model_is_asked_by_many_threads(pathways):
    X, y = images_of()
    clf = SoftEquivariantClassifier(**SHORT, pathways=pathways, predictive="laplace").fit(X, y)
    mode = copy.copy(clf).set_params(predictive="map")  # with the same network
    mode.net_ = clf.net_
    asked = (clf.predict_proba, mode.predict_proba, lambda X: clf.equivariance_error(X).layers)
    expected = [ask(X) for ask in asked]
    jobs = [joblib.delayed(ask)(X) for ask in asked] * 5
    found = joblib.Parallel(4, backend="threading")(jobs)
    for answer, before in zip(found, expected * 5, strict=True):
        np.testing.assert_array_equal(answer, before)
