"""
Choosing a model
================

Within a fit the evidence chooses the precisions. *Between* networks of different form it can rank
wrongly, so widths and sets of pathways are chosen as in all of scikit-learn, by rows that are held
out. A fit takes a while; one split in place of five folds asks for a fifth of the fits.

Real digits, 8×8 pixels: which pathways, and how wide?
"""

# %%
# A search with one split
# -----------------------
# 600 images to choose and fit with, of which a fifth is held out (with fewer rows a choice is soon
# one of chance), 1197 to test. Both figures are asked for; the log loss decides. The variable
# ``SOFTEQ_MAX_EPOCHS`` of the environment caps the number of epochs.

import os
import time
import warnings

from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit, train_test_split

from sklearn_softeq import SoftEquivariantClassifier, marginal_likelihood_score

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "40"))

X, y = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, train_size=600, stratify=y, random_state=0)
grid = {"pathways": ["conv", ("conv", "factored_fc")], "width": [2, 4]}


def search_by(cv):
    """A finished search, and the seconds that it took."""
    search = GridSearchCV(
        SoftEquivariantClassifier(max_epochs=MAX_EPOCHS, random_state=0),
        grid,
        scoring={"log_likelihood": "neg_log_loss", "evidence": marginal_likelihood_score},
        refit="log_likelihood",
        cv=cv,
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(X, y)
    return search, time.perf_counter() - start


search, seconds = search_by(StratifiedShuffleSplit(1, test_size=0.2, random_state=0))
loss = log_loss(y_test, search.predict_proba(X_test))
print(f"one split: {search.best_params_}, {loss:.3f} nats on the test images, {seconds:.0f} s")

# %%
# The same with five folds
# ------------------------
# Each candidate is judged by all 600 images in turn, by five networks. What that is worth is the
# difference of the losses, what it costs that of the seconds. (``benchmarks/search.py`` does this
# over five seeds and ten candidates.)

folds, seconds_of_folds = search_by(5)
loss_of_folds = log_loss(y_test, folds.predict_proba(X_test))
print(f"five folds: {folds.best_params_}, {loss_of_folds:.3f} nats, {seconds_of_folds:.0f} s")
print(f"{seconds_of_folds / seconds:.1f} times as long, for {loss - loss_of_folds:+.3f} nats")

# %%
# What the evidence says of the same fits
# ---------------------------------------
# It sums over all images that a network was fitted to and needs none held out, but it is an
# estimate at one optimum, and networks of different form differ in how good an estimate it is.
# Where the two disagreed, the points do not lie on a rising line.

import matplotlib.pyplot as plt

found = folds.cv_results_
markers = dict(zip(map(str, grid["pathways"]), "os", strict=True))
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for parameters, likelihood, spread, evidence in zip(
    found["params"],
    found["mean_test_log_likelihood"],
    found["std_test_log_likelihood"],
    found["mean_test_evidence"],
    strict=True,
):
    pathways, width = parameters["pathways"], parameters["width"]
    name = pathways if isinstance(pathways, str) else " + ".join(pathways)
    axes.errorbar(
        evidence,
        likelihood,
        spread / 5**0.5,
        fmt=markers[str(pathways)],
        color=f"C{grid['width'].index(width)}",
        label=f"{name}, width {width}",
    )
axes.set(
    title="Four candidates, means over five folds with standard errors",
    xlabel="Log evidence, nats per image",
    ylabel="Log likelihood of held-out images, nats per image",
)
axes.legend(loc="best")
plt.show()
