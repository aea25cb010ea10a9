"""Searches of scikit-learn, with its scorers and with the evidence."""

import numpy as np
import pytest
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_softeq import (
    SoftEquivariantClassifier,
    SoftEquivariantRegressor,
    marginal_likelihood_score,
)

SHORT = {"max_epochs": 8, "width": 2, "burn_in": 2, "evidence_every": 2, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:120], y[:120]


def test_the_score_is_the_evidence_of_each_observation(digits):
    X, y = digits
    clf = SoftEquivariantClassifier(**SHORT).fit(X, y, sample_weight=np.full(len(y), 2.0))
    expected = clf.log_marginal_likelihood_value_ / 240
    assert marginal_likelihood_score(clf) == expected
    assert marginal_likelihood_score(clf, X[:3], y[:3]) == expected


def test_what_is_not_fitted_has_no_score():
    with pytest.raises(NotFittedError):
        marginal_likelihood_score(SoftEquivariantClassifier())
    with pytest.raises(NotFittedError):
        marginal_likelihood_score(make_pipeline(FunctionTransformer(), SoftEquivariantClassifier()))


def test_what_stands_around_an_estimator_is_looked_into(digits):
    X, y = digits
    clf = SoftEquivariantClassifier(**SHORT)
    model = make_pipeline(FunctionTransformer(), clf)
    for search in (GridSearchCV(model, {}, cv=2), HalvingGridSearchCV(model, {}, cv=2)):
        outer = make_pipeline(FunctionTransformer(), search).fit(X, y)
        expected = marginal_likelihood_score(search.best_estimator_[-1])
        assert marginal_likelihood_score(outer) == marginal_likelihood_score(search) == expected
    reg = TransformedTargetRegressor(SoftEquivariantRegressor(**SHORT), func=abs, inverse_func=abs)
    reg.fit(X, y)
    assert marginal_likelihood_score(reg) == marginal_likelihood_score(reg.regressor_)


def test_what_is_kept_by_no_search_or_not_fitted_within_has_no_score(digits):
    search = GridSearchCV(SoftEquivariantClassifier(**SHORT), {}, cv=2, refit=False)
    for model in (search, TransformedTargetRegressor(SoftEquivariantRegressor())):
        with pytest.raises(NotFittedError):
            marginal_likelihood_score(model)
    with pytest.raises(NotFittedError):
        marginal_likelihood_score(search.fit(*digits))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (LogisticRegression(), "LogisticRegression"),
        (make_pipeline(FunctionTransformer(), LogisticRegression()), "LogisticRegression"),
        (make_pipeline(FunctionTransformer(), "passthrough"), "str"),
        (None, "NoneType"),
        (SoftEquivariantClassifier, "type"),
    ],
)
def test_anything_else_is_a_type_error(model, name):
    said = f"SoftEquivariantRegressor, or a Pipeline.*not a {name}, which"
    with pytest.raises(TypeError, match=said):
        marginal_likelihood_score(model)


def test_a_search_by_the_evidence_takes_the_best_one(digits):
    X, y = digits
    model = make_pipeline(FunctionTransformer(np.sqrt), SoftEquivariantClassifier(**SHORT))
    rows = np.arange(len(X))
    grid = {"softequivariantclassifier__prior_precision": [1.0, 1e4]}
    options = {"scoring": marginal_likelihood_score, "cv": [(rows, rows[:1])]}
    search = GridSearchCV(model, grid, **options).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    assert search.best_score_ == scores.max() > scores.min()
    # The one fit that scored was to all rows, as the one that is kept.
    assert marginal_likelihood_score(search.best_estimator_) == search.best_score_


def test_a_small_hold_out_is_enough_for_a_search(digits):
    split = StratifiedShuffleSplit(1, test_size=0.5, random_state=0)
    grid = {"max_epochs": [1, 30]}
    search = GridSearchCV(
        SoftEquivariantClassifier(**SHORT), grid, scoring="neg_log_loss", cv=split
    ).fit(*digits)
    assert search.n_splits_ == 1
    assert search.best_params_ == {"max_epochs": 30}


def test_epochs_are_a_resource(digits):
    search = HalvingGridSearchCV(
        SoftEquivariantClassifier(**SHORT),
        {"pathways": ["conv", "factored_fc", "fc"]},
        resource="max_epochs",
        min_resources=2,
        max_resources=8,
        factor=2,
        cv=2,
        random_state=0,
    ).fit(*digits)
    assert search.n_resources_ == [2, 4]
    assert search.n_candidates_ == [3, 2]
    assert search.best_estimator_.max_epochs == 4
    assert search.predict(digits[0]).shape == (120,)
