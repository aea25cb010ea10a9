"""Predictions: a row's outputs do not know the other rows; log odds at any size of logits."""

import pytest
import torch
from cases import randomise

from sklearn_softeq.networks import build_network
from sklearn_softeq.predictive import log_odds, map_outputs

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


def test_outputs_of_no_rows():
    network = network_of(torch.float32)
    assert map_outputs(network, torch.empty(0, 1, 16, 16), 16).shape == (0, 3)


# ── log odds


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
