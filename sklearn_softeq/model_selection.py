"""Choosing between fits with scikit-learn's own searches."""

from typing import Any

from sklearn.compose import TransformedTargetRegressor
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from .base import SoftEquivariantBase

__all__ = ["fitted_within", "marginal_likelihood_score"]


def marginal_likelihood_score(estimator: Any, X: Any = None, y: Any = None) -> float:
    """Log marginal likelihood per observation of a fit, as a scorer for searches.

    It is that of the data of the fit itself and needs no others, so that a search can do with a
    single fit of each candidate, to all rows. **It is no safe judge**: it compares precisions and
    pathways within one start, and can rank networks of other form, starts or settings wrongly. A
    hold-out of a fifth of the rows, scored by ``"neg_log_loss"`` or ``"r2"``, is (see "When to
    trust the evidence" in the user guide).

    Parameters
    ----------
    estimator : SoftEquivariantClassifier or SoftEquivariantRegressor
        A fitted one; or a Pipeline, whose last step counts, a search such as GridSearchCV, whose
        best estimator does, or a TransformedTargetRegressor with one within.
    X, y : ignored
        What scikit-learn passes to a scorer.

    Returns
    -------
    float
        ``log_marginal_likelihood_value_ / n_observations_``, in nats; more is better.

    Raises
    ------
    NotFittedError
        If it is not fitted, or a search has kept no best estimator (``refit=False``).
    TypeError
        If it is something else.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_softeq import SoftEquivariantClassifier, marginal_likelihood_score
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SoftEquivariantClassifier(max_epochs=5, random_state=0).fit(X[:300], y[:300])
    >>> marginal_likelihood_score(clf)  # doctest: +SKIP
    -3.1
    """
    inner = fitted_within(estimator, "marginal_likelihood_score")
    return inner.log_marginal_likelihood_value_ / inner.n_observations_


def fitted_within(estimator: Any, asks: str) -> SoftEquivariantBase:
    """The estimator of this package that one of scikit-learn's has within.

    Parameters
    ----------
    estimator : estimator
        One of this package, a Pipeline, a search or a TransformedTargetRegressor.
    asks : str
        What it is for, in errors.

    Raises
    ------
    NotFittedError
        If it is not fitted, or a search has kept no best estimator.
    TypeError
        If there is none.
    """
    inner = _within(estimator)
    if not isinstance(inner, SoftEquivariantBase):
        raise TypeError(
            f"{asks} takes a SoftEquivariantClassifier or a SoftEquivariantRegressor, or a "
            "Pipeline, a search or a TransformedTargetRegressor with one within, but not a "
            f"{type(inner).__name__}, which has no evidence."
        )
    check_is_fitted(inner)
    return inner


def _within(estimator: Any) -> Any:
    """What is trained in the end."""
    match estimator:
        case Pipeline():
            return _within(estimator[-1])
        case BaseSearchCV():
            check_is_fitted(estimator, "best_estimator_")
            return _within(estimator.best_estimator_)
        case TransformedTargetRegressor():
            check_is_fitted(estimator, "regressor_")
            return _within(estimator.regressor_)
    return estimator
