"""A network for one thread with the weights of another."""

import torch

from sklearn_softeq.networks import build_network
from sklearn_softeq.twins import twin_of


def test_a_twin_has_the_same_tensors_and_hooks_of_its_own():
    pathways = ("conv", "p4_conv", "sparse_fc")
    network = build_network((1, 4, 4), 3, pathways=pathways, width=2)
    network.blocks[0].enabled["sparse_fc"] = False
    twin, images, seen = twin_of(network), torch.randn(5, 1, 4, 4), []
    pairs = [
        (list(a()), list(b()))
        for a, b in ((network.parameters, twin.parameters), (network.buffers, twin.buffers))
    ]
    assert all(a is b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    assert not {id(m) for m in network.modules()} & {id(m) for m in twin.modules()}
    twin.blocks[0].register_forward_hook(lambda *args: seen.append(1))
    network(images)
    assert not seen
    assert torch.equal(twin(images), network(images))
    assert seen == [1]
