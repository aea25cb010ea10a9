"""A trained net as plain numbers: arrays, strings and dictionaries, and back.

So a fitted estimator can be saved by whatever saves arrays, is no larger than its weights and a few
kilobytes, and holds no class of skorch's or torch's that a loader would have to trust.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ._version import __version__
from .assembly import Assembly, Seeds
from .batches import TrainingData
from .checkpoint import columns, plain_start, rows, start_from
from .notices import warn
from .schedules import LearningRate
from .training import SoftEquivariantNet

__all__ = ["check_settings", "check_version", "packed", "unpacked"]


def packed(net: SoftEquivariantNet) -> dict[str, Any]:
    """All that predictions and further training need of a net between two calls of ``fit``.

    The moments of the optimizers and the losses of single batches are left out.
    """
    settings, seeds = net.origin
    course = net.course
    states = (net.iterator_train__random_state, net.iterator_train__augment_state)
    return {
        "settings": dict(settings),
        "seeds": list(seeds),
        "dtype": str(next(net.module_.parameters()).dtype).removeprefix("torch."),
        "network": {
            name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value
            for name, value in net.module_.state_dict().items()
        },
        "log_precision": net.prior_.log_precision.cpu().numpy(),
        "noise": net.criterion_.log_hyperparameters(),
        "history": columns(net.history),
        "course": {
            "start": plain_start(course.start),
            "rate": asdict(course.rate),
            "holding": course.holding,
            "endless": course.endless,
            "converged": course.converged,
            "capped": course.capped,
            "ramp": course.evidence.ramp,
            "ramp_from": course.evidence.ramp_from,
        },
        "random_states": [state.get_state(legacy=False) for state in states],
    }


def unpacked(state: Mapping[str, Any], clf: Any) -> SoftEquivariantNet:
    """The net again.

    Parameters
    ----------
    state : dict
        As from :func:`packed`.
    clf : SoftEquivariantBase
        Its fitted attributes count, such as classes, image shape and device, not its parameters:
        these may have been changed since the net was trained.
    """
    owner = type(clf)(**state["settings"])
    for name in clf._built_from:
        setattr(owner, name, getattr(clf, name))
    inputs = torch.empty(0, *clf.image_shape_, dtype=getattr(torch, state["dtype"]))
    no_rows = TrainingData(inputs, torch.empty(0), torch.empty(0), clf.n_observations_)
    course = state["course"]
    # A further fit builds another net, and asks for its memory then.
    net = Assembly(owner, no_rows, Seeds(*state["seeds"]), to_train=False).resumed(
        start_from(course["start"]), course["holding"], course["endless"]
    )
    net.discard(
        (layer, name)
        for layer, block in net.module_.layers.items()
        for name in set(block.pathways) - set(_extra(state, layer)["enabled"])
    )
    net.module_.load_state_dict(
        {
            # A copy: what is loaded may be a file that was mapped to be read.
            name: torch.tensor(value) if isinstance(value, np.ndarray) else value
            for name, value in state["network"].items()
        }
    )
    net.prior_.log_precision.copy_(torch.tensor(state["log_precision"]))
    net.criterion_ = net.criterion_.with_log_hyperparameters(state["noise"])
    net.history_.extend(rows(state["history"]))
    net.course.rate = LearningRate(**course["rate"])
    if net.course.endless:  # the moments of the optimizer have to be found again
        net.course.rate.rewarm(len(net.history))
    net.course.converged, net.course.capped = course["converged"], course["capped"]
    net.course.evidence.ramp = course["ramp"]
    net.course.evidence.ramp_from = course["ramp_from"]
    for name, found in zip(("random", "augment"), state["random_states"], strict=True):
        getattr(net, f"iterator_train__{name}_state").set_state(found)
    net.module_.eval()
    return net


def check_version(found: str, name: str) -> None:
    """Say so if a model was saved by another version.

    Warns
    -----
    UserWarning
        With both versions.
    """
    if found != __version__:
        warn(
            f"This {name} was saved by sklearn_softeq {found} and is loaded by {__version__}. "
            "Predictions may differ; fit it again, or load it with the version that saved it."
        )


def check_settings(settings: Mapping[str, Any], known: Iterable[str], found: str) -> None:
    """Refuse a model that was trained with parameters that this version does not know.

    Parameters
    ----------
    settings : mapping
        The parameters that it was trained with.
    known : iterable of str
        Names of those that there are.
    found : str
        The version that saved it.

    Raises
    ------
    ValueError
        With both versions and the names.
    """
    # To leave them out, with a warning, would let a model load that predicts something else: what
    # a new parameter does to a network is not known here.
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"This model was trained by sklearn_softeq {found} with parameters that {__version__} "
            f"does not know: {', '.join(unknown)}. Load it with the version that saved it, or a "
            "later one."
        )


def _extra(state: Mapping[str, Any], layer: str) -> dict[str, Any]:
    return state["network"][f"{layer}._extra_state"]
