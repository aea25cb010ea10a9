"""Likelihoods: log p(y | f), a root of its Hessian in f, and the link to predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

__all__ = ["Categorical", "Gaussian", "Noise"]


class Noise(NamedTuple):
    """What an evidence has to know of a noise that is learned.

    Parameters
    ----------
    log_precision : float
        log 1/σ² at which log likelihood and curvature were taken.
    squares : float
        Σ w ‖y − f‖² over N observations.
    n_numbers : float
        N K.
    """

    log_precision: float
    squares: float
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

    def constant_log_likelihood(self, targets: torch.Tensor, weights: torch.Tensor) -> float:
        """Σ_n w_n log p(y_n) of the best prediction that ignores the inputs, in nats."""
        counts = torch.bincount(targets, weights.double())
        frequencies = counts[counts > 0] / counts.sum()
        return (counts.sum() * (frequencies * frequencies.log()).sum()).item()

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

    def noise(self, log_likelihood: float, n_observations: float, n_outputs: int) -> None:
        """There is none."""

    def at_best_noise(
        self, log_likelihood: float, n_observations: float, n_outputs: int
    ) -> "Categorical":
        """The same, as there is no noise."""
        return self

    def score(self, log_likelihood: float, n_observations: float, n_outputs: int) -> float:
        """The log likelihood of each of some observations, in nats, from that of all."""
        return log_likelihood / n_observations

    def explained(
        self, log_likelihood: float, constant: float, n_observations: float, n_outputs: int
    ) -> float:
        """1 − log p / log p of the best constant: 0 for predictions that ignore the inputs.

        1 where there is nothing to explain, as for a single class.
        """
        return 1.0 if constant == 0 else 1.0 - log_likelihood / constant

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

    def link(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class probabilities, shape (n, K)."""
        return outputs.softmax(dim=-1)

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
        passed = slopes * signs
        passed = passed.cumsum(1) - passed
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
    """Independent Gaussian noise of one variance on each of K outputs f of shape (n, K).

    A value: what learns the noise goes on with another one.

    Parameters
    ----------
    noise_variance : float, default=1.0
        σ², in squared units of the targets.
    learned : bool, default=False
        Whether that is only where it begins.
    log_units : float, default=0.0
        Added to each log density: log |∂y/∂t| where y are targets t that have been rescaled, so
        that densities are those of t.
    """

    noise_variance: float = 1.0
    learned: bool = False
    log_units: float = 0.0

    def log_prob(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(y | f) of each row, summed over outputs, in nats."""
        squares = (outputs - targets).square().sum(-1) / self.noise_variance  # (n,)
        return -0.5 * (squares + self._normaliser(outputs.shape[-1]))

    def _normaliser(self, n_outputs: int) -> float:
        """What −2 log p of a row has beside its squares."""
        return n_outputs * math.log(2 * math.pi * self.noise_variance) - 2 * self.log_units

    def constant_log_likelihood(self, targets: torch.Tensor, weights: torch.Tensor) -> float:
        """Σ_n w_n log p(y_n) of the best prediction that ignores the inputs, in nats.

        That is the weighted mean. The noise is the present one.
        """
        targets, weights = targets.double(), weights.double()
        total = weights.sum()
        squares = (targets - weights @ targets / total).square().sum(-1)
        normaliser = total * self._normaliser(targets.shape[-1])
        return -0.5 * (weights @ squares / self.noise_variance + normaliser).item()

    @property
    def pace(self) -> float:
        """What a step along the plain gradient is multiplied by: σ².

        Then the steps are those of least squares. In nats the gradient rises without bound as
        the noise falls.
        """
        return self.noise_variance

    def n_columns(self, n_outputs: int) -> int:
        """Of the exact root of the output Hessian, K."""
        return n_outputs

    def log_hyperparameters(self) -> list[float]:
        """Logarithms of what is learned beside the precisions: log 1/σ², or nothing."""
        return [-math.log(self.noise_variance)] if self.learned else []

    def with_log_hyperparameters(self, values: Sequence[float]) -> "Gaussian":
        """The same with other :meth:`log_hyperparameters`."""
        return replace(self, noise_variance=math.exp(-values[0])) if self.learned else self

    def noise(self, log_likelihood: float, n_observations: float, n_outputs: int) -> Noise | None:
        """What the evidence has to know, None for a noise that stays.

        Parameters
        ----------
        log_likelihood : float
            Of N = ``n_observations``, at the present noise.
        n_observations : float
        n_outputs : int
            K.
        """
        if not self.learned:
            return None
        squares = self._squares(log_likelihood, n_observations, n_outputs)
        n_numbers = n_observations * n_outputs
        return Noise(-math.log(self.noise_variance), squares, n_numbers)

    def _squares(self, log_likelihood: float, n_observations: float, n_outputs: int) -> float:
        """Σ w ‖y − f‖², from a log likelihood at the present noise."""
        rest = -2 * log_likelihood - n_observations * self._normaliser(n_outputs)
        return max(rest * self.noise_variance, 0.0)

    def at_best_noise(
        self, log_likelihood: float, n_observations: float, n_outputs: int
    ) -> "Gaussian":
        """The same with the noise that is best for the same residuals, their mean square.

        No smaller than :data:`LEAST_VARIANCE`.
        """
        squares = self._squares(log_likelihood, n_observations, n_outputs)
        best = max(squares / (n_observations * n_outputs), LEAST_VARIANCE)
        return replace(self, noise_variance=best)

    def score(self, log_likelihood: float, n_observations: float, n_outputs: int) -> float:
        """The log likelihood of each of some observations at the best noise, in nats.

        At a noise that has still to be found, or that is taken to be much smaller than what is
        left to be learnt, log likelihoods would be no measure of how far predictions differ.
        """
        best = self.at_best_noise(log_likelihood, n_observations, n_outputs)
        squares = self._squares(log_likelihood, n_observations, n_outputs) / n_observations
        return -0.5 * (squares / best.noise_variance + best._normaliser(n_outputs))

    def explained(
        self, log_likelihood: float, constant: float, n_observations: float, n_outputs: int
    ) -> float:
        """R², 1 − Σ w ‖y − f‖² / Σ w ‖y − ȳ‖²; 1 where there is nothing to explain."""
        left, whole = (
            self._squares(value, n_observations, n_outputs) for value in (log_likelihood, constant)
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

    def link(self, outputs: torch.Tensor) -> torch.Tensor:
        """The mean, shape (n, K)."""
        return outputs

    def hessian_root(self, outputs: torch.Tensor) -> torch.Tensor:
        """R = I/σ with R Rᵀ = −∂² log p / ∂f², shape (n, K, K)."""
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return (eye / math.sqrt(self.noise_variance)).expand(len(outputs), -1, -1)

    def hessian_sketch(
        self, outputs: torch.Tensor, n_sketches: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns v with E[v vᵀ] = I/σ², shape (n, K, n_sketches)."""
        return _signs(outputs, n_sketches, generator) / math.sqrt(n_sketches * self.noise_variance)

    def hessian_trace(self, outputs: torch.Tensor) -> torch.Tensor:
        """Trace of −∂² log p / ∂f², the same for each row, shape (n,)."""
        return outputs.new_full((len(outputs),), outputs.shape[-1] / self.noise_variance)

    def hessian_labels(
        self, outputs: torch.Tensor, n_labels: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns ε/σ² with noise ε of variance σ², shape (n, K, n_labels)."""
        noise = torch.randn((*outputs.shape, n_labels), generator=generator)
        return noise.to(outputs) / math.sqrt(n_labels * self.noise_variance)
