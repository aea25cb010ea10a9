"""What does each layer cost?

Forward and backward, with the gradients of weights and of the input, of every kind of layer between
10 channels of 32×32 pixels and 20 channels of 16×16 (stride 2), batch 128, float32; for the
convolution of a group each channel has all of its orientations. Each contender is timed once a
round, in one process, by the time of its processor, which a busy machine disturbs less than the
clock; a ratio is the median over the rounds of the ratio within a round. Part e times a curvature
pass instead. A part that is there is left out of a further run.

    python benchmarks/layers.py [--part a|b|c|d|e] [--rounds N] [--threads N] [--output PATH]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import (
    N_WARM_UP,
    Results,
    Step,
    mark_row,
    print_marks,
    print_table,
    ratio_cells,
    summary,
    timed_rounds,
)
from torch import nn

from sklearn_softeq.curvature import Estimator, kronecker_factors
from sklearn_softeq.groups import P1, POINT_GROUPS
from sklearn_softeq.layers import PATHWAYS, FactoredFC, LayerSpec, Pathway
from sklearn_softeq.likelihoods import Categorical

OUTPUT = Path(__file__).with_suffix(".json")
BATCH = 128
SPEC = LayerSpec(in_channels=10, out_channels=20, grid=(32, 32), stride=(2, 2))


class BlockDiagonal(nn.Module):
    """The rival of FactoredFC, with its weights: products with mostly zeros.

    Parameters
    ----------
    layer : FactoredFC
        Whose weights it takes.
    of : {"inputs", "weights"}
        What stands on the diagonal of a matrix: the channels of the input, as in the authors'
        code, or the blocks of the weights.
    """

    def __init__(self, layer: FactoredFC, of: str):
        super().__init__()
        self.U, self.V = layer.U, layer.V
        self.output_grid = layer.output_grid
        self.product = {"inputs": self._of_inputs, "weights": self._of_weights}[of]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.product(inputs.flatten(2).transpose(0, 1), self.U.weight)  # (C, n, D)
        hidden = hidden + self.U.bias
        outputs = self.product(hidden.permute(2, 1, 0), self.V.weight) + self.V.bias  # (D, n, Y)
        return outputs.transpose(0, 1).unflatten(2, self.output_grid)

    @staticmethod
    def _of_inputs(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # (B·n, B·d_in) times (B·d_in, d_out)
        found = torch.block_diag(*blocks) @ weight.transpose(1, 2).flatten(0, 1)
        return found.unflatten(0, blocks.shape[:2])

    @staticmethod
    def _of_weights(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # (n, B·d_in) times (B·d_in, B·d_out)
        found = blocks.transpose(0, 1).flatten(1) @ torch.block_diag(*weight).T
        return found.unflatten(1, weight.shape[:2]).transpose(0, 1)


@dataclass(frozen=True)
class Ratio:
    """A comparison of two contenders of a part.

    Parameters
    ----------
    of, to : str
        Names of the contenders.
    mark : tuple (sign, bound), optional
        What the ratio of times should be.
    fewer_weights : float, optional
        By which factor ``of`` should have fewer weights than ``to``, at least.
    """

    of: str
    to: str
    mark: tuple[str, float] | None = None
    fewer_weights: float | None = None


@dataclass(frozen=True)
class Part:
    """Contenders that take turns.

    Parameters
    ----------
    build : callable
        Makes the layers by name.
    ratios : list of Ratio
    step : callable
        What is timed: takes the name of a contender and its layer.
    """

    build: Callable[[], dict[str, nn.Module]]
    ratios: list[Ratio]
    step: Callable[[str, nn.Module], Step]

    def measure(self, rounds: int) -> dict:
        """Medians, quartiles and ratios of all contenders."""
        layers = self.build()
        steps = {name: self.step(name, layer) for name, layer in layers.items()}
        seconds = timed_rounds(steps, rounds)
        weights = {name: sum(p.numel() for p in m.parameters()) for name, m in layers.items()}
        return {
            "batch": BATCH,
            "milliseconds": {name: summary(1e3 * s) for name, s in seconds.items()},
            "weights": weights,
            "ratios": {
                f"{r.of} / {r.to}": {
                    "time": summary(seconds[r.of] / seconds[r.to]),
                    "fewer weights": round(weights[r.to] / weights[r.of], 3),
                }
                for r in self.ratios
            },
        }


def pathway(name: str, **changes) -> Pathway:
    """A pathway with a random start, between the feature maps of SPEC but for these."""
    layer = PATHWAYS[name].build(replace(SPEC, **changes))
    layer.reset(torch.Generator().manual_seed(0))
    return layer


def group_pathway(name: str, lifts: bool = False) -> Pathway:
    """The convolution of a group, all orientations of SPEC's channels, or from an image."""
    return pathway(f"{name}_conv", **group_channels(name, lifts))


def plain_twin(name: str, lifts: bool = False) -> Pathway:
    """The plain convolution of the same arithmetic."""
    return pathway("conv", **{**group_channels(name, lifts), "in_group": P1, "out_group": P1})


def group_channels(name: str, lifts: bool) -> dict:
    """What a group changes in SPEC."""
    group = POINT_GROUPS[name]
    return {
        "in_channels": SPEC.in_channels * (1 if lifts else group.order),
        "out_channels": SPEC.out_channels * group.order,
        "in_group": P1 if lifts else group,
        "out_group": group,
    }


def features(layer: nn.Module) -> torch.Tensor:
    """Random inputs of a layer."""
    channels = getattr(layer, "in_channels", SPEC.in_channels)
    return torch.randn(BATCH, channels, *SPEC.grid, generator=torch.Generator().manual_seed(0))


def forward_backward(name: str, layer: nn.Module) -> Step:
    """Output, and the gradients of the input and of every weight for a random one of the output."""
    inputs = features(layer).requires_grad_()
    wanted = [inputs, *layer.parameters()]
    with torch.no_grad():
        shape = layer(inputs).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def step():
        outputs = layer(inputs)
        return outputs, *torch.autograd.grad(outputs, wanted, cotangent)

    return step


def curvature_pass(name: str, layer: nn.Module) -> Step:
    """Kronecker factors by one sketch; the mean over positions makes the likelihood cheap."""
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = (features(layer), torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH))
    generator = torch.Generator().manual_seed(0)
    return lambda: kronecker_factors(
        network,
        Categorical(),
        [batch],
        estimator=Estimator("rademacher"),
        generator=generator,
        lengthscales=name.endswith("lengthscales"),
    )


def factored_layers() -> dict[str, nn.Module]:
    """Factored maps and their rivals, after a check that they are the same function."""
    layer = pathway("factored_fc")
    found = {
        "factored_fc": layer,
        "block-diagonal inputs (published)": BlockDiagonal(layer, "inputs"),
        "block-diagonal weights": BlockDiagonal(layer, "weights"),
    }
    results = [forward_backward(name, each)() for name, each in found.items()]
    for first, *others in zip(*results, strict=True):
        for other in others:
            error = (other - first).abs().max() / first.abs().max()
            assert error <= 1e-5, f"a rival is another function: {error:.1e}"
    return found


def named(*names: str) -> Callable[[], dict[str, nn.Module]]:
    """Builds pathways between the feature maps of SPEC; what follows a comma is a remark."""
    return lambda: {name: pathway(name.partition(",")[0]) for name in names}


def group_layers() -> dict[str, nn.Module]:
    """The convolution of each group, beside its plain twin, and the layers that lift images."""
    found: dict[str, nn.Module] = {}
    for name in POINT_GROUPS:
        for kind, lifts in ((f"{name}_conv", False), (f"{name}_conv, lifting", True)):
            found[kind] = group_pathway(name, lifts)
            found[f"conv as {kind}"] = plain_twin(name, lifts)
    return found


def curvature_layers() -> dict[str, nn.Module]:
    """Layers of which a curvature pass is timed."""
    return {
        "p4_conv": group_pathway("p4"),
        "conv as p4_conv": plain_twin("p4"),
        **named("conv", "factored_fc", "sparse_fc", "sparse_fc, lengthscales")(),
    }


GROUP_CONVS = [kind for name in POINT_GROUPS for kind in (f"{name}_conv", f"{name}_conv, lifting")]
PARTS = {
    "a": Part(
        factored_layers,
        [
            Ratio("block-diagonal inputs (published)", "factored_fc", ("≥", 10.0)),
            Ratio("block-diagonal weights", "factored_fc"),
        ],
        forward_backward,
    ),
    "b": Part(
        named("factored_fc", "sparse_fc"),
        [Ratio("sparse_fc", "factored_fc", ("≤", 2.0), fewer_weights=1.8)],
        forward_backward,
    ),
    "c": Part(
        group_layers,
        [
            Ratio(kind, f"conv as {kind}", ("≤", 1.3) if kind == "p4_conv" else None)
            for kind in GROUP_CONVS
        ],
        forward_backward,
    ),
    "d": Part(
        named("conv", "sparse_conv", "factored_fc", "fc"),
        [
            Ratio("sparse_conv", "conv"),
            Ratio("factored_fc", "conv"),
            Ratio("fc", "conv"),
        ],
        forward_backward,
    ),
    "e": Part(
        curvature_layers,
        [
            Ratio("p4_conv", "conv as p4_conv"),
            Ratio("factored_fc", "conv"),
            Ratio("sparse_fc", "factored_fc"),
            Ratio("sparse_fc, lengthscales", "sparse_fc"),
        ],
        curvature_pass,
    ),
}


def time_rows(part: str, result: dict) -> list[tuple[str, ...]]:
    """A row for each contender of a part."""
    to = {r.of: (r.to, result["ratios"][f"{r.of} / {r.to}"]) for r in PARTS[part].ratios}
    rows = []
    for name, time_ in result["milliseconds"].items():
        milliseconds = f"{time_['median']:.2f}"
        weights = str(result["weights"][name])
        rival, ratio = to.get(name, ("", None))
        figures = ("", "") if ratio is None else ratio_cells(ratio["time"])
        rows.append((part, name, weights, milliseconds, rival, *figures))
    return rows


def mark_rows(part: str, result: dict) -> list[tuple[str, ...]]:
    """A row for each mark of a part."""
    rows = []
    for r in PARTS[part].ratios:
        found = result["ratios"][f"{r.of} / {r.to}"]
        if r.mark is not None:
            time = found["time"]["median"]
            rows.append(mark_row(part, f"time of {r.of} / {r.to}", time, *r.mark))
        if r.fewer_weights is not None:
            what = f"weights of {r.to} / {r.of}"
            rows.append(mark_row(part, what, found["fewer weights"], "≥", r.fewer_weights))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="one part only (all)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds that are counted (31)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch, times are summed (1)"
    )
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = Results(options.output)
    times, marks = [], []
    for part in [options.part] if options.part else PARTS:
        key = f"{part}, rounds={options.rounds}, threads={options.threads}"
        result = kept.get(key, lambda part=part: PARTS[part].measure(options.rounds))
        times += time_rows(part, result)
        marks += mark_rows(part, result)
        print(f"  part {part}: done", flush=True)
    env = result["environment"]
    print(f"\n{env['threads']} thread(s), {env['cores']} cores, torch {env['torch']}, float32,")
    print(f"batch {BATCH}, {options.rounds} rounds after {N_WARM_UP} to warm up")
    print_table(
        ("part", "layer", "weights", "ms", "against", "ratio of times", "quartiles"),
        times,
    )
    print_marks(marks)
