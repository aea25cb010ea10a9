"""Maps given at anchors, with interpolation to the pixels or to the taps of a filter."""

import math

import torch

from ..anchors import Interpolation
from .contract import Grid, LayerSpec, in_one_order
from .conv import Conv
from .factored import FactoredFC, FactorU, FactorV

__all__ = ["SparseConv", "SparseFC", "SparseU", "SparseV"]

#: Anchors for each pixel or tap, and for each tap where a sparse convolution stands alone.
ANCHOR_FRACTION = 0.5
ALONE_FRACTION = 7 / 9


class SparseU(FactorU):
    """h[n, d, c] = Σ_m U'[d, c, m] Σ_x Ψ[m, x] x[n, c, x] + b[d]."""

    interpolation: Interpolation

    def __init__(self, in_channels: int, grid: Grid, out_channels: int, fraction: float):
        interpolation = Interpolation(grid, fraction)
        super().__init__(in_channels, interpolation.n_anchors, out_channels)
        self.interpolation = interpolation

    @torch.no_grad()
    def draw(self, variance: float, generator: torch.Generator | None) -> None:
        """Fit a dense draw of this variance; see :func:`_fitted_draw`."""
        self.weight.copy_(_fitted_draw(self, self.weight.shape[1], variance, generator))
        self.bias.zero_()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # Either order is Σ_m U' Ψ x.
        pixels = inputs.flatten(2)
        weight: torch.Tensor = self.weight
        if _projects(self, len(inputs), self.weight.shape[1]):
            pixels = _product(self, pixels, self.interpolation.matrix)  # (n, C, M)
        else:
            weight = weight @ self.interpolation.matrix
        if not self.training:
            pixels, weight = in_one_order(pixels, weight)
        return torch.baddbmm(self.bias, pixels.transpose(0, 1), weight.transpose(1, 2))

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().input_tokens(inputs) @ self.interpolation.matrix.T  # (n, 1, C, M)

    def input_tangent(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().input_tokens(inputs) @ self.interpolation.tangent().T


class SparseV(FactorV):
    """y[n, d, y] = Σ_m Ψ[m, y] Σ_c V'[m, d, c] h[n, d, c]; no bias."""

    interpolation: Interpolation

    def __init__(self, out_channels: int, in_channels: int, grid: Grid, fraction: float):
        interpolation = Interpolation(grid, fraction)
        super().__init__(out_channels, in_channels, interpolation.n_anchors, bias=False)
        self.interpolation = interpolation

    @torch.no_grad()
    def draw(self, variance: float, generator: torch.Generator | None) -> None:
        """Fit a dense draw of this variance; see :func:`_fitted_draw`."""
        drawn = _fitted_draw(self, self.weight.shape[2], variance, generator)
        self.weight.copy_(drawn.transpose(1, 2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        n_in, n, _ = hidden.shape
        channels = hidden.permute(2, 1, 0).contiguous()  # (D, n, C)
        psi = self.interpolation.matrix.T
        if _projects(self, n, n_in):
            return _product(self, _product(self, channels, self.weight), psi)
        return _product(self, channels, psi @ self.weight)

    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        return super().gradient_tokens(grads) @ self.interpolation.matrix.T  # (n, 1, D, M')

    def gradient_tangent(self, grads: torch.Tensor) -> torch.Tensor:
        return super().gradient_tokens(grads) @ self.interpolation.tangent().T


class SparseFC(FactoredFC):
    """A factored map whose U and V are interpolated from anchors; D biases, of U.

    Parameters
    ----------
    in_channels, out_channels : int
        C, D.
    grid, stride : pair of int
        Of the input; of the output's subsampling.
    anchor_fraction : float, default=0.5
        Anchors for each pixel of either grid, at least 1 in all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: Grid,
        stride: Grid = (1, 1),
        anchor_fraction: float = ANCHOR_FRACTION,
    ):
        self.anchor_fraction = anchor_fraction
        super().__init__(in_channels, out_channels, grid, stride)

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> "SparseFC":
        fraction = spec.anchor_fraction or ANCHOR_FRACTION
        return cls(spec.in_channels, spec.out_channels, spec.grid, spec.stride, fraction)

    def _factor_u(self, in_channels: int, grid: Grid, out_channels: int) -> SparseU:
        return SparseU(in_channels, grid, out_channels, self.anchor_fraction)

    def _factor_v(self, out_channels: int, in_channels: int, grid: Grid) -> SparseV:
        return SparseV(out_channels, in_channels, grid, self.anchor_fraction)


class SparseConv(Conv):
    """A convolution whose 3×3 filters are interpolated from anchors.

    Parameters
    ----------
    in_channels, out_channels : int
        C, D.
    grid, stride : pair of int
        Of the input; of the subsampling.
    anchor_fraction : float, default=0.5
        Anchors for each tap, at least 1 in all: 4 of 9.
    """

    interpolation: Interpolation

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: Grid,
        stride: Grid = (1, 1),
        anchor_fraction: float = ANCHOR_FRACTION,
    ):
        interpolation = Interpolation(self.kernel_for(grid), anchor_fraction)
        super().__init__(in_channels, out_channels, grid, stride, interpolation.n_anchors)
        self.interpolation = interpolation

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> "SparseConv":
        fraction = spec.anchor_fraction or (ALONE_FRACTION if spec.alone else ANCHOR_FRACTION)
        return cls(spec.in_channels, spec.out_channels, spec.grid, spec.stride, fraction)

    @torch.no_grad()
    def draw(self, variance: float, generator: torch.Generator | None) -> None:
        """Fit filters drawn with this variance; what of them is smooth is what images see."""
        shape = (self.weight.shape[1], self.in_channels, math.prod(self.kernel))
        dense = self.draw_like(self.weight.new_empty(shape), variance, generator)
        self.weight.copy_(self.interpolation.fit(dense).flatten(1)[None])
        self.bias.zero_()

    def filters(self) -> torch.Tensor:
        anchors = self.weight.unflatten(2, (self.in_channels, -1))[0]  # (D, C, M)
        return (anchors @ self.interpolation.matrix).unflatten(2, self.kernel)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._projected(inputs, self.interpolation.matrix)  # (n, Y, 1, C·M)

    def input_gram(self, inputs: torch.Tensor, root_weight: torch.Tensor | None) -> torch.Tensor:
        gram = self.patch_gram(inputs, root_weight)
        gram = gram.unflatten(1, (self.in_channels, -1)).unflatten(0, (self.in_channels, -1))
        psi = self.interpolation.matrix
        gram = psi @ gram.transpose(1, 2) @ psi.T  # Eq. Ψ A Ψᵀ, (C, C', M, M)
        return gram.transpose(1, 2).flatten(2).flatten(0, 1)[None]

    def input_tangent(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._projected(inputs, self.interpolation.tangent())

    def _projected(self, inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        patches = super().input_tokens(inputs).unflatten(3, (self.in_channels, -1))
        return (patches @ matrix.T).flatten(3)


def _projects(layer: SparseU | SparseV, n: int, n_channels: int) -> bool:
    """Whether maps come to the anchors, rather than weights to the pixels: where it is cheaper.

    In predictions whatever their number is: the order decides about last digits, and a graph that
    is exported is for any number.
    """
    n_anchors, n_pixels = layer.interpolation.matrix.shape
    project, form = n_anchors * (n_pixels + n_channels), n_channels * n_pixels  # for each map
    if not layer.training:
        return project <= form
    return n * project <= n * form + n_anchors * form  # and once for all, to form the weights


def _product(layer: SparseU | SparseV, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ_i rows[..., i] weight[..., d, i]."""
    if not layer.training:
        rows, weight = in_one_order(rows, weight)
    return rows @ weight.transpose(-1, -2)


def _fitted_draw(
    layer: SparseU | SparseV, n_rows: int, variance: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Least-squares fit of white noise (B, n_rows, X) at anchors (B, n_rows, M), as large as it.

    M of the X directions of the noise can be interpolated. The fit alone would lose all but M/X
    of its mean square, a layer of two factors all but the square of that, and a stack of such
    layers its signal.
    """
    n_anchors, n_pixels = layer.interpolation.matrix.shape
    shape = (len(layer.weight), n_rows, n_pixels)
    dense = layer.draw_like(layer.weight.new_empty(shape), variance, generator)
    return layer.interpolation.fit(dense) * math.sqrt(n_pixels / n_anchors)
