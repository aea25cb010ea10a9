"""The training data on their device, their batches, and what augments them."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from .curvature import Batch
from .layers import shift
from .processes import ALONE, Processes

__all__ = ["AUGMENTATIONS", "BATCH_ROWS", "Batches", "TrainingData", "batch_rows", "crop_flip"]

Augmentation = Callable[[torch.Tensor], torch.Tensor]

_LENT = threading.Lock()

#: Rows of a batch where there are many.
BATCH_ROWS = 128
#: Of fewer rows an epoch has so many batches, if each has about so many rows: epochs of one or two
#: steps train little before the first evidence. What is as few as this is one batch, so that
#: weights are repetitions to the last digit there.
N_BATCHES, FEWEST_ROWS, ONE_BATCH = 8, 16, 64


def batch_rows(batch_size: int | str, n_rows: int) -> int:
    """Rows of a batch, as they are given or, for "auto", for data of so many rows."""
    if isinstance(batch_size, int | np.integer):
        return int(batch_size)
    if n_rows <= ONE_BATCH:
        return ONE_BATCH
    return min(BATCH_ROWS, max(FEWEST_ROWS, math.ceil(n_rows / N_BATCHES)))


@dataclass(frozen=True, eq=False)
class TrainingData(torch.utils.data.Dataset):
    """Images, targets and weights on one device, indexed by whole batches of rows.

    Parameters
    ----------
    inputs : tensor of shape (n, C, H, W)
    targets : tensor of shape (n,) or (n, K)
        Codes of classes, or K numbers of each row.
    weights : tensor of shape (n,)
        Repetitions of each row, positive.
    n_observations : float
        N, the weight that the data stand for: their sum, or more when they are one chunk of many.
    digests : mapping of str to str, optional
        Of the data as a user has passed them, by which they are known again.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    n_observations: float
    digests: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows):
        return self.inputs[rows], (self.targets[rows], self.weights[rows])

    @cached_property
    def unit_weights(self) -> bool:
        """Whether every row counts once."""
        return bool((self.weights == 1).all())

    @property
    def n_targets(self) -> int:
        """Numbers that are predicted of each row; of a class it is one."""
        return self.targets[:1].numel()

    @property
    def _strata(self) -> torch.Tensor:
        """The class of each row; where targets are numbers all are of one."""
        if self.targets.dim() == 1:
            return self.targets
        return self.targets.new_zeros(len(self), dtype=torch.int64)

    def split(
        self, every: int, generator: torch.Generator, fewest: int = 1
    ) -> tuple["TrainingData", "TrainingData"] | None:
        """Hold out one row of so many, stratified by class if there are classes.

        Equal rows stay together: a copy of a row that was trained on would judge nothing, and a
        row that is repeated is treated like one of a larger weight. A class of a single row is
        kept: nothing can be predicted of a class that was not trained on.

        Parameters
        ----------
        every : int
        generator : torch.Generator
            Of the order within a class; on the CPU.
        fewest : int, default=1
            Different rows that have to be held out at least.

        Returns
        -------
        kept, held : TrainingData
            None instead if there are not enough different rows to choose from.
        """
        direction = torch.randn(self.inputs[0].numel(), generator=generator).to(self.inputs)
        parts = self.inputs.flatten(1).split(4096)
        # Not a matrix product, in which the last bit may depend on a row's place among the others.
        along = torch.cat([(part * direction).sum(1) for part in parts])
        order, strata = along.argsort(), self._strata
        order = order[strata[order].argsort(stable=True)]
        keys = torch.stack([strata.to(along), along], 1)[order]
        changes = (keys[1:] != keys[:-1]).any(1)
        different = torch.cat([changes.new_zeros(1), changes]).cumsum(0)  # number of each row
        classes = strata[order[torch.cat([changes.new_ones(1), changes])]]
        shared = torch.bincount(classes)[classes] > 1  # of each different row
        if shared.sum() < every * fewest:
            return None
        first = torch.randint(every, (), generator=generator).item()
        chosen = shared & ((shared.cumsum(0) - 1) % every == first)
        out = torch.zeros(len(self), dtype=torch.bool, device=order.device)
        out[order] = chosen[different]
        kept, held = (self._rows(part) for part in (~out, out))
        return kept, held

    def _rows(self, chosen: torch.Tensor) -> "TrainingData":
        inputs, (targets, weights) = self[chosen]
        share = weights.sum() / self.weights.sum()
        return TrainingData(inputs, targets, weights, share.item() * self.n_observations)

    def sample(
        self, size: int, traces: torch.Tensor, generator: torch.Generator, copies: int = 1
    ) -> "TrainingData":
        """So many rows, drawn more often the more they add to the curvature, that stand for all.

        Half of a row's chance is its share of the weights, which the input factors need, and half
        its share of the trace of the output Hessian: a network that fits nearly all rows has its
        curvature in the few that it is undecided about. Weights make up for the chances. A row
        is taken as often as its chance says, at most ``copies`` times, and along the order of
        traces rows are taken at even steps of their chances, so that every degree of indecision
        is represented.

        Parameters
        ----------
        size : int
            Below the number of rows.
        traces : tensor of shape (n,)
            Trace of the output Hessian of each row.
        generator : torch.Generator
            Of the order among equal traces and of the place of the first step; on the CPU.
        copies : int, default=1
            More are of use where a row is looked at through random columns, other ones each time.

        References
        ----------
        Sampling with unequal probabilities in systematic steps: W. G. Madow, Annals of
        Mathematical Statistics 20 (1949).
        """
        weights, traces = self.weights.double(), traces.double()
        curvature = weights * traces
        shares = weights / weights.sum()
        shares = shares + torch.where(
            curvature.sum() > 0, curvature / curvature.sum().clamp_min(1e-300), shares
        )
        chances = copies * _chances(shares, size / copies)
        shuffled = torch.randperm(len(self), generator=generator).to(traces.device)
        order = shuffled[traces[shuffled].argsort(stable=True)]
        first = torch.rand((), generator=generator, dtype=torch.float64).item()
        steps = torch.arange(size, dtype=torch.float64, device=order.device) + first
        upto = chances[order].cumsum(0)
        places = torch.searchsorted(upto, steps * (upto[-1] / size), right=True)
        rows = order[places.clamp_max(len(self) - 1)]  # rounding may lead beyond the last one
        inputs, (targets, _) = self[rows]
        stand_for = weights[rows] * (self.n_observations / weights.sum()) / chances[rows]
        return replace(
            self, inputs=inputs, targets=targets, weights=stand_for.to(self.weights.dtype)
        )

    def in_order(self, size: int) -> Iterator[Batch]:
        """Batches of nearly equal size, at most ``size`` rows, in order."""
        n_batches = math.ceil(len(self) / size)
        columns = (self.inputs, self.targets, self.weights)
        return zip(*(column.tensor_split(n_batches) for column in columns), strict=True)


def _chances(shares: torch.Tensor, size: float) -> torch.Tensor:
    """Chances in proportion to shares whose sum is ``size``; none above 1."""
    falling = shares.sort(descending=True).values
    rest = falling.flip(0).cumsum(0).flip(0)  # of each and all smaller ones
    left = size - torch.arange(len(shares), device=shares.device)  # after so many certain ones
    n_certain = (falling * left <= rest).byte().argmax(0, keepdim=True)
    return (shares * (left / rest).gather(0, n_certain)).clamp_max(1.0)


class Batches:
    """Iterates over shuffled batches of nearly equal size, at most ``batch_size``.

    One step on a left-over batch of a few rows would be all noise, so the rows are spread evenly.
    A batch is (inputs, (targets, weights, rows, n)); of several processes each has its share of
    its n rows.

    Parameters
    ----------
    dataset : TrainingData
    batch_size : int
    random_state : RandomState
        Of the order of the rows.
    augment : callable, optional
        From the images of a batch to others in their place.
    augment_state : RandomState, optional
        Of its random numbers.
    processes : Processes, optional
        Those that share each batch.
    """

    def __init__(
        self,
        dataset: TrainingData,
        batch_size: int,
        random_state: np.random.RandomState,
        augment: Augmentation | None = None,
        augment_state: np.random.RandomState | None = None,
        processes: Processes = ALONE,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.random_state = random_state
        self.augment = augment
        self.augment_state = augment_state or np.random.RandomState(0)
        self.processes = processes

    def __iter__(self):
        own = slice(self.processes.rank, None, self.processes.size)
        for rows in self._rows():
            if self.augment is None:
                inputs, columns = self.dataset[rows[own]]
            else:
                # The whole batch in each process, so that it meets the same random numbers.
                inputs, columns = self.dataset[rows]
                inputs = self._augmented(self.augment, inputs)[own]
                columns = tuple(column[own] for column in columns)
            yield inputs, (*columns, rows[own], len(rows))

    def _rows(self):
        n_rows = len(self.dataset)
        if n_rows <= self.batch_size:
            # The whole data in their own order: nothing here may depend on n or on a shuffle.
            return [torch.arange(n_rows, device=self.dataset.inputs.device)]
        order = torch.from_numpy(self.random_state.permutation(n_rows))
        order = order.to(self.dataset.inputs.device)  # one transfer for all batches
        return torch.tensor_split(order, math.ceil(n_rows / self.batch_size))

    def _augmented(self, augment: Augmentation, inputs: torch.Tensor) -> torch.Tensor:
        """The images after augmentation, whose random numbers depend on our state alone."""
        seed = self.augment_state.randint(2**31 - 1)
        devices = [inputs.device] if inputs.is_cuda else []
        # The global generators are lent to it, to one thread at a time.
        with _LENT, torch.random.fork_rng(devices), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
            found = augment(inputs.clone())
        if not isinstance(found, torch.Tensor) or found.shape != inputs.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(
                f"augment has to return a tensor of the shape {tuple(inputs.shape)} that it was "
                f"given, but it returned {shape}."
            )
        return found.to(inputs)


def crop_flip(images: torch.Tensor) -> torch.Tensor:
    """Random crops of images padded with zeros by an eighth of their sides, and random flips.

    The usual augmentation of natural images: for 32×32 pixels a margin of 4, then left ↔ right
    with probability one half.

    Parameters
    ----------
    images : tensor of shape (n, C, H, W)
    """
    n, _, height, width = images.shape
    rows, columns = height // 8, width // 8
    padded = torch.nn.functional.pad(images, (columns, columns, rows, rows))
    # Drawn on the device: numbers from the CPU would have to be waited for.
    corners = (
        torch.randint(2 * margin + 1, (n,), device=images.device) for margin in (rows, columns)
    )
    crops = shift(padded, *corners)[:, :, :height, :width]
    flipped = torch.rand(n, device=images.device) < 0.5
    return torch.where(flipped[:, None, None, None], crops.flip(3), crops)


AUGMENTATIONS: dict[str, Augmentation] = {"crop_flip": crop_flip}
