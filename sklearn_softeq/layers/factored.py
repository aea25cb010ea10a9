"""Free maps of rank 1 over space for each pair of channels."""

import math

import torch

from .contract import Grid, Pathway, SharedLinear, in_one_order, strided

__all__ = ["FactorU", "FactorV", "FactoredFC"]


class FactorU(SharedLinear):
    """h[n, d, c] = Σ_x U[d, c, x] x[n, c, x] + b[d]; blocks are input channels."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        pixels = inputs.flatten(2).transpose(0, 1)  # (C, n, X)
        return torch.baddbmm(self.bias, pixels, self.weight.transpose(1, 2))  # (C, n, D)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.flatten(2)[:, None]  # (n, 1, C, X)

    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        return grads.transpose(0, 1)[:, None]  # (n, 1, C, D)


class FactorV(SharedLinear):
    """y[n, d, y] = Σ_c V[y, d, c] h[n, d, c] + b[y]; blocks are output channels."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Brought into order at once: a product of matrices with odd strides copies one by one.
        channels = hidden.permute(2, 1, 0).contiguous()  # (D, n, C)
        weight: torch.Tensor = self.weight
        if not self.training:
            channels, weight = in_one_order(channels, weight)
        return torch.baddbmm(self.bias, channels, weight.transpose(1, 2))  # (D, n, Y)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.permute(1, 2, 0)[:, None]  # (n, 1, D, C)

    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        return grads.transpose(0, 1)[:, None]  # (n, 1, D, Y)


class FactoredFC(Pathway):
    """A free map of rank 1 over space for each pair of channels: θ = V[y, d, c] U[d, c, x].

    Two batched matrix products; neither θ nor a block-diagonal matrix is ever formed. U has
    D biases, V has Y.
    """

    group = None
    factor_names = ("U.weight", "V.weight")

    def __init__(self, in_channels: int, out_channels: int, grid: Grid, stride: Grid = (1, 1)):
        super().__init__()
        self.output_grid = strided(grid, stride)
        self.n_pixels, self.in_channels = math.prod(grid), in_channels
        self.U = self._factor_u(in_channels, grid, out_channels)
        self.V = self._factor_v(out_channels, in_channels, self.output_grid)

    @property
    def log_gauge(self) -> float:
        """log(X/C), of weights with the variances 1/X and 1/C."""
        return math.log(self.n_pixels / self.in_channels)

    def _factor_u(self, in_channels: int, grid: Grid, out_channels: int) -> FactorU:
        return FactorU(in_channels, math.prod(grid), out_channels)

    def _factor_v(self, out_channels: int, in_channels: int, grid: Grid) -> FactorV:
        return FactorV(out_channels, in_channels, math.prod(grid))

    def reset(self, generator: torch.Generator | None = None) -> None:
        self.U.draw(1.0 / self.n_pixels, generator)
        self.V.draw(1.0 / self.in_channels, generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.V(self.U(inputs))  # (D, n, Y)
        return outputs.transpose(0, 1).unflatten(2, self.output_grid)
