"""What a process asks of CUDA devices: one of its own, and full precision where it matters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_precision", "own_device"]

#: What lets CUDA devices use TF32 in products and in convolutions.
_TF32 = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 on CUDA devices, whatever steps of the weights may use; restored afterwards."""
    if not torch.cuda.is_available():
        yield
        return
    before = [owner.fp32_precision for owner in _TF32]
    for owner in _TF32:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        for owner, value in zip(_TF32, before, strict=True):
            owner.fp32_precision = value


def own_device(device: torch.device) -> torch.device:
    """Of several processes on one machine each has the CUDA device of its number, if there is."""
    if device.type == "cuda" and device.index is None:
        number = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", number % max(torch.cuda.device_count(), 1))
    return device
