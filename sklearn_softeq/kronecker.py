"""Kronecker matrices with a block axis, and their spectra.

A weight tensor of B independent maps W[b], each (d_out, d_in), has the curvature
blkdiag_b(A_b ⊗ Γ_b), the rows of W[b].T stacked (input index slow, output index fast).
Evidence needs nothing of it but the eigenvalues λ of A_b and μ of Γ_b.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .devices import full_precision

__all__ = [
    "LARGEST_INVERTED",
    "TOGETHER",
    "Eigenbases",
    "Eigenbasis",
    "Factor",
    "Kronecker",
    "Root",
    "Spectrum",
    "UnsolvedError",
    "decomposed",
    "dense",
    "eigenbasis",
    "spectra",
]

#: Numbers in matrices of one size that are decomposed in one call, which copies them: a larger call
#: gains nothing.
TOGETHER = 2**20

#: Size of a factor beyond which steps of the weights make do without its inverse, which takes the
#: cube of it.
LARGEST_INVERTED = 1024


class UnsolvedError(ValueError):
    """A matrix is finite, but no solver finds its eigenvalues."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues λ_i μ_j of a block Kronecker matrix, kept as factors.

    Parameters
    ----------
    left : tensor of shape (B, d_in)
        Eigenvalues λ of the input factors, float64; fewer where the others are zero for sure.
    right : tensor of shape (B, d_out)
        Eigenvalues μ of the gradient factors, likewise.
    left_tangent, right_tangent : tensor of the same shape, optional
        Derivatives of λ and μ in a hyperparameter that reaches the factors.
    shares : tensor of shape (K, B, d_out), optional
        Part of each μ that is each output's, q_jᵀ Γ_k q_j / μ_j; their sum over outputs is 1.
    """

    left: torch.Tensor
    right: torch.Tensor
    left_tangent: torch.Tensor | None = None
    right_tangent: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    def raised(self, rises: torch.Tensor) -> "Spectrum":
        """That of a curvature of which each output's part has been multiplied by a number.

        To first order, eigenvectors as they are. It is exact where the numbers are the same, and
        where the parts have eigenvectors in common, as those of a layer's that gives the outputs.

        Parameters
        ----------
        rises : tensor of shape (K,), or (1,) for all outputs
        """
        if self.shares is None:
            rise, shares = rises, None
            assert len(rises) == 1, "outputs that are not told apart"
        else:
            raised = rises[:, None, None] * self.shares
            rise = raised.sum(0)  # (B, d_out)
            shares = raised / rise
        tangent = None if self.right_tangent is None else self.right_tangent * rise
        return replace(self, right=self.right * rise, right_tangent=tangent, shares=shares)

    def eigenvalues(self) -> torch.Tensor:
        """All products λ_i μ_j, shape (B, d_in, d_out)."""
        return self.left[:, :, None] * self.right[:, None, :]  # (B, d_in, d_out)

    def log_det_ratio(self, precision: torch.Tensor | float) -> torch.Tensor:
        """log det(H + δ) − log det(δ) = Σ_b Σ_ij log(1 + λ_i μ_j / δ)."""
        return torch.log1p(self.eigenvalues() / precision).sum()  # Eq. log determinant

    def effective_dimensions(self, precision: torch.Tensor | float) -> torch.Tensor:
        """γ = Σ_b Σ_ij λ_i μ_j / (λ_i μ_j + δ), between 0 and the number of weights."""
        products = self.eigenvalues()
        return (products / (products + precision)).sum()  # Eq. effective dimensions

    def dimensions_of_outputs(self, precision: torch.Tensor | float) -> torch.Tensor:
        """γ_k = tr H_k (H + δ)⁻¹ with H_k what output k adds to H, (K,); all of it where K = 1.

        In the eigenvectors of H only the diagonal of H_k counts, and that is λ_i q_jᵀ Γ_k q_j.
        """
        products = self.eigenvalues()
        determined = (products / (products + precision)).sum(1)  # (B, d_out)
        if self.shares is None:
            return determined.sum()[None]
        return (self.shares * determined).sum((1, 2))  # Eq. dimensions of an output

    def log_det_slope(self, precision: torch.Tensor) -> torch.Tensor:
        """Derivative of ``log_det_ratio``, Σ_b Σ_ij (∂λ_i μ_j + λ_i ∂μ_j) / (λ_i μ_j + δ)."""
        change = torch.zeros((), dtype=self.left.dtype)
        if self.left_tangent is not None:
            change = change + self.left_tangent[:, :, None] * self.right[:, None, :]
        if self.right_tangent is not None:
            change = change + self.left[:, :, None] * self.right_tangent[:, None, :]
        return (change / (self.eigenvalues() + precision)).sum()  # Eq. slope in ω


@dataclass(frozen=True, eq=False)
class Root:
    """A matrix RᵀR of each block, given by R of fewer rows than columns.

    Its eigenvalues are those of R Rᵀ, which is smaller, and zeros.

    Parameters
    ----------
    rows : tensor of shape (B, r, d)
    """

    rows: torch.Tensor

    def dense(self) -> torch.Tensor:
        """RᵀR, shape (B, d, d)."""
        return self.rows.transpose(1, 2) @ self.rows

    def gram(self) -> torch.Tensor:
        """R Rᵀ, shape (B, r, r)."""
        return self.rows @ self.rows.transpose(1, 2)


Factor = torch.Tensor | Root


def dense(factor: Factor) -> torch.Tensor:
    """The matrices of a factor, (B, d, d)."""
    return factor.dense() if isinstance(factor, Root) else factor


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Block-diagonal matrix blkdiag_b(A_b ⊗ Γ_b).

    Parameters
    ----------
    left : tensor of shape (B, d_in, d_in), or Root
        Input factors A.
    right : tensor of shape (B, d_out, d_out), or Root
        Gradient factors Γ, scaled so that the product is the curvature itself.
    left_tangent, right_tangent : tensor of shape (B, d, d), optional
        Derivatives of A and Γ, which are tensors then, in a hyperparameter that reaches them.
    """

    left: Factor
    right: Factor
    left_tangent: torch.Tensor | None = None
    right_tangent: torch.Tensor | None = None

    def to_dense(self) -> torch.Tensor:
        """The full matrix, (B·d_in·d_out) squared; for small cases and tests."""
        sides = zip(dense(self.left), dense(self.right), strict=True)
        return torch.block_diag(*(torch.kron(a, g) for a, g in sides))

    @full_precision()
    def inverse_form(
        self, vector: torch.Tensor, precision: float, bases: "Eigenbases | None" = None
    ) -> float:
        """gᵀ (H + δ)⁻¹ g, in float64, block by block.

        Parameters
        ----------
        vector : tensor
            g, of the shape (B, d_out, d_in) of the weights or with as many entries.
        precision : float
            δ.
        bases : Eigenbases, optional
            Those that have been found; default: none yet.
        """
        basis_of = Eigenbases() if bases is None else bases
        left, right = basis_of(self.left), basis_of(self.right)
        sides = zip(left.values, left.vectors, right.values, right.vectors, strict=True)
        total = vector.new_zeros((), dtype=torch.float64)
        parts = vector.flatten().chunk(len(left.values))
        for (a, p, g, q), part in zip(sides, parts, strict=True):
            part = part.double().view(len(q), len(p))  # (d_out, d_in)
            squares = (q.T @ part @ p).square()
            # What lies in neither space of eigenvectors has the eigenvalue 0.
            rest = (part.square().sum() - squares.sum()).clamp_min(0.0) / precision
            # Eq. linear term
            total += (squares / (g[:, None] * a + precision)).sum() + rest
        return total.item()


def _blocks(factor: Factor) -> list[Factor]:
    """The factor of each block."""
    if isinstance(factor, Root):
        return [Root(rows[None]) for rows in factor.rows]
    return [matrix[None] for matrix in factor]


def _eigenvectors(block: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (r,) and eigenvectors (d, r) of one block; those left out have eigenvalue 0."""
    if isinstance(block, Root):
        rows = block.rows[0].double()
        values, vectors = _eigh(rows @ rows.T)
        there = values > 1e-12 * values[-1]  # others are rounding
        values = values[there]
        return values, rows.T @ vectors[:, there] * values.rsqrt()
    values, vectors = _eigh(block[0].double())
    return values.clamp_min(0.0), vectors


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors; by the CPU's solver where that of another device fails."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        where = matrix.device
    try:
        values, vectors = torch.linalg.eigh(matrix.cpu())
    except torch.linalg.LinAlgError as error:
        raise _unsolved("one of the tensors", matrix) from error
    return values.to(where), vectors.to(where)


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Eigenvalues and eigenvectors of each block of a factor; those left out have eigenvalue 0.

    Parameters
    ----------
    values : tensor of shape (B, r)
    vectors : tensor of shape (B, d, r)
        r ≤ d columns, orthonormal. A block of lower rank than others has columns of zeros.
    """

    values: torch.Tensor
    vectors: torch.Tensor

    @property
    def whole(self) -> bool:
        """Whether the columns span the space."""
        return self.vectors.shape[1] == self.vectors.shape[2]

    def eigenvalues(self) -> torch.Tensor:
        """Of each of the coordinates, (B, r), or (B, r + d) where the basis is not whole."""
        if self.whole:
            return self.values
        blocks, size, _ = self.vectors.shape
        return torch.cat([self.values, self.values.new_zeros(blocks, size)], 1)

    def coordinates(self, tokens: torch.Tensor) -> torch.Tensor:
        """Coordinates of vectors (B, m, d) in the basis.

        Where it is not whole what is orthogonal to it follows, as a vector of d entries. A small
        rest is exact so; the difference of two squared norms would lose it.

        Returns
        -------
        tensor of shape (B, m, r) or (B, m, r + d)
        """
        found = torch.bmm(tokens, self.vectors)
        if self.whole:
            return found
        return torch.cat([found, tokens - torch.bmm(found, self.vectors.transpose(1, 2))], 2)


@full_precision()
def eigenbasis(factor: Factor) -> Eigenbasis:
    """Eigenvalues and eigenvectors of a factor, float64; of a root only as many as its rows."""
    if isinstance(factor, Root) and factor.rows.shape[1] >= factor.rows.shape[2]:
        factor = factor.dense()  # it spares nothing, and blocks of less rank would lack a rest
    found = [_eigenvectors(block) for block in _blocks(factor)]
    rank, first = max(len(values) for values, _ in found), found[0][1]
    size = len(first)
    values, vectors = first.new_zeros(len(found), rank), first.new_zeros(len(found), size, rank)
    for b, (some, columns) in enumerate(found):
        values[b, : len(some)], vectors[b, :, : len(some)] = some, columns
    return Eigenbasis(values, vectors)


class Eigenbases:
    """Eigenbases of factors, each found once, however many tensors and questions share it."""

    def __init__(self) -> None:
        # With the factors themselves: an identity means nothing once its factor is gone.
        self._known: dict[int, tuple[Factor, Eigenbasis]] = {}

    def __call__(self, factor: Factor) -> Eigenbasis:
        """As from :func:`eigenbasis`."""
        if id(factor) not in self._known:
            self._known[id(factor)] = (factor, eigenbasis(factor))
        return self._known[id(factor)][1]


@full_precision()
def spectra(
    factors: dict[str, Kronecker],
    known: dict[int, torch.Tensor] | None = None,
    parts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Spectrum]:
    """Eigenvalues of each matrix; a factor that two tensors share is decomposed once.

    Parameters
    ----------
    factors : dict of str to Kronecker
    known : dict of int to tensor, optional
        Eigenvalues by the identity of their factor, for those that have been decomposed before.
        It takes in those of all factors that do not move.
    parts : mapping of str to tensor, optional
        What each output adds to the right factor of each tensor, (K, B, d_out, d_out), or to its
        trace, (K, B, 1, 1); up to a common number, as from a part of the rows. Default: outputs
        are not told apart.

    Raises
    ------
    ValueError
        If a factor is not finite or its eigenvalues cannot be found in float64 either.
    """
    known = {} if known is None else known
    shares = _shares(factors, parts or {}, known)
    names = {}  # identity, not value: a layer's bias may hold the very Γ of its weight
    for name, k in factors.items():
        for factor, tangent in ((k.left, k.left_tangent), (k.right, k.right_tangent)):
            if tangent is None and id(factor) not in known:
                names[id(factor)] = (name, factor)
    known.update(_eigenvalues(names))
    found = {}
    for name, k in factors.items():
        sides = ((k.left, k.left_tangent), (k.right, k.right_tangent))
        (left, d_left), (right, d_right) = (
            (known[id(factor)], None) if tangent is None else _moving(factor, tangent, name)
            for factor, tangent in sides
        )
        share = shares.get(name)
        share = None if share is None else share.expand(-1, *right.shape)
        found[name] = Spectrum(left, right, d_left, d_right, share)
    return found


def _shares(
    factors: Mapping[str, Kronecker],
    parts: Mapping[str, torch.Tensor],
    known: dict[int, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Shares of outputs in the eigenvalues of the right factors, (K, B, d_out), or (K, B, 1).

    Eigenvalues that are found on the way are known from then on.
    """
    seen: dict[int, torch.Tensor] = {}
    for name, part in parts.items():
        factor = factors[name].right
        if id(factor) in seen:
            continue
        part = part.to("cpu", torch.float64)
        if part.shape[-1] > 1:
            values, vectors = _all_eigenvectors(dense(factor), name)
            known[id(factor)] = values
            part = (vectors * (part @ vectors)).sum(-2)  # (K, B, d_out)
        else:
            part = part[..., 0]
        total = part.clamp_min_(0.0).sum(0)
        even = torch.full_like(part, 1 / len(part))  # where there is nothing to share
        seen[id(factor)] = torch.where(total > 0, part / total, even)  # Eq. shares
    return {name: seen[id(factors[name].right)] for name in parts}


def _all_eigenvectors(matrix: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block, in float64 on the CPU; eigenvalues that are not negative."""
    matrix = matrix.to("cpu", torch.float64)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise _unsolved(repr(name), matrix) from error
    if not torch.isfinite(values).all():
        raise _unsolved(repr(name), matrix)
    return values.clamp_min(0.0), vectors


def decomposed(factors: Mapping[str, Factor]) -> dict[int, torch.Tensor]:
    """Eigenvalues by the identity of their factor, for the ``known`` of :func:`spectra`.

    Each factor is decomposed by itself: among others of its size the last digits depend on where in
    memory it comes to lie, and so on which others there are.

    Raises
    ------
    ValueError
        As of :func:`spectra`.
    """
    found: dict[int, torch.Tensor] = {}
    for name, factor in factors.items():
        found |= _eigenvalues({id(factor): (name, factor)})
    return found


def _moving(factor: Factor, tangent: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and their derivatives, ∂λ_i = q_iᵀ ∂A q_i."""
    values, vectors = _all_eigenvectors(dense(factor), name)
    return values, (vectors * (tangent.to(vectors) @ vectors)).sum(-2)


def _eigenvalues(named: dict[int, tuple[str, Factor]]) -> dict[int, torch.Tensor]:
    """Eigenvalues by key, those of one size in one call and all in one transfer."""
    matrices = {
        key: factor.gram() if isinstance(factor, Root) else factor
        for key, (_, factor) in named.items()
    }
    groups: dict[tuple[int, ...], list[int]] = {}
    for key, matrix in matrices.items():
        groups.setdefault(tuple(matrix.shape[1:]), []).append(key)
    solved: dict[int, torch.Tensor] = {}
    for size, keys in groups.items():
        at_once = max(TOGETHER // math.prod(size), 1)
        if sum(len(matrices[key]) for key in keys) <= at_once:
            values = _solved(torch.cat([matrices[key] for key in keys]))
            sizes = [len(matrices[key]) for key in keys]
            solved.update(zip(keys, values.split(sizes), strict=True))
        else:
            for key in keys:
                parts = matrices[key].split(at_once)
                solved[key] = torch.cat([_solved(part) for part in parts])
    return {
        key: _checked(values, matrices[key], named[key][0])
        for key, values in _to_cpu(solved).items()
    }


def _to_cpu(tensors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The same in float64 on the CPU."""
    if not tensors:
        return {}
    flat = torch.cat([t.flatten() for t in tensors.values()]).to("cpu", torch.float64)
    parts = flat.split([t.numel() for t in tensors.values()])
    return {key: part.view_as(t) for (key, t), part in zip(tensors.items(), parts, strict=True)}


def _checked(values: torch.Tensor, matrix: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(values).all():
        values = _solved(matrix.to("cpu", torch.float64))
    if not torch.isfinite(values).all():
        raise _unsolved(repr(name), matrix)
    return values.clamp_min(0.0)


def _unsolved(whose: str, matrix: torch.Tensor) -> ValueError:
    finite = bool(torch.isfinite(matrix).all())
    why = "the solver fails in float64, too" if finite else "the factor is not finite"
    kind = UnsolvedError if finite else ValueError
    return kind(
        f"The eigenvalues of the curvature factor of {whose} could not be computed: "
        f"{why}. Lower the learning rate or scale the inputs."
    )


def _solved(matrix: torch.Tensor) -> torch.Tensor:
    # In float32 the solver may fail, or return NaN without a word (seen where one eigenvalue is
    # 1e13 times the others); both ask for another try in float64.
    if matrix.shape[-1] == 1:
        return matrix[..., 0]
    try:
        values = torch.linalg.eigvalsh(matrix)
        # It passes over a NaN on the diagonal of a matrix that is diagonal otherwise.
        return values + 0 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    except torch.linalg.LinAlgError:
        return torch.full_like(matrix[..., 0], torch.nan)
