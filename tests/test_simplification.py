"""Fitted classifiers without the pathways that are of no use any more."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_softeq import SoftEquivariantClassifier, SymmetryDisplay

SHORT = {
    "width": 2,
    "max_epochs": 8,
    "burn_in": 2,
    "evidence_every": 2,
    "start": "joint",
    "random_state": 0,
    "tol": 1e9,
}


def digits(n=60):
    images, labels = load_digits(return_X_y=True)
    return images[:n].reshape(-1, 8, 8), labels[:n]


pytestmark = pytest.mark.filterwarnings("ignore:The log evidence had not settled")


@pytest.fixture
def fitted():
    clf = SoftEquivariantClassifier(**SHORT).fit(*digits())
    # As the evidence does with what it switches off.
    for i in (0, 2):
        layer = clf.module_.layers[clf.layer_names_[i]]
        layer.remove("factored_fc")
        clf.prior_precision_[i, 1] = np.inf
        for table in (clf.effective_dimensions_, clf.output_share_, clf.symmetry_):
            table[i, 1] = 0
    return clf


def test_the_posterior_of_what_was_removed_goes_too():
    X, y = digits()
    clf = SoftEquivariantClassifier(**SHORT, predictive="laplace").fit(X, y)
    before = clf.predict_proba(X)
    layer = clf.module_.layers["blocks.1"]
    layer.remove("factored_fc")
    clf.symmetry_[1], clf.output_share_[1] = (1, 0), (1, 0)
    simple = clf.simplify(X, tol=1)
    gone = {name for name in clf.posterior_.tensors if name.startswith("blocks.1.factored_fc.")}
    assert gone
    assert simple.posterior_.tensors.keys() == clf.posterior_.tensors.keys() - gone
    assert simple.posterior_.nbytes < clf.posterior_.nbytes
    np.testing.assert_array_equal(simple.predict_proba(X), clf.predict_proba(X))
    assert (clf.predict_proba(X) != before).any()


def test_what_was_removed_is_gone_and_predictions_are_the_same(fitted):
    X, _ = digits(90)
    before = fitted.predict_proba(X)
    n_before = fitted.n_weights_.copy()
    simple = fitted.simplify(X, threshold=0)
    report = simple.simplification_
    gone = [(fitted.layer_names_[i], "factored_fc") for i in (0, 2)]
    assert report.removed == gone
    assert report.change == 0
    np.testing.assert_array_equal(simple.predict_proba(X), before)
    left = {name for name, _ in simple.module_.named_parameters()}
    named = dict(fitted.module_.named_parameters())
    lost = {n for n in named if any(n.startswith(f"{layer}.{path}.") for layer, path in gone)}
    assert left == named.keys() - lost
    n_lost = sum(named[name].numel() for name in lost)
    assert n_lost == n_before[[0, 2], 1].sum()
    n_weights = sum(w.numel() for w in named.values())
    assert report.n_weights == (n_weights, n_weights - n_lost)
    assert all(seconds > 0 for seconds in report.seconds)
    # The classifier itself is as it was.
    np.testing.assert_array_equal(fitted.n_weights_, n_before)
    np.testing.assert_array_equal(fitted.predict_proba(X), before)
    assert "simplification_" not in vars(fitted)


def test_the_last_step_of_a_pipeline_becomes_smaller():
    X, y = digits()
    rows = X.reshape(len(X), -1)
    model = make_pipeline(FunctionTransformer(np.tanh), SoftEquivariantClassifier(**SHORT))
    model.fit(rows, y)
    model[-1].module_.layers["blocks.1"].remove("factored_fc")
    before = model[:-1]  # as the user guide has it
    smaller = make_pipeline(*before, model[-1].simplify(before.transform(rows), tol=1))
    n_weights = smaller[-1].simplification_.n_weights
    assert n_weights[1] < n_weights[0]
    assert smaller[-1] is not model[-1]
    np.testing.assert_allclose(smaller.predict_proba(rows), model.predict_proba(rows), atol=1e-6)


def test_a_refusal_leaves_the_classifier_as_it_was():
    X, y = digits()
    clf = SoftEquivariantClassifier(**SHORT).fit(X, y)
    before, attributes = clf.predict_proba(X), set(vars(clf))
    tables = [clf.n_weights_.copy(), clf.prior_precision_.copy(), clf.output_share_.copy()]
    with pytest.raises(ValueError, match="more than tol=1e-09"):
        clf.simplify(X, threshold=1.0, tol=1e-9)
    assert set(vars(clf)) == attributes
    np.testing.assert_array_equal(clf.predict_proba(X), before)
    for table, found in zip(
        tables, (clf.n_weights_, clf.prior_precision_, clf.output_share_), strict=True
    ):
        np.testing.assert_array_equal(found, table)


@pytest.mark.parametrize(
    ("options", "free"),
    [
        ({"pathways": ("p4_conv", "conv", "factored_fc")}, "factored_fc"),  # with another head
        ({"architecture": "resnet"}, "factored_fc"),
        ({"pathways": ("sparse_conv", "sparse_fc"), "learn_lengthscale": True}, "sparse_fc"),
    ],
    ids=str,
)
def test_of_other_networks_what_was_removed_goes_and_nothing_changes(options, free):
    X, y = digits()
    clf = SoftEquivariantClassifier(**{**SHORT, **options}).fit(X, y)
    column = clf.pathway_names_.index(free)
    there = [name for name, layer in clf.module_.layers.items() if free in layer.pathways]
    for name in there:
        clf.module_.layers[name].remove(free)
        place = clf.layer_names_.index(name), column
        for table in (clf.effective_dimensions_, clf.output_share_, clf.symmetry_):
            table[place] = 0
    simple = clf.simplify(X, threshold=0)
    assert simple.simplification_.removed == [(name, free) for name in there]
    np.testing.assert_array_equal(simple.predict_proba(X), clf.predict_proba(X))
    assert (simple.n_weights_[:, column] == 0).all()
    assert not any(free in name for name, _ in simple.module_.named_parameters())


def test_tables_of_what_is_left(fitted):
    simple = fitted.simplify(digits()[0], threshold=0)
    for i in (0, 2):
        assert simple.prior_precision_[i, 1] == np.inf
        for table in (simple.effective_dimensions_, simple.n_weights_, simple.output_share_):
            assert table[i, 1] == 0
            assert table[i, 0] > 0
    for table in (simple.symmetry_, simple.symmetry_per_weight_, simple.output_share_):
        np.testing.assert_allclose(table.sum(1), 1)
    np.testing.assert_array_equal(simple.prior_precision_[1], fitted.prior_precision_[1])
    infinite = {n for n, value in simple.prior_precisions_by_name_.items() if value == np.inf}
    assert infinite == {
        f"{fitted.layer_names_[i]}.factored_fc.{factor}.{kind}"
        for i in (0, 2)
        for factor in "UV"
        for kind in ("weight", "bias")
    }
    assert simple.log_marginal_likelihood_value_ == fitted.log_marginal_likelihood_value_


def test_what_is_below_the_threshold_goes_if_predictions_allow():
    clf = SoftEquivariantClassifier(**{**SHORT, "random_state": 2}).fit(*digits())
    X = digits(90)[0]
    small = np.maximum(clf.symmetry_, clf.output_share_)
    threshold = float(np.nextafter(small.min(), 1))  # one is below
    assert threshold < 0.5
    i, j = np.unravel_index(small.argmin(), small.shape)
    expected = [(clf.layer_names_[i], clf.pathway_names_[j])]
    with pytest.raises(ValueError, match="a probability changes by .* more than tol=1e-09"):
        clf.simplify(X, threshold=threshold, tol=1e-9)
    simple = clf.simplify(X, threshold=threshold, tol=1.0)
    assert simple.simplification_.removed == expected
    change = np.abs(simple.predict_proba(X) - clf.predict_proba(X)).max()
    assert simple.simplification_.change == pytest.approx(change)
    assert 0 < change <= 1


def test_each_layer_keeps_the_pathway_that_gives_most():
    clf, X = SoftEquivariantClassifier(**SHORT).fit(*digits()), digits()[0]
    simple = clf.simplify(X, threshold=1.0, tol=1.0)
    for i, layer in enumerate(simple.module_.layers.values()):
        assert list(layer.enabled) == [clf.pathway_names_[clf.output_share_[i].argmax()]]
    assert np.isfinite(simple.predict_proba(X)).all()


def test_pathways_that_are_held_back_stay():
    clf = SoftEquivariantClassifier(**{**SHORT, "start": "symmetric"})
    X, y = digits()
    clf.partial_fit(X, y, classes=np.arange(10))
    assert clf.simplify(X, threshold=0.4).simplification_.removed == []


def test_a_simple_classifier_is_a_classifier(fitted):
    X, y = digits()
    simple = fitted.simplify(X, threshold=0)
    again = pickle.loads(pickle.dumps(simple))
    np.testing.assert_array_equal(again.predict_proba(X), simple.predict_proba(X))
    assert again.simplification_.removed == simple.simplification_.removed
    assert simple.score(X, y) == fitted.score(X, y)
    errors = simple.equivariance_error(X)
    assert errors.layers[0] == pytest.approx(0, abs=1e-5)  # a convolution alone
    np.testing.assert_allclose(errors.layers, fitted.equivariance_error(X).layers)
    SymmetryDisplay.from_estimator(simple)
    assert clone(simple).get_params() == fitted.get_params()
    assert simple.simplify(X, threshold=0).simplification_.removed == []
    assert "simplification_" not in vars(simple.fit(X, y))
    assert (simple.n_weights_ > 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "kfac"},
        {"hyper_solver": "adam"},
        {"pathways": ("conv", "sparse_fc"), "learn_lengthscale": True},
    ],
    ids=str,
)
def test_a_simple_classifier_can_be_trained_on_by_chunks_only(options):
    X, y = digits()
    clf = SoftEquivariantClassifier(**{**SHORT, **options})
    for _ in range(4):
        clf.partial_fit(X, y, classes=np.arange(10))
    free = clf.pathway_names_[1]
    clf.module_.layers["blocks.0"].remove(free)
    simple = clf.simplify(X, threshold=0)
    for _ in range(4):
        before = simple.predict_proba(X)
        simple.partial_fit(X, y)
        assert not np.array_equal(simple.predict_proba(X), before)
    assert "simplification_" not in vars(simple)
    assert simple.n_weights_[0, 1] == 0
    assert (simple.n_weights_[1:, 1] > 0).all()
    assert not any(n.startswith(f"blocks.0.{free}.") for n in simple.prior_precisions_by_name_)
    simple.set_params(warm_start=True)
    with pytest.raises(ValueError, match=r"simplify\(\)"):
        simple.fit(X, y)


def test_a_copy_without_less_trains_on_as_the_model_itself():
    X, y = digits()
    clf = SoftEquivariantClassifier(**SHORT)
    for _ in range(4):
        clf.partial_fit(X, y, classes=np.arange(10))
    same = clf.simplify(X, threshold=0)
    assert same.simplification_.removed == []
    found = [c.partial_fit(X, y).predict_proba(X) for c in (clf, same)]
    np.testing.assert_array_equal(*found)


def test_moments_of_what_is_left_stay():
    X, y = digits()
    clf = SoftEquivariantClassifier(**SHORT).partial_fit(X, y, classes=np.arange(10))
    clf.module_.layers["blocks.0"].remove("factored_fc")
    optimizer = clf.simplify(X, threshold=0).net_.optimizer_
    left = dict(clf.module_.named_parameters())
    gone = {name for name in left if name.startswith("blocks.0.factored_fc.")}
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == len(left) - len(gone)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threshold": -0.1}, ValueError),
        ({"threshold": "low"}, TypeError),
        ({"tol": -1}, ValueError),
        ({"tol": np.nan}, ValueError),
        ({"threshold": np.nan}, ValueError),
    ],
)
def test_bad_options(fitted, options, error):
    with pytest.raises(error, match="must be|finite"):
        fitted.simplify(digits()[0], **options)
