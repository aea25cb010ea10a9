"""Choosing between fits with scikit-learn's own searches."""

from typing import Any

from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

__all__ = ["marginal_likelihood_score"]


def marginal_likelihood_score(estimator: Any, X: Any = None, y: Any = None) -> float:
    """Log marginal likelihood per observation of a fit, as a scorer for searches.

    It is that of the data of the fit itself and needs no others, so that a search can do with a
    single fit of each candidate, to all rows. **It is no safe judge**: it compares precisions and
    pathways within one start, and can rank networks of other form, starts or settings wrongly. A
    hold-out of a tenth of the rows, scored by ``"neg_log_loss"`` or ``"r2"``, is (see "When to
    trust the evidence" in the user guide).

    Parameters
    ----------
    estimator : SoftEquivariantClassifier, SoftEquivariantRegressor or Pipeline
        A fitted one; of a pipeline the last step counts.
    X, y : ignored
        What scikit-learn passes to a scorer.

    Returns
    -------
    float
        ``log_marginal_likelihood_value_ / n_observations_``, in nats; more is better.

    Raises
    ------
    NotFittedError
        If it is not fitted.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn_softeq import SoftEquivariantClassifier, marginal_likelihood_score
    >>> X, y = load_digits(return_X_y=True)
    >>> rows = np.arange(len(X))
    >>> search = GridSearchCV(
    ...     SoftEquivariantClassifier(random_state=0),
    ...     {"pathways": ["conv", "factored_fc", ("conv", "factored_fc")]},
    ...     scoring=marginal_likelihood_score,
    ...     cv=[(rows, rows[:1])],  # all rows; the second part is not looked at
    ... )
    >>> search.fit(X, y).best_params_  # doctest: +SKIP
    {'pathways': ('conv', 'factored_fc')}
    """
    last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    check_is_fitted(last)
    return last.log_marginal_likelihood_value_ / last.n_observations_
