"""Where memory runs out: predictions by fewer rows, and fits that say what to lower."""

import gc
import weakref

import numpy as np
import pytest
import torch
from nets import small_digits
from sklearn.exceptions import NotFittedError

from sklearn_softeq import SoftEquivariantClassifier, base, predictive
from sklearn_softeq.memory import in_fewer_rows, ran_out
from sklearn_softeq.networks import SoftEquivariantNetwork
from sklearn_softeq.training import SoftEquivariantNet

SHORT = {"max_epochs": 2, "width": 2, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "linux": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4000000000000000 bytes. Error code 12"
    ),
    "windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 4000000000000000 bytes."
    ),
    "numpy": MemoryError("Unable to allocate 7.28 PiB for an array"),
    "python": MemoryError(),
}

each_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


@pytest.fixture(scope="module")
def digits():
    return small_digits(150)


@pytest.fixture(scope="module", params=["map", "laplace"])
def fitted(request, digits):
    return SoftEquivariantClassifier(**SHORT, predictive=request.param).fit(*digits)


@each_error
def test_errors_that_say_so(error):
    assert ran_out(error)


def test_this_machine_says_so():
    for allocate in (lambda: torch.empty(10**16), lambda: np.empty(10**16)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert ran_out(raised.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")], ids=repr
)
def test_errors_of_another_kind(error):
    assert not ran_out(error)


# ── in prediction


class Crowded:
    """Passes of more than so many rows find no memory."""

    def __init__(self, monkeypatch, most, error):
        self.seen, self.most, self.error = [], most, error
        forward, covariance = SoftEquivariantNetwork.forward, predictive.output_covariance

        def watched(network, images):
            self.look(images)
            return forward(network, images)

        def also_watched(network, posterior, images, *args):
            self.look(images)
            return covariance(network, posterior, images, *args)

        monkeypatch.setattr(SoftEquivariantNetwork, "forward", watched)
        monkeypatch.setattr(predictive, "output_covariance", also_watched)

    def look(self, images):
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error


@each_error
@pytest.mark.parametrize("most", [100, 16])
def test_fewer_rows_are_predicted_at_a_time(fitted, digits, monkeypatch, error, most):
    monkeypatch.setattr(predictive, "rows_of_a_prediction", lambda *args: 112)
    fitted.set_params(batch_size=112)
    expected = fitted.predict_proba(digits[0])
    crowded = Crowded(monkeypatch, most, error)
    with pytest.warns(UserWarning, match="not enough memory to predict 112 rows") as record:
        found = fitted.predict_proba(digits[0])
    assert len(record) == 1  # of all batches
    assert f"done with {min(most, 48)}." in str(record[0].message)
    assert set(crowded.seen) == {112, 48, min(most, 48)}  # multiples of 16
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(fitted.classes_[found.argmax(1)], fitted.predict(digits[0]))


def test_rows_are_predicted_alike_when_memory_runs_out_late(fitted, digits, monkeypatch):
    monkeypatch.setattr(predictive, "rows_of_a_prediction", lambda *args: 64)
    fitted.set_params(batch_size=64)
    crowded = Crowded(monkeypatch, 64, ERRORS["linux"])
    look = crowded.look

    def third_time(images):
        look(images)
        if len(crowded.seen) == 3:
            raise crowded.error

    crowded.look = third_time
    with pytest.warns(UserWarning, match="done with 32"):
        found = fitted.predict_proba(digits[0])
    monkeypatch.setattr(predictive, "rows_of_a_prediction", lambda *args: 32)
    fitted.set_params(batch_size=32)
    np.testing.assert_array_equal(found, fitted.predict_proba(digits[0]))


@each_error
@pytest.mark.filterwarnings("error::UserWarning")
def test_one_tile_is_the_least(fitted, digits, monkeypatch, error):
    crowded = Crowded(monkeypatch, 15, error)
    with pytest.raises(type(error)) as raised:
        fitted.predict_proba(digits[0])
    assert raised.value is error
    assert crowded.seen[-1] == 16


def test_other_errors_are_not_tried_again(fitted, digits, monkeypatch):
    crowded = Crowded(monkeypatch, 0, RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        fitted.predict_proba(digits[0])
    assert len(crowded.seen) == 1


def test_what_was_allocated_is_let_go_before_the_next_try():
    held = []

    def predict(n_rows):
        large = torch.zeros(n_rows)
        gc.collect()
        assert all(reference() is None for reference in held)
        held.append(weakref.ref(large))
        if n_rows > 16:
            raise MemoryError
        return n_rows

    with pytest.warns(UserWarning, match="done with 16"):
        assert in_fewer_rows(predict, 64, 16) == 16
    assert len(held) == 3


# ── in training


def failing(monkeypatch, owner, name, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("error", [ERRORS["cuda"], ERRORS["linux"], ERRORS["python"]], ids=repr)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SoftEquivariantNet, "train_step"),  # of a trial, before training
        (SoftEquivariantNet, "log_joint_gradients"),  # at the end
        (base, "output_shares"),  # when it is over
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fit_says_what_to_lower(digits, monkeypatch, owner, name, error):
    clf = SoftEquivariantClassifier(**SHORT, batch_size=32, curvature_subset=70)
    failing(monkeypatch, owner, name, error)
    with pytest.raises(MemoryError, match="not enough memory to train") as raised:
        clf.fit(*digits)
    for advice in ("batch_size, which is 32", "curvature_subset, which is 70", "is 'auto'", "is 2"):
        assert advice in str(raised.value)
    assert raised.value.__cause__ is error
    with pytest.raises(NotFittedError):
        clf.predict(digits[0])
    assert not [attribute for attribute in vars(clf) if attribute.endswith("_")]


def test_a_chunk_says_so_too(digits, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT)
    failing(monkeypatch, SoftEquivariantNet, "train_step", ERRORS["cuda"])
    with pytest.raises(MemoryError, match="Lower batch_size"):
        clf.partial_fit(*digits, classes=[0, 1, 2])


def test_other_errors_of_a_fit_stay_what_they_are(digits, monkeypatch):
    error = RuntimeError("a mistake")
    failing(monkeypatch, SoftEquivariantNet, "train_step", error)
    with pytest.raises(RuntimeError, match="a mistake") as raised:
        SoftEquivariantClassifier(**SHORT).fit(*digits)
    assert raised.value is error


def test_the_error_does_not_hold_what_was_allocated(digits, monkeypatch):
    held = []

    def fail(self, batch, **kwargs):
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SoftEquivariantNet, "train_step", fail)
    with pytest.raises(MemoryError) as raised:
        SoftEquivariantClassifier(**SHORT).fit(*digits)
    gc.collect()
    assert raised.value.__cause__ is not None
    assert [reference() for reference in held] == [None]
