"""The classifier: parameters, what it makes of labels, and what a fit reveals."""

from numbers import Integral
from typing import ClassVar

import numpy as np
import torch
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from .base import SoftEquivariantBase
from .likelihoods import Categorical
from .onnx_export import Output, exported, labels_as_json
from .predictive import laplace_outputs, log_odds
from .simplification import simplified
from .validation import check_classes, check_incremental_class_weight, check_weights, encode

__all__ = ["SoftEquivariantClassifier"]


class SoftEquivariantClassifier(ClassifierMixin, SoftEquivariantBase):
    """A network on images that learns which symmetry each of its layers should keep.

    Every layer is a sum of pathways, some equivariant (a convolution), some free (a factored
    fully-connected map). Each weight tensor has a Gaussian prior with a precision of its own.
    ``fit`` ascends the log joint in the weights and a Laplace estimate of the log marginal
    likelihood in the precisions; a free pathway that the data do not ask for is held at zero, one
    that they ask for stays. No validation set has to be given: before training begins a fifth of
    the rows is held out for a while, to choose what begins (``start``).

    Parameters
    ----------
    pathways : str or tuple of str, default=("conv", "factored_fc")
        Pathways of each layer. Equivariant to shifts: "conv" and "sparse_conv", whose filters are
        interpolated from anchors; to shifts and quarter turns "p4_conv", with reflections
        "p4m_conv", to shifts and the reflection left ↔ right "pm_conv". Free: "fc",
        "factored_fc", of rank one over space, and "sparse_fc", the same interpolated from
        anchors. One pathway alone is a network with that symmetry built in.
    architecture : {"auto", "paper", "resnet"}, default="auto"
        "paper": the stack of the paper, for images of up to 32×32 pixels. "auto": the same
        pattern from any image down to 1×1; sides are padded to powers of two. "resnet": a
        residual block of two layers in place of each of its layers, without batch normalisation.
    width : int, default=8
        Channels of the first of L layers; the last has 2^⌊L/2⌋ times as many (2^⌊L/4⌋ for images
        of a single row). The paper has 10. With the convolution of a group of G elements each
        channel has G orientations, which makes "conv" G² times as large: take less.
    activation : {"silu", "relu"}, default="silu"
        Between layers: √2 x / (1 + exp(−x)), or max(x, 0), the paper's. With ReLUs narrow layers
        sometimes died at the start; on 1000 images and more they took longer and came to a worse
        end, on 120 to a better one (docs/design/sums_log.md).
    anchor_fraction : float or "auto", default="auto"
        Anchors of the sparse pathways for each pixel, or tap of a filter, in (0, 1]. "auto": 0.5,
        and 7/9 for "sparse_conv" alone, as in the paper.
    image_shape : tuple, default=None
        (channels, height, width) or (height, width) of one image when X has rows of features.
        None: taken from X if it has images; of rows, s² features are (1, s, s), 3 s² (3, s, s),
        any other number f (1, 1, f). Channels come first in rows, too.
    standardize : bool, default=True
        Subtract the mean and divide by the standard deviation of each channel over the training
        data. (A scaler per pixel would destroy the symmetry that is looked for.)
    learn_prior : bool, default=True
        False trains to the mode at the fixed precision ``prior_precision``; the evidence is
        evaluated once, at the end. True: where the training images are fitted to a mean loss below
        0.005 nats, the logits are scaled down to that in the end. From images that leave nothing
        open neither precisions nor evidence can tell what it would cost to be so sure.
    learn_lengthscale : bool, default=False
        Also learn, by the evidence, the lengthscales of the interpolations of sparse pathways,
        one of each map. False, or ``learn_prior=False``, leaves them at one pixel.
    start : {"symmetric", "joint"}, default="symmetric"
        "symmetric": the pathways of one symmetry alone at first, then all, the others from zero,
        with their log determinants counted four times in the hyper steps; one that the evidence
        switches off is removed. What begins is tried before, on four fifths of the rows: each
        symmetry, and all pathways at once, for twice ``burn_in`` epochs or, where these tell too
        little, for longer, up to half of ``max_epochs``. The best of the symmetries by the other
        fifth begins, unless all pathways at once are plainly better (user guide, "The course of a
        fit"; ``start_`` and ``symmetry_trials_`` say what was found). Where the symmetric pathways
        have learnt next to nothing, all begin anew as with "joint": all pathways at once from
        random weights, their sum divided by the root of their number (the paper takes the mean).
    prior_precision : float, default=1.0
        Start of every precision, in units of 1 / weight²; taken to lie between e⁻¹⁰ and e¹⁸.
    burn_in : int, default=20
        Epochs of one symmetry alone, and half of those of each trial, before the first evidence;
        at most half of ``max_epochs``. The paper has 10. After trials the first evidence comes
        after five epochs more. Those of trials are not counted in ``n_iter_`` or ``max_epochs``.
        Without trials, as with one pathway, a network that has explained less than a fifth of its
        targets by then begins from other random weights, up to twice, within that half.
    evidence_every : int, default=5
        Epochs from one evidence to the next, as in the paper.
    hyper_solver : {"fixed_point", "adam"}, default="fixed_point"
        How the precisions ascend: MacKay's fixed point, damped, needs no rate to be tuned; Adam
        is the paper's.
    hyper_steps : int, default=5
        Steps of the precisions after each evidence. The paper takes 20, of Adam.
    hyper_lr : float, default=None
        Rate of these steps on log precisions; None: 0.5 for the fixed point (1 is undamped), 0.1
        for Adam.
    hyper_warmup : int, default=100
        Epochs, at most a quarter of ``max_epochs``, over which the log determinants, which pull
        towards strong priors, come to count fully in these steps; precisions begin below their
        fixed point, and only then is the evidence asked whether it still rises. At full weight
        from the first one on (0, the paper) they push networks that have learnt little yet into
        priors out of which they do not come back, most of all where there are few images. It
        begins with the learning of the precisions or the release of pathways; ``warm_start`` and
        ``partial_fit``, where each call counts as an epoch, go on where it was.
    curvature : {"auto", "exact", "rademacher", "monte_carlo"}, default="auto"
        How the Hessian of the outputs enters the curvature: exactly, by all of its K − 1 columns;
        by random combinations of them with signs ±1; or by labels drawn from the model, which is
        noisier and there for comparison. "auto" is exact, and deterministic, while
        rows × (K − 1) ≤ 4096; beyond, it chooses columns and rows by their sizes such that all
        evidences take about a tenth of the time of training.
    curvature_samples : int, default=1
        Random columns for each row when it is not exact; where they would be as many as the
        exact ones, it is exact.
    curvature_subset : int, default=None
        Rows that the curvature and the log likelihood of the evidences during training are
        estimated from, drawn anew for each: half of a row's chance is its share of the weights,
        half its share of the trace of the output Hessian in the last epoch, and weights make up
        for the chances. With random columns one that has much of the curvature may come several
        times. None: all, or what ``curvature="auto"`` chooses. The evidence at the end
        sees all rows.
    kfac : {"expand", "reduce"}, default="expand"
        What the Kronecker factors sum over the positions that share a weight: products of inputs
        and gradients, or inputs and gradients before their product. "reduce" has log determinants
        far too small for convolutions, and is there for comparison.
    max_epochs : int, default=400
        Cap of the number of epochs. Training stops when the evidence (the log joint, where nothing
        is learned by the evidence) has stopped rising; with the other defaults that takes some 80
        epochs at the least, and a smaller cap always comes first.
    tol : float, default=0.01
        Rise that counts, in nats for each observation; less than one nat in all (a Bayes factor
        of e) does not count either.
    n_iter_no_change : int, default=10
        Evaluations in a row without a rise after which training ends (after a cool-down).
    keep_best : bool, default=False
        Return to the state of the best figure seen if the last one is worse; for rates that do not
        fall. While the rate is high evidences shake, and the best of them is often of a network
        that is too sure of itself: with K-FAC, images of 40 classes, an NLL of .54 in place of
        .21 (docs/design/sums_log.md).
    batch_size : int or "auto", default="auto"
        Rows of one step, and, up to 128, of one pass in prediction. "auto": 128; of less than 1000
        images so many that an epoch has eight batches, or of about 16 if those would be smaller,
        but up to 64 images all at once. With batches of 128, digits were recognised by
        45 to 76 % after a fit to 120, and by 60 to 90 % with batches of 16 (all pathways together
        from the beginning).
    lr : float, default=None
        Learning rate of the weights. None: 0.1 for "kfac", 0.01 for "adam" and "sgd". Where the
        evidence presses down a pathway that the symmetric start began without, Adam's rate falls
        there with the prior's standard deviation, unless ``lr_schedule="constant"``.
    lr_schedule : {"cooldown", "cosine", "constant"}, default="cooldown"
        "cooldown": warm-up, full rate until convergence, then a cosine to zero over a third of
        the epochs so far, whose weights are averaged. "cosine": to zero over ``max_epochs`` (the
        paper). "constant": left to a scheduler among the callbacks, if there is one.
    optimizer : {"kfac", "adam", "sgd"}, default="kfac"
        Of the weights. "kfac" preconditions the gradient with Kronecker factors of the curvature,
        from 256 rows every other epoch, and bounds each step by the change of the predictions: on
        1000 small images it mostly came to a better likelihood of new images and a better evidence
        than "adam", in about the same time (docs/design/sums_log.md). "sgd" has momentum 0.9 (the
        paper).
    augment : {"crop_flip"} or callable, default=None
        What is done to the images of a batch before each step of the weights; the evidence is
        that of the images as they are. "crop_flip": random crops of images with a margin of an
        eighth of their sides, and random reflections left ↔ right, for images whose mirror images
        are as good. A callable takes a tensor (n, C, H, W), standardised and on the device, and
        returns one of the same shape; torch's random numbers in it follow ``random_state``.
    amp : {"bf16"}, default=None
        Type of the activations in steps of the weights: half the memory, and faster on recent
        GPUs. Weights, curvature, evidence and predictions are float32.
    compile : bool, default=False
        Run the steps of the weights through ``torch.compile``: faster after minutes of
        compilation, which has to be repeated when pathways are released or removed. Curvature,
        evidence and predictions stay as they are.
    predictive : {"map", "laplace"}, default="map"
        What the probabilities are of. "map": the network with the weights that were found.
        "laplace": the average over the posterior of the weights, which the curvature at the end of
        training gives, of the network linearised in them [3]_; they are milder where the data
        leave the weights open. ``fit`` then keeps that posterior, which may be ten times as large
        as the weights, and to predict takes a backward pass for each class. A classifier that was
        fitted with "laplace" may be set to "map" and back; one that was fitted with "map" has to
        be fitted again. "map" is the default since it predicts faster, and since on the digits
        tried the average changed little at the default temperature. An average can only make a
        network less sure: where one predicts badly, and is too sure of it, compare on held-out
        rows.
    predictive_samples : int, default=None
        Samples of the logits of each row that the average is taken over. None: a closed form, by
        MacKay's approximation of the integral, which is deterministic and faster for many
        rows (a few take as long as 128 do). The samples are the same random numbers at each call
        and for each row. No meaning for "map".
    predictive_temperature : float, default=0.01
        What the covariance of the weights is multiplied by; it may be changed after the fit. 1 is
        the posterior as the curvature has it, towards 0 all is as with "map". Posteriors of
        networks are too wide as they are, most of all where they fit the training data closely:
        of 0.003 to 1, 0.01 gave the lowest NLL and calibration error, in closed form, on rows of
        scikit-learn's digits that were held out of seven fits to 300 (docs/benchmarks.md). On
        other data try some on rows that are held out. No meaning for "map".
    class_weight : dict or "balanced", default=None
        Weights of the classes; they multiply ``sample_weight``.
    device : str or torch.device, default="auto"
        "auto" takes a CUDA device if there is one; else "cpu", "cuda" or "cuda:N". Where no
        CUDA device is to be had, a warning says so and the CPU serves.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Of the computation. "auto": float64 on the CPU for float64 input and for integers other
        than uint8, which scikit-learn takes as float64; else float32.
    random_state : int, RandomState instance or None, default=None
        Of initial weights, batches and curvature. None draws from NumPy's global generator, as
        in scikit-learn; no other global generator is moved.
    warm_start : bool, default=False
        Begin a further ``fit`` from the weights and precisions of the last one.
    callbacks : list of skorch callbacks, default=None
        They are copied, but what cannot be, as a writer of logs, is shared. There is no validation
        set: what can be monitored is "train_loss"; at an evaluation the history has
        "log_marginal_likelihood" and its terms, too. A scheduler of the learning rate needs
        ``lr_schedule="constant"``.
    checkpoint_dir : str or path-like, default=None
        Folder in which ``fit`` keeps its state while it trains. After a crash the same call goes on
        from the last state that is complete, and ends as it would have ended (but for what
        callbacks of your own remember, as a scheduler does); when it is over, the same call returns
        at once. The folder holds one fit: other data or parameters are refused, with what differs;
        callbacks do not count, a function counts with its code. Of a clone, as
        searches, cross-validation and ensembles make them, each fit has a sub-folder, named after
        its data and parameters, so that nothing has to be set for them. "~" is the user's home.
        None: no file is written; ``partial_fit`` never writes any.
    verbose : int, default=0
        1 prints what the trials of a start found, a line at each evaluation, and how training has
        ended.

    Attributes
    ----------
    classes_ : ndarray of shape (K,)
        Class labels.
    n_features_in_ : int
        C·H·W.
    feature_names_in_ : ndarray of shape (C·H·W,)
        Names of the columns, when X had string names.
    image_shape_ : tuple (C, H, W)
        Shape of one image.
    channel_mean_ : ndarray of shape (C,)
        What ``standardize`` subtracts: the mean; 0 without it.
    channel_scale_ : ndarray of shape (C,)
        What it divides by: the standard deviation; 1 where a channel is constant, or the size of
        its mean in a first chunk of ``partial_fit``; 1 without it.
    net_ : SoftEquivariantNet
        The fitted skorch net.
    module_ : SoftEquivariantNetwork
        Its torch module.
    device_ : torch.device
        Where it was trained.
    n_iter_ : int
        Epochs.
    n_observations_ : float
        N, the sum of all weights.
    loss_curve_ : ndarray of shape (epochs,)
        Negative log joint for each observation (without the prior's normaliser), by epoch.
    symmetry_trials_ : dict of str to float
        Log likelihood of the held-out fifth for each observation, in nats, of the trial of each
        group ("p1": shifts alone), and of all pathways ("joint") where some have no symmetry.
        Trials of groups may have gone on for longer than that of all pathways, see ``start``; their
        best score counts. Empty without trials.
    start_ : str
        What training began with in the end: the pathways of one symmetry, the best of the trials
        ("p1": shifts alone, "p4": quarter turns, "p4m": these and reflections, "pm": left ↔ right),
        or all pathways, "joint", if they led as ``start`` says, if they alone predicted better than
        the frequencies of the labels, or if the symmetry had then learnt next to nothing. Without
        trials the largest begin, joined by "+" if there are several.
    scores_ : ndarray
        Log marginal likelihood at each evaluation, in nats.
    history_ : dict of ndarray
        By evaluation: "epoch", "n_observations" (N at that time), "log_likelihood", "scatter",
        "log_det_ratio" and "log_marginal_likelihood" = log_likelihood − ½ scatter −
        ½ log_det_ratio, in nats; "curvature" and "curvature_rows", how it was estimated.
    log_marginal_likelihood_value_ : float
        Laplace estimate of log p(y | X) of the whole training set at the end, in nats. Compare
        precisions or pathways within one start by it. It is no judge between architectures,
        pathways or settings that were trained apart: there, score a held-out part.
    evidence_linear_term_ : float
        ½ gᵀ(H + δ)⁻¹ g for each observation, in nats, with g the gradient of the log joint and H
        its curvature: what Laplace's estimate lacks where the weights are not at a mode. Where it
        is large against a difference of ``log_marginal_likelihood_value_ / n_observations_``,
        that difference means nothing; with the terms added differences are no better. NaN
        after ``partial_fit``, for which it would be too dear.
    prior_precisions_by_name_ : dict of str to float
        Precision of each weight tensor, biases included; inf where a pathway was removed.
    lengthscales_by_name_ : dict of str to float
        1/ω, in pixels of the layer's grid, of each map of a sparse pathway that is on.
    layer_names_ : list of str
        The L layers that are sums of pathways. In a network with orientations the last one is the
        readout, "head.hidden", unless all pathways have the same group.
    pathway_names_ : list of str
        The P pathways; with such a readout its own, "pooled" and "free", come last. In the tables
        below an entry is 0 (a precision NaN) where a layer does not have the pathway.
    prior_precision_ : ndarray of shape (L, P)
        Precision of each pathway's weights; of a product of factors √(δ_U δ_V), which does not
        depend on how the scale is shared between them; inf where a pathway was removed, NaN where
        it was still held back (training ended before ``burn_in``) or the layer has none.
    effective_dimensions_ : ndarray of shape (L, P)
        γ: how many directions of each pathway's weights the data determine.
    n_weights_ : ndarray of shape (L, P)
        Number of weights, biases included.
    symmetry_ : ndarray of shape (L, P)
        Share of each pathway in its layer's γ; rows sum to 1. What a layer uses; whether a symmetry
        is kept :meth:`equivariance_error` measures.
    symmetry_per_weight_ : ndarray of shape (L, P)
        Share of each pathway in its layer's γ / number of weights (the paper's figure).
    output_share_ : ndarray of shape (L, P)
        Share of each pathway in the energy of its layer's output on the training data.
    posterior_ : Posterior
        With ``predictive="laplace"``: covariance of each weight tensor, as eigenvectors and
        eigenvalues of its Kronecker factors. After ``partial_fit`` its curvature is that of the
        last chunk, scaled to the weight of all chunks.

    References
    ----------
    .. [1] T. van der Ouderaa, A. Immer, M. van der Wilk, "Learning Layer-wise Equivariances
       Automatically using Gradients", NeurIPS 2023, arXiv:2310.06131.
    .. [2] A. Immer, M. Bauer, V. Fortuin, G. Rätsch, M. E. Khan, "Scalable Marginal Likelihood
       Estimation for Model Selection in Deep Learning", ICML 2021.
    .. [3] A. Immer, M. Korzepa, M. Bauer, "Improving predictions of Bayesian neural nets via local
       linearization", AISTATS 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_softeq import SoftEquivariantClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SoftEquivariantClassifier(max_epochs=5, random_state=0)
    >>> clf.fit(X[:200], y[:200]).predict(X[200:]).shape  # doctest: +SKIP
    (1597,)
    """

    _built_from = ("classes_", *SoftEquivariantBase._built_from)
    _said_to_change = "a probability"

    _parameter_constraints: ClassVar[dict] = {
        **SoftEquivariantBase._parameter_constraints,
        "predictive_samples": [Interval(Integral, 1, None, closed="left"), None],
        "class_weight": [dict, StrOptions({"balanced"}), None],
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
        predictive_samples=None,
        predictive_temperature=0.01,
        class_weight=None,
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
        self.predictive_samples = predictive_samples
        self.predictive_temperature = predictive_temperature
        self.class_weight = class_weight
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.checkpoint_dir = checkpoint_dir
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Learn weights and precisions from images and their classes.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images, or rows of C·H·W features.
        y : array-like of shape (n,)
            Class labels, numbers or strings.
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
        MemoryError
            If memory runs out in training, which leaves the estimator unfitted; it says what to
            lower. What torch raised is its cause.
        KeyboardInterrupt
            At Ctrl-C, if the estimator is a clone, as the fits of searches and ensembles are, if
            several processes train together, or before the first evidence is over; and at a second
            one. The estimator is as it was before the call.

        Warns
        -----
        ConvergenceWarning
            If the evidence had not settled by ``max_epochs``.
        UserWarning
            If Ctrl-C broke off the training: the estimator is fitted then, with the state of the
            last evidence. If a checkpoint is damaged or cannot be written, or was made with another
            number of threads.
        """
        classes = self.classes_ if self._previous() else None
        return self._fit(X, y, sample_weight, classes)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train one epoch on a chunk of data.

        N is the weight of all chunks so far, so a second pass over the same rows counts them
        again; the evidence is that of the present chunk, scaled up to N. Standardisation is that
        of the first chunk. After a warm-up of five calls the learning rate stays constant; burn-in,
        evidence and ``hyper_warmup`` count calls as epochs. With ``predictive="laplace"`` each call
        leaves a posterior, whose curvature is that of its chunk, scaled up to N. Of parameters
        that are set between calls only ``batch_size``, ``class_weight`` and those of predictions
        count. A call that is broken off, by Ctrl-C or an error in training, leaves the estimator
        unfitted.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            A chunk.
        y : array-like of shape (n,)
            Its labels.
        classes : array-like of shape (K,), default=None
            All classes; needed in the first call.
        sample_weight : array-like of shape (n,), default=None
            As in ``fit``.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in ``fit``; if classes are missing in the first call, differ from it, or lack a
            label.
        MemoryError
            As in ``fit``.

        Warns
        -----
        UserWarning
            If a channel of the images does not vary in the first chunk.
        """
        known = self.classes_ if self.__sklearn_is_fitted__() else None
        classes = check_classes(classes, known)
        self._validate_params()  # they may have been set since the last call
        check_incremental_class_weight(self.class_weight)
        return self._partial_fit(X, y, sample_weight, classes)

    @property
    def _n_outputs(self) -> int:
        return len(self.classes_)

    @property
    def _likelihood(self) -> Categorical:
        return Categorical()

    def _encoded(self, y, present, classes, first):
        classes = np.unique(y) if classes is None else classes
        return encode(y, classes), classes

    def _weights(self, sample_weight, X, y, classes):
        return check_weights(sample_weight, X, y, classes, self.class_weight)

    def _targets(self, classes, codes, weights, first, more):
        self.classes_ = classes
        return codes

    def _described(self) -> str:
        return repr(self.classes_.tolist())

    def _compared(self, X):
        return self.predict_proba(X)

    def decision_function(self, X):
        """Log odds of the probabilities of ``predict_proba``.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images.

        Returns
        -------
        ndarray of shape (n, K), or (n,) for two classes
            log p_k − log(1 − p_k); for two classes of the second one.
        """
        return log_odds(self._outputs(X)).numpy()

    def predict_log_proba(self, X):
        """Log probabilities of the classes.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images.

        Returns
        -------
        ndarray of shape (n, K)
            In the order of ``classes_``.
        """
        return self._outputs(X).log_softmax(1).numpy()

    def predict_proba(self, X):
        """Probabilities of the classes.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images.

        Returns
        -------
        ndarray of shape (n, K)
            In the order of ``classes_``.

        Raises
        ------
        ValueError
            With ``predictive="laplace"`` after a fit without it; all that predicts raises it.
        MemoryError, torch.OutOfMemoryError, RuntimeError
            What torch raises if memory does not suffice for 16 rows at a time.

        Warns
        -----
        UserWarning
            If memory did not suffice for as many rows at a time as were to be taken; fewer were.
        """
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X):
        """The most probable class of each row.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images.

        Returns
        -------
        ndarray of shape (n,)
            Class labels.
        """
        codes = self._outputs(X).argmax(1).numpy()
        return self.classes_[codes]

    def _outputs(self, X) -> torch.Tensor:
        """What the softmax of is predicted, (n, K)."""
        if self._takes_map():
            return self._map_outputs(X)
        return laplace_outputs(
            self.module_,
            self.posterior_,
            self._new_images(X),
            len(self.classes_),
            self.predictive_samples,
            self.predictive_temperature,
        )

    # It is the same for all, and is to stand among the methods that are documented.
    equivariance_error = SoftEquivariantBase.equivariance_error

    def simplify(self, X, threshold=0.01, tol=1e-3):
        """A copy without the pathways that are off, or next to idle.

        What is left has fewer weights, and predicts as before within a tolerance. Pathways that
        were removed during training go in any case. The copy of a model that was fitted by ``fit``
        cannot go on by ``warm_start``; one of ``partial_fit`` can go on.

        Parameters
        ----------
        X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
            Images on which the predictions of both are compared.
        threshold : float, default=0.01
            A pathway goes where its shares of its layer's effective dimensions (``symmetry_``) and
            of the energy of its layer's output (``output_share_``) are both below. 0 takes
            only what was removed during training, which changes no prediction.
        tol : float, default=1e-3
            Largest change of any probability that is let pass.

        Returns
        -------
        SoftEquivariantClassifier
            It has ``simplification_``, a Bunch with ``removed``, list of (layer, pathway);
            ``change``, the largest change of a probability on X; ``n_weights``, ``seconds``: pairs
            of numbers before and after, the latter of ``predict_proba(X)``, the shortest of three.
            In the tables of its pathways what is gone has the precision inf and zeros; the
            evidence is that of the fit.

        Raises
        ------
        ValueError
            If a probability changes by more than ``tol``: then pathways below the threshold are
            still of use; lower it.
        """
        check_is_fitted(self)
        return simplified(self, X, threshold, tol)

    def export_onnx(self, path):
        """Write the network as an ONNX graph, which other runtimes compute without Python.

        Its input ``images``, float32 of shape (n, C, H, W) for any n, are images as ``fit`` takes
        them (rows of features have to be brought into this shape); standardisation is part of the
        graph. Its output ``probabilities``, float32 of shape (n, K), are those of
        ``predict_proba`` with ``predictive="map"``, but for rounding. Where two of the grids that
        a strided layer chooses from are as large as each other, rounding may choose the other one.
        Pathways that are off are left out. The metadata hold ``classes``, as JSON, in which labels
        that are neither numbers nor strings, such as dates, are strings.

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
        ValueError
            With ``predictive="laplace"``.
        """
        check_is_fitted(self)
        if self.predictive != "map":
            raise ValueError(
                f"predictive={self.predictive!r} averages over the posterior, for which there is "
                'no graph. Call set_params(predictive="map") first to export the network itself.'
            )
        classes = {"classes": labels_as_json(self.classes_)}
        exported(self, Output("probabilities", torch.nn.Softmax(1), classes)).save(path)
        return path
