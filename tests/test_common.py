"""scikit-learn's own checks, all of them, on the default estimators and on sets of pathways."""

from unittest import SkipTest

import pytest
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from sklearn_softeq import SoftEquivariantClassifier, SoftEquivariantRegressor

# A classifier with predict_proba, sample_weight and class_weight; a regressor of several numbers.
N_CHECKS = {SoftEquivariantClassifier: 63, SoftEquivariantRegressor: 60}


def statuses(estimator):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert len(results) >= N_CHECKS[type(estimator)]
    return {
        f"{result['check_name']}: {result['status']}: {result['exception']}"
        for result in results
        if result["status"] != "passed"
    }


def names(lines):
    return {line.split(":")[0] for line in lines}


#: 63 checks fit more than a hundred times; those of the defaults have their budget and width.
SHORT = {"max_epochs": 20, "evidence_every": 10, "width": 4}


def test_check_estimator():
    quick = {**SHORT, "batch_size": 64}
    assert statuses(SoftEquivariantClassifier(**quick)) == set()


# Each check by itself: all in one, the regressor's would be by far the longest of all tests.
@pytest.mark.slow
@parametrize_with_checks([SoftEquivariantClassifier(), SoftEquivariantRegressor()])
def test_check_default(estimator, check):
    try:
        check(estimator)
    except SkipTest as reason:
        pytest.fail(f"skipped: {reason}")


@pytest.mark.slow
def test_check_estimator_laplace():
    assert statuses(SoftEquivariantClassifier(**SHORT, predictive="laplace")) == set()


# Rows of f features are images of one row, for a group with quarter turns on a square canvas: f²
# pixels, at which a network of few channels must do.
SUMS = [
    {"pathways": ("sparse_fc",), "anchor_fraction": 1.0},
    {"pathways": ("conv", "fc", "factored_fc")},
    {
        "pathways": ("conv", "sparse_conv", "fc", "factored_fc", "sparse_fc", "pm_conv"),
        "width": 2,
    },
]


OTHERS = [
    {"start": "joint"},
    {"learn_prior": False},
    {"optimizer": "adam"},
    {"architecture": "resnet"},
    {
        "pathways": ("conv", "sparse_conv", "sparse_fc"),
        "anchor_fraction": 1.0,
        "learn_lengthscale": True,
    },
]
# On rows of two features a strict convolution network is a symmetric function of the two, and the
# blobs of check_classifiers_train cannot be told apart by one.
SYMMETRIC = [
    {"pathways": "conv"},
    {"pathways": "p4m_conv", "width": 2},
    {"pathways": "sparse_fc"},  # one anchor for two pixels
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*SUMS, *OTHERS], ids=str)
def test_check_estimator_options(options):
    assert statuses(SoftEquivariantClassifier(**{**SHORT, **options})) == set()


@pytest.mark.slow
@pytest.mark.parametrize("options", SYMMETRIC, ids=str)
def test_check_estimator_symmetric_in_two_features(options):
    failed = names(statuses(SoftEquivariantClassifier(**{**SHORT, **options})))
    assert failed <= {"check_classifiers_train"}


# ── the regressor


def test_check_regressor():
    # About the quickest there is: the checks are of forms and repetitions, and of an R² of .5.
    quick = {"pathways": "factored_fc", "width": 2, "max_epochs": 12, "evidence_every": 6}
    assert statuses(SoftEquivariantRegressor(**quick, batch_size=64)) == set()


REGRESSORS = [
    {**SHORT, "predictive": "laplace"},
    {**SHORT, "pathways": ("conv", "sparse_fc", "fc")},
    {**SHORT, "start": "joint", "learn_prior": False, "optimizer": "adam", "noise": 0.5},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", REGRESSORS, ids=str)
def test_check_regressor_options(options):
    assert statuses(SoftEquivariantRegressor(**options)) == set()
