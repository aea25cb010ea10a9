"""Shared by all tests: one seed for each test, one thread, plots without a screen."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "SCIPY_ARRAY_API", "1"
)  # before scipy is imported: no common check is skipped

import numpy as np
import pytest
import torch

from sklearn_softeq import course

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu(request):
    """What tests expect is of the CPU, also where there is a GPU; ``test_gpu`` is of that."""
    if request.module.__name__ == "test_gpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that tests begin
        yield


@pytest.fixture
def no_restart(monkeypatch):
    """Nothing is learnt in a few epochs on noise; what follows from that has tests of its own."""
    monkeypatch.setattr(course, "LEARNT", -np.inf)
