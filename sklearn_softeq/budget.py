"""What an evidence may cost, and the estimate of the curvature that keeps to it.

Learning the prior should cost no more than a tenth of the training without it. The choice is made
before training and from sizes alone, so that a fit can be repeated to the last bit: costs are
counted in rows of a MAP epoch (the time that training spends on one row), and the constants below
were measured on networks of every kind of layer on one core of a CPU.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace

from torch import nn

from .curvature import Estimator
from .layers import SharedLinear

__all__ = [
    "BUDGET",
    "EXACT_COLUMNS",
    "MAX_ROWS",
    "MIN_ROWS",
    "CurvaturePlan",
    "plan_curvature",
    "rows_of_a_pass",
]

#: Share of the time of training that the evidences within it may take. What is left of a tenth is
#: for the last one, which sees all data.
BUDGET = 0.07

#: Rows × columns of the output Hessian that "auto" treats exactly whatever their share of the
#: time is: that is a fraction of a second, and a fit without chance in it.
EXACT_COLUMNS = 4096

#: Rows of a subset: fewer estimate a log determinant too badly (256: by 3 to 8 %), more than the
#: larger number do not improve it (4096: by 0.1 %).
MIN_ROWS, MAX_ROWS = 256, 4096

#: What a pass of the curvature may hold at a time, in numbers: so many, or about 1.4 times those of
#: a step of training on 128 rows. And the fewest and the most rows of a pass: with fewer it takes
#: longer than its arithmetic, and more gain nothing.
PASS_NUMBERS, FEWEST_PASS_ROWS, MOST_PASS_ROWS = 2**24, 32, 512

#: Numbers that a step and a pass hold for each one that a map of the network gives out, measured:
#: features, gradients, and what operations take for themselves.
STEP_NUMBERS, ROW_NUMBERS = 1.5, 2.2

#: Cost of a row with no column (its forward pass, and the products of its inputs), of each
#: column, of the derivatives in lengthscales in multiples of that, and of the cube of the size
#: of a factor, and of a weight in the hyper steps, for each multiplication of a row.
ROW, COLUMN, LENGTHSCALES, CUBE, WEIGHT = 1.1, 0.6, 2.8, 0.4, 120.0


@dataclass(frozen=True)
class CurvaturePlan:
    """An estimator, and the rows that it sees at each evidence during training.

    Parameters
    ----------
    estimator : Estimator
    n_rows : int
    copies : int, default=1
        How often one row may be among a subset, each time with random columns of its own.
    """

    estimator: Estimator
    n_rows: int
    copies: int = 1

    def describe(self, n_rows: int) -> str:
        """In words, for data of so many rows."""
        columns = {
            "exact": "exact",
            "rademacher": f"Rademacher sketches: {self.estimator.samples}",
            "monte_carlo": f"Monte-Carlo labels: {self.estimator.samples}",
        }[self.estimator.columns]
        rows = "all rows" if self.n_rows >= n_rows else f"{self.n_rows} of {n_rows} rows"
        return f"{columns}, {rows}"


def plan_curvature(
    network: nn.Module,
    n_rows: int,
    n_columns: int,
    *,
    curvature: str,
    samples: int,
    subset: int | None,
    kfac: str,
    every: int,
    lengthscales: bool,
) -> CurvaturePlan:
    """Choose how the curvature is estimated.

    Parameters
    ----------
    network : nn.Module
        Sums of maps :class:`SharedLinear`.
    n_rows, n_columns : int
        Rows of the data, and columns of the output Hessian of each.
    curvature : {"auto", "exact", "rademacher", "monte_carlo"}
        "auto" is exact on all rows while rows × columns is at most :data:`EXACT_COLUMNS` or the
        budget allows it, then a sketch of all rows, then of a subset.
    samples : int
        Random columns of each row; with as many as there are exact ones, these are taken.
    subset : int or None
        Rows; None: all of them, or what "auto" chooses.
    kfac : {"expand", "reduce"}
    every : int
        Epochs from one evidence to the next: what the budget is a share of.
    lengthscales : bool
        Whether derivatives in lengthscales are needed.
    """
    rows = n_rows if subset is None else min(subset, n_rows)
    name = "rademacher" if curvature == "auto" else curvature
    random = Estimator(name, samples, kfac)
    exact = replace(random, columns="exact")
    if samples >= n_columns:
        random = exact
    # A row that has most of the curvature needs as many random columns as it has exact ones.
    copies = 1 if random.columns == "exact" else max(1, n_columns // samples)
    if curvature != "auto":
        return CurvaturePlan(random, rows, copies)
    if rows * n_columns <= EXACT_COLUMNS:
        return CurvaturePlan(exact, rows)
    if subset is not None:
        return CurvaturePlan(random, rows, copies)
    costs = {e: _Cost(network, e, n_columns, lengthscales) for e in (exact, random)}
    allowed = BUDGET * every * n_rows
    for estimator in (exact, random):
        if costs[estimator](n_rows) <= allowed:
            return CurvaturePlan(estimator, n_rows)
    most = bisect_right(range(n_rows), allowed, key=costs[random]) - 1
    return CurvaturePlan(random, min(max(most, MIN_ROWS), MAX_ROWS, n_rows), copies)


def rows_of_a_pass(network: nn.Module) -> int:
    """How many rows a network sees at a time when its curvature is computed."""
    maps = [m for m in network.modules() if isinstance(m, SharedLinear)]
    given = factors = 0
    for m in maps:
        n_blocks, n_out, n_in = m.weight.shape
        given += m.n_positions * n_blocks * n_out
        factors += n_blocks * (n_in**2 + n_out**2)
    room = max(PASS_NUMBERS, 1.4 * STEP_NUMBERS * 128 * given) - factors
    rows = int(room / (ROW_NUMBERS * max(given, 1)))
    return min(max(rows, FEWEST_PASS_ROWS), MOST_PASS_ROWS)


class _Cost:
    """Cost of an evidence on a number of rows, in rows of a MAP epoch."""

    def __init__(
        self, network: nn.Module, estimator: Estimator, n_columns: int, lengthscales: bool
    ):
        columns = n_columns if estimator.columns == "exact" else estimator.samples
        self.row = (ROW + COLUMN * columns) * (LENGTHSCALES if lengthscales else 1.0)
        self.maps = [m for m in network.modules() if isinstance(m, SharedLinear)]
        self.columns = columns
        self.weights = sum(m.weight.numel() for m in self.maps)
        self.multiplications = sum(m.n_positions * m.weight.numel() for m in self.maps)

    def __call__(self, n_rows: int) -> float:
        cubes = 0
        for m in self.maps:
            n_blocks, n_out, n_in = m.weight.shape
            seen = n_rows * m.n_positions
            # Of fewer tokens than their size only the products with each other are decomposed.
            cubes += n_blocks * (min(n_in, seen) ** 3 + min(n_out, seen * self.columns) ** 3)
        fixed = (CUBE * cubes + WEIGHT * self.weights) / self.multiplications
        return self.row * n_rows + fixed
