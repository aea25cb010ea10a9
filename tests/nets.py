"""Nets that are ready to train, put together as the estimator does, and data for them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch.callbacks import Callback

from sklearn_softeq.batches import Batches, TrainingData
from sklearn_softeq.budget import CurvaturePlan
from sklearn_softeq.course import Course, EvidenceStep
from sklearn_softeq.curvature import Estimator
from sklearn_softeq.likelihoods import Categorical
from sklearn_softeq.marginal_likelihood import (
    FixedPointSolver,
)
from sklearn_softeq.networks import build_network
from sklearn_softeq.schedules import STARTS, LearningRate, Plateau
from sklearn_softeq.training import OPTIMIZERS, SoftEquivariantNet

K = 3
ALL = ("conv", "factored_fc", "fc")


def small_digits(n):
    """Images (n, 4, 4) of three digits, float32 in 0…1, and their labels."""
    images, labels = load_digits(n_class=3, return_X_y=True)
    images = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)) / 16
    return images[:n].astype(np.float32), labels[:n]


def data_of(n=12, shape=(1, 4, 4), dtype=torch.float64, n_observations=None, weighted=True):
    weights = torch.rand(n, dtype=dtype) + 0.5 if weighted else torch.ones(n, dtype=dtype)
    total = weights.sum().item() if n_observations is None else n_observations
    inputs = torch.randn(n, *shape, dtype=dtype)
    return TrainingData(inputs, torch.randint(K, (n,)), weights, total)


def numbers_of(n=12, shape=(1, 4, 4), n_outputs=K, **options):
    """The same with numbers for targets, that depend on the images."""
    data = data_of(n, shape, **options)
    flat = data.inputs.flatten(1)
    mix = torch.linspace(-1, 1, flat.shape[1] * n_outputs, dtype=flat.dtype).view(-1, n_outputs)
    return replace(data, targets=flat @ mix / 6 + 0.3 * torch.randn(n, n_outputs, dtype=flat.dtype))


def plan(n_sketches, subset, network, n_rows):
    """So many sketches, 0 for all columns, of so many rows."""
    estimator = Estimator("rademacher", n_sketches) if n_sketches else Estimator()
    return CurvaturePlan(estimator, subset or n_rows, K - 1 if n_sketches else 1)


EXACT = partial(plan, 0, None)


def begin(net, data):
    """As far as training does before its first epoch."""
    net.data_ = data
    net.course.evidence.on_train_begin(net)


def net_of(
    module=build_network,
    *,
    pathways=("conv", "factored_fc"),
    start="joint",
    evidence=None,
    solver=None,
    steps=2,
    burn_in=2,
    every=2,
    n_sketches=0,
    subset=None,
    evidence_seed=0,
    lengthscales=None,
    ramp=0.0,
    schedule="constant",
    lr=0.01,
    optimizer="adam",
    max_epochs=6,
    criterion=Categorical,
    noise_alone=False,
    patience=100,
    keep_best=True,
    holding=True,
    endless=False,
    spare_starts=0,
    batch_size=128,
    batch_seed=0,
    precision=1.0,
    seed=0,
    callbacks=(),
    **params,
):
    """A net ready to train, put together as the estimator does."""
    if evidence is None:
        solver = solver or FixedPointSolver()
        how = partial(plan, n_sketches, subset)
        seen = (burn_in, every, how, evidence_seed, lengthscales, ramp, noise_alone)
        evidence = EvidenceStep(solver, steps, *seen)
    start = STARTS[start]() if isinstance(start, str) else start
    rate, plateau = LearningRate(schedule, lr, max_epochs), Plateau(0.0, patience)
    course = Course(evidence, start, rate, plateau, keep_best, holding, endless, spare_starts)
    if module is build_network:
        params = {
            "module__image_shape": (1, 4, 4),
            "module__n_outputs": K,
            "module__pathways": pathways,
            "module__width": 2,
            "module__dtype": torch.float64,
            **params,
        }
    kind = OPTIMIZERS[optimizer]
    net = SoftEquivariantNet(
        module,
        criterion=criterion,
        optimizer=kind.build,
        lr=lr,
        max_epochs=1 if endless else max_epochs,
        batch_size=batch_size,
        iterator_train=Batches,
        iterator_train__random_state=np.random.RandomState(batch_seed),
        train_split=None,
        callbacks=[("evidence", evidence), ("course", course), *callbacks],
        verbose=0,
        device="cpu",
        prior_precision=precision,
        seed=seed,
        **params,
        **{f"optimizer__{name}": value for name, value in kind.settings.items()},
    )
    net.initialize()
    if holding:
        start.begin(net.module_)
    return net


def weights_of(net):
    return {name: w.detach().clone() for name, w in net.module_.named_parameters()}


def assert_weights(net, expected, equal=torch.equal):
    assert list(expected) == [name for name, _ in net.module_.named_parameters()]
    for name, w in net.module_.named_parameters():
        assert equal(w, expected[name]), name


def negative_log_joint(net, data, precisions: Mapping[str, float]):
    """−(1/Σw) Σ w log p + (1/2N) Σ δ ‖w‖², spelled out, with a graph."""
    log_p = net.module_(data.inputs).log_softmax(1)[range(len(data)), data.targets]
    loss = -(data.weights * log_p).sum() / data.weights.sum()
    named = net.module_.named_parameters()
    squares = sum(precisions[name] * w.square().sum() for name, w in named)
    return loss + 0.5 * squares / data.n_observations


class Record(Callback):
    """Weights after each epoch, rates, gradients, and the rows of each batch."""

    def __init__(self):
        self.weights, self.precisions, self.rates = [], [], []
        self.gradients, self.inputs, self.enabled = [], [], []

    def on_epoch_end(self, net, **kwargs):
        self.weights.append(weights_of(net))
        self.precisions.append(net.prior_.precisions())
        self.rates.append(net.optimizer_.param_groups[0]["lr"])
        self.enabled.append([dict(block.enabled) for block in net.module_.blocks])

    def on_grad_computed(self, net, **kwargs):
        named = net.module_.named_parameters()
        gradients = {name: None if w.grad is None else w.grad.clone() for name, w in named}
        self.gradients.append(gradients)

    def on_batch_begin(self, net, batch, **kwargs):
        self.inputs.append(batch[0])


def in_training(net, data):
    """What partial_fit keeps while it trains."""
    net.data_, net.weight_sum_ = data, data.weights.sum()
    return net


def log_omegas(net):
    return {name: psi.log_omega.item() for name, psi in net.module_.interpolations.items()}
