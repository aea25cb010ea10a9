"""Nets have what the parameters of an estimator ask for."""

from operator import attrgetter

import numpy as np
import pytest
import torch

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.schedules import WARM_UP
from sklearn_softeq.trials import FEWEST_HELD, HELD_OUT, N_TRIALS, Trial

# One symmetry, which needs no trial: a net is built without any training.
TINY = {"pathways": "conv", "width": 1, "burn_in": 1, "max_epochs": 2, "random_state": 0}

N = 12

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def images_of(n=N):
    images = np.random.default_rng(0).normal(size=(n, 4, 4)).astype(np.float32)
    return images, np.arange(n) % 4


def built(sample_weight=None, endless=False, **parameters):
    """A net as it is before its first epoch."""
    clf = SoftEquivariantClassifier(**TINY | parameters)
    return clf._build_net(clf._prepare(*images_of(), sample_weight), None, endless=endless)


def estimator_of(net):
    return net.course.evidence.plan(net.module_, N).estimator


def start_weights(net):
    return torch.cat([weight.detach().flatten() for weight in net.module_.parameters()])


@pytest.mark.parametrize(
    ("name", "values", "look"),
    [
        ("hyper_lr", (0.03, 0.3), attrgetter("course.evidence.solver.rate")),
        ("hyper_steps", (2, 7), attrgetter("course.evidence.steps")),
        ("evidence_every", (2, 3), attrgetter("course.evidence.every")),
        ("curvature", ("rademacher", "monte_carlo"), lambda net: estimator_of(net).columns),
        ("curvature_samples", (2, 3), lambda net: estimator_of(net).samples),
        ("kfac", ("expand", "reduce"), lambda net: estimator_of(net).kfac),
        ("lr", (0.02, 0.2), attrgetter("course.rate.rate")),
        ("lr_schedule", ("cooldown", "cosine", "constant"), attrgetter("course.rate.schedule")),
        ("n_iter_no_change", (3, 4), attrgetter("course.plateau.patience")),
        ("tol", (0.25, 0.5), attrgetter("course.plateau.tol")),
        ("keep_best", (False, True), attrgetter("course.keep_best")),
    ],
)
def test_a_net_has_what_a_parameter_says(name, values, look):
    # Several, of which one at most is what a net has anyway.
    assert tuple(look(built(**{name: value})) for value in values) == values


def test_a_solver_has_its_own_rate_unless_told():
    rates = {"fixed_point": "solver.rate", "adam": "solver.ascent.rate"}
    for solver, where in rates.items():
        asked, own = (
            attrgetter(where)(built(hyper_solver=solver, hyper_lr=lr).course.evidence)
            for lr in (0.03, None)
        )
        assert asked == 0.03
        assert own == {"fixed_point": 0.5, "adam": 0.1}[solver]


@pytest.mark.parametrize("weight", [1, 3])
def test_a_rise_of_one_nat_in_all_is_the_least_that_is_told(weight):
    net = built(np.full(N, weight), tol=0.0)
    assert net.course.plateau.tol == 1 / (weight * N)


@pytest.mark.parametrize("schedule", ["cooldown", "cosine"])
def test_the_rate_of_chunks_stays_at_its_height(schedule):
    rate = built(endless=True, lr_schedule=schedule, lr=0.2).course.rate
    # "cosine" would be at 0 after max_epochs, and chunks have no end.
    found = [rate.at(epoch) for epoch in (1, WARM_UP, 10 * WARM_UP)]
    assert found == pytest.approx([0.2 / WARM_UP, 0.2, 0.2])


@pytest.mark.parametrize(
    ("max_epochs", "expected"), [(1, 5), (20, 5), (28, 7), (41, 10), (400, 10)]
)
def test_in_a_short_training_the_bound_warms_up_in_less_time(max_epochs, expected):
    assert built(max_epochs=max_epochs).course.rate.bound_warmup == expected


def test_each_trial_of_a_symmetry_has_a_random_start_of_its_own(monkeypatch):
    begun = {"p4_conv": [], "conv": []}
    begin = Trial.on_train_begin

    def noted(self, net, **kwargs):
        begin(self, net, **kwargs)
        if len(net.history) == 0:  # the best of them begin once more, to go on
            (on,) = (name for name, on in net.module_.layers["blocks.0"].enabled.items() if on)
            begun[on].append(start_weights(net))

    monkeypatch.setattr(Trial, "on_train_begin", noted)
    clf = SoftEquivariantClassifier(**TINY | {"pathways": tuple(begun)})
    clf.fit(*images_of(HELD_OUT * FEWEST_HELD))
    for starts in begun.values():
        assert len(starts) == N_TRIALS
        assert len(torch.stack(starts).unique(dim=0)) == N_TRIALS
    # What is compared differs by the symmetry alone.
    assert torch.equal(torch.stack(begun["p4_conv"]), torch.stack(begun["conv"]))


def test_another_random_state_is_another_fit():
    one, other = (start_weights(built(random_state=seed)) for seed in (0, 1))
    assert not torch.isclose(one, other).all()
    images, labels = images_of()
    one, other, again = (
        SoftEquivariantClassifier(**TINY | {"random_state": seed}).fit(images, labels)
        for seed in (0, 1, 0)
    )
    assert not np.allclose(one.predict_proba(images), other.predict_proba(images))
    np.testing.assert_array_equal(one.predict_proba(images), again.predict_proba(images))
