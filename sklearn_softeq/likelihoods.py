"""Likelihoods: log p(y | f), a root of its Hessian in f, and the link to predictions."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import nn

__all__ = ["Categorical", "Gaussian"]


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

        return brentq(excess, 0.0, 1.0, xtol=1e-9) if excess(1.0) > 0 > excess(0.0) else 1.0

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

    Parameters
    ----------
    noise_variance : float, default=1.0
        Variance of the noise, in squared units of the targets.
    """

    noise_variance: float = 1.0

    def log_prob(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(y | f) of each row, summed over outputs, in nats."""
        squares = (outputs - targets).square().sum(-1) / self.noise_variance  # (n,)
        normaliser = outputs.shape[-1] * math.log(2 * math.pi * self.noise_variance)
        return -0.5 * (squares + normaliser)

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
