"""Finite groups acting on the pixel grid, as value objects.

A group lists the elements at which equivariance is measured on a grid, lets one of them act on
feature maps, and says which elements of the output grid may answer to it after a stride.
"""

from dataclasses import dataclass

import torch

__all__ = ["GROUPS", "Translation"]

Shift = tuple[int, int]


@dataclass(frozen=True)
class Translation:
    """Cyclic shifts of the pixel grid.

    An element is a pair (rows, columns) of pixels; it acts by
    ``(g f)[y, x] = f[y - rows, x - columns]``, indices modulo the sides of the grid.
    """

    name: str = "translation"

    def elements(self, grid: tuple[int, int]) -> list[Shift]:
        """Shifts by 0, 1 and half of the side along each axis, without the identity.

        Together they generate every shift along an axis; the half turn of the grid is the
        farthest one. A grid of one pixel has no shift.
        """
        rows, columns = (sorted({0, 1 % side, side // 2}) for side in grid)
        return [(i, j) for i in rows for j in columns if (i, j) != (0, 0)]

    def act(self, features: torch.Tensor, element: Shift) -> torch.Tensor:
        """Move feature maps of shape (..., H, W) by an element."""
        return torch.roll(features, shifts=element, dims=(-2, -1))

    def output_elements(self, element: Shift, stride: tuple[int, int]) -> list[Shift]:
        """Shifts of a strided output that may answer to a shift of its input.

        At stride s a shift by t pixels moves the kept grid by ⌊t/s⌋ or ⌈t/s⌉ positions,
        depending on the grid that a sample keeps.
        """
        rows, columns = (sorted({t // s, -(-t // s)}) for t, s in zip(element, stride, strict=True))
        return [(i, j) for i in rows for j in columns]


GROUPS = {"translation": Translation()}
