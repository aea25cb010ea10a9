"""Padding and shifts on the torus against torch's own, with their gradients."""

from itertools import product

import pytest
import torch
from torch.nn.functional import pad

from sklearn_softeq.layers.torus import circular_pad, shift

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# (H, W), rows before and behind, columns before and behind: one side or both, as many as there
# are, sides of one pixel.
PADS = [
    ((4, 6), (1, 1), (1, 1)),
    ((4, 6), (1, 0), (1, 0)),
    ((3, 5), (0, 2), (2, 2)),
    ((3, 5), (2, 1), (0, 0)),
    ((5, 3), (0, 0), (0, 3)),
    ((2, 2), (0, 2), (2, 2)),
    ((2, 3), (2, 2), (3, 3)),
    ((1, 4), (0, 0), (1, 1)),
    ((4, 1), (3, 1), (1, 0)),
    ((1, 1), (1, 1), (1, 1)),
]
each_pad = pytest.mark.parametrize(("grid", "rows", "columns"), PADS, ids=str)

# (H, W), and where the origin of each sample lies: within the grid, before and beyond it.
SHIFTS = [
    ((4, 6), (0, 1, 3), (5, 0, 2)),
    ((3, 5), (-1, -4, 7), (0, -5, 12)),
    ((1, 4), (0, 2, -1), (1, 2, 3)),
    ((2, 1), (1, 0, 1), (0, 1, 0)),
    ((1, 1), (0, 3, -2), (0, 1, 1)),
]
each_shift = pytest.mark.parametrize(("grid", "rows", "columns"), SHIFTS, ids=str)


def maps_on(grid, dtype=torch.float64, n=3):
    return torch.randn(n, 2, *grid, dtype=dtype)


def offsets(*places):
    return tuple(map(torch.tensor, places))


def padded(inputs, rows, columns):
    return pad(inputs, (*columns, *rows), mode="circular")


def rolled(inputs, rows, columns):
    places = zip(inputs, rows, columns, strict=True)
    return torch.stack([torch.roll(x, (-int(i), -int(j)), (1, 2)) for x, i, j in places])


def gradient(function, inputs, grads):
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(function(inputs), inputs, grads)[0]


def same_gradient(function, expected, inputs):
    """At several cotangents, and the second derivatives through them."""
    for _ in range(3):
        grads = torch.randn_like(expected(inputs))
        found = gradient(function, inputs, grads)
        torch.testing.assert_close(found, gradient(expected, inputs, grads))
    inputs = inputs.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# ── padding


@each_pad
@each_dtype
def test_padding_is_that_of_torch(grid, rows, columns, dtype):
    inputs = maps_on(grid, dtype)
    found = circular_pad(inputs, rows, columns)
    assert found.dtype == dtype
    assert torch.equal(found, padded(inputs, rows, columns))


@each_pad
def test_a_padded_map_is_periodic(grid, rows, columns):
    (height, width), inputs = grid, maps_on(grid)
    found = circular_pad(inputs, rows, columns)
    for i, j in product(range(found.shape[2]), range(found.shape[3])):
        place = (i - rows[0]) % height, (j - columns[0]) % width
        assert torch.equal(found[:, :, i, j], inputs[:, :, place[0], place[1]])


@each_pad
def test_gradient_of_padding(grid, rows, columns):
    same_gradient(
        lambda x: circular_pad(x, rows, columns), lambda x: padded(x, rows, columns), maps_on(grid)
    )


@each_pad
def test_gradient_of_padding_in_float32(grid, rows, columns):
    inputs = maps_on(grid, torch.float32)
    grads = torch.randn_like(padded(inputs, rows, columns))
    found = gradient(lambda x: circular_pad(x, rows, columns), inputs, grads)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient(lambda x: padded(x, rows, columns), inputs, grads))


def test_no_padding_is_no_copy():
    inputs = maps_on((3, 4))
    assert circular_pad(inputs, (0, 0), (0, 0)) is inputs


def test_padding_of_maps_that_lie_otherwise_in_memory():
    inputs = maps_on((4, 6)).to(memory_format=torch.channels_last)
    for x in (inputs, inputs.transpose(2, 3), inputs[:1].expand(5, 2, 4, 6)):
        assert torch.equal(circular_pad(x, (1, 2), (2, 0)), padded(x, (1, 2), (2, 0)))


@each_pad
def test_padding_under_vmap(grid, rows, columns):
    def function(x):
        return circular_pad(x, rows, columns)

    def sensitivity(x, grads):
        return torch.func.vjp(function, x)[1](grads)[0]

    inputs = torch.stack([maps_on(grid) for _ in range(4)], 2)  # the axis is not the first one
    each = inputs.unbind(2)
    found = torch.vmap(function, in_dims=2)(inputs)
    assert torch.equal(found, torch.stack([padded(x, rows, columns) for x in each]))
    grads = torch.randn_like(found)
    found = torch.vmap(sensitivity, in_dims=(2, 0))(inputs, grads)
    expected = [
        gradient(lambda t: padded(t, rows, columns), x, g) for x, g in zip(each, grads, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


# ── shifts


@each_dtype
@each_pad
def test_an_exported_graph_pads_alike(monkeypatch, grid, rows, columns, dtype):
    inputs = maps_on(grid, dtype)
    expected = circular_pad(inputs, rows, columns)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(circular_pad(inputs, rows, columns), expected)


@each_shift
@each_dtype
def test_each_sample_is_rolled_by_its_own_shift(grid, rows, columns, dtype):
    inputs, places = maps_on(grid, dtype), offsets(rows, columns)
    found = shift(inputs, *places)
    assert found.dtype == dtype
    assert torch.equal(found, rolled(inputs, *places))
    origin = zip(inputs, rows, columns, strict=True)
    expected = [x[:, i % grid[0], j % grid[1]] for x, i, j in origin]
    assert torch.equal(found[:, :, 0, 0], torch.stack(expected))


@each_shift
def test_gradient_of_a_shift(grid, rows, columns):
    places = offsets(rows, columns)
    same_gradient(lambda x: shift(x, *places), lambda x: rolled(x, *places), maps_on(grid))


def test_gradient_of_a_shift_in_float32():
    inputs, places = maps_on((4, 6), torch.float32), offsets((0, 1, 3), (5, 0, 2))
    grads = torch.randn_like(inputs)
    found = gradient(lambda x: shift(x, *places), inputs, grads)
    assert torch.equal(found, rolled(grads, *(-place for place in places)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_shifts_are_integers_of_any_width(dtype):
    inputs, places = maps_on((3, 5)), offsets((-1, -4, 7), (0, -5, 12))
    found = shift(inputs, *(place.to(dtype) for place in places))
    assert torch.equal(found, rolled(inputs, *places))


def test_shift_of_maps_that_lie_otherwise_in_memory():
    places = offsets((1, 2, 3), (2, 0, 1))
    inputs = maps_on((4, 6)).to(memory_format=torch.channels_last)
    for x in (inputs, inputs.transpose(2, 3), inputs[:1].expand(3, 2, 4, 6)):
        assert torch.equal(shift(x, *places), rolled(x, *places))


@each_shift
def test_shift_under_vmap(grid, rows, columns):
    inputs = torch.stack([maps_on(grid) for _ in range(4)], 1)  # (3, 4, C, H, W)
    places = offsets(rows, columns)
    other = [torch.stack([place + i for i in range(4)]) for place in places]  # (4, 3)
    each = inputs.unbind(1)
    found = torch.vmap(shift, in_dims=(1, None, None))(inputs, *places)
    assert torch.equal(found, torch.stack([rolled(x, *places) for x in each]))
    found = torch.vmap(shift, in_dims=(1, 0, 0))(inputs, *other)
    several = zip(each, *other, strict=True)
    assert torch.equal(found, torch.stack([rolled(*arguments) for arguments in several]))


@each_shift
def test_gradient_of_a_shift_under_vmap(grid, rows, columns):
    inputs, places = maps_on(grid), offsets(rows, columns)

    def sensitivity(grads):
        return torch.func.vjp(lambda x: shift(x, *places), inputs)[1](grads)[0]

    grads = torch.stack([maps_on(grid) for _ in range(4)])
    back = [-place for place in places]
    assert torch.equal(
        torch.vmap(sensitivity)(grads), torch.stack([rolled(g, *back) for g in grads])
    )
