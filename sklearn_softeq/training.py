"""The skorch net that ascends the log joint in the weights and the evidence in the precisions.

The loop is skorch's. The net adds the gradient of the log prior to that of the log likelihood;
:class:`EvidenceStep` is a callback that takes the hyper steps; :class:`Course` decides about
learning rate, release of pathways and the end.
"""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback

from .batches import TrainingData
from .budget import CurvaturePlan
from .curvature import kronecker_factors
from .hyperparameters import LayerwisePrior, squared_norms
from .kronecker import Factor, spectra
from .layers import PathwaySum
from .marginal_likelihood import Evidence, LaplaceEvidence, LengthscaleSolver, Solver
from .processes import ALONE, joined
from .schedules import (
    JointStart,
    LearningRate,
    Plateau,
    Start,
    fix_gauge,
    restart_jointly,
)
from .states import State, WeightMean, restore, state_of

__all__ = [
    "AMP_DTYPES",
    "OPTIMIZERS",
    "Course",
    "EvidenceStep",
    "ProgressLine",
    "SoftEquivariantNet",
]

#: Name → (class, its settings). Momentum is the paper's. Adam's fused kernel replaces a dozen
#: passes; SGD's cannot take tensors that get their first gradient later, at a release. Adam's
#: usual memory of squared gradients, .999, is longer than a fit of ten steps an epoch: where the
#: precisions had moved it scaled steps by what no longer held, and well trained networks broke
#: down for some epochs, some for good (docs/benchmarks.md).
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True, "betas": (0.9, 0.99)}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}

#: Name → type of the activations of MAP steps; curvature and predictions stay as they are.
AMP_DTYPES = {"bf16": torch.bfloat16}

#: Rows of one curvature pass; bounds its memory.
CURVATURE_BATCH = 256

#: Share of the entropy of the targets that symmetric pathways must have explained by the end of
#: the burn-in, on the training data. Strictly invariant networks that could only memorise explained
#: up to 13 %; where it is the four turns of ten digits that they cannot see, they can reach 60 %.
LEARNT = 0.2


class _StopTraining(Exception):
    """A user's callback has asked to stop."""


class SoftEquivariantNet(NeuralNet):
    """A skorch net whose loss is the negative log joint per observation.

    −(1/N) Σ log p(y | x, w) + (1/2N) Σ_g δ_g ‖w_g‖²

    Parameters
    ----------
    *args, **kwargs
        skorch's.
    prior_precision : float, default=1.0
        Start of every δ.
    seed : int, default=0
        Of random starts; torch's global generator is neither used nor touched.
    amp : {"bf16"} or None, default=None
        Type of the activations of MAP steps, with weights kept as they are.
    compiled : bool, default=False
        Whether MAP steps run through torch.compile.
    """

    processes_ = ALONE  # but for the time of training
    compiled_: Callable | None = None

    def __init__(
        self,
        *args,
        prior_precision: float = 1.0,
        seed: int = 0,
        amp: str | None = None,
        compiled: bool = False,
        **kwargs,
    ):
        self.prior_precision = prior_precision
        self.seed = seed
        self.amp = amp
        self.compiled = compiled
        super().__init__(*args, **kwargs)

    def initialize_module(self):
        # A generator of our own: torch's global one is shared by all threads.
        self.module_ = self.module(**self.get_params_for("module"), generator=self.generator())
        self.prior_ = LayerwisePrior(dict(self.module_.named_parameters()), self.prior_precision)
        return self

    @property
    def _default_callbacks(self):
        return []

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh source of random numbers, on the CPU."""
        return torch.Generator().manual_seed(self.seed + offset)

    @property
    def course(self) -> "Course":
        """What decides about the course of training."""
        return next(cb for _, cb in self.callbacks_ if isinstance(cb, Course))

    def take_over(self, previous: "SoftEquivariantNet", history: bool = False) -> None:
        """Begin from the weights and precisions of another net, and from its history if asked.

        Raises
        ------
        ValueError
            If its network has another form.
        """
        shapes, known = (
            {name: tensor.shape for name, tensor in net.module_.named_parameters()}
            for net in (self, previous)
        )
        if shapes != known:
            raise ValueError(
                "A fitted model can be trained further only with the same image shape, classes, "
                "pathways, architecture, width and anchor_fraction; at least one has changed. "
                "Set warm_start=False, or fit a new estimator."
            )
        restore(self.module_, self.prior_, state_of(previous.module_, previous.prior_))
        if history:
            self.history_ = copy.deepcopy(previous.history)

    def partial_fit(self, X, y=None, classes=None, **fit_params):
        """Train on a :class:`TrainingData`; an interrupt is not swallowed, unlike skorch's."""
        # Kept during training only.
        self.data_, self.weight_sum_, self.stop_ = X, X.weights.sum(), False
        self.processes_ = joined(X.inputs.device)
        self.compiled_ = torch.compile(self.module_.forward) if self.compiled else None
        self.update_decay()
        try:
            with suppress(_StopTraining):
                self.notify("on_train_begin", X=X, y=y)
                self.fit_loop(X, y, **fit_params)
            with suppress(_StopTraining):
                self.notify("on_train_end", X=X, y=y)
        finally:
            del self.data_, self.decay_, self.weight_sum_, self.processes_, self.compiled_
        return self

    def fit_loop(self, X, y=None, epochs=None, **fit_params):
        """Skorch's loop without a validation set, until ``stop_`` is set or the cap is reached."""
        batches = self.get_iterator(X, training=True)
        batches.processes = self.processes_
        for _ in range(self.max_epochs if epochs is None else epochs):
            self.notify("on_epoch_begin", dataset_train=X, dataset_valid=None)
            self.run_single_epoch(
                batches, training=True, prefix="train", step_fn=self.train_step, **fit_params
            )
            self.notify("on_epoch_end", dataset_train=X, dataset_valid=None)
            if self.stop_:
                break
        return self

    def notify(self, method_name, **cb_kwargs):
        """Call the callbacks; a user's may end training as skorch's own do, by an interrupt."""
        getattr(self, method_name)(self, **cb_kwargs)
        for _, callback in self.callbacks_:
            try:
                getattr(callback, method_name)(self, **cb_kwargs)
            except KeyboardInterrupt:
                if isinstance(callback, EvidenceStep | Course):
                    raise
                raise _StopTraining from None

    def run_single_epoch(self, iterator, training, prefix, step_fn, **fit_params):
        """As skorch's, but losses are read back from the device once, at the end of the epoch."""
        losses: list[torch.Tensor] = []
        try:
            for batch in iterator:
                self.notify("on_batch_begin", batch=batch, training=training)
                step = step_fn(batch, **fit_params)
                losses.append(step["loss"].detach())
                self.history.record_batch(f"{prefix}_loss", losses[-1])
                self.history.record_batch(f"{prefix}_batch_size", batch[1][2])
                self.notify("on_batch_end", batch=batch, training=training, **step)
            self.history.record(f"{prefix}_batch_count", len(losses))
            self.processes_.add(found := torch.stack(losses))
            losses = list(found.cpu())
        finally:  # in an epoch that was broken off, too
            for row, loss in zip(self.history[-1]["batches"], losses, strict=False):
                row[f"{prefix}_loss"] = loss.item()

    def infer(self, x, **fit_params):
        """Outputs of a MAP step."""
        forward = self.compiled_ or self.module_
        if self.amp is None:
            return forward(x)
        with torch.autocast(x.device.type, AMP_DTYPES[self.amp]):
            return forward(x).to(x.dtype)

    def get_loss(self, y_pred, y_true, X=None, training=False):
        """(rows / |B|) Σ_B w (−log p) / Σ_D w, unbiased for the weighted mean over the data D.

        Of several processes each has the part of its own rows of B.
        """
        targets, weights, n_rows = y_true
        log_prob = self.criterion_.log_prob(y_pred, targets)  # (own rows of B,)
        # Eq. MAP loss, its part in the likelihood
        return -(weights * log_prob).sum() * (len(self.data_) / n_rows) / self.weight_sum_

    def train_step_single(self, batch, **fit_params):
        step = super().train_step_single(batch, **fit_params)
        self._add_gradients()
        for parameter, decay, implicit in self.decay_:
            if parameter.grad is not None and not implicit:
                parameter.grad.add_(parameter.detach(), alpha=decay)  # Eq. prior's gradient
        return step

    def _add_gradients(self) -> None:
        """Sum the gradients of all processes, in one go."""
        if self.processes_.size == 1:
            return
        grads = [p.grad for p in self.module_.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        self.processes_.add(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    @torch.no_grad()
    def train_step(self, batch, **fit_params):
        with torch.enable_grad():
            step = super().train_step(batch, **fit_params)
        for parameter, decay, implicit in self.decay_:
            if implicit:
                parameter.div_(1.0 + decay * self._long_run_rate())  # Eq. implicit prior
        return step

    def update_decay(self) -> None:
        """Turn the precisions into decays δ/N of the weight tensors.

        SGD diverges on a prior that is stiff for its rate, so there it is applied implicitly,
        w ← w / (1 + rate · δ/N), after the step. Adam's steps are bounded whatever δ is.
        """
        sgd = isinstance(self.optimizer_, torch.optim.SGD)
        precisions = self.prior_.precisions()
        self.decay_: list[tuple[torch.Tensor, float, bool]] = []
        for name, parameter in self.module_.named_parameters():
            decay = precisions[name] / self.data_.n_observations
            stiff = sgd and decay * self._long_run_rate() > 0.1
            self.decay_.append((parameter, decay, stiff))

    def _long_run_rate(self) -> float:
        # Momentum m multiplies a steady gradient by 1/(1 − m).
        group = self.optimizer_.param_groups[0]
        return group["lr"] / (1.0 - group.get("momentum", 0.0))

    @torch.no_grad()
    def explained(self) -> float:
        """1 − log p(D | w) / log p(D | the best constant): 0 for a network that ignores its inputs.

        1 where there is nothing to explain, as for a single class.
        """
        constant = self.criterion_.constant_log_likelihood(self.data_.targets, self.data_.weights)
        if constant == 0:
            return 1.0
        log_likelihood = 0.0
        for inputs, targets, weights in self.data_.in_order(CURVATURE_BATCH):
            log_prob = self.criterion_.log_prob(self.module_(inputs), targets)
            log_likelihood += torch.dot(weights.double(), log_prob.double()).item()
        return self.processes_.agreed(1.0 - log_likelihood / constant)

    def enabled_tensors(self) -> dict[str, torch.Tensor]:
        """The named parameters without those of pathways that are switched off."""
        off = self._tensors_where(lambda block, name: not block.enabled[name])
        named = self.module_.named_parameters()
        return {name: tensor for name, tensor in named if name not in off}

    def removed_tensors(self) -> set[str]:
        """Names of the parameters of pathways that were removed."""
        return self._tensors_where(lambda block, name: block.removed(name))

    def _tensors_where(self, condition: Callable[[PathwaySum, str], bool]) -> set[str]:
        return {
            f"{layer}.{name}.{tensor}"
            for layer, block in self.module_.layers.items()
            for name, pathway in block.pathways.items()
            if condition(block, name)
            for tensor, _ in pathway.named_parameters()
        }

    def on_epoch_end(self, net, **kwargs):
        """Record the loss of the epoch; stop if it is not a number."""
        rows = self.history[-1]["batches"]
        sizes = np.array([row["train_batch_size"] for row in rows], dtype=float)
        losses = np.array([row["train_loss"] for row in rows])
        scatter = self.prior_.scatter(self.enabled_tensors())
        # Eq. MAP loss
        loss = losses @ sizes / sizes.sum() + 0.5 * scatter / self.data_.n_observations
        self.history.record("train_loss", float(loss))
        if not math.isfinite(loss):
            raise ValueError(self.not_finite(f"The training loss became {loss}"))

    def not_finite(self, what: str) -> str:
        """What to tell the user when training has left the finite numbers."""
        values = [row.get("log_marginal_likelihood", math.nan) for row in self.history]
        finite = [value for value in values if math.isfinite(value)]
        last = f"{finite[-1]:.6g}" if finite else "none yet"
        return (
            f"{what} in epoch {len(self.history)} (last finite log evidence: {last}). "
            "Lower lr, keep standardize=True, or look for values of extreme size in X."
        )


class EvidenceStep(Callback):
    """Every few epochs after the burn-in: curvature, evidence, and steps of the precisions.

    Parameters
    ----------
    solver : FixedPointSolver or AdamSolver
    steps : int
        Hyper steps at each evaluation; 0 evaluates only.
    burn_in, every : int
        Epochs before the first evaluation, and between evaluations.
    plan : callable
        From a network and a number of rows to a CurvaturePlan: how the curvature is estimated
        during training. The rows of a subset stay the same for all of it, so that evidences
        compare; random columns are drawn anew, so that their errors average out over the hyper
        steps. The last evidence sees all rows.
    seed : int
        Of rows and random columns: a generator of its own, so that learning the prior does not
        change the order of the batches.
    lengthscales : LengthscaleSolver, optional
        How the lengthscales of interpolations ascend; default: they stay.
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
    ):
        self.solver = solver
        self.steps = steps
        self.burn_in = burn_in
        self.every = every
        self.plan = plan
        self.seed = seed
        self.lengthscales = lengthscales
        self._slopes: dict[str, float] = {}
        self._constants: dict[str, Factor] = {}
        self._known: dict[int, torch.Tensor] = {}

    def on_train_begin(self, net, **kwargs):
        self.chosen = self.plan(net.module_, len(net.data_))
        n_rows = self.chosen.n_rows if self.steps else len(net.data_)
        self._sample: TrainingData | None = net.data_.subset(n_rows, self.seed)
        self._constants, self._known = {}, {}

    def due(self, epoch: int) -> bool:
        """Whether the evidence is evaluated after this epoch."""
        return epoch >= self.burn_in and (epoch - self.burn_in) % self.every == 0

    def forget(self) -> None:
        """Drop the slopes: the weights that they belong to are gone."""
        self._slopes = {}

    def evaluate(self, net: SoftEquivariantNet) -> LaplaceEvidence:
        """The evidence at the present weights as a function of the precisions."""
        assert self._sample is not None, "evidences belong to training"
        objective = self._evaluate(net, self._sample, self._constants, self._known)
        # An identity means nothing once its factor is gone.
        kept = {id(factor) for factor in self._constants.values()}
        self._known = {key: values for key, values in self._known.items() if key in kept}
        return objective

    def finish(self, net: SoftEquivariantNet, last: LaplaceEvidence | None) -> LaplaceEvidence:
        """The evidence of all data at the end, which ``last`` is if it has seen them all."""
        complete = self._sample is net.data_
        self._sample, self._constants, self._known = None, {}, {}
        return last if complete and last else self._evaluate(net, net.data_, {}, {})

    def _evaluate(
        self,
        net: SoftEquivariantNet,
        data: TrainingData,
        constants: dict[str, Factor],
        known: dict[int, torch.Tensor],
    ) -> LaplaceEvidence:
        processes = net.processes_
        curvature = kronecker_factors(
            net.module_,
            net.criterion_,
            data.in_order(CURVATURE_BATCH),
            estimator=self.chosen.estimator,
            total_weight=data.n_observations,
            unit_weights=data.unit_weights,
            generator=torch.Generator().manual_seed(self.seed + len(net.history)),
            # While the rate falls lengthscales stay: see on_epoch_end.
            lengthscales=self.lengthscales is not None and not net.course.rate.cooling,
            constants=constants,
            own=slice(processes.rank, None, processes.size),
            reduction=processes.add if processes.size > 1 else None,
        )
        try:
            eigenvalues = spectra(curvature.factors, known)
        except ValueError as error:
            raise ValueError(net.not_finite("The curvature became infinite or NaN")) from error
        return LaplaceEvidence(
            curvature.log_likelihood,
            eigenvalues,
            squared_norms(net.enabled_tensors()),
            net.prior_.index,
            net.course.start.charges(net.module_),
            curvature.slopes,
        )

    def ascend(self, net: SoftEquivariantNet, objective: LaplaceEvidence) -> Evidence:
        """Take the hyper steps; the evidence at their end."""
        log_precision = net.prior_.log_precision.cpu()
        for _ in range(self.steps):
            log_precision = self.solver.step(objective, log_precision)
        # Other processors may round otherwise: all go on from the same numbers.
        log_precision, evidence = net.processes_.agreed(
            (log_precision, objective.evidence(log_precision))
        )
        net.prior_.log_precision.copy_(log_precision)
        return evidence

    def on_epoch_begin(self, net, **kwargs):
        """Take a step of the lengthscales, if there are slopes to follow.

        Not at once when they are found: the state that was evaluated may be one to return to.
        """
        if self.lengthscales is None or not self._slopes:
            return
        interpolations = net.module_.interpolations
        present = {name: i.log_omega.item() for name, i in interpolations.items()}
        for name, value in self.lengthscales.step(present, self._slopes).items():
            interpolations[name].set_log_omega(value)
        self._slopes = {}

    def on_epoch_end(self, net, **kwargs):
        if not self.steps or not self.due(len(net.history)):
            return
        objective = self.evaluate(net)
        evidence = self.ascend(net, objective)
        for term, value in evidence._asdict().items():
            net.history.record(term, value)
        net.history.record("log_marginal_likelihood", evidence.value)
        net.history.record("n_observations", net.data_.n_observations)
        net.history.record("curvature", self.chosen.estimator.columns)
        net.history.record("curvature_rows", min(self.chosen.n_rows, len(net.data_)))
        net.effective_dimensions_ = net.processes_.agreed(
            objective.effective_dimensions(net.prior_.log_precision.cpu())
        )
        if not net.course.rate.cooling:  # weights that are averaged share one gauge and one Ψ
            self._slopes = net.processes_.agreed(
                objective.lengthscale_gradient(net.prior_.log_precision.cpu())
            )
            fix_gauge(net.module_, net.prior_)
        net.update_decay()


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

    Attributes
    ----------
    holding : bool
        As above, now.
    converged : bool
        Whether the figure has stopped rising.
    capped : bool
        Whether the cap of epochs came first.
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
    ):
        self.evidence = evidence
        self.start = start
        self.rate = rate
        self.plateau = plateau
        self.keep_best = keep_best
        self.holding = holding
        self.endless = endless
        self.converged = False
        self.capped = False
        self.mean = WeightMean()
        self.best: tuple[float, State] | None = None

    def on_train_begin(self, net, **kwargs):
        if self.holding and not net.history:
            self.start.begin(net.module_)

    def on_epoch_begin(self, net, **kwargs):
        if self.rate.schedule == "constant":
            return  # left to the user's own callbacks
        for group in net.optimizer_.param_groups:
            group["lr"] = self.rate.at(len(net.history))

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
            self.holding = False
            if self._restarted(net, epoch) or self._released(net, epoch):
                # Another model from here on: what was reached before is no measure for it.
                self.rate.rewarm(epoch)
                net.update_decay()
                return
        figure = self._figure(net)
        if self.keep_best and not self.endless and (self.best is None or figure > self.best[0]):
            self.best = (figure, state_of(net.module_, net.prior_))
        self.converged = self.plateau.reached(figure) or self.converged
        if self.evidence.steps and not self.rate.cooling:
            # Only now: the figure is that of the network as it was. And not while the rate falls,
            # when the others could no longer take over what a pathway still did.
            self.start.prune(net.module_, net.effective_dimensions_)

    def _released(self, net: SoftEquivariantNet, epoch: int) -> bool:
        learn = self.evidence.steps > 0
        return self.start.release(net.module_, net.prior_, learn, net.generator(epoch))

    def _restarted(self, net: SoftEquivariantNet, epoch: int) -> bool:
        """Go on as with the joint start if the symmetric one has led nowhere."""
        if isinstance(self.start, JointStart) or net.explained() >= LEARNT:
            return False
        if not restart_jointly(net.module_, net.prior_, net.generator(epoch)):
            return False
        self.start = JointStart()
        self.evidence.forget()
        net.optimizer_.state.clear()  # moments of weights that are gone
        return True

    def _figure(self, net: SoftEquivariantNet) -> float:
        last = net.history[-1]
        if self.evidence.steps:
            return last["log_marginal_likelihood"] / net.data_.n_observations
        return -last["train_loss"]

    def on_train_end(self, net, **kwargs):
        """Take the mean weights of the cool-down, or the best state seen, and evaluate it."""
        self.mean.load(net.enabled_tensors())
        last = self.evidence.evaluate(net)
        if self.endless:  # the precisions wait for the next one
            net.laplace_ = last
            return
        restored = False
        if not self.holding:
            final = self.evidence.ascend(net, last)
            joint = final.log_likelihood - 0.5 * final.scatter
            figure = (final.value if self.evidence.steps else joint) / net.data_.n_observations
            if self.best is not None and self.best[0] > figure:
                restore(net.module_, net.prior_, self.best[1])
                restored = True
        self.best = None
        net.laplace_ = self.evidence.finish(net, None if restored else last)


class ProgressLine(Callback):
    """Prints a line at each evaluation; to stand before :class:`Course` among the callbacks."""

    def on_train_begin(self, net, **kwargs):
        evidence = net.course.evidence
        if evidence.steps and not net.history and net.processes_.rank == 0:
            print(f"curvature: {evidence.chosen.describe(len(net.data_))}")

    def on_epoch_end(self, net, **kwargs):
        epoch, last = len(net.history), net.history[-1]
        if not net.course.evidence.due(epoch) or net.processes_.rank > 0:
            return
        line = f"epoch {epoch}: loss {last['train_loss']:.4f}"
        if "log_marginal_likelihood" in last:
            evidence = last["log_marginal_likelihood"] / net.data_.n_observations
            line += f", log evidence {evidence:.4f}"
        on = [on for block in net.module_.layers.values() for on in block.enabled.values()]
        print(f"{line} nats per observation, {sum(on)} of {len(on)} pathways on")
