"""The action of a group on the grid, and what answers to it after a stride."""

import pytest
import torch

from sklearn_softeq.groups import GROUPS, Translation

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (4, 7), (8, 8)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def test_the_table_names_its_groups():
    assert all(name == group.name for name, group in GROUPS.items())


@each_grid
def test_action_is_the_formula(grid):
    features = torch.randn(2, 3, *grid)
    group = Translation()
    for element in [(0, 0), (1, 0), (0, 1), (2, -1), (5, 3)]:
        moved = group.act(features, element)
        for y in range(grid[0]):
            for x in range(grid[1]):
                source = features[..., (y - element[0]) % grid[0], (x - element[1]) % grid[1]]
                assert torch.equal(moved[..., y, x], source)


@each_grid
def test_action_is_a_homomorphism_with_inverses(grid):
    features = torch.randn(2, 3, *grid)
    group = Translation()
    for a, b in [((1, 2), (3, 1)), ((0, 3), (2, 0))]:
        both = group.act(group.act(features, a), b)
        assert torch.equal(both, group.act(features, (a[0] + b[0], a[1] + b[1])))
        assert torch.equal(group.act(group.act(features, a), (-a[0], -a[1])), features)


@each_grid
def test_elements_generate_every_shift_without_the_identity(grid):
    elements = Translation().elements(grid)
    assert len(set(elements)) == len(elements)
    reached = {(0, 0)}
    while True:
        further = {((i + a) % grid[0], (j + b) % grid[1]) for i, j in reached for a, b in elements}
        if further <= reached:
            break
        reached |= further
    assert len(reached) == grid[0] * grid[1]
    # Each of them moves something.
    image = torch.arange(grid[0] * grid[1]).view(grid)
    assert not any(torch.equal(Translation().act(image, g), image) for g in elements)


@each_grid
def test_elements_reach_half_way_along_each_axis(grid):
    elements = Translation().elements(grid)
    for axis, side in enumerate(grid):
        assert side == 1 or side // 2 in {g[axis] for g in elements if g[1 - axis] == 0}


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_output_elements_are_those_that_occur(stride):
    # A sample that keeps the positions a, a+s, … keeps (a+t) mod s, … once shifted by t: the
    # position a + s k, now a + t + s k, is number (a + t − a′)/s + k of them.
    for t in [(1, 0), (2, 3), (4, 1), (3, 3)]:
        along = [
            {(a + shift - (a + shift) % s) // s for a in range(s)}
            for shift, s in zip(t, stride, strict=True)
        ]
        expected = {(i, j) for i in along[0] for j in along[1]}
        found = Translation().output_elements(t, stride)
        assert set(found) == expected
        assert len(found) == len(expected)


def test_a_group_is_a_value():
    assert Translation() == GROUPS["translation"]
