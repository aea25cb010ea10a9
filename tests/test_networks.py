"""Stacks: weight counts, shapes for any image, invariance end to end, memory, start."""

import math
import os
from itertools import pairwise

import pytest
import torch
from cases import KINDS, P2, randomise
from equivariance import assert_equivariant, moved
from references import IDENTITY, Trace, roll_to_largest_grid, silu
from sklearn.datasets import load_digits

from sklearn_softeq import networks
from sklearn_softeq.groups import P1, P4, P4M, PM
from sklearn_softeq.layers import (
    FC,
    PATHWAYS,
    LayerSpec,
    PathwaySum,
    PooledFC,
    SharedLinear,
)
from sklearn_softeq.networks import (
    ACTIVATIONS,
    ARCHITECTURES,
    SCALES,
    ResidualBlock,
    SiLU,
    build_network,
)

PAPER_STRIDES = [(s, s) for s in (1, 2, 1, 2, 1, 2, 2, 2)]
PAPER_CHANNELS = [1, 2, 2, 4, 4, 8, 8, 16]
ALL = tuple(PATHWAYS)


def n_weights(network):
    return sum(p.numel() for p in network.parameters())


def drawn(image_shape, n_outputs=3, **options):
    """A network in float64 with every weight drawn anew, so that no logit is constant."""
    return randomise(build_network(image_shape, n_outputs, dtype=torch.float64, **options))


# ── the stack of the paper, α = 10, images on a canvas of 32×32

CIFAR, DIGIT, QUADRANT = ((3, 32, 32), 10), ((1, 28, 28), 10), ((1, 28, 28), 40)


def paper(task, *pathways):
    image_shape, n_outputs = task
    return build_network(image_shape, n_outputs, pathways=pathways, architecture="paper", width=10)


@pytest.mark.parametrize(
    ("task", "pathways", "expected"),
    [
        (CIFAR, ("conv",), 338_770),
        (CIFAR, ("factored_fc",), 1_542_625),
        (CIFAR, ("factored_fc", "conv"), 1_771_945),
        (CIFAR, ("sparse_fc",), 831_820),
        (CIFAR, ("sparse_conv",), 287_910),
        (CIFAR, ("sparse_fc", "sparse_conv"), 933_990),
        (DIGIT, ("conv",), 338_590),
        (DIGIT, ("factored_fc", "conv"), 1_730_805),
        (QUADRANT, ("conv",), 357_820),
        (QUADRANT, ("factored_fc", "conv"), 1_750_035),
    ],
)
def test_number_of_weights(task, pathways, expected):
    assert n_weights(paper(task, *pathways)) == expected


@pytest.mark.parametrize(
    ("task", "pathways", "expected"),
    [
        (CIFAR, ("fc",), 133_635_690),
        (CIFAR, ("fc", "conv"), 133_865_010),
        (DIGIT, ("fc",), 112_664_170),
        (QUADRANT, ("fc",), 112_683_400),
    ],
)
def test_number_of_weights_of_free_layers(task, pathways, expected, monkeypatch):
    monkeypatch.setattr(networks, "_memory", lambda: 2**50)
    with torch.device("meta"):
        network = paper(task, *pathways)
    assert all(p.is_meta for p in network.parameters())
    assert n_weights(network) == expected


@pytest.mark.parametrize("group", [P4, P4M, PM], ids=lambda group: group.name)
def test_number_of_weights_of_a_group_network(group):
    # C·D·k² in the first layer, C·D·G·k² in the others, a bias and a pooled feature a channel.
    channels = [10 * c for c in PAPER_CHANNELS]
    later = sum(c * d for c, d in pairwise(channels))
    convs = 9 * (3 * 10 + group.order * later) + sum(channels)
    network = paper(CIFAR, f"{group.name}_conv")
    assert n_weights(network) == convs + 109_450


def test_head_of_the_paper():
    network = paper(CIFAR, "conv")
    assert n_weights(network.head) == 109_450
    assert network.head.hidden.weight.shape == (1, 640, 160)
    assert network.head.output.weight.shape == (1, 10, 640)


@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 17, 32), (2, 20, 31)])
def test_auto_is_the_paper_on_its_canvas(image_shape):
    auto, paper = (
        build_network(image_shape, 10, architecture=a, width=2) for a in ("auto", "paper")
    )
    assert [b.stride for b in auto.blocks] == [b.stride for b in paper.blocks] == PAPER_STRIDES
    assert auto.canvas == paper.canvas == (32, 32)
    shapes = [{n: p.shape for n, p in net.named_parameters()} for net in (auto, paper)]
    assert shapes[0] == shapes[1]
    channels = [b.conv.weight.shape[1] for b in paper.blocks]
    assert channels == [2 * c for c in PAPER_CHANNELS]


@pytest.mark.parametrize(
    ("image_shape", "channels"),
    [
        ((1, 1, 64), [1, 1, 1, 2, 2, 2, 2, 4, 4, 4]),
        ((3, 16, 1), [1, 1, 1, 2, 2, 2]),
        ((1, 16, 16), [1, 2, 2, 4, 4, 8]),
        ((1, 2, 16), [1, 2, 2, 4, 4, 8]),
        ((2, 1, 1), [1]),
    ],
    ids=str,
)
def test_channels_grow_half_as_fast_along_one_axis(image_shape, channels):
    network = build_network(image_shape, 2, pathways=("conv",), width=3)
    found = [block.conv.weight.shape[1] for block in network.blocks]
    assert found == [3 * c for c in channels]
    assert network.head.hidden.weight.shape == (1, 4 * found[-1], found[-1])


def test_paper_refuses_large_images():
    with pytest.raises(ValueError, match="at most 32×32.*33×5.*architecture='auto'"):
        build_network((1, 33, 5), 10, architecture="paper")


# ── names


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize("pathways", [("conv", "fc"), ("p4_conv", "sparse_fc")], ids="+".join)
def test_layers_are_named_as_in_the_names_of_their_tensors(pathways, architecture):
    network = build_network((1, 4, 4), 3, pathways=pathways, architecture=architecture)
    owners = {f"{name}.{path}" for name, layer in network.layers.items() for path in layer.pathways}
    tensors = [name for name, _ in network.named_parameters()]
    single = ("head.hidden.weight", "head.hidden.bias", "head.output.weight", "head.output.bias")
    inside = {name.rpartition(".")[0] for name in tensors if name not in single}
    assert {name.removesuffix(".U").removesuffix(".V") for name in inside} == owners
    for name, layer in network.layers.items():
        assert layer is network.get_submodule(name)
    expected = {
        "auto": ["blocks.0", "blocks.1"],
        "resnet": [f"blocks.{i}.{part}" for i in range(2) for part in ("first", "second")],
    }[architecture]
    assert list(network.layers) == expected + ["head.hidden"] * ("p4_conv" in pathways)


def test_interpolations_are_named_after_their_maps():
    network = build_network((1, 4, 4), 3, pathways=("sparse_conv", "conv", "sparse_fc"))
    paths = ("sparse_conv", "sparse_fc.U", "sparse_fc.V")
    expected = [f"blocks.{i}.{path}" for i in range(2) for path in paths]
    assert list(network.interpolations) == expected
    for name, interpolation in network.interpolations.items():
        assert interpolation is network.get_submodule(name).interpolation
    assert build_network((1, 4, 4), 3, pathways=("conv", "fc")).interpolations == {}


@pytest.mark.parametrize(
    ("pathways", "fraction", "expected"),
    [
        (("sparse_conv",), "auto", [7, 7]),
        (("sparse_conv", "sparse_fc"), "auto", [4, 8, 2, 4, 2, 1]),
        (("sparse_conv",), 0.25, [2, 2]),
        (("sparse_conv", "sparse_fc"), 0.25, [2, 4, 1, 2, 1, 1]),
        (("sparse_conv", "sparse_fc"), 1, [9, 16, 4, 9, 4, 1]),
    ],
    ids=str,
)
def test_anchor_fraction(pathways, fraction, expected):
    network = build_network((1, 4, 4), 3, pathways=pathways, anchor_fraction=fraction)
    assert [i.n_anchors for i in network.interpolations.values()] == expected


def test_layer_inputs_are_what_each_layer_sees():
    network = drawn((1, 3, 4), pathways=("p4_conv", "conv"), architecture="resnet", width=1)
    images = torch.randn(5, 1, 3, 4, dtype=torch.float64)
    seen = network.layer_inputs(images)
    assert list(seen) == list(network.layers)
    features = network.pad(images)
    for i, block in enumerate(network.blocks):
        assert torch.equal(seen[f"blocks.{i}.first"], features)
        inner = silu(block.first(features))
        torch.testing.assert_close(seen[f"blocks.{i}.second"], inner)
        features = block(features)
    torch.testing.assert_close(seen["head.hidden"], features)
    assert not any(tensor.requires_grad for tensor in seen.values())
    assert not any(module._forward_pre_hooks for module in network.modules())


# ── any image

IMAGE_SHAPES = [(1, 1, 1), (1, 1, 2), (1, 1, 7), (2, 5, 3), (4, 2, 2), (1, 8, 8), (3, 64, 64)]


def strides(block):
    return block.first.stride if isinstance(block, ResidualBlock) else block.stride


@pytest.mark.parametrize("image_shape", IMAGE_SHAPES, ids=str)
@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_every_image_gives_finite_outputs(image_shape, n_outputs, architecture):
    network = build_network(image_shape, n_outputs, width=1, architecture=architecture)
    outputs = network(torch.randn(4, *image_shape))
    assert outputs.shape == (4, n_outputs)
    assert torch.isfinite(outputs).all()
    # There is a block; the grid ends at one pixel, halving only sides of more than one.
    assert len(network.blocks) >= 1
    grid = network.canvas
    for block in network.blocks:
        assert all(s == 1 or side > 1 for side, s in zip(grid, strides(block), strict=True))
        grid = tuple(side // s for side, s in zip(grid, strides(block), strict=True))
    assert grid == (1, 1)
    for side, image_side in zip(network.canvas, image_shape[1:], strict=True):
        assert image_side <= side < 2 * image_side
        assert math.log2(side).is_integer()


@pytest.mark.parametrize(
    ("pathways", "canvas"),
    [
        (("conv", "fc"), (4, 8)),
        (("pm_conv",), (4, 8)),
        (("p4_conv",), (8, 8)),
        (("fc", "p4m_conv"), (8, 8)),
    ],
    ids=str,
)
def test_the_canvas_is_a_square_where_a_group_needs_it(pathways, canvas):
    assert build_network((1, 3, 7), 2, pathways=pathways, width=1).canvas == canvas


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize("pathways", [*((name,) for name in ALL), ALL], ids="+".join)
def test_every_choice_of_pathways(pathways, architecture):
    network = build_network((2, 4, 3), 3, pathways=pathways, width=2, architecture=architecture)
    assert network(torch.randn(5, 2, 4, 3)).shape == (5, 3)
    for name, layer in network.layers.items():
        assert list(layer.pathways) == (["pooled", "free"] if "head" in name else list(pathways))


@pytest.mark.parametrize(
    ("image_shape", "pathways", "architecture"),
    [
        ((2, 4, 3), ALL, "auto"),
        ((1, 8, 8), ("conv", "fc", "factored_fc"), "auto"),
        ((1, 3, 8), ("pm_conv", "sparse_fc"), "auto"),
        ((1, 4, 4), ("p4_conv", "pm_conv"), "auto"),
        ((3, 4, 4), ("conv", "sparse_conv"), "resnet"),
        ((2, 4, 3), ALL, "resnet"),
        ((9, 2, 2), ("p4_conv", "conv"), "resnet"),
    ],
    ids=str,
)
def test_against_the_slow_stack(image_shape, pathways, architecture):
    network = drawn(image_shape, pathways=pathways, architecture=architecture, width=1)
    images = torch.randn(3, *image_shape, dtype=torch.float64)
    expected = torch.stack([Trace().run(network, "", image) for image in images]).detach()
    torch.testing.assert_close(network(images), expected, atol=1e-10, rtol=1e-10)


def test_images_are_centred_on_zeros():
    network = build_network((2, 5, 3), 3)
    images = torch.randn(2, 2, 5, 3)
    padded = network.pad(images)
    assert padded.shape == (2, 2, 8, 4)
    assert torch.equal(padded[:, :, 1:6, 0:3], images)
    assert padded.count_nonzero() == images.count_nonzero()


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize("pathways", [("conv", "factored_fc"), ("p4m_conv", "sparse_fc")], ids=str)
def test_a_row_does_not_depend_on_its_mates(pathways, architecture):
    network = drawn((2, 8, 8), pathways=pathways, architecture=architecture, width=2)
    images = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    images *= torch.logspace(-2, 2, 6, dtype=torch.float64)[:, None, None, None]
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=1e-11)


# ── invariance end to end


def changes(network, images, group):
    """Largest change of a logit for each element of a group followed by each shift."""
    moves = moved(network.pad(images), group)
    logits = network(torch.cat(list(moves.values()))).unflatten(0, (-1, len(images)))
    change = (logits - network(images)).abs().flatten(1).amax(1)
    return dict(zip(moves, change.tolist(), strict=True))


def assert_invariant(network, images, group):
    assert network(images).std(0).min() > 1e-4, "constant logits test nothing"
    assert max(changes(network, images, group).values()) < 1e-10


@pytest.mark.parametrize("image_shape", [(2, 8, 8), (1, 4, 8), (3, 2, 2), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("pathways", [("conv",), ("sparse_conv",)], ids=str)
@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_convolutions_alone_are_invariant_to_shifts(image_shape, pathways, architecture):
    network = drawn(image_shape, pathways=pathways, architecture=architecture, width=4)
    assert_invariant(network, torch.randn(5, *image_shape, dtype=torch.float64), P1)


@pytest.mark.parametrize("image_shape", [(1, 3, 5), (2, 4, 4), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("group", [P4, P4M, PM], ids=lambda group: group.name)
@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_a_strict_group_network_is_invariant(image_shape, group, architecture):
    pathways = (f"{group.name}_conv",)
    network = drawn(image_shape, pathways=pathways, architecture=architecture, width=3)
    images = torch.randn(4, *image_shape, dtype=torch.float64)
    if group.needs_square:
        assert network.canvas[0] == network.canvas[1]
    assert_invariant(network, images, group)


def test_images_are_invariant_on_the_canvas_they_are_padded_to():
    network = drawn((1, 3, 5), 2, pathways=("conv",), width=4)
    assert network.canvas == (4, 8)
    assert_invariant(network, torch.randn(4, 1, 3, 5, dtype=torch.float64), P1)


def test_a_further_group_needs_no_other_code(monkeypatch):
    monkeypatch.setitem(PATHWAYS, "p2_conv", KINDS["p2_conv"])
    images = torch.randn(4, 1, 3, 5, dtype=torch.float64)
    for architecture in ("auto", "resnet"):
        network = drawn((1, 3, 5), pathways=("p2_conv",), architecture=architecture, width=3)
        assert_invariant(network, images, P2)
        assert isinstance(network.head.hidden, PooledFC)
    mixed = build_network((1, 3, 5), 3, pathways=("p2_conv", "pm_conv", "conv"), width=1)
    assert mixed.blocks[0].out_group.order == 4
    assert mixed(images.float()).shape == (4, 3)


@pytest.mark.parametrize("free", ["fc", "factored_fc", "sparse_fc"])
@pytest.mark.parametrize("strict", ["conv", "p4_conv"])
def test_a_free_pathway_breaks_the_invariance(free, strict):
    network = drawn((1, 4, 4), 2, pathways=(strict, free), width=4)
    images = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    broken = changes(network, images, P1)
    assert broken.pop((IDENTITY, (0, 0))) < 1e-10
    assert min(broken.values()) > 0.01 * network(images).abs().max()


@pytest.mark.parametrize(
    ("pathways", "turn"),
    [
        (("conv",), P4),
        (("p4_conv",), PM),
        (("pm_conv",), P4),
        (("p4_conv", "conv"), P4),
        (("p4_conv", "pm_conv"), P4),
        (("p4_conv", "pm_conv"), PM),
    ],
    ids=str,
)
def test_invariant_to_shifts_and_no_more(pathways, turn):
    network = drawn((1, 4, 4), pathways=pathways, width=3)
    images = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    assert_invariant(network, images, P1)
    for (g, _), change in changes(network, images, turn).items():
        assert g == IDENTITY or change > 1e-3


# ── groups in a network


@pytest.mark.parametrize(
    ("pathways", "group"),
    [
        (("conv", "fc"), P1),
        (("p4_conv", "fc"), P4),
        (("conv", "pm_conv"), PM),
        (("p4_conv", "p4m_conv"), P4M),
        (("p4_conv", "pm_conv"), P4M),
    ],
    ids=str,
)
def test_features_live_in_the_group_of_all_pathways(pathways, group):
    network = build_network((2, 4, 4), 3, pathways=pathways, width=2)
    axes = [(layer.in_group, layer.out_group) for layer in network.blocks]
    assert [set(before.matrices) for before, _ in axes] == [set(P1.matrices), set(group.matrices)]
    assert all(set(after.matrices) == set(group.matrices) for _, after in axes)
    seen = network.layer_inputs(torch.randn(3, 2, 4, 4))
    assert seen["blocks.1"].shape == (3, 2 * group.order, 2, 2)
    # α, then 2 α for each orientation; the paper's readout has 4 units for each channel of these
    assert network.head.output.weight.shape == (1, 3, 4 * 2 * 2)


@pytest.mark.parametrize("pathways", [("p4_conv",), ("p4m_conv",), ("pm_conv",)], ids="+".join)
def test_a_strict_network_reads_pooled_features_only(pathways):
    hidden = build_network((1, 4, 4), 3, pathways=pathways, width=2).head.hidden
    assert isinstance(hidden, PooledFC)
    assert hidden.weight.shape == (1, 16, 4)


@pytest.mark.parametrize(
    "pathways", [("p4_conv", "conv"), ("pm_conv", "fc"), ("p4_conv", "p4m_conv")], ids="+".join
)
@pytest.mark.parametrize(("scale", "factor"), [("mean", 0.5), ("sqrt", 0.5**0.5), ("symmetric", 1)])
def test_a_mixed_network_reads_orientations_too(pathways, scale, factor):
    network = build_network((1, 4, 4), 3, pathways=pathways, width=2, scale=scale)
    hidden = network.head.hidden
    order = network.blocks[0].out_group.order
    assert {name: type(path) for name, path in hidden.pathways.items()} == {
        "pooled": PooledFC,
        "free": FC,
    }
    assert hidden.scale == pytest.approx(factor)
    assert hidden.free.weight.shape == (1, 16, 4 * order)
    assert hidden.pooled.weight.shape == (1, 16, 4)
    assert hidden.less_symmetric == ["free"]
    assert (hidden.in_group, hidden.out_group) == (network.blocks[-1].out_group, P1)
    features = torch.randn(2, 4 * order, 1, 1)
    pooled = features.view(2, 4, order, 1, 1).amax(2)
    expected = pooled.flatten(1) @ hidden.pooled.weight[0].T + hidden.pooled.bias
    expected = expected + features.flatten(1) @ hidden.free.weight[0].T + hidden.free.bias
    torch.testing.assert_close(hidden(features).flatten(1), factor * expected)


# ── residual stacks


def test_depth_of_the_residual_stack_is_18():
    network = build_network((3, 32, 32), 10, pathways=("conv",), architecture="resnet", width=1)
    maps = [name for name, m in network.named_modules() if isinstance(m, SharedLinear)]
    assert len(maps) == 18
    assert [strides(block) for block in network.blocks] == PAPER_STRIDES
    assert all(block.second.stride == (1, 1) for block in network.blocks)
    assert [block.out_channels for block in network.blocks] == PAPER_CHANNELS
    assert ARCHITECTURES["resnet"](32, 32)[:2] == ARCHITECTURES["auto"](32, 32)[:2]


def block_of(channels, stride, axes=(P1, P1), kind="conv"):
    """A residual block from C to D channels on 4×4 pixels."""
    (c, d), (before, after) = channels, axes
    grid = (4 // stride[0], 4 // stride[1])
    first = LayerSpec(c, d, (4, 4), stride, before, after)
    second = LayerSpec(d, d, grid, (1, 1), after, after)
    layers = [
        PathwaySum({kind: KINDS[kind].build(spec)}, spec.stride, 0.7, spec.in_group, spec.out_group)
        for spec in (first, second)
    ]
    return randomise(ResidualBlock(*layers, SiLU(), d)).double()


def silence(block):
    for path in block.second.pathways.values():
        path.silence()
    return block


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("channels", [(3, 3), (2, 5), (4, 3)], ids=str)
def test_a_silent_branch_leaves_the_identity(channels, stride):
    block, inputs = silence(block_of(channels, stride)), torch.randn(6, channels[0], 4, 4).double()
    kept = [roll_to_largest_grid(x, stride)[:, :: stride[0], :: stride[1]] for x in inputs]
    outputs, shared = block(inputs), min(channels)
    assert torch.equal(outputs[:, :shared], torch.stack(kept)[:, :shared])
    assert (outputs[:, shared:] == 0).all()
    assert outputs.shape[1] == channels[1]


@pytest.mark.parametrize("channels", [(2, 8), (3, 20), (3, 8)], ids=str)
def test_the_identity_lifts_an_image(channels):
    block = silence(block_of(channels, (1, 1), (P1, P4), "p4_conv"))
    inputs = torch.randn(3, channels[0], 4, 4).double()
    outputs, lifted = block(inputs), 4 * channels[0]
    for d in range(channels[1]):
        expected = inputs[:, d // 4] if d < lifted else torch.zeros(3, 4, 4)
        assert torch.equal(outputs[:, d], expected.double())


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_a_block_is_the_identity_and_two_layers(stride):
    block, inputs = block_of((3, 5), stride), torch.randn(6, 3, 4, 4).double()
    hidden = silu(block.first(inputs))
    expected = silence(block_of((3, 5), stride))(inputs) + block.second(hidden)
    torch.testing.assert_close(block(inputs), expected)


@pytest.mark.parametrize("group", [P1, P2, P4, P4M, PM], ids=lambda group: group.name)
@pytest.mark.parametrize("lifted", [True, False], ids=["lifted", "oriented"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_a_block_is_equivariant(group, lifted, stride):
    before = P1 if lifted else group
    kind = "conv" if group is P1 else f"{group.name}_conv"
    block = block_of((2 * before.order, 3 * group.order), stride, (before, group), kind)
    inputs = torch.randn(4, 2 * before.order, 4, 4, dtype=torch.float64)
    assert_equivariant(block, inputs, group, (before, group), stride)


@pytest.mark.parametrize("scale", SCALES)
def test_branches_are_divided_by_the_root_of_their_number(scale):
    pathways = ("conv", "factored_fc")
    network = build_network((1, 8, 8), 3, pathways=pathways, architecture="resnet", scale=scale)
    plain = build_network((1, 8, 8), 3, pathways=pathways, scale=scale).blocks[0].scale
    n_blocks = len(network.blocks)
    assert n_blocks == 4
    for block in network.blocks:
        assert block.first.scale == plain
        assert block.second.scale == pytest.approx(plain / (2 * n_blocks) ** 0.5)


# ── start

MIXED = ("p4_conv", "conv", "fc")


@pytest.mark.parametrize(
    ("scale", "pathways", "divisor"),
    [
        ("mean", ("conv",), 1),
        ("mean", ("conv", "fc"), 2),
        ("mean", MIXED, 3),
        ("sqrt", ("conv",), 1),
        ("sqrt", ("conv", "fc"), 2**0.5),
        ("sqrt", MIXED, 3**0.5),
        ("symmetric", ("conv",), 1),
        ("symmetric", ("conv", "fc"), 1),
        ("symmetric", MIXED, 1),
        ("symmetric", ("fc", "factored_fc"), 2**0.5),
        ("symmetric", ("conv", "sparse_conv", "fc"), 2**0.5),
        ("symmetric", ("p4_conv", "p4m_conv"), 1),
        ("symmetric", ("p4_conv", "pm_conv", "conv"), 2**0.5),
    ],
    ids=str,
)
def test_scale(scale, pathways, divisor):
    network = build_network((1, 2, 2), 2, pathways=pathways, scale=scale)
    assert [block.scale for block in network.blocks] == pytest.approx([1 / divisor])
    assert set(SCALES) == {"mean", "sqrt", "symmetric"}


@pytest.mark.parametrize(
    "pathways",
    [("conv",), ("fc",), ("conv", "fc"), ("p4_conv",), ("sparse_conv",), ("p4m_conv", "conv")],
    ids="+".join,
)
def test_signals_keep_their_size(pathways):
    options = {"width": 8, "scale": "sqrt", "activation": "relu"}
    network = build_network((3, 16, 16), 10, pathways=pathways, **options)
    features = network.pad(torch.randn(50, 3, 16, 16))
    for block in network.blocks:
        features = torch.relu(block(features))
        assert 0.2 < features.square().mean() < 5
    assert 0.2 < network.head(features).square().mean() < 10


@pytest.mark.parametrize(
    "pathways",
    [*((name,) for name in ALL), ("conv", "fc"), ("sparse_conv", "factored_fc")],
    ids="+".join,
)
def test_signals_keep_their_size_through_18_layers(pathways):
    width = 1 if "fc" in pathways else 2
    network = build_network((3, 32, 32), 10, pathways=pathways, architecture="resnet", width=width)
    features = torch.randn(20, 3, 32, 32)
    for block in network.blocks:
        features = block(features)
        assert 0.05 < features.square().mean() < 5
    assert 0.05 < network.head(features).square().mean() < 20


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_activation(architecture):
    assert set(ACTIVATIONS) == {"silu", "relu"}
    options, images = {"architecture": architecture, "width": 2}, torch.randn(4, 1, 8, 8)
    generators = (torch.Generator().manual_seed(0) for _ in range(3))
    default, smooth, rectified = (
        build_network((1, 8, 8), 3, generator=generator, **options, **more)
        for generator, more in zip(
            generators, ({}, {"activation": "silu"}, {"activation": "relu"}), strict=True
        )
    )
    assert torch.equal(default(images), smooth(images))
    for network, function in ((smooth, silu), (rectified, torch.relu)):
        features = images
        for block in network.blocks:
            if architecture == "auto":
                features = function(block(features))
            else:
                features = block._skip(features) + block.second(function(block.first(features)))
        hidden = function(network.head.hidden(features))
        torch.testing.assert_close(network(images), network.head.output(hidden).flatten(1))


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_start_draws_every_weight_and_leaves_biases_at_zero(architecture):
    network = build_network((1, 4, 4), 3, pathways=ALL, architecture=architecture)
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert p.std() > 0 if p.numel() > 1 else (p != 0).all()


def test_start_follows_the_global_seed():
    first, again, other = (
        torch.manual_seed(seed) and build_network((1, 4, 4), 3).state_dict() for seed in (1, 1, 2)
    )
    weights = [name for name in first if name.endswith("weight")]
    assert all(torch.equal(first[name], again[name]) for name in weights)
    assert not any(torch.equal(first[name], other[name]) for name in weights)


def test_start_follows_a_generator_and_leaves_the_global_one():
    state = torch.get_rng_state()
    first, again = (
        build_network((1, 4, 4), 3, pathways=ALL, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), again.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    network = build_network((1, 4, 4), 3, pathways=ALL, dtype=dtype)
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert {i.matrix.dtype for i in network.interpolations.values()} == {dtype}
    assert network(torch.randn(2, 1, 4, 4, dtype=dtype)).dtype == dtype


# ── memory


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch):
    def allocate(*args):
        raise AssertionError("a weight was drawn")

    monkeypatch.setattr(SharedLinear, "draw", allocate)
    # 1e15 weights: even an attempt to allocate them would fail in another way.
    with pytest.raises(ValueError, match="'blocks.1.fc.weight'.*'factored_fc' in place of 'fc'"):
        build_network((3, 2048, 2048), 10, pathways=("conv", "fc"))


def assert_needs(monkeypatch, needed, match, **options):
    monkeypatch.setattr(networks, "_memory", lambda: needed)
    build_network(**options)
    monkeypatch.setattr(networks, "_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=match):
        build_network(**options)


def test_memory_counts_weights_moments_factors_and_eigenvalues(monkeypatch):
    # One block 1×1 → 1×1 with one channel of width 1, then 1 → 4 → 3: five tensors of weights.
    options = {"image_shape": (1, 1, 1), "n_outputs": 3, "width": 1, "pathways": ("fc",)}
    count = n_weights(build_network(**options))
    assert count == (1 + 1) + (4 + 4) + (12 + 3)
    factors = (1 + 1) + (1 + 16) + (16 + 9)
    needed = 16 * count + 16 * factors + 16 * 12
    match = f"{count} weights.*'head.output.weight'.*{needed} bytes"
    assert_needs(monkeypatch, needed, match, **options)
    # Factors that K-FAC does not invert are not kept.
    monkeypatch.setattr(networks, "LARGEST_INVERTED", 3)
    assert_needs(monkeypatch, needed - 8 * (16 + 16), f"{needed - 8 * 32} bytes", **options)


def test_memory_counts_interpolations_and_solving_for_them(monkeypatch):
    # The same with U and V at one anchor each, once solved and once while they are.
    options = {"image_shape": (1, 1, 1), "n_outputs": 3, "width": 1, "pathways": ("sparse_fc",)}
    count = n_weights(build_network(**options))
    assert count == (1 + 1 + 1) + (4 + 4) + (12 + 3)
    factors = (1 + 1) + (1 + 1) + (1 + 16) + (16 + 9)
    needed = 16 * count + 16 * factors + 16 * 12 + 4 * (1 + 1) + 4 * 8 * 1 * (1 + 1)
    assert_needs(monkeypatch, needed, f"{count} weights.*{needed} bytes", **options)


def test_memory_of_this_machine():
    assert networks._memory() > 2**20


@pytest.mark.parametrize("error", [None, ValueError, OSError])
def test_memory_of_a_machine_that_does_not_tell(error, monkeypatch):
    def refuse(name):
        raise error(name)

    if error is None:  # as on Windows
        monkeypatch.delattr(os, "sysconf", raising=False)
    else:
        monkeypatch.setattr(os, "sysconf", refuse, raising=False)
    assert networks._memory() == 2**34
    build_network((1, 4, 4), 3)  # what is of common size is let pass


@pytest.mark.slow
@pytest.mark.parametrize("pathways", [("conv",), ("conv", "factored_fc")], ids="+".join)
def test_a_resnet_of_depth_18_trains_from_its_start(pathways):
    X, y = load_digits(n_class=5, return_X_y=True)
    images = torch.tensor(X[:128], dtype=torch.float32).view(-1, 1, 8, 8)
    images = ((images - images.mean()) / images.std()).repeat_interleave(4, 2)
    images, labels = images.repeat_interleave(4, 3), torch.tensor(y[:128])  # 32×32
    generator = torch.Generator().manual_seed(0)
    options = {"architecture": "resnet", "width": 4, "generator": generator}
    network = build_network((1, 32, 32), 5, pathways=pathways, **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < math.log(5) / 3
