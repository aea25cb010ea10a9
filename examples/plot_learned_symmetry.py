"""
Learned symmetry of each layer
==============================

The same images of digits make two tasks. In one the label is the digit, so that a shift of the
image changes nothing. In the other it is the digit and the quadrant in which it stands, so that a
shift changes the answer. What does the classifier, which is not told, make of them?

The budget is small; ``examples/demo.py`` gives both tasks up to 400 epochs.
"""

# %%
# The tasks
# ---------
# An 8×8 digit stands in a random quadrant of a 16×16 canvas. The variable ``SOFTEQ_MAX_EPOCHS`` of
# the environment changes the budget.

import os

from sklearn_softeq.datasets import load_digit_tasks

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "80"))
tasks = {name: load_digit_tasks(task=name, n_train=600) for name in ("digit", "quadrant")}

# %%
# Two fits
# --------
# First the convolutions alone, and all pathways together, have a trial on a part of the rows. Where
# the convolutions win, "p1", training begins with them, and the free pathways join in at zero; else
# all begin together, "joint". The warning that the evidence had not settled is true here, and left
# aside.

import warnings

from sklearn.exceptions import ConvergenceWarning

from sklearn_softeq import SoftEquivariantClassifier

fitted = {}
for name, data in tasks.items():
    clf = SoftEquivariantClassifier(max_epochs=MAX_EPOCHS, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted[name] = clf.fit(data.X_train, data.y_train)
    accuracy = clf.score(data.X_test, data.y_test)
    evidence = clf.log_marginal_likelihood_value_ / clf.n_observations_
    print(f"{name}, start {clf.start_}: held-out accuracy {accuracy:.3f}, ", end="")
    print(f"log evidence {evidence:.3f} nats per image")

# %%
# What each layer uses
# --------------------
# The share of each pathway in the effective dimensions of its layer. On the first task the free
# pathway's should be small in every layer; on the second one or more layers need it.

import matplotlib.pyplot as plt

from sklearn_softeq import MarginalLikelihoodDisplay, SymmetryDisplay

for name, clf in fitted.items():
    SymmetryDisplay.from_estimator(clf, name=f"task {name!r}")

# %%
# What each layer does
# --------------------
# The distance between "shift, then layer" and "layer, then shift", in units of the layer's output.

for name, clf in fitted.items():
    error = clf.equivariance_error(tasks[name].X_test)
    by_layer = ", ".join(f"{value:.3f}" for value in error.layers)
    print(f"{name}: {by_layer} by layer, {error.logits:.3f} for the logits")

# %%
# How the evidence rose
# ---------------------
# The fit pays for the capacity that it uses.

MarginalLikelihoodDisplay.from_estimator(fitted["quadrant"], name="task 'quadrant'")
plt.show()
