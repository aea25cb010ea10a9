"""Which symmetry a network begins with, judged by rows that are held out."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from nets import Record, data_of, net_of, weights_of
from skorch.callbacks import Callback

from sklearn_softeq import trials
from sklearn_softeq.groups import P1, P4, PM
from sklearn_softeq.schedules import LearningRate, SymmetricStart
from sklearn_softeq.trials import HELD_OUT, MARGIN, N_TRIALS, Trial, best_symmetry

PATHWAYS = ("p4_conv", "pm_conv", "conv")
EPOCHS = 8
rate = partial(LearningRate, "cooldown", 0.02, 100)


def trial_net(trial, *, record=None, group=None, pathways=("conv",), max_epochs=EPOCHS):
    callbacks = [("trial", trial)] + ([("record", record)] if record else [])
    net = net_of(pathways=pathways, max_epochs=max_epochs, module__width=1)
    net.callbacks_ = callbacks
    SymmetricStart(group=group).begin(net.module_)
    return net


def test_score_is_that_of_the_held_out_rows_at_the_mean_of_the_last_weights():
    kept, held = data_of(), data_of(n=7)
    record, trial = Record(), Trial(rate(), held)
    net = trial_net(trial, record=record).partial_fit(kept)
    last = record.weights[-EPOCHS // 4 :]
    for name, found in weights_of(net).items():
        torch.testing.assert_close(found, sum(w[name] for w in last) / len(last))
        assert not torch.equal(found, record.weights[-1][name])
    log_p = net.module_(held.inputs).log_softmax(1)[range(7), held.targets]
    expected = (held.weights * log_p).sum() / held.weights.sum()
    assert trial.score == pytest.approx(expected.item())


def test_a_trial_that_goes_on_is_judged_by_its_last_weights():
    record, trial = Record(), Trial(rate(), data_of(n=7))
    net = trial_net(trial, record=record).partial_fit(data_of())
    before = trial.score
    net.partial_fit(data_of())
    last = record.weights[-EPOCHS // 4 :]
    for name, found in weights_of(net).items():
        torch.testing.assert_close(found, sum(w[name] for w in last) / len(last))
    assert trial.score != before


def test_a_trial_of_one_epoch_has_a_score():
    trial = Trial(rate(), data_of(n=7))
    net = trial_net(trial, max_epochs=1).partial_fit(data_of())
    assert np.isfinite(trial.score)
    assert len(net.history) == 1


def test_rates_are_those_of_the_schedule():
    record = Record()
    net = trial_net(Trial(rate(), data_of(n=7)), record=record).partial_fit(data_of())
    assert record.rates == pytest.approx([0.004, 0.008, 0.012, 0.016, *[0.02] * 4])
    net.partial_fit(data_of())  # the second half is not a new beginning
    assert record.rates[EPOCHS:] == pytest.approx([0.02] * EPOCHS)


def parts():
    return data_of(n=20).split(HELD_OUT, torch.Generator().manual_seed(1))


def given_scores(monkeypatch, scores):
    given = iter(scores)
    monkeypatch.setattr(
        Trial, "on_train_end", lambda self, net, **kwargs: setattr(self, "score", next(given))
    )


@pytest.mark.parametrize(
    ("scores", "best", "number"),
    [
        ((-1.0, -4.0, -5.0, -1.5, -3.0, -3.0, -3.0, -3.0, -2.0, -6.0, -7.0, -2.0), P4, 0),
        ((-9.0, -8.0, -3.0, -2.0, -2.0, -2.5, -4.0, -1.8, -6.0, -5.0, -1.9, -1.7), P1, 2),
        ((-2.0, -2.0, -2.0, -3.0, -3.0, -1.0, -1.0, -1.0, -1.0, -1.0, -2.0, -1.0), PM, 1),
        ((-1.0, -2.0, -2.0, -3.0, -3.0, -3.0, -2.8, -2.5, -9.0, -9.0, -9.0, -9.0), PM, 2),
    ],
)
def test_the_best_symmetry_goes_on(scores, best, number, monkeypatch):
    given_scores(monkeypatch, scores)
    built, records = {}, {}

    def build(group, number, trial):
        records[group, number] = Record()
        built[group, number] = trial_net(
            trial, record=records[group, number], group=group, pathways=PATHWAYS
        )
        return built[group, number]

    kept, held = parts()
    state = torch.get_rng_state()
    group, net, found = best_symmetry(build, (P4, PM, P1), rate, kept, held)
    assert torch.equal(torch.get_rng_state(), state)
    assert (group, net) == (best, built[best, number])
    assert list(built) == list(itertools.product((P4, PM, P1), range(N_TRIALS)))
    assert list(found) == ["p4", "pm", "p1"]
    assert list(found.values()) == [scores[i] for i in (3, 7, 11)]
    # The best start of each goes on for as long again.
    for i, at in ((0, P4), (4, PM), (8, P1)):
        best = int(np.argmax(scores[i : i + N_TRIALS]))
        lengths = [len(built[at, number].history) for number in range(N_TRIALS)]
        assert lengths == [EPOCHS * (1 + (number == best)) for number in range(N_TRIALS)]
    seen = [torch.cat(record.inputs[:1]) for record in records.values()]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(seen))  # the same rows for all
    assert len(seen[0]) == len(kept)
    for (group, _), record in records.items():
        on = record.enabled[-1][0]
        assert [name for name in on if on[name]] == {
            P4: ["p4_conv"],
            PM: ["pm_conv"],
            P1: ["conv"],
        }[group]


@pytest.mark.parametrize(
    ("symmetric", "lead", "best"),
    [
        # In units of the entropy of the labels and of the margin.
        (-0.8, 0.9, P1),
        (-0.8, 1.1, None),
        (-1.001, 0.1, None),  # the symmetry knows nothing, all together do
        (-1.01, 0.01, P1),  # neither knows anything
        (-0.99, 0.9, P1),
    ],
)
def test_all_together_need_a_margin(symmetric, lead, best, monkeypatch):
    kept, held = parts()
    entropy = entropy_of(held)
    symmetric = symmetric * entropy
    joint = symmetric + lead * MARGIN * entropy
    given_scores(monkeypatch, [-6.0, symmetric, -3.0, joint])  # a lone symmetry has one start

    def build(group, number, trial):
        return trial_net(trial, group=group, pathways=PATHWAYS)

    group, net, found = best_symmetry(build, (P1, None), rate, kept, held)
    assert group is best
    assert len(net.history) == 2 * EPOCHS
    assert found == {"p1": symmetric, "joint": joint}


@pytest.mark.parametrize(
    ("leads", "best"),
    [
        # Of quarter turns, the reflection and shifts alone, in units of the margin.
        ((0.0, 0.9, 1.5), P1),
        ((0.0, 0.9, 0.9), P4),
        ((0.0, 1.1, 1.9), PM),
        ((0.0, 1.1, 2.2), P1),
        ((0.0, -0.5, 0.9), P4),
    ],
)
def test_a_smaller_symmetry_needs_a_margin(leads, best, monkeypatch):
    kept, held = parts()
    entropy = entropy_of(held)
    scores = [(lead * MARGIN - 0.4) * entropy for lead in leads]
    monkeypatch.setattr(trials, "N_TRIALS", 1)
    given_scores(monkeypatch, [score for score in scores for _ in range(2)])

    def build(group, number, trial):
        return trial_net(trial, group=group, pathways=PATHWAYS)

    group, _, found = best_symmetry(build, (P4, PM, P1), rate, kept, held)
    assert group is best
    assert list(found.values()) == scores


@pytest.mark.parametrize(
    ("groups", "n_starts"),
    [
        ((P4, P1, None), {P4: N_TRIALS, P1: N_TRIALS, None: 1}),
        ((P4, None), {P4: N_TRIALS, None: 1}),
        ((PM, None), {PM: N_TRIALS, None: 1}),
        ((P1, None), {P1: 1, None: 1}),
    ],
)
def test_narrow_networks_have_several_starts(groups, n_starts):
    built = []

    def build(group, number, trial):
        built.append((group, number))
        return trial_net(trial, group=group, pathways=PATHWAYS)

    best_symmetry(build, groups, rate, *parts())
    assert built == [(group, number) for group in groups for number in range(n_starts[group])]


def entropy_of(data):
    counts = torch.bincount(data.targets, data.weights)
    shares = counts[counts > 0] / counts.sum()
    return -(shares * shares.log()).sum().item()


@pytest.mark.parametrize(
    ("groups", "doublings", "after", "length", "best"),
    [
        ((P4, P1), 2, (-0.49, -0.9, -9.0), 2, P4),
        ((P4, P1), 0, (-0.8, -0.9, -9.0), 2, P4),
        ((P4, P1), 1, (-0.8, -0.9, -9.0), 4, P1),
        ((P4, P1), 1, (-0.55, -0.9, -9.0), 4, P4),  # which was ahead before it overfitted
        ((P4, P1), 2, (-0.8, -0.9, -9.0), 8, P4),
        ((P4, P1), 5, (-0.8, -0.9, -9.0), 8, P4),  # then it is known
        ((P4, P1, None), 1, (-0.8, -0.9, -0.76), 4, P1),
        ((P4, P1, None), 2, (-0.8, -0.9, -0.4), 4, None),  # all together lead twice
        ((P4, P1, None), 1, (-0.8, -0.9, -0.6), 4, P1),  # all together lead once
        ((P4, P1, None), 2, (-0.8, -0.9, -0.6), 8, P4),  # then it is known
        ((P4, P1, None), 2, (-0.49, -0.9, -0.4), 4, None),
        ((P4, P1, None), 0, (-0.8, -0.9, -0.6), 2, None),
        ((P1, None), 2, (-0.8, -0.6, -9.0), 2, P1),  # there is nothing to choose
        ((P1, None), 2, (-0.8, -0.8, -0.6), 4, P1),
        ((P1, None), 2, (-0.8, -0.8, -0.5), 4, None),
    ],
)
def test_trials_go_on_until_something_is_known(groups, doublings, after, length, best, monkeypatch):
    kept, held = parts()
    entropy = entropy_of(held)
    scores = {P4: {2: after[0], 4: -0.7, 8: -0.4}, P1: {2: after[1], 4: -0.6, 8: -0.6}}
    scores[None] = {2: after[2]}
    nets = {}

    def score(self, net, **kwargs):
        group = next(group for group, (_, trial) in nets.items() if trial is self)
        self.score = entropy * scores[group].get(len(net.history) // EPOCHS, -1.0)

    def build(group, number, trial):
        net = trial_net(trial, group=group, pathways=PATHWAYS)
        nets[group] = net, trial
        return net

    monkeypatch.setattr(trials, "N_TRIALS", 1)
    monkeypatch.setattr(Trial, "on_train_end", score)
    group, net, found = best_symmetry(build, groups, rate, kept, held, doublings)
    assert group is best
    assert net is nets[best][0]
    lengths = {group: len(net.history) // EPOCHS for group, (net, _) in nets.items()}
    assert lengths == {group: 2 if group is None else length for group in groups}
    names = {P4: "p4", P1: "p1", None: "joint"}
    best_of = {
        group: max(score for n, score in scores[group].items() if n <= lengths[group])
        for group in groups
    }
    assert found == {names[group]: entropy * best_of[group] for group in groups}


def test_a_trial_that_diverges_is_the_worst():
    nets = []

    def build(group, number, trial):
        nets.append(trial)
        net = trial_net(trial, group=group, pathways=PATHWAYS)
        if group == P4:
            for parameter in net.module_.parameters():
                parameter.data.mul_(math.inf)
        return net

    group, _, found = best_symmetry(build, (P4, P1), rate, *parts())
    assert group == P1
    assert found["p4"] == -math.inf
    assert math.isfinite(found["p1"])
    assert len(nets) == 2 * N_TRIALS


def test_a_trial_that_diverges_later_is_the_worst():
    class Spoil(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == EPOCHS + 2:
                for parameter in net.module_.parameters():
                    parameter.data.mul_(math.inf)

    def build(group, number, trial):
        net = trial_net(trial, group=group, pathways=PATHWAYS)
        if group == P4:
            net.callbacks_.append(("spoil", Spoil()))
        return net

    group, _, found = best_symmetry(build, (P4, P1), rate, *parts())
    assert group == P1
    assert found["p4"] == -math.inf


def test_held_out_rows_are_not_trained_on():
    (kept, held), nets = parts(), []

    def build(group, number, trial):
        nets.append((trial, record := Record()))
        return trial_net(trial, record=record)

    best_symmetry(build, (P4, P1, None), rate, kept, held)
    assert len(nets) == 2 * N_TRIALS + 1
    for trial, record in nets:
        assert len(trial.held) == 4
        for inputs in record.inputs:
            for image in trial.held.inputs:
                assert not (inputs == image).flatten(1).all(1).any()
