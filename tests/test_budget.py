"""What estimate is chosen for which sizes; its cost against a sum map by map."""

from dataclasses import dataclass, replace

import pytest
import torch
from cases import chain, randomise
from torch import nn

from sklearn_softeq import budget, networks
from sklearn_softeq.budget import (
    EXACT_COLUMNS,
    MAX_ROWS,
    MIN_ROWS,
    CurvaturePlan,
    plan_curvature,
    rows_of_a_pass,
)
from sklearn_softeq.curvature import Estimator
from sklearn_softeq.layers import FC, Conv, FactoredFC, SharedLinear
from sklearn_softeq.networks import build_network

PATHWAYS = ("conv", "factored_fc")
EXACT = Estimator("exact")


def network_of(shape=(1, 8, 8), n_outputs=10, width=2, **options):
    return build_network(shape, n_outputs, pathways=PATHWAYS, width=width, **options)


@dataclass(frozen=True)
class Question:
    """What is asked of :func:`plan_curvature`, with the defaults of the estimator."""

    n_rows: int
    n_outputs: int = 10
    curvature: str = "auto"
    samples: int = 1
    subset: int | None = None
    kfac: str = "expand"
    every: int = 5
    lengthscales: bool = False

    def plan(self, network=None):
        network = network or network_of(n_outputs=self.n_outputs)
        asked = vars(self)
        return plan_curvature(
            network,
            n_columns=self.n_outputs - 1,
            **{name: value for name, value in asked.items() if name != "n_outputs"},
        )


# Near to those that were measured, which may be measured again.
COSTS = {"ROW": 1.0, "COLUMN": 0.5, "LENGTHSCALES": 3.0, "CUBE": 0.4, "WEIGHT": 100.0}
SHARE = 0.1


@pytest.fixture(autouse=True)
def prices(monkeypatch):
    for name, value in {"BUDGET": SHARE, **COSTS}.items():
        monkeypatch.setattr(budget, name, value)


@pytest.fixture
def no_time(monkeypatch, prices):
    monkeypatch.setattr(budget, "BUDGET", 0.0)


@pytest.fixture
def all_the_time(monkeypatch, prices):
    monkeypatch.setattr(budget, "BUDGET", 1e9)


def sketch(samples=1, kfac="expand"):
    return Estimator("rademacher", samples, kfac)


def columns_and_rows(plan):
    return plan.estimator.columns, plan.n_rows


# ── what is asked for is taken

EXPLICIT = [
    (Question(9000, curvature="exact"), EXACT, 9000),
    (Question(9000, curvature="exact", subset=700), EXACT, 700),
    (Question(9000, curvature="exact", samples=3), replace(EXACT, samples=3), 9000),
    (Question(9000, curvature="rademacher"), sketch(), 9000),
    (Question(9000, curvature="rademacher", samples=8, subset=10), sketch(8), 10),
    (Question(9000, curvature="rademacher", kfac="reduce"), sketch(kfac="reduce"), 9000),
    (Question(9000, curvature="monte_carlo", samples=2), Estimator("monte_carlo", 2), 9000),
    (Question(50, curvature="monte_carlo", subset=60), Estimator("monte_carlo"), 50),
    # few rows change nothing
    (Question(20, curvature="rademacher"), sketch(), 20),
    # as many random columns as there are exact ones
    (Question(9000, 4, "rademacher", samples=3), replace(EXACT, samples=3), 9000),
    (Question(9000, 4, "monte_carlo", samples=9), replace(EXACT, samples=9), 9000),
    (Question(9000, 4, "rademacher", samples=2), sketch(2), 9000),
    (Question(9000, 2, "monte_carlo"), EXACT, 9000),
]


@pytest.mark.parametrize(("question", "estimator", "n_rows"), EXPLICIT, ids=str)
@pytest.mark.parametrize("share", [0.0, SHARE, 1e9])
def test_what_is_asked_for_is_taken_whatever_it_costs(
    monkeypatch, question, estimator, n_rows, share
):
    monkeypatch.setattr(budget, "BUDGET", share)
    found = question.plan()
    assert (found.estimator, found.n_rows) == (estimator, n_rows)


@pytest.mark.parametrize(
    ("question", "copies"),
    [
        # random columns of a row at most as often as it has exact ones
        (Question(9000), 9),
        (Question(9000, samples=2), 4),
        (Question(9000, subset=8999), 9),
        (Question(9000, samples=2, subset=8999), 4),
        (Question(9000, samples=8, subset=8999), 1),
        (Question(9000, 100, "rademacher", subset=10), 99),
        (Question(9000, curvature="monte_carlo", samples=4, subset=10), 2),
        # exact ones of a row are the same each time
        (Question(9000, curvature="exact", subset=10), 1),
        (Question(9000, samples=9, subset=8999), 1),
        (Question(9000, 2, subset=8999), 1),
        (Question(9000, subset=3), 1),
    ],
    ids=str,
)
def test_how_often_a_row_may_be_in_a_subset(no_time, question, copies):
    assert question.plan().copies == copies


# ── auto: few columns are exact

FEW = EXACT_COLUMNS // 9  # rows of ten classes


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (Question(FEW), ("exact", FEW)),
        (Question(FEW + 1), ("rademacher", MIN_ROWS)),
        (Question(1), ("exact", 1)),
        (Question(EXACT_COLUMNS, 2), ("exact", EXACT_COLUMNS)),
        (Question(EXACT_COLUMNS // 2, 3), ("exact", EXACT_COLUMNS // 2)),
        (Question(EXACT_COLUMNS // 2 + 1, 3), ("rademacher", MIN_ROWS)),
        # of a subset that the user chose
        (Question(9000, subset=FEW), ("exact", FEW)),
        (Question(9000, subset=FEW + 1), ("rademacher", FEW + 1)),
        (Question(FEW, subset=9000), ("exact", FEW)),
        (Question(9000, subset=8999), ("rademacher", 8999)),
        (Question(9000, subset=9001), ("rademacher", 9000)),
        (Question(9000, subset=3), ("exact", 3)),
        # one column is exact: there is nothing to sketch
        (Question(9000, 2), ("exact", MIN_ROWS)),
        (Question(9000, 2, subset=8999), ("exact", 8999)),
        (Question(9000, 4, samples=3), ("exact", MIN_ROWS)),
        (Question(9000, 4, samples=2), ("rademacher", MIN_ROWS)),
        # as few rows as there are
        (Question(MIN_ROWS, 100), ("rademacher", MIN_ROWS)),
        (Question(MIN_ROWS - 50, 100), ("rademacher", MIN_ROWS - 50)),
        (Question(MIN_ROWS + 50, 100), ("rademacher", MIN_ROWS)),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengthscales", [False, True])
def test_auto_where_there_is_no_time(no_time, question, expected, lengthscales):
    question = replace(question, lengthscales=lengthscales)
    assert columns_and_rows(question.plan()) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (Question(9000), ("exact", 9000)),
        (Question(10**7, 1000), ("exact", 10**7)),
        (Question(9000, samples=3), ("exact", 9000)),
        # a subset that the user chose is no question of time
        (Question(9000, subset=8999), ("rademacher", 8999)),
    ],
    ids=str,
)
def test_auto_where_there_is_all_the_time(all_the_time, question, expected):
    assert columns_and_rows(question.plan()) == expected


@pytest.mark.parametrize("kfac", ["expand", "reduce"])
@pytest.mark.parametrize("subset", [None, 300, 600])
def test_the_form_and_the_number_of_columns_are_those_asked_for(no_time, kfac, subset):
    question = Question(9000, samples=3, kfac=kfac, subset=subset)
    columns = "exact" if subset == 300 else "rademacher"
    assert question.plan().estimator == Estimator(columns, 3, kfac)


# ── auto: the budget


def slow_cost(network, n_columns, n_rows, lengthscales=False):
    """Cost of an evidence in rows of a MAP epoch, from the words beside the constants."""
    row = COSTS["ROW"] + COSTS["COLUMN"] * n_columns
    row *= COSTS["LENGTHSCALES"] if lengthscales else 1
    fixed = multiplications = 0
    for layer in (m for m in network.modules() if isinstance(m, SharedLinear)):
        positions, (n_blocks, n_out, n_in) = layer.n_positions, layer.weight.shape
        multiplications += positions * n_blocks * n_out * n_in
        fixed += COSTS["WEIGHT"] * n_blocks * n_out * n_in
        for _ in range(n_blocks):
            fixed += COSTS["CUBE"] * min(n_in, n_rows * positions) ** 3
            fixed += COSTS["CUBE"] * min(n_out, n_rows * positions * n_columns) ** 3
    return row * n_rows + fixed / multiplications


def small():
    return chain(Conv(1, 4, (4, 4)), nn.ReLU(), FC(4, 10, (4, 4)))


NETWORKS = {
    "conv": small,
    "stack": network_of,
    "large factors": lambda: chain(FC(2, 40, (8, 8)), nn.ReLU(), FC(40, 10, (8, 8))),
    "shared": lambda: chain(Conv(80, 300, (2, 2)), nn.ReLU(), FC(300, 10, (2, 2))),
    "blocks": lambda: chain(FactoredFC(3, 30, (6, 6)), nn.ReLU(), FC(30, 10, (6, 6))),
}
each_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
QUESTIONS = [
    Question(n_rows, samples=samples, every=every, lengthscales=lengthscales)
    for n_rows in (3000, 30_000)
    for samples in (1, 2)
    for every in (1, 5, 20, 60)
    for lengthscales in (False, True)
]


@each_network
@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_the_best_estimate_within_the_budget_is_taken(monkeypatch, build, question):
    # Least and largest numbers of rows that never bind: see below.
    monkeypatch.setattr(budget, "MIN_ROWS", 0)
    monkeypatch.setattr(budget, "MAX_ROWS", 10**9)
    network, n_rows, allowed = build(), question.n_rows, SHARE * question.every * question.n_rows
    columns, rows = columns_and_rows(question.plan(network))

    def cost(n_columns, n_rows):
        return slow_cost(network, n_columns, n_rows, question.lengthscales)

    if cost(9, n_rows) <= allowed:
        assert (columns, rows) == ("exact", n_rows)
    elif cost(question.samples, n_rows) <= allowed:
        assert (columns, rows) == ("rademacher", n_rows)
    else:
        assert columns == "rademacher"
        assert rows < n_rows
        assert rows <= 0 or cost(question.samples, rows) <= allowed
        assert cost(question.samples, rows + 1) > allowed


def test_all_three_occur():
    found = set()
    for question in QUESTIONS:
        columns, rows = columns_and_rows(question.plan(small()))
        found.add((columns, rows < question.n_rows))
    assert found == {("exact", False), ("rademacher", False), ("rademacher", True)}


@pytest.mark.parametrize(
    ("n_rows", "every", "expected"),
    [
        (1000, 1, MIN_ROWS),  # a little time: less than the least that is of use
        (MIN_ROWS + 1, 1, MIN_ROWS),
        (200_000, 5, MAX_ROWS),  # much time, but more than what improves the estimate
    ],
)
def test_a_subset_is_of_a_size_that_is_of_use(n_rows, every, expected):
    question = Question(n_rows, n_outputs=20, every=every)
    network = small()
    allowed = SHARE * every * n_rows
    assert (slow_cost(network, 1, expected) > allowed) == (expected == MIN_ROWS)
    assert columns_and_rows(question.plan(network)) == ("rademacher", expected)


def test_all_rows_may_be_more_than_a_subset_may_have():
    question = Question(200_000, every=60)
    assert question.plan(small()).n_rows == 200_000


# ── how the choice moves


def rows_of(network, questions):
    return [question.plan(network).n_rows for question in questions]


@each_network
def test_more_rows_are_never_seen_less(build):
    network = build()
    n_rows = [*range(500, 20_000, 1500), 40_000, 100_000]
    for every in (1, 5, 20, 60):
        found = rows_of(network, [Question(n, every=every) for n in n_rows])
        assert found == sorted(found)
    found = rows_of(small(), [Question(n) for n in n_rows])
    assert len(set(found)) > 5


def test_rarer_evidences_see_more():
    question, every = Question(20_000), (1, 2, 5, 10, 20, 100, 1000)
    plans = [replace(question, every=e).plan(small()) for e in every]
    rows = [plan.n_rows for plan in plans]
    assert rows == sorted(rows)
    assert len(set(rows)) >= 4
    assert [plan.estimator.columns for plan in plans[-2:]] == ["exact", "exact"]
    assert rows[-1] == 20_000


def test_derivatives_in_lengthscales_leave_time_for_less():
    network = small()
    for every in (1, 2, 5):
        question = Question(8000, every=every)
        plain, moving = rows_of(network, [question, replace(question, lengthscales=True)])
        assert moving < plain
    rare = Question(20_000, every=60)
    assert rare.plan(network).estimator.columns == "exact"
    assert replace(rare, lengthscales=True).plan(network).estimator.columns == "rademacher"


def test_more_columns_leave_time_for_fewer_rows():
    found = rows_of(small(), [Question(8000, samples=samples) for samples in (1, 2, 4, 8)])
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_larger_factors_leave_time_for_fewer_rows():
    # The decompositions of a wide map take a time that depends on no number of rows.
    wide = chain(Conv(1, 4, (4, 4)), nn.ReLU(), FC(4, 100, (4, 4)))
    question = Question(8000)
    assert question.plan(wide).n_rows < question.plan(small()).n_rows


# ── what it depends on


def test_a_function_of_sizes_alone():
    question, network = Question(8000), small()
    expected = question.plan(network)
    assert MIN_ROWS < expected.n_rows < MAX_ROWS
    with torch.device("meta"):
        shapes = small()
    for other in (randomise(small()), small().double(), small().eval(), shapes):
        assert question.plan(other) == expected
    state = torch.get_rng_state()
    assert question.plan(network) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("plan", "n_rows", "expected"),
    [
        (CurvaturePlan(EXACT, 500), 500, "exact, all rows"),
        (CurvaturePlan(Estimator("exact", 3), 256), 500, "exact, 256 of 500 rows"),
        (CurvaturePlan(sketch(), 600), 500, "Rademacher sketches: 1, all rows"),
        (CurvaturePlan(sketch(4), 499), 500, "Rademacher sketches: 4, 499 of 500 rows"),
        (CurvaturePlan(Estimator("monte_carlo", 2), 7), 7, "Monte-Carlo labels: 2, all rows"),
        (
            CurvaturePlan(Estimator("monte_carlo", 1, "reduce"), 1),
            7,
            "Monte-Carlo labels: 1, 1 of 7 rows",
        ),
    ],
)
def test_a_plan_in_words(plan, n_rows, expected):
    assert plan.describe(n_rows) == expected


def test_words_for_what_is_chosen():
    assert Question(50).plan().describe(50) == "exact, all rows"
    plan = Question(9000, subset=1000).plan()
    assert plan.describe(9000) == "Rademacher sketches: 1, 1000 of 9000 rows"


# ── rows of a pass


@pytest.mark.parametrize(
    ("maps", "given", "factors"),
    [
        ([FC(2, 3, (4, 4))], 3 * 16, 32**2 + 48**2),
        ([Conv(2, 3, (64, 32), (2, 2))], 3 * 32 * 16, 18**2 + 3**2),
        ([FactoredFC(30, 40, (16, 8), (2, 2))], 1200 + 1280, 30 * (128**2 + 40**2) + 40 * 1924),
        ([Conv(1, 40, (32, 64))], 40 * 2048, 9**2 + 40**2),  # a step needs more than that
        ([FC(1, 3, (64, 64))], 3 * 4096, 4096**2 + 12288**2),  # the factors alone need more
        ([], 0, 0),
    ],
)
def test_rows_of_a_pass_keep_to_the_memory(maps, given, factors):
    room = max(2**24, 1.4 * 1.5 * 128 * given) - factors
    expected = min(max(int(room / (2.2 * given)), 32), 512) if given else 512
    assert rows_of_a_pass(nn.Sequential(*maps)) == expected


def test_rows_of_a_pass_of_networks(monkeypatch):
    monkeypatch.setattr(networks, "_memory", lambda: 2**50)  # none is trained
    found = [rows_of_a_pass(build_network((1, side, side), 3, width=4)) for side in (4, 32, 128)]
    assert found[0] == budget.MOST_PASS_ROWS
    assert budget.FEWEST_PASS_ROWS < found[1] < budget.MOST_PASS_ROWS
    assert found[2] == budget.FEWEST_PASS_ROWS
