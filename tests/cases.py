"""Cases as data: single layers, and networks on which KFAC is exact or an approximation."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sklearn_softeq.layers import FC, PATHWAYS, Conv, FactoredFC, Pathway, PathwaySum
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


@dataclass(frozen=True)
class LayerCase:
    """One pathway: its name in PATHWAYS, (C, D), the input grid and the stride."""

    kind: str
    channels: tuple[int, int]
    grid: tuple[int, int]
    stride: tuple[int, int]

    def __str__(self):
        (c, d), (h, w), (s, t) = self.channels, self.grid, self.stride
        return f"{self.kind}-{c}to{d}-{h}x{w}-stride{s}{t}"

    @property
    def output_grid(self) -> tuple[int, int]:
        return self.grid[0] // self.stride[0], self.grid[1] // self.stride[1]

    def pathway(self, dtype: torch.dtype = torch.float64) -> Pathway:
        return randomise(PATHWAYS[self.kind](*self.channels, self.grid, self.stride)).to(dtype)

    def inputs(self, n: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(n, self.channels[0], *self.grid, dtype=dtype)


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
LAYERS = [LayerCase(kind, *geometry) for kind in PATHWAYS for geometry in GEOMETRIES]


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


def _stack(shape, n_outputs, *pathways, width=1):
    return lambda: build_network(shape, n_outputs, pathways=pathways, width=width)


# Each block A ⊗ Γ / N equals the block of the GGN where the gradient factors do not depend on the
# row (linear network, Gaussian noise) or there is one row only, and no position is shared or the
# outputs of different positions do not meet.
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
]
