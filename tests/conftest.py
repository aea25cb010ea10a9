"""Shared by all tests: one seed for each test, one thread, plots without a screen."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "SCIPY_ARRAY_API", "1"
)  # before scipy is imported: no common check is skipped

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
