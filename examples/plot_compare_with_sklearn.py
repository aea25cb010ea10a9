"""
Beside classifiers of scikit-learn
==================================

The digits that scikit-learn ships, 8×8 pixels, upright and centred: a task without a symmetry to
speak of. How does a classifier that may learn one compare with those that know of none?
"""

# %%
# The candidates
# --------------
# Each is a step of a pipeline that scales the pixels to 0 … 1; one scale for all pixels, since a
# scale for each would destroy the symmetry that the first one looks for. The variable
# ``SOFTEQ_MAX_EPOCHS`` of the environment caps its epochs.

import os

from sklearn.ensemble import RandomForestClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC

from sklearn_softeq import SoftEquivariantClassifier

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "120"))


def to_unit(X):
    """Pixels from 0 … 16 to 0 … 1."""
    return X / 16


candidates = {
    classifier.__class__.__name__: make_pipeline(FunctionTransformer(to_unit), classifier)
    for classifier in (
        SoftEquivariantClassifier(max_epochs=MAX_EPOCHS, random_state=0),
        MLPClassifier(max_iter=500, random_state=0),
        RandomForestClassifier(random_state=0),
        SVC(),
    )
}

# %%
# Five folds
# ----------
# The same folds for each. Times are of one fit on four fifths of the 1797 images.

import warnings

from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_validate

X, y = load_digits(return_X_y=True)
folds = StratifiedKFold(5, shuffle=True, random_state=0)
print(f"{'classifier':26} {'accuracy':>8} {'± (folds)':>9} {'s per fit':>9}")
for name, pipeline in candidates.items():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = cross_validate(pipeline, X, y, cv=folds)
    scores, seconds = found["test_score"], found["fit_time"].mean()
    print(f"{name:26} {scores.mean():8.3f} {scores.std(ddof=1):9.3f} {seconds:9.1f}")
