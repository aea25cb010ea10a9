"""How well does the classifier do on digits, and what does its evidence say?

Part a: five-fold cross-validation on the 8×8 digits, beside classifiers of scikit-learn in the
same run. Part b: the tasks "digit" and "quadrant" with the equivariant pathway alone, the free one
alone, and their sum. Part c: what `simplify` makes of the sum on "digit", and the time that
predictions take with all pathways on, as fitted and simplified, three seeds. Every result is
written as soon as it is there; a further run leaves out those that are present.

    python benchmarks/digits.py [--part a|b|c] [--max-epochs N] [--output PATH]
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
from harness import Results, print_table, timed_rounds
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.datasets import load_digit_tasks
from sklearn_softeq.layers import PATHWAYS

OUTPUT = Path(__file__).with_suffix(".json")
N_FOLDS = 5
N_TRAIN = 1200
SEEDS = range(3)
N_ROUNDS = 40
MODELS = (("conv",), ("factored_fc",), ("conv", "factored_fc"))


def ours(max_epochs, **parameters):
    """The classifier with default parameters but for these."""
    if max_epochs is not None:
        parameters["max_epochs"] = max_epochs
    return SoftEquivariantClassifier(**{"random_state": 0, **parameters})


def timed_fit(clf, X, y):
    """Seconds of one fit."""
    start = time.perf_counter()
    clf.fit(X, y)
    return time.perf_counter() - start


def part_a(results, max_epochs):
    """Cross-validation on the digits."""
    X, y = load_digits(return_X_y=True)
    rivals = {
        "SoftEquivariantClassifier": lambda: ours(max_epochs),
        "SVC": SVC,
        "MLPClassifier": lambda: MLPClassifier(random_state=0, max_iter=500),
        "RandomForestClassifier": lambda: RandomForestClassifier(random_state=0),
    }
    folds = list(StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(X, y))
    rows = []
    for name, make in rivals.items():
        cap = _cap(max_epochs) if name == "SoftEquivariantClassifier" else ""
        found = []
        for k, (train, test) in enumerate(folds):

            def compute(make=make, train=train, test=test):
                clf = make()
                seconds = timed_fit(clf, X[train], y[train])
                return {"accuracy": clf.score(X[test], y[test]), "seconds": seconds}

            found.append(results.get(result_key("a", name, f"fold {k}", cap), compute))
        accuracy = [result["accuracy"] for result in found]
        seconds = np.mean([result["seconds"] for result in found])
        rows.append(
            (name, f"{np.mean(accuracy):.4f}", f"{np.std(accuracy, ddof=1):.4f}", f"{seconds:.2f}")
        )
        print(f"  {name}: done", flush=True)
    print_table(("classifier", "accuracy", "deviation over folds", "seconds per fit"), rows)


def part_b(results, max_epochs):
    """Tasks with and without the symmetry, pathways alone and summed."""
    rows = []
    for task in ("digit", "quadrant"):
        data = load_digit_tasks(task=task, n_train=N_TRAIN)
        for pathways in MODELS:

            def compute(data=data, pathways=pathways):
                return task_result(ours(max_epochs, pathways=pathways), data)

            name = "+".join(pathways)
            result = results.get(result_key("b", task, name, _cap(max_epochs)), compute)
            rows.append(
                (
                    task,
                    name,
                    f"{result['accuracy']:.3f}",
                    f"{result['nll']:.3f}",
                    f"{result['log_evidence_per_image']:.3f}",
                    f"{result['free_effective_dimensions']:.1f}",
                    str(result["epochs"]),
                    f"{result['seconds']:.1f}",
                )
            )
            print(f"  {task}, {name}: done", flush=True)
    head = ("task", "pathways", "accuracy", "NLL", "log evidence per image", "γ of free pathways")
    print_table((*head, "epochs", "seconds per fit"), rows)


def task_result(clf, data):
    """Scores and learned symmetry of one fit."""
    seconds = timed_fit(clf, data.X_train, data.y_train)
    free = [j for j, name in enumerate(clf.pathway_names_) if PATHWAYS[name].group is None]
    probabilities = clf.predict_proba(data.X_test)
    return {
        "accuracy": clf.score(data.X_test, data.y_test),
        "nll": log_loss(data.y_test, probabilities, labels=clf.classes_),
        "log_evidence_per_image": clf.log_marginal_likelihood_value_ / clf.n_observations_,
        "free_effective_dimensions": float(clf.effective_dimensions_[:, free].sum()),
        "effective_dimensions": clf.effective_dimensions_.tolist(),
        "n_weights": clf.n_weights_.tolist(),
        "symmetry": clf.symmetry_.tolist(),
        "equivariance_error": clf.equivariance_error(data.X_test).layers.tolist(),
        "logits_equivariance_error": clf.equivariance_error(data.X_test).logits,
        "epochs": clf.n_iter_,
        "seconds": seconds,
    }


def part_c(results, max_epochs):
    """What is left of the sum of a symmetric task when its idle pathways are taken out."""
    rows = []
    for seed in SEEDS:
        key = result_key("c", "digit", f"seed {seed}", _cap(max_epochs))
        result = results.get(key, lambda seed=seed: simplified(max_epochs, seed))
        before, after = result["n_weights"]
        everything, fitted, simple = (1000 * result[name] for name in TIMES)
        rows.append(
            (
                str(seed),
                f"{result['accuracy']:.3f}",
                f"{before} → {after}",
                f"{100 * (1 - after / before):.0f} %",
                f"{result['change']:.1g}",
                *(f"{time:.0f} ms" for time in (everything, fitted, simple)),
            )
        )
    head = ("seed", "accuracy", "weights", "less", "change of a probability", "all on")
    print_table((*head, "as fitted", "simplified"), rows)


TIMES = ("all_on", "fitted", "simple")


def simplified(max_epochs, seed):
    """Weights and the time of predictions before and after."""
    data = load_digit_tasks(task="digit", n_train=N_TRAIN, random_state=seed)
    clf = ours(max_epochs, random_state=seed).fit(data.X_train, data.y_train)
    everything, simple = copy.deepcopy(clf), clf.simplify(data.X_test)
    for layer in everything.module_.layers.values():
        layer.enabled = dict.fromkeys(layer.enabled, True)
    steps = {
        name: lambda each=each: each.predict_proba(data.X_test)
        for name, each in zip(TIMES, (everything, clf, simple), strict=True)
    }
    seconds = timed_rounds(steps, N_ROUNDS)
    return {
        "accuracy": clf.score(data.X_test, data.y_test),
        "n_weights": simple.simplification_.n_weights,
        "change": simple.simplification_.change,
        **{name: float(np.median(found)) for name, found in seconds.items()},
    }


def result_key(part, *names):
    """What a result is kept under; a cap of the epochs makes it another result."""
    return ", ".join([part, *(name for name in names if name)])


def _cap(max_epochs):
    return "" if max_epochs is None else f"max_epochs={max_epochs}"


PARTS = {"a": part_a, "b": part_b, "c": part_c}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="one part only (all)")
    parser.add_argument("--max-epochs", type=int, help="cap of the epochs of our fits")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    options = parser.parse_args()
    kept = Results(options.output)
    for name, part in PARTS.items():
        if options.part in (None, name):
            part(kept, options.max_epochs)
