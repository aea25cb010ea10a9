"""Evidence against closed forms and finite differences; its ascent; a toy whose truth is known."""

import math
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest
import torch
from cases import APPROXIMATE, EXACT
from objectives import LinearModel, ascend, laplace
from references import linear_regression_map

from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.hyperparameters import LOG_PRECISION_BOUNDS, LayerwisePrior, squared_norms
from sklearn_softeq.kronecker import Kronecker, Spectrum, dense, spectra
from sklearn_softeq.layers import FC, Conv, PathwaySum
from sklearn_softeq.likelihoods import Gaussian
from sklearn_softeq.marginal_likelihood import (
    HYPER_SOLVERS,
    AdamSolver,
    Evidence,
    FixedPointSolver,
    LaplaceEvidence,
)

BY_NAME = {case.name: case for case in EXACT + APPROXIMATE}
NETWORKS = [BY_NAME[name] for name in ("all", "all-gaussian", "factored-fc", "full-resolution")]
each_network = pytest.mark.parametrize("case", NETWORKS, ids=str)


def objective_of(case, n=30):
    network = case.network()
    prior = LayerwisePrior(dict(network.named_parameters()))
    inputs = case.inputs(n)
    batch = (inputs, case.targets(network(inputs).detach()), torch.ones(n, dtype=torch.float64))
    return laplace(network, case.likelihood, batch, prior), prior, network


# ── the value


def test_terms():
    evidence = Evidence(log_likelihood=-7.0, scatter=2.0, log_det_ratio=4.0)
    assert evidence.value == -7.0 - 1.0 - 2.0


def test_terms_against_dense_matrices():
    case = BY_NAME["all"]
    network = case.network()
    batch = case.batch(network)
    prior = LayerwisePrior(dict(network.named_parameters()))
    log_precision = torch.randn(len(prior.index), dtype=torch.float64)
    found = laplace(network, case.likelihood, batch, prior).evidence(log_precision)
    curvature = kronecker_factors(network, case.likelihood, [batch])
    factors, log_likelihood = curvature.factors, curvature.log_likelihood
    prior.log_precision.copy_(log_precision)
    log_det = 0.0
    for name, delta in prior.precisions().items():
        dense = factors[name].to_dense() / delta
        log_det += torch.logdet(dense + torch.eye(len(dense), dtype=torch.float64)).item()
    assert found.log_likelihood == log_likelihood
    assert found.scatter == pytest.approx(prior.scatter(dict(network.named_parameters())))
    assert found.log_det_ratio == pytest.approx(log_det)


LINEAR_LAYERS = pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: FC(2, 3, (2, 3)), (2, 2, 3)),
        (lambda: FC(2, 3, (2, 4), (2, 2)), (2, 2, 4)),
        (lambda: Conv(2, 3, (3, 4)), (2, 3, 4)),
        (lambda: Conv(2, 2, (4, 2), (2, 2)), (2, 4, 2)),
        (lambda: Conv(3, 2, (1, 5)), (3, 1, 5)),
    ],
    ids=["fc", "fc-strided", "conv", "conv-strided", "conv-line"],
)


def linear_model(layer, shape, size=1.0):
    """A model of targets of this deviation; of less than 1 no noise meets its bound."""
    layer = layer().double()
    inputs = torch.randn(25, *shape, dtype=torch.float64)
    inputs = inputs - inputs.mean(0)  # so that no cross block of weight and bias is dropped
    targets = size * torch.randn_like(layer(inputs).flatten(1))
    model = LinearModel(layer, inputs, targets)
    model.prior.set_precision("layer0.weight", 2.5)
    model.prior.set_precision("layer0.bias", 0.4)
    return model


@LINEAR_LAYERS
@pytest.mark.parametrize("noise_variance", [0.1, 3.0])
def test_evidence_of_a_linear_layer_is_bayesian_linear_regression(layer, shape, noise_variance):
    model = linear_model(layer, shape)
    model.to_mode(noise_variance)
    found = model.objective(noise_variance).evidence(model.prior.log_precision).value
    assert found == pytest.approx(model.closed_form(noise_variance), rel=0, abs=1e-6)


@LINEAR_LAYERS
@pytest.mark.parametrize("noise_variance", [0.1, 3.0])
def test_with_the_linear_term_the_evidence_is_right_away_from_the_mode(
    layer, shape, noise_variance
):
    # In an expansion that is exact the estimate lacks nothing else.
    model = linear_model(layer, shape)
    model.set_weights(torch.randn(model.design.shape[1], dtype=torch.float64))
    likelihood, precisions = Gaussian(noise_variance), model.prior.precisions()
    batch = (model.inputs, model.targets, torch.ones(25, dtype=torch.float64))
    log_joint = likelihood.log_prob(model.network(model.inputs), model.targets).sum()
    for name, weight in model.tensors.items():
        log_joint = log_joint - 0.5 * precisions[name] * weight.square().sum()
    found = torch.autograd.grad(log_joint, list(model.tensors.values()))
    gradients = dict(zip(model.tensors, found, strict=True))
    objective = laplace(model.network, likelihood, batch, model.prior)
    term = objective.linear_term(gradients, model.prior.log_precision)
    without = objective.evidence(model.prior.log_precision).value
    assert term > 1.0
    assert without + term == pytest.approx(model.closed_form(noise_variance), rel=1e-9)


# ── the noise

NOISES = [0.05, 0.4, 6.0]


@LINEAR_LAYERS
@pytest.mark.parametrize("noise_variance", NOISES)
def test_evidence_at_another_noise_is_bayesian_linear_regression(layer, shape, noise_variance):
    # All is measured at one noise and asked at another; the weights are at the mode of that one.
    model = linear_model(layer, shape)
    model.to_mode(noise_variance)
    found = model.objective(0.7, learned=True).evidence(model.hyperparameters(noise_variance))
    assert found.value == pytest.approx(model.closed_form(noise_variance), rel=0, abs=1e-6)


@LINEAR_LAYERS
def test_with_the_linear_term_so_away_from_the_mode(layer, shape):
    model = linear_model(layer, shape)
    model.set_weights(torch.randn(model.design.shape[1], dtype=torch.float64))
    here, there = model.objective(0.7, learned=True), model.hyperparameters(0.2)
    log_joint = Gaussian(0.2).log_prob(model.network(model.inputs), model.targets).sum()
    precisions = model.prior.precisions()
    for name, weight in model.tensors.items():
        log_joint = log_joint - 0.5 * precisions[name] * weight.square().sum()
    found = torch.autograd.grad(log_joint, list(model.tensors.values()))
    term = here.linear_term(dict(zip(model.tensors, found, strict=True)), there)
    assert here.evidence(there).value + term == pytest.approx(model.closed_form(0.2), rel=1e-9)


@pytest.mark.parametrize("case", [BY_NAME["all-gaussian"]], ids=str)
def test_all_figures_at_another_noise_are_those_that_are_found_there(case):
    network = case.network()
    prior = LayerwisePrior(dict(network.named_parameters()))
    inputs = case.inputs(9)
    targets, weights = case.targets(network(inputs).detach()), torch.rand(9).double() + 0.5
    at = torch.randn(len(prior.index) + 1, dtype=torch.float64)
    at[-1] = -math.log(0.2)
    names = [name.removesuffix(".weight") for name in prior.index if name.endswith("weight")]
    gradients = {name: torch.randn_like(w) for name, w in network.named_parameters()}
    batch, figures = (inputs, targets, weights), []
    for noise_variance in (0.2, 3.0):
        objective = laplace(network, Gaussian(noise_variance, True), batch, prior)
        # Slopes of a log likelihood are in proportion to the precision of the noise.
        slopes = dict.fromkeys(names[:2], 1.7 / noise_variance)
        objective = replace(objective, slopes=slopes, log_det_weight=0.6)
        moments = objective.balance(at)
        figures.append(
            [
                *objective.evidence(at),
                *objective.effective_dimensions(at).values(),
                *moments[0].tolist(),
                *moments[1].tolist(),
                *objective.gradient(at).tolist(),
                *objective.lengthscale_gradient(at).values(),
                objective.linear_term(gradients, at),
            ]
        )
    assert figures[1] == pytest.approx(figures[0], rel=1e-9)


def assert_gradient(objective, at, h=1e-4):
    """It is that of central differences."""
    slope = objective.gradient(at)
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = h
        up, down = (objective.evidence(at + s).value for s in (step, -step))
        assert (up - down) / (2 * h) == pytest.approx(slope[i].item(), rel=1e-5, abs=1e-5)


@LINEAR_LAYERS
def test_gradient_in_the_noise_against_central_differences(layer, shape):
    model = linear_model(layer, shape, size=0.1)
    model.to_mode(0.03)
    objective, at = model.objective(0.07, learned=True), model.hyperparameters(0.03)
    assert_gradient(objective, at)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_the_noise_comes_to_where_the_exact_evidence_is_highest(rate):
    model = linear_model(lambda: FC(1, 2, (2, 2)), (1, 2, 2), size=0.1)
    noise_variance = 0.5
    reached, solver = [model.closed_form(noise_variance)], FixedPointSolver(rate)
    for _ in range(60):
        model.to_mode(noise_variance)
        moved = solver.step(
            model.objective(noise_variance, learned=True), model.hyperparameters(noise_variance)
        )
        noise_variance = math.exp(-moved[-1].item())  # the precisions stay
        reached.append(model.closed_form(noise_variance))
    assert all(b >= a - 1e-9 for a, b in pairwise(reached))  # it never overshoots
    up, down = (model.closed_form(noise_variance * math.exp(h)) for h in (1e-3, -1e-3))
    assert up < reached[-1] > down
    assert (up - down) / 2e-3 == pytest.approx(0.0, abs=1e-4)


# ── a noise for each output

UNLIKE = (0.05, 0.5, 5.0)


def unlike_model(size=1.0):
    return linear_model(lambda: FC(2, 3, (1, 3), (1, 3)), (2, 1, 3), size)


@pytest.mark.parametrize("at", [UNLIKE, (0.3, 0.3, 0.3), UNLIKE[::-1]], ids=str)
def test_evidence_at_unlike_noises_is_bayesian_linear_regression(at):
    # Each output has weights of its own, so it is exact wherever it was measured.
    model = unlike_model()
    model.to_mode(UNLIKE)
    found = model.objective(at, learned=True).evidence(model.hyperparameters(UNLIKE))
    assert found.value == pytest.approx(model.closed_form(UNLIKE), rel=0, abs=1e-6)


def test_noises_come_to_where_each_regression_by_itself_has_them():
    # Of three outputs with weights of their own each is a Bayesian linear regression.
    model, apart = unlike_model(), []
    model.targets *= torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
    precision = model.prior.precisions()["layer0.weight"]
    model.prior.set_precision("layer0.bias", precision)
    design = torch.cat([model.inputs.flatten(1), torch.ones(25, 1, dtype=torch.float64)], 1)
    solver = FixedPointSolver(1.0)
    for target in model.targets.T:
        variance, precisions = 0.5, torch.full((7,), precision, dtype=torch.float64)
        for _ in range(300):
            weights = linear_regression_map(design, target, precisions, variance)
            hessian = design.T @ design / variance + torch.diag(precisions)
            gamma = 7 - (precisions / hessian.inverse().diagonal().reciprocal()).sum().item()
            left = (target - design @ weights).square().sum().item()
            variance = (left + gamma * variance) / 25
        apart.append(variance)
    assert max(apart) > 10 * min(apart)
    found = (0.5, 0.5, 0.5)
    for _ in range(300):
        model.to_mode(found)
        at = model.hyperparameters(found)
        moved = solver.step(model.objective(found, learned=True), at)
        found = tuple((-moved[-3:]).exp().tolist())
    assert found == pytest.approx(apart, rel=1e-6)


def dense_dimensions(factor, parts, precision):
    """tr H_k (H + δ)⁻¹ from dense matrices, with H_k of the k-th part of the right factor."""
    of_outputs = [Kronecker(dense(factor.left), part).to_dense() for part in parts]
    whole = sum(of_outputs)
    inverse = torch.linalg.inv(whole + precision * torch.eye(len(whole), dtype=whole.dtype))
    return [torch.trace(part @ inverse).item() for part in of_outputs]


def unlike_case():
    case = BY_NAME["all-gaussian"]
    network, inputs = case.network(), case.inputs(9)
    prior = LayerwisePrior(dict(network.named_parameters()))
    targets, weights = case.targets(network(inputs).detach()), torch.rand(9).double() + 0.5
    variances = tuple(torch.logspace(-1.0, 0.5, targets.shape[1]).tolist())
    return network, (inputs, targets, weights), prior, Gaussian(variances, True)


def test_dimensions_of_each_output_against_dense_matrices():
    network, batch, prior, likelihood = unlike_case()
    objective = laplace(network, likelihood, batch, prior)
    parts = kronecker_factors(network, likelihood, [batch], apart=True).parts
    for name, spectrum in objective.spectra.items():
        found = spectrum.dimensions_of_outputs(0.7)
        expected = dense_dimensions(objective.factors[name], parts[name], 0.7)
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert found.sum().item() == pytest.approx(spectrum.effective_dimensions(0.7).item())


def test_by_traces_dimensions_are_right_where_outputs_are_alike(monkeypatch):
    monkeypatch.setattr("sklearn_softeq.curvature.APART_NUMBERS", 0)
    model = unlike_model()
    found = model.objective((0.3,) * 3, learned=True)
    for spectrum in found.spectra.values():
        apart = spectrum.dimensions_of_outputs(1.3)
        whole = spectrum.effective_dimensions(1.3).expand(3) / 3
        torch.testing.assert_close(apart, whole)
    # And in any case they are those of the layer, dealt out by the traces of the parts.
    network, batch, prior, likelihood = unlike_case()
    objective = laplace(network, likelihood, batch, prior)
    monkeypatch.undo()
    parts = kronecker_factors(network, likelihood, [batch], apart=True).parts
    for name, spectrum in objective.spectra.items():
        traces = parts[name].diagonal(dim1=2, dim2=3).sum(2)  # (K, B)
        expected = (traces / traces.sum(0))[..., None].expand_as(spectrum.shares)
        torch.testing.assert_close(spectrum.shares, expected)


def test_figures_at_noises_that_have_changed_a_little():
    # To first order in how unlike the changes are they are those that are found there.
    network, batch, prior, likelihood = unlike_case()
    here = laplace(network, likelihood, batch, prior)
    way = torch.linspace(-1, 1, len(likelihood.variances), dtype=torch.float64)
    errors = []
    for size in (0.2, 0.1):
        at = torch.cat([prior.log_precision, torch.tensor(here.noise.log_precisions).double()])
        at[-len(way) :] += size * way
        moved = likelihood.with_log_hyperparameters(at[-len(way) :].tolist())
        there = laplace(network, moved, batch, prior)
        found, expected = here.evidence(at), there.evidence(at)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)
        errors.append(abs(found.log_det_ratio - expected.log_det_ratio))
    assert errors[0] < 0.01 * expected.log_det_ratio
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)


def test_gradient_in_unlike_noises_against_central_differences():
    network, batch, prior, likelihood = unlike_case()
    with torch.no_grad():
        batch = (batch[0], network(batch[0]) + 0.1 * batch[1], batch[2])
    objective = laplace(network, likelihood, batch, prior)
    n_noises = len(likelihood.variances)
    at = torch.cat([prior.log_precision + 6, -torch.rand(n_noises, dtype=torch.float64)])
    assert_gradient(objective, at)


def test_more_dimensions_than_numbers_ask_for_more_noise_and_no_more_than_that():
    # Block by block γ may exceed N K; MacKay's formula would divide by a negative number.
    case = BY_NAME["all-gaussian"]
    network = case.network()
    prior = LayerwisePrior(dict(network.named_parameters()), 1e-4)
    inputs = case.inputs(3)
    batch = (inputs, network(inputs).detach(), torch.ones(3, dtype=torch.float64))
    objective = laplace(network, Gaussian(1e-3, True), batch, prior)
    at = torch.cat([prior.log_precision, torch.tensor([math.log(1e3)], dtype=torch.float64)])
    assert sum(objective.effective_dimensions(at).values()) > objective.noise.n_numbers
    moved = FixedPointSolver(1.0).step(objective, at)
    assert at[-1] - 2.0 <= moved[-1] < at[-1]
    assert objective.gradient(at)[-1] < 0


def test_neither_charges_nor_the_growing_weight_touch_the_noise():
    model = linear_model(lambda: FC(2, 3, (2, 3)), (2, 2, 3))
    model.to_mode(0.7)
    objective, at = model.objective(0.7, learned=True), model.hyperparameters(0.7)
    other = replace(objective, charges={"layer0.weight": 4.0}, log_det_weight=0.2)
    for ours, theirs in zip(objective.balance(at), other.balance(at), strict=True):
        assert ours[-1] == theirs[-1]
    assert objective.balance(at)[0][0] != other.balance(at)[0][0]


# ── the gradient


@each_network
def test_gradient_against_central_differences(case):
    objective, prior, _ = objective_of(case)
    at = torch.randn(len(prior.index), dtype=torch.float64)
    slope, h = objective.gradient(at), 1e-4
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = h
        up, down = (objective.evidence(at + s).value for s in (step, -step))
        assert (up - down) / (2 * h) == pytest.approx(slope[i].item(), rel=1e-5, abs=1e-5)


@each_network
def test_effective_dimensions_lie_between_none_and_all(case):
    objective, prior, network = objective_of(case)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    for log_delta in (-9.0, 0.0, 9.0):
        at = torch.full((len(prior.index),), log_delta, dtype=torch.float64)
        found = objective.effective_dimensions(at)
        assert set(found) == set(sizes)
        assert all(0 <= found[name] <= sizes[name] for name in sizes)


def test_balance_has_an_entry_for_each_tensor():
    objective, prior, network = objective_of(BY_NAME["all"])
    gamma, squares = objective.balance(prior.log_precision)
    found = objective.effective_dimensions(prior.log_precision)
    norms = squared_norms(dict(network.named_parameters()))
    for name, i in prior.index.items():
        assert gamma[i].item() == pytest.approx(found[name])
        assert squares[i].item() == pytest.approx(norms[name])


def test_tensors_that_are_not_in_use_count_for_nothing():
    case = BY_NAME["all"]
    network = case.network()
    prior = LayerwisePrior(dict(network.named_parameters()))
    network.blocks[0].enabled["fc"] = False
    objective = laplace(network, case.likelihood, case.batch(network), prior)
    before = objective.evidence(prior.log_precision)
    i = prior.index["blocks.0.fc.weight"]
    prior.log_precision[i] = 3.0
    assert objective.evidence(prior.log_precision) == before
    assert objective.gradient(prior.log_precision)[i] == 0


def test_the_weight_of_the_log_determinants_multiplies_all_charges():
    plain, prior, _ = objective_of(BY_NAME["all"])
    charges = {"blocks.0.fc.weight": 2.0}
    part = replace(plain, charges=charges, log_det_weight=0.3)
    at = torch.randn(len(prior.index), dtype=torch.float64)
    assert part.evidence(at) == plain.evidence(at)
    charges = {name: 0.3 * charges.get(name, 1.0) for name in plain.spectra}
    assert torch.equal(part.gradient(at), replace(plain, charges=charges).gradient(at))


def test_a_charge_multiplies_the_log_determinant_in_the_ascent_only():
    plain, prior, _ = objective_of(BY_NAME["all"])
    charged = replace(plain, charges={"blocks.0.fc.weight": 2.0})
    at = torch.randn(len(prior.index), dtype=torch.float64)
    assert charged.evidence(at) == plain.evidence(at)
    i, h = prior.index["blocks.0.fc.weight"], 1e-4
    step = torch.zeros_like(at)
    step[i] = h
    up, down = (charged.evidence(at + s) for s in (step, -step))
    twice = [e.log_likelihood - 0.5 * e.scatter - e.log_det_ratio for e in (up, down)]
    slope = charged.gradient(at)
    assert slope[i].item() == pytest.approx((twice[0] - twice[1]) / (2 * h), rel=1e-5)
    others = torch.arange(len(at)) != i
    assert torch.equal(slope[others], plain.gradient(at)[others])
    end = ascend(FixedPointSolver(), charged, prior.log_precision, 300)
    assert end[i].exp().item() == pytest.approx(
        2
        * charged.effective_dimensions(end)["blocks.0.fc.weight"]
        / charged.squared_norms["blocks.0.fc.weight"]
    )


# ── the ascent


@each_network
def test_fixed_point_is_stationary(case):
    objective, prior, _ = objective_of(case)
    end = ascend(FixedPointSolver(), objective, prior.log_precision, 300)
    low, high = LOG_PRECISION_BOUNDS
    assert ((end > low) & (end < high)).all()
    assert objective.gradient(end).abs().max() < 1e-8
    gamma, squares = objective.balance(end)
    torch.testing.assert_close(end.exp(), gamma / squares)


def test_one_undamped_and_one_damped_step():
    objective, prior, _ = objective_of(BY_NAME["all"])
    # Near the fixed point no step meets its largest length, 2.
    end = ascend(FixedPointSolver(), objective, prior.log_precision, 300)
    start = end + 0.5 * torch.rand(len(prior.index), dtype=torch.float64)
    before = start.clone()
    gamma, squares = objective.balance(start)
    target = (gamma / squares).log()
    torch.testing.assert_close(FixedPointSolver(rate=1.0).step(objective, start), target)
    quarter = FixedPointSolver(rate=0.25).step(objective, start)
    torch.testing.assert_close(quarter, 0.75 * start + 0.25 * target)
    far = FixedPointSolver(rate=1.0).step(objective, end - 5.0)
    assert ((far - end + 5.0) <= 2.0 + 1e-12).all()
    assert torch.equal(start, before)


@each_network
def test_adam_ascends_to_the_same_optimum(case):
    objective, prior, _ = objective_of(case)
    solver, start = AdamSolver(), prior.log_precision
    early = ascend(solver, objective, start, 10)
    assert objective.evidence(early).value > objective.evidence(start).value
    adam = ascend(solver, objective, early, 400)
    assert objective.evidence(adam).value > objective.evidence(early).value
    fixed = ascend(FixedPointSolver(), objective, prior.log_precision, 300)
    torch.testing.assert_close(adam, fixed, atol=0.02, rtol=0)
    best = objective.evidence(fixed).value
    assert objective.evidence(adam).value == pytest.approx(best, abs=1e-2)


def test_adam_is_the_published_recursion_and_its_moments_last():
    first, prior, _ = objective_of(BY_NAME["all"])
    second, *_ = objective_of(BY_NAME["all"], n=7)
    solver = AdamSolver(rate=0.1)
    at = expected = prior.log_precision.clone()
    m, v = torch.zeros_like(at), torch.zeros_like(at)
    for t, objective in enumerate([first] * 5 + [second] * 5, start=1):
        g = objective.gradient(expected)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = expected + 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        at = solver.step(objective, at)
        torch.testing.assert_close(at, expected)


def test_adam_steps_from_the_point_it_is_given():
    objective, prior, _ = objective_of(BY_NAME["all"])
    solver = AdamSolver(rate=0.1)
    solver.step(objective, prior.log_precision)
    elsewhere = prior.log_precision - 3.0
    assert (solver.step(objective, elsewhere) - elsewhere).abs().max() < 0.2


def small(left, right, square):
    """One tensor of one block with these eigenvalues and ‖w‖²."""
    values = [torch.tensor([v], dtype=torch.float64) for v in (left, right)]
    return LaplaceEvidence(0.0, {"w": Spectrum(*values)}, {"w": square}, {"w": 0})


@pytest.mark.parametrize("solver", HYPER_SOLVERS)
@pytest.mark.parametrize(
    ("objective", "bound"),
    [
        (small([1e3], [1e3], 1e-40), 1),  # free to grow: the weights are zero
        (small([1e6], [1e6], 1e-12), 1),
        (small([0.0], [1.0], 1.0), 0),  # weights without curvature
        (small([1e-9, 0.0], [1e-9], 1e3), 0),
    ],
)
def test_bounds_are_kept(solver, objective, bound):
    near = torch.full((1,), 0.99 * LOG_PRECISION_BOUNDS[bound], dtype=torch.float64)
    end = ascend(HYPER_SOLVERS[solver](), objective, near, 20)
    assert end.item() == LOG_PRECISION_BOUNDS[bound]


@pytest.mark.parametrize("solver", HYPER_SOLVERS)
def test_a_silent_tensor_leaves_its_precision_alone(solver):
    live = Spectrum(*(torch.tensor([[1.0, 3.0]], dtype=torch.float64) for _ in range(2)))
    silent = spectra({"w": Kronecker(torch.zeros(2, 3, 3), torch.zeros(2, 2, 2))})["w"]
    objective = LaplaceEvidence(
        0.0,
        {"live": live, "silent": silent},
        {"live": 1.0, "silent": 0.0},
        {"live": 0, "silent": 1},
    )
    end = ascend(HYPER_SOLVERS[solver](), objective, torch.full((2,), 3.5, dtype=torch.float64), 20)
    assert end[0] != 3.5
    assert end[1] == 3.5


# ── a toy whose truth is known: y = W x + 0.3 ε in R⁸, W a circulant of three taps plus ε_b R

BREAKING = (0.0, 0.1, 0.3, 1.0, None)  # None: no symmetry at all, W = 3 R
PATHS = {"fc": ("fc",), "conv": ("conv",), "sum": ("fc", "conv")}
N_TOY, SIDE = 30, 8


def toy_data(breaking, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    taps = normal(3)
    circulant = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for i in range(SIDE):
        for a in range(3):
            circulant[i, (i + a - 1) % SIDE] = taps[a]
    dense = normal(SIDE, SIDE)
    dense *= circulant.norm() / dense.norm()
    truth = 3 * dense if breaking is None else circulant + breaking * dense
    x = normal(N_TOY, SIDE)
    return x[:, None, None], x @ truth.T + 0.3 * normal(N_TOY, SIDE)


def fit_toy(pathways, inputs, targets, n_passes=20):
    """Precisions at their fixed point, noise, and weights at their mode, in turns."""
    kinds = {"fc": FC, "conv": Conv}
    paths = {name: kinds[name](1, 1, (1, SIDE)) for name in pathways}
    model = LinearModel(PathwaySum(paths, (1, 1), 1.0), inputs, targets)
    solver, noise = FixedPointSolver(rate=1.0), targets.var().item()
    for _ in range(n_passes):
        model.to_mode(noise)
        objective = model.objective(noise)
        at = model.prior.log_precision.clone()
        seen = {
            "kronecker": objective.evidence(at).value / targets.numel(),
            "exact": model.closed_form(noise) / targets.numel(),
            "gamma": objective.effective_dimensions(at),
            "precision": model.prior.precisions(),
        }
        model.prior.log_precision.copy_(ascend(solver, objective, at, 3))
        residual = (targets - model.network(inputs)).square().sum().item()
        noise = residual / (targets.numel() - sum(seen["gamma"].values()))
    return {**seen, "error": equivariance_error(model.network)}


def equivariance_error(network):
    """‖f(g h) − g f(h)‖ / ‖f(h)‖, root mean square over all shifts g."""
    inputs = torch.randn(500, 1, 1, SIDE, dtype=torch.float64)
    with torch.no_grad():
        outputs = network(inputs)
        changes = [network(inputs.roll(g, 3)) - outputs.roll(g, 1) for g in range(1, SIDE)]
    return math.sqrt(mean(c.square().sum().item() for c in changes)) / outputs.norm().item()


@pytest.fixture(scope="module")
def toy():
    """Fits by degree of breaking: a list over seeds of {model: fit}."""
    torch.manual_seed(0)
    return {
        breaking: [
            {name: fit_toy(paths, *toy_data(breaking, seed)) for name, paths in PATHS.items()}
            for seed in range(3)
        ]
        for breaking in BREAKING
    }


def over_seeds(toy, value):
    return [mean(value(fits) for fits in toy[breaking]) for breaking in BREAKING]


def rises(values):
    return all(b > a for a, b in pairwise(values))


def test_toy_precision_of_the_free_path_falls_with_the_breaking(toy):
    found = over_seeds(toy, lambda f: math.log(f["sum"]["precision"]["layer0.fc.weight"]))
    assert rises([-value for value in found])
    assert found[0] > 6
    assert found[-1] < 1


def test_toy_effective_dimensions_of_the_free_path_rise_with_the_breaking(toy):
    found = over_seeds(toy, lambda f: f["sum"]["gamma"]["layer0.fc.weight"])
    assert rises(found)
    assert found[0] < 8
    assert 60 < found[-1] < 64


def test_toy_equivariance_error_rises_with_the_breaking(toy):
    found = over_seeds(toy, lambda f: f["sum"]["error"])
    assert rises(found)
    assert found[0] < 0.05
    assert found[-1] > 1.2


def test_toy_sum_is_as_good_as_the_best_of_its_parts(toy):
    """Evidence per output, exactly and with the blocks between the pathways dropped."""
    for fits in (f for seeds in toy.values() for f in seeds):
        for kind in ("exact", "kronecker"):
            best = max(fits["fc"][kind], fits["conv"][kind])
            assert fits["sum"][kind] >= best - 1e-2


def test_toy_dropped_blocks_cost_little_and_only_ever_cost(toy):
    """A determinant is at most the product of those of its blocks: the estimate is a bound."""
    cost = over_seeds(toy, lambda f: f["sum"]["exact"] - f["sum"]["kronecker"])
    every = [f[m]["exact"] - f[m]["kronecker"] for seeds in toy.values() for f in seeds for m in f]
    assert min(every) > -1e-9
    # Charged twice: the three taps, where both paths are in use; 0.29 nat a datum at most here.
    assert max(every) < 0.05
    assert max(cost) == max(cost[1:4]) > 5e-3
    alone = [
        f[m]["exact"] - f[m]["kronecker"] for s in toy.values() for f in s for m in ("fc", "conv")
    ]
    assert max(alone) < 2e-3


def test_toy_evidence_knows_which_model_is_true(toy):
    """Ties at the ends; between them the sum wins, and neither part is right throughout."""
    fc, conv, both = (over_seeds(toy, lambda f, m=m: f[m]["kronecker"]) for m in PATHS)
    assert both[0] == pytest.approx(conv[0], abs=1e-2)
    assert both[-1] == pytest.approx(fc[-1], abs=1e-2)
    assert conv[0] > fc[0] + 0.2
    assert fc[-1] > conv[-1] + 0.5
    for i in (1, 2, 3):
        assert both[i] > max(fc[i], conv[i]) + 0.02
