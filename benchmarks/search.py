"""What does a search with one hold-out cost and lose against five-fold cross-validation?

Ten candidates on scikit-learn's digits, 1000 images to choose and fit with and 797 to test, five
seeds with splits and starts of their own. The fits and scores of ``GridSearchCV`` with one
stratified split, a fifth held out (200 rows), as the user guide recommends, or a tenth; of the same
with five folds, of which the first is the fifth held out; and without any row held out, by the
evidence (``marginal_likelihood_score``). All candidates are fitted to all 1000 as well, which says
how good each choice is: its regret is the test NLL of its choice less that of the best candidate.
Fits are made one by one, each once; seconds of a search are the sum of the processor's in its fits
and scores and in the fit of its choice to all rows. What is there is left out of a further run.

    python benchmarks/search.py [--seeds N ...] [--max-epochs N] [--output PATH] [--report]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from harness import Results, mark_row, print_marks, print_table, standard_error
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import (
    ParameterGrid,
    StratifiedKFold,
    StratifiedShuffleSplit,
    train_test_split,
)

from sklearn_softeq import SoftEquivariantClassifier

OUTPUT = Path(__file__).with_suffix(".json")
N_FIT = 1000
GRID = {
    "pathways": ["conv", "factored_fc", "p4_conv", ("conv", "factored_fc"), ("p4_conv", "conv")],
    "width": [2, 4],
}
CANDIDATES = list(ParameterGrid(GRID))
N_FOLDS = 5
SPLITS = {
    "one hold-out": lambda seed: StratifiedShuffleSplit(1, test_size=0.1, random_state=seed),
    "five folds": lambda seed: StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed),
}
RECOMMENDED, USUAL, EVIDENCE = "a fifth held out", "five folds", "evidence"
#: The splits that each search judges by.
SEARCHES = {
    "a tenth held out": [("one hold-out", 0)],
    RECOMMENDED: [("five folds", 0)],
    USUAL: [("five folds", fold) for fold in range(N_FOLDS)],
}


def split(seed):
    """Images and digits to choose and fit with, and to test with."""
    X, y = load_digits(return_X_y=True)
    return train_test_split(X, y, train_size=N_FIT, stratify=y, random_state=seed)


def fit_of(candidate, seed, cap, search=None, fold=0):
    """Log loss of what one fit of a search, or the fit to all rows, has not seen, and its time."""
    X, X_test, y, y_test = split(seed)
    if search is not None:
        kept, held = list(SPLITS[search](seed).split(X, y))[fold]
        X, X_test, y, y_test = X[kept], X[held], y[kept], y[held]
    parameters = {} if cap is None else {"max_epochs": cap}
    start = time.process_time()
    clf = SoftEquivariantClassifier(random_state=seed, **candidate, **parameters).fit(X, y)
    nll = log_loss(y_test, clf.predict_proba(X_test), labels=clf.classes_)
    seconds = time.process_time() - start
    return {
        "nll": round(nll, 4),
        "evidence": round(clf.log_marginal_likelihood_value_ / len(y), 4),
        "epochs": clf.n_iter_,
        "seconds": round(seconds, 1),
    }


def name_of(candidate):
    """A candidate in words."""
    pathways = candidate["pathways"]
    pathways = pathways if isinstance(pathways, str) else " + ".join(pathways)
    return f"{pathways}, width {candidate['width']}"


def searches(kept, seed, cap):
    """What each search chose, its regret and its time; None while fits are missing.

    And the regret of each fold as the only rows held out.
    """
    whole = [kept(candidate, seed, cap) for candidate in CANDIDATES]
    fits = {
        split: [kept(candidate, seed, cap, *split) for candidate in CANDIDATES]
        for split in dict.fromkeys(split for splits in SEARCHES.values() for split in splits)
    }
    if None in whole or any(None in found for found in fits.values()):
        return None
    nll = np.array([fit["nll"] for fit in whole])
    held = {split: np.array([fit["nll"] for fit in found]) for split, found in fits.items()}
    found = {}
    for name, splits in SEARCHES.items():
        chosen = int(np.argmin(sum(held[split] for split in splits)))
        seconds = sum(fit["seconds"] for split in splits for fit in fits[split])
        found[name] = chosen, nll[chosen] - nll.min(), seconds + whole[chosen]["seconds"]
    chosen = int(np.argmax([fit["evidence"] for fit in whole]))
    found[EVIDENCE] = chosen, nll[chosen] - nll.min(), sum(fit["seconds"] for fit in whole)
    return found, [nll[np.argmin(held[split])] - nll.min() for split in SEARCHES[USUAL]]


def report(done):
    """A row for each way to choose, and the marks."""
    found, alone = zip(*done, strict=True)
    rows = []
    for name in (*SEARCHES, EVIDENCE):
        chosen, regret, seconds = zip(*(of_seed[name] for of_seed in found), strict=True)
        regret = np.array(regret)
        rows.append(
            (
                name,
                f"{regret.mean():.3f} ± {standard_error(regret):.3f}",
                f"{np.median(seconds):.0f}",
                "; ".join(name_of(CANDIDATES[place]) for place in chosen),
            )
        )
    print_table(("chosen by", "regret, nats", "seconds, median", "choices"), rows)
    alone = np.ravel(alone)
    print(f"each fold as the only one held out, {alone.size} times: regret {alone.mean():.3f}")
    ratio = np.median([of_seed[USUAL][2] / of_seed[RECOMMENDED][2] for of_seed in found])
    regret = np.mean([of_seed[RECOMMENDED][1] for of_seed in found])
    print_marks(
        [
            mark_row("search", f"seconds of {USUAL} / {RECOMMENDED}, median", ratio, "≥", 4.0),
            mark_row("search", f"regret of {RECOMMENDED}, nats", regret, "≤", 0.02),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--max-epochs", type=int, help="a smaller cap of the epochs")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    parser.add_argument("--report", action="store_true", help="tables of what is there, no fits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.output)

    def kept(candidate, seed, cap, *of_search):
        """A fit from the file, or a new one."""
        rows = ", ".join(map(str, of_search)) or "all rows"
        key = f"seed {seed}, {name_of(candidate)}, {rows}"
        key += "" if cap is None else f", max_epochs={cap}"
        if key not in results.by_key and options.report:
            return None
        if key not in results.by_key:
            print(f"  {key}", flush=True)
        return results.get(key, lambda: fit_of(candidate, seed, cap, *of_search))

    done = [searches(kept, seed, options.max_epochs) for seed in options.seeds]
    whole = [found for found in done if found is not None]
    if whole:
        report(whole)
