"""The Laplace estimate of the log marginal likelihood, and its ascent in the precisions.

    log q(D | δ) = log p(D | w*) − ½ Σ_g δ_g ‖w*_g‖² − ½ Σ_g Σ_ij log(1 + λ_i μ_j / δ_g)

Nothing in λ, μ depends on δ: one eigendecomposition serves any number of steps. The gradient is
in closed form, ∂ log q / ∂ log δ_g = ½ (γ_g − δ_g ‖w*_g‖²). A lengthscale reaches λ, μ and the
likelihood: there each evidence gives a gradient for one step.

The precisions β_k = 1/σ²_k of Gaussian noises that are learned, one for each output, are as many
precisions more, the last of the vector of logarithms. The curvature is H = Σ_k β_k G_k: where all β
rise alike that comes to the same in λμ/δ as other δ. Where they do not, each eigenvalue follows
what each output has of it, which is right to first order: steps are few, and after them the
curvature is found anew. All figures are exact at the β at which it was found, at those in
proportion to them, and in a linear model, where the G_k have eigenvectors in common.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from .anchors import LOG_OMEGA_BOUNDS
from .hyperparameters import LOG_PRECISION_BOUNDS
from .kronecker import Eigenbases, Kronecker, Spectrum
from .likelihoods import Noise

__all__ = [
    "HYPER_SOLVERS",
    "AdamSolver",
    "Ascent",
    "Evidence",
    "FixedPointSolver",
    "LaplaceEvidence",
    "LengthscaleSolver",
]

_TINY = 1e-30  # below any squared norm or γ that a float32 network can produce on purpose

#: Largest step of the fixed point in log δ: a tensor that is zero by chance (γ/‖w‖² = ∞) should
#: not be thrown to the bound by one look at it.
_MAX_STEP = 2.0


class Evidence(NamedTuple):
    """The three terms of the estimate, in nats."""

    log_likelihood: float
    scatter: float
    log_det_ratio: float

    @property
    def value(self) -> float:
        """log q(D | δ)."""
        return self.log_likelihood - 0.5 * self.scatter - 0.5 * self.log_det_ratio  # Eq. evidence


@dataclass(frozen=True, eq=False)
class LaplaceEvidence:
    """log q(D | δ) as a function of the log precisions, that of a learned noise among them.

    Parameters
    ----------
    log_likelihood : float
        log p(D | w*), nats.
    spectra : dict of str to Spectrum
        Eigenvalues of the curvature of each tensor that is in use.
    squared_norms : dict of str to float
        ‖w*_g‖² of the same tensors.
    index : dict of str to int
        The entry of the vector log δ that belongs to each tensor.
    charges : dict of str to float, optional
        How many times the log determinant of a tensor counts in the ascent; 1 where it has no
        entry. The evidence itself always counts it once.
    log_det_weight : float, default=1.0
        What all charges are multiplied by, and the slope in the lengthscales, while the weight of
        the log determinants is still growing.
    slopes : dict of str to float, optional
        ∂ log p(D | w*) / ∂ log ω by the name of each map with a lengthscale.
    factors : dict of str to Kronecker, optional
        The curvature itself, for :meth:`linear_term`.
    noise : Noise, optional
        Those that are learned, and at which all of this was found. The vectors of log precisions
        have their log β as last entries then.
    bases : Eigenbases, optional
        Those of the factors of the curvature that have been found.
    """

    log_likelihood: float
    spectra: dict[str, Spectrum]
    squared_norms: dict[str, float]
    index: dict[str, int]
    charges: Mapping[str, float] = field(default_factory=dict)
    log_det_weight: float = 1.0
    slopes: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, Kronecker] = field(default_factory=dict)
    noise: Noise | None = None
    bases: Eigenbases = field(default_factory=Eigenbases)

    def without_curvature(self) -> "LaplaceEvidence":
        """The same without what only :meth:`linear_term` needs, which is large."""
        return replace(self, factors={}, bases=Eigenbases())

    def evidence(self, log_precision: torch.Tensor) -> Evidence:
        """The estimate and its terms at a vector of log precisions."""
        log_det = self._of_each(Spectrum.log_det_ratio, log_precision).sum()
        return Evidence(
            self._log_likelihood_at(log_precision),
            torch.dot(self._squares, log_precision.exp()[self._places]).item(),
            log_det.item(),
        )

    def effective_dimensions(self, log_precision: torch.Tensor) -> dict[str, float]:
        """γ of each tensor, between 0 and its number of weights."""
        found = self._of_each(Spectrum.effective_dimensions, log_precision)
        return dict(zip(self.spectra, found.tolist(), strict=True))

    def linear_term(
        self, gradients: Mapping[str, torch.Tensor], log_precision: torch.Tensor
    ) -> float:
        """½ Σ_g ∇_gᵀ (H_g + δ_g)⁻¹ ∇_g, which the estimate lacks away from a mode, in nats.

        It expands the log joint around w* as if that were a mode. With the gradient there the
        same expansion has its mode elsewhere, and by so much more under it. The curvature is taken
        to have risen as a whole, with the mean of all log β.

        Parameters
        ----------
        gradients : mapping of str to tensor
            ∇ of the log joint in the tensors that are in use.
        log_precision : tensor
            log δ, at which these gradients were taken.
        """
        precisions, rise = log_precision.exp(), self._common_rise(log_precision)
        found = 0.0
        for name, factor in self.factors.items():
            precision = precisions[self.index[name]].item() / rise
            found += factor.inverse_form(gradients[name], precision, self.bases) / rise
        return 0.5 * found  # Eq. linear term

    def balance(self, log_precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c γ, with c the charge, and ‖w‖² of each entry; zero for tensors that are not in use.

        For a noise N, and the squares that the posterior expects, Σ w (y_k − f_k)² + γ_k / β_k,
        with γ_k = Σ_g tr H_gk (H_g + δ_g)⁻¹ the dimensions that output k determines. At the
        mode's squares and N − γ_k, as in MacKay's formula, balance is at the same β; but block by
        block γ_k may exceed N, and here each step is one of expectation maximisation, which
        raises the evidence always. No more is expected than what the mean leaves, N for targets
        of unit variance, if the network does not leave more. Neither charges nor the weight of
        the log determinants touch it: with less than all of γ a close fit would call for a small
        noise, and that for a closer fit.
        """
        found = self._of_each(Spectrum.effective_dimensions, log_precision)
        gamma = torch.zeros_like(log_precision).index_put((self._places,), self._charges * found)
        squares = torch.zeros_like(log_precision).index_put((self._places,), self._squares)
        if self.noise is not None:
            n, left = self.noise.n_numbers, log_precision.new_tensor(self.noise.squares)
            determined = self._of_each(Spectrum.dimensions_of_outputs, log_precision).sum(0)
            expected = left + determined / log_precision[-len(left) :].exp()  # Eq. noise
            gamma[-len(left) :] = n
            squares[-len(left) :] = expected.minimum(left.clamp_min(n))
        return gamma, squares

    def gradient(self, log_precision: torch.Tensor) -> torch.Tensor:
        """∂ log q / ∂ log δ = ½ (c γ − δ ‖w‖²), with charge c = 1 the gradient of the evidence."""
        gamma, squares = self.balance(log_precision)
        return 0.5 * (gamma - log_precision.exp() * squares)  # Eq. gradient

    def lengthscale_gradient(self, log_precision: torch.Tensor) -> dict[str, float]:
        """∂ log q / ∂ log ω of each map with a lengthscale, activations held fixed in log det.

        Log determinants count as far as they have come to count for the precisions. Charges are
        about the precisions alone. The slope of the log likelihood is taken to have risen with the
        mean of all log β.
        """
        gradient, rise = {}, self._common_rise(log_precision)
        for name, slope in self.slopes.items():
            tensor = f"{name}.weight"
            precision = log_precision[self.index[tensor]].exp()
            log_det_slope = self._raised(tensor, log_precision).log_det_slope(precision).item()
            # Eq. gradient in ω
            gradient[name] = rise * slope - 0.5 * self.log_det_weight * log_det_slope
        return gradient

    def _log_rises(self, log_precision: torch.Tensor) -> torch.Tensor:
        """What was added to each log β since the curvature was found; nothing without noises."""
        if self.noise is None:
            return log_precision.new_zeros(0)
        before = log_precision.new_tensor(self.noise.log_precisions)
        return log_precision[-len(before) :] - before

    def _common_rise(self, log_precision: torch.Tensor) -> float:
        """What the curvature as a whole is multiplied by."""
        rises = self._log_rises(log_precision)
        return math.exp(rises.mean().item()) if len(rises) else 1.0

    def _raised(self, name: str, log_precision: torch.Tensor) -> Spectrum:
        """The spectrum of a tensor at other β."""
        rises = self._log_rises(log_precision)
        return self.spectra[name].raised(rises.exp()) if len(rises) else self.spectra[name]

    def _log_likelihood_at(self, log_precision: torch.Tensor) -> float:
        if self.noise is None:
            return self.log_likelihood
        rises = self._log_rises(log_precision)
        before = log_precision.new_tensor(self.noise.log_precisions).exp()
        squares = before * rises.expm1() * log_precision.new_tensor(self.noise.squares)
        change = self.noise.n_numbers * rises - squares
        return self.log_likelihood + 0.5 * change.sum().item()

    # Of the tensors in use, in the order of ``spectra``; many steps ask for them.

    @cached_property
    def _places(self) -> torch.Tensor:
        return torch.tensor([self.index[name] for name in self.spectra], dtype=torch.int64)

    @cached_property
    def _squares(self) -> torch.Tensor:
        return torch.tensor([self.squared_norms[n] for n in self.spectra], dtype=torch.float64)

    @cached_property
    def _charges(self) -> torch.Tensor:
        charges = [self.log_det_weight * self.charges.get(name, 1.0) for name in self.spectra]
        return torch.tensor(charges, dtype=torch.float64)

    def _of_each(
        self, function: Callable[[Spectrum, float], torch.Tensor], log_precision: torch.Tensor
    ) -> torch.Tensor:
        """A figure of each spectrum at its precision."""
        at = log_precision.exp()[self._places].tolist()
        raised = (self._raised(name, log_precision) for name in self.spectra)
        found = [function(each, p) for each, p in zip(raised, at, strict=True)]
        return torch.stack(found) if found else log_precision.new_zeros(0)


class FixedPointSolver:
    """MacKay's fixed point δ = c γ / ‖w‖² (charge c, usually 1), damped in the logarithm.

    And σ²_k = (Σ w (y_k − f_k)² + γ_k σ²_k) / N, of noises that are learned.

    Parameters
    ----------
    rate : float, default=0.5
        log δ ← (1 − rate) log δ + rate · log(γ / ‖w‖²), by at most 2; 1 is undamped.

    References
    ----------
    D. MacKay, "Bayesian interpolation", Neural Computation 4, 1992.
    """

    def __init__(self, rate: float = 0.5):
        self.rate = rate

    def step(self, objective: LaplaceEvidence, log_precision: torch.Tensor) -> torch.Tensor:
        """One update of the vector log δ."""
        gamma, squares = objective.balance(log_precision)
        target = gamma.clamp_min(_TINY).log() - squares.clamp_min(_TINY).log()  # Eq. fixed point
        # A tensor with neither weights nor dimensions (it is off) says nothing about δ.
        silent = (gamma <= _TINY) & (squares <= _TINY)
        step = torch.where(silent, 0.0, self.rate * (target - log_precision))
        return (log_precision + step.clamp(-_MAX_STEP, _MAX_STEP)).clamp(*LOG_PRECISION_BOUNDS)


class Ascent:
    """Adam on a vector of logarithms, ascending; its moments last from step to step.

    A vector of another length, as after pathways were taken out, begins anew.

    Parameters
    ----------
    rate : float
        About the change of a logarithm in one step.
    bounds : pair of float
        Of each entry.
    eps : float, default=1e-8
        Size of a gradient that is as good as none; much smaller ones take much smaller steps.
    """

    def __init__(self, rate: float, bounds: tuple[float, float], eps: float = 1e-8):
        self.rate = rate
        self.bounds = bounds
        self.eps = eps
        self._vector = torch.zeros(0, dtype=torch.float64)
        self._adam: torch.optim.Adam | None = None

    def step(self, vector: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """One step from a vector along a gradient."""
        if self._adam is None or len(vector) != len(self._vector):
            self._adam = self._begun(vector)
        self._vector.copy_(vector)
        self._vector.grad = gradient
        self._adam.step()
        return self._vector.clamp(*self.bounds)

    def _begun(self, vector: torch.Tensor) -> torch.optim.Adam:
        self._vector = vector.clone()
        return torch.optim.Adam([self._vector], lr=self.rate, eps=self.eps, maximize=True)

    def memory(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        """What the next step needs of those before, for :meth:`recall`."""
        return None if self._adam is None else (self._vector, dict(self._adam.state[self._vector]))

    def recall(self, memory: tuple[torch.Tensor, dict[str, torch.Tensor]] | None) -> None:
        """Go on from a :meth:`memory`."""
        self._adam = None
        if memory is not None:
            self._adam = self._begun(memory[0])
            self._adam.state[self._vector] = dict(memory[1])


class AdamSolver:
    """Adam on the log precisions, ascending (the paper's choice).

    Parameters
    ----------
    rate : float, default=0.1
        About the change of log δ in one step.
    """

    def __init__(self, rate: float = 0.1):
        self.ascent = Ascent(rate, LOG_PRECISION_BOUNDS)

    def step(self, objective: LaplaceEvidence, log_precision: torch.Tensor) -> torch.Tensor:
        """One update of the vector log δ."""
        return self.ascent.step(log_precision, objective.gradient(log_precision))


class LengthscaleSolver:
    """One step of Adam on all log ω at each evidence.

    Not more than one: the eigenvalues are those of the present ω, and so is the fit. A slope of
    less than a nat says little and moves little.

    Parameters
    ----------
    rate : float, default=0.1
        About the change of log ω in one step.
    """

    def __init__(self, rate: float = 0.1):
        self.ascent = Ascent(rate, LOG_OMEGA_BOUNDS, eps=1.0)

    def step(
        self, log_omegas: Mapping[str, float], gradient: Mapping[str, float]
    ) -> dict[str, float]:
        """New log ω of each map that has a gradient, from those of all maps."""
        vector, slopes = (
            torch.tensor(values, dtype=torch.float64)
            for values in (list(log_omegas.values()), [gradient.get(n, 0.0) for n in log_omegas])
        )
        moved = dict(zip(log_omegas, self.ascent.step(vector, slopes).tolist(), strict=True))
        return {name: moved[name] for name in gradient}


Solver = AdamSolver | FixedPointSolver

HYPER_SOLVERS: dict[str, type[Solver]] = {"adam": AdamSolver, "fixed_point": FixedPointSolver}
