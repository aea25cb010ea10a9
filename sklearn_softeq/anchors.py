"""Anchor points and the interpolation between anchors and the pixel grid.

Values at M anchors give values at X pixels by Ψ = (K_ZZ + σ² I)⁻¹ K_Z,grid with the kernel
k(z, x) = exp(−½ ω² |z − x|²) on pixel coordinates about the centre of the grid.
"""

import math

import torch
from torch import nn

__all__ = ["LOG_OMEGA_BOUNDS", "Interpolation", "place_anchors"]

#: σ, which keeps K_ZZ + σ² I well away from singular.
NOISE = 0.01

#: Bounds of log ω, ω in 1/pixel. Below 0.2 (a lengthscale of 5 pixels) neighbouring anchors say
#: the same and Ψ is lost to rounding; above 2, with an anchor for every other pixel, a pixel half
#: way between the nearest ones hears them at less than exp(−1).
LOG_OMEGA_BOUNDS = (math.log(0.2), math.log(2.0))


def place_anchors(grid: tuple[int, int], n_anchors: int) -> torch.Tensor:
    """Points spread evenly over a grid, the same at each call, shape (M, 2), float64.

    They stand in rows of equal height, as many in each as makes M, at equal distances; the number
    of rows is about that of a hexagonal lattice. As many as there are pixels lie on the pixels, 7
    on 3×3 make a hexagon and its centre, and 2 on 2×2 a diagonal.

    Parameters
    ----------
    grid : pair of int
        H, W.
    n_anchors : int
        M, from 1 to H·W.
    """
    height, width = grid
    hexagonal = round(math.sqrt(2 / math.sqrt(3) * n_anchors * height / width))
    n_rows = min(max(hexagonal, math.ceil(n_anchors / width)), height, n_anchors)
    ends = [round(i * n_anchors / n_rows) for i in range(n_rows + 1)]
    points = []
    for i, row in enumerate(_spread(n_rows, height)):
        count = ends[i + 1] - ends[i]
        # Anchors that all stand one below the other would not see the columns.
        in_line = n_anchors == n_rows and min(n_rows, width) > 1
        shift = (-1) ** (i + 1) * width / 4 if in_line else 0.0
        points += [(row, column + shift) for column in _spread(count, width)]
    return torch.tensor(points, dtype=torch.float64)


def _spread(count: int, side: int) -> list[float]:
    """Centres of ``count`` equal parts of a side, as seen from its middle."""
    return [side * ((i + 0.5) / count - 0.5) for i in range(count)]


class Interpolation(nn.Module):
    """The matrix Ψ between anchors and pixels; solved anew only when ω changes.

    Parameters
    ----------
    grid : pair of int
        H, W.
    fraction : float
        Anchors for each pixel, in (0, 1]; M is rounded, and at least 1.

    Attributes
    ----------
    log_omega : tensor of shape ()
        log ω, 0 to start: a lengthscale 1/ω of one pixel. A buffer, set by :meth:`set_log_omega`.
    matrix : tensor of shape (M, X)
        Ψ.
    """

    log_omega: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, grid: tuple[int, int], fraction: float):
        super().__init__()
        self.grid = grid
        self.n_anchors = max(1, round(fraction * math.prod(grid)))
        shape = (self.n_anchors, math.prod(grid))
        self._tangent: tuple[float, torch.Tensor] | None = None  # for one ω, when asked for
        self.register_buffer("log_omega", torch.zeros((), dtype=torch.float64))
        # It follows from log ω, and is larger than the weights that it interpolates.
        self.register_buffer("matrix", torch.empty(shape), persistent=False)
        if not self.matrix.is_meta:
            self.set_log_omega(0.0)

    def _apply(self, fn, recurse=True):
        # A change of dtype solves anew: Ψ in float64 is more than the digits of Ψ in float32, and
        # log ω keeps all of its own.
        before, log_omega = self.matrix.dtype, self.log_omega
        super()._apply(fn, recurse)
        self._tangent = None
        if not self.matrix.is_meta and not log_omega.is_meta:
            self.log_omega = log_omega.to(self.log_omega.device)
        if self.matrix.dtype != before and not self.matrix.is_meta:
            self.set_log_omega(self.log_omega.item())
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        before = self.log_omega.item()
        super()._load_from_state_dict(*args, **kwargs)
        if self.log_omega.item() != before:
            self.set_log_omega(self.log_omega.item())

    @torch.no_grad()
    def set_log_omega(self, value: float) -> None:
        """Set log ω, within its bounds, and solve for Ψ."""
        low, high = LOG_OMEGA_BOUNDS
        self.log_omega.fill_(min(max(value, low), high))
        anchors, anchors_to_pixels, _ = self._kernels()
        self.matrix.copy_(torch.linalg.solve(anchors, anchors_to_pixels))  # Eq. interpolation

    def tangent(self) -> torch.Tensor:
        """∂Ψ / ∂log ω = (K_ZZ + σ² I)⁻¹ (∂K_Z,grid − ∂K_ZZ Ψ), shape (M, X)."""
        omega = self.log_omega.item()
        if self._tangent is None or self._tangent[0] != omega:
            self._tangent = (omega, self._solve_tangent().to(self.matrix))
        return self._tangent[1]

    def _solve_tangent(self) -> torch.Tensor:
        anchors, anchors_to_pixels, squares = self._kernels()
        omega_square = (2 * self.log_omega.double().cpu()).exp()
        d_anchors = -omega_square * squares[0] * anchors  # σ² stands where the distance is 0
        d_pixels = -omega_square * squares[1] * anchors_to_pixels
        solved = torch.linalg.solve(anchors, anchors_to_pixels)
        return torch.linalg.solve(anchors, d_pixels - d_anchors @ solved)

    def fit(self, dense: torch.Tensor) -> torch.Tensor:
        """Anchor values whose interpolation is nearest to a dense map, (..., X) → (..., M)."""
        rows = dense.flatten(0, -2).T.double().cpu()  # (X, rows)
        found = torch.linalg.lstsq(self.matrix.T.double().cpu(), rows, driver="gelsd").solution
        return found.T.reshape(*dense.shape[:-1], self.n_anchors).to(dense)

    def _kernels(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """K_ZZ + σ² I, K_Z,grid and the squared distances of both, float64 on the CPU."""
        height, width = self.grid
        anchors = place_anchors(self.grid, self.n_anchors)
        pixels = place_anchors(self.grid, height * width)
        half_square = 0.5 * (2 * self.log_omega.double().cpu()).exp()
        squares = (_squared_distances(anchors, anchors), _squared_distances(anchors, pixels))
        k_anchors, k_pixels = (torch.exp(-half_square * square) for square in squares)
        noise = NOISE**2 * torch.eye(self.n_anchors, dtype=torch.float64)
        return k_anchors + noise, k_pixels, squares


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a[:, None] - b[None]).square().sum(-1)
