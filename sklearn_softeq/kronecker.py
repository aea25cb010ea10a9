"""Kronecker matrices with a block axis, and their spectra.

A weight tensor of B independent maps W[b], each (d_out, d_in), has the curvature
blkdiag_b(A_b ⊗ Γ_b), the rows of W[b].T stacked (input index slow, output index fast).
Evidence needs nothing of it but the eigenvalues λ of A_b and μ of Γ_b.
"""

from dataclasses import dataclass

import torch

__all__ = ["Kronecker", "Spectrum", "spectra"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues λ_i μ_j of a block Kronecker matrix, kept as factors.

    Parameters
    ----------
    left : tensor of shape (B, d_in)
        Eigenvalues λ of the input factors, float64.
    right : tensor of shape (B, d_out)
        Eigenvalues μ of the gradient factors, float64.
    left_tangent, right_tangent : tensor of the same shape, optional
        Derivatives of λ and μ in a hyperparameter that reaches the factors.
    """

    left: torch.Tensor
    right: torch.Tensor
    left_tangent: torch.Tensor | None = None
    right_tangent: torch.Tensor | None = None

    def eigenvalues(self) -> torch.Tensor:
        """All products λ_i μ_j, shape (B, d_in, d_out)."""
        return self.left[:, :, None] * self.right[:, None, :]  # (B, d_in, d_out)

    def log_det_ratio(self, precision: torch.Tensor) -> torch.Tensor:
        """log det(H + δ) − log det(δ) = Σ_b Σ_ij log(1 + λ_i μ_j / δ)."""
        return torch.log1p(self.eigenvalues() / precision).sum()  # Eq. log determinant

    def effective_dimensions(self, precision: torch.Tensor) -> torch.Tensor:
        """γ = Σ_b Σ_ij λ_i μ_j / (λ_i μ_j + δ), between 0 and the number of weights."""
        products = self.eigenvalues()
        return (products / (products + precision)).sum()  # Eq. effective dimensions

    def log_det_slope(self, precision: torch.Tensor) -> torch.Tensor:
        """Derivative of ``log_det_ratio``, Σ_b Σ_ij (∂λ_i μ_j + λ_i ∂μ_j) / (λ_i μ_j + δ)."""
        change = torch.zeros((), dtype=self.left.dtype)
        if self.left_tangent is not None:
            change = change + self.left_tangent[:, :, None] * self.right[:, None, :]
        if self.right_tangent is not None:
            change = change + self.left[:, :, None] * self.right_tangent[:, None, :]
        return (change / (self.eigenvalues() + precision)).sum()  # Eq. slope in ω


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Block-diagonal matrix blkdiag_b(A_b ⊗ Γ_b).

    Parameters
    ----------
    left : tensor of shape (B, d_in, d_in)
        Input factors A.
    right : tensor of shape (B, d_out, d_out)
        Gradient factors Γ, scaled so that the product is the curvature itself.
    left_tangent, right_tangent : tensor of the same shape, optional
        Derivatives of A and Γ in a hyperparameter that reaches them.
    """

    left: torch.Tensor
    right: torch.Tensor
    left_tangent: torch.Tensor | None = None
    right_tangent: torch.Tensor | None = None

    def to_dense(self) -> torch.Tensor:
        """The full matrix, (B·d_in·d_out) squared; for small cases and tests."""
        blocks = [torch.kron(a, g) for a, g in zip(self.left, self.right, strict=True)]
        return torch.block_diag(*blocks)


def spectra(factors: dict[str, Kronecker]) -> dict[str, Spectrum]:
    """Eigenvalues of each matrix; a factor that two tensors share is decomposed once.

    Raises
    ------
    ValueError
        If a factor is not finite or its eigenvalues cannot be found in float64 either.
    """
    known: dict[int, torch.Tensor] = {}

    def eigenvalues(matrix: torch.Tensor, name: str) -> torch.Tensor:
        # Identity, not value: a layer's bias may hold the very Γ of its weight.
        if id(matrix) not in known:
            known[id(matrix)] = _eigenvalues(matrix, name)
        return known[id(matrix)]

    found = {}
    for name, k in factors.items():
        sides = ((k.left, k.left_tangent), (k.right, k.right_tangent))
        (left, d_left), (right, d_right) = (
            (eigenvalues(matrix, name), None) if tangent is None else _moving(matrix, tangent, name)
            for matrix, tangent in sides
        )
        found[name] = Spectrum(left, right, d_left, d_right)
    return found


def _moving(
    matrix: torch.Tensor, tangent: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and their derivatives, ∂λ_i = q_iᵀ ∂A q_i."""
    matrix, tangent = (m.to("cpu", torch.float64) for m in (matrix, tangent))
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        raise _not_finite(name) from None
    slopes = (vectors * (tangent @ vectors)).sum(-2)
    if not torch.isfinite(values).all():
        raise _not_finite(name)
    return values.clamp_min(0.0), slopes


def _eigenvalues(matrix: torch.Tensor, name: str) -> torch.Tensor:
    if matrix.shape[-1] == 1:
        values = matrix[..., 0]
    else:
        values = _solved(matrix)
        if not torch.isfinite(values).all():
            values = _solved(matrix.to("cpu", torch.float64))
    values = values.to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        raise _not_finite(name)
    return values.clamp_min(0.0)


def _not_finite(name: str) -> ValueError:
    return ValueError(
        f"The eigenvalues of the curvature factor of {name!r} could not be computed: "
        "the factor is not finite. Lower the learning rate or scale the inputs."
    )


def _solved(matrix: torch.Tensor) -> torch.Tensor:
    # In float32 the solver may fail, or return NaN without a word (seen where one eigenvalue is
    # 1e13 times the others); both ask for another try in float64.
    try:
        return torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        return torch.full_like(matrix[..., 0], torch.nan)
