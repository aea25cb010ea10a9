"""Moves of feature maps on the torus: circular padding, and a shift for each sample.

Both only move numbers, and so do their adjoints, which are written here: those that autograd
would make of slices, concatenations and rolls take several passes over the features each.
"""

from typing import Any

import torch

from .contract import Grid

__all__ = ["circular_pad", "shift"]


class _Pad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: torch.Tensor, rows: Grid, columns: Grid) -> torch.Tensor:
        height, width = inputs.shape[2:]
        (top, bottom), (left, right) = rows, columns
        assert max(rows) <= height, "more than once around"
        assert max(columns) <= width, "more than once around"
        shape = (*inputs.shape[:2], top + height + bottom, left + width + right)
        padded = inputs.new_empty(shape)
        middle = padded[:, :, top : top + height]
        middle[..., left : left + width] = inputs
        middle[..., :left] = inputs[..., width - left :]
        middle[..., left + width :] = inputs[..., :right]
        padded[:, :, :top] = padded[:, :, height : height + top]
        padded[:, :, top + height :] = padded[:, :, top : top + bottom]
        return padded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, ctx.rows, ctx.columns = inputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        (top, bottom), (left, right) = ctx.rows, ctx.columns
        height, width = grad.shape[2] - top - bottom, grad.shape[3] - left - right
        # Where the parts before, within and behind come from, and where they belong.
        rows = _parts(top, bottom, height)
        columns = _parts(left, right, width)
        total = grad[:, :, top : top + height, left : left + width].clone()
        for row_from, row_to in rows:
            for column_from, column_to in columns:
                if (row_from, column_from) != (rows[0][0], columns[0][0]):
                    total[:, :, row_to, column_to] += grad[:, :, row_from, column_from]
        return total, None, None


def _parts(before: int, behind: int, size: int) -> list[tuple[slice, slice]]:
    """Places in a padded axis, the middle first, and the places that they are copies of."""
    parts = [(slice(before, before + size), slice(0, size))]
    if before:
        parts.append((slice(0, before), slice(size - before, size)))
    if behind:
        parts.append((slice(before + size, before + size + behind), slice(0, behind)))
    return parts


def circular_pad(inputs: torch.Tensor, rows: Grid, columns: Grid) -> torch.Tensor:
    """Feature maps with rows and columns of the torus beside them.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
    rows, columns : pair of int
        How many to add before and behind, not more than there are.
    """
    if (*rows, *columns) == (0, 0, 0, 0):
        return inputs
    if torch.compiler.is_exporting():  # to a graph without gradients, in which this is less
        return _joined(_joined(inputs, 2, rows), 3, columns)
    return _Pad.apply(inputs, rows, columns)


def _joined(inputs: torch.Tensor, axis: int, margins: Grid) -> torch.Tensor:
    """Feature maps with what is beyond the ends of one of their axes."""
    size, (before, behind) = inputs.shape[axis], margins
    parts = [inputs.narrow(axis, size - before, before), inputs, inputs.narrow(axis, 0, behind)]
    return torch.cat([part for part in parts if part.shape[axis]], axis)


class _Shift(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        height, width = inputs.shape[2:]
        row, column = (torch.arange(side, device=inputs.device) for side in (height, width))
        row = (row + rows[:, None]) % height  # (n, H)
        column = (column + columns[:, None]) % width  # (n, W)
        places = (row[:, :, None] * width + column[:, None]).flatten(1)  # (n, H·W)
        places = places[:, None].expand(-1, inputs.shape[1], -1)
        return inputs.flatten(2).gather(2, places).view_as(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        return shift(grads[0], -rows, -columns), None, None


def shift(inputs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Each sample rolled so that its pixel (rows[n], columns[n]) comes to lie at the origin.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
    rows, columns : integer tensor of shape (n,)
    """
    return _Shift.apply(inputs, rows, columns)
