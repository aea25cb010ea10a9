"""What a network says about symmetry: tables, shares of the output, errors of equivariance."""

import math

import numpy as np
import pytest
import torch
from cases import randomise
from references import roll_to_largest_grid

from sklearn_softeq.groups import GROUPS
from sklearn_softeq.networks import build_network
from sklearn_softeq.symmetry import (
    enabled_table,
    equivariance_errors,
    layer_names,
    output_shares,
    pathway_names,
    precision_table,
    shares,
    sum_table,
)

GROUP = GROUPS["translation"]
ALL = ("conv", "factored_fc", "fc")


def network_of(*pathways, shape=(1, 8, 8), width=2):
    network = build_network(shape, 3, pathways=pathways, width=width, dtype=torch.float64)
    return randomise(network)


def images(n=5, shape=(1, 8, 8)):
    return torch.randn(n, *shape, dtype=torch.float64)


# ── tables


def test_names():
    network = network_of("factored_fc", "conv")
    assert layer_names(network) == [f"blocks.{i}" for i in range(4)]
    assert pathway_names(network) == ["factored_fc", "conv"]


def test_sum_table_sums_over_the_tensors_of_a_pathway():
    network = network_of("factored_fc", "conv", "fc", shape=(1, 4, 4))
    values = {name: float(2**i) for i, (name, _) in enumerate(network.named_parameters())}
    values = dict(reversed(values.items()))  # names count, not the order
    table = sum_table(network, values)
    assert table.shape == (2, 3)
    for i in range(2):
        for j, pathway in enumerate(("factored_fc", "conv", "fc")):
            tensors = [
                f"blocks.{i}.{pathway}.{name}"
                for name, _ in network.blocks[i].get_submodule(pathway).named_parameters()
            ]
            assert len(tensors) == (4 if pathway == "factored_fc" else 2)
            assert table[i, j] == sum(values[name] for name in tensors)
    head = sum(value for name, value in values.items() if name.startswith("head"))
    assert table.sum() + head == sum(values.values())
    # Names are compared whole: "fc" is not "fc_2", nor "blocks.1" "blocks.10".
    values = {"blocks.1.fc.weight": 3.0, "blocks.10.fc.weight": 5.0, "blocks.1.fc_2.bias": 7.0}
    assert sum_table(network, values).tolist() == [[0, 0, 0], [0, 0, 3]]


def test_precision_table_takes_the_geometric_mean_of_factors():
    network = network_of(*ALL, shape=(1, 4, 4))
    precisions = {name: 1e6 for name, _ in network.named_parameters()}  # biases do not count
    precisions |= {
        "blocks.0.conv.weight": 3.0,
        "blocks.0.factored_fc.U.weight": 2.0,
        "blocks.0.factored_fc.V.weight": 32.0,
        "blocks.0.fc.weight": 7.0,
        "blocks.1.conv.weight": 5.0,
        "blocks.1.factored_fc.U.weight": 1e-4,
        "blocks.1.factored_fc.V.weight": 1e8,
    }
    table = precision_table(network, precisions)
    np.testing.assert_allclose(table, [[3.0, 8.0, 7.0], [5.0, 100.0, 1e6]], rtol=1e-12)
    # √(δ_U δ_V) does not depend on the gauge.
    precisions["blocks.0.factored_fc.U.weight"] *= 81.0
    precisions["blocks.0.factored_fc.V.weight"] /= 81.0
    np.testing.assert_allclose(precision_table(network, precisions), table, rtol=1e-12)


def test_precision_of_what_is_off():
    network = network_of(*ALL, shape=(1, 4, 4))
    precisions = dict.fromkeys((name for name, _ in network.named_parameters()), 2.0)
    network.blocks[0].enabled["fc"] = False  # held back: nothing is known of it yet
    network.blocks[1].remove("factored_fc")
    expected = [[2.0, 2.0, np.nan], [2.0, np.inf, 2.0]]
    np.testing.assert_allclose(precision_table(network, precisions), expected)
    assert enabled_table(network).tolist() == [[True, True, False], [True, False, True]]


def test_shares_sum_to_1_and_an_empty_row_is_shared_by_what_is_on():
    table = np.array([[1.0, 3.0], [0.0, 0.0], [0.0, 5.0], [1e-300, 1e-300], [0.0, 0.0]])
    enabled = np.array([[True, True]] * 4 + [[True, False]])
    with np.errstate(all="raise"):
        found = shares(table, enabled)
    np.testing.assert_allclose(found, [[0.25, 0.75], [0.5, 0.5], [0, 1], [0.5, 0.5], [1, 0]])
    assert table[1].tolist() == [0.0, 0.0]


# ── output shares


def batch(x, weights=None):
    weights = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
    return x, torch.zeros(len(x), dtype=torch.long), weights


def constant_outputs(network, **levels):
    """Each pathway's output becomes a constant by its name, in every block."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.zero_()
            pathway = name.split(".")[2]
            if name.endswith(".bias") and not name.endswith("U.bias") and pathway in levels:
                parameter.fill_(levels[pathway])


def test_output_shares_of_known_energies():
    network = network_of(*ALL)
    constant_outputs(network, conv=1.0, factored_fc=-2.0, fc=3.0)
    expected = np.array([1, 4, 9]) / 14
    found = output_shares(network, [batch(images())])
    np.testing.assert_allclose(found, np.tile(expected, (4, 1)), rtol=1e-12)
    network.blocks[2].enabled["fc"] = False
    found = output_shares(network, [batch(images())])
    np.testing.assert_allclose(found[2], [0.2, 0.8, 0], rtol=1e-12)
    np.testing.assert_allclose(found[3], expected, rtol=1e-12)


def slow_output_shares(network, x, counts):
    """Σ_n count_n ‖output‖² of each pathway, one row at a time, through the true features."""
    energy = np.zeros((len(network.blocks), len(pathway_names(network))))
    for row, count in zip(x, counts, strict=True):
        features = network.pad(row[None])
        for i, block in enumerate(network.blocks):
            rolled = roll_to_largest_grid(features[0], block.stride)[None]
            for j, (name, path) in enumerate(block.pathways.items()):
                if block.enabled[name]:
                    energy[i, j] += (
                        count * path(rolled if name == "conv" else features).square().sum().item()
                    )
            features = block(features).clamp_min(0)
    return energy / energy.sum(1, keepdims=True)


def test_output_shares_see_the_layers_own_inputs():
    network, x = network_of(*ALL, shape=(2, 7, 8)), images(4, (2, 7, 8))
    network.blocks[1].enabled["fc"] = False
    expected = slow_output_shares(network, x, [1] * 4)
    assert np.ptp(expected[:, 0]) > 0.01  # the case tells layers apart
    np.testing.assert_allclose(output_shares(network, [batch(x)]), expected, rtol=1e-10)
    parts = [batch(x[:3]), batch(x[3:])]
    np.testing.assert_allclose(output_shares(network, parts), expected, rtol=1e-10)


def test_a_weight_is_a_number_of_repetitions():
    network = network_of(*ALL)
    x = images(4) * torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=torch.float64)[:, None, None, None]
    counts = torch.tensor([3, 1, 2, 0])
    weighted = output_shares(network, [batch(x, counts.double())])
    repeated = output_shares(network, [batch(x.repeat_interleave(counts, 0))])
    np.testing.assert_allclose(weighted, repeated, rtol=1e-12)
    assert np.abs(weighted - output_shares(network, [batch(x)])).max() > 1e-3
    expected = slow_output_shares(network, x, counts.tolist())
    np.testing.assert_allclose(weighted, expected, rtol=1e-10)


def test_output_shares_in_float32_with_gradients_on():
    network = network_of(*ALL).float()
    found = output_shares(network, [batch(images().float())])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(1), 1)


# ── errors of equivariance


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 8), (1, 6, 7), (1, 1, 8)])
def test_convolutions_are_equivariant(shape):
    network, x = network_of("conv", shape=shape), images(4, shape)
    layers, logits = equivariance_errors(network, [x], GROUP)
    assert layers.shape == (len(network.blocks),)
    assert layers.max() < 1e-10
    assert logits < 1e-10


def test_and_not_because_the_outputs_are_empty():
    network, x = network_of("conv"), images(4)
    for block, features in zip(network.blocks, blockwise(network, x), strict=True):
        assert block(features).std() > 1e-3


def blockwise(network, x):
    features = network.pad(x)
    for block in network.blocks:
        yield features
        features = torch.relu(block(features))


@pytest.mark.parametrize("free", ["fc", "factored_fc"])
def test_free_pathways_are_not_equivariant(free):
    network, x = network_of(free), images(8)
    with torch.no_grad():  # biases that shift with nothing would hide a good deal
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    layers, logits = equivariance_errors(network, [x], GROUP)
    assert (layers[:-1] > 0.3).all()
    assert (layers < 2).all()
    assert 0.02 < logits < 2


def test_a_free_pathway_switched_off_leaves_no_error():
    network, x = network_of("conv", "fc"), images(4)
    before, _ = equivariance_errors(network, [x], GROUP)
    network.blocks[0].enabled["fc"] = False
    after, _ = equivariance_errors(network, [x], GROUP)
    assert before[0] > 0.1
    assert after[0] < 1e-10
    assert after[1] > 0.1  # each layer is measured by itself


def slow_error(block, features):
    """Mean over shifts by 0, 1, half of ‖f(gh) − g'f(h)‖ / ‖f(h)‖, g' the nearest by row."""
    height, width = features.shape[2:]
    outputs, ratios = block(features), []
    for i in sorted({0, 1 % height, height // 2}):
        for j in sorted({0, 1 % width, width // 2}):
            if (i, j) == (0, 0):
                continue
            total = 0.0
            for n in range(len(features)):
                moved = block(torch.roll(features[n : n + 1], (i, j), (2, 3)))[0]
                total += min(
                    (moved - torch.roll(outputs[n], (a, b), (1, 2))).square().sum().item()
                    for a in (math.floor(i / block.stride[0]), math.ceil(i / block.stride[0]))
                    for b in (math.floor(j / block.stride[1]), math.ceil(j / block.stride[1]))
                )
            ratios.append(math.sqrt(total / outputs.square().sum().item()))
    return np.mean(ratios)


def test_errors_are_those_of_the_definition_in_any_batches():
    network, x = network_of(*ALL, shape=(1, 7, 8)), images(5, (1, 7, 8))
    expected = [
        slow_error(block, features) if max(features.shape[2:]) > 1 else 0.0
        for block, features in zip(network.blocks, blockwise(network, x), strict=True)
    ]
    layers, logits = equivariance_errors(network, [x], GROUP)
    np.testing.assert_allclose(layers, expected, rtol=1e-10)
    f, canvas = network(x), network.pad(x)
    ratios = [
        ((network(torch.roll(canvas, (i, j), (2, 3))) - f).norm() / f.norm()).item()
        for i, j in [(0, 1), (0, 4), (1, 0), (1, 1), (1, 4), (4, 0), (4, 1), (4, 4)]
    ]
    assert logits == pytest.approx(np.mean(ratios), rel=1e-10)
    in_parts = equivariance_errors(network, [x[:1], x[1:4], x[4:]], GROUP)
    np.testing.assert_allclose(in_parts[0], layers, rtol=1e-10)
    assert in_parts[1] == pytest.approx(logits, rel=1e-10)


def test_a_strided_layer_may_answer_with_either_neighbour():
    # Shifting a row by one pixel keeps the same pixels: the kept grid moves by 0 or by 1.
    network = network_of("conv", shape=(1, 1, 4), width=3)
    block, x = network.blocks[0], images(16, (1, 1, 4))
    assert block.stride == (1, 2)
    outputs, moved = block(x), block(torch.roll(x, 1, 3))
    stays = (moved - outputs).flatten(1).norm(dim=1)
    moves = (moved - torch.roll(outputs, 1, 3)).flatten(1).norm(dim=1)
    assert stays.max() > 1e-3  # neither answer holds for all,
    assert moves.max() > 1e-3
    assert torch.minimum(stays, moves).max() < 1e-12  # one of them for each
    assert equivariance_errors(network, [x], GROUP)[0].max() < 1e-12


def test_a_grid_of_one_pixel_has_no_shift():
    network = network_of("conv", "fc", shape=(3, 1, 1))
    layers, logits = equivariance_errors(network, [images(3, (3, 1, 1))], GROUP)
    assert layers.tolist() == [0.0]
    assert logits == 0.0


def test_a_layer_that_is_zero_has_no_error():
    network = network_of("fc")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    layers, logits = equivariance_errors(network, [images(2)], GROUP)
    assert layers.tolist() == [0.0] * 4
    assert logits == 0.0
