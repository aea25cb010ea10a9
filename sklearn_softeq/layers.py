"""Layers as linear maps that are used at shared positions in blocks, and their sums.

Contract: every weight tensor is a map ``out[n, s, b] = W[b] @ inp[n, s, b] (+ bias)`` used at S
shared positions in B blocks. A :class:`SharedLinear` says how its input and the gradient at its
output unfold to ``(n, S, B, d)``; curvature, evidence and report know its name and this form, and
nothing else. A *pathway* holds one or two such maps and takes feature maps ``(n, C, H, W)`` to
``(n, D, H', W')``. :class:`PathwaySum` adds pathways. A further pathway is a class here and a row
of :data:`PATHWAYS`.
"""

import math
from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import nn

__all__ = ["FC", "PATHWAYS", "Conv", "FactoredFC", "Pathway", "PathwaySum", "SharedLinear"]

Grid = tuple[int, int]


class SharedLinear(nn.Module, ABC):
    """B linear maps R^d_in → R^d_out, each used at S positions, with one bias for all of them.

    Parameters
    ----------
    n_blocks, n_in, n_out : int
        B, d_in, d_out. The weight has shape (B, d_out, d_in), the bias (d_out,).
    """

    def __init__(self, n_blocks: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_blocks, n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))

    @torch.no_grad()
    def draw(self, variance: float, generator: torch.Generator | None) -> None:
        """Draw the weights uniformly with this variance, on the CPU; biases are 0."""
        bound = math.sqrt(3.0 * variance)
        weight = torch.empty(self.weight.shape, dtype=self.weight.dtype)
        self.weight.copy_(weight.uniform_(-bound, bound, generator=generator))
        self.bias.zero_()

    @abstractmethod
    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        """Unfold the input of ``forward`` to (n, S, B, d_in)."""

    @abstractmethod
    def output_tokens(self, outputs: torch.Tensor) -> torch.Tensor:
        """Unfold the output of ``forward``, or a gradient there, to (n, S, B, d_out)."""


class Pathway(nn.Module, ABC):
    """A linear map between feature maps, (n, C, H, W) → (n, D, H', W').

    Attributes
    ----------
    equivariant : bool
        Whether it commutes with translations; such pathways share the grid that a strided layer
        keeps, the free ones see the input as it is.
    factor_names : tuple of str
        The names of its weight tensors. A pathway with two is a product U, V of factors, whose
        common scale is a gauge: (aU, V/a) is the same function.
    """

    equivariant: bool
    factor_names: tuple[str, ...] = ("weight",)

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


class FC(SharedLinear, Pathway):
    """A free map from all inputs to all outputs; S = B = 1, D·Y biases."""

    equivariant = False

    def __init__(self, in_channels: int, out_channels: int, grid: Grid, stride: Grid = (1, 1)):
        self.output_shape = (out_channels, *_strided(grid, stride))
        super().__init__(1, in_channels * math.prod(grid), math.prod(self.output_shape))

    def reset(self, generator: torch.Generator | None = None) -> None:
        # Kaiming's variance 2/fan_in keeps the signal through ReLU.
        self.draw(2.0 / self.weight.shape[-1], generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = torch.addmm(self.bias, inputs.flatten(1), self.weight[0].T)  # (n, D·Y)
        return outputs.unflatten(1, self.output_shape)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.flatten(1)[:, None, None, :]  # (n, 1, 1, C·X)

    def output_tokens(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.flatten(1)[:, None, None, :]  # (n, 1, 1, D·Y)


class FactorU(SharedLinear):
    """h[n, d, c] = Σ_x U[d, c, x] x[n, c, x] + b[d]; blocks are input channels."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        pixels = inputs.flatten(2).transpose(0, 1)  # (C, n, X)
        return torch.baddbmm(self.bias, pixels, self.weight.transpose(1, 2))  # (C, n, D)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.flatten(2)[:, None]  # (n, 1, C, X)

    def output_tokens(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.transpose(0, 1)[:, None]  # (n, 1, C, D)


class FactorV(SharedLinear):
    """y[n, d, y] = Σ_c V[y, d, c] h[n, d, c] + b[y]; blocks are output channels."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        channels = hidden.permute(2, 1, 0)  # (D, n, C)
        return torch.baddbmm(self.bias, channels, self.weight.transpose(1, 2))  # (D, n, Y)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.permute(1, 2, 0)[:, None]  # (n, 1, D, C)

    def output_tokens(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.transpose(0, 1)[:, None]  # (n, 1, D, Y)


class FactoredFC(Pathway):
    """A free map of rank 1 over space for each pair of channels: θ = V[y, d, c] U[d, c, x].

    Two batched matrix products; neither θ nor a block-diagonal matrix is ever formed. U has
    D biases, V has Y.
    """

    equivariant = False
    factor_names = ("U.weight", "V.weight")

    def __init__(self, in_channels: int, out_channels: int, grid: Grid, stride: Grid = (1, 1)):
        super().__init__()
        self.output_grid = _strided(grid, stride)
        self.U = FactorU(in_channels, math.prod(grid), out_channels)
        self.V = FactorV(out_channels, in_channels, math.prod(self.output_grid))

    def reset(self, generator: torch.Generator | None = None) -> None:
        for factor in (self.U, self.V):
            factor.draw(1.0 / factor.weight.shape[-1], generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.V(self.U(inputs))  # (D, n, Y)
        return outputs.transpose(0, 1).unflatten(2, self.output_grid)


class Conv(SharedLinear, Pathway):
    """A convolution with a 3×3 kernel and circular padding; S = Y positions, D biases.

    Along a side of one pixel the kernel has one tap.
    """

    equivariant = True

    def __init__(self, in_channels: int, out_channels: int, grid: Grid, stride: Grid = (1, 1)):
        self.kernel = (min(3, 2 * grid[0] - 1), min(3, 2 * grid[1] - 1))
        self.in_channels = in_channels
        self.stride = stride
        super().__init__(1, in_channels * math.prod(self.kernel), out_channels)

    def reset(self, generator: torch.Generator | None = None) -> None:
        self.draw(2.0 / self.weight.shape[-1], generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        filters = self.weight.view(-1, self.in_channels, *self.kernel)  # (D, C, k, k)
        padded = _circular_pad(inputs, self.kernel)
        return nn.functional.conv2d(padded, filters, self.bias, self.stride)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(
            _circular_pad(inputs, self.kernel), self.kernel, stride=self.stride
        )  # (n, C·k², Y)
        return patches.transpose(1, 2)[:, :, None]  # (n, Y, 1, C·k²)

    def output_tokens(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.flatten(2).transpose(1, 2)[:, :, None]  # (n, Y, 1, D)


PATHWAYS: dict[str, type[Pathway]] = {"conv": Conv, "fc": FC, "factored_fc": FactoredFC}


class PathwaySum(nn.Module):
    """The sum of pathways between the same feature maps, times a constant.

    At a stride, the grid that is kept is chosen for each sample by the largest norm of the
    input's polyphase components, and shared by all equivariant pathways, which makes their sum
    commute with translations; free pathways see the input as it is.

    Parameters
    ----------
    pathways : dict of str to Pathway
        Children by name.
    stride : pair of int
        Subsampling of rows and columns.
    scale : float
        Factor of the sum.

    Attributes
    ----------
    enabled : dict of str to bool
        A pathway that is switched off is not computed; it counts as zero.
    """

    def __init__(self, pathways: dict[str, Pathway], stride: Grid, scale: float):
        super().__init__()
        self.stride = stride
        self.scale = scale
        self.enabled = dict.fromkeys(pathways, True)
        for name, pathway in pathways.items():
            self.add_module(name, pathway)

    @property
    def pathways(self) -> dict[str, Pathway]:
        """The pathways by name."""
        return {name: cast(Pathway, self.get_submodule(name)) for name in self.enabled}

    def get_extra_state(self) -> dict[str, bool]:
        """What is switched off travels with the weights."""
        return dict(self.enabled)

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restore what is switched off."""
        self.enabled = dict(state)

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Switch a pathway off for good: its weights become exactly zero."""
        self.enabled[name] = False
        for parameter in self.pathways[name].parameters():
            parameter.zero_()

    def removed(self, name: str) -> bool:
        """Whether a pathway was removed, as against held back until later."""
        return not self.enabled[name] and not any(p.any() for p in self.pathways[name].parameters())

    def outputs(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scaled output of each pathway that is switched on."""
        paths = {name: path for name, path in self.pathways.items() if self.enabled[name]}
        rolled = inputs
        if self.stride != (1, 1) and any(p.equivariant for p in paths.values()):
            rolled = keep_largest_grid(inputs, self.stride)
        outputs = {
            name: path(rolled if path.equivariant else inputs) for name, path in paths.items()
        }
        if self.scale == 1.0:  # spares a pass over the features
            return outputs
        return {name: output * self.scale for name, output in outputs.items()}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert any(self.enabled.values()), "a layer needs a pathway"
        first, *others = self.outputs(inputs).values()
        return sum(others, start=first)


def keep_largest_grid(inputs: torch.Tensor, stride: Grid) -> torch.Tensor:
    """Roll each sample so that its polyphase grid of largest norm comes to lie at the origin.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
        H and W are multiples of the stride.
    stride : pair of int
        Sides of the cell of grids, 1 or 2 each. Ties go to the first grid in row-major order.
    """
    n, _, height, width = inputs.shape
    rows, columns = stride
    cells = inputs.detach().square().sum(1)  # (n, H, W)
    cells = cells.view(n, height // rows, rows, width // columns, columns)
    norms = cells.sum((1, 3)).flatten(1)  # Eq. polyphase choice, (n, rows · columns)
    best = norms.argmax(1)
    for dim, phase in ((2, best // columns), (3, best % columns)):
        moved = (phase == 1)[:, None, None, None]
        inputs = torch.where(moved, torch.roll(inputs, -1, dim), inputs)
    return inputs


def _strided(grid: Grid, stride: Grid) -> Grid:
    return grid[0] // stride[0], grid[1] // stride[1]


def _circular_pad(inputs: torch.Tensor, kernel: Grid) -> torch.Tensor:
    # Concatenation is several times faster than torch's circular padding on the CPU.
    if kernel[0] > 1:
        inputs = torch.cat([inputs[:, :, -1:], inputs, inputs[:, :, :1]], 2)
    if kernel[1] > 1:
        inputs = torch.cat([inputs[:, :, :, -1:], inputs, inputs[:, :, :, :1]], 3)
    return inputs
