"""What is told of a fit while it lasts: printed lines, and to callbacks of scikit-learn and skorch.

To those of scikit-learn a fit is a task, and each epoch one below it. They are experimental there;
where they are missing, fits have none.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from skorch.callbacks import (
    BatchScoring,
    Callback,
    EpochScoring,
    LRScheduler,
    PassthroughScoring,
)

from .training import SoftEquivariantNet

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # another version of scikit-learn

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands for a scikit-learn without callbacks."""


__all__ = ["CallbackSupportMixin", "FitTasks", "ProgressLine", "check_callbacks"]

#: Noises that a line of output lists one by one.
MOST_NOISES = 4


class FitTasks(Callback):
    """Tells scikit-learn's callbacks of an estimator about its fit and each epoch.

    Parameters
    ----------
    estimator : estimator
        That is being fitted, and has callbacks.
    X, y : array-like
        As the user passed them.
    sample_weight : array-like or None
        Likewise.
    fitted : callable
        From the net, after an epoch, to the attributes that make a copy of the estimator one that
        is fitted so far. Asked only if a callback asks.
    max_epochs : int
        Cap of the epochs.
    """

    def __init__(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        sample_weight: Any,
        fitted: Callable[[Any], dict[str, Any]],
        max_epochs: int,
    ):
        self.fitted = fitted
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        self.about = {"estimator": estimator, "X": X, "y": y, "metadata": metadata}
        # The trials of a symmetric start come before the first epoch.
        self.root = estimator._init_callback_context(max_subtasks=max_epochs)
        self.root.call_on_fit_task_begin(**self.about)

    def on_epoch_begin(self, net, **kwargs):
        self.epoch = self.root.subcontext(task_name="epoch")
        self.epoch.call_on_fit_task_begin(**self.about)

    def on_epoch_end(self, net, **kwargs):
        # A callback may ask to stop; what follows is what follows the last epoch.
        if self.epoch.call_on_fit_task_end(
            **self.about, reconstruction_attributes=lambda: self.fitted(net)
        ):
            net.stop_ = True

    def ended(self) -> None:
        """The estimator is fitted."""
        self.root.call_on_fit_task_end(**self.about, reconstruction_attributes={})


class ProgressLine(Callback):
    """Prints a line at each evaluation; to stand before the course among the callbacks.

    Parameters
    ----------
    unit : ndarray of shape (K,) or (1,)
        What the deviation of a noise is multiplied by to be in units of its target.
    """

    def __init__(self, unit: np.ndarray):
        self.unit = unit

    def on_train_begin(self, net, **kwargs):
        evidence = net.course.evidence
        self._start, self._spare = net.course.start.name, net.course.spare_starts
        if evidence.steps and not net.history and net.processes_.rank == 0:
            print(f"curvature: {evidence.chosen.describe(len(net.data_))}")

    def on_epoch_end(self, net, **kwargs):
        course, epoch, last = net.course, len(net.history), net.history[-1]
        if not course.evidence.due(epoch) or net.processes_.rank > 0:
            return
        if course.start.name != self._start:
            self._start = course.start.name
            print(f"start: {self._start}, anew, as the symmetric pathways had learnt too little")
        if course.spare_starts != self._spare:
            self._spare = course.spare_starts
            print("start: other random weights, as the first had learnt too little")
        cap = "" if course.endless else f"/{net.max_epochs}"
        line = f"epoch {epoch}{cap}: loss {last['train_loss']:.4f}"
        if "log_marginal_likelihood" in last:
            line += f", {_evidence(last['log_marginal_likelihood'], net.data_.n_observations)}"
        print(f"{line} nats per observation{self._state(net)}")

    def ended(self, net: SoftEquivariantNet, evidence: float, n_observations: float) -> None:
        """Say how a fit has ended, from the last evidence."""
        if net.interrupted_:
            how = "broken off by an interrupt"
        elif net.course.capped:
            how = "cap reached, not converged"
        else:
            how = "converged" if net.course.converged else "stopped by a callback"
        found = f"{_evidence(evidence, n_observations)} nats per observation"
        print(f"end after epoch {len(net.history)}: {how}; {found}{self._state(net)}")

    def _state(self, net: SoftEquivariantNet) -> str:
        """The noise, if there is one, and what is on."""
        said = ""
        if deviations := net.criterion_.deviations:
            noises = [f"{value:.3g}" for value in deviations * self.unit]
            listed = ", ".join(noises) if len(noises) <= MOST_NOISES else _range(noises)
            said = f", noise {listed}"
        layers = net.module_.layers.values()
        on = [on for block in layers for on in block.enabled.values()]
        return f"{said}, {sum(on)} of {len(on)} pathways on in {len(layers)} layers"


def _evidence(value: float, n_observations: float) -> str:
    return f"log evidence {value / n_observations:.4f}"


def _range(numbers: list[str]) -> str:
    """The least and the greatest of many."""
    return f"{min(numbers, key=float)} to {max(numbers, key=float)}"


def check_callbacks(callbacks: Iterable[Any] | None, schedule: str) -> None:
    """Whether they are skorch's, and ask for nothing that a fit does not have.

    Parameters
    ----------
    callbacks : iterable of skorch callbacks, their classes, or pairs of a name and one, or None
    schedule : str
        The ``lr_schedule``.

    Raises
    ------
    TypeError
        If one is no skorch callback.
    ValueError
        If one needs validation data or batches of skorch's own, or would set the rate beside us.
    """
    for entry in callbacks or ():
        callback = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if isinstance(callback, type) and issubclass(callback, Callback):
            callback = callback()  # as skorch does
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks= takes skorch callbacks, got {callback!r}. Those of scikit-learn are "
                "set with set_callbacks."
            )
        name = type(callback).__name__
        if isinstance(callback, EpochScoring | BatchScoring | PassthroughScoring):
            raise ValueError(
                f"{name} needs a validation set or batches of skorch's own. Scores of each epoch "
                "come from scikit-learn's ScoringMonitor, which is set with set_callbacks."
            )
        monitor = vars(callback).get("monitor")
        if isinstance(monitor, str) and monitor.startswith("valid_"):
            raise ValueError(
                f"{name} monitors {monitor!r}, but there is no validation set. An EarlyStopping "
                "can monitor 'train_loss', a Checkpoint None or a function of the net."
            )
        if isinstance(callback, LRScheduler) and schedule != "constant":
            raise ValueError(
                f"{name} and lr_schedule={schedule!r} would both set the rate. Set "
                "lr_schedule='constant'."
            )
