"""Likelihoods: log p(y | f), a root of its Hessian in f, and the link to predictions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

__all__ = ["Categorical", "Gaussian", "Noise"]


class Noise(NamedTuple):
    """What an evidence has to know of noises that are learned: one for each output, or for all.

    Parameters
    ----------
    log_precisions : tuple of float
        log 1/σ² at which log likelihood and curvature were taken.
    squares : tuple of float
        Σ w (y − f)² over N observations, of the outputs that have each noise.
    n_numbers : float
        Numbers that each is the noise of: N, or N K of one for all.
    """

    log_precisions: tuple[float, ...]
    squares: tuple[float, ...]
    n_numbers: float


#: Least variance of a noise that is taken from residuals, in units of the targets' variance.
LEAST_VARIANCE = 1e-7


#: Of the interval in which the scale of logits is looked for: to 1e-9.
N_HALVINGS = 30


def _signs(outputs: torch.Tensor, n_sketches: int, generator: torch.Generator) -> torch.Tensor:
    """Independent random signs of shape (n, K, n_sketches), drawn on the CPU."""
    shape = (*outputs.shape, n_sketches)
    bits = torch.randint(0, 2, shape, generator=generator)
    return (2 * bits - 1).to(outputs)


def _cholesky(
    outputs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Cholesky factor of diag(p) − p pᵀ with classes in falling order of p, in closed form.

    With t_j the probability of all classes behind the j-th, L_jj = √(p_j t_j / t_{j−1}) and
    L_ij = −p_i √(p_j / (t_{j−1} t_j)) for i > j; what is left after j columns is the covariance of
    the classes behind, so that the first columns are the large ones and the last one is 0.

    Parameters
    ----------
    outputs : tensor of shape (n, K)

    Returns
    -------
    tuple of tensors of shape (n, K)
        p in falling order; which classes those are; L_jj; and −L_ij / p_i.

    References
    ----------
    K. Tanabe, M. Sagae, "An Exact Cholesky Decomposition and the Generalized Inverse of the
    Variance-Covariance Matrix of the Multinomial Distribution, with Applications", Journal of the
    Royal Statistical Society B 54 (1992).
    """
    p, places = outputs.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    tails = p.flip(-1).cumsum(-1).flip(-1)  # t_{j−1}, small ones summed first
    behind = torch.cat([tails[:, 1:], torch.zeros_like(p[:, :1])], dim=-1)  # t_j
    # Where nothing is behind, the columns are 0; roots apart, as a product of tails may underflow.
    tiny = torch.finfo(p.dtype).tiny
    share = (p / tails.clamp_min(tiny)).sqrt()
    slopes = torch.where(behind > 0, share * behind.clamp_min(tiny).rsqrt(), 0.0)
    return p, places, share * behind.sqrt(), slopes


def _in_place(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows (n, K, ...) at their places, (n, K), in the order of the classes."""
    return torch.empty_like(rows).scatter_(1, places[:, :, None].expand_as(rows), rows)


@dataclass(frozen=True)
class Categorical:
    """Softmax classification of K classes from logits f of shape (n, K)."""

    def log_prob(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(y | f) of each row, in nats; targets are codes 0 … K−1."""
        return -nn.functional.cross_entropy(outputs, targets, reduction="none")  # (n,)

    def log_probs(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The same as a column, (n, 1): a class is one number that is predicted."""
        return self.log_prob(outputs, targets)[:, None]

    def constant_log_likelihoods(
        self, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[float, ...]:
        """Σ_n w_n log p(y_n) of the best prediction that ignores the inputs, in nats."""
        counts = torch.bincount(targets, weights.double())
        frequencies = counts[counts > 0] / counts.sum()
        return ((counts.sum() * (frequencies * frequencies.log()).sum()).item(),)

    # What a likelihood with a noise has to say about it; here there is none.

    #: What a step along the plain gradient is multiplied by.
    pace = 1.0

    def n_columns(self, n_outputs: int) -> int:
        """Of the exact root of the output Hessian, K − 1."""
        return n_outputs - 1

    def log_hyperparameters(self) -> list[float]:
        """Logarithms of what is learned beside the precisions: nothing."""
        return []

    def with_log_hyperparameters(self, values: Sequence[float]) -> "Categorical":
        """The same, as nothing is learned."""
        return self

    @property
    def deviations(self) -> tuple[float, ...]:
        """Of the noise: there is none."""
        return ()

    def noise(self, log_likelihoods: Sequence[float], n_observations: float) -> None:
        """There is none."""

    def at_best_noise(
        self, log_likelihoods: Sequence[float], n_observations: float
    ) -> "Categorical":
        """The same, as there is no noise."""
        return self

    def score(self, log_likelihoods: Sequence[float], n_observations: float) -> float:
        """The log likelihood of each of some observations, in nats, from that of all."""
        return log_likelihoods[0] / n_observations

    def explained(
        self, log_likelihoods: Sequence[float], constants: Sequence[float], n_observations: float
    ) -> float:
        """1 − log p / log p of the best constant: 0 for predictions that ignore the inputs.

        1 where there is nothing to explain, as for a single class.
        """
        return 1.0 if constants[0] == 0 else 1.0 - log_likelihoods[0] / constants[0]

    def score_of(self, explained: float, constant: float, n_outputs: int) -> float:
        """The score at which a part is explained, from that of the best constant."""
        return (1 - explained) * constant

    def stake(self, constant: float, n_outputs: int) -> float:
        """What margins of scores are parts of: the entropy of the labels, in nats."""
        return -constant

    def scale_of_outputs(
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        log_likelihood: float,
    ) -> float:
        """The factor in (0, 1] of the logits at which Σ_n w_n log p(y_n) comes down to a value.

        That sum is concave in the factor, so there is one where it is above the value at 1, and
        below at 0; 1 where it is not.
        """
        outputs, weights = outputs.double(), weights.double()

        def excess(scale: float) -> float:
            log_prob = self.log_prob(scale * outputs, targets)
            return torch.dot(weights, log_prob).item() - log_likelihood

        if not excess(1.0) > 0 > excess(0.0):
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(N_HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if excess(middle) > 0 else (middle, high)
        return high

    def hessian_root(self, outputs: torch.Tensor) -> torch.Tensor:
        """R with R Rᵀ = −∂² log p / ∂f² = diag(p) − p pᵀ, exactly, in K − 1 columns.

        Returns
        -------
        tensor of shape (n, K, K − 1)
        """
        p, places, diagonal, slopes = _cholesky(outputs)
        lower = torch.diag_embed(diagonal) - (p[:, :, None] * slopes[:, None, :]).tril(-1)
        return _in_place(lower[:, :, :-1], places)  # the last column is 0

    def hessian_sketch(
        self, outputs: torch.Tensor, n_sketches: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns v with E[v vᵀ] = diag(p) − p pᵀ: R r with random signs r.

        The columns are scaled by 1/√n_sketches, so that their sum of squares is the estimate. Its
        error is of the products of different columns of R, so R should have few large ones: where
        two classes are in question this one has a single column, and the estimate no error.

        Returns
        -------
        tensor of shape (n, K, n_sketches)
        """
        p, places, diagonal, slopes = (t[:, :, None] for t in _cholesky(outputs))
        signs = _signs(outputs, n_sketches, generator)
        # Sums of those before, not sums less the last: near-certain rows have slopes far apart.
        before = nn.functional.pad((slopes * signs)[:, :-1], (0, 0, 1, 0))
        passed = before.cumsum(1)
        # Eq. sketch R r, without forming R
        return _in_place(diagonal * signs - p * passed, places[:, :, 0]) / math.sqrt(n_sketches)

    def hessian_trace(self, outputs: torch.Tensor) -> torch.Tensor:
        """Trace of −∂² log p / ∂f², 1 − Σ p²: how undecided each prediction is, shape (n,)."""
        p = outputs.softmax(dim=-1)
        return (p * (1 - p)).sum(-1)

    def hessian_labels(
        self, outputs: torch.Tensor, n_labels: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns e_y − p with labels y drawn from p, so that E[v vᵀ] = diag(p) − p pᵀ.

        The Monte-Carlo estimate of other libraries, for comparison: it is noisier than a sketch.

        Returns
        -------
        tensor of shape (n, K, n_labels), scaled by 1/√n_labels
        """
        p = outputs.softmax(dim=-1)  # (n, K)
        drawn = torch.multinomial(p.cpu(), n_labels, replacement=True, generator=generator)
        labels = nn.functional.one_hot(drawn.to(p.device), p.shape[-1])  # (n, n_labels, K)
        return (labels - p[:, None]).transpose(1, 2) / math.sqrt(n_labels)


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise on each of K outputs f of shape (n, K).

    A value: what learns the noise goes on with another one.

    Parameters
    ----------
    noise_variance : float or tuple of K floats, default=1.0
        σ², in squared units of the targets: one for all outputs, or one for each.
    learned : bool, default=False
        Whether that is only where it begins.
    log_units : float, default=0.0
        Added to each log density: log |∂y/∂t| where y are targets t that have been rescaled, so
        that densities are those of t.
    """

    noise_variance: float | tuple[float, ...] = 1.0
    learned: bool = False
    log_units: float = 0.0

    @property
    def variances(self) -> tuple[float, ...]:
        """σ² of each noise that there is."""
        found = self.noise_variance
        return found if isinstance(found, tuple) else (found,)

    @property
    def deviations(self) -> tuple[float, ...]:
        """σ of each noise that there is."""
        return tuple(math.sqrt(variance) for variance in self.variances)

    def _figure(
        self, function: Callable[[float], float], outputs: torch.Tensor
    ) -> torch.Tensor | float:
        """A function of σ², for each output; a number where there is one noise."""
        found = [function(variance) for variance in self.variances]
        return found[0] if len(found) == 1 else outputs.new_tensor(found)  # (K,)

    def log_prob(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(y | f) of each row, summed over outputs, in nats."""
        return self.log_probs(outputs, targets).sum(-1).to(outputs.dtype)  # (n,)

    def log_probs(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(y | f) of each number, (n, K), in nats; units are dealt out evenly.

        In double precision: small squares beside a large normaliser are asked for again.
        """
        apart, n_outputs = (outputs - targets).double(), outputs.shape[-1]
        squares = apart.square() / self._figure(float, apart)  # (n, K)
        normaliser = self._figure(lambda variance: self._normaliser(variance, n_outputs), apart)
        return -0.5 * (squares + normaliser)

    def _normaliser(self, variance: float, n_outputs: int) -> float:
        """What −2 log p of a number has beside its square."""
        return math.log(2 * math.pi * variance) - 2 * self.log_units / n_outputs

    def _of_each(self, n_outputs: int) -> tuple[float, ...]:
        """σ² of each output."""
        return self.variances * n_outputs if len(self.variances) == 1 else self.variances

    def constant_log_likelihoods(
        self, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[float, ...]:
        """Σ_n w_n log p(y_n) of the best prediction that ignores the inputs, by output, in nats.

        That is the weighted mean. The noise is the present one.
        """
        targets, weights = targets.double(), weights.double()
        mean = weights @ targets / weights.sum()
        return tuple((weights @ self.log_probs(mean.expand_as(targets), targets)).tolist())

    @property
    def pace(self) -> float:
        """What a step along the plain gradient is multiplied by: σ², the least of several.

        Then the steps are those of least squares, or shorter. In nats the gradient rises without
        bound as the noise falls.
        """
        return min(self.variances)

    def n_columns(self, n_outputs: int) -> int:
        """Of the exact root of the output Hessian, K."""
        return n_outputs

    def log_hyperparameters(self) -> list[float]:
        """Logarithms of what is learned beside the precisions: log 1/σ² of each, or nothing."""
        return [-math.log(variance) for variance in self.variances] if self.learned else []

    def with_log_hyperparameters(self, values: Sequence[float]) -> "Gaussian":
        """The same with other :meth:`log_hyperparameters`."""
        return self._with([math.exp(-value) for value in values]) if self.learned else self

    def _with(self, variances: Sequence[float]) -> "Gaussian":
        several = isinstance(self.noise_variance, tuple)
        return replace(self, noise_variance=tuple(variances) if several else variances[0])

    def noise(self, log_likelihoods: Sequence[float], n_observations: float) -> Noise | None:
        """What the evidence has to know, None for a noise that stays.

        Parameters
        ----------
        log_likelihoods : sequence of K floats
            Of N = ``n_observations``, at the present noise, by output.
        n_observations : float
        """
        if not self.learned:
            return None
        squares = self._squares(log_likelihoods, n_observations)
        n_numbers = n_observations * len(log_likelihoods) / len(squares)
        return Noise(tuple(self.log_hyperparameters()), squares, n_numbers)

    def _squares(
        self, log_likelihoods: Sequence[float], n_observations: float
    ) -> tuple[float, ...]:
        """Σ w (y − f)² by noise, from log likelihoods of the outputs at the present one."""
        n_outputs = len(log_likelihoods)
        found = []
        for value, variance in zip(log_likelihoods, self._of_each(n_outputs), strict=True):
            rest = -2 * value - n_observations * self._normaliser(variance, n_outputs)
            found.append(max(rest * variance, 0.0))
        return tuple(found) if len(self.variances) > 1 else (sum(found),)

    def at_best_noise(self, log_likelihoods: Sequence[float], n_observations: float) -> "Gaussian":
        """The same with the noise that is best for the same residuals, their mean square.

        No smaller than :data:`LEAST_VARIANCE`.
        """
        squares = self._squares(log_likelihoods, n_observations)
        n_numbers = n_observations * len(log_likelihoods) / len(squares)
        return self._with([max(some / n_numbers, LEAST_VARIANCE) for some in squares])

    def score(self, log_likelihoods: Sequence[float], n_observations: float) -> float:
        """The log likelihood of each of some observations at the best noise, in nats.

        At a noise that has still to be found, or that is taken to be much smaller than what is
        left to be learnt, log likelihoods would be no measure of how far predictions differ.
        """
        n_outputs, best = len(log_likelihoods), self.at_best_noise(log_likelihoods, n_observations)
        squares = self._squares(log_likelihoods, n_observations)
        parts = zip(squares, best.variances, strict=True)
        left = sum(some / variance for some, variance in parts) / n_observations
        normalisers = (self._normaliser(v, n_outputs) for v in best._of_each(n_outputs))
        return -0.5 * (left + sum(normalisers))

    def explained(
        self, log_likelihoods: Sequence[float], constants: Sequence[float], n_observations: float
    ) -> float:
        """R², 1 − Σ w ‖y − f‖² / Σ w ‖y − ȳ‖²; 1 where there is nothing to explain."""
        left, whole = (
            sum(self._squares(values, n_observations)) for values in (log_likelihoods, constants)
        )
        return 1.0 if whole <= LEAST_VARIANCE * n_observations else 1.0 - left / whole

    def score_of(self, explained: float, constant: float, n_outputs: int) -> float:
        """The score at which a part is explained, from that of the best constant."""
        return constant - 0.5 * n_outputs * math.log1p(-explained)

    def stake(self, constant: float, n_outputs: int) -> float:
        """What margins of scores are parts of: two nats for each output.

        An entropy of numbers has no zero. Two nats are what it is worth to explain all but a
        fiftieth of the variance, and nearly the entropy of ten classes.
        """
        return 2.0 * n_outputs

    def scale_of_outputs(self, *_: torch.Tensor | float) -> float:
        """1: a mean has no scale that says how sure it is; that is the noise."""
        return 1.0

    def hessian_root(self, outputs: torch.Tensor) -> torch.Tensor:
        """R = diag(1/σ) with R Rᵀ = −∂² log p / ∂f², shape (n, K, K): a column for each output."""
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return (eye / self._figure(math.sqrt, outputs)).expand(len(outputs), -1, -1)

    def hessian_sketch(
        self, outputs: torch.Tensor, n_sketches: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns v with E[v vᵀ] = diag(1/σ²), shape (n, K, n_sketches)."""
        signs = _signs(outputs, n_sketches, generator).transpose(1, 2)  # (n, n_sketches, K)
        deviations = self._figure(lambda variance: math.sqrt(n_sketches * variance), outputs)
        return (signs / deviations).transpose(1, 2)

    def hessian_trace(self, outputs: torch.Tensor) -> torch.Tensor:
        """Trace of −∂² log p / ∂f², the same for each row, shape (n,)."""
        trace = sum(1 / variance for variance in self._of_each(outputs.shape[-1]))
        return outputs.new_full((len(outputs),), trace)

    def hessian_labels(
        self, outputs: torch.Tensor, n_labels: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns ε/σ² with noise ε of variance σ², shape (n, K, n_labels)."""
        noise = torch.randn((*outputs.shape, n_labels), generator=generator).to(outputs)
        deviations = self._figure(lambda variance: math.sqrt(n_labels * variance), outputs)
        return (noise.transpose(1, 2) / deviations).transpose(1, 2)
