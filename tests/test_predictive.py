"""Predictions: a row does not know the other rows; integrals over the posterior; log odds."""

import math
import time

import pytest
import torch
from cases import randomise
from references import binary_predictive

from sklearn_softeq import predictive
from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.layers import PATHWAYS
from sklearn_softeq.likelihoods import Categorical
from sklearn_softeq.networks import build_network
from sklearn_softeq.posterior import Posterior
from sklearn_softeq.predictive import laplace_outputs, log_odds, map_outputs, moderated, sampled

DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def network_of(dtype, shape=(1, 16, 16), n_outputs=3, width=4):
    pathways = ("conv", "factored_fc", "fc")
    return randomise(build_network(shape, n_outputs, pathways=pathways, width=width)).to(dtype)


# ── outputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_those_of_the_network(dtype):
    network, images = network_of(dtype), torch.randn(11, 1, 16, 16, dtype=dtype)
    found = map_outputs(network, images, 4)
    assert found.dtype == torch.float64
    assert found.shape == (11, 3)
    assert not found.requires_grad
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, network(images).detach().double(), rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch_size", "n_threads"),
    [(16, 1), (7, 1), (50, 1), pytest.param(16, 2, marks=pytest.mark.slow)],
)
def test_a_row_does_not_depend_on_the_others_to_the_last_bit(dtype, batch_size, n_threads, threads):
    threads(n_threads)
    network, images = network_of(dtype), torch.randn(60, 1, 16, 16, dtype=dtype)
    outputs = map_outputs(network, images, batch_size)
    assert torch.equal(map_outputs(network, images, batch_size), outputs)
    for i in (0, 3, 17, 59):  # alone
        assert torch.equal(map_outputs(network, images[i : i + 1], batch_size), outputs[i : i + 1])
    for k in (1, 5, 58):  # in other batches, at other positions
        assert torch.equal(map_outputs(network, images[k:], batch_size), outputs[k:])
        assert torch.equal(map_outputs(network, images[:k], batch_size), outputs[:k])
    order = torch.randperm(60)
    assert torch.equal(map_outputs(network, images[order], batch_size), outputs[order])
    # Beside rows of another size, too.
    beside = torch.cat([1e3 * images[:5], images[5:20], -1e-3 * images[20:40]])
    assert torch.equal(map_outputs(network, beside, batch_size)[5:20], outputs[5:20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nor_with_two_threads(dtype, threads):
    threads(2)
    network, images = network_of(dtype), torch.randn(20, 1, 16, 16, dtype=dtype)
    outputs = map_outputs(network, images, 16)
    assert torch.equal(map_outputs(network, images[3:4], 16), outputs[3:4])
    assert torch.equal(map_outputs(network, images[5:], 16), outputs[5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 4, 4), (1, 8, 8)])
def test_so_for_other_networks(dtype, shape):
    network = network_of(dtype, shape, n_outputs=2, width=8)
    images = torch.randn(140, *shape, dtype=dtype)
    outputs = map_outputs(network, images, 128)  # the default
    for i in (0, 50, 127, 139):
        assert torch.equal(map_outputs(network, images[i : i + 1], 128), outputs[i : i + 1])
    assert torch.equal(map_outputs(network, images.flip(0), 128), outputs.flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize(
    "pathways",
    [("sparse_conv", "sparse_fc"), ("p4_conv", "conv", "sparse_fc"), ("p4m_conv",)],
    ids="+".join,
)
def test_so_for_other_pathways(dtype, architecture, pathways):
    # Sparse maps choose the cheaper of two orders by the number of rows: it must not be seen.
    options = {"pathways": pathways, "width": 2, "architecture": architecture}
    network = randomise(build_network((1, 8, 8), 3, **options)).to(dtype)
    images = torch.randn(40, 1, 8, 8, dtype=dtype)
    outputs = map_outputs(network, images, 16)
    for i in (0, 17, 39):
        assert torch.equal(map_outputs(network, images[i : i + 1], 16), outputs[i : i + 1])
    assert torch.equal(map_outputs(network, images.flip(0), 16), outputs.flip(0))
    beside = torch.cat([1e3 * images[:5], images[5:20], -1e-3 * images[20:40]])
    assert torch.equal(map_outputs(network, beside, 16)[5:20], outputs[5:20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pathway", PATHWAYS)
@pytest.mark.parametrize(
    ("width", "shape", "fraction"),
    [(3, (1, 2, 3), 0.5), (5, (1, 1, 3), 0.5), (9, (1, 4, 4), 0.6), (10, (1, 8, 8), 0.3)],
)
def test_so_for_sums_of_an_odd_length(dtype, pathway, width, shape, fraction):
    options = {"pathways": (pathway,), "width": width, "anchor_fraction": fraction}
    network = randomise(build_network(shape, 2, **options)).to(dtype)
    images = torch.randn(40, *shape, dtype=dtype)
    outputs = map_outputs(network, images, 128)
    assert torch.equal(map_outputs(network, images.flip(0), 128), outputs.flip(0))
    assert torch.equal(map_outputs(network, images[7:8], 128), outputs[7:8])
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(outputs, network(images).detach().double(), rtol=tol, atol=tol)


def test_outputs_of_no_rows():
    network = network_of(torch.float32)
    assert map_outputs(network, torch.empty(0, 1, 16, 16), 16).shape == (0, 3)


# ── the posterior's predictive


def posterior_of(network, images, n_outputs, precision=1.0):
    targets, weights = torch.arange(len(images)) % n_outputs, torch.ones(len(images))
    batch = (images, targets, weights.to(images.dtype))
    factors = kronecker_factors(network, Categorical(), [batch]).factors
    return Posterior.from_curvature(factors, dict.fromkeys(factors, precision), images.dtype)


def setting(dtype, n_outputs=3, shape=(1, 8, 8), pathways=("conv", "factored_fc", "fc"), n=20):
    network = build_network(shape, n_outputs, pathways=pathways, width=2, dtype=dtype)
    network = randomise(network).to(dtype)
    return network, posterior_of(network, torch.randn(n, *shape, dtype=dtype), n_outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_samples", [None, 7])
@pytest.mark.parametrize(
    "pathways",
    [("conv", "factored_fc", "fc"), ("sparse_conv", "sparse_fc"), ("p4_conv", "conv")],
    ids="+".join,
)
def test_integrals_of_a_row_do_not_depend_on_the_others(dtype, n_samples, pathways, monkeypatch):
    monkeypatch.setattr("sklearn_softeq.posterior.MOST_ROWS", 32)
    network, posterior = setting(dtype, pathways=pathways)
    images = torch.randn(40, 1, 8, 8, dtype=dtype)

    def outputs(rows):
        return laplace_outputs(network, posterior, rows, 3, n_samples)

    together = outputs(images)
    assert together.dtype == torch.float64
    assert together.shape == (40, 3)
    assert not together.requires_grad
    assert torch.equal(outputs(images), together)
    for i in (0, 17, 31, 39):
        assert torch.equal(outputs(images[i : i + 1]), together[i : i + 1])
    assert torch.equal(outputs(images.flip(0)), together.flip(0))
    assert torch.equal(outputs(images[5:]), together[5:])
    beside = torch.cat([1e2 * images[:5], images[5:20], -1e-2 * images[20:40]])
    assert torch.equal(outputs(beside)[5:20], together[5:20])


# The covariance of logits is singular, and a root of it is as exact as the root of the rounding.
@pytest.mark.parametrize(("n_samples", "tol"), [(None, 1e-12), (7, 1e-7)])
def test_row_by_row_where_outputs_are_too_many_for_a_tile(n_samples, tol, monkeypatch):
    network, posterior = setting(torch.float64)
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    expected = laplace_outputs(network, posterior, images, 3, n_samples)
    monkeypatch.setattr("sklearn_softeq.posterior.TILE_NUMBERS", 0)
    found = laplace_outputs(network, posterior, images, 3, n_samples)
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)
    assert torch.equal(laplace_outputs(network, posterior, images[3:4], 3, n_samples), found[3:4])


@pytest.mark.slow
def test_nor_do_they_with_two_threads(threads):
    threads(2)
    network, posterior = setting(torch.float32)
    images = torch.randn(20, 1, 8, 8)
    for n_samples in (None, 7):
        together = laplace_outputs(network, posterior, images, 3, n_samples)
        alone = laplace_outputs(network, posterior, images[3:4], 3, n_samples)
        assert torch.equal(alone, together[3:4])


@pytest.mark.parametrize("n_samples", [None, 50])
def test_without_uncertainty_it_is_the_map(n_samples):
    network, posterior = setting(torch.float64)
    images = torch.randn(9, 1, 8, 8, dtype=torch.float64)
    expected = map_outputs(network, images, 16).softmax(1)
    found = laplace_outputs(network, posterior, images, 3, n_samples, temperature=1e-20)
    torch.testing.assert_close(found.softmax(1), expected, rtol=1e-6, atol=1e-6)


def test_the_hotter_the_milder():
    network, posterior = setting(torch.float64)
    images = torch.randn(9, 1, 8, 8, dtype=torch.float64)
    cold, warm, hot = (
        laplace_outputs(network, posterior, images, 3, 2000, temperature=t).softmax(1).amax(1)
        for t in (1e-4, 1e-2, 1.0)
    )
    assert cold.mean() > warm.mean() > hot.mean()


def test_integrals_of_no_rows_and_of_one_class():
    network, posterior = setting(torch.float32)
    assert laplace_outputs(network, posterior, torch.empty(0, 1, 8, 8), 3).shape == (0, 3)
    network, posterior = setting(torch.float32, n_outputs=1)
    for n_samples in (None, 3):
        found = laplace_outputs(network, posterior, torch.randn(4, 1, 8, 8), 1, n_samples)
        assert found.softmax(1).tolist() == [[1.0]] * 4


def test_no_global_generator_is_touched():
    network, posterior = setting(torch.float32)
    before = torch.get_rng_state()
    laplace_outputs(network, posterior, torch.zeros(2, 1, 8, 8), 3, 10)
    assert torch.equal(torch.get_rng_state(), before)


def centred(n_classes):
    return torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes


def random_covariance(n, n_classes, scale=1.0):
    root = torch.randn(n, n_classes, n_classes, dtype=torch.float64) * scale
    return centred(n_classes) @ root @ root.transpose(1, 2) @ centred(n_classes)


def test_two_classes_are_moderated_as_by_mackay():
    difference, variance = torch.tensor([-3.0, 0.5, 2.0]).double(), torch.tensor([0.1, 4.0, 30.0])
    logits = torch.stack([-difference, difference], 1) / 2
    found = moderated(logits, variance.double()[:, None].expand(-1, 2) / 4)
    expected = difference / (1 + math.pi / 8 * variance.double()).sqrt()
    torch.testing.assert_close(log_odds(found), expected)


def test_moderation_is_near_the_integral():
    for mean, variance in ((0.5, 1.0), (2.0, 4.0), (-3.0, 9.0), (1.0, 30.0)):
        logits = torch.tensor([[-mean / 2, mean / 2]], dtype=torch.float64)
        found = moderated(logits, torch.full((1, 2), variance / 4).double()).softmax(1)
        assert found[0, 1].item() == pytest.approx(binary_predictive(mean, variance), abs=0.02)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_moderation_keeps_the_order_of_equal_variances_and_pulls_to_the_middle(n_classes):
    logits = torch.randn(20, n_classes, dtype=torch.float64) @ centred(n_classes)
    equal = torch.full_like(logits, 3.0)
    found = moderated(logits, equal)
    assert torch.equal(found.argsort(1), logits.argsort(1))
    assert (found.softmax(1).amax(1) <= logits.softmax(1).amax(1)).all()
    assert torch.equal(moderated(logits, 0 * equal), logits)


@pytest.mark.parametrize(("mean", "variance"), [(0.5, 1.0), (2.0, 4.0), (-3.0, 9.0)])
def test_samples_approach_the_integral(mean, variance):
    logits = torch.tensor([[-mean / 2, mean / 2]], dtype=torch.float64)
    ones = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    expected = binary_predictive(mean, variance)
    errors = []
    for n_samples in (100, 100_000):
        found = sampled(logits, variance / 4 * ones[None], n_samples, 1e-15).exp()
        assert found.sum().item() == pytest.approx(1)
        errors.append(abs(found[0, 1].item() - expected))
    assert errors[0] < 0.15
    assert errors[1] < 0.005


def test_samples_and_closed_form_agree_where_both_are_good():
    logits = torch.randn(30, 4, dtype=torch.float64) @ centred(4)
    covariance = random_covariance(30, 4, 0.2)
    closed = moderated(logits, covariance.diagonal(dim1=1, dim2=2)).softmax(1)
    torch.testing.assert_close(
        sampled(logits, covariance, 20_000, 1e-15).exp(), closed, rtol=0, atol=0.04
    )


def test_samples_in_parts_are_the_same(monkeypatch):
    logits, covariance = torch.randn(3, 4).double(), random_covariance(3, 4)
    whole = sampled(logits, covariance, 40, 1e-15)
    monkeypatch.setattr(predictive, "DRAWN_NUMBERS", 12 * 20)
    torch.testing.assert_close(sampled(logits, covariance, 40, 1e-15), whole)


def test_a_covariance_that_is_rounded_below_zero_has_a_root():
    covariance = random_covariance(5, 6)
    covariance[1] -= 1e-5 * torch.eye(6, dtype=torch.float64)  # more than the first jitter
    covariance[2] = 0
    root = predictive._root(covariance, 1e-9)
    found = root @ root.transpose(1, 2)
    torch.testing.assert_close(found, covariance, rtol=0, atol=2e-3)
    assert found[2].abs().max() < 1e-300


def test_what_is_not_a_number_ends():
    covariance = torch.full((1, 3, 3), math.nan, dtype=torch.float64)
    assert sampled(torch.zeros(1, 3).double(), covariance, 5, 1e-7).isnan().all()


# ── log odds


def test_log_odds_of_many_classes_are_as_quick_as_their_probabilities():
    outputs = 3 * torch.randn(2000, 500, dtype=torch.float64)
    begin = time.perf_counter()
    found = log_odds(outputs)
    assert time.perf_counter() - begin < 2.0  # one class after the other: 6 s
    for k in (0, 250, 499):
        others = torch.cat([outputs[:, :k], outputs[:, k + 1 :]], 1)
        torch.testing.assert_close(
            found[:, k], outputs[:, k] - others.logsumexp(1), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_log_odds_are_those_of_the_probabilities(n_classes):
    outputs = torch.randn(7, n_classes, dtype=torch.float64)
    p = outputs.softmax(1)
    expected = p.log() - (1 - p).log()
    found = log_odds(outputs)
    if n_classes == 2:
        expected = expected[:, 1]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_log_odds_stay_finite_and_in_order(n_classes):
    outputs = torch.zeros(2, n_classes, dtype=torch.float64)
    outputs[0, 0], outputs[1, -1] = 1e4, 1e4
    found = log_odds(outputs)
    assert torch.isfinite(found).all()
    if n_classes == 2:
        assert found.tolist() == [-1e4, 1e4]
    else:
        others = torch.tensor(n_classes - 1.0).log().item()
        assert found[0, 0].item() == pytest.approx(1e4 - others)
        assert found[0, 1].item() == pytest.approx(-1e4)
        assert found[1, -1].item() == found[0, 0].item()


def test_log_odds_rank_as_the_probabilities_where_those_are_rounded_to_1():
    logits = torch.tensor([[0.0, 50.0, -1.0], [0.0, 60.0, -1.0]], dtype=torch.float64)
    assert (logits.softmax(1)[:, 1] == 1).all()
    assert log_odds(logits)[0, 1] < log_odds(logits)[1, 1]


def test_one_class_has_nothing_to_prefer():
    assert log_odds(torch.randn(4, 1, dtype=torch.float64)).tolist() == [0.0] * 4
