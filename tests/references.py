"""Slow twins and dense oracles, written from the formulas and not from the package's code.

Nothing here uses a method of a layer: weights are read, and maps are spelled out sample by sample.
Of groups the matrices of their elements are read, of anchors the places at which they stand.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import exp

import torch
from torch import nn

from sklearn_softeq.anchors import place_anchors
from sklearn_softeq.groups import PointGroup
from sklearn_softeq.layers import (
    FC,
    Conv,
    FactoredFC,
    GroupConv,
    PathwaySum,
    PooledFC,
    SparseConv,
    SparseFC,
)
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.networks import ResidualBlock, SiLU, SoftEquivariantNetwork

Tensor = torch.Tensor
Grid = tuple[int, int]
Matrix = tuple[tuple[int, int], tuple[int, int]]


def close(found: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    """Assert that they agree to so much of the largest number."""
    scale = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(found, expected, atol=tol * scale, rtol=tol)


def pixels(grid: Grid) -> list[tuple[int, int]]:
    return list(product(range(grid[0]), range(grid[1])))


def offsets(grid: Grid) -> list[tuple[int, int]]:
    """What a filter sees from a pixel: one step each way, along sides of more than one pixel."""
    return list(product(*(range(1) if side == 1 else range(-1, 2) for side in grid)))


def kept_grid(x: Tensor, stride: Grid) -> Grid:
    return x.shape[1] // stride[0], x.shape[2] // stride[1]


# ── interpolation between anchors and pixels


@lru_cache
def interpolation(grid: Grid, n_anchors: int, log_omega: float, noise: float = 0.01) -> Tensor:
    """Ψ = (K_ZZ + σ²I)⁻¹ K_Z,grid, k(z, x) = exp(−½ ω² |z − x|²), shape (M, X)."""
    anchors = place_anchors(grid, n_anchors).tolist()
    centred = [(i - (grid[0] - 1) / 2, j - (grid[1] - 1) / 2) for i, j in pixels(grid)]

    def kernel(z, x):
        return exp(-0.5 * exp(log_omega) ** 2 * ((z[0] - x[0]) ** 2 + (z[1] - x[1]) ** 2))

    among = [
        [kernel(z, other) + noise**2 * (i == j) for j, other in enumerate(anchors)]
        for i, z in enumerate(anchors)
    ]
    across = [[kernel(z, x) for x in centred] for z in anchors]
    return torch.linalg.solve(*(torch.tensor(k, dtype=torch.float64) for k in (among, across)))


def interpolation_of(layer: nn.Module, grid: Grid, n_anchors: int) -> Tensor:
    return interpolation(grid, n_anchors, layer.interpolation.log_omega.item())


# ── groups as matrices

IDENTITY: Matrix = ((1, 0), (0, 1))


def times(a: Matrix, b: Matrix) -> Matrix:
    row, column = ([sum(a[i][k] * b[k][j] for k in (0, 1)) for j in (0, 1)] for i in (0, 1))
    return tuple(row), tuple(column)


def move(matrix: Matrix, place: tuple[float, float]) -> tuple[float, float]:
    y, x = (row[0] * place[0] + row[1] * place[1] for row in matrix)
    return y, x


def inverse(group: PointGroup, matrix: Matrix) -> Matrix:
    return next(m for m in group.matrices if times(m, matrix) == IDENTITY)


def representatives(group: PointGroup, axis: PointGroup) -> list[Matrix]:
    """t_j: of each coset {h t_j} of a group in the group of the features, the first element."""
    found: list[Matrix] = []
    for g in axis.matrices:
        if all(g != times(h, t) for h in group.matrices for t in found):
            found.append(g)
    return found


# ── layers as one structure of θ[d, c, y, x]


def dense_fc(layer: FC, case) -> tuple[Tensor, Tensor]:
    (c, d), x, y = case.n_channels, len(pixels(case.grid)), len(pixels(case.output_grid))
    theta = layer.weight.detach().reshape(d, y, c, x).permute(0, 2, 1, 3)  # (D, C, Y, X)
    return theta, layer.bias.detach().reshape(d, y)


def rank_one(u: Tensor, v: Tensor, case) -> Tensor:
    """θ = V[y, d, c] · U[d, c, x] from U (C, D, X) and V (D, Y, C)."""
    (c, d), x, y = case.n_channels, u.shape[2], v.shape[1]
    theta = u.new_zeros(d, c, y, x)
    for i, j, k in product(range(d), range(c), range(y)):
        theta[i, j, k] = v[i, k, j] * u[j, i]
    return theta


def dense_factored_fc(layer: FactoredFC, case) -> tuple[Tensor, Tensor]:
    u, v = layer.U.weight.detach(), layer.V.weight.detach()  # (C, D, X), (D, Y, C)
    bias = v.sum(2) * layer.U.bias.detach()[:, None] + layer.V.bias.detach()
    return rank_one(u, v, case), bias


def dense_sparse_fc(layer: SparseFC, case) -> tuple[Tensor, Tensor]:
    at_anchors = layer.U.weight.detach(), layer.V.weight.detach()  # (C, D, M), (D, M', C)
    psi_u = interpolation_of(layer.U, case.grid, at_anchors[0].shape[2])
    psi_v = interpolation_of(layer.V, case.output_grid, at_anchors[1].shape[1])
    u = sum(at_anchors[0][:, :, m, None] * psi for m, psi in enumerate(psi_u))
    v = sum(at_anchors[1][:, m, None] * psi[:, None] for m, psi in enumerate(psi_v))
    return rank_one(u, v, case), v.sum(2) * layer.U.bias.detach()[:, None]


def dense_conv(layer: Conv, case) -> tuple[Tensor, Tensor]:
    (c, d) = case.n_channels
    return convolution(layer.weight.detach().reshape(d, c, -1), layer.bias.detach(), case)


def dense_sparse_conv(layer: SparseConv, case) -> tuple[Tensor, Tensor]:
    (c, d), grid = case.n_channels, case.grid
    at_anchors = layer.weight.detach().reshape(d, c, -1)
    kernel = (min(grid[0], 2) * 2 - 1, min(grid[1], 2) * 2 - 1)
    psi = interpolation_of(layer, kernel, at_anchors.shape[2])
    return convolution(at_anchors @ psi, layer.bias.detach(), case)


def seen_from_each_output(case, offset: tuple[int, int]) -> list[int]:
    """The place of the pixel at an offset from each pixel of the output's grid, on the torus."""
    kept = [(i * case.stride[0], j * case.stride[1]) for i, j in pixels(case.output_grid)]
    places = [((i + offset[0]) % case.grid[0], (j + offset[1]) % case.grid[1]) for i, j in kept]
    return [i * case.grid[1] + j for i, j in places]


def convolution(filters: Tensor, bias: Tensor, case) -> tuple[Tensor, Tensor]:
    """θ = k[d, c, x − y] from filters (D, C, taps)."""
    n_outputs = len(pixels(case.output_grid))
    theta = filters.new_zeros(*filters.shape[:2], n_outputs, len(pixels(case.grid)))
    for tap, offset in enumerate(offsets(case.grid)):
        theta[:, :, range(n_outputs), seen_from_each_output(case, offset)] += filters[:, :, [tap]]
    return theta, bias[:, None].expand(-1, n_outputs)


def dense_group_conv(layer: GroupConv, case) -> tuple[Tensor, Tensor]:
    """θ = k[d, c, g⁻¹h, g⁻¹(x − y)]; features of a larger group have a channel for each coset."""
    group, lifted, taps = layer.group, case.in_group.order == 1, offsets(case.grid)
    into, out = (representatives(group, axis) for axis in (case.in_group, case.out_group))
    orientations = [IDENTITY] if lifted else group.matrices
    (c, d), n_outputs = case.channels, len(pixels(case.output_grid))
    k = layer.weight.detach().reshape(d, len(out), c, len(into), len(orientations), len(taps))
    theta = k.new_zeros(*reversed(case.n_channels), n_outputs, len(pixels(case.grid)))
    bias = k.new_zeros(case.n_channels[1], n_outputs)
    for g, (i, s) in product(group.matrices, enumerate(out)):
        outputs = theta[case.out_group.matrices.index(times(g, s)) :: case.out_group.order]
        bias[case.out_group.matrices.index(times(g, s)) :: case.out_group.order] = (
            layer.bias.detach().reshape(d, len(out))[:, i, None]
        )
        back = inverse(group, g)
        for (j, t), h, offset in product(enumerate(into), orientations, taps):
            block = outputs[:, case.in_group.matrices.index(times(h, t)) :: case.in_group.order]
            turned = 0 if lifted else group.matrices.index(times(back, h))  # g⁻¹h
            weights = k[:, i, :, j, turned, taps.index(move(back, offset)), None]
            block[:, :, range(n_outputs), seen_from_each_output(case, offset)] += weights
    return theta, bias


DENSE = {
    FC: dense_fc,
    FactoredFC: dense_factored_fc,
    SparseFC: dense_sparse_fc,
    Conv: dense_conv,
    SparseConv: dense_sparse_conv,
    GroupConv: dense_group_conv,
}


def slow_pathway(pathway: nn.Module, case, inputs: Tensor) -> Tensor:
    """y[d, y] = Σ_cx θ[d, c, y, x] x[c, x] + bias, with θ materialised."""
    theta, bias = DENSE[type(pathway)](pathway, case)
    outputs = torch.stack([(theta * x.flatten(1)[None, :, None]).sum((1, 3)) for x in inputs])
    return (outputs + bias).reshape(len(inputs), case.n_channels[1], *case.output_grid)


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
    ``biased`` holds the names of the maps that have a bias.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}
        self.nudges: dict[str, Tensor] = {}
        self.biased: set[str] = set()
        # The groups of the orientations before and after the layer that is run; None: its own.
        self.axes: tuple[PointGroup, PointGroup] | None = None

    def map(self, layer: nn.Module, name: str, tokens: list[list[Tensor]]) -> Tensor:
        inp = torch.stack([torch.stack(blocks) for blocks in tokens])  # (S, B, d_in)
        out = torch.einsum("boi,sbi->sbo", layer.weight.detach(), inp)
        if layer.bias is not None:
            self.biased.add(name)
            out = out + layer.bias.detach()
        self.tokens[name] = inp.detach()
        self.nudges[name] = torch.zeros_like(out, requires_grad=True)
        return out + self.nudges[name]  # (S, B, d_out)

    def run(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        return RUNS[type(module)](self, module, name, x)

    def fc(self, layer: FC, name: str, x: Tensor) -> Tensor:
        return self.map(layer, name, [[x.flatten()]]).reshape(layer.output_shape)

    def pooled_fc(self, layer: PooledFC, name: str, x: Tensor) -> Tensor:
        # Of orientations that tie but for rounding, as they must on a 2×2 torus, it is the first.
        pooled = []
        for orientations in x.flatten().split(layer.group.order):
            largest = max(orientations.tolist())
            pooled.append(next(v for v in orientations if v.item() >= largest - 1e-10))
        return self.map(layer, name, [[torch.stack(pooled)]]).reshape(layer.output_shape)

    def patches(self, x: Tensor, stride: Grid, projection: Tensor | None = None) -> list:
        """What the filter sees at each kept position, (C, taps), or its projection, (C, M)."""
        height, width = x.shape[1:]
        found = []
        for i, j in product(range(0, height, stride[0]), range(0, width, stride[1])):
            taps = [x[:, (i + a) % height, (j + b) % width] for a, b in offsets((height, width))]
            patch = torch.stack(taps, 1)
            found.append(patch if projection is None else patch @ projection.T)
        return found

    def conv(self, layer: Conv, name: str, x: Tensor, psi: Tensor | None = None) -> Tensor:
        tokens = [[patch.flatten()] for patch in self.patches(x, layer.stride, psi)]
        out = self.map(layer, name, tokens)[:, 0]  # (Y, D)
        return out.T.reshape(-1, *kept_grid(x, layer.stride))

    def sparse_conv(self, layer: SparseConv, name: str, x: Tensor) -> Tensor:
        kernel = tuple(1 if side == 1 else 3 for side in x.shape[1:])
        n_anchors = layer.weight.shape[2] // len(x)
        return self.conv(layer, name, x, interpolation_of(layer, kernel, n_anchors))

    def group_conv(self, layer: GroupConv, name: str, x: Tensor) -> Tensor:
        """Tokens f[c, g h t, y + g u]: the filter stands still and the frame turns."""
        group = layer.group
        before, after = self.axes or (group, group)
        into, out = (representatives(group, axis) for axis in (before, after))
        orientations = [IDENTITY] if before.order == 1 else group.matrices
        taps, tokens = offsets(x.shape[1:]), []
        for g, patch in product(group.matrices, self.patches(x, layer.stride)):
            frame = IDENTITY if before.order == 1 else g
            channels = [
                c + before.matrices.index(times(frame, times(h, t)))
                for c, t, h in product(range(0, len(x), before.order), into, orientations)
            ]
            seen = [taps.index(move(g, u)) for u in taps]
            tokens.append([patch[channels][:, seen].flatten()])
        result = self.map(layer, name, tokens)[:, 0].unflatten(0, (group.order, -1))  # (G, Y, D)
        planes = [x] * (result.shape[2] * group.order)
        for (i, g), d in product(enumerate(group.matrices), range(result.shape[2])):
            channel, coset = divmod(d, len(out))
            place = after.matrices.index(times(g, out[coset]))
            planes[channel * after.order + place] = result[i, :, d]
        return torch.stack(planes).reshape(-1, *kept_grid(x, layer.stride))

    def factored_fc(self, layer: FactoredFC, name: str, x: Tensor) -> Tensor:
        hidden = self.map(layer.U, f"{name}.U", [[channel.flatten() for channel in x]])[0]  # (C, D)
        out = self.map(layer.V, f"{name}.V", [[hidden[:, d] for d in range(hidden.shape[1])]])
        return out[0].reshape(-1, *layer.output_grid)

    def sparse_fc(self, layer: SparseFC, name: str, x: Tensor) -> Tensor:
        psi = interpolation_of(layer.U, tuple(x.shape[1:]), layer.U.weight.shape[2])
        hidden = self.map(layer.U, f"{name}.U", [[psi @ channel.flatten() for channel in x]])[0]
        out = self.map(layer.V, f"{name}.V", [[hidden[:, d] for d in range(hidden.shape[1])]])[0]
        psi = interpolation_of(layer.V, layer.output_grid, layer.V.weight.shape[1])
        return (out @ psi).reshape(-1, *layer.output_grid)

    def pathway_sum(self, layer: PathwaySum, name: str, x: Tensor) -> Tensor:
        rolled, total = roll_to_largest_grid(x, layer.stride), torch.zeros(())
        self.axes = layer.in_group, layer.out_group
        for child, on in layer.enabled.items():
            if on:
                path = layer.get_submodule(child)
                seen = x if type(path) in (FC, FactoredFC, SparseFC) else rolled
                total = total + layer.scale * self.run(path, f"{name}.{child}", seen)
        self.axes = None
        return total

    def residual_block(self, block: ResidualBlock, name: str, x: Tensor) -> Tensor:
        hidden = self.run(block.activation, name, self.run(block.first, f"{name}.first", x))
        out = self.run(block.second, f"{name}.second", hidden)
        rows, columns = block.first.stride
        kept = roll_to_largest_grid(x, block.first.stride)[:, ::rows, ::columns]
        if block.first.in_group != block.first.out_group:  # an image is repeated along the group
            kept = torch.stack([c for c in kept for _ in block.first.out_group.matrices])
        skip = torch.zeros_like(out)
        shared = min(len(kept), len(out))
        skip[:shared] = kept[:shared]
        return skip + out

    def stack(self, network: SoftEquivariantNetwork, name: str, image: Tensor) -> Tensor:
        x = image.new_zeros(len(image), *network.canvas)
        top, left = ((network.canvas[i] - image.shape[1 + i]) // 2 for i in (0, 1))
        x[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        for i, block in enumerate(network.blocks):
            x = self.run(block, f"blocks.{i}", x)
            if not isinstance(block, ResidualBlock):
                x = self.run(network.activation, "", x)
        return self.run(network.head, "head", x).flatten()

    def sequential(self, layers: nn.Sequential, name: str, x: Tensor) -> Tensor:
        for child, layer in layers.named_children():
            x = self.run(layer, f"{name}.{child}".lstrip("."), x)
        return x

    def relu(self, layer: nn.ReLU, name: str, x: Tensor) -> Tensor:
        return x.clamp_min(0)

    def silu(self, layer: SiLU, name: str, x: Tensor) -> Tensor:
        return silu(x)

    def flatten(self, layer: nn.Flatten, name: str, x: Tensor) -> Tensor:
        return x.flatten()


def silu(x: Tensor) -> Tensor:
    """√2 x / (1 + exp(−x))."""
    return 2**0.5 * x / (1 + torch.exp(-x))


RUNS = {
    FC: Trace.fc,
    PooledFC: Trace.pooled_fc,
    Conv: Trace.conv,
    SparseConv: Trace.sparse_conv,
    GroupConv: Trace.group_conv,
    FactoredFC: Trace.factored_fc,
    SparseFC: Trace.sparse_fc,
    PathwaySum: Trace.pathway_sum,
    ResidualBlock: Trace.residual_block,
    SoftEquivariantNetwork: Trace.stack,
    nn.Sequential: Trace.sequential,
    nn.ReLU: Trace.relu,
    SiLU: Trace.silu,
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


def kfac_expand(
    network, likelihood, inputs, weights
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """A_b, Γ_b and the exact bias block of every map by name, by loops over n, y, s, b.

    A_b = Σ w inp inpᵀ and Γ_b = Σ w p(y) g gᵀ / S are (B, d, d); H_b = A_b ⊗ Γ_b / Σ w. The bias
    block Σ w p(y) g gᵀ has g summed over s and b; it is None for a map without a bias.
    """
    factors: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    for image, weight in zip(inputs, weights.tolist(), strict=True):
        trace = Trace()
        f = trace.run(network, "", image)
        for name, tokens in trace.tokens.items():
            positions, blocks, d_in = tokens.shape
            d_out = trace.nudges[name].shape[2]
            start = [tokens.new_zeros(s) for s in ((blocks, d_in, d_in), (blocks, d_out, d_out))]
            bias = tokens.new_zeros(d_out, d_out) if name in trace.biased else None
            left, _, _ = factors.setdefault(name, (*start, bias))
            for s, b in product(range(positions), range(blocks)):
                left[b] += weight * torch.outer(tokens[s, b], tokens[s, b])
        for p, log_p in labels(likelihood, f):
            grads = torch.autograd.grad(log_p, list(trace.nudges.values()), retain_graph=True)
            for name, grad in zip(trace.nudges, grads, strict=True):
                _, right, bias = factors[name]
                for s, b in product(range(grad.shape[0]), range(grad.shape[1])):
                    right[b] += weight * p * torch.outer(grad[s, b], grad[s, b]) / len(grad)
                if bias is not None:
                    total = grad.sum((0, 1))
                    bias += weight * p * torch.outer(total, total)
    return factors


def kfac_reduce(network, likelihood, inputs, weights) -> dict[str, tuple[Tensor, Tensor]]:
    """A_b and Γ_b of every map by name, from the mean input and the sum of gradients over s.

    A_b = Σ w ā āᵀ and Γ_b = Σ w p(y) (Σ_s g)(Σ_s g)ᵀ are (B, d, d); H_b = A_b ⊗ Γ_b / Σ w.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for image, weight in zip(inputs, weights.tolist(), strict=True):
        trace = Trace()
        f = trace.run(network, "", image)
        for name, tokens in trace.tokens.items():
            positions, blocks, d_in = tokens.shape
            d_out = trace.nudges[name].shape[2]
            start = [tokens.new_zeros(s) for s in ((blocks, d_in, d_in), (blocks, d_out, d_out))]
            left, _ = factors.setdefault(name, (start[0], start[1]))
            for b in range(blocks):
                mean = sum(tokens[s, b] for s in range(positions)) / positions
                left[b] += weight * torch.outer(mean, mean)
        for p, log_p in labels(likelihood, f):
            grads = torch.autograd.grad(log_p, list(trace.nudges.values()), retain_graph=True)
            for name, grad in zip(trace.nudges, grads, strict=True):
                for b in range(grad.shape[1]):
                    total = sum(grad[s, b] for s in range(grad.shape[0]))
                    factors[name][1][b] += weight * p * torch.outer(total, total)
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


# ── posterior


def linearised_covariance(
    network, inputs, curvature: Mapping[str, Tensor], tensors: Mapping[str, tuple[float, Tensor]]
) -> Tensor:
    """Σ_b J_b (H_b / r_b + δ)⁻¹ J_bᵀ of each row, (n, K, K), from dense H and (δ, r (B,))."""
    total = torch.zeros((), dtype=torch.float64)
    for name, jacobian in jacobians(network, inputs).items():
        if name in curvature:
            delta, shares = tensors[name]
            size = jacobian.shape[2] // len(shares)
            for b, share in enumerate(shares.tolist()):
                here = slice(b * size, (b + 1) * size)
                values, vectors = torch.linalg.eigh(curvature[name][here, here])
                variances = share / (values.clamp_min(0) + share * delta)
                sigma = (vectors * variances) @ vectors.T
                total = total + jacobian[:, :, here] @ sigma @ jacobian[:, :, here].mT
    return total.detach()


def binary_predictive(mean: float, variance: float, n_points: int = 20001) -> float:
    """∫ σ(f) N(f | mean, variance) df on a fine grid of twelve deviations each way."""
    grid = torch.linspace(-12, 12, n_points, dtype=torch.float64)
    density = torch.exp(-0.5 * grid**2)
    return ((mean + variance**0.5 * grid).sigmoid() * density).sum().item() / density.sum().item()


# ── evidence


def linear_regression_log_evidence(
    design: Tensor, targets: Tensor, precisions: Tensor, noise_variance: float | Tensor
) -> float:
    """log N(y | 0, Φ diag(1/δ) Φᵀ + diag(σ²)): Φ (n, P), y (n,), δ (P,), σ² a number or (n,)."""
    covariance = (design / precisions) @ design.T
    covariance = covariance + noise_variance * torch.eye(len(targets), dtype=targets.dtype)
    zeros = torch.zeros_like(targets)
    normal = torch.distributions.MultivariateNormal(zeros, covariance_matrix=covariance)
    return normal.log_prob(targets).item()


def linear_regression_map(
    design: Tensor, targets: Tensor, precisions: Tensor, noise_variance: float | Tensor
) -> Tensor:
    """argmax of −Σ (y − Φw)²/2σ² − ½ Σ δ w², shape (P,); σ² a number or (n,)."""
    weighed = design.T / noise_variance
    return torch.linalg.solve(weighed @ design + torch.diag(precisions), weighed @ targets)
