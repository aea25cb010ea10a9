"""What a fitted network says about symmetry, as arrays (layer × pathway).

Everything here goes by the names of tensors, ``blocks.<layer>.<pathway>.<tensor>``.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from .curvature import Batch
from .groups import Translation
from .networks import SoftEquivariantNetwork

__all__ = [
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
    """Names of the blocks."""
    return list(network.layers)


def pathway_names(network: SoftEquivariantNetwork) -> list[str]:
    """Names of the pathways, the same in every block."""
    return list(next(iter(network.layers.values())).pathways)


def sum_table(network: SoftEquivariantNetwork, values: Mapping[str, float]) -> np.ndarray:
    """Sums of a figure over the tensors of each pathway, shape (L, P)."""
    table = np.zeros((len(network.blocks), len(pathway_names(network))))
    for i, layer in enumerate(layer_names(network)):
        for j, pathway in enumerate(pathway_names(network)):
            prefix = f"{layer}.{pathway}."
            table[i, j] = sum(v for name, v in values.items() if name.startswith(prefix))
    return table


def precision_table(network: SoftEquivariantNetwork, precisions: Mapping[str, float]) -> np.ndarray:
    """Prior precision of each pathway's weights, shape (L, P).

    It is inf where a pathway was removed, NaN where it was still held back.

    Of a product of factors it is √(δ_U δ_V): the function V U depends on the product alone, and
    the ratio of the two is a gauge.
    """
    table = np.full((len(network.blocks), len(pathway_names(network))), np.nan)
    for i, (layer, block) in enumerate(network.layers.items()):
        for j, (name, pathway) in enumerate(block.pathways.items()):
            if block.removed(name):
                table[i, j] = np.inf
            elif block.enabled[name]:
                tensors = [f"{layer}.{name}.{factor}" for factor in pathway.factor_names]
                # Eq. gauge-free precision: the geometric mean of the factors'
                table[i, j] = np.exp(np.mean([np.log(precisions[t]) for t in tensors]))
    return table


def enabled_table(network: SoftEquivariantNetwork) -> np.ndarray:
    """Which pathways are on, bool of shape (L, P)."""
    return np.array([list(block.enabled.values()) for block in network.layers.values()])


def shares(table: np.ndarray, enabled: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; where a row is all zero, equal shares of what is enabled."""
    total = table.sum(1, keepdims=True)
    equal = enabled / enabled.sum(1, keepdims=True)
    return np.divide(table, total, out=equal, where=total > 0)


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
    energy = np.zeros((len(network.blocks), len(names)))
    for inputs, _, weights in batches:
        features = network.pad(inputs)
        for i, block in enumerate(network.layers.values()):
            outputs = block.outputs(features)
            for name, output in outputs.items():
                squares = output.flatten(1).square().sum(1).double()
                energy[i, names.index(name)] += torch.dot(squares, weights.double()).item()
            features = torch.relu(torch.stack(list(outputs.values())).sum(0))
    return shares(energy, enabled_table(network))


@torch.no_grad()
def equivariance_errors(
    network: SoftEquivariantNetwork, batches: Iterable[torch.Tensor], group: Translation
) -> tuple[np.ndarray, float]:
    """How far each layer, and the whole network, is from commuting with a group.

    For each layer l on its own input h: ‖f_l(g h) − g' f_l(h)‖ / ‖f_l(h)‖, over the data in the
    Frobenius norm, where g' is for each sample the nearest of the output's elements that may
    answer to g at the layer's stride; then the mean over g. For the network: ‖f(g x) − f(x)‖ /
    ‖f(x)‖ of the logits.

    Returns
    -------
    layers : ndarray of shape (L,)
        0 is a strictly equivariant layer; an unconstrained one is of order 1.
    logits : float
        0 is an invariant network.
    """
    n_layers = len(network.blocks)
    squares = [dict[tuple[int, int], float]() for _ in range(n_layers + 1)]
    norms = np.zeros(n_layers + 1)
    for images in batches:
        features = canvas = network.pad(images)
        for i, block in enumerate(network.layers.values()):
            outputs = block(features)
            norms[i] += outputs.double().square().sum().item()
            for g in group.elements((features.shape[2], features.shape[3])):
                moved = block(group.act(features, g))
                distance = torch.stack(
                    [
                        (moved - group.act(outputs, a)).double().square().sum((1, 2, 3))
                        for a in group.output_elements(g, block.stride)
                    ]
                ).amin(0)  # (n,)
                squares[i][g] = squares[i].get(g, 0.0) + distance.sum().item()
            features = torch.relu(outputs)
        logits = network(images).double()
        norms[-1] += logits.square().sum().item()
        for g in group.elements(network.canvas):
            change = (network(group.act(canvas, g)).double() - logits).square().sum().item()
            squares[-1][g] = squares[-1].get(g, 0.0) + change
    errors = np.array(
        [
            # Eq. equivariance error
            np.mean([np.sqrt(s / norm) for s in found.values()]) if found and norm > 0 else 0.0
            for found, norm in zip(squares, norms, strict=True)
        ]
    )
    return errors[:-1], float(errors[-1])
