"""Of any data and parameters a fit makes a finite model, or an error that names what is wrong."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.layers import PATHWAYS

#: What an error of a fit may speak of: a parameter, or what was passed.
NAMED = (
    *SoftEquivariantClassifier().get_params(),
    "X ",
    "y ",
    "class",
    "sample",
    "weight",
    "array",
)

#: Nothing is kept from one run to the next: the cases are the same at each.
COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}

side = st.integers(1, 5)
shapes = st.one_of(
    st.tuples(side, side),
    st.tuples(st.integers(1, 3), side, side),
    st.tuples(st.integers(1, 12)),
)

dtypes = st.sampled_from(["f4", "f8", "f2", "u1", "i8", "?", ">f4"])

labels = st.sampled_from(
    [
        lambda codes: codes,
        lambda codes: codes.astype(str),
        lambda codes: codes.astype(float) * 2 - 1,
        lambda codes: codes % 2 == 0,
        lambda codes: np.array(["a", "bb", "ccc", "d"], dtype=object)[codes % 4],
        lambda codes: list(codes),
        lambda codes: codes + 0.5,  # refused, if there are several
        lambda codes: None,  # refused
    ]
)

weights = st.one_of(
    st.none(),
    st.sampled_from(
        [
            np.ones,
            lambda n: np.arange(n) % 3,
            lambda n: np.geomspace(1e-12, 1e12, n),
            lambda n: np.full(n, 1e-9),
            np.zeros,  # refused
            lambda n: -np.ones(n),  # refused
        ]
    ),
)

parameters = st.fixed_dictionaries(
    {
        "max_epochs": st.integers(1, 2),
        "width": st.integers(1, 3),
        "random_state": st.integers(0, 3),
        "pathways": st.lists(st.sampled_from(sorted(PATHWAYS)), min_size=1, max_size=3).map(tuple),
    },
    optional={
        "architecture": st.sampled_from(["auto", "paper", "resnet"]),
        "activation": st.sampled_from(["silu", "relu"]),
        "anchor_fraction": st.one_of(st.just("auto"), st.floats(0.05, 1.0)),
        "image_shape": st.sampled_from([None, (2, 2), (1, 3, 4), (0, 1)]),
        "standardize": st.booleans(),
        "learn_prior": st.booleans(),
        "learn_lengthscale": st.booleans(),
        "start": st.sampled_from(["symmetric", "joint"]),
        "prior_precision": st.floats(1e-6, 1e6),
        "burn_in": st.integers(1, 3),
        "evidence_every": st.integers(1, 3),
        "hyper_solver": st.sampled_from(["fixed_point", "adam"]),
        "hyper_warmup": st.integers(0, 3),
        "curvature": st.sampled_from(["auto", "exact", "rademacher", "monte_carlo"]),
        "curvature_samples": st.integers(1, 3),
        "curvature_subset": st.one_of(st.none(), st.integers(1, 20)),
        "kfac": st.sampled_from(["expand", "reduce"]),
        "keep_best": st.booleans(),
        "batch_size": st.one_of(st.just("auto"), st.integers(1, 20)),
        "lr": st.one_of(st.none(), st.floats(1e-6, 1e6)),
        "lr_schedule": st.sampled_from(["cooldown", "cosine", "constant"]),
        "optimizer": st.sampled_from(["kfac", "adam", "sgd"]),
        "augment": st.sampled_from([None, "crop_flip"]),
        "amp": st.sampled_from([None, "bf16"]),
        "predictive": st.sampled_from(["map", "laplace"]),
        "predictive_samples": st.one_of(st.none(), st.integers(1, 5)),
        "class_weight": st.sampled_from([None, "balanced", {0: 1e-12, 1: 1e12, 2: 1.0}]),
        "dtype": st.sampled_from(["auto", "float32", "float64"]),
    },
)

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "n_classes": st.integers(1, 5),
        "shape": shapes,
        "dtype": dtypes,
        "scale": st.sampled_from([1.0, 0.0, 1e-12, 1e4, 1e12]),
        "labels": labels,
        "weights": weights,
        "parameters": parameters,
    }
)


def data_of(case):
    rng = np.random.default_rng(0)
    n, dtype = case["n"], np.dtype(case["dtype"])
    codes = np.arange(n) % case["n_classes"]
    images = rng.normal(size=(n, *case["shape"])) + codes.reshape(-1, *[1] * len(case["shape"]))
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = case["scale"] * images
        limit = np.finfo(dtype).max if dtype.kind == "f" else 200 if dtype.kind == "u" else 2**40
        X = np.clip(scaled, 0 if dtype.kind == "u" else -limit, limit).astype(dtype)
    weights = case["weights"]
    return X, case["labels"](codes), None if weights is None else weights(n)


def error_of(fit, *data):
    """What a fit raises, of the kinds that it may raise; None where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit(*data)
        except (ValueError, TypeError) as error:
            return error
    return None


def holds(case):
    """A fit of the case ends as it should."""
    X, y, weights = data_of(case)
    clf = SoftEquivariantClassifier(**case["parameters"])
    error = error_of(clf.fit, X, y, weights)
    if error is not None:
        assert any(name in str(error) for name in NAMED), error
        assert not clf.__sklearn_is_fitted__()
        return
    assert all(torch.isfinite(weight).all() for weight in clf.module_.parameters())
    assert np.isfinite(clf.log_marginal_likelihood_value_)
    assert np.isfinite(clf.loss_curve_).all()
    assert len(clf.loss_curve_) == clf.n_iter_ == case["parameters"]["max_epochs"]
    assert np.isfinite(clf.effective_dimensions_).all()
    proba = clf.predict_proba(X)
    assert proba.shape == (len(X), len(clf.classes_))
    assert np.isfinite(proba).all()
    np.testing.assert_allclose(proba.sum(1), 1.0)
    np.testing.assert_allclose(clf.predict_proba(X[::-1]), proba[::-1], rtol=1e-4, atol=1e-7)
    assert np.isin(clf.predict(X), clf.classes_).all()


@settings(max_examples=15, **COMMON)
@given(cases)
def test_a_few_fits(case):
    holds(case)


@pytest.mark.slow
@settings(max_examples=500, **COMMON)
@given(cases)
def test_many_fits(case):
    holds(case)
