"""Which layers keep which symmetry in the paper's network, with all images?

MNIST's digits, averaged to 16×16 pixels, in a random quadrant of 32×32, labelled by the digit or by
digit and quadrant, and CIFAR-10 with random crops and flips; the stack of the paper with 10, 20, …
channels; one pathway or two; priors learned or fixed at one. Beside accuracy, NLL and evidence: the
pathway that carries each layer of a sum, and how much of its weights the data determined, γ/P.

    python benchmarks/full_scale.py [--sets S ...] [--models M ...] [--priors P ...] [--rows N]
        [--width N] [--epochs N] [--seconds S] [--mnist PATH] [--cifar10 PATH ...] [--device D]
        [--output PATH]

What is there already is left out, and after `--seconds` no further fit begins: a machine that is
lent for minutes can be used again and again. Both sets come from OpenML, or from npz files: MNIST's
as in symmetry.py, CIFAR-10's with X of the shape (n, 3, 32, 32) and y, of which the last file has
the test images.
"""

import argparse
import time
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from harness import Results, print_table
from sklearn.datasets import fetch_openml
from symmetry import measured, mnist, resized

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.datasets import make_quadrants

OUTPUT = Path(__file__).with_suffix(".json")
MODELS = {
    "CONV": ("conv",),
    "S-CONV": ("sparse_conv",),
    "F-FC": ("factored_fc",),
    "S-FC": ("sparse_fc",),
    "F-FC+CONV": ("factored_fc", "conv"),
    "S-FC+S-CONV": ("sparse_fc", "sparse_conv"),
    "FC": ("fc",),
    "FC+CONV": ("fc", "conv"),
}
NAMES = {paths[0]: name for name, paths in MODELS.items() if len(paths) == 1}
SETS = ("digit", "quadrant", "cifar10")
PRIORS = {"learned": {}, "MAP": {"learn_prior": False}}
N_TEST = 10_000

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@cache
def cifar10(paths: tuple[str, ...]) -> Split:
    """Training and test images (n, 3, 32, 32) from 0 to 1, with their labels."""
    if not paths:
        X, y = fetch_openml("CIFAR_10", return_X_y=True, as_frame=False, parser="auto")
        X, y = (X.reshape(-1, 3, 32, 32) / 255).astype(np.float32), y.astype(int)
        return X[:50000], y[:50000], X[50000:], y[50000:]
    files = [np.load(path) for path in paths]
    images = [(file["X"] / 255).astype(np.float32) for file in files]
    labels = [file["y"].astype(int) for file in files]
    return np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1]


@cache
def quadrants(path: str | None, label: str, seed: int) -> Split:
    """MNIST's digits at half their size in a quadrant, (n, 32, 32)."""
    X_train, y_train, X_test, y_test = mnist(path)
    small = (resized(np.pad(X / 255, ((0, 0), (2, 2), (2, 2))), 16) for X in (X_train, X_test))
    rng = np.random.RandomState(seed)
    return tuple(
        part
        for X, y in zip(small, (y_train, y_test), strict=True)
        for part in make_quadrants(X, y, label=label, random_state=rng)
    )


def split_of(name: str, options: argparse.Namespace) -> Split:
    """As many training images as asked for, drawn by the seed, and the test images."""
    if name == "cifar10":
        split = cifar10(tuple(options.cifar10))
    else:
        label = {"digit": "class", "quadrant": "class_and_position"}[name]
        split = quadrants(options.mnist, label, options.seed)
    X_train, y_train, X_test, y_test = split
    rows = np.random.default_rng(options.seed).permutation(len(X_train))[: options.rows]
    return X_train[rows], y_train[rows], X_test[:N_TEST], y_test[:N_TEST]


def measure(name: str, model: str, prior: str, options: argparse.Namespace) -> dict:
    """Fit and test."""
    split = split_of(name, options)
    clf = SoftEquivariantClassifier(
        pathways=MODELS[model],
        architecture="paper",
        width=options.width,
        max_epochs=options.epochs,
        augment="crop_flip" if name == "cifar10" else None,
        random_state=options.seed,
        device=options.device,
        **PRIORS[prior],
    )
    start = time.perf_counter()
    clf.fit(*split[:2])
    seconds = time.perf_counter() - start
    found = measured(clf, *split)
    return {**found, "n_weights": clf.n_weights_.tolist(), "seconds": round(seconds, 1)}


def pattern(fit: dict) -> str:
    """The pathway with the largest γ in each layer, and its γ/P."""
    gamma, weights = (np.array(fit[name], dtype=float) for name in ENERGIES)
    layers = []
    for of_layer, sizes in zip(gamma, weights, strict=True):
        best = int(of_layer.argmax())
        name = NAMES.get(fit["pathways"][best])
        if name is not None:  # the head has none of them
            layers.append(f"{name} {of_layer[best] / sizes[best]:.3f}")
    return ", ".join(layers)


ENERGIES = ("effective_dimensions", "n_weights")


def row_of(name: str, model: str, prior: str, fit: dict) -> tuple[str, ...]:
    """Of the table."""
    return (
        name,
        model,
        prior,
        f"{100 * fit['accuracy']:.2f}",
        f"{fit['nll']:.3f}",
        f"{fit['log_evidence']:.3f}",
        str(fit["weights"]),
        str(fit["epochs"]),
        f"{fit['seconds']:.0f}",
        pattern(fit) if prior == "learned" else "",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=list(PRIORS))
    parser.add_argument("--rows", type=int, default=60_000, help="for training, at most (60000)")
    parser.add_argument("--width", type=int, default=10, help="α (10)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=np.inf, help="no fit begins after these")
    parser.add_argument("--mnist", help="npz file with MNIST (fetched from OpenML)")
    parser.add_argument("--cifar10", nargs="+", default=[], help="npz files (fetched from OpenML)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin, kept, rows = time.perf_counter(), Results(options.output), []
    size = f"{options.rows} rows, width {options.width}, {options.epochs} epochs"
    for name, prior, model in product(options.sets, options.priors, options.models):
        key = f"{name}, {model}, {prior}, {size}, {options.seed}"
        if key not in kept.by_key:
            if time.perf_counter() - begin > options.seconds:
                continue
            print(f"  {key}", flush=True)
        fit = kept.get(key, lambda of=(name, model, prior): measure(*of, options))
        rows.append(row_of(name, model, prior, fit))
    print(f"\n{size}")
    head = ("set", "model", "prior", "accuracy, %", "NLL", "log evidence", "weights", "epochs")
    print_table((*head, "seconds", "pathway of each layer and its γ/P"), rows)
