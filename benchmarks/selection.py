"""Which of several networks is best: does the evidence know, and what does a hold-out know?

The fits of symmetry.py to all training images, with learned priors, and others to four fifths of
them. What a selector says of the models of one task and seed is compared with their NLL on the test
images, which no selector sees:

* evidence: of the fit to all rows; with its linear term; both again after polishing, which trains
  the weights further at fixed precisions until the log joint has settled;
* hold-out: log likelihood of a fifth of the rows by the fit to the others;
* five folds: the same for each fifth in turn, summed.

    python benchmarks/selection.py [--sets S ...] [--tasks T ...] [--models M ...] [--seeds N ...]
        [--folds 1|5] [--polish] [--mnist PATH] [--symmetry PATH] [--output PATH] [--report]

What is there already is left out, in both files. One fold is the hold-out alone.
"""

import argparse
import math
import time
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import Results, print_table, standard_error
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from symmetry import MODELS, TASKS, Run, task_of
from symmetry import OUTPUT as SYMMETRY
from symmetry_tables import ALL, HARD_CODED, SETS

from sklearn_softeq import SoftEquivariantClassifier

OUTPUT = Path(__file__).with_suffix(".json")
N_FOLDS = 5
#: Rows of smaller hold-outs, which are parts of a fold.
FEWER = (50, 100)
#: Nats between two test NLLs that count as different, and that are plainly different.
MARGIN, CLEAR = 0.05, 0.3

Task = tuple[np.ndarray, ...]


def classifier(model: str, seed: int) -> SoftEquivariantClassifier:
    """Default parameters, and the pathways of this model."""
    pathways, width = MODELS[model]
    return SoftEquivariantClassifier(pathways=pathways, width=width, random_state=seed)


def polished(model: str, seed: int, task: Task) -> dict[str, float]:
    """Evidence and linear term of a fit to all rows that has been trained on to a mode."""
    X_train, y_train, X_test, y_test = task
    start = time.process_time()
    clf = classifier(model, seed).fit(X_train, y_train)
    epochs = clf.n_iter_
    clf.set_params(warm_start=True, learn_prior=False).fit(X_train, y_train)
    return {
        "log_evidence": round(clf.log_marginal_likelihood_value_ / clf.n_observations_, 4),
        "linear_term": round(clf.evidence_linear_term_, 4),
        "nll": round(log_loss(y_test, clf.predict_proba(X_test), labels=clf.classes_), 4),
        "epochs": [epochs, clf.n_iter_],  # the second number is of the polishing
        "seconds": round(time.process_time() - start, 1),
    }


def fit_to_fold(model: str, seed: int, task: Task, fold: int) -> dict[str, float]:
    """Log likelihood of the rows of one fold, by a fit to the others."""
    X, y, X_test, y_test = task
    rows = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(X, y)
    fitted, held_out = list(rows)[fold]
    start = time.process_time()
    clf = classifier(model, seed).fit(X[fitted], y[fitted])
    log_p = clf.predict_log_proba(X[held_out])
    found = log_p[np.arange(len(held_out)), np.searchsorted(clf.classes_, y[held_out])]
    # A smaller hold-out, drawn at random as a fold has its rows in their order.
    order = np.random.default_rng(seed).permutation(len(held_out))
    return {
        "log_likelihood": round(found.sum(), 2),
        "n_rows": len(held_out),
        "of_fewer": {n: round(found[order[:n]].mean(), 4) for n in FEWER},
        "nll": round(log_loss(y_test, clf.predict_proba(X_test), labels=clf.classes_), 4),
        "seconds": round(time.process_time() - start, 1),
    }


class Opinion(NamedTuple):
    """What a selector says of a model, more is better, and the test NLL of what it would choose."""

    score: float
    nll: float


def opinions_of(
    whole: Mapping, folds: Mapping[int, Mapping], mode: Mapping | None
) -> dict[str, Opinion]:
    """Those of each selector that has what it needs.

    Scores of a hold-out are of fits to four fifths. It can choose the model, which is then fitted
    to all rows, or the very network that it has scored.
    """
    found = {}
    for name, fit in (("evidence", whole), ("polished evidence", mode)):
        if fit is not None:
            found[name] = Opinion(fit["log_evidence"], fit["nll"])
            with_term = fit["log_evidence"] + fit["linear_term"]
            found[f"{name}, linear term"] = Opinion(with_term, fit["nll"])
    if 0 in folds:
        score = folds[0]["log_likelihood"] / folds[0]["n_rows"]
        found["hold-out"] = Opinion(score, whole["nll"])
        found["hold-out, its own network"] = Opinion(score, folds[0]["nll"])
        for n, score in folds[0].get("of_fewer", {}).items():
            found[f"{n} rows of the hold-out"] = Opinion(score, whole["nll"])
    if len(folds) == N_FOLDS:
        rows = sum(fold["n_rows"] for fold in folds.values())
        score = sum(fold["log_likelihood"] for fold in folds.values()) / rows
        found["five folds"] = Opinion(score, whole["nll"])
    return found


def table_of(choices: Iterable[Mapping[str, Mapping[str, Opinion]]]) -> list[tuple[str, ...]]:
    """A row for each selector, from what each says of each model in each choice.

    Errors are over choices, as the pairs of one choice are not independent of each other.
    """
    choices = list(choices)
    selectors = dict.fromkeys(name for models in choices for of in models.values() for name in of)
    rows = []
    for selector in selectors:
        asked = [
            [of[selector] for of in models.values()]
            for models in choices
            if all(selector in of for of in models.values())
        ]
        regrets = [max(found).nll - min(of.nll for of in found) for found in asked]
        rows.append(
            (
                selector,
                str(len(asked)),
                *(alike(asked, *gaps) for gaps in ((MARGIN, math.inf), (MARGIN, CLEAR))),
                with_error(regrets),
            )
        )
    return rows


def alike(asked: list[list[Opinion]], least: float, most: float) -> str:
    """Part of the pairs, of NLLs so far apart, that a selector orders by NLL, with their number."""
    right, n_pairs = [], 0
    for found in asked:
        pairs = [(a, b) for a, b in combinations(found, 2) if least < abs(a.nll - b.nll) <= most]
        n_pairs += len(pairs)
        if pairs:
            right.append([(a.score > b.score) == (a.nll < b.nll) for a, b in pairs])
    if not right:
        return ""
    together = 100 * np.mean([alike for choice in right for alike in choice])
    error = 100 * standard_error(np.array([np.mean(choice) for choice in right]))
    return f"{together:.0f} ± {error:.0f} % of {n_pairs}"


def with_error(values: list[float]) -> str:
    """Mean ± standard error."""
    if not values:
        return ""
    return f"{np.mean(values):.3f} ± {standard_error(np.array(values)):.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*HARD_CODED, ALL])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", type=int, choices=(1, N_FOLDS), default=N_FOLDS)
    parser.add_argument("--polish", action="store_true", help="fit again, and on to a mode")
    parser.add_argument("--mnist", help="npz file with MNIST (fetched from OpenML)")
    parser.add_argument("--symmetry", default=SYMMETRY, help="the fits to all rows")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    parser.add_argument("--report", action="store_true", help="tables of what is there, no fits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept, to_all = Results(options.output), Results(options.symmetry)
    choices: dict[tuple, dict] = {}
    for seed, data, name, model in product(
        options.seeds, options.sets, options.tasks, options.models
    ):
        run, key = Run(data, name, model, "learned", seed), f"{data}, {name}, {model}, {seed}"
        parts = {
            f"{key}, fold {fold}": lambda *of, fold=fold: fit_to_fold(*of, fold)
            for fold in range(options.folds)
        } | ({f"{key}, polished": polished} if options.polish else {})
        if not options.report:
            to_all.get(run.key, lambda run=run: run.measure(options.mnist))
        for part, fit in parts.items():
            if part in kept.by_key or options.report:
                continue
            print(f"  {part}", flush=True)
            task = task_of(data, name, seed, options.mnist)
            kept.get(part, lambda fit=fit, of=(model, seed, task): fit(*of))
        folds = {
            fold: kept.by_key[f"{key}, fold {fold}"]
            for fold in range(N_FOLDS)
            if f"{key}, fold {fold}" in kept.by_key
        }
        if run.key in to_all.by_key:
            whole = to_all.by_key[run.key]
            found = opinions_of(whole, folds, kept.by_key.get(f"{key}, polished"))
            choices.setdefault((data, name, seed), {})[model] = found
    complete = [models for models in choices.values() if len(models) == len(options.models)]
    heads = ("selector", "choices", f"ordered alike, > {MARGIN}", f"{MARGIN} to {CLEAR}", "regret")
    print("\nPairs of models by how far their test NLLs are apart; choices with all models fitted")
    print_table(heads, table_of(complete))
