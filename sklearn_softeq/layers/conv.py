"""Convolutions with circular padding."""

import math

import torch
from torch import nn

from ..groups import P1
from .contract import Grid, Pathway, SharedLinear

__all__ = ["Conv", "circular_pad"]


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

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        padded = circular_pad(inputs, self.kernel, self.stride)
        return nn.functional.conv2d(padded, self.filters(), self.bias, self.stride)

    def patches(self, inputs: torch.Tensor) -> torch.Tensor:
        """What each kept position sees, (n, Y, 1, C·k²)."""
        padded = circular_pad(inputs, self.kernel, self.stride)
        patches = nn.functional.unfold(padded, self.kernel, stride=self.stride)  # (n, C·k², Y)
        return patches.transpose(1, 2)[:, :, None]

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.patches(inputs)

    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        return grads.flatten(2).transpose(1, 2)[:, :, None]  # (n, Y, 1, D)


def circular_pad(inputs: torch.Tensor, kernel: Grid, stride: Grid) -> torch.Tensor:
    """Feature maps with the rows and columns of the torus beside them that a filter reads.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
    kernel, stride : pair of int
        Of the convolution that follows. At stride 2 and an even side nothing beyond the last
        pixel is read.
    """
    # Concatenation is several times faster than torch's circular padding on the CPU, and the
    # backward pass of one split faster than that of two slices.
    for dim, taps, step in ((2, kernel[0], stride[0]), (3, kernel[1], stride[1])):
        side = inputs.shape[dim]
        if taps == 1:
            continue
        if step == 2 and side % 2 == 0:
            rest, last = inputs.split((side - 1, 1), dim)
            inputs = torch.cat([last, rest, last], dim)
        else:
            first, rest, last = inputs.split((1, side - 2, 1), dim)
            inputs = torch.cat([last, first, rest, last, first], dim)
    return inputs
