"""Which symmetry does each layer choose: quarter turns, shifts alone, or none?

The sum of p4_conv, conv and factored_fc on three tasks of the same 8×8 digits: upright; turned by
random quarter turns, labelled with the digit; turned, labelled with the digit and the turn. Five
seeds, each with its own split, turns and start; both figures of a pathway's share in a layer: of
the effective dimensions γ, and of γ divided by the number of weights (the paper's). Shares are
averaged over the layers of a fit; intervals are over seeds (Student's t, 95 %).

    python benchmarks/orientation.py [--seeds 0 1 2 3 4] [--max-epochs N] [--output PATH]

Several processes with different seeds may write to one file.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from harness import Results, interval, print_table
from sklearn.metrics import log_loss

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.datasets import load_digit_tasks

OUTPUT = Path(__file__).with_suffix(".json")
PATHWAYS = ("p4_conv", "conv", "factored_fc")
TASKS = {"plain": "upright", "rotated": "quarter-turned", "rotation": "orientation-labelled"}
N_TRAIN = 1200


def fit(task, seed, max_epochs):
    """Scores and shares of one fit."""
    data = load_digit_tasks(task=task, n_train=N_TRAIN, random_state=seed)
    cap = {} if max_epochs is None else {"max_epochs": max_epochs}
    clf = SoftEquivariantClassifier(pathways=PATHWAYS, width=4, random_state=seed, **cap)
    start = time.perf_counter()
    clf.fit(data.X_train, data.y_train)
    seconds = time.perf_counter() - start
    turns, shifts = (clf.equivariance_error(data.X_test, g) for g in ("p4", "translation"))
    probabilities = clf.predict_proba(data.X_test)
    return {
        "accuracy": clf.score(data.X_test, data.y_test),
        "nll": log_loss(data.y_test, probabilities, labels=clf.classes_),
        "log_evidence_per_image": clf.log_marginal_likelihood_value_ / clf.n_observations_,
        "layers": clf.layer_names_,
        "pathways": clf.pathway_names_,
        "symmetry": clf.symmetry_.tolist(),
        "symmetry_per_weight": clf.symmetry_per_weight_.tolist(),
        "effective_dimensions": clf.effective_dimensions_.tolist(),
        "quarter_turns": {name: np.asarray(value).tolist() for name, value in turns.items()},
        "translation": {name: np.asarray(value).tolist() for name, value in shifts.items()},
        "epochs": clf.n_iter_,
        "seconds": seconds,
    }


def rows_of_shares(by_task):
    """Mean shares over the blocks, for each task and figure."""
    for task, fits in by_task.items():
        for figure, label in (("symmetry", "γ"), ("symmetry_per_weight", "γ / weights")):
            tables = [np.array(f[figure])[: _n_blocks(f), : len(PATHWAYS)] for f in fits]
            percent = 100 * np.array(tables)  # (seeds, layers, pathways)
            means, low, high = percent.mean(1), percent.min((0, 1)), percent.max((0, 1))
            cells = [
                f"{interval(means[:, j], 1)} ({low[j]:.0f}–{high[j]:.0f})"
                for j in range(len(PATHWAYS))
            ]
            yield (TASKS[task], label, *cells)


def rows_of_scores(by_task):
    """Accuracy, errors of equivariance and the free readout, for each task."""
    for task, fits in by_task.items():
        columns = (
            ([f["accuracy"] for f in fits], 3),
            ([f["nll"] for f in fits], 3),
            ([f["quarter_turns"]["logits"] for f in fits], 2),
            ([f["translation"]["logits"] for f in fits], 2),
            ([100 * f["symmetry"][-1][-1] for f in fits], 1),
            ([f["seconds"] for f in fits], 0),
        )
        yield (TASKS[task], *(interval(values, digits) for values, digits in columns))


def _n_blocks(result):
    return sum(name.startswith("blocks.") for name in result["layers"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--max-epochs", type=int, help="cap of the epochs")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    options = parser.parse_args()
    kept = Results(options.output)
    found = {task: [] for task in TASKS}
    cap = "" if options.max_epochs is None else f", max_epochs={options.max_epochs}"
    for seed in options.seeds:
        for task, fits in found.items():

            def compute(task=task, seed=seed):
                return fit(task, seed, options.max_epochs)

            fits.append(kept.get(f"{task}, seed {seed}{cap}", compute))
            print(f"  {task}, seed {seed}: done", flush=True)
    print_table(
        ("task", "share of", *(f"{name}, % (layers: min–max)" for name in PATHWAYS)),
        list(rows_of_shares(found)),
    )
    head = ("task", "accuracy", "NLL", "logits, quarter turns", "logits, shifts")
    print_table((*head, "free readout, % of γ", "seconds"), list(rows_of_scores(found)))
