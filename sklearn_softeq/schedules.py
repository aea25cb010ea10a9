"""Small pieces that decide, epoch by epoch, what training does next.

They are plain objects without a network in them where that is possible: a plateau that tells
whether a figure still rises, the learning rate of an epoch, and the two ways to start the
pathways of a network.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from .groups import P1, PointGroup
from .hyperparameters import LOG_PRECISION_BOUNDS, LayerwisePrior
from .layers import Pathway, PathwaySum
from .networks import SoftEquivariantNetwork

__all__ = [
    "BOUND_WARM_UP",
    "LR_SCHEDULES",
    "STARTS",
    "WARM_UP",
    "JointStart",
    "LearningRate",
    "Plateau",
    "Start",
    "SymmetricStart",
    "begin_anew",
    "fix_gauge",
    "restart_jointly",
    "symmetries",
]

LR_SCHEDULES = ("cooldown", "cosine", "constant")


#: Epochs of linear warm-up of the learning rate.
WARM_UP = 5

#: Epochs in which a bound on the steps warms up. With steps of full length from the first epochs on
#: K-FAC made constant predictors, for good, of one in three narrow networks
#: (docs/design/sums_log.md).
BOUND_WARM_UP = 10

#: Largest drift of log δ_U − log δ_V from its start, see :func:`fix_gauge`.
GAUGE_LIMIT = 4.0


@dataclass
class Plateau:
    """Whether a figure has stopped rising.

    Parameters
    ----------
    tol : float
        A rise of the best value by less than this does not count.
    patience : int
        Number of values in a row without a rise after which the plateau is reached.
    """

    tol: float
    patience: int
    best: float = -math.inf
    stale: int = 0

    def reached(self, value: float) -> bool:
        """Take the next value."""
        if value > self.best + self.tol:
            self.best, self.stale = value, 0
        else:
            self.stale += 1
        return self.stale >= self.patience


@dataclass
class LearningRate:
    """The learning rate of each epoch.

    "cooldown": a warm-up, a constant rate until training has converged, then a cosine to 0 that
    takes a third of the epochs so far, or what ``max_epochs`` leaves. "cosine": a cosine to 0
    over ``max_epochs`` (the paper). "constant": as it says.

    Parameters
    ----------
    schedule : {"cooldown", "cosine", "constant"}
    rate : float
        The full rate.
    max_epochs : int
        Cap of the number of epochs.
    warmup : int, default=WARM_UP
        Epochs of linear warm-up after the start and after a release of pathways; not with
        "constant".
    bound_warmup : int, default=BOUND_WARM_UP
        The same of a bound on the steps, if they have one, whatever the schedule.
    """

    schedule: str
    rate: float
    max_epochs: int
    warmup: int = WARM_UP
    bound_warmup: int = BOUND_WARM_UP
    cooldown_from: float = math.inf
    cooldown_epochs: int = 0
    warm_from: int = 0

    @property
    def cooling(self) -> bool:
        """Whether the cool-down has begun."""
        return self.cooldown_from < math.inf

    def rewarm(self, epoch: int) -> None:
        """Warm up again from this epoch on."""
        self.warm_from = epoch

    @property
    def latest_cooldown(self) -> int:
        """The last epoch after which a cool-down still fits under the cap."""
        return (3 * self.max_epochs) // 4 if self.schedule == "cooldown" else self.max_epochs

    def begin_cooldown(self, epoch: int) -> None:
        """Let the rate fall after this epoch; schedules without a cool-down end here."""
        self.cooldown_from = epoch
        if self.schedule == "cooldown":
            self.cooldown_epochs = min(max(1, epoch // 3), self.max_epochs - epoch)

    def finished(self, epoch: int) -> bool:
        """Whether the cool-down is over after this epoch."""
        return epoch >= self.cooldown_from + self.cooldown_epochs

    def at(self, epoch: int) -> float:
        """The rate of an epoch, counted from 1."""
        if self.schedule == "constant":
            return self.rate
        rate = self.rate * min(1.0, (epoch - self.warm_from) / self.warmup)
        if self.schedule == "cosine":
            return rate * _cosine((epoch - 1) / self.max_epochs)
        if self.cooling:
            rate *= _cosine((epoch - self.cooldown_from) / (self.cooldown_epochs + 1))
        return rate

    def hand_to(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Set the rate of an epoch, times the pace of a group of tensors that has one.

        A constant one is left to the user's own callbacks. Where steps are bounded, as K-FAC's
        are, the bound shortens the first ones to one length whatever the rate is; so it warms up,
        too, with the square, as it is one of second order.
        """
        warm = min(1.0, (epoch - self.warm_from) / self.bound_warmup)
        for group in optimizer.param_groups:
            if "clip" in group:
                group["clip"] = optimizer.defaults["clip"] * warm**2
            if self.schedule != "constant":
                group["lr"] = self.at(epoch) * group.get("pace", 1.0)


def _cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(fraction, 1.0)))


Entry = tuple[str, PathwaySum, str, Pathway]


def _pathways(network: SoftEquivariantNetwork) -> list[Entry]:
    """(tensor prefix, block, name, pathway) of every pathway of every block."""
    return [
        (f"{layer}.{name}", block, name, pathway)
        for layer, block in network.layers.items()
        for name, pathway in block.pathways.items()
    ]


def symmetries(groups: Iterable[PointGroup | None]) -> list[PointGroup]:
    """The different groups among those of some pathways, the largest first."""
    found = dict.fromkeys(group for group in groups if group is not None)
    return sorted(found, key=lambda group: -group.order)


def _first(block: PathwaySum, group: PointGroup | None) -> list[str]:
    """Names of the pathways that a layer begins with, for a group; None: the most symmetric."""
    most = [name for name in block.pathways if name not in block.less_symmetric]
    if group is None:
        return most
    same = [name for name, pathway in block.pathways.items() if pathway.group == group]
    if group == P1 and not same:  # a readout from one pixel: what is free commutes with shifts, too
        same = [name for name, pathway in block.pathways.items() if pathway.group is None]
    return same or most


class JointStart:
    """All pathways at once, from random weights (the paper).

    Attributes
    ----------
    name : str
        Its key in ``STARTS``.
    scale : str
        Factor of the sums of pathways, a key of ``networks.SCALES``.
    """

    name: ClassVar[str] = "joint"
    scale: ClassVar[str] = "sqrt"

    def again(self) -> "JointStart":
        """That of a further fit."""
        return JointStart()

    def begun_with(self, network: SoftEquivariantNetwork) -> str:
        """What training begins with: all pathways."""
        return self.name

    def begin(self, network: SoftEquivariantNetwork) -> None:
        """Nothing is held back."""

    def release(
        self,
        network: SoftEquivariantNetwork,
        prior: LayerwisePrior,
        learn: bool,
        generator: torch.Generator | None = None,
    ) -> bool:
        """Nothing to release."""
        return False

    def charges(self, network: SoftEquivariantNetwork) -> dict[str, float]:
        """Every log determinant counts once."""
        return {}

    def paces(self, prior: LayerwisePrior) -> dict[str, float]:
        """All tensors have the same learning rate."""
        return {}

    def prune(
        self, network: SoftEquivariantNetwork, effective_dimensions: Mapping[str, float]
    ) -> None:
        """Nothing is removed."""

    def settle(
        self, network: SoftEquivariantNetwork, effective_dimensions: Mapping[str, float]
    ) -> bool:
        """Nothing is removed."""
        return False


@dataclass
class SymmetricStart:
    """Symmetry first: the pathways of one symmetry until the end of the burn-in, then the rest.

    At the release the others are exactly zero, so the network goes on as the symmetric one; their
    precisions then let them grow or hold them down. One whose effective dimensions stay below 0.9
    at three evaluations of the evidence is removed for good: its weights become zero and its
    computation is skipped. In the end all that are below go, unless the evidence falls.

    Parameters
    ----------
    group : PointGroup or None, default=None
        The symmetry, beside shifts; None: that of the most symmetric pathways.
    charge : float, default=4.0
        How many times the log determinants of what was held back count in the hyper steps. The
        Kronecker factors overstate the log determinant of a convolution (1.9 times the exact
        block's) more than that of a factored layer (1.2 to 1.5 times), charge a function that two
        pathways can carry twice, and weights that still move under noise look larger than they
        are; counted twice, such pathways often survive on tasks that have the symmetry
        (docs/design/sums.md).
    threshold : float, default=0.9
        Effective dimensions below which a pathway is as good as off. A single bias that the data
        determine counts up to one.
    patience : int, default=3
        Evaluations in a row after which it is removed.
    released : dict of str to float, optional
        Precisions at which tensors were released.
    """

    group: PointGroup | None = None
    charge: float = 4.0
    threshold: float = 0.9
    patience: int = 3
    released: dict[str, float] = field(default_factory=dict)
    low: dict[str, int] = field(default_factory=dict)
    name: ClassVar[str] = "symmetric"
    scale: ClassVar[str] = "symmetric"

    def begun_with(self, network: SoftEquivariantNetwork) -> str:
        """The symmetries that training begins with; as the joint start, where there are none."""
        block = next(iter(network.layers.values()))
        found = symmetries(block.pathways[name].group for name in _first(block, self.group))
        return "+".join(group.name for group in found) or JointStart.name

    def again(self) -> "SymmetricStart":
        """That of a further fit: what was released stays so, and nothing counts as low yet."""
        return replace(self, released=dict(self.released), low={})

    def begin(self, network: SoftEquivariantNetwork) -> None:
        """Switch off all but the pathways of the group, in a network as it was built."""
        for block in network.layers.values():
            first = _first(block, self.group)
            block.scale *= math.sqrt(len(_first(block, None)) / len(first))
            block.enabled = {name: name in first for name in block.enabled}

    def _held(self, network: SoftEquivariantNetwork) -> list[Entry]:
        """The pathways that the network begins without."""
        return [
            entry for entry in _pathways(network) if entry[2] not in _first(entry[1], self.group)
        ]

    def release(
        self,
        network: SoftEquivariantNetwork,
        prior: LayerwisePrior,
        learn: bool,
        generator: torch.Generator | None = None,
    ) -> bool:
        """Switch on what was held back, at zero; whether there was any.

        Where precisions are learned (``learn``), those of these pathways start at the scale
        of a random start of their weights.
        """
        held = self._held(network)
        for prefix, block, name, pathway in held:
            pathway.reset(generator)
            for factor in pathway.factor_names if learn else ():
                mean_square = pathway.get_parameter(factor).detach().square().mean().item()
                prior.set_precision(f"{prefix}.{factor}", 1.0 / mean_square)
            pathway.silence()
            block.enabled[name] = True
        precisions = prior.precisions()
        self.released = {name: precisions[name] for name in self._tensors(held)}
        return bool(held)

    def charges(self, network: SoftEquivariantNetwork) -> dict[str, float]:
        """The charge of each tensor that is held back at the start."""
        return dict.fromkeys(self._tensors(self._held(network)), self.charge)

    def paces(self, prior: LayerwisePrior) -> dict[str, float]:
        """Learning rates of released tensors, as parts of the common one.

        They fall with the prior's standard deviation. Adam's steps have one length whatever the
        gradient, and on the many weights of a pathway that is hardly used they are noise, from
        which all others suffer and which looks like use.
        """
        precisions = prior.precisions()
        return {
            name: min(1.0, math.sqrt(before / precisions[name]))
            for name, before in self.released.items()
            if name in precisions
        }

    def prune(
        self, network: SoftEquivariantNetwork, effective_dimensions: Mapping[str, float]
    ) -> None:
        """Remove what the evidence has switched off for a while."""
        for prefix, block, name, gamma in self._left(network, effective_dimensions):
            self.low[prefix] = self.low.get(prefix, 0) + 1 if gamma < self.threshold else 0
            if self.low[prefix] >= self.patience:
                block.remove(name)

    def settle(
        self, network: SoftEquivariantNetwork, effective_dimensions: Mapping[str, float]
    ) -> bool:
        """Remove at once what is switched off in the end; whether there was any."""
        low = [e for e in self._left(network, effective_dimensions) if e[3] < self.threshold]
        for _, block, name, _ in low:
            block.remove(name)
        return bool(low)

    @staticmethod
    def _tensors(entries: list[Entry]) -> list[str]:
        """Names of the tensors of some pathways."""
        named = ((prefix, path.named_parameters()) for prefix, _, _, path in entries)
        return [f"{prefix}.{name}" for prefix, tensors in named for name, _ in tensors]

    def _left(
        self, network: SoftEquivariantNetwork, effective_dimensions: Mapping[str, float]
    ) -> list[tuple[str, PathwaySum, str, float]]:
        """What was held back and is on, as prefix of its tensors, block and name, with its γ."""
        return [
            (
                prefix,
                block,
                name,
                sum(effective_dimensions[f"{prefix}.{t}"] for t, _ in pathway.named_parameters()),
            )
            for prefix, block, name, pathway in self._held(network)
            if block.enabled[name]
        ]


Start = JointStart | SymmetricStart

STARTS: dict[str, type[Start]] = {kind.name: kind for kind in (JointStart, SymmetricStart)}


def restart_jointly(
    network: SoftEquivariantNetwork,
    prior: LayerwisePrior,
    generator: torch.Generator | None = None,
) -> None:
    """Begin anew with all pathways at once, if some are still held back.

    For a network whose symmetric pathways alone have learnt nothing: where the task breaks the
    symmetry, the prior may have taken their weights to zero, and nothing grows from there.
    """
    if all(on for layer in network.layers.values() for on in layer.enabled.values()):
        return
    for layer in network.layers.values():
        layer.scale *= math.sqrt(sum(layer.enabled.values()) / len(layer.enabled))
        layer.enabled = dict.fromkeys(layer.enabled, True)
    begin_anew(network, prior, generator)


def begin_anew(
    network: SoftEquivariantNetwork,
    prior: LayerwisePrior,
    generator: torch.Generator | None = None,
) -> None:
    """Draw another random start of all weights, at the first precisions."""
    for module in network.modules():
        if isinstance(module, Pathway):
            module.reset(generator)
    prior.reset()


@torch.no_grad()
def fix_gauge(network: SoftEquivariantNetwork, prior: LayerwisePrior) -> dict[str, float]:
    """Bound the drift of the scale between the factors U, V of products.

    U → aU, δ_U → δ_U / a², V → V / a, δ_V → a² δ_V leaves the network, its effective dimensions
    and its evidence as they are, but hyper steps make log δ_U − log δ_V drift without end. It is
    held within :data:`GAUGE_LIMIT` of its value at a random start.

    Returns
    -------
    dict of str to float
        What each tensor that has moved was multiplied by.
    """
    scales: dict[str, float] = {}
    precisions = prior.precisions()
    for prefix, _, _, pathway in _pathways(network):
        if pathway.log_gauge is None:
            continue
        u, v = pathway.factor_names
        log_u, log_v = (math.log(precisions[f"{prefix}.{name}"]) for name in (u, v))
        drift = log_u - log_v - pathway.log_gauge
        move = (drift - max(-GAUGE_LIMIT, min(GAUGE_LIMIT, drift))) / 2
        # No farther than both precisions can follow: else the weights would move alone.
        low, high = LOG_PRECISION_BOUNDS
        move = min(max(move, log_u - high, low - log_v), log_u - low, high - log_v)
        a = math.exp(move / 2)  # Eq. gauge
        # U brings its bias along: V (U x + b).
        for name, scale in ((u, a), (u.replace("weight", "bias"), a), (v, 1 / a)):
            pathway.get_parameter(name).mul_(scale)
            prior.set_precision(f"{prefix}.{name}", precisions[f"{prefix}.{name}"] / scale**2)
            if scale != 1.0:
                scales[f"{prefix}.{name}"] = scale
    return scales
