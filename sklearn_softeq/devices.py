"""What a process asks of CUDA devices: one of its own, and full precision where it matters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_precision", "own_device"]

#: What lets CUDA devices use TF32 in products and convolutions, and the value that forbids it.
_TF32 = (
    ((torch.backends.cuda.matmul, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False))
    if torch.__version__ < "2.9"
    else (
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    )
)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 on CUDA devices, whatever steps of the weights may use; restored afterwards."""
    before = [getattr(owner, name) for owner, name, _ in _TF32]
    for owner, name, off in _TF32:
        setattr(owner, name, off)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(_TF32, before, strict=True):
            setattr(owner, name, value)


def own_device(device: torch.device) -> torch.device:
    """Of several processes on one machine each has the CUDA device of its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
