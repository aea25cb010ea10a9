"""What the fits of symmetry.py say: tables of each cell, of the promise, of symmetry told apart."""

from itertools import product

import numpy as np
from harness import interval, standard_error, table_text

__all__ = [
    "ALL",
    "HARD_CODED",
    "HEADS",
    "SETS",
    "Cell",
    "Fits",
    "best_hard_coded",
    "codes",
    "promises",
    "report",
    "summary",
    "table_of",
    "told_apart",
]

SETS = ("digits", "mnist")
ALL = "all"
HARD_CODED = ("conv", "factored_fc", "sparse_fc", "p4_conv")
FREE = ("factored_fc", "sparse_fc")
#: Tasks with and without a symmetry, the change of the logits under it, and the pathways of the sum
#: that do not keep it.
PAIRS = (
    ("digit", "quadrant", "shifts", FREE),
    ("rotated", "rotation", "turns", ("conv", *FREE, "free")),
)
#: Pairs of fits at which the promise is kept or not, and fits of each task at which symmetries are
#: told apart or not; with fewer the answer is only so far.
ENOUGH_PAIRS, ENOUGH_FITS = 20, 5

#: ``max_epochs`` of the estimator, at which a fit has to end.
CAP = 400

#: Seeds that had been looked at when the defaults of these fits were chosen
#: (docs/design/sums_log.md).
N_SEEN = 5

Cell = tuple[str, str]
Fits = dict[tuple[str, str], dict[int, dict]]  # by (model, prior) and seed

HEADS = {
    "cell": (
        *("model", "prior", "fits", "accuracy, %", "NLL", "regret", "ECE"),
        *("log evidence", "linear term", "γ of free pathways", "lowest log δ of them"),
        *("logits, shifts", "logits, turns", "epochs", "seconds"),
    ),
    "promises": (
        *("set", "task", "best hard-coded", "pairs", "NLL", "log evidence", "accuracy, %", "met"),
    ),
    "fixed": (
        *("set", "task", "pairs with MAP, chosen", "NLL − MAP's", "scaled"),
        *("NLL − chosen's", "scaled", "seconds / chosen's"),
    ),
    "apart": (
        *("set", "tasks", "fits", "change of the logits"),
        *("lowest log precision that breaks it", "apart"),
    ),
}
#: Columns of a cell's table that say how good its fits are, and what they have learned.
SCORES, LEARNED = (0, 1, 2, 3, 4, 5, 6, 13, 14), (0, 1, 7, 8, 9, 10, 11, 12)


def table_of(fits: Fits) -> list[tuple[str, ...]]:
    """A row for each model and prior of a cell."""
    best = best_hard_coded(fits)
    rows = []
    for (model, prior), by_seed in fits.items():
        found = list(by_seed.values())
        regret = differences(fits, (model, prior), best, "nll") if best else []
        lowest = np.median([lowest_precision(f, FREE) for f in found])
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
                interval([of_pathways(f, "effective_dimensions", FREE).sum() for f in found], 1),
                f"{lowest:.1f}" if any(name in FREE for name in found[0]["pathways"]) else "",
                interval([f["shifts"][-1] for f in found]),
                interval([f["turns"][-1] for f in found]),
                f"{np.mean([f['epochs'] for f in found]):.0f}",
                f"{np.mean([f['seconds'] for f in found]):.0f}",
            )
        )
    return rows


def of_pathways(fit: dict, figure: str, pathways: tuple[str, ...]) -> np.ndarray:
    """A figure of these pathways, (layers, pathways)."""
    columns = [j for j, name in enumerate(fit["pathways"]) if name in pathways]
    return np.array(fit[figure], dtype=float)[:, columns]


def lowest_precision(fit: dict, pathways: tuple[str, ...]) -> float:
    """Logarithm of the precision of the most open of these pathways; inf if all were removed.

    One open pathway of one layer breaks the symmetry, so it is the lowest of all layers.
    """
    found = of_pathways(fit, "log_precisions", pathways)
    return np.nan_to_num(found, nan=np.inf).min(initial=np.inf)


def told_apart(cells: dict[Cell, Fits]) -> list[tuple[str, ...]]:
    """What the sum says of a symmetry where it is there and where it is broken, over seeds."""
    rows = []
    for data, (kept, broken, error, free) in product(SETS, PAIRS):
        both = [cells.get((data, task), {}).get((ALL, "learned")) for task in (kept, broken)]
        if not all(both):
            continue
        errors = [[fit[error][-1] for fit in fits.values()] for fits in both]
        precisions = [[lowest_precision(fit, free) for fit in fits.values()] for fits in both]
        apart = max(errors[0]) < min(errors[1]) and min(precisions[0]) > max(precisions[1])
        rows.append(
            (
                data,
                f"{kept} / {broken}",
                " / ".join(str(len(fits)) for fits in both),
                " / ".join(f"{min(found):.2f} to {max(found):.2f}" for found in errors),
                " / ".join(f"{min(found):.1f} to {max(found):.1f}" for found in precisions),
                verdict(apart, min(map(len, both)), ENOUGH_FITS),
            )
        )
    return rows


def verdict(good: bool, n: int, enough: int) -> str:
    """Yes or no, or what it looks like so far."""
    return ("yes" if good else "no") if n >= enough else f"so far {'yes' if good else 'no'}"


def best_hard_coded(fits: Fits) -> tuple[str, str] | None:
    """The network with one pathway, and learned prior, of the best mean NLL; None if one lacks."""
    there = [(model, "learned") for model in HARD_CODED if (model, "learned") in fits]
    if len(there) < len(HARD_CODED):
        return None
    seeds = set.intersection(*(set(fits[k]) for k in there))
    if not seeds:
        return None
    return min(there, key=lambda k: np.mean([fits[k][seed]["nll"] for seed in seeds]))


def paired(fits: Fits, one: tuple, other: tuple) -> list[tuple[dict, dict]]:
    """The fits of two models, seed by seed, where both have them."""
    first, second = fits.get(one, {}), fits.get(other, {})
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def differences(fits: Fits, one: tuple, other: tuple, figure: str) -> np.ndarray:
    """Of a figure between two models, over the seeds that both have."""
    return np.array([a[figure] - b[figure] for a, b in paired(fits, one, other)])


def promises(cells: dict[Cell, Fits], first_seed: int = 0) -> list[tuple[str, ...]]:
    """All pathways against the best hard-coded network, cell by cell.

    The best hard-coded network is that of all seeds; of the differences those from a first one on.
    """
    rows = []
    for (data, task), of_all in cells.items():
        best = best_hard_coded(of_all)
        fits = {
            which: {seed: fit for seed, fit in by_seed.items() if seed >= first_seed}
            for which, by_seed in of_all.items()
        }
        if best is None or not paired(fits, (ALL, "learned"), best):
            continue
        found = {
            figure: differences(fits, (ALL, "learned"), best, figure)
            for figure in ("nll", "log_evidence", "accuracy")
        }
        nll, evidence, accuracy = (np.mean(values) for values in found.values())
        met = nll <= 0.02 and evidence >= -0.02 and accuracy >= -0.01
        rows.append(
            (
                data,
                task,
                best[0],
                str(len(found["nll"])),
                with_error(found["nll"], 3),
                with_error(found["log_evidence"], 2),
                with_error(100 * found["accuracy"], 1),
                verdict(met, len(found["nll"]), ENOUGH_PAIRS),
            )
        )
    return rows


def fixed_priors(cells: dict[Cell, Fits]) -> list[tuple[str, ...]]:
    """All pathways with the learned prior against fixed ones, cell by cell."""
    rows = []
    for (data, task), fits in cells.items():
        pairs = [len(paired(fits, (ALL, "learned"), (ALL, prior))) for prior in ("MAP", "chosen")]
        if any(pairs):
            differing = (
                against_fixed(fits, prior, figure)
                for prior in ("MAP", "chosen")
                for figure in ("nll", "scaled_nll")
            )
            n_pairs = ", ".join(map(str, pairs))
            rows.append((data, task, n_pairs, *differing, seconds_of_chosen(fits)))
    return rows


def against_fixed(fits: Fits, prior: str, figure: str) -> str:
    """NLL with the learned prior less that with a fixed one, as it is or with its logits scaled.

    In the end of a fit with a learned prior logits are scaled down to a certain training loss, if
    need be. That is not the prior's doing: the second figure grants it to the fixed one, too.
    """
    pairs = paired(fits, (ALL, "learned"), (ALL, prior))
    if not pairs:
        return ""
    return with_error(np.array([ours["nll"] - fit[figure] for ours, fit in pairs]), 3)


def seconds_of_chosen(fits: Fits) -> str:
    """Median ratio of the time of a learned prior and of one chosen by cross-validation."""
    pairs = paired(fits, (ALL, "learned"), (ALL, "chosen"))
    return f"{np.median([a['seconds'] / b['seconds'] for a, b in pairs]):.2f}" if pairs else ""


def with_error(values: np.ndarray, digits: int) -> str:
    """Mean ± standard error."""
    mean = f"{np.mean(values):+.{digits}f}"
    return f"{mean} ± {standard_error(values):.{digits}f}" if len(values) > 1 else mean


def codes(cells: dict[Cell, Fits]) -> dict[str, int]:
    """How many fits each state of the package made."""
    found: dict[str, int] = {}
    for fits in cells.values():
        for by_seed in fits.values():
            for fit in by_seed.values():
                code = fit["environment"].get("code", "not recorded")
                found[code] = found.get(code, 0) + 1
    return found


def summary(cells: dict[Cell, Fits]) -> dict[str, str]:
    """What all cells say together, in Markdown: each section by its name."""
    found = {"promises": table_text(HEADS["promises"], promises(cells))}
    if later := promises(cells, first_seed=N_SEEN):
        found["promises"] += (
            f"\n\nOf seeds from {N_SEEN} on, which had no part in the choice of these defaults:\n\n"
            + table_text(HEADS["promises"], later)
        )
    if against := fixed_priors(cells):
        found["fixed priors"] = table_text(HEADS["fixed"], against)
    found["symmetries told apart"] = table_text(HEADS["apart"], told_apart(cells))
    if any(cells.values()):
        found["seconds"] = seconds_of_fits(cells)
    return found


def seconds_of_fits(cells: dict[Cell, Fits]) -> str:
    """How long fits with learned priors took, and how many of them were still learning."""
    fits: dict[bool, list[dict]] = {False: [], True: []}
    for (model, prior), by_seed in (item for of in cells.values() for item in of.items()):
        if prior == "learned":
            fits[model == ALL] += by_seed.values()
    found = []
    for several, of_these in fits.items():
        if of_these:
            low, high = np.quantile([fit["seconds"] for fit in of_these], (0.05, 0.95))
            capped = np.mean([fit["epochs"] >= CAP for fit in of_these])
            found.append(
                f"with {'all pathways' if several else 'one or two pathways'} {low:.0f} to "
                f"{high:.0f} s ({100 * capped:.0f} % at the cap)"
            )
    return (
        f"A fit with learned precisions takes, in processor time, {'; '.join(found)}: the middle\n"
        f"nine tenths, two fits at a time on two cores. The cap is {CAP} epochs."
    )


def report(cells: dict[Cell, Fits]) -> str:
    """All tables, in Markdown."""
    parts = []
    for (data, task), fits in cells.items():
        if fits:
            head, rows = HEADS["cell"], table_of(fits)
            # In two: a page is not so wide.
            parts += [f"## {data}, {task}"] + [
                table_text([head[j] for j in some], [[row[j] for j in some] for row in rows])
                for some in (SCORES, LEARNED)
            ]
    for name, text in summary(cells).items():
        parts += [f"## {name[0].upper()}{name[1:]}", text]
    states = ", ".join(f"{n} by {code}" for code, n in codes(cells).items())
    return "\n\n".join([*parts, f"Fits by states of the code: {states}."])
