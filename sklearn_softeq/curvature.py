"""Kronecker factors of the generalised Gauss–Newton matrix of every weight tensor.

For a map out[n, s, b] = W[b] inp[n, s, b] + bias with S shared positions, the expand form is

    A_b = Σ_n Σ_s inp inpᵀ        Γ_b = Σ_n Σ_s E[g gᵀ] / S        H_b = A_b ⊗ Γ_b / N

with g the gradient of the log likelihood at the output of the map for a label of the model's own
predictive. The expectation is taken with columns v of a root of the output Hessian: g = Jᵀ v, one
backward pass each. Biases are exact: H = Σ_n E[g gᵀ] with g summed over positions and blocks.

Where a map is given at anchors, A or Γ depends on a hyperparameter ω of the interpolation. With
activations and gradients held fixed its derivative is Σ ∂t tᵀ + t ∂tᵀ over the tokens t; that of
the log likelihood, in which everything follows, is Σ g · ∂out with g for the labels of the data.

Where outputs have noises of their own, Γ = Σ_k Γ_k with Γ_k what output k adds, in proportion to
its 1/σ²_k. These parts are kept if they are asked for, or their traces alone where they are large.

Gradients of weights are never formed; hooks live inside one call and depend on no layer after it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

from .devices import full_precision
from .kronecker import Factor, Kronecker, Root
from .layers import SharedLinear, in_blocks, outer

__all__ = [
    "COLUMNS",
    "KFAC_FORMS",
    "Curvature",
    "Estimator",
    "Likelihood",
    "input_factors",
    "kronecker_factors",
    "pull_back",
    "watched",
]

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Reduction = Callable[[torch.Tensor], None]


class Likelihood(Protocol):
    """What the curvature asks of a likelihood."""

    def log_prob(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...

    def log_probs(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...

    def hessian_root(self, outputs: torch.Tensor) -> torch.Tensor: ...

    def hessian_sketch(
        self, outputs: torch.Tensor, n_sketches: int, generator: torch.Generator
    ) -> torch.Tensor: ...

    def hessian_labels(
        self, outputs: torch.Tensor, n_labels: int, generator: torch.Generator
    ) -> torch.Tensor: ...

    def hessian_trace(self, outputs: torch.Tensor) -> torch.Tensor: ...


#: Columns v of the output Hessian, (n, K, columns), with Σ v vᵀ equal to it or its mean: by name,
#: from a likelihood, the outputs, a number of random columns and their source.
COLUMNS: dict[str, Callable[..., torch.Tensor]] = {
    "exact": lambda likelihood, outputs, *_: likelihood.hessian_root(outputs),
    "rademacher": lambda likelihood, *rest: likelihood.hessian_sketch(*rest),
    "monte_carlo": lambda likelihood, *rest: likelihood.hessian_labels(*rest),
}

KFAC_FORMS = ("expand", "reduce")

#: Numbers in the parts of a factor by output that are kept as matrices: 4 MiB in float32. Larger
#: ones stand before layers in which all outputs have a part in every direction, so that their
#: traces say nearly as much.
APART_NUMBERS = 2**20


@dataclass(frozen=True)
class Estimator:
    """How the curvature is estimated.

    Parameters
    ----------
    columns : {"exact", "rademacher", "monte_carlo"}, default="exact"
        How the output Hessian enters: by all of its columns, by random combinations of them, or
        by labels drawn from the model.
    samples : int, default=1
        Random columns of each row; no meaning for "exact".
    kfac : {"expand", "reduce"}, default="expand"
        What is summed over shared positions: outer products, or tokens before their product.
        Reduce is A = Σ_n ā āᵀ with ā the mean token, and Γ = Σ_n E[(Σ_s g)(Σ_s g)ᵀ].

    References
    ----------
    R. Eschenhagen, A. Immer, R. Turner, F. Schneider, P. Hennig, "Kronecker-Factored Approximate
    Curvature for Modern Neural Network Architectures", NeurIPS 2023.
    """

    columns: str = "exact"
    samples: int = 1
    kfac: str = "expand"

    def draw(
        self,
        likelihood: Likelihood,
        outputs: torch.Tensor,
        generator: torch.Generator | None,
        n_rows: int,
        own: slice,
    ) -> tuple[torch.Tensor, ...]:
        """Columns v of the output Hessian, (n, K) each.

        The random ones of a row are the same whoever draws them: they are drawn for all
        ``n_rows`` of a batch, of which the outputs are those that a slice takes.
        """
        assert generator is not None or self.columns == "exact"
        everyone = outputs.new_zeros(n_rows, outputs.shape[1])
        everyone[own] = outputs
        found = COLUMNS[self.columns](likelihood, everyone, self.samples, generator)
        return found[own].unbind(-1)


EXACT = Estimator()

EVERY_ROW = slice(None)


class Curvature(NamedTuple):
    """Kronecker factors by tensor name, and the log likelihoods of the outputs met on the way.

    All stand for N observations, whatever part of the data was seen. ``slopes`` holds
    ∂ log likelihood / ∂ log ω by the name of each map that has an ω, if they were asked for, and
    ``parts`` what each output adds to Γ by the name of each tensor, (K, B, d_out, d_out), or to its
    trace, (K, B, 1, 1), likewise.
    """

    factors: dict[str, Kronecker]
    log_likelihoods: tuple[float, ...]
    slopes: dict[str, float]
    parts: dict[str, torch.Tensor]

    @property
    def log_likelihood(self) -> float:
        """That of all outputs."""
        return sum(self.log_likelihoods)


@full_precision()
def kronecker_factors(
    network: nn.Module,
    likelihood: Likelihood,
    batches: Iterable[Batch],
    *,
    estimator: Estimator = EXACT,
    total_weight: float | None = None,
    unit_weights: bool = False,
    generator: torch.Generator | None = None,
    lengthscales: bool = False,
    apart: bool = False,
    constants: Mapping[str, Factor] | None = None,
    own: slice = EVERY_ROW,
    reduction: Reduction | None = None,
) -> Curvature:
    """Factors of each tensor of each :class:`SharedLinear` that the network uses.

    Nothing is read back from the device before all batches have been seen. Sums are of float32 or
    wider.

    Parameters
    ----------
    network : nn.Module
        Rows of its output may depend on their own row of the input only.
    likelihood : Categorical or Gaussian
        Gives the columns of the output Hessian.
    batches : iterable of (inputs, targets, weights)
        Weights of shape (n,) count repetitions, or make up for the chance of being among them.
    estimator : Estimator, default=Estimator()
        Default: exact columns, expand.
    total_weight : float, optional
        N; default: the sum of the weights of the batches. When the batches hold only a part, of
        weight m, the curvature and the log likelihood are scaled by N/m.
    unit_weights : bool, default=False
        Whether all weights are known to be 1, which spares a pass over the tokens.
    generator : torch.Generator, optional
        Source of random columns.
    lengthscales : bool, default=False
        Also the derivatives in log ω of every map that is given at anchors: those of its factors,
        and that of the log likelihood, for one backward pass more.
    apart : bool, default=False
        Also what each output adds to Γ. The columns have to be exact, one for each output.
    constants : mapping of str to Factor, optional
        Mean input factors of the maps that see the images themselves, by name, as
        :func:`input_factors` finds them. They depend on no weight.
    own : slice, optional
        The rows of each batch that this process sees, if others see the rest.
    reduction : callable, optional
        Adds the entries of a flat float64 tensor, in place, to those of the other processes.
        Default: there are none.

    Returns
    -------
    Curvature
    """
    constants = constants or {}
    sums: dict[str, _FactorSums] = {}

    def new(name: str, layer: SharedLinear, like: torch.Tensor) -> _FactorSums:
        n_parts = len(targets[0]) if apart else 1
        known = constants.get(name)
        return _FactorSums(layer, like, estimator.kfac, lengthscales, known, n_parts)

    assert not apart or estimator.columns == "exact", "random columns are of all outputs"
    seen: list[torch.Tensor] = []  # (log likelihoods, weight) of each batch
    for batch in batches:
        inputs, targets, weights = (column[own] for column in batch)
        root_weight = None if unit_weights else weights.sqrt().to(inputs.dtype)
        outputs, ends = _forward(network, inputs, root_weight, sums, new)
        detached = outputs.detach()
        log_probs = likelihood.log_probs(detached, targets).double()
        weight = weights.double()
        seen.append(torch.cat([weight @ log_probs, weight.sum()[None]]))
        if moving := {name: end for name, end in ends.items() if sums[name].moving}:
            score, down_to = _score(likelihood, detached, targets, weights), list(moving.values())
            visit = {name: sums[name].add_score for name in moving}
            pull_back(outputs, moving, score, down_to, True, visit)
        columns = estimator.draw(likelihood, detached, generator, len(batch[0]), own)
        _add_columns(outputs, ends, columns, root_weight, sums)
        del outputs, ends, moving  # or they stay until the next ones are there
    assert seen, "no batches"
    return _finished(sums, torch.stack(seen).sum(0), total_weight, reduction)


@full_precision()
def input_factors(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    kfac: str = "expand",
    unit_weights: bool = False,
    known: Collection[str] = (),
    own: slice = EVERY_ROW,
    reduction: Reduction | None = None,
) -> dict[str, Factor]:
    """Mean input factors A of the maps that see the images themselves, by the name of the map.

    They depend on no weight, and are the same for all evidences of a fit. Which they are is seen
    from one row; of the others only what comes before the last of these maps is computed. Maps at
    anchors, whose tokens depend on ω, are left out.

    Parameters
    ----------
    network, batches, kfac, unit_weights, own, reduction
        As of :func:`kronecker_factors`.
    known : collection of str
        Names that are left out.
    """
    sums: dict[str, _FactorSums] = {}
    weight: torch.Tensor | float = 0.0
    for inputs, _, weights in ((column[own] for column in batch) for batch in batches):
        names = list(sums) or [n for n in _seeing(network, inputs[:1]) if n not in known]
        if not names:
            return {}
        root_weight = None if unit_weights else weights.sqrt().to(inputs.dtype)
        weight = weight + weights.double().sum()
        for name, given in _inputs_of(network, names, inputs).items():
            if name not in sums:
                sums[name] = _FactorSums(_map(network, name), given, kfac, False, None, 1)
            sums[name].add_input(given, root_weight, len(inputs))
    assert isinstance(weight, torch.Tensor), "no batches"
    if reduction is not None:
        _reduce([weight, *(s.left.matrix for s in sums.values())], reduction)
    return {name: s.left.finish(1 / weight.item()) for name, s in sums.items()}


def _finished(
    sums: "dict[str, _FactorSums]",
    seen: torch.Tensor,
    total_weight: float | None,
    reduction: Reduction | None,
) -> Curvature:
    """Sums turned into curvature for N observations."""
    if reduction is not None:
        _reduce([seen, *(tensor for s in sums.values() for tensor in s.tensors())], reduction)
    *log_likelihoods, weight_seen = seen.tolist()
    assert weight_seen > 0, "the batches hold no observation"
    total = weight_seen if total_weight is None else total_weight
    scale = total / weight_seen
    factors: dict[str, Kronecker] = {}
    parts: dict[str, torch.Tensor] = {}
    for name, layer_sums in sums.items():
        for tensor, part in layer_sums.parts().items():
            parts[f"{name}.{tensor}"] = part * scale
        for tensor, factor in layer_sums.finish(weight_seen, total).items():
            factors[f"{name}.{tensor}"] = factor
    slopes = {name: s.slope.item() * scale for name, s in sums.items() if s.moving}
    return Curvature(factors, tuple(v * scale for v in log_likelihoods), slopes, parts)


def _reduce(tensors: list[torch.Tensor], reduction: Reduction) -> None:
    """Sum tensors over processes in one go."""
    flat = torch.cat([tensor.flatten().double() for tensor in tensors])
    reduction(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _score(
    likelihood: Likelihood, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """∂ Σ_n w_n log p(y_n | f_n) / ∂f, shape (n, K)."""
    with torch.enable_grad():
        outputs = outputs.clone().requires_grad_()
        log_likelihood = (likelihood.log_prob(outputs, targets) * weights).sum()
        return torch.autograd.grad(log_likelihood, outputs)[0]


class _Moments:
    """Σ t tᵀ of each block over tokens t, by its root while that has fewer rows than columns.

    Parameters
    ----------
    n_blocks, size : int
        B, d.
    like : tensor
        Of the dtype and device to sum in.
    root : bool
        Whether a root will do.
    n_parts : int, default=1
        Parts of the sum that are kept apart, each as a matrix, or by its trace if it is large.
    """

    def __init__(self, n_blocks: int, size: int, like: torch.Tensor, root: bool, n_parts: int = 1):
        self.n_blocks, self.size, self.like, self.may_be_root = n_blocks, size, like, root
        self.rows: list[torch.Tensor] = []  # (B, r, d) each
        self.n_rows = 0
        self._matrix: torch.Tensor | None = None
        self.parts: torch.Tensor | None = None
        if n_parts > 1:
            kept = size if n_parts * n_blocks * size**2 <= APART_NUMBERS else 1
            self.parts = like.new_zeros(n_parts, n_blocks, kept, kept)

    def keeps(self, n_rows: int) -> bool:
        """Whether so many tokens more would still be kept as they are."""
        kept = self.may_be_root and self._matrix is None
        return kept and self.n_rows + n_rows < self.size

    def add(self, tokens: torch.Tensor, part: int = 0) -> None:
        """Count in tokens (n, S, B, d)."""
        rows = in_blocks(tokens)  # (B, n·S, d)
        if self.parts is not None and self.parts.shape[-1] == self.size:
            self.parts[part].baddbmm_(rows.transpose(1, 2), rows)
        elif self.parts is not None:
            self.parts[part] += rows.square().sum((1, 2), keepdim=True)
        if self.keeps(rows.shape[1]):
            self.rows.append(rows)
            self.n_rows += rows.shape[1]
        else:
            self.matrix.baddbmm_(rows.transpose(1, 2), rows)

    def add_gram(self, gram: torch.Tensor, scale: float = 1.0, part: int = 0) -> None:
        """Count in what has been summed already, (B, d, d)."""
        self.matrix.add_(gram, alpha=scale)
        if self.parts is None:
            return
        if self.parts.shape[-1] < self.size:
            gram = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        self.parts[part].add_(gram, alpha=scale)

    @property
    def matrix(self) -> torch.Tensor:
        """The sum as a matrix, (B, d, d), from now on."""
        if self._matrix is None:
            self._matrix = self.like.new_zeros(self.n_blocks, self.size, self.size)
            while self.rows:
                rows = self.rows.pop()
                self._matrix.baddbmm_(rows.transpose(1, 2), rows)
        return self._matrix

    def finish(self, scale: float) -> Factor:
        """The factor, times a scale."""
        if self.rows:
            return Root(torch.cat(self.rows, 1) * scale**0.5)
        return self.matrix.mul_(scale)


class _FactorSums:
    """Running sums of the factors of one map."""

    def __init__(
        self,
        layer: SharedLinear,
        like: torch.Tensor,
        kfac: str,
        lengthscales: bool,
        known: Factor | None,
        n_parts: int,
    ):
        n_blocks, n_out, n_in = layer.weight.shape
        like = like.new_empty(0)  # of its kind; itself it would stay in memory
        self.layer, self.kfac, self.known = layer, kfac, known
        self.moving = lengthscales and layer.interpolation is not None
        self.left = _Moments(n_blocks, n_in, like, not self.moving)
        self.right = _Moments(n_blocks, n_out, like, not self.moving, n_parts)
        self.bias = _Moments(1, n_out, like, True, n_parts)
        self.left_tangent: torch.Tensor | None = None
        self.right_tangent: torch.Tensor | None = None
        self.inputs = like  # of the batch at hand, where ω asks for them
        self.slope = like.new_zeros((), dtype=torch.float64)
        self.shared = layer.n_positions > 1 or n_blocks > 1

    @torch.no_grad()
    def add_input(
        self, inputs: torch.Tensor, root_weight: torch.Tensor | None, n_rows: int
    ) -> None:
        if self.known is not None:
            return
        # Eq. A
        gram = None
        if self.kfac != "reduce" and not self.left.keeps(n_rows * self.layer.n_positions):
            gram = self.layer.input_gram(inputs, root_weight)
        if gram is None:
            self.left.add(_weighted(self._merged(self.layer.input_tokens(inputs)), root_weight))
        else:
            self.left.add_gram(gram)
        if not self.moving:
            return
        self.inputs = inputs
        change = self.layer.input_tangent(inputs)
        if change is not None:
            change, tokens = (
                _weighted(self._merged(t), root_weight)
                for t in (change, self.layer.input_tokens(inputs))
            )
            self.left_tangent = _added(self.left_tangent, outer(change, tokens))

    def _merged(self, tokens: torch.Tensor) -> torch.Tensor:
        """With reduce, the mean token over positions."""
        return tokens.mean(1, keepdim=True) if self.kfac == "reduce" else tokens

    @torch.no_grad()
    def add_gradient(self, column: int, grad: torch.Tensor) -> None:
        layer, n_positions = self.layer, self.layer.n_positions
        tokens = layer.gradient_tokens(grad)  # (n, S, B, d_out)
        if self.shared and layer.bias is not None:
            self.bias.add(tokens.sum((1, 2), keepdim=True), column)  # Eq. H of the bias
        # Eq. Γ
        gram = None
        if self.kfac != "reduce" and not self.right.keeps(len(tokens) * n_positions):
            gram = layer.gradient_gram(grad)
        if gram is None:
            self.right.add(self._summed(tokens), column)
        else:
            self.right.add_gram(gram, 1 / n_positions, column)
        change = layer.gradient_tangent(grad) if self.moving else None
        if change is not None:
            tangent = outer(self._summed(change), self._summed(tokens))
            self.right_tangent = _added(self.right_tangent, tangent)

    def _summed(self, tokens: torch.Tensor) -> torch.Tensor:
        """With reduce, the sum over positions; else scaled to make up for their number."""
        if self.kfac == "reduce":
            return tokens.sum(1, keepdim=True)
        n_positions = self.layer.n_positions
        return tokens if n_positions == 1 else tokens * n_positions**-0.5

    @torch.no_grad()
    def add_score(self, grad: torch.Tensor) -> None:
        """Count in g · ∂out / ∂log ω, with g the gradient for the labels of the data."""
        layer, inputs, grads = self.layer, self.inputs, self.layer.gradient_tokens(grad)
        change = layer.input_tangent(inputs)
        if change is not None:
            self.slope += _bilinear(grads, layer.weight, change)
        change = layer.gradient_tangent(grad)
        if change is not None:
            self.slope += _bilinear(change, layer.weight, layer.input_tokens(inputs))
            if layer.bias is not None:
                self.slope += (change * layer.bias).sum().double()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All sums, to be summed over processes in place."""
        if self.known is None:
            yield self.left.matrix
        yield self.right.matrix
        if self.shared and self.layer.bias is not None:
            yield self.bias.matrix
        for tangent in (self.left_tangent, self.right_tangent):
            if tangent is not None:
                yield tangent
        yield from self.parts().values()
        yield self.slope

    def parts(self) -> dict[str, torch.Tensor]:
        """What each output adds to the gradient factor of weight and bias, if it was kept."""
        found = {"weight": self.right.parts}
        if self.layer.bias is not None:
            # As in finish: a bias may have the very factor of the weight.
            found["bias"] = self.bias.parts if self.shared else self.right.parts
        return {tensor: parts for tensor, parts in found.items() if parts is not None}

    def finish(self, seen: float, total: float) -> dict[str, Kronecker]:
        """Curvature of weight and bias for N = total from sums over weight m = seen."""
        mean, scale = 1 / seen, total / seen  # Eq. H = A / m ⊗ Γ, times N/m
        left = self.left.finish(mean) if self.known is None else self.known
        right = self.right.finish(scale)
        d_left, d_right = _symmetric(self.left_tangent, mean), _symmetric(self.right_tangent, scale)
        found = {"weight": Kronecker(left, right, d_left, d_right)}
        one = self.layer.weight.new_ones(1, 1, 1)
        if self.layer.bias is not None and self.shared:
            found["bias"] = Kronecker(one, self.bias.finish(scale))
        elif self.layer.bias is not None:
            # One position, one block: Γ itself, the same tensor, so that it is decomposed once.
            found["bias"] = Kronecker(one, right)
        return found


def _weighted(tokens: torch.Tensor, root_weight: torch.Tensor | None) -> torch.Tensor:
    return tokens if root_weight is None else tokens * root_weight[:, None, None, None]


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total + part


def _symmetric(half: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    """Σ ∂t tᵀ + t ∂tᵀ from its first half."""
    return None if half is None else (half + half.transpose(1, 2)) * scale


def _bilinear(left: torch.Tensor, weight: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ_n Σ_s Σ_b lᵀ W_b r."""
    return (outer(left, right).double() * weight).sum()


def _forward(
    network: nn.Module,
    inputs: torch.Tensor,
    root_weight: torch.Tensor | None,
    sums: "dict[str, _FactorSums]",
    new: "Callable[[str, SharedLinear, torch.Tensor], _FactorSums]",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A forward pass that counts in the inputs of every map on its way, see :func:`watched`."""

    def see(name: str, layer: SharedLinear, given: torch.Tensor) -> None:
        if name not in sums:
            sums[name] = new(name, layer, given)
        sums[name].add_input(given, root_weight, len(inputs))

    return watched(network, inputs, see)


def watched(
    network: nn.Module,
    inputs: torch.Tensor,
    see: Callable[[str, SharedLinear, torch.Tensor], None],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A forward pass that shows the input of every map on its way.

    Weights are constants to it, so that the graph keeps what the gradients at outputs of maps need
    and nothing for those of weights.

    Parameters
    ----------
    network : nn.Module
    inputs : tensor of shape (n, C, H, W)
    see : callable
        Given the name of each map, the map and its input, in the order in which they come.

    Returns
    -------
    outputs : tensor of shape (n, K)
    ends : dict of str to tensor
        The output of each map, for :func:`pull_back`; that of a map before which there is none
        begins the graph.
    """
    ends: dict[str, torch.Tensor] = {}

    def hook(name: str, layer: SharedLinear, given: torch.Tensor, output: torch.Tensor):
        see(name, layer, given.detach())
        ends[name] = output if output.requires_grad else output.requires_grad_()
        return ends[name]

    with _hooked(network, hook), _asking(network, False), torch.enable_grad():
        return network(inputs), ends


def _add_columns(
    outputs: torch.Tensor,
    ends: dict[str, torch.Tensor],
    columns: tuple[torch.Tensor, ...],
    root_weight: torch.Tensor | None,
    sums: "dict[str, _FactorSums]",
) -> None:
    """Count in the gradients of each column of the output Hessian, (n, K)."""
    first = [end for end in ends.values() if end.is_leaf]
    for i, column in enumerate(columns):
        visit = {name: partial(sums[name].add_gradient, i) for name in ends}
        weighted = column if root_weight is None else column * root_weight[:, None]
        pull_back(outputs, ends, weighted, first, i + 1 < len(columns), visit)


def pull_back(
    outputs: torch.Tensor,
    ends: dict[str, torch.Tensor],
    vector: torch.Tensor,
    down_to: list[torch.Tensor],
    keep: bool,
    visit: Mapping[str, Callable[[torch.Tensor], None]],
) -> None:
    """Visit the gradient of vector · outputs at each end, one after the other; none is kept."""
    if not ends:
        return
    handles = [end.register_hook(visit[name]) for name, end in ends.items()]
    try:
        torch.autograd.grad(outputs, down_to, vector, retain_graph=keep)
    finally:
        for handle in handles:
            handle.remove()


class _SeenEnough(Exception):
    """Nothing that comes later in a forward pass is needed."""


def _seeing(network: nn.Module, inputs: torch.Tensor) -> list[str]:
    """Names of the maps whose input depends on no parameter, but for those at anchors."""
    names = []

    def hook(name: str, layer: SharedLinear, given: torch.Tensor, output: torch.Tensor):
        if not given.requires_grad and layer.interpolation is None:
            names.append(name)

    with _hooked(network, hook), _asking(network, True), torch.enable_grad():
        network(inputs)
    return names


@torch.no_grad()
def _inputs_of(
    network: nn.Module, names: list[str], inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Inputs of some maps, of which the last ends the forward pass."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(layer, args):
            seen[name] = args[0]
            if len(seen) == len(names):
                raise _SeenEnough

        return hook

    handles = [_map(network, name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with suppress(_SeenEnough):
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _map(network: nn.Module, name: str) -> SharedLinear:
    return cast(SharedLinear, network.get_submodule(name))


@contextmanager
def _hooked(network: nn.Module, hook: Callable[..., torch.Tensor | None]) -> Iterator[None]:
    """Call ``hook(name, layer, input, output)`` after each map; what it returns is its output."""

    def named(name: str):
        return lambda layer, args, output: hook(name, layer, args[0], output)

    handles = [
        module.register_forward_hook(named(name))
        for name, module in network.named_modules()
        if isinstance(module, SharedLinear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _asking(network: nn.Module, wanted: bool) -> Iterator[None]:
    """All parameters ask for a gradient, or none does."""
    before = {parameter: parameter.requires_grad for parameter in network.parameters()}
    for parameter in before:
        parameter.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
