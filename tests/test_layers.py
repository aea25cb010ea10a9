"""Layers against slow loops; the contract of tokens; equivariance of one layer and of sums."""

import copy
from itertools import product

import pytest
import torch
from cases import LAYERS, LayerCase, randomise
from references import roll_to_largest_grid, slow_pathway

from sklearn_softeq.groups import Translation
from sklearn_softeq.layers import FC, Conv, FactoredFC, PathwaySum, SharedLinear, keep_largest_grid

TRANSLATION = Translation()
each_layer = pytest.mark.parametrize("case", LAYERS, ids=str)

CONVS = [case for case in LAYERS if case.kind == "conv"]
SYMMETRIC = [case for case in CONVS if case.stride == (1, 1) and case.grid != (1, 1)]
STRIDED = [
    ((4, 6), (2, 2)),
    ((4, 4), (1, 2)),
    ((6, 4), (2, 1)),
    ((1, 8), (1, 2)),
    ((2, 2), (2, 2)),
]
each_strided = pytest.mark.parametrize(("grid", "stride"), STRIDED, ids=str)


def shifts(grid):
    return [g for g in product(range(grid[0]), range(grid[1])) if g != (0, 0)]


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ── the map


@each_layer
def test_against_the_slow_loop(case):
    pathway, inputs = case.pathway(), case.inputs()
    expected = slow_pathway(pathway, case, inputs)
    torch.testing.assert_close(pathway(inputs), expected, atol=1e-10, rtol=1e-10)
    assert pathway(inputs).shape == (3, case.channels[1], *case.output_grid)


@each_layer
def test_float32(case):
    pathway, inputs = case.pathway(torch.float32), case.inputs(dtype=torch.float32)
    assert pathway(inputs).dtype == torch.float32
    expected = slow_pathway(copy.deepcopy(pathway).double(), case, inputs.double())
    torch.testing.assert_close(pathway(inputs), expected.float(), atol=1e-5, rtol=1e-4)


@each_layer
def test_number_of_weights(case):
    (c, d), x, y = case.channels, case.grid[0] * case.grid[1], case.output_grid
    taps = (1 if case.grid[0] == 1 else 3) * (1 if case.grid[1] == 1 else 3)
    y = y[0] * y[1]
    weights = {"fc": c * d * x * y, "factored_fc": c * d * (x + y), "conv": c * d * taps}
    biases = {"fc": d * y, "factored_fc": d + y, "conv": d}
    found = dict(case.pathway().named_parameters())
    n_biases = sum(p.numel() for name, p in found.items() if name.endswith("bias"))
    assert n_biases == biases[case.kind]
    assert sum(p.numel() for p in found.values()) == weights[case.kind] + n_biases


@each_layer
def test_gradients(case):
    pathway, inputs = case.pathway(), case.inputs(n=2).requires_grad_()
    values = {name: p.detach().requires_grad_() for name, p in pathway.named_parameters()}

    def f(x, *parameters):
        return torch.func.functional_call(pathway, dict(zip(values, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (inputs, *values.values()), fast_mode=True)


@each_layer
def test_tokens_are_the_contract(case):
    """out[n, s, b] = W[b] @ inp[n, s, b] + bias for every map that the pathway holds."""
    pathway, seen = case.pathway(), {}
    for name, module in pathway.named_modules():
        if isinstance(module, SharedLinear):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
    pathway(case.inputs())
    factors = {name: pathway.get_submodule(name) for name in seen}
    assert {f"{name}.weight".lstrip(".") for name in seen} == set(pathway.factor_names)
    for name, layer in factors.items():
        inp, out = seen[name]
        tokens, result = layer.input_tokens(inp), layer.output_tokens(out)
        blocks, d_out, d_in = layer.weight.shape
        assert tokens.shape[0] == result.shape[0] == 3
        assert tokens.shape[1] == result.shape[1]
        assert tokens.shape[2:] == (blocks, d_in)
        assert result.shape[2:] == (blocks, d_out)
        for n, s, b in product(range(3), range(tokens.shape[1]), range(blocks)):
            expected = layer.weight[b] @ tokens[n, s, b] + layer.bias
            torch.testing.assert_close(result[n, s, b], expected, atol=1e-12, rtol=1e-10)


@each_layer
def test_shared_positions_are_the_kept_ones(case):
    pathway, inputs = case.pathway(), case.inputs()
    if case.kind == "conv":
        n_kept = case.output_grid[0] * case.output_grid[1]
        assert pathway.input_tokens(inputs).shape[1] == n_kept
    elif case.kind == "fc":
        assert pathway.input_tokens(inputs).shape[1:3] == (1, 1)
    else:
        assert pathway.U.input_tokens(inputs).shape[1:3] == (1, case.channels[0])
        assert pathway.V.input_tokens(pathway.U(inputs)).shape[1:3] == (1, case.channels[1])


@each_layer
def test_silence_is_exactly_zero_and_can_wake(case):
    pathway, inputs = case.pathway(), case.inputs()
    pathway.silence()
    outputs = pathway(inputs)
    assert (outputs == 0).all()
    (outputs * torch.randn_like(outputs)).sum().backward()
    first = pathway.get_parameter(pathway.factor_names[0])
    assert (first == 0).all()
    assert first.grad.abs().min() > 0
    for name in pathway.factor_names[1:]:
        assert pathway.get_parameter(name).abs().min() > 0


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["conv", "fc", "factored_fc"])
def test_reset_draws_the_stated_start(kind, stride):
    case = LayerCase(kind, (8, 16), (8, 8), stride)
    pathway = case.pathway()
    pathway.reset()
    variances = {
        "conv": {"weight": 2 / (8 * 9)},
        "fc": {"weight": 2 / (8 * 64)},
        "factored_fc": {"U.weight": 1 / 64, "V.weight": 1 / 8},
    }[kind]
    for name, variance in variances.items():
        weights = pathway.get_parameter(name).detach()
        assert weights.abs().max() <= (3 * variance) ** 0.5
        assert weights.square().mean().item() == pytest.approx(variance, rel=0.1)
    assert all((p == 0).all() for name, p in pathway.named_parameters() if name.endswith("bias"))
    outputs = pathway(case.inputs(n=200))
    # Kaiming's gain of 2 makes good what ReLU takes; U and V have none.
    gain = 1.0 if kind == "factored_fc" else 2.0
    assert outputs.square().mean().item() == pytest.approx(gain, rel=0.25)


# ── equivariance


@pytest.mark.parametrize("case", SYMMETRIC, ids=str)
def test_convolution_commutes_with_every_shift(case):
    pathway, inputs = case.pathway(), case.inputs()
    for g in shifts(case.grid):
        moved = pathway(TRANSLATION.act(inputs, g))
        assert error(moved, TRANSLATION.act(pathway(inputs), g)) < 1e-10


def compatible_error(layer, inputs, g, stride):
    """Error of each sample at the best of the compatible shifts of its output."""
    moved, outputs = layer(TRANSLATION.act(inputs, g)), layer(inputs)
    candidates = [
        (moved - TRANSLATION.act(outputs, h)).flatten(1).norm(dim=1)
        for h in TRANSLATION.output_elements(g, stride)
    ]
    return (torch.stack(candidates).amin(0) / outputs.flatten(1).norm(dim=1)).max().item()


def conv_sum(grid, stride):
    paths = {name: Conv(2, 3, grid, stride) for name in "ab"}
    return randomise(PathwaySum(paths, stride, 0.5)).double()


@each_strided
def test_sum_of_convolutions_commutes_up_to_a_compatible_shift(grid, stride):
    layer, inputs = conv_sum(grid, stride), torch.randn(6, 2, *grid, dtype=torch.float64)
    for g in shifts(grid):
        assert compatible_error(layer, inputs, g, stride) < 1e-10


def test_sum_of_convolutions_commutes_at_stride_1():
    layer, inputs = conv_sum((3, 5), (1, 1)), torch.randn(6, 2, 3, 5, dtype=torch.float64)
    for g in shifts((3, 5)):
        moved = layer(TRANSLATION.act(inputs, g))
        assert error(moved, TRANSLATION.act(layer(inputs), g)) < 1e-10


@each_strided
@pytest.mark.parametrize("kind", [FC, FactoredFC])
def test_free_layers_do_not_commute(kind, grid, stride):
    layer = PathwaySum(
        {"free": kind(2, 3, grid, stride), "conv": Conv(2, 3, grid, stride)}, stride, 1.0
    )
    layer = randomise(layer).double()
    inputs = torch.randn(6, 2, *grid, dtype=torch.float64)
    for g in shifts(grid):
        assert compatible_error(layer, inputs, g, stride) > 0.1


# ── the grid that is kept


@each_strided
def test_grid_is_chosen_for_each_sample_by_its_norm(grid, stride):
    inputs = torch.randn(20, 2, *grid, dtype=torch.float64)
    rolled = keep_largest_grid(inputs, stride)
    expected = torch.stack([roll_to_largest_grid(x, stride) for x in inputs])
    assert torch.equal(rolled, expected)
    moved = (rolled != inputs).flatten(1).any(1)
    assert moved.any()
    assert not moved.all()


def test_ties_go_to_the_first_grid():
    constant = torch.ones(2, 3, 4, 4)
    constant[:, :, 1::2, 1::2] *= -1
    assert torch.equal(keep_largest_grid(constant, (2, 2)), constant)
    constant[:, :, 0::2, 0::2] = 0
    expected = torch.roll(constant, -1, 3)
    assert torch.equal(keep_largest_grid(constant, (2, 2)), expected)


def test_grid_of_a_row_does_not_depend_on_its_mates():
    layer, rows = conv_sum((4, 4), (2, 2)), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    # A mate that is far larger, at each of the grids in turn.
    for i, j in product((0, 1), (0, 1)):
        mate = torch.zeros_like(rows)
        mate[:, :, i::2, j::2] = 100.0
        together = layer(torch.cat([mate, rows, mate]))
        torch.testing.assert_close(together[1:2], layer(rows), atol=1e-12, rtol=1e-12)


def test_gradient_flows_through_the_roll():
    layer = conv_sum((4, 4), (2, 2))
    inputs = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (inputs,))


# ── the sum


def three_paths(stride=(2, 2), grid=(4, 6), scale=0.3):
    kinds = {"conv": Conv, "free": FC, "rank": FactoredFC}
    paths = {name: kind(2, 3, grid, stride) for name, kind in kinds.items()}
    return randomise(PathwaySum(paths, stride, scale)).double()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)], ids=str)
def test_sum_is_the_scaled_sum_of_its_slow_pathways(stride):
    layer, inputs = three_paths(stride), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    rolled = torch.stack([roll_to_largest_grid(x, stride) for x in inputs])
    seen = {"conv": ("conv", rolled), "free": ("fc", inputs), "rank": ("factored_fc", inputs)}
    expected = {
        name: 0.3
        * slow_pathway(layer.get_submodule(name), LayerCase(kind, (2, 3), (4, 6), stride), x)
        for name, (kind, x) in seen.items()
    }
    torch.testing.assert_close(layer(inputs), sum(expected.values()), atol=1e-10, rtol=1e-10)
    outputs = layer.outputs(inputs)
    assert list(outputs) == list(expected)
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], atol=1e-10, rtol=1e-10)


def test_pathways_by_name_on_or_off():
    layer = three_paths()
    layer.enabled["free"] = False
    assert layer.pathways == dict(layer.named_children())
    assert list(layer.pathways) == ["conv", "free", "rank"]


def test_a_pathway_that_is_off_is_not_computed():
    layer, inputs = three_paths(), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    everything = layer.outputs(inputs)
    layer.enabled["free"] = False
    with torch.no_grad():
        layer.get_submodule("free").weight.fill_(torch.nan)
    assert set(layer.outputs(inputs)) == {"conv", "rank"}
    torch.testing.assert_close(layer(inputs), everything["conv"] + everything["rank"])
    layer.enabled["conv"] = False
    torch.testing.assert_close(layer(inputs), everything["rank"])


def test_what_is_off_travels_with_the_weights(tmp_path):
    layer, inputs = three_paths(), torch.randn(5, 2, 4, 6, dtype=torch.float64)
    layer.enabled["rank"] = False
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = three_paths()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert other.enabled == layer.enabled
    assert torch.equal(other(inputs), layer(inputs))


def test_the_state_is_a_copy():
    layer, others = three_paths(), [three_paths(), three_paths()]
    state = layer.state_dict()
    layer.enabled["rank"] = False
    for other in others:
        other.load_state_dict(state)
        assert all(other.enabled.values())
        other.enabled["conv"] = False
