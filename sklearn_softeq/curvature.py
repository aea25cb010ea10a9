"""Kronecker factors of the generalised Gauss–Newton matrix of every weight tensor.

For a map out[n, s, b] = W[b] inp[n, s, b] + bias with S shared positions, the expand form is

    A_b = Σ_n Σ_s inp inpᵀ        Γ_b = Σ_n Σ_s E[g gᵀ] / S        H_b = A_b ⊗ Γ_b / N

with g the gradient of the log likelihood at the output of the map for a label of the model's own
predictive. The expectation is taken with columns v of a root of the output Hessian: g = Jᵀ v, one
backward pass each. Biases are exact: H = Σ_n E[g gᵀ] with g summed over positions and blocks.

Gradients of weights are never formed; hooks live inside one call and hang on no layer after it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .kronecker import Kronecker
from .layers import SharedLinear

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

    Both stand for N observations, whatever part of the data was seen.
    """

    factors: dict[str, Kronecker]
    log_likelihood: float


def kronecker_factors(
    network: nn.Module,
    likelihood: Likelihood,
    batches: Iterable[Batch],
    *,
    total_weight: float | None = None,
    n_sketches: int = 0,
    generator: torch.Generator | None = None,
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
            weighted = bool((weights != 1).any())
            if n_sketches:
                assert generator is not None
                columns = likelihood.hessian_sketch(detached, n_sketches, generator)
            else:
                columns = likelihood.hessian_root(detached)
            columns = columns * root_weight[:, None, None]  # (n, K, columns)
            for name, (layer, inp, _) in record.items():
                sums.setdefault(name, _FactorSums(layer)).add_input(inp, root_weight, weighted)
            pre_activations = [out for _, _, out in record.values()]
            for j in range(columns.shape[-1]):
                grads = torch.autograd.grad(
                    outputs, pre_activations, columns[..., j], retain_graph=True
                )
                for name, grad in zip(record, grads, strict=True):
                    sums[name].add_gradient(grad)
    assert weight_seen > 0, "the batches hold no observation"
    total = weight_seen if total_weight is None else total_weight
    factors: dict[str, Kronecker] = {}
    for name, layer_sums in sums.items():
        weight, bias = layer_sums.finish(weight_seen, total)
        factors[f"{name}.weight"], factors[f"{name}.bias"] = weight, bias
    return Curvature(factors, log_likelihood * total / weight_seen)


class _FactorSums:
    """Running sums of the factors of one map."""

    def __init__(self, layer: SharedLinear):
        n_blocks, n_out, n_in = layer.weight.shape
        self.layer = layer
        self.left = layer.weight.new_zeros(n_blocks, n_in, n_in)
        self.right = layer.weight.new_zeros(n_blocks, n_out, n_out)
        self.bias = layer.weight.new_zeros(1, n_out, n_out)
        self.shared = True

    @torch.no_grad()
    def add_input(self, inputs: torch.Tensor, root_weight: torch.Tensor, weighted: bool) -> None:
        tokens = self.layer.input_tokens(inputs)  # (n, S, B, d_in)
        if weighted:  # spares a pass over the largest arrays there are
            tokens = tokens * root_weight[:, None, None, None]
        self.left += _outer(tokens)  # Eq. A
        self.shared = tokens.shape[1] > 1 or tokens.shape[2] > 1

    @torch.no_grad()
    def add_gradient(self, grad: torch.Tensor) -> None:
        tokens = self.layer.output_tokens(grad)  # (n, S, B, d_out)
        self.right += _outer(tokens) / tokens.shape[1]  # Eq. Γ
        if self.shared:
            self.bias += _outer(tokens.sum((1, 2), keepdim=True))  # Eq. H of the bias

    def finish(self, seen: float, total: float) -> tuple[Kronecker, Kronecker]:
        """Curvature of weight and bias for N = total from sums over weight m = seen."""
        right = self.right * (total / seen**2)  # Eq. H = A ⊗ Γ / m, times N/m
        weight = Kronecker(self.left, right)
        one = self.left.new_ones(1, 1, 1)
        if self.shared:
            return weight, Kronecker(one, self.bias * (total / seen))
        # One position, one block: Γ itself, the same tensor, so that it is decomposed once.
        return weight, Kronecker(one * seen, right)


def _outer(tokens: torch.Tensor) -> torch.Tensor:
    """Σ_n Σ_s t tᵀ of each block: (n, S, B, d) → (B, d, d)."""
    rows = tokens.permute(2, 0, 1, 3).flatten(1, 2)  # (B, n·S, d)
    return torch.bmm(rows.transpose(1, 2), rows)


Record = dict[str, tuple[SharedLinear, torch.Tensor, torch.Tensor]]


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
