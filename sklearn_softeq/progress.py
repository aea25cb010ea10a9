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
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    LoadInitState,
    LRScheduler,
    PassthroughScoring,
)

from .training import OWN_CALLBACKS, SoftEquivariantNet

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # another version of scikit-learn

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands for a scikit-learn without callbacks."""


__all__ = ["CallbackSupportMixin", "FitTasks", "ProgressLine", "check_callbacks"]

#: Noises that a line of output lists one by one.
MOST_NOISES = 4

#: What the history has at evaluations only.
AT_EVALUATIONS = ("log_marginal_likelihood", "log_likelihood", "scatter", "log_det_ratio")


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
    """Prints a line at each evaluation.

    It stands before the course among the callbacks, so that a line says what was on when the
    evidence was computed, not what has been released or removed since.

    Parameters
    ----------
    unit : ndarray of shape (K,) or (1,)
        What the deviation of a noise is multiplied by to be in units of its target.
    """

    def __init__(self, unit: np.ndarray):
        self.unit = unit

    def on_train_begin(self, net, **kwargs):
        self._known: tuple[str, int] | None = None
        evidence = net.course.evidence
        if evidence.steps and not net.history and net.processes_.rank == 0:
            print(f"curvature: {evidence.chosen.describe(len(net.data_))}")

    def on_epoch_begin(self, net, **kwargs):
        # Not as training begins: a fit that goes on finds its state after that.
        if self._known is None:
            self._known = net.course.start.name, net.course.spare_starts

    def on_epoch_end(self, net, **kwargs):
        course, epoch, last = net.course, len(net.history), net.history[-1]
        if not course.evidence.due(epoch) or net.processes_.rank > 0:
            return
        assert self._known is not None
        name, spare = self._known
        self._known = course.start.name, course.spare_starts
        if course.start.name != name:
            now = course.start.name
            print(f"start: {now}, anew, as the symmetric pathways had learnt too little")
        if course.spare_starts != spare:
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
        If one has the name of one of ours, needs validation data or batches of skorch's own,
        monitors what not each epoch has, or would set rate or weights beside us.
    """
    for entry in callbacks or ():
        callback = entry
        if isinstance(entry, tuple) and len(entry) == 2:
            name, callback = entry
            if name in OWN_CALLBACKS:
                raise ValueError(f"callbacks= has one named {name!r}, as one of training is named.")
        if isinstance(callback, type) and issubclass(callback, Callback):
            callback = callback()  # as skorch does
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks= takes skorch callbacks, got {callback!r}. Those of scikit-learn are "
                "set with set_callbacks."
            )
        if (reason := _refused(callback, schedule)) is not None:
            raise ValueError(f"{type(callback).__name__} {reason}")


def _refused(callback: Callback, schedule: str) -> str | None:
    """Why a callback has no place in a fit, if it has none."""
    if isinstance(callback, EpochScoring | BatchScoring | PassthroughScoring):
        return (
            "needs a validation set or batches of skorch's own. Scores of each epoch come from "
            "scikit-learn's ScoringMonitor, which is set with set_callbacks."
        )
    if isinstance(callback, LRScheduler) and schedule != "constant":
        return f"and lr_schedule={schedule!r} would both set the rate. Set lr_schedule='constant'."
    if isinstance(callback, LoadInitState):
        return (
            "restores weights without their precisions and all else that training goes on from. "
            "Set checkpoint_dir, or warm_start=True."
        )
    if vars(callback).get("load_best"):
        return (
            "would load other weights than those that the evidence is of, with load_best=True. "
            "Set keep_best=True of the estimator."
        )
    return _monitors_in_vain(callback)


def _monitors_in_vain(callback: Callback) -> str | None:
    """What it monitors and the history has not, or not in each epoch."""
    monitor = vars(callback).get("monitor")
    if not isinstance(monitor, str) or not isinstance(callback, EarlyStopping | Checkpoint):
        return None
    if monitor.startswith("valid_"):
        reason = "but there is no validation set"
    elif monitor == "train_loss_best":
        reason = "which only skorch's own scoring notes"
    elif monitor in AT_EVALUATIONS:
        reason = (
            "which only some epochs have. Training ends by itself when the evidence has settled "
            "(tol, n_iter_no_change)"
        )
    else:
        return None
    return (
        f"monitors {monitor!r}, {reason}. An EarlyStopping can monitor 'train_loss', a Checkpoint "
        "None or a function of the net."
    )
