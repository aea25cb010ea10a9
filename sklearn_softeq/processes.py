"""Several processes that train one model, under torchrun or in a group that the caller made."""

import atexit
import os
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["ALONE", "Processes", "alone", "joined"]

Data = TypeVar("Data", bound=Sized)


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

    def add_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """The same for each of some tensors of one dtype, in one go."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.add(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agreed(self, value: Any) -> Any:
        """The first process's value, whatever the others have."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def by_first(self, find: Callable[[], Any]) -> Any:
        """What the first process finds; an error of its is raised in all."""
        if self.size == 1:
            return find()
        found, error = None, None
        if self.rank == 0:
            try:
                found = find()
            except (ValueError, OSError) as raised:
                error = raised
        found, error = self.agreed((found, error))
        if error is not None:
            raise error
        return found

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def alike(self, prepare: Callable[[], Data], fingerprint: Callable[[Data], str]) -> Data:
        """What each process has prepared, if it is the same in all; none waits for another.

        Raises
        ------
        ValueError
            In every process, if one has failed, if they differ, or if there are more of them than
            rows.
        """
        try:
            prepared = prepare()
            own = fingerprint(prepared), ""
        except Exception as error:
            self.gathered(("", f"{type(error).__name__}: {error}"))
            raise
        found = self.gathered(own)
        if problems := [said for _, said in found if said]:
            raise ValueError(f"Another process has refused its data: {problems[0]}")
        if len(set(found)) > 1:
            raise ValueError(
                "Each process has to be given the same data, of which it takes its share, in the "
                "same order, and the same parameters. Here they differ."
            )
        if len(prepared) < self.size:
            raise ValueError(
                f"{len(prepared)} rows are too few for {self.size} processes; each needs one."
            )
        return prepared


ALONE = Processes()


def alone() -> bool:
    """Whether there is no group of processes, and none to be joined."""
    if not dist.is_available():
        return True
    launched = dist.is_torchelastic_launched() and os.environ.get("WORLD_SIZE", "1") != "1"
    return not (dist.is_initialized() or launched)


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
    if alone():
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where objects are sent from
    return Processes(dist.get_rank(), dist.get_world_size())
