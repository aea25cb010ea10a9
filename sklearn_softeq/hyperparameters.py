"""The prior: one precision for each weight tensor, by name."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

__all__ = ["LOG_PRECISION_BOUNDS", "LayerwisePrior"]

#: Bounds of log δ. Below, a weight of ordinary size is free in any case; above, its tensor is
#: off in any case (the effective dimensions vanish), and MAP steps would only become stiffer.
LOG_PRECISION_BOUNDS = (-10.0, 18.0)


class LayerwisePrior(nn.Module):
    """w_g ~ N(0, δ_g⁻¹ I) for each weight tensor g: each factor of each pathway, and each bias.

    The log precisions are a buffer, not a Parameter: they move and are saved with the model, and
    the optimiser of the weights never sees them.

    Parameters
    ----------
    names : iterable of str
        Names of the tensors.
    precision : float, default=1.0
        The start of every δ.

    Attributes
    ----------
    index : dict of str to int
        The entry of ``log_precision`` that belongs to each tensor.
    log_precision : tensor of shape (number of tensors,), float64
        log δ.
    """

    log_precision: torch.Tensor

    def __init__(self, names: Iterable[str], precision: float = 1.0):
        super().__init__()
        self.index = {name: i for i, name in enumerate(names)}
        low, high = LOG_PRECISION_BOUNDS
        self.start = min(max(math.log(precision), low), high)
        start = torch.full((len(self.index),), self.start, dtype=torch.float64)
        self.register_buffer("log_precision", start)

    def keep(self, names: Iterable[str]) -> None:
        """Go on with these tensors alone, in their order."""
        names = list(names)
        self.log_precision = self.log_precision[[self.index[name] for name in names]]
        self.index = {name: i for i, name in enumerate(names)}

    def reset(self) -> None:
        """Bring every δ back to its start."""
        self.log_precision.fill_(self.start)

    def precisions(self) -> dict[str, float]:
        """δ of each tensor by name."""
        return dict(zip(self.index, self.log_precision.exp().tolist(), strict=True))

    def set_precision(self, name: str, value: float) -> None:
        """Set δ of a tensor, within the bounds."""
        low, high = LOG_PRECISION_BOUNDS
        self.log_precision[self.index[name]] = min(max(math.log(value), low), high)

    def scatter(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Σ_g δ_g ‖w_g‖² over the given tensors, in nats times two."""
        precisions = self.precisions()
        squares = squared_norms(tensors)
        return sum(precisions[name] * square for name, square in squares.items())


def squared_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """‖w_g‖² by name, in one transfer from the device."""
    if not tensors:
        return {}
    squares = torch.stack([w.detach().square().sum().double() for w in tensors.values()])
    return dict(zip(tensors, squares.tolist(), strict=True))
