"""Stacks of soft-equivariant layers, built from a short specification."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .anchors import Interpolation
from .groups import P1, PointGroup, join
from .kronecker import LARGEST_INVERTED
from .layers import (
    FC,
    PATHWAYS,
    Grid,
    LayerSpec,
    Pathway,
    PathwaySum,
    PooledFC,
    SharedLinear,
    keep_largest_grid,
    less_symmetric,
    strided,
)

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "SCALES",
    "ResidualBlock",
    "SiLU",
    "SoftEquivariantNetwork",
    "build_network",
]

Groups = Mapping[str, PointGroup | None]

#: Factor of a sum of p pathways, given their groups: the paper takes the mean; 1/√p keeps the
#: variance of a sum of independent pathways; "symmetric" keeps that of the most symmetric ones
#: alone, for a start at which the others are zero.
SCALES: dict[str, Callable[[Groups], float]] = {
    "mean": lambda groups: 1.0 / len(groups),
    "sqrt": lambda groups: 1.0 / math.sqrt(len(groups)),
    "symmetric": lambda groups: 1.0 / math.sqrt(len(groups) - len(less_symmetric(groups))),
}


class SiLU(nn.Module):
    """√2 x / (1 + exp(−x)).

    Small signals x become x/√2, which has the energy that a ReLU leaves of them. Without the factor
    they shrink from layer to layer where few data and a strong prior keep the weights small.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(inputs) * math.sqrt(2.0)


#: What stands between layers, acting on each number by itself and so equivariant to everything.
#: Layers of few rectified channels can die in the first steps of training, when all gradients of a
#: filter point the same way; with a SiLU they cannot (docs/design/sums_log.md).
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": SiLU, "relu": nn.ReLU}


class ResidualBlock(nn.Module):
    """Two layers with an identity beside them: skip(x) + second(φ(first(x))).

    Nothing stands between a block and the next: the sum of all branches is never rectified. The
    identity has no weights. Where the first layer is strided it takes the same kept grid;
    channels that are more are zero, those that are fewer are cut, and an image is lifted.

    Parameters
    ----------
    first, second : PathwaySum
        The layers, the first one perhaps strided.
    activation : nn.Module
        φ.
    out_channels : int
        D, orientations included.
    """

    def __init__(
        self, first: PathwaySum, second: PathwaySum, activation: nn.Module, out_channels: int
    ):
        super().__init__()
        self.first = first
        self.second = second
        self.activation = activation
        self.out_channels = out_channels

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._skip(inputs) + self.second(self.activation(self.first(inputs)))

    def _skip(self, inputs: torch.Tensor) -> torch.Tensor:
        rows, columns = self.first.stride
        if (rows, columns) != (1, 1):
            inputs = keep_largest_grid(inputs, self.first.stride)[:, :, ::rows, ::columns]
        inputs = inputs.repeat_interleave(
            self.first.out_group.order // self.first.in_group.order, 1
        )[:, : self.out_channels]
        missing = self.out_channels - inputs.shape[1]
        return nn.functional.pad(inputs, (0, 0, 0, 0, 0, missing)) if missing else inputs


class SoftEquivariantNetwork(nn.Module):
    """Blocks with an activation after each that is not residual, then a dense head.

    Parameters
    ----------
    canvas : pair of int
        Height and width to which images are padded with zeros, once, at the input.
    blocks : list of PathwaySum or ResidualBlock
        Layers down to a 1×1 grid.
    activation : nn.Module
        Between them.
    head : nn.Module
        Map from the last feature maps (n, C, 1, 1) to (n, K, 1, 1).
    """

    def __init__(
        self, canvas: Grid, blocks: list[nn.Module], activation: nn.Module, head: nn.Module
    ):
        super().__init__()
        self.canvas = canvas
        self.blocks = nn.ModuleList(blocks)
        self.activation = activation
        self.head = head

    @property
    def layers(self) -> dict[str, PathwaySum]:
        """The sums of pathways by name, as they stand in the names of their tensors."""
        return {name: m for name, m in self.named_modules() if isinstance(m, PathwaySum)}

    @property
    def interpolations(self) -> dict[str, Interpolation]:
        """The interpolations between anchors and pixels, by the name of the map that has one."""
        found = {name: m for name, m in self.named_modules() if isinstance(m, SharedLinear)}
        return {name: m.interpolation for name, m in found.items() if m.interpolation is not None}

    @torch.no_grad()
    def layer_inputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each of ``layers`` sees, by its name."""
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str):
            return lambda layer, args: seen.update({name: args[0]})

        hooks = [m.register_forward_pre_hook(keep(name)) for name, m in self.layers.items()]
        try:
            self(images)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @torch.no_grad()
    def scale_outputs(self, factor: float) -> None:
        """Multiply all outputs f by a number, in the weights of the last map."""
        for tensor in self.head.get_submodule("output").parameters():
            tensor.mul_(factor)

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
            features = block(features)
            if not isinstance(block, ResidualBlock):
                features = self.activation(features)
        return self.head(features).flatten(1)  # (n, K)


def build_network(
    image_shape: tuple[int, int, int],
    n_outputs: int,
    *,
    pathways: tuple[str, ...] = ("conv", "factored_fc"),
    architecture: str = "auto",
    width: int = 8,
    scale: str = "sqrt",
    activation: str = "silu",
    anchor_fraction: float | str = "auto",
    dtype: torch.dtype = torch.float32,
    to_train: bool = True,
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
    architecture : {"auto", "paper", "resnet"}
        "paper" is the stack of the paper for images of up to 32×32 pixels; "auto" continues its
        pattern to the canvas of any image; "resnet" has a residual block of two layers in place
        of each of its layers.
    width : int
        α: the first of L blocks has α channels, the last 2^⌊L/2⌋ α (2^⌊L/4⌋ α for images of a
        single row or column); with the convolution of a group of G elements among the pathways,
        G orientations of each.
    scale : {"mean", "sqrt", "symmetric"}
        Factor of the sum of the pathways, see :data:`SCALES`.
    activation : {"silu", "relu"}
        Between layers, see :data:`ACTIVATIONS`.
    anchor_fraction : float or "auto"
        Anchors of the sparse pathways for each pixel or tap; "auto": the pathways' own (half of
        them, and 7 of 9 for the filters of a sparse convolution that stands alone).
    dtype : torch.dtype
        Of the weights.
    to_train : bool, default=True
        Refuse a network whose training would not fit into memory, and draw its start. False: its
        weights are still to come.
    generator : torch.Generator, optional
        Source of the start, on the CPU; default: torch's global one.

    Returns
    -------
    SoftEquivariantNetwork

    Raises
    ------
    ValueError
        If it is to be trained, and weights and curvature would not fit into memory.
    """
    groups = [PATHWAYS[name].group for name in pathways]
    group = join(group for group in groups if group is not None)
    channels, height, columns = image_shape
    if group.needs_square:
        height = columns = max(height, columns)
    canvas, strides, residual = ARCHITECTURES[architecture](height, columns)
    plan = _Plan(
        pathways,
        group,
        canvas,
        strides,
        residual,
        width,
        SCALES[scale],
        ACTIVATIONS[activation],
        None if anchor_fraction == "auto" else float(anchor_fraction),
    )
    if to_train:
        with torch.device("meta"):
            # Shapes only: what it would take is known before anything is allocated.
            sketch = plan.network(channels, n_outputs)
        _check_memory(sketch, dtype.itemsize)
    network = plan.network(channels, n_outputs).to(dtype)
    if to_train:
        for module in network.modules():
            if isinstance(module, Pathway):
                module.reset(generator)
    return network


@dataclass(frozen=True)
class _Plan:
    """How a network is put together."""

    pathways: tuple[str, ...]
    group: PointGroup
    canvas: Grid
    strides: list[Grid]
    residual: bool
    width: int
    scale: Callable[[Groups], float]
    activation: type[nn.Module]
    anchor_fraction: float | None

    def network(self, channels: int, n_outputs: int) -> SoftEquivariantNetwork:
        # A row of pixels loses half of them where an image loses three quarters: half the growth.
        n_axes = sum(side > 1 for side in self.canvas)
        blocks, grid, axis = list[nn.Module](), self.canvas, P1
        for i, stride in enumerate(self.strides):
            # α (1, 2, 2, 4, 4, 8, 8, 16, …), for each orientation
            out_channels = self.width * 2 ** ((i + 1) * n_axes // 4) * self.group.order
            spec = LayerSpec(
                channels,
                out_channels,
                grid,
                stride,
                axis,
                self.group,
                len(self.pathways) == 1,
                self.anchor_fraction,
            )
            blocks.append(self.block(spec))
            channels, grid, axis = out_channels, strided(grid, stride), self.group
        head = self.head(channels, n_outputs)
        return SoftEquivariantNetwork(self.canvas, blocks, self.activation(), head)

    def block(self, spec: LayerSpec) -> nn.Module:
        if not self.residual:
            return self.layer(spec)
        after = replace(
            spec,
            in_channels=spec.out_channels,
            in_group=spec.out_group,
            grid=strided(spec.grid, spec.stride),
            stride=(1, 1),
        )
        # L branches of size 1/√L add up to a bounded signal at any depth, with no normalisation.
        # The start of a layer doubles the energy, to make good what an activation takes; a branch
        # has two layers and one activation.
        branch = 1.0 / math.sqrt(2 * len(self.strides))
        first, second = self.layer(spec), self.layer(after, branch)
        return ResidualBlock(first, second, self.activation(), spec.out_channels)

    def layer(self, spec: LayerSpec, factor: float = 1.0) -> PathwaySum:
        paths = {name: PATHWAYS[name].build(spec) for name in self.pathways}
        return self.sum_of(paths, spec, factor)

    def sum_of(self, paths: dict[str, Pathway], spec: LayerSpec, factor: float = 1.0) -> PathwaySum:
        factor *= self.scale({name: path.group for name, path in paths.items()})
        return PathwaySum(paths, spec.stride, factor, spec.in_group, spec.out_group)

    def head(self, channels: int, n_outputs: int) -> nn.Sequential:
        hidden = 4 * channels // self.group.order
        head = nn.Sequential()
        head.add_module("hidden", self.readout(channels, hidden))
        head.add_module("activation", self.activation())
        head.add_module("output", FC(hidden, n_outputs, (1, 1)))
        return head

    def readout(self, channels: int, n_hidden: int) -> nn.Module:
        """What reads the last features: pooled over orientations, and free where layers are."""
        if self.group.order == 1:
            return FC(channels, n_hidden, (1, 1))
        pooled = PooledFC(channels, n_hidden, self.group)
        if all(PATHWAYS[name].group == self.group for name in self.pathways):
            return pooled
        paths: dict[str, Pathway] = {"pooled": pooled, "free": FC(channels, n_hidden, (1, 1))}
        return self.sum_of(paths, LayerSpec(channels, n_hidden, (1, 1), in_group=self.group))


Stack = tuple[Grid, list[Grid], bool]


def _paper(height: int, width: int) -> Stack:
    """Eight blocks from a 32×32 canvas to 1×1, strides 1 2 1 2 1 2 2 2."""
    if max(height, width) > 32:
        raise ValueError(
            f"architecture='paper' takes images of at most 32×32 pixels, got {height}×{width}. "
            "Use architecture='auto' for larger ones."
        )
    return (32, 32), [(s, s) for s in (1, 2, 1, 2, 1, 2, 2, 2)], False


def _auto(height: int, width: int) -> Stack:
    """The paper's pattern on a canvas whose sides are the next powers of two.

    While the longer side is at least 8, a block at full resolution precedes each halving; then
    blocks halve down to 1×1. At 32×32 this is the paper's stack.
    """
    canvas = (1 << (height - 1).bit_length(), 1 << (width - 1).bit_length())
    (height, width), strides = canvas, list[Grid]()
    while max(height, width) > 1:
        if max(height, width) >= 8:
            strides.append((1, 1))
        strides.append((min(2, height), min(2, width)))
        height, width = height // strides[-1][0], width // strides[-1][1]
    return canvas, strides or [(1, 1)], False


def _resnet(height: int, width: int) -> Stack:
    """A residual block of two layers in place of each layer of "auto".

    At 32×32 eight blocks and the head make 18 layers. The identity subsamples and pads channels
    with zeros (He et al. 2016, option A), and the second layer of a block is divided by the root
    of the number of blocks (Hayou et al., "Stable ResNet", 2021).
    """
    canvas, strides, _ = _auto(height, width)
    return canvas, strides, True


ARCHITECTURES: dict[str, Callable[[int, int], Stack]] = {
    "auto": _auto,
    "paper": _paper,
    "resnet": _resnet,
}


def _check_memory(network: SoftEquivariantNetwork, itemsize: int) -> None:
    """Refuse a network whose training would not fit.

    Counted are weights, gradients and Adam's two moments, the curvature factors of every map
    (twice: sums and scaled), those that K-FAC keeps with their inverses, the eigenvalues of the
    largest tensor in float64, and the interpolations with what it takes to solve for them.
    """
    sizes = {name: tensor.numel() for name, tensor in network.named_parameters()}
    shapes = [m.weight.shape for m in network.modules() if isinstance(m, SharedLinear)]
    sides = [(blocks, size) for blocks, *both in shapes for size in both]
    factors = sum(blocks * size**2 for blocks, size in sides)
    kept = sum(blocks * size**2 for blocks, size in sides if size <= LARGEST_INVERTED)
    largest = max(sizes, key=lambda name: sizes[name])
    needed = itemsize * (4 * sum(sizes.values()) + 2 * (factors + kept))
    needed += 2 * 8 * sizes[largest]
    anchors = [i.matrix.shape for i in network.interpolations.values()]
    needed += sum(itemsize * m * x for m, x in anchors)
    needed += max((4 * 8 * m * (m + x) for m, x in anchors), default=0)
    present = _memory()
    if needed > present:
        raise ValueError(
            f"The network has {sum(sizes.values())} weights, {sizes[largest]} of them in "
            f"{largest!r}; training it with its curvature needs about {needed} bytes, and this "
            f"machine has {present}. Images are padded to {network.canvas[0]}×"
            f"{network.canvas[1]} (to a square where a group has quarter turns). Use the pathway "
            "'factored_fc' in place of 'fc', a smaller group, smaller images, or a smaller width."
        )


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on this platform
        return 16 * 2**30
