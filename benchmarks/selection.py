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
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from harness import Results, print_table, standard_error
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from symmetry import ALL, HARD_CODED, MODELS, SETS, TASKS, Run, task_of
from symmetry import OUTPUT as SYMMETRY

from sklearn_softeq import SoftEquivariantClassifier

OUTPUT = Path(__file__).with_suffix(".json")
N_FOLDS = 5
MARGIN = 0.05  # nats between two test NLLs that count as different


def classifier(model: str, seed: int) -> SoftEquivariantClassifier:
    """Default parameters, and the pathways of this model."""
    pathways, width = MODELS[model]
    return SoftEquivariantClassifier(pathways=pathways, width=width, random_state=seed)


def polished(model: str, seed: int, task: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Evidence and linear term of a fit to all rows that has been trained on to a mode."""
    start = time.process_time()
    clf = classifier(model, seed).fit(*task[:2])
    clf.set_params(warm_start=True, learn_prior=False).fit(*task[:2])
    return {
        "log_evidence": round(clf.log_marginal_likelihood_value_ / clf.n_observations_, 4),
        "linear_term": round(clf.evidence_linear_term_, 4),
        "seconds": round(time.process_time() - start, 1),
    }


def fit_to_fold(model: str, seed: int, task: tuple[np.ndarray, ...], fold: int) -> dict[str, float]:
    """Log likelihood of the rows of one fold, by a fit to the others."""
    X, y = task[:2]
    rows = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(X, y)
    fitted, held_out = list(rows)[fold]
    start = time.process_time()
    clf = classifier(model, seed).fit(X[fitted], y[fitted])
    p = clf.predict_proba(X[held_out])
    return {
        "log_likelihood": round(-log_loss(y[held_out], p, labels=clf.classes_, normalize=False), 2),
        "n_rows": len(held_out),
        "seconds": round(time.process_time() - start, 1),
    }


def scores_of(
    whole: Mapping, folds: Mapping[int, Mapping], mode: Mapping | None
) -> dict[str, float]:
    """What each selector says of a model; more is better."""
    found = {}
    for name, fit in (("evidence", whole), ("polished evidence", mode)):
        if fit is not None:
            found[name] = fit["log_evidence"]
            found[f"{name}, linear term"] = fit["log_evidence"] + fit["linear_term"]
    if 0 in folds:
        found["hold-out"] = folds[0]["log_likelihood"] / folds[0]["n_rows"]
    if len(folds) == N_FOLDS:
        rows = sum(fold["n_rows"] for fold in folds.values())
        found["five folds"] = sum(fold["log_likelihood"] for fold in folds.values()) / rows
    return found


def table_of(choices: Mapping[tuple, Mapping[str, tuple[float, Mapping]]]) -> list[tuple]:
    """A row for each selector, from (test NLL, scores) by choice and model."""
    ordered, regrets = defaultdict(list), defaultdict(list)
    for models in choices.values():
        if len(models) == 1:
            continue
        for (nll, scores), (other_nll, others) in combinations(models.values(), 2):
            if abs(nll - other_nll) > MARGIN:
                for selector in scores.keys() & others.keys():
                    right = (scores[selector] > others[selector]) == (nll < other_nll)
                    ordered[selector].append(right)
        best = min(nll for nll, _ in models.values())
        for selector in set.intersection(*(set(scores) for _, scores in models.values())):
            chosen = max(models.values(), key=lambda found, s=selector: found[1][s])
            regrets[selector].append(chosen[0] - best)
    return [
        (
            selector,
            str(len(right)),
            f"{100 * np.mean(right):.0f} %",
            str(len(regrets[selector])),
            f"{np.mean(regrets[selector]):.3f} ± {standard_error(np.array(regrets[selector])):.3f}"
            if len(regrets[selector]) > 1
            else "",
        )
        for selector, right in sorted(ordered.items())
    ]


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
            scores = scores_of(whole, folds, kept.by_key.get(f"{key}, polished"))
            choices.setdefault((data, name, seed), {})[model] = (whole["nll"], scores)
    print(f"\nPairs of models whose test NLL differs by more than {MARGIN}")
    print_table(("selector", "pairs", "ordered alike", "choices", "regret"), table_of(choices))
