"""What happens in training beside the steps of the weights, as callbacks of its net.

:class:`EvidenceStep` evaluates the evidence and takes the hyper steps; :class:`Course` decides
about learning rate, release of pathways and the end.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from skorch.callbacks import Callback

from .batches import TrainingData
from .budget import EXACT_COLUMNS, CurvaturePlan, rows_of_a_pass
from .curvature import Estimator, input_factors, kronecker_factors
from .hyperparameters import squared_norms
from .kronecker import Factor, UnsolvedError, decomposed, spectra
from .marginal_likelihood import Evidence, LaplaceEvidence, LengthscaleSolver, Solver
from .schedules import (
    JointStart,
    LearningRate,
    Plateau,
    Start,
    begin_anew,
    fix_gauge,
    restart_jointly,
)
from .states import State, WeightMean, restore, state_of
from .training import SoftEquivariantNet

__all__ = ["Course", "EvidenceStep", "Preconditioner"]

#: Share of the entropy of the targets that a network must have explained by the end of the
#: burn-in, on the training data. Strictly invariant networks that could only memorise explained
#: up to 13 %; where it is the four turns of ten digits that they cannot see, they can reach 60 %.
LEARNT = 0.2


#: Mean loss of the training data, in nats, below which logits are scaled down in the end. Where it
#: is less there is no curvature left, so that neither precisions nor evidence know what being so
#: sure would cost. New data asked for .006 in two such fits, and were content with .002 to .01
#: (docs/design/sums_log.md).
LEAST_LOSS = 0.005


#: Columns of the output Hessian that tell how the curvature is shared by outputs with noises of
#: their own, where evidences take random ones.
APART_COLUMNS = 512


class EvidenceStep(Callback):
    """Every few epochs after the burn-in: curvature, evidence, and steps of the precisions.

    All at the mean of the weights over these epochs: at the weights themselves, which shake at the
    full rate, evidences jump from one to the next, and squared norms are mostly noise where a
    pathway is not needed (docs/design/sums_log.md).

    Parameters
    ----------
    solver : FixedPointSolver or AdamSolver
    steps : int
        Hyper steps at each evaluation; 0 evaluates only.
    burn_in, every : int
        Epochs before the first evaluation, and between evaluations.
    plan : callable
        From a network and a number of rows to a CurvaturePlan: how the curvature is estimated
        during training. The rows of a subset and random columns are drawn anew for each evidence,
        so that their errors average out over the hyper steps; the rows by the trace of their
        output Hessian in the last epoch. The last evidence sees all rows.
    seed : int
        Of rows and random columns: a generator of its own, so that learning the prior does not
        change the order of the batches.
    lengthscales : LengthscaleSolver, optional
        How the lengthscales of interpolations ascend; default: they stay.
    ramp : float, default=0.0
        Epochs over which the log determinants come to count fully in the hyper steps. At full
        weight from the beginning they push networks that have learnt little yet towards those that
        need few weights, out of which they do not come back (docs/design/sums_log.md).
    noise_alone : bool, default=False
        Whether the hyper steps are of a learned noise, and the precisions stay.

    Attributes
    ----------
    state : State or None
        That of the last evaluation, with the mean weights and the precisions that came of it; None
        before the first one of the present model.
    ramp_from : int
        Epoch with which the ramp begins, below 0 if a part of it was before.
    """

    def __init__(
        self,
        solver: Solver,
        steps: int,
        burn_in: int,
        every: int,
        plan: Callable[[torch.nn.Module, int], CurvaturePlan],
        seed: int,
        lengthscales: LengthscaleSolver | None = None,
        ramp: float = 0.0,
        noise_alone: bool = False,
    ):
        self.noise_alone = noise_alone
        self.solver = solver
        self.steps = steps
        self.burn_in = burn_in
        self.every = every
        self.ramp = ramp
        self.ramp_from = burn_in - every
        self.plan = plan
        self.seed = seed
        self.lengthscales = lengthscales
        self._slopes: dict[str, float] = {}
        self.forget_data()

    def forget_data(self) -> None:
        """Drop what depends on the data of a fit."""
        self.state: State | None = None
        self._mean = WeightMean()
        self._traces: torch.Tensor | None = None  # of the rows' output Hessians, for a subset
        self._constants: dict[str, Factor] = {}
        self._covered: set[str] = set()  # tensors that were in use when these were computed
        self._known: dict[int, torch.Tensor] = {}

    def on_train_begin(self, net, **kwargs):
        self.forget_data()
        self.chosen = self.plan(net.module_, len(net.data_))
        if self.steps and self.chosen.n_rows < len(net.data_):
            self._traces = torch.zeros_like(net.data_.weights)

    def due(self, epoch: int) -> bool:
        """Whether the evidence is evaluated after this epoch."""
        return epoch >= self.burn_in and (epoch - self.burn_in) % self.every == 0

    def log_det_weight(self, epoch: int) -> float:
        """How far the log determinants count in the hyper steps after this epoch, 0 to 1."""
        beyond = max(0, epoch - self.ramp_from)
        return min(1.0, beyond / self.ramp) if self.ramp > 0 else 1.0

    @property
    def learns_prior(self) -> bool:
        """Whether the precisions move."""
        return self.steps > 0 and not self.noise_alone

    def forget(self) -> None:
        """Drop what belongs to weights that are gone."""
        self.state, self._slopes = None, {}

    def wait(self, n_epochs: int) -> None:
        """Let the burn-in last so much longer."""
        self.burn_in += n_epochs
        self.ramp_from += n_epochs

    def evaluate(
        self, net: SoftEquivariantNet, final: bool = False, keep: bool = False
    ) -> LaplaceEvidence:
        """The evidence at the present weights as a function of the precisions.

        In the ``final`` one of a fit log determinants count fully, as a training that was too
        short for the ramp has to end without, and it holds the curvature itself, if that is of all
        rows. With ``keep`` it does in any case.
        """
        weight = 1.0 if final else self.log_det_weight(len(net.history))
        if self._traces is None:
            return self._evaluate(net, None, self._generator(net), weight, final or keep)
        traces, generator = self._traces.clone(), self._generator(net)
        net.processes_.add(traces)
        chosen = self.chosen
        sample = net.data_.sample(chosen.n_rows, traces, generator, chosen.copies)
        return self._evaluate(net, sample, generator, weight, keep)

    @property
    def sampled(self) -> bool:
        """Whether evidences are of a sample of the rows."""
        return self._traces is not None

    def complete(self, net: SoftEquivariantNet, keep: bool = False) -> LaplaceEvidence:
        """The evidence of all rows, at full weight of the log determinants."""
        return self._evaluate(net, None, self._generator(net), keep=keep)

    def _generator(self, net: SoftEquivariantNet) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + len(net.history))

    def _evaluate(
        self,
        net: SoftEquivariantNet,
        sample: TrainingData | None,
        generator: torch.Generator,
        log_det_weight: float = 1.0,
        keep: bool = False,
    ) -> LaplaceEvidence:
        data = net.data_ if sample is None else sample
        curvature = kronecker_factors(
            net.module_,
            net.criterion_,
            data.in_order(rows_of_a_pass(net.module_)),
            estimator=self.chosen.estimator,
            # The weights of a sample stand for all observations.
            total_weight=net.data_.n_observations if sample is None else None,
            unit_weights=sample is None and data.unit_weights,
            generator=generator,
            # While the rate falls lengthscales stay: see on_epoch_end.
            lengthscales=self.lengthscales is not None and not net.course.rate.cooling,
            apart=self._tells_apart(net) and self.chosen.estimator.columns == "exact",
            constants=self._input_factors(net),
            **_shared(net),
        )
        parts = curvature.parts
        if self._tells_apart(net) and not parts:
            parts = self._parts(net, data, generator)
        with _finite(net):
            eigenvalues = spectra(curvature.factors, self._known, parts)
        # An identity means nothing once its factor is gone.
        kept = {id(factor) for factor in self._input_factors(net).values()}
        self._known = {key: values for key, values in self._known.items() if key in kept}
        return LaplaceEvidence(
            curvature.log_likelihood,
            eigenvalues,
            squared_norms(net.enabled_tensors()),
            net.prior_.index,
            net.course.start.charges(net.module_),
            log_det_weight,
            curvature.slopes,
            curvature.factors if keep else {},
            net.criterion_.noise(curvature.log_likelihoods, net.data_.n_observations),
        )

    @staticmethod
    def _tells_apart(net: SoftEquivariantNet) -> bool:
        """Whether the curvature has to be told apart by outputs: if they have their own noises."""
        return len(net.criterion_.log_hyperparameters()) > 1

    def _parts(
        self, net: SoftEquivariantNet, data: TrainingData, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """What each output adds to the curvature, from a few rows, where columns are random.

        A random column is of all outputs at once.
        """
        n_rows = max(APART_COLUMNS // data.n_targets, 1)
        if n_rows < len(data):
            data = data.sample(n_rows, torch.ones_like(data.weights), generator)
        found = kronecker_factors(
            net.module_,
            net.criterion_,
            data.in_order(rows_of_a_pass(net.module_)),
            estimator=replace(self.chosen.estimator, columns="exact"),
            apart=True,
            **_shared(net),
        )
        return found.parts

    def _input_factors(self, net: SoftEquivariantNet) -> dict[str, Factor]:
        """Those that depend on no weight, of all rows, computed once for each set of pathways."""
        enabled = set(net.enabled_tensors())
        if not enabled <= self._covered:
            self._covered = enabled
            found = input_factors(
                net.module_,
                net.data_.in_order(rows_of_a_pass(net.module_)),
                kfac=self.chosen.estimator.kfac,
                unit_weights=net.data_.unit_weights,
                known=self._constants,
                **_shared(net),
            )
            self._constants |= found
            with _finite(net):
                self._known |= decomposed(found)
        return self._constants

    def ascend(self, net: SoftEquivariantNet, objective: LaplaceEvidence) -> Evidence:
        """Take the hyper steps; the evidence at their end."""
        log_precision = net.log_hyperparameters()
        for _ in range(self.steps):
            moved = self.solver.step(objective, log_precision)
            if self.noise_alone:
                n_precisions = len(net.prior_.log_precision)
                moved[:n_precisions] = log_precision[:n_precisions]
            log_precision = moved
        # Other processors may round otherwise: all go on from the same numbers.
        log_precision, evidence = net.processes_.agreed(
            (log_precision, objective.evidence(log_precision))
        )
        net.set_log_hyperparameters(log_precision)
        return evidence

    def on_batch_end(self, net, batch=None, y_pred=None, **kwargs):
        """Note how undecided the network was about each row."""
        if self._traces is not None:
            self._traces[batch[1][2]] = net.criterion_.hessian_trace(y_pred.detach())

    def on_epoch_begin(self, net, **kwargs):
        """Take a step of the lengthscales, if there are slopes to follow.

        Not at once when they are found: the state that was evaluated may be one to return to.
        """
        if self._traces is not None and net.processes_.size > 1:
            self._traces.zero_()  # others may see to these rows from here on
        if self.lengthscales is None or not self._slopes:
            return
        interpolations = net.module_.interpolations
        present = {name: i.log_omega.item() for name, i in interpolations.items()}
        for name, value in self.lengthscales.step(present, self._slopes).items():
            interpolations[name].set_log_omega(value)
        self._slopes = {}

    def on_epoch_end(self, net, **kwargs):
        epoch = len(net.history)
        if not self.steps:
            return
        if epoch > self.burn_in - self.every:
            self._mean.add(net.module_)
        if not self.due(epoch):
            return
        with self._mean.loaded(net.enabled_tensors()) as scales:
            self._record(net)
            # Weights that are averaged share one gauge and one Ψ; precisions that are given stay.
            if self.learns_prior and not net.course.rate.cooling:
                scales.update(fix_gauge(net.module_, net.prior_))
            self.state = state_of(net)
        net.follow(scales)
        net.update_decay()

    def _record(self, net: SoftEquivariantNet) -> None:
        """Take the hyper steps at the present weights, and note what has been found there."""
        objective = self.evaluate(net)
        evidence = self.ascend(net, objective)
        for term, value in evidence._asdict().items():
            net.history.record(term, value)
        net.history.record("log_marginal_likelihood", evidence.value)
        net.history.record("n_observations", net.data_.n_observations)
        if deviations := net.criterion_.deviations:
            net.history.record("event_noise", list(deviations))
        # No number: loggers of skorch leave out what is named so.
        net.history.record("event_curvature", self.chosen.estimator.columns)
        net.history.record("curvature_rows", min(self.chosen.n_rows, len(net.data_)))
        log_precision = net.log_hyperparameters()
        net.effective_dimensions_ = net.processes_.agreed(
            objective.effective_dimensions(log_precision)
        )
        if not net.course.rate.cooling:
            self._slopes = net.processes_.agreed(objective.lengthscale_gradient(log_precision))


@contextmanager
def _finite(net: SoftEquivariantNet) -> Iterator[None]:
    """Where a curvature that is not finite is found out."""
    try:
        yield
    except UnsolvedError as error:
        raise net.diverged("The curvature has eigenvalues that no solver finds") from error
    except ValueError as error:
        raise net.diverged("The curvature became infinite or NaN") from error


def _shared(net: SoftEquivariantNet) -> dict[str, Any]:
    """What this process sees of each batch, and how it adds what it finds to the others'."""
    processes = net.processes_
    return {
        "own": slice(processes.rank, None, processes.size),
        "reduction": processes.add if processes.size > 1 else None,
    }


class Preconditioner(Callback):
    """Gives K-FAC the curvature that it preconditions with.

    It is dropped with the data at the end of training, and so after each call of ``partial_fit``.

    Parameters
    ----------
    seed : int
        Of rows and random columns.
    n_columns : int
        Of the output Hessian of a row: K − 1.
    every : int, default=2
        Epochs from one look at the curvature to the next. Tensors that are new to it, as after a
        release, are looked at before their first step.
    n_rows : int, default=256
        Rows that it looks at, drawn by their weights, with one random column of each. Data of no
        more rows and few classes are looked at exactly.
    """

    def __init__(self, seed: int, n_columns: int, every: int = 2, n_rows: int = 256):
        self.seed = seed
        self.n_columns = n_columns
        self.every = every
        self.n_rows = n_rows
        self._decays: object = None  # those that the inverses are of

    def on_epoch_begin(self, net, **kwargs):
        tensors, optimizer = net.enabled_tensors(), net.optimizer_
        known = all(optimizer.knows(tensor) for tensor in tensors.values())
        due = not known or (len(net.history) - 1) % self.every == 0
        if due:
            self._observe(net, tensors)
        if not due and self._decays is net.decay_:
            return
        self._decays = net.decay_  # another list when precisions have moved
        decays = {id(parameter): decay for parameter, decay, _ in net.decay_}
        with _finite(net):
            optimizer.precondition({tensor: decays[id(tensor)] for tensor in tensors.values()})

    def _observe(self, net: SoftEquivariantNet, tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(self.seed + len(net.history))
        data, total = net.data_, net.data_.n_observations
        whole = len(data) <= self.n_rows
        exact = whole and len(data) * self.n_columns <= EXACT_COLUMNS
        if not whole:
            data = data.sample(self.n_rows, torch.ones_like(data.weights), generator)
        curvature = kronecker_factors(
            net.module_,
            net.criterion_,
            data.in_order(rows_of_a_pass(net.module_)),
            estimator=Estimator("exact" if exact else "rademacher"),
            total_weight=total,
            unit_weights=whole and data.unit_weights,
            generator=generator,
            **_shared(net),
        )
        for name, tensor in tensors.items():
            net.optimizer_.observe(tensor, curvature.factors[name], total)

    def on_train_end(self, net, **kwargs):
        self._decays = None
        net.optimizer_.forget()


def _whole(net: SoftEquivariantNet) -> bool:
    """Whether no pathway is switched off."""
    return all(on for block in net.module_.layers.values() for on in block.enabled.values())


class Course(Callback):
    """The course of a fit: learning rate, release and removal of pathways, and the end.

    The figure that must rise is the log evidence per observation, or, when no evidence is
    computed, the log joint per observation.

    Parameters
    ----------
    evidence : EvidenceStep
        Says when there is something to decide.
    start : JointStart or SymmetricStart
        What happens to the pathways.
    rate : LearningRate
        Of each epoch.
    plateau : Plateau
        When the figure has stopped rising.
    keep_best : bool
        Return to the state of the best figure if the last one is worse.
    holding : bool, default=True
        Whether the start is still to come: pathways are held back until the burn-in is over.
    endless : bool, default=False
        Training in single epochs by partial_fit: nothing is concluded from a plateau, averaged
        or restored.
    spare_starts : int, default=0
        Further random starts, each with a burn-in of its own, of a network that holds nothing back
        and has learnt nothing in the last one.

    Attributes
    ----------
    holding : bool
        As above, now.
    converged : bool
        Whether the figure has stopped rising.
    capped : bool
        Whether the cap of epochs came first.
    keeps_curvature : bool
        Whether what is left on the net at the end of training holds the curvature, for a posterior
        of the weights; False unless it is set.
    """

    def __init__(
        self,
        evidence: EvidenceStep,
        start: Start,
        rate: LearningRate,
        plateau: Plateau,
        keep_best: bool,
        holding: bool = True,
        endless: bool = False,
        spare_starts: int = 0,
    ):
        self.evidence = evidence
        self.start = start
        self.rate = rate
        self.plateau = plateau
        self.keep_best = keep_best
        self.holding = holding
        self.endless = endless
        self.spare_starts = spare_starts
        self.converged = False
        self.capped = False
        self.keeps_curvature = False
        self.mean = WeightMean()
        self.best: tuple[float, State] | None = None

    def on_epoch_begin(self, net, **kwargs):
        if self.rate.schedule != "constant":  # then rates are the user's
            net.set_paces(self.start.paces(net.prior_))
        self.rate.hand_to(net.optimizer_, len(net.history))

    def on_epoch_end(self, net, **kwargs):
        epoch = len(net.history)
        if self.rate.cooling:
            self.mean.add(net.module_)
        if self.evidence.due(epoch):
            self._decide(net, epoch)
        if self._may_end(epoch):
            self.capped = not self.converged
            self.rate.begin_cooldown(epoch)
        if self.rate.finished(epoch):
            net.stop_ = True

    def _may_end(self, epoch: int) -> bool:
        return (
            not self.endless
            and not self.rate.cooling
            and (self.converged or epoch >= self.rate.latest_cooldown)
        )

    def _decide(self, net: SoftEquivariantNet, epoch: int) -> None:
        if self.holding:
            self.holding = self._tries_again(net, epoch)
            another = self.holding or self._restarted(net, epoch) or self._released(net, epoch)
            if another:
                # Another model from here on: what was reached before is no measure for it.
                self.evidence.state = None
                self.rate.rewarm(epoch)
                if not self.holding:
                    self.evidence.ramp_from = epoch
                net.update_decay()
                return
        if not self.evidence.steps or self.evidence.log_det_weight(epoch) == 1.0:
            self._conclude(net)
        if self.evidence.learns_prior and not self.rate.cooling:
            # Only now: the figure is that of the network as it was. And not while the rate falls,
            # when the others could no longer take over what a pathway still did.
            self.start.prune(net.module_, net.effective_dimensions_)

    def _conclude(self, net: SoftEquivariantNet) -> None:
        """Note the figure, and the state if it is the best one."""
        figure = self._figure(net)
        if self.keep_best and not self.endless and (self.best is None or figure > self.best[0]):
            self.best = (figure, self.evidence.state or state_of(net))
        self.converged = self.plateau.reached(figure) or self.converged

    def _released(self, net: SoftEquivariantNet, epoch: int) -> bool:
        learn = self.evidence.learns_prior
        return self.start.release(net.module_, net.prior_, learn, net.generator(epoch))

    def _tries_again(self, net: SoftEquivariantNet, epoch: int) -> bool:
        """Begin from other random weights if these, with all that there is, have led nowhere.

        One in three lone networks of four features died in its first epochs, for good.
        """
        if not self.spare_starts or not _whole(net) or net.explained() >= LEARNT:
            return False
        self.spare_starts -= 1
        begin_anew(net.module_, net.prior_, net.generator(epoch))
        self._forget(net)
        self.evidence.wait(epoch - self.rate.warm_from)  # as long as it had been
        return True

    def _restarted(self, net: SoftEquivariantNet, epoch: int) -> bool:
        """Go on as with the joint start if the symmetric one has led nowhere."""
        if isinstance(self.start, JointStart) or _whole(net) or net.explained() >= LEARNT:
            return False
        restart_jointly(net.module_, net.prior_, net.generator(epoch))
        self.start = JointStart()
        self._forget(net)
        return True

    def _forget(self, net: SoftEquivariantNet) -> None:
        """Drop what was learnt beside the weights, and about them, as they are gone."""
        net.initialize_criterion()  # a noise that was learned, too, is as at the start
        self.evidence.forget()
        net.optimizer_.state.clear()

    def _figure(self, net: SoftEquivariantNet) -> float:
        last = net.history[-1]
        if self.evidence.steps:
            return last["log_marginal_likelihood"] / net.data_.n_observations
        return -last["train_loss"]

    def on_train_end(self, net, **kwargs):
        """Take the mean weights of the cool-down, or the best state seen, and evaluate it."""
        self._average(net)
        evidence = self.evidence
        last = evidence.evaluate(
            net, final=not self.endless, keep=self.endless and self.keeps_curvature
        )
        if self.endless:  # the precisions wait for the next one
            net.laplace_, net.linear_term_ = last, math.nan
            evidence.forget_data()
            return
        restored = False
        if not self.holding:
            final = evidence.ascend(net, last)
            joint = final.log_likelihood - 0.5 * final.scatter
            figure = (final.value if evidence.steps else joint) / net.data_.n_observations
            if self.best is not None and self.best[0] > figure:
                restored = self._returned(net, self.best[1], final.value)
        self.best = None
        if restored or evidence.sampled or last.noise is not None:
            del last  # the curvature of these weights or rows, or at another noise
            last = evidence.complete(net, keep=True)
        if evidence.learns_prior and not self.holding:
            last = self._settled(net, last)
        evidence.forget_data()
        log_precision = net.log_hyperparameters()
        net.linear_term_ = last.linear_term(net.log_joint_gradients(), log_precision)
        net.laplace_ = last if self.keeps_curvature else last.without_curvature()

    def broken_off(self, net: SoftEquivariantNet) -> str | None:
        """Bring back the state of the last evidence, to end with; what is kept, in words.

        There is nothing before the first one is over, and in single epochs. If it was that of the
        burn-in, or evidences are not computed, present weights are what there is. Once the rate has
        begun to fall the mean of the weights since then takes their place.
        """
        complete = sum("train_loss" in row for row in net.history)
        if self.endless or self.holding or complete < self.evidence.burn_in:
            return None
        kept = "the weights of that moment"
        if self.evidence.state is not None:
            kept = "the state of the last evidence before it"
            layers = net.module_.layers.values()
            gone = [(b, name) for b in layers for name in b.pathways if b.removed(name)]
            restore(net, self.evidence.state)
            for block, name in gone:  # by what that evidence said
                block.remove(name)
        if self.mean.count:
            kept = "the mean of the weights since the learning rate began to fall"
        return kept

    def _average(self, net: SoftEquivariantNet) -> None:
        """Take the mean weights of the cool-down; with a learned prior, no surer than may be."""
        self.mean.load(net.enabled_tensors())
        self._tempered(net)

    def _tempered(self, net: SoftEquivariantNet) -> bool:
        """Whether the network was surer than may be, and is no longer."""
        may_be = self.endless or not self.evidence.learns_prior
        return not may_be and net.temper(-LEAST_LOSS * net.weight_sum_.item())

    def _settled(self, net: SoftEquivariantNet, last: LaplaceEvidence) -> LaplaceEvidence:
        """Take out what is as good as off, if the evidence does not fall by what would count."""
        here, log_precision = state_of(net), net.log_hyperparameters()
        dimensions = net.processes_.agreed(last.effective_dimensions(log_precision))
        if not self.start.settle(net.module_, dimensions):
            return last
        without = self.evidence.complete(net, keep=True)
        value, before = (found.evidence(log_precision).value for found in (without, last))
        if net.processes_.agreed(value >= before - self.plateau.tol * net.data_.n_observations):
            return without
        restore(net, here)
        return last

    def _returned(self, net: SoftEquivariantNet, best: State, here: float) -> bool:
        """Return to the best state, no surer than may be, from one of the evidence ``here``.

        Where figures are of samples, or that state was surer, only if all rows still say so.
        """
        evidence, now = self.evidence, state_of(net)
        if evidence.sampled:
            here = evidence.complete(net).evidence(net.log_hyperparameters()).value
        restore(net, best)
        if not self._tempered(net) and not evidence.sampled:
            return True
        there = evidence.complete(net).evidence(net.log_hyperparameters()).value
        better = net.processes_.agreed(there > here)
        if not better:
            restore(net, now)
        return better
