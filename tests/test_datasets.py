"""Properties of the tasks: where pixels lie, what labels say, what can be undone."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits

from sklearn_softeq import datasets
from sklearn_softeq.datasets import (
    load_digit_tasks,
    make_quadrants,
    make_rotations,
    make_shifts,
)

MAKERS = (make_quadrants, make_shifts, make_rotations)
each_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def positive_images(n=40, channels=2, height=3, width=5, dtype=np.float32):
    """Images without a zero, so that a zero in a result is background."""
    rng = np.random.RandomState(1)
    return rng.randint(1, 100, size=(n, channels, height, width)).astype(dtype)


def string_labels(n=40):
    return np.array(["cat", "ant", "bee"])[np.arange(n) % 3]


def test_quadrants_hold_the_image_and_nothing_else():
    images, labels = positive_images(n=200), string_labels(200)
    X, y = make_quadrants(images, labels, label="class_and_position", random_state=0)
    assert X.shape == (200, 2, 6, 10)
    for canvas, image, quadrant in zip(X, images, y % 4, strict=True):
        row, column = 3 * (quadrant // 2), 5 * (quadrant % 2)
        assert_array_equal(canvas[:, row : row + 3, column : column + 5], image)
        assert np.count_nonzero(canvas) == image.size
    assert_array_equal(np.array(["ant", "bee", "cat"])[y // 4], labels)
    assert set(y) == set(range(12))


def test_label_does_not_move_the_images():
    images, labels = positive_images(height=4, width=4), string_labels()
    for make, both in (
        (make_quadrants, "class_and_position"),
        (make_rotations, "class_and_rotation"),
    ):
        X, y = make(images, labels, label="class", random_state=3)
        assert_array_equal(X, make(images, labels, label=both, random_state=3)[0])
        assert_array_equal(y, labels)


@pytest.mark.parametrize("canvas", [None, (3, 5), (4, 9)])
def test_shifts_place_whole_images_anywhere(canvas):
    images, labels = positive_images(n=200), string_labels(200)
    X, y = make_shifts(images, labels, canvas=canvas, random_state=0)
    height, width = canvas or (6, 10)
    assert X.shape == (200, 2, height, width)
    corners = set()
    for placed, image in zip(X, images, strict=True):
        row, column = np.argwhere(placed[0]).min(axis=0)
        assert_array_equal(placed[:, row : row + 3, column : column + 5], image)
        assert np.count_nonzero(placed) == image.size
        corners.add((row, column))
    assert corners == set(np.ndindex(height - 2, width - 4))
    assert_array_equal(y, labels)


def test_quarter_turns_can_be_undone():
    images, labels = positive_images(height=4, width=4), string_labels()
    X, y = make_rotations(images, labels, label="class_and_rotation", random_state=0)
    undone = [np.rot90(x, -turns, axes=(-2, -1)) for x, turns in zip(X, y % 4, strict=True)]
    assert_array_equal(undone, images)
    assert_array_equal(np.array(["ant", "bee", "cat"])[y // 4], labels)
    assert set(y % 4) == {0, 1, 2, 3}


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_free_rotation_agrees_with_quarter_turns(turns):
    images = positive_images(n=4, height=4, width=4)
    rotated = datasets._rotate(images, np.full(4, 90.0 * turns))
    assert_allclose(rotated, np.rot90(images, turns, axes=(-2, -1)), rtol=1e-6)


def rotated_slowly(image, degrees):
    """Bilinear interpolation at the place each pixel comes from, one pixel after the other."""
    height, width = image.shape
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    result = np.zeros(image.shape)
    for i, j in np.ndindex(height, width):
        x, y = j - (width - 1) / 2, (height - 1) / 2 - i  # y upwards
        column = cosine * x + sine * y + (width - 1) / 2
        row = (height - 1) / 2 - (cosine * y - sine * x)
        for k, l in np.ndindex(height, width):
            weight = max(0.0, 1 - abs(row - k)) * max(0.0, 1 - abs(column - l))
            result[i, j] += weight * image[k, l]
    return result


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 6), (1, 7)])
def test_free_rotation_agrees_with_a_slow_loop(height, width, monkeypatch):
    monkeypatch.setattr(datasets, "_ROTATED_AT_ONCE", 3)
    angles = np.array([0.0, 17.0, 45.0, 90.0, 133.3, 271.0, 359.0])
    images = positive_images(n=len(angles), channels=2, height=height, width=width, dtype=float)
    rotated = datasets._rotate(images, angles)
    for found, image, angle in zip(rotated, images, angles, strict=True):
        expected = [rotated_slowly(channel, angle) for channel in image]
        assert_allclose(found, expected, atol=1e-10)


def test_free_rotation_keeps_the_middle_of_a_disc():
    offset = np.arange(17) - 8
    disc = np.maximum(0, 6 - np.hypot(offset[:, None], offset))[None].repeat(20, axis=0)
    X, _ = make_rotations(disc, np.zeros(20), angles="free", random_state=0)
    assert X.shape == (20, 1, 17, 17)
    assert_allclose(X[:, 0], disc, atol=0.35)  # a cone of slope 1, interpolated between pixels
    assert not np.array_equal(X[0], X[1])


def test_free_rotation_rounds_integers():
    images = np.full((10, 9, 9), 201, dtype=np.uint8)
    X, _ = make_rotations(images, np.arange(10), angles="free", random_state=0)
    assert (X[..., 2:7, 2:7] == 201).all()


@each_maker
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_dtype_and_inputs_are_kept(make, dtype):
    images, labels = positive_images(height=4, width=4, dtype=dtype), string_labels()
    before = images.copy()
    X, y = make(images, labels, random_state=0)
    assert X.dtype == dtype
    assert_array_equal(images, before)
    assert_array_equal(y, labels)


@each_maker
def test_reproducible(make):
    images, labels = positive_images(height=4, width=4), string_labels()
    first, again, other = (make(images, labels, random_state=seed)[0] for seed in (5, 5, 6))
    assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@each_maker
def test_images_without_channels(make):
    images, labels = positive_images(channels=1, height=4, width=4), string_labels()
    expected, _ = make(images, labels, random_state=0)
    assert_array_equal(make(images[:, 0].tolist(), list(labels), random_state=0)[0], expected)


@each_maker
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.ones((4, 9)), np.ones(4), r"\(n, C, H, W\); found shape \(4, 9\)"),
        (np.ones((0, 3, 3)), np.ones(0), "non-empty"),
        (np.full((1, 3, 3), "a"), np.ones(1), "real numbers"),
        (np.ones((4, 3, 3)), np.ones(3), r"shape \(4,\); found shape \(3,\)"),
        (np.ones((4, 3, 3)), np.ones((4, 1)), r"found shape \(4, 1\)"),
    ],
)
def test_wrong_shapes(make, images, labels, message):
    with pytest.raises(ValueError, match=message):
        make(images, labels)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_quadrants, {"label": "position"}, "'class_and_position'; found 'position'"),
        (make_quadrants, {"label": None}, "found None"),
        (make_rotations, {"label": "turn"}, "'class_and_rotation'; found 'turn'"),
        (make_rotations, {"angles": 90}, "'quarter_turns', 'free'; found 90"),
        (make_rotations, {"label": "class_and_rotation", "angles": "free"}, "finite number"),
        (make_rotations, {}, "square images; found 3 rows and 5 columns"),
        (make_shifts, {"canvas": 8}, "two integers.*found 8"),
        (make_shifts, {"canvas": (8.0, 8)}, "two integers"),
        (make_shifts, {"canvas": (8, 4)}, "3×5 pixels; found 8×4"),
    ],
)
def test_wrong_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(positive_images(), string_labels(), **options)


TRUTHS = {
    "digit": ("translation", 16, 10),
    "quadrant": ("broken translation", 16, 40),
    "shifts": ("translation", 16, 10),
    "rotated": ("quarter turns", 8, 10),
    "rotation": ("broken quarter turns", 8, 40),
    "plain": ("none", 8, 10),
}


@pytest.mark.parametrize("task", TRUTHS)
def test_digit_tasks(task):
    data = load_digit_tasks(task=task, n_train=1000)
    symmetry, side, n_classes = TRUTHS[task]
    assert data.symmetry == symmetry
    assert data.X_train.shape == (1000, 1, side, side)
    assert data.X_test.shape == (797, 1, side, side)
    assert data.X_train.dtype == np.float32
    assert data.X_train.min() == 0.0
    assert data.X_train.max() == 1.0
    assert_array_equal(np.unique(data.y_train), np.arange(n_classes))


def test_digit_tasks_hold_each_digit_once():
    data = load_digit_tasks(task="plain", n_train=1000, random_state=4)
    X = np.concatenate([data.X_train, data.X_test])[:, 0] * 16
    rows = [tuple(x.ravel()) for x in load_digits().images]
    assert sorted(tuple(x.ravel()) for x in X) == sorted(rows)
    assert not np.array_equal(X, load_digits().images)


def test_tasks_share_the_split():
    tasks = [load_digit_tasks(task=task, random_state=7) for task in ("digit", "quadrant", "plain")]
    for data in tasks:
        assert_array_equal(data.y_test // (4 if data.y_test.max() > 9 else 1), tasks[0].y_test)


@pytest.mark.parametrize("n_train", [0, 1797, 10.5])
def test_wrong_n_train(n_train):
    with pytest.raises(ValueError, match="from 1 to 1796"):
        load_digit_tasks(n_train=n_train)


def test_unknown_task():
    with pytest.raises(ValueError, match="'plain'; found 'digits'"):
        load_digit_tasks(task="digits")
