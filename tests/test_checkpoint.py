"""Fits that were broken off go on from the disk, and end as they would have ended."""

import contextlib
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import Callback

from sklearn_softeq import (
    SoftEquivariantClassifier,
    SoftEquivariantRegressor,
    assembly,
    checkpoint,
    course,
)
from sklearn_softeq.checkpoint import FILES, Checkpoint, columns, rows
from sklearn_softeq.records import read, write
from sklearn_softeq.training import SoftEquivariantNet

SHORT = {
    "width": 2,
    "max_epochs": 16,
    "burn_in": 2,
    "evidence_every": 2,
    "batch_size": 16,
    "random_state": 0,
}
KINDS = {
    "default": {},
    "float32": {"dtype": "float32", "augment": "crop_flip"},
    "adam": {"optimizer": "adam"},
    "sgd, jointly": {"optimizer": "sgd", "start": "joint", "lr_schedule": "cosine"},
    "two symmetries": {"pathways": ("p4_conv", "conv"), "max_epochs": 10},
    "lengthscales": {
        "pathways": ("conv", "sparse_fc"),
        "learn_lengthscale": True,
        "hyper_solver": "adam",
        "optimizer": "adam",
    },
    "a subset of rows": {"curvature": "rademacher", "curvature_subset": 17},
    "fixed prior": {"learn_prior": False, "optimizer": "adam"},
    "posterior": {"predictive": "laplace"},
    "residual": {"architecture": "resnet", "pathways": "conv", "max_epochs": 8},
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _at_each_epoch(monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)


@pytest.fixture(scope="module")
def data():
    """41 images of three digits, 4×4 pixels."""
    images, labels = load_digits(n_class=3, return_X_y=True)
    return images.reshape(-1, 1, 4, 2, 4, 2).mean((3, 5))[:41] / 16, labels[:41]


class BrokenError(Exception):
    pass


class Break(Callback):
    """Ends training as a crash would, before an epoch."""

    def __init__(self, after):
        self.after = after

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) > self.after:
            raise BrokenError


def broken_off(clf, data, after, **fit):
    """A fit that is broken off after so many epochs."""
    before = clf.callbacks
    with pytest.raises(BrokenError):
        clf.set_params(callbacks=[Break(after)]).fit(*data, **fit)
    clf.set_params(callbacks=before)


def assert_same(found, expected, X):
    """All that a fit leaves, to the last bit."""
    ours = ("net_", "checkpoint_dir", "callbacks", "random_state", "_is_clone", "posterior_")
    assert {*vars(found), *ours} == {*vars(expected), *ours}
    assert ("posterior_" in vars(found)) is ("posterior_" in vars(expected))
    for name in vars(found).keys() - set(ours):
        np.testing.assert_equal(vars(found)[name], vars(expected)[name], err_msg=name)
    states = [dict(leaves(checkpoint.snapshot(clf.net_))) for clf in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for path, leaf in states[1].items():
        np.testing.assert_equal(states[0][path], leaf, err_msg=path)
    np.testing.assert_array_equal(found._compared(X), expected._compared(X))


@contextlib.contextmanager
def breaking(monkeypatch, owner, name, function, error=BrokenError):
    """A part of the code ends what is done within, as a crash would."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        with pytest.raises(error):
            yield


def crash(*args, **kwargs):
    raise BrokenError


def leaves(value, path="", seen=frozenset()):
    """(path, leaf) of all that there is in an object of ours, in what it holds, and so on."""
    if id(value) in seen:
        return
    seen |= {id(value)}
    inside = None
    if isinstance(value, torch.optim.Optimizer):
        tensors = [p for group in value.param_groups for p in group["params"]]
        states = [dict(value.state.get(p, {})) for p in tensors]
        inside = {"groups": value.param_groups, "states": states}
    elif isinstance(value, np.random.RandomState):
        inside = {"state": list(value.get_state()[1:])}
    elif isinstance(value, dict):
        inside = value
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value))
    elif type(value).__module__.startswith("sklearn_softeq.") or isinstance(value, torch.nn.Module):
        inside = vars(value)
    if inside is None:
        if isinstance(value, torch.Tensor):
            value = value.detach().numpy().copy()
        known = isinstance(value, int | float | str | np.ndarray | None)
        yield path, value if known else type(value).__name__
        return
    yield path, len(inside)
    for name, part in inside.items():
        yield from leaves(part, f"{path}.{name}", seen)


# ── the same end


QUICK = ("default", "adam", "two symmetries", "lengthscales")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS],
)
def test_a_fit_that_was_broken_off_ends_as_if_it_had_not_been(kind, data, tmp_path):
    settings = {**SHORT, **KINDS[kind]}
    expected = SoftEquivariantClassifier(**settings).fit(*data)
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path / "a" / "b")
    last = expected.n_iter_ - 1
    for after in (0, last // 2, last):
        broken_off(clf, data, after)
        assert not clf.__sklearn_is_fitted__()
    clf.fit(*data)
    assert_same(clf, expected, data[0])
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted(FILES)


def test_a_fit_that_was_broken_off_between_its_random_starts(data, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "LEARNT", 0.9)  # more than is learnt by then
    settings = {**SHORT, "pathways": "conv", "burn_in": 2, "max_epochs": 12}
    expected = SoftEquivariantClassifier(**settings).fit(*data)
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    for after in (1, 2, 3, 5):  # starts after epochs 2 and 4
        broken_off(clf, data, after)
    assert_same(clf.fit(*data), expected, data[0])


#: With rates that do not fall and the best state, to which training returns, in memory.
REGRESSOR = {**SHORT, "lr_schedule": "constant", "keep_best": True, "hyper_warmup": 0}


def test_a_regressor_that_was_broken_off_ends_as_if_it_had_not_been(data, tmp_path):
    expected = SoftEquivariantRegressor(**REGRESSOR).fit(*data)
    reg = SoftEquivariantRegressor(**REGRESSOR, checkpoint_dir=tmp_path)
    for after in (0, 7, 15):
        broken_off(reg, data, after)
    assert_same(reg.fit(*data), expected, data[0])
    assert_same(reg.fit(*data), expected, data[0])  # at once
    with pytest.raises(ValueError, match="noise was 'learned' and is 0.5"):
        reg.set_params(noise=0.5).fit(*data)
    with pytest.raises(ValueError, match="y has changed"):
        reg.set_params(noise="learned").fit(data[0], 2.0 * data[1])


def test_a_fit_with_checkpoints_is_one_without(data, tmp_path):
    expected = SoftEquivariantClassifier(**SHORT).fit(*data)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=str(tmp_path)).fit(*data)
    assert_same(clf, expected, data[0])


def test_a_fit_that_has_converged_goes_on_alike(data, tmp_path):
    settings = {**SHORT, "max_epochs": 200, "tol": 5.0, "n_iter_no_change": 2, "hyper_warmup": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        expected = SoftEquivariantClassifier(**settings).fit(*data)
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    for after in (3, expected.n_iter_ - 2, expected.n_iter_ - 1):
        broken_off(clf, data, after)
    assert_same(clf.fit(*data), expected, data[0])


@pytest.mark.parametrize("sampled", [False, True])
def test_a_fit_goes_on_from_its_last_epoch_to_its_end(sampled, data, tmp_path, monkeypatch):
    settings = {**SHORT, **(KINDS["a subset of rows"] if sampled else {})}
    expected = SoftEquivariantClassifier(**settings).fit(*data)
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    with breaking(monkeypatch, Checkpoint, "on_train_end", crash):
        clf.fit(*data)
    assert_same(clf.fit(*data), expected, data[0])


def test_weights_strings_and_frames(data, tmp_path):
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame(data[0].reshape(41, 16), columns=[f"p{i}" for i in range(16)])
    y = np.array(["a", "b", "c"])[data[1]]
    fit = {"sample_weight": np.arange(41) % 4}
    settings = {**SHORT, "class_weight": {"a": 1.0, "b": 2.0, "c": 1.0}}
    expected = SoftEquivariantClassifier(**settings).fit(X, y, **fit)
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    broken_off(clf, (X, y), 6, **fit)
    assert_same(clf.fit(X, y, **fit), expected, X)


def test_a_finished_fit_returns_at_once(data, tmp_path, monkeypatch):
    expected = SoftEquivariantClassifier(**SHORT).fit(*data)
    SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path).fit(*data)
    written = {name: (tmp_path / name).read_bytes() for name in FILES}
    monkeypatch.setattr(SoftEquivariantNet, "partial_fit", None)
    with pytest.warns(ConvergenceWarning):  # once more
        clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path).fit(*data)
    assert_same(clf, expected, data[0])
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == written
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict_proba(data[0]), expected.predict_proba(data[0]))


def test_what_a_finished_fit_has_left_can_be_trained_further(data, tmp_path):
    fits = []
    for _ in range(2):
        clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path).fit(*data)
        fits.append(clf.partial_fit(*data).partial_fit(*data))
    assert_same(*fits, data[0])


# ── chance


def test_seeds_are_drawn_once(data, tmp_path):
    settings = {**SHORT, "random_state": None}
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    np.random.seed(1)  # noqa: NPY002
    broken_off(clf, data, 5)
    clf.fit(*data)
    np.random.seed(1)  # noqa: NPY002
    expected = SoftEquivariantClassifier(**settings).fit(*data)
    assert_same(clf, expected, data[0])
    other = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path / "other").fit(*data)
    assert not np.array_equal(other.predict_proba(data[0]), clf.predict_proba(data[0]))


def test_a_generator_is_known_by_its_state_and_moves_on(data, tmp_path):
    ours, theirs = np.random.RandomState(3), np.random.RandomState(3)
    expected = SoftEquivariantClassifier(**{**SHORT, "random_state": theirs}).fit(*data)
    settings = {**SHORT, "checkpoint_dir": tmp_path}
    broken_off(SoftEquivariantClassifier(**{**settings, "random_state": ours}), data, 5)
    ours = np.random.RandomState(3)
    for _ in range(2):  # the second returns at once
        ours = np.random.RandomState(3)
        clf = SoftEquivariantClassifier(**{**settings, "random_state": ours}).fit(*data)
        assert_same(clf, expected, data[0])
        assert ours.randint(2**31) == np.random.RandomState(3).randint(2**31, size=6)[-1]
    with pytest.raises(ValueError, match="random_state was a RandomState in the state"):
        clf.fit(*data)
    assert theirs.randint(2**31) == np.random.RandomState(3).randint(2**31, size=6)[-1]


def test_a_refused_call_draws_no_number(data, tmp_path):
    settings = {**SHORT, "checkpoint_dir": tmp_path}
    SoftEquivariantClassifier(**{**settings, "random_state": np.random.RandomState(3)}).fit(*data)
    ours = np.random.RandomState(4)
    with pytest.raises(ValueError, match="random_state"):
        SoftEquivariantClassifier(**{**settings, "random_state": ours}).fit(*data)
    assert ours.randint(2**31) == np.random.RandomState(4).randint(2**31)


# ── before training: trials


def test_trials_that_are_over_are_not_repeated(data, tmp_path, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 0)
    monkeypatch.setattr(assembly, "best_symmetry", None)
    clf.fit(*data)
    assert set(clf.symmetry_trials_) == {"p1", "joint"}


def test_trials_that_were_broken_off_begin_again(data, tmp_path, monkeypatch):
    settings = {**SHORT, "random_state": None}
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    np.random.seed(1)  # noqa: NPY002
    with breaking(monkeypatch, assembly, "best_symmetry", crash):
        clf.fit(*data)
    clf.fit(*data)
    np.random.seed(1)  # noqa: NPY002
    assert_same(clf, SoftEquivariantClassifier(**settings).fit(*data), data[0])


# ── all of the state


#: What is computed again to the last bit, or lives no longer than an epoch; and what a run itself
#: remembers of the disk.
FORGOTTEN = re.compile(
    r"\.evidence\.(state|_constants|_known|_covered)\b|\.effective_dimensions_"
    r"|\.optimizer_\.states\.\d+(\.inverse|$)|\.preconditioner\._decays|^\.checkpoint"
    r"|\.batches|\._tangent"
)


def state_in_full(net):
    """All that depends on a net, but for what is forgotten on purpose."""
    callbacks = {name: found for name, found in net.callbacks_ if name != "break"}
    whole = {**vars(net), **callbacks}
    for name in ("callbacks", "callbacks_", "module", "criterion", "origin", "data_"):
        whole.pop(name, None)
    return {path: leaf for path, leaf in leaves(whole) if path and not FORGOTTEN.search(path)}


@pytest.mark.parametrize(
    ("kind", "after"),
    [*((kind, 6) for kind in KINDS), ("default", 1), ("default", 13), ("regressor", 9)],
)
def test_nothing_of_the_state_is_lost(kind, after, data, tmp_path, monkeypatch):
    # A new attribute that changes during training fails here until snapshot and restore know it.
    if kind == "regressor":
        clf = SoftEquivariantRegressor(**REGRESSOR, checkpoint_dir=tmp_path)
    else:
        clf = SoftEquivariantClassifier(**{**SHORT, **KINDS[kind]}, checkpoint_dir=tmp_path)
    found = []
    end, begin = Checkpoint.on_epoch_end, Checkpoint.on_train_begin

    def stop_at_end(self, net, **kwargs):
        end(self, net, **kwargs)
        if len(net.history) == after:
            found.append(state_in_full(net))
            raise BrokenError

    def stop_at_begin(self, net, **kwargs):
        begin(self, net, **kwargs)
        found.append(state_in_full(net))
        raise BrokenError

    for name, stop in (("on_epoch_end", stop_at_end), ("on_train_begin", stop_at_begin)):
        with breaking(monkeypatch, Checkpoint, name, stop):
            clf.fit(*data)
    before, now = found
    assert before.keys() == now.keys()
    for path, leaf in before.items():
        np.testing.assert_equal(now[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        (
            "lengthscales",
            [
                ".course.evidence.solver.ascent._adam.states.0.exp_avg",
                ".course.evidence.lengthscales.ascent._vector",
                ".course.evidence.ramp_from",
            ],
        ),
        (
            "two symmetries",
            [
                ".course.rate.cooldown_from",
                ".course.plateau.stale",
                ".course.start.released.blocks.0.conv.weight",
                ".course.mean.count",
                ".iterator_train__random_state.state.1",
                ".prior_._buffers.log_precision",
                ".optimizer_.groups.0.lr",
                ".history_.3.train_loss",
                ".enabled.p4_conv",
            ],
        ),
    ],
)
def test_the_walk_reaches_what_matters(kind, paths, data):
    clf = SoftEquivariantClassifier(**{**SHORT, **KINDS[kind]}).fit(*data)
    found = state_in_full(clf.net_)
    for path in paths:
        assert any(name.endswith(path) for name in found), path


# ── damaged files


@pytest.mark.parametrize("damage", ["torn", "in the magic", "changed", "empty", "zeros"])
def test_a_damaged_file_is_left_aside(damage, data, tmp_path):
    expected = SoftEquivariantClassifier(**SHORT).fit(*data)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 7)
    last = max((tmp_path / name for name in FILES), key=lambda path: read(path)["number"])
    content = last.read_bytes()
    last.write_bytes(
        {
            "torn": content[: len(content) // 2],
            "in the magic": content[:9],
            "changed": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "empty": b"",
            "zeros": bytes(len(content)),
        }[damage]
    )
    begun = []

    class Note(Callback):
        def on_epoch_begin(self, net, **kwargs):
            begun.append(len(net.history))

    clf.set_params(callbacks=[Note()])
    with pytest.warns(UserWarning, match="left aside"):
        clf.fit(*data)
    assert begun[0] == 7  # instead of 8
    assert_same(clf, expected, data[0])


def test_without_any_whole_file_a_fit_begins_anew(data, tmp_path):
    expected = SoftEquivariantClassifier(**SHORT).fit(*data)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 7)
    for name in FILES:
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="left aside"):
        clf.fit(*data)
    assert_same(clf, expected, data[0])


@pytest.mark.parametrize(
    "other",
    [
        lambda record: {**record, "one more": None},
        lambda record: {key: value for key, value in record.items() if key != "trials"},
        lambda record: list(record),
    ],
    ids=["one more", "one less", "a list"],
)
def test_a_whole_record_of_another_form_is_no_state(other, data, tmp_path, capsys):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path, verbose=1)
    broken_off(clf, data, 3)
    last = max((tmp_path / name for name in FILES), key=lambda path: read(path)["number"])
    write(last, other(read(last)))  # its digest is right, as if another version had written it
    with pytest.warns(UserWarning, match=f"{last.name} is no checkpoint. It is left aside"):
        broken_off(clf, data, 3)
    assert "goes on after epoch 2, from" in capsys.readouterr().out  # instead of 3


def test_no_code_in_a_checkpoint_is_run(data, tmp_path):
    done = tmp_path / "done"

    class Payload:
        def __reduce__(self):
            return open, (str(done), "w")

    torch.save(Payload(), tmp_path / FILES[0])
    with pytest.raises(FileExistsError):
        SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path).fit(*data)
    assert not done.exists()


@pytest.mark.parametrize("content", [b"notes", pickle.dumps({}), bytes(9) + b"1", b"\n"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_file_of_something_else_is_left_alone(content, begun, data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    if begun:
        broken_off(clf, data, 3)
    (tmp_path / FILES[0]).write_bytes(content)
    before = dict(vars(clf))
    with pytest.raises(FileExistsError, match=f"{FILES[0]} is no record .* move it away"):
        clf.fit(*data)
    assert vars(clf) == before
    assert (tmp_path / FILES[0]).read_bytes() == content


def test_what_was_left_half_written_goes_after_a_while(data, tmp_path, monkeypatch):
    part = tmp_path / f".{FILES[0]}.abc.part"
    part.write_bytes(b"half")
    other = tmp_path / ".other.part"
    other.write_bytes(b"")
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 1)
    assert part.exists()  # it may be another process's
    monkeypatch.setattr(checkpoint, "LITTER", -1.0)
    clf.fit(*data)
    assert not part.exists()
    assert other.exists()


# ── other fits


def changed(data, what):
    X, y = (column.copy() for column in data)
    if what == "X":
        X[3, 0, 0, 0] += 1e-3
    if what == "y":
        y[3] = (y[3] + 1) % 3
    if what == "the order":
        X, y = X[::-1], y[::-1]
    return X, y


@pytest.mark.parametrize(
    ("what", "said", "unsaid"),
    [
        ("X", ["X has changed"], ["y has", "sample_weight"]),
        ("y", ["y has changed"], ["X has", "sample_weight"]),
        ("the order", ["X has changed", "y has changed"], ["sample_weight"]),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_data_are_refused(what, said, unsaid, finished, data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    clf.fit(*data) if finished else broken_off(clf, data, 3)
    files = {name: (tmp_path / name).read_bytes() for name in FILES}
    before = dict(vars(clf))
    with pytest.raises(ValueError, match="holds another fit") as error:
        clf.fit(*changed(data, what))
    assert all(words in str(error.value) for words in said)
    assert not any(words in str(error.value) for words in unsaid)
    assert vars(clf) == before
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == files
    clf.fit(*data)


def test_other_weights_are_refused_and_ones_are_none(data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path).fit(*data)
    clf.fit(*data, sample_weight=np.ones(41))
    with pytest.raises(ValueError, match="fit: sample_weight has changed. Call"):
        clf.fit(*data, sample_weight=np.arange(41))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 3}, "fit: width was 2 and is 3. Call"),
        ({"max_epochs": 17, "lr": 0.5}, "lr was None and is 0.5; max_epochs was 16 and is 17"),
        ({"random_state": 1}, "random_state was 0 and is 1"),
        ({"dtype": "float32"}, "fit: dtype was float64 and is float32. Call"),
        ({"pathways": ("conv",)}, "pathways was ('conv', 'factored_fc') and is ('conv')"),
        ({"class_weight": "balanced"}, "fit: class_weight was None and is 'balanced'. Call"),
        ({"augment": torch.flip}, "augment was None and is"),
    ],
)
def test_other_parameters_are_refused(changes, said, data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 3)
    with pytest.raises(ValueError, match="holds another fit") as error:
        clf.set_params(**changes).fit(*data)
    found = str(error.value)
    assert all(part in found for part in said.split("; ")), found


@pytest.mark.parametrize(
    "changes",
    [
        {"verbose": 1},
        {"callbacks": []},
        {"width": np.int64(2)},
        {"pathways": ["conv", "factored_fc"]},
        {"pathways": np.array(["conv", "factored_fc"])},
        {"warm_start": True},
        {"device": "cpu"},
    ],
)
def test_what_makes_no_difference_is_let_pass(changes, data, tmp_path, capsys):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 3)
    clf.set_params(**changes).fit(*data)
    assert ("goes on after epoch 3" in capsys.readouterr().out) == ("verbose" in changes)


def test_a_fit_that_goes_on_tells_of_no_start_that_was_not(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(course, "LEARNT", -1.0)  # whatever has been learnt is enough
    settings = {**SHORT, "pathways": "conv", "burn_in": 2, "verbose": 1}
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path)
    broken_off(clf, data, 5)
    clf.fit(*data)
    assert clf.net_.course.spare_starts > 0
    before, after = capsys.readouterr().out.split("goes on after epoch 5")
    assert "epoch 4" in before
    assert "epoch 8" in after
    assert "start:" not in before + after


def test_one_pathway_and_image_shapes_in_any_form(data, tmp_path, capsys):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path, verbose=1)
    broken_off(clf.set_params(pathways="conv", image_shape=(1, 4, 4)), data, 3)
    broken_off(clf.set_params(pathways=["conv"], image_shape=[1, 4, 4]), data, 5)
    assert "goes on after epoch 3" in capsys.readouterr().out
    clf.set_params(pathways=("conv",), image_shape=np.array([1, 4, 4])).fit(*data)
    assert "goes on after epoch 5" in capsys.readouterr().out


def shift(batch, k):
    return batch.roll(k, -1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(shift, k=1), partial(shift, k=3)),
        (lambda batch: batch, lambda batch: batch.flip(-1)),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2)),
    ],
)
def test_another_callable_is_refused(one, other, data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, augment=one, checkpoint_dir=tmp_path)
    broken_off(clf, data, 3)
    with pytest.raises(ValueError, match="augment was .* and is .*. Call"):
        clf.set_params(augment=other).fit(*data)
    clf.set_params(augment=one).fit(*data)
    with pytest.raises(ValueError, match="augment was .* and is .*. Call"):
        clf.set_params(augment=other).fit(*data)


class Locked:
    """An augmentation that no other process can know again."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, batch):
        with self.lock:
            return batch

    def __deepcopy__(self, memo):
        return self


def test_a_parameter_that_cannot_be_known_again_is_refused(data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, augment=Locked(), checkpoint_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="augment=.*Locked.* of _thread.lock nothing can be kept"):
        clf.fit(*data)
    assert not list(tmp_path.iterdir())
    clf.set_params(checkpoint_dir=None).fit(*data)  # nothing has to be known again


@pytest.mark.parametrize("of", ["sklearn_softeq", "torch"])
def test_another_version_is_refused(of, data, tmp_path, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 3)
    if of == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr(checkpoint, "__version__", "99.0")
    with pytest.raises(ValueError, match=f"the version of {of} was .* and is 99.0"):
        clf.fit(*data)


def test_another_number_of_threads_is_noticed(data, tmp_path, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    broken_off(clf, data, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match="begun with 1 threads and goes on with 7"):
        clf.fit(*data)
    with warnings.catch_warnings():  # what is over stays as it is
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        clf.fit(*data)


# ── searches


@pytest.mark.slow
def test_in_a_search_each_fit_has_its_own_folder(data, tmp_path, monkeypatch):
    clf = SoftEquivariantClassifier(**SHORT)
    grid = {"width": [1, 2]}
    expected = GridSearchCV(clf, grid, cv=2, scoring="neg_log_loss").fit(*data)
    clf.set_params(checkpoint_dir=tmp_path)
    search = GridSearchCV(clf, grid, cv=2, scoring="neg_log_loss", n_jobs=2).fit(*data)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == len(list(tmp_path.iterdir())) == 5  # two folds of two, and the best
    for key in ("mean_test_score", "std_test_score"):
        np.testing.assert_array_equal(search.cv_results_[key], expected.cv_results_[key])
    assert_same(search.best_estimator_, expected.best_estimator_, data[0])
    # Once more it is read from the disk.
    monkeypatch.setattr(SoftEquivariantNet, "partial_fit", None)
    again = GridSearchCV(clf, grid, cv=2, scoring="neg_log_loss").fit(*data)
    np.testing.assert_array_equal(
        again.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"]
    )
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_search_over_functions_tells_them_apart(n_jobs, data, tmp_path):
    clf = SoftEquivariantClassifier(**{**SHORT, "max_epochs": 4})
    grid = {"augment": [lambda batch: batch, lambda batch: batch * 0, partial(shift, k=1)]}
    options = {"cv": 2, "scoring": "neg_log_loss"}
    expected = GridSearchCV(clf, grid, **options).fit(*data)
    clf.set_params(checkpoint_dir=tmp_path)
    search = GridSearchCV(clf, grid, **options, n_jobs=n_jobs).fit(*data)
    scores = search.cv_results_["mean_test_score"]
    np.testing.assert_array_equal(scores, expected.cv_results_["mean_test_score"])
    assert len(set(scores)) == 3
    # Two folds of three, and the best; here the functions are those of the other processes.
    assert len(list(tmp_path.iterdir())) == 7


def test_a_search_that_was_broken_off_goes_on(data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    expected = cross_val_score(clone(clf).set_params(checkpoint_dir=None), *data, cv=2)
    assert not list(tmp_path.iterdir())
    clf.set_params(callbacks=[Break(5)])
    with pytest.raises(BrokenError):
        cross_val_score(clf, *data, cv=2, error_score="raise")
    (folder,) = tmp_path.iterdir()
    assert any(read(folder / name)["state"] for name in FILES)
    clf.set_params(callbacks=None)
    np.testing.assert_array_equal(cross_val_score(clf, *data, cv=2), expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_clones_wherever_they_are_made(data, tmp_path):
    X, y = data[0].reshape(41, 16), data[1]
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path / "bag")
    BaggingClassifier(clf, 2, random_state=0).fit(X, y)
    assert len(list((tmp_path / "bag").iterdir())) == 2
    clf.set_params(checkpoint_dir=tmp_path / "pipe")
    cross_val_predict(make_pipeline(FunctionTransformer(), clf), X, y, cv=2)
    assert len(list((tmp_path / "pipe").iterdir())) == 2
    assert "_is_clone" not in vars(clf)
    assert "_is_clone" in vars(pickle.loads(pickle.dumps(clone(clf))))


# ── no files, and none that can be written


def test_no_file_is_written_unless_asked_for(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SoftEquivariantClassifier(**SHORT).fit(*data)
    assert not list(tmp_path.iterdir())


def test_chunks_are_not_kept(data, tmp_path):
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path / "run")
    for _ in range(3):
        clf.partial_fit(*data, classes=[0, 1, 2])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(SoftEquivariantNet, "initialize", None)  # nothing is begun
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=folder)
        before = dict(vars(clf))
        with pytest.raises(OSError, match="Nothing can be written to checkpoint_dir"):
            clf.fit(*data)
        assert vars(clf) == before


@pytest.mark.parametrize("folder", [3, True])
def test_checkpoint_dir_is_a_path(folder, data):
    with pytest.raises(ValueError, match="checkpoint_dir"):
        SoftEquivariantClassifier(**SHORT, checkpoint_dir=folder).fit(*data)


def test_the_home_of_the_user(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir="~/x")
    broken_off(clf, data, 1)
    assert (tmp_path / "home" / "x" / FILES[0]).exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("folder", ["", "~nobody of that name/x"])
def test_what_names_no_folder_is_refused(folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=folder)
    with pytest.raises(ValueError, match="checkpoint_dir='"):
        clf.fit(*data)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_no_training(data, tmp_path, monkeypatch):
    expected = SoftEquivariantClassifier(**SHORT).fit(*data)
    written, write = [], checkpoint.write

    def fail(path, tree):
        if len(written) in (4, 5, 6):
            written.append(None)
            raise OSError("no space left")
        written.append(write(path, tree))

    monkeypatch.setattr(checkpoint, "write", fail)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    with pytest.warns(UserWarning, match="could not be written .no space left") as said:
        broken_off(clf, data, 6)
    assert len([w for w in said if "could not" in str(w.message)]) == 3
    assert max(read(tmp_path / name)["number"] for name in FILES) == len(written) - 4
    assert_same(clf.fit(*data), expected, data[0])


def test_writing_takes_a_small_part_of_the_time(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", 1e-9)
    written, keep = [], checkpoint.Run.keep
    monkeypatch.setattr(
        checkpoint.Run, "keep", lambda run, *args: (written.append(1), keep(run, *args))
    )
    SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path).fit(*data)
    assert len(written) == 2  # as training begins, and at the end


# ── warm start, callbacks


def test_what_a_warm_start_begins_with_is_part_of_the_fit(data, tmp_path):
    def both(first, second, after=None):
        clf = SoftEquivariantClassifier(**SHORT, warm_start=True, checkpoint_dir=first).fit(*data)
        clf.set_params(checkpoint_dir=second)
        if after is not None:
            broken_off(clf, data, after)
            return both(first, second)
        return clf.fit(*data)

    expected = both(None, None)
    found = both(tmp_path / "a", tmp_path / "b", after=5)
    assert_same(found, expected, data[0])
    with pytest.raises(ValueError, match="the model to go on from has changed"):
        both(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ValueError, match="the model to go on from has changed"):
        found.fit(*data)  # from the second on


def test_a_callback_may_stop_and_note(data, tmp_path):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.history.record("mine", {"no": "number"})
            net.history.record("word", "yes")
            net.history.record("figure", np.float32(0.5))
            if len(net.history) == 9:
                raise KeyboardInterrupt

    expected = SoftEquivariantClassifier(**SHORT, callbacks=[Stop()]).fit(*data)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    with pytest.raises(BrokenError):
        clf.set_params(callbacks=[Stop(), Break(4)]).fit(*data)
    clf.set_params(callbacks=[Stop()]).fit(*data)
    assert clf.n_iter_ == expected.n_iter_ == 9
    np.testing.assert_array_equal(clf.predict_proba(data[0]), expected.predict_proba(data[0]))
    assert clf.net_.history[0]["word"] == "yes"
    assert clf.net_.history[0]["figure"] == 0.5
    assert ["mine" in row for row in clf.net_.history] == [False] * 4 + [True] * 5


def test_what_other_callbacks_do_at_the_end_of_an_epoch_is_kept(data, tmp_path):
    class Shrink(Callback):
        def on_epoch_end(self, net, **kwargs):
            for parameter in net.module_.parameters():
                parameter.data.mul_(0.9)

    expected = SoftEquivariantClassifier(**SHORT, callbacks=[Shrink()]).fit(*data)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    with pytest.raises(BrokenError):
        clf.set_params(callbacks=[Shrink(), Break(7)]).fit(*data)
    clf.set_params(callbacks=[Shrink()]).fit(*data)
    np.testing.assert_array_equal(clf.predict_proba(data[0]), expected.predict_proba(data[0]))


@pytest.mark.parametrize("is_clone", [False, True])
def test_ctrl_c_ends_a_fit_that_goes_on_later(data, tmp_path, monkeypatch, is_clone):
    expected = SoftEquivariantClassifier(**SHORT).fit(*data)
    clf = SoftEquivariantClassifier(**SHORT, checkpoint_dir=tmp_path)
    clf = clone(clf) if is_clone else clf
    keep = checkpoint.Run.keep

    def interrupt(run, net, *args):
        keep(run, net, *args)
        if len(net.history) == 5:
            raise KeyboardInterrupt

    if is_clone:
        with breaking(monkeypatch, checkpoint.Run, "keep", interrupt, KeyboardInterrupt):
            clf.fit(*data)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Run, "keep", interrupt)
            with pytest.warns(UserWarning, match="broke off training"):
                clf.fit(*data)
    assert_same(clf.fit(*data), expected, data[0])


def test_history_there_and_back():
    history = [{"epoch": 1, "batches": [1], "a": 0.5}, {"epoch": 2, "batches": []}]
    assert rows(columns(history)) == [
        {"epoch": 1, "a": 0.5, "batches": []},
        {"epoch": 2, "batches": []},
    ]


class Notes(Callback):
    """Notes of each epoch what can be saved and what cannot, and other things in each."""

    def on_epoch_end(self, net, **kwargs):
        epoch = len(net.history)
        noted = {
            "figure": np.float32(0.5),
            "mixed": epoch if epoch % 2 else "even",
            "flag": epoch > 3,
            "huge": 2**70,
            "gradients": [0.0] * epoch,
            "day": np.datetime64("2020-01-01"),
            "root": np.complex64(1j),
            "own": type("Name", (str,), {})("a"),
            "nothing": None,
        }
        for name, value in noted.items():
            net.history.record(name, value)


def test_whatever_callbacks_note_a_fit_is_kept_on_disk_and_can_be_saved(data, tmp_path):
    settings = {**SHORT, "checkpoint_dir": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        clf = SoftEquivariantClassifier(**settings, callbacks=[Notes()]).fit(*data)
    for found in (
        pickle.loads(pickle.dumps(clf)),
        SoftEquivariantClassifier(**settings).fit(*data),  # from disk
    ):
        first, second = found.net_.history[:2]
        expected = {"figure": 0.5, "mixed": 1, "flag": False, "huge": 2**70}
        assert {name: first[name] for name in expected} == expected
        assert [type(first[name]) for name in expected] == [float, int, bool, int]
        assert second["mixed"] == "even"
        assert not {"gradients", "day", "root", "own", "nothing"} & first.keys()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_posterior_comes_back_from_disk_in_the_precision_of_the_network(dtype, data, tmp_path):
    settings = {**SHORT, "max_epochs": 6, "predictive": "laplace", "dtype": dtype}
    clf = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path).fit(*data)
    again = SoftEquivariantClassifier(**settings, checkpoint_dir=tmp_path).fit(*data)
    np.testing.assert_array_equal(again.predict_proba(data[0]), clf.predict_proba(data[0]))
    for found, expected in zip(again.posterior_.bases, clf.posterior_.bases, strict=True):
        assert found.values.dtype == getattr(torch, dtype)
        assert torch.equal(found.vectors, expected.vectors)


# ── in processes of their own


FIT = """
    import pickle, sys, warnings

    import numpy as np
    import torch

    import sklearn_softeq
    from sklearn_softeq import checkpoint

    torch.set_num_threads(1)
    checkpoint.SHARE = float(sys.argv[3])
    name, settings, X, y = pickle.loads(open(sys.argv[1], "rb").read())
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    clf = getattr(sklearn_softeq, name)(**settings).fit(X, y)
    found = {name: value for name, value in vars(clf).items() if name.endswith("_")}
    del found["net_"], found["device_"]
    found.pop("posterior_", None)
    found["predictions"] = clf._compared(X)
    found["weights"] = {name: w.detach().numpy() for name, w in clf.module_.named_parameters()}
    with open(sys.argv[2], "wb") as file:
        pickle.dump(found, file)
"""


def begin(folder, data, share=math.inf, estimator=SoftEquivariantClassifier, **settings):
    """A process that is about to fit, and the file for what it finds."""
    given = (estimator.__name__, settings, *data)
    for name, content in (("fit.py", textwrap.dedent(FIT)), ("data", given)):
        written = content.encode() if isinstance(content, str) else pickle.dumps(content)
        (folder / name).write_bytes(written)
    arguments = [folder / "fit.py", folder / "data", folder / "found", share]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process, folder / "found"


def finished(process, path):
    assert process.wait() == 0
    process.stdout.close()
    return pickle.loads(path.read_bytes())


RESTART = """
    import contextlib, functools, sys

    import numpy as np
    from sklearn_softeq import SoftEquivariantClassifier, checkpoint
    from skorch.callbacks import Callback

    checkpoint.SHARE = float("inf")

    class Stop(Callback):
        def on_epoch_begin(self, net, **kwargs):
            print(len(net.history), end=" ")
            if len(net.history) == int(sys.argv[2]):
                raise OSError

    def flip(batch, k=None):
        return batch.flip(-1) if k in {1, 2, "a", "b"} else batch

    class Flip:
        kinds = ("a", "b")

        def __init__(self, kinds):
            self.kinds = kinds

        def __call__(self, batch):
            return flip(batch, "a") if "a" in self.kinds else batch

    X, y = np.arange(320.0).reshape(20, 16) % 7, np.arange(20) % 2
    augment = [lambda batch: flip(batch, 1), functools.partial(flip, k="b"), Flip({"a", "c", "d"})]
    for i, function in enumerate(augment):
        clf = SoftEquivariantClassifier(
            width=1, max_epochs=4, burn_in=1, evidence_every=1, random_state=0,
            callbacks=[Stop()], augment=function, checkpoint_dir=f"{sys.argv[1]}/{i}",
        )
        with contextlib.suppress(OSError):
            clf.fit(X, y)
        print()
"""


@pytest.mark.slow
def test_code_of_a_script_is_known_again_after_a_restart(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(textwrap.dedent(RESTART))
    for seed, stop, epochs in (("1", "2", "1 2"), ("2", "-1", "2 3 4")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script, tmp_path / "run", stop],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert [line.strip() for line in done.stdout.splitlines()] == [epochs] * 3


def last_number(folder):
    """Of the records on disk; -1 if there is none yet."""
    # The random numbers of trials that are not over are on disk, or nothing is yet.
    numbers = [read(folder / name)["number"] for name in FILES if (folder / name).exists()]
    return max(numbers, default=-1)


def kill(process):
    process.kill()  # SIGKILL
    process.wait()
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(("share", "n_kills"), [(0.2, 8), (math.inf, 20)])
def test_killed_at_any_moment(share, n_kills, data, tmp_path):
    folder, settings = tmp_path / "run", {**SHORT, "max_epochs": 40}
    process = begin(tmp_path, data, share, **settings)  # imports are over
    begun = time.monotonic()
    expected = finished(*process)
    seconds = time.monotonic() - begun
    settings["checkpoint_dir"] = folder
    chance, reached = random.Random(0), []
    while len(reached) < n_kills:
        process, path = begin(tmp_path, data, share, **settings)
        try:
            process.wait(timeout=chance.uniform(0.0, seconds))
        except subprocess.TimeoutExpired:
            kill(process)
            reached.append(last_number(folder))
        else:
            np.testing.assert_equal(finished(process, path), expected)
            shutil.rmtree(folder)  # once more from the beginning
    assert len(set(reached)) > 1  # not always at the same place
    np.testing.assert_equal(finished(*begin(tmp_path, data, share, **settings)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "options"),
    [(SoftEquivariantRegressor, REGRESSOR), (SoftEquivariantClassifier, KINDS["posterior"])],
)
def test_other_fits_killed_on_the_way(estimator, options, data, tmp_path):
    given = (tmp_path, data, math.inf, estimator)
    settings = {**SHORT, **options, "max_epochs": 40}
    expected = finished(*begin(*given, **settings))
    settings["checkpoint_dir"] = folder = tmp_path / "run"
    for number in (0, 9, 22):
        process, _ = begin(*given, **settings)
        while last_number(folder) < number and process.poll() is None:
            time.sleep(0.002)
        kill(process)
        assert process.returncode == -signal.SIGKILL
    np.testing.assert_equal(finished(*begin(*given, **settings)), expected)
