"""Warnings point to the line of the user's that led to them."""

import copy
import inspect
import pickle
import warnings

import joblib
import pytest
import skops.io
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_softeq import SoftEquivariantClassifier, checkpoint, persistence
from sklearn_softeq.checkpoint import FILES
from sklearn_softeq.networks import SoftEquivariantNetwork
from sklearn_softeq.notices import warn

SHORT = {"max_epochs": 2, "width": 1, "burn_in": 1, "evidence_every": 1, "random_state": 0}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(n_class=2, return_X_y=True)
    return X[:40], y[:40]


@pytest.fixture(scope="module")
def fitted(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SoftEquivariantClassifier(**SHORT).fit(*digits)


def places(call, said):
    """Where the warnings of a call that say so point to, and where they should."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    found = {(w.filename, w.lineno) for w in record if said in str(w.message)}
    return found, {(__file__, call.__code__.co_firstlineno)}


def test_what_is_called_by_hand():
    def deep():
        warn("deep", ConvergenceWarning)

    with pytest.warns(ConvergenceWarning, match="deep") as record:
        deep()
    line = inspect.getsourcelines(deep)[1] + 1
    assert [(w.filename, w.lineno) for w in record] == [(__file__, line)]


def test_without_a_caller_outside_it_is_still_a_warning():
    with pytest.warns(UserWarning, match="alone"):
        eval("warn('alone')", {"warn": warn, "__name__": "sklearn_softeq.made_up"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(digits):
    clf = SoftEquivariantClassifier(**SHORT, device="cuda")
    found, expected = places(lambda: clf.fit(*digits), "device='cuda'")
    assert found == expected


@pytest.mark.parametrize("search", [False, True])
def test_a_fit_that_has_not_settled(search, digits):
    model = make_pipeline(FunctionTransformer(), SoftEquivariantClassifier(**SHORT))
    model = GridSearchCV(model, {}, cv=2) if search else model
    found, expected = places(lambda: model.fit(*digits), "had not settled")
    assert found == expected


def test_a_cross_validation(digits):
    clf = SoftEquivariantClassifier(**SHORT)
    found, expected = places(lambda: cross_val_score(clf, *digits, cv=2), "had not settled")
    assert found == expected


def fail(*args):
    raise OSError("full")


@pytest.mark.parametrize("said", ["left aside", "could not be written", "begun with 1 threads"])
def test_a_fit_on_disk(said, digits, tmp_path, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    if said == "left aside":
        (tmp_path / FILES[0]).write_bytes(b"")
    elif said == "could not be written":
        write = checkpoint.write
        monkeypatch.setattr(
            checkpoint, "write", lambda p, t: write(p, t) if t["number"] == 0 else fail(p, t)
        )
    else:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Run, "keep", fail)
            with pytest.raises(OSError, match="full"):
                clf.fit(*digits)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    found, expected = places(lambda: clf.fit(*digits), said)
    assert found == expected


def test_a_prediction_by_fewer_rows(fitted, digits, monkeypatch):
    forward = SoftEquivariantNetwork.forward

    def crowded(network, images):
        if len(images) > 16:
            raise MemoryError
        return forward(network, images)

    monkeypatch.setattr(SoftEquivariantNetwork, "forward", crowded)
    found, expected = places(lambda: fitted.predict_proba(digits[0]), "not enough memory")
    assert found == expected


ROUTES = {
    "pickle": (pickle.dump, pickle.load),
    "joblib": (joblib.dump, joblib.load),
    "skops": (skops.io.dump, lambda file: skops.io.load(file, trusted=TRUSTED)),
}
TRUSTED = ["sklearn_softeq.estimators.SoftEquivariantClassifier"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_file_of_another_version(route, fitted, tmp_path, monkeypatch):
    write, load = ROUTES[route]
    with open(tmp_path / "model", "wb") as file:
        write(fitted, file)
    monkeypatch.setattr(persistence, "__version__", "99.0")
    with open(tmp_path / "model", "rb") as file:
        found, expected = places(lambda: load(file), "loaded by 99.0")
    if route == "skops":
        expected = {(__file__, ROUTES["skops"][1].__code__.co_firstlineno)}
    assert found == expected


def test_a_copy_of_another_version(fitted, monkeypatch):
    monkeypatch.setattr(persistence, "__version__", "99.0")
    found, expected = places(lambda: copy.deepcopy(fitted), "loaded by 99.0")
    assert found == expected
