"""Stacks of soft-equivariant layers, built from a short specification."""

import math
import os
from typing import cast

import torch
from torch import nn

from .layers import FC, PATHWAYS, Grid, Pathway, PathwaySum, SharedLinear

__all__ = ["ARCHITECTURES", "SCALES", "SoftEquivariantNetwork", "build_network"]

#: Factor of a sum of p pathways: the paper takes the mean; 1/√p keeps the variance of the sum of
#: independent pathways; "sum" keeps a pathway's own scale whatever stands beside it.
SCALES = {"mean": lambda p: 1.0 / p, "sqrt": lambda p: 1.0 / math.sqrt(p), "sum": lambda p: 1.0}


class SoftEquivariantNetwork(nn.Module):
    """Blocks of pathway sums with ReLU between them, then a dense head.

    Parameters
    ----------
    canvas : pair of int
        Height and width to which images are padded with zeros, once, at the input.
    blocks : list of PathwaySum
        Layers down to a 1×1 grid.
    head : nn.Module
        Map from the last feature maps (n, C, 1, 1) to (n, K, 1, 1).
    """

    def __init__(self, canvas: Grid, blocks: list[PathwaySum], head: nn.Module):
        super().__init__()
        self.canvas = canvas
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    @property
    def layers(self) -> dict[str, PathwaySum]:
        """The blocks by name, as they stand in the names of their tensors."""
        return {f"blocks.{i}": cast(PathwaySum, block) for i, block in enumerate(self.blocks)}

    def pad(self, images: torch.Tensor) -> torch.Tensor:
        """Centre images (n, C, H, W) on the canvas, on which shifts are cyclic."""
        rows, columns = (self.canvas[i] - images.shape[2 + i] for i in (0, 1))
        if rows == columns == 0:
            return images
        margins = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return nn.functional.pad(images, margins)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs f of shape (n, K)."""
        features = self.pad(images)
        for block in self.blocks:
            features = torch.relu(block(features))
        return self.head(features).flatten(1)  # (n, K)


def build_network(
    image_shape: tuple[int, int, int],
    n_outputs: int,
    *,
    pathways: tuple[str, ...] = ("conv", "factored_fc"),
    architecture: str = "auto",
    width: int = 8,
    scale: str = "sqrt",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> SoftEquivariantNetwork:
    """Build and start a network.

    Parameters
    ----------
    image_shape : tuple (C, H, W)
        Shape of one image.
    n_outputs : int
        K.
    pathways : tuple of str
        Names from ``layers.PATHWAYS``, summed in every block.
    architecture : {"auto", "paper"}
        "paper" is the stack of the paper for images of up to 32×32 pixels; "auto" continues its
        pattern to the canvas of any image.
    width : int
        α: the first of L blocks has α channels, the last 2^⌊L/2⌋ α (2^⌊L/4⌋ α for images of a
        single row or column).
    scale : {"mean", "sqrt", "sum"}
        Factor of the sum of the pathways.
    dtype : torch.dtype
        Of the weights.
    generator : torch.Generator, optional
        Source of the start, on the CPU; default: torch's global one.

    Returns
    -------
    SoftEquivariantNetwork

    Raises
    ------
    ValueError
        If the weights and their curvature would not fit into memory.
    """
    canvas, strides = ARCHITECTURES[architecture](image_shape)
    with torch.device("meta"):
        # Shapes only: what it would take is known before anything is allocated.
        sketch = _assemble(image_shape[0], n_outputs, pathways, canvas, strides, width, scale)
    _check_memory(sketch, dtype.itemsize)
    network = _assemble(image_shape[0], n_outputs, pathways, canvas, strides, width, scale)
    network.to(dtype)
    for module in network.modules():
        if isinstance(module, Pathway):
            module.reset(generator)
    return network


def _assemble(
    channels: int,
    n_outputs: int,
    pathways: tuple[str, ...],
    canvas: Grid,
    strides: list[Grid],
    width: int,
    scale: str,
) -> SoftEquivariantNetwork:
    factor = SCALES[scale](len(pathways))
    # A row of pixels loses half of them where an image loses three quarters: half the growth.
    n_axes = sum(side > 1 for side in canvas)
    blocks, grid = [], canvas
    for i, stride in enumerate(strides):
        out_channels = width * 2 ** ((i + 1) * n_axes // 4)  # α (1, 2, 2, 4, 4, 8, 8, 16, …)
        paths = {name: PATHWAYS[name](channels, out_channels, grid, stride) for name in pathways}
        blocks.append(PathwaySum(paths, stride, factor))
        channels, grid = out_channels, (grid[0] // stride[0], grid[1] // stride[1])
    head = nn.Sequential()
    head.add_module("hidden", FC(channels, 4 * channels, (1, 1)))
    head.add_module("relu", nn.ReLU())
    head.add_module("output", FC(4 * channels, n_outputs, (1, 1)))
    return SoftEquivariantNetwork(canvas, blocks, head)


def _paper(image_shape: tuple[int, int, int]) -> tuple[Grid, list[Grid]]:
    """Eight blocks from a 32×32 canvas to 1×1, strides 1 2 1 2 1 2 2 2."""
    _, height, width = image_shape
    if max(height, width) > 32:
        raise ValueError(
            f"architecture='paper' takes images of at most 32×32 pixels, got {height}×{width}. "
            "Use architecture='auto' for larger ones."
        )
    return (32, 32), [(s, s) for s in (1, 2, 1, 2, 1, 2, 2, 2)]


def _auto(image_shape: tuple[int, int, int]) -> tuple[Grid, list[Grid]]:
    """The paper's pattern on a canvas whose sides are the next powers of two.

    While the longer side is at least 8, a block at full resolution precedes each halving; then
    blocks halve down to 1×1. At 32×32 this is the paper's stack.
    """
    _, height, width = image_shape
    canvas = (1 << (height - 1).bit_length(), 1 << (width - 1).bit_length())
    (height, width), strides = canvas, list[Grid]()
    while max(height, width) > 1:
        if max(height, width) >= 8:
            strides.append((1, 1))
        strides.append((min(2, height), min(2, width)))
        height, width = height // strides[-1][0], width // strides[-1][1]
    return canvas, strides or [(1, 1)]


ARCHITECTURES = {"auto": _auto, "paper": _paper}


def _check_memory(network: SoftEquivariantNetwork, itemsize: int) -> None:
    """Refuse a network whose training would not fit.

    Counted are weights, gradients and Adam's two moments, the curvature factors of every map
    (twice: sums and scaled), and the eigenvalues of the largest tensor in float64.
    """
    sizes = {name: tensor.numel() for name, tensor in network.named_parameters()}
    shapes = [m.weight.shape for m in network.modules() if isinstance(m, SharedLinear)]
    factors = sum(blocks * (n_out**2 + n_in**2) for blocks, n_out, n_in in shapes)
    largest = max(sizes, key=lambda name: sizes[name])
    needed = itemsize * (4 * sum(sizes.values()) + 2 * factors) + 2 * 8 * sizes[largest]
    present = _memory()
    if needed > present:
        raise ValueError(
            f"The network has {sum(sizes.values())} weights, {sizes[largest]} of them in "
            f"{largest!r}; training it with its curvature needs about {needed} bytes, and this "
            f"machine has {present}. Use the pathway 'factored_fc' in place of 'fc', smaller "
            "images, or a smaller width."
        )


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on this platform
        return 16 * 2**30
