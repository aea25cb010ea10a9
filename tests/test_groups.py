"""The action of a group on the grid, what answers to it after a stride, and its structure."""

from itertools import product

import pytest
import torch
from cases import P2
from references import IDENTITY, inverse, move, offsets, times

from sklearn_softeq.groups import (
    GROUPS,
    P1,
    P4,
    P4M,
    PM,
    POINT_GROUPS,
    PointGroup,
    Translation,
    join,
)

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (4, 7), (8, 8)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)

POINTS = [P1, P2, P4, P4M, PM]
each_point_group = pytest.mark.parametrize("group", POINTS, ids=lambda group: group.name)
SUBGROUPS = [(sub, group) for sub, group in product(POINTS, POINTS) if sub in (P1, group)]
SUBGROUPS += [(P2, P4), (P2, P4M), (P4, P4M), (PM, P4M)]
each_subgroup = pytest.mark.parametrize(
    ("subgroup", "group"), SUBGROUPS, ids=lambda group: group.name
)


def centred(grid):
    """Pixels as seen from the centre of the grid."""
    sides = [[i - (side - 1) / 2 for i in range(side)] for side in grid]
    return list(product(*sides))


def test_the_tables_name_their_groups():
    assert all(name == group.name for name, group in GROUPS.items())
    assert all(GROUPS[name] is group for name, group in POINT_GROUPS.items())


def test_a_group_is_a_value():
    assert Translation() == GROUPS["translation"]
    quarter_turn = ((0, -1), (1, 0))
    assert PointGroup.generated("p4", quarter_turn) == P4
    assert len({P1, P2, P4, P4M, PM, PointGroup.generated("p4", quarter_turn)}) == 5


# ── translations


@each_grid
def test_shift_is_the_formula(grid):
    features = torch.randn(2, 3, *grid)
    group = Translation()
    for element in [(0, 0), (1, 0), (0, 1), (2, -1), (5, 3)]:
        moved = group.act(features, element)
        for y in range(grid[0]):
            for x in range(grid[1]):
                source = features[..., (y - element[0]) % grid[0], (x - element[1]) % grid[1]]
                assert torch.equal(moved[..., y, x], source)


@each_grid
def test_shifts_are_a_homomorphism_with_inverses(grid):
    features = torch.randn(2, 3, *grid)
    group = Translation()
    for a, b in [((1, 2), (3, 1)), ((0, 3), (2, 0))]:
        both = group.act(group.act(features, a), b)
        assert torch.equal(both, group.act(features, (a[0] + b[0], a[1] + b[1])))
        assert torch.equal(group.act(group.act(features, a), (-a[0], -a[1])), features)


def test_a_shift_leaves_orientations_where_they_are():
    features = torch.randn(2, 8, 3, 4)
    moved = Translation().act(features, (1, 2), P4)
    assert torch.equal(moved, Translation().act(features, (1, 2)))


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


# ── turns and reflections: the group


def test_elements_of_each_group():
    signs = (-1, 1)
    diagonal = {((a, 0), (0, b)) for a, b in product(signs, signs)}
    transposed = {((0, a), (b, 0)) for a, b in product(signs, signs)}
    half_turn, reflection = ((-1, 0), (0, -1)), ((1, 0), (0, -1))
    quarter_turns = {((0, -1), (1, 0)), ((0, 1), (-1, 0))}
    assert set(P1.matrices) == {IDENTITY}
    assert set(P2.matrices) == {IDENTITY, half_turn}
    assert set(P4.matrices) == {IDENTITY, half_turn} | quarter_turns
    assert set(P4M.matrices) == diagonal | transposed
    assert set(PM.matrices) == {IDENTITY, reflection}


def test_the_first_turn_is_counter_clockwise_and_the_reflection_swaps_left_and_right():
    image = torch.arange(16.0).view(4, 4)
    assert torch.equal(P4.act(image, P4.matrices[1]), image.rot90())
    assert torch.equal(PM.act(image, PM.matrices[1]), image.fliplr())


@each_point_group
def test_it_is_a_group(group):
    elements = set(group.matrices)
    assert group.order == len(group.matrices) == len(elements)
    assert group.matrices[0] == IDENTITY
    assert {times(a, b) for a, b in product(elements, elements)} == elements
    for g in elements:
        assert times(g, inverse(group, g)) == times(inverse(group, g), g) == IDENTITY


@each_point_group
def test_the_place_of_a_product(group):
    for g, h in product(group.matrices, group.matrices):
        assert group.matrices[group.quotient(g, h)] == times(inverse(group, g), h)


def test_which_group_holds_which():
    holds = {(sub.name, group.name) for sub, group in SUBGROUPS}
    for sub, group in product(POINTS, POINTS):
        assert group.contains(sub) == ((sub.name, group.name) in holds)
        assert group.contains(None)
    assert ((0, -1), (1, 0)) in P4
    assert ((0, -1), (1, 0)) not in PM


def test_which_group_needs_a_square():
    assert [group.needs_square for group in (P1, P2, P4, P4M, PM)] == [
        False,
        False,
        *[True] * 2,
        False,
    ]


@each_subgroup
def test_cosets_part_the_group(subgroup, group):
    cosets = group.cosets(subgroup)
    assert sorted(place for coset in cosets for place in coset) == list(range(group.order))
    for coset in cosets:
        first = group.matrices[coset[0]]
        assert [group.matrices[i] for i in coset] == [times(h, first) for h in subgroup.matrices]


@each_point_group
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 1), (3, 3)], ids=str)
def test_taps_are_moved_back(group, kernel):
    taps = offsets(tuple(2 if side == 3 else 1 for side in kernel))
    for g in group.elements(kernel):
        back = [taps.index(move(inverse(group, g), u)) for u in taps]
        assert group.taps(g, kernel).tolist() == back


def test_join_is_the_smallest_group_that_holds_all():
    assert join([]) is P1
    assert join([P4]) is P4
    assert join([P1, PM]) is PM
    assert join([P4, P4M, PM]) is P4M
    assert set(join([P4, PM]).matrices) == set(P4M.matrices)
    both = join([P2, PM])  # has no name among them
    assert set(both.matrices) == {((a, 0), (0, b)) for a, b in product((-1, 1), (-1, 1))}


# ── turns and reflections: the action


@each_point_group
@each_grid
def test_action_is_the_formula(group, grid):
    features, places = torch.randn(2, *grid), centred(grid)
    for g in group.elements(grid):
        moved = group.act(features, g).flatten(1)
        for i, x in enumerate(places):
            source = places.index(move(inverse(group, g), x))
            assert torch.equal(moved[:, i], features.flatten(1)[:, source])


@each_subgroup
def test_action_on_orientations_is_the_formula(subgroup, group):
    # (r f)[c, g, x] = f[c, r⁻¹ g, r⁻¹ x], for features of the group and r of a subgroup too
    features, places = torch.randn(2, 3 * group.order, 3, 3), centred((3, 3))
    flat = features.view(2, 3, group.order, 9)
    for r in subgroup.elements((3, 3)):
        moved = subgroup.act(features, r, group).reshape(2, 3, group.order, 9)
        for (k, g), (i, x) in product(enumerate(group.matrices), enumerate(places)):
            back = inverse(group, r)
            source = group.matrices.index(times(back, g)), places.index(move(back, x))
            assert torch.equal(moved[:, :, k, i], flat[:, :, source[0], source[1]])


@each_point_group
def test_action_is_a_homomorphism_with_inverses(group):
    features = torch.randn(2, 3 * group.order, 4, 4)
    for a, b in product(group.matrices, group.matrices):
        both = group.act(group.act(features, a, group), b, group)
        assert torch.equal(both, group.act(features, times(b, a), group))
    for g in group.matrices:
        back = group.act(group.act(features, g, group), inverse(group, g), group)
        assert torch.equal(back, features)


def test_a_move_from_outside_changes_the_coordinates_of_the_orientations():
    features = torch.randn(2, 4, 3, 3)
    # m⁻¹ r m = r⁻¹ for a reflection m and a turn r: e and r² stay, r and r³ change places.
    m = PM.matrices[1]
    sources = [P4.matrices.index(inverse(P4, g)) for g in P4.matrices]
    assert torch.equal(P4M.act(features, m, P4), features.flip(-1)[:, sources])
    assert torch.equal(PM.act(features, m, P1), features.flip(-1))
    # It is an action: twice m is nothing, and m r m⁻¹ is the turn back.
    twice = P4M.act(P4M.act(features, m, P4), m, P4)
    assert torch.equal(twice, features)
    r = P4.matrices[1]
    around = P4M.act(P4.act(P4M.act(features, m, P4), r, P4), m, P4)
    assert torch.equal(around, P4.act(features, inverse(P4, r), P4))


def test_elements_that_take_orientations_nowhere_are_left_out():
    half_turn = ((-1, 0), (0, -1))
    assert P4.elements((4, 4), PM) == [half_turn]  # a quarter turn takes ← → to ↑ ↓
    assert set(PM.elements((4, 4), P4)) == set(PM.matrices[1:])
    # On one pixel only what moves orientations: m those of p4, the half turn none of pm.
    assert P4.elements((1, 1), PM) == []
    assert P4.elements((1, 1), P4) == list(P4.matrices[1:])
    assert PM.elements((1, 1), P4) == list(PM.matrices[1:])


@each_point_group
@each_grid
def test_elements_keep_the_shape_without_the_identity(group, grid):
    found = group.elements(grid)
    keeps = {g for g in group.matrices if grid[0] == grid[1] or g[0][0] != 0}
    keeps = keeps if grid != (1, 1) else set()  # where nothing moves
    assert set(found) == keeps - {IDENTITY}
    assert len(found) == len(set(found))
    image = torch.randn(2, *grid)
    assert all(group.act(image, g).shape == image.shape for g in found)


@each_point_group
def test_a_strided_output_answers_with_the_same_element(group):
    assert all(group.output_elements(g, (2, 2)) == [g] for g in group.matrices)
