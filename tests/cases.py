"""Cases as data: single layers, and networks on which KFAC is exact or an approximation."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from sklearn_softeq.groups import P1, P4, P4M, PM, PointGroup
from sklearn_softeq.layers import (
    FC,
    PATHWAYS,
    Conv,
    FactoredFC,
    GroupConv,
    LayerSpec,
    Pathway,
    PathwayKind,
    PathwaySum,
    PooledFC,
    SparseConv,
    SparseFC,
)
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.networks import build_network


def randomise(module: nn.Module) -> nn.Module:
    """Draw every parameter, biases included, so that no term of a map is hidden by a zero.

    Biases are positive: a narrow stack whose ReLUs are all off would test nothing.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


# Half turns: a group that the package does not have, which shows what a further one takes.
P2 = PointGroup.generated("p2", ((-1, 0), (0, -1)))

KINDS = {**PATHWAYS, "p2_conv": PathwayKind(partial(GroupConv.from_spec_of, P2), P2)}


@dataclass(frozen=True)
class LayerCase:
    """One pathway: its name in KINDS, (C, D), the input grid and the stride.

    The channels are counted without the orientations that they have in a group network.
    """

    kind: str
    channels: tuple[int, int]
    grid: tuple[int, int]
    stride: tuple[int, int]
    in_group: PointGroup = P1
    out_group: PointGroup = P1
    alone: bool = True
    anchor_fraction: float | None = None

    def __str__(self):
        (c, d), (h, w), (s, t) = self.channels, self.grid, self.stride
        groups = f"-{self.in_group.name}to{self.out_group.name}" * (self.out_group != P1)
        sparse = "" if self.anchor_fraction is None else f"-anchors{self.anchor_fraction}"
        sparse += "" if self.alone else "-summed"
        return f"{self.kind}-{c}to{d}-{h}x{w}-stride{s}{t}{groups}{sparse}"

    @property
    def n_channels(self) -> tuple[int, int]:
        """All channels, orientations included."""
        return self.channels[0] * self.in_group.order, self.channels[1] * self.out_group.order

    @property
    def output_grid(self) -> tuple[int, int]:
        return self.grid[0] // self.stride[0], self.grid[1] // self.stride[1]

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec(
            *self.n_channels,
            self.grid,
            self.stride,
            self.in_group,
            self.out_group,
            self.alone,
            self.anchor_fraction,
        )

    def pathway(self, dtype: torch.dtype = torch.float64) -> Pathway:
        return randomise(KINDS[self.kind].build(self.spec)).to(dtype)

    def inputs(self, n: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(n, self.n_channels[0], *self.grid, dtype=dtype)


# (C, D), (H, W), stride: square, non-square, sides of 1 and 2, each stride.
GEOMETRIES = [
    ((2, 3), (4, 6), (1, 1)),
    ((2, 3), (4, 6), (2, 2)),
    ((3, 2), (4, 4), (1, 2)),
    ((2, 2), (6, 4), (2, 1)),
    ((1, 2), (2, 2), (2, 2)),
    ((2, 3), (2, 2), (1, 1)),
    ((2, 2), (2, 4), (1, 1)),
    ((2, 3), (1, 4), (1, 2)),
    ((2, 1), (4, 1), (2, 1)),
    ((2, 3), (1, 2), (1, 1)),
    ((2, 3), (1, 1), (1, 1)),
]
# Where rows and columns may be exchanged.
SQUARES = [
    ((2, 1), (3, 3), (1, 1)),
    ((1, 2), (4, 4), (2, 2)),
    ((2, 1), (4, 4), (1, 2)),
    ((1, 2), (2, 2), (2, 2)),
    ((2, 2), (1, 1), (1, 1)),
]


def _layer_cases() -> list[LayerCase]:
    cases = []
    for name, kind in KINDS.items():
        group = kind.group or P1
        geometries = SQUARES if group.needs_square else GEOMETRIES
        cases += [LayerCase(name, *geometry, group, group) for geometry in geometries]
        if group != P1:  # an image is lifted
            cases += [LayerCase(name, *geometry, P1, group) for geometry in geometries[:4]]
    return cases


# A pathway of a group network that has less symmetry than the network, at its start and later.
EMBEDDED = [
    LayerCase(kind, (1, 1), grid, stride, in_group, group)
    for kind, group in (("p4_conv", P4M), ("pm_conv", P4M), ("conv", P4), ("sparse_fc", PM))
    for in_group, grid, stride in ((P1, (4, 4), (1, 1)), (group, (4, 4), (2, 2)))
]
# As many anchors as in a sum, and as asked for.
ANCHORED = [
    LayerCase("sparse_conv", (2, 3), (4, 6), (2, 2), alone=False),
    LayerCase("sparse_conv", (2, 3), (4, 4), (1, 1), anchor_fraction=1.0),
    LayerCase("sparse_fc", (2, 3), (4, 4), (2, 2), anchor_fraction=1.0),
    LayerCase("sparse_fc", (2, 3), (2, 4), (1, 1), anchor_fraction=0.01),
]
LAYERS = _layer_cases() + EMBEDDED + ANCHORED


@dataclass(frozen=True)
class NetworkCase:
    """A network with float64 weights and a likelihood, and the number of rows to see."""

    name: str
    build: Callable[[], nn.Module]
    likelihood: Categorical | Gaussian
    shape: tuple[int, int, int]
    n: int = 4

    def __str__(self):
        return self.name

    def network(self) -> nn.Module:
        return randomise(self.build()).double()

    def inputs(self, n: int | None = None) -> torch.Tensor:
        return torch.randn(n or self.n, *self.shape, dtype=torch.float64)

    def targets(self, outputs: torch.Tensor) -> torch.Tensor:
        if isinstance(self.likelihood, Gaussian):
            return torch.randn_like(outputs)
        return torch.randint(outputs.shape[1], (len(outputs),))

    def batch(self, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and weights; the weights are no integers."""
        inputs = self.inputs()
        weights = 0.25 + 2 * torch.rand(len(inputs), dtype=torch.float64)
        return inputs, self.targets(network(inputs).detach()), weights


def chain(*layers: nn.Module) -> nn.Sequential:
    """Layers named ``layer0``, ``layer1``, … and a flat output."""
    named = [(f"layer{i}", layer) for i, layer in enumerate(layers)]
    return nn.Sequential(OrderedDict([*named, ("flat", nn.Flatten())]))


def _sum(stride, **pathways):
    return PathwaySum(pathways, stride, 0.7)


def _stack(shape, n_outputs, *pathways, width=1, architecture="auto"):
    return lambda: build_network(
        shape, n_outputs, pathways=pathways, width=width, architecture=architecture
    )


# Each block A ⊗ Γ / N equals the block of the GGN where the gradient factors do not depend on the
# row (linear network, Gaussian noise) or there is one row only, and no position is shared or the
# outputs of different positions do not meet. Anchors change nothing: their pixels are projected,
# their gradients gathered, by the same Ψ for each row. The orientations of a group convolution are
# positions, which a layer after it would let meet.
EXACT = [
    NetworkCase(
        "one-fc-gaussian", lambda: chain(FC(2, 2, (2, 4), (1, 2))), Gaussian(0.3), (2, 2, 4)
    ),
    NetworkCase(
        "one-conv-gaussian", lambda: chain(Conv(2, 3, (4, 6), (2, 2))), Gaussian(2.0), (2, 4, 6)
    ),
    NetworkCase(
        "one-factored-gaussian", lambda: chain(FactoredFC(2, 3, (2, 3))), Gaussian(0.5), (2, 2, 3)
    ),
    NetworkCase(
        "deep-linear-gaussian",
        lambda: chain(FC(2, 2, (2, 2)), FactoredFC(2, 3, (2, 2), (2, 2)), FC(3, 2, (1, 1))),
        Gaussian(0.4),
        (2, 2, 2),
    ),
    NetworkCase(
        "one-row-fc-relu-categorical",
        lambda: chain(FC(2, 3, (2, 2), (2, 2)), nn.ReLU(), FC(3, 4, (1, 1))),
        Categorical(),
        (2, 2, 2),
        n=1,
    ),
    NetworkCase(
        "one-row-sum-categorical",
        lambda: chain(
            _sum(
                (2, 2),
                conv=Conv(1, 3, (2, 2), (2, 2)),
                fc=FC(1, 3, (2, 2), (2, 2)),
                factored_fc=FactoredFC(1, 3, (2, 2), (2, 2)),
            ),
            nn.ReLU(),
            FC(3, 4, (1, 1)),
        ),
        Categorical(),
        (1, 2, 2),
        n=1,
    ),
    NetworkCase(
        "one-sparse-gaussian", lambda: chain(SparseFC(2, 3, (2, 3))), Gaussian(0.5), (2, 2, 3)
    ),
    NetworkCase(
        "one-sparse-conv-gaussian",
        lambda: chain(SparseConv(2, 3, (4, 6), (2, 2))),
        Gaussian(2.0),
        (2, 4, 6),
    ),
    NetworkCase(
        "one-p4-gaussian",
        lambda: chain(GroupConv(4, 8, (4, 4), (2, 2), group=P4)),
        Gaussian(2.0),
        (4, 4, 4),
        n=3,
    ),
    NetworkCase(
        "one-pm-gaussian",
        lambda: chain(GroupConv(2, 4, (2, 3), group=PM)),
        Gaussian(2.0),
        (2, 2, 3),
    ),
    NetworkCase("one-pooled-gaussian", lambda: chain(PooledFC(8, 3, P4)), Gaussian(0.5), (8, 1, 1)),
    NetworkCase(
        "one-row-sparse-sum-categorical",
        lambda: chain(
            _sum(
                (2, 2),
                sparse_conv=SparseConv(1, 3, (2, 2), (2, 2)),
                sparse_fc=SparseFC(1, 3, (2, 2), (2, 2)),
            ),
            nn.ReLU(),
            FC(3, 4, (1, 1)),
        ),
        Categorical(),
        (1, 2, 2),
        n=1,
    ),
]

ALL_PATHWAYS = ("conv", "factored_fc", "fc")
APPROXIMATE = [
    NetworkCase("conv", _stack((2, 4, 4), 3, "conv", width=2), Categorical(), (2, 4, 4)),
    NetworkCase("fc", _stack((1, 2, 4), 3, "fc", width=3), Categorical(), (1, 2, 4)),
    NetworkCase(
        "factored-fc", _stack((2, 4, 4), 3, "factored_fc", width=2), Categorical(), (2, 4, 4)
    ),
    NetworkCase("all", _stack((3, 2, 4), 3, *ALL_PATHWAYS, width=2), Categorical(), (3, 2, 4)),
    NetworkCase(
        "all-padded", _stack((1, 3, 3), 2, *ALL_PATHWAYS, width=2), Categorical(), (1, 3, 3)
    ),
    NetworkCase(
        "all-gaussian", _stack((1, 4, 2), 2, *ALL_PATHWAYS, width=2), Gaussian(0.6), (1, 4, 2)
    ),
    NetworkCase(
        "full-resolution", _stack((1, 8, 8), 2, "conv", width=2), Categorical(), (1, 8, 8), n=2
    ),
    NetworkCase(
        "sparse",
        _stack((2, 4, 4), 3, "sparse_conv", "sparse_fc", width=2),
        Categorical(),
        (2, 4, 4),
    ),
    NetworkCase("strict-p4m", _stack((1, 2, 2), 3, "p4m_conv"), Categorical(), (1, 2, 2)),
    NetworkCase(
        "group-readout",
        _stack((1, 4, 4), 3, "p4_conv", "conv", "factored_fc"),
        Categorical(),
        (1, 4, 4),
        n=3,
    ),
    NetworkCase(
        "two-groups", _stack((1, 2, 2), 2, "p4_conv", "pm_conv"), Gaussian(0.6), (1, 2, 2), n=3
    ),
    NetworkCase(
        "resnet",
        _stack((3, 4, 4), 3, "conv", "factored_fc", architecture="resnet"),
        Categorical(),
        (3, 4, 4),
        n=3,
    ),
    NetworkCase(
        "group-resnet",
        _stack((1, 2, 4), 2, "pm_conv", "sparse_fc", architecture="resnet"),
        Categorical(),
        (1, 2, 4),
        n=3,
    ),
]
