"""A network for one thread, with the weights of another network."""

import copy
from typing import TypeVar

from torch import nn

__all__ = ["twin_of"]

Network = TypeVar("Network", bound=nn.Module)


def twin_of(network: Network) -> Network:
    """A copy of the modules whose tensors lie where those of the network do.

    Hooks that are set on it, its mode, and whether its parameters ask for gradients are not seen by
    other threads, which may predict with the network in the meantime.
    """
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, shared | {id(buffer): buffer for buffer in network.buffers()})
