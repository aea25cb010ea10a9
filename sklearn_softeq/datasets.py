"""Tasks whose true symmetry is a parameter, made from any set of images.

The ``make_*`` functions place or turn each image at random. With ``label="class"`` the label
ignores what was done, so the task has the symmetry; with the position or the rotation in the
label the same images break it.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.utils import Bunch, check_random_state

__all__ = ["load_digit_tasks", "make_quadrants", "make_rotations", "make_shifts"]


def make_quadrants(images, labels, *, label="class", random_state=None):
    """Place each image in a random quadrant of a canvas of twice its height and width.

    Quadrants are numbered row by row: 0 upper left, 1 upper right, 2 lower left, 3 lower right.

    Parameters
    ----------
    images : array-like of shape (n, H, W) or (n, C, H, W)
        Images, in any units; what they leave of the canvas is 0.
    labels : array-like of shape (n,)
        Classes, as integers or strings.
    label : {"class", "class_and_position"}, default="class"
        With "class" the labels are returned as they came: translations do not change them. With
        "class_and_position" the label is ``4 * code + quadrant``, where ``code`` is the place of
        the class among the K sorted ones: 4 K labels, and the symmetry is broken.
    random_state : int, RandomState instance or None, default=None
        Draws the quadrants.

    Returns
    -------
    X : ndarray of shape (n, C, 2 * H, 2 * W)
        Canvases, with the dtype of the images.
    y : ndarray of shape (n,)
        Labels.

    Raises
    ------
    ValueError
        If a shape or an option is not one of those above.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_softeq.datasets import make_quadrants
    >>> X, y = make_quadrants(
    ...     np.ones((3, 2, 2)), ["a", "b", "a"], label="class_and_position", random_state=0
    ... )
    >>> X.shape
    (3, 1, 4, 4)
    >>> y
    array([0, 7, 1])
    """
    images, labels = _check_images(images, labels)
    _check_option("label", label, ("class", "class_and_position"))
    height, width = images.shape[-2:]
    quadrants = check_random_state(random_state).randint(4, size=len(images))  # (n,)
    rows, columns = height * (quadrants // 2), width * (quadrants % 2)
    X = _place(images, rows, columns, (2 * height, 2 * width))
    return X, labels if label == "class" else _with_change(labels, quadrants)


def make_shifts(images, labels, *, canvas=None, random_state=None):
    """Place each image anywhere on a larger canvas, all places alike.

    Parameters
    ----------
    images : array-like of shape (n, H, W) or (n, C, H, W)
        Images, in any units; what they leave of the canvas is 0.
    labels : array-like of shape (n,)
        Classes, as integers or strings.
    canvas : tuple of two ints or None, default=None
        Height and width of the canvas in pixels; None for twice those of the images.
    random_state : int, RandomState instance or None, default=None
        Draws the places.

    Returns
    -------
    X : ndarray of shape (n, C, canvas height, canvas width)
        Canvases, with the dtype of the images.
    y : ndarray of shape (n,)
        The labels as they came: translations do not change them.

    Raises
    ------
    ValueError
        If a shape is not one of those above, or the images do not fit on the canvas.
    """
    images, labels = _check_images(images, labels)
    height, width = images.shape[-2:]
    canvas = (2 * height, 2 * width) if canvas is None else _check_canvas(canvas, (height, width))
    random_state = check_random_state(random_state)
    rows = random_state.randint(canvas[0] - height + 1, size=len(images))  # (n,)
    columns = random_state.randint(canvas[1] - width + 1, size=len(images))  # (n,)
    return _place(images, rows, columns, canvas), labels


def make_rotations(images, labels, *, label="class", angles="quarter_turns", random_state=None):
    """Rotate each image about its centre, counter-clockwise, by a random angle.

    Parameters
    ----------
    images : array-like of shape (n, H, W) or (n, C, H, W)
        Images, in any units; square ones for quarter turns.
    labels : array-like of shape (n,)
        Classes, as integers or strings.
    label : {"class", "class_and_rotation"}, default="class"
        With "class" the labels are returned as they came: rotations do not change them. With
        "class_and_rotation" the label is ``4 * code + turns``, where ``code`` is the place of the
        class among the K sorted ones and ``turns`` the number of quarter turns: 4 K labels, and
        the symmetry is broken.
    angles : {"quarter_turns", "free"}, default="quarter_turns"
        Multiples of 90°, which only move pixels; or any angle, with bilinear interpolation, 0
        where the image leaves a corner, and integer images rounded back to their dtype.
    random_state : int, RandomState instance or None, default=None
        Draws the angles.

    Returns
    -------
    X : ndarray of shape (n, C, H, W)
        Rotated images, with the dtype of the images.
    y : ndarray of shape (n,)
        Labels.

    Raises
    ------
    ValueError
        If a shape or an option is not one of those above, quarter turns are asked of images that
        are not square, or the label is to hold an angle that is free.
    """
    images, labels = _check_images(images, labels)
    _check_option("label", label, ("class", "class_and_rotation"))
    _check_option("angles", angles, ("quarter_turns", "free"))
    random_state = check_random_state(random_state)
    if angles == "free":
        if label != "class":
            raise ValueError(
                f"label={label!r} needs a finite number of rotations, but angles='free' draws any "
                "angle; use angles='quarter_turns', or label='class'."
            )
        return _rotate(images, random_state.uniform(0.0, 360.0, size=len(images))), labels
    turns = random_state.randint(4, size=len(images))  # (n,)
    X = _turn(images, turns)
    return X, labels if label == "class" else _with_change(labels, turns)


# Images in one pass of a free rotation; bounds its memory.
_ROTATED_AT_ONCE = 1024

# What load_digit_tasks makes of the digits, and what is then true of the task.
_DIGIT_TASKS: dict[str, tuple[Callable | None, dict[str, str], str]] = {
    "digit": (make_quadrants, {"label": "class"}, "translation"),
    "quadrant": (make_quadrants, {"label": "class_and_position"}, "broken translation"),
    "shifts": (make_shifts, {}, "translation"),
    "rotated": (make_rotations, {"label": "class"}, "quarter turns"),
    "rotation": (make_rotations, {"label": "class_and_rotation"}, "broken quarter turns"),
    "plain": (None, {}, "none"),
}


def load_digit_tasks(*, task="digit", n_train=1200, random_state=0):
    """Load a task of known symmetry, made from the digits that scikit-learn ships.

    The 1797 images of 8×8 pixels are scaled to 0 … 1, shuffled and split; then each half is
    placed or turned by draws of its own.

    Parameters
    ----------
    task : {"digit", "quadrant", "shifts", "rotated", "rotation", "plain"}, default="digit"
        "digit" and "quadrant" put the digits in a quadrant of a canvas of 16×16, with the digit
        as the label (10 classes) or digit and quadrant (40). "shifts" puts them anywhere on it.
        "rotated" and "rotation" turn them by a multiple of 90°, with the digit as the label or
        digit and rotation (40 classes). "plain" leaves them upright and in their place.
    n_train : int, default=1200
        Number of training images, from 1 to 1796; the rest is for testing.
    random_state : int, RandomState instance or None, default=0
        Draws the split, the places and the rotations.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        X_train, X_test : ndarrays of shape (n, 1, H, W) and dtype float32
            Images.
        y_train, y_test : ndarrays of shape (n,)
            Labels, integers.
        symmetry : str
            What is true of the task: "translation", "broken translation", "quarter turns",
            "broken quarter turns" or "none".

    Raises
    ------
    ValueError
        If the task is not known or `n_train` leaves no image on one side.

    Examples
    --------
    >>> from sklearn_softeq.datasets import load_digit_tasks
    >>> data = load_digit_tasks(task="quadrant")
    >>> data.X_train.shape, data.X_test.shape
    ((1200, 1, 16, 16), (597, 1, 16, 16))
    >>> data.symmetry
    'broken translation'
    """
    _check_option("task", task, tuple(_DIGIT_TASKS))
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]  # (1797, 1, 8, 8)
    n_train = _check_n_train(n_train, len(images))
    random_state = check_random_state(random_state)
    order = random_state.permutation(len(images))
    make, options, symmetry = _DIGIT_TASKS[task]

    def part(rows):
        X, y = images[rows], digits.target[rows]
        return (X, y) if make is None else make(X, y, random_state=random_state, **options)

    X_train, y_train = part(order[:n_train])
    X_test, y_test = part(order[n_train:])
    return Bunch(X_train=X_train, y_train=y_train, X_test=X_test, y_test=y_test, symmetry=symmetry)


def _place(images, rows, columns, canvas):
    """Copy each image to a canvas of zeros, its upper left corner at (row, column)."""
    n, channels, height, width = images.shape
    placed = np.zeros((n, channels, *canvas), dtype=images.dtype)
    for target, image, i, j in zip(placed, images, rows, columns, strict=True):
        target[:, i : i + height, j : j + width] = image
    return placed


def _turn(images, turns):
    """Rotate each square image by its number of quarter turns."""
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(
            f"Quarter turns need square images; found {height} rows and {width} columns. Pad the "
            "images to a square, or use angles='free'."
        )
    turned = images.copy()
    for k in (1, 2, 3):
        turned[turns == k] = np.rot90(images[turns == k], k, axes=(-2, -1))
    return turned


def _rotate(images, degrees):
    """Rotate each image counter-clockwise by its angle, on the grid that it has."""
    height, width = images.shape[-2:]
    angles = np.deg2rad(degrees)
    cosine, sine, zero = np.cos(angles), np.sin(angles), np.zeros(len(angles))
    # Where each output pixel comes from, rows counted downwards; torch's coordinates run from −1
    # to 1 along either side, whatever its length.
    across = np.stack([cosine, -sine * height / width, zero], axis=1)  # (n, 3)
    down = np.stack([sine * width / height, cosine, zero], axis=1)  # (n, 3)
    sources = np.stack([across, down], axis=1)  # (n, 2, 3)
    # Interpolated in float64 and rounded, since a cast would cut integers off.
    rotated = np.empty(images.shape, dtype=np.float64)
    for start in range(0, len(images), _ROTATED_AT_ONCE):
        rows = slice(start, start + _ROTATED_AT_ONCE)
        pixels = torch.from_numpy(images[rows].astype(np.float64))
        grid = torch.nn.functional.affine_grid(
            torch.from_numpy(sources[rows]), list(pixels.shape), align_corners=False
        )
        rotated[rows] = torch.nn.functional.grid_sample(pixels, grid, align_corners=False).numpy()
    if not np.issubdtype(images.dtype, np.floating):
        rotated = np.rint(rotated)
    return rotated.astype(images.dtype)


def _with_change(labels, change):
    """Codes 4 * class + change, with 0 <= change < 4."""
    return 4 * np.unique(labels, return_inverse=True)[1] + change


def _check_images(images, labels):
    """The images as (n, C, H, W) and the labels as (n,)."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim not in (3, 4) or 0 in images.shape or images.dtype.kind not in "buif":
        raise ValueError(
            "images must be a non-empty array of real numbers, of shape (n, H, W) or "
            f"(n, C, H, W); found shape {images.shape} and dtype {images.dtype}. Flat rows can be "
            "reshaped with images.reshape(-1, H, W)."
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must hold one label an image, shape ({len(images)},); found shape "
            f"{labels.shape}. Pass the labels of the same images, one-dimensional."
        )
    return images if images.ndim == 4 else images[:, None], labels


def _check_option(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {options}; found {value!r}.")


def _check_canvas(canvas, image):
    """The canvas as two ints, at least the height and width of the images."""
    sides = tuple(canvas) if isinstance(canvas, tuple | list) else (canvas,)
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) for side in sides):
        raise ValueError(
            f"canvas must be two integers, its height and width in pixels; found {canvas!r}. "
            "Leave it at None for twice the height and width of the images."
        )
    if sides[0] < image[0] or sides[1] < image[1]:
        raise ValueError(
            f"canvas must be at least as large as the images, {image[0]}×{image[1]} pixels; found "
            f"{sides[0]}×{sides[1]}. Enlarge the canvas or crop the images."
        )
    return int(sides[0]), int(sides[1])


def _check_n_train(n_train, n):
    if not isinstance(n_train, int | np.integer) or not 1 <= n_train < n:
        raise ValueError(
            f"n_train must be an integer from 1 to {n - 1}, so that training and test set hold an "
            f"image each; found {n_train!r}."
        )
    return int(n_train)
