"""What a fitted network says about symmetry, as arrays (layer × pathway).

Everything here goes by the names of tensors, ``<layer>.<pathway>.<tensor>``.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from .curvature import Batch
from .groups import Symmetry
from .layers import PathwaySum, untrained_free_layer
from .networks import SoftEquivariantNetwork

__all__ = [
    "EquivarianceErrors",
    "dimension_shares",
    "enabled_table",
    "equivariance_errors",
    "layer_names",
    "output_shares",
    "pathway_names",
    "precision_table",
    "shares",
    "sum_table",
]


def layer_names(network: SoftEquivariantNetwork) -> list[str]:
    """Names of the layers that are sums of pathways."""
    return list(network.layers)


def pathway_names(network: SoftEquivariantNetwork) -> list[str]:
    """Names of the pathways of any layer, in the order in which they first appear."""
    return list(dict.fromkeys(n for layer in network.layers.values() for n in layer.pathways))


def sum_table(network: SoftEquivariantNetwork, values: Mapping[str, float]) -> np.ndarray:
    """Sums of a figure over the tensors of each pathway, shape (L, P); 0 where there is none."""
    table = np.zeros((len(layer_names(network)), len(pathway_names(network))))
    for i, layer in enumerate(layer_names(network)):
        for j, pathway in enumerate(pathway_names(network)):
            prefix = f"{layer}.{pathway}."
            table[i, j] = sum(v for name, v in values.items() if name.startswith(prefix))
    return table


def precision_table(network: SoftEquivariantNetwork, precisions: Mapping[str, float]) -> np.ndarray:
    """Prior precision of each pathway's weights, shape (L, P).

    It is inf where a pathway was removed, NaN where it was still held back, or the layer has none
    of that name.

    Of a product of factors it is √(δ_U δ_V): the function V U depends on the product alone, and
    the ratio of the two is a gauge.
    """
    names = pathway_names(network)
    table = np.full((len(network.layers), len(names)), np.nan)
    for i, (layer, block) in enumerate(network.layers.items()):
        for name, pathway in block.pathways.items():
            if block.removed(name):
                table[i, names.index(name)] = np.inf
            elif block.enabled[name]:
                tensors = [f"{layer}.{name}.{factor}" for factor in pathway.factor_names]
                # Eq. gauge-free precision: the geometric mean of the factors'
                mean = np.exp(np.mean([np.log(precisions[t]) for t in tensors]))
                table[i, names.index(name)] = mean
    return table


def enabled_table(network: SoftEquivariantNetwork, names: list[str] | None = None) -> np.ndarray:
    """Which pathways, of any or of these names, are there and on, bool of shape (L, P)."""
    names = pathway_names(network) if names is None else names
    layers = network.layers.values()
    return np.array([[layer.enabled.get(name, False) for name in names] for layer in layers])


def shares(table: np.ndarray, enabled: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; where a row is all zero, equal shares of what is enabled."""
    total = table.sum(1, keepdims=True)
    equal = enabled / enabled.sum(1, keepdims=True)
    return np.divide(table, total, out=equal, where=total > 0)


def dimension_shares(
    dimensions: np.ndarray, n_weights: np.ndarray, enabled: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of each layer's γ, and of its γ / number of weights."""
    per_weight = dimensions / np.maximum(n_weights, 1)
    return shares(dimensions, enabled), shares(per_weight, enabled)


@torch.no_grad()
def output_shares(network: SoftEquivariantNetwork, batches: Iterable[Batch]) -> np.ndarray:
    """Share of each pathway in the energy Σ ‖output‖² of its layer, shape (L, P).

    Parameters
    ----------
    network : SoftEquivariantNetwork
    batches : iterable of (inputs, targets, weights)
        Each row's energy counts by its weight.
    """
    names = pathway_names(network)
    energy = np.zeros((len(network.layers), len(names)))
    for inputs, _, weights in batches:
        seen = network.layer_inputs(inputs)
        for i, (layer, block) in enumerate(network.layers.items()):
            for name, output in block.outputs(seen[layer]).items():
                squares = output.flatten(1).square().sum(1).double()
                energy[i, names.index(name)] += torch.dot(squares, weights.double()).item()
    return shares(energy, enabled_table(network))


class EquivarianceErrors(NamedTuple):
    """Measured errors of equivariance: 0 is strict.

    Parameters
    ----------
    layers : ndarray of shape (L,)
        Of each layer.
    free : ndarray of shape (L,)
        Of an untrained free layer in its place: the scale at which no symmetry is left.
    logits : float
        Of the whole network.
    """

    layers: np.ndarray
    free: np.ndarray
    logits: float


@torch.no_grad()
def equivariance_errors(
    network: SoftEquivariantNetwork, batches: Iterable[torch.Tensor], group: Symmetry
) -> EquivarianceErrors:
    """How far each layer, and the whole network, is from commuting with a group.

    For each layer l on its own input h: ‖f_l(g h) − g' f_l(h)‖ / ‖f_l(h)‖, over the data in the
    Frobenius norm, where g' is for each sample the nearest of the output's elements that may
    answer to g at the layer's stride; then the mean over the g that move anything (0 if none
    does). For the network: ‖f(g x) − f(x)‖ / ‖f(x)‖ of the logits.
    """
    layers, free = ({name: _Error() for name in network.layers} for _ in range(2))
    logits = _Error()
    for images in batches:
        for name, features in network.layer_inputs(images).items():
            layer = network.layers[name]
            untrained = untrained_free_layer(features, layer(features), layer)
            _add_errors(layers[name], layer, features, group)
            _add_errors(free[name], untrained, features, group)
        canvas, outputs = network.pad(images), network(images)
        for g in group.elements(network.canvas):
            logits.add(g, network(group.act(canvas, g)), [outputs], outputs)
    layer_errors, free_errors = (
        np.array([error.mean() for error in found.values()]) for found in (layers, free)
    )
    return EquivarianceErrors(layer_errors, free_errors, logits.mean())


def _add_errors(
    error: "_Error", layer: PathwaySum, features: torch.Tensor, group: Symmetry
) -> None:
    """Count in the error of a layer on its input, for each element."""
    outputs = layer(features)
    grid = (features.shape[2], features.shape[3])
    for g in group.elements(grid, layer.in_group, layer.out_group):
        moved = layer(group.act(features, g, layer.in_group))
        answers = group.output_elements(g, layer.stride)
        error.add(g, moved, [group.act(outputs, a, layer.out_group) for a in answers], outputs)


class _Error:
    """Sums for one error of equivariance, by group element."""

    def __init__(self) -> None:
        self.squares: dict[object, float] = {}
        self.norms: dict[object, float] = {}

    def add(
        self,
        element: object,
        moved: torch.Tensor,
        candidates: list[torch.Tensor],
        outputs: torch.Tensor,
    ) -> None:
        """Count in ‖f(g h) − g' f(h)‖² of each sample at the best g', and ‖f(h)‖²."""
        distances = [(moved - c).double().flatten(1).square().sum(1) for c in candidates]
        square = torch.stack(distances).amin(0).sum().item()
        self.squares[element] = self.squares.get(element, 0.0) + square
        norm = outputs.double().square().sum().item()
        self.norms[element] = self.norms.get(element, 0.0) + norm

    def mean(self) -> float:
        """The mean over g of the relative errors; 0 where no element moves anything."""
        ratios = [
            np.sqrt(square / self.norms[g]) if self.norms[g] > 0 else 0.0
            for g, square in self.squares.items()
        ]
        return float(np.mean(ratios)) if ratios else 0.0  # Eq. equivariance error
