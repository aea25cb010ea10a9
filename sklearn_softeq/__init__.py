"""Soft-equivariant networks that learn their symmetry from data, for scikit-learn."""

from ._version import __version__
from .display import MarginalLikelihoodDisplay, SymmetryDisplay
from .estimators import SoftEquivariantClassifier
from .model_selection import marginal_likelihood_score
from .regression import SoftEquivariantRegressor

__all__ = [
    "MarginalLikelihoodDisplay",
    "SoftEquivariantClassifier",
    "SoftEquivariantRegressor",
    "SymmetryDisplay",
    "__version__",
    "marginal_likelihood_score",
]
