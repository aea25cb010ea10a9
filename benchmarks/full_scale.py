"""Which layers keep which symmetry in the paper's network, with all images?

MNIST's digits, averaged to 16×16 pixels, in a random quadrant of 32×32, labelled by the digit or by
digit and quadrant, and CIFAR-10 with random crops and flips; the stack of the paper with 10, 20, …
channels; one pathway or two; priors learned or fixed at one. Beside accuracy, NLL and evidence: the
pathway that carries each layer of a sum, by how much of its weights the data determined, γ/P.

    python benchmarks/full_scale.py [--sets S ...] [--models M ...] [--priors P ...] [--rows N]
        [--width N] [--epochs N] [--seconds S] [--mnist PATH] [--cifar10 PATH ...] [--device D]
        [--seed N] [--threads N] [--output PATH]

What is there already is left out. After `--seconds` it stops and can be called again: then it goes
on after the epoch in which it was broken off, from states in a folder beside the output, which take
up gigabytes for FC. On a CPU, with as many threads, the result is that of an unbroken fit to the
last bit; on a GPU sums are in no fixed order, and no two fits are the same. It stops between epochs
only: trials before the first epoch, and what is measured after the last, are not broken up, and
begin anew if the process is killed in them. Seconds are the processor's in training, summed over
calls. Where memory does not do, that is the result; it is tried again once its line in the output
is gone.

Both sets come from OpenML, or from npz files: MNIST's as in symmetry.py, CIFAR-10's with X of the
shape (n, 3, 32, 32) and y, of which the last file has the test images.
"""

import argparse
import gc
import re
import shutil
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from harness import Results, print_table
from sklearn.base import clone
from sklearn.datasets import fetch_openml
from skorch.callbacks import Callback
from symmetry import measured, mnist, resized

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.datasets import make_quadrants
from sklearn_softeq.memory import ran_out

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
#: What the package says of a network that it does not even begin with.
TOO_LARGE = "bytes, and this machine has"

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


class OutOfTimeError(Exception):
    """The seconds of a call are over in the midst of a fit."""


class Clock(Callback):
    """Notes the processor seconds of each epoch, and breaks a fit off when its time is over.

    The history is part of the states that a fit goes on from, so their sum is that of all calls.
    """

    def __init__(self, end: float):
        self.end = end
        self.noted_ = time.process_time()  # trials count with the first epoch

    def on_epoch_end(self, net, **kwargs):
        net.history.record("seconds", self._since())
        if time.perf_counter() > self.end:
            # The state of this epoch, in any case: on their own large ones are written seldom.
            checkpoint = dict(net.callbacks_)["checkpoint"]
            checkpoint.run.keep(net, checkpoint.trials)
            raise OutOfTimeError

    def on_train_end(self, net, **kwargs):
        net.history.record("seconds", net.history[-1]["seconds"] + self._since())

    def _since(self) -> float:
        before, self.noted_ = self.noted_, time.process_time()
        return self.noted_ - before


def measure(name: str, model: str, prior: str, folder: Path, options: argparse.Namespace) -> dict:
    """Fit, or go on with a fit, and test; raises OutOfTimeError at ``options.end``."""
    split = split_of(name, options)
    clf = SoftEquivariantClassifier(
        pathways=MODELS[model],
        architecture="paper",
        width=options.width,
        max_epochs=options.epochs,
        augment="crop_flip" if name == "cifar10" else None,
        random_state=options.seed,
        device=options.device,
        callbacks=[Clock(options.end)],
        checkpoint_dir=folder,
        **PRIORS[prior],
    )
    # A clone's training is broken off by an interrupt; another's would end with it, as if complete.
    clf = clone(clf).fit(*split[:2])
    found = measured(clf, *split)
    seconds = round(sum(row["seconds"] for row in clf.net_.history), 1)
    size = {"n_weights": clf.n_weights_.tolist(), "device": clf.device_.type}
    return {**found, **size, "seconds": seconds}


def attempt(name: str, model: str, prior: str, folder: Path, options: argparse.Namespace) -> dict:
    """What was measured, or why it could not be for lack of memory."""
    try:
        return measure(name, model, prior, folder, options)
    except (MemoryError, RuntimeError, ValueError) as error:
        if not ran_out(error) and TOO_LARGE not in str(error):
            raise
        cause = error.__cause__ or error
        reason = str(cause) or type(cause).__name__
    # Nets refer to themselves: until they are collected the next fit would lack their memory.
    gc.collect()
    return {"failure": reason}


def key_of(name: str, model: str, prior: str, options: argparse.Namespace) -> str:
    """Of a fit among the results."""
    return f"{name}, {model}, {prior}, {size_of(options)}, {options.seed}"


def size_of(options: argparse.Namespace) -> str:
    """What all fits of a call have in common, in words."""
    return f"{options.rows} rows, width {options.width}, {options.epochs} epochs"


def fits_of(options: argparse.Namespace) -> dict[tuple[str, str, str], dict]:
    """By set, model and prior: what is there, and what is over before ``options.end``."""
    kept, found = Results(options.output), {}
    states = options.output.with_suffix(".fits.part")
    # Sets innermost, so that a run that is broken off has something of each.
    for prior, model, name in product(options.priors, options.models, options.sets):
        key = key_of(name, model, prior, options)
        folder = states / re.sub(r"[^\w.]+", "-", key)
        if key not in kept.by_key:
            if time.perf_counter() > options.end:
                continue
            print(f"  {key}", flush=True)
        try:
            fit = partial(attempt, name, model, prior, folder, options)
            found[name, model, prior] = kept.get(key, fit)
        except OutOfTimeError:
            print("  broken off; the next call goes on with it", flush=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # there is none, or a fit is to go on from it
        states.rmdir()
    return found


def pattern(fit: dict) -> str:
    """The pathway with the largest γ/P in each layer, its γ/P, and the others' shares of γ/P."""
    gamma, sizes = (
        np.array(fit[figure], dtype=float) for figure in ("effective_dimensions", "n_weights")
    )
    names = [NAMES[pathway] for pathway in fit["pathways"]]
    layers = []
    for per_weight in np.divide(gamma, sizes, out=np.zeros_like(gamma), where=sizes > 0):
        best, total = int(per_weight.argmax()), per_weight.sum()
        shares = per_weight / total if total > 0 else per_weight
        others = [f"{n} {shares[j]:.2g}" for j, n in enumerate(names) if j != best]
        layers.append(f"{names[best]} {per_weight[best]:.3f}")
        if others:
            layers[-1] += f" ({', '.join(others)})"
    return "; ".join(layers)


def row_of(name: str, model: str, prior: str, fit: dict) -> tuple[str, ...]:
    """Of the table."""
    if "failure" in fit:
        reason = textwrap.shorten(fit["failure"], 160, placeholder=" …")
        return (name, model, prior, *[""] * 6, f"failed: {reason}")
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


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options from the command line, or from these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=list(PRIORS))
    parser.add_argument("--rows", type=int, default=60_000, help="for training, at most (60000)")
    parser.add_argument("--width", type=int, default=10, help="α (10)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=np.inf, help="after these it stops")
    parser.add_argument("--mnist", help="npz file with MNIST (fetched from OpenML)")
    parser.add_argument("--cifar10", nargs="+", default=[], help="npz files (fetched from OpenML)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit what is missing, as far as the seconds go, and print what there is."""
    options = parsed(arguments)
    options.end = time.perf_counter() + options.seconds
    torch.set_num_threads(options.threads)
    fits = fits_of(options)
    shown = [of for of in product(options.sets, options.models, options.priors) if of in fits]
    print(f"\n{size_of(options)}")
    head = ("set", "model", "prior", "accuracy, %", "NLL", "log evidence", "weights", "epochs")
    layers = "pathway of each layer, its γ/P (the others' shares)"
    print_table((*head, "seconds", layers), [row_of(*of, fits[of]) for of in shown])


if __name__ == "__main__":
    main()
