"""Precisions by name: what holds them, how far they go."""

import copy
import math

import pytest
import torch

from sklearn_softeq.hyperparameters import LOG_PRECISION_BOUNDS, LayerwisePrior, squared_norms
from sklearn_softeq.networks import build_network


@pytest.fixture
def network():
    pathways = ("conv", "factored_fc", "fc")
    return build_network((1, 2, 4), 3, pathways=pathways, width=2, dtype=torch.float64)


@pytest.fixture
def tensors(network):
    return dict(network.named_parameters())


def test_each_tensor_has_its_own_precision_in_order(tensors):
    prior = LayerwisePrior(tensors)
    assert list(prior.index) == list(tensors)
    assert list(prior.index.values()) == list(range(len(tensors)))
    assert prior.log_precision.shape == (len(tensors),)


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_biases_that_are_not_there_have_no_precision(architecture):
    pathways = ("p4_conv", "sparse_conv", "sparse_fc")
    options = {"pathways": pathways, "width": 1, "architecture": architecture}
    tensors = dict(build_network((1, 4, 4), 3, **options).named_parameters())
    prior = LayerwisePrior(tensors, 2.0)
    assert list(prior.index) == list(tensors)
    assert not any(name.endswith("V.bias") for name in prior.index)
    assert {"head.hidden.pooled.weight", "head.hidden.free.bias"} <= set(prior.index)
    squares = {name: w.detach().square().sum().item() for name, w in tensors.items()}
    assert prior.scatter(tensors) == pytest.approx(2.0 * sum(squares.values()), rel=1e-5)


def test_log_precision_is_saved_but_not_trained(tensors):
    prior = LayerwisePrior(tensors, precision=3.0)
    assert list(prior.parameters()) == []
    prior.set_precision("blocks.0.conv.weight", 7.0)
    other = LayerwisePrior(tensors)
    other.load_state_dict(copy.deepcopy(prior.state_dict()))
    assert other.precisions() == prior.precisions()
    assert prior.log_precision.dtype == torch.float64


def test_start(tensors):
    assert set(LayerwisePrior(tensors).precisions().values()) == {1.0}
    assert LayerwisePrior(tensors, 2.5).precisions() == pytest.approx(dict.fromkeys(tensors, 2.5))
    extreme = LayerwisePrior(tensors, 1e30)
    assert (extreme.log_precision == LOG_PRECISION_BOUNDS[1]).all()


def test_set_precision(tensors):
    prior = LayerwisePrior(tensors)
    prior.set_precision("blocks.1.fc.weight", 4.0)
    changed = {name for name, value in prior.precisions().items() if value != 1.0}
    assert changed == {"blocks.1.fc.weight"}
    assert prior.precisions()["blocks.1.fc.weight"] == pytest.approx(4.0)


@pytest.mark.parametrize(("start", "expected"), [(2.5, 2.5), (1e30, math.exp(18))])
def test_reset(tensors, start, expected):
    prior = LayerwisePrior(tensors, start)
    for i, name in enumerate(tensors):
        prior.set_precision(name, 0.1 + i)
    prior.reset()
    assert list(prior.precisions().values()) == pytest.approx([expected] * len(tensors))


@pytest.mark.parametrize(("value", "end"), [(1e-20, 0), (1e20, 1)])
def test_set_precision_keeps_to_the_bounds(tensors, value, end):
    prior = LayerwisePrior(tensors)
    prior.set_precision("blocks.0.fc.weight", value)
    found = prior.precisions()["blocks.0.fc.weight"]
    assert math.log(found) == pytest.approx(LOG_PRECISION_BOUNDS[end])


def test_squared_norms(tensors):
    found = squared_norms(tensors)
    expected = {name: float((w.detach().numpy() ** 2).sum()) for name, w in tensors.items()}
    assert found == pytest.approx(expected)
    assert squared_norms({}) == {}


def test_squared_norms_of_many_float32_weights_are_summed_well():
    value = 1e-3
    found = squared_norms({"w": torch.full((4_000_000,), value)})["w"]
    assert found == pytest.approx(4.0, rel=1e-5)


def test_scatter_is_minus_twice_the_log_prior_of_the_weights(tensors):
    prior = LayerwisePrior(tensors)
    for i, name in enumerate(n for n in tensors if n.endswith("weight")):
        prior.set_precision(name, 0.5 + i)
    prior.set_precision("head.output.bias", 3.0)
    with torch.no_grad():
        for w in tensors.values():
            w.normal_()
    expected = 0.0
    for name, w in tensors.items():
        normal = torch.distributions.Normal(0.0, prior.precisions()[name] ** -0.5)
        expected += -2 * (normal.log_prob(w) - normal.log_prob(torch.zeros(()))).sum().item()
    assert prior.scatter(tensors) == pytest.approx(expected)


def test_scatter_of_some_of_the_tensors(tensors):
    prior = LayerwisePrior(tensors, 2.0)
    some = {name: w for name, w in tensors.items() if "conv" in name}
    expected = 2.0 * sum(w.detach().square().sum().item() for w in some.values())
    assert prior.scatter(some) == pytest.approx(expected)
    assert prior.scatter({}) == 0
