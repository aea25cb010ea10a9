"""Finite groups acting on the pixel grid, as value objects.

A group lists the elements at which equivariance is measured on a grid, lets one of them act on
feature maps, and says which elements of the output grid may answer to it after a stride. A
:class:`PointGroup` also has the structure that a group convolution needs: products, inverses,
cosets, and its action on the taps of a filter. A further point group is one more object in
:data:`POINT_GROUPS`; its convolution and its measurement come with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = [
    "GROUPS",
    "P1",
    "P4",
    "P4M",
    "PM",
    "POINT_GROUPS",
    "PointGroup",
    "Symmetry",
    "Translation",
    "join",
]

Grid = tuple[int, int]
Shift = tuple[int, int]
Matrix = tuple[tuple[int, int], tuple[int, int]]

_IDENTITY: Matrix = ((1, 0), (0, 1))
_QUARTER_TURN: Matrix = ((0, -1), (1, 0))  # (row, column) → (−column, row), counter-clockwise
_REFLECTION: Matrix = ((1, 0), (0, -1))  # left ↔ right


class Symmetry(Protocol):
    """What a measurement of equivariance asks of a group; only the group knows its elements."""

    def elements(self, grid: Grid, *axes: "PointGroup") -> list[Any]: ...

    def act(
        self, features: torch.Tensor, element: Any, axis: "PointGroup | None" = None
    ) -> torch.Tensor: ...

    def output_elements(self, element: Any, stride: Grid) -> list[Any]: ...


@dataclass(frozen=True)
class PointGroup:
    """Turns and reflections of the grid about its centre.

    Features of a network of group G have G orientations for each channel, channel slow and
    element fast, and live in the image's frame: (r f)[c, g, x] = f[c, r⁻¹ g, r⁻¹ x].

    Parameters
    ----------
    name : str
        The wallpaper group that it makes with the translations of the grid.
    matrices : tuple of 2×2 tuples of int
        The elements, acting on (row, column) as seen from the centre; the identity first.
    """

    name: str
    matrices: tuple[Matrix, ...]

    @classmethod
    def generated(cls, name: str, *generators: Matrix) -> "PointGroup":
        """The smallest group that holds these matrices."""
        found = [_IDENTITY]
        for matrix in found:  # grows while it is read
            for generator in generators:
                product = _product(generator, matrix)
                if product not in found:
                    found.append(product)
        return cls(name, tuple(found))

    @property
    def order(self) -> int:
        """Number of elements G."""
        return len(self.matrices)

    @property
    def needs_square(self) -> bool:
        """Whether an element exchanges rows and columns."""
        return any(_transposes(matrix) for matrix in self.matrices)

    def __contains__(self, matrix: Matrix) -> bool:
        return matrix in self.matrices

    def contains(self, other: "PointGroup | None") -> bool:
        """Whether the other is a subgroup; None stands for no symmetry at all."""
        return other is None or set(other.matrices) <= set(self.matrices)

    def quotient(self, g: Matrix, h: Matrix) -> int:
        """The place of g⁻¹ h among the elements."""
        return self.matrices.index(_product(_inverse(g), h))

    def cosets(self, subgroup: "PointGroup") -> list[list[int]]:
        """Places of the elements h t_j of each coset of a subgroup, h in its own order.

        A channel with the orientations of this group is, for the subgroup, one channel for each
        coset: (r f)[h t_j] = f[(r⁻¹ h) t_j] for r in the subgroup.
        """
        rest, found = list(self.matrices), []
        while rest:
            coset = [_product(h, rest[0]) for h in subgroup.matrices]
            found.append([self.matrices.index(g) for g in coset])
            rest = [g for g in rest if g not in coset]
        return found

    def taps(self, element: Matrix, kernel: Grid) -> torch.Tensor:
        """The place of g⁻¹ u for each tap u of a filter, shape (k²,)."""
        places = torch.arange(kernel[0] * kernel[1], device="cpu").view(kernel)
        return _move(places, element).flatten()

    def elements(self, grid: Grid, *axes: "PointGroup") -> list[Matrix]:
        """The elements that move feature maps on a grid, with the orientations of these groups.

        Left out are those that do not keep the shape of the grid, those that take an orientation
        to none, and, on a grid of one pixel, those that move no orientation either.
        """
        square = grid[0] == grid[1]
        found = []
        for matrix in self.matrices[1:]:
            sources = [_sources(matrix, axis) for axis in axes]
            known = None not in sources and (square or not _transposes(matrix))
            if known and (grid != (1, 1) or any(s != sorted(s or ()) for s in sources)):
                found.append(matrix)
        return found

    def act(
        self, features: torch.Tensor, element: Matrix, axis: "PointGroup | None" = None
    ) -> torch.Tensor:
        """Move feature maps of shape (..., C·G, H, W) by an element.

        Parameters
        ----------
        features : tensor
        element : matrix
        axis : PointGroup, optional
            The group of the features' orientations, default none. An element r of that group
            takes them from r⁻¹ g; any other m, as a change of coordinates, from m⁻¹ g m.
        """
        moved = _move(features, element)
        if axis is None or axis.order == 1:
            return moved
        sources = _sources(element, axis)
        assert sources is not None, "the orientations do not know this element"
        return moved.unflatten(-3, (-1, axis.order))[..., sources, :, :].flatten(-4, -3)

    def output_elements(self, element: Matrix, stride: Grid) -> list[Matrix]:
        """What a strided output may answer to an element of its input: the same.

        The kept grid is turned with the image, and its pixels turn about their own centre.
        """
        return [element]


@dataclass(frozen=True)
class Translation:
    """Cyclic shifts of the pixel grid.

    An element is a pair (rows, columns) of pixels; it acts by
    ``(g f)[y, x] = f[y - rows, x - columns]``, indices modulo the sides of the grid.
    """

    name: str = "translation"

    def elements(self, grid: Grid, *axes: PointGroup) -> list[Shift]:
        """Shifts by 0, 1 and half of the side along each axis, without the identity.

        Together they generate every shift along an axis; the half turn of the grid is the
        farthest one. A grid of one pixel has no shift.
        """
        rows, columns = (sorted({0, 1 % side, side // 2}) for side in grid)
        return [(i, j) for i in rows for j in columns if (i, j) != (0, 0)]

    def act(
        self, features: torch.Tensor, element: Shift, axis: PointGroup | None = None
    ) -> torch.Tensor:
        """Move feature maps of shape (..., H, W) by an element, whatever their orientations."""
        return torch.roll(features, shifts=element, dims=(-2, -1))

    def output_elements(self, element: Shift, stride: Grid) -> list[Shift]:
        """Shifts of a strided output that may answer to a shift of its input.

        At stride s a shift by t pixels moves the kept grid by ⌊t/s⌋ or ⌈t/s⌉ positions,
        depending on the grid that a sample keeps.
        """
        rows, columns = (sorted({t // s, -(-t // s)}) for t, s in zip(element, stride, strict=True))
        return [(i, j) for i in rows for j in columns]


def join(groups: Iterable[PointGroup]) -> PointGroup:
    """The smallest group that holds all of them: one of theirs, or a nameless one."""
    groups = [P1, *groups]
    together = PointGroup.generated("", *(m for group in groups for m in group.matrices))
    return next((group for group in groups if group.contains(together)), together)


def _sources(element: Matrix, axis: PointGroup) -> list[int] | None:
    """Where each orientation comes from under an element; None if it is from none of them."""
    inverse = _inverse(element)
    if element in axis:
        found = [_product(inverse, g) for g in axis.matrices]
    else:
        found = [_product(_product(inverse, g), element) for g in axis.matrices]
    if not all(g in axis for g in found):
        return None
    return [axis.matrices.index(g) for g in found]


def _product(a: Matrix, b: Matrix) -> Matrix:
    (p, q), (r, s) = a
    (t, u), (v, w) = b
    return ((p * t + q * v, p * u + q * w), (r * t + s * v, r * u + s * w))


def _inverse(matrix: Matrix) -> Matrix:
    (p, q), (r, s) = matrix
    return ((p, r), (q, s))  # signed permutations are orthogonal


def _transposes(matrix: Matrix) -> bool:
    return matrix[0][0] == 0


def _move(features: torch.Tensor, element: Matrix) -> torch.Tensor:
    """(g f)[x] = f[g⁻¹ x] on the last two axes, x as seen from the centre."""
    # g⁻¹ x = gᵀ x takes its row from column 0 of g and its column from column 1.
    flipped = [dim for dim in (0, 1) if element[0][dim] + element[1][dim] < 0]
    features = features.flip([dim - 2 for dim in flipped]) if flipped else features
    return features.transpose(-2, -1) if _transposes(element) else features


#: Shifts alone: features without orientations.
P1 = PointGroup.generated("p1")
#: Quarter turns.
P4 = PointGroup.generated("p4", _QUARTER_TURN)
#: Quarter turns and reflections.
P4M = PointGroup.generated("p4m", _QUARTER_TURN, _REFLECTION)
#: The reflection left ↔ right.
PM = PointGroup.generated("pm", _REFLECTION)

#: Groups with a convolution of their own, ``layers.PATHWAYS["<name>_conv"]``.
POINT_GROUPS = {group.name: group for group in (P4, P4M, PM)}

#: Groups for which equivariance is measured.
GROUPS: dict[str, Symmetry] = {"translation": Translation(), **POINT_GROUPS}
