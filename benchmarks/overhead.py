"""What does it cost to learn the prior, beside the same training without?

Three trainings of the same network on the same number of batches: with the learned prior, one
evidence for every five epochs; at a fixed prior; and a bare loop in torch (forward, cross entropy,
backward, fused Adam, the prior as weight decay) with nothing around it. Counted is the time of the
processor from the first epoch to the end of the last one: neither the preparation nor the evidence
that ends every fit. Pathways start jointly, so that none is held back or removed and all three
train the same ones to the end. They take turns, in an order drawn anew for each round; ratios are
medians over the rounds of the ratio within a round.

Beside it stands how the curvature was estimated, and the error of that estimate's log determinant
Σ log(1 + λμ/δ) at the fitted weights and precisions, over all tensors, for a few draws of rows and
signs, made as in the fit. For a hundred classes it is compared with sixteen sketches of all rows
and not with 99 exact columns.

Parts a, b, c: images of 8×8 (scikit-learn's digits, repeated with noise), 1×28×28 and 3×32×32
(random, smooth), 5000 of each, for 2, 10 and 100 classes. Part d: exact curvature on scikit-learn's
digits as they are. A case that is there is left out of a further run.

    python benchmarks/overhead.py [--part a|b|c|d] [--rounds N] [--epochs N] [--width N]
        [--classes K ...] [--threads N] [--output PATH]
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import (
    Results,
    curvature_of,
    mark_row,
    print_marks,
    print_table,
    ratio_cells,
    smooth_images,
    summary,
    traces_of,
    training_data,
)
from sklearn.datasets import load_digits
from skorch.callbacks import Callback
from torch import nn

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.budget import CurvaturePlan, rows_of_a_pass
from sklearn_softeq.curvature import Curvature, Estimator, input_factors
from sklearn_softeq.kronecker import spectra
from sklearn_softeq.networks import build_network

OUTPUT = Path(__file__).with_suffix(".json")
N, BATCH, EVERY = 5000, 128, 5
LR = 0.003  # all of these networks learn at it, with no warm-up
N_DRAWS = 5
MOST_EXACT_CLASSES, N_SKETCHES = 10, 16
TRAININGS = ("learned", "fixed", "bare")


@dataclass(frozen=True)
class Case:
    """Data, and what is trained on them.

    Parameters
    ----------
    shape : tuple (C, H, W)
    n_classes : int
    width : int
    epochs : int
        Of each training, a multiple of five.
    curvature : {"auto", "exact"}
    mark : float
        Time with the learned prior / without.
    """

    shape: tuple[int, int, int]
    n_classes: int
    width: int
    epochs: int
    curvature: str = "auto"
    mark: float = 1.10

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, C, H, W), standardised, and codes."""
        if self.curvature == "exact":
            X, y = digits(None, self.n_classes)
        elif self.shape == (1, 8, 8):
            X, y = digits(N, self.n_classes)
        else:
            X, y = smooth_images(N, self.shape, self.n_classes)
        return ((X - X.mean()) / X.std()).astype(np.float32), y

    def classifier(self, learned: bool) -> SoftEquivariantClassifier:
        """Trained for all of its epochs, whatever the figures say."""
        return SoftEquivariantClassifier(
            width=self.width,
            learn_prior=learned,
            start="joint",
            curvature=self.curvature,
            evidence_every=EVERY,
            burn_in=EVERY,
            max_epochs=self.epochs,
            n_iter_no_change=self.epochs,
            optimizer="adam",  # as in the bare loop
            lr=LR,
            lr_schedule="constant",
            batch_size=BATCH,
            standardize=False,
            random_state=0,
            callbacks=[Clock()],
        )


class Clock(Callback):
    """Processor time at the begin of the first epoch and at the end of each; the last to look."""

    def on_train_begin(self, net, **kwargs):
        self.times = []

    def on_epoch_begin(self, net, **kwargs):
        if not self.times:
            self.times.append(time.process_time())

    def on_epoch_end(self, net, **kwargs):
        self.times.append(time.process_time())


def digits(n: int | None, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, repeated with noise to n; their parity, value, or value and ink."""
    X, value = load_digits(return_X_y=True)
    ink = X.sum(1).argsort().argsort() * 10 // len(X)  # its decile
    y = {2: value % 2, 10: value, 100: 10 * value + ink}[n_classes]
    y = np.unique(y, return_inverse=True)[1]
    if n is not None:
        rng = np.random.default_rng(0)
        rows = np.resize(rng.permutation(len(X)), n)
        X, y = X[rows] + rng.standard_normal((n, X.shape[1])), y[rows]
    return X.reshape(-1, 1, 8, 8), y


def bare_loop(case: Case, X: np.ndarray, y: np.ndarray) -> list[float]:
    """Times at the begin and after each epoch of a plain loop."""
    inputs, targets = torch.from_numpy(X), torch.from_numpy(y)
    generator = torch.Generator().manual_seed(0)
    network = build_network(case.shape, int(y.max()) + 1, width=case.width, generator=generator)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1.0 / len(X), fused=True
    )
    n_batches = math.ceil(len(X) / BATCH)
    times = [time.process_time()]
    for _ in range(case.epochs):
        for rows in torch.randperm(len(X), generator=generator).tensor_split(n_batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        times.append(time.process_time())
    return times


def measure(case: Case, rounds: int) -> dict:
    """Times of all trainings, and what is to be known about the last one with a learned prior."""
    X, y = case.data()
    rng = np.random.default_rng(0)
    epochs: dict[str, list[list[float]]] = {name: [] for name in TRAININGS}
    fits: dict[str, SoftEquivariantClassifier] = {}
    for _ in range(rounds):
        for name in rng.permutation(TRAININGS):
            if name == "bare":
                times = bare_loop(case, X, y)
            else:
                fits[name] = case.classifier(name == "learned").fit(X, y)
                callbacks = fits[name].net_.callbacks_
                times = next(cb.times for _, cb in callbacks if isinstance(cb, Clock))
            epochs[name].append(np.diff(times).tolist())
    fitted = fits["learned"]
    seconds = {name: np.sum(found, 1) for name, found in epochs.items()}
    assert all(len(found[0]) == case.epochs for found in epochs.values())
    return {
        "rows": len(X),
        "classes": int(y.max()) + 1,
        "weights": sum(p.numel() for p in fitted.module_.parameters()),
        "evidences": len(fitted.scores_),
        "seconds per epoch": {n: summary(s / case.epochs) for n, s in seconds.items()},
        "learned / fixed": summary(seconds["learned"] / seconds["fixed"]),
        "fixed / bare": summary(seconds["fixed"] / seconds["bare"]),
        "epochs": epochs,
        **quality(fitted, X, y),
    }


def quality(clf: SoftEquivariantClassifier, X: np.ndarray, y: np.ndarray) -> dict:
    """How the curvature was estimated, and how far off its log determinant is."""
    plan: CurvaturePlan = clf.net_.course.evidence.chosen
    every_row = CurvaturePlan(Estimator(), len(X))
    if len(clf.classes_) > MOST_EXACT_CLASSES:
        every_row = CurvaturePlan(Estimator("rademacher", N_SKETCHES), len(X))
    found = {"curvature": plan.describe(len(X)), "log det errors": [0.0]}
    if plan == every_row:
        return found
    data = training_data(X, y)
    traces = traces_of(clf.module_, data)
    batches = data.in_order(rows_of_a_pass(clf.module_))
    constants = input_factors(clf.module_, batches, unit_weights=True)  # which a fit has, too
    true = log_det(clf, curvature_of(clf.module_, data, every_row, traces, 0, constants))
    errors = []
    for seed in range(N_DRAWS):
        estimate = curvature_of(clf.module_, data, plan, traces, seed, constants)
        errors.append(100 * (log_det(clf, estimate) / true - 1))
    return {**found, "log det": true, "log det errors": np.round(errors, 2).tolist()}


def log_det(clf: SoftEquivariantClassifier, curvature: Curvature) -> float:
    """Σ log(1 + λμ/δ) at the precisions of a fit."""
    precisions = clf.prior_precisions_by_name_
    return sum(
        s.log_det_ratio(torch.tensor(precisions[name], dtype=torch.float64)).item()
        for name, s in spectra(curvature.factors).items()
    )


SHAPES = {"a": (1, 8, 8), "b": (1, 28, 28), "c": (3, 32, 32)}
#: Of the network for each part. At twice the width of the larger images an epoch takes 5 seconds.
WIDTHS = {"a": 8, "b": 4, "c": 4, "d": 8}


def cases(part: str, options: argparse.Namespace) -> dict[str, Case]:
    """The cases of a part by name."""
    width = options.width or WIDTHS[part]
    if part == "d":
        name = "scikit-learn's digits, 10 classes, exact"
        return {name: Case((1, 8, 8), 10, width, options.epochs, "exact", 1.5)}
    shape = SHAPES[part]
    images = "×".join(map(str, shape))
    return {
        f"{images}, {k} classes": Case(shape, k, width, options.epochs) for k in options.classes
    }


def row_of(part: str, name: str, case: Case, result: dict) -> tuple[str, ...]:
    """A row of the table."""
    errors = np.abs(result["log det errors"])
    return (
        part,
        name,
        str(case.width),
        str(result["weights"]),
        result["curvature"],
        *(f"{result['seconds per epoch'][n]['median']:.3f}" for n in TRAININGS),
        *ratio_cells(result["learned / fixed"]),
        *ratio_cells(result["fixed / bare"]),
        f"{np.median(errors):.1f} ({errors.max():.1f})",
    )


def mark_rows(part: str, name: str, case: Case, result: dict) -> list[tuple[str, ...]]:
    """Rows for the marks of a case."""
    found = [
        mark_row(
            part,
            f"learned / fixed, {name}",
            result["learned / fixed"]["median"],
            "≤",
            case.mark,
        )
    ]
    if case.curvature == "auto":
        ratio = result["fixed / bare"]["median"]
        worst = np.abs(result["log det errors"]).max()
        found.append(mark_row(part, f"fixed / bare, {name}", ratio, "≤", 1.15))
        found.append(mark_row(part, f"log det error, %, worst draw, {name}", worst, "≤", 3.0))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=[*SHAPES, "d"], help="one part only (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a training (10)")
    parser.add_argument("--width", type=int, help="width of the network (8; large images: 4)")
    parser.add_argument(
        "--classes", type=int, nargs="+", choices=(2, 10, 100), default=[2, 10, 100]
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = Results(options.output)
    settings = f"rounds={options.rounds}, epochs={options.epochs}"
    rows, marks = [], []
    for part in [options.part] if options.part else [*SHAPES, "d"]:
        for name, case in cases(part, options).items():
            key = f"{part}, {name}, {settings}, width={case.width}, threads={options.threads}"
            result = kept.get(key, lambda case=case: measure(case, options.rounds))
            rows.append(row_of(part, name, case, result))
            marks += mark_rows(part, name, case, result)
            print(f"  {name}: done", flush=True)
    print(f"\n{options.epochs} epochs, {options.rounds} rounds")
    head = ("part", "images", "width", "weights", "curvature")
    seconds = tuple(f"{name}, s/epoch" for name in TRAININGS)
    ratios = ("learned / fixed", "quartiles", "fixed / bare", "quartiles")
    print_table((*head, *seconds, *ratios, "log det error, %: median (worst)"), rows)
    print_marks(marks)
