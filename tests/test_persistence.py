"""Fitted classifiers are saved small, as plain values, and come back as they were."""

import copy
import io
import pickle
import warnings

import joblib
import numpy as np
import pytest
import skops.io as skops_io
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier

from sklearn_softeq import SoftEquivariantClassifier, SoftEquivariantRegressor, base, persistence

SHORT = {"max_epochs": 8, "width": 2, "burn_in": 2, "evidence_every": 2, "random_state": 0}
KINDS = {
    "default": {},
    "float32": {"dtype": "float32"},
    "two symmetries": {"pathways": ("p4_conv", "conv", "factored_fc")},
    "jointly": {"start": "joint"},
    "resnet": {"architecture": "resnet", "pathways": "conv"},
    "lengthscales": {"pathways": ("conv", "sparse_fc"), "learn_lengthscale": True},
    "kfac": {"optimizer": "kfac"},
    "fixed": {"learn_prior": False},
    "laplace": {"predictive": "laplace"},
    "laplace, float32": {"predictive": "laplace", "dtype": "float32", "predictive_samples": 20},
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:60], y[:60]


def by_pickle(clf, folder):
    return pickle.loads(pickle.dumps(clf))


def by_joblib(clf, folder):
    joblib.dump(clf, folder / "model.joblib")
    return joblib.load(folder / "model.joblib", mmap_mode="r")


def by_deepcopy(clf, folder):
    return copy.deepcopy(clf)


def by_skops(clf, folder):
    data = skops_io.dumps(clf)
    trusted = [f"{type(clf).__module__}.{type(clf).__name__}"]
    assert skops_io.get_untrusted_types(data=data) == trusted
    return skops_io.loads(data, trusted=trusted)


ROUTES = [by_pickle, by_joblib, by_deepcopy, by_skops]


def assert_same(found, expected):
    """Fitted attributes, but for the net and the posterior, to the last bit."""
    assert found.keys() == expected.keys()
    for name in found.keys() - {"net_", "posterior_"}:
        np.testing.assert_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, digits, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, **KINDS[kind]).fit(*digits)
    for route in ROUTES:
        again = route(clf, tmp_path)
        np.testing.assert_array_equal(again.predict_proba(digits[0]), clf.predict_proba(digits[0]))
        assert_same(vars(again), vars(clf))
        figures = [c.equivariance_error(digits[0]).layers for c in (again, clf)]
        np.testing.assert_array_equal(*figures)
        # Once more, what has been loaded says the same.
        np.testing.assert_equal(again.__getstate__(), clf.__getstate__())
    # What goes on from the weights alone goes on alike.
    further = [c.set_params(warm_start=True).fit(*digits) for c in (again, clf)]
    np.testing.assert_array_equal(*(c.predict_proba(digits[0]) for c in further))
    assert_same(vars(again), vars(clf))


@pytest.mark.parametrize("options", [{"predictive": "laplace"}, {"noise": 2.0}], ids=str)
def test_round_trip_of_a_regressor(options, digits, tmp_path):
    X, y = digits[0], np.stack([digits[1], digits[0].mean(1)], 1)
    reg = SoftEquivariantRegressor(**SHORT, **options).fit(X, y)
    for route in ROUTES:
        again = route(reg, tmp_path)
        found, expected = (r.predict(X, return_std=True) for r in (again, reg))
        np.testing.assert_array_equal(found, expected)
        assert_same(vars(again), vars(reg))
        np.testing.assert_equal(again.__getstate__(), reg.__getstate__())
        assert again.net_.criterion_ == reg.net_.criterion_
    further = [r.set_params(warm_start=True).fit(X, y) for r in (again, reg)]
    np.testing.assert_array_equal(*(r.predict(X) for r in further))
    assert_same(vars(again), vars(reg))


def test_chunks_of_a_regressor_go_on_after_a_round_trip(digits, tmp_path):
    reg = SoftEquivariantRegressor(**{**SHORT, "batch_size": 64, "optimizer": "sgd"})
    for _ in range(6):
        reg.partial_fit(*digits)
    again = by_pickle(reg, tmp_path)
    assert again.net_.criterion_ == reg.net_.criterion_
    for _ in range(4):
        again.partial_fit(*digits)
    assert again.noise_std_ != reg.noise_std_
    assert again.n_iter_ == 10


@pytest.mark.parametrize("route", [by_joblib, by_skops])
def test_chunks_go_on_after_a_round_trip(route, digits, tmp_path):
    options = {**SHORT, "max_epochs": 16, "burn_in": 8, "batch_size": 16}
    clf = SoftEquivariantClassifier(**options)
    for _ in range(20):
        clf.partial_fit(*digits, classes=range(10))
    again = route(clf, tmp_path)
    np.testing.assert_array_equal(again.predict_proba(digits[0]), clf.predict_proba(digits[0]))
    for _ in range(10):
        again.partial_fit(*digits)
    assert again.n_iter_ == 30
    assert again.n_observations_ == 30 * 60
    assert not again.net_.course.holding
    np.testing.assert_array_equal(again.history_["epoch"], range(8, 31, 2))
    np.testing.assert_array_equal(again.loss_curve_[:20], clf.loss_curve_)
    # Adam's moments are found again.
    assert again.loss_curve_[-5:].mean() < 0.8 * clf.loss_curve_[-5:].mean()


def test_a_simple_classifier_stays_simple(digits, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT).fit(*digits)
    layer = clf.net_.module_.layers["blocks.1"]
    layer.remove("factored_fc")
    clf.symmetry_[1], clf.output_share_[1] = (1, 0), (1, 0)
    simple = clf.simplify(digits[0])
    assert ("blocks.1", "factored_fc") in simple.simplification_.removed
    for route in ROUTES:
        again = route(simple, tmp_path)
        assert_same(vars(again), vars(simple))
        found, expected = (c.predict_proba(digits[0]) for c in (again, simple))
        np.testing.assert_array_equal(found, expected)
        assert "factored_fc" not in again.module_.layers["blocks.1"].pathways


def test_what_the_parameters_are_now_does_not_matter(digits):
    clf = SoftEquivariantClassifier(**SHORT).fit(*digits)
    expected = clf.predict_proba(digits[0])
    clf.set_params(width=5, pathways=("p4_conv",), architecture="resnet", dtype="float64")
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict_proba(digits[0]), expected)
    assert again.get_params() == clf.get_params()


def test_loading_touches_no_global_generator(digits):
    data = pickle.dumps(SoftEquivariantClassifier(**SHORT).fit(*digits))
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    pickle.loads(data)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_what_is_not_fitted_is_not_fitted_after_loading(tmp_path):
    for route in ROUTES:
        again = route(SoftEquivariantClassifier(width=3), tmp_path)
        assert again.get_params() == SoftEquivariantClassifier(width=3).get_params()
        assert not again.__sklearn_is_fitted__()


@pytest.mark.parametrize("width", [2, 8])
@pytest.mark.parametrize(
    ("epochs", "predictive", "dtype"),
    [
        (8, "map", "float32"),
        (8, "laplace", "float32"),
        (8, "laplace", "float64"),
        (30, "map", "float64"),
        pytest.param(150, "map", "float32", marks=pytest.mark.slow),
    ],
)
def test_files_are_no_larger_than_weights_and_a_little(
    epochs, predictive, dtype, width, digits, tmp_path
):
    options = {**SHORT, "max_epochs": epochs, "width": width, "tol": 0, "batch_size": 10}
    clf = SoftEquivariantClassifier(**options, predictive=predictive, dtype=dtype).fit(*digits)
    kept = sum(w.numel() * w.element_size() for w in clf.module_.parameters())
    if predictive == "laplace":
        kept += clf.posterior_.nbytes
    limit = 1.3 * kept + 20_000
    path = tmp_path / "model"
    for dump in (joblib.dump, skops_io.dump):  # as the user guide has it
        dump(clf, path)
        assert path.stat().st_size < limit
    assert len(pickle.dumps(clf)) < limit


def test_a_file_of_another_version_is_noticed(digits, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT).fit(*digits)
    data = pickle.dumps(clf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(data)
    monkeypatch.setattr(persistence, "__version__", "99.0")
    with pytest.warns(UserWarning, match=r"saved by sklearn_softeq \S+ and is loaded by 99\.0"):
        again = pickle.loads(data)
    np.testing.assert_array_equal(again.predict_proba(digits[0]), clf.predict_proba(digits[0]))


@pytest.mark.parametrize("route", [by_pickle, by_skops])
def test_a_parameter_of_a_newer_version_is_an_error(route, digits, tmp_path, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT).fit(*digits)
    settings, seeds = clf.net_.origin
    clf.net_.origin = {**settings, "zeal": 1, "awe": 2}, seeds
    monkeypatch.setattr(base, "__version__", "99.0")
    with (
        pytest.warns(UserWarning, match="saved by sklearn_softeq 99.0"),
        pytest.raises(ValueError, match=r"99\.0 with parameters that \S+ does not know: awe, zeal"),
    ):
        route(clf, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_model_of_a_gpu_is_loaded_without_one(digits):
    state = SoftEquivariantClassifier(**SHORT).fit(*digits).__getstate__()
    for device, message in (("auto", None), ("cuda", "has 0 CUDA devices")):
        again = SoftEquivariantClassifier.__new__(SoftEquivariantClassifier)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again.__setstate__({**state, "device": device, "device_": "cuda:0"})
        assert [message in str(warning.message) for warning in said] == [True] * bool(message)
        assert again.device_ == torch.device("cpu")
        assert again.predict(digits[0]).shape == (60,)


def test_no_class_of_torch_or_skorch_is_saved(digits):
    found = set()

    class Look(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(module.split(".")[0])
            return super().find_class(module, name)

    data = io.BytesIO(pickle.dumps(SoftEquivariantClassifier(**SHORT).fit(*digits)))
    Look(data).load()
    assert found <= {"sklearn_softeq", "numpy", "builtins", "copyreg"}


def test_inside_an_ensemble(digits):
    bag = BaggingClassifier(SoftEquivariantClassifier(**SHORT), 2, random_state=0).fit(*digits)
    again = pickle.loads(pickle.dumps(bag))
    np.testing.assert_array_equal(again.predict_proba(digits[0]), bag.predict_proba(digits[0]))
