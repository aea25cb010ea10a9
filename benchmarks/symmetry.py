"""Does the sum of all pathways do as well as the network whose symmetry was known beforehand?

Six tasks of known symmetry, made of scikit-learn's digits and of MNIST, in images of 16×16 with
1000 for training; networks with one pathway, with two, and with all, of the same number of
features in each layer, so that but for the head a sum contains its parts; each with the learned
prior, at fixed precisions 1 (MAP) and at the precision that five-fold cross-validation chooses in
the time that the learned prior took (chosen; asks for the other two), all else at its default.
Everything depends on the seed: split, task and start.

Digits are placed (quadrants, shifts) at 8×8 pixels on a canvas of 16×16, and turned or left as
they are at 16×16: scikit-learn's interpolated, MNIST's averaged. Test sets are the 797 other digits
and 2000 of MNIST's test images.

    python benchmarks/symmetry.py [--sets S ...] [--tasks T ...] [--models M ...]
        [--priors P ...] [--seeds N ...] [--parameters JSON] [--mnist PATH] [--output PATH]
        [--report]

What is there already is left out; several processes may write to one file. `--report` fits nothing.
MNIST comes from an npz file with X_train, X_test of the shape (n, 1, 28, 28) from 0 to 255 and
y_train, y_test, or from OpenML. Processes that write to one file should have seeds of their own.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import Results, interval, print_table, standard_error
from sklearn.base import clone
from sklearn.datasets import fetch_openml, load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from torch.nn import functional

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.datasets import make_quadrants, make_rotations, make_shifts

OUTPUT = Path(__file__).with_suffix(".json")
N_TRAIN, N_TEST = 1000, 2000
SMALL, LARGE = 8, 16  # pixels of an image that is placed, and of one that is not
N_BINS = 15
SETS = ("digits", "mnist")

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
    "all": (("p4_conv", "conv", "factored_fc", "sparse_fc"), 1),
}
ALL = "all"
#: Tasks with and without a symmetry, the change of the logits under it, and the pathways of the sum
#: that do not keep it.
PAIRS = (
    ("digit", "quadrant", "shifts", ("factored_fc", "sparse_fc")),
    ("rotated", "rotation", "turns", ("conv", "factored_fc", "sparse_fc", "free")),
)
HARD_CODED = ("conv", "factored_fc", "sparse_fc", "p4_conv")
FREE = ("factored_fc", "sparse_fc")
PRIORS = {"learned": {}, "MAP": {"learn_prior": False}, "chosen": {"learn_prior": False}}
DECAYS = (1.0, 10.0, 100.0, 1000.0)  # the precisions to choose from by cross-validation
N_FOLDS = 5


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
    name: str, side: int, seed: int, path: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images for training and testing, (n, side, side) from 0 to 1, with their labels."""
    rng = np.random.default_rng(seed)
    if name == "digits":
        digits = load_digits()
        order = rng.permutation(len(digits.images))
        train, test = order[:N_TRAIN], order[N_TRAIN:]
        images = resized(digits.images / 16, side)
        return images[train], digits.target[train], images[test], digits.target[test]
    X_train, y_train, X_test, y_test = mnist(path)
    train = rng.choice(len(X_train), N_TRAIN, replace=False)
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


def task_of(name: str, task: str, seed: int, path: str | None) -> tuple[np.ndarray, ...]:
    """X_train, y_train, X_test, y_test."""
    side, make = TASKS[task]
    X_train, y_train, X_test, y_test = images_of(name, side, seed, path)
    rng = np.random.RandomState(seed)
    return *make(X_train, y_train, rng), *make(X_test, y_test, rng)


class Budget(NamedTuple):
    """Of a fit with the choice of its precision before it."""

    seconds: float
    seconds_per_epoch: float


def choose_precision(
    clf: SoftEquivariantClassifier, X: np.ndarray, y: np.ndarray, budget: Budget
) -> None:
    """Set the precision that is best in cross-validation, and the epochs of the fit after it.

    Half of the time is for the fits to the folds, the other half for that to all rows. In those to
    the folds all pathways begin together: trials would take most of their epochs.
    """
    epochs = budget.seconds / 2 / budget.seconds_per_epoch
    of_folds = epochs / (len(DECAYS) * (N_FOLDS - 1))  # each fit has four fifths of the rows
    cv = StratifiedKFold(N_FOLDS, shuffle=True, random_state=clf.random_state)
    search = GridSearchCV(
        clone(clf).set_params(start="joint", max_epochs=max(1, int(of_folds))),
        {"prior_precision": DECAYS},
        scoring="neg_log_loss",
        cv=cv,
        refit=False,
    )
    clf.set_params(**search.fit(X, y).best_params_, max_epochs=max(1, int(epochs)))


@dataclass(frozen=True)
class Run:
    """One fit, and all that it hangs on."""

    data: str
    task: str
    model: str
    prior: str
    seed: int
    parameters: str = "{}"

    @property
    def key(self) -> str:
        more = "" if self.parameters == "{}" else f", {self.parameters}"
        return f"{self.data}, {self.task}, {self.model}, {self.prior}, {self.seed}{more}"

    def measure(self, path: str | None, budget: Budget | None = None) -> dict:
        """Fit and test."""
        X_train, y_train, X_test, y_test = task_of(self.data, self.task, self.seed, path)
        pathways, width = MODELS[self.model]
        parameters = {**PRIORS[self.prior], **json.loads(self.parameters)}
        clf = SoftEquivariantClassifier(
            pathways=pathways, width=width, random_state=self.seed, **parameters
        )
        start = time.process_time()
        if budget is not None:
            choose_precision(clf, X_train, y_train, budget)
        clf.fit(X_train, y_train)
        seconds = time.process_time() - start
        found = measured(clf, X_train, y_train, X_test, y_test)
        return {**found, "prior_precision": clf.prior_precision, "seconds": round(seconds, 1)}


def measured(clf: SoftEquivariantClassifier, X_train, y_train, X_test, y_test) -> dict:
    """What a fit found and how good it is."""
    p = clf.predict_proba(X_test)
    shifts, turns = (clf.equivariance_error(X_test, g) for g in ("translation", "p4"))
    of_training = log_loss(y_train, clf.predict_proba(X_train), labels=clf.classes_)
    return {
        "accuracy": round(clf.score(X_test, y_test), 4),
        "nll": round(log_loss(y_test, p, labels=clf.classes_), 4),
        "ece": round(calibration_error(clf.classes_, y_test, p), 4),
        "train_nll": round(of_training, 4),
        "log_evidence": round(clf.log_marginal_likelihood_value_ / len(y_train), 4),
        "linear_term": round(clf.evidence_linear_term_, 4),
        "shifts": rounded([*shifts.layers, shifts.logits]),
        "turns": rounded([*turns.layers, turns.logits]),
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


def calibration_error(classes: np.ndarray, y: np.ndarray, p: np.ndarray) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over bins of confidence."""
    confidence, right = p.max(1), classes[p.argmax(1)] == y
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, confidence - right, N_BINS)
    return float(np.abs(gaps).sum() / len(y))


Cell = tuple[str, str]
Fits = dict[tuple[str, str], dict[int, dict]]  # by (model, prior) and seed


def table_of(fits: Fits) -> list[tuple[str, ...]]:
    """A row for each model and prior of a cell."""
    best = best_hard_coded(fits)
    rows = []
    for (model, prior), by_seed in fits.items():
        found = list(by_seed.values())
        regret = differences(fits, (model, prior), best, "nll") if best else []
        rows.append(
            (
                model,
                prior,
                str(len(found)),
                interval([100 * f["accuracy"] for f in found], 1),
                interval([f["nll"] for f in found], 3),
                interval(regret, 3) if len(regret) else "",
                interval([f["ece"] for f in found], 3),
                interval([f["log_evidence"] for f in found]),
                interval([f["linear_term"] for f in found]),
                interval([of_pathways(f, "effective_dimensions").sum() for f in found], 1),
                interval([f["shifts"][-1] for f in found]),
                interval([f["turns"][-1] for f in found]),
                f"{np.mean([f['epochs'] for f in found]):.0f}",
                f"{np.mean([f['seconds'] for f in found]):.0f}",
            )
        )
    return rows


def of_pathways(fit: dict, figure: str, pathways: tuple[str, ...] = FREE) -> np.ndarray:
    """A figure of these pathways, (layers, pathways)."""
    names = fit["pathways"]
    columns = [j for j, name in enumerate(names) if name in pathways]
    return np.array(fit[figure], dtype=float)[:, columns]


def told_apart(cells: dict[Cell, Fits]) -> list[tuple[str, ...]]:
    """What the sum says of a symmetry where it is there and where it is broken, over seeds."""
    rows = []
    for data, (kept, broken, error, free) in product(SETS, PAIRS):
        both = [cells.get((data, task), {}).get((ALL, "learned")) for task in (kept, broken)]
        if not all(both):
            continue
        errors = [[fit[error][-1] for fit in fits.values()] for fits in both]
        # A pathway that was removed has an infinite precision; the lowest one is the most open.
        precisions = [
            [
                np.nan_to_num(of_pathways(fit, "log_precisions", free), nan=np.inf).min()
                for fit in fits.values()
            ]
            for fits in both
        ]
        apart = max(errors[0]) < min(errors[1]) and min(precisions[0]) > max(precisions[1])
        rows.append(
            (
                data,
                f"{kept} / {broken}",
                " / ".join(str(len(fits)) for fits in both),
                " / ".join(f"{min(found):.2f} to {max(found):.2f}" for found in errors),
                " / ".join(f"{min(found):.1f} to {max(found):.1f}" for found in precisions),
                "yes" if apart else "no",
            )
        )
    return rows


def best_hard_coded(fits: Fits) -> tuple[str, str] | None:
    """The network with one pathway, and learned prior, of the best mean NLL."""
    there = [(model, "learned") for model in HARD_CODED if (model, "learned") in fits]
    seeds = set.intersection(*(set(fits[k]) for k in there)) if there else set()
    if not seeds:
        return None
    return min(there, key=lambda k: np.mean([fits[k][seed]["nll"] for seed in seeds]))


def differences(fits: Fits, one: tuple, other: tuple, figure: str) -> np.ndarray:
    """Of a figure between two models, over the seeds that both have."""
    first, second = fits.get(one, {}), fits.get(other, {})
    seeds = sorted(first.keys() & second.keys())
    return np.array([first[s][figure] - second[s][figure] for s in seeds])


def promises(cells: dict[Cell, Fits]) -> list[tuple[str, ...]]:
    """All pathways against the best hard-coded network and against MAP, cell by cell."""
    rows = []
    for (data, task), fits in cells.items():
        best = best_hard_coded(fits)
        if best is None or not len(differences(fits, (ALL, "learned"), best, "nll")):
            continue
        cells_of = {
            figure: differences(fits, (ALL, "learned"), best, figure)
            for figure in ("nll", "log_evidence", "accuracy")
        }
        rivals = [
            differences(fits, (ALL, "learned"), (ALL, prior), "nll") for prior in ("MAP", "chosen")
        ]
        nll, evidence, accuracy = (np.mean(found) for found in cells_of.values())
        met = nll <= 0.02 and evidence >= -0.02 and accuracy >= -0.01
        rows.append(
            (
                data,
                task,
                best[0],
                str(len(cells_of["nll"])),
                with_error(cells_of["nll"], 3),
                with_error(cells_of["log_evidence"], 2),
                with_error(100 * cells_of["accuracy"], 1),
                *(with_error(found, 3) if len(found) else "" for found in rivals),
                "yes" if met else "no",
            )
        )
    return rows


def with_error(values: np.ndarray, digits: int) -> str:
    """Mean ± standard error."""
    return f"{np.mean(values):+.{digits}f} ± {standard_error(values):.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=["learned", "MAP"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--parameters", default="{}", help="of the classifier, as JSON")
    parser.add_argument("--mnist", help="npz file with MNIST (fetched from OpenML)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
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
        run = Run(*cell, model, prior, seed, options.parameters)
        if run.key not in kept.by_key and options.report:
            continue
        if run.key not in kept.by_key:
            print(f"  {run.key}", flush=True)
        budget = None
        if prior == "chosen":
            learned, fixed = (fits[model, other][seed] for other in ("learned", "MAP"))
            budget = Budget(learned["seconds"], fixed["seconds"] / fixed["epochs"])
        found = kept.get(run.key, lambda run=run, of=budget: run.measure(options.mnist, of))
        fits.setdefault((model, prior), {})[seed] = found
    head = ("model", "prior", "fits", "accuracy, %", "NLL", "regret", "ECE")
    evidence = ("log evidence", "linear term")
    errors = ("γ of free pathways", "logits, shifts", "logits, turns", "epochs", "seconds")
    for (data, task), fits in cells.items():
        if fits:
            print(f"\n{data}, {task}")
            print_table((*head, *evidence, *errors), table_of(fits))
    what = ("NLL", "log evidence", "accuracy, %", "NLL − MAP's", "NLL − chosen's")
    print_table(("set", "task", "best hard-coded", "pairs", *what, "met"), promises(cells))
    what = ("change of the logits", "lowest log precision that breaks it", "apart")
    print()
    print_table(("set", "tasks", "fits", *what), told_apart(cells))
