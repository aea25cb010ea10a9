"""States of a network, and means of its weights."""

import pytest
import torch
from torch import nn

from sklearn_softeq.states import WeightMean


def taken(values):
    """A mean of the weights of a map with these values in turn, and the map with the last."""
    module, mean = nn.Linear(2, 1, dtype=torch.float64), WeightMean()
    for value in values:
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.bias, -value)
        mean.add(module)
    return mean, module


def test_mean_is_loaded_once():
    mean, module = taken([1.0, 2.0, 6.0])
    mean.load({"weight": module.weight.data})
    assert module.weight.tolist() == [[3.0, 3.0]]
    assert module.bias.tolist() == [-6.0]  # it was not among the tensors
    nn.init.constant_(module.weight, 7.0)
    mean.load(dict(module.named_parameters()))
    assert module.weight.tolist() == [[7.0, 7.0]]


def test_mean_is_there_for_a_while():
    mean, module = taken([1.0, 2.0, 6.0])
    with mean.loaded(dict(module.named_parameters())) as scales:
        assert (module.weight.tolist(), module.bias.tolist()) == ([[3.0, 3.0]], [-3.0])
        scales["weight"] = 0.5
    assert (module.weight.tolist(), module.bias.tolist()) == ([[3.0, 3.0]], [-6.0])
    nn.init.constant_(module.weight, 8.0)
    mean.add(module)  # begins anew
    with mean.loaded(dict(module.named_parameters())):
        assert module.weight.tolist() == [[8.0, 8.0]]


def test_weights_come_back_after_an_error():
    mean, module = taken([1.0, 5.0])
    with pytest.raises(KeyError), mean.loaded(dict(module.named_parameters())):
        raise KeyError
    assert module.weight.tolist() == [[5.0, 5.0]]
