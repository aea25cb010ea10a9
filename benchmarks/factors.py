"""What does an evidence cost, and how far off is a cheap estimate of it?

A convolutional network of 56 002 weights for 2000 images of 28×28, ten classes, trained by Adam to
a negative log likelihood of about 0.25. Timed is all that an evidence takes: Kronecker factors,
their eigenvalues, and 20 hyper steps of Adam with the evidence at their end; the unit is an epoch
of training the same network in a bare loop (batches of 128, forward, cross entropy, backward, fused
Adam) in the same round. An estimate's error is that of the log determinant Σ log(1 + λμ/δ) of all
tensors against the exact one, and the largest relative error of the effective dimensions γ of a
tensor; both are medians over seeds.

Part a is the network as it is built. Part b holds its subsampled grid fixed, which makes it a plain
stack that other libraries can take: beside it laplace-torch's KronLaplace on the same network in
torch's own modules, with each backend that is installed (make rivals).

    python benchmarks/factors.py [--part a|b] [--rounds N] [--threads N] [--output PATH]
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from harness import (
    Results,
    Step,
    curvature_of,
    mark_row,
    print_marks,
    print_table,
    ratio_cells,
    summary,
    timed_rounds,
    traces_of,
    training_data,
)
from sklearn.datasets import load_digits
from torch import nn

from sklearn_softeq.batches import TrainingData
from sklearn_softeq.budget import CurvaturePlan, rows_of_a_pass
from sklearn_softeq.curvature import Estimator, input_factors
from sklearn_softeq.hyperparameters import squared_norms
from sklearn_softeq.kronecker import Factor, Spectrum, spectra
from sklearn_softeq.marginal_likelihood import AdamSolver, LaplaceEvidence
from sklearn_softeq.networks import SoftEquivariantNetwork, build_network

OUTPUT = Path(__file__).with_suffix(".json")
N, K, SIDE, BATCH = 2000, 10, 28, 128
NLL = 0.25
HYPER_STEPS = 20
PRECISIONS = (0.1, 1.0, 10.0)
N_SEEDS = 5
N_WARM_UP = 1  # a round is long enough
EPOCH = "MAP epoch"
BACKENDS = {
    "asdfghjkl": ("laplace.curvature.asdl", "AsdlGGN"),
    "backpack-for-pytorch": ("laplace.curvature.backpack", "BackPackGGN"),
    "curvlinops-for-pytorch": ("laplace.curvature.curvlinops", "CurvlinopsGGN"),
}

Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Estimate:
    """A way to estimate the curvature.

    Parameters
    ----------
    estimator : Estimator
    n_rows : int
        So many, drawn as in a fit, stand for all.
    warm : bool
        With the input factor of the first layer known, as at every evidence of a fit but one.
    mark : float, optional
        How many epochs it may take.
    """

    estimator: Estimator
    n_rows: int = N
    warm: bool = False
    mark: float | None = None


ESTIMATES = {
    "exact": Estimate(Estimator(), mark=5.0),
    "sketch, cold": Estimate(Estimator("rademacher"), mark=1.3),
    "sketch": Estimate(Estimator("rademacher"), warm=True, mark=1.3),
    "sketch of 256 rows": Estimate(Estimator("rademacher"), 256, warm=True, mark=0.2),
    "Monte-Carlo label": Estimate(Estimator("monte_carlo"), warm=True),
    "exact, reduce": Estimate(Estimator(kfac="reduce")),
}
#: Ours, cold, and what it is called in KronLaplace.
AT_FIXED_PHASE = {
    "exact": (ESTIMATES["exact"], {"stochastic": False}),
    "Monte-Carlo label": (Estimate(Estimator("monte_carlo")), {"stochastic": True}),
}


@dataclass(frozen=True, eq=False)
class Pass:
    """An evidence of a network and the hyper steps that follow, as in training."""

    network: nn.Module
    data: TrainingData
    estimate: Estimate

    @cached_property
    def traces(self) -> torch.Tensor:
        """What training has found about the rows on its way."""
        return traces_of(self.network, self.data)

    def constants(self) -> dict[str, Factor]:
        """Factors that depend on no weight."""
        rows = rows_of_a_pass(self.network)
        form = self.estimate.estimator.kfac
        return input_factors(self.network, self.data.in_order(rows), kfac=form, unit_weights=True)

    @cached_property
    def known(self) -> tuple[dict[str, Factor], dict[int, torch.Tensor]]:
        """These factors from an earlier evidence, and their eigenvalues."""
        return self.constants(), {}

    def spectra(self, seed: int = 0) -> tuple[float, dict[str, Spectrum]]:
        """Log likelihood, and eigenvalues of every tensor."""
        constants, eigenvalues = self.known if self.estimate.warm else (self.constants(), {})
        copies = 1 if self.estimate.estimator.columns == "exact" else K - 1
        plan = CurvaturePlan(self.estimate.estimator, self.estimate.n_rows, copies)
        curvature = curvature_of(self.network, self.data, plan, self.traces, seed, constants)
        found = spectra(curvature.factors, eigenvalues)
        kept = {id(factor) for factor in constants.values()}
        for key in set(eigenvalues) - kept:  # an identity means nothing once its factor is gone
            del eigenvalues[key]
        return curvature.log_likelihood, found

    def __call__(self) -> LaplaceEvidence:
        log_likelihood, found = self.spectra()
        norms = squared_norms(dict(self.network.named_parameters()))
        index = {name: i for i, name in enumerate(found)}
        objective = LaplaceEvidence(log_likelihood, found, norms, index)
        solver, log_precision = AdamSolver(), torch.zeros(len(index), dtype=torch.float64)
        for _ in range(HYPER_STEPS):
            log_precision = solver.step(objective, log_precision)
        objective.evidence(log_precision)
        return objective


class RivalPass:
    """KronLaplace of laplace-torch: fit and differentiable hyper steps, as in its own training."""

    def __init__(self, kron_laplace: type, backend: type, network: nn.Module, data: Data, **kwargs):
        self.make = lambda precisions: kron_laplace(
            network,
            "classification",
            prior_precision=precisions,
            backend=backend,
            backend_kwargs=kwargs,
        )
        self.n_tensors = len(list(network.parameters()))
        self.loader = Loader(data)

    def fitted(self):
        laplace = self.make(torch.ones(self.n_tensors))
        laplace.fit(self.loader)
        return laplace

    def __call__(self) -> None:
        laplace = self.fitted()
        log_precision = torch.zeros(self.n_tensors, requires_grad=True)
        optimizer = torch.optim.Adam([log_precision], lr=0.1, maximize=True)
        for _ in range(HYPER_STEPS):
            optimizer.zero_grad()
            laplace.log_marginal_likelihood(log_precision.exp()).backward()
            optimizer.step()

    def log_dets(self) -> list[float]:
        """Log determinants at each of PRECISIONS."""
        laplace, found = self.fitted(), []
        for precision in PRECISIONS:
            laplace.prior_precision = torch.full((self.n_tensors,), precision)
            found.append(laplace.log_det_ratio.item())
        return found


class Loader:
    """Batches without the overhead of torch's loader, which is no part of the comparison."""

    def __init__(self, data: Data):
        self.batches = list(zip(*(t.split(BATCH) for t in data), strict=True))
        self.dataset = torch.utils.data.TensorDataset(*data)

    def __iter__(self):
        return iter(self.batches)


def enlarged_digits() -> Data:
    """scikit-learn's digits at 28×28, some of them twice, with noise, standardised."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.resize(rng.permutation(len(X)), N))
    images = torch.from_numpy(X[rows]).float().view(-1, 1, 8, 8)
    images = nn.functional.interpolate(images, size=(SIDE, SIDE), mode="bilinear")
    images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images - images.mean()) / images.std(), torch.from_numpy(y[rows])


def epoch_of(network: nn.Module, data: Data) -> Step:
    """An epoch of plain training, in place."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4, fused=True)
    inputs, targets = data

    def epoch():
        for rows in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()

    return epoch


def new_network() -> SoftEquivariantNetwork:
    """The network, at its start."""
    network = build_network(
        (1, SIDE, SIDE),
        K,
        pathways=("conv",),
        architecture="paper",
        width=4,
        activation="relu",  # of which the other library has the second derivatives
        generator=torch.Generator().manual_seed(0),
    )
    assert sum(p.numel() for p in network.parameters()) == 56_002
    return network


def train(network: nn.Module, data: Data) -> None:
    """Train in place, until the network fits the data well enough."""
    torch.manual_seed(0)
    epoch = epoch_of(network, data)
    for _ in range(200):
        epoch()
        if nll(network, data) <= NLL:
            return
    raise RuntimeError("the network does not learn")


@torch.no_grad()
def nll(network: nn.Module, data: Data) -> float:
    """Mean negative log likelihood."""
    return nn.functional.cross_entropy(network(data[0]), data[1]).item()


def at_fixed_phase(network: SoftEquivariantNetwork) -> nn.Sequential:
    """The same layers with the same weights; strides keep the first grid. Images are padded."""
    blocks = [m for block in network.blocks for m in (block.get_submodule("conv"), nn.ReLU())]
    return nn.Sequential(*blocks, *network.head, nn.Flatten())


def in_torch_modules(network: nn.Sequential) -> nn.Sequential:
    """The same function in torch's own modules."""
    layers: list[nn.Module] = []
    for module in network:
        if hasattr(module, "kernel"):
            n_out, n_in, *kernel = module.filters().shape
            twin = nn.Conv2d(n_in, n_out, kernel, module.stride, 1, padding_mode="circular")
            layers.append(with_weights(twin, module.filters(), module.bias))
        elif hasattr(module, "weight"):
            if not any(isinstance(layer, nn.Flatten) for layer in layers):
                layers.append(nn.Flatten())
            _, n_out, n_in = module.weight.shape
            layers.append(with_weights(nn.Linear(n_in, n_out), module.weight[0], module.bias))
        elif isinstance(module, nn.ReLU):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


@torch.no_grad()
def with_weights(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """A layer with these weights."""
    layer.get_parameter("weight").copy_(weight)
    layer.get_parameter("bias").copy_(bias)
    return layer


def rivals(network: nn.Sequential, data: Data) -> tuple[dict[str, tuple[str, RivalPass]], list]:
    """Rival passes by name, each with the estimate that it is one of, and what is missing."""
    try:
        kron_laplace = import_module("laplace").KronLaplace
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision for another torch
        return {}, [f"laplace-torch could not be imported, so there is no rival: {error}"]
    found, missing = {}, []
    for name, (module, backend) in BACKENDS.items():
        try:
            interface = getattr(import_module(module), backend)
        except ImportError as error:
            missing.append(f"backend {name} could not be imported and is left out: {error}")
            continue
        for estimate, (_, options) in AT_FIXED_PHASE.items():
            # A backend leaves its hooks in a network, and others refuse it then.
            twin = in_torch_modules(network)
            rival = RivalPass(kron_laplace, interface, twin, data, **options)
            found[f"laplace-torch, {name}, {estimate}"] = (estimate, rival)
    return found, missing


def log_dets(found: dict[str, Spectrum]) -> list[float]:
    """Σ log(1 + λμ/δ) over all tensors at each of PRECISIONS."""
    at = [torch.tensor(precision, dtype=torch.float64) for precision in PRECISIONS]
    return [sum(s.log_det_ratio(p).item() for s in found.values()) for p in at]


def dimensions(found: dict[str, Spectrum]) -> np.ndarray:
    """γ of every tensor, (precisions, tensors)."""
    at = [torch.tensor(precision, dtype=torch.float64) for precision in PRECISIONS]
    return np.array([[s.effective_dimensions(p).item() for s in found.values()] for p in at])


def errors(estimate: Pass, exact: dict[str, Spectrum]) -> dict[str, list[float]]:
    """Errors of an estimate at each of PRECISIONS in per cent, medians over seeds."""
    n_seeds = 1 if estimate.estimate.estimator.columns == "exact" else N_SEEDS
    found = [estimate.spectra(seed)[1] for seed in range(n_seeds)]
    log_det = np.array([log_dets(f) for f in found]) / log_dets(exact) - 1
    gamma = np.abs(np.array([dimensions(f) for f in found]) / dimensions(exact) - 1).max(2)
    return {
        "log det": (100 * np.median(log_det, 0)).round(2).tolist(),
        "worst γ": (100 * np.median(gamma, 0)).round(2).tolist(),
    }


def measure(
    network: nn.Module,
    data: Data,
    passes: dict[str, Pass],
    others: dict[str, Step],
    rounds: int,
) -> dict:
    """Times in epochs of the network, and errors of our passes."""
    exact = Pass(network, training_data(*data), ESTIMATES["exact"]).spectra()[1]
    quality = {name: errors(each, exact) for name, each in passes.items()}
    steps = {EPOCH: epoch_of(copy.deepcopy(network), data), **passes, **others}
    seconds = timed_rounds(steps, rounds, N_WARM_UP)
    return {
        "nll": nll(network, data),
        "seconds": {name: summary(s) for name, s in seconds.items()},
        "epochs": {name: summary(s / seconds[EPOCH]) for name, s in seconds.items()},
        "errors": quality,
        "log dets": log_dets(exact),
        "rounds": {name: s.tolist() for name, s in seconds.items()},
    }


def part_a(rounds: int) -> dict:
    """Our estimates on the network as it is built."""
    data = enlarged_digits()
    network = new_network()
    train(network, data)
    rows = training_data(*data)
    passes = {name: Pass(network, rows, estimate) for name, estimate in ESTIMATES.items()}
    return measure(network, data, passes, {}, rounds)


def part_b(rounds: int) -> dict:
    """Beside laplace-torch, at a fixed phase."""
    data = enlarged_digits()
    built = new_network()
    data = built.pad(data[0]), data[1]
    network = at_fixed_phase(built)
    train(network, data)
    plain = in_torch_modules(network)
    difference = (network(data[0]) - plain(data[0])).abs().max().item()
    assert difference <= 1e-4, f"the rivals' network is another function: {difference:.1e}"
    rows = training_data(*data)
    passes = {name: Pass(network, rows, ours) for name, (ours, _) in AT_FIXED_PHASE.items()}
    others, missing = rivals(network, data)
    steps = {name: rival for name, (_, rival) in others.items()}
    steps[f"{EPOCH}, torch's modules"] = epoch_of(plain, data)
    found = measure(network, data, passes, steps, rounds)
    for name, (_, rival) in others.items():
        log_det = np.array(rival.log_dets()) / found["log dets"] - 1
        found["errors"][name] = {"log det": (100 * log_det).round(2).tolist()}
    times = {name: np.array(seconds) for name, seconds in found["rounds"].items()}
    slower = {name: summary(times[name] / times[of]) for name, (of, _) in others.items()}
    return {**found, "slower": slower, "missing": missing}


PARTS: dict[str, Callable[[int], dict]] = {"a": part_a, "b": part_b}


def rows_of(part: str, result: dict) -> list[tuple[str, ...]]:
    """A row for each pass of a part."""
    rows = []
    for name, epochs in result["epochs"].items():
        error = result["errors"].get(name, {})
        cells = (error_cell(error, "log det", "+.1f"), error_cell(error, "worst γ", ".1f"))
        seconds = f"{result['seconds'][name]['median']:.3f}"
        slower = result.get("slower", {}).get(name)
        ratio = "" if slower is None else f"{slower['median']:.2f}"
        rows.append((part, name, seconds, *ratio_cells(epochs), *cells, ratio))
    return rows


def error_cell(error: dict, key: str, form: str) -> str:
    """Three figures, one for each precision."""
    return " / ".join(f"{value:{form}}" for value in error[key]) if key in error else ""


def mark_rows(part: str, result: dict) -> list[tuple[str, ...]]:
    """A row for each mark of a part."""
    if part == "a":
        return [
            mark_row(part, f"{name}, epochs", result["epochs"][name]["median"], "≤", e.mark)
            for name, e in ESTIMATES.items()
            if e.mark is not None
        ]
    rows = []
    for estimate in AT_FIXED_PHASE:
        medians = [
            ratio["median"] for name, ratio in result["slower"].items() if name.endswith(estimate)
        ]
        if medians:
            what = f"laplace-torch's best backend / ours, {estimate}"
            rows.append(mark_row(part, what, min(medians), "≥", 2.0))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="one part only (both)")
    parser.add_argument("--rounds", type=int, default=11, help="rounds that are counted (11)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # a backend's, at every call
    kept = Results(options.output)
    rows, marks = [], []
    for part in [options.part] if options.part else PARTS:
        key = f"{part}, rounds={options.rounds}, threads={options.threads}"
        result = kept.get(key, lambda part=part: PARTS[part](options.rounds))
        rows += rows_of(part, result)
        marks += mark_rows(part, result)
        print(f"  part {part}: done", flush=True)
        for line in result.get("missing", ()):
            print(f"  {line}")
    head = ("part", "pass", "seconds", "MAP epochs", "quartiles")
    errors_head = tuple(f"{what} %" for what in ("log det error at δ = .1 / 1 / 10,", "worst γ,"))
    print_table((*head, *errors_head, "time / ours"), rows)
    print_marks(marks)
