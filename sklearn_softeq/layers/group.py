"""Group convolutions: filters are moved by every element, and orientations are mixed.

    y[d, g, y] = Σ_{c,h,x} k[d, c, g⁻¹h, g⁻¹(x − y)] f[c, h, x]

For each g the filter is moved *and* its orientation axis permuted. An image, which has no
orientations, is lifted: y[d, g, y] = Σ_{c,x} k[d, c, g⁻¹(x − y)] f[c, x].
"""

import math
from itertools import product

import torch

from ..groups import PointGroup
from .contract import Grid, LayerSpec
from .conv import Conv

__all__ = ["GroupConv"]


class GroupConv(Conv):
    """A convolution over a point group and the translations; S = G·Y positions, D biases.

    Parameters
    ----------
    in_channels, out_channels : int
        All channels, orientations included.
    grid, stride : pair of int
        Of the input; of the subsampling.
    group : PointGroup
        G, what it commutes with.
    in_group, out_group : PointGroup, optional
        Whose orientations the channels have: G (the default), a larger group, of which each coset
        of G is a channel more, or for the input P1: an image, which is lifted.

    References
    ----------
    T. Cohen, M. Welling, "Group Equivariant Convolutional Networks", ICML 2016.
    """

    _taps: torch.Tensor
    _rows: torch.Tensor
    _patch: torch.Tensor
    _places: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: Grid,
        stride: Grid = (1, 1),
        *,
        group: PointGroup,
        in_group: PointGroup | None = None,
        out_group: PointGroup | None = None,
    ):
        out_group = out_group or group
        n_out = out_channels // group.order  # one filter for all orientations of an output
        super().__init__(in_channels, out_channels, grid, stride, n_filters=n_out)
        self.n_positions *= group.order
        self.group = group
        self.in_group = in_group or group
        self.out_group = out_group
        taps = _taps(group, self.in_group, in_channels, self.kernel)  # (G, C·G·k²)
        rows = _orientations(group, out_group, n_out)  # (D·G,)
        self._in_order = group == out_group  # then rows is the identity
        self.register_buffer("_taps", taps, persistent=False)
        self.register_buffer("_patch", taps.argsort(1), persistent=False)
        self.register_buffer("_rows", rows, persistent=False)
        self.register_buffer("_places", rows.argsort(), persistent=False)

    @classmethod
    def from_spec_of(cls, group: PointGroup, spec: LayerSpec) -> "GroupConv":
        """The convolution over a group that fits into a layer."""
        return cls(
            spec.in_channels,
            spec.out_channels,
            spec.grid,
            spec.stride,
            group=group,
            in_group=spec.in_group,
            out_group=spec.out_group,
        )

    def filters(self) -> torch.Tensor:
        # Eq. group convolution: k[d, c, g⁻¹h, g⁻¹u] for each (d, g), (c, h) and tap u
        # index_select: the backward pass of indexing with [] is several times slower.
        moved = self.weight[0].index_select(1, self._taps.flatten())  # (D, G·C·G·k²)
        moved = moved.view(-1, self._taps.shape[1])  # (D·G, C·G·k²)
        if not self._in_order:
            moved = moved.index_select(0, self._places)
        return moved.view(-1, self.in_channels, *self.kernel)

    def biases(self) -> torch.Tensor:
        return self.bias.index_select(0, self._places // self.group.order)  # (D·G,)

    def input_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        patches = self.patches(inputs).transpose(1, 2)  # (n, Y, C·G·k²)
        return patches[:, :, self._patch].transpose(1, 2).flatten(1, 2)[:, :, None]

    def input_gram(self, inputs: torch.Tensor, root_weight: torch.Tensor | None) -> torch.Tensor:
        # Permuting a patch permutes its moments: no need for G times the patches.
        gram = self.patch_gram(inputs, root_weight)
        total = torch.zeros_like(gram)
        for places in self._patch:
            total += gram[places][:, places]
        return total[None]

    def fields(self, grads: torch.Tensor) -> torch.Tensor:
        grads = grads.flatten(2)
        if not self._in_order:
            grads = grads.index_select(1, self._rows)
        return grads.unflatten(1, (-1, self.group.order)).flatten(2)  # (n, D, G·Y)


def _taps(group: PointGroup, axis: PointGroup, channels: int, kernel: Grid) -> torch.Tensor:
    """Where the filter of each g finds its weight for each input channel and tap, (G, C·G·k²)."""
    n_taps = math.prod(kernel)
    moved = {g: group.taps(g, kernel) for g in group.matrices}
    lifted = axis.order == 1
    places = torch.empty(group.order, channels, n_taps, dtype=torch.int64, device="cpu")
    if lifted:
        for i, g in enumerate(group.matrices):
            places[i] = torch.arange(channels, device="cpu")[:, None] * n_taps + moved[g]
        return places.flatten(1)
    for (j, coset), (k, h) in product(enumerate(axis.cosets(group)), enumerate(group.matrices)):
        # Channels of this coset and orientation, and the fields that the pathway sees in them.
        here = torch.arange(coset[k], channels, axis.order, device="cpu")
        fields = torch.arange(len(here), device="cpu") * (axis.order // group.order) + j
        for i, g in enumerate(group.matrices):
            row = fields * group.order + group.quotient(g, h)
            places[i, here] = row[:, None] * n_taps + moved[g]
    return places.flatten(1)


def _orientations(group: PointGroup, axis: PointGroup, n_out: int) -> torch.Tensor:
    """The output channel of each field and orientation of the pathway, (D·G,)."""
    cosets = torch.tensor(axis.cosets(group), device="cpu")  # (cosets, G)
    starts = torch.arange(n_out // len(cosets), device="cpu") * axis.order
    return (starts[:, None, None] + cosets).flatten()
