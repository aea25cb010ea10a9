"""Displays keep what they are given, draw all of it, and read fitted arrays only."""

import inspect
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.base import SoftEquivariantBase
from sklearn_softeq.display import MarginalLikelihoodDisplay, SymmetryDisplay

DISPLAYS = (SymmetryDisplay, MarginalLikelihoodDisplay)
each_display = pytest.mark.parametrize("display", DISPLAYS, ids=lambda display: display.__name__)


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


class Fitted(SoftEquivariantBase):
    """The fitted arrays that displays read, without a fit."""

    def fit(self, X=None, y=None):
        self.symmetry_ = np.array([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
        self.prior_precision_ = np.array([[3.0, np.inf], [200.0, 1e5], [1.0, 1.0]])
        self.layer_names_ = ("blocks.0", "blocks.1", "head")
        self.pathway_names_ = ("conv", "factored_fc")
        self.history_ = {
            "n_observations": np.array([200.0, 200.0]),
            "epoch": np.array([5, 10]),
            "log_likelihood": np.array([-300.0, -100.0]),
            "scatter": np.array([20.0, 40.0]),
            "log_det_ratio": np.array([60.0, 80.0]),
            "log_marginal_likelihood": np.array([-340.0, -160.0]),
        }
        self.n_observations_ = 200.0
        self.net_ = None
        return self


def random_symmetry(n_layers, n_pathways):
    rng = np.random.RandomState(0)
    return SymmetryDisplay(
        symmetry=rng.dirichlet(np.ones(n_pathways), size=n_layers),
        prior_precision=10.0 ** rng.uniform(-3, 6, size=(n_layers, n_pathways)),
        layer_names=[f"a.layer.of.a.long.name.{i}" for i in range(n_layers)],
        pathway_names=[f"pathway {i}" for i in range(n_pathways)],
    )


@each_display
def test_from_estimator_reads_a_fit_or_a_pipeline(plt, display):
    fitted = Fitted().fit()
    shown = display.from_estimator(fitted)
    piped = display.from_estimator(make_pipeline(FunctionTransformer(), fitted))
    assert shown.estimator_name == piped.estimator_name == "Fitted"
    assert display.from_estimator(fitted, name="mine").estimator_name == "mine"
    assert shown.figure_ is not piped.figure_
    shown.figure_.canvas.draw()


@each_display
def test_from_estimator_asks_for_a_fit(display):
    for estimator in (Fitted(), make_pipeline(FunctionTransformer(), Fitted())):
        with pytest.raises(NotFittedError):
            display.from_estimator(estimator)


@each_display
def test_from_estimator_looks_where_scikit_learn_keeps_it(plt, display):
    search, target = GridSearchCV(Fitted(), {}), TransformedTargetRegressor(Fitted())
    for around in (search, target):
        with pytest.raises(NotFittedError):
            display.from_estimator(around)
    search.best_estimator_ = target.regressor_ = Fitted().fit()
    for around in (search, target):
        assert display.from_estimator(around).estimator_name == "Fitted"
    with pytest.raises(TypeError, match=f"{display.__name__} takes .* not a LogisticRegression"):
        display.from_estimator(LogisticRegression())


@each_display
def test_plot_draws_where_it_is_told(plt, display):
    figure, ax = plt.subplots()
    shown = display.from_estimator(Fitted().fit(), ax=ax)
    assert shown.figure_ is figure
    figure.canvas.draw()
    assert plt.get_fignums() == [figure.number]


@each_display
def test_plot_without_matplotlib_says_what_to_install(monkeypatch, display):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"sklearn-softeq\[plot\]"):
        display.from_estimator(Fitted().fit())


def test_shares_are_stacked_in_rows(plt):
    fitted = Fitted().fit()
    display = SymmetryDisplay.from_estimator(fitted)
    widths = np.array([[bar.get_width() for bar in bars] for bars in display.bars_]).T
    starts = np.array([[bar.get_x() for bar in bars] for bars in display.bars_]).T
    assert_allclose(widths, fitted.symmetry_)
    assert_allclose(starts, [[0, 1], [0, 0.25], [0, 0.5]])
    names = [label.get_text() for label in display.axes_[0].get_yticklabels()]
    assert names == ["blocks.0", "blocks.1", "head"]
    assert display.axes_[0].yaxis_inverted()


def test_a_removed_pathway_stands_at_the_edge(plt):
    display = SymmetryDisplay.from_estimator(Fitted().fit())
    conv, factored = (marker.get_xdata() for marker in display.markers_)
    assert_allclose(conv, [3.0, 200.0, 1.0])
    assert_allclose(factored[1:], [1e5, 1.0])
    assert 1e5 < factored[0] < display.axes_[1].get_xlim()[1]
    assert [text.get_text() for text in display.axes_[1].texts] == ["removed"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.1, 11.0, ["5", "10"]),
        (0.3, 12.0, ["0.5", "1", "2", "5", "10"]),
        (1e-3, 1e5, ["0.01", "1", "100", "10000"]),
    ],
)
def test_ticks_of_precisions_are_few_and_round(plt, low, high, expected):
    display = SymmetryDisplay(
        symmetry=np.ones((2, 1)),
        prior_precision=np.array([[low], [high]]),
        layer_names=["blocks.0", "head"],
        pathway_names=["conv"],
    ).plot()
    ax = display.axes_[1]
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert [tick for tick in shown if float(tick) >= low] == expected
    assert not list(ax.get_xticklabels(minor=True))


def test_no_word_of_removal_when_all_pathways_are_there(plt):
    assert len(random_symmetry(3, 2).plot().axes_[1].texts) == 0


def test_every_pathway_is_removed(plt):
    display = random_symmetry(3, 2)
    display.prior_precision = np.full((3, 2), np.inf)
    display.plot().figure_.canvas.draw()
    # At points that an axis without any number can show, and said once.
    assert [text.get_text() for text in display.axes_[1].texts] == ["removed"]
    assert all(np.isfinite(marker.get_xdata()).all() for marker in display.markers_)


def test_a_layer_may_lack_a_pathway(plt):
    display = random_symmetry(2, 2)
    display.symmetry = [[0.5, 0.5], [np.nan, 1.0]]
    display.prior_precision = [[1.0, 2.0], [np.nan, 3.0]]
    display.plot().figure_.canvas.draw()
    assert display.bars_[0][1].get_width() == 0
    assert_array_equal(display.markers_[0].get_xdata(), [1.0, np.nan])


class FittedReadout(Fitted):
    """Five pathways: three in each block, two others in the readout."""

    def fit(self, X=None, y=None):
        super().fit()
        nan, inf = np.nan, np.inf
        self.layer_names_ = ("blocks.0", "blocks.1", "head.hidden")
        self.pathway_names_ = ("p4_conv", "conv", "sparse_fc", "pooled", "free")
        self.symmetry_ = np.array(
            [[0.5, 0.25, 0.25, 0, 0], [1.0, 0, 0, 0, 0], [0, 0, 0, 0.125, 0.875]]
        )
        self.prior_precision_ = np.array(
            [[2.0, 5.0, 9.0, nan, nan], [1.0, inf, 40.0, nan, nan], [nan, nan, nan, 3.0, 7.0]]
        )
        return self


@pytest.mark.filterwarnings("error")
def test_layers_with_pathways_of_their_own(plt):
    fitted = FittedReadout().fit()
    display = SymmetryDisplay.from_estimator(fitted)
    display.figure_.canvas.draw()
    widths = np.array([[bar.get_width() for bar in bars] for bars in display.bars_]).T
    ends = np.array([[bar.get_x() + bar.get_width() for bar in bars] for bars in display.bars_]).T
    assert_allclose(widths, fitted.symmetry_)
    assert_allclose(ends.max(1), 1)
    labels = [text.get_text() for text in display.axes_[0].texts if text.get_text()]
    assert sorted(labels) == ["100%", "12%", "25%", "25%", "50%", "88%"]
    shown = np.array([marker.get_xdata() for marker in display.markers_]).T
    finite = np.isfinite(fitted.prior_precision_)
    assert_allclose(shown[finite], fitted.prior_precision_[finite])
    assert_array_equal(np.isnan(shown), np.isnan(fitted.prior_precision_))
    assert 40 < shown[1, 1] < display.axes_[1].get_xlim()[1]
    legend = display.axes_[1].get_legend()
    assert tuple(text.get_text() for text in legend.get_texts()) == fitted.pathway_names_
    looks = {(m.get_marker(), m.get_markerfacecolor()) for m in display.markers_}
    assert len(looks) == 5


@pytest.mark.filterwarnings("error")  # matplotlib warns when the parts do not fit
@pytest.mark.parametrize(("n_layers", "n_pathways"), [(1, 1), (40, 3), (4, 17)])
def test_any_number_of_layers_and_pathways(plt, n_layers, n_pathways):
    display = random_symmetry(n_layers, n_pathways).plot()
    display.figure_.canvas.draw()
    legend = display.axes_[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == display.pathway_names
    # It stands beside the axes, so it covers no marker.
    assert legend.get_window_extent().x0 >= display.axes_[1].get_window_extent().x1


def test_pathways_differ_in_more_than_colour(plt):
    display = random_symmetry(2, 14).plot()
    looks = {(m.get_marker(), m.get_markerfacecolor()) for m in display.markers_}
    assert len(looks) == 14


def test_a_pair_of_axes(plt):
    figure, axes = plt.subplots(2, 1)
    display = random_symmetry(3, 2).plot(ax=axes)
    assert list(display.axes_) == list(axes)
    assert display.figure_ is figure


def test_three_axes_are_refused(plt):
    with pytest.raises(ValueError, match="a pair of them; found 3"):
        random_symmetry(3, 2).plot(ax=plt.subplots(1, 3)[1])


def test_terms_add_up_to_the_evidence_per_datum(plt):
    fitted = Fitted().fit()
    display = MarginalLikelihoodDisplay.from_estimator(fitted)
    evidence, *terms = (line.get_ydata() for line in display.lines_)
    assert_allclose(evidence, fitted.history_["log_marginal_likelihood"] / 200.0)
    assert_allclose(evidence, np.sum(terms, axis=0))
    assert_allclose(terms, [[-1.5, -0.5], [-0.05, -0.1], [-0.15, -0.2]])
    for line in display.lines_:
        assert_array_equal(line.get_xdata(), [5, 10])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("learn_prior", [False, True])
def test_a_fit_without_evidences_has_nothing_to_show(learn_prior):
    X, y = np.random.default_rng(0).normal(size=(12, 1, 4, 4)), np.arange(12) % 2
    clf = SoftEquivariantClassifier(width=1, max_epochs=4, start="joint", learn_prior=learn_prior)
    if learn_prior:
        clf.partial_fit(X, y, classes=[0, 1])  # one epoch: burn_in is still to come
    else:
        clf.fit(X, y)
    with pytest.raises(ValueError, match="recorded no evidence .* Fit it with learn_prior=True"):
        MarginalLikelihoodDisplay.from_estimator(clf)


@each_display
def test_init_only_stores(display):
    given = {name: object() for name in inspect.signature(display).parameters}
    assert vars(display(**given)) == given
