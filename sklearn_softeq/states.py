"""States of a network, its prior and its likelihood in memory: kept, restored, averaged."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["State", "WeightMean", "restore", "state_of"]

State = tuple[dict, dict, list[float]]


def state_of(net: Any) -> State:
    """A copy of weights, of what is switched off, of the precisions and of a learned noise."""
    states = net.module_.state_dict(), net.prior_.state_dict()
    return *copy.deepcopy(states), net.criterion_.log_hyperparameters()


def restore(net: Any, state: State) -> None:
    """Bring a state back; a noise that is not learned stays, and so does one of a net without."""
    net.module_.load_state_dict(state[0])
    net.prior_.load_state_dict(state[1])
    if state[2]:
        net.criterion_ = net.criterion_.with_log_hyperparameters(state[2])


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
