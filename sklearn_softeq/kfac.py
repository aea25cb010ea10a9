"""Steps along a gradient that the Kronecker factors of the curvature precondition."""

import math
from collections.abc import Mapping

import torch

from .kronecker import LARGEST_INVERTED, TOGETHER, Factor, Kronecker, Root, dense

__all__ = ["KFAC"]


class KFAC(torch.optim.Optimizer):
    """Momentum on gradients times the inverse of the damped curvature.

    The curvature of a tensor is A ⊗ Γ/N, and each factor is damped by itself,

        s = (Γ/N + √λ/π)⁻¹ g (A + π √λ)⁻¹,    λ = damping + δ/N,    π² = mean eig A / mean eig Γ/N

    with δ the precision of the tensor, whose part of g is the prior's. All steps are shortened
    alike where lr² Σ s·g, the change of the predictions to second order, exceeds a bound. Without
    curvature a tensor follows its gradient.

    Parameters
    ----------
    params : iterable of Parameter
    lr : float, default=0.1
    momentum : float, default=0.9
    damping : float, default=0.1
        Curvature of the mean loss that is added to that of each weight, in nats per squared unit
        of the weight.
    clip : float, default=0.01
        The bound, in nats per observation.
    memory : float, default=0.8
        Part of the earlier factors that stays when new ones come.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", ICML 2015: factored damping, sections 6.2 and 6.3. J. Ba, R. Grosse, J. Martens,
    "Distributed Second-Order Optimization using Kronecker-Factored Approximations", ICLR 2017: the
    bound, section 5.2.
    """

    def __init__(
        self,
        params,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 0.1,
        clip: float = 0.01,
        memory: float = 0.8,
    ):
        # Nothing but groups and defaults survives a copy of an optimizer.
        group = {"lr": lr, "momentum": momentum, "clip": clip, "damping": damping}
        super().__init__(params, {**group, "memory": memory})

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether there is curvature for a tensor."""
        return "left" in self.state.get(tensor, {})

    @torch.no_grad()
    def observe(self, tensor: torch.Tensor, curvature: Kronecker, n_observations: float) -> None:
        """Take in new factors of a tensor.

        Parameters
        ----------
        tensor : Parameter
        curvature : Kronecker
            For all N = ``n_observations``, as in the log joint.
        """
        state = self.state[tensor]
        left, right = _small(curvature.left), _small(curvature.right) / n_observations
        weight = state.get("weight", 0.0) * self.defaults["memory"]
        for name, new in (("left", left), ("right", right)):
            old = state.get(name, torch.zeros_like(new))
            state[name] = (weight * old + new) / (weight + 1.0)
        state["weight"] = weight + 1.0

    @torch.no_grad()
    def precondition(self, decays: Mapping[torch.Tensor, float]) -> None:
        """Invert the curvature of tensors, each with the δ/N of its prior.

        Raises
        ------
        ValueError
            If there is no inverse, as of factors that are not finite.
        """
        failed: list[torch.Tensor] = []
        for tensor, decay in decays.items():
            state = self.state[tensor]
            left, right = state["left"], state["right"]
            means = [_mean_eigenvalue(factor) for factor in (left, right)]
            # A factor that is zero, as of weights that nothing has reached yet, says nothing.
            ratio = (means[0] / means[1].clamp_min(1e-30)).sqrt().clamp(1e-6, 1e6)
            root = math.sqrt(self.defaults["damping"] + decay)
            sides = [_inverse(left, ratio * root), _inverse(right, root / ratio)]
            state["inverse"] = tuple(inverse for inverse, _ in sides)
            failed += [~torch.isfinite(means[0] * means[1]), *(info for _, info in sides)]
        if failed and torch.stack(failed).any():
            raise ValueError("A factor of the curvature has no inverse.")

    @torch.no_grad()
    def rescale(self, scales: Mapping[torch.Tensor, float]) -> None:
        """Follow tensors that have been multiplied by numbers, with the function left as it is."""
        for tensor, scale in scales.items():
            state = self.state.get(tensor, {})
            if "momentum" in state:
                state["momentum"] *= scale
            if "right" in state:
                state["right"] = state["right"] / scale**2
            if "inverse" in state:
                left, right = state["inverse"]
                state["inverse"] = left, right * scale**2

    @torch.no_grad()
    def sharpen(self, rise: float) -> None:
        """Follow a curvature that has risen by a factor, as all does when a noise falls.

        Of several noises the least one says by how much, see ``_set_likelihood`` of the net; what
        is wrong with it lasts until the next :meth:`observe`.

        The momentum stays: it is of steps, whose length depends on the ratio of both.
        """
        for state in self.state.values():
            if "right" in state:
                state["right"] = state["right"] * rise

    def forget(self) -> None:
        """Drop the curvature, which is large beside the weights."""
        for state in self.state.values():
            for name in ("left", "right", "weight", "inverse"):
                state.pop(name, None)

    @torch.no_grad()
    def step(self, closure=None):
        """A step of each tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            directions = [self._direction(p) for p in moved]
            products = [(p.grad * s).sum() for p, s in zip(moved, directions, strict=True)]
            change = torch.stack(products).sum() * group["lr"] ** 2
            shrink = (group["clip"] / change.clamp_min(1e-30)).sqrt().clamp_max(1.0)  # Eq. clip
            for tensor, direction in zip(moved, directions, strict=True):
                state = self.state[tensor]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(tensor)
                state["momentum"].mul_(group["momentum"]).add_(direction * shrink)
                tensor.sub_(state["momentum"], alpha=group["lr"])
        return loss

    def _direction(self, tensor: torch.Tensor) -> torch.Tensor:
        """The gradient of a tensor, preconditioned."""
        gradient, inverse = tensor.grad, self.state[tensor].get("inverse")
        assert gradient is not None
        if inverse is None:
            return gradient
        left, right = inverse
        blocks = gradient if gradient.dim() == 3 else gradient[None, :, None]  # (B, d_out, d_in)
        blocks = right * blocks if right.shape[1] == 1 else right @ blocks
        blocks = blocks * left if left.shape[1] == 1 else blocks @ left  # Eq. preconditioned
        return blocks.view_as(gradient)


def _small(factor: Factor) -> torch.Tensor:
    """A factor as a matrix, or its mean eigenvalue in each block where it is too large."""
    rows = factor.rows if isinstance(factor, Root) else factor
    size = rows.shape[-1]
    if size <= LARGEST_INVERTED:
        return dense(factor)
    if isinstance(factor, Root):
        trace = factor.rows.square().sum((1, 2))
    else:
        trace = factor.diagonal(dim1=1, dim2=2).sum(1)
    return (trace / size)[:, None, None]


def _mean_eigenvalue(factor: torch.Tensor) -> torch.Tensor:
    """Over all blocks."""
    return factor.diagonal(dim1=1, dim2=2).mean()


def _inverse(factor: torch.Tensor, damping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor + damping)⁻¹ of each block, of size 1 a reciprocal; and whether there is none."""
    size = factor.shape[-1]
    if size == 1:
        inverse = 1.0 / (factor + damping)
        return inverse, ~torch.isfinite(inverse).all()
    found, failed = [], []
    for part in factor.split(max(TOGETHER // size**2, 1)):
        # In float32 a factor of bad condition may have no root.
        damped = part.to(torch.float64, copy=True)
        damped.diagonal(dim1=1, dim2=2).add_(damping)
        root, info = torch.linalg.cholesky_ex(damped)
        try:
            inverse = torch.cholesky_inverse(root)
        except torch.linalg.LinAlgError:  # of a root with a zero on its diagonal
            inverse = torch.full_like(root, torch.nan)
        found.append(inverse.to(factor.dtype))
        failed.append(info.any() | ~torch.isfinite(found[-1]).all())
    return torch.cat(found), torch.stack(failed).any()
