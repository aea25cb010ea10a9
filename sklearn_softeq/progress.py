"""The bridge to scikit-learn's callbacks: a fit is a task, and each of its epochs one below it.

They are new and experimental there; where they are missing, fits have none.
"""

from collections.abc import Callable
from typing import Any

from skorch.callbacks import Callback

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # another version of scikit-learn

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands for a scikit-learn without callbacks."""


__all__ = ["CallbackSupportMixin", "FitTasks"]


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
