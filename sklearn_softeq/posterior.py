"""The posterior of the weights, and the covariance of a network's outputs under it.

Laplace's approximation at the mode w* is w ~ N(w*, (H + δ)⁻¹), with H the curvature of the log
likelihood and δ diagonal. Of H only the blocks H_b ≈ A_b ⊗ Γ_b of each weight tensor are known. To
leave out what lies between them is to count a direction of the outputs that several layers can move
once for each of them. Here each block has a share r_b of the curvature instead,

    Σ_b = (H_b / r_b + δ)⁻¹,    Σ_b r_b = 1

As |Σ_b a_b|² ≤ Σ_b |a_b|² / r_b, H is at most the matrix of the blocks H_b / r_b, and (H + δ)⁻¹ at
least that of the Σ_b: no more uncertainty than the whole matrix has. The shares make the most of
that. The outputs, linearised in the weights, are then Gaussian as well, row by row:

    C = Σ_b J_b Σ_b J_bᵀ        J_b = ∂f / ∂w_b

J_b of one output is Σ_s g inpᵀ, from the tokens of the inputs and of the gradients at the
pre-activations. In the eigenvectors of Γ and A the inverse is a division by μ_i λ_j / r_b + δ.
Where no position is shared J_b has rank one, and the sum over i and j is one product of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .curvature import pull_back, watched
from .devices import full_precision
from .kronecker import Eigenbases, Eigenbasis, Kronecker
from .layers import SharedLinear, in_blocks

__all__ = ["Posterior", "output_covariance", "rows_of_a_prediction"]

#: Numbers that a pass may hold at a time, and those of one product of tokens within it: 128 MiB and
#: 16 MiB in float32.
PASS_NUMBERS, PRODUCT_NUMBERS = 2**25, 2**22

#: Rows come in tiles, as in :mod:`sklearn_softeq.predictive`. A pass takes no more than so many,
#: for a single row costs as much as all of them: with 512 it took 0.3 to 3 s where 128 take 0.1 to
#: 0.6, and many rows need at most 1.3 times as long.
TILE, MOST_ROWS = 16, 128

#: Numbers up to which one tile is a pass, where ``PASS_NUMBERS`` do not suffice for it: 512 MiB in
#: float32, of 400 outputs of small images that are sampled. Beyond, a pass has a single row.
TILE_NUMBERS = 2**27

#: Numbers that a pass holds for each one that a map of the network gives out, as in the curvature.
ROW_NUMBERS = 2.2


#: Steps towards the best shares. After 20 what they maximise was within 0.01 % of its maximum.
SHARE_STEPS = 20

#: Part of the curvature that is dealt out evenly. To a block without any share the rounding of
#: eigenvalues that are 0 would count as knowledge.
EVEN = 0.01

#: Below any product of eigenvalues that counts.
TINY = 1e-30


class _Tensor(NamedTuple):
    """Where the two bases of a weight tensor stand, δ, and the shares of its blocks, (B,)."""

    left: int
    right: int
    precision: float
    shares: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Σ_b = (H_b / r_b + δ)⁻¹ of each block of each weight tensor, by eigenvectors, eigenvalues.

    A tensor that it does not know has no uncertainty.

    Parameters
    ----------
    bases : tuple of Eigenbasis
        Of all factors; one that two tensors have in common stands here once.
    tensors : dict of str to (int, int, float, tensor)
        For each name the places of the bases of A and of Γ, δ, and the shares r of its blocks.
    """

    bases: tuple[Eigenbasis, ...]
    tensors: Mapping[str, _Tensor]

    @classmethod
    def from_curvature(
        cls,
        factors: Mapping[str, Kronecker],
        precisions: Mapping[str, float],
        dtype: torch.dtype,
        bases: Eigenbases | None = None,
    ) -> "Posterior":
        """The posterior from the curvature of each tensor in use, and δ.

        Parameters
        ----------
        factors : mapping of str to Kronecker
            Of all N observations.
        precisions : mapping of str to float
            δ.
        dtype : torch.dtype
            To keep it in, that of the network; it is computed in float64.
        bases : Eigenbases, optional
            Those of the factors that have been found; default: none yet.
        """
        basis_of = Eigenbases() if bases is None else bases
        places: dict[int, int] = {}
        kept: list[Eigenbasis] = []

        def place(factor) -> int:
            if id(factor) not in places:
                places[id(factor)] = len(kept)
                found = basis_of(factor)
                kept.append(Eigenbasis(found.values.to(dtype), found.vectors.to(dtype)))
            return places[id(factor)]

        places_of = {name: (place(k.left), place(k.right)) for name, k in factors.items()}
        shares = _shares(
            {
                name: (_products(kept[left], kept[right]).double(), precisions[name])
                for name, (left, right) in places_of.items()
            }
        )
        tensors = {
            name: _Tensor(*found, precisions[name], shares[name].to(dtype))
            for name, found in places_of.items()
        }
        return cls(tuple(kept), tensors)

    def __repr__(self) -> str:
        return f"Posterior({len(self.tensors)} tensors, {self.nbytes / 1e6:.3g} MB)"

    @property
    def nbytes(self) -> int:
        """Size of its arrays."""
        return sum(b.values.nbytes + b.vectors.nbytes for b in self.bases)

    def of(self, name: str) -> tuple[Eigenbasis, Eigenbasis]:
        """Bases of A and of Γ of a tensor."""
        left, right, _, _ = self.tensors[name]
        return self.bases[left], self.bases[right]

    def eigenvalues(self, name: str) -> torch.Tensor:
        """Of Σ_b, for the coordinates (B, of Γ, of A) of a tensor."""
        left, right, precision, shares = self.tensors[name]
        products, share = _products(self.bases[left], self.bases[right]), shares[:, None, None]
        return share / (products + share * precision)  # Eq. posterior

    def keep(self, names: Iterable[str]) -> "Posterior":
        """That of these tensors alone, as far as it knows them."""
        kept = {name: self.tensors[name] for name in names if name in self.tensors}
        used = sorted({place for t in kept.values() for place in (t.left, t.right)})
        tensors = {
            name: t._replace(left=used.index(t.left), right=used.index(t.right))
            for name, t in kept.items()
        }
        return Posterior(tuple(self.bases[place] for place in used), tensors)

    def to(self, device: torch.device) -> "Posterior":
        """The same on a device."""
        moved = (
            replace(b, values=b.values.to(device), vectors=b.vectors.to(device)) for b in self.bases
        )
        tensors = {n: t._replace(shares=t.shares.to(device)) for n, t in self.tensors.items()}
        return Posterior(tuple(moved), tensors)

    def packed(self) -> dict[str, Any]:
        """The same as plain values and arrays, to be saved."""
        return {
            "bases": [[b.values.cpu().numpy(), b.vectors.cpu().numpy()] for b in self.bases],
            "tensors": {
                name: [t.left, t.right, t.precision, t.shares.cpu().numpy()]
                for name, t in self.tensors.items()
            },
        }

    @classmethod
    def unpacked(cls, state: Mapping[str, Any]) -> "Posterior":
        """The posterior again, on the CPU."""
        # Copies: what is loaded may be a file that was mapped to be read.
        bases = (
            Eigenbasis(*(torch.tensor(np.asarray(a)) for a in pair)) for pair in state["bases"]
        )
        tensors = {
            name: _Tensor(left, right, precision, torch.tensor(np.asarray(shares)))
            for name, (left, right, precision, shares) in state["tensors"].items()
        }
        return cls(tuple(bases), tensors)


def _products(left: Eigenbasis, right: Eigenbasis) -> torch.Tensor:
    """μ_i λ_j, (B, d_out, d_in)."""
    return right.eigenvalues()[:, :, None] * left.eigenvalues()[:, None, :]


def _shares(spectra: Mapping[str, tuple[torch.Tensor, float]]) -> dict[str, torch.Tensor]:
    """Shares of the curvature with the most uncertainty of the training outputs left, (B,) each.

    They maximise Σ_b tr(H_b Σ_b) = Σ_b Σ_i r h_i / (h_i + r δ), which is concave in r, by steps
    r_b ← r_b · slope_b, brought to the sum 1.

    Parameters
    ----------
    spectra : mapping of str to (tensor of shape (B, d_out, d_in), float)
        Eigenvalues h of each H_b, and δ.
    """
    n_blocks = sum(len(h) for h, _ in spectra.values())
    shares = {name: h.new_full((len(h),), 1.0 / n_blocks) for name, (h, _) in spectra.items()}
    for _ in range(SHARE_STEPS):
        raised = {}
        for name, (h, precision) in spectra.items():
            held = h + shares[name][:, None, None] * precision
            raised[name] = shares[name] * (h / held.clamp_min(TINY)).square().sum((1, 2))
        total = torch.stack([r.sum() for r in raised.values()]).sum()
        if total <= TINY:  # nothing was determined
            break
        shares = {name: r / total for name, r in raised.items()}
    return {name: (1 - EVEN) * r + EVEN / n_blocks for name, r in shares.items()}


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
        at, n_held = (0, 1) if diagonal else (k, n_pulls)
        visit = {name: partial(seen.see, at, n_held) for name, seen in maps.items()}
        vector = direction.to(outputs).expand(n, -1)
        pull_back(outputs, ends, vector, first, k + 1 < n_pulls, visit)
        if diagonal:
            for part in (part for seen in maps.values() for part in seen.covariances()):
                found[:, k] += part[:, 0, 0]
    if not diagonal:
        for part in (part for seen in maps.values() for part in seen.covariances()):
            found += part
    return outputs.detach(), found


class _Map:
    """What a map sees of a batch, in the eigenvectors of its posterior."""

    def __init__(self, layer: SharedLinear, posterior: Posterior, name: str, given: torch.Tensor):
        self.layer = layer
        self.parts: dict[str, _Part] = {}
        tokens = layer.input_tokens(given)  # (n, S, B, d_in)
        if f"{name}.weight" in posterior.tensors:
            self.parts["weight"] = _Part(posterior, f"{name}.weight", tokens)
        if f"{name}.bias" in posterior.tensors:
            ones = tokens.new_ones(len(tokens), 1, 1, 1)
            self.parts["bias"] = _Part(posterior, f"{name}.bias", ones)

    @torch.no_grad()
    def see(self, k: int, n_pulls: int, grad: torch.Tensor) -> None:
        """Take in the gradient of the k-th of some combinations of the outputs."""
        tokens = self.layer.gradient_tokens(grad)  # (n, S, B, d_out)
        if "weight" in self.parts:
            self.parts["weight"].see(k, n_pulls, tokens)
        if "bias" in self.parts:
            # A bias is added at every position of every block.
            self.parts["bias"].see(k, n_pulls, tokens.sum((1, 2), keepdim=True))

    @torch.no_grad()
    def covariances(self) -> Iterator[torch.Tensor]:
        """What each tensor of this map adds to that of these combinations, (n, R, R)."""
        return (part.covariance() for part in self.parts.values())


class _Part:
    """J Σ Jᵀ of one weight tensor and the rows of a batch.

    Parameters
    ----------
    posterior : Posterior
    name : str
    inputs : tensor of shape (n, S, B, d_in)
        Input tokens.
    """

    def __init__(self, posterior: Posterior, name: str, inputs: torch.Tensor):
        left, self.right = posterior.of(name)
        self.n_rows, self.n_positions = inputs.shape[:2]
        variances = posterior.eigenvalues(name)  # (B, d_out, d_in)
        tokens = left.coordinates(in_blocks(inputs))  # (B, n·S, d_in)
        if self.n_positions == 1:
            # Eq. rank one: Σ_ij q_i q'_i a_j² / (μ_i λ_j / r + δ)
            self.scale = torch.bmm(tokens.square_(), variances.transpose(1, 2))  # (B, n, d_out)
        else:
            self.roots = _padded(variances.sqrt_())
            self.inputs = _padded(tokens).unflatten(1, (self.n_rows, -1))  # (B, n, S, d_in)
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
            return torch.stack([_shared(*part) for part in parts]).sum(0)
        rows = pulled[..., 0]  # (B, n, R, d_out)
        scaled = rows * self.scale[:, :, None]
        # (n, R, B·d_out)
        scaled, rows = (_padded(t.permute(1, 2, 0, 3).flatten(2)) for t in (scaled, rows))
        return torch.bmm(scaled, rows.transpose(1, 2)).double()


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """The same with zeros up to a multiple of 16 entries.

    Then every row of a product begins at the same place of a vector register, and its sum is taken
    in the same order, wherever among the others it stands.
    """
    return nn.functional.pad(rows, (0, -rows.shape[-1] % TILE))


def _shared(pulled: torch.Tensor, inputs: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Σ_ij T_ij T'_ij / (μ_i λ_j / r + δ), T = Σ_s q aᵀ, for a few rows and some i at a time.

    Parameters
    ----------
    pulled : tensor of shape (n, R, d_out, S)
        q of each combination.
    inputs : tensor of shape (n, S, d_in)
        a.
    roots : tensor of shape (d_out, d_in)
        1 / √(μ_i λ_j / r + δ).

    Returns
    -------
    tensor of shape (n, R, R), float64
    """
    n, n_pulls, n_out, _ = pulled.shape
    n_in = inputs.shape[2]
    some = min(max(PRODUCT_NUMBERS // (n_pulls * n_in), 1), n_out)
    fit = max(PRODUCT_NUMBERS // (n_pulls * some * n_in), 1)
    rows = next(r for r in range(min(fit, n), 0, -1) if n % r == 0)  # of one size for all rows
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
        left, right = posterior.of(name)
        places = layer.n_positions * len(layer.weight) if kind == "weight" else 1
        given, seen = (basis.eigenvalues().shape[1] for basis in (right, left))
        kept = seen if layer.n_positions > 1 else 0  # coordinates of the inputs
        numbers += places * ((n_held + ROW_NUMBERS) * given + kept)
    if TILE * numbers > TILE_NUMBERS:
        # Nothing between: among fewer rows than a tile the last bits of one depend on its place.
        return 1
    rows = int(PASS_NUMBERS / max(numbers, 1.0))
    return min(max(rows // TILE * TILE, TILE), MOST_ROWS)
