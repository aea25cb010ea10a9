"""What the estimators have in common: fit as a table of contents, fitted attributes, states.

An estimator says what it makes of its targets: how they become codes and the targets of a net, what
likelihood these have, and what predictions are.
"""

import hashlib
import math
import os
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from ._version import __version__
from .assembly import Assembly, Seeds
from .batches import AUGMENTATIONS, BATCH_ROWS, TrainingData, batch_rows
from .blobs import Blob, from_blob, to_blob
from .budget import rows_of_a_pass
from .checkpoint import Checkpoint, Run, data_digests, identity, open_run, restore, start_from
from .curvature import COLUMNS, KFAC_FORMS
from .groups import GROUPS
from .layers import PATHWAYS
from .likelihoods import Categorical, Gaussian
from .marginal_likelihood import HYPER_SOLVERS
from .memory import advises_on_memory
from .networks import ACTIVATIONS, ARCHITECTURES
from .notices import warn
from .persistence import check_settings, check_version, packed, unpacked
from .posterior import Posterior
from .predictive import PREDICTIVES, map_outputs
from .processes import alone, joined
from .progress import CallbackSupportMixin, FitTasks, check_callbacks
from .schedules import LR_SCHEDULES, STARTS
from .symmetry import (
    dimension_shares,
    enabled_table,
    equivariance_errors,
    layer_names,
    output_shares,
    pathway_names,
    precision_table,
    sum_table,
)
from .training import AMP_DTYPES, OPTIMIZERS, SoftEquivariantNet
from .twins import twin_of
from .validation import (
    check_images,
    check_names,
    check_same_shape,
    check_weights,
    distinct_rows,
    present_device,
    resolve_device,
    resolve_image_shape,
    scale_of,
    warn_of_shares,
)

__all__ = ["SoftEquivariantBase"]

#: Range of standardised numbers below which they are constant but for rounding.
FLAT = 1e-5


class SoftEquivariantBase(CallbackSupportMixin, BaseEstimator):
    """The part of an estimator that does not depend on what is predicted.

    Parameters and attributes are those of the estimators.
    """

    image_shape_: tuple[int, int, int]
    device_: torch.device

    #: Fitted attributes that a net is built from.
    _built_from: ClassVar[tuple[str, ...]] = ("image_shape_", "device_")
    #: Whether targets are numbers, of which each row may have several.
    _numbers: ClassVar[bool] = False
    #: What is compared by ``simplify``, in words.
    _said_to_change: ClassVar[str]

    _parameter_constraints: ClassVar[dict] = {
        "pathways": ["array-like", str],
        "architecture": [StrOptions(set(ARCHITECTURES))],
        "width": [Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "anchor_fraction": [Interval(Real, 0, 1, closed="right"), StrOptions({"auto"})],
        "image_shape": ["array-like", None],
        "standardize": ["boolean"],
        "learn_prior": ["boolean"],
        "learn_lengthscale": ["boolean"],
        "start": [StrOptions(set(STARTS))],
        "prior_precision": [Interval(Real, 0, None, closed="neither")],
        "burn_in": [Interval(Integral, 1, None, closed="left")],
        "evidence_every": [Interval(Integral, 1, None, closed="left")],
        "hyper_solver": [StrOptions(set(HYPER_SOLVERS))],
        "hyper_steps": [Interval(Integral, 1, None, closed="left")],
        "hyper_lr": [Interval(Real, 0, None, closed="neither"), None],
        "hyper_warmup": [Interval(Integral, 0, None, closed="left")],
        "curvature": [StrOptions({"auto", *COLUMNS})],
        "curvature_samples": [Interval(Integral, 1, None, closed="left")],
        "curvature_subset": [Interval(Integral, 1, None, closed="left"), None],
        "kfac": [StrOptions(set(KFAC_FORMS))],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "keep_best": ["boolean"],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "lr": [Interval(Real, 0, None, closed="neither"), None],
        "lr_schedule": [StrOptions(set(LR_SCHEDULES))],
        "optimizer": [StrOptions(set(OPTIMIZERS))],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "amp": [StrOptions(set(AMP_DTYPES)), None],
        "compile": ["boolean"],
        "predictive": [StrOptions(set(PREDICTIVES))],
        "predictive_temperature": [Interval(Real, 0, None, closed="neither")],
        "device": [str, torch.device],
        "dtype": [StrOptions({"auto", "float32", "float64"})],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "callbacks": [list, tuple, None],
        "checkpoint_dir": [str, os.PathLike, None],
        "verbose": ["verbose"],
    }

    # What an estimator says of its targets.

    @property
    def _n_outputs(self) -> int:
        """K, of the data that were prepared last."""
        raise NotImplementedError

    @property
    def _likelihood(self) -> Categorical | Gaussian:
        """Of the targets, as training begins."""
        raise NotImplementedError

    @property
    def _target_unit(self) -> np.ndarray:
        """What the targets of a net are in units of, (K,), or (1,) for all of them."""
        return np.ones(1)

    def _encoded(
        self, y: np.ndarray, present: np.ndarray, known: Any, first: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the targets, which tell equal ones, and what they are codes of.

        Rows that are not present have no weight, and leave no trace but the name of a class.
        """
        raise NotImplementedError

    def _weights(self, sample_weight, X, y, values) -> np.ndarray:
        """Of the rows."""
        return check_weights(sample_weight, X)

    def _targets(self, values, codes, weights, first: bool, more: bool) -> np.ndarray:
        """What a net is trained on, (n,) or (n, K); sets what is known of the targets."""
        raise NotImplementedError

    def _described(self) -> str:
        """What is known of the targets, to be compared between processes."""
        raise NotImplementedError

    def _compared(self, X) -> np.ndarray:
        """The predictions of which ``simplify`` bounds the change."""
        raise NotImplementedError

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
        """Plain values, arrays and parameters; nothing of torch's or skorch's.

        Those of a fitted estimator are one array of bytes, but for what is not plain.
        """
        state = super().__getstate__().copy()
        version = {"_sklearn_softeq_version": __version__}
        if not self.__sklearn_is_fitted__():
            return state | version
        state["net_"] = packed(self.net_)
        state["device_"] = str(self.device_)
        if "posterior_" in state:
            state["posterior_"] = self.posterior_.packed()
        if "simplification_" in state:
            state["simplification_"] = dict(state["simplification_"])
        return {"_blob": list(to_blob(state))} | version

    def __setstate__(self, state):
        state = dict(state)
        version = state.pop("_sklearn_softeq_version", "unknown")
        check_version(version, type(self).__name__)
        if "_blob" in state:
            state = from_blob(Blob(*state.pop("_blob"))) | state
        if "net_" in state:
            check_settings(state["net_"]["settings"], self._get_param_names(), version)
        super().__setstate__(state)
        if "net_" in state:
            self.device_ = present_device(state["device_"], self.device)
            self.net_ = unpacked(state["net_"], self)
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

    def _previous(self) -> SoftEquivariantNet | None:
        """What ``fit`` goes on from."""
        return self.net_ if self.warm_start and self.__sklearn_is_fitted__() else None

    def _fit(self, X, y, sample_weight, known=None):
        previous = self._previous()
        tasks = self._tasks(X, y, sample_weight)
        with self._unchanged_on_error(KeyboardInterrupt if previous is None else BaseException):
            with self._unchanged_on_error():
                data = self._shared(X, y, sample_weight, known)
                run = self._run(data, previous)
                net = self._build_net(data, previous, run, tasks=tasks)
            self._train(net, data, run)
        self._warn_if_not_converged()
        if tasks is not None:
            tasks.ended()
        return self

    def _partial_fit(self, X, y, sample_weight, known=None):
        previous = self.net_ if self.__sklearn_is_fitted__() else None
        with self._unchanged_on_error():
            data = self._shared(X, y, sample_weight, known, first=previous is None, more=True)
            net = previous
            if net is None or not net.course.endless:
                net = self._build_net(data, previous, endless=True)
            net.batch_size = batch_rows(self.batch_size, len(data))
        if previous is None:
            self._warn_of_no_variance(data)
        self._train(net, data)
        return self

    def _warn_of_no_variance(self, data: TrainingData) -> None:
        """All later chunks are standardised as the first one."""
        looks = {
            "a channel of the images": self.standardize and _flat(data.inputs.transpose(0, 1)),
            "a target": self._numbers and _flat(data.targets.T),
        }
        found = " and ".join(what for what, flat in looks.items() if flat)
        if found and joined(self.device_).rank == 0:
            warn(
                f"In the first chunk {found} did not vary. All chunks are scaled as the first one, "
                "and that was scaled by the size of its mean, which may be far from the deviation "
                "of those to come. Begin with a chunk of several different rows."
            )

    def _prepare(self, X, y, sample_weight, known=None, first=True, more=False) -> TrainingData:
        """Check everything that a user passes; the rows of positive weight on the device.

        The ``first`` data of a model say how all are scaled, those of which ``more`` is to come,
        too.
        """
        check_names(self.pathways, PATHWAYS, "pathways")
        check_callbacks(self.callbacks, self.lr_schedule)
        if self.amp is not None and self.dtype == "float64":
            raise ValueError(
                f"amp={self.amp!r} is for computation in float32; use dtype='auto' or 'float32'."
            )
        device = resolve_device(self.device) if first else self.device_
        X, y, found = check_images(self, X, y, reset=first, numbers=self._numbers)
        if first:
            shape = resolve_image_shape(self.image_shape, found, X.shape[1])
        else:
            shape = check_same_shape(found, self.image_shape_)
        counts = check_weights(sample_weight, X)
        codes, values = self._encoded(y, counts > 0, known, first)
        kept = self.checkpoint_dir is not None
        digests = data_digests(X, y, counts, shape) if kept else {}
        weights = self._weights(sample_weight, X, y, values)
        warn_of_shares(weights)
        X, codes, weights = distinct_rows(X, codes, weights)
        targets = self._targets(values, codes, weights, first, more)
        self.image_shape_, self.device_ = shape, device
        if first:
            self._set_standardizer(X, weights, shape[0], more)
        inputs = self._as_images(X)
        if not first:
            inputs = inputs.to(next(self.module_.parameters()).dtype)
        seen = weights.sum() + (0.0 if first else self.n_observations_)
        return TrainingData(
            inputs.to(device),
            torch.tensor(targets, dtype=inputs.dtype if self._numbers else None, device=device),
            torch.tensor(weights, dtype=inputs.dtype, device=device),
            float(seen),
            digests,
        )

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
            for output in (c for name, c in net.callbacks_ if name == "progress"):
                if not net.course.endless and joined(self.device_).rank == 0:
                    output.ended(net, outcome["evidence"], data.n_observations)
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
        found.update(repr((self._described(), sorted(parameters.items()))).encode())
        return found.hexdigest()

    def _set_standardizer(
        self, X: np.ndarray, weights: np.ndarray, n_channels: int, more: bool
    ) -> None:
        """Weighted mean and deviation of each channel, see :func:`scale_of`."""
        self.channel_mean_, self.channel_scale_ = np.zeros(n_channels), np.ones(n_channels)
        if not self.standardize:
            return
        pixels = X.reshape(len(X), n_channels, -1)  # (n, C, X)
        mean = np.average(pixels.mean(2, dtype=np.float64), axis=0, weights=weights)  # (C,)
        parts = np.array_split(pixels, len(X) // 4096 + 1)  # bounds the float64 copies
        spread = [np.square(part - mean[:, None]).mean(2) for part in parts]
        scale = np.sqrt(np.average(np.concatenate(spread), axis=0, weights=weights))
        self.channel_mean_ = mean
        self.channel_scale_ = scale_of(scale, mean, float(np.finfo(X.dtype).eps), more)

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
        # In memory of torch's: last digits can depend on how it is aligned, and NumPy aligns it
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
        so_far = {"net_": unpacked(packed(net), self), "n_iter_": len(net.history)}
        return {**so_far, "predictive": "map"}  # the posterior comes at the end

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
        self.start_ = net.course.start.begun_with(network)
        self.history_ = _evaluations(net)
        self.log_marginal_likelihood_value_ = evidence = outcome["evidence"]
        self.evidence_linear_term_ = outcome["linear_term"]
        self.scores_ = (
            self.history_["log_marginal_likelihood"]
            if net.course.evidence.steps
            else np.array([evidence])
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
            warn(
                f"An interrupt (Ctrl-C) broke off training in epoch {self.net_.interrupted_} of at "
                f"most {self.max_epochs}. The model is fitted with {self.net_.kept_}."
                f"{further}",
            )
            return
        if self.net_.course.capped and joined(self.device_).rank == 0:
            figure = "log evidence" if self.net_.course.evidence.steps else "log joint"
            warn(
                f"The {figure} had not settled when training had to end at max_epochs="
                f"{self.max_epochs}. Raise max_epochs, or tol ({self.tol} nats per observation) "
                "if this is good enough.",
                ConvergenceWarning,
            )

    def _takes_map(self) -> bool:
        """Whether predictions are those of the weights alone.

        Raises
        ------
        ValueError
            If they are not, and there is no posterior.
        """
        check_is_fitted(self)
        self._validate_params()  # they may have been set since the fit
        if self.predictive == "map":
            return True
        if "posterior_" not in vars(self):
            raise ValueError(
                'predictive="laplace" needs the posterior of the weights, which is kept only by a '
                'fit with it: call fit with predictive="laplace", or set predictive="map".'
            )
        return False

    def _map_outputs(self, X) -> torch.Tensor:
        """Outputs of the network, (n, K)."""
        # Each pass has as many rows, so that none depends on how many there are: a single one must
        # not cost what large steps do.
        most = BATCH_ROWS if self.batch_size == "auto" else int(self.batch_size)
        return map_outputs(self.module_, self._new_images(X), min(most, BATCH_ROWS))

    def equivariance_error(self, X, group="translation"):
        """How far the layers and the whole network are from commuting with a group.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images to measure on.
        group : {"translation", "p4", "p4m", "pm"}, default="translation"
            "translation": cyclic shifts of the padded canvas, by one pixel and by half of it.
            "p4": its quarter turns; "pm": its reflection left ↔ right; "p4m": both. Where the
            canvas, or the grid of a layer, is not square, only those that keep its shape.

        Returns
        -------
        Bunch
            ``layers`` : ndarray of shape (L,), ‖f(gh) − g f(h)‖ / ‖f(h)‖ of each layer on its own
            input; 0 is strict equivariance. ``free`` : ndarray of shape (L,), the same of an
            untrained free layer in its place, the scale at which no symmetry is left.
            ``logits`` : float, ‖f(gx) − f(x)‖ / ‖f(x)‖ of the whole network; 0 is invariance.

        Raises
        ------
        ValueError
            If the group is unknown.
        """
        check_is_fitted(self)
        if group not in list(GROUPS):
            raise ValueError(f"group={group!r} is not known. Choose one of {sorted(GROUPS)}.")
        batches = self._new_images(X).to(self.device_).split(rows_of_a_pass(self.module_))
        network = twin_of(self.module_)  # what the layers see is found out by hooks
        return Bunch(**equivariance_errors(network, batches, GROUPS[group])._asdict())


def _flat(values: torch.Tensor) -> bool:
    """Whether any of some standardised columns is constant but for rounding."""
    values = values.flatten(1)
    return bool((values.amax(1) - values.amin(1)).min() < FLAT)


def _evaluations(net: SoftEquivariantNet) -> dict[str, np.ndarray]:
    rows = [row for row in net.history if "log_marginal_likelihood" in row]
    terms = ("log_likelihood", "scatter", "log_det_ratio", "log_marginal_likelihood")
    columns = ("epoch", "n_observations", *terms, "event_curvature", "curvature_rows")
    return {
        column.removeprefix("event_"): np.array([row[column] for row in rows]) for column in columns
    }
