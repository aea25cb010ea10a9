"""Spectra against dense matrices; what happens to a factor that cannot be decomposed."""

from dataclasses import replace

import pytest
import torch
from references import close

from sklearn_softeq import kronecker
from sklearn_softeq.kronecker import (
    Eigenbases,
    Kronecker,
    Root,
    UnsolvedError,
    dense,
    eigenbasis,
    spectra,
)

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


def solved(kron, weights, delta):
    """gᵀ (H + δ)⁻¹ g with the dense matrix."""
    matrix_ = kron.to_dense()
    vector = weights.transpose(1, 2).flatten()
    eye = torch.eye(len(matrix_), dtype=torch.float64)
    return (vector @ torch.linalg.solve(matrix_ + delta * eye, vector)).item()


@each_shape
@pytest.mark.parametrize("delta", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("rank", [None, 1])
def test_inverse_form_against_the_dense_matrix(shape, delta, rank):
    kron, (blocks, d_in, d_out) = matrix(shape, rank=rank), shape
    weights = torch.randn(blocks, d_out, d_in, dtype=torch.float64)
    expected = pytest.approx(solved(kron, weights, delta), rel=1e-9)
    assert kron.inverse_form(weights, delta) == expected
    assert kron.inverse_form(weights.flatten(), delta) == expected


def test_a_factor_that_two_share_is_decomposed_once(monkeypatch):
    kron = matrix((2, 3, 4))
    bias = Kronecker(torch.ones(2, 1, 1, dtype=torch.float64), kron.right)
    bases, found = Eigenbases(), []
    monkeypatch.setattr(
        kronecker, "eigenbasis", lambda factor: found.append(factor) or eigenbasis(factor)
    )
    for _ in range(2):
        for one, n_weights in ((kron, 24), (bias, 8)):
            vector = torch.ones(n_weights, dtype=torch.float64)
            assert one.inverse_form(vector, 0.3, bases) == one.inverse_form(vector, 0.3)
    assert sum(factor is kron.right for factor in found) == 1 + 4
    assert bases(kron.right) is bases(kron.right)


def test_a_matrix_is_its_own_dense_form():
    given = positive(2, 3)
    assert dense(given) is given


# ── factors given by their roots

ROOTS = [(1, 1, 3), (1, 3, 4), (3, 2, 5), (2, 1, 2), (4, 4, 9)]  # (B, r, d)
each_root = pytest.mark.parametrize("shape", ROOTS, ids=str)


def root(shape):
    return Root(torch.randn(shape, dtype=torch.float64))


@each_root
def test_products_of_a_root(shape):
    given = root(shape)
    across, among = given.dense(), given.gram()
    assert across.shape == (shape[0], shape[2], shape[2])
    assert among.shape == (shape[0], shape[1], shape[1])
    for b, rows in enumerate(given.rows):
        close(across[b], sum(torch.outer(row, row) for row in rows))
        close(among[b], torch.stack([torch.stack([x @ y for y in rows]) for x in rows]))
    close(dense(given), across)


def with_roots(sides):
    """A matrix of three blocks with roots on some sides, and the same without them."""
    given = Kronecker(
        root((3, 2, 5)) if "left" in sides else positive(3, 5),
        root((3, 1, 4)) if "right" in sides else positive(3, 4),
    )
    return given, Kronecker(dense(given.left), dense(given.right))


each_rooted_side = pytest.mark.parametrize("sides", [("left",), ("right",), ("left", "right")])


@each_rooted_side
def test_dense_matrix_of_roots(sides):
    given, plain = with_roots(sides)
    expected = [torch.kron(a, g) for a, g in zip(plain.left, plain.right, strict=True)]
    close(given.to_dense(), torch.block_diag(*expected))


@each_rooted_side
@pytest.mark.parametrize("delta", [1e-3, 1.0, 50.0])
def test_inverse_form_of_roots_against_the_dense_matrix(sides, delta):
    given, plain = with_roots(sides)
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    found = given.inverse_form(weights, delta)
    assert found == pytest.approx(solved(plain, weights, delta), rel=1e-9)


@each_rooted_side
@pytest.mark.parametrize("delta", [1e-3, 1.0, 50.0])
def test_spectrum_of_roots_against_the_dense_matrix(sides, delta):
    given, plain = with_roots(sides)
    matrix_, precision = plain.to_dense(), torch.tensor(delta, dtype=torch.float64)
    eye = torch.eye(len(matrix_), dtype=torch.float64)
    found = spectrum(given)
    log_det = torch.logdet(matrix_ + delta * eye) - len(matrix_) * precision.log()
    close(found.log_det_ratio(precision), log_det)
    gamma = torch.trace(matrix_ @ torch.linalg.inv(matrix_ + delta * eye))
    close(found.effective_dimensions(precision), gamma)


@each_rooted_side
def test_eigenvalues_of_roots_are_those_that_can_be_more_than_zero(sides):
    given, plain = with_roots(sides)
    found, expected = spectrum(given), torch.linalg.eigvalsh(plain.to_dense())
    assert found.left.shape == (3, 2 if "left" in sides else 5)
    assert found.right.shape == (3, 1 if "right" in sides else 4)
    values = found.eigenvalues().flatten().sort().values
    close(values, expected[-len(values) :])
    assert expected[: -len(values)].abs().max() < 1e-10 * expected[-1]
    assert values.min() > 1e-6  # none of them is lost among zeros


@pytest.mark.parametrize("n_rows", [None, 2, 4, 6])
def test_an_eigenbasis_is_the_matrix_again(n_rows):
    factor = positive(3, 4) if n_rows is None else Root(torch.randn(3, n_rows, 4).double())
    if n_rows == 2:
        factor.rows[1, 1] = factor.rows[1, 0]  # of rank one
    basis = eigenbasis(factor)
    assert basis.whole == (n_rows != 2)
    tokens = torch.randn(3, 5, 4, dtype=torch.float64)
    coordinates, values = basis.coordinates(tokens), basis.eigenvalues()
    assert coordinates.shape[2] == values.shape[1]
    found = torch.einsum("bmi,bi,bni->bmn", coordinates, values, coordinates)
    close(found, tokens @ dense(factor) @ tokens.transpose(1, 2))
    close(coordinates @ coordinates.transpose(1, 2), tokens @ tokens.transpose(1, 2))


def test_a_root_that_moves_is_multiplied_out():
    given, plain = with_roots(("left",))
    moving = symmetric(3, 5)
    found, expected = (spectrum(replace(k, left_tangent=moving)) for k in (given, plain))
    delta = torch.tensor(0.7, dtype=torch.float64)
    close(found.log_det_slope(delta), dense_slope(replace(plain, left_tangent=moving), 0.7))
    close(found.left, expected.left)


def test_rounding_below_zero_is_cut_in_a_root_of_equal_rows():
    rows = torch.randn(2, 1, 50).expand(-1, 20, -1)
    found = spectrum(Kronecker(Root(rows), torch.ones(2, 1, 1))).left
    assert found.dtype == torch.float64
    assert found.min() >= 0


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


# ── many at once


def several():
    """Matrices of equal and of other sizes, blocks and forms; one of them is in two places."""
    shared = positive(1, 3)
    return {
        "first": Kronecker(positive(1, 3), positive(1, 2)),
        "blocks": Kronecker(positive(4, 3), positive(4, 3)),
        "root": Kronecker(root((2, 3, 5)), root((2, 2, 3))),
        "weight": Kronecker(positive(1, 5), shared),
        "bias": Kronecker(torch.tensor([[[7.0]]], dtype=torch.float64), shared),
        "roots of other sizes": Kronecker(root((1, 3, 8)), root((1, 1, 2))),
    }


def eigenvalues_of(factor):
    """Of each block by itself; of a root as many as it has rows."""
    n_values = factor.rows.shape[1] if isinstance(factor, Root) else factor.shape[1]
    return torch.stack([torch.linalg.eigvalsh(m)[-n_values:] for m in dense(factor)])


def test_each_of_many_has_its_own_eigenvalues():
    factors = several()
    found = spectra(factors)
    assert list(found) == list(factors)
    for name, kron in factors.items():
        close(found[name].left, eigenvalues_of(kron.left))
        close(found[name].right, eigenvalues_of(kron.right))


def test_those_of_one_size_are_decomposed_together(decomposed):
    spectra(several())
    n_blocks = {given.shape[1:]: len(given) for given in decomposed}
    assert len(decomposed) == len(n_blocks)
    assert n_blocks == {(3, 3): 1 + 4 + 4 + 2 + 1 + 1, (2, 2): 1 + 2, (5, 5): 1}


def test_of_many_in_two_dtypes_each_is_right():
    one, other = matrix((2, 3, 4), dtype=torch.float32), matrix((2, 3, 4))
    found = spectra({"one": one, "other": other})
    close(found["other"].left, eigenvalues_of(other.left))
    torch.testing.assert_close(
        found["one"].left, eigenvalues_of(one.left.double()), atol=1e-5, rtol=1e-5
    )
    assert found["one"].left.dtype == found["other"].left.dtype == torch.float64


def test_nothing_to_decompose():
    assert spectra({}) == {}


# ── what is known already


def poison(factor):
    return torch.full((len(dense(factor)), 2), 42.0, dtype=torch.float64)


def test_what_is_known_is_taken_and_not_decomposed(decomposed):
    kron = matrix((2, 3, 4))
    known = {id(kron.left): poison(kron.left)}
    found = spectra({"w": kron}, known)["w"]
    assert torch.equal(found.left, poison(kron.left))
    close(found.right, eigenvalues_of(kron.right))
    assert [given.shape for given in decomposed[:1]] == [(2, 4, 4)]


def test_what_has_been_decomposed_is_known(decomposed):
    factors, known = several(), {}
    found = spectra(factors, known)
    everything = {id(f): f for kron in factors.values() for f in (kron.left, kron.right)}
    assert set(known) == set(everything)
    n_calls = len(decomposed)
    again = spectra(factors, known)
    assert len(decomposed) == n_calls
    for name, values in found.items():
        assert again[name].left is values.left
        assert again[name].right is values.right
    for key, factor in everything.items():
        close(known[key], eigenvalues_of(factor))


def test_what_is_known_of_others_stays():
    other, kron = torch.zeros(1, 1, 1), matrix((1, 2, 3))
    known = {id(other): poison(other)}
    spectra({"w": kron}, known)
    assert set(known) == {id(other), id(kron.left), id(kron.right)}
    assert torch.equal(known[id(other)], poison(other))


def test_what_moves_is_not_known():
    kron = replace(matrix((2, 3, 4)), left_tangent=symmetric(2, 3))
    known = {}
    spectra({"w": kron}, known)
    assert set(known) == {id(kron.right)}
    known = {id(kron.left): poison(kron.left)}
    close(spectra({"w": kron}, known)["w"].left, eigenvalues_of(kron.left))


# ── what cannot be decomposed


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


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_a_failure_in_float64_too_is_an_error_that_says_what_to_do(monkeypatch, failure):
    def fails(given):
        if failure == "error":
            raise torch.linalg.LinAlgError("no convergence")
        return torch.full_like(given[..., 0], torch.nan)

    monkeypatch.setattr(kronecker.torch.linalg, "eigvalsh", fails)
    with pytest.raises(UnsolvedError, match="'head.weight'.*fails in float64, too.*Lower"):
        spectra({"head.weight": matrix((2, 3, 4), dtype=torch.float32)})


@pytest.mark.parametrize("rank", [None, 2])
def test_eigenvectors_that_a_device_does_not_find_are_found_by_the_cpu(monkeypatch, rank):
    solve, calls = torch.linalg.eigh, []

    def every_other_time(given):
        calls.append(given.device.type)
        if len(calls) % 2:  # on the device
            raise torch.linalg.LinAlgError("no convergence")
        return solve(given)

    kron, vector = matrix((2, 3, 4), rank=rank), torch.randn(24, dtype=torch.float64)
    expected = kron.inverse_form(vector, 0.3)
    monkeypatch.setattr(kronecker.torch.linalg, "eigh", every_other_time)
    assert kron.inverse_form(vector, 0.3) == expected
    assert len(calls) == 2 * 4  # two sides of two blocks


def test_eigenvectors_that_nobody_finds_are_an_error_that_says_what_to_do(monkeypatch):
    def fails(given):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(kronecker.torch.linalg, "eigh", fails)
    kron = matrix((2, 3, 4))
    moving = replace(kron, left_tangent=kron.left)
    for find in (
        lambda: kron.inverse_form(torch.ones(24), 0.3),
        lambda: eigenbasis(kron.left),
        lambda: spectra({"w": moving}),
    ):
        with pytest.raises(UnsolvedError, match="Lower the learning rate or scale the inputs"):
            find()
    kron.left[0] = torch.nan
    with pytest.raises(ValueError, match="is not finite. Lower the learning rate"):
        eigenbasis(kron.left)


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_a_failure_of_one_of_many_leaves_the_others_right(monkeypatch, failure):
    # Either the values of one matrix are NaN, or none of the group can be had in float32.
    solve = torch.linalg.eigvalsh
    factors = {name: matrix((2, 3, 3), dtype=torch.float32) for name in "abc"}

    def fails_in_float32(given):
        if given.dtype == torch.float32 and failure == "error":
            raise torch.linalg.LinAlgError("no convergence")
        values = solve(given)
        if given.dtype == torch.float32:
            values[3] = torch.nan
        return values

    monkeypatch.setattr(kronecker.torch.linalg, "eigvalsh", fails_in_float32)
    found = spectra(factors)
    for name, kron in factors.items():
        for side in ("left", "right"):
            expected = solve(getattr(kron, side).double())
            values = getattr(found[name], side)
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


def spoil(factor, bad):
    """As if one entry of a token were not finite: a row of a root, a row and a column of a sum."""
    if isinstance(factor, Root):
        factor.rows[0, 0, 0] = bad
    else:
        factor[0, 0] = factor[0, :, 0] = bad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", list(several()))
@pytest.mark.parametrize("side", ["left", "right"])
def test_of_many_the_one_that_is_not_finite_is_named(bad, name, side):
    factors = several()
    spoil(getattr(factors[name], side), bad)
    shared = name in ("weight", "bias") and side == "right"
    named = "(weight|bias)" if shared else name
    with pytest.raises(ValueError, match=f"factor of '{named}'.*not finite"):
        spectra(factors)


def test_a_nan_on_the_diagonal_is_seen():
    # The solver alone passes over it where nothing stands beside the diagonal.
    matrix = torch.eye(3, dtype=torch.float64)[None].clone()
    matrix[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="'w'.*not finite"):
        spectra({"w": Kronecker(matrix, torch.ones(1, 1, 1, dtype=torch.float64))})


def test_a_factor_decomposed_by_itself_hangs_on_no_other():
    factors = {f"map {i}": torch.randn(1, 9, 9, dtype=torch.float64) for i in range(5)}
    factors = {name: f @ f.mT for name, f in factors.items()}
    found = kronecker.decomposed(factors)
    assert found.keys() == {id(factor) for factor in factors.values()}
    for name, factor in factors.items():
        assert torch.equal(kronecker.decomposed({name: factor})[id(factor)], found[id(factor)])
        torch.testing.assert_close(found[id(factor)], torch.linalg.eigvalsh(factor).clamp_min(0.0))
