"""Convolutions with circular padding."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.grad import conv2d_weight

from ..groups import P1
from .contract import Grid, Pathway, SharedLinear, in_one_order, strided
from .torus import circular_pad

__all__ = ["Conv", "circular_gram", "sum_of_convolutions"]


class Conv(SharedLinear, Pathway):
    """A convolution with a 3×3 kernel and circular padding; S = Y positions, D biases.

    Along a side of one pixel the kernel has one tap.

    Parameters
    ----------
    in_channels, out_channels : int
        C, D.
    grid, stride : pair of int
        Of the input; of the subsampling.
    n_taps : int, optional
        Weights for each pair of channels; default: one for each tap.
    n_filters : int, optional
        Rows of the weight; default: one for each output channel.

    Notes
    -----
    Convolutions of one layer are computed as one, from their ``filters`` and ``biases``
    (:func:`sum_of_convolutions`): a subclass says what it does by these, not by ``forward``.
    """

    group = P1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: Grid,
        stride: Grid = (1, 1),
        n_taps: int | None = None,
        n_filters: int | None = None,
    ):
        self.kernel = self.kernel_for(grid)
        self.in_channels = in_channels
        self.stride = stride
        n_taps = n_taps or math.prod(self.kernel)
        super().__init__(1, in_channels * n_taps, n_filters or out_channels)
        self.n_positions = math.prod(strided(grid, stride))

    @staticmethod
    def kernel_for(grid: Grid) -> Grid:
        """Sides of the filter on a grid."""
        return min(3, 2 * grid[0] - 1), min(3, 2 * grid[1] - 1)

    def reset(self, generator: torch.Generator | None = None) -> None:
        # Kaiming's variance 2/fan_in keeps the signal through ReLU.
        self.draw(2.0 / (self.in_channels * math.prod(self.kernel)), generator)

    def filters(self) -> torch.Tensor:
        """The filters, (D, C, k, k)."""
        return self.weight.view(-1, self.in_channels, *self.kernel)

    def biases(self) -> torch.Tensor:
        """What is added to each output channel, (D,)."""
        return self.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return sum_of_convolutions([self], inputs)

    def pad(self, inputs: torch.Tensor) -> torch.Tensor:
        """Feature maps with the rows and columns of the torus beside them that filters read."""
        # At stride 2 nothing beyond the last pixel is read.
        margins = [
            (taps // 2, 0 if step == 2 else taps // 2)
            for taps, step in zip(self.kernel, self.stride, strict=True)
        ]
        return circular_pad(inputs, *margins)

    def patches(self, inputs: torch.Tensor) -> torch.Tensor:
        """What each kept position sees, (n, C·k², Y)."""
        return nn.functional.unfold(self.pad(inputs), self.kernel, stride=self.stride)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.patches(inputs).transpose(1, 2)[:, :, None]  # (n, Y, 1, C·k²)

    def input_gram(self, inputs: torch.Tensor, root_weight: torch.Tensor | None) -> torch.Tensor:
        return self.patch_gram(inputs, root_weight)[None]

    def patch_gram(self, inputs: torch.Tensor, root_weight: torch.Tensor | None) -> torch.Tensor:
        """Σ_n Σ_y w_n patch patchᵀ over the kept positions, (C·k², C·k²)."""
        if root_weight is not None:
            inputs = inputs * root_weight[:, None, None, None]
        if self.stride == (1, 1):
            return circular_gram(inputs, self.kernel)
        # Few positions: their patches are as cheap, brought into one long matrix in one copy.
        windows = self.pad(inputs).unfold(2, self.kernel[0], self.stride[0])
        windows = windows.unfold(3, self.kernel[1], self.stride[1])  # (n, C, H', W', k, k)
        rows = windows.permute(1, 4, 5, 0, 2, 3).reshape(
            self.in_channels * math.prod(self.kernel), -1
        )
        return rows @ rows.T

    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        return self.fields(grads).transpose(1, 2)[:, :, None]  # (n, S, 1, D)

    def gradient_gram(self, grads: torch.Tensor) -> torch.Tensor:
        return _gram(self.fields(grads))[None]

    def fields(self, grads: torch.Tensor) -> torch.Tensor:
        """The rows of the weight at all their positions, (n, D, S)."""
        return grads.flatten(2)


def sum_of_convolutions(convs: Sequence[Conv], inputs: torch.Tensor) -> torch.Tensor:
    """The sum of convolutions of one layer, as the one whose filters are the sums of theirs."""
    first, *others = convs
    filters = sum((conv.filters() for conv in others), start=first.filters())
    biases = sum((conv.biases() for conv in others), start=first.biases())
    inputs = first.pad(inputs)
    if first.training or inputs.shape[2:] != filters.shape[2:]:
        return nn.functional.conv2d(inputs, filters, biases, first.stride)
    # At a single position it is a product of matrices, of which the order has to be kept.
    rows, weight = in_one_order(inputs.flatten(1), filters.flatten(1))
    return torch.addmm(biases, rows, weight.T)[:, :, None, None]


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Σ_n r rᵀ of matrices (n, d, S), shape (d, d)."""
    d, length = rows.shape[1:]
    if length < d:
        rows = rows.transpose(0, 1).flatten(1)
        return rows @ rows.T
    # A product for each sample is faster than to bring long rows together.
    return torch.bmm(rows, rows.transpose(1, 2)).sum(0)


def circular_gram(inputs: torch.Tensor, kernel: Grid) -> torch.Tensor:
    """Σ_n Σ_y of patch patchᵀ at stride 1, (C·k², C·k²), without the patches.

    On a torus Σ_y f[c, y + u] f[c', y + v] depends on v − u alone: R[c, c', v − u], of which the
    half with v − u ≥ 0 along the rows is enough, as R[c, c', −t] = R[c', c, t]. R is the gradient
    of a convolution of f with itself in its filter, which is a single pass over f.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
    kernel : pair of int
        Odd sides of the patch.
    """
    channels = inputs.shape[1]
    rows, columns = kernel[0] - 1, kernel[1] - 1  # largest offset along each axis
    ahead = circular_pad(inputs, (0, rows), (columns, columns))
    shape = (channels, channels, rows + 1, 2 * columns + 1)
    half = conv2d_weight(ahead, shape, inputs)  # (C, C', v − u)
    behind = half[:, :, 1:].transpose(0, 1).flip(2, 3)
    correlation = torch.cat([behind, half], 2)  # Eq. Toeplitz A
    u, v = (torch.arange(side, device=inputs.device) for side in kernel)
    at = (u - u[:, None] + rows).flatten(), (v - v[:, None] + columns).flatten()
    spread = correlation[:, :, at[0]][..., at[1]]  # (C, C', k·k, k·k)
    spread = spread.unflatten(3, (kernel[1], -1)).unflatten(2, (kernel[0], -1))
    return spread.permute(0, 2, 4, 1, 3, 5).reshape(2 * (channels * math.prod(kernel),))
