"""Slow twins and dense oracles, written from the formulas and not from the package's code.

Nothing here uses a method of a layer: weights are read, and maps are spelled out sample by sample.
"""

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import nn

from sklearn_softeq.layers import FC, Conv, FactoredFC, PathwaySum
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.networks import SoftEquivariantNetwork

Tensor = torch.Tensor


# ── layers as one structure of θ[d, c, y, x]


def pixels(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return list(product(range(grid[0]), range(grid[1])))


def dense_fc(layer: FC, case) -> tuple[Tensor, Tensor]:
    (c, d), x, y = case.channels, len(pixels(case.grid)), len(pixels(case.output_grid))
    theta = layer.weight.detach().reshape(d, y, c, x).permute(0, 2, 1, 3)  # (D, C, Y, X)
    return theta, layer.bias.detach().reshape(d, y)


def dense_factored_fc(layer: FactoredFC, case) -> tuple[Tensor, Tensor]:
    u, v = layer.U.weight.detach(), layer.V.weight.detach()  # (C, D, X), (D, Y, C)
    (c, d), x, y = case.channels, u.shape[2], v.shape[1]
    theta, bias = u.new_zeros(d, c, y, x), u.new_zeros(d, y)
    for i, j, k in product(range(d), range(c), range(y)):
        theta[i, j, k] = v[i, k, j] * u[j, i]
    for i, k in product(range(d), range(y)):
        bias[i, k] = v[i, k].sum() * layer.U.bias.detach()[i] + layer.V.bias.detach()[k]
    return theta, bias


def dense_conv(layer: Conv, case) -> tuple[Tensor, Tensor]:
    (c, d), grid, outputs = case.channels, case.grid, pixels(case.output_grid)
    sides = [1 if side == 1 else 3 for side in grid]
    filters = layer.weight.detach().reshape(d, c, *sides)
    theta = filters.new_zeros(d, c, len(outputs), grid[0] * grid[1])
    for y, (i, j) in enumerate(outputs):
        for a, b in product(range(sides[0]), range(sides[1])):
            row = (i * case.stride[0] + a - sides[0] // 2) % grid[0]
            column = (j * case.stride[1] + b - sides[1] // 2) % grid[1]
            theta[:, :, y, row * grid[1] + column] += filters[:, :, a, b]
    return theta, layer.bias.detach()[:, None].expand(d, len(outputs))


DENSE = {"fc": dense_fc, "factored_fc": dense_factored_fc, "conv": dense_conv}


def slow_pathway(pathway: nn.Module, case, inputs: Tensor) -> Tensor:
    """y[d, y] = Σ_cx θ[d, c, y, x] x[c, x] + bias, with θ materialised."""
    theta, bias = DENSE[case.kind](pathway, case)
    outputs = torch.stack([(theta * x.flatten(1)[None, :, None]).sum((1, 3)) for x in inputs])
    return (outputs + bias).reshape(len(inputs), case.channels[1], *case.output_grid)


def roll_to_largest_grid(image: Tensor, stride: tuple[int, int]) -> Tensor:
    """One sample (C, H, W): its polyphase grid of largest norm moved to the origin."""
    best, largest = (0, 0), -1.0
    for phase in pixels(stride):
        norm = image[:, phase[0] :: stride[0], phase[1] :: stride[1]].detach().norm().item()
        if norm > largest:
            best, largest = phase, norm
    rows = [(i + best[0]) % image.shape[1] for i in range(image.shape[1])]
    columns = [(j + best[1]) % image.shape[2] for j in range(image.shape[2])]
    return image[:, rows][:, :, columns]


# ── networks as maps out[s, b] = W[b] inp[s, b] + bias of one sample, each output nudged


class Trace:
    """Run a network on one sample, map by map; keep the inputs, add a zero to each output.

    ``tokens[name]`` has shape (S, B, d_in), ``nudges[name]`` shape (S, B, d_out) and a gradient.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}
        self.nudges: dict[str, Tensor] = {}

    def map(self, layer: nn.Module, name: str, tokens: list[list[Tensor]]) -> Tensor:
        inp = torch.stack([torch.stack(blocks) for blocks in tokens])  # (S, B, d_in)
        out = torch.einsum("boi,sbi->sbo", layer.weight.detach(), inp) + layer.bias.detach()
        self.tokens[name] = inp.detach()
        self.nudges[name] = torch.zeros_like(out, requires_grad=True)
        return out + self.nudges[name]  # (S, B, d_out)

    def run(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        return RUNS[type(module)](self, module, name, x)

    def fc(self, layer: FC, name: str, x: Tensor) -> Tensor:
        return self.map(layer, name, [[x.flatten()]]).reshape(layer.output_shape)

    def conv(self, layer: Conv, name: str, x: Tensor) -> Tensor:
        _, height, width = x.shape
        reach = [range(1) if side == 1 else range(-1, 2) for side in (height, width)]
        kept = list(product(range(0, height, layer.stride[0]), range(0, width, layer.stride[1])))
        tokens = []
        for i, j in kept:
            taps = [x[:, (i + a) % height, (j + b) % width] for a, b in product(*reach)]
            tokens.append([torch.stack(taps, 1).flatten()])
        out = self.map(layer, name, tokens)[:, 0]  # (Y, D)
        return out.T.reshape(-1, height // layer.stride[0], width // layer.stride[1])

    def factored_fc(self, layer: FactoredFC, name: str, x: Tensor) -> Tensor:
        hidden = self.map(layer.U, f"{name}.U", [[channel.flatten() for channel in x]])[0]  # (C, D)
        out = self.map(layer.V, f"{name}.V", [[hidden[:, d] for d in range(hidden.shape[1])]])
        return out[0].reshape(-1, *layer.output_grid)

    def pathway_sum(self, layer: PathwaySum, name: str, x: Tensor) -> Tensor:
        rolled, total = roll_to_largest_grid(x, layer.stride), torch.zeros(())
        for child, on in layer.enabled.items():
            if on:
                path = layer.get_submodule(child)
                seen = rolled if isinstance(path, Conv) else x
                total = total + layer.scale * self.run(path, f"{name}.{child}", seen)
        return total

    def stack(self, network: SoftEquivariantNetwork, name: str, image: Tensor) -> Tensor:
        x = image.new_zeros(len(image), *network.canvas)
        top, left = ((network.canvas[i] - image.shape[1 + i]) // 2 for i in (0, 1))
        x[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        for i, block in enumerate(network.blocks):
            x = self.run(block, f"blocks.{i}", x).clamp_min(0)
        return self.run(network.head, "head", x).flatten()

    def sequential(self, layers: nn.Sequential, name: str, x: Tensor) -> Tensor:
        for child, layer in layers.named_children():
            x = self.run(layer, f"{name}.{child}".lstrip("."), x)
        return x

    def relu(self, layer: nn.ReLU, name: str, x: Tensor) -> Tensor:
        return x.clamp_min(0)

    def flatten(self, layer: nn.Flatten, name: str, x: Tensor) -> Tensor:
        return x.flatten()


RUNS = {
    FC: Trace.fc,
    Conv: Trace.conv,
    FactoredFC: Trace.factored_fc,
    PathwaySum: Trace.pathway_sum,
    SoftEquivariantNetwork: Trace.stack,
    nn.Sequential: Trace.sequential,
    nn.ReLU: Trace.relu,
    nn.Flatten: Trace.flatten,
}


# ── the model's own labels


def _categorical_labels(likelihood: Categorical, f: Tensor) -> Iterator[tuple[float, Tensor]]:
    for label, p in enumerate(f.softmax(0).tolist()):
        distribution = torch.distributions.Categorical(logits=f)
        yield p, distribution.log_prob(torch.tensor(label))


def _gaussian_labels(likelihood: Gaussian, f: Tensor) -> Iterator[tuple[float, Tensor]]:
    # 2K labels f ± σ √K e_k with equal weights have the mean and covariance of y.
    scale = likelihood.noise_variance**0.5
    for k, sign in product(range(len(f)), (-1, 1)):
        label = f.detach().clone()
        label[k] += sign * scale * len(f) ** 0.5
        yield 0.5 / len(f), torch.distributions.Normal(f, scale).log_prob(label).sum()


LABELS = {Categorical: _categorical_labels, Gaussian: _gaussian_labels}


def labels(likelihood, f: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Pairs p(y|f), log p(y|f) whose average of ∇ ∇ᵀ is that over the predictive."""
    return LABELS[type(likelihood)](likelihood, f)


# ── curvature


def kfac_expand(network, likelihood, inputs, weights) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A_b, Γ_b and the exact bias block of every map by name, by loops over n, y, s, b.

    A_b = Σ w inp inpᵀ and Γ_b = Σ w p(y) g gᵀ / S are (B, d, d); H_b = A_b ⊗ Γ_b / Σ w. The bias
    block Σ w p(y) g gᵀ has g summed over s and b.
    """
    factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for image, weight in zip(inputs, weights.tolist(), strict=True):
        trace = Trace()
        f = trace.run(network, "", image)
        for name, tokens in trace.tokens.items():
            positions, blocks, d_in = tokens.shape
            d_out = trace.nudges[name].shape[2]
            start = [tokens.new_zeros(s) for s in ((blocks, d_in, d_in), (blocks, d_out, d_out))]
            left, _, _ = factors.setdefault(name, (*start, tokens.new_zeros(d_out, d_out)))
            for s, b in product(range(positions), range(blocks)):
                left[b] += weight * torch.outer(tokens[s, b], tokens[s, b])
        for p, log_p in labels(likelihood, f):
            grads = torch.autograd.grad(log_p, list(trace.nudges.values()), retain_graph=True)
            for name, grad in zip(trace.nudges, grads, strict=True):
                _, right, bias = factors[name]
                for s, b in product(range(grad.shape[0]), range(grad.shape[1])):
                    right[b] += weight * p * torch.outer(grad[s, b], grad[s, b]) / len(grad)
                total = grad.sum((0, 1))
                bias += weight * p * torch.outer(total, total)
    return factors


def output_hessian(likelihood, f: Tensor) -> Tensor:
    """−∂² log p / ∂f² of one row as the expectation of the outer product of the score."""
    f = f.detach().requires_grad_()
    hessian = torch.zeros(len(f), len(f), dtype=f.dtype)
    for p, log_p in labels(likelihood, f):
        (score,) = torch.autograd.grad(log_p, f)
        hessian += p * torch.outer(score, score)
    return hessian


def jacobians(network, inputs) -> dict[str, Tensor]:
    """∂f/∂w of each tensor, (n, K, P) with the entries in the order of the Kronecker product.

    A weight (B, d_out, d_in) is read block by block, input index slow, output index fast.
    """
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def f(values: Mapping[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, dict(values), (inputs,))

    found = torch.func.jacrev(f)(parameters)
    ordered = {n: j.transpose(-1, -2) if j.ndim > 3 else j for n, j in found.items()}
    return {name: j.flatten(2) for name, j in ordered.items()}


def ggn(network, likelihood, inputs, weights, names=None) -> tuple[Tensor, dict[str, slice]]:
    """The full generalised Gauss–Newton matrix Σ w Jᵀ Λ J, and where each tensor lies in it."""
    found = jacobians(network, inputs)
    found = {name: found[name] for name in names or found}
    jacobian = torch.cat(list(found.values()), 2).detach()  # (n, K, P)
    matrix = jacobian.new_zeros(jacobian.shape[2], jacobian.shape[2])
    for j, f, w in zip(jacobian, network(inputs), weights, strict=True):
        matrix += w * j.T @ output_hessian(likelihood, f) @ j
    ends = torch.tensor([j.shape[2] for j in found.values()]).cumsum(0).tolist()
    places = map(slice, [0, *ends[:-1]], ends)
    return matrix, dict(zip(found, places, strict=True))


# ── evidence


def linear_regression_log_evidence(
    design: Tensor, targets: Tensor, precisions: Tensor, noise_variance: float
) -> float:
    """log N(y | 0, Φ diag(1/δ) Φᵀ + σ² I): Φ (n, P), y (n,), δ (P,)."""
    covariance = (design / precisions) @ design.T
    covariance = covariance + noise_variance * torch.eye(len(targets), dtype=targets.dtype)
    zeros = torch.zeros_like(targets)
    normal = torch.distributions.MultivariateNormal(zeros, covariance_matrix=covariance)
    return normal.log_prob(targets).item()


def linear_regression_map(
    design: Tensor, targets: Tensor, precisions: Tensor, noise_variance: float
) -> Tensor:
    """argmax of −‖y − Φw‖²/2σ² − ½ Σ δ w², shape (P,)."""
    hessian = design.T @ design / noise_variance + torch.diag(precisions)
    return torch.linalg.solve(hessian, design.T @ targets / noise_variance)
