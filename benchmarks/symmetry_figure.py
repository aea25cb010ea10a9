"""A picture of what symmetry.py found: all pathways less the best hard-coded network, by cell."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from harness import standard_error
from symmetry_tables import ALL, Cell, Fits, best_hard_coded, differences

__all__ = ["draw"]

#: Figure of a fit, its name on the axis, what it is multiplied by, the mark, and whether more is
#: better.
PANELS = (
    ("nll", "test NLL, nats per image", 1.0, 0.02, False),
    ("log_evidence", "log evidence, nats per image", 1.0, -0.02, True),
    ("accuracy", "accuracy, points", 100.0, -1.0, True),
)


def draw(cells: dict[Cell, Fits], path: Path) -> None:
    """Save the picture: means over paired seeds, ± standard errors, and the marks."""
    found = [(cell, fits, best) for cell, fits in cells.items() if (best := best_hard_coded(fits))]
    places = np.arange(len(found))[::-1]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 4.2), sharey=True)
    for ax, (name, label, unit, mark, more) in zip(axes, PANELS, strict=True):
        for place, (_, fits, best) in zip(places, found, strict=True):
            values = unit * differences(fits, (ALL, "learned"), best, name)
            mean = values.mean()
            met = mean >= mark if more else mean <= mark
            error = standard_error(values) if len(values) > 1 else 0.0
            ax.errorbar(mean, place, xerr=error, fmt="o", color="C0" if met else "C3", capsize=3)
            ax.plot(values, np.full(len(values), place), "|", color="0.7", zorder=0)
        ax.axvline(0.0, color="0.5", linewidth=0.8)
        ax.axvline(mark, color="0.3", linewidth=0.8, linestyle="--")
        ax.set_xlabel(label)
        ax.set_title("more is better" if more else "less is better", fontsize="medium")
    axes[0].set_yticks(places, [f"{data}, {task} ({best[0]})" for (data, task), _, best in found])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
