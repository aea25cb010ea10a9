"""A fitted estimator without the pathways that are of no use any more."""

import copy
import time
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from sklearn.utils import Bunch, check_scalar

from .symmetry import dimension_shares, enabled_table, shares

__all__ = ["simplified"]

N_TIMINGS = 3


def simplified(clf: Any, X, threshold: float, tol: float) -> Any:
    """A copy of a fitted estimator without its idle pathways.

    See :meth:`SoftEquivariantClassifier.simplify`.
    """
    check_scalar(threshold, "threshold", Real, min_val=0, max_val=1)
    check_scalar(tol, "tol", Real, min_val=0)
    if not np.isfinite([threshold, tol]).all():
        raise ValueError(f"threshold={threshold} and tol={tol} have to be finite numbers.")
    places = _idle(clf, threshold)
    removed = [(clf.layer_names_[i], clf.pathway_names_[j]) for i, j in places]
    simple = _twin(clf)
    simple.net_.discard(removed)
    _take_out(places, simple)
    (before, slow), (after, fast) = (_timed(c._compared, X) for c in (clf, simple))
    change = float(np.abs(after - before).max())
    if change > tol:
        raise ValueError(
            f"Without the pathways below threshold={threshold} {clf._said_to_change} changes by "
            f"{change:.2g}, more than tol={tol}. Lower the threshold, or accept it with a "
            "larger tol."
        )
    n_weights = tuple(sum(w.numel() for w in c.module_.parameters()) for c in (clf, simple))
    simple.simplification_ = Bunch(
        removed=removed, change=change, n_weights=n_weights, seconds=(slow, fast)
    )
    return simple


def _twin(clf: Any) -> Any:
    """A deep copy with the moments of the optimizer, which ``copy`` leaves out as a pickle does."""
    twin = object.__new__(type(clf))
    vars(twin).update(copy.deepcopy(vars(clf)))
    return twin


def _idle(clf: Any, threshold: float) -> list[tuple[int, int]]:
    """Places (layer, pathway) in the tables of what was removed, or is below the threshold.

    Each layer keeps the pathway that gives most of its output, and what is held back for a release
    that is still to come.
    """
    enabled = enabled_table(clf.module_, clf.pathway_names_)
    kept = np.maximum(clf.symmetry_, clf.output_share_) >= threshold
    kept[np.arange(len(kept)), np.where(enabled, clf.output_share_, -1.0).argmax(1)] = True
    return [
        (i, j)
        for i, layer in enumerate(clf.module_.layers.values())
        for j, name in enumerate(clf.pathway_names_)
        if name in layer.enabled and (layer.removed(name) or (enabled[i, j] and not kept[i, j]))
    ]


def _take_out(places: list[tuple[int, int]], clf: Any) -> None:
    """Take pathways out of the fitted attributes."""
    for place in places:
        clf.prior_precision_[place] = np.inf
        for table in (clf.effective_dimensions_, clf.n_weights_, clf.output_share_):
            table[place] = 0
    enabled = enabled_table(clf.module_, clf.pathway_names_)
    clf.output_share_ = shares(clf.output_share_, enabled)
    clf.symmetry_, clf.symmetry_per_weight_ = dimension_shares(
        clf.effective_dimensions_, clf.n_weights_, enabled
    )
    left = dict(clf.module_.named_parameters())
    if "posterior_" in vars(clf):
        clf.posterior_ = clf.posterior_.keep(left)
    for name in clf.prior_precisions_by_name_.keys() - left.keys():
        clf.prior_precisions_by_name_[name] = np.inf
    lengthscales = clf.lengthscales_by_name_.items()
    clf.lengthscales_by_name_ = {n: value for n, value in lengthscales if f"{n}.weight" in left}


def _timed(predict: Callable[[Any], np.ndarray], X) -> tuple[np.ndarray, float]:
    """What is predicted, and the shortest of some times that it took."""
    seconds = []
    for _ in range(N_TIMINGS):
        start = time.perf_counter()
        found = predict(X)
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)
