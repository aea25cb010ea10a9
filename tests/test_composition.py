"""What scikit-learn composes or draws takes images as arrays of four axes."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.ensemble import (
    AdaBoostClassifier,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    DetCurveDisplay,
    PrecisionRecallDisplay,
    PredictionErrorDisplay,
    RocCurveDisplay,
)

from sklearn_softeq import SoftEquivariantClassifier, SoftEquivariantRegressor

SHORT = {"width": 1, "max_epochs": 2, "start": "joint", "random_state": 0}

CLASSIFIER = SoftEquivariantClassifier(**SHORT)
REGRESSOR = SoftEquivariantRegressor(**SHORT)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(40, 1, 4, 4))


@pytest.fixture
def labels(images):
    return np.where(images.mean((1, 2, 3)) > 0, "bright", "dark")


def name_of(value):
    return type(value).__name__


@pytest.mark.parametrize(
    "model",
    [
        VotingClassifier([("one", CLASSIFIER), ("other", CLASSIFIER)], voting="soft"),
        StackingClassifier([("one", CLASSIFIER), ("other", CLASSIFIER)], cv=2),
        CalibratedClassifierCV(CLASSIFIER, cv=2),
        AdaBoostClassifier(CLASSIFIER, n_estimators=2),
    ],
    ids=name_of,
)
def test_classifiers_within_others(model, images, labels):
    model = clone(model).fit(images, labels)
    probabilities = model.predict_proba(images)
    assert probabilities.shape == (40, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert model.classes_.tolist() == ["bright", "dark"]
    np.testing.assert_array_equal(
        model.predict(images), model.classes_[probabilities.argmax(axis=1)]
    )


@pytest.mark.parametrize(
    "model",
    [
        VotingRegressor([("one", REGRESSOR), ("other", REGRESSOR)]),
        StackingRegressor([("one", REGRESSOR), ("other", REGRESSOR)], cv=2),
    ],
    ids=name_of,
)
def test_regressors_within_others(model, images):
    found = clone(model).fit(images, images.mean((1, 2, 3))).predict(images)
    assert found.shape == (40,)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "display",
    [
        RocCurveDisplay,
        PrecisionRecallDisplay,
        DetCurveDisplay,
        CalibrationDisplay,
        ConfusionMatrixDisplay,
        PredictionErrorDisplay,
    ],
    ids=lambda display: display.__name__,
)
def test_displays_of_scikit_learn(display, images, labels):
    plt = pytest.importorskip("matplotlib.pyplot")
    if display is PredictionErrorDisplay:
        model, y = REGRESSOR, images.mean((1, 2, 3))
    else:
        model, y = CLASSIFIER, labels
    try:
        drawn = display.from_estimator(clone(model).fit(images, y), images, y)
        assert drawn.figure_.axes[0].has_data()
        drawn.figure_.canvas.draw()
    finally:
        plt.close("all")
