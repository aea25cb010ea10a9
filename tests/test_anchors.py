"""Where anchors stand, and the interpolation Ψ between them and the pixels."""

import math
from itertools import product

import pytest
import torch
from references import interpolation, pixels

from sklearn_softeq import anchors
from sklearn_softeq.anchors import LOG_OMEGA_BOUNDS, Interpolation, place_anchors

GRIDS = [*product((1, 2, 3, 5, 8, 9), (1, 2, 3, 4, 7, 12)), (16, 16)]
SOME_GRIDS = [(1, 1), (1, 7), (3, 3), (4, 7), (8, 8)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_of_some_grids = pytest.mark.parametrize("grid", SOME_GRIDS, ids=str)

FRACTIONS = [0.01, 0.25, 0.5, 7 / 9, 1.0]
each_fraction = pytest.mark.parametrize("fraction", FRACTIONS, ids=lambda f: f"{f:.2f}")


def numbers(grid):
    """Each number of anchors on a small grid, some of them on a large one."""
    n_pixels = grid[0] * grid[1]
    return range(1, n_pixels + 1, 1 if n_pixels < 30 else 7)


def smallest(distances):
    return (distances + torch.diag(torch.full((len(distances),), torch.inf))).min().item()


# ── places


@each_grid
def test_as_many_as_asked_for_inside_the_image(grid):
    half = torch.tensor(grid, dtype=torch.float64) / 2
    for n in numbers(grid):
        places = place_anchors(grid, n)
        assert places.shape == (n, 2)
        assert places.dtype == torch.float64
        assert (places.abs() < half).all()


@each_grid
def test_as_many_as_there_are_pixels_stand_on_the_pixels(grid):
    centre = (torch.tensor(grid, dtype=torch.float64) - 1) / 2
    expected = torch.tensor(pixels(grid), dtype=torch.float64) - centre
    torch.testing.assert_close(place_anchors(grid, grid[0] * grid[1]), expected)


@each_grid
def test_spread_evenly(grid):
    """No pixel is farther than a spacing from an anchor, no two anchors nearer than half of it."""
    places = place_anchors(grid, grid[0] * grid[1])
    for n in numbers(grid):
        found, spacing = place_anchors(grid, n), math.sqrt(grid[0] * grid[1] / n)
        along = max(spacing, max(grid) / n)  # of anchors in a single row, on a thin image
        assert torch.cdist(places, found).amin(1).max() <= along
        assert smallest(torch.cdist(found, found)) >= spacing / 2


def test_seven_on_a_filter_make_a_hexagon_and_four_a_square():
    seven, four = place_anchors((3, 3), 7), place_anchors((3, 3), 4)
    assert sorted(seven[:, 0].tolist()) == [-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert [0.0, 0.0] in seven.tolist()
    assert smallest(torch.cdist(seven, seven)) == 1.0
    assert {tuple(place) for place in four.tolist()} == set(product((-0.75, 0.75), repeat=2))
    # Both are unchanged by a half turn and by reflections.
    for places, flip in product((seven, four), ([-1, -1], [-1, 1], [1, -1])):
        moved = places * torch.tensor(flip)
        assert sorted(moved.tolist()) == sorted(places.tolist())


def test_the_same_at_each_call_whatever_the_random_state():
    first, matrix = place_anchors((5, 7), 11), Interpolation((5, 7), 0.3).matrix
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(place_anchors((5, 7), 11), first)
    assert torch.equal(Interpolation((5, 7), 0.3).matrix, matrix)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("grid", "fraction", "expected"),
    [
        ((1, 1), 0.5, 1),
        ((1, 2), 0.5, 1),
        ((1, 3), 0.5, 2),
        ((2, 2), 0.5, 2),
        ((3, 3), 0.5, 4),
        ((3, 3), 7 / 9, 7),
        ((1, 3), 7 / 9, 2),
        ((4, 4), 0.5, 8),
        ((32, 32), 0.01, 10),
        ((4, 4), 0.01, 1),
        ((4, 7), 1.0, 28),
    ],
    ids=str,
)
def test_a_fraction_of_the_pixels_rounded_and_at_least_one(grid, fraction, expected):
    found = Interpolation(grid, fraction)
    assert found.n_anchors == expected
    assert found.matrix.shape == (expected, grid[0] * grid[1])


# ── the matrix


@each_of_some_grids
@each_fraction
def test_matrix_is_the_formula(grid, fraction):
    found = Interpolation(grid, fraction).double()
    for log_omega in (0.0, LOG_OMEGA_BOUNDS[0], -0.3, 0.6, LOG_OMEGA_BOUNDS[1]):
        found.set_log_omega(log_omega)
        expected = interpolation(grid, found.n_anchors, log_omega)
        torch.testing.assert_close(found.matrix, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("log_omega", [0.0, 0.6])
def test_values_at_anchors_are_kept(log_omega):
    # Every pixel an anchor: σ² = 1e-4 is small beside the least eigenvalue of K_ZZ, 1e-3 or more.
    found = Interpolation((4, 5), 1.0).double()
    found.set_log_omega(log_omega)
    away = (found.matrix - torch.eye(20)).abs().max()
    assert 0 < away < {0.0: 0.05, 0.6: 3e-3}[log_omega]
    # Anchors between pixels: where one happens to stand on a pixel, it alone speaks there.
    centre = Interpolation((3, 3), 7 / 9).double()
    centre.set_log_omega(log_omega)
    at_centre = centre.matrix[:, 4]
    assert at_centre[3] == pytest.approx(1.0, abs=0.01)
    assert at_centre[[0, 1, 2, 4, 5, 6]].abs().max() < 0.01


def test_less_noise_keeps_the_values_better(monkeypatch):
    away = []
    for noise in (0.1, 0.01, 1e-4):
        monkeypatch.setattr(anchors, "NOISE", noise)
        away.append((Interpolation((4, 5), 1.0).double().matrix - torch.eye(20)).abs().max().item())
        expected = interpolation((4, 5), 10, 0.0, noise)
        found = Interpolation((4, 5), 0.5).double().matrix
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert away[0] > 10 * away[1] > 100 * away[2]


def test_a_smooth_image_is_kept():
    # The longer the lengthscale, the more of a slow wave passes through half as many anchors.
    found = Interpolation((8, 8), 0.5).double()
    rows, columns = place_anchors((8, 8), 64).T
    wave = torch.cos(0.5 * rows + 0.3) * torch.cos(0.4 * columns)
    lost = []
    for log_omega in (0.6, 0.0, -1.0):
        found.set_log_omega(log_omega)
        kept = found.fit(wave[None]) @ found.matrix
        lost.append(((kept - wave).norm() / wave.norm()).item())
    assert lost[0] > 2 * lost[1] > 8 * lost[2]
    assert lost[2] < 0.01


@each_fraction
def test_fit_is_the_least_squares_one(fraction):
    found = Interpolation((4, 3), fraction).double()
    dense = torch.randn(2, 5, 12, dtype=torch.float64)
    values = found.fit(dense)
    assert values.shape == (2, 5, found.n_anchors)
    # What is left over is orthogonal to all that can be interpolated.
    left = dense - values @ found.matrix
    torch.testing.assert_close(left @ found.matrix.T, torch.zeros_like(values), atol=1e-9, rtol=0)
    assert (left.norm() < 1e-9) == (fraction == 1.0)
    assert found.float().fit(dense.float()).dtype == torch.float32


# ── the lengthscale


@each_of_some_grids
@each_fraction
@pytest.mark.parametrize("log_omega", [-0.5, 0.0, 0.6])
def test_tangent_against_central_differences(grid, fraction, log_omega):
    found, step = Interpolation(grid, fraction).double(), 1e-5
    either = []
    for value in (log_omega + step, log_omega - step):
        found.set_log_omega(value)
        either.append(found.matrix.clone())
    found.set_log_omega(log_omega)
    expected = (either[0] - either[1]) / (2 * step)
    tangent = found.tangent()
    torch.testing.assert_close(tangent, expected, atol=1e-6, rtol=1e-5)
    assert found.n_anchors == 1 == grid[0] * grid[1] or tangent.abs().max() > 1e-6


def test_log_omega_starts_at_one_pixel_and_stays_within_its_bounds():
    found = Interpolation((3, 4), 0.5)
    assert found.log_omega == 0.0
    for asked, bound in zip((-50.0, 50.0), LOG_OMEGA_BOUNDS, strict=True):
        found.set_log_omega(asked)
        assert found.log_omega.item() == bound
        at_bound = interpolation((3, 4), 6, bound).float()
        torch.testing.assert_close(found.matrix, at_bound, atol=1e-5, rtol=1e-4)
    assert LOG_OMEGA_BOUNDS[0] < 0 < LOG_OMEGA_BOUNDS[1]
    assert torch.isfinite(found.matrix).all()


def test_it_is_a_hyperparameter_and_no_weight():
    found = Interpolation((3, 4), 0.5)
    assert list(found.parameters()) == []
    assert {name for name, _ in found.named_buffers()} == {"log_omega", "matrix"}


@pytest.fixture
def solved(monkeypatch):
    """Counts how often a system is solved."""
    calls, solve = [], torch.linalg.solve

    def counted(*args):
        calls.append(args[0].shape)
        return solve(*args)

    monkeypatch.setattr(torch.linalg, "solve", counted)
    return calls


def test_solved_once_for_each_omega(solved):
    found = Interpolation((3, 4), 0.5)
    for _ in range(3):
        assert found.matrix.sum() != 0
    assert len(solved) == 1
    found.set_log_omega(0.3)
    assert len(solved) == 2
    found.tangent()
    once = len(solved)
    assert once > 2
    first = found.tangent()
    assert found.tangent() is first
    assert len(solved) == once
    found.set_log_omega(0.4)
    assert not torch.equal(found.tangent(), first)


def test_solved_anew_for_other_digits_only(solved):
    found = Interpolation((3, 4), 0.5)
    found.float().to("cpu").requires_grad_(False)
    assert len(solved) == 1
    found.double()
    assert len(solved) == 2


# ── dtypes, devices and states


def test_a_change_of_dtype_has_all_digits():
    found = Interpolation((4, 4), 0.5)
    found.set_log_omega(0.25)
    single, tangent = found.matrix.clone(), found.tangent()
    assert found.tangent().dtype == single.dtype == torch.float32
    found.double()
    expected = interpolation((4, 4), 8, 0.25)
    torch.testing.assert_close(found.matrix, expected, atol=1e-12, rtol=1e-12)
    assert found.tangent().dtype == torch.float64
    torch.testing.assert_close(found.tangent().float(), tangent, atol=1e-5, rtol=1e-5)
    assert found.float().log_omega.item() == 0.25
    assert torch.equal(found.matrix, single)


def test_a_state_travels_with_its_omega():
    found, other = Interpolation((4, 4), 0.5), Interpolation((4, 4), 0.5)
    before = other.tangent()
    found.set_log_omega(-0.4)
    other.load_state_dict(found.state_dict())
    assert other.log_omega == found.log_omega
    assert torch.equal(other.matrix, found.matrix)
    assert torch.equal(other.tangent(), found.tangent())
    assert not torch.equal(other.tangent(), before)
    assert list(found.state_dict()) == ["log_omega"]  # of which all else is made


def test_a_state_of_less_digits_has_all_of_its_own(solved):
    found, other = Interpolation((4, 4), 0.5), Interpolation((4, 4), 0.5).double()
    found.set_log_omega(-0.4)
    other.load_state_dict(found.float().state_dict())
    expected = interpolation((4, 4), 8, -0.4)
    torch.testing.assert_close(other.matrix, expected, atol=1e-12, rtol=1e-12)
    before = len(solved)
    other.load_state_dict(found.state_dict())  # the same ω
    assert len(solved) == before


def test_without_memory_nothing_is_solved(solved):
    with torch.device("meta"):
        found = Interpolation((1000, 1000), 0.5)
    assert found.matrix.shape == (500_000, 1_000_000)
    found.double()
    assert solved == []


def test_log_omega_keeps_its_digits_in_a_float32_network():
    found = Interpolation((4, 4), 0.5)
    found.to(torch.float32).set_log_omega(0.1)
    assert found.log_omega.dtype == torch.float64
    assert found.double().log_omega.item() == 0.1
