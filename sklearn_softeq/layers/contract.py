"""The contract: linear maps that are used at shared positions in blocks.

Every weight tensor is a map ``out[n, s, b] = W[b] @ inp[n, s, b] (+ bias)`` used at S shared
positions in B blocks. A :class:`SharedLinear` says how its input and the gradient at its output
unfold to ``(n, S, B, d)``; curvature, evidence and report know its name and this form, and nothing
else. A *pathway* holds one or two such maps and takes feature maps ``(n, C, H, W)`` to
``(n, D, H', W')``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from ..anchors import Interpolation
from ..groups import P1, PointGroup

__all__ = [
    "Grid",
    "LayerSpec",
    "Pathway",
    "SharedLinear",
    "in_blocks",
    "in_one_order",
    "outer",
    "rounding",
    "strided",
]

Grid = tuple[int, int]

#: Numbers in the shortest vectors that products of matrices are computed by.
VECTOR = 4


class SharedLinear(nn.Module, ABC):
    """B linear maps R^d_in → R^d_out, each used at S positions, with one bias for all of them.

    Parameters
    ----------
    n_blocks, n_in, n_out : int
        B, d_in, d_out. The weight has shape (B, d_out, d_in), the bias (d_out,).
    bias : bool, default=True
        Whether there is one.

    Attributes
    ----------
    n_positions : int
        S, kept positions only.
    interpolation : Interpolation or None
        Where the map is given at anchors: what stands between them and the pixels.
    """

    n_positions: int = 1
    bias: nn.Parameter  # None in a map without one
    interpolation: Interpolation | None

    def __init__(self, n_blocks: int, n_in: int, n_out: int, bias: bool = True):
        super().__init__()
        self.interpolation = None
        self.weight = nn.Parameter(torch.empty(n_blocks, n_out, n_in))
        self.register_parameter("bias", nn.Parameter(torch.zeros(n_out)) if bias else None)

    @torch.no_grad()
    def draw(self, variance: float, generator: torch.Generator | None) -> None:
        """Draw the weights uniformly with this variance, on the CPU; biases are 0."""
        self.weight.copy_(self.draw_like(self.weight, variance, generator))
        if self.bias is not None:
            self.bias.zero_()

    @staticmethod
    def draw_like(
        weight: torch.Tensor, variance: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Uniform numbers of this variance in the shape and dtype of a tensor, on the CPU."""
        bound = math.sqrt(3.0 * variance)
        drawn = torch.empty(weight.shape, dtype=weight.dtype)
        return drawn.uniform_(-bound, bound, generator=generator)

    @abstractmethod
    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        """Unfold the input of ``forward`` to (n, S, B, d_in)."""

    @abstractmethod
    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        """Unfold a gradient at the output of ``forward`` to the outputs of the maps.

        The adjoint of what ``forward`` does with them: of shape (n, S, B, d_out), and
        Σ grads · forward(x) = Σ gradient_tokens(grads) · (W input_tokens(x) + bias).
        """

    def input_gram(
        self, inputs: torch.Tensor, root_weight: torch.Tensor | None
    ) -> torch.Tensor | None:
        """A_b = Σ_n Σ_s w_n inp inpᵀ, shape (B, d_in, d_in), if there is a way without tokens.

        Parameters
        ----------
        inputs : tensor of shape (n, ...)
        root_weight : tensor of shape (n,) or None
            √w_n; None for weights of 1.
        """
        return None

    def gradient_gram(self, grads: torch.Tensor) -> torch.Tensor | None:
        """Σ_n Σ_s g gᵀ, shape (B, d_out, d_out), if there is a way without tokens."""
        return None

    def input_tangent(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """∂ input_tokens / ∂ log ω, or None where they do not depend on ω."""
        return None

    def gradient_tangent(self, grads: torch.Tensor) -> torch.Tensor | None:
        """∂ gradient_tokens / ∂ log ω, or None where they do not depend on ω."""
        return None


def outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ_n Σ_s l rᵀ of each block: (n, S, B, d) → (B, d, d)."""
    return torch.bmm(in_blocks(left).transpose(1, 2), in_blocks(right))


def in_blocks(tokens: torch.Tensor) -> torch.Tensor:
    """(n, S, B, d) → (B, n·S, d), such that a product need not copy each block by itself."""
    rows = tokens.permute(2, 0, 1, 3).flatten(1, 2)
    return rows if 1 in rows.stride()[1:] else rows.contiguous()


def in_one_order(rows: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with zeros up to a whole number of vectors (..., d), if they have more than one.

    For predictions: sums over rows of other lengths are taken in an order that depends on the place
    of a row in its batch, and so do the last digits.
    """
    missing = -weight.shape[-1] % VECTOR if weight.shape[-1] > VECTOR else 0
    if not missing:
        return rows, weight
    return nn.functional.pad(rows, (0, missing)), nn.functional.pad(weight, (0, missing))


@dataclass(frozen=True)
class LayerSpec:
    """What a layer lies between.

    Parameters
    ----------
    in_channels, out_channels : int
        C, D: all channels, orientations included.
    grid : pair of int
        Of the input.
    stride : pair of int
        Subsampling of rows and columns.
    in_group, out_group : PointGroup
        Whose orientations the input and output channels have; P1: none.
    alone : bool
        Whether the layer is one pathway only.
    anchor_fraction : float or None
        Anchors for each pixel or tap; None: the pathway's own default.
    """

    in_channels: int
    out_channels: int
    grid: Grid
    stride: Grid = (1, 1)
    in_group: PointGroup = P1
    out_group: PointGroup = P1
    alone: bool = True
    anchor_fraction: float | None = None


class Pathway(nn.Module, ABC):
    """A linear map between feature maps, (n, C, H, W) → (n, D, H', W').

    Attributes
    ----------
    group : PointGroup or None
        It commutes with this group and all translations; None: with nothing. Equivariant
        pathways share the grid that a strided layer keeps, free ones see the input as it is.
    factor_names : tuple of str
        The names of its weight tensors. A pathway with two is a product U, V of factors, whose
        common scale is a gauge: (aU, V/a) is the same function.
    """

    group: PointGroup | None
    factor_names: tuple[str, ...] = ("weight",)

    @property
    def log_gauge(self) -> float | None:
        """log δ_U − log δ_V of two factors at a random start; None where there is no gauge."""
        return None

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> "Pathway":
        """The pathway that fits into a layer."""
        return cls(spec.in_channels, spec.out_channels, spec.grid, spec.stride)

    @abstractmethod
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw a random start whose outputs have about the size of the inputs.

        Parameters
        ----------
        generator : torch.Generator, optional
            On the CPU; default: torch's global one.
        """

    def silence(self) -> None:
        """Make the map exactly zero while a gradient can still bring it to life."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == self.factor_names[0] or name.endswith("bias"):
                    parameter.zero_()


def rounding(dtype: torch.dtype) -> float:
    """Relative size of what decisions take for rounding; of half precision not its own.

    Eight bits would take unequal things for equal, and float32 decides otherwise afterwards.
    """
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def strided(grid: Grid, stride: Grid) -> Grid:
    """The grid that is left of a grid."""
    return grid[0] // stride[0], grid[1] // stride[1]
