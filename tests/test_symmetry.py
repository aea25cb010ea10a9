"""What a network says about symmetry: tables, shares of the output, errors of equivariance."""

import math

import numpy as np
import pytest
import torch
from cases import randomise
from references import IDENTITY, inverse, move, pixels, roll_to_largest_grid, silu, times

from sklearn_softeq.groups import GROUPS, P1, P4, P4M, PM
from sklearn_softeq.layers import FactoredFC, GroupConv, PathwaySum
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


def network_of(*pathways, shape=(1, 8, 8), width=2, **options):
    options = {"pathways": pathways, "width": width, "dtype": torch.float64, **options}
    return randomise(build_network(shape, 3, **options))


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


# A block of three degrees of symmetry, and a readout with pathways of its own.
GROUP_PATHWAYS = ("p4_conv", "conv", "factored_fc")


def group_network(**options):
    return network_of(*GROUP_PATHWAYS, shape=(1, 4, 4), width=1, **options)


def test_tables_of_a_network_whose_layers_differ():
    network = group_network()
    assert layer_names(network) == ["blocks.0", "blocks.1", "head.hidden"]
    assert pathway_names(network) == [*GROUP_PATHWAYS, "pooled", "free"]
    enabled = np.array([[True] * 3 + [False] * 2] * 2 + [[False] * 3 + [True] * 2])
    assert enabled_table(network).dtype == bool
    assert enabled_table(network).tolist() == enabled.tolist()
    sizes = {name: w.numel() for name, w in network.named_parameters()}
    table = sum_table(network, sizes)
    for i, layer in enumerate((*network.blocks, network.head.hidden)):
        for j, name in enumerate(pathway_names(network)):
            pathway = layer.pathways.get(name)
            expected = sum(w.numel() for w in pathway.parameters()) if pathway else 0
            assert table[i, j] == expected
    assert (table > 0).tolist() == enabled.tolist()
    for values in (table, np.zeros((3, 5))):
        found = shares(values, enabled_table(network))
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
        assert (found > 0).tolist() == enabled.tolist()
    precisions = dict.fromkeys(sizes, 4.0)
    found = precision_table(network, precisions)
    np.testing.assert_allclose(found, np.where(enabled, 4.0, np.nan))


def test_tables_of_what_is_off_in_a_network_whose_layers_differ():
    network = group_network()
    network.blocks[0].enabled["conv"] = False  # held back
    network.blocks[1].remove("factored_fc")
    network.head.hidden.remove("free")
    precisions = dict.fromkeys((name for name, _ in network.named_parameters()), 2.0)
    nan, inf = np.nan, np.inf
    np.testing.assert_allclose(
        precision_table(network, precisions),
        [[2, nan, 2, nan, nan], [2, 2, inf, nan, nan], [nan, nan, nan, 2, inf]],
    )
    on = enabled_table(network)
    assert on.sum(1).tolist() == [2, 2, 1]
    np.testing.assert_allclose(shares(np.zeros((3, 5)), on), on / on.sum(1, keepdims=True))


def test_names_of_a_residual_network():
    network = network_of("conv", "fc", shape=(1, 4, 4), architecture="resnet")
    expected = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("first", "second")]
    assert layer_names(network) == expected
    assert pathway_names(network) == ["conv", "fc"]
    assert sum_table(network, {"blocks.1.second.fc.bias": 3.0}).tolist() == [[0, 0]] * 3 + [[0, 3]]


def test_a_strict_group_network_has_no_readout_among_its_layers():
    network = network_of("p4_conv", shape=(1, 4, 4), width=1)
    assert layer_names(network) == ["blocks.0", "blocks.1"]
    assert pathway_names(network) == ["p4_conv"]


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
            features = silu(block(features))
    return energy / energy.sum(1, keepdims=True)


def test_output_shares_see_the_layers_own_inputs():
    network, x = network_of(*ALL, shape=(2, 7, 8)), images(4, (2, 7, 8))
    network.blocks[1].enabled["fc"] = False
    expected = slow_output_shares(network, x, [1] * 4)
    assert np.ptp(expected[:, 0]) > 0.01  # the case tells layers apart
    np.testing.assert_allclose(output_shares(network, [batch(x)]), expected, rtol=1e-10)
    parts = [batch(x[:3]), batch(x[3:])]
    np.testing.assert_allclose(output_shares(network, parts), expected, rtol=1e-10)


def seen_by_layers(network, x):
    """The input of each sum of pathways, by hooks of our own."""
    seen, handles = {}, []

    def keep(name):
        return lambda _, args: seen.update({name: args[0].detach()})

    for name, module in network.named_modules():
        if isinstance(module, PathwaySum):
            handles.append(module.register_forward_pre_hook(keep(name)))
    network(x)
    for handle in handles:
        handle.remove()
    return [(network.get_submodule(name), features) for name, features in seen.items()]


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_output_shares_where_layers_differ(architecture):
    network, x = group_network(architecture=architecture), images(3, (1, 4, 4))
    energy = np.zeros((len(layer_names(network)), 5))
    for i, (layer, features) in enumerate(seen_by_layers(network, x)):
        for name in layer.enabled:
            rows = [
                row if name in ("factored_fc", "free") else roll_to_largest_grid(row, layer.stride)
                for row in features
            ]
            outputs = layer.get_submodule(name)(torch.stack(rows))
            energy[i, pathway_names(network).index(name)] = outputs.square().sum().item()
    found = output_shares(network, [batch(x)])
    np.testing.assert_allclose(found, energy / energy.sum(1, keepdims=True), rtol=1e-10)
    assert (found > 0).tolist() == enabled_table(network).tolist()


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
    found = equivariance_errors(network, [x], GROUP)
    assert found.layers.shape == found.free.shape == (len(network.blocks),)
    assert found.layers.max() < 1e-10
    assert found.logits < 1e-10


def test_and_not_because_the_outputs_are_empty():
    network, x = network_of("conv"), images(4)
    for block, features in zip(network.blocks, blockwise(network, x), strict=True):
        assert block(features).std() > 1e-3


def blockwise(network, x):
    features = network.pad(x)
    for block in network.blocks:
        yield features
        features = silu(block(features))


@pytest.mark.parametrize("free", ["fc", "factored_fc"])
def test_free_pathways_are_not_equivariant(free):
    network, x = network_of(free), images(8)
    with torch.no_grad():  # biases that shift with nothing would hide a good deal
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    found = equivariance_errors(network, [x], GROUP)
    assert (found.layers[:-1] > 0.3).all()
    assert (found.layers < 2).all()
    assert 0.02 < found.logits < 2


def test_a_free_pathway_switched_off_leaves_no_error():
    network, x = network_of("conv", "fc"), images(4)
    before = equivariance_errors(network, [x], GROUP).layers
    network.blocks[0].enabled["fc"] = False
    after = equivariance_errors(network, [x], GROUP).layers
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
    layers, free, logits = equivariance_errors(network, [x], GROUP)
    np.testing.assert_allclose(layers, expected, rtol=1e-10)
    f, canvas = network(x), network.pad(x)
    ratios = [
        ((network(torch.roll(canvas, (i, j), (2, 3))) - f).norm() / f.norm()).item()
        for i, j in [(0, 1), (0, 4), (1, 0), (1, 1), (1, 4), (4, 0), (4, 1), (4, 4)]
    ]
    assert logits == pytest.approx(np.mean(ratios), rel=1e-10)
    in_parts = equivariance_errors(network, [x[:1], x[1:4], x[4:]], GROUP)
    np.testing.assert_allclose(in_parts.layers, layers, rtol=1e-10)
    np.testing.assert_allclose(in_parts.free, free, rtol=1e-10)
    assert in_parts.logits == pytest.approx(logits, rel=1e-10)


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
    layers, free, logits = equivariance_errors(network, [images(3, (3, 1, 1))], GROUP)
    assert layers.tolist() == free.tolist() == [0.0]
    assert logits == 0.0


def test_a_layer_that_is_zero_has_no_error():
    network = network_of("fc")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    found = equivariance_errors(network, [images(2)], GROUP)
    assert found.layers.tolist() == [0.0] * 4
    assert found.logits == 0.0


# ── errors in turns and reflections


def slow_sources(element, group, axis):
    """The place from which each orientation comes: r⁻¹ g, or m⁻¹ g m if m is no element of theirs.

    None if it comes from no orientation.
    """
    back = inverse(group, element)
    after = IDENTITY if element in axis.matrices else element
    found = [times(times(back, g), after) for g in axis.matrices]
    return [axis.matrices.index(g) for g in found] if set(found) <= set(axis.matrices) else None


def slow_act(features, element, group, axis):
    """(r f)[c, g, x] = f[c, r⁻¹ g, r⁻¹ x], x from the centre, pixel by pixel."""
    back, centre = inverse(group, element), [(side - 1) / 2 for side in features.shape[2:]]
    sources = slow_sources(element, group, axis)
    moved = torch.empty_like(features)
    for channel in range(features.shape[1]):
        g = channel % axis.order
        for y, x in pixels(features.shape[2:]):
            i, j = move(back, (y - centre[0], x - centre[1]))
            place = round(i + centre[0]), round(j + centre[1])
            moved[:, channel, y, x] = features[:, channel - g + sources[g], *place]
    return moved


def slow_elements(grid, group, *axes):
    """Those that keep the grid, know where each orientation goes, and move anything at all."""
    found = []
    for element in group.matrices[1:]:
        sources = [slow_sources(element, group, axis) for axis in axes]
        keeps = grid[0] == grid[1] or element[0][0]  # rows stay rows
        if keeps and None not in sources:
            still = all(s == sorted(s) for s in sources) and tuple(grid) == (1, 1)
            found += [] if still else [element]
    return found


def slow_error_of(layer, features, group, in_axis, out_axis):
    """Mean over the elements that move something of ‖f(gh) − g f(h)‖ / ‖f(h)‖."""
    outputs, ratios = layer(features), []
    for element in slow_elements(features.shape[2:], group, in_axis, out_axis):
        moved = layer(slow_act(features, element, group, in_axis))
        expected = slow_act(outputs, element, group, out_axis)
        ratios.append(((moved - expected).norm() / outputs.norm()).item())
    return np.mean(ratios) if ratios else 0.0


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 7)], ids=str)
@pytest.mark.parametrize(
    ("pathway", "groups"),
    [
        ("p4_conv", ("translation", "p4")),
        ("p4m_conv", ("translation", "p4", "p4m", "pm")),
        ("pm_conv", ("translation", "pm")),
    ],
)
def test_group_convolutions_are_equivariant(pathway, groups, shape):
    network, x = network_of(pathway, shape=shape, width=1), images(4, shape)
    assert all(features.std() > 1e-3 for _, features in seen_by_layers(network, x))
    for name, group in GROUPS.items():
        found = equivariance_errors(network, [x], group)
        assert found.layers.shape == found.free.shape == (4,)
        if name in groups:
            assert found.layers.max() < 1e-10
            assert found.logits < 1e-10
        else:  # the other cases are not passed by all that is not zero
            assert found.layers.max() > 0.1
            assert found.logits > 1e-3
        assert found.free[:-1].min() > 0.3


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize("name", ["p4", "p4m", "pm"])
def test_errors_of_turns_are_those_of_the_definition(name, architecture):
    pathways = ("p4m_conv", "p4_conv", "factored_fc")
    network = network_of(*pathways, shape=(1, 4, 4), width=1, architecture=architecture)
    x, group = images(4, (1, 4, 4)), GROUPS[name]
    seen = seen_by_layers(network, x)  # the first layer lifts an image, the readout has no axis
    axes = [(P1, P4M), *[(P4M, P4M)] * (len(seen) - 2), (P4M, P1)]
    expected = [
        slow_error_of(layer, features, group, *around)
        for (layer, features), around in zip(seen, axes, strict=True)
    ]
    found = equivariance_errors(network, [x], group)
    np.testing.assert_allclose(found.layers, expected, rtol=1e-10)
    assert (found.layers[:-2] > 1e-2).all()
    f, ratios = network(x), []
    for element in group.matrices[1:]:
        turned = network(slow_act(x, element, group, P1))
        ratios.append(((turned - f).norm() / f.norm()).item())
    assert found.logits == pytest.approx(np.mean(ratios), rel=1e-10)
    in_parts = equivariance_errors(network, [x[:1], x[1:]], group)
    np.testing.assert_allclose(in_parts.layers, found.layers, rtol=1e-10)
    assert in_parts.logits == pytest.approx(found.logits, rel=1e-10)


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize(("strict", "axis"), [("p4_conv", P4), ("pm_conv", PM)])
@pytest.mark.parametrize("name", ["p4", "p4m", "pm"])
def test_errors_of_elements_that_the_orientations_lack(name, strict, axis, architecture):
    # Reflections exchange quarter turns; quarter turns take a reflection to one that pm lacks.
    options = {"shape": (1, 4, 4), "width": 1, "architecture": architecture}
    network, x = network_of(strict, "factored_fc", **options), images(4, (1, 4, 4))
    seen, group = seen_by_layers(network, x), GROUPS[name]
    axes = [(P1, axis), *[(axis, axis)] * (len(seen) - 2), (axis, P1)]
    expected = [
        slow_error_of(layer, features, group, *around)
        for (layer, features), around in zip(seen, axes, strict=True)
    ]
    found = equivariance_errors(network, [x], group)
    np.testing.assert_allclose(found.layers, expected, rtol=1e-10)
    assert found.layers[0] > 1e-2
    free = network_of("factored_fc", **options)  # without orientations there is nothing to lack
    measured = equivariance_errors(free, [x], group).layers
    layers = [slow_error_of(*pair, group, P1, P1) for pair in seen_by_layers(free, x)]
    np.testing.assert_allclose(measured, layers, rtol=1e-10)


def test_one_pixel_has_the_symmetry_of_its_orientations_only():
    # In the last block of a residual network: half a turn of one pixel is not worth a measurement.
    network = network_of("p4_conv", "fc", shape=(1, 2, 2), width=1, architecture="resnet")
    _, features = seen_by_layers(network, images(3, (1, 2, 2)))[1]
    assert features.shape[2:] == (1, 1)
    assert slow_elements((1, 1), P4, P4, P4) == list(P4.matrices[1:])
    assert slow_elements((1, 1), P4M, P1, P1) == []
    assert P4.elements((1, 1), P4, P4) == list(P4.matrices[1:])
    assert P4M.elements((1, 1), P1, P1) == PM.elements((1, 1)) == []
    plain = network_of("conv", "fc", shape=(1, 2, 2), architecture="resnet")
    found = equivariance_errors(plain, [images(3, (1, 2, 2))], P4)
    assert found.layers[0] > 1e-2
    assert found.layers[1] == found.free[1] == 0


@pytest.mark.parametrize("group", [P4, P4M, PM], ids=lambda group: group.name)
def test_orientations_turn_with_the_pixels(group):
    # Without the permutation of orientations a strict layer would not pass for one.
    layer = GroupConv(2 * group.order, group.order, (4, 4), (2, 2), group=group).double()
    layer.reset()
    block = PathwaySum({"conv": layer}, (2, 2), 1.0, group, group)
    features = images(3, (2 * group.order, 4, 4))
    assert slow_error_of(block, features, group, group, group) < 1e-12
    assert slow_error_of(block, features, group, P1, P1) > 0.3


@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 2, 4), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("name", ["p4", "p4m", "pm"])
def test_only_what_keeps_the_shape_of_a_grid_is_measured(name, shape):
    network, x, group = network_of("conv", "fc", shape=shape), images(3, shape), GROUPS[name]
    expected = [
        slow_error_of(layer, features, group, P1, P1)
        for layer, features in seen_by_layers(network, x)
    ]
    found = equivariance_errors(network, [x], group)
    np.testing.assert_allclose(found.layers, expected, rtol=1e-10)
    assert found.layers[0] > 0.1
    f, ratios = network(x), []
    for element in group.matrices[1:]:
        if element[0][0]:
            turned = network(slow_act(x, element, group, P1))
            ratios.append(((turned - f).norm() / f.norm()).item())
    assert found.logits == pytest.approx(np.mean(ratios), rel=1e-10)


def test_a_readout_is_measured_by_its_own_pathways():
    network, x = group_network(), images(4, (1, 4, 4))
    both = equivariance_errors(network, [x], GROUPS["p4"]).layers[-1]
    network.head.hidden.enabled["free"] = False
    pooled = equivariance_errors(network, [x], GROUPS["p4"]).layers[-1]
    assert pooled < 1e-12
    assert both > 1e-2


# ── the scale at which no symmetry is left


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 4, 8)], ids=str)
def test_free_errors_are_those_of_an_untrained_factored_layer(name, shape):
    network, x, group = network_of("conv", "fc", shape=shape), images(4, shape), GROUPS[name]
    expected = []
    for block, features in seen_by_layers(network, x):
        outputs = block(features)
        layer = FactoredFC(features.shape[1], outputs.shape[1], features.shape[2:], block.stride)
        layer.double().reset(torch.Generator().manual_seed(0))
        layer.stride = block.stride
        if name != "translation":
            expected.append(slow_error_of(layer, features, group, P1, P1))
        else:
            moves = max(features.shape[2:]) > 1
            expected.append(slow_error(layer, features) if moves else 0.0)
    found = equivariance_errors(network, [x], group).free
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert (found[:-1] > 0.5).all()
    assert (found < 2).all()
    # Whatever has been learned, and on however many rows it is measured: a fixed scale.
    with torch.no_grad():
        for block in network.blocks[1:]:
            for parameter in block.parameters():
                parameter.normal_()
    assert equivariance_errors(network, [x], group).free[0] == pytest.approx(found[0])


def test_free_error_of_a_layer_with_orientations():
    network, x = network_of("p4_conv", shape=(1, 4, 4), width=1), images(4, (1, 4, 4))
    (_, _), (block, features) = seen_by_layers(network, x)
    layer = FactoredFC(features.shape[1], block(features).shape[1], (2, 2), (2, 2)).double()
    layer.reset(torch.Generator().manual_seed(0))
    expected = slow_error_of(layer, features, P4, P4, P4)
    assert equivariance_errors(network, [x], P4).free[1] == pytest.approx(expected, rel=1e-10)


def test_measuring_leaves_no_trace():
    network, x = network_of(*ALL).float(), images().float()
    state = torch.get_rng_state()
    before = {name: w.clone() for name, w in network.named_parameters()}
    found = equivariance_errors(network, [x], GROUP)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, before[name]) for name, w in network.named_parameters())
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert found.layers.dtype == found.free.dtype == np.float64
