"""Ctrl-C: a single fit keeps what it has, a search stops."""

import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from nets import begin, data_of, net_of, small_digits, weights_of
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import Callback

from sklearn_softeq import SoftEquivariantClassifier, checkpoint
from sklearn_softeq.course import EvidenceStep
from sklearn_softeq.processes import Processes
from sklearn_softeq.training import SoftEquivariantNet

#: Fifty rows have trials; the first evidence comes after five epochs more.
SHORT = {
    "max_epochs": 24,
    "width": 2,
    "burn_in": 2,
    "evidence_every": 2,
    "batch_size": 25,
    "random_state": 0,
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def digits():
    return small_digits(50)


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C in the n-th step of the training proper, in its epoch after the trials."""

    def at(epoch, batch=1, times=1):
        step, left, seen = SoftEquivariantNet.train_step, [times], {}

        def interrupted(net, *args, **kwargs):
            if "course" in dict(net.callbacks_):
                here = len(net.history)
                seen[here] = seen.get(here, 0) + 1
                if left[0] and here >= epoch and seen[here] >= batch:
                    left[0] -= 1
                    raise KeyboardInterrupt
            return step(net, *args, **kwargs)

        monkeypatch.setattr(SoftEquivariantNet, "train_step", interrupted)

    return at


def interrupted(clf, digits):
    """The fitted classifier; the only warning is that of the interrupt."""
    with pytest.warns(UserWarning, match="An interrupt .Ctrl-C. broke off training") as record:
        assert clf.fit(*digits) is clf
    (said,) = record
    assert said.filename == __file__
    return str(said.message)


# ── a single fit


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("epoch", [8, 13, 23])
def test_a_single_fit_keeps_the_state_of_the_last_evidence(
    digits, ctrl_c, monkeypatch, epoch, batch
):
    states, note = [], EvidenceStep._record

    def noted(self, net):
        note(self, net)
        states.append(weights_of(net))  # the mean, at which the evidence was evaluated

    monkeypatch.setattr(EvidenceStep, "_record", noted)
    ctrl_c(epoch, batch)
    clf = SoftEquivariantClassifier(**SHORT, pathways="conv", lr_schedule="constant")
    message = interrupted(clf, digits)
    assert f"broke off training in epoch {epoch} of at most 24" in message
    assert "state of the last evidence" in message
    for name, weight in weights_of(clf.net_).items():
        np.testing.assert_array_equal(weight, states[-1][name])
    assert clf.n_iter_ == len(clf.loss_curve_) == epoch - 1
    assert clf.scores_.shape == clf.history_["epoch"].shape == (len(states),)


def test_every_attribute_is_that_of_a_fitted_model(digits, ctrl_c):
    settings = {**SHORT, "predictive": "laplace"}
    whole = SoftEquivariantClassifier(**settings).fit(*digits)
    ctrl_c(12)
    clf = SoftEquivariantClassifier(**settings)
    interrupted(clf, digits)
    assert {name for name in vars(clf) if name.endswith("_")} == {
        name for name in vars(whole) if name.endswith("_")
    }
    assert np.isfinite(clf.log_marginal_likelihood_value_)
    assert np.isfinite(clf.evidence_linear_term_)
    np.testing.assert_allclose(clf.symmetry_.sum(1), 1.0)
    proba = clf.predict_proba(digits[0])
    np.testing.assert_allclose(proba.sum(1), 1.0)
    twin = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(twin.predict_proba(digits[0]), proba)


def test_in_the_cooldown_the_mean_of_its_weights_is_kept(digits, ctrl_c):
    ctrl_c(23)
    clf = SoftEquivariantClassifier(**SHORT)
    message = interrupted(clf, digits)
    assert "with the mean of the weights since the learning rate began to fall." in message
    assert clf.net_.course.rate.cooling
    assert clf.net_.course.mean.count == 0  # it was taken
    assert np.isfinite(clf.log_marginal_likelihood_value_)


def test_without_evidences_the_present_weights_are_kept(digits, ctrl_c):
    ctrl_c(12)
    clf = SoftEquivariantClassifier(**SHORT, learn_prior=False)
    assert "with the weights of that moment." in interrupted(clf, digits)
    assert clf.n_iter_ == 11
    assert clf.scores_.shape == (1,)


def test_training_goes_on_from_what_was_kept(digits, ctrl_c):
    ctrl_c(12)
    clf = SoftEquivariantClassifier(**SHORT, warm_start=True)
    interrupted(clf, digits)
    before = clf.log_marginal_likelihood_value_
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", category=Warning)
        clf.fit(*digits)  # the fixture interrupts once
    assert clf.n_iter_ > 12
    assert clf.log_marginal_likelihood_value_ > before


def test_what_was_removed_stays_so():
    net = net_of(start="symmetric", burn_in=1, every=1, max_epochs=2)
    net.partial_fit(data_of())
    begin(net, data_of())
    net.course.evidence.on_epoch_end(net)
    kept, (block, *_) = net.course.evidence.state, net.module_.blocks
    assert kept[0]["blocks.0.factored_fc.U.bias"].any()
    block.remove("factored_fc")
    assert net.course.broken_off(net)
    assert block.removed("factored_fc")
    assert not block.removed("conv")


# ── when there is nothing to keep


@pytest.mark.parametrize(("epoch", "batch"), [(1, 1), (3, 2), (5, 2)])
def test_before_the_first_evidence_it_goes_through(digits, ctrl_c, epoch, batch):
    ctrl_c(epoch, batch)
    clf = SoftEquivariantClassifier(**SHORT)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*digits)
    assert vars(clf).keys() == clf.get_params().keys()
    with pytest.raises(NotFittedError):
        clf.predict(digits[0])


@pytest.mark.parametrize("warm_start", [True, False])
def test_then_the_estimator_is_as_before(digits, ctrl_c, warm_start):
    clf = SoftEquivariantClassifier(**SHORT, warm_start=warm_start).fit(*digits)
    before, proba = dict(vars(clf)), clf.predict_proba(digits[0])
    ctrl_c(1)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(digits[0][:40], digits[1][:40])
    assert vars(clf).keys() == before.keys()
    assert all(vars(clf)[name] is value for name, value in before.items())
    np.testing.assert_array_equal(clf.predict_proba(digits[0]), proba)


def test_trials_are_no_state_to_keep(digits, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SoftEquivariantNet, "train_step", interrupt)
    clf = SoftEquivariantClassifier(**SHORT)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*digits)
    assert vars(clf).keys() == clf.get_params().keys()


def test_nor_is_a_chunk(digits, ctrl_c):
    clf = SoftEquivariantClassifier(**SHORT)
    for _ in range(6):
        clf.partial_fit(*digits, classes=[0, 1, 2])
    ctrl_c(1)
    with pytest.raises(KeyboardInterrupt):
        clf.partial_fit(*digits)


@pytest.mark.parametrize("where", ["log_joint_gradients", "outcome"])
def test_a_second_one_goes_through(digits, ctrl_c, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    ctrl_c(12)
    monkeypatch.setattr(SoftEquivariantNet, where, interrupt)
    clf = SoftEquivariantClassifier(**SHORT)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*digits)
    assert vars(clf).keys() == clf.get_params().keys()


def test_an_interrupt_within_the_first_evidence_goes_through(digits, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvidenceStep, "_record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SoftEquivariantClassifier(**SHORT).fit(*digits)


def test_one_within_a_later_evidence_does_not(digits, monkeypatch):
    note, calls = EvidenceStep._record, []

    def third_time(self, net):
        calls.append(len(net.history))
        if len(calls) == 3:
            raise KeyboardInterrupt
        note(self, net)

    monkeypatch.setattr(EvidenceStep, "_record", third_time)
    clf = SoftEquivariantClassifier(**SHORT)
    message = interrupted(clf, digits)
    assert f"in epoch {calls[2]} of" in message
    assert len(clf.scores_) == 2
    assert np.isfinite(clf.predict_proba(digits[0])).all()


@pytest.mark.parametrize("size", [1, 2])
def test_several_processes_are_all_interrupted(monkeypatch, size):
    net = net_of(burn_in=1, every=1)
    net.ends_on_interrupt_ = True

    def interrupt(*args, **kwargs):
        net.processes_ = Processes(0, size)
        raise KeyboardInterrupt

    monkeypatch.setattr(net, "on_epoch_end", interrupt)
    monkeypatch.setattr(net.course, "broken_off", lambda net: True)
    monkeypatch.setattr(net.course, "on_train_end", lambda net, **kwargs: None)
    if size == 1:
        assert net.partial_fit(data_of()).interrupted_ == 1
        return
    with pytest.raises(KeyboardInterrupt):
        net.partial_fit(data_of())


# ── searches


class Steps(Callback):
    """Counts the epochs of all fits."""

    seen: list = []  # noqa: RUF012

    def on_epoch_end(self, net, **kwargs):
        self.seen.append(1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_search_is_stopped(digits, ctrl_c, wrapped):
    Steps.seen.clear()
    clf = SoftEquivariantClassifier(**SHORT, image_shape=(1, 4, 4), callbacks=[Steps()])
    name = "width"
    if wrapped:
        clf, name = make_pipeline(FunctionTransformer(), clf), f"softequivariantclassifier__{name}"
    ctrl_c(12)
    search = GridSearchCV(clf, {name: [2, 3]}, cv=2)
    with pytest.raises(KeyboardInterrupt):
        search.fit(digits[0].reshape(50, 16), digits[1])
    assert len(Steps.seen) == 11  # of the first fit


def test_so_is_cross_validation(digits, ctrl_c):
    ctrl_c(12)
    with pytest.raises(KeyboardInterrupt):
        cross_val_score(SoftEquivariantClassifier(**SHORT), *digits, cv=2)


def test_a_clone_in_any_hands_is_one_of_a_search(digits, ctrl_c):
    ctrl_c(12)
    twin = pickle.loads(pickle.dumps(clone(SoftEquivariantClassifier(**SHORT))))
    with pytest.raises(KeyboardInterrupt):
        twin.fit(*digits)


def test_a_pipeline_of_ones_own_is_a_single_fit(digits, ctrl_c):
    ctrl_c(12)
    pipe = make_pipeline(FunctionTransformer(), SoftEquivariantClassifier(**SHORT))
    with pytest.warns(UserWarning, match="broke off training in epoch 12"):
        pipe.fit(*digits)
    assert pipe[-1].n_iter_ == 11


def test_a_callback_that_asks_to_stop_ends_one_fit_without_a_warning(digits):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 12:
                raise KeyboardInterrupt

    clf = SoftEquivariantClassifier(**SHORT, callbacks=[Stop()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The log evidence had not settled")
        clf.fit(*digits)
        search = GridSearchCV(clf, {"width": [2]}, cv=2).fit(*digits)
    assert clf.n_iter_ == search.best_estimator_.n_iter_ == 12


# ── files, and real signals


def test_a_fit_that_was_broken_off_goes_on_from_its_files(digits, ctrl_c, tmp_path):
    whole = SoftEquivariantClassifier(**SHORT).fit(*digits)
    ctrl_c(12)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    message = interrupted(clf, digits)
    assert "To go on with it, call fit again." in message
    assert clf.n_iter_ == 11
    clf.fit(*digits)
    assert clf.n_iter_ == whole.n_iter_
    np.testing.assert_array_equal(clf.predict_proba(digits[0]), whole.predict_proba(digits[0]))


class Crash(Callback):
    """The process dies at the beginning of an epoch."""

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == 13:
            raise RuntimeError("dies")


def test_what_is_kept_is_in_the_files_too(digits, ctrl_c, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)  # after each epoch
    settings = {**SHORT, "lr_schedule": "constant", "evidence_every": 3}
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path, callbacks=[Crash()])
    with pytest.raises(RuntimeError, match="dies"):
        clf.fit(*digits)  # between evidences, after epochs 11 and 14
    ctrl_c(14)
    expected = SoftEquivariantClassifier(**settings)
    assert "state of the last evidence" in interrupted(expected, digits)
    ctrl_c(14)
    assert "state of the last evidence" in interrupted(clf.set_params(callbacks=None), digits)
    assert 11 in clf.history_["epoch"]
    assert 14 not in clf.history_["epoch"]
    np.testing.assert_array_equal(clf.predict_proba(digits[0]), expected.predict_proba(digits[0]))


SCRIPT = """
import signal
import warnings
import numpy as np
from sklearn_softeq import SoftEquivariantClassifier

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it has none
X = np.random.default_rng(0).normal(size=(60, 8, 8)).astype(np.float32)
clf = SoftEquivariantClassifier(
    max_epochs=100_000, burn_in=2, width=2, n_iter_no_change=10**6, verbose=1
)
with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always")
    clf.fit(X, np.arange(60) % 2)
print("said", [str(w.message) for w in record])
print("sums", np.allclose(clf.predict_proba(X).sum(1), 1.0), clf.n_iter_)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are not sent there")
def test_a_signal_to_a_process():
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 32"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.count("broke off training in epoch") == 1
    assert "sums True" in out
