"""Likelihoods: log p(y | f), a root of its Hessian in f, and the link to predictions."""

import math
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Categorical", "Gaussian"]


def _signs(outputs: torch.Tensor, n_sketches: int, generator: torch.Generator) -> torch.Tensor:
    """Independent random signs of shape (n, K, n_sketches), drawn on the CPU."""
    shape = (*outputs.shape, n_sketches)
    bits = torch.randint(0, 2, shape, generator=generator)
    return (2 * bits - 1).to(outputs)


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

    def link(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class probabilities, shape (n, K)."""
        return outputs.softmax(dim=-1)

    def hessian_root(self, outputs: torch.Tensor) -> torch.Tensor:
        """R with R Rᵀ = −∂² log p / ∂f² = diag(p) − p pᵀ, exactly, in K − 1 columns.

        S = diag(√p) − p √pᵀ is a root with S √p = 0, so the Householder reflection Q that takes
        √p to −e_K leaves S Q with a last column of zeros.

        Returns
        -------
        tensor of shape (n, K, K − 1)
        """
        p = outputs.softmax(dim=-1)  # (n, K)
        root = p.sqrt()
        s = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]  # Eq. root S, (n, K, K)
        v = root.clone()
        v[:, -1] += 1.0  # + and not −: no cancellation, vᵀv >= 1
        reflected = 2.0 * (s @ v[:, :, None]) / (v * v).sum(-1)[:, None, None]  # (n, K, 1)
        return (s - reflected * v[:, None, :])[:, :, :-1]  # Eq. S Q, its last column is 0

    def hessian_sketch(
        self, outputs: torch.Tensor, n_sketches: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns v with E[v vᵀ] = diag(p) − p pᵀ: S r with random signs r.

        The columns are scaled by 1/√n_sketches, so that their sum of squares is the estimate.

        Returns
        -------
        tensor of shape (n, K, n_sketches)
        """
        p = outputs.softmax(dim=-1)[:, :, None]  # (n, K, 1)
        signed = p.sqrt() * _signs(outputs, n_sketches, generator)
        # Eq. sketch S r, without forming S
        return (signed - p * signed.sum(1, keepdim=True)) / math.sqrt(n_sketches)

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

    def hessian_labels(
        self, outputs: torch.Tensor, n_labels: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random columns ε/σ² with noise ε of variance σ², shape (n, K, n_labels)."""
        noise = torch.randn((*outputs.shape, n_labels), generator=generator)
        return noise.to(outputs) / math.sqrt(n_labels * self.noise_variance)
