"""The evidence step, curvature for K-FAC, lengthscales, the course of a fit."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from nets import (
    ALL,
    EXACT,
    K,
    Record,
    assert_weights,
    begin,
    data_of,
    in_training,
    log_omegas,
    net_of,
    numbers_of,
    weights_of,
)
from skorch.callbacks import Callback

from sklearn_softeq import course
from sklearn_softeq.anchors import Interpolation
from sklearn_softeq.batches import TrainingData
from sklearn_softeq.course import EvidenceStep, Preconditioner
from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.kfac import KFAC
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.marginal_likelihood import (
    HYPER_SOLVERS,
    AdamSolver,
    FixedPointSolver,
    LaplaceEvidence,
    LengthscaleSolver,
)
from sklearn_softeq.schedules import STARTS, JointStart, LearningRate

LEARNT = course.LEARNT


pytestmark = pytest.mark.usefixtures("no_restart")


# ── the evidence step


@pytest.mark.parametrize(
    ("burn_in", "every", "expected"),
    [(3, 4, [3, 7, 11, 15]), (0, 5, [5, 10, 15]), (6, 1, [*range(6, 17)]), (20, 4, [])],
)
def test_epochs_of_the_evidence(burn_in, every, expected):
    step = EvidenceStep(FixedPointSolver(), 1, burn_in, every, EXACT, 0)
    assert [epoch for epoch in range(1, 17) if step.due(epoch)] == expected


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [(0.0, [1, 1, 1, 1]), (0.5, [1, 1, 1, 1]), (8.0, [0.5, 1, 1, 1]), (16.0, [0.25, 0.5, 0.75, 1])],
)
def test_weight_of_the_log_determinants(ramp, expected):
    step = EvidenceStep(FixedPointSolver(), 1, 3, 4, EXACT, 0, ramp=ramp)
    assert [step.log_det_weight(epoch) for epoch in (3, 7, 11, 15)] == expected
    step.ramp_from = 7
    assert [step.log_det_weight(epoch) for epoch in (3, 7)] == [float(ramp == 0.0)] * 2


def log_det_weights():
    """Those of all objectives that hyper steps are taken on, from here on."""
    found = []

    class Solver(FixedPointSolver):
        def step(self, objective, log_precision):
            found.append(objective.log_det_weight)
            return super().step(objective, log_precision)

    return found, Solver()


def test_hyper_steps_are_taken_with_the_weight_of_their_epoch_and_fully_in_the_end():
    found, solver = log_det_weights()
    options = {"solver": solver, "steps": 1, "burn_in": 1, "every": 1}
    net_of(**options, ramp=4.0, max_epochs=6).partial_fit(data_of())
    assert found == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    found.clear()
    net_of(**options, ramp=40.0, max_epochs=2).partial_fit(data_of())
    assert found == [1 / 40, 2 / 40, 1]


def test_the_ramp_begins_anew_at_the_release():
    found, solver = log_det_weights()
    options = {"solver": solver, "steps": 1, "burn_in": 3, "every": 1}
    net = net_of(start="symmetric", ramp=4.0, max_epochs=8, **options).partial_fit(data_of())
    assert not net.course.holding
    assert found == [0.25, 0.25, 0.5, 0.75, 1, 1, 1]


def test_nothing_is_concluded_before_the_log_determinants_count_fully():
    """Evidences fall from the first one on; training ends so long after the ramp."""

    class Worse(Callback):
        def on_epoch_end(self, net, **kwargs):
            if "log_marginal_likelihood" in net.history[-1]:
                net.history.record("log_marginal_likelihood", -1e3 * len(net.history))
                kept.append(net.course.best)

    for ramp, n_epochs in ((0.0, 4), (5.0, 8)):
        kept = []
        net = net_of(burn_in=1, every=1, ramp=ramp, max_epochs=20, patience=3)
        net.callbacks_.insert(1, ("worse", Worse()))
        net.partial_fit(data_of())
        assert len(net.history) == n_epochs
        assert [best is None for best in kept] == [i < max(ramp, 1) for i in range(n_epochs)]


def evaluated(seed, n_epochs=0, n_sketches=1):
    torch.manual_seed(5)
    data = data_of()
    net = net_of(evidence_seed=seed, n_sketches=n_sketches)
    begin(net, data)
    for _ in range(n_epochs):
        net.history.new_epoch()
    state = torch.get_rng_state()
    found = net.callbacks_[0][1].evaluate(net)
    assert torch.equal(torch.get_rng_state(), state)
    return found.evidence(net.prior_.log_precision)


def test_evidence_is_deterministic_for_a_seed():
    assert evaluated(3) == evaluated(3)
    assert evaluated(3).log_det_ratio != evaluated(4).log_det_ratio
    assert evaluated(3).log_det_ratio != evaluated(3, n_epochs=1).log_det_ratio  # new sketches
    assert evaluated(3, n_sketches=0) == evaluated(4, 2, n_sketches=0)
    assert evaluated(3).scatter == evaluated(4).scatter


def test_evidence_is_that_of_the_weights_the_data_and_n():
    data = data_of(n_observations=50.0)
    net = net_of(pathways=ALL, precision=2.0)
    begin(net, data)
    net.module_.blocks[0].enabled["fc"] = False
    found = net.callbacks_[0][1].evaluate(net).evidence(net.prior_.log_precision)
    log_p = net.module_(data.inputs).log_softmax(1)[range(12), data.targets]
    scale = 50.0 / data.weights.sum()
    assert found.log_likelihood == pytest.approx((scale * (data.weights * log_p).sum()).item())
    names = [name for name in weights_of(net) if not name.startswith("blocks.0.fc.")]
    squares = sum(weights_of(net)[name].square().sum().item() for name in names)
    assert found.scatter == pytest.approx(2.0 * squares)


@pytest.mark.parametrize("subset", [None, 5])
def test_the_linear_term_is_that_of_all_rows_at_the_end(subset):
    data = data_of(n_observations=50.0)
    net = net_of(subset=subset, burn_in=1, every=1, max_epochs=3)
    net.partial_fit(data)
    assert not net.laplace_.factors  # which are large
    batch = (data.inputs, data.targets, data.weights)
    factors = kronecker_factors(net.module_, Categorical(), [batch], total_weight=50.0).factors
    gradients, expected = in_training(net, data).log_joint_gradients(), 0.0
    for name, delta in net.prior_.precisions().items():
        matrix, g = factors[name].to_dense(), gradients[name]
        vector = (g.transpose(1, 2) if g.ndim == 3 else g).flatten()  # the inputs' index is slow
        eye = torch.eye(len(matrix), dtype=torch.float64)
        expected += 0.5 * (vector @ torch.linalg.solve(matrix + delta * eye, vector)).item()
    assert net.linear_term_ == pytest.approx(expected, rel=1e-6)


def test_no_linear_term_chunk_by_chunk():
    assert np.isnan(net_of(endless=True).partial_fit(data_of()).linear_term_)


def test_hyper_steps_raise_the_evidence_and_are_recorded():
    data, looks = data_of(), []

    class Before(Callback):
        def on_epoch_end(self, net, **kwargs):
            looks.append((net.prior_.log_precision.clone(), weights_of(net)))

    solver = FixedPointSolver()
    evidence = EvidenceStep(solver, 4, 2, 3, EXACT, 0)
    net = net_of(evidence=evidence, max_epochs=6, keep_best=False)
    net.callbacks_.insert(0, ("before", Before()))
    net.partial_fit(data)
    rows = net.history
    assert [("log_marginal_likelihood" in row) for row in rows] == [
        epoch in (2, 5) for epoch in range(1, 7)
    ]
    # At the mean of the weights since the last one, of at most three epochs.
    for i, since in ((1, 0), (4, 2)):
        row, log_precision = rows[i], looks[i][0]
        epochs = [weights for _, weights in looks[since : i + 1]]
        with torch.no_grad():
            for name, w in net.module_.named_parameters():
                w.copy_(sum(weights[name] for weights in epochs) / len(epochs))
        begin(net, data)
        objective = evidence.evaluate(net)
        start = objective.evidence(log_precision).value
        for _ in range(4):
            log_precision = solver.step(objective, log_precision)
        expected = objective.evidence(log_precision)
        assert row["log_marginal_likelihood"] == pytest.approx(expected.value, rel=1e-12)
        assert expected.value > start
        for term, value in expected._asdict().items():
            assert row[term] == pytest.approx(value, rel=1e-10)
        after = looks[i + 1][0]
        torch.testing.assert_close(after, log_precision, rtol=0, atol=1e-10)


def test_training_goes_on_from_its_own_weights():
    looks = []

    class Look(Callback):
        def on_epoch_end(self, net, **kwargs):
            looks.append(weights_of(net))

    # A drift of the gauge moves weights, but not this early.
    net = net_of(burn_in=5, every=3, max_epochs=5, callbacks=[("after", Look())])
    net.callbacks_.insert(0, ("before", Look()))
    net.partial_fit(data_of())
    before, after = looks[-2:]
    for name, w in before.items():
        assert torch.equal(after[name], w)
    means = sum(weights["head.output.weight"] for weights in looks[4::2]) / 3
    assert not torch.allclose(means, after["head.output.weight"])


def test_the_best_state_is_that_of_the_mean_weights():
    seen = {}

    class Look(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 4:
                seen["evidence"] = net.history[-1]["log_marginal_likelihood"]
                seen["state"] = net.course.evidence.state

        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) > 4:
                with torch.no_grad():
                    net.module_.head.output.weight.mul_(-30)

    net = net_of(burn_in=4, every=2, max_epochs=6, steps=1, callbacks=[("look", Look())])
    net.partial_fit(data_of())
    weights, prior, _ = seen["state"]
    assert_weights(net, {name: weights[name] for name in weights_of(net)})
    assert torch.equal(net.prior_.log_precision, prior["log_precision"])
    # One hyper step later its evidence is what it was, or more.
    assert net.laplace_.evidence(net.prior_.log_precision).value == pytest.approx(seen["evidence"])
    assert net.course.evidence.state is None


@pytest.mark.parametrize(("steps", "burn_in"), [(0, 1), (3, 10)])
def test_no_hyper_step_without_steps_or_before_the_burn_in(steps, burn_in):
    record = Record()
    net = net_of(
        steps=steps, burn_in=burn_in, every=1, precision=3.0, callbacks=[("record", record)]
    )
    net.partial_fit(data_of())
    for precisions in record.precisions:
        assert list(precisions.values()) == pytest.approx([3.0] * len(precisions))
    assert not any("log_marginal_likelihood" in row for row in net.history)
    # Nor at the end of a training that did not outlast its burn-in.
    at_the_end = list(net.prior_.precisions().values())
    assert at_the_end == pytest.approx([3.0] * len(at_the_end))


@pytest.mark.parametrize("steps", [0, 3])
def test_the_end_takes_the_hyper_steps_at_the_final_weights(steps):
    data, record = data_of(), Record()
    solver = FixedPointSolver()
    evidence = EvidenceStep(solver, steps, 2, 3, EXACT, 0)
    net = net_of(evidence=evidence, keep_best=False, callbacks=[("record", record)])
    net.partial_fit(data)
    assert_weights(net, record.weights[-1])
    begin(net, data)
    expected = torch.tensor([*record.precisions[-1].values()], dtype=torch.float64).log()
    objective = evidence.evaluate(net)
    for _ in range(steps):
        expected = solver.step(objective, expected)
    torch.testing.assert_close(net.prior_.log_precision, expected, rtol=0, atol=1e-10)
    value = net.laplace_.evidence(net.prior_.log_precision).value
    assert value == pytest.approx(objective.evidence(expected).value, rel=1e-10)


def test_new_precisions_count_from_the_next_step_on():
    data, decays = data_of(), []

    class Look(Callback):
        def on_batch_begin(self, net, **kwargs):
            precisions = net.prior_.precisions()
            expected = [precisions[name] / data.n_observations for name in net.prior_.index]
            decays.append([decay for _, decay, _ in net.decay_])
            assert decays[-1] == pytest.approx(expected)

    net_of(burn_in=2, every=2, callbacks=[("look", Look())]).partial_fit(data)
    assert decays[1] == decays[0] != decays[2]


@pytest.mark.parametrize("solver", [FixedPointSolver, AdamSolver])
def test_learning_the_prior_does_not_change_the_batches(solver):
    data, orders = data_of(), []
    learning = {"steps": 3, "solver": solver(), "n_sketches": 1}
    learning["lengthscales"] = LengthscaleSolver()
    for settings in ({"steps": 0}, learning):
        record, pathways = Record(), ("conv", "sparse_fc")
        net = net_of(
            **settings,
            pathways=pathways,
            burn_in=1,
            every=1,
            batch_size=5,
            callbacks=[("r", record)],
        )
        net.partial_fit(data)
        orders.append(torch.cat(record.inputs))
    assert torch.equal(*orders)


class Watched(Callback):
    """Outputs of the steps of the last epoch by row, and the rows that evidences see."""

    def on_train_begin(self, net, **kwargs):
        self.outputs = torch.full((len(net.data_), K), torch.nan, dtype=torch.float64)

    def on_batch_end(self, net, batch=None, y_pred=None, **kwargs):
        self.outputs[batch[1][2]] = y_pred.detach()


def test_a_sample_is_drawn_by_the_outputs_of_the_last_epoch(monkeypatch):
    data, seen, watched = data_of(40, weighted=True), [], Watched()
    drawn = TrainingData.sample

    def sample(self, size, traces, generator, copies):
        seen.append((size, copies, traces.clone(), watched.outputs.softmax(1)))
        return drawn(self, size, traces, generator, copies)

    monkeypatch.setattr(TrainingData, "sample", sample)
    settings = {"burn_in": 2, "every": 3, "max_epochs": 8, "batch_size": 7}
    net = net_of(n_sketches=1, subset=9, callbacks=[watched], **settings)
    # The evidence looks at the outputs after our callback has: callbacks are met in order.
    net.callbacks_.insert(0, net.callbacks_.pop())
    net.partial_fit(data)
    assert len(seen) == 4  # epochs 2, 5, 8 and the last weights; then all rows
    for size, copies, traces, p in seen:
        assert (size, copies) == (9, K - 1)
        torch.testing.assert_close(traces, 1 - p.square().sum(1))
    assert not torch.equal(seen[0][2], seen[1][2])


def test_input_factors_are_computed_once_and_again_for_what_is_released(monkeypatch):
    found, compute = [], course.input_factors

    def counting(*args, **kwargs):
        found.append(compute(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(course, "input_factors", counting)
    settings = {"pathways": ("conv", "factored_fc"), "burn_in": 2, "every": 1, "max_epochs": 6}
    net_of(start="symmetric", subset=7, **settings).partial_fit(data_of(20))
    free = "blocks.0.factored_fc.U"
    assert [set(each) for each in found] == [{"blocks.0.conv"}, {free}]
    found.clear()
    net_of(start="joint", **settings).partial_fit(data_of(20))
    assert len(found) == 1


@pytest.mark.parametrize("endless", [False, True])
def test_an_evidence_step_keeps_nothing_of_the_data(endless):
    net = net_of(subset=7, burn_in=1, every=1, max_epochs=2, endless=endless)
    net.partial_fit(data_of(20))
    evidence = net.course.evidence
    assert not evidence.sampled
    assert evidence._constants == evidence._known == {}


@pytest.mark.parametrize(("best_is_better", "lucky"), [(True, False), (False, True)])
def test_all_rows_are_asked_before_training_returns_to_the_best(monkeypatch, best_is_better, lucky):
    # The figures of samples say that the first state was the best one; all rows may differ.
    data = data_of(30)
    net = net_of(subset=9, burn_in=1, every=1, max_epochs=3, schedule="constant")
    sampled, complete, states = EvidenceStep.ascend, EvidenceStep.complete, []

    def ascend(self, net, objective):
        found = sampled(self, net, objective)
        states.append(weights_of(net))
        return found._replace(log_likelihood=0.0 if len(states) == 1 else -1e6)

    def of_all_rows(self, net, keep=False):
        found = complete(self, net)
        first = all(torch.equal(w, states[0][name]) for name, w in weights_of(net).items())
        return replace(found, log_likelihood=1e6 if first == best_is_better else -1e6)

    monkeypatch.setattr(EvidenceStep, "ascend", ascend)
    monkeypatch.setattr(EvidenceStep, "complete", of_all_rows)
    net.partial_fit(data)
    assert_weights(net, states[-1] if lucky else states[0])


def test_no_row_is_looked_at_when_all_are_seen(monkeypatch):
    monkeypatch.setattr(Categorical, "hessian_trace", None)
    for options in ({}, {"subset": 5, "steps": 0}):
        net = net_of(burn_in=1, every=1, max_epochs=3, **options)
        assert len(net.partial_fit(data_of()).history) == 3
    with pytest.raises(TypeError):  # but for a sample they are
        net_of(burn_in=1, every=1, max_epochs=3, subset=5).partial_fit(data_of())


# ── curvature for K-FAC


class Looks(Callback):
    """What K-FAC has been shown, by epoch."""

    def __init__(self):
        self.epochs = []

    def on_batch_begin(self, net, **kwargs):
        known = {name for name, w in net.enabled_tensors().items() if net.optimizer_.knows(w)}
        weights = [net.optimizer_.state[w]["weight"] for w in net.enabled_tensors().values()]
        self.epochs.append((len(net.history), known, weights))


def kfac_net(every_look=2, n_rows=256, **params):
    looks = Looks()
    preconditioner = Preconditioner(seed=7, n_columns=K - 1, every=every_look, n_rows=n_rows)
    callbacks = [("preconditioner", preconditioner), ("looks", looks)]
    return net_of(optimizer="kfac", lr=0.1, callbacks=callbacks, **params), looks


def test_curvature_is_looked_at_every_other_epoch():
    net, looks = kfac_net(burn_in=100, max_epochs=5)
    net.partial_fit(data_of())
    first, second = ((1 + 0.8), (1 + 0.8 + 0.64))
    expected = [1.0, 1.0, first, first, second]
    for (epoch, known, weights), weight in zip(looks.epochs, expected, strict=True):
        assert known == set(net.enabled_tensors()), epoch
        assert weights == pytest.approx([weight] * len(weights))


def test_pathways_that_are_released_are_looked_at_before_their_first_step():
    start = STARTS["symmetric"](threshold=0.0)  # which removes nothing
    net, looks = kfac_net(start=start, burn_in=2, every=3, max_epochs=4)
    net.partial_fit(data_of())
    sizes = [len(known) for _, known, _ in looks.epochs]
    assert sizes[0] == sizes[1] < sizes[2] == len(net.enabled_tensors())


def test_kfac_sees_the_curvature_of_the_rows_that_it_looks_at():
    data = data_of(20, n_observations=50.0)
    net, _ = kfac_net(burn_in=100, max_epochs=1)
    seen = {}
    observe = net.optimizer_.observe

    def spy(tensor, found, n):
        seen[id(tensor)] = found.to_dense()
        observe(tensor, found, n)

    net.optimizer_.observe = spy
    batch = (data.inputs, data.targets, data.weights)
    expected = kronecker_factors(net.module_, Categorical(), [batch], total_weight=50.0).factors
    net.partial_fit(data)
    for name, tensor in net.module_.named_parameters():
        torch.testing.assert_close(seen[id(tensor)], expected[name].to_dense())


@pytest.mark.parametrize(
    ("n_rows", "most", "columns"),
    [(20, 20 * (K - 1), "exact"), (20, 20 * (K - 1) - 1, "rademacher"), (8, 4096, "rademacher")],
)
def test_kfac_takes_all_columns_of_few_rows_else_random_ones(n_rows, most, columns, monkeypatch):
    seen = []

    def spy(*args, estimator, total_weight, generator, **options):
        seen.append((estimator.columns, total_weight, generator.initial_seed()))
        options |= {"estimator": estimator, "generator": generator}
        return kronecker_factors(*args, total_weight=total_weight, **options)

    monkeypatch.setattr(course, "kronecker_factors", spy)
    monkeypatch.setattr(course, "EXACT_COLUMNS", most)
    net, _ = kfac_net(burn_in=100, max_epochs=3, n_rows=n_rows)
    net.partial_fit(data_of(20, n_observations=50.0))
    # Other signs each time; what follows is the evidence at the end.
    assert seen[:2] == [(columns, 50.0, 7 + epoch) for epoch in (1, 3)]


def test_kfac_looks_at_so_many_rows_of_more(monkeypatch):
    sizes = []
    drawn = TrainingData.sample

    def sample(self, size, traces, generator):
        sizes.append((size, traces.unique().tolist()))
        return drawn(self, size, traces, generator)

    monkeypatch.setattr(TrainingData, "sample", sample)
    net, _ = kfac_net(burn_in=100, max_epochs=3, n_rows=8)
    net.partial_fit(data_of(20))
    assert sizes == [(8, [1.0])] * 2


def test_kfac_follows_the_gauge(monkeypatch):
    scales = {"blocks.0.factored_fc.U.weight": 2.0, "blocks.0.factored_fc.V.weight": 0.5}
    found = []
    monkeypatch.setattr(course, "fix_gauge", lambda network, prior: scales)
    net, _ = kfac_net(burn_in=1, every=1, max_epochs=1, schedule="constant")
    monkeypatch.setattr(net.optimizer_, "rescale", found.append)
    net.partial_fit(data_of())
    tensors = dict(net.module_.named_parameters())
    assert [{id(w): c for w, c in each.items()} for each in found] == [
        {id(tensors[name]): c for name, c in scales.items()}
    ]


def test_kfac_inverts_anew_where_precisions_have_moved(monkeypatch):
    inverted, precondition = [], KFAC.precondition

    def counting(self, decays):
        inverted.append(sorted(decays.values()))
        precondition(self, decays)

    monkeypatch.setattr(KFAC, "precondition", counting)
    net, _ = kfac_net(burn_in=3, every=20, max_epochs=8, every_look=5)
    net.partial_fit(data_of())
    # Looks before epochs 1 and 6; the evidence after epoch 3 has moved the precisions.
    assert len(inverted) == 3
    assert inverted[0] != inverted[1]


def test_a_curvature_for_kfac_that_is_no_number():
    net, _ = kfac_net(burn_in=2, every=1, max_epochs=3)

    class Spoil(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 2:
                next(net.module_.parameters()).data.fill_(torch.inf)

    net.callbacks_.append(("spoil", Spoil()))
    with pytest.raises(ValueError, match="curvature became infinite or NaN in epoch 3"):
        net.partial_fit(data_of())


def test_kfac_keeps_no_curvature():
    net, _ = kfac_net(burn_in=1, every=1, max_epochs=2)
    net.partial_fit(data_of())
    assert {name for state in net.optimizer_.state.values() for name in state} == {"momentum"}


# ── lengthscales

SPARSE = ("sparse_conv", "sparse_fc")


class Lengthscales(Callback):
    """log ω of every map at the beginning and at the end of each epoch, in turns."""

    def __init__(self):
        self.begin, self.end = [], []

    def on_epoch_begin(self, net, **kwargs):
        self.begin.append(log_omegas(net))

    def on_epoch_end(self, net, **kwargs):
        self.end.append(log_omegas(net))


def learned(data=None, callbacks=(), **options):
    """A fit that learns lengthscales, and a record of them."""
    record = Lengthscales()
    options = {"pathways": SPARSE, "lengthscales": LengthscaleSolver(), **options}
    net = net_of(callbacks=[*callbacks, ("lengthscales", record)], **options)
    return net.partial_fit(data_of() if data is None else data), record


def changes(record):
    """Epochs at whose beginning an ω moved; at no other time does one move."""
    for at_begin, at_end in zip(record.begin, record.end, strict=True):
        assert at_begin == at_end
    before = [dict.fromkeys(record.begin[0], 0.0), *record.end[:-1]]
    return [
        i
        for i, pair in enumerate(zip(before, record.begin, strict=True), 1)
        if len({*map(str, pair)}) > 1
    ]


def assert_interpolations_fit_their_lengthscales(net):
    for psi in net.module_.interpolations.values():
        fresh = Interpolation(psi.grid, psi.n_anchors / psi.matrix.shape[1]).double()
        fresh.set_log_omega(psi.log_omega.item())
        torch.testing.assert_close(psi.matrix, fresh.matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lengthscales": None}, []),
        ({"steps": 0}, []),  # the prior is fixed, and so is this part of it
        ({"burn_in": 2, "every": 3}, [3, 6]),
        ({"burn_in": 1, "every": 1}, [*range(2, 9)]),
        ({"burn_in": 8, "every": 1}, []),  # no epoch is left
        ({"burn_in": 2, "every": 3, "schedule": "cosine"}, [3, 6]),
    ],
    ids=str,
)
def test_lengthscales_step_at_the_beginning_of_the_next_epoch(options, expected):
    net, record = learned(**{"max_epochs": 8, "keep_best": False, **options})
    assert changes(record) == expected
    assert log_omegas(net) == record.end[-1]
    assert_interpolations_fit_their_lengthscales(net)


def test_a_step_follows_the_evidence_of_the_epoch_before():
    data, expected = data_of(), []
    twin = LengthscaleSolver()

    class Predict(Callback):  # after the evidence: at the precisions that it has found
        def on_epoch_end(self, net, **kwargs):
            evidence = net.callbacks_[0][1]
            if not evidence.due(len(net.history)) or net.course.rate.cooling:
                return
            objective = evidence.evaluate(net)
            gradient = objective.lengthscale_gradient(net.prior_.log_precision)
            assert list(gradient) == list(net.module_.interpolations)
            expected.append(twin.step(log_omegas(net), gradient))

    # Of every epoch, so that the mean weights are the present ones.
    settings = {"burn_in": 2, "every": 1, "max_epochs": 5, "precision": 5.0}
    _, record = learned(data, callbacks=[("predict", Predict())], **settings)
    assert len(expected) == 3
    for epoch, predicted in zip((3, 4, 5), expected, strict=True):
        assert record.begin[epoch - 1] == pytest.approx(predicted, rel=1e-9, abs=1e-12)
        moved = [name for name, value in predicted.items() if abs(value) > 1e-3]
        assert len(moved) == len(predicted) - 1  # the output of the last block is one pixel


def test_weights_that_are_averaged_share_their_lengthscales():
    net, record = learned(burn_in=2, every=1, schedule="cooldown", max_epochs=16, keep_best=False)
    assert len(net.history) == 16
    first = net.course.rate.cooldown_from + 1
    assert first == 13
    assert changes(record)[:3] == [3, 4, 5]
    assert all(omegas == record.end[first - 1] for omegas in record.end[first:])
    assert log_omegas(net) == record.end[-1]
    assert net.laplace_.slopes == {}  # which would cost a pass


def test_the_best_state_has_its_lengthscales():
    data, record = data_of(), Record()

    class Spoil(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) > 5:
                with torch.no_grad():
                    net.module_.head.output.weight.mul_(-30)

    callbacks = [("record", record), ("spoil", Spoil())]
    net, omegas = learned(data, callbacks=callbacks, burn_in=1, every=1, max_epochs=8)
    figures = net.history[:, "log_marginal_likelihood"]
    best = int(np.argmax(figures))
    assert best < 6
    assert_weights(net, record.weights[best])
    assert log_omegas(net) == omegas.end[best] != omegas.end[-1]
    assert_interpolations_fit_their_lengthscales(net)
    value = net.laplace_.evidence(net.prior_.log_precision).value
    assert value == pytest.approx(figures[best], rel=1e-6)


def test_what_is_off_has_no_slope_and_keeps_its_lengthscale():
    removed = {}

    class Remove(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 6:
                net.module_.blocks[0].remove("sparse_fc")
                removed.update(log_omegas(net))

    start = STARTS["symmetric"](threshold=0.0)  # which removes nothing by itself
    options = {"start": start, "burn_in": 3, "every": 1, "max_epochs": 12}
    net, record = learned(callbacks=[("remove", Remove())], keep_best=False, **options)
    held = {name for name in log_omegas(net) if "sparse_fc" in name}
    for epoch in (1, 2, 3, 4):  # released at the end of epoch 3, first seen in epoch 4
        assert all(record.end[epoch - 1][name] == 0 for name in held)
    for name in ("blocks.0.sparse_fc.U", "blocks.0.sparse_fc.V"):
        assert removed[name] != 0
        assert len({omegas[name] for omegas in record.end[7:]}) == 1
        # It was still there at the evidence before its end, and takes that step at most.
        assert abs(record.end[-1][name] - removed[name]) < 0.11
    assert len({omegas["blocks.1.sparse_fc.U"] for omegas in record.end[5:]}) == 7


def test_endless_training_learns_lengthscales_from_call_to_call():
    data, seen = data_of(), []
    net = net_of(
        pathways=SPARSE, lengthscales=LengthscaleSolver(), endless=True, burn_in=2, every=2
    )
    for _ in range(6):
        net.partial_fit(data)
        seen.append(str(log_omegas(net)))
    assert [a != b for a, b in itertools.pairwise(seen)] == [False, True, False, True, False]


def test_another_net_takes_the_lengthscales_over():
    first, record = learned(burn_in=1, every=1, keep_best=False)
    second = net_of(pathways=SPARSE, seed=1)
    second.take_over(first)
    assert log_omegas(second) == log_omegas(first) == record.end[-1]
    assert_interpolations_fit_their_lengthscales(second)
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(second.module_(x), first.module_(x))
    first.module_.interpolations["blocks.0.sparse_conv"].set_log_omega(-0.9)
    assert log_omegas(second) != log_omegas(first)


def test_slopes_do_not_know_of_the_gauge():
    data = data_of()
    evidence = EvidenceStep(FixedPointSolver(), 1, 1, 1, EXACT, 0, LengthscaleSolver())
    net = net_of(pathways=("sparse_fc",), evidence=evidence, max_epochs=1)
    begin(net, data)
    u, v = (f"blocks.0.sparse_fc.{factor}.weight" for factor in "UV")
    with torch.no_grad():
        net.module_.get_parameter(u).mul_(1e-3)
        net.module_.get_parameter(v).mul_(1e3)
    net.prior_.set_precision(u, 1e6)
    net.prior_.set_precision(v, 1e-4)
    objective = evidence.evaluate(net)
    log_precision = evidence.solver.step(objective, net.prior_.log_precision)
    expected = objective.lengthscale_gradient(log_precision)
    net.update_decay()
    net.history.new_epoch()
    evidence.on_epoch_end(net)
    assert net.prior_.precisions()[u] != pytest.approx(log_precision[net.prior_.index[u]].exp())
    assert evidence._slopes == pytest.approx(expected, rel=1e-6)


# ── the course of a fit


class Scripted(LaplaceEvidence):
    """All that is there is in use."""

    def effective_dimensions(self, log_precision):
        return dict.fromkeys(self.index, 9.0)


class Script(EvidenceStep):
    """An evidence that follows a script, by epoch; the last value is that at the end."""

    def __init__(self, values, final=None, dimensions=None, burn_in=1):
        super().__init__(FixedPointSolver(), 1, burn_in, 1, EXACT, 0)
        self.values = values
        self.final = values[-1] if final is None else final
        self.dimensions = dimensions or {}

    def evaluate(self, net, final=False, keep=False):
        return Scripted(self.final, {}, {}, net.prior_.index)

    def on_epoch_end(self, net, **kwargs):
        epoch = len(net.history)
        if self.due(epoch):
            value = self.values[min(epoch, len(self.values)) - 1]
            net.history.record("log_marginal_likelihood", value)
            net.effective_dimensions_ = self.dimensions.get(
                epoch, dict.fromkeys(weights_of(net), 9)
            )
            net.prior_.log_precision.fill_(0.1 * epoch)


def scripted(values, *, final=None, dimensions=None, burn_in=1, **settings):
    record = Record()
    script = Script(values, final, dimensions, burn_in)
    net = net_of(evidence=script, callbacks=[("record", record)], **settings)
    return net.partial_fit(data_of()), record


RISING = [float(i) for i in range(100)]


def test_best_state_is_restored_if_the_last_is_worse():
    net, record = scripted([-9.0, -5.0, -1.0, -7.0, -6.0, -5.0])
    assert len(net.history) == 6
    assert_weights(net, record.weights[2])
    assert net.prior_.precisions() == record.precisions[2]
    # What it was is not what it became.
    best, last = (record.weights[epoch]["head.output.weight"] for epoch in (2, 5))
    assert not torch.equal(best, last)
    assert record.precisions[2] != record.precisions[5]


@pytest.mark.parametrize(
    ("final", "keep_best"), [(-0.9, True), (-1.0, True), (-7.0, False)], ids=str
)
def test_last_state_is_kept_if_it_is_no_worse_or_if_one_wants_so(final, keep_best):
    net, record = scripted([-9.0, -5.0, -1.0, -7.0], final=final, keep_best=keep_best)
    assert_weights(net, record.weights[-1])
    assert net.prior_.precisions() == record.precisions[-1]


def test_the_best_state_knows_what_was_switched_off():
    dimensions = {epoch: dict.fromkeys(weights_of(net_of()), 0.0) for epoch in (3, 4, 5, 6)}
    settings = {"start": "symmetric", "burn_in": 1, "dimensions": dimensions}
    values = [-9.0, -1.0, -5.0, -5.0, -5.0, -5.0]
    net, record = scripted(values, **settings)
    assert [on["factored_fc"] for on in record.enabled[-1]] == [False, False]
    assert [block.enabled["factored_fc"] for block in net.module_.blocks] == [True, True]
    assert_weights(net, record.weights[1])
    assert net.module_.blocks[0].factored_fc.V.weight.abs().max() > 0


class Idle(Scripted):
    """The free pathway of the first block does nothing any more."""

    def effective_dimensions(self, log_precision):
        return {n: 0.0 if n.startswith("blocks.0.factored") else 9.0 for n in self.index}


@pytest.mark.parametrize(("fall", "goes"), [(0.1, True), (20.0, False)])
def test_what_idles_in_the_end_goes_unless_the_evidence_falls(fall, goes, monkeypatch):
    data, looks = data_of(), []

    def evaluate(self, net, final=False, keep=False):
        on = net.module_.blocks[0].enabled["factored_fc"]
        looks.append((on, final or keep))
        return Idle(5.0 if on else 5.0 - fall, {}, {}, net.prior_.index)

    monkeypatch.setattr(Script, "evaluate", evaluate)
    monkeypatch.setattr(Script, "complete", evaluate)
    record, script = Record(), Script(RISING, burn_in=1)
    net = net_of(evidence=script, start="symmetric", callbacks=[("record", record)])
    net.course.plateau.tol = 1.0  # for each of about 12 observations
    net.partial_fit(data)
    assert looks == [(True, True), (False, True)]
    first = net.module_.blocks[0]
    assert first.enabled["factored_fc"] is not goes
    assert first.removed("factored_fc") is goes
    kept = {n: w for n, w in weights_of(net).items() if not n.startswith("blocks.0.factored")}
    assert all(torch.equal(w, record.weights[-1][n]) for n, w in kept.items())
    if not goes:
        assert_weights(net, record.weights[-1])


def test_without_evidence_the_log_joint_is_the_figure():
    data, record = data_of(), Record()
    settings = {"steps": 0, "burn_in": 1, "every": 3, "max_epochs": 8, "lr": 0.05}
    settings["ramp"] = 100.0  # where no precision is learned there is none
    net = net_of(**settings, callbacks=[("record", record)])
    net.partial_fit(data)
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0]
    assert_weights(net, record.weights[-1])  # it was still falling
    # A last step that spoils everything.

    class Spoil(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 8:
                with torch.no_grad():
                    net.module_.head.output.weight.mul_(-30)

    net = net_of(**settings, callbacks=[("spoil", Spoil())])
    net.partial_fit(data)
    assert_weights(net, record.weights[6])  # the state at the last evaluation, in epoch 7


def test_weights_of_the_cooldown_are_averaged():
    # 3/4 of 12 epochs, then a cool-down of 3.
    net, record = scripted(RISING, final=1e9, schedule="cooldown", max_epochs=12)
    assert len(net.history) == 12
    assert net.course.capped
    for name, w in weights_of(net).items():
        mean = torch.stack([weights[name] for weights in record.weights[9:]]).mean(0)
        torch.testing.assert_close(w, mean, rtol=1e-12, atol=1e-14)
    assert not torch.equal(
        record.weights[9]["head.output.weight"], weights_of(net)["head.output.weight"]
    )


@pytest.mark.parametrize("learn", [True, False])
def test_no_fit_of_a_learned_prior_is_too_sure(learn, monkeypatch):
    monkeypatch.setattr(course, "LEAST_LOSS", 0.9)
    data, record = data_of(), Record()
    settings = {"schedule": "cooldown", "max_epochs": 12, "lr": 0.05, "burn_in": 2, "every": 2}
    net = net_of(callbacks=[("record", record)], steps=2 * learn, keep_best=False, **settings)
    net.partial_fit(data)
    means = {
        name: torch.stack([weights[name] for weights in record.weights[9:]]).mean(0)
        for name in weights_of(net)
    }
    scales = {name: w / means[name] for name, w in weights_of(net).items()}
    scale = scales["head.output.bias"][0].item()
    for name, found in scales.items():
        expected = scale if name.startswith("head.output.") else 1.0
        torch.testing.assert_close(found, torch.full_like(found, expected), msg=name)
    log_p = net.module_(data.inputs).log_softmax(1)[range(len(data)), data.targets]
    loss = -torch.dot(data.weights, log_p).item() / data.weights.sum().item()
    if learn:
        assert 0.1 < scale < 0.95
        assert loss == pytest.approx(0.9)
    else:
        assert scale == pytest.approx(1.0)
        assert loss < 0.8


def test_weights_are_averaged_in_one_gauge(monkeypatch):
    epochs = []

    def fix_gauge(network, prior):
        epochs.append(len(net.history))
        return {}

    monkeypatch.setattr(course, "fix_gauge", fix_gauge)
    net = net_of(burn_in=2, every=1, schedule="cooldown", max_epochs=12)
    net.partial_fit(data_of())
    assert epochs == [*range(2, 10)]  # not in the cool-down


def without(*prefixes):
    """Effective dimensions of which these are none."""
    return {name: 0.0 if name.startswith(prefixes) else 9.0 for name in weights_of(net_of())}


def test_averaging_leaves_removed_pathways_zero():
    net, record = scripted(
        RISING,
        final=1e9,
        dimensions={9: without("blocks.1.factored_fc")},  # 9 is the last epoch at the full rate
        start=STARTS["symmetric"](patience=1),
        schedule="cooldown",
        max_epochs=12,
        burn_in=2,
    )
    assert record.weights[7]["blocks.1.factored_fc.V.weight"].abs().max() > 0
    assert [block.enabled["factored_fc"] for block in net.module_.blocks] == [True, False]
    assert all(torch.count_nonzero(w) == 0 for w in net.module_.blocks[1].factored_fc.parameters())
    name = "blocks.0.factored_fc.V.weight"
    mean = torch.stack([weights[name] for weights in record.weights[9:]]).mean(0)
    torch.testing.assert_close(weights_of(net)[name], mean, rtol=1e-12, atol=1e-14)


def test_nothing_is_removed_while_the_rate_falls():
    # The others could no longer take over what a pathway still did.
    settings = {"schedule": "cooldown", "max_epochs": 12, "burn_in": 2}
    dimensions = dict.fromkeys((10, 11, 12), without("blocks.1.factored_fc"))
    start = STARTS["symmetric"](patience=1)
    net, _ = scripted(RISING, final=1e9, dimensions=dimensions, start=start, **settings)
    assert len(net.history) == 12
    assert all(all(block.enabled.values()) for block in net.module_.blocks)


def test_the_best_state_is_that_before_a_removal():
    # The figure is that of the network that still had the pathway.
    net, record = scripted(
        [-9.0, -5.0, -1.0, -7.0, -6.0],
        dimensions={3: without("blocks.0.factored_fc")},
        start=STARTS["symmetric"](patience=1),
        max_epochs=5,
    )
    assert [enabled[0]["factored_fc"] for enabled in record.enabled] == [True] * 2 + [False] * 3
    assert net.module_.blocks[0].enabled["factored_fc"]
    assert net.module_.blocks[0].factored_fc.V.weight.abs().max() > 0
    assert torch.equal(
        weights_of(net)["head.output.weight"], record.weights[2]["head.output.weight"]
    )


@pytest.mark.parametrize(
    ("schedule", "n_epochs"), [("constant", 9), ("cosine", 9), ("cooldown", 12)]
)
def test_training_ends_after_the_plateau(schedule, n_epochs):
    net, record = scripted(
        [*RISING[:7], 6.0], schedule=schedule, max_epochs=100, patience=2, lr=1e-3
    )
    assert len(net.history) == n_epochs
    assert net.course.converged
    assert not net.course.capped
    expected = [LearningRate(schedule, 1e-3, 100).at(epoch) for epoch in range(1, 10)]
    assert record.rates[:9] == pytest.approx(expected)
    assert record.rates[9:] == sorted(record.rates[9:], reverse=True)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "cooldown"])
@pytest.mark.parametrize("max_epochs", [1, 2, 3, 9])
def test_training_never_goes_beyond_the_cap(schedule, max_epochs):
    net, _ = scripted(RISING, schedule=schedule, max_epochs=max_epochs, patience=1, lr=1e-3)
    assert max_epochs - (schedule == "cooldown") <= len(net.history) <= max_epochs
    assert net.course.capped
    assert not net.course.converged


def test_release_at_the_end_of_the_burn_in():
    values = [*[0.0] * 6, *RISING]  # without a rise before the release
    net, record = scripted(
        values, start="symmetric", burn_in=3, schedule="cooldown", max_epochs=16, patience=9
    )
    on = [enabled[0]["factored_fc"] for enabled in record.enabled]
    assert on == [False] * 2 + [True] * (len(net.history) - 2)
    assert torch.count_nonzero(record.weights[2]["blocks.0.factored_fc.U.weight"]) == 0
    assert record.weights[3]["blocks.0.factored_fc.U.weight"].abs().max() > 0
    full = 0.01
    assert record.rates[:9] == pytest.approx(
        [full * f for f in (0.2, 0.4, 0.6, 0.2, 0.4, 0.6, 0.8, 1, 1)]
    )


def test_what_is_released_goes_at_the_pace_of_its_prior():
    seen = []

    class Look(Callback):
        def on_batch_end(self, net, **kwargs):
            rates = {id(p): g["lr"] for g in net.optimizer_.param_groups for p in g["params"]}
            tensors = net.module_.named_parameters()
            seen.append(({n: rates[id(p)] for n, p in tensors}, net.prior_.precisions()))

    net = net_of(
        start="symmetric",
        burn_in=2,
        every=1,
        schedule="cooldown",
        max_epochs=8,
        callbacks=[("look", Look())],
    )
    net.partial_fit(data_of())
    released = net.course.start.released
    assert set(released) == {n for n, _ in net.module_.named_parameters() if "factored_fc" in n}
    for epoch, (rates, precisions) in enumerate(seen, 1):
        full = rates["blocks.0.conv.weight"]
        for name, rate in rates.items():
            # Precisions that count in an epoch are those at its beginning.
            slower = epoch > 2 and name in released and precisions[name] > released[name]
            factor = math.sqrt(released[name] / precisions[name]) if slower else 1.0
            assert rate == pytest.approx(full * factor, rel=1e-9)
    assert any(rates["blocks.0.conv.weight"] > min(rates.values()) for rates, _ in seen)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_start_that_has_learnt_nothing_begins_anew(monkeypatch, steps):
    # At the end of the burn-in, with all pathways from random weights and the first precisions.
    looks, rates = [], LearningRate("cooldown", 0.01, 16)
    rates.rewarm(3)

    class Look(Callback):
        def on_epoch_end(self, net, **kwargs):
            looks.append((weights_of(net), net.prior_.precisions()))

    for learnt in (-np.inf, np.inf):
        monkeypatch.setattr(course, "LEARNT", learnt)
        record, settings = Record(), {"start": "symmetric", "burn_in": 3, "every": 3}
        net = net_of(
            **settings,
            steps=steps,
            precision=2.0,
            schedule="cooldown",
            max_epochs=16,
            callbacks=[("record", record), ("look", Look())],
        )
        net.partial_fit(data_of())
        assert record.enabled[2][0]["factored_fc"]
        assert record.rates[3:9] == pytest.approx([rates.at(epoch) for epoch in range(4, 10)])
    assert isinstance(net.course.start, JointStart)  # no charges, and nothing is removed
    # The factor that it was built with, times that of the joint start.
    assert [block.scale for block in net.module_.blocks] == pytest.approx([0.5, 0.5])
    released, anew = looks[2], looks[len(looks) // 2 + 2]
    assert torch.count_nonzero(released[0]["blocks.0.factored_fc.U.weight"]) == 0
    assert list(anew[1].values()) == pytest.approx([2.0] * len(anew[1]))
    for name, weight in anew[0].items():
        assert (torch.count_nonzero(weight) == 0) == name.endswith("bias")
        if not name.endswith("bias"):
            assert not torch.equal(weight, released[0][name])


def test_a_restarted_net_is_taken_over_with_its_factors(monkeypatch):
    monkeypatch.setattr(course, "LEARNT", np.inf)
    settings = {"start": "symmetric", "burn_in": 1, "module__scale": "symmetric"}
    first = net_of(**settings).partial_fit(data_of())
    second = net_of(**settings, seed=1)
    assert [block.scale for block in second.module_.blocks] == [1, 1]
    second.take_over(first)
    assert [block.scale for block in second.module_.blocks] == pytest.approx([2**-0.5] * 2)
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(second.module_(x), first.module_(x))


def test_a_restart_forgets_slopes_and_moments(monkeypatch):
    # Those of weights that are gone: lengthscales wait for the next evidence.
    steps = []

    class Look(Callback):
        def on_batch_begin(self, net, **kwargs):
            states = net.optimizer_.state.values()
            steps.append(max((int(state["step"]) for state in states), default=0))

    for learnt in (-np.inf, np.inf):
        monkeypatch.setattr(course, "LEARNT", learnt)
        options = {"start": "symmetric", "burn_in": 3, "every": 1, "max_epochs": 8}
        steps.clear()
        _, record = learned(callbacks=[("look", Look())], keep_best=False, **options)
        assert (4 in changes(record)) == (learnt < 0)
        assert 5 in changes(record)
        assert steps == [0, 1, 2, *([3, 4, 5, 6, 7] if learnt < 0 else [0, 1, 2, 3, 4])]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("start", "pathways"), [("symmetric", ("conv",)), ("joint", ("conv", "factored_fc"))]
)
def test_a_network_that_holds_nothing_back_has_spare_starts(monkeypatch, start, pathways, steps):
    looks, due = [], []

    class Look(Callback):
        def on_epoch_end(self, net, **kwargs):
            states = [int(state["step"]) for state in net.optimizer_.state.values()]
            due.append("log_marginal_likelihood" in net.history[-1])
            looks.append((weights_of(net), net.prior_.precisions(), max(states, default=0)))

    monkeypatch.setattr(course, "LEARNT", np.inf)
    settings = {"start": start, "pathways": pathways, "burn_in": 3, "every": 2, "steps": steps}
    settings |= {"precision": 2.0, "schedule": "cooldown", "max_epochs": 16, "ramp": 4.0}
    net = net_of(**settings, spare_starts=2, callbacks=[("look", Look())])
    net.partial_fit(data_of())
    assert net.course.spare_starts == 0
    # Each begins as the first has: at the first precisions, without moments, with a burn-in.
    for epoch in (3, 6):
        weights, precisions, moments = looks[epoch - 1]
        assert list(precisions.values()) == pytest.approx([2.0] * len(precisions))
        assert moments == 0
        for name, weight in weights.items():
            assert (torch.count_nonzero(weight) == 0) == name.endswith("bias")
    drawn = [looks[epoch - 1][0]["head.output.weight"] for epoch in (3, 6)]
    assert not torch.equal(*drawn)
    if steps:
        assert [epoch for epoch, now in enumerate(due, 1) if now][:5] == [3, 6, 9, 11, 13]
        assert net.course.evidence.log_det_weight(9) == 0.5
    twin = net_of(**settings, callbacks=[("look", Look())])
    looks.clear()
    twin.partial_fit(data_of())
    assert all(moments for *_, moments in looks)  # no spare start, and none is taken


def test_a_network_that_has_learnt_something_keeps_its_start(monkeypatch):
    monkeypatch.setattr(course, "LEARNT", -np.inf)
    data, settings = data_of(), {"start": "symmetric", "pathways": ("conv",), "burn_in": 2}
    without, with_spare = (net_of(**settings, spare_starts=n).partial_fit(data) for n in (0, 2))
    assert with_spare.course.spare_starts == 2
    found = weights_of(with_spare)
    assert all(torch.equal(weight, found[name]) for name, weight in weights_of(without).items())


def test_what_a_network_explains():
    data, net = data_of(n=40), net_of(pathways=ALL)
    data.targets[:] = torch.randint(K - 1, (40,))  # a class that does not occur
    in_training(net, data)
    log_p = net.module_(data.inputs).log_softmax(1)[range(40), data.targets]
    shares = [data.weights[data.targets == k].sum() / data.weights.sum() for k in range(K - 1)]
    entropy = -sum(share * share.log() for share in shares)
    mean_log_p = (data.weights * log_p).sum() / data.weights.sum()
    assert net.explained() == pytest.approx((1 + mean_log_p / entropy).item(), rel=1e-10)
    with torch.no_grad():  # the best constant: nothing is explained
        for weight in net.module_.parameters():
            weight.zero_()
        net.module_.head.output.bias[: K - 1] = torch.tensor(shares).log()
        net.module_.head.output.bias[K - 1] = -1e4
    assert net.explained() == pytest.approx(0.0, abs=1e-10)


# ── a noise that is learned

LEARNED = partial(Gaussian, 1.0, True)


class NoteNoise(Callback):
    """The noise after each epoch, and what the optimizer has of curvature."""

    def __init__(self):
        self.noises, self.precisions = [], []

    def on_epoch_end(self, net, **kwargs):
        self.noises.append(net.criterion_.noise_variance)
        self.precisions.append(net.prior_.log_precision.clone())


def noisy(**options):
    note = NoteNoise()
    # Under a strong prior γ is small, and the noise below its bound.
    options = {"precision": 1e3, **options}
    net = net_of(criterion=LEARNED, callbacks=[("note", note)], **options)
    return net, note


@pytest.mark.parametrize("solver", HYPER_SOLVERS)
def test_noise_ascends_with_the_precisions(solver):
    net, note = noisy(burn_in=2, every=2, max_epochs=6, solver=HYPER_SOLVERS[solver]())
    net.partial_fit(numbers_of(30))
    noises = np.array(note.noises)
    assert (np.flatnonzero(np.diff(noises, prepend=1.0)) + 1).tolist() == [2, 4, 6]
    # The last evidence is of the noise that is left, and its figures are those of the net.
    at = net.log_hyperparameters()
    assert at[-1].item() == -math.log(net.criterion_.noise_variance)
    found = net.laplace_.evidence(at)
    assert found.log_likelihood == pytest.approx(net.log_likelihood(numbers_at(net)), rel=1e-9)


def numbers_at(net):
    """The data of the test above, once more."""
    torch.manual_seed(0)
    return numbers_of(30)


def test_steps_of_the_noise_raise_the_evidence():
    net, _ = noisy(burn_in=1, every=1, max_epochs=1, steps=5)
    looks = []
    ascend = net.course.evidence.ascend

    def watched(net, objective):
        before = objective.evidence(net.log_hyperparameters()).value
        after = ascend(net, objective)
        looks.append(after.value - before)
        there = objective.evidence(net.log_hyperparameters())
        assert there == pytest.approx(after, rel=1e-12)
        return after

    net.course.evidence.ascend = watched
    net.partial_fit(numbers_of(30))
    assert min(looks) > 0


def test_the_noise_alone():
    net, note = noisy(noise_alone=True, start="symmetric", max_epochs=8, pathways=ALL)
    assert not net.course.evidence.learns_prior
    net.partial_fit(numbers_of(30))
    assert len(set(note.noises)) == 5  # that of the start, and of four evidences
    assert all(torch.equal(found, note.precisions[0]) for found in note.precisions)
    assert not net.removed_tensors()
    assert all(on for block in net.module_.blocks for on in block.enabled.values())


def test_a_noise_that_is_given_stays():
    note = NoteNoise()
    net = net_of(criterion=partial(Gaussian, 0.3), callbacks=[("note", note)])
    net.partial_fit(numbers_of(30))
    assert set(note.noises) == {0.3}
    assert net.laplace_.noise is None
    assert len(net.log_hyperparameters()) == len(net.prior_.log_precision)


def test_the_best_state_has_its_noise():
    class Spoil(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) > 4:
                with torch.no_grad():
                    net.module_.head.output.weight.mul_(-30)

    net, note = noisy(burn_in=4, every=2, max_epochs=6, steps=1)
    net.callbacks_.append(("spoil", Spoil()))
    net.partial_fit(numbers_of(30))
    assert net.criterion_.noise_variance == pytest.approx(note.noises[3])
    assert note.noises[5] > 2 * note.noises[3]


def test_a_new_beginning_has_the_noise_of_the_start(monkeypatch):
    monkeypatch.setattr("sklearn_softeq.course.LEARNT", 2.0)
    net, note = noisy(start="symmetric", burn_in=2, every=2, max_epochs=3, pathways=ALL)
    net.partial_fit(numbers_of(30))
    assert isinstance(net.course.start, JointStart)
    assert note.noises[1] == 1.0


def test_explained_is_the_share_of_the_variance():
    data = numbers_of(30)
    net = in_training(net_of(criterion=partial(Gaussian, 0.2)), data)
    left = (data.weights @ (net.module_(data.inputs) - data.targets).square().sum(1)).item()
    apart = data.targets - data.weights @ data.targets / data.weights.sum()
    whole = (data.weights @ apart.square().sum(1)).item()
    assert net.explained() == pytest.approx(1 - left / whole)


def test_a_single_class_leaves_nothing_to_explain():
    data, net = data_of(), net_of()
    data.targets[:] = 1
    assert in_training(net, data).explained() == 1.0


@pytest.mark.parametrize(("symmetric", "anew"), [(True, False), (False, True)])
def test_whether_a_symmetric_start_has_learnt(symmetric, anew, monkeypatch):
    monkeypatch.setattr(course, "LEARNT", LEARNT)
    # The total of an image against the side on which it is: shifts leave the one as it is.
    data = data_of(n=60, weighted=False)
    data.inputs[:] = 0.1 * torch.rand_like(data.inputs)
    place = torch.randint(16, (60,))
    data.inputs.view(60, 16)[range(60), place] += 1 + 2.0 * (torch.arange(60) % 2)
    data.targets[:] = torch.arange(60) % 2 if symmetric else (place % 4 > 1).long()
    record = Record()
    settings = {"start": "symmetric", "burn_in": 40, "max_epochs": 40, "lr": 0.02}
    net = net_of(**settings, callbacks=[("record", record)])
    net.partial_fit(data)
    u = record.weights[-1]["blocks.0.factored_fc.U.weight"]
    assert (torch.count_nonzero(u) > 0) == anew


def test_plateau_starts_anew_at_the_release():
    # The figure of the symmetric network is higher than any later one, but those rise.
    values = [0.0] * 3 + [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0]
    net, _ = scripted(values, start="symmetric", burn_in=3, max_epochs=10, patience=3)
    assert not net.course.converged
    assert len(net.history) == 10


def test_without_a_burn_in_nothing_is_held_back():
    net, record = scripted(RISING, start="symmetric", burn_in=0, max_epochs=4)
    assert all(all(on.values()) for enabled in record.enabled for on in enabled)
    assert all(all(block.enabled.values()) for block in net.module_.blocks)


def test_a_course_that_holds_nothing_back_leaves_the_pathways_as_they_are():
    _, record = scripted(RISING, start="symmetric", burn_in=2, max_epochs=4, holding=False)
    assert all(all(on.values()) for enabled in record.enabled for on in enabled)
    assert torch.count_nonzero(record.weights[1]["blocks.0.factored_fc.U.weight"]) > 0


def test_endless_training_concludes_nothing():
    record = Record()
    net = net_of(
        evidence=Script([9.0, 1.0]),
        endless=True,
        patience=1,
        max_epochs=3,
        callbacks=[("record", record)],
    )
    for epoch in range(1, 6):
        net.partial_fit(data_of())
        assert len(net.history) == epoch
        assert_weights(net, record.weights[-1])
    assert net.history[:, "epoch"] == [1, 2, 3, 4, 5]
    assert record.rates == [0.01] * 5
    assert not net.course.rate.cooling
    assert not net.course.capped


def test_a_spent_course_keeps_no_weights():
    net, _ = scripted(RISING, schedule="cooldown", max_epochs=8)
    assert net.course.best is None
    assert net.course.mean.weights == {}
