"""The ONNX graph of a fitted estimator, computed by another runtime."""

import json
import logging
from datetime import date

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from sklearn_softeq import (
    SoftEquivariantClassifier,
    SoftEquivariantRegressor,
    __version__,
    onnx_export,
)
from sklearn_softeq.layers import PATHWAYS

onnxruntime = pytest.importorskip("onnxruntime")

SHORT = {"max_epochs": 2, "burn_in": 1, "evidence_every": 1, "width": 2, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def images_of(shape, n=60, dtype=np.float32):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = 50.0 + 7.0 * (rng.normal(size=(n, *shape)) + labels[:, None, None, None])
    return images.astype(dtype), labels


def run(path, images, name="probabilities"):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, found.name) == ("images", name)
    assert given.shape[1:] == list(images.shape[1:])
    (predictions,) = session.run(None, {"images": images})
    return predictions


def undecided(clf, images):
    """Rows of which two grids of a strided layer, of those to choose from, are nearly equal."""
    found = np.zeros(len(images), dtype=bool)
    network = clf.module_
    for name, inputs in network.layer_inputs(clf._new_images(images)).items():
        layer = network.layers[name]
        rows, columns = layer.stride
        chooses = any(path.group is not None for path in layer.pathways.values())
        if not chooses and clf.architecture != "resnet":  # whose identities do
            continue
        n, _, height, width = inputs.shape
        cells = inputs.double().square().sum(1)
        cells = cells.view(n, height // rows, rows, width // columns, columns)
        norms = cells.sum((1, 3)).flatten(1).sort(1).values
        if norms.shape[1] > 1:
            found |= (norms[:, -2] >= (1 - 1e-5) * norms[:, -1]).numpy()
    return found


def assert_computed_alike(clf, images, path):
    """Other runtimes find the same, for any number of rows."""
    assert clf.export_onnx(path) == path
    given, expected = images.astype(np.float32), clf.predict_proba(images)
    sure = ~undecided(clf, images)
    assert sure.mean() > 0.9
    for rows in (slice(None), slice(1), slice(3, 10)):
        found = run(path, given[rows])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-6)
        np.testing.assert_allclose(found[sure[rows]], expected[rows][sure[rows]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning")
def test_an_exported_classifier_predicts_the_same(tmp_path, capfd, caplog):
    # One channel of 6×5 pixels, padded to 8×8.
    X, y = images_of((1, 6, 5))
    clf = SoftEquivariantClassifier(**SHORT, start="joint", pathways=("conv", "sparse_fc"))
    clf.fit(X, y + 5)
    before = clf.predict_proba(X)
    assert_computed_alike(clf, X, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == [5, 6, 7]
    assert said["sklearn_softeq"] == __version__
    np.testing.assert_array_equal(clf.predict_proba(X), before)  # nothing has moved


SETTINGS = [
    *({"pathways": name} for name in sorted(PATHWAYS)),
    {"pathways": ("conv", "factored_fc")},
    {"pathways": ("p4_conv", "conv", "factored_fc", "sparse_fc")},
    {"pathways": ("p4m_conv", "pm_conv", "sparse_conv", "fc")},
    {"pathways": ("conv", "factored_fc"), "architecture": "resnet"},
    {"pathways": ("conv", "factored_fc"), "architecture": "paper", "activation": "relu"},
    {"pathways": ("conv", "factored_fc"), "standardize": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_so_for_every_network(tmp_path, options):
    X, y = images_of((2, 3, 5))
    X = X if options.get("standardize", True) else X / 50
    clf = SoftEquivariantClassifier(**SHORT, **options, start="joint").fit(X, y)
    assert_computed_alike(clf, X, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (1, 7, 2), (3, 8, 8)], ids=str)
def test_so_for_every_shape(tmp_path, shape):
    X, y = images_of(shape, dtype=np.float64)  # the graph has float32
    clf = SoftEquivariantClassifier(**SHORT, start="joint").fit(X, y)
    assert_computed_alike(clf, X, tmp_path / "model.onnx")


@pytest.mark.slow
def test_what_is_off_is_left_out(tmp_path):
    X, y = images_of((1, 4, 4))
    clf = SoftEquivariantClassifier(**SHORT, pathways=("conv", "fc"), start="joint").fit(X, y)
    assert_computed_alike(clf, X, tmp_path / "whole.onnx")
    for block in clf.module_.layers.values():
        block.remove("fc")
    assert_computed_alike(clf, X, tmp_path / "less.onnx")
    simple = clf.simplify(X, threshold=0.0)
    assert_computed_alike(simple, X, tmp_path / "simple.onnx")
    sizes = {
        name: (tmp_path / f"{name}.onnx").stat().st_size for name in ("whole", "less", "simple")
    }
    assert sizes["less"] < sizes["whole"]
    assert abs(sizes["simple"] - sizes["less"]) < 1000


@pytest.mark.parametrize("n_outputs", [None, 1, 3])
def test_an_exported_regressor_predicts_the_same(tmp_path, n_outputs):
    X, y = images_of((2, 3, 5))
    y = 100.0 + 5.0 * X.mean((1, 2, 3)) + y
    if n_outputs is not None:
        y = np.stack([y * (k + 1) for k in range(n_outputs)], 1)
    settings = {**SHORT, "pathways": "fc", "predictive": "laplace"}
    reg = SoftEquivariantRegressor(**settings).fit(X, y)
    path = tmp_path / "model.onnx"
    assert reg.export_onnx(path) == path
    expected = reg.predict(X).reshape(60, -1)
    for rows in (slice(None), slice(1), slice(3, 10)):
        found = run(path, X[rows], "prediction")
        assert found.dtype == np.float32
        rounding = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected[rows], rtol=1e-5, atol=rounding)
    said = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    np.testing.assert_allclose(json.loads(said["noise_std"]), reg.noise_std_)


DATES = np.array(["2024-02-29", "2025-01-01", "2026-12-24"], dtype="datetime64[ns]")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (DATES, ["2024-02-29T00:00:00.000000000", "2025-01-01T00:00:00.000000000"]),
        (DATES.astype("datetime64[D]"), ["2024-02-29", "2025-01-01"]),
        (np.array([date(2024, 2, 29), date(2025, 1, 1)]), ["2024-02-29", "2025-01-01"]),
        (np.array([1.5, 2.0]), [1.5, 2.0]),
        (np.array([True, False]), [True, False]),
        (np.array(["a", "é"], dtype=object), ["a", "é"]),
    ],
    ids=str,
)
def test_labels_of_every_kind_can_be_written(labels, said):
    assert json.loads(onnx_export.labels_as_json(labels))[:2] == said


def test_a_classifier_of_dates_is_exported(tmp_path):
    X, y = images_of((1, 2, 2))
    clf = SoftEquivariantClassifier(**SHORT, pathways="fc").fit(X, DATES[y].astype("datetime64[D]"))
    clf.export_onnx(tmp_path / "model.onnx")
    meta = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta()
    found = json.loads(meta.custom_metadata_map["classes"])
    assert found == ["2024-02-29", "2025-01-01", "2026-12-24"]


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    X, y = images_of((1, 2, 2))
    clf = SoftEquivariantClassifier(**SHORT, predictive="laplace")
    with pytest.raises(NotFittedError):
        clf.export_onnx(tmp_path / "model.onnx")
    clf.fit(X, y)
    with pytest.raises(ValueError, match="predictive='laplace'.*set_params"):
        clf.export_onnx(tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(ImportError, match="and onnx cannot be found.*sklearn-softeq.onnx"):
        clf.set_params(predictive="map").export_onnx(tmp_path / "model.onnx")
    reg = SoftEquivariantRegressor(**SHORT, pathways="fc")
    with pytest.raises(NotFittedError):
        reg.export_onnx(tmp_path / "model.onnx")
    with pytest.raises(ImportError, match="and onnx cannot be found.*sklearn-softeq.onnx"):
        reg.fit(X, y).export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
