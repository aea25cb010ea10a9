"""What the estimators have in common: data on the device, nets, fitted attributes, states.

An estimator says which data it takes, by ``_prepare``, and what its predictions are.
"""

import hashlib
import math
import warnings
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Bunch, check_random_state

from ._version import __version__
from .assembly import Assembly, Seeds
from .batches import TrainingData
from .budget import rows_of_a_pass
from .checkpoint import Checkpoint, Run, identity, open_run, restore, start_from
from .memory import advises_on_memory
from .persistence import check_version, packed, unpacked
from .posterior import Posterior
from .processes import alone, joined
from .progress import CallbackSupportMixin, FitTasks
from .symmetry import (
    dimension_shares,
    enabled_table,
    layer_names,
    output_shares,
    pathway_names,
    precision_table,
    sum_table,
)
from .training import SoftEquivariantNet
from .validation import (
    check_images,
    check_same_shape,
    present_device,
    resolve_device,
)

__all__ = ["SoftEquivariantBase"]


class SoftEquivariantBase(CallbackSupportMixin, BaseEstimator):
    """The part of an estimator that does not hang on what is predicted.

    Attributes are those of the estimators.
    """

    image_shape_: tuple[int, int, int]
    device_: torch.device

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self):
        return "net_" in vars(self)

    def __sklearn_clone__(self):
        twin = super().__sklearn_clone__()
        # Its fits may be some of a search's: each has a folder of its own, and an interrupt is
        # meant for all.
        twin._is_clone = True
        return twin

    def __getstate__(self):
        """Plain values, arrays and parameters; nothing of torch's or skorch's."""
        state = super().__getstate__().copy()
        if self.__sklearn_is_fitted__():
            state["net_"] = packed(self.net_)
            state["device_"] = str(self.device_)
        if "posterior_" in state:
            state["posterior_"] = self.posterior_.packed()
        if "simplification_" in state:
            state["simplification_"] = dict(state["simplification_"])
        return {**state, "_sklearn_softeq_version": __version__}

    def __setstate__(self, state):
        state = dict(state)
        check_version(state.pop("_sklearn_softeq_version", "unknown"), type(self).__name__)
        net = state.pop("net_", None)
        super().__setstate__(state)
        if net is not None:
            self.device_ = present_device(state["device_"], self.device)
            self.net_ = unpacked(net, self)
        if "posterior_" in state:
            self.posterior_ = Posterior.unpacked(state["posterior_"]).to(self.device_)
        if "simplification_" in state:
            self.simplification_ = Bunch(**state["simplification_"])

    @property
    def module_(self):
        """The net's network; a property, so that no copy of it is ever pickled beside the net."""
        return self.net_.module_

    @contextmanager
    def _unchanged_on_error(self, error: type[BaseException] = BaseException):
        """A call that is refused leaves the estimator as it was."""
        before = dict(vars(self))
        try:
            yield
        except error:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    @advises_on_memory
    def _train(self, net: SoftEquivariantNet, data: TrainingData, run: Run | None = None) -> None:
        """Train and record; what fails half way must not pass for a fitted model."""
        self.n_observations_ = data.n_observations
        net.course.keeps_curvature = self.predictive == "laplace"
        net.ends_on_interrupt_ = "_is_clone" not in vars(self)
        try:
            if run is not None and run.outcome is not None:
                self._record(net, data, run.outcome)
                return
            net.partial_fit(data, epochs=run and run.epochs_left(net.max_epochs))
            net.callbacks_ = [entry for entry in net.callbacks_ if entry[0] != "tasks"]
            outcome = net.outcome(data)
            self._record(net, data, outcome)
            if run is not None and not net.interrupted_:  # else it can go on
                run.keep(net, self.symmetry_trials_, outcome)
        except BaseException:
            for name in [name for name in vars(self) if name.endswith("_")]:
                delattr(self, name)
            raise

    def _shared(self, *data, **options) -> TrainingData:
        """Checked data, which all processes have been given alike."""
        if alone():
            return self._prepare(*data, **options)
        processes = joined(resolve_device(self.device))
        return processes.alike(lambda: self._prepare(*data, **options), self._fingerprint)

    def _fingerprint(self, data: TrainingData) -> str:
        """Differs where the data, their order or a parameter that is a plain value do."""
        found = hashlib.sha256()
        for column in (data.inputs, data.targets, data.weights):
            found.update(column.cpu().numpy().tobytes())
        plain = (str, int, float, bool, tuple)
        parameters = {k: v for k, v in self.get_params().items() if isinstance(v, plain)}
        found.update(repr((self.classes_.tolist(), sorted(parameters.items()))).encode())
        return found.hexdigest()

    def _set_standardizer(self, X: np.ndarray, weights: np.ndarray, n_channels: int) -> None:
        """Weighted mean and deviation of each channel."""
        self.channel_mean_, self.channel_scale_ = np.zeros(n_channels), np.ones(n_channels)
        if not self.standardize:
            return
        pixels = X.reshape(len(X), n_channels, -1)  # (n, C, X)
        mean = np.average(pixels.mean(2, dtype=np.float64), axis=0, weights=weights)  # (C,)
        parts = np.array_split(pixels, len(X) // 4096 + 1)  # bounds the float64 copies
        spread = [np.square(part - mean[:, None]).mean(2) for part in parts]
        scale = np.sqrt(np.average(np.concatenate(spread), axis=0, weights=weights))
        # What varies by no more than rounding is constant, and is left at its own scale.
        constant = scale <= 10 * np.finfo(X.dtype).eps * np.abs(mean)
        self.channel_mean_, self.channel_scale_ = mean, np.where(constant, 1.0, scale)

    def _as_images(self, X: np.ndarray) -> torch.Tensor:
        """Standardised images (n, C, H, W) on the CPU, in the dtype of the computation."""
        dtype = {"float32": np.float32, "float64": np.float64}.get(self.dtype, X.dtype)
        if self.dtype == "auto" and (self.device_.type != "cpu" or self.amp is not None):
            dtype = np.float32
        images = X.reshape(len(X), *self.image_shape_)
        mean, scale = (
            figure.astype(X.dtype)[:, None, None]
            for figure in (self.channel_mean_, self.channel_scale_)
        )
        # In memory of torch's: last digits can hang on how it is aligned, and NumPy aligns it
        # otherwise in each process.
        found = torch.empty(images.shape, dtype=getattr(torch, np.dtype(dtype).name))
        np.divide(images - mean, scale, out=found.numpy(), casting="same_kind")
        return found

    def _new_images(self, X) -> torch.Tensor:
        X, _, found = check_images(self, X, reset=False)
        check_same_shape(found, self.image_shape_)
        dtype = next(self.module_.parameters()).dtype
        return self._as_images(X).to(dtype)

    def _tasks(self, X, y, sample_weight) -> FitTasks | None:
        """What tells scikit-learn's callbacks about a fit, if there are any."""
        if not vars(self).get("_skl_callbacks"):
            return None
        return FitTasks(self, X, y, sample_weight, self._so_far, self.max_epochs)

    def _so_far(self, net: SoftEquivariantNet) -> dict[str, Any]:
        """What makes a copy of the estimator predict as its net does now."""
        return {"net_": unpacked(packed(net), self), "n_iter_": len(net.history)}

    def _run(self, data: TrainingData, previous: SoftEquivariantNet | None) -> Run | None:
        """Where a fit is kept on disk, if it is."""
        if self.checkpoint_dir is None:
            return None
        found = identity(self.get_params(), data, previous)
        is_clone = "_is_clone" in vars(self)
        return open_run(self.checkpoint_dir, found, is_clone, joined(self.device_))

    @advises_on_memory
    def _build_net(self, data, previous, run=None, endless=False, tasks=None) -> SoftEquivariantNet:
        """A net that is ready to train: from a random start, a previous net or a state on disk."""
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=5).tolist()
        # random_state=None is another one in each process.
        seeds = joined(self.device_).agreed(seeds)
        seeds = Seeds(*(seeds if run is None else run.begin(seeds)))
        assembly = Assembly(self, data, seeds, tasks)
        if run is not None and run.state is not None:
            course = run.state["course"]
            net = assembly.resumed(start_from(course["start"]), course["holding"], endless)
            self.symmetry_trials_ = run.trials
        elif previous is not None:
            net = assembly.further(previous, endless)
        else:
            self.symmetry_trials_, net = assembly.first(endless)
        if run is not None and run.outcome is not None:
            restore(net, run.state)
        elif run is not None:
            checkpoint = Checkpoint(run, self.symmetry_trials_, bool(self.verbose))
            net.callbacks_.append(("checkpoint", checkpoint))
        return net

    def _record(self, net: SoftEquivariantNet, data: TrainingData, outcome: dict) -> None:
        """Set the fitted attributes."""
        network = net.module_
        self.net_ = net
        for name in ("simplification_", "posterior_"):  # of what it was before
            self.__dict__.pop(name, None)
        if outcome["posterior"] is not None:
            self.posterior_ = Posterior.unpacked(outcome["posterior"]).to(self.device_)
        losses = [row["train_loss"] for row in net.history if "train_loss" in row]
        self.n_iter_, self.loss_curve_ = len(losses), np.array(losses)
        self.start_ = net.course.start.name
        self.history_ = _evaluations(net)
        self.log_marginal_likelihood_value_ = evidence = outcome["evidence"]
        self.evidence_linear_term_ = outcome["linear_term"]
        self.scores_ = (
            self.history_["log_marginal_likelihood"] if self.learn_prior else np.array([evidence])
        )
        removed = net.removed_tensors()
        self.prior_precisions_by_name_ = {
            name: np.inf if name in removed else value
            for name, value in net.prior_.precisions().items()
        }
        self.lengthscales_by_name_ = {
            name: math.exp(-interpolation.log_omega.item())
            for name, interpolation in network.interpolations.items()
            if f"{name}.weight" in net.enabled_tensors()
        }
        self.layer_names_ = layer_names(network)
        self.pathway_names_ = pathway_names(network)
        self.prior_precision_ = precision_table(network, net.prior_.precisions())
        self.effective_dimensions_ = sum_table(network, outcome["effective_dimensions"])
        sizes = {name: tensor.numel() for name, tensor in network.named_parameters()}
        self.n_weights_ = sum_table(network, sizes).astype(np.int64)
        self.symmetry_, self.symmetry_per_weight_ = dimension_shares(
            self.effective_dimensions_, self.n_weights_, enabled_table(network)
        )
        self.output_share_ = output_shares(network, data.in_order(rows_of_a_pass(network)))
        network.eval()

    def _warn_if_not_converged(self) -> None:
        """Say so, too, if it was an interrupt that ended training."""
        if self.net_.interrupted_:
            further = "" if self.checkpoint_dir is None else " To go on with it, call fit again."
            warnings.warn(
                f"An interrupt (Ctrl-C) broke off training in epoch {self.net_.interrupted_} of at "
                f"most {self.max_epochs}. The model is fitted with the state of the last evidence "
                f"before it.{further}",
                UserWarning,
                stacklevel=4,
            )
            return
        if self.net_.course.capped and joined(self.device_).rank == 0:
            figure = "log evidence" if self.learn_prior else "log joint"
            warnings.warn(
                f"The {figure} had not settled when training had to end at max_epochs="
                f"{self.max_epochs}. Raise max_epochs, or tol ({self.tol} nats per observation) "
                "if this is good enough.",
                ConvergenceWarning,
                stacklevel=4,  # past scikit-learn's wrapper, to the caller of fit
            )


def _evaluations(net: SoftEquivariantNet) -> dict[str, np.ndarray]:
    rows = [row for row in net.history if "log_marginal_likelihood" in row]
    terms = ("log_likelihood", "scatter", "log_det_ratio", "log_marginal_likelihood")
    columns = ("epoch", "n_observations", *terms, "curvature", "curvature_rows")
    return {column: np.array([row[column] for row in rows]) for column in columns}
