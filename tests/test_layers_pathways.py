"""The table of pathways; equivariance of one pathway and of sums; the grid that is kept."""

from itertools import product

import pytest
import torch
from cases import KINDS, LAYERS, P2, LayerCase, randomise
from equivariance import assert_equivariant, joint_errors
from references import DENSE, IDENTITY, roll_to_largest_grid, slow_pathway

from sklearn_softeq.groups import P1, P4, P4M, PM, POINT_GROUPS, join
from sklearn_softeq.layers import (
    FC,
    PATHWAYS,
    Conv,
    FactoredFC,
    PathwaySum,
    keep_largest_grid,
    less_symmetric,
    untrained_free_layer,
)


def test_the_table():
    groups = {name: kind.group for name, kind in PATHWAYS.items()}
    assert groups == {
        **dict.fromkeys(("conv", "sparse_conv"), P1),
        **dict.fromkeys(("fc", "factored_fc", "sparse_fc")),
        **{f"{name}_conv": group for name, group in POINT_GROUPS.items()},
    }


# ── equivariance


SYMMETRIC = [
    case
    for case in LAYERS
    if KINDS[case.kind].group is not None and case.stride == (1, 1) and case.grid != (1, 1)
]
SYMMETRIC += [
    LayerCase("pm_conv", (2, 1), (3, 5), (1, 1), PM, PM),
    LayerCase("p2_conv", (2, 1), (5, 3), (1, 1), P2, P2),
    LayerCase("p4m_conv", (1, 2), (5, 5), (1, 1), P1, P4M),
    LayerCase("p2_conv", (1, 1), (3, 4), (1, 1), P4M, P4M),
]


@pytest.mark.parametrize("case", SYMMETRIC, ids=str)
def test_a_layer_commutes_with_its_group_and_every_shift(case):
    axes = case.in_group, case.out_group
    assert_equivariant(case.pathway(), case.inputs(), KINDS[case.kind].group, axes)


def layer_of(kinds, axes, grid, stride, channels=(1, 2), scale=0.5):
    """A sum of pathways in a network with these groups of orientations."""
    cases = {kind: LayerCase(kind, channels, grid, stride, *axes) for kind in kinds}
    paths = {kind: case.pathway() for kind, case in cases.items()}
    inputs = torch.randn(5, *cases[kinds[0]].inputs().shape[1:], dtype=torch.float64)
    return PathwaySum(paths, stride, scale, *axes).double(), inputs


SQUARE_STRIDES = [((4, 4), (1, 1)), ((3, 3), (1, 1)), ((4, 4), (2, 2)), ((6, 6), (2, 2))]
ALL_STRIDES = [
    *SQUARE_STRIDES,
    ((2, 2), (2, 2)),
    ((4, 6), (2, 2)),
    ((4, 4), (1, 2)),
    ((6, 4), (2, 1)),
    ((1, 8), (1, 2)),
]
# Pathways, the group of the network, and what their sum commutes with.
SUMS = [
    (("conv", "sparse_conv"), P1, P1),
    (("p4_conv",), P4, P4),
    (("p4m_conv",), P4M, P4M),
    (("pm_conv",), PM, PM),
    (("p2_conv",), P2, P2),
    (("p4_conv", "p4m_conv"), P4M, P4),
    (("p4m_conv", "pm_conv"), P4M, PM),
    (("p2_conv", "p4_conv"), P4, P2),
    (("p4_conv", "pm_conv"), join([P4, PM]), P1),
    (("conv", "p4_conv", "p4m_conv"), P4M, P1),
]
STRIDED_SUMS = [
    (kinds, axis, group, grid, stride)
    for kinds, axis, group in SUMS
    for grid, stride in ALL_STRIDES
    if not axis.needs_square or (grid, stride) in [*SQUARE_STRIDES, ((2, 2), (2, 2))]
]


def name_of(value):
    return "+".join(value) if isinstance(value, tuple) and isinstance(value[0], str) else None


@pytest.mark.parametrize("lifted", [True, False], ids=["lifted", "oriented"])
@pytest.mark.parametrize(("kinds", "axis", "group", "grid", "stride"), STRIDED_SUMS, ids=name_of)
def test_a_sum_commutes_with_what_its_pathways_share(kinds, axis, group, grid, stride, lifted):
    axes = (P1 if lifted else axis), axis
    layer, inputs = layer_of(kinds, axes, grid, stride)
    assert_equivariant(layer, inputs, group, axes, stride)


# A layer, the group of its orientations, and moves with which it does not commute.
BROKEN = [
    (("conv",), P4, P4),
    (("sparse_conv",), P4, P4),
    (("conv",), PM, PM),
    (("p4_conv",), P4M, PM),
    (("p4_conv",), P4, PM),
    (("pm_conv",), P4M, P4),
    (("p2_conv",), P4, P4),
    (("p2_conv",), P2, PM),
    (("p4_conv", "conv"), P4, P4),
    (("p4_conv", "pm_conv"), P4M, P4M),
]


@pytest.mark.parametrize(("grid", "stride"), SQUARE_STRIDES, ids=str)
@pytest.mark.parametrize(("kinds", "axis", "group"), BROKEN, ids=name_of)
def test_what_is_not_claimed_does_not_hold(kinds, axis, group, grid, stride):
    layer, inputs = layer_of(kinds, (axis, axis), grid, stride)
    errors = joint_errors(layer, inputs, group, (axis, axis), stride)
    held = set(group.matrices).intersection(*(KINDS[kind].group.matrices for kind in kinds))
    assert set(group.matrices) - held
    for (g, _), found in errors.items():
        assert found < 1e-10 if g in held else found > 0.1


FREE = [kind for kind, row in KINDS.items() if row.group is None]
# Not 2×2: its two anchors stand side by side and see the columns only.


@pytest.mark.parametrize(("grid", "stride"), ALL_STRIDES, ids=str)
@pytest.mark.parametrize("kind", FREE)
def test_free_layers_commute_with_nothing(kind, grid, stride):
    layer, inputs = layer_of((kind, "pm_conv"), (PM, PM), grid, stride, channels=(2, 3), scale=1.0)
    errors = joint_errors(layer, inputs, PM, (PM, PM), stride)
    assert errors.pop((IDENTITY, (0, 0))) < 1e-10
    assert min(errors.values()) > 0.05


def test_a_convolution_of_a_group_is_a_convolution():
    # p4_conv ⊂ conv ⊂ fc: the larger layer can carry the smaller one's function.
    case = LayerCase("p4_conv", (2, 1), (4, 4), (2, 2), P4, P4)
    pathway, inputs = case.pathway(), case.inputs()
    conv, free = (layer(8, 4, (4, 4), (2, 2)).double() for layer in (Conv, FC))
    theta, bias = DENSE[type(pathway)](pathway, case)
    filters = pathway.filters().detach()
    state = {"weight": filters.reshape(conv.weight.shape), "bias": bias[:, 0]}
    conv.load_state_dict(state)
    free.load_state_dict(
        {"weight": theta.transpose(1, 2).reshape(free.weight.shape), "bias": bias.flatten()}
    )
    for layer in (conv, free):
        torch.testing.assert_close(layer(inputs), pathway(inputs), atol=1e-12, rtol=1e-12)


def test_lifting_repeats_the_image_and_turns_the_filter():
    case = LayerCase("p4_conv", (1, 1), (5, 5), (1, 1), P1, P4)
    pathway, images = case.pathway(), case.inputs()
    turned = pathway.filters()[:, 0]
    for k in range(4):
        torch.testing.assert_close(turned[k], turned[0].rot90(k))
    # As if each orientation of a constant filter saw the image: a repeated one is lifted alike.
    oriented = LayerCase("p4_conv", (1, 1), (5, 5), (1, 1), P4, P4).pathway()
    with torch.no_grad():
        oriented.weight.copy_(pathway.weight.view(1, 1, 1, 9).expand(1, 1, 4, 9).flatten(2) / 4)
        oriented.bias.copy_(pathway.bias)
    repeated = images.repeat_interleave(4, 1)
    torch.testing.assert_close(oriented(repeated), pathway(images), atol=1e-12, rtol=1e-12)


# ── the grid that is kept

STRIDED = [(grid, stride) for grid, stride in ALL_STRIDES if stride != (1, 1)]
each_strided = pytest.mark.parametrize(("grid", "stride"), STRIDED, ids=str)


def conv_sum(grid, stride):
    return layer_of(("conv", "sparse_conv"), (P1, P1), grid, stride, (2, 3))[0]


@each_strided
def test_grid_is_chosen_for_each_sample_by_its_norm(grid, stride):
    inputs = torch.randn(20, 2, *grid, dtype=torch.float64)
    rolled = keep_largest_grid(inputs, stride)
    expected = torch.stack([roll_to_largest_grid(x, stride) for x in inputs])
    assert torch.equal(rolled, expected)
    moved = (rolled != inputs).flatten(1).any(1)
    assert moved.any()
    assert not moved.all()


def test_ties_go_to_the_first_grid():
    constant = torch.ones(2, 3, 4, 4)
    constant[:, :, 1::2, 1::2] *= -1
    assert torch.equal(keep_largest_grid(constant, (2, 2)), constant)
    constant[:, :, 0::2, 0::2] = 0
    expected = torch.roll(constant, -1, 3)
    assert torch.equal(keep_largest_grid(constant, (2, 2)), expected)


def test_ties_but_for_rounding_go_to_the_first_grid():
    # The grids of an image that mirrors itself: their norms differ by the order of the sums only.
    half = torch.rand(20, 3, 4, 8, dtype=torch.float64)
    mirrored = torch.cat([half, half.flip(2)], 2)
    noise = 1 + 1e-16 * torch.randn_like(mirrored)
    rolled = keep_largest_grid(mirrored * noise, (2, 1))
    assert torch.equal(rolled, mirrored * noise)


def test_grid_of_a_row_does_not_depend_on_its_mates():
    layer, rows = conv_sum((4, 4), (2, 2)), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    # A mate that is far larger, at each of the grids in turn.
    for i, j in product((0, 1), (0, 1)):
        mate = torch.zeros_like(rows)
        mate[:, :, i::2, j::2] = 100.0
        together = layer(torch.cat([mate, rows, mate]))
        torch.testing.assert_close(together[1:2], layer(rows), atol=1e-12, rtol=1e-12)


def test_gradient_flows_through_the_roll():
    layer = conv_sum((4, 4), (2, 2))
    inputs = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (inputs,))


# ── the sum


def three_paths(stride=(2, 2), grid=(4, 6), scale=0.3):
    kinds = {"conv": Conv, "free": FC, "rank": FactoredFC}
    paths = {name: kind(2, 3, grid, stride) for name, kind in kinds.items()}
    return randomise(PathwaySum(paths, stride, scale)).double()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)], ids=str)
def test_sum_is_the_scaled_sum_of_its_slow_pathways(stride):
    layer, inputs = three_paths(stride), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    rolled = torch.stack([roll_to_largest_grid(x, stride) for x in inputs])
    seen = {"conv": ("conv", rolled), "free": ("fc", inputs), "rank": ("factored_fc", inputs)}
    expected = {
        name: 0.3
        * slow_pathway(layer.get_submodule(name), LayerCase(kind, (2, 3), (4, 6), stride), x)
        for name, (kind, x) in seen.items()
    }
    torch.testing.assert_close(layer(inputs), sum(expected.values()), atol=1e-10, rtol=1e-10)
    outputs = layer.outputs(inputs)
    assert list(outputs) == list(expected)
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("lifted", [True, False], ids=["lifted", "oriented"])
def test_sum_of_a_group_network_is_that_of_its_slow_pathways(lifted):
    axes = (P1 if lifted else P4M), P4M
    kinds = ("p4_conv", "conv", "sparse_fc", "p4m_conv", "sparse_conv")
    layer, inputs = layer_of(kinds, axes, (4, 4), (2, 2), scale=0.3)
    rolled = torch.stack([roll_to_largest_grid(x, (2, 2)) for x in inputs])
    assert not torch.equal(rolled, inputs)
    found = layer.outputs(inputs)
    assert list(found) == list(kinds)
    for kind, output in found.items():
        case = LayerCase(kind, (1, 2), (4, 4), (2, 2), *axes)
        seen = inputs if kind == "sparse_fc" else rolled
        expected = 0.3 * slow_pathway(layer.get_submodule(kind), case, seen)
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(layer(inputs), sum(found.values()))


@pytest.mark.parametrize("axes", [(P1, P4M), (P4M, P4M)], ids=["lifted", "oriented"])
def test_convolutions_of_a_sum_are_one(axes, monkeypatch):
    kinds = ("p4_conv", "conv", "sparse_fc", "p4m_conv", "sparse_conv")
    layer, inputs = layer_of(kinds, axes, (4, 4), (2, 2))
    calls, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *args: calls.append(1) or conv2d(*args)
    )
    loss = layer(inputs).square().sum()
    assert len(calls) == 1
    expected = sum(layer.outputs(inputs).values()).square().sum()
    assert len(calls) == 5
    parameters = list(layer.parameters())
    found, wanted = (torch.autograd.grad(of, parameters) for of in (loss, expected))
    torch.testing.assert_close(found, wanted)


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *args: seen.append(args)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(
        lambda *args: seen.append(args)
    ),
    "backward": lambda module, seen: module.register_full_backward_hook(
        lambda *args: seen.append(args)
    ),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(
        lambda *args: seen.append(args)
    ),
    "global": lambda module, seen: torch.nn.modules.module.register_module_forward_hook(
        lambda *args: seen.append(args)
    ),
}


@pytest.mark.parametrize("kinds", [("conv",), ("p4_conv", "conv", "sparse_fc")], ids=str)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_a_convolution_are_called(hook, kinds):
    layer, inputs = layer_of(kinds, (P4, P4), (4, 4), (2, 2))
    expected, seen = layer(inputs), []
    conv = layer.get_submodule("conv")
    with HOOKS[hook](conv, seen):
        found = layer(inputs)
        found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert sum(module is conv for module, *_ in seen) == 1


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("conv",), []),
        (("fc",), []),
        (("fc", "factored_fc", "sparse_fc"), []),
        (("fc", "conv"), ["fc"]),
        (("conv", "sparse_conv", "sparse_fc"), ["sparse_fc"]),
        (("p4_conv", "conv", "fc"), ["conv", "fc"]),
        (("p4_conv", "p4m_conv", "pm_conv"), ["p4_conv", "pm_conv"]),
        (("p4_conv", "pm_conv"), []),
        (("p4_conv", "p2_conv", "pm_conv", "conv"), ["p2_conv", "conv"]),
    ],
    ids=str,
)
def test_less_symmetric_is_what_another_pathway_tops(kinds, expected):
    groups = {kind: KINDS[kind].group for kind in kinds}
    assert less_symmetric(groups) == expected
    axis = join(group for group in groups.values() if group is not None)
    layer, _ = layer_of(kinds, (axis, axis), (4, 4), (1, 1))
    assert layer.less_symmetric == expected


def test_removed_for_good_or_held_back():
    layer, inputs = three_paths(), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    everything = layer.outputs(inputs)
    layer.enabled["conv"] = False
    layer.remove("free")
    assert [layer.removed(name) for name in layer.pathways] == [False, True, False]
    assert all((p == 0).all() for p in layer.pathways["free"].parameters())
    torch.testing.assert_close(layer(inputs), everything["rank"])
    layer.enabled["free"] = True
    assert not layer.removed("free")


def test_an_untrained_free_layer_fits_in_place_of_another():
    layer, inputs = layer_of(("p4_conv", "conv"), (P1, P4), (4, 4), (2, 2))
    state = torch.get_rng_state()
    outputs = layer(inputs)
    free, again = (untrained_free_layer(inputs, outputs, layer) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert free(inputs).shape == outputs.shape
    assert free(inputs).dtype == outputs.dtype
    assert torch.equal(free(inputs), again(inputs))
    assert (free.in_group, free.out_group, free.stride) == (P1, P4, (2, 2))
    assert [path.group for path in free.pathways.values()] == [None]


def test_pathways_by_name_on_or_off():
    layer = three_paths()
    layer.enabled["free"] = False
    assert layer.pathways == dict(layer.named_children())
    assert list(layer.pathways) == ["conv", "free", "rank"]


def test_a_pathway_that_is_off_is_not_computed():
    layer, inputs = three_paths(), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    everything = layer.outputs(inputs)
    layer.enabled["free"] = False
    with torch.no_grad():
        layer.get_submodule("free").weight.fill_(torch.nan)
    assert set(layer.outputs(inputs)) == {"conv", "rank"}
    torch.testing.assert_close(layer(inputs), everything["conv"] + everything["rank"])
    layer.enabled["conv"] = False
    torch.testing.assert_close(layer(inputs), everything["rank"])


def test_what_is_off_travels_with_the_weights(tmp_path):
    layer, inputs = three_paths(), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    layer.enabled["rank"] = False
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = three_paths()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert other.enabled == layer.enabled
    assert torch.equal(other(inputs), layer(inputs))


def test_the_state_is_a_copy():
    layer, others = three_paths(), [three_paths(), three_paths()]
    state = layer.state_dict()
    layer.enabled["rank"] = False
    for other in others:
        other.load_state_dict(state)
        assert all(other.enabled.values())
        other.enabled["conv"] = False
