"""States of a network and its prior in memory: kept, restored, averaged."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from .hyperparameters import LayerwisePrior

__all__ = ["State", "WeightMean", "restore", "state_of"]

State = tuple[dict, dict]


def state_of(module: torch.nn.Module, prior: LayerwisePrior) -> State:
    """A copy of weights, of what is switched off, and of the precisions."""
    return copy.deepcopy((module.state_dict(), prior.state_dict()))


def restore(module: torch.nn.Module, prior: LayerwisePrior, state: State) -> None:
    """Bring a state back."""
    module.load_state_dict(state[0])
    prior.load_state_dict(state[1])


class WeightMean:
    """The mean of a network's weights over epochs.

    Averaging lowers the noise that steps of finite size leave in the weights.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, module: torch.nn.Module) -> None:
        """Count the present weights in."""
        self.count += 1
        for name, weight in module.named_parameters():
            mean = self.weights.setdefault(name, weight.detach().clone())
            mean.lerp_(weight, 1.0 / self.count)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the mean into these tensors, if there is one, and forget it."""
        for name in self.weights.keys() & tensors.keys():
            tensors[name].copy_(self.weights[name])
        self.weights, self.count = {}, 0

    @contextmanager
    def loaded(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, float]]:
        """Have the mean in these tensors for a while, and forget it.

        Yields
        ------
        dict of str to float
            To be filled with what tensors have been multiplied by in the meantime; the weights
            that come back are multiplied by it, too.
        """
        present = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.load(tensors)
        scales: dict[str, float] = {}
        try:
            yield scales
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(present[name] * scales.get(name, 1.0))
