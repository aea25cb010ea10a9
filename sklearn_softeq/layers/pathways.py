"""The table of pathways, and their sums.

A further pathway is a class and a row of :data:`PATHWAYS`; the convolution of a further group
comes with the group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..groups import P1, POINT_GROUPS, PointGroup
from .contract import Grid, LayerSpec, Pathway, rounding
from .conv import Conv, sum_of_convolutions
from .factored import FactoredFC
from .fc import FC
from .group import GroupConv
from .sparse import SparseConv, SparseFC
from .torus import shift

__all__ = [
    "PATHWAYS",
    "PathwayKind",
    "PathwaySum",
    "keep_largest_grid",
    "less_symmetric",
    "untrained_free_layer",
]


@dataclass(frozen=True)
class PathwayKind:
    """One of the pathways that a layer can have.

    Parameters
    ----------
    build : callable
        Makes it from a LayerSpec.
    group : PointGroup or None
        The symmetry that it will have.
    """

    build: Callable[[LayerSpec], Pathway]
    group: PointGroup | None


PATHWAYS: dict[str, PathwayKind] = {
    "conv": PathwayKind(Conv.from_spec, P1),
    "sparse_conv": PathwayKind(SparseConv.from_spec, P1),
    "fc": PathwayKind(FC.from_spec, None),
    "factored_fc": PathwayKind(FactoredFC.from_spec, None),
    "sparse_fc": PathwayKind(SparseFC.from_spec, None),
    **{
        f"{name}_conv": PathwayKind(partial(GroupConv.from_spec_of, group), group)
        for name, group in POINT_GROUPS.items()
    },
}


def less_symmetric(groups: Mapping[str, PointGroup | None]) -> list[str]:
    """Names of those whose group is a proper subgroup of another one's; None is below all."""
    return [
        name
        for name, group in groups.items()
        if any(
            other is not None and other != group and other.contains(group)
            for other in groups.values()
        )
    ]


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
    in_group, out_group : PointGroup, default=P1
        Whose orientations the channels of the input and of the output have.

    Attributes
    ----------
    enabled : dict of str to bool
        A pathway that is switched off is not computed; it counts as zero.
    """

    def __init__(
        self,
        pathways: dict[str, Pathway],
        stride: Grid,
        scale: float,
        in_group: PointGroup = P1,
        out_group: PointGroup = P1,
    ):
        super().__init__()
        self.stride = stride
        self.scale = scale
        self.in_group = in_group
        self.out_group = out_group
        self.enabled = dict.fromkeys(pathways, True)
        for name, pathway in pathways.items():
            self.add_module(name, pathway)

    @property
    def pathways(self) -> dict[str, Pathway]:
        """The pathways by name."""
        return {name: cast(Pathway, self.get_submodule(name)) for name in self.enabled}

    @property
    def less_symmetric(self) -> list[str]:
        """Names of the pathways beside which another one keeps more symmetry."""
        return less_symmetric({name: path.group for name, path in self.pathways.items()})

    def get_extra_state(self) -> dict[str, Any]:
        """What is switched off, and the factor, travel with the weights."""
        return {"enabled": dict(self.enabled), "scale": self.scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what is switched off, and the factor."""
        self.enabled, self.scale = dict(state["enabled"]), state["scale"]

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Switch a pathway off for good: its weights become exactly zero."""
        self.enabled[name] = False
        for parameter in self.pathways[name].parameters():
            parameter.zero_()

    def discard(self, name: str) -> None:
        """Take a pathway out of the sum; another one has to be left."""
        assert any(on for other, on in self.enabled.items() if other != name)
        delattr(self, name)
        del self.enabled[name]

    def removed(self, name: str) -> bool:
        """Whether a pathway was removed, as against held back until later."""
        return not self.enabled[name] and not any(p.any() for p in self.pathways[name].parameters())

    def outputs(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scaled output of each pathway that is switched on."""
        rolled = self._rolled(inputs)
        return {
            name: path(inputs if path.group is None else rolled) * self.scale
            for name, path in self._on.items()
        }

    @property
    def _on(self) -> dict[str, Pathway]:
        return {name: path for name, path in self.pathways.items() if self.enabled[name]}

    def _rolled(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the equivariant pathways see."""
        if self.stride == (1, 1) or all(path.group is None for path in self._on.values()):
            return inputs
        return keep_largest_grid(inputs, self.stride)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert any(self.enabled.values()), "a layer needs a pathway"
        rolled, paths = self._rolled(inputs), list(self._on.values())
        # A convolution that somebody watches is called by itself.
        convs = [path for path in paths if isinstance(path, Conv) and not _watched(path)]
        convs = convs if len(convs) > 1 else []
        found = [sum_of_convolutions(convs, rolled)] if convs else []
        for path in paths:
            if path not in convs:
                found.append(path(inputs if path.group is None else rolled))
        first, *others = found
        total = sum(others, start=first)
        return total if self.scale == 1.0 else total * self.scale  # spares a pass over the features


def _watched(module: nn.Module) -> bool:
    """Whether a hook would see a call of this module; torch asks itself the same."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def keep_largest_grid(inputs: torch.Tensor, stride: Grid) -> torch.Tensor:
    """Roll each sample so that its polyphase grid of largest norm comes to lie at the origin.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
        H and W are multiples of the stride.
    stride : pair of int
        Sides of the cell of grids, 1 or 2 each. Ties, but for rounding, go to the first grid in
        row-major order: in a strict network an image with a symmetry of its own has equal grids,
        and which of them is kept must not depend on a last bit.
    """
    n, _, height, width = inputs.shape
    rows, columns = stride
    wide = torch.promote_types(inputs.dtype, torch.float32)
    cells = inputs.detach().to(wide).square().sum(1)  # (n, H, W)
    cells = cells.view(n, height // rows, rows, width // columns, columns)
    norms = cells.sum((1, 3)).flatten(1)  # Eq. polyphase choice, (n, rows · columns)
    nearly = norms.amax(1, keepdim=True) * (1 - 32 * rounding(wide))
    best = (norms >= nearly).byte().argmax(1)
    return shift(inputs, best // columns, best % columns)


def untrained_free_layer(
    inputs: torch.Tensor, outputs: torch.Tensor, like: PathwaySum
) -> PathwaySum:
    """A layer of one free pathway, at a fixed random start, that fits where another one stands."""
    spec = LayerSpec(
        inputs.shape[1], outputs.shape[1], (inputs.shape[2], inputs.shape[3]), like.stride
    )
    free = FactoredFC.from_spec(spec).to(inputs)
    free.reset(torch.Generator().manual_seed(0))
    return PathwaySum({"free": free}, like.stride, 1.0, like.in_group, like.out_group)
