"""Warnings that point to the line of the user's that led to them, however deep it was."""

import sys
import warnings

__all__ = ["warn"]

#: Packages, this one and those that stand between it and what calls it. (Python's own
#: ``skip_file_prefixes`` comes with 3.12.)
BETWEEN = {
    *(__name__.partition(".")[0], "sklearn", "skorch", "torch", "joblib", "skops"),
    *("contextlib", "copy", "functools", "pickle"),
}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither of this package nor of what calls it.

    Parameters
    ----------
    message : str
    category : type, default=UserWarning
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_between(module: str) -> bool:
    return module.partition(".")[0] in BETWEEN
