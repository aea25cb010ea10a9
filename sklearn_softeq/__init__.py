"""Soft-equivariant classification that learns its symmetry from data, for scikit-learn."""

from ._version import __version__
from .display import MarginalLikelihoodDisplay, SymmetryDisplay
from .estimators import SoftEquivariantClassifier
from .model_selection import marginal_likelihood_score

__all__ = [
    "MarginalLikelihoodDisplay",
    "SoftEquivariantClassifier",
    "SymmetryDisplay",
    "__version__",
    "marginal_likelihood_score",
]
