"""Moments of patches and of gradients against loops over positions and taps."""

import math
from itertools import product

import pytest
import torch
from cases import P2, LayerCase

from sklearn_softeq.groups import P1, P4, P4M, PM
from sklearn_softeq.layers import outer
from sklearn_softeq.layers.conv import circular_gram

# Sides from one pixel, with a kernel of one tap there, to more than the kernel's.
GRIDS = [(1, 1), (1, 4), (3, 1), (2, 2), (2, 3), (3, 3), (3, 5), (4, 2), (4, 4), (5, 4), (5, 5)]
KERNELS = [(1, 1), (1, 3), (3, 1), (3, 3), (5, 3), (5, 5)]
FITTING = [
    (grid, kernel)
    for grid, kernel in product(GRIDS, KERNELS)
    # The patch of a side of one pixel has one tap; other patches wrap around once at most.
    if all(taps == 1 or 1 < taps <= side + 1 for taps, side in zip(kernel, grid, strict=True))
]


def images(n, channels, grid):
    return torch.randn(n, channels, *grid, dtype=torch.float64)


def some_weights():
    """One of them zero."""
    return torch.tensor([0.3, 2.5, 0.0, 1.2], dtype=torch.float64)


def moments(inputs, weights, kernel, stride=(1, 1)):
    """Σ_n w_n Σ_y patch patchᵀ, (C·k², C·k²), tap by tap at each kept position."""
    channels, height, width = inputs.shape[1:]
    taps = list(product(*(range(-(side // 2), side // 2 + 1) for side in kernel)))
    total = inputs.new_zeros(channels, len(taps), channels, len(taps))
    for i, j in product(range(0, height, stride[0]), range(0, width, stride[1])):
        seen = [inputs[:, :, (i + a) % height, (j + b) % width] for a, b in taps]
        for (u, left), (v, right) in product(enumerate(seen), repeat=2):
            total[:, u, :, v] += (weights * left.T) @ right
    return total.flatten(2).flatten(0, 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


# ── inputs


@pytest.mark.parametrize(("grid", "kernel"), FITTING, ids=str)
def test_circular_gram_against_the_slow_loop(grid, kernel):
    inputs = images(2, 3, grid)
    close(circular_gram(inputs, kernel), moments(inputs, torch.ones(2).double(), kernel))


def test_circular_gram_of_one_channel_is_toeplitz():
    # The pixels of a 1×5 torus once: offsets of 0, ±1 and ±2 between taps.
    x = torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    near, far = 1 * 2 + 3 * 1, 2 * 3
    expected = torch.tensor([[14.0, near, far], [near, 14.0, near], [far, near, 14.0]])
    close(circular_gram(x[None, None, None], (1, 3)), expected.double())


def test_circular_gram_in_float32():
    inputs = images(3, 2, (4, 6))
    found = circular_gram(inputs.float(), (3, 3))
    assert found.dtype == torch.float32
    expected = moments(inputs, torch.ones(3).double(), (3, 3))
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


STRIDED = [
    ((4, 6), (1, 1)),
    ((3, 5), (1, 1)),
    ((5, 2), (1, 1)),
    ((2, 2), (2, 2)),
    ((4, 6), (2, 2)),
    ((3, 4), (1, 2)),
    ((6, 5), (2, 1)),
    ((1, 6), (1, 2)),
    ((1, 3), (1, 1)),
    ((8, 1), (2, 1)),
    ((1, 16), (1, 2)),
]
SQUARE = [((2, 2), (1, 1)), ((3, 3), (1, 1)), ((5, 5), (1, 1)), ((4, 4), (1, 2)), ((4, 4), (2, 2))]
each_stride = pytest.mark.parametrize(("grid", "stride"), STRIDED, ids=str)


@each_stride
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_moments_of_the_patches_of_a_convolution(grid, stride, weighted):
    case = LayerCase("conv", (2, 3), grid, stride)
    layer, inputs = case.pathway(), case.inputs(n=4)
    weights = some_weights() if weighted else torch.ones(4).double()
    kernel = tuple(1 if side == 1 else 3 for side in grid)
    found = layer.input_gram(inputs, weights.sqrt() if weighted else None)
    close(found, moments(inputs, weights, kernel, stride)[None])


def gram_cases():
    for geometry in STRIDED:
        yield LayerCase("conv", (2, 3), *geometry)
        yield LayerCase("sparse_conv", (2, 3), *geometry)
        yield LayerCase("sparse_conv", (3, 2), *geometry, anchor_fraction=1.0)
        yield LayerCase("pm_conv", (2, 1), *geometry, PM, PM)
        yield LayerCase("p2_conv", (2, 3), *geometry, P1, P2)
    for geometry in SQUARE:
        yield LayerCase("p4_conv", (2, 1), *geometry, P4, P4)
        yield LayerCase("p4m_conv", (1, 2), *geometry, P1, P4M)
        yield LayerCase("pm_conv", (1, 3), *geometry, P4M, P4M)


CASES = list(gram_cases())
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_input_gram_is_the_outer_product_of_the_tokens(case):
    layer, inputs = case.pathway(), case.inputs(n=4)
    tokens = layer.input_tokens(inputs)
    close(layer.input_gram(inputs, None), outer(tokens, tokens))
    weights = some_weights()
    weighted = tokens * weights[:, None, None, None]
    close(layer.input_gram(inputs, weights.sqrt()), outer(weighted, tokens))


# ── gradients


def gradients_of(case):
    return torch.randn(4, case.n_channels[1], *case.output_grid, dtype=torch.float64)


@each_case
def test_gradient_gram_is_the_outer_product_of_the_tokens(case):
    layer, grads = case.pathway(), gradients_of(case)
    tokens = layer.gradient_tokens(grads)
    found = layer.gradient_gram(grads)
    assert found.shape == (1, *layer.weight.shape[1:2] * 2)
    close(found, outer(tokens, tokens))


@each_stride
@pytest.mark.parametrize("channels", [1, 3, 40])
def test_gradient_gram_of_a_convolution_against_the_slow_loop(grid, stride, channels):
    case = LayerCase("conv", (1, channels), grid, stride)
    grads = gradients_of(case)
    expected = torch.zeros(1, channels, channels, dtype=torch.float64)
    for row, y in product(grads, range(math.prod(case.output_grid))):
        at = row.flatten(1)[:, y]
        expected += torch.outer(at, at)
    close(case.pathway().gradient_gram(grads), expected)


def test_both_ways_of_a_product_occur():
    # Few long rows and many short ones are multiplied in different ways.
    seen = {"patches": set(), "fields": set()}
    for case in CASES:
        layer = case.pathway()
        if case.stride != (1, 1):
            patches = layer.patches(case.inputs())
            seen["patches"].add(patches.shape[2] < patches.shape[1])
        fields = layer.fields(gradients_of(case))
        seen["fields"].add(fields.shape[2] < fields.shape[1])
    assert seen == {"patches": {True, False}, "fields": {True, False}}
