"""From what users pass to what the network takes, and every error on the way.

Rows are flattened before scikit-learn sees them, so that its own checks and messages hold for
images too; the shape of the images is kept beside them.
"""

import hashlib
from collections.abc import Collection, Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import column_or_1d
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, validate_data

from .devices import own_device
from .notices import warn

__all__ = [
    "check_classes",
    "check_images",
    "check_incremental_class_weight",
    "check_names",
    "check_same_outputs",
    "check_same_shape",
    "check_weights",
    "distinct_rows",
    "distinct_targets",
    "encode",
    "mean_and_scale",
    "present_device",
    "resolve_device",
    "resolve_image_shape",
    "warn_of_shares",
]

ImageShape = tuple[int, int, int]

#: Sum of the weights, for each row of positive weight, below which they can hardly be counts.
FEW = 0.1


def check_images(
    estimator: BaseEstimator,
    X: Any,
    y: Any = "no_validation",
    *,
    reset: bool,
    numbers: bool = False,
) -> tuple[np.ndarray, Any, ImageShape | None]:
    """Rows as a float array of shape (n, C·H·W), targets, and the image shape if X had one.

    Parameters
    ----------
    estimator : BaseEstimator
        Its ``n_features_in_`` is set (``reset=True``) or held against the input.
    X : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
        NumPy array, list, DataFrame or torch tensor on any device. float64 and float32 stay;
        arrays, tensors and lists of images of uint8, bool and float16 become float32. All else,
        as other integers, becomes float64, as in scikit-learn, whatever it comes in.
    y : array-like of shape (n,), (n, K) or "no_validation"
        Class labels, or numbers; None is an error, in scikit-learn's words.
    reset : bool
        True in fit.
    numbers : bool, default=False
        Whether y has numbers, of which each row may have several, and not class labels. They become
        float64.

    Raises
    ------
    ValueError, TypeError
        scikit-learn's own, for NaN, infinity, complex, sparse, object or empty data, for a
        wrong number of features and for a y that is missing, or neither a vector of class labels
        nor finite numbers, as it should be. Ours for arrays of more than four dimensions, for
        one image by itself and for arrays of images.
    """
    X, shape = _flattened(X)
    if not reset:
        _refuse_one_image(X, estimator)
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu().numpy()
    dtypes = [np.float64, np.float32]
    kind = {"multi_output": True, "y_numeric": True} if numbers else {}
    checked = validate_data(estimator, X, y, reset=reset, dtype=dtypes, **kind)
    if isinstance(y, str):
        return checked, None, shape
    if numbers:
        return checked[0], _as_numbers(checked[1]), shape
    check_classification_targets(checked[1])
    return *checked, shape


def _as_numbers(y: Any) -> np.ndarray:
    """Targets as float64, (n,) or (n, K)."""
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "biuf":
        kind = y.dtype if isinstance(y, np.ndarray) else type(y).__name__
        raise ValueError(f"y has to be a dense array of real numbers, but it is of {kind}.")
    if y.ndim > 2 or not y[:1].size:
        raise ValueError(
            f"y has the shape {y.shape}; (n,) or (n, K) is needed, with K at least one number for "
            "each row."
        )
    return y.astype(np.float64)


def _flattened(X: Any) -> tuple[Any, ImageShape | None]:
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    elif isinstance(X, list | tuple):
        X = _list_of_images(X)
    if not isinstance(X, np.ndarray):
        return X, None
    if X.dtype in (np.uint8, np.bool_, np.float16):
        X = X.astype(np.float32)
    if not X.dtype.isnative:  # torch has no other order of bytes
        X = X.astype(X.dtype.newbyteorder("="))
    if X.ndim > 4:
        raise ValueError(
            f"X has {X.ndim} dimensions; (n, features), (n, H, W) or (n, C, H, W) is needed. Of "
            "volumes, slices can be passed as channels."
        )
    if X.dtype == object and X.ndim == 1 and any(np.ndim(image) > 1 for image in X[:1]):
        raise ValueError("X is an array of images. Bring them to one size and pass np.stack(X).")
    if X.ndim not in (3, 4):
        return X, None
    channels, height, width = (1, *X.shape[1:])[-3:]
    return X.reshape(len(X), channels * height * width), (channels, height, width)


def _refuse_one_image(X: Any, estimator: Any) -> None:
    """Rows of the wrong length that are the rows of a single image."""
    shape = vars(estimator).get("image_shape_")
    alone = isinstance(X, np.ndarray) and X.ndim == 2 and shape == (1, *X.shape)
    if alone and X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has the shape {X.shape} of one image. To pass it as the only one of several: "
            "X[None]."
        )


def _list_of_images(rows: Sequence) -> Any:
    # Nested lists of images become arrays; anything ragged or flat is left to scikit-learn.
    try:
        array = np.asarray(rows)
    except ValueError:
        return rows
    return array if array.ndim in (3, 4) else rows


def distinct_rows(
    X: np.ndarray, codes: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each different row of positive weight once, with the weight of all that are equal to it.

    In an order that depends on what the rows are and not on where they stood. So two equal rows are
    one of weight two, a row of weight zero is none, and a fit to the same rows in another order is
    the same, to the last bit: a long training makes of last bits whatever it likes.

    Parameters
    ----------
    X : ndarray of shape (n, features)
    codes : ndarray of shape (n,)
        Of the targets; rows are equal if these are, too.
    weights : ndarray of shape (n,)
        Not negative.

    Returns
    -------
    X, codes, weights : ndarrays of at most n rows
    """
    present = weights > 0
    # Zeros have signs, which make no difference, but in the bytes.
    X, codes, weights = X[present] + 0.0, codes[present], weights[present]
    keys = b"".join(
        hashlib.blake2b(np.int64(code).tobytes() + row.tobytes(), digest_size=16).digest()
        for row, code in zip(X, codes, strict=True)
    )
    pairs = np.frombuffer(keys, np.uint64).reshape(-1, 2)
    _, first, place = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    return X[first], codes[first], np.bincount(place.ravel(), weights)


def resolve_image_shape(
    requested: tuple[int, ...] | None, found: ImageShape | None, n_features: int
) -> ImageShape:
    """The shape (C, H, W) of one image.

    Parameters
    ----------
    requested : tuple or None
        The parameter ``image_shape``: (C, H, W), or (H, W) for one channel.
    found : tuple or None
        Shape of the images passed, when they came as images.
    n_features : int
        Number of values of one row.

    Returns
    -------
    tuple (C, H, W)
        ``requested``, else ``found``, else a guess from the number of features: s² → (1, s, s),
        3 s² → (3, s, s), any other f → (1, 1, f).

    Raises
    ------
    ValueError
        If what was requested does not agree with the data.

    Warns
    -----
    UserWarning
        If the features make no square: then they are taken for a row of pixels.
    """
    if requested is not None:
        shape = _three(requested)
        if found is not None and shape != found:
            raise ValueError(
                f"image_shape={requested!r}, but X holds images of shape {found}. "
                "Leave image_shape=None for images, or pass X as rows of features."
            )
        if int(np.prod(shape)) != n_features:
            raise ValueError(
                f"image_shape={requested!r} has {int(np.prod(shape))} values, but X has "
                f"{n_features} features. Give the (channels, height, width) of one image."
            )
        return shape
    if found is not None:
        if found[2] in (1, 3, 4) and found[0] not in (1, 3, 4) and found[1] != found[2]:
            raise ValueError(
                f"X holds images of shape {found}, which looks like (height, width, channels); "
                "(channels, height, width) is needed. Pass X.transpose(0, 3, 1, 2), or "
                f"image_shape={found} if the first side does count channels."
            )
        return found
    for channels in (1, 3):
        side = round((n_features / channels) ** 0.5)
        if channels * side * side == n_features:
            return channels, side, side
    warn(
        f"X has {n_features} features, which make no square image of one or three channels. They "
        f"are taken for a single row of pixels: give image_shape=(1, 1, {n_features}) if that is "
        "meant, else the (channels, height, width) of an image."
    )
    return 1, 1, n_features


def _three(shape: tuple[int, ...]) -> ImageShape:
    sides = tuple(shape)
    whole = all(isinstance(side, Integral) and side >= 1 for side in sides)
    if len(sides) not in (2, 3) or not whole:
        raise ValueError(
            f"image_shape={shape!r} is not allowed: give (channels, height, width) or "
            "(height, width), positive integers, or None to infer it from X."
        )
    channels, height, width = (int(side) for side in (1, *sides)[-3:])
    return channels, height, width


def check_same_shape(found: ImageShape | None, fitted: ImageShape) -> ImageShape:
    """Images, when they come as images, must have the shape that was fitted.

    Raises
    ------
    ValueError
        If they have the same number of values in another shape.
    """
    if found is not None and found != fitted:
        channels_last = (found[2], *found[:2]) == fitted
        raise ValueError(
            f"X holds images of shape {found}, but the model was fitted on images of shape "
            f"{fitted}. Pass images of that shape, or rows of {int(np.prod(fitted))} features."
            + (" Channels come first: X.transpose(0, 3, 1, 2)." if channels_last else "")
        )
    return fitted


def check_classes(classes: Any, known: np.ndarray | None) -> np.ndarray:
    """The classes of an incremental fit, sorted.

    Raises
    ------
    ValueError
        If they are missing in the first call or differ from those of the first call.
    """
    if classes is None:
        if known is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        return known
    found = np.unique(column_or_1d(classes))
    if known is not None and not np.array_equal(found, known):
        raise ValueError(
            f"classes={classes!r} is not the same as on the last call to partial_fit: {known!r}."
        )
    return found


def encode(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Codes 0 … K−1 of the labels.

    Raises
    ------
    ValueError
        If a label is not among the classes.
    """
    unknown = np.setdiff1d(y, classes)
    if unknown.size:
        raise ValueError(
            f"y contains labels that are not among the classes: {unknown.tolist()}; "
            f"the classes are {classes.tolist()}. Name every class in `classes` on the first call "
            "to partial_fit, or fit anew with warm_start=False."
        )
    return np.searchsorted(classes, y)


def distinct_targets(y: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the targets, and the different targets in rising order, (m, K).

    Codes are the same in whatever unit the targets are given, and depend on no row that is not
    present, whose own code is 0.
    """
    # Zeros have signs, which make no difference.
    rows = y.reshape(len(y), -1)[present] + 0.0
    values, places = np.unique(rows, axis=0, return_inverse=True)
    codes = np.zeros(len(y), dtype=np.int64)
    codes[present] = places.ravel()
    return codes, values


def mean_and_scale(
    targets: np.ndarray, weights: np.ndarray, more: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of each output, and its scale, see :func:`scale_of`.

    Parameters
    ----------
    targets : ndarray of shape (n, K)
    weights : ndarray of shape (n,)
    more : bool, default=False
        Whether more is to come.
    """
    mean = np.average(targets, axis=0, weights=weights)
    apart = targets - mean
    largest = np.abs(apart).max(0)  # squares of what is divided by it neither over- nor underflow
    largest[largest == 0] = 1.0
    scale = largest * np.sqrt(np.average(np.square(apart / largest), axis=0, weights=weights))
    return mean, scale_of(scale, mean, np.finfo(np.float64).eps, more)


def scale_of(deviation: np.ndarray, mean: np.ndarray, eps: float, more: bool) -> np.ndarray:
    """The deviation, but for what is constant: what varies by no more than rounding.

    That is left at its own scale, 1, if all of it is there. If more is to come it has the size of
    its mean, which is all that is known of the unit, or 1 if that is 0.

    Parameters
    ----------
    deviation, mean : ndarray of shape (K,)
    eps : float
        Relative size of a rounding error.
    more : bool
        Whether more is to come.
    """
    size = np.abs(mean)
    known = size if more else np.ones_like(size)
    return np.where(deviation <= 10 * eps * size, np.where(known > 0, known, 1.0), deviation)


def check_same_outputs(found: int, fitted: int) -> None:
    """A chunk has to have as many numbers for each row as the first one had.

    Raises
    ------
    ValueError
        With both.
    """
    if found != fitted:
        raise ValueError(
            f"y has {found} numbers for each row, but the first call had {fitted}. Pass as many, "
            "or fit anew."
        )


def check_incremental_class_weight(class_weight: Any) -> None:
    """No chunk knows how frequent the classes are in all of the data.

    Raises
    ------
    ValueError
        For "balanced".
    """
    if class_weight == "balanced":
        raise ValueError(
            "class_weight 'balanced' is not supported for partial_fit. Pass the weights as a "
            "dict, from compute_class_weight on all labels."
        )


def check_weights(
    sample_weight: Any, X: np.ndarray, y: Any = None, classes: Any = None, class_weight: Any = None
) -> np.ndarray:
    """Weights of the rows, those of their classes included if there are any, float64.

    Raises
    ------
    ValueError
        For a negative weight, a wrong length, or weights that are all zero.
    """
    if isinstance(sample_weight, torch.Tensor):
        sample_weight = sample_weight.detach().cpu().numpy()
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if class_weight is not None:
        present = weights > 0
        y = y[present]
        # "balanced" divides by a class's weight, so it wants classes that have one.
        named = np.unique(y) if isinstance(class_weight, str) else classes
        factors = compute_class_weight(
            class_weight, classes=named, y=y, sample_weight=weights[present]
        )
        weights = weights.copy()  # it may be the caller's own array
        weights[present] *= factors[np.searchsorted(named, y)]
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(
            f"class_weight={class_weight!r} makes weights that are negative or not finite; "
            "give each class a finite weight of at least 0."
        )
    if not weights.any():
        raise ValueError(
            "All sample weights are zero, so there is no data to learn from; "
            "give at least one row a positive weight."
        )
    return weights


def warn_of_shares(weights: np.ndarray) -> None:
    """Say so if weights sum to next to nothing for so many rows, as those do that sum to 1.

    Warns
    -----
    UserWarning
        If they sum to less than :data:`FEW` for each row that has one.
    """
    n_rows = int((weights > 0).sum())
    if weights.sum() < FEW * n_rows:
        warn(
            f"The weights of {n_rows} rows sum to {weights.sum():.3g}. Weights are counts, so this "
            "is as much data as so many observations, and the prior decides. If they are shares, "
            "multiply them by the number of rows."
        )


def check_names(names: Any, allowed: Collection[str], parameter: str) -> tuple[str, ...]:
    """A name or a sequence of different names, each of them allowed.

    Raises
    ------
    ValueError
        If it is empty or a set, or a name is unknown or stands twice.
    """
    if isinstance(names, Set):  # whose order differs from one process to the next
        raise ValueError(f"{parameter}={names!r} has no order: give a tuple or a list.")
    listed = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in listed if not isinstance(name, str) or name not in allowed]
    if not listed or unknown or len(set(listed)) != len(listed):
        raise ValueError(
            f"{parameter}={names!r} is not allowed: give one or more different names out of "
            f"{sorted(allowed)}" + (f"; unknown: {unknown}." if unknown else ".")
        )
    return listed


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on.

    Parameters
    ----------
    device : str or torch.device
        "auto" takes the CUDA device if there is one and the CPU otherwise; else "cpu", "cuda" or
        "cuda:N". Without a number each process of a machine has its own.

    Raises
    ------
    ValueError
        If it names something else.

    Warns
    -----
    UserWarning
        If a CUDA device is asked for and there is none; the CPU is taken.
    """
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return own_device(torch.device("cuda")) if n_cuda else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device={device!r} is not supported; use 'auto', 'cpu', 'cuda' or 'cuda:N'."
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= n_cuda:
        warn(
            f"device={device!r} was asked for, but this machine has {n_cuda} CUDA devices; "
            "the CPU is used.",
        )
        return torch.device("cpu")
    return own_device(resolved)


def present_device(used: str, asked: str | torch.device) -> torch.device:
    """The device that a loaded model computes on: as before, or if it is not here as asked for.

    Parameters
    ----------
    used : str
        The device before.
    asked : str or torch.device
        As in :func:`resolve_device`.
    """
    before = torch.device(used)
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gone = before.type == "cuda" and (before.index or 0) >= n_cuda
    return resolve_device(asked if gone else before)
