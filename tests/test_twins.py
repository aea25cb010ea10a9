"""A network for one thread with the weights of another."""

import torch

from sklearn_softeq.networks import build_network
from sklearn_softeq.twins import twin_of


def small_network():
    network = build_network((1, 4, 4), 3, pathways=("conv", "p4_conv", "sparse_fc"), width=2)
    network.blocks[0].enabled["sparse_fc"] = False
    return network


def test_a_twin_has_the_same_tensors_and_hooks_of_its_own():
    network = small_network()
    twin, images, seen = twin_of(network), torch.randn(5, 1, 4, 4), []
    pairs = [
        (list(a()), list(b()))
        for a, b in ((network.parameters, twin.parameters), (network.buffers, twin.buffers))
    ]
    places = [(a.data_ptr(), b.data_ptr()) for pair in pairs for a, b in zip(*pair, strict=True)]
    assert all(a == b for a, b in places)
    assert not {id(m) for m in network.modules()} & {id(m) for m in twin.modules()}
    twin.blocks[0].register_forward_hook(lambda *args: seen.append(1))
    network(images)
    assert not seen
    assert torch.equal(twin(images), network(images))
    assert seen == [1]


def test_whether_a_twin_asks_for_gradients_is_its_own():
    network = small_network()
    first = next(network.parameters()).requires_grad_(False)
    twin = twin_of(network)
    asked = [p.requires_grad for p in network.parameters()]
    assert [p.requires_grad for p in twin.parameters()] == asked
    for parameter in twin.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    assert [p.requires_grad for p in network.parameters()] == asked
    with torch.no_grad():
        first.fill_(3.0)
    assert (next(twin.parameters()) == 3.0).all()
