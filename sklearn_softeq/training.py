"""The skorch net that ascends the log joint in the weights and the evidence in the precisions.

The loop is skorch's. The net adds the gradient of the log prior to that of the log likelihood; what
else happens, from evidences to the end, is up to the callbacks of :mod:`sklearn_softeq.course`.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from skorch import NeuralNet

from .batches import TrainingData
from .budget import rows_of_a_pass
from .devices import full_precision
from .hyperparameters import LayerwisePrior
from .kfac import KFAC
from .layers import PathwaySum
from .posterior import Posterior
from .processes import ALONE, joined
from .states import restore, state_of

__all__ = [
    "AMP_DTYPES",
    "OPTIMIZERS",
    "OWN_CALLBACKS",
    "DivergedError",
    "OptimizerKind",
    "SoftEquivariantNet",
]


class OptimizerKind(NamedTuple):
    """One of the optimizers of the weights.

    Parameters
    ----------
    build : class
    lr : float
        Rate at the beginning of training, if the user names none.
    settings : dict
        What else it is given.
    """

    build: type[torch.optim.Optimizer]
    lr: float
    settings: dict[str, Any]


#: Adam's fused kernel replaces a dozen passes; SGD's cannot take tensors that get their first
#: gradient later, at a release. Adam's usual memory of squared gradients, .999, is longer than a
#: fit of ten steps an epoch: where the precisions had moved it scaled steps by what no longer held,
#: and well trained networks broke down for some epochs, some for good (docs/benchmarks.md).
#: Momentum is the paper's.
OPTIMIZERS = {
    "adam": OptimizerKind(torch.optim.Adam, 0.01, {"fused": True, "betas": (0.9, 0.99)}),
    "kfac": OptimizerKind(KFAC, 0.1, {}),
    "sgd": OptimizerKind(torch.optim.SGD, 0.01, {"momentum": 0.9}),
}

#: Name → type of the activations of MAP steps; curvature and predictions stay as they are.
AMP_DTYPES = {"bf16": torch.bfloat16}

#: Names of the callbacks that training consists of; all others are the user's.
OWN_CALLBACKS = ("evidence", "preconditioner", "trial", "progress", "course", "tasks", "checkpoint")


class DivergedError(ValueError):
    """The loss or the curvature has left the finite numbers."""


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
    ends_on_interrupt_ = False  #: whether an interrupt ends training, if there is a state to keep
    interrupted_ = 0  #: the epoch in which it did
    kept_: str | None = None  #: and what training ended with then, in words
    criterion_: Any  # the likelihood, a value
    compiled_: Callable | None = None
    origin: tuple[dict[str, Any], tuple]  #: parameters and seeds of the estimator it was built for

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
    def course(self) -> Any:
        """What decides about the course of training, a Course."""
        return dict(self.callbacks_)["course"]

    def take_over(self, previous: "SoftEquivariantNet", history: bool = False) -> None:
        """Begin from the weights and precisions of another net, and from its history if asked.

        Raises
        ------
        ValueError
            If its network has another form.
        """
        forms = [
            (
                type(net.module_.activation),
                # In their order: precisions are a vector in that of the tensors.
                [(name, tensor.shape) for name, tensor in net.module_.named_parameters()],
            )
            for net in (self, previous)
        ]
        if forms[0] != forms[1]:
            raise ValueError(
                f"A fitted model can be trained further only in the same form, but "
                f"{self._changed_since(previous)}. Set warm_start=False, or fit a new estimator."
            )
        restore(self, state_of(previous))
        if history:
            self.history_ = copy.deepcopy(previous.history)

    def _changed_since(self, previous: "SoftEquivariantNet") -> str:
        """What gives this network another form than the previous one's, in words."""
        now, then = (net.get_params_for("module") for net in (self, previous))
        said = {"n_outputs": "the number of outputs", "image_shape": "the image shape"}
        names = ("pathways", "architecture", "width", "activation", "anchor_fraction", *said)
        changed = [
            f"{said.get(name, name)} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in names
            if then.get(name) != now.get(name)
        ]
        return ", ".join(changed) or "simplify() has taken pathways out"

    def set_paces(self, paces: Mapping[str, float]) -> None:
        """Give tensors, by name, learning rates that are parts of the common one.

        Only Adam's: steps of the others shrink with the gradient. SGD has the likelihood's pace.
        """
        if isinstance(self.optimizer_, torch.optim.SGD):
            for group in self.optimizer_.param_groups:
                group["pace"] = self.criterion_.pace
        if not isinstance(self.optimizer_, torch.optim.Adam):
            return
        common, *own = self.optimizer_.param_groups
        groups = {id(group["params"][0]): group for group in own}
        tensors = dict(self.module_.named_parameters())
        for tensor, pace in ((tensors[name], pace) for name, pace in paces.items()):
            if id(tensor) not in groups:
                common["params"] = [p for p in common["params"] if p is not tensor]
                groups[id(tensor)] = {**common, "params": [tensor]}
                self.optimizer_.param_groups.append(groups[id(tensor)])
            groups[id(tensor)]["pace"] = pace

    def log_hyperparameters(self) -> torch.Tensor:
        """log δ, and as last entries the logarithms of the noises' precisions that are learned."""
        log_precision = self.prior_.log_precision.cpu()
        noise = self.criterion_.log_hyperparameters()
        if not noise:
            return log_precision
        return torch.cat([log_precision, log_precision.new_tensor(noise)])

    def set_log_hyperparameters(self, values: torch.Tensor) -> None:
        """Go on with other ones."""
        n_precisions = len(self.prior_.log_precision)
        self.prior_.log_precision.copy_(values[:n_precisions])
        self._set_likelihood(
            self.criterion_.with_log_hyperparameters(values[n_precisions:].tolist())
        )

    def _set_likelihood(self, likelihood: Any) -> None:
        """Take a likelihood of another noise; what is remembered of gradients follows it.

        Where noises change unlike each other nothing that was summed over outputs can follow all
        of them. It follows the least one, which has the most of gradients and curvature; and what
        has gone down and up again is as it was.
        """
        rise = self.criterion_.pace / likelihood.pace
        self.criterion_ = likelihood
        if rise == 1.0:
            return
        if isinstance(self.optimizer_, KFAC):
            self.optimizer_.sharpen(rise)
        for state in self.optimizer_.state.values():
            self._multiply_moments(state, rise)

    def follow(self, scales: Mapping[str, float]) -> None:
        """Let what the optimizer remembers follow tensors that were multiplied by numbers.

        Gradients are divided by the same numbers; the steps that K-FAC remembers are multiplied.
        """
        tensors = dict(self.module_.named_parameters())
        by_tensor = {tensors[name]: scale for name, scale in scales.items()}
        if isinstance(self.optimizer_, KFAC):
            self.optimizer_.rescale(by_tensor)
            return
        for tensor, scale in by_tensor.items():
            self._multiply_moments(self.optimizer_.state.get(tensor, {}), 1.0 / scale)

    @staticmethod
    def _multiply_moments(state: dict[str, Any], factor: float) -> None:
        """As if all gradients of a tensor had been multiplied."""
        powers = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}
        for name in powers.keys() & state.keys():
            if state[name] is not None:
                state[name].mul_(factor ** powers[name])

    def discard(self, pathways: Iterable[tuple[str, str]]) -> None:
        """Take pathways out, given by layer and name, with their precisions and moments."""
        for layer, name in pathways:
            self.module_.layers[layer].discard(name)
        left = dict(self.module_.named_parameters())
        self.prior_.keep(left)
        kept = {id(parameter) for parameter in left.values()}
        for group in self.optimizer_.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in kept:
                    self.optimizer_.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) in kept]
        self.optimizer_.param_groups = [g for g in self.optimizer_.param_groups if g["params"]]
        self.course.evidence.forget()

    def partial_fit(self, X, y=None, classes=None, **fit_params):
        """Train on a :class:`TrainingData`; an interrupt is not swallowed, unlike skorch's.

        Unless ``ends_on_interrupt_`` is set: then the first one ends training as the end of the
        last epoch does, and ``interrupted_`` is the epoch, if the course finds a state to keep.
        """
        # Kept during training only.
        self.data_, self.weight_sum_, self.stop_ = X, X.weights.sum(), False
        self.processes_ = joined(X.inputs.device)
        self.compiled_ = torch.compile(self.module_.forward) if self.compiled else None
        self.module_.train()
        self.update_decay()
        try:
            with suppress(_StopTraining), self._ended_by_interrupt():
                self.notify("on_train_begin", X=X, y=y)
                self.fit_loop(X, y, **fit_params)
            with suppress(_StopTraining):
                self.notify("on_train_end", X=X, y=y)
        finally:
            del self.data_, self.decay_, self.weight_sum_, self.processes_, self.compiled_
        return self

    @contextmanager
    def _ended_by_interrupt(self) -> Iterator[None]:
        """Where an interrupt is the end of training, if there is anything to keep."""
        try:
            yield
        except KeyboardInterrupt:
            # Of several processes each would be broken off in another place.
            possible = self.ends_on_interrupt_ and self.processes_.size == 1
            self.kept_ = self.course.broken_off(self) if possible else None
            if self.kept_ is None:
                raise
            self.interrupted_ = len(self.history)

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
        for name, callback in self.callbacks_:
            try:
                getattr(callback, method_name)(self, **cb_kwargs)
            except KeyboardInterrupt:
                if name in OWN_CALLBACKS:
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
                self.history.record_batch(f"{prefix}_batch_size", batch[1][-1])
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
        targets, weights, _, n_rows = y_true
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
        grads = [p.grad for p in self.module_.parameters() if p.grad is not None]
        self.processes_.add_all(grads)

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
        w ← w / (1 + rate/(1 − m) · δ/N) with momentum m, after the step. Adam's steps are bounded
        whatever δ is.
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

    def log_likelihood(self, data: TrainingData) -> float:
        """Σ w log p(y | x, w) of some data, the same in all processes."""
        return sum(self.log_likelihoods(data))

    @torch.no_grad()
    def log_likelihoods(self, data: TrainingData) -> list[float]:
        """The same of each of the numbers that are predicted."""
        total = torch.zeros(data.n_targets, dtype=torch.float64)
        for inputs, targets, weights in data.in_order(rows_of_a_pass(self.module_)):
            log_probs = self.criterion_.log_probs(self.module_(inputs), targets)  # (n, K)
            total += (weights.double() @ log_probs.double()).cpu()
        return self.processes_.agreed(total.tolist())

    def fit_noise(self, data: TrainingData) -> None:
        """Go on with the noise that some data show, where it is learned."""
        if not self.criterion_.log_hyperparameters():
            return
        found = self.criterion_.at_best_noise(*self._judged(data))
        if all(math.isfinite(deviation) for deviation in found.deviations):
            self._set_likelihood(found)

    def score(self, data: TrainingData) -> float:
        """Log likelihood of each observation of some data at their best noise, in nats."""
        return self.criterion_.score(*self._judged(data))

    def constant_score(self, data: TrainingData) -> float:
        """The same of the best prediction that ignores the inputs."""
        constants = self.criterion_.constant_log_likelihoods(data.targets, data.weights)
        return self.criterion_.score(constants, data.weights.sum().item())

    def _judged(self, data: TrainingData) -> tuple[list[float], float]:
        """Log likelihoods of the numbers in some data, and of how many observations."""
        return self.log_likelihoods(data), data.weights.sum().item()

    @torch.no_grad()
    def temper(self, log_likelihood: float) -> bool:
        """Scale the outputs down until that of the training data is no higher than this.

        Returns
        -------
        bool
            Whether it was higher.
        """
        data, rows = self.data_, rows_of_a_pass(self.module_)
        outputs = torch.cat([self.module_(inputs).cpu() for inputs, *_ in data.in_order(rows)])
        scale = self.processes_.agreed(
            self.criterion_.scale_of_outputs(
                outputs, data.targets.cpu(), data.weights.cpu(), log_likelihood
            )
        )
        self.module_.scale_outputs(scale)
        return scale < 1.0

    def explained(self) -> float:
        """The part of what can be explained that is: 0 for a network that ignores its inputs."""
        log_likelihoods, n_observations = self._judged(self.data_)
        constants = self.criterion_.constant_log_likelihoods(self.data_.targets, self.data_.weights)
        return self.criterion_.explained(log_likelihoods, constants, n_observations)

    @full_precision()
    def log_joint_gradients(self) -> dict[str, torch.Tensor]:
        """Those of Σ log p(y | x, w) − ½ Σ_g δ_g ‖w_g‖², for N observations, by tensor in use."""
        tensors, processes = self.enabled_tensors(), self.processes_
        sums = [torch.zeros_like(tensor) for tensor in tensors.values()]
        own = slice(processes.rank, None, processes.size)
        for batch in self.data_.in_order(rows_of_a_pass(self.module_)):
            inputs, targets, weights = (column[own] for column in batch)
            with torch.enable_grad():
                log_prob = self.criterion_.log_prob(self.module_(inputs), targets)
                found = torch.autograd.grad((weights * log_prob).sum(), list(tensors.values()))
            for total, part in zip(sums, found, strict=True):
                total.add_(part)
        processes.add_all(sums)
        scale = self.data_.n_observations / self.weight_sum_
        precisions = self.prior_.precisions()
        return {
            name: scale * total - precisions[name] * tensor.detach()
            for (name, tensor), total in zip(tensors.items(), sums, strict=True)
        }

    def outcome(self, data: TrainingData) -> dict[str, Any]:
        """What the last evidence of a training has said; its spectra have then served."""
        log_precision, laplace = self.log_hyperparameters(), self.laplace_
        found = {
            "effective_dimensions": laplace.effective_dimensions(log_precision),
            "evidence": laplace.evidence(log_precision).value,
            "linear_term": self.linear_term_ / data.n_observations,
            "posterior": None,
        }
        if self.course.keeps_curvature:
            dtype = next(self.module_.parameters()).dtype
            found["posterior"] = Posterior.from_curvature(
                laplace.factors, self.prior_.precisions(), dtype, laplace.bases
            ).packed()
        del self.laplace_, self.linear_term_
        return found

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
            raise self.diverged(f"The training loss became {loss}")

    def diverged(self, what: str) -> DivergedError:
        """What to tell the user when training has left the finite numbers."""
        values = [row.get("log_marginal_likelihood", math.nan) for row in self.history]
        finite = [value for value in values if math.isfinite(value)]
        last = f"{finite[-1]:.6g}" if finite else "none yet"
        return DivergedError(
            f"{what} in epoch {len(self.history)} (last finite log evidence: {last}). "
            "Lower lr, keep standardize=True, or look for values of extreme size in X."
        )
