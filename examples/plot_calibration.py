"""
How sure may it be?
===================

A classifier that says 99 % should be right in 99 of 100 cases. From a few images a network fits its
training data so closely that it is sure of nearly everything. Its posterior knows which weights the
data left open: probabilities that are averaged over it are milder where that matters.

Real digits, 8×8 pixels: is it even or odd?
"""

# %%
# One fit
# -------
# 200 images to fit, 300 held out to choose with, the rest to look at. All pathways are there from
# the beginning, which fits few images most closely. ``predictive="laplace"`` keeps the posterior.
# The variable ``SOFTEQ_MAX_EPOCHS`` of the environment caps the number of epochs.

import os
import warnings

from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from sklearn_softeq import SoftEquivariantClassifier

MAX_EPOCHS = int(os.environ.get("SOFTEQ_MAX_EPOCHS", "120"))

images, digits = load_digits(return_X_y=True)
odd = digits % 2
X_fit, X_rest, y_fit, y_rest = train_test_split(
    images, odd, train_size=200, stratify=digits, random_state=0
)
X_held, X_test, y_held, y_test = train_test_split(X_rest, y_rest, train_size=300, random_state=0)

clf = SoftEquivariantClassifier(
    start="joint", predictive="laplace", max_epochs=MAX_EPOCHS, random_state=0
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)
    clf.fit(X_fit, y_fit)
print(clf.posterior_)

# %%
# Three kinds of probabilities
# ----------------------------
# The same weights serve all of them: those of the weights alone (MAP), the average over the
# posterior, and the average at the temperature that the held-out images like best. Nothing is
# fitted again.

from sklearn.metrics import log_loss

TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0)


def held_out_loss(temperature):
    """Log loss of the held-out images at a temperature of the posterior."""
    clf.set_params(predictive="laplace", predictive_temperature=temperature)
    return log_loss(y_held, clf.predict_proba(X_held))


best = min(TEMPERATURES, key=held_out_loss)
kinds = {
    "MAP": {"predictive": "map"},
    "Laplace": {"predictive": "laplace", "predictive_temperature": 0.01},
    f"Laplace, temperature {best:g}": {"predictive": "laplace", "predictive_temperature": best},
}
probabilities = {
    name: clf.set_params(**parameters).predict_proba(X_test) for name, parameters in kinds.items()
}
print(f"{'':26} {'NLL':>6} {'accuracy':>8} {'mean confidence':>15}")
for name, p in probabilities.items():
    right = (p.argmax(1) == y_test).mean()
    print(f"{name:26} {log_loss(y_test, p):6.3f} {right:8.3f} {p.max(1).mean():15.3f}")

# %%
# Their calibration
# -----------------
# On the diagonal a probability is what it says. The MAP is sure of nearly every image, also of most
# that it gets wrong; the few that it doubts make a curve that jumps. At the temperature of the
# held-out images more of them are doubted, and the curve is near the diagonal.

import matplotlib.pyplot as plt
from sklearn.calibration import CalibrationDisplay

figure, (curves, histogram) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
for name, p in probabilities.items():
    CalibrationDisplay.from_predictions(y_test, p[:, 1], n_bins=6, name=name, ax=curves)
curves.set(
    title="Calibration on 1297 images",
    xlabel="Predicted probability of an odd digit",
    ylabel="Part of odd digits",
)
histogram.hist(
    [p.max(1) for p in probabilities.values()], bins=10, range=(0.5, 1), label=list(probabilities)
)
histogram.set(
    title="How sure it is",
    xlabel="Probability of the predicted class",
    ylabel="Number of images",
    yscale="log",
)
histogram.legend(loc="upper left")
plt.show()
