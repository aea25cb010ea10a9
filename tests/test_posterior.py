"""The covariance of the outputs against dense matrices, for every layer; shares."""

import math
from functools import partial

import pytest
import torch
from cases import APPROXIMATE, EXACT, LAYERS, chain
from references import close as close_to
from references import ggn, jacobians, linearised_covariance

from sklearn_softeq import posterior
from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.kronecker import Kronecker, dense
from sklearn_softeq.layers import FC
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.networks import build_network
from sklearn_softeq.posterior import Posterior, output_covariance, rows_of_a_prediction

each_case = pytest.mark.parametrize("case", EXACT + APPROXIMATE, ids=str)


close = partial(close_to, tol=1e-9)


def factors_of(network, likelihood, *batches):
    return kronecker_factors(network, likelihood, batches).factors


def precisions_of(factors):
    return {name: 0.3 + 0.2 * i for i, name in enumerate(factors)}


def posterior_of(factors, dtype=torch.float64):
    return Posterior.from_curvature(factors, precisions_of(factors), dtype)


def assert_covariance(network, factors, inputs, directions):
    found = posterior_of(factors)
    tensors = {name: (t.precision, t.shares) for name, t in found.tensors.items()}
    curvature = {name: kron.to_dense() for name, kron in factors.items()}
    expected = linearised_covariance(network, inputs, curvature, tensors)
    expected = directions @ expected @ directions.T
    outputs, covariance = output_covariance(network, found, inputs, directions)
    close(outputs, network(inputs).detach())
    close(covariance, expected)
    outputs, variance = output_covariance(network, found, inputs, directions, diagonal=True)
    close(outputs, network(inputs).detach())
    close(variance, expected.diagonal(dim1=1, dim2=2))


@each_case
def test_covariance_of_networks_against_the_dense_one(case):
    network = case.network()
    inputs, targets, weights = case.batch(network)
    factors = factors_of(network, case.likelihood, (inputs, targets, weights))
    n_outputs = network(inputs).shape[1]
    directions = torch.randn(min(n_outputs + 1, 5), n_outputs, dtype=torch.float64)
    assert_covariance(network, factors, case.inputs(3), directions)


# Of a dense matrix of several thousand weights the eigenvectors take half a minute.
SMALL = [case for case in LAYERS if case.kind != "fc" or math.prod(case.grid) <= 16]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_covariance_of_each_layer_against_the_dense_one(case):
    network, inputs = chain(case.pathway()), case.inputs(5)
    outputs = network(inputs)
    batch = (inputs, torch.zeros_like(outputs), torch.ones(5, dtype=torch.float64))
    factors = factors_of(network, Gaussian(0.7), batch)
    directions = torch.randn(3, outputs.shape[1], dtype=torch.float64)
    assert_covariance(network, factors, case.inputs(2), directions)


@pytest.mark.parametrize("numbers", [1, 40, 300])
def test_products_in_parts_are_the_same(monkeypatch, numbers):
    case = APPROXIMATE[0]
    network = case.network()
    factors = factors_of(network, case.likelihood, case.batch(network))
    monkeypatch.setattr(posterior, "PRODUCT_NUMBERS", numbers)
    assert_covariance(network, factors, case.inputs(6), torch.eye(3, dtype=torch.float64))


def test_closed_form_of_a_linear_regression():
    network = chain(FC(2, 3, (2, 2), (2, 2))).double()
    inputs, noise, precision = torch.randn(20, 2, 2, 2, dtype=torch.float64), 0.4, 1.7
    batch = (inputs, torch.randn(20, 3, dtype=torch.float64), torch.ones(20, dtype=torch.float64))
    factors = factors_of(network, Gaussian(noise), batch)
    only = {"layer0.weight": factors["layer0.weight"]}  # the bias is taken as known
    found = Posterior.from_curvature(only, {"layer0.weight": precision}, torch.float64)
    new = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    _, covariance = output_covariance(network, found, new, torch.eye(3, dtype=torch.float64))
    design, phi = inputs.flatten(1), new.flatten(1)
    inverse = torch.linalg.inv(design.T @ design / noise + precision * torch.eye(8).double())
    expected = (phi @ inverse * phi).sum(1)
    close(covariance, expected[:, None, None] * torch.eye(3, dtype=torch.float64))


# ── shares


@each_case
def test_shares_are_of_one(case):
    network = case.network()
    found = posterior_of(factors_of(network, case.likelihood, case.batch(network)))
    shares = torch.cat([tensor.shares for tensor in found.tensors.values()])
    assert shares.min() >= 0.01 / len(shares)
    assert shares.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_never_more_uncertain_than_the_whole_matrix(case):
    network = case.network()
    batch = case.batch(network)
    found = posterior_of(factors_of(network, case.likelihood, batch))
    whole, _ = ggn(network, case.likelihood, *batch[::2])
    every = jacobians(network, batch[0])
    jacobian = torch.cat(list(every.values()), 2).detach()
    precisions = precisions_of(found.tensors)
    delta = torch.cat(
        [torch.full((j.shape[2],), precisions[n], dtype=torch.float64) for n, j in every.items()]
    )
    expected = jacobian @ torch.linalg.inv(whole + torch.diag(delta)) @ jacobian.transpose(1, 2)
    eye = torch.eye(jacobian.shape[1], dtype=torch.float64)
    _, covariance = output_covariance(network, found, batch[0], eye)
    least = torch.linalg.eigvalsh(expected - covariance).min().item()
    assert least > -1e-8 * expected.abs().max().item()
    assert (covariance.diagonal(dim1=1, dim2=2) > 0).any()


def left_over(factors, precisions, shares):
    """tr(H Σ), summed over blocks."""
    total = 0.0
    for name, kron in factors.items():
        for block, share in zip(blocks_of(kron), shares[name], strict=True):
            h = torch.linalg.eigvalsh(block)
            total += (share * h / (h + share * precisions[name])).sum().item()
    return total


def blocks_of(kron):
    whole = kron.to_dense()
    size = len(whole) // len(dense(kron.left))
    return [whole[i : i + size, i : i + size] for i in range(0, len(whole), size)]


def test_shares_leave_the_most():
    case = APPROXIMATE[3]
    network = case.network()
    factors = factors_of(network, case.likelihood, case.batch(network))
    precisions = precisions_of(factors)
    shares = {n: t.shares for n, t in posterior_of(factors).tensors.items()}
    best, n_blocks = left_over(factors, precisions, shares), sum(map(len, shares.values()))
    equal = {n: torch.full_like(s, 1 / n_blocks) for n, s in shares.items()}
    assert best > left_over(factors, precisions, equal)
    for _ in range(50):
        other = {n: s + 0.05 * torch.rand_like(s) for n, s in shares.items()}
        total = sum(s.sum() for s in other.values())
        other = {n: s / total for n, s in other.items()}
        assert left_over(factors, precisions, other) < best * (1 + 0.01)


def test_where_nothing_was_determined_all_is_prior():
    zero = torch.zeros(1, 2, 2, dtype=torch.float64)
    found = Posterior.from_curvature({"w": Kronecker(zero, zero)}, {"w": 4.0}, torch.float64)
    assert found.tensors["w"].shares.tolist() == [1.0]
    assert (found.eigenvalues("w") == 0.25).all()


# ── the value


def setting(dtype=torch.float32, n_outputs=3, width=4):
    network = build_network(
        (1, 8, 8), n_outputs, pathways=("conv", "factored_fc", "fc"), width=width, dtype=dtype
    )
    inputs = torch.randn(20, 1, 8, 8, dtype=dtype)
    targets, weights = torch.randint(n_outputs, (20,)), torch.ones(20, dtype=dtype)
    return network, posterior_of(
        factors_of(network, Categorical(), (inputs, targets, weights)), dtype
    )


def test_packed_and_back():
    _, found = setting()
    again = Posterior.unpacked(found.packed())
    for name, tensor in found.tensors.items():
        assert again.tensors[name][:3] == tensor[:3]
        assert torch.equal(again.tensors[name].shares, tensor.shares)
    for basis, expected in zip(again.bases, found.bases, strict=True):
        assert torch.equal(basis.values, expected.values)
        assert torch.equal(basis.vectors, expected.vectors)
        assert basis.vectors.dtype == torch.float32
    assert again.nbytes == found.nbytes
    assert "tensors" in repr(found)
    assert len(repr(found)) < 60


def test_the_gradient_factor_of_a_bias_is_kept_once():
    _, found = setting()
    weight, bias = (found.tensors[f"head.output.{kind}"] for kind in ("weight", "bias"))
    assert weight.right == bias.right


def test_roots_stay_small():
    _, found = setting()
    (left, _), *_ = [
        found.of(name) for name in found.tensors if name.endswith("blocks.0.fc.weight")
    ]
    assert left.vectors.shape == (1, 64, 20)  # of 20 rows


def test_only_some_tensors():
    network, found = setting()
    names = ["head.output.weight", "head.output.bias", "of.nothing"]
    kept = found.keep(names)
    assert list(kept.tensors) == names[:2]
    assert kept.nbytes < found.nbytes
    inputs, eye = torch.randn(3, 1, 8, 8), torch.eye(3)
    assert all(torch.equal(kept.of(n)[1].vectors, found.of(n)[1].vectors) for n in names[:2])
    _, all_of_it = output_covariance(network, found, inputs, eye)
    _, covariance = output_covariance(network, kept, inputs, eye)
    assert (covariance.diagonal(dim1=1, dim2=2) < all_of_it.diagonal(dim1=1, dim2=2)).all()
    assert torch.equal(kept.to(torch.device("cpu")).bases[0].vectors, kept.bases[0].vectors)


def test_single_precision_is_near_the_double():
    torch.manual_seed(1)
    network, found = setting(torch.float64)
    inputs, eye = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.eye(3)
    _, expected = output_covariance(network, found, inputs, eye)
    plain = found.packed()
    plain["bases"] = [[a.astype("float32") for a in pair] for pair in plain["bases"]]
    plain["tensors"] = {n: [*t[:3], t[3].astype("float32")] for n, t in plain["tensors"].items()}
    single = Posterior.unpacked(plain)
    _, covariance = output_covariance(network.float(), single, inputs.float(), eye)
    close(covariance, expected, tol=1e-4)


def test_nothing_is_left_on_the_network():
    network, found = setting()
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    output_covariance(network, found, torch.randn(2, 1, 8, 8), torch.eye(3))
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())


def test_rows_of_a_pass_go_by_sizes():
    network, found = setting()
    rows = partial(rows_of_a_prediction, network, found)
    assert rows(1) % 16 == rows(100) % 16 == 0
    assert rows(10_000) == 1 < rows(2000) == 16 < rows(100) <= rows(1) <= 128
