"""
Which symmetry?
===============

Images that lie in any of four orientations make two tasks. In one the label is the digit: a quarter
turn changes nothing. In the other it is the digit and the turn: a quarter turn changes the answer.
Each layer may share its filters over quarter turns (``p4_conv``), over shifts only (``conv``), or
over nothing (``factored_fc``). Which does it choose?

The budget is small; ``benchmarks/orientation.py`` fits until the evidence has stopped rising.
"""

# %%
# The tasks
# ---------
# The digits of scikit-learn, turned at random. ``SOFTEQ_MAX_EPOCHS`` changes the budget.

import os

from sklearn_softeq.datasets import load_digit_tasks

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "80"))
tasks = {name: load_digit_tasks(task=name, n_train=900) for name in ("rotated", "rotation")}

# %%
# Two fits
# --------
# Every channel has four orientations, so that a small ``width`` will do.

import warnings

from sklearn.exceptions import ConvergenceWarning

from sklearn_softeq import SoftEquivariantClassifier

pathways = ("p4_conv", "conv", "factored_fc")
fitted = {}
for name, data in tasks.items():
    clf = SoftEquivariantClassifier(
        pathways=pathways, width=4, max_epochs=MAX_EPOCHS, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted[name] = clf.fit(data.X_train, data.y_train)
    print(f"{name}: held-out accuracy {clf.score(data.X_test, data.y_test):.3f}")

# %%
# What each layer uses
# --------------------
# The last row is the readout: it may pool over orientations or see each of them.

import matplotlib.pyplot as plt

from sklearn_softeq import SymmetryDisplay

for name, clf in fitted.items():
    SymmetryDisplay.from_estimator(clf, name=f"task {name!r}")

# %%
# What each layer does
# --------------------
# The distance between "turn, then layer" and "layer, then turn", in units of the layer's output,
# beside that of an untrained free layer in the same place.

for name, clf in fitted.items():
    error = clf.equivariance_error(tasks[name].X_test, group="p4")
    for layer, found, free in zip(clf.layer_names_, error.layers, error.free, strict=True):
        print(f"{name}, {layer}: {found:.3f} (untrained free layer: {free:.3f})")
    print(f"{name}, logits: {error.logits:.3f}")

plt.show()
