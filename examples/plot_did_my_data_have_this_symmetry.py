"""
Did my data have this symmetry?
===============================

Suppose that images came to you in any of four orientations. Whether a quarter turn is a symmetry
of the task is written in the labels, not in the images: if the label is what is seen, a turn
changes nothing; if the label depends on how it lies, a turn changes the answer. One fit tells
which.

Here are both, made from the same handwritten digits. In the first set the label is the digit, in
the second it is the digit and its orientation. The classifier is not told.
"""

# %%
# Two sets of images
# ------------------
# 800 images of 8×8 pixels each, and 997 others to look at afterwards. The variable
# ``SOFTEQ_MAX_EPOCHS`` of the environment changes the budget.

import os

from sklearn_softeq.datasets import load_digit_tasks

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "55"))
names = {"rotated": "label: digit", "rotation": "label: digit and orientation"}
tasks = {names[task]: load_digit_tasks(task=task, n_train=800) for task in names}

# %%
# One fit for each
# ----------------
# In each layer a filter may be shared over shifts and quarter turns (``p4_conv``), over shifts
# (``conv``), or over nothing (``factored_fc``). Every channel of ``p4_conv`` has four orientations,
# so that a small ``width`` will do. The budget is small, too: the warning that the evidence had not
# settled is true here, and left aside.

import warnings

from sklearn.exceptions import ConvergenceWarning

from sklearn_softeq import SoftEquivariantClassifier

fitted = {}
for name, data in tasks.items():
    clf = SoftEquivariantClassifier(
        pathways=("p4_conv", "conv", "factored_fc"),
        width=3,
        burn_in=10,
        max_epochs=MAX_EPOCHS,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted[name] = clf.fit(data.X_train, data.y_train)
    print(f"{name}: accuracy on other images {clf.score(data.X_test, data.y_test):.3f}")

# %%
# The answer in numbers
# ---------------------
# How far are the logits from those of the turned image, in units of the logits? And how much of
# what the fit learned is in pathways that do not keep quarter turns? Both are small if the symmetry
# is there, and the first is about √2 for a network that has nothing of it. The line between is
# drawn at a half here.

for name, clf in fitted.items():
    error = clf.equivariance_error(tasks[name].X_test, group="p4")
    others = [clf.pathway_names_.index(pathway) for pathway in ("conv", "factored_fc", "free")]
    used = clf.effective_dimensions_[:, others].sum() / clf.effective_dimensions_.sum()
    answer = "a symmetry" if error.logits < 0.5 else "no symmetry"
    print(f"{name}: a quarter turn is {answer}")
    print(f"    change of the logits by a quarter turn {error.logits:.3f}")
    print(f"    effective dimensions in pathways that do not keep it {used:.1%}")

# %%
# The answer in each layer
# ------------------------
# The share of each pathway in the effective dimensions of its layer. The last row is the readout:
# it may pool over the four orientations, or see each of them.

import matplotlib.pyplot as plt

from sklearn_softeq import SymmetryDisplay

for name, clf in fitted.items():
    SymmetryDisplay.from_estimator(clf, name=name)

# %%
# The answer for one image
# ------------------------
# A digit that neither fit has seen, turned by hand, and what each fit makes of it. With the
# orientation in the label there are four classes for each digit, side by side.

import numpy as np

image = tasks["label: digit"].X_test[:1]
turned = np.concatenate([np.rot90(image, k, axes=(2, 3)) for k in range(4)])

figure, axes = plt.subplots(
    4, 3, figsize=(9, 5), width_ratios=(1, 3, 3), sharex="col", layout="constrained"
)
for ax, picture in zip(axes[:, 0], turned[:, 0], strict=True):
    ax.imshow(picture, cmap="gray_r")
    ax.set_axis_off()
for column, (name, clf) in zip(axes.T[1:], fitted.items(), strict=True):
    n_classes = len(clf.classes_)
    for ax, p in zip(column, clf.predict_proba(turned), strict=True):
        ax.bar(range(n_classes), p)
        ax.set(ylim=(0, 1), yticks=(0, 1))
    middle = (n_classes // 10 - 1) / 2
    column[-1].set(xlabel="digit", xticks=np.arange(10) * (n_classes // 10) + middle)
    column[-1].set_xticklabels(range(10))
    column[0].set_title(name)
figure.supylabel("probability")
plt.show()
