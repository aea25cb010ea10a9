"""What is done where memory runs out: fewer rows at a time in prediction, advice in training."""

from collections.abc import Callable
from functools import wraps
from traceback import clear_frames
from typing import Any, TypeVar

import torch

from .notices import warn

__all__ = ["advises_on_memory", "in_fewer_rows", "ran_out"]

Found = TypeVar("Found")

#: How torch says so where it raises a plain RuntimeError: its allocator on CPUs, by platform, and
#: the libraries below it on CUDA devices.
SAID = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or of the machine, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in SAID)


def in_fewer_rows(predict: Callable[[int], Found], n_rows: int, tile: int) -> Found:
    """What a function finds with so many rows at a time, or with fewer if there is no memory.

    The number is halved as often as need be, and then serves all rows alike: all are predicted
    anew with it, so that a row depends on no other one of the same call.

    Parameters
    ----------
    predict : callable
        From the number of rows at a time to what is predicted.
    n_rows : int
        To begin with, a multiple of ``tile``.
    tile : int
        What numbers of rows are multiples of. With one tile the error is the caller's.

    Warns
    -----
    UserWarning
        Once, if fewer rows than ``n_rows`` were taken.
    """
    rows = n_rows
    while True:
        try:
            found = predict(rows)
            break
        except (RuntimeError, MemoryError) as error:
            if rows <= tile or not ran_out(error):
                raise
        # Only here: as long as the error is handled it holds what had been allocated.
        rows = max(rows // 2 // tile, 1) * tile
    if rows < n_rows:
        warn(
            f"There was not enough memory to predict {n_rows} rows at a time, so it was done with "
            f"{rows}. Last digits can differ from those of predictions by {n_rows} rows.",
        )
    return found


def advises_on_memory(method: Callable) -> Callable:
    """Have a method of an estimator that trains say what to lower where memory runs out.

    Raises
    ------
    MemoryError
        In place of what torch raises, which is its cause.
    """

    @wraps(method)
    def advising(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            # What they hold would be held for as long as somebody keeps the error.
            clear_frames(error.__traceback__)
            raise MemoryError(_advice(self.get_params(deep=False), error)) from error

    return advising


def _advice(parameters: dict[str, Any], error: BaseException) -> str:
    present = {name: repr(value) for name, value in parameters.items()}
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"There was not enough memory to train ({said}). Lower batch_size, which is "
        f"{present['batch_size']}, for the steps of the weights; for the evidence set "
        f'curvature="rademacher" (curvature is {present["curvature"]}) and lower '
        f"curvature_subset, which is {present['curvature_subset']}; everything grows with width, "
        f"which is {present['width']}, and with the sides of the images."
    )
