"""scikit-learn's callbacks hear of a fit and of each of its epochs; what is printed of it."""

import importlib
import pickle
import sys
from functools import partial

import numpy as np
import pytest
from nets import ALL, data_of, net_of, numbers_of
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.likelihoods import Gaussian
from sklearn_softeq.progress import ProgressLine

SHORT = {"max_epochs": 8, "width": 2, "burn_in": 2, "evidence_every": 2, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:60], y[:60]


class Listener:
    """Notes what it hears, and what an estimator fitted so far predicts; may ask to stop."""

    def __init__(self, stop_after=None, wants=True):
        self.stop_after, self.wants = stop_after, wants
        self.heard, self.tasks, self.predicted, self.metadata = [], [], [], []

    def setup(self, estimator, context):
        self.heard.append("setup")

    def teardown(self, estimator, context):
        self.heard.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.heard.append(("begin", context.task_name, context.task_id))
        self.tasks.append(context.max_subtasks)

    def on_fit_task_end(
        self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None
    ):
        self.heard.append(("end", context.task_name, context.task_id))
        self.metadata.append(metadata)
        self.predicted.append(fitted_estimator.predict_proba(X))
        return context.task_name == "epoch" and context.task_id + 1 == self.stop_after


def test_a_task_for_the_fit_and_one_for_each_epoch(digits):
    listener = Listener()
    clf = SoftEquivariantClassifier(**SHORT).set_callbacks(listener).fit(*digits)
    epochs = [(what, "epoch", i) for i in range(clf.n_iter_) for what in ("begin", "end")]
    assert listener.heard == ["setup", ("begin", "fit", 0), *epochs, ("end", "fit", 0), "teardown"]
    assert listener.tasks == [SHORT["max_epochs"], *[0] * clf.n_iter_]
    assert set(listener.metadata) == {None}
    # Each time as it was then, at the end as it is now.
    assert len({p.tobytes() for p in listener.predicted[:-1]}) == clf.n_iter_
    np.testing.assert_array_equal(listener.predicted[-1], clf.predict_proba(digits[0]))


def test_a_callback_changes_nothing(digits):
    plain = SoftEquivariantClassifier(**SHORT).fit(*digits)
    clf = SoftEquivariantClassifier(**SHORT).set_callbacks(Listener()).fit(*digits)
    assert vars(clf).keys() - vars(plain).keys() == {"_skl_callbacks"}
    for name in vars(plain).keys() - {"net_"}:
        np.testing.assert_equal(getattr(clf, name), getattr(plain, name), err_msg=name)
    np.testing.assert_array_equal(clf.predict_proba(digits[0]), plain.predict_proba(digits[0]))
    # Neither data nor tasks stay with the net.
    assert [name for name, _ in clf.net_.callbacks_] == ["evidence", "preconditioner", "course"]
    clf.set_callbacks()
    assert len(pickle.dumps(clf)) < 1.01 * len(pickle.dumps(plain))


def test_weights_are_passed_on(digits):
    listener, weights = Listener(), np.ones(60)
    clf = SoftEquivariantClassifier(**SHORT).set_callbacks(listener)
    clf.fit(*digits, sample_weight=weights)
    assert all(metadata["sample_weight"] is weights for metadata in listener.metadata)


def test_a_callback_may_stop_the_training(digits):
    listener = Listener(stop_after=5)
    clf = SoftEquivariantClassifier(**SHORT).set_callbacks(listener).fit(*digits)
    assert clf.n_iter_ == 5
    assert np.isfinite(clf.log_marginal_likelihood_value_)
    assert listener.heard[-1] == "teardown"


def test_a_callback_that_fails_ends_the_fit(digits):
    class Failing(Listener):
        def on_fit_task_end(self, estimator, context, **kwargs):
            raise KeyboardInterrupt

    failing = Failing()
    clf = SoftEquivariantClassifier(**SHORT).set_callbacks(failing)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*digits)
    assert failing.heard[-1] == "teardown"
    with pytest.raises(NotFittedError):
        clf.predict(digits[0])


def test_refused_data_end_the_task(digits):
    listener = Listener()
    clf = SoftEquivariantClassifier(**SHORT).set_callbacks(listener)
    with pytest.raises(ValueError, match="NaN"):
        clf.fit(np.full((60, 64), np.nan), digits[1])
    assert listener.heard == ["setup", ("begin", "fit", 0), "teardown"]


def test_partial_fit_has_no_tasks(digits):
    listener = Listener()
    SoftEquivariantClassifier(**SHORT).set_callbacks(listener).partial_fit(
        *digits, classes=range(10)
    )
    assert listener.heard == []


def test_scores_of_each_epoch(digits):
    X, y = digits
    monitor = ScoringMonitor(scoring="neg_log_loss")
    clf = SoftEquivariantClassifier(**SHORT, learn_prior=False).set_callbacks(monitor).fit(X, y)
    log = monitor.get_logs().data_as_pandas
    scores = log[log["task_name"] == "epoch"].sort_values("task_id")["neg_log_loss"]
    assert len(scores) == clf.n_iter_
    assert scores.iloc[-1] > scores.iloc[0]
    last = log[log["task_name"] == "fit"]["neg_log_loss"].item()
    assert last == pytest.approx(-log_loss(y, clf.predict_proba(X)))


def test_scores_before_there_is_a_posterior_are_without(digits):
    monitor = ScoringMonitor(scoring="neg_log_loss")
    clf = SoftEquivariantClassifier(**SHORT, predictive="laplace").set_callbacks(monitor)
    for _ in range(2):  # of the second fit, too, which has that of the first at hand
        clf.fit(*digits)
    log = monitor.get_logs().data_as_pandas
    scores = log[log["task_name"] == "epoch"]["neg_log_loss"]
    plain = ScoringMonitor(scoring="neg_log_loss")
    SoftEquivariantClassifier(**SHORT).set_callbacks(plain).fit(*digits)
    log = plain.get_logs().data_as_pandas
    expected = log[log["task_name"] == "epoch"]["neg_log_loss"]
    np.testing.assert_allclose(scores.to_numpy()[-len(expected) :], expected.to_numpy())


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_bars_of_a_search_over_a_pipeline(n_jobs, digits, capfd):
    model = make_pipeline(StandardScaler(with_std=False), SoftEquivariantClassifier(**SHORT))
    grid = {"softequivariantclassifier__width": [1, 2]}
    search = GridSearchCV(model, grid, cv=2, n_jobs=n_jobs)
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(*digits)
    printed = capfd.readouterr().out
    for level in ("GridSearchCV", "Pipeline", "SoftEquivariantClassifier"):
        assert level in printed
    assert "100%" in printed
    assert search.predict(digits[0]).shape == (60,)


# ── a scikit-learn without callbacks


def own_modules():
    return [name for name in sys.modules if name.partition(".")[0] == "sklearn_softeq"]


@pytest.fixture
def fresh(monkeypatch):
    """Imports the package once more, without ``sklearn.callback``; then all is as it was."""
    kept = {name: sys.modules.pop(name) for name in own_modules()}
    monkeypatch.setitem(sys.modules, "sklearn.callback", None)
    yield lambda: importlib.import_module("sklearn_softeq")
    for name in own_modules():
        del sys.modules[name]  # no class of it may be met beside its twin
    sys.modules.update(kept)


def test_without_callbacks_in_scikit_learn_a_fit_has_none(digits, fresh):
    X, y = digits
    options = {**SHORT, "max_epochs": 2, "start": "joint"}
    clf = fresh().SoftEquivariantClassifier(**options)
    assert not isinstance(clf, SoftEquivariantClassifier)
    assert "set_callbacks" not in dir(clf)
    expected = SoftEquivariantClassifier(**options).fit(X, y)
    np.testing.assert_array_equal(clf.fit(X, y).predict_proba(X), expected.predict_proba(X))


# ── lines that are printed


def test_progress_line(capsys):
    progress = [("progress", ProgressLine(np.ones(1)))]
    net = net_of(burn_in=2, every=2, max_epochs=5, callbacks=progress)
    data = data_of()
    net.partial_fit(data)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["curvature", "epoch 2/5", "epoch 4/5"]
    assert lines.pop(0) == "curvature: exact, all rows"
    evidence = net.history[1, "log_marginal_likelihood"] / data.n_observations
    assert lines[0] == (
        f"epoch 2/5: loss {net.history[1, 'train_loss']:.4f}, log evidence {evidence:.4f} "
        "nats per observation, 4 of 4 pathways on in 2 layers"
    )


def test_the_last_line_says_how_training_ended(capsys):
    line = ProgressLine(np.ones(1))
    net = net_of(max_epochs=4, schedule="cooldown").partial_fit(data_of())
    course = net.course
    for converged, capped, interrupted, said in (
        (True, False, 0, "converged"),
        (False, True, 0, "cap reached, not converged"),
        (False, False, 0, "stopped by a callback"),
        (True, False, 4, "broken off by an interrupt"),
    ):
        course.converged, course.capped, net.interrupted_ = converged, capped, interrupted
        line.ended(net, -24.0, 12.0)
        assert capsys.readouterr().out == (
            f"end after epoch 4: {said}; log evidence -2.0000 nats per observation, "
            "4 of 4 pathways on in 2 layers\n"
        )


def test_noises_in_units_of_the_targets(capsys):
    numbers = partial(Gaussian, (0.25, 1.0, 4.0), True)
    net = net_of(criterion=numbers).partial_fit(numbers_of())
    net.criterion_ = numbers()
    ProgressLine(np.array([1.0, 10.0, 1e6])).ended(net, 0.0, 1.0)
    assert ", noise 0.5, 10, 2e+06, " in capsys.readouterr().out
    net.criterion_ = Gaussian((1.0, 4.0, 0.01, 9.0, 1.0), True)
    ProgressLine(np.ones(5)).ended(net, 0.0, 1.0)
    assert ", noise 0.1 to 3, " in capsys.readouterr().out


def test_a_new_beginning_is_told(capsys, monkeypatch):
    monkeypatch.setattr("sklearn_softeq.course.LEARNT", 2.0)
    progress = [("progress", ProgressLine(np.ones(1)))]
    net = net_of(start="symmetric", burn_in=2, every=2, pathways=ALL, callbacks=progress)
    net.callbacks_.sort(key=lambda entry: entry[0] == "course")  # it comes last
    net.partial_fit(data_of(30))
    lines = capsys.readouterr().out.splitlines()
    said = [line.split(":")[0] for line in lines]
    assert said == ["curvature", "epoch 2/6", "start", "epoch 4/6", "epoch 6/6"]
    assert lines[2].startswith("start: joint, anew")
    net = net_of(pathways=ALL[:1], burn_in=2, every=1, spare_starts=1, callbacks=progress)
    net.callbacks_.sort(key=lambda entry: entry[0] == "course")
    net.partial_fit(data_of(30))
    lines = capsys.readouterr().out.splitlines()
    said = [line.split(":")[0] for line in lines]
    assert said == ["curvature", "epoch 2/6", "start", "epoch 4/6", "epoch 5/6", "epoch 6/6"]
    assert lines[2].startswith("start: other random weights")
