"""Kronecker factors of the generalised Gauss–Newton matrix of every weight tensor.

For a map out[n, s, b] = W[b] inp[n, s, b] + bias with S shared positions, the expand form is

    A_b = Σ_n Σ_s inp inpᵀ        Γ_b = Σ_n Σ_s E[g gᵀ] / S        H_b = A_b ⊗ Γ_b / N

with g the gradient of the log likelihood at the output of the map for a label of the model's own
predictive. The expectation is taken with columns v of a root of the output Hessian: g = Jᵀ v, one
backward pass each. Biases are exact: H = Σ_n E[g gᵀ] with g summed over positions and blocks.

Where a map is given at anchors, A or Γ depends on a hyperparameter ω of the interpolation. With
activations and gradients held fixed its derivative is Σ ∂t tᵀ + t ∂tᵀ over the tokens t; that of
the log likelihood, in which everything follows, is Σ g · ∂out with g for the labels of the data.

Gradients of weights are never formed; hooks live inside one call and hang on no layer after it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .kronecker import Kronecker
from .layers import SharedLinear, outer

__all__ = ["Curvature", "Likelihood", "kronecker_factors"]

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Likelihood(Protocol):
    """What the curvature asks of a likelihood."""

    def log_prob(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...

    def hessian_root(self, outputs: torch.Tensor) -> torch.Tensor: ...

    def hessian_sketch(
        self, outputs: torch.Tensor, n_sketches: int, generator: torch.Generator
    ) -> torch.Tensor: ...


class Curvature(NamedTuple):
    """Kronecker factors by tensor name, and the log likelihood met on the way.

    All stand for N observations, whatever part of the data was seen. ``slopes`` holds
    ∂ log likelihood / ∂ log ω by the name of each map that has an ω, if they were asked for.
    """

    factors: dict[str, Kronecker]
    log_likelihood: float
    slopes: dict[str, float]


def kronecker_factors(
    network: nn.Module,
    likelihood: Likelihood,
    batches: Iterable[Batch],
    *,
    total_weight: float | None = None,
    n_sketches: int = 0,
    generator: torch.Generator | None = None,
    lengthscales: bool = False,
) -> Curvature:
    """Factors of each tensor of each :class:`SharedLinear` that the network uses.

    Parameters
    ----------
    network : nn.Module
        Rows of its output may depend on their own row of the input only.
    likelihood : Categorical or Gaussian
        Gives the root of the output Hessian.
    batches : iterable of (inputs, targets, weights)
        Weights of shape (n,) count repetitions.
    total_weight : float, optional
        N; default: the sum of the weights of the batches. When the batches hold only a part, of
        weight m, the curvature and the log likelihood are scaled by N/m.
    n_sketches : int, default=0
        Number of Rademacher sketches of the output Hessian; 0 takes all of its columns.
    generator : torch.Generator, optional
        Source of the sketches.
    lengthscales : bool, default=False
        Also the derivatives in log ω of every map that is given at anchors: those of its factors,
        and that of the log likelihood, for one backward pass more.

    Returns
    -------
    Curvature
    """
    sums: dict[str, _FactorSums] = {}
    log_likelihood, weight_seen = 0.0, 0.0
    for inputs, targets, weights in batches:
        with torch.enable_grad(), _recorded(network) as record:
            outputs = network(inputs)
        detached = outputs.detach()
        log_prob = likelihood.log_prob(detached, targets)
        log_likelihood += torch.dot(weights.double(), log_prob.double()).item()
        weight_seen += weights.double().sum().item()
        root_weight = weights.sqrt().to(inputs.dtype)
        weighted = root_weight if (weights != 1).any() else None  # spares a pass over the tokens
        for name, (layer, inp, _) in record.items():
            sums.setdefault(name, _FactorSums(layer, lengthscales)).add_input(inp, weighted)
        if lengthscales:
            score = _score(likelihood, detached, targets, weights)
            moving = {name: r for name, r in record.items() if r[0].interpolation is not None}
            for name, grad in _gradients(outputs, moving, score):
                sums[name].add_score(record[name][1], grad)
        for column in _columns(likelihood, detached, n_sketches, generator):  # (n, K)
            for name, grad in _gradients(outputs, record, column * root_weight[:, None]):
                sums[name].add_gradient(grad)
    assert weight_seen > 0, "the batches hold no observation"
    total = weight_seen if total_weight is None else total_weight
    factors: dict[str, Kronecker] = {}
    for name, layer_sums in sums.items():
        for tensor, factor in layer_sums.finish(weight_seen, total).items():
            factors[f"{name}.{tensor}"] = factor
    scale = total / weight_seen
    slopes = {name: s.slope * scale for name, s in sums.items() if s.moving}
    return Curvature(factors, log_likelihood * scale, slopes)


def _columns(
    likelihood: Likelihood,
    outputs: torch.Tensor,
    n_sketches: int,
    generator: torch.Generator | None,
) -> Iterator[torch.Tensor]:
    """Columns v of a root of the output Hessian, or sketches of it, (n, K) each."""
    if n_sketches:
        assert generator is not None
        return iter(likelihood.hessian_sketch(outputs, n_sketches, generator).unbind(-1))
    return iter(likelihood.hessian_root(outputs).unbind(-1))


def _score(
    likelihood: Likelihood, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """∂ Σ_n w_n log p(y_n | f_n) / ∂f, shape (n, K)."""
    with torch.enable_grad():
        outputs = outputs.clone().requires_grad_()
        log_likelihood = (likelihood.log_prob(outputs, targets) * weights).sum()
        return torch.autograd.grad(log_likelihood, outputs)[0]


class _FactorSums:
    """Running sums of the factors of one map."""

    def __init__(self, layer: SharedLinear, lengthscales: bool):
        n_blocks, n_out, n_in = layer.weight.shape
        self.layer = layer
        self.moving = lengthscales and layer.interpolation is not None
        self.left = layer.weight.new_zeros(n_blocks, n_in, n_in)
        self.right = layer.weight.new_zeros(n_blocks, n_out, n_out)
        self.bias = layer.weight.new_zeros(1, n_out, n_out)
        self.left_tangent: torch.Tensor | None = None
        self.right_tangent: torch.Tensor | None = None
        self.slope = 0.0
        self.shared = True

    @torch.no_grad()
    def add_input(self, inputs: torch.Tensor, root_weight: torch.Tensor | None) -> None:
        self.left += self.layer.input_gram(inputs, root_weight)  # Eq. A
        change = self.layer.input_tangent(inputs) if self.moving else None
        if change is not None:
            tokens = self.layer.input_tokens(inputs)
            if root_weight is not None:
                tokens = tokens * root_weight.square()[:, None, None, None]
            self.left_tangent = _added(self.left_tangent, outer(change, tokens))

    @torch.no_grad()
    def add_gradient(self, grad: torch.Tensor) -> None:
        tokens = self.layer.gradient_tokens(grad)  # (n, S, B, d_out)
        n_positions = tokens.shape[1]
        self.right += outer(tokens, tokens) / n_positions  # Eq. Γ
        self.shared = n_positions > 1 or tokens.shape[2] > 1
        if self.shared and self.layer.bias is not None:
            summed = tokens.sum((1, 2), keepdim=True)
            self.bias += outer(summed, summed)  # Eq. H of the bias
        change = self.layer.gradient_tangent(grad) if self.moving else None
        if change is not None:
            self.right_tangent = _added(self.right_tangent, outer(change, tokens) / n_positions)

    @torch.no_grad()
    def add_score(self, inputs: torch.Tensor, grad: torch.Tensor) -> None:
        """Count in g · ∂out / ∂log ω, with g the gradient for the labels of the data."""
        layer, grads = self.layer, self.layer.gradient_tokens(grad)
        change = layer.input_tangent(inputs)
        if change is not None:
            self.slope += _bilinear(grads, layer.weight, change)
        change = layer.gradient_tangent(grad)
        if change is not None:
            self.slope += _bilinear(change, layer.weight, layer.input_tokens(inputs))
            if layer.bias is not None:
                self.slope += (change * layer.bias).sum().item()

    def finish(self, seen: float, total: float) -> dict[str, Kronecker]:
        """Curvature of weight and bias for N = total from sums over weight m = seen."""
        scale = total / seen**2  # Eq. H = A ⊗ Γ / m, times N/m
        right = self.right * scale
        d_left, d_right = _symmetric(self.left_tangent, 1.0), _symmetric(self.right_tangent, scale)
        found = {"weight": Kronecker(self.left, right, d_left, d_right)}
        one = self.left.new_ones(1, 1, 1)
        if self.layer.bias is not None and self.shared:
            found["bias"] = Kronecker(one, self.bias * (total / seen))
        elif self.layer.bias is not None:
            # One position, one block: Γ itself, the same tensor, so that it is decomposed once.
            found["bias"] = Kronecker(one * seen, right)
        return found


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total + part


def _symmetric(half: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    """Σ ∂t tᵀ + t ∂tᵀ from its first half."""
    return None if half is None else (half + half.transpose(1, 2)) * scale


def _bilinear(left: torch.Tensor, weight: torch.Tensor, right: torch.Tensor) -> float:
    """Σ_n Σ_s Σ_b lᵀ W_b r."""
    return (outer(left, right).double() * weight).sum().item()


Record = dict[str, tuple[SharedLinear, torch.Tensor, torch.Tensor]]


def _gradients(
    outputs: torch.Tensor, record: Record, vector: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients of vector · outputs at the output of each map of the record, by name."""
    if not record:
        return iter(())
    grads = torch.autograd.grad(
        outputs, [out for _, _, out in record.values()], vector, retain_graph=True
    )
    return zip(record, grads, strict=True)


@contextmanager
def _recorded(network: nn.Module) -> Iterator[Record]:
    """Inputs and outputs of every shared linear map, by name, during one forward pass."""
    record: Record = {}

    def keep(name: str):
        def hook(layer, args, output):
            record[name] = (layer, args[0].detach(), output)

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if isinstance(module, SharedLinear)
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
