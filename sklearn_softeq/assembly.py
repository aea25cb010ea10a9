"""Nets put together from the parameters of an estimator."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from skorch.callbacks import Callback
from torch import nn

from .anchors import Interpolation
from .batches import AUGMENTATIONS, Batches, TrainingData, batch_rows
from .budget import CurvaturePlan, plan_curvature
from .course import Course, EvidenceStep, Preconditioner
from .groups import PointGroup
from .layers import PATHWAYS
from .marginal_likelihood import HYPER_SOLVERS, LengthscaleSolver
from .networks import build_network
from .processes import joined
from .progress import ProgressLine
from .schedules import (
    BOUND_WARM_UP,
    STARTS,
    WARM_UP,
    JointStart,
    LearningRate,
    Plateau,
    Start,
    SymmetricStart,
    restart_jointly,
    symmetries,
)
from .training import OPTIMIZERS, SoftEquivariantNet
from .trials import FEWEST_HELD, HELD_OUT, N_TRIALS, Trial, best_symmetry
from .validation import check_names

__all__ = ["Assembly", "Seeds"]


class Seeds(NamedTuple):
    """Of all that is random in a fit, each by itself."""

    curvature: int
    batches: int
    weights: int
    augmentation: int
    preconditioner: int


@dataclass(frozen=True)
class Assembly:
    """Puts nets together for one call of ``fit`` or ``partial_fit``.

    Parameters
    ----------
    clf : SoftEquivariantBase
        Its parameters count, with image shape, likelihood and device, which are known by now.
    data : TrainingData
    seeds : Seeds
    tasks : Callback, optional
        What is to be told about each epoch of training, not of trials.
    to_train : bool, default=True
        False: nets are for predictions alone, and need no memory for training.
    """

    clf: Any
    data: TrainingData
    seeds: Seeds
    tasks: Callback | None = None
    to_train: bool = True

    def first(self, endless: bool) -> tuple[dict[str, float], SoftEquivariantNet]:
        """A net at its start, and the scores of the symmetries that have been tried for it."""
        groups = [] if endless else self._groups_to_try()
        parts = groups and self.data.split(
            HELD_OUT, torch.Generator().manual_seed(self.seeds.curvature), FEWEST_HELD
        )
        if not parts:
            start = self._start()
            spare = 0 if endless else min(N_TRIALS, self._half // self.burn_in) - 1
            course = self._course(start, self.burn_in, True, endless, spare)
            return {}, self._begun(start, course)
        group, tried, scores = best_symmetry(
            self._trial, groups, self._rate, *parts, self._doublings
        )
        if self.clf.verbose and joined(self.data.inputs.device).rank == 0:
            found = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            print(f"trials, log likelihood of held-out rows: {found} nats per observation")
            print(f"start: {'joint' if group is None else group.name}")
        start = JointStart() if group is None else self._start(group)
        # The trial was the burn-in.
        net = self._begun(start, self._course(start, min(WARM_UP, self._half), True, endless))
        net.take_over(tried)
        return scores, net

    def further(self, previous: SoftEquivariantNet, endless: bool) -> SoftEquivariantNet:
        """A net that goes on from another one."""
        before, begun = previous.course, len(previous.history)
        # What is held back is released by the start that did so.
        goes_on = self.clf.start == "symmetric" or before.holding
        start = before.start.again() if goes_on else JointStart()
        course = self._course(start, self.burn_in, before.holding, endless)
        if not before.holding:  # the ramp goes on where it was, if it is not over
            course.evidence.ramp = before.evidence.ramp
            course.evidence.ramp_from = before.evidence.ramp_from - (0 if endless else begun)
        net = self._begun(start, course)
        net.take_over(previous, history=endless)
        net.course.rate.rewarm(len(net.history))
        return net

    def resumed(self, start: Start, holding: bool, endless: bool) -> SoftEquivariantNet:
        """A net as it was built for a start, with random weights, and without any trial."""
        return self._begun(start, self._course(start, self.burn_in, holding, endless))

    @property
    def burn_in(self) -> int:
        """Epochs of a symmetry alone."""
        return min(int(self.clf.burn_in), self._half)

    @property
    def _doublings(self) -> int:
        """How often a trial may double without taking longer than half of the training."""
        return max(self._half // (2 * self.burn_in), 1).bit_length() - 1

    @property
    def _half(self) -> int:
        """What a short training can spare before it needs all of its pathways."""
        return max(int(self.clf.max_epochs) // 2, 1)

    @property
    def initial_rate(self) -> float:
        """The rate at the beginning of training."""
        clf = self.clf
        return OPTIMIZERS[clf.optimizer].lr if clf.lr is None else clf.lr

    @property
    def _pathways(self) -> tuple[str, ...]:
        return check_names(self.clf.pathways, PATHWAYS, "pathways")

    def _groups_to_try(self) -> list[PointGroup | None]:
        """What a symmetric start can begin with, if there is a choice.

        None stands for all pathways, where some have no symmetry.
        """
        of_pathways = [PATHWAYS[name].group for name in self._pathways]
        found = [*symmetries(of_pathways), *([None] if None in of_pathways else [])]
        return found if self.clf.start == "symmetric" and len(found) > 1 else []

    def _start(self, group: PointGroup | None = None) -> Start:
        return SymmetricStart(group) if self.clf.start == "symmetric" else JointStart()

    def _rate(self, endless: bool = False) -> LearningRate:
        # Without an end "cooldown" is a warm-up and then the full rate.
        schedule = self.clf.lr_schedule
        schedule = "cooldown" if endless and schedule == "cosine" else schedule
        # A short training cannot spare so much.
        bound_warmup = min(BOUND_WARM_UP, max(self.clf.max_epochs // 4, WARM_UP))
        return LearningRate(
            schedule, self.initial_rate, self.clf.max_epochs, bound_warmup=bound_warmup
        )

    def _trial(self, group: PointGroup | None, number: int, trial: Trial) -> SoftEquivariantNet:
        callbacks = [*self._preconditioner(), ("trial", trial)]
        # To compile steps takes longer than the trial.
        net = self._net(callbacks, self.burn_in, number, compiled=False)
        self._start(group).begin(net.module_)
        if group is None:
            restart_jointly(net.module_, net.prior_, net.generator())
        return net

    def _begun(self, start: Start, course: Course) -> SoftEquivariantNet:
        max_epochs = 1 if course.endless else self.clf.max_epochs
        net = self._net(self._callbacks(course), max_epochs)
        start.begin(net.module_)
        return net

    def _course(
        self, start: Start, burn_in: int, holding: bool, endless: bool, spare_starts: int = 0
    ) -> Course:
        return Course(
            self._evidence_step(burn_in, endless),
            start,
            self._rate(endless),
            Plateau(max(self.clf.tol, 1.0 / self.data.n_observations), self.clf.n_iter_no_change),
            self.clf.keep_best,
            holding=holding,
            endless=endless,
            spare_starts=spare_starts,
        )

    def _callbacks(self, course: Course) -> list:
        """Ours, then copies of the user's, which find our entries in the history."""
        output = [("progress", ProgressLine(self.clf._target_unit))] if self.clf.verbose else []
        copies: dict[int, Any] = {}  # what several of them share they share again
        users = [_copied(entry, copies) for entry in self.clf.callbacks or ()]
        ours = [("evidence", course.evidence), *self._preconditioner(), *output]
        told = [] if self.tasks is None else [("tasks", self.tasks)]
        return [*ours, ("course", course), *told, *users]

    def _preconditioner(self) -> list:
        if self.clf.optimizer != "kfac":
            return []
        return [("preconditioner", Preconditioner(self.seeds.preconditioner, self._n_columns))]

    @property
    def _n_columns(self) -> int:
        """Of the exact root of the output Hessian."""
        return self.clf._likelihood.n_columns(self.clf._n_outputs)

    def _evidence_step(self, burn_in: int, endless: bool) -> EvidenceStep:
        clf = self.clf
        ramp = clf.hyper_warmup if endless else min(clf.hyper_warmup, clf.max_epochs / 4)
        solver = HYPER_SOLVERS[clf.hyper_solver]
        learn_lengthscale = clf.learn_prior and clf.learn_lengthscale
        learn_noise = bool(clf._likelihood.log_hyperparameters())
        return EvidenceStep(
            solver() if clf.hyper_lr is None else solver(clf.hyper_lr),
            steps=clf.hyper_steps if clf.learn_prior or learn_noise else 0,
            burn_in=burn_in,
            every=clf.evidence_every,
            plan=partial(
                _plan,
                n_columns=self._n_columns,
                curvature=clf.curvature,
                samples=clf.curvature_samples,
                subset=clf.curvature_subset,
                kfac=clf.kfac,
                every=1 if endless else clf.evidence_every,  # one ends each call of partial_fit
                lengthscales=learn_lengthscale,
            ),
            seed=self.seeds.curvature,
            lengthscales=LengthscaleSolver() if learn_lengthscale else None,
            ramp=ramp,
            noise_alone=learn_noise and not clf.learn_prior,
        )

    def _net(
        self, callbacks: list, max_epochs: int, number: int = 0, compiled: bool = True
    ) -> SoftEquivariantNet:
        """A net at the random start of this number, with compiled steps if they are asked for."""
        clf = self.clf
        optimizer, likelihood = OPTIMIZERS[clf.optimizer], clf._likelihood
        net = SoftEquivariantNet(
            build_network,
            # What skorch calls to begin with it, also anew.
            criterion=partial(replace, likelihood),
            optimizer=optimizer.build,
            lr=self.initial_rate,
            max_epochs=max_epochs,
            batch_size=batch_rows(clf.batch_size, len(self.data)),
            iterator_train=Batches,
            iterator_train__random_state=np.random.RandomState(self.seeds.batches),
            iterator_train__augment=_augmentation(clf.augment),
            iterator_train__augment_state=np.random.RandomState(self.seeds.augmentation),
            train_split=None,
            callbacks=callbacks,
            verbose=0,
            device=str(clf.device_),
            prior_precision=clf.prior_precision,
            seed=self.seeds.weights + number,
            amp=clf.amp,
            compiled=clf.compile and compiled,
            module__image_shape=clf.image_shape_,
            module__n_outputs=clf._n_outputs,
            module__pathways=self._pathways,
            module__architecture=clf.architecture,
            module__width=clf.width,
            module__scale=STARTS[clf.start].scale,
            module__activation=clf.activation,
            module__anchor_fraction=clf.anchor_fraction,
            module__dtype=self.data.inputs.dtype,
            module__to_train=self.to_train,
            **{f"optimizer__{name}": value for name, value in optimizer.settings.items()},
        )
        net.origin = clf.get_params(deep=False), self.seeds
        return net.initialize()


def _plan(network: nn.Module, n_rows: int, lengthscales: bool, **options: Any) -> CurvaturePlan:
    """As :func:`plan_curvature` says; lengthscales cost something where there are any."""
    there = any(isinstance(module, Interpolation) for module in network.modules())
    return plan_curvature(network, n_rows, lengthscales=lengthscales and there, **options)


def _copied(entry: Any, copies: dict[int, Any]) -> Any:
    """A callback, its class, or a pair with its name, so that a fit changes none of the user's."""
    if isinstance(entry, tuple):
        return entry[0], _copied(entry[1], copies)
    try:
        return copy.deepcopy(entry, copies)
    except TypeError:  # of writers, with their locks, there are no copies
        return copy.copy(entry)


def _augmentation(augment):
    return AUGMENTATIONS[augment] if isinstance(augment, str) else augment
