"""Spectra against dense matrices; what happens to a factor that cannot be decomposed."""

from dataclasses import replace

import pytest
import torch

from sklearn_softeq import kronecker
from sklearn_softeq.kronecker import Kronecker, spectra

SHAPES = [(1, 3, 4), (3, 2, 4), (2, 1, 3), (4, 3, 1), (1, 1, 1)]  # (B, d_in, d_out)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def positive(n_blocks, side, dtype=torch.float64, rank=None):
    rows = torch.randn(n_blocks, rank or side, side, dtype=dtype)
    return rows.transpose(1, 2) @ rows


def matrix(shape, **options):
    blocks, d_in, d_out = shape
    return Kronecker(positive(blocks, d_in, **options), positive(blocks, d_out, **options))


def spectrum(kron):
    return spectra({"w": kron})["w"]


@each_shape
def test_to_dense_acts_on_weights_as_the_formula(shape):
    kron = matrix(shape)
    blocks, d_in, d_out = shape
    weights = torch.randn(blocks, d_out, d_in, dtype=torch.float64)
    vector = weights.transpose(1, 2).flatten()
    expected = sum(
        (w.T * (a @ w.T @ g)).sum() for w, a, g in zip(weights, kron.left, kron.right, strict=True)
    )
    torch.testing.assert_close(vector @ kron.to_dense() @ vector, expected)


@each_shape
@pytest.mark.parametrize("delta", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("rank", [None, 1])
def test_spectrum_against_the_dense_matrix(shape, delta, rank):
    kron = matrix(shape, rank=rank)
    dense, precision = kron.to_dense(), torch.tensor(delta, dtype=torch.float64)
    eye = torch.eye(len(dense), dtype=torch.float64)
    found = spectrum(kron)
    log_det = torch.logdet(dense + delta * eye) - len(dense) * precision.log()
    torch.testing.assert_close(found.log_det_ratio(precision), log_det)
    gamma = torch.trace(dense @ torch.linalg.inv(dense + delta * eye))
    torch.testing.assert_close(found.effective_dimensions(precision), gamma)
    torch.testing.assert_close(
        found.eigenvalues().flatten().sort().values, torch.linalg.eigvalsh(dense), atol=1e-9, rtol=0
    )


@each_shape
def test_effective_dimensions_lie_between_none_and_all(shape):
    found = spectrum(matrix(shape))
    precisions = torch.logspace(-12, 12, 25, dtype=torch.float64)
    gammas = torch.stack([found.effective_dimensions(p) for p in precisions])
    assert (gammas.diff() < 0).all()
    n_weights = shape[0] * shape[1] * shape[2]
    assert 0 <= gammas[-1] < 1e-6
    assert n_weights * (1 - 1e-3) < gammas[0] <= n_weights


# ── the slope in a hyperparameter that moves the factors


def symmetric(n_blocks, side):
    half = torch.randn(n_blocks, side, side, dtype=torch.float64)
    return half + half.transpose(1, 2)


def dense_slope(kron, delta):
    """∂ log det(H + δ) = tr (H + δ)⁻¹ ∂H, with ∂H = ∂A ⊗ Γ + A ⊗ ∂Γ."""
    zero = Kronecker(torch.zeros_like(kron.left), torch.zeros_like(kron.right)).to_dense()
    moved = [
        zero if kron.left_tangent is None else Kronecker(kron.left_tangent, kron.right).to_dense(),
        zero if kron.right_tangent is None else Kronecker(kron.left, kron.right_tangent).to_dense(),
    ]
    dense = kron.to_dense()
    eye = torch.eye(len(dense), dtype=torch.float64)
    return torch.trace(torch.linalg.solve(dense + delta * eye, sum(moved)))


SIDES = {"left": (True, False), "right": (False, True), "both": (True, True), "none": (False,) * 2}
each_side = pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)


@each_shape
@each_side
@pytest.mark.parametrize("delta", [1e-2, 1.0, 50.0])
def test_slope_against_the_dense_matrix(shape, sides, delta):
    blocks, d_in, d_out = shape
    moving = [
        symmetric(blocks, side) if on else None
        for on, side in zip(sides, (d_in, d_out), strict=True)
    ]
    kron = replace(matrix(shape), left_tangent=moving[0], right_tangent=moving[1])
    found = spectrum(kron).log_det_slope(torch.tensor(delta, dtype=torch.float64))
    torch.testing.assert_close(found, dense_slope(kron, delta), rtol=1e-9, atol=1e-9)
    assert (found != 0) == any(sides)


DEGENERATE = {
    "identity": torch.ones(5, dtype=torch.float64),
    "pairs": torch.tensor([2.0, 2.0, 7.0, 7.0, 7.0], dtype=torch.float64),
    "rank 2": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64),
    "zero": torch.zeros(5, dtype=torch.float64),
}


@pytest.mark.parametrize("left", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("right", DEGENERATE.values(), ids=DEGENERATE)
def test_slope_where_eigenvalues_are_equal(left, right):
    # Eigenvectors of equal eigenvalues are not unique and their own slopes mean nothing, but the
    # sum over them does. In a rotated basis: a diagonal matrix would be too easy to get right.
    basis = torch.linalg.qr(torch.randn(2, 5, 5, dtype=torch.float64)).Q
    a, gamma = (q @ torch.diag(v) @ q.T for q, v in zip(basis, (left, right), strict=True))
    kron = Kronecker(a[None], gamma[None], symmetric(1, 5), symmetric(1, 5))
    found = spectrum(kron).log_det_slope(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(found, dense_slope(kron, 0.7), rtol=1e-9, atol=1e-9)


def test_a_factor_that_moves_has_the_eigenvalues_of_one_at_rest():
    kron = matrix((3, 4, 2))
    moving = replace(kron, left_tangent=symmetric(3, 4), right_tangent=symmetric(3, 2))
    at_rest, found = spectrum(kron), spectrum(moving)
    torch.testing.assert_close(found.left, at_rest.left)
    torch.testing.assert_close(found.right, at_rest.right)
    assert at_rest.left_tangent is at_rest.right_tangent is None
    flat = matrix((2, 30, 40), dtype=torch.float32, rank=1)  # its rounding is cut, too
    found = spectrum(replace(flat, left_tangent=symmetric(2, 30), right_tangent=symmetric(2, 40)))
    assert min(found.left.min(), found.right.min()) >= 0
    assert found.left.dtype == found.left_tangent.dtype == torch.float64


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moving_factor_that_is_not_finite_is_an_error_with_its_name(side, bad):
    kron = matrix((2, 3, 3))
    kron = replace(kron, left_tangent=symmetric(2, 3), right_tangent=symmetric(2, 3))
    getattr(kron, side)[1, 0, 0] = bad
    with pytest.raises(ValueError, match="'blocks.2.sparse_fc.U.weight'.*not finite"):
        spectra({"blocks.2.sparse_fc.U.weight": kron})


# ── decompositions


def test_gradient_of_the_log_determinant_is_minus_gamma():
    found = spectrum(matrix((3, 2, 4)))
    log_precision = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(found.log_det_ratio(log_precision.exp()), log_precision)
    torch.testing.assert_close(-slope, found.effective_dimensions(log_precision.detach().exp()))


@pytest.fixture
def decomposed(monkeypatch):
    """Matrices that the eigenvalue solver was given, in order."""
    seen, solve = [], torch.linalg.eigvalsh

    def counting(given):
        seen.append(given)
        return solve(given)

    monkeypatch.setattr(kronecker.torch.linalg, "eigvalsh", counting)
    return seen


def test_a_shared_factor_is_decomposed_once(decomposed):
    kron = matrix((1, 3, 4))
    bias = Kronecker(torch.full((1, 1, 1), 7.0, dtype=torch.float64), kron.right)
    found = spectra({"w": kron, "b": bias})
    assert len(decomposed) == 2
    assert found["b"].right is found["w"].right
    torch.testing.assert_close(
        found["b"].eigenvalues().flatten(), torch.linalg.eigvalsh(7 * kron.right[0])
    )


def test_equal_factors_of_two_tensors_are_not_taken_for_one():
    first, second = matrix((1, 2, 3)), matrix((1, 2, 3))
    found = spectra({"first": first, "second": second})
    for name, kron in (("first", first), ("second", second)):
        torch.testing.assert_close(found[name].right, torch.linalg.eigvalsh(kron.right))


def test_rounding_below_zero_is_cut():
    found = spectrum(matrix((2, 30, 40), dtype=torch.float32, rank=1))
    assert found.left.dtype == found.right.dtype == torch.float64
    assert found.left.min() >= 0
    assert found.right.min() >= 0


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_a_failure_in_float32_is_tried_again_in_float64(monkeypatch, failure):
    solve = torch.linalg.eigvalsh

    def fails_in_float32(given):
        if given.dtype == torch.float64:
            return solve(given)
        if failure == "error":
            raise torch.linalg.LinAlgError("no convergence")
        values = solve(given)
        values[..., 0] = torch.nan
        return values

    kron = matrix((2, 3, 4), dtype=torch.float32)
    monkeypatch.setattr(kronecker.torch.linalg, "eigvalsh", fails_in_float32)
    torch.testing.assert_close(spectrum(kron).right, solve(kron.right.double()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_that_is_not_finite_is_an_error_with_its_name(bad, shape, dtype):
    kron = matrix(shape, dtype=dtype)
    kron.right[0, 0, 0] = bad
    with pytest.raises(ValueError, match="'blocks.2.conv.weight'.*not finite"):
        spectra({"blocks.2.conv.weight": kron})
