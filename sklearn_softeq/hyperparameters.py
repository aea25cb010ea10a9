"""The prior: one precision for each weight tensor, by name."""

import math
from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["LOG_PRECISION_BOUNDS", "LayerwisePrior"]

#: Bounds of log δ. Below, a weight of ordinary size is free in any case; above, its tensor is
#: off in any case (the effective dimensions vanish), and MAP steps would only become stiffer.
LOG_PRECISION_BOUNDS = (-10.0, 18.0)


class LayerwisePrior(nn.Module):
    """w_g ~ N(0, δ_g⁻¹ I) for each weight tensor g; all biases share one precision.

    The log precisions are a buffer, not a Parameter: they move and are saved with the model, and
    the optimiser of the weights never sees them.

    Parameters
    ----------
    tensors : dict of str to tensor
        The named parameters of a network.
    precision : float, default=1.0
        The start of every δ.

    Attributes
    ----------
    names : tuple of str
        Names of the tensors.
    groups : tuple of str
        Names of the precisions: a weight tensor's own name, or ``"bias"``.
    index : tensor of shape (number of tensors,)
        The precision that each tensor has.
    log_precision : tensor of shape (number of precisions,), float64
        log δ.
    """

    log_precision: torch.Tensor
    index: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], precision: float = 1.0):
        super().__init__()
        self.names = tuple(tensors)
        owner = ["bias" if name.endswith("bias") else name for name in self.names]
        self.groups = tuple(dict.fromkeys(owner))
        self.register_buffer("index", torch.tensor([self.groups.index(name) for name in owner]))
        start = torch.full((len(self.groups),), math.log(precision), dtype=torch.float64)
        self.register_buffer("log_precision", start.clamp(*LOG_PRECISION_BOUNDS))

    def group_of(self) -> dict[str, int]:
        """Which entry of ``log_precision`` each tensor has."""
        return dict(zip(self.names, self.index.tolist(), strict=True))

    def precisions(self) -> dict[str, float]:
        """δ of each tensor by name."""
        values = self.log_precision[self.index].exp().tolist()
        return dict(zip(self.names, values, strict=True))

    def set_precision(self, name: str, value: float) -> None:
        """Set δ of a tensor (and of all that share it), within the bounds."""
        low, high = LOG_PRECISION_BOUNDS
        self.log_precision[self.index[self.names.index(name)]] = min(
            max(math.log(value), low), high
        )

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
