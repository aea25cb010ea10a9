"""Learn which symmetry two tasks have, from the same images of digits.

Both tasks put an 8×8 digit in a random quadrant of a 16×16 canvas. In "digit" the label is the
digit, so shifting an image changes nothing; in "quadrant" the label names the digit and the
quadrant, so it does. The classifier is not told which is which. The images come with
scikit-learn.

    python examples/demo.py [--max-epochs N] [--n-train N] [--figure PATH]

With the default sizes it takes three to five minutes on two cores.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from sklearn_softeq import MarginalLikelihoodDisplay, SoftEquivariantClassifier, SymmetryDisplay
from sklearn_softeq.datasets import load_digit_tasks
from sklearn_softeq.layers import PATHWAYS

TASKS = {
    "digit": "label = the digit; shifts do not change it",
    "quadrant": "label = the digit and its quadrant; shifts change it",
}


def main(max_epochs=None, n_train=1200, figure="demo.png"):
    """Fit both tasks, print what was learned and save one figure.

    Parameters
    ----------
    max_epochs : int or None
        Cap of the epochs of each fit; None for the classifier's default.
    n_train : int
        Number of training images; the rest of the 1797 is held out.
    figure : str or path
        Where the figure goes.

    Returns
    -------
    dict of str to SoftEquivariantClassifier
        The fitted classifiers by task.
    """
    fitted, errors = {}, {}
    for task, meaning in TASKS.items():
        data = load_digit_tasks(task=task, n_train=n_train)
        print(f"Task {task!r}: {meaning}")
        fitted[task] = fit(data, max_epochs)
        errors[task] = fitted[task].equivariance_error(data.X_test)
        print(table(fitted[task], errors[task].layers), end="\n\n")
    print(f"Figure: {plot(fitted, figure)}\n")
    print(conclusion(fitted, errors))
    return fitted


def fit(data, max_epochs):
    """A classifier with default parameters, and how well it does."""
    clf = SoftEquivariantClassifier(random_state=0)
    if max_epochs is not None:
        clf.set_params(max_epochs=max_epochs)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        clf.fit(data.X_train, data.y_train)
    seconds = time.perf_counter() - start
    accuracy = clf.score(data.X_test, data.y_test)
    nll = negative_log_likelihood(clf, data.X_test, data.y_test)
    evidence = clf.log_marginal_likelihood_value_
    capped = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    print(
        f"  {len(data.X_train)} training images, {len(clf.classes_)} classes, {clf.n_iter_} epochs "
        f"in {seconds:.0f} s{' (not settled)' if capped else ''}"
    )
    print(f"  {len(data.X_test)} held-out images: accuracy {accuracy:.3f}, NLL {nll:.3f} nats")
    print(
        f"  log evidence {evidence:.0f} nats, {evidence / clf.n_observations_:.3f} per "
        "training image"
    )
    return clf


def negative_log_likelihood(clf, X, y):
    """Mean of −log p(y | x), nats; infinite if a label was not among those of the training."""
    if not np.isin(y, clf.classes_).all():
        return np.inf
    columns = np.searchsorted(clf.classes_, y)
    return -clf.predict_log_proba(X)[np.arange(len(y)), columns].mean()


def table(clf, errors):
    """What each pathway of each layer does, as aligned text."""
    head = ("layer", "pathway", "share of γ", "γ", "weights", "precision", "output", "equiv. error")
    rows = []
    for i, layer in enumerate(clf.layer_names_):
        for j, pathway in enumerate(clf.pathway_names_):
            precision = clf.prior_precision_[i, j]
            rows.append(
                (
                    layer if j == 0 else "",
                    pathway,
                    f"{clf.symmetry_[i, j]:.1%}",
                    f"{clf.effective_dimensions_[i, j]:.1f}",
                    str(clf.n_weights_[i, j]),
                    "removed" if np.isinf(precision) else f"{precision:.3g}",
                    f"{clf.output_share_[i, j]:.1%}",
                    f"{errors[i]:.3f}" if j == 0 else "",
                )
            )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        # Names to the left, numbers to the right.
        aligned = [
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "  ".join(aligned).rstrip()

    return "\n".join([line(head), *map(line, rows)])


def plot(fitted, path):
    """One figure: symmetry of each task, and the evidence over the epochs below."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 11), layout="constrained")
    *symmetry, evidence = figure.subfigures(len(fitted) + 1, 1)
    axes = evidence.subplots(1, len(fitted))
    for part, ax, (task, clf) in zip(symmetry, axes, fitted.items(), strict=True):
        SymmetryDisplay.from_estimator(clf, ax=part.subplots(1, 2), name=f"task {task!r}")
        MarginalLikelihoodDisplay.from_estimator(clf, ax=ax, name=f"task {task!r}")
    for ax in axes[:-1]:
        ax.get_legend().remove()  # the same as the last one's
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return Path(path)


def conclusion(fitted, errors):
    """What the fitted arrays say: a sentence for each task, and one that compares them."""
    sentences = []
    for task, clf in fitted.items():
        free = [j for j, name in enumerate(clf.pathway_names_) if PATHWAYS[name].group is None]
        gamma = clf.effective_dimensions_
        share = gamma[:, free].sum() / gamma.sum()
        removed = int(np.isinf(clf.prior_precision_[:, free]).all(axis=1).sum())
        most = int(clf.symmetry_[:, free].sum(axis=1).argmax())
        sentences.append(
            f"On {task!r} the free pathways hold {share:.1%} of the effective dimensions and were "
            f"removed from {removed} of {len(gamma)} layers"
            + (
                f"; their share is largest in {clf.layer_names_[most]}, "
                f"{clf.symmetry_[most, free].sum():.0%}"
                if removed < len(gamma)
                else ""
            )
            + f". A shift of the image changes the logits by {errors[task].logits:.2f} of their "
            "size."
        )
    *_, second, first = sorted(fitted, key=lambda task: errors[task].logits)
    if errors[first].logits > errors[second].logits:
        sentences.append(f"So the network gave up more of the symmetry on {first!r}.")
    return "\n".join(sentences)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--max-epochs", type=int, help="cap of the epochs of each fit")
    parser.add_argument("--n-train", type=int, default=1200, help="training images (1200)")
    parser.add_argument("--figure", default="demo.png", help="where the figure goes (demo.png)")
    options = parser.parse_args()
    main(options.max_epochs, options.n_train, options.figure)
