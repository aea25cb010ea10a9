"""The net: batches, loss, gradient, decay; beginning from another; interrupts; what is kept."""

import copy
import itertools
import math
import pickle
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from nets import (
    ALL,
    K,
    Record,
    assert_weights,
    begin,
    data_of,
    in_training,
    log_omegas,
    negative_log_joint,
    net_of,
    numbers_of,
    weights_of,
)
from skorch.callbacks import Callback
from torch import nn

from sklearn_softeq import training
from sklearn_softeq.batches import TrainingData
from sklearn_softeq.layers import FC
from sklearn_softeq.likelihoods import Gaussian
from sklearn_softeq.marginal_likelihood import (
    AdamSolver,
    LengthscaleSolver,
)

pytestmark = pytest.mark.usefixtures("no_restart")


# ── loss and gradient


def batch_loss(net, data, rows, n_rows=None):
    inputs, (targets, weights) = data[torch.tensor(rows)]
    return net.get_loss(net.module_(inputs), (targets, weights, None, n_rows or len(rows))).item()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_loss_of_a_batch_is_unbiased(size):
    data = data_of(5)
    net = in_training(net_of(), data)
    whole = negative_log_joint(net, data, dict.fromkeys(weights_of(net), 0.0)).item()
    subsets = itertools.combinations(range(5), size)
    losses = [batch_loss(net, data, rows) for rows in subsets]
    assert np.mean(losses) == pytest.approx(whole, rel=1e-12)


def test_losses_of_an_epoch_add_up():
    data = data_of(5)
    net = in_training(net_of(), data)
    whole = negative_log_joint(net, data, dict.fromkeys(weights_of(net), 0.0)).item()
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 17):
        parts = [order[:2], order[2:]]
        total = sum(len(rows) / 5 * batch_loss(net, data, rows) for rows in parts)
        assert total == pytest.approx(whole, rel=1e-12)


def test_shares_of_a_batch_add_up():
    data = data_of(5)
    net = in_training(net_of(), data)
    shares = [batch_loss(net, data, rows, n_rows=4) for rows in ([0, 2], [1, 3])]
    assert sum(shares) == pytest.approx(batch_loss(net, data, range(4)), rel=1e-12)


def test_weights_are_repetitions_in_the_loss():
    data, counts = data_of(6, weighted=False), torch.tensor([1, 3, 2, 1, 1, 2])
    weighted = TrainingData(data.inputs, data.targets, counts.double(), 10.0)
    repeated = TrainingData(
        *(c.repeat_interleave(counts, 0) for c in (data.inputs, data.targets, data.weights)), 10.0
    )
    losses = [batch_loss(in_training(net_of(), d), d, range(len(d))) for d in (weighted, repeated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("n_observations", [None, 70.0])
def test_gradient_of_a_step_is_that_of_the_negative_log_joint(optimizer, n_observations):
    data, record = data_of(n_observations=n_observations), Record()
    net = net_of(pathways=ALL, optimizer=optimizer, max_epochs=1, callbacks=[("record", record)])
    with torch.no_grad():
        for w in net.module_.parameters():  # biases, too
            w.add_(0.1 * torch.randn_like(w))
    for i, name in enumerate(net.prior_.index):
        net.prior_.set_precision(name, 0.1 * (i + 1))
    loss = negative_log_joint(net, data, net.prior_.precisions())
    expected = torch.autograd.grad(loss, list(net.module_.parameters()))
    net.partial_fit(data)
    [found] = record.gradients
    for name, gradient in zip(net.prior_.index, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)


def test_what_is_switched_off_has_no_gradient_and_does_not_move():
    data, record = data_of(), Record()
    net = net_of(start="symmetric", burn_in=100, max_epochs=3, callbacks=[("record", record)])
    before = weights_of(net)
    net.partial_fit(data)
    for name, w in weights_of(net).items():
        off = ".factored_fc." in name
        assert all((gradients[name] is None) == off for gradients in record.gradients)
        assert torch.equal(w, before[name]) == off


def test_gradients_of_the_log_joint_are_those_of_all_rows_for_n_observations(monkeypatch):
    data = data_of(n_observations=50.0)
    net = in_training(net_of(pathways=("conv", "factored_fc", "fc"), precision=2.0), data)
    net.module_.blocks[0].enabled["fc"] = False
    monkeypatch.setattr(training, "rows_of_a_pass", lambda network: 5)  # of 12
    found = net.log_joint_gradients()
    on = {n: w for n, w in net.module_.named_parameters() if not n.startswith("blocks.0.fc.")}
    loss = negative_log_joint(net, data, net.prior_.precisions())
    expected = torch.autograd.grad(-50.0 * loss, list(on.values()))
    assert list(found) == list(on)
    for gradient, whole in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, whole)


@pytest.mark.parametrize("batch_size", [128, 5])
def test_recorded_loss_is_the_negative_log_joint(batch_size):
    data = data_of(13, n_observations=40.0)  # batches of 5, 4 and 4 rows
    net = net_of(start="symmetric", burn_in=100, lr=1e-300, max_epochs=1, batch_size=batch_size)
    precisions = {}
    for i, name in enumerate(net.prior_.index):
        net.prior_.set_precision(name, 0.5 + i)
        on = ".factored_fc." not in name  # what is off has no part in the prior
        precisions[name] = net.prior_.precisions()[name] * on
    before = weights_of(net)
    net.partial_fit(data)
    assert_weights(net, before, lambda w, expected: torch.allclose(w, expected, atol=1e-200))
    expected = negative_log_joint(net, data, precisions).item()
    assert net.history[0, "train_loss"] == pytest.approx(expected, rel=1e-12)


# ── the decay of SGD


class Regression(nn.Module):
    """Logistic regression: the log joint is concave, so there is one stationary point."""

    layers: ClassVar[dict] = {}

    def __init__(self, generator):
        super().__init__()
        self.output = FC(4, K, (1, 1))
        self.output.reset(generator)
        self.double()

    def forward(self, inputs):
        return self.output(inputs).flatten(1)


def mode(data, precisions):
    """argmin of the negative log joint: a line search finds the basin, Newton's method the rest."""

    def loss(v):
        weight, bias = v[: 4 * K].view(K, 4), v[4 * K :]
        log_p = (data.inputs.flatten(1) @ weight.T + bias).log_softmax(1)
        value = -(data.weights * log_p[range(len(data)), data.targets]).sum() / data.weights.sum()
        squares = precisions[0] * weight.square().sum() + precisions[1] * bias.square().sum()
        return value + 0.5 * squares / data.n_observations

    found = torch.zeros(5 * K, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(loss)(found)
        step = torch.linalg.solve(torch.func.hessian(loss)(found), gradient)
        while loss(found - step) > loss(found):
            step = step / 2
            if step.norm() < 1e-14 * found.norm():
                break
        found = found - step
    return found[: 4 * K], found[4 * K :]


@pytest.mark.parametrize(
    ("precision", "implicit"), [(0.8, False), (40.0, True), (1e4, True), (6e7, True)]
)
def test_sgd_reaches_the_mode_whether_the_prior_is_stiff_or_not(precision, implicit):
    # In 12 observations, at rate 0.1 and momentum 0.9, an explicit step on a decay of δ/12 is
    # stable below δ = 456 only.
    data, record = data_of(shape=(4, 1, 1), n_observations=12.0), []

    class Look(Callback):
        def on_batch_begin(self, net, **kwargs):
            record.append([found for *_, found in net.decay_])

    settings = {"optimizer": "sgd", "lr": 0.1, "max_epochs": 400, "steps": 0, "burn_in": 1000}
    net = net_of(Regression, **settings, callbacks=[("look", Look())])
    net.prior_.set_precision("output.weight", precision)
    net.prior_.set_precision("output.bias", 1.0)
    net.partial_fit(data)
    assert record[0] == record[-1] == [implicit, False]
    weight, bias = mode(data, (precision, 1.0))
    found = net.module_.output
    torch.testing.assert_close(found.weight.flatten().detach(), weight, rtol=1e-6, atol=1e-18)
    torch.testing.assert_close(found.bias.detach(), bias, rtol=1e-6, atol=1e-12)


def test_stiff_decay_uses_the_rate_of_the_step():
    data = data_of(shape=(4, 1, 1), n_observations=12.0)
    net = net_of(
        Regression, optimizer="sgd", lr=0.1, max_epochs=1, steps=0, burn_in=100, schedule="cooldown"
    )
    net.prior_.set_precision("output.weight", 240.0)
    weight = net.module_.output.weight
    before = weight.detach().clone()
    log_p = net.module_(data.inputs).log_softmax(1)[range(12), data.targets]
    loss = -(data.weights * log_p).sum() / data.weights.sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    net.partial_fit(data)
    # Warm-up: a fifth of the rate in the first epoch; δ/N = 20, momentum multiplies it by 10.
    expected = (before - 0.02 * gradient) / (1 + 20 * 0.02 * 10)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-14)


def test_adam_never_decays_implicitly():
    data = data_of()
    net = net_of(precision=1e7, max_epochs=1)
    begin(net, data)
    net.update_decay()
    assert [implicit for *_, implicit in net.decay_] == [False] * len(net.prior_.index)
    assert [decay for _, decay, _ in net.decay_] == pytest.approx(
        [1e7 / data.n_observations] * len(net.prior_.index)
    )


# ── learning rates of single tensors


def test_a_pace_scales_the_steps_of_its_tensor():
    data, moved = data_of(9), {}
    for pace in (1.0, 0.25):
        torch.manual_seed(0)
        net = in_training(net_of(schedule="cooldown"), data)
        before, name = weights_of(net), "blocks.0.conv.weight"
        net.set_paces({name: pace})
        net.update_decay()
        net.course.rate.hand_to(net.optimizer_, 2)
        rates = [group["lr"] for group in net.optimizer_.param_groups]
        assert rates == pytest.approx([0.004, 0.004 * pace])
        net.train_step((data.inputs, (data.targets, data.weights, None, len(data))))
        moved[pace] = {n: w - before[n] for n, w in weights_of(net).items()}
    for tensor, step in moved[1.0].items():
        assert step.abs().max() > 0
        expected = 0.25 * step if tensor == name else step
        torch.testing.assert_close(moved[0.25][tensor], expected, rtol=1e-9, atol=1e-15)


def test_each_tensor_has_one_pace():
    net = in_training(net_of(), data_of(9))
    names = ["blocks.0.conv.weight", "blocks.1.conv.weight"]
    for paces in ([0.5], [0.25, 0.75], [1.0, 0.1]):
        net.set_paces(dict(zip(names, paces, strict=False)))
        groups = net.optimizer_.param_groups
        assert [group.get("pace") for group in groups] == [None, *paces]
        parameters = [p for group in groups for p in group["params"]]
        assert sorted(map(id, parameters)) == sorted(map(id, net.module_.parameters()))
    net.discard([("blocks.0", "conv")])
    assert [group.get("pace") for group in net.optimizer_.param_groups] == [None, 0.1]


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_only_steps_of_a_given_length_have_paces(optimizer):
    net = in_training(net_of(optimizer=optimizer), data_of(9))
    net.set_paces({"blocks.0.conv.weight": 0.5})
    assert len(net.optimizer_.param_groups) == 1


# ── another noise


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_is_remembered_of_gradients_follows_the_noise(optimizer):
    # As if they had been taken at that noise; the prior, whose part has no noise, is weak here.
    states = []
    for first in (1.0, 0.04):
        torch.manual_seed(0)
        data, likelihood = numbers_of(9), partial(Gaussian, first, True)
        net = in_training(net_of(criterion=likelihood, optimizer=optimizer, precision=1e-9), data)
        net.update_decay()
        net.train_step((data.inputs, (data.targets, data.weights, None, len(data))))
        net.set_log_hyperparameters(net.log_hyperparameters() * 0 - math.log(0.04))
        assert net.criterion_.noise_variance == pytest.approx(0.04)
        states.append([net.optimizer_.state[w] for w in net.module_.parameters()])
    for found, expected in zip(*states, strict=True):
        for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & found.keys():
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_is_remembered_of_gradients_follows_the_gauge(optimizer):
    # As if they had been taken at the weights that came of it; the prior is weak here.
    states, (u, v) = [], (f"blocks.0.factored_fc.{name}" for name in ("U.weight", "V.weight"))
    scales = {u: 4.0, u.replace("weight", "bias"): 4.0, v: 0.25}
    for before in (True, False):
        torch.manual_seed(0)
        data = data_of()
        net = in_training(net_of(optimizer=optimizer, precision=1e-9), data)
        net.update_decay()

        def move(net=net):
            with torch.no_grad():
                for name, scale in scales.items():
                    net.module_.get_parameter(name).mul_(scale)
            net.follow(scales)

        if before:
            move()
        net.train_step_single((data.inputs, (data.targets, data.weights, None, len(data))))
        net.optimizer_.step()
        if not before:
            move()
        states.append([net.optimizer_.state[w] for w in net.module_.parameters()])
    for found, expected in zip(*states, strict=True):
        for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & found.keys():
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "kfac"])
def test_of_several_noises_the_least_is_followed(optimizer):
    data, first = numbers_of(9), (1.0, 0.5, 2.0)
    net = in_training(net_of(criterion=partial(Gaussian, first, True), optimizer=optimizer), data)
    net.update_decay()
    net.train_step((data.inputs, (data.targets, data.weights, None, len(data))))
    states = [net.optimizer_.state[w] for w in net.module_.parameters()]
    if optimizer == "kfac":
        for state in states:
            state["right"] = torch.ones(1, 1, 1)
    powers = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1, "right": 1}
    before = [{n: state[n].clone() for n in powers.keys() & state.keys()} for state in states]
    n_precisions = len(net.prior_.log_precision)

    def set_noises(*variances):
        at = net.log_hyperparameters()
        at[n_precisions:] = -torch.tensor(variances).log()
        net.set_log_hyperparameters(at)

    set_noises(1.0, 0.1, 8.0)
    for state, old in zip(states, before, strict=True):
        for name, value in old.items():
            torch.testing.assert_close(state[name], value * 5.0 ** powers[name])
    set_noises(0.5, 3.0, 1.0)
    for state, old in zip(states, before, strict=True):
        for name, value in old.items():
            torch.testing.assert_close(state[name], value)


def test_sgd_has_the_steps_of_least_squares():
    moved = []
    for noise_variance in (1.0, 0.01):
        torch.manual_seed(0)
        data = numbers_of(9)
        criterion = partial(Gaussian, noise_variance)
        net = net_of(criterion=criterion, optimizer="sgd", schedule="cooldown", precision=1e-9)
        before = weights_of(in_training(net, data))
        net.set_paces({})
        net.update_decay()
        net.course.rate.hand_to(net.optimizer_, 9)
        net.train_step((data.inputs, (data.targets, data.weights, None, len(data))))
        moved.append({name: w - before[name] for name, w in weights_of(net).items()})
    for name, step in moved[0].items():
        torch.testing.assert_close(moved[1][name], step, rtol=1e-3, atol=1e-6)


def test_noise_of_some_data():
    net, data = net_of(criterion=partial(Gaussian, 1.0, True)), numbers_of(20)
    squares = (net.module_(data.inputs) - data.targets).square().sum(1)
    net.fit_noise(data)
    mean = (data.weights @ squares / (data.weights.sum() * 3)).item()
    assert net.criterion_.noise_variance == pytest.approx(mean)
    assert net.score(data) == pytest.approx(
        net.log_likelihood(data) / data.weights.sum().item(), rel=1e-9
    )
    fixed = net_of(criterion=partial(Gaussian, 0.3))
    fixed.fit_noise(data)
    assert fixed.criterion_ == Gaussian(0.3)


@pytest.mark.parametrize("learned", [True, False])
def test_take_over_of_a_noise(learned):
    first = net_of(criterion=partial(Gaussian, 1.0, True)).partial_fit(numbers_of())
    second = net_of(criterion=partial(Gaussian, 0.5, learned))
    second.take_over(first)
    expected = first.criterion_.noise_variance if learned else 0.5
    assert second.criterion_.noise_variance == pytest.approx(expected)
    third = net_of(criterion=partial(Gaussian, 0.7, True))
    third.take_over(net_of(criterion=partial(Gaussian, 0.1)))  # it says nothing of its own
    assert third.criterion_.noise_variance == 0.7


# ── beginning from another net


def test_take_over():
    first = net_of(pathways=ALL).partial_fit(data_of())
    first.module_.blocks[0].enabled["fc"] = False
    second = net_of(pathways=ALL, seed=1)
    second.take_over(first)
    assert_weights(second, weights_of(first))
    assert second.prior_.precisions() == first.prior_.precisions()
    assert second.module_.blocks[0].enabled == first.module_.blocks[0].enabled
    second.partial_fit(data_of())  # and is its own
    assert not torch.equal(second.module_.head.output.weight, first.module_.head.output.weight)
    assert second.module_.blocks[0].enabled is not first.module_.blocks[0].enabled


@pytest.mark.parametrize(
    ("other", "changed"),
    [
        ({"module__width": 3}, "width was 3 and is"),
        ({"pathways": ("conv",)}, r"pathways was \('conv',\) and is \('conv', 'factored_fc'\)"),
        ({"module__n_outputs": 4}, "the number of outputs was 4 and is 3"),
    ],
    ids=str,
)
def test_take_over_of_another_form(other, changed):
    with pytest.raises(ValueError, match=f"but {changed}.*warm_start=False"):
        net_of().take_over(net_of(**other))


# ── randomness


def test_global_generators_are_left_as_they_were():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data = data_of()
    torch.set_rng_state(state)
    net = net_of(pathways=ALL, start="symmetric", n_sketches=1, batch_size=5)
    assert torch.equal(torch.get_rng_state(), state)
    net.partial_fit(data)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_generators_of_a_net():
    def drawn(seed, offset):
        return torch.rand(3, generator=net_of(seed=seed).generator(offset)).tolist()

    assert drawn(4, 0) == drawn(4, 0)
    assert drawn(4, 0) != drawn(5, 0)
    assert drawn(4, 0) != drawn(4, 1)


def test_a_fit_depends_on_its_seeds_alone():
    data = data_of()
    settings = {"start": "symmetric", "burn_in": 1, "n_sketches": 1, "batch_size": 5}
    first = net_of(**settings).partial_fit(data)
    torch.manual_seed(77)
    second = net_of(**settings).partial_fit(data)
    assert_weights(second, weights_of(first))
    assert second.prior_.precisions() == first.prior_.precisions()
    for other in ({"seed": 1}, {"batch_seed": 1}, {"evidence_seed": 1}):
        third = net_of(**settings, **other).partial_fit(data)
        assert not torch.equal(third.module_.head.output.weight, first.module_.head.output.weight)


# ── interrupts and errors


class Interrupt(Callback):
    """As skorch's EarlyStopping asks to stop."""

    def __init__(self, event, epoch=3):
        self.event, self.epoch = event, epoch

    def _raise(self, net):
        if len(net.history) == self.epoch:
            raise KeyboardInterrupt


for event in ("on_epoch_end", "on_epoch_begin", "on_batch_end", "on_grad_computed", "on_train_end"):

    def method(self, net, *args, event=event, **kwargs):
        if event == self.event:
            self._raise(net)

    setattr(Interrupt, event, method)


@pytest.mark.parametrize(
    "event", ["on_epoch_end", "on_epoch_begin", "on_batch_end", "on_grad_computed"]
)
def test_a_callback_may_end_training(event):
    net = net_of(burn_in=1, every=1, callbacks=[("stop", Interrupt(event))])
    net.partial_fit(data_of())
    assert len(net.history) == 3
    assert net.laplace_ is not None  # on_train_end has run
    assert not {"data_", "decay_", "weight_sum_"} & vars(net).keys()


@pytest.mark.parametrize(("event", "epoch"), [("on_train_begin", 0), ("on_train_end", 6)])
def test_a_callback_may_do_so_when_there_is_nothing_left_to_end(event, epoch):
    stop = Interrupt(event, epoch)
    if event == "on_train_begin":
        stop.on_train_begin = lambda net, **kwargs: stop._raise(net)
    net = net_of(callbacks=[("stop", stop)])
    net.partial_fit(data_of())
    assert len(net.history) == epoch
    assert not {"data_", "decay_", "weight_sum_"} & vars(net).keys()


@pytest.mark.parametrize("where", ["get_loss", "train_step", "fit_loop"])
def test_ctrl_c_goes_through(monkeypatch, where):
    net = net_of()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(net, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        net.partial_fit(data_of())
    assert not {"data_", "decay_", "weight_sum_"} & vars(net).keys()


def test_ctrl_c_goes_through_the_evidence(monkeypatch):
    net = net_of()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(net.callbacks_[0][1], "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        net.partial_fit(data_of())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(value):
    class Break(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 4:
                with torch.no_grad():
                    net.module_.head.output.bias.fill_(value)

    net = net_of(burn_in=2, every=1, callbacks=[("break", Break())])
    with pytest.raises(ValueError, match="training loss became") as error:
        net.partial_fit(data_of())
    last = net.history[3, "log_marginal_likelihood"]
    for part in ("in epoch 5", f"last finite log evidence: {last:.6g}", "Lower lr", "standardize"):
        assert part in str(error.value)
    assert not {"data_", "decay_", "weight_sum_"} & vars(net).keys()


def test_a_curvature_that_is_no_number():
    class Break(Callback):  # finite weights, infinite outputs, after the loss of the epoch
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 4:
                with torch.no_grad():
                    for w in net.module_.parameters():
                        w.fill_(1e120)

    net = net_of(burn_in=2, every=2)
    net.callbacks_.insert(0, ("break", Break()))
    with pytest.raises(ValueError, match="curvature became infinite or NaN in epoch 4") as error:
        net.partial_fit(data_of())
    last = net.history[1, "log_marginal_likelihood"]
    for part in (f"last finite log evidence: {last:.6g}", "Lower lr"):
        assert part in str(error.value)


def test_a_curvature_that_nobody_can_decompose(monkeypatch):
    def fails(given):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    with pytest.raises(ValueError, match="no solver finds in epoch 2 .last finite.*Lower lr"):
        net_of(burn_in=2, every=2).partial_fit(data_of())


def test_a_loss_that_is_no_number_from_the_first():
    data = data_of()
    data.inputs[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="nan in epoch 1 .last finite log evidence: none yet"):
        net_of().partial_fit(data)


# ── what is kept


def test_the_data_are_not_kept():
    net = net_of().partial_fit(data_of())
    assert not {"data_", "decay_", "weight_sum_"} & vars(net).keys()
    size = len(pickle.dumps(net))
    bigger = len(pickle.dumps(net_of().partial_fit(data_of(600))))
    assert bigger < size + 16 * 600  # 600 images of 16 pixels are 8 times that


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_nets_can_be_copied(duplicate):
    pathways, lengthscales = (*ALL, "sparse_fc"), LengthscaleSolver()
    settings = {"endless": True, "solver": AdamSolver(), "burn_in": 1, "every": 1}
    net = net_of(pathways=pathways, lengthscales=lengthscales, **settings)
    net.partial_fit(data_of()).partial_fit(data_of())
    net.module_.blocks[0].enabled["fc"] = False
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    twin = duplicate(net)
    assert torch.equal(twin.module_(x), net.module_(x))
    assert twin.prior_.precisions() == net.prior_.precisions()
    assert twin.history[:, "train_loss"] == net.history[:, "train_loss"]
    before = weights_of(net)
    data = data_of()
    twin.partial_fit(data)  # it goes on, and the other is not touched
    assert_weights(net, before)
    assert len(net.history) == 2
    assert log_omegas(twin) != log_omegas(net)
    net.partial_fit(data)
    assert_weights(twin, weights_of(net))
    assert log_omegas(twin) == log_omegas(net)
