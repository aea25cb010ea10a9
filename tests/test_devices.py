"""A device for each process, and precision that is put back."""

import pytest
import torch
from nets import data_of, in_training, net_of
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_softeq.curvature import input_factors, kronecker_factors
from sklearn_softeq.devices import full_precision, own_device
from sklearn_softeq.kronecker import eigenbasis, spectra
from sklearn_softeq.likelihoods import Categorical
from sklearn_softeq.posterior import Posterior, output_covariance


def test_each_process_has_a_cuda_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device(torch.device("cuda")) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda")) == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a launcher shows each its own
    assert own_device(torch.device("cuda")) == torch.device("cuda:0")
    for named in ("cuda:1", "cpu"):
        assert own_device(torch.device(named)) == torch.device(named)


MATMUL, CONV = torch.backends.cuda.matmul, torch.backends.cudnn.conv


def settings():
    """TF32 in products and in convolutions; how convolutions are chosen."""
    cudnn = torch.backends.cudnn
    precise = MATMUL.fp32_precision, CONV.fp32_precision
    return precise, (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)


def legacy(value):
    torch.set_float32_matmul_precision({"tf32": "high", "none": "highest"}[value])


def new(value):
    MATMUL.fp32_precision = value


@pytest.fixture(params=[legacy, new])
def allowing(request):
    """TF32 allowed in products, in each of torch's two ways, of which one cannot read the other."""
    cudnn = torch.backends.cudnn
    chosen = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark = cudnn.deterministic = True
    request.param("tf32")
    yield
    request.param("none")
    cudnn.benchmark, cudnn.deterministic = chosen


@pytest.mark.parametrize("error", [None, ValueError])
def test_full_precision_forbids_tf32_and_nothing_else(allowing, error, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = settings()
    assert before[0] == ("tf32", "tf32")
    try:
        with full_precision():
            assert settings() == (("ieee", "ieee"), before[1])
            if error:
                raise error
    except ValueError:
        pass
    assert settings() == before


def test_without_a_cuda_device_nothing_is_touched(allowing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = settings()
    with full_precision():
        assert settings() == before


class Precisions(TorchDispatchMode):
    """Notes the precision of convolutions at each operation of torch."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(CONV.fp32_precision)
        return func(*args, **(kwargs or {}))


def covariance(net, batch, factors):
    posterior = Posterior.from_curvature(factors, net.prior_.precisions(), torch.float64)
    directions = torch.eye(3).double()
    return lambda: output_covariance(net.module_, posterior, batch[0], directions)


WITH_CURVATURE = {
    "factors": lambda net, batch, _: lambda: kronecker_factors(net.module_, Categorical(), [batch]),
    "input factors": lambda net, batch, _: lambda: input_factors(net.module_, [batch]),
    "spectra": lambda net, _, factors: lambda: spectra(factors),
    "eigenbasis": lambda net, _, factors: lambda: eigenbasis(factors["head.output.weight"].left),
    "inverse form": lambda net, _, factors: (
        lambda: factors["head.output.weight"].inverse_form(net.module_.head.output.weight, 1.0)
    ),
    "gradients": lambda net, *_: net.log_joint_gradients,
    "covariance": covariance,
}


@pytest.mark.parametrize("what", WITH_CURVATURE)
def test_all_that_the_evidence_needs_is_in_full_precision(what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    net, data = net_of(), data_of()
    batch = (data.inputs, data.targets, data.weights)
    factors = kronecker_factors(in_training(net, data).module_, Categorical(), [batch]).factors
    compute = WITH_CURVATURE[what](net, batch, factors)
    before = CONV.fp32_precision
    assert before != "ieee"
    with torch.no_grad(), Precisions() as precisions:
        compute()
    assert precisions.seen == {"ieee"}
    assert CONV.fp32_precision == before
