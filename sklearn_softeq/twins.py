"""A network for one thread, with the weights of another network."""

import copy
from typing import TypeVar

from torch import nn

__all__ = ["twin_of"]

Network = TypeVar("Network", bound=nn.Module)


def twin_of(network: Network) -> Network:
    """A copy of the modules with the very same tensors.

    Hooks that are set on it are not seen by other threads, which may predict with the network in
    the meantime.
    """
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
