"""Free maps, and the readouts of a group network."""

import math

import torch

from ..groups import PointGroup
from .contract import Grid, LayerSpec, Pathway, SharedLinear, in_one_order, rounding, strided

__all__ = ["FC", "PooledFC"]


class FC(SharedLinear, Pathway):
    """A free map from all inputs to all outputs; S = B = 1, D·Y biases."""

    group: PointGroup | None = None

    def __init__(self, in_channels: int, out_channels: int, grid: Grid, stride: Grid = (1, 1)):
        self.output_shape = (out_channels, *strided(grid, stride))
        super().__init__(1, in_channels * math.prod(grid), math.prod(self.output_shape))

    def reset(self, generator: torch.Generator | None = None) -> None:
        # Kaiming's variance 2/fan_in keeps the signal through ReLU.
        self.draw(2.0 / self.weight.shape[-1], generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows, weight = inputs.flatten(1), self.weight[0]
        if not self.training:
            rows, weight = in_one_order(rows, weight)
        outputs = torch.addmm(self.bias, rows, weight.T)  # (n, D·Y)
        return outputs.unflatten(1, self.output_shape)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.flatten(1)[:, None, None, :]  # (n, 1, 1, C·X)

    def gradient_tokens(self, grads: torch.Tensor) -> torch.Tensor:
        return grads.flatten(1)[:, None, None, :]  # (n, 1, 1, D·Y)


class PooledFC(FC):
    """A map of what is left of C·G channels by the maximum over their G orientations.

    For the last grid, of one pixel: there it is invariant to the group.

    Parameters
    ----------
    in_channels : int
        C·G.
    out_channels : int
        D.
    group : PointGroup
        Of the input's orientations.
    """

    def __init__(self, in_channels: int, out_channels: int, group: PointGroup):
        super().__init__(in_channels // group.order, out_channels, (1, 1))
        self.group = group
        self.order = group.order

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> "PooledFC":
        return cls(spec.in_channels, spec.out_channels, spec.in_group)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(self._pool(inputs))

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().input_tokens(self._pool(inputs))

    def _pool(self, inputs: torch.Tensor) -> torch.Tensor:
        orientations = inputs.unflatten(1, (-1, self.order))  # (n, C, G, 1, 1)
        # Orientations may be equal but for rounding: those of an image with a symmetry of its own,
        # and g and −g on a 2×2 torus. Which of them is the largest by a last bit must not decide
        # where the gradient goes, so it goes to the first of them; the value is the maximum.
        known = orientations.detach()
        largest = known.amax(2, keepdim=True)
        slack = 1e3 * rounding(known.dtype) * largest.abs()
        first = (known >= largest - slack).byte().argmax(2, keepdim=True)
        chosen = orientations.gather(2, first)
        return (chosen + (largest - chosen.detach())).squeeze(2)  # Eq. pooling, (n, C, 1, 1)
