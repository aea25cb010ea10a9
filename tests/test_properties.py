"""Of any data and parameters a fit makes a finite model, or an error that names what is wrong."""

import dis
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sklearn_softeq
from sklearn_softeq import SoftEquivariantClassifier, SoftEquivariantRegressor
from sklearn_softeq.layers import PATHWAYS

#: Where errors on purpose are raised.
OURS = tuple(str(Path(package.__file__).parent) for package in (sklearn_softeq, sklearn))

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


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


dtypes = st.sampled_from(["f4", "f8", "f2", "u1", "i8", "?", ">f4"])


def mostly(good, bad):
    """One of the good ones in nine of ten cases."""
    return st.integers(0, 9).flatmap(lambda i: st.sampled_from(bad if i == 9 else good))


labels = mostly(
    [
        lambda codes: codes,
        lambda codes: codes.astype(str),
        lambda codes: codes.astype(float) * 2 - 1,
        lambda codes: codes % 2 == 0,
        lambda codes: np.array(["a", "bb", "ccc", "d"], dtype=object)[codes % 4],
        lambda codes: list(codes),
    ],
    [lambda codes: codes + 0.5, lambda codes: None],
)

numbers = mostly(
    [
        lambda codes: codes + np.sin(np.arange(len(codes))),
        lambda codes: codes,
        lambda codes: 1e12 * codes,
        lambda codes: 1e-12 * np.arange(len(codes)),
        lambda codes: np.full(len(codes), 7.0),
        lambda codes: codes[:, None] + 0.5,
        lambda codes: np.stack([codes, np.cos(np.arange(len(codes)))], 1),
        lambda codes: codes.astype(">f4"),
    ],
    [lambda codes: codes.astype(str), lambda codes: codes / 0.0, lambda codes: None],
)

layouts = st.sampled_from(
    [
        lambda X: X,
        np.asfortranarray,
        lambda X: np.repeat(X, 2, 0)[::2],
        lambda X: X[::-1].copy()[::-1],
        read_only,
    ]
)

weights = mostly(
    [
        lambda n: None,
        np.ones,
        lambda n: np.arange(1, n + 1) % 3,
        lambda n: np.geomspace(1e-12, 1e12, n),
        lambda n: np.full(n, 1e-9),
    ],
    [np.zeros, lambda n: -np.ones(n)],
)

ALWAYS = {
    "max_epochs": st.integers(1, 2),
    "width": st.integers(1, 3),
    "random_state": st.integers(0, 3),
    "pathways": st.lists(
        st.sampled_from(sorted(PATHWAYS)), min_size=1, max_size=3, unique=True
    ).map(tuple),
}
OFTEN = {
    "architecture": st.sampled_from(["auto", "paper", "resnet"]),
    "activation": st.sampled_from(["silu", "relu"]),
    "anchor_fraction": st.one_of(st.just("auto"), st.floats(0.05, 1.0)),
    "image_shape": mostly([None], [(2, 2), (1, 3, 4), (0, 1)]),
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
    "predictive_temperature": st.floats(1e-6, 1e3),
    "dtype": st.sampled_from(["auto", "float32", "float64"]),
}
OF_CLASSES = {
    "predictive_samples": st.one_of(st.none(), st.integers(1, 5)),
    "class_weight": st.sampled_from([None, "balanced", {0: 1e-12, 1: 1e12, 2: 1.0}]),
}
OF_NUMBERS = {"noise": st.one_of(st.just("learned"), st.floats(1e-9, 1e9))}


def cases_of(estimator, targets, options):
    return st.fixed_dictionaries(
        {
            "estimator": st.just(estimator),
            "n": st.integers(1, 40),
            "n_classes": st.integers(1, 5),
            "shape": shapes,
            "dtype": dtypes,
            "layout": layouts,
            "scale": st.sampled_from([1.0, 0.0, 1e-12, 1e4, 1e12]),
            "targets": targets,
            "weights": weights,
            "parameters": st.fixed_dictionaries(ALWAYS, optional=OFTEN | options),
        }
    )


each_estimator = pytest.mark.parametrize(
    "cases",
    [
        cases_of(SoftEquivariantClassifier, labels, OF_CLASSES),
        cases_of(SoftEquivariantRegressor, numbers, OF_NUMBERS),
    ],
    ids=["classifier", "regressor"],
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
    with np.errstate(divide="ignore", invalid="ignore"):
        y = case["targets"](codes)
    return case["layout"](X), y, case["weights"](n)


def error_of(fit, *data):
    """What a fit raises, of the kinds that it may raise; None where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit(*data)
        except (ValueError, TypeError) as error:
            return error
    return None


def on_purpose(error):
    """Whether a ``raise`` of this package or of scikit-learn's brought it up.

    What NumPy or torch say of arrays that a user has never seen comes out of a call.
    """
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and code.co_filename.startswith(OURS)


def holds(case):
    """A fit of the case ends as it should."""
    X, y, weights = data_of(case)
    estimator = case["estimator"](**case["parameters"])
    error = error_of(estimator.fit, X, y, weights)
    if error is not None:
        assert on_purpose(error), error
        assert not estimator.__sklearn_is_fitted__()
        return
    assert all(torch.isfinite(weight).all() for weight in estimator.module_.parameters())
    assert np.isfinite(estimator.log_marginal_likelihood_value_)
    assert np.isfinite(estimator.loss_curve_).all()
    assert len(estimator.loss_curve_) == estimator.n_iter_ == case["parameters"]["max_epochs"]
    assert np.isfinite(estimator.effective_dimensions_).all()
    PREDICTS[case["estimator"]](estimator, X, y)


def predicts_classes(clf, X, y):
    proba = clf.predict_proba(X)
    assert proba.shape == (len(X), len(clf.classes_))
    assert np.isfinite(proba).all()
    np.testing.assert_allclose(proba.sum(1), 1.0)
    np.testing.assert_allclose(clf.predict_proba(X[::-1]), proba[::-1], rtol=1e-4, atol=1e-7)
    assert np.isin(clf.predict(X), clf.classes_).all()


def predicts_numbers(reg, X, y):
    laplace = reg.predictive == "laplace"
    found = reg.predict(X, return_std=True) if laplace else (reg.predict(X), reg.noise_std_)
    assert found[0].shape == np.shape(y)
    assert all(np.isfinite(numbers).all() for numbers in found)
    assert (found[1] >= 0).all()
    scale = np.abs(np.asarray(y, dtype=float)).max()
    np.testing.assert_allclose(reg.predict(X[::-1]), found[0][::-1], rtol=1e-4, atol=1e-6 * scale)


PREDICTS = {
    SoftEquivariantClassifier: predicts_classes,
    SoftEquivariantRegressor: predicts_numbers,
}


@each_estimator
def test_a_few_fits(cases):
    settings(max_examples=10, **COMMON)(given(cases)(holds))()


@pytest.mark.slow
@each_estimator
def test_many_fits(cases):
    settings(max_examples=500, **COMMON)(given(cases)(holds))()
