"""What a network begins with: each symmetry has its trials, and rows held out decide."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from skorch.callbacks import Callback

from .batches import TrainingData
from .groups import P1, PointGroup
from .schedules import LearningRate
from .states import WeightMean
from .training import DivergedError, SoftEquivariantNet

__all__ = [
    "FEWEST_HELD",
    "HELD_OUT",
    "KNOWN",
    "MARGIN",
    "N_TRIALS",
    "Trial",
    "best_symmetry",
]

#: One row of so many judges the trials; it comes back when they are over. After 20 epochs the mean
#: log likelihoods of 200 rows by quarter turns and by shifts alone differed by up to 1.3 nats, in
#: the order of a whole test set in 47 of 48 trials. Training rows cannot tell: they favour what
#: memorises.
HELD_OUT = 5

#: Rows below which nothing is judged. The deviation of one row's log likelihood is about a nat.
FEWEST_HELD = 5

#: Random starts of each symmetry where one is larger than shifts alone. Such networks have few
#: channels, may learn nothing for twenty epochs from a bad start, and would be judged by that.
N_TRIALS = 3

#: Part of the entropy of the labels by which a smaller symmetry has to predict better than a larger
#: one, and all pathways together better than each, if training is to begin with it: 0.12 nats of
#: ten classes, about the error of the score of two hundred rows. Where a symmetry is right it is
#: ahead itself, and what a larger one lacks is released later (docs/design/sums.md). Of numbers it
#: is a part of two nats for each: where all together leave less than 0.82 of the squares.
MARGIN = 0.05

#: Part of the entropy of the labels, or of the variance of numbers, that the best of several
#: symmetries has to explain before it is believed. Until then the order is that in which networks
#: begin to learn, and a larger symmetry does so first: of MNIST's digits at any place quarter turns
#: and shifts were ahead of shifts alone after 40 epochs in 3 of 7 fits, by 80 in none.
KNOWN = 0.5


class Trial(Callback):
    """Training for a while, and the score at its end; then, perhaps, for a while more.

    Parameters
    ----------
    rate : LearningRate
        Of each epoch.
    held : TrainingData
        Rows that are not trained on.

    Attributes
    ----------
    score : float
        Mean log likelihood of the held-out rows, in nats, with a Gaussian noise at that which is
        best for them; −inf if training diverged.
    """

    def __init__(self, rate: LearningRate, held: TrainingData):
        self.rate = rate
        self.held = held
        self.score = -math.inf

    def on_train_begin(self, net, **kwargs):
        self.score, self.mean, self._begun = -math.inf, WeightMean(), len(net.history)

    def on_epoch_begin(self, net, **kwargs):
        net.set_paces({})
        self.rate.hand_to(net.optimizer_, len(net.history))

    def on_epoch_end(self, net, **kwargs):
        if 4 * (len(net.history) - self._begun) > 3 * net.max_epochs:
            self.mean.add(net.module_)

    def on_train_end(self, net, **kwargs):
        self.mean.load(net.enabled_tensors())
        net.fit_noise(self.held)  # that of the training rows would be too small by what is learnt
        score = net.score(self.held)
        self.score = score if math.isfinite(score) else -math.inf


def best_symmetry(
    build: Callable[[PointGroup | None, int, Trial], SoftEquivariantNet],
    groups: Sequence[PointGroup | None],
    rate: Callable[[], LearningRate],
    kept: TrainingData,
    held: TrainingData,
    doublings: int = 0,
) -> tuple[PointGroup | None, SoftEquivariantNet, dict[str, float]]:
    """Train networks of each symmetry, and find the one that predicts best.

    Parameters
    ----------
    build : callable
        From a group, the number of a random start and a callback to a net that begins with that
        group's pathways, or with all for None, for half of the epochs that a trial takes.
    groups : sequence of PointGroup or None
        Those to be tried, larger ones first, of which one at least is a group; a later one has to
        lead by :data:`MARGIN`.
    rate : callable
        A fresh schedule of the learning rate.
    kept, held : TrainingData
        Rows to train on, and rows that judge.
    doublings : int, default=0
        How often the trials of the symmetries may go on for as long again as they are: once if all
        pathways together lead, and where there are several, while the best of them has not
        explained the part :data:`KNOWN` of the entropy of the labels.

    Returns
    -------
    group : PointGroup or None
        The best: a later one only if it is so by :data:`MARGIN`, or if it alone predicts better
        than the frequencies of the labels.
    net : SoftEquivariantNet
        Its best net, after the trial.
    scores : dict of str to float
        For each group's name, and "joint", the mean log likelihood of the held-out rows, in nats,
        after that trial of a group after which it was highest.

    Notes
    -----
    Where a group is larger than shifts alone each has :data:`N_TRIALS` nets; after half of the
    epochs the best of them goes on. All pathways together learn faster, and are soon as good as
    they get: they are judged by their first trial, and have to lead the symmetries by the second
    as well. A symmetry is judged by its best trial: what goes on for long overfits at the fixed
    precisions of trials, which says nothing of how it fares with learned ones.

    References
    ----------
    The log likelihood of rows given others is the conditional marginal likelihood of S. Lotfi et
    al., "Bayesian Model Selection, the Marginal Likelihood, and Generalization", ICML 2022, here
    at the mode: it hangs less on the prior, with which no network has been fitted yet.
    """
    several = sum(group is not None for group in groups) > 1
    narrow = any(group not in (None, P1) for group in groups)
    tried: dict[PointGroup | None, tuple[Trial, SoftEquivariantNet]] = {}
    scores: dict[PointGroup | None, float] = {}
    for group in groups:
        n_starts = N_TRIALS if narrow and group is not None else 1
        tried[group] = _best_start(partial(build, group), n_starts, rate, kept, held)
        scores[group] = tried[group][0].score
    joint = tried.pop(None, None)
    free = scores.pop(None, -math.inf)
    yardstick = Yardstick.of(next(iter(tried.values()))[1], held)
    best = _first_choice(scores, yardstick)
    leads = yardstick.leads(free, scores[best])
    for doubling in range(doublings):
        unknown = several and scores[best] < yardstick.known
        if not (doubling == 0 if leads else unknown):
            break
        for group, (trial, net) in tried.items():
            _go_on(trial, net, kept)
            scores[group] = max(scores[group], trial.score)
        best = _first_choice(scores, yardstick)
        leads = leads and yardstick.leads(free, scores[best])
    found = {group.name: score for group, score in scores.items() if group is not None}
    if joint is None:
        return best, tried[best][1], found
    found["joint"] = free
    return (None, joint[1], found) if leads else (best, tried[best][1], found)


def _best_start(
    build: Callable[[int, Trial], SoftEquivariantNet],
    n_starts: int,
    rate: Callable[[], LearningRate],
    kept: TrainingData,
    held: TrainingData,
) -> tuple[Trial, SoftEquivariantNet]:
    """The best of some random starts, which goes on for as long again, and its trial."""
    best: tuple[Trial, SoftEquivariantNet] | None = None
    for number in range(n_starts):
        trial = Trial(rate(), held)
        net = build(number, trial)
        _train(net, kept)
        if best is None or trial.score > best[0].score:  # the others are let go at once
            best = trial, net
    assert best is not None
    _go_on(*best, kept)
    return best


def _go_on(trial: Trial, net: SoftEquivariantNet, data: TrainingData) -> None:
    """Train for as many epochs again, unless training has diverged."""
    for _ in range(len(net.history) // net.max_epochs):
        if trial.score > -math.inf:
            _train(net, data)


class Yardstick(NamedTuple):
    """What scores are held against, in nats for each observation.

    Parameters
    ----------
    constant : float
        Score of the best prediction that ignores the inputs: the frequencies of the labels, or
        the mean of numbers.
    known : float
        Score below which nothing is believed yet.
    margin : float
        What has less symmetry has to lead by.
    """

    constant: float
    known: float
    margin: float

    @classmethod
    def of(cls, net: SoftEquivariantNet, held: TrainingData) -> "Yardstick":
        """That of the held-out rows."""
        constant, likelihood = net.constant_score(held), net.criterion_
        known = likelihood.score_of(KNOWN, constant, held.n_targets)
        return cls(constant, known, MARGIN * likelihood.stake(constant, held.n_targets))

    def leads(self, free: float, symmetric: float) -> bool:
        """Whether what has less symmetry is so far ahead that training begins with it."""
        return free - symmetric > self.margin or symmetric <= self.constant < free


def _first_choice(
    scores: Mapping[PointGroup | None, float], yardstick: Yardstick
) -> PointGroup | None:
    """The largest of these symmetries, or one that leads it."""
    best, *others = scores
    for group in others:
        if yardstick.leads(scores[group], scores[best]):
            best = group
    return best


def _train(net: SoftEquivariantNet, data: TrainingData) -> None:
    with suppress(DivergedError):  # then the score stays −∞
        net.partial_fit(data)
