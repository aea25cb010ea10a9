"""Several processes that train one model, under torchrun or in a group that the caller made."""

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["ALONE", "Processes", "joined"]


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Parameters
    ----------
    rank : int, default=0
        Of this process.
    size : int, default=1
        How many there are.
    """

    rank: int = 0
    size: int = 1

    def add(self, tensor: torch.Tensor) -> None:
        """Put the sum over all processes into a tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agreed(self, value: Any) -> Any:
        """The first process's value, whatever the others have."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


ALONE = Processes()


def joined(device: torch.device) -> Processes:
    """This process among all that share the fit; alone unless it was started as one of several.

    A process group that exists is taken. Otherwise torchrun's, or accelerate's, environment is,
    with NCCL between CUDA devices and Gloo between CPUs. A process that dies breaks its
    connections, which ends the others with an error.

    Parameters
    ----------
    device : torch.device
        That this process computes on.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
            return ALONE
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())
