"""Pictures of a fit: which symmetry each layer learned, and how the evidence rose.

A display stores arrays, draws them in ``plot`` and takes them from a fitted estimator in
``from_estimator``, as those of scikit-learn do.
"""

import math

import numpy as np

from .model_selection import fitted_within

__all__ = ["MarginalLikelihoodDisplay", "SymmetryDisplay"]

# The palette of Okabe and Ito, told apart by colour-blind readers. Markers repeat the distinction
# without colour; after a full round bars are hatched and markers hollow.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_DARK = frozenset({"#0072B2", "#009E73", "#D55E00"})
_MARKERS = "osD^vP*"
_HATCHES = ("", "//", "..", "xx", "++")


class SymmetryDisplay:
    """Shares and prior precisions of the pathways of each layer.

    On the left one bar a layer shows how its effective dimensions divide over the pathways; on
    the right stand the prior precisions, where a high one holds a pathway off. A pathway that was
    removed has an infinite precision and stands in the band at the right edge.

    Parameters
    ----------
    symmetry : array-like of shape (n_layers, n_pathways)
        Share of each pathway in the effective dimensions of its layer; rows sum to 1. 0 or NaN
        where a layer lacks a pathway.
    prior_precision : array-like of shape (n_layers, n_pathways)
        Prior precision δ of each pathway, ``inf`` where it was removed, NaN where a layer lacks
        it or it is still held back.
    layer_names : sequence of str, of length n_layers
        Names of the layers, from the input to the output.
    pathway_names : sequence of str, of length n_pathways
        Names of the pathways.
    estimator_name : str or None, default=None
        Name of the estimator, for the title.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that holds the plot.
    axes_ : ndarray of shape (2,), dtype=matplotlib Axes
        Axes with the shares and with the precisions.
    bars_ : list of matplotlib BarContainer, of length n_pathways
        Bars of each pathway.
    markers_ : list of matplotlib Line2D, of length n_pathways
        Markers of the precisions of each pathway.

    See Also
    --------
    MarginalLikelihoodDisplay : The evidence over the epochs.

    Examples
    --------
    >>> from sklearn_softeq.display import SymmetryDisplay
    >>> display = SymmetryDisplay(
    ...     symmetry=[[0.98, 0.02], [0.3, 0.7]],
    ...     prior_precision=[[2.0, 900.0], [40.0, 5.0]],
    ...     layer_names=["blocks.0", "blocks.1"],
    ...     pathway_names=["conv", "fc"],
    ... )
    >>> display.plot()
    <...SymmetryDisplay object at ...>
    """

    def __init__(
        self, *, symmetry, prior_precision, layer_names, pathway_names, estimator_name=None
    ):
        self.symmetry = symmetry
        self.prior_precision = prior_precision
        self.layer_names = layer_names
        self.pathway_names = pathway_names
        self.estimator_name = estimator_name

    @classmethod
    def from_estimator(cls, estimator, *, ax=None, name=None):
        """Plot what a fitted estimator learned.

        Parameters
        ----------
        estimator : estimator instance
            Fitted classifier or regressor of this package, a :class:`~sklearn.pipeline.Pipeline`
            that ends in one, or a search over one.
        ax : matplotlib Axes, pair of matplotlib Axes or None, default=None
            Where to plot, as in :meth:`plot`.
        name : str or None, default=None
            Title; None for the name of the estimator's class.

        Returns
        -------
        display : SymmetryDisplay
            The display, plotted.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        estimator = fitted_within(estimator, cls.__name__)
        display = cls(
            symmetry=estimator.symmetry_,
            prior_precision=estimator.prior_precision_,
            layer_names=estimator.layer_names_,
            pathway_names=estimator.pathway_names_,
            estimator_name=type(estimator).__name__ if name is None else name,
        )
        return display.plot(ax=ax)

    def plot(self, *, ax=None):
        """Draw the shares and the precisions side by side.

        Parameters
        ----------
        ax : matplotlib Axes, pair of matplotlib Axes or None, default=None
            One axes is divided in two; a pair takes the shares and the precisions; None makes a
            figure whose height follows the number of layers and pathways.

        Returns
        -------
        display : SymmetryDisplay
            The display itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        self.axes_ = _two_axes(ax, len(self.layer_names), len(self.pathway_names))
        self.figure_ = self.axes_[0].figure
        self._plot_shares(self.axes_[0])
        self._plot_precisions(self.axes_[1])
        self._legend(self.axes_[1])
        if self.estimator_name is not None:
            self.axes_[0].set_title(self.estimator_name, loc="left")
        return self

    def _plot_shares(self, ax):
        shares = np.nan_to_num(np.asarray(self.symmetry, dtype=float))  # (layers, pathways)
        rows = np.arange(len(shares))
        starts = np.cumsum(shares, axis=1) - shares
        self.bars_ = []
        for p in range(shares.shape[1]):
            colour, _, hatch = _style(p)
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "height": 0.72}
            bars = ax.barh(rows, shares[:, p], left=starts[:, p], **style)
            labels = [f"{share:.0%}" if share >= 0.12 else "" for share in shares[:, p]]
            ink = "white" if colour in _DARK else "black"
            ax.bar_label(bars, labels, label_type="center", color=ink, fontsize="small")
            self.bars_.append(bars)
        ax.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))  # the input's layer on top
        ax.set_yticks(rows, labels=self.layer_names)
        ax.set_xticks([0, 0.5, 1], labels=["0%", "50%", "100%"])
        ax.set_xlabel("share of effective dimensions")
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)

    def _plot_precisions(self, ax):
        precision = np.asarray(self.prior_precision, dtype=float)  # (layers, pathways)
        low, high, removed = _log_range(precision)
        shown = np.where(np.isinf(precision), removed, precision)
        # A little apart, so that equal precisions do not hide each other.
        present = ~np.isnan(shown)
        places = (np.cumsum(present, 1) - 0.5) / np.maximum(present.sum(1, keepdims=True), 1)
        rows = np.arange(len(shown))[:, None] + 0.6 * (places - 0.5)  # (layers, pathways)
        self.markers_ = []
        for p in range(shown.shape[1]):
            colour, marker, hatch = _style(p)
            style = {"linestyle": "none", "marker": marker, "markersize": 6.5, "color": colour}
            style |= {"markerfacecolor": "white" if hatch else colour, "markeredgewidth": 1.2}
            self.markers_ += ax.plot(shown[:, p], rows[:, p], **style)
        ax.set_xscale("log")
        ax.set(xlim=(low, high), ylim=(len(rows) - 0.5, -0.5), xlabel="prior precision δ")
        ax.set_yticks(np.arange(len(shown)), labels=[])
        edge = removed**2 / high if np.isinf(precision).any() else high
        ticks = _log_ticks(low, edge)
        ax.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
        if edge < high:
            ax.axvspan(edge, high, color="0.93", zorder=0)
            where = {"xy": (removed, 1.0), "xycoords": ("data", "axes fraction")}
            ax.annotate("removed", **where, ha="center", va="bottom", fontsize="small")
        ax.grid(color="0.88", zorder=0)
        ax.set_axisbelow(True)
        ax.tick_params(axis="both", which="both", length=0)
        ax.spines[:].set_visible(False)

    def _legend(self, ax):
        from matplotlib.legend_handler import HandlerTuple

        handles = list(zip(self.bars_, self.markers_, strict=True))
        side_by_side = {tuple: HandlerTuple(ndivide=None)}
        _legend_beside(ax, handles, self.pathway_names, title="pathway", handler_map=side_by_side)


class MarginalLikelihoodDisplay:
    """The Laplace estimate of the log marginal likelihood over the epochs, with its three terms.

    The evidence is log p(D | w) − ½ Σ δ‖w‖² − ½ Σ log(1 + λμ/δ): the fit, less the distance of
    the weights from the prior's mean, less the capacity that the data determined. All are shown
    per datum.

    Parameters
    ----------
    epochs : array-like of shape (n_evaluations,)
        Epochs at which the evidence was evaluated.
    log_likelihood : array-like of shape (n_evaluations,)
        log p(D | w) in nats, summed over the data.
    scatter : array-like of shape (n_evaluations,)
        Σ δ‖w‖² over the weight tensors.
    log_det_ratio : array-like of shape (n_evaluations,)
        Σ log(1 + λμ/δ), the log determinant of the posterior precision over the prior's.
    n_samples : float or array-like of shape (n_evaluations,)
        Number of training samples, or the sum of their weights, at each evaluation.
    estimator_name : str or None, default=None
        Name of the estimator, for the title.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that holds the plot.
    ax_ : matplotlib Axes
        Axes with the lines.
    lines_ : list of matplotlib Line2D, of length 4
        The evidence, the fit, the scatter's term and the determinant's term.

    See Also
    --------
    SymmetryDisplay : Shares and precisions of the pathways of each layer.

    Examples
    --------
    >>> from sklearn_softeq.display import MarginalLikelihoodDisplay
    >>> display = MarginalLikelihoodDisplay(
    ...     epochs=[5, 10, 15],
    ...     log_likelihood=[-110.0, -60.0, -55.0],
    ...     scatter=[20.0, 30.0, 25.0],
    ...     log_det_ratio=[90.0, 80.0, 60.0],
    ...     n_samples=100,
    ... )
    >>> display.plot()
    <...MarginalLikelihoodDisplay object at ...>
    """

    def __init__(
        self, *, epochs, log_likelihood, scatter, log_det_ratio, n_samples, estimator_name=None
    ):
        self.epochs = epochs
        self.log_likelihood = log_likelihood
        self.scatter = scatter
        self.log_det_ratio = log_det_ratio
        self.n_samples = n_samples
        self.estimator_name = estimator_name

    @classmethod
    def from_estimator(cls, estimator, *, ax=None, name=None):
        """Plot the evidence that a fitted estimator recorded.

        Parameters
        ----------
        estimator : estimator instance
            Fitted classifier or regressor of this package, a :class:`~sklearn.pipeline.Pipeline`
            that ends in one, or a search over one.
        ax : matplotlib Axes or None, default=None
            Where to plot; None for a new figure.
        name : str or None, default=None
            Title; None for the name of the estimator's class.

        Returns
        -------
        display : MarginalLikelihoodDisplay
            The display, plotted.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        ValueError
            If it evaluated no evidence while it trained.
        """
        estimator = fitted_within(estimator, cls.__name__)
        history = estimator.history_
        if not len(history["epoch"]):
            raise ValueError(
                "The estimator recorded no evidence during training: it was fitted with "
                "learn_prior=False, or stopped before burn_in. Fit it with learn_prior=True."
            )
        display = cls(
            epochs=history["epoch"],
            log_likelihood=history["log_likelihood"],
            scatter=history["scatter"],
            log_det_ratio=history["log_det_ratio"],
            n_samples=history["n_observations"],
            estimator_name=type(estimator).__name__ if name is None else name,
        )
        return display.plot(ax=ax)

    def plot(self, *, ax=None):
        """Draw the evidence and its terms.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to plot; None for a new figure.

        Returns
        -------
        display : MarginalLikelihoodDisplay
            The display itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        if ax is None:
            _, ax = _pyplot().subplots(figsize=(7.5, 4), layout="constrained")
        self.figure_, self.ax_, self.lines_ = ax.figure, ax, []
        for p, values in enumerate(self._terms().values()):
            colour, marker, _ = ("black", "o", "") if p == 0 else _style(p - 1)
            style = {"color": colour, "marker": marker, "linewidth": 2.4 if p == 0 else 1.4}
            style |= {"markersize": 4, "zorder": 3 if p == 0 else 2}
            self.lines_ += ax.plot(self.epochs, values, **style)
        ax.set(xlabel="epoch", ylabel="nats per datum")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        _legend_beside(ax, self.lines_, list(self._terms()))
        if self.estimator_name is not None:
            ax.set_title(self.estimator_name, loc="left")
        return self

    def _terms(self):
        """The evidence and its terms by their labels, per datum."""
        fit = np.asarray(self.log_likelihood, dtype=float) / self.n_samples
        scatter = -0.5 * np.asarray(self.scatter, dtype=float) / self.n_samples
        capacity = -0.5 * np.asarray(self.log_det_ratio, dtype=float) / self.n_samples
        return {
            "log marginal likelihood": fit + scatter + capacity,
            "fit: log p(D | w)": fit,
            "scatter: −½ Σ δ‖w‖²": scatter,
            "capacity: −½ Σ log(1 + λμ/δ)": capacity,
        }


def _pyplot():
    """matplotlib.pyplot, imported when the first plot is drawn."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with "
            "`pip install 'sklearn-softeq[plot]'`."
        ) from error
    return plt


def _style(p):
    """Colour, marker and hatch of pathway p."""
    turn, place = divmod(p, len(_COLOURS))
    return _COLOURS[place], _MARKERS[place], _HATCHES[turn % len(_HATCHES)]


def _two_axes(ax, n_layers, n_pathways):
    """Axes for the shares and for the precisions, in an array of two."""
    plt = _pyplot()
    if ax is None:
        # Inches: room for a bar a layer, and for a line of the legend a pathway.
        row = max(0.34, 0.12 * n_pathways)  # for the markers of a layer, one below the other
        height = 1.3 + max(row * max(n_layers, 3), 0.24 * n_pathways)
        return plt.subplots(1, 2, figsize=(9.0, height), layout="constrained")[1]
    if isinstance(ax, plt.Axes):
        ax.set_axis_off()
        return np.array([ax.inset_axes((0, 0, 0.46, 1)), ax.inset_axes((0.54, 0, 0.46, 1))])
    if np.size(ax) != 2:
        raise ValueError(
            "ax must be one matplotlib Axes, which is divided in two, or a pair of them; found "
            f"{np.size(ax)}. Leave it at None for a figure of its own."
        )
    return np.ravel(ax)


def _log_range(precision):
    """Limits of a log axis around the finite precisions, and the place of the infinite ones."""
    finite = np.log10(precision[np.isfinite(precision)])
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = 0.08 * max(high - low, 1.0)
    removed = high + 3 * margin
    right = removed + margin if np.isinf(precision).any() else high + margin
    return 10 ** (low - margin), 10**right, 10**removed


def _log_ticks(low, high):
    """A few round numbers between two limits of a log axis: 1, 2, 5 of each decade, or decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1, max((last - first) // 4, 1))
    digits = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return [tick for tick in ticks if low <= tick < high]


def _legend_beside(ax, handles, labels, **options):
    """A legend to the right of the axes, where it covers nothing."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}
    ax.legend(handles, labels, frameon=False, alignment="left", **place, **options)
