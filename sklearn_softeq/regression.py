"""The regressor: parameters, what it makes of numbers, and predictions with their deviations."""

import json
from numbers import Real
from typing import ClassVar

import numpy as np
from sklearn.base import RegressorMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from .base import SoftEquivariantBase
from .docstrings import completed_from
from .estimators import SoftEquivariantClassifier
from .likelihoods import Gaussian
from .onnx_export import Output, Unscaled, exported
from .predictive import laplace_variances
from .simplification import simplified
from .validation import check_same_outputs, distinct_targets, mean_and_scale

__all__ = ["SoftEquivariantRegressor"]


@completed_from(SoftEquivariantClassifier)
class SoftEquivariantRegressor(RegressorMixin, SoftEquivariantBase):
    """A network from images to numbers that learns which symmetry each of its layers should keep.

    Layers, priors and evidence are those of :class:`SoftEquivariantClassifier`. The likelihood is
    Gaussian: one or more numbers of each image, each with independent noise of its own, whose size
    is learned with the precisions by the evidence. Within, each output has the mean 0 and the
    deviation 1 that its targets have in the training data, as priors of unit size presume. What is
    reported is in the units of the targets.

    Parameters
    ----------
    {pathways}
    {architecture}
    {width}
    {activation}
    {anchor_fraction}
    {image_shape}
    {standardize}
    learn_prior : bool, default=True
        False trains to the mode at the fixed precision ``prior_precision``. Evidences are evaluated
        for the noise alone then; if that is fixed, too, once, at the end.
    {learn_lengthscale}
    start : {"symmetric", "joint"}, default="symmetric"
        As in the classifier. All pathways at once begin only where they predict better by more
        than 0.1 nats for each output, at the noise that is best for each: where they leave less
        than 0.82 of the squares. Trials go on while the best of several symmetries explains less
        than half of the variance; and where the symmetric pathways have explained less than a
        fifth of it, all begin anew as with "joint".
    {prior_precision}
    noise : "learned" or float, default="learned"
        Standard deviation of the noise. "learned": that of each output ascends the evidence with
        the precisions, by σ² = (Σ (y − f)² + γ σ²) / N with γ the effective dimensions that this
        output determines, the mean square that the posterior of the weights expects (MacKay's
        fixed point, in steps that cannot overshoot); it begins at the deviation of the targets,
        or, after trials, at the error on the rows held out of them. γ is exact under the
        approximation of the curvature, but for large factors, of which each output has its part
        by the traces, and for random columns, with which parts are estimated from a few rows. A
        number, in units of the targets: it stays, for all outputs; they are taken to have one
        unit then, and are divided by one scale.
    {burn_in}
    {evidence_every}
    {hyper_solver}
    {hyper_steps}
    {hyper_lr}
    {hyper_warmup}
    curvature : {"auto", "exact", "rademacher", "monte_carlo"}, default="auto"
        How the Hessian of the outputs enters the curvature: exactly, by all of its K columns;
        by random combinations of them with signs ±1; or by noise drawn from the model, which is
        more random and there for comparison. "auto" is exact, and deterministic, while rows × K ≤
        4096; beyond, it chooses columns and rows by their sizes such that all evidences take about
        a tenth of the time of training.
    {curvature_samples}
    curvature_subset : int, default=None
        Rows that the curvature and the log likelihood of the evidences during training are
        estimated from, drawn anew for each, by their weights. None: all, or what
        ``curvature="auto"`` chooses. The evidence at the end sees all rows.
    {kfac}
    {max_epochs}
    {tol}
    {n_iter_no_change}
    {keep_best}
    {batch_size}
    lr : float, default=None
        Learning rate of the weights. None: 0.1 for "kfac", 0.01 for "adam" and "sgd". Where the
        evidence presses down a pathway that the symmetric start began without, Adam's rate falls
        there with the prior's standard deviation, and that of "sgd" is multiplied by the variance
        of the noise, in units of the targets' variance, as if it descended mean squares; neither
        with ``lr_schedule="constant"``.
    lr_schedule : {"cooldown", "cosine", "constant"}, default="cooldown"
        "cooldown": warm-up, full rate until convergence, then a cosine to zero over a third of
        the epochs so far, whose weights are averaged. "cosine": to zero over ``max_epochs`` (the
        paper). "constant": left to a scheduler among the callbacks, if there is one.
    {optimizer}
    {augment}
    {amp}
    {compile}
    predictive : {"map", "laplace"}, default="map"
        What ``predict(X, return_std=True)`` takes for uncertain. "map": the noise alone, the same
        for all rows; the weights are taken to be known. "laplace": the weights, too, by the
        posterior that the curvature at the end of training gives, with the network linearised in
        them. ``fit`` then keeps that posterior, which may be ten times as large as the weights, and
        a deviation takes a backward pass for each output. The predictions themselves are the same.
        A regressor that was fitted with "laplace" may be set to "map" and back; one that was
        fitted with "map" has to be fitted again.
    predictive_temperature : float, default=1.0
        What the covariance of the weights is multiplied by; it may be changed after the fit. 1 is
        the posterior as the curvature has it, towards 0 the noise alone is left. No meaning for
        "map".
    {device}
    {dtype}
    {random_state}
    {warm_start}
    {callbacks}
    {checkpoint_dir}
    {verbose}

    Attributes
    ----------
    {n_features_in_}
    {feature_names_in_}
    {image_shape_}
    {channel_mean_}
    {channel_scale_}
    target_mean_ : ndarray of shape (K,)
        What targets are centred by, within: their mean.
    target_scale_ : ndarray of shape (K,)
        What they are divided by, within: the standard deviation; 1 where an output is constant, or
        the size of its mean in a first chunk of ``partial_fit``. With a fixed ``noise`` one for
        all.
    noise_std_ : ndarray of shape (K,)
        Standard deviation of the noise of each output, in units of its targets.
    {net_}
    {module_}
    {device_}
    {n_iter_}
    {n_observations_}
    {loss_curve_}
    symmetry_trials_ : dict of str to float
        Log likelihood of the held-out fifth for each observation, in nats, at the noise that is
        best for it, of the trial of each group ("p1": shifts alone), and of all pathways ("joint")
        where some have no symmetry. Trials of groups may have gone on for longer than that of all
        pathways, see ``start``; their best score counts. Empty without trials.
    start_ : str
        What training began with in the end: the pathways of one symmetry, the best of the trials
        ("p1": shifts alone, "p4": quarter turns, "p4m": these and reflections, "pm": left ↔ right),
        or all pathways, "joint", if they led by what ``start`` says, if they alone predicted better
        than the mean of the targets, or if the symmetry had then learnt next to nothing. Without
        trials the largest begin, joined by "+" if there are several.
    {scores_}
    history_ : dict of ndarray
        By evaluation: "epoch", "n_observations" (N at that time), "log_likelihood", "scatter",
        "log_det_ratio" and "log_marginal_likelihood" = log_likelihood − ½ scatter −
        ½ log_det_ratio, in nats; "noise", of shape (evaluations, K), the deviations of the noise
        after it, in units of the targets; "curvature" and "curvature_rows", how the curvature was
        estimated.
    {log_marginal_likelihood_value_}
    {evidence_linear_term_}
    {prior_precisions_by_name_}
    {lengthscales_by_name_}
    {layer_names_}
    {pathway_names_}
    {prior_precision_}
    {effective_dimensions_}
    {n_weights_}
    {symmetry_}
    {symmetry_per_weight_}
    {output_share_}
    {posterior_}

    References
    ----------
    .. [1] T. van der Ouderaa, A. Immer, M. van der Wilk, "Learning Layer-wise Equivariances
       Automatically using Gradients", NeurIPS 2023, arXiv:2310.06131.
    .. [2] D. MacKay, "Bayesian interpolation", Neural Computation 4, 1992: the noise.

    Notes
    -----
    Log likelihoods and evidences are log densities of the targets in their own units. In another
    unit, y → a y, they are lower by log a for each number, so compare them on the same targets.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_softeq import SoftEquivariantRegressor
    >>> X, _ = load_digits(return_X_y=True)
    >>> y = X.sum(1)  # how much ink there is
    >>> reg = SoftEquivariantRegressor(max_epochs=5, random_state=0).fit(X[:300], y[:300])
    >>> mean, deviation = reg.predict(X[300:], return_std=True)
    >>> mean.shape, deviation.shape  # doctest: +SKIP
    ((1497,), (1497,))
    """

    _built_from = ("target_mean_", "target_scale_", *SoftEquivariantBase._built_from)
    _numbers = True
    _said_to_change = "a prediction, in units of its target's deviation,"

    _parameter_constraints: ClassVar[dict] = {
        **SoftEquivariantBase._parameter_constraints,
        "noise": [StrOptions({"learned"}), Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        *,
        pathways=("conv", "factored_fc"),
        architecture="auto",
        width=8,
        activation="silu",
        anchor_fraction="auto",
        image_shape=None,
        standardize=True,
        learn_prior=True,
        learn_lengthscale=False,
        start="symmetric",
        prior_precision=1.0,
        noise="learned",
        burn_in=20,
        evidence_every=5,
        hyper_solver="fixed_point",
        hyper_steps=5,
        hyper_lr=None,
        hyper_warmup=100,
        curvature="auto",
        curvature_samples=1,
        curvature_subset=None,
        kfac="expand",
        max_epochs=400,
        tol=0.01,
        n_iter_no_change=10,
        keep_best=False,
        batch_size="auto",
        lr=None,
        lr_schedule="cooldown",
        optimizer="kfac",
        augment=None,
        amp=None,
        compile=False,
        predictive="map",
        predictive_temperature=1.0,
        device="auto",
        dtype="auto",
        random_state=None,
        warm_start=False,
        callbacks=None,
        checkpoint_dir=None,
        verbose=0,
    ):
        self.pathways = pathways
        self.architecture = architecture
        self.width = width
        self.activation = activation
        self.anchor_fraction = anchor_fraction
        self.image_shape = image_shape
        self.standardize = standardize
        self.learn_prior = learn_prior
        self.learn_lengthscale = learn_lengthscale
        self.start = start
        self.prior_precision = prior_precision
        self.noise = noise
        self.burn_in = burn_in
        self.evidence_every = evidence_every
        self.hyper_solver = hyper_solver
        self.hyper_steps = hyper_steps
        self.hyper_lr = hyper_lr
        self.hyper_warmup = hyper_warmup
        self.curvature = curvature
        self.curvature_samples = curvature_samples
        self.curvature_subset = curvature_subset
        self.kfac = kfac
        self.max_epochs = max_epochs
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.keep_best = keep_best
        self.batch_size = batch_size
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.optimizer = optimizer
        self.augment = augment
        self.amp = amp
        self.compile = compile
        self.predictive = predictive
        self.predictive_temperature = predictive_temperature
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.checkpoint_dir = checkpoint_dir
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Learn weights, precisions and noise from images and their numbers.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images, or rows of C·H·W features.
        y : array-like of shape (n,) or (n, K)
            Numbers.
        sample_weight : array-like of shape (n,), default=None
            How many observations each row stands for. Weights are counts: their sum is N in the
            prior and in the evidence, so weights that sum to 1 mean a single observation. A row of
            weight 2 comes to the same as two equal rows, to the last bit. The order of the rows
            makes no difference either.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For bad data, shapes or parameters, before any training, and if ``checkpoint_dir`` holds
            another fit, or a parameter cannot be known again in another process; and when the loss
            becomes infinite or NaN, which leaves the estimator unfitted.
        OSError
            If nothing can be written to ``checkpoint_dir``, before any training; FileExistsError if
            there is another program's file where a checkpoint would stand.
        MemoryError, KeyboardInterrupt
            As of :meth:`SoftEquivariantClassifier.fit`.

        Warns
        -----
        ConvergenceWarning
            If the evidence had not settled by ``max_epochs``.
        UserWarning
            If Ctrl-C broke off the training: the estimator is fitted then, with the state of the
            last evidence. If a checkpoint is damaged or cannot be written, or was made with another
            number of threads.
        """
        return self._fit(X, y, sample_weight)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train one epoch on a chunk of data.

        N is the weight of all chunks so far, so a second pass over the same rows counts them
        again; the evidence is that of the present chunk, scaled up to N. Standardisation, that of
        the targets, too, is that of the first chunk, which should have several different rows.
        After a warm-up of five calls the learning rate stays constant; burn-in, evidence and
        ``hyper_warmup`` count calls as epochs. With ``predictive="laplace"`` each call leaves a
        posterior, whose curvature is that of its chunk, scaled up to N. Of parameters that are
        set between calls only ``batch_size`` and those of predictions count. A call that is
        broken off, by Ctrl-C or an error in training, leaves the estimator unfitted.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            A chunk.
        y : array-like of shape (n,) or (n, K)
            Its numbers, as many for each row as in the first call.
        sample_weight : array-like of shape (n,), default=None
            As in ``fit``.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in ``fit``; if there are more or fewer numbers for each row than in the first call.

        Warns
        -----
        UserWarning
            If a target or a channel of the images does not vary in the first chunk.
        """
        self._validate_params()  # they may have been set since the last call
        return self._partial_fit(X, y, sample_weight)

    @property
    def _n_outputs(self) -> int:
        return len(self.target_scale_)

    @property
    def _likelihood(self) -> Gaussian:
        log_units = -np.log(self.target_scale_).sum().item()
        if self.noise == "learned":
            return Gaussian((1.0,) * self._n_outputs, True, log_units)
        return Gaussian((self.noise / self.target_scale_[0].item()) ** 2, False, log_units)

    @property
    def _target_unit(self) -> np.ndarray:
        return self.target_scale_

    def _encoded(self, y, present, known, first):
        if first:  # chunks are free to have it otherwise
            self._one_number = y.ndim == 1
        return distinct_targets(y, present)

    def _targets(self, values, codes, weights, first, more):
        targets = values[codes]  # (n, K)
        if first:
            self.target_mean_, self.target_scale_ = mean_and_scale(targets, weights, more)
            if self.noise != "learned":
                apart = (targets - self.target_mean_).reshape(-1, 1)
                _, common = mean_and_scale(apart, np.repeat(weights, targets.shape[1]))
                if more and not apart.any():
                    common = self.target_scale_.max()  # the size of what does not vary
                self.target_scale_ = np.full_like(self.target_scale_, common.item())
        check_same_outputs(targets.shape[1], self._n_outputs)
        return (targets - self.target_mean_) / self.target_scale_

    def _described(self) -> str:
        return repr((self.target_mean_.tolist(), self.target_scale_.tolist()))

    def _record(self, net, data, outcome):
        super()._record(net, data, outcome)
        found = [row["event_noise"] for row in net.history if "event_noise" in row]
        noises = [noise * self.target_scale_ for noise in found]
        self.history_["noise"] = np.reshape(noises, (-1, self._n_outputs))
        self.noise_std_ = np.array(net.criterion_.deviations) * self.target_scale_

    def _compared(self, X):
        return self._map_outputs(X).numpy()

    def predict(self, X, return_std=False):
        """The mean of each output, and its standard deviation if asked for.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images.
        return_std : bool, default=False
            Whether to return the deviation of a new observation as well: with
            ``predictive="map"`` that of the noise alone, ``noise_std_`` in each row; with
            "laplace" √(σ² + T v), v the variance of the output under the posterior of the
            weights and T the ``predictive_temperature``.

        Returns
        -------
        mean : ndarray of shape (n,) or (n, K)
            In the form of the y of ``fit``.
        deviation : ndarray of the same shape
            Only if ``return_std``.

        Raises
        ------
        ValueError
            For deviations with ``predictive="laplace"`` after a fit without it.
        """
        check_is_fitted(self)
        self._validate_params()  # they may have been set since the fit
        mean = self._map_outputs(X).numpy() * self.target_scale_ + self.target_mean_
        if not return_std:
            return self._in_form(mean)
        return self._in_form(mean), self._in_form(self._deviations(X, mean.shape))

    def _deviations(self, X, shape: tuple[int, int]) -> np.ndarray:
        """Of new observations, (n, K)."""
        if self._takes_map():
            return np.broadcast_to(self.noise_std_, shape).copy()
        found = laplace_variances(
            self.module_, self.posterior_, self._new_images(X), self._n_outputs
        )
        variances = self.predictive_temperature * np.square(self.target_scale_) * found.numpy()
        return np.sqrt(np.square(self.noise_std_) + variances)  # Eq. deviation

    def _in_form(self, values: np.ndarray) -> np.ndarray:
        """(n,) where y was."""
        return values[:, 0] if self._one_number else values

    # It is the same for all, and is to stand among the methods that are documented.
    equivariance_error = SoftEquivariantBase.equivariance_error

    def simplify(self, X, threshold=0.01, tol=1e-3):
        """A copy without the pathways that the evidence has switched off.

        What is left has fewer weights, and predicts as before within a tolerance. Pathways that
        were removed during training go in any case. The copy of a model that was fitted by ``fit``
        cannot be trained further; one of ``partial_fit`` can.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images on which the predictions of both are compared.
        threshold : float, default=0.01
            A pathway goes where its shares of its layer's effective dimensions (``symmetry_``) and
            of the energy of its layer's output (``output_share_``) are both below. 0 takes
            only what was removed during training, which changes no prediction.
        tol : float, default=1e-3
            Largest change of any prediction that is let pass, in units of ``target_scale_``.

        Returns
        -------
        SoftEquivariantRegressor
            It has ``simplification_``, a Bunch with ``removed``, list of (layer, pathway);
            ``change``, the largest change of a prediction on X, in the same units; ``n_weights``,
            ``seconds``: pairs of numbers before and after, the latter of ``predict(X)``, the
            shortest of three. In the tables of its pathways what is gone has the precision inf
            and zeros; the evidence is that of the fit.

        Raises
        ------
        ValueError
            If a prediction changes by more than ``tol``: then pathways below the threshold are
            still of use; lower it.
        """
        check_is_fitted(self)
        return simplified(self, X, threshold, tol)

    def export_onnx(self, path):
        """Write the network as an ONNX graph, which other runtimes compute without Python.

        Its input ``images``, float32 of shape (n, C, H, W) for any n, are images as ``fit`` takes
        them (rows of features have to be brought into this shape); standardisation is part of the
        graph. Its output ``prediction``, float32 of shape (n, K), a column where y was a vector,
        is that of ``predict`` in the units of the targets, but for rounding. Where two of the
        grids that a strided layer chooses from are as large as each other, rounding may choose the
        other one. Pathways that are off are left out. The metadata hold ``noise_std``, as JSON;
        what ``predictive="laplace"`` adds to that is not in the graph.

        Needs the extra ``onnx``: ``pip install 'sklearn-softeq[onnx]'``.

        Parameters
        ----------
        path : str or path-like
            File to be written, usually with the ending ``.onnx``.

        Returns
        -------
        str or path-like
            ``path``.

        Raises
        ------
        ImportError
            If the packages onnx and onnxscript are not installed.
        """
        check_is_fitted(self)
        link = Unscaled(self.target_mean_, self.target_scale_)
        noise = {"noise_std": json.dumps(self.noise_std_.tolist())}
        exported(self, Output("prediction", link, noise)).save(path)
        return path
