"""What the benchmarks share: results that are kept, the environment, a table."""

import json
import os
import platform
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning

import sklearn_softeq

__all__ = ["Results", "environment", "print_table"]


class Results:
    """Results by key in a JSON file, with the versions and the cores that they were made with."""

    def __init__(self, path):
        self.path = Path(path)
        self.by_key = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key, compute):
        """The result of this key, computed only if it is not there."""
        if key not in self.by_key:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # recorded as epochs
                found = {**compute(), "environment": environment()}
            # Another process may have added some in the meantime.
            self.by_key = json.loads(self.path.read_text()) if self.path.exists() else {}
            self.by_key[key] = found
            self.path.write_text(json.dumps(self.by_key, indent=1) + "\n")
        return self.by_key[key]


def environment():
    """What a time and, to the last digit, a score depend on."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
        "sklearn_softeq": sklearn_softeq.__version__,
    }


def print_table(head, rows):
    """A table in Markdown."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    print("\n" + "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)]) + "\n")
