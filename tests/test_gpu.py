"""What only a CUDA device can show; skipped where there is none."""

import numpy as np
import pytest
import torch
from cases import randomise
from skorch.callbacks import Callback

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.curvature import Estimator, kronecker_factors
from sklearn_softeq.datasets import load_digit_tasks
from sklearn_softeq.kronecker import dense, spectra
from sklearn_softeq.likelihoods import Categorical
from sklearn_softeq.networks import build_network

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]

SHORT = {"max_epochs": 24, "burn_in": 6, "width": 4, "random_state": 0}


@pytest.fixture(scope="module")
def task():
    data = load_digit_tasks(task="digit", n_train=600, random_state=0)
    return data.X_train.astype(np.float32), data.y_train


@pytest.mark.parametrize("estimator", [Estimator(), Estimator("rademacher")], ids=str)
def test_factors_are_those_of_the_cpu(estimator):
    pathways = ("conv", "sparse_conv", "fc", "factored_fc", "sparse_fc", "p4_conv")
    network = randomise(build_network((2, 4, 4), 3, pathways=pathways, width=1)).double()
    inputs = torch.randn(9, 2, 4, 4, dtype=torch.float64)
    batch = inputs, torch.arange(9) % 3, torch.rand(9, dtype=torch.float64) + 0.5
    found = []
    for device in ("cpu", "cuda"):
        network, columns = network.to(device), tuple(column.to(device) for column in batch)
        generator = torch.Generator().manual_seed(0)
        factors = kronecker_factors(
            network, Categorical(), [columns], estimator=estimator, generator=generator
        ).factors
        found.append((factors, spectra(factors)))
    (expected, values), (factors, others) = found
    for name, kron in expected.items():
        for side in ("left", "right"):
            here, there = (dense(getattr(k, side)) for k in (kron, factors[name]))
            torch.testing.assert_close(there.cpu(), here, rtol=1e-10, atol=1e-10 * here.abs().max())
            torch.testing.assert_close(
                getattr(others[name], side), getattr(values[name], side), rtol=1e-7, atol=1e-10
            )


def test_a_fit_is_like_that_of_the_cpu(task):
    fits = [
        SoftEquivariantClassifier(**SHORT, device=device).fit(*task) for device in ("cpu", "cuda")
    ]
    assert fits[1].device_.type == "cuda"
    np.testing.assert_allclose(fits[1].loss_curve_[:3], fits[0].loss_curve_[:3], rtol=1e-2)
    assert abs(fits[1].score(*task) - fits[0].score(*task)) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"amp": "bf16"},
        {"augment": "crop_flip"},
        {"curvature": "rademacher", "curvature_subset": 100},
        {"optimizer": "kfac"},
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(task, settings):
    class Watch(Callback):
        """Between the steps of an epoch whatever waits is an error."""

        def on_batch_begin(self, net, **kwargs):
            torch.cuda.set_sync_debug_mode("error")

        def on_epoch_end(self, net, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

        def on_batch_end(self, net, **kwargs):
            if len(net.history[-1]["batches"]) == 5:  # of 600 rows
                torch.cuda.set_sync_debug_mode("default")

    try:
        clf = SoftEquivariantClassifier(
            **SHORT, **settings, device="cuda", callbacks=[("watch", Watch())]
        ).fit(*task)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert clf.n_iter_ > 6


@pytest.mark.slow
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_compiled_steps(task, amp):
    clf = SoftEquivariantClassifier(**SHORT, device="cuda", compile=True, amp=amp).fit(*task)
    assert clf.score(*task) > 0.5


def test_curvature_is_never_in_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        network = randomise(build_network((3, 8, 8), 5, width=16)).cuda()
        inputs = torch.randn(64, 3, 8, 8).cuda()
        batch = inputs, torch.arange(64).cuda() % 5, torch.ones(64).cuda()
        found = kronecker_factors(network, Categorical(), [batch]).factors
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    batch = tuple(c.double() if c.is_floating_point() else c for c in batch)
    exact = kronecker_factors(network.double(), Categorical(), [batch]).factors
    for name, kron in exact.items():
        left, other = dense(kron.left), dense(found[name].left).double()
        assert (other - left).norm() <= 1e-5 * left.norm(), name
