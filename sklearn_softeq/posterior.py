"""The posterior of the weights, and the covariance of a network's outputs under it.

Laplace's approximation at the mode w* is w_g ~ N(w*_g, (H_g + δ_g)⁻¹) for each weight tensor g, with
the Kronecker curvature H_g = blkdiag_b(A_b ⊗ Γ_b). The outputs, linearised in the weights, are then
Gaussian as well, row by row:

    C = Σ_g J_g (H_g + δ_g)⁻¹ J_gᵀ        J_g = ∂f / ∂w_g

J_g of one output is Σ_s g inpᵀ in each block, from the tokens of the inputs and of the gradients
at the pre-activations. In the eigenvectors of Γ and A the inverse is a division by μ_i λ_j + δ. Where
no position is shared J_g has rank one, and the sum over i and j takes one product of a matrix.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .curvature import pull_back, watched
from .devices import full_precision
from .kronecker import Eigenbasis, Kronecker, eigenbasis
from .layers import SharedLinear, in_blocks

__all__ = ["Posterior", "output_covariance", "rows_of_a_prediction"]

#: Numbers that a pass may hold at a time, and those of one product of tokens within it: 128 MiB and
#: 16 MiB in float32.
PASS_NUMBERS, PRODUCT_NUMBERS = 2**25, 2**22

#: Fewest and most rows of a pass. Rows come in tiles, as in :mod:`sklearn_softeq.predictive`.
TILE, MOST_ROWS = 16, 512

#: Numbers that a pass holds for each one that a map of the network gives out, as in the curvature.
ROW_NUMBERS = 2.2


class _Tensor(NamedTuple):
    """Where the two bases of a weight tensor stand, and δ."""

    left: int
    right: int
    precision: float


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Σ_g = (H_g + δ_g)⁻¹ of each weight tensor in use, by eigenvectors, eigenvalues and δ.

    Parameters
    ----------
    bases : tuple of Eigenbasis
        Of all factors; one that two tensors share stands here once.
    tensors : dict of str to (int, int, float)
        For each name the places of the bases of A and of Γ, and δ.
    """

    bases: tuple[Eigenbasis, ...]
    tensors: Mapping[str, _Tensor]

    @classmethod
    def from_curvature(
        cls,
        factors: Mapping[str, Kronecker],
        precisions: Mapping[str, float],
        dtype: torch.dtype,
    ) -> "Posterior":
        """The posterior from the curvature of each tensor in use, and δ.

        Parameters
        ----------
        factors : mapping of str to Kronecker
            H_g, for all N observations.
        precisions : mapping of str to float
            δ_g.
        dtype : torch.dtype
            To keep it in, that of the network; it is computed in float64.
        """
        places: dict[int, int] = {}
        bases: list[Eigenbasis] = []

        def place(factor) -> int:
            if id(factor) not in places:
                places[id(factor)] = len(bases)
                found = eigenbasis(factor)
                bases.append(Eigenbasis(found.values.to(dtype), found.vectors.to(dtype)))
            return places[id(factor)]

        tensors = {
            name: _Tensor(place(k.left), place(k.right), precisions[name])
            for name, k in factors.items()
        }
        return cls(tuple(bases), tensors)

    def __repr__(self) -> str:
        return f"Posterior({len(self.tensors)} tensors, {self.nbytes / 1e6:.3g} MB)"

    @property
    def nbytes(self) -> int:
        """Size of its arrays."""
        return sum(b.values.nbytes + b.vectors.nbytes for b in self.bases)

    def of(self, name: str) -> tuple[Eigenbasis, Eigenbasis, float]:
        """Bases of A and of Γ, and δ, of a tensor."""
        left, right, precision = self.tensors[name]
        return self.bases[left], self.bases[right], precision

    def keep(self, names: Iterable[str]) -> "Posterior":
        """That of these tensors alone, as far as it knows them."""
        kept = {name: self.tensors[name] for name in names if name in self.tensors}
        used = sorted({place for t in kept.values() for place in (t.left, t.right)})
        tensors = {
            name: _Tensor(used.index(t.left), used.index(t.right), t.precision)
            for name, t in kept.items()
        }
        return Posterior(tuple(self.bases[place] for place in used), tensors)

    def to(self, device: torch.device) -> "Posterior":
        """The same on a device."""
        moved = (
            replace(b, values=b.values.to(device), vectors=b.vectors.to(device)) for b in self.bases
        )
        return replace(self, bases=tuple(moved))

    def packed(self) -> dict[str, Any]:
        """The same as plain values and arrays, to be saved."""
        return {
            "bases": [[b.values.cpu().numpy(), b.vectors.cpu().numpy()] for b in self.bases],
            "tensors": {name: list(tensor) for name, tensor in self.tensors.items()},
        }

    @classmethod
    def unpacked(cls, state: Mapping[str, Any]) -> "Posterior":
        """The posterior again, on the CPU."""
        # Copies: what is loaded may be a file that was mapped to be read.
        bases = (
            Eigenbasis(*(torch.tensor(np.asarray(a)) for a in pair)) for pair in state["bases"]
        )
        tensors = {name: _Tensor(*tensor) for name, tensor in state["tensors"].items()}
        return cls(tuple(bases), tensors)


@full_precision()
def output_covariance(
    network: nn.Module,
    posterior: Posterior,
    inputs: torch.Tensor,
    directions: torch.Tensor,
    diagonal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the covariance of some linear combinations of them, of each row.

    Gradients of weights are formed for a few rows at a time, and only where positions share a
    weight; there is one backward pass for each combination.

    Parameters
    ----------
    network : nn.Module
    posterior : Posterior
        Of its weights.
    inputs : tensor of shape (n, C, H, W)
        On the device of the network.
    directions : tensor of shape (R, K)
        The combinations V f.
    diagonal : bool, default=False
        Their variances alone. Nothing is held for all combinations at a time then.

    Returns
    -------
    outputs : tensor of shape (n, K)
    covariance : tensor of shape (n, R, R), or (n, R) if ``diagonal``, float64
        V C Vᵀ.

    References
    ----------
    A. Immer, M. Korzepa, M. Bauer, "Improving predictions of Bayesian neural nets via local
    linearization", AISTATS 2021. H. Ritter, A. Botev, D. Barber, "A Scalable Laplace Approximation
    for Neural Networks", ICLR 2018: the Kronecker posterior.
    """
    maps: dict[str, _Map] = {}

    def see(name: str, layer: SharedLinear, given: torch.Tensor) -> None:
        with torch.no_grad():
            maps[name] = _Map(layer, posterior, name, given)

    outputs, ends = watched(network, inputs, see)
    n, n_pulls = len(inputs), len(directions)
    first = [end for end in ends.values() if end.is_leaf]
    shape = (n, n_pulls) if diagonal else (n, n_pulls, n_pulls)
    found = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    for k, direction in enumerate(directions):
        visit = {name: partial(m.see, k, 1 if diagonal else n_pulls) for name, m in maps.items()}
        vector = direction.to(outputs).expand(n, -1)
        pull_back(outputs, ends, vector, first, k + 1 < n_pulls, visit)
        if diagonal:
            for m in maps.values():
                found[:, k] += m.covariance()[:, 0, 0]
    if not diagonal:
        for m in maps.values():
            found += m.covariance()
    return outputs.detach(), found


class _Map:
    """What a map sees of a batch, in the eigenvectors of its posterior."""

    def __init__(self, layer: SharedLinear, posterior: Posterior, name: str, given: torch.Tensor):
        self.layer = layer
        self.weight = _Part(*posterior.of(f"{name}.weight"), layer.input_tokens(given))
        self.bias: _Part | None = None
        if layer.bias is not None:
            ones = given.new_ones(self.weight.n_rows, 1, 1, 1)
            self.bias = _Part(*posterior.of(f"{name}.bias"), ones)

    @torch.no_grad()
    def see(self, k: int, n_pulls: int, grad: torch.Tensor) -> None:
        """Take in the gradient of the k-th of some combinations of the outputs."""
        k = k if n_pulls > 1 else 0
        tokens = self.layer.gradient_tokens(grad)  # (n, S, B, d_out)
        self.weight.see(k, n_pulls, tokens)
        if self.bias is not None:
            # A bias is added at every position of every block.
            self.bias.see(k, n_pulls, tokens.sum((1, 2), keepdim=True))

    @torch.no_grad()
    def covariance(self) -> torch.Tensor:
        """What the tensors of this map add to that of these combinations, (n, R, R)."""
        found = self.weight.covariance()
        return found if self.bias is None else found + self.bias.covariance()


class _Part:
    """J Σ Jᵀ of one weight tensor and the rows of a batch.

    Parameters
    ----------
    left, right : Eigenbasis
        Of A and Γ.
    precision : float
        δ.
    inputs : tensor of shape (n, S, B, d_in)
        Input tokens.
    """

    def __init__(self, left: Eigenbasis, right: Eigenbasis, precision: float, inputs: torch.Tensor):
        self.right = right
        self.n_rows, self.n_positions = inputs.shape[:2]
        products = right.eigenvalues()[:, :, None] * left.eigenvalues()[:, None, :]
        weights = 1.0 / (products + precision)  # Eq. posterior, (B, d_out, d_in)
        tokens = left.coordinates(in_blocks(inputs))  # (B, n·S, d_in)
        if self.n_positions == 1:
            # Eq. rank one: Σ_ij q_i q'_i a_j² / (μ_i λ_j + δ)
            self.scale = torch.bmm(tokens.square_(), weights.transpose(1, 2))  # (B, n, d_out)
        else:
            self.roots = weights.sqrt_()
            self.inputs = tokens.unflatten(1, (self.n_rows, -1))  # (B, n, S, d_in)
        self.pulled: torch.Tensor | None = None

    def see(self, k: int, n_pulls: int, tokens: torch.Tensor) -> None:
        """Take in the gradient tokens (n, S, B, d_out) of the k-th combination."""
        found = self.right.coordinates(in_blocks(tokens)).unflatten(1, (self.n_rows, -1))
        if self.pulled is None:
            blocks, n, positions, size = found.shape
            self.pulled = found.new_empty(blocks, n, n_pulls, size, positions)
        self.pulled[:, :, k] = found.transpose(2, 3)  # (B, n, d_out, S)

    def covariance(self) -> torch.Tensor:
        """(n, R, R) of the combinations that were seen last, which are forgotten."""
        assert self.pulled is not None
        pulled, self.pulled = self.pulled, None
        if self.n_positions > 1:
            parts = zip(pulled, self.inputs, self.roots, strict=True)
            return sum(_shared(*part) for part in parts)
        rows = pulled[..., 0]  # (B, n, R, d_out)
        scaled = rows * self.scale[:, :, None]
        scaled, rows = (t.permute(1, 2, 0, 3).flatten(2) for t in (scaled, rows))  # (n, R, B·d_out)
        return torch.bmm(scaled, rows.transpose(1, 2)).double()


def _shared(pulled: torch.Tensor, inputs: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Σ_ij T_ij T'_ij / (μ_i λ_j + δ) with T = Σ_s q aᵀ, a few rows and some of the i at a time.

    Parameters
    ----------
    pulled : tensor of shape (n, R, d_out, S)
        q of each combination.
    inputs : tensor of shape (n, S, d_in)
        a.
    roots : tensor of shape (d_out, d_in)
        1 / √(μ_i λ_j + δ).

    Returns
    -------
    tensor of shape (n, R, R), float64
    """
    n, n_pulls, n_out, _ = pulled.shape
    n_in = inputs.shape[2]
    some = min(max(PRODUCT_NUMBERS // (n_pulls * n_in), 1), n_out)
    # Products of one size, so that it is the same for each row.
    rows = next(
        r
        for r in range(n, 0, -1)
        if n % r == 0 and (r == 1 or r * n_pulls * some * n_in <= PRODUCT_NUMBERS)
    )
    found = torch.zeros(n, n_pulls, n_pulls, dtype=torch.float64, device=pulled.device)
    for at in range(0, n, rows):
        seen = inputs[at : at + rows]
        for q, root in zip(pulled[at : at + rows].split(some, 2), roots.split(some), strict=True):
            jacobian = torch.bmm(q.flatten(1, 2), seen)  # (rows, R·some, d_in)
            jacobian = jacobian.view(rows, n_pulls, *root.shape).mul_(root).flatten(2)
            found[at : at + rows] += torch.bmm(jacobian, jacobian.transpose(1, 2))
    return found


def rows_of_a_prediction(network: nn.Module, posterior: Posterior, n_held: int) -> int:
    """How many rows are predicted at a time, from sizes alone.

    Parameters
    ----------
    network : nn.Module
    posterior : Posterior
    n_held : int
        Combinations of outputs whose gradients are held at the same time.
    """
    numbers = 0.0
    for name in posterior.tensors:
        map_name, _, kind = name.rpartition(".")
        layer = network.get_submodule(map_name)
        assert isinstance(layer, SharedLinear)
        left, right, _ = posterior.of(name)
        places = layer.n_positions * len(layer.weight) if kind == "weight" else 1
        given, seen = (basis.eigenvalues().shape[1] for basis in (right, left))
        numbers += places * (n_held * given + (seen if layer.n_positions > 1 else 0))
        numbers += ROW_NUMBERS * places * given
    rows = int(PASS_NUMBERS / max(numbers, 1.0))
    return min(max(rows // TILE * TILE, TILE), MOST_ROWS)
