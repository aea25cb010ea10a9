"""A device for each process, and precision that is put back."""

import pytest
import torch

from sklearn_softeq.devices import full_precision, own_device


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
