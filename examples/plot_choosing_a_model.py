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
# 600 images to choose and fit with, of which a tenth is held out (60 rows are about the fewest that
# tell), 1197 to test. Both figures are asked for; the log loss decides. The variable
# ``SOFTEQ_MAX_EPOCHS`` of the environment caps the number of epochs.

import os
import warnings

from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit, train_test_split

from sklearn_softeq import SoftEquivariantClassifier, marginal_likelihood_score

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "80"))

X, y = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, train_size=600, stratify=y, random_state=0)
grid = {"pathways": ["conv", "factored_fc", ("conv", "factored_fc")], "width": [2, 4]}
search = GridSearchCV(
    SoftEquivariantClassifier(max_epochs=MAX_EPOCHS, random_state=0),
    grid,
    scoring={"log_likelihood": "neg_log_loss", "evidence": marginal_likelihood_score},
    refit="log_likelihood",
    cv=StratifiedShuffleSplit(1, test_size=0.1, random_state=0),
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)
    search.fit(X, y)
print("chosen:", search.best_params_)
print(f"{log_loss(y_test, search.predict_proba(X_test)):.3f} nats on the test images")
print(f"{search.score(X_test, y_test):.3f} the score that decided, of the test images")

# %%
# What the evidence says of the same fits
# ---------------------------------------
# It sums over all images that a network was fitted to and needs none held out, but it is an
# estimate at one optimum, and networks of different form differ in how good an estimate it is. Here
# both like the sums best; of the convolutions alone one has the evidence of the other, and a third
# of its loss.

import matplotlib.pyplot as plt

found = search.cv_results_
markers = dict(zip(map(str, grid["pathways"]), "os^", strict=True))
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for parameters, likelihood, evidence in zip(
    found["params"], found["mean_test_log_likelihood"], found["mean_test_evidence"], strict=True
):
    pathways, width = parameters["pathways"], parameters["width"]
    name = pathways if isinstance(pathways, str) else " + ".join(pathways)
    axes.plot(
        evidence,
        likelihood,
        markers[str(pathways)],
        color=f"C{grid['width'].index(width)}",
        label=f"{name}, width {width}",
    )
axes.axhline(search.best_score_, color="0.8", zorder=0)
axes.set(
    title="Six candidates, 540 images to fit, 60 held out",
    xlabel="Log evidence, nats per image",
    ylabel="Log likelihood of held-out images, nats per image",
)
axes.legend(loc="best")
plt.show()
