"""Preconditioned steps against dense matrices, Newton's step and plain momentum."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from sklearn_softeq import kfac
from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.kfac import KFAC
from sklearn_softeq.kronecker import Kronecker, Root
from sklearn_softeq.layers import FC
from sklearn_softeq.likelihoods import Gaussian

N = 40.0


def matrix(n_blocks, size, scale=1.0):
    root = torch.randn(n_blocks, size, size + 2, dtype=torch.float64)
    return scale * root @ root.transpose(1, 2)


def weight(n_blocks=2, n_out=3, n_in=4):
    tensor = nn.Parameter(torch.randn(n_blocks, n_out, n_in, dtype=torch.float64))
    tensor.grad = torch.randn_like(tensor)
    return tensor


def curvature(n_blocks=2, n_out=3, n_in=4):
    return Kronecker(matrix(n_blocks, n_in), matrix(n_blocks, n_out, N))


def ready(*pairs, decay=0.3, **settings):
    """An optimizer that knows the curvature of tensors."""
    optimizer = KFAC([tensor for tensor, _ in pairs], **settings)
    for tensor, found in pairs:
        optimizer.observe(tensor, found, N)
    optimizer.precondition({tensor: decay for tensor, _ in pairs})
    return optimizer


def direction(tensor, found, damping, decay):
    """(A + π√λ)⁻¹ ⊗ (Γ/N + √λ/π)⁻¹ times the gradient, by a dense matrix of all weights."""
    left, right = found.left, found.right / N
    sizes = left.shape[-1], right.shape[-1]
    traces = [f.diagonal(dim1=1, dim2=2).mean() for f in (left, right)]
    pi, root = (traces[0] / traces[1]).sqrt(), math.sqrt(damping + decay)
    blocks = []
    for a, g in zip(left, right, strict=True):
        damped_a = a + pi * root * torch.eye(sizes[0], dtype=a.dtype)
        damped_g = g + root / pi * torch.eye(sizes[1], dtype=a.dtype)
        blocks.append(torch.kron(damped_g, damped_a))  # acts on rows of the weight
    flat = torch.linalg.solve(torch.block_diag(*blocks), tensor.grad.flatten())
    return flat.view_as(tensor)


def test_a_step_against_the_dense_inverse():
    tensor, found = weight(), curvature()
    optimizer = ready((tensor, found), lr=0.07, damping=0.2, clip=1e9)
    before = tensor.detach().clone()
    optimizer.step()
    step = 0.07 * direction(tensor, found, 0.2, 0.3)
    torch.testing.assert_close(before - tensor.detach(), step, rtol=1e-10, atol=1e-12)


def test_a_bias_has_the_inverse_of_its_block():
    bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    bias.grad = torch.randn_like(bias)
    found = Kronecker(torch.ones(1, 1, 1, dtype=torch.float64), matrix(1, 3, N))
    before = bias.detach().clone()
    ready((bias, found), lr=1.0, damping=0.2, clip=1e9).step()
    as_weight = nn.Parameter(before[None, :, None].clone())
    as_weight.grad = bias.grad[None, :, None]
    step = direction(as_weight, found, 0.2, 0.3)[0, :, 0]
    torch.testing.assert_close(before - bias.detach(), step, rtol=1e-10, atol=1e-12)


def test_a_linear_model_is_solved_in_one_step():
    # Its curvature is A ⊗ I without any approximation, so this is Newton's step.
    model = FC(2, 3, (1, 2)).double()
    model.bias.requires_grad_(False)
    model.draw(1.0, None)
    inputs, targets = torch.randn(30, 2, 1, 2).double(), torch.randn(30, 6).double()
    batch = (inputs, targets, torch.ones(30).double())
    network = nn.Sequential(model, nn.Flatten())
    found = kronecker_factors(network, Gaussian(), [batch]).factors["0.weight"]
    optimizer = KFAC([model.weight], lr=1.0, momentum=0.0, damping=1e-14, clip=1e9)
    optimizer.observe(model.weight, found, 30.0)
    optimizer.precondition({model.weight: 0.0})
    loss = -Gaussian().log_prob(network(inputs), targets).mean()
    loss.backward()
    optimizer.step()
    design = inputs.flatten(1)
    expected = torch.linalg.lstsq(design, targets).solution.T
    torch.testing.assert_close(model.weight.detach()[0], expected, rtol=1e-6, atol=1e-6)


def test_momentum_and_no_curvature_are_sgd():
    tensor = weight()
    twin = nn.Parameter(tensor.detach().clone())
    ours = KFAC([tensor], lr=0.03, momentum=0.7, clip=1e9)
    theirs = torch.optim.SGD([twin], lr=0.03, momentum=0.7)
    for _ in range(4):
        tensor.grad = torch.randn_like(tensor)
        twin.grad = tensor.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(tensor, twin)


@pytest.mark.parametrize("clip", [1e-4, 1e-2, 1e9])
def test_steps_are_shortened_to_the_bound(clip):
    pairs = [(weight(), curvature()), (weight(1, 2, 5), curvature(1, 2, 5))]
    optimizer = ready(*pairs, lr=0.5, momentum=0.0, clip=clip, damping=0.2)
    full = [0.5 * direction(*pair, 0.2, 0.3) for pair in pairs]
    products = [(step * tensor.grad).sum() for step, (tensor, _) in zip(full, pairs, strict=True)]
    change = 0.5 * sum(products)
    before = [tensor.detach().clone() for tensor, _ in pairs]
    optimizer.step()
    shrink = min(1.0, math.sqrt(clip / change))
    assert (shrink < 1) == (clip < 1)
    for old, (tensor, _), step in zip(before, pairs, full, strict=True):
        torch.testing.assert_close(old - tensor.detach(), shrink * step)


def test_a_zero_gradient_moves_nothing():
    tensor = weight()
    optimizer = ready((tensor, curvature()))
    tensor.grad.zero_()
    before = tensor.detach().clone()
    optimizer.step()
    assert torch.equal(tensor.detach(), before)
    tensor.grad = None
    optimizer.step()
    assert torch.equal(tensor.detach(), before)


def test_a_curvature_that_has_risen():
    tensor, found = weight(), curvature()
    risen = Kronecker(found.left, 9 * found.right)
    optimizers = ready((tensor, found)), ready((tensor, risen))
    optimizers[0].sharpen(9.0)
    for optimizer in optimizers:
        optimizer.observe(tensor, risen, N)  # the mean with what comes next
        optimizer.precondition({tensor: 0.3})
    steps = [optimizer._direction(tensor) for optimizer in optimizers]
    torch.testing.assert_close(*steps)


def test_factors_are_averaged():
    tensor = weight()
    found = [curvature() for _ in range(3)]
    optimizer = KFAC([tensor], memory=0.6)
    assert not optimizer.knows(tensor)
    for each in found:
        optimizer.observe(tensor, each, N)
    assert optimizer.knows(tensor)
    weights = [0.36, 0.6, 1.0]
    for name, scale in (("left", 1.0), ("right", N)):
        mean = sum(w * getattr(f, name) for w, f in zip(weights, found, strict=True))
        torch.testing.assert_close(optimizer.state[tensor][name], mean / sum(weights) / scale)


def test_a_change_of_gauge_changes_no_step():
    # U → aU, V → V/a and the like: gradients go with 1/a, and steps with a.
    tensor, found, scale = weight(), curvature(), 3.0
    moved = nn.Parameter(scale * tensor.detach())
    settings = {"lr": 0.05, "momentum": 0.9, "damping": 0.0, "clip": 0.01}
    plain, scaled = ready((tensor, found), **settings), ready((moved, found), **settings)
    moved.data.copy_(tensor.detach())
    for optimizer, each in ((plain, tensor), (scaled, moved)):
        each.grad = torch.ones_like(each)
        optimizer.step()
    moved.data.mul_(scale)
    scaled.rescale({moved: scale})
    for again in range(3):
        if again == 1:  # the inverse is of the averages, which followed, and δ → δ/a²
            plain.precondition({tensor: 0.3})
            scaled.precondition({moved: 0.3 / scale**2})
        tensor.grad = torch.randn_like(tensor)
        moved.grad = tensor.grad / scale
        plain.step()
        scaled.step()
        torch.testing.assert_close(moved.detach(), scale * tensor.detach())


@pytest.mark.parametrize("as_root", [False, True])
def test_a_large_factor_is_its_mean_eigenvalue(monkeypatch, as_root):
    monkeypatch.setattr(kfac, "LARGEST_INVERTED", 3)
    tensor, root = weight(), torch.randn(2, 2, 4, dtype=torch.float64)
    left = Root(root) if as_root else root.transpose(1, 2) @ root
    found = Kronecker(left, matrix(2, 3, N))
    before = tensor.detach().clone()
    ready((tensor, found), lr=1.0, damping=0.2, clip=1e9).step()
    means = root.square().sum((1, 2)) / 4
    plain = Kronecker(means[:, None, None] * torch.eye(4, dtype=torch.float64), found.right)
    step = direction(tensor, plain, 0.2, 0.3)
    torch.testing.assert_close(before - tensor.detach(), step, rtol=1e-10, atol=1e-12)


def test_weights_that_nothing_reaches_yet():
    # Both factors may be zero, as behind a silent layer.
    tensor = weight()
    zero = Kronecker(torch.zeros(2, 4, 4).double(), torch.zeros(2, 3, 3).double())
    ready((tensor, zero)).step()
    assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [1, 3])
def test_factors_that_are_not_finite_are_an_error(value, size):
    tensor = weight(n_out=size)
    found = curvature(n_out=size)
    found.right[1, 0, 0] = value
    with pytest.raises(ValueError, match="no inverse"):
        ready((tensor, found))


def test_inverses_in_portions(monkeypatch):
    tensor, found = weight(n_blocks=5), curvature(n_blocks=5)
    monkeypatch.setattr(kfac, "TOGETHER", 2 * 4**2)
    before = tensor.detach().clone()
    ready((tensor, found), lr=1.0, damping=0.2, clip=1e9).step()
    step = direction(tensor, found, 0.2, 0.3)
    torch.testing.assert_close(before - tensor.detach(), step, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(duplicate):
    tensor = weight()
    optimizer = ready((tensor, curvature()), damping=0.7, memory=0.3)
    optimizer.step()
    twin = duplicate(optimizer)
    (other,) = twin.param_groups[0]["params"]
    new = curvature()
    for each, of in ((optimizer, tensor), (twin, other)):
        of.grad = torch.ones_like(of)
        each.observe(of, new, N)
        each.precondition({of: 0.2})
        each.step()
    assert torch.equal(other.detach(), tensor.detach())


def test_curvature_can_be_dropped():
    tensor = weight()
    optimizer = ready((tensor, curvature()))
    optimizer.step()
    optimizer.forget()
    assert list(optimizer.state[tensor]) == ["momentum"]
    assert not optimizer.knows(tensor)
    optimizer.step()  # plain momentum


def test_factors_of_bad_condition_in_float32():
    left = torch.diag(torch.tensor([1e12, 1.0, 1e-3, 0.0]))[None]
    found = Kronecker(left, torch.diag(torch.tensor([1e-12, 0.0, 1e6]))[None])
    tensor = nn.Parameter(torch.zeros(1, 3, 4))
    tensor.grad = torch.ones(1, 3, 4)
    ready((tensor, found), decay=1e-6).step()
    assert torch.isfinite(tensor).all()
