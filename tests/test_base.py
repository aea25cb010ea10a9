"""What the estimators have in common: scales of the images, and how predictions are averaged."""

import numpy as np
import pytest

from sklearn_softeq import SoftEquivariantClassifier

TINY = {"pathways": "conv", "width": 1, "burn_in": 1, "max_epochs": 2, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def coloured():
    """Images of two channels, each on a scale of its own, and their labels."""
    rng = np.random.default_rng(0)
    scale, mean = np.array([0.5, 3.0]), np.array([-1.0, 2.0])
    labels = np.arange(24) % 3
    images = rng.normal(size=(24, 2, 4, 4)) + 0.5 * labels[:, None, None, None]
    return scale[:, None, None] * images + mean[:, None, None], labels


def test_channels_are_standardised_by_the_weights_of_the_rows(coloured):
    images, labels = coloured
    weights = np.arange(24) % 5 + 0.5  # far from alike
    weights[:4] = 0
    clf = SoftEquivariantClassifier(**TINY).fit(images, labels, sample_weight=weights)
    mean = np.average(images.mean((2, 3)), axis=0, weights=weights)
    squares = np.square(images - mean[:, None, None]).mean((2, 3))
    np.testing.assert_allclose(clf.channel_mean_, mean)
    np.testing.assert_allclose(clf.channel_scale_, np.sqrt(np.average(squares, 0, weights)))
    seen = (images - mean[:, None, None]) / clf.channel_scale_[:, None, None]
    np.testing.assert_allclose(clf._new_images(images), seen)


def test_images_stay_as_they_are_unless_they_are_standardised(coloured):
    images, labels = coloured
    clf = SoftEquivariantClassifier(**TINY, standardize=False).fit(images, labels)
    np.testing.assert_array_equal(clf.channel_mean_, [0, 0])
    np.testing.assert_array_equal(clf.channel_scale_, [1, 1])
    np.testing.assert_array_equal(clf._new_images(images), images)


@pytest.fixture(scope="module")
def averaged(coloured):
    return SoftEquivariantClassifier(**TINY, predictive="laplace").fit(*coloured)


@pytest.fixture
def proba(averaged, coloured):
    """Probabilities of one fitted model, with other parameters of its predictions."""
    plain = {"predictive": "laplace", "predictive_samples": None, "predictive_temperature": 1.0}
    return lambda **changed: averaged.set_params(**plain | changed).predict_proba(coloured[0])


def test_what_is_hotter_is_less_sure(proba):
    plain = proba(predictive="map")
    np.testing.assert_allclose(proba(predictive_temperature=1e-9), plain, atol=1e-6)
    shaken = [np.abs(proba(predictive_temperature=t) - plain).mean() for t in (0.01, 1, 100)]
    np.testing.assert_array_less(2 * np.array(shaken[:2]), shaken[1:])
    np.testing.assert_allclose(proba(predictive_temperature=1e9), 1 / 3, atol=1e-2)


def test_many_samples_come_to_one_answer_and_few_do_not(proba):
    one, few, many, more = (proba(predictive_samples=n) for n in (1, 16, 2000, 4000))
    far = [np.abs(found - more).mean() for found in (one, few, many)]
    np.testing.assert_array_less(2 * np.array(far[1:]), far[:-1])
    closed, many = (proba(predictive_samples=n, predictive_temperature=0.01) for n in (None, 2000))
    np.testing.assert_allclose(many, closed, atol=0.01)
