"""Are probabilities better averaged over the posterior of the weights, and what does that cost?

Part a: scikit-learn's digits, 300 to fit and 1497 held out, stratified; five seeds, each with its
own split and start. One fit is predicted from its weights (MAP) and from its posterior
(``predictive="laplace"``, the closed form and samples, and at temperature 1, the posterior as the
curvature has it); and so is one with all pathways from the beginning and weak fixed priors, which
is too sure of itself. Beside them CalibratedClassifierCV around the classifier, and MLPClassifier
alone and calibrated. Part b: the largest resident memory of a process, with all that it has
loaded, that predicts rows of 100 classes (16×16 pixels), and how long it takes (Linux only). A
result that is there is left out of a further run.

    python benchmarks/calibration.py [--part a|b] [--seeds N ...] [--max-epochs N] [--only-rivals]
        [--output PATH]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from harness import (
    Results,
    calibration_error,
    curvature_of,
    mark_row,
    print_marks,
    print_table,
    standard_error,
    training_data,
)
from scaling import Setting
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.budget import CurvaturePlan
from sklearn_softeq.curvature import Estimator
from sklearn_softeq.posterior import Posterior
from sklearn_softeq.predictive import laplace_outputs

OUTPUT = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2, 3, 4)
N_FIT = 300
N_FOLDS = 3
SCORES = ("nll", "ece", "accuracy")
PREDICTIONS = {
    "MAP": {"predictive": "map"},
    "Laplace, closed form": {"predictive": "laplace"},
    "Laplace, 1000 samples": {"predictive": "laplace", "predictive_samples": 1000},
    "Laplace, closed form, temperature 1": {"predictive": "laplace", "predictive_temperature": 1.0},
}
#: What is added to the name of a fit, and its parameters.
FITS = {
    "": {},
    ", joint and weak priors": {
        "start": "joint",
        "learn_prior": False,
        "prior_precision": 0.1,
        "max_epochs": 60,
    },
}
#: Of part b: how many samples, None for the closed form, and rows; with samples passes are of 16.
MEASURED = {"closed form, 10 000 rows": (None, 10_000), "1000 samples, 1000 rows": (1000, 1000)}
LARGE = Setting(n_classes=100)
GIB = 2**30 / 1e6  # in MB


def scores(probabilities, codes):
    """NLL in nats, ECE and accuracy."""
    return {
        "nll": float(log_loss(codes, probabilities)),
        "ece": calibration_error(probabilities, codes),
        "accuracy": float((probabilities.argmax(1) == codes).mean()),
    }


def split(seed):
    """Images and classes to fit and held out."""
    X, y = load_digits(return_X_y=True)
    return train_test_split(X, y, train_size=N_FIT, stratify=y, random_state=seed)


def ours(seed, cap, **parameters):
    """The classifier with default parameters but for these, and a cap of its epochs."""
    if cap is not None:
        parameters["max_epochs"] = min(cap, parameters.get("max_epochs", cap))
    return SoftEquivariantClassifier(random_state=seed, **parameters)


def fitted(seed, max_epochs, fit):
    """A fit that keeps its posterior, and its seconds."""
    X, _, y, _ = split(seed)
    start = time.perf_counter()
    clf = ours(seed, max_epochs, predictive="laplace", **FITS[fit]).fit(X, y)
    return clf, time.perf_counter() - start


def own_scores(seed, max_epochs, fit):
    """One fit, predicted in each way."""
    clf, seconds = fitted(seed, max_epochs, fit)
    found = {"seconds": seconds, "start": clf.start_, "epochs": clf.n_iter_}
    _, X_held, _, y_held = split(seed)
    defaults = SoftEquivariantClassifier().get_params()
    names = ("predictive", "predictive_samples", "predictive_temperature")
    for name, parameters in PREDICTIONS.items():
        clf.set_params(**{n: defaults[n] for n in names}).set_params(**parameters)
        start = time.perf_counter()
        probabilities = clf.predict_proba(X_held)
        seconds = time.perf_counter() - start
        found[name] = {**scores(probabilities, y_held), "seconds of prediction": seconds}
    return found


def rivals(seed, max_epochs):
    """What else gives probabilities, by name."""

    def mlp():
        return MLPClassifier(max_iter=500, random_state=seed)

    def calibrated(clf):
        return CalibratedClassifierCV(clf, method="temperature", cv=N_FOLDS)

    return {
        "MAP, calibrated": lambda: calibrated(ours(seed, max_epochs)),
        "MLPClassifier": mlp,
        "MLPClassifier, calibrated": lambda: calibrated(mlp()),
    }


def rival_scores(make, seed):
    """One fit of another classifier."""
    X, X_held, y, y_held = split(seed)
    start = time.perf_counter()
    clf = make().fit(X, y)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **scores(clf.predict_proba(X_held), y_held)}


def part_a(results, seeds, max_epochs, only_rivals=False):
    """Scores of every seed, as a table, and the marks."""
    found: dict[str, list[dict]] = {}
    cap = "" if max_epochs is None else f", max_epochs={max_epochs}"
    for seed in seeds:
        for fit in FITS if not only_rivals else ():
            key = f"a, ours{fit}{cap}, seed {seed}"
            own = results.get(key, lambda s=seed, fit=fit: own_scores(s, max_epochs, fit))
            for name in PREDICTIONS:
                found.setdefault(name + fit, []).append(own[name])
        for name, make in rivals(seed, max_epochs).items():
            key = f"a, {name}{cap}, seed {seed}"
            result = results.get(key, lambda make=make, seed=seed: rival_scores(make, seed))
            found.setdefault(name, []).append(result)
        print(f"  seed {seed}: done", flush=True)
    print_table(
        ("probabilities", "NLL", "ECE", "accuracy"),
        [(name, *(cell(values, score) for score in SCORES)) for name, values in found.items()],
    )
    if only_rivals:
        return []
    mean = {n: {s: np.mean([v[s] for v in values]) for s in SCORES} for n, values in found.items()}
    name = "Laplace, closed form"
    return [
        mark_row(
            "a",
            f"{score.upper()} of {name} / MAP{fit}",
            mean[name + fit][score] / mean[f"MAP{fit}"][score],
            "≤",
            1.0,
        )
        for fit in FITS
        for score in ("nll", "ece")
    ]


def cell(values, score):
    """Mean and its standard error over seeds."""
    column = np.array([value[score] for value in values])
    return f"{column.mean():.4f} ± {standard_error(column):.4f}"


def measure_here(n_samples, n_rows):
    """Peak of this process, and the time of a prediction of many rows and classes."""
    setting = replace(LARGE, n_rows=n_rows)
    network, (inputs, targets) = setting.network(), setting.data()
    few = training_data(inputs[:256], targets[:256])
    plan = CurvaturePlan(Estimator("rademacher"), len(few))
    factors = curvature_of(network, few, plan, torch.ones(len(few))).factors
    posterior = Posterior.from_curvature(factors, dict.fromkeys(factors, 1.0), torch.float32)
    del factors

    start = time.process_time()
    laplace_outputs(network, posterior, inputs, LARGE.n_classes, n_samples)
    seconds = time.process_time() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"megabytes": kilobytes * 1024 / 1e6, "seconds": seconds}


def measure(name):
    """The same in a process of its own."""
    child = [sys.executable, __file__, "--child", json.dumps(MEASURED[name])]
    done = subprocess.run(child, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def part_b(results):
    """Memory and time, as a table, and the mark."""
    found = {n: results.get(f"b, {n}", lambda n=n: measure(n)) for n in MEASURED}
    rows = [(n, f"{r['megabytes']:.0f}", f"{r['seconds']:.0f}") for n, r in found.items()]
    print_table(("100 classes", "MB of the process", "s"), rows)
    return [
        mark_row("b", f"MB for 100 classes, {n}", r["megabytes"], "≤", GIB)
        for n, r in found.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("a", "b"), help="one part only (both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of part a (0 … 4)")
    parser.add_argument("--only-rivals", action="store_true", help="of part a")
    parser.add_argument("--max-epochs", type=int, help="cap of the epochs of our fits")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(*json.loads(options.child))))
        sys.exit()
    kept, marks = Results(options.output), []
    if options.part != "b":
        marks += part_a(kept, options.seeds, options.max_epochs, options.only_rivals)
    if options.part != "a":
        marks += part_b(kept)
    if marks:
        print_marks(marks)
