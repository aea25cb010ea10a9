"""Stacks: weight counts, shapes for any image, invariance end to end, memory, start."""

import math
from itertools import product

import pytest
import torch
from cases import randomise
from references import Trace

from sklearn_softeq import networks
from sklearn_softeq.layers import PATHWAYS
from sklearn_softeq.networks import SCALES, build_network

PAPER_STRIDES = [(s, s) for s in (1, 2, 1, 2, 1, 2, 2, 2)]
PAPER_CHANNELS = [1, 2, 2, 4, 4, 8, 8, 16]


def n_weights(network):
    return sum(p.numel() for p in network.parameters())


# ── the stack of the paper, α = 10, images on a canvas of 32×32


@pytest.mark.parametrize(
    ("image_shape", "n_outputs", "pathways", "expected"),
    [
        ((3, 32, 32), 10, ("conv",), 338_770),
        ((3, 32, 32), 10, ("factored_fc",), 1_542_625),
        ((3, 32, 32), 10, ("conv", "factored_fc"), 1_771_945),
        ((1, 28, 28), 10, ("conv",), 338_590),
        ((1, 28, 28), 10, ("conv", "factored_fc"), 1_730_805),
        ((1, 28, 28), 40, ("conv",), 357_820),
        ((1, 28, 28), 40, ("factored_fc", "conv"), 1_750_035),
    ],
)
def test_number_of_weights(image_shape, n_outputs, pathways, expected):
    network = build_network(
        image_shape, n_outputs, pathways=pathways, architecture="paper", width=10
    )
    assert n_weights(network) == expected


@pytest.mark.parametrize(
    ("channels", "n_outputs", "pathways", "expected"),
    [
        (3, 10, ("fc",), 133_635_690),
        (3, 10, ("fc", "conv"), 133_865_010),
        (1, 10, ("fc",), 112_664_170),
        (1, 40, ("fc",), 112_683_400),
    ],
)
def test_number_of_weights_of_free_layers(channels, n_outputs, pathways, expected):
    with torch.device("meta"):
        network = networks._assemble(
            channels, n_outputs, pathways, (32, 32), PAPER_STRIDES, 10, "mean"
        )
    assert n_weights(network) == expected


def test_head_of_the_paper():
    network = build_network((3, 32, 32), 10, pathways=("conv",), architecture="paper", width=10)
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


def test_layers_are_named_as_in_the_names_of_their_tensors():
    network = build_network((1, 4, 4), 3, pathways=("conv", "fc"))
    owners = {f"{name}.{path}" for name, layer in network.layers.items() for path in layer.pathways}
    tensors = [name for name, _ in network.named_parameters() if not name.startswith("head.")]
    assert {name.rpartition(".")[0] for name in tensors} == owners
    for name, layer in network.layers.items():
        assert layer is network.get_submodule(name)


def test_paper_refuses_large_images():
    with pytest.raises(ValueError, match="at most 32×32.*33×5.*architecture='auto'"):
        build_network((1, 33, 5), 10, architecture="paper")


# ── any image

IMAGE_SHAPES = [(1, 1, 1), (1, 1, 2), (1, 1, 7), (2, 5, 3), (4, 2, 2), (1, 8, 8), (3, 64, 64)]


@pytest.mark.parametrize("image_shape", IMAGE_SHAPES, ids=str)
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_every_image_gives_finite_outputs(image_shape, n_outputs):
    network = build_network(image_shape, n_outputs, width=1)
    outputs = network(torch.randn(4, *image_shape))
    assert outputs.shape == (4, n_outputs)
    assert torch.isfinite(outputs).all()
    # There is a block; the grid ends at one pixel, halving only sides of more than one.
    assert len(network.blocks) >= 1
    grid = network.canvas
    for block in network.blocks:
        assert all(s == 1 or side > 1 for side, s in zip(grid, block.stride, strict=True))
        grid = tuple(side // s for side, s in zip(grid, block.stride, strict=True))
    assert grid == (1, 1)
    for side, image_side in zip(network.canvas, image_shape[1:], strict=True):
        assert image_side <= side < 2 * image_side
        assert math.log2(side).is_integer()


@pytest.mark.parametrize("pathways", [("conv",), ("fc",), ("factored_fc",), tuple(PATHWAYS)])
def test_every_choice_of_pathways(pathways):
    network = build_network((2, 4, 3), 3, pathways=pathways, width=2)
    assert network(torch.randn(5, 2, 4, 3)).shape == (5, 3)
    for block in network.blocks:
        assert [name for name, _ in block.named_children()] == list(pathways)


@pytest.mark.parametrize("image_shape", [(2, 4, 3), (1, 8, 8)], ids=str)
def test_against_the_slow_stack(image_shape):
    network = build_network(image_shape, 3, pathways=tuple(PATHWAYS), width=2)
    network = randomise(network).double()
    images = torch.randn(3, *image_shape, dtype=torch.float64)
    expected = torch.stack([Trace().run(network, "", image) for image in images])
    torch.testing.assert_close(network(images), expected, atol=1e-10, rtol=1e-10)


def test_images_are_centred_on_zeros():
    network = build_network((2, 5, 3), 3)
    images = torch.randn(2, 2, 5, 3)
    padded = network.pad(images)
    assert padded.shape == (2, 2, 8, 4)
    assert torch.equal(padded[:, :, 1:6, 0:3], images)
    assert padded.count_nonzero() == images.count_nonzero()


def test_a_row_does_not_depend_on_its_mates():
    network = randomise(build_network((2, 8, 8), 3, dtype=torch.float64))
    images = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    images *= torch.logspace(-2, 2, 6, dtype=torch.float64)[:, None, None, None]
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("image_shape", [(2, 8, 8), (1, 4, 8), (3, 2, 2), (1, 1, 16)], ids=str)
def test_convolutions_alone_are_invariant_end_to_end(image_shape):
    # Every weight is drawn anew, wide enough that no layer is dead and no logit constant.
    network = randomise(
        build_network(image_shape, 3, pathways=("conv",), width=4, dtype=torch.float64)
    )
    images = torch.randn(5, *image_shape, dtype=torch.float64)
    logits = network(images)
    assert logits.std(0).min() > 1e-4
    for g in product(range(image_shape[1]), range(image_shape[2])):
        moved = network(torch.roll(images, g, (2, 3)))
        torch.testing.assert_close(moved, logits, atol=1e-10, rtol=0)


def test_images_are_invariant_on_the_canvas_they_are_padded_to():
    network = randomise(
        build_network((1, 3, 5), 2, pathways=("conv",), width=4, dtype=torch.float64)
    )
    images = torch.randn(4, 1, 3, 5, dtype=torch.float64)
    canvas = network.pad(images)
    for g in product(range(4), range(8)):
        moved = network(torch.roll(canvas, g, (2, 3)))
        torch.testing.assert_close(moved, network(images), atol=1e-10, rtol=0)


@pytest.mark.parametrize("free", ["fc", "factored_fc"])
def test_a_free_pathway_breaks_the_invariance(free):
    network = randomise(
        build_network((1, 4, 4), 2, pathways=("conv", free), width=4, dtype=torch.float64)
    )
    images = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    change = network(torch.roll(images, (1, 2), (2, 3))) - network(images)
    assert change.norm() > 0.05 * network(images).norm()


# ── start


@pytest.mark.parametrize(("scale", "factors"), [("mean", (1, 1 / 2, 1 / 3)), ("sum", (1, 1, 1))])
def test_scale(scale, factors):
    for p, factor in enumerate(factors, start=1):
        network = build_network((1, 2, 2), 2, pathways=tuple(PATHWAYS)[:p], scale=scale)
        assert [block.scale for block in network.blocks] == [factor]


def test_sqrt_scale_and_the_table():
    assert set(SCALES) == {"mean", "sqrt", "sum"}
    for p in (1, 2, 3):
        network = build_network((1, 2, 2), 2, pathways=tuple(PATHWAYS)[:p], scale="sqrt")
        assert [block.scale for block in network.blocks] == pytest.approx([p**-0.5])


@pytest.mark.parametrize("pathways", [("conv",), ("fc",), ("conv", "fc")])
def test_signals_keep_their_size(pathways):
    network = build_network((3, 16, 16), 10, pathways=pathways, width=16, scale="sqrt")
    features = network.pad(torch.randn(50, 3, 16, 16))
    for block in network.blocks:
        features = torch.relu(block(features))
        assert 0.2 < features.square().mean() < 5
    assert 0.2 < network.head(features).square().mean() < 10


def test_start_draws_every_weight_and_leaves_biases_at_zero():
    network = build_network((1, 4, 4), 3, pathways=tuple(PATHWAYS))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    network = build_network((1, 4, 4), 3, dtype=dtype)
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert network(torch.randn(2, 1, 4, 4, dtype=dtype)).dtype == dtype


# ── memory


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch):
    def allocate(*args):
        raise AssertionError("a weight was drawn")

    monkeypatch.setattr(torch.nn.init, "uniform_", allocate)
    # 1e15 weights: even an attempt to allocate them would fail in another way.
    with pytest.raises(ValueError, match="'blocks.1.fc.weight'.*'factored_fc' in place of 'fc'"):
        build_network((3, 2048, 2048), 10, pathways=("conv", "fc"))


def test_memory_counts_weights_moments_factors_and_eigenvalues(monkeypatch):
    # One block 1×1 → 1×1 with one channel of width 1, then 1 → 4 → 3: five tensors of weights.
    network = build_network((1, 1, 1), 3, width=1, pathways=("fc",))
    count = n_weights(network)
    assert count == (1 + 1) + (4 + 4) + (12 + 3)
    factors = (1 + 1) + (1 + 16) + (16 + 9)
    needed = 16 * count + 8 * factors + 16 * 12
    monkeypatch.setattr(networks, "_memory", lambda: needed)
    build_network((1, 1, 1), 3, width=1, pathways=("fc",))
    monkeypatch.setattr(networks, "_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=f"{count} weights.*'head.output.weight'.*{needed} bytes"):
        build_network((1, 1, 1), 3, width=1, pathways=("fc",))


def test_memory_of_this_machine():
    assert networks._memory() > 2**20
