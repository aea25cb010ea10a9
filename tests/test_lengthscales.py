"""Lengthscales of maps given at anchors: their gradient, and where the ascent ends."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from cases import NetworkCase, chain
from objectives import LinearModel, ascend, laplace
from references import output_hessian
from torch import nn

from sklearn_softeq import assembly
from sklearn_softeq.anchors import LOG_OMEGA_BOUNDS
from sklearn_softeq.hyperparameters import LayerwisePrior
from sklearn_softeq.layers import FC, PathwaySum, SparseConv, SparseFC, SparseU, SparseV
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.marginal_likelihood import FixedPointSolver, LengthscaleSolver
from sklearn_softeq.networks import build_network


def maps_of(network):
    """The maps that are given at anchors, by name."""
    kinds = (SparseU, SparseV, SparseConv)
    return {name: m for name, m in network.named_modules() if isinstance(m, kinds)}


@contextmanager
def lengthscale(layer, log_omega):
    """A map at another ω, for a while."""
    before = layer.interpolation.log_omega.item()
    layer.interpolation.set_log_omega(log_omega)
    yield
    layer.interpolation.set_log_omega(before)


# ── the slow twin: moments of activations and gradients in pixels, taken once; Ψ(ω) around them


@dataclass
class PixelMoments:
    """A and Γ of the blocks of a map before its interpolation: Ψ acts on the one or the other."""

    left: torch.Tensor  # (B, d, d)
    right: torch.Tensor
    moves: str
    n_fields: int  # Ψ acts on each of them: the channels of a patch

    def at(self, psi):
        """A and Γ with Ψ A Ψᵀ, or Ψ Γ Ψᵀ."""
        psi = torch.block_diag(*[psi] * self.n_fields)
        left, right = (
            psi @ moments @ psi.T if self.moves == side else moments
            for side, moments in (("left", self.left), ("right", self.right))
        )
        return left, right


def moments_of_u(layer, x, grads, weights, hessian):
    x = x.flatten(2)  # (n, C, X), gradients (K, C, n, D)
    left = torch.einsum("n,ncx,ncy->cxy", weights, x, x)
    right = torch.einsum("n,nkl,kcnd,lcne->cde", weights, hessian, grads, grads)
    return PixelMoments(left, right, "left", 1)


def moments_of_v(layer, hidden, grads, weights, hessian):
    left = torch.einsum("n,cnd,end->dce", weights, hidden, hidden)  # hidden (C, n, D)
    right = torch.einsum("n,nkl,kdny,ldnz->dyz", weights, hessian, grads, grads)
    return PixelMoments(left, right, "right", 1)


def moments_of_conv(layer, x, grads, weights, hessian):
    reach = [range(1) if side == 1 else range(-1, 2) for side in x.shape[2:]]
    taps = [torch.roll(x, (-i, -j), (2, 3)) for i, j in product(*reach)]
    rows, columns = layer.stride
    patches = torch.stack(taps, 2)[..., ::rows, ::columns].flatten(3)  # (n, C, k², Y)
    patches = patches.flatten(1, 2)
    left = torch.einsum("n,nay,nby->ab", weights, patches, patches)[None]
    grads = grads.flatten(3)  # (K, n, D, Y)
    right = torch.einsum("n,nkl,kndy,lney->de", weights, hessian, grads, grads)[None]
    return PixelMoments(left, right / grads.shape[3], "left", x.shape[1])


MOMENTS = {SparseU: moments_of_u, SparseV: moments_of_v, SparseConv: moments_of_conv}


def pixel_moments(network, likelihood, inputs, weights):
    """Those of every map at its present ω; nothing in them is asked of the map itself."""
    seen = {}
    handles = [
        layer.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args, out)})
        )
        for name, layer in maps_of(network).items()
    ]
    outputs = network(inputs)
    for handle in handles:
        handle.remove()
    hessian = torch.stack([output_hessian(likelihood, f) for f in outputs])  # (n, K, K)
    found = {}
    for name, ((x,), out) in seen.items():
        rows = [torch.autograd.grad(f.sum(), out, retain_graph=True)[0] for f in outputs.T]
        layer = maps_of(network)[name]
        parts = (layer, x.detach(), torch.stack(rows), weights, hessian)
        found[name] = MOMENTS[type(layer)](*parts)
    return found


LOG_PROB = {
    Categorical: lambda _, f, y: torch.distributions.Categorical(logits=f).log_prob(y),
    Gaussian: lambda likelihood, f, y: (
        torch.distributions.Normal(f, likelihood.noise_variance**0.5).log_prob(y).sum(1)
    ),
}


def log_likelihood(network, likelihood, batch):
    inputs, targets, weights = batch
    with torch.no_grad():
        log_prob = LOG_PROB[type(likelihood)](likelihood, network(inputs), targets)
        return (weights * log_prob).sum().item()


def log_det(moments, psi, scale, precision):
    """Σ_b log det(1 + A_b ⊗ Γ_b scale / δ)."""
    total = 0.0
    for a, gamma in zip(*moments.at(psi), strict=True):
        dense = torch.kron(a, gamma) * (scale / precision)
        total += torch.linalg.slogdet(
            torch.eye(len(dense), dtype=dense.dtype) + dense
        ).logabsdet.item()
    return total


# ── the gradient against central differences


def _sum():
    paths = {
        "sparse_conv": SparseConv(2, 3, (4, 4), (2, 2)),
        "fc": FC(2, 3, (4, 4), (2, 2)),
        "sparse_fc": SparseFC(2, 3, (4, 4), (2, 2)),
    }
    return chain(PathwaySum(paths, (2, 2), 0.7), nn.ReLU(), FC(3, 3, (2, 2), (2, 2)))


def _network(*pathways, **options):
    options = {"pathways": pathways, "width": 2, "dtype": torch.float64, **options}
    return lambda: build_network((2, 4, 4), 3, **options)


CASES = [
    NetworkCase("fc", lambda: chain(SparseFC(2, 3, (3, 4))), Gaussian(0.5), (2, 3, 4)),
    NetworkCase("conv", lambda: chain(SparseConv(2, 3, (4, 6), (2, 1))), Gaussian(2.0), (2, 4, 6)),
    NetworkCase("line", lambda: chain(SparseConv(1, 3, (1, 4))), Categorical(), (1, 1, 4)),
    NetworkCase("sum", _sum, Categorical(), (2, 4, 4)),
    NetworkCase("sum-gaussian", _sum, Gaussian(0.3), (2, 4, 4)),
    NetworkCase("network", _network("sparse_conv", "sparse_fc"), Categorical(), (2, 4, 4), n=6),
    NetworkCase(
        "resnet",
        _network("sparse_fc", "conv", "sparse_conv", architecture="resnet", anchor_fraction=0.75),
        Gaussian(0.4),
        (2, 4, 4),
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
BY_NAME = {case.name: case for case in CASES}


@dataclass
class Setting:
    """A network with an ω of its own at each map, and everything its evidence needs."""

    case: NetworkCase

    def __post_init__(self):
        self.network = self.case.network()
        for layer in maps_of(self.network).values():
            layer.interpolation.set_log_omega(torch.empty(()).uniform_(-1.0, 0.8).item())
        self.batch = self.case.batch(self.network)
        self.prior = LayerwisePrior(dict(self.network.named_parameters()))
        self.log_precision = torch.randn(len(self.prior.index), dtype=torch.float64)

    def objective(self, **options):
        options = {"lengthscales": True, **options}
        return laplace(self.network, self.case.likelihood, self.batch, self.prior, **options)

    def slopes(self, total=None, h=1e-4):
        """∂ log p(D | w, ω) and −½ ∂ log det of each map, activations in log det held fixed."""
        inputs, _, weights = self.batch
        seen = weights.sum().item()
        total = seen if total is None else total
        moments = pixel_moments(self.network, self.case.likelihood, inputs, weights)
        found = {}
        for name, layer in maps_of(self.network).items():
            precision = self.log_precision[self.prior.index[f"{name}.weight"]].exp().item()
            at, values = layer.interpolation.log_omega.item(), []
            for step in (h, -h):
                with lengthscale(layer, at + step):
                    fit = log_likelihood(self.network, self.case.likelihood, self.batch)
                    psi = layer.interpolation.matrix
                    capacity = log_det(moments[name], psi, total / seen**2, precision)
                values.append((total / seen * fit, -0.5 * capacity))
            found[name] = [(up - down) / (2 * h) for up, down in zip(*values, strict=True)]
        return found


def agree(found, expected):
    """To 1e-6 of the larger of the two parts of each slope: they may cancel."""
    assert list(found) == list(expected)
    for name, parts in expected.items():
        tolerance = 1e-6 * max(map(abs, parts)) + 1e-12
        assert found[name] == pytest.approx(sum(parts), rel=0, abs=tolerance), name


@each_case
@pytest.mark.parametrize(("total", "charge"), [(None, 1.0), (50.0, 1.0), (50.0, 2.0)])
def test_gradient_against_central_differences(case, total, charge):
    """It is that of the evidence itself: charges, which serve precisions, do not reach it."""
    setting = Setting(case)
    objective = setting.objective(total_weight=total)
    charges = {f"{name}.weight": charge for name in maps_of(setting.network)}
    found = replace(objective, charges=charges).lengthscale_gradient(setting.log_precision)
    expected = setting.slopes(total)
    agree(found, expected)
    agree(objective.slopes, {name: [fit, 0.0] for name, (fit, _) in expected.items()})
    # While the weight of the log determinants grows it counts here, too.
    part = replace(objective, log_det_weight=0.3).lengthscale_gradient(setting.log_precision)
    agree(part, {name: [fit, 0.3 * log_det] for name, (fit, log_det) in expected.items()})
    for name, layer in maps_of(setting.network).items():
        assert (min(map(abs, expected[name])) > 1e-3) == (layer.interpolation.matrix.numel() > 1)


def test_what_is_off_and_what_has_no_lengthscale_have_no_slope():
    setting = Setting(BY_NAME["sum"])
    assert setting.objective(lengthscales=False).lengthscale_gradient(setting.log_precision) == {}
    layer = setting.network.layer0
    layer.enabled["sparse_fc"] = False
    found = setting.objective().lengthscale_gradient(setting.log_precision)
    assert list(found) == ["layer0.sparse_conv"]
    layer.remove("sparse_conv")
    assert setting.objective().lengthscale_gradient(setting.log_precision) == {}


# ── a layer alone with Gaussian noise is Bayesian linear regression: the evidence is exact


class Factor(nn.Module):
    """A factor as a layer: the blocks of its input and output stand behind the rows."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        x = x.transpose(0, 1) if isinstance(self.factor, SparseV) else x
        return self.factor(x).transpose(0, 1)


LINEAR = {
    "U": (lambda: Factor(SparseU(1, (4, 4), 2, 0.5)), (30, 1, 4, 4)),
    "V": (lambda: Factor(SparseV(2, 2, (4, 4), 0.5)), (6, 2, 2)),
    "conv": (lambda: SparseConv(1, 2, (4, 4), (1, 1), 7 / 9), (6, 1, 4, 4)),
}
each_linear = pytest.mark.parametrize(("layer", "shape"), LINEAR.values(), ids=LINEAR)
NOISE = 0.1


def smooth_model(layer, shape, truth):
    """A model of one layer, on data that the same layer made at an ω of its own."""
    inputs = torch.randn(shape, dtype=torch.float64)
    inputs = inputs - inputs.mean(0)  # so that no cross block of weight and bias is dropped
    model = LinearModel(layer(), inputs, None)
    (made_by,) = maps_of(model.network).values()
    made_by.interpolation.set_log_omega(truth)
    with torch.no_grad():
        made_by.weight.normal_()
        clean = model.network(inputs)
    model.targets = clean + NOISE**0.5 * torch.randn_like(clean)
    return model


def set_omega(model, log_omega):
    (layer,) = maps_of(model.network).values()
    layer.interpolation.set_log_omega(log_omega)
    model.linearise()
    return layer.interpolation.log_omega.item()


@each_linear
@pytest.mark.parametrize("at", [-0.7, 0.6])
def test_gradient_of_a_linear_layer_is_that_of_bayesian_linear_regression(layer, shape, at):
    model, h = smooth_model(layer, shape, -0.3), 1e-4
    for i, name in enumerate(model.prior.index):
        model.prior.set_precision(name, 0.4 + 2.1 * i)
    set_omega(model, at)
    model.to_mode(NOISE)
    objective = model.objective(NOISE, lengthscales=True)
    (found,) = objective.lengthscale_gradient(model.prior.log_precision).values()
    values = []
    for step in (h, -h):
        set_omega(model, at + step)
        values.append(model.closed_form(NOISE))
    # The mode moves with ω, too, but there the log joint is flat in the weights.
    assert found == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def ascend_from(model, start, n_steps):
    """log ω, after steps of it in turns with the mode and the fixed point of δ."""
    solver, at = LengthscaleSolver(), set_omega(model, start)
    model.prior.log_precision.zero_()
    for _ in range(n_steps):
        model.to_mode(NOISE)
        objective = model.objective(NOISE, lengthscales=True)
        log_precision = ascend(FixedPointSolver(), objective, model.prior.log_precision, 3)
        model.prior.log_precision.copy_(log_precision)
        gradient = objective.lengthscale_gradient(log_precision)
        (new,) = solver.step(dict.fromkeys(gradient, at), gradient).values()
        at = set_omega(model, new)
    return at


def optimum(model):
    """argmax over log ω of the exact log evidence at the best δ, both on a grid."""
    best = {}
    for log_omega in torch.linspace(*LOG_OMEGA_BOUNDS, 28).tolist():
        set_omega(model, log_omega)
        values = []
        for log_delta in (-2.0, -1.0, 0.0, 1.0, 2.0):
            model.prior.log_precision.fill_(log_delta)
            values.append(model.closed_form(NOISE))
        best[log_omega] = max(values)
    return max(best, key=best.get)


@pytest.mark.parametrize(("name", "truth"), [("U", -0.5), ("U", 0.3), ("V", 0.3), ("conv", -0.5)])
def test_lengthscales_find_the_truth_from_both_sides(name, truth):
    model = smooth_model(*LINEAR[name], truth)
    expected = optimum(model)  # where the data put it; the grid is 0.1 apart
    assert expected == pytest.approx(truth, abs=0.25)
    for start in (truth - 0.6, truth + 0.6):
        found = ascend_from(model, start, 60)
        assert found == pytest.approx(expected, abs=0.1)
        assert abs(found - truth) < 0.4 * abs(start - truth)


# ── the solver


def test_a_step_is_that_of_adam_and_its_moments_last():
    solver, at = LengthscaleSolver(rate=0.05), {"a": -0.2, "b": 0.3}
    m, v = (dict.fromkeys(at, 0.0) for _ in range(2))
    expected = dict(at)
    for t in range(1, 9):
        gradient = {"a": 3.0 - t, "b": 100.0 / t}
        for name, g in gradient.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)) ** 0.5 + 1.0)
            expected[name] += 0.05 * step
        before, at = dict(at), solver.step(at, gradient)
        assert at == pytest.approx(expected, rel=1e-12)
        assert before != at


def test_a_step_begins_where_it_is_told():
    solver = LengthscaleSolver(rate=0.1)
    solver.step({"a": 0.5}, {"a": 1e6})
    assert solver.step({"a": -1.0}, {"a": 1e6})["a"] == pytest.approx(-0.9)


def test_a_slope_of_less_than_a_nat_moves_little():
    steps = {g: LengthscaleSolver(rate=0.1).step({"a": 0.0}, {"a": g})["a"] for g in (0.01, 1, 100)}
    assert steps == pytest.approx({g: 0.1 * g / (g + 1) for g in steps})


@pytest.mark.parametrize(("slope", "bound"), [(1.0, 1), (-1e6, 0)])
def test_bounds_are_kept(slope, bound):
    solver, at = LengthscaleSolver(), {"a": 0.0, "b": 0.1}
    for _ in range(40):
        at = solver.step(at, {"a": slope, "b": 0.0})
    assert at == {"a": LOG_OMEGA_BOUNDS[bound], "b": 0.1}


def test_what_has_no_gradient_stays():
    # Neither a slope of zero nor none at all moves a lengthscale, whatever its past.
    solver, at = LengthscaleSolver(), {"a": 0.1, "b": 0.2, "c": 0.3}
    assert solver.step(at, {}) == {}
    moved = solver.step(at, {"a": 1.0, "b": 0.0})
    assert list(moved) == ["a", "b"]
    assert moved["a"] != 0.1
    assert moved["b"] == 0.2
    assert list(solver.step({**at, **moved}, {"b": 1.0})) == ["b"]  # a has been switched off


@pytest.mark.parametrize(("pathways", "dearer"), [("conv", False), ("sparse_fc", True)])
def test_lengthscales_leave_time_for_fewer_rows_only_where_there_are_any(pathways, dearer):
    network = build_network((1, 16, 16), 10, pathways=(pathways,))
    options = {"n_columns": 9, "curvature": "auto", "samples": 1, "subset": None, "kfac": "expand"}
    with_them, without = (
        assembly._plan(network, 20_000, lengthscales, every=5, **options).n_rows
        for lengthscales in (True, False)
    )
    assert (with_them < without) == dearer
