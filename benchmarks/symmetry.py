"""Does the sum of all pathways do as well as the network whose symmetry was known beforehand?

Six tasks of known symmetry, made of scikit-learn's digits and of MNIST, in images of 16×16 with
1000 for training; networks with one pathway, with two, and with all, of the same number of
features in each layer, so that but for the head a sum contains its parts; each with the learned
prior, at fixed precisions 1 (MAP) and at the precision that five-fold cross-validation chooses in
the time that the learned prior took (chosen; asks for that one), all else at its default.
Everything depends on the seed: split, task and start. Of fixed precisions there is a second NLL
(scaled), with logits scaled down to the least training loss that a learned prior leaves.
NLLs are scikit-learn's, which count no probability of single precision below 1e-7: that favours
what is too sure of itself.

Digits are placed (quadrants, shifts) at 8×8 pixels on a canvas of 16×16, and turned or left as
they are at 16×16: scikit-learn's interpolated, MNIST's averaged. Test sets are the 797 other digits
and 2000 of MNIST's test images.

    python benchmarks/symmetry.py [--sets S ...] [--tasks T ...] [--models M ...]
        [--priors P ...] [--seeds N ...] [--n-train N] [--parameters JSON] [--mnist PATH]
        [--threads N] [--output PATH] [--page PATH]
        [--summary PATH] [--figure PATH] [--report]

What is there already is left out; several processes may write to one file. `--report` fits nothing.
MNIST comes from an npz file with X_train, X_test of the shape (n, 1, 28, 28) from 0 to 255 and
y_train, y_test, or from OpenML. Processes that write to one file should have seeds of their own.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import Results, calibration_error, replaced
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.datasets import fetch_openml, load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from symmetry_tables import ALL, SETS, Cell, Fits, report, summary
from torch.nn import functional

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.course import LEAST_LOSS
from sklearn_softeq.datasets import make_quadrants, make_rotations, make_shifts
from sklearn_softeq.likelihoods import Categorical

OUTPUT = Path(__file__).with_suffix(".json")
N_TRAIN, N_TEST = 1000, 2000
SMALL, LARGE = 8, 16  # pixels of an image that is placed, and of one that is not

TASKS = {
    "digit": (SMALL, lambda *data: make_quadrants(*data[:2], random_state=data[2])),
    "quadrant": (
        SMALL,
        lambda *data: make_quadrants(*data[:2], label="class_and_position", random_state=data[2]),
    ),
    "shifts": (SMALL, lambda *data: make_shifts(*data[:2], random_state=data[2])),
    "rotated": (LARGE, lambda *data: make_rotations(*data[:2], random_state=data[2])),
    "rotation": (
        LARGE,
        lambda *data: make_rotations(*data[:2], label="class_and_rotation", random_state=data[2]),
    ),
    "plain": (LARGE, lambda images, labels, _: (images, labels)),
}
#: Pathways and width. With quarter turns the width counts for each of four orientations: all have
#: 4, 8, 8, 16, 16 and 32 features. The hidden layer of the dense head has 128 units
#: without quarter turns and 32 with them: there the sum of all has less than "conv".
MODELS = {
    "conv": (("conv",), 4),
    "factored_fc": (("factored_fc",), 4),
    "sparse_fc": (("sparse_fc",), 4),
    "p4_conv": (("p4_conv",), 1),
    "conv + factored_fc": (("conv", "factored_fc"), 4),
    "conv + sparse_fc": (("conv", "sparse_fc"), 4),
    "p4_conv + factored_fc": (("p4_conv", "factored_fc"), 1),
    ALL: (("p4_conv", "conv", "factored_fc", "sparse_fc"), 1),
}
PRIORS = {"learned": {}, "MAP": {"learn_prior": False}, "chosen": {"learn_prior": False}}
#: The precisions to choose from by cross-validation. With a fourth, by what fits take, those to the
#: folds would have about ten epochs.
DECAYS = (1.0, 10.0, 100.0)
N_FOLDS = 5
BEGIN, END = "<!-- symmetry.py: begin -->", "<!-- symmetry.py: end -->"
EPOCHS_TIMED = 5  # of which the cost of an epoch is measured


@cache
def mnist(path: str | None) -> tuple[np.ndarray, ...]:
    """Training and test images (n, 28, 28) from 0 to 255, with their labels."""
    if path is None:
        X, y = fetch_openml("mnist_784", return_X_y=True, as_frame=False, parser="auto")
        X, y = X.reshape(-1, 28, 28), y.astype(int)
        return X[:60000], y[:60000], X[60000:], y[60000:]
    with np.load(path) as data:
        X_train, y_train, X_test, y_test = (
            data[name] for name in ("X_train", "y_train", "X_test", "y_test")
        )
    return X_train[:, 0], y_train.astype(int), X_test[:, 0], y_test.astype(int)


def images_of(
    name: str, side: int, seed: int, path: str | None, n_train: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images for training and testing, (n, side, side) from 0 to 1, with their labels."""
    rng = np.random.default_rng(seed)
    if name == "digits":
        digits = load_digits()
        order = rng.permutation(len(digits.images))
        train, test = order[:n_train], order[n_train:]
        images = resized(digits.images / 16, side)
        return images[train], digits.target[train], images[test], digits.target[test]
    X_train, y_train, X_test, y_test = mnist(path)
    train = rng.choice(len(X_train), n_train, replace=False)
    test = rng.choice(len(X_test), N_TEST, replace=False)
    padded = (np.pad(X / 255, ((0, 0), (2, 2), (2, 2))) for X in (X_train[train], X_test[test]))
    first, second = (resized(X, side) for X in padded)
    return first, y_train[train], second, y_test[test]


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Means of pixels, or values between them."""
    pixels = torch.from_numpy(images)[:, None].float()
    if pixels.shape[-1] >= side:
        found = functional.adaptive_avg_pool2d(pixels, side)
    else:
        found = functional.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
    return found[:, 0].numpy()


def task_of(
    name: str, task: str, seed: int, path: str | None, n_train: int = N_TRAIN
) -> tuple[np.ndarray, ...]:
    """X_train, y_train, X_test, y_test."""
    side, make = TASKS[task]
    X_train, y_train, X_test, y_test = images_of(name, side, seed, path, n_train)
    rng = np.random.RandomState(seed)
    return *make(X_train, y_train, rng), *make(X_test, y_test, rng)


class Choice(NamedTuple):
    """What cross-validation said of each precision."""

    fold_epochs: int
    scores: list[float]


def choose_precision(
    clf: SoftEquivariantClassifier, X: np.ndarray, y: np.ndarray, seconds: float
) -> Choice:
    """Set the precision that is best in cross-validation, and the epochs of the fit after it.

    Half of the seconds are for the training of fits to the folds, the other half for that to all
    rows. In those to the folds all pathways begin together: trials would take most of their
    epochs. What an epoch costs is measured beside them, and what the evidence at the end of a fit
    costs is left out, as only the learned prior needs it.
    """
    epochs = seconds / 2 / seconds_per_epoch(clf, X, y)
    # Each fit to folds has four fifths of the rows.
    of_folds = max(1, int(epochs / (len(DECAYS) * (N_FOLDS - 1))))
    cv = StratifiedKFold(N_FOLDS, shuffle=True, random_state=clf.random_state)
    search = GridSearchCV(
        clone(clf).set_params(start="joint", max_epochs=of_folds),
        {"prior_precision": DECAYS},
        scoring="neg_log_loss",
        cv=cv,
        refit=False,
    )
    clf.set_params(**search.fit(X, y).best_params_, max_epochs=max(1, int(epochs)))
    return Choice(of_folds, search.cv_results_["mean_test_score"].round(4).tolist())


def seconds_per_epoch(clf: SoftEquivariantClassifier, X: np.ndarray, y: np.ndarray) -> float:
    """Of training with all pathways: what more epochs add to the time of a fit."""

    def seconds(epochs: int) -> float:
        start = time.process_time()
        clone(clf).set_params(start="joint", max_epochs=epochs).fit(X, y)
        return time.process_time() - start

    return max((seconds(1 + EPOCHS_TIMED) - seconds(1)) / EPOCHS_TIMED, 1e-3)


@dataclass(frozen=True)
class Run:
    """One fit, and all that it depends on."""

    data: str
    task: str
    model: str
    prior: str
    seed: int
    parameters: str = "{}"
    n_train: int = N_TRAIN

    @property
    def key(self) -> str:
        more = "" if self.parameters == "{}" else f", {self.parameters}"
        more += "" if self.n_train == N_TRAIN else f", {self.n_train} images"
        return f"{self.data}, {self.task}, {self.model}, {self.prior}, {self.seed}{more}"

    def measure(self, path: str | None, seconds: float | None = None) -> dict:
        """Fit and test; with its precision chosen before, if there are seconds for both."""
        X_train, y_train, X_test, y_test = task_of(
            self.data, self.task, self.seed, path, self.n_train
        )
        pathways, width = MODELS[self.model]
        parameters = {**PRIORS[self.prior], **json.loads(self.parameters)}
        clf = SoftEquivariantClassifier(
            pathways=pathways, width=width, random_state=self.seed, **parameters
        )
        start = time.process_time()
        choice = None if seconds is None else choose_precision(clf, X_train, y_train, seconds)
        clf.fit(X_train, y_train)
        found = {"seconds": round(time.process_time() - start, 1)}
        found |= measured(clf, X_train, y_train, X_test, y_test)
        found |= {} if choice is None else choice._asdict()
        if self.prior != "learned":
            found["scaled_nll"] = round(scaled_nll(clf, X_train, y_train, X_test, y_test), 4)
        return {**found, "prior_precision": clf.prior_precision}


def scaled_nll(clf, X_train, y_train, X_test, y_test) -> float:
    """With the logits scaled down, if need be, to the least loss that a learned prior leaves."""
    codes = torch.from_numpy(np.searchsorted(clf.classes_, y_train))
    log_p = torch.from_numpy(clf.predict_log_proba(X_train))  # logits, but for a constant each
    scale = Categorical().scale_of_outputs(
        log_p, codes, torch.ones(len(codes)).double(), -LEAST_LOSS * len(codes)
    )
    p = np.exp(log_softmax(scale * clf.predict_log_proba(X_test), axis=1))
    return log_loss(y_test, p, labels=clf.classes_)


def measured(clf: SoftEquivariantClassifier, X_train, y_train, X_test, y_test) -> dict:
    """What a fit found and how good it is."""
    p = clf.predict_proba(X_test)
    shifts, turns = (clf.equivariance_error(X_test, g) for g in ("translation", "p4"))
    of_training = log_loss(y_train, clf.predict_proba(X_train), labels=clf.classes_)
    return {
        "accuracy": round(clf.score(X_test, y_test), 4),
        "nll": round(log_loss(y_test, p, labels=clf.classes_), 4),
        "ece": round(calibration_error(p, np.searchsorted(clf.classes_, y_test)), 4),
        "train_nll": round(of_training, 4),
        "log_evidence": round(clf.log_marginal_likelihood_value_ / len(y_train), 4),
        "linear_term": round(clf.evidence_linear_term_, 4),
        "shifts": rounded([*shifts.layers, shifts.logits]),
        "turns": rounded([*turns.layers, turns.logits]),
        "start": clf.start_,
        "trials": {name: round(score, 3) for name, score in clf.symmetry_trials_.items()},
        "pathways": clf.pathway_names_,
        "effective_dimensions": rounded(clf.effective_dimensions_, 2),
        "log_precisions": rounded(np.log(clf.prior_precision_), 2),
        "removed": np.isposinf(clf.prior_precision_).tolist(),
        "output_share": rounded(clf.output_share_),
        "weights": sum(p.numel() for p in clf.module_.parameters()),
        "epochs": clf.n_iter_,
    }


def rounded(values, digits: int = 4) -> list:
    """As a list that JSON can hold; what is not finite is None."""
    values = np.asarray(values, dtype=float)
    found = np.where(np.isfinite(values), np.round(values, digits), np.nan).astype(object)
    return np.where(np.isfinite(values), found, None).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=["learned", "MAP"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--n-train", type=int, default=N_TRAIN, help="images to fit to (1000)")
    parser.add_argument("--parameters", default="{}", help="of the classifier, as JSON")
    parser.add_argument("--mnist", help="npz file with MNIST (fetched from OpenML)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    parser.add_argument("--page", type=Path, help="page to write the tables to")
    parser.add_argument("--summary", type=Path, help="page to write what they say together to")
    parser.add_argument("--figure", type=Path, help="picture of the promise to save")
    parser.add_argument("--report", action="store_true", help="tables of what is there, no fits")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = Results(options.output)
    chosen = product(options.sets, options.tasks)
    cells: dict[Cell, Fits] = {cell: {} for cell in chosen}
    # Seed by seed, so that a run that is broken off has something of everything.
    for seed, (cell, fits), model, prior in product(
        options.seeds, cells.items(), options.models, sorted(options.priors, key=list(PRIORS).index)
    ):
        run = Run(*cell, model, prior, seed, options.parameters, options.n_train)
        if run.key not in kept.by_key:
            if options.report:
                continue
            print(f"  {run.key}", flush=True)
        learned = kept.by_key.get(replace(run, prior="learned").key)
        if prior == "chosen" and learned is None:
            continue  # there is no time to be had the same of
        seconds = learned["seconds"] if prior == "chosen" else None
        found = kept.get(run.key, lambda run=run, of=seconds: run.measure(options.mnist, of))
        fits.setdefault((model, prior), {})[seed] = found
    text = report(cells)
    print(f"\n{text}")
    if options.page is not None:
        options.page.write_text(replaced(options.page.read_text(), text, BEGIN, END))
    if options.summary is not None:
        page = options.summary.read_text()
        for name, section in summary(cells).items():
            begin, end = (
                line.replace("symmetry.py", f"symmetry.py, {name}") for line in (BEGIN, END)
            )
            page = replaced(page, section, begin, end)
        options.summary.write_text(page)
    if options.figure is not None:
        from symmetry_figure import draw  # asks for matplotlib

        draw(cells, options.figure)
