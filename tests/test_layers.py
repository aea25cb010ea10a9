"""Layers against slow loops; the contract of tokens; the start; anchors; readouts."""

import copy
import math
from itertools import product

import pytest
import torch
from cases import KINDS, LAYERS, P2, LayerCase, randomise
from references import interpolation_of, slow_pathway
from torch.utils.flop_counter import FlopCounterMode

from sklearn_softeq import anchors
from sklearn_softeq.anchors import Interpolation
from sklearn_softeq.groups import P1, P4, P4M, PM
from sklearn_softeq.layers import (
    FC,
    Conv,
    FactoredFC,
    FactorU,
    FactorV,
    GroupConv,
    LayerSpec,
    PooledFC,
    SharedLinear,
    SparseConv,
    SparseFC,
    SparseU,
    SparseV,
    outer,
    strided,
)

each_layer = pytest.mark.parametrize("case", LAYERS, ids=str)

SPARSE = [case for case in LAYERS if case.kind.startswith("sparse")]
each_sparse_layer = pytest.mark.parametrize("case", SPARSE, ids=str)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def maps(pathway, inputs):
    """The maps of a pathway by name, with what they see and what they say."""
    seen = {}
    for name, module in pathway.named_modules():
        if isinstance(module, SharedLinear):
            module.register_forward_hook(
                lambda m, i, o, name=name: seen.update({name: (m, i[0].detach(), o.detach())})
            )
    pathway(inputs)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_pathway_has_the_group_of_its_kind(kind):
    group = KINDS[kind].group
    assert LayerCase(kind, (1, 1), (2, 2), (1, 1), P1, group or P1).pathway().group == group


# ── the map


@each_layer
def test_against_the_slow_loop(case):
    pathway, inputs = case.pathway(), case.inputs()
    expected = slow_pathway(pathway, case, inputs)
    torch.testing.assert_close(pathway(inputs), expected, atol=1e-10, rtol=1e-10)
    assert pathway(inputs).shape == (3, case.n_channels[1], *case.output_grid)
    assert strided(case.grid, case.stride) == case.output_grid


@each_layer
def test_float32(case):
    pathway, inputs = case.pathway(torch.float32), case.inputs(dtype=torch.float32)
    assert pathway(inputs).dtype == torch.float32
    expected = slow_pathway(copy.deepcopy(pathway).double(), case, inputs.double())
    torch.testing.assert_close(pathway(inputs), expected.float(), atol=1e-5, rtol=1e-4)


def taps(grid):
    return math.prod(1 if side == 1 else 3 for side in grid)


def anchors_of(n_pixels, fraction=0.5):
    """Half of the pixels or taps, rounded, and at least one."""
    return max(1, round(fraction * n_pixels))


def n_weights(case):
    """Weights and biases by the table of the method; an image has one orientation."""
    (c, d), x, y = case.n_channels, math.prod(case.grid), math.prod(case.output_grid)
    k, group = taps(case.grid), KINDS[case.kind].group or P1
    of_pixels, of_taps = (0.5, 7 / 9 if case.alone else 0.5)
    if case.anchor_fraction is not None:
        of_pixels = of_taps = case.anchor_fraction
    found = {
        "fc": (c * d * x * y, d * y),
        "factored_fc": (c * d * (x + y), d + y),
        "sparse_fc": (c * d * (anchors_of(x, of_pixels) + anchors_of(y, of_pixels)), d),
        "conv": (c * d * k, d),
        "sparse_conv": (c * d * anchors_of(k, of_taps), d),
    }
    n_filters = d // group.order  # of a group convolution: one for all orientations
    return found.get(case.kind, (c * n_filters * k, n_filters))


@each_layer
def test_number_of_weights(case):
    found = {name: p.numel() for name, p in case.pathway().named_parameters()}
    n_biases = sum(n for name, n in found.items() if name.endswith("bias"))
    assert (sum(found.values()) - n_biases, n_biases) == n_weights(case)


def test_number_of_weights_of_a_group_convolution():
    # C·D·G·k² and D; C·D·k² where an image is lifted
    for group in (P2, P4, P4M, PM):
        later = LayerCase(f"{group.name}_conv", (5, 7), (4, 4), (1, 1), group, group)
        first = LayerCase(f"{group.name}_conv", (5, 7), (4, 4), (1, 1), P1, group)
        assert n_weights(later) == (5 * 7 * group.order * 9, 7)
        assert n_weights(first) == (5 * 7 * 9, 7)


@pytest.mark.parametrize("group", [P2, P4, P4M, PM], ids=lambda group: group.name)
def test_orientations_are_those_of_the_convolution_unless_told(group):
    case = LayerCase(f"{group.name}_conv", (2, 1), (4, 4), (1, 1), group, group)
    layer = randomise(GroupConv(*case.n_channels, (4, 4), group=group)).double()
    inputs = case.inputs()
    expected = slow_pathway(layer, case, inputs)
    torch.testing.assert_close(layer(inputs), expected, atol=1e-10, rtol=1e-10)


@each_layer
def test_gradients(case):
    pathway, inputs = case.pathway(), case.inputs(n=2).requires_grad_()
    values = {name: p.detach().requires_grad_() for name, p in pathway.named_parameters()}

    def f(x, *parameters):
        return torch.func.functional_call(pathway, dict(zip(values, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (inputs, *values.values()), fast_mode=True)


# ── the contract of tokens


def pre_activations(layer, inputs):
    """W[b] inp[n, s, b] + bias, spelled out."""
    tokens = layer.input_tokens(inputs)
    out = tokens.new_empty(*tokens.shape[:3], layer.weight.shape[1])
    for n, s, b in product(*map(range, tokens.shape[:3])):
        out[n, s, b] = layer.weight.detach()[b] @ tokens[n, s, b]
    return out if layer.bias is None else out + layer.bias.detach()


@each_layer
def test_tokens_are_the_contract(case):
    """Σ grads · forward(x) = Σ gradient_tokens(grads) · (W input_tokens(x) + bias)."""
    pathway = case.pathway()
    seen = maps(pathway, case.inputs())
    assert {f"{name}.weight".lstrip(".") for name in seen} == set(pathway.factor_names)
    for layer, inp, out in seen.values():
        blocks, d_out, d_in = layer.weight.shape
        expected = pre_activations(layer, inp)
        assert layer.input_tokens(inp).shape[2:] == (blocks, d_in)
        assert expected.shape[2:] == (blocks, d_out)
        for _ in range(3):
            grads = torch.randn_like(out)
            gathered = layer.gradient_tokens(grads)
            assert gathered.shape == expected.shape
            found = (gathered * expected).sum()
            torch.testing.assert_close(found, (grads * out).sum(), atol=1e-10, rtol=1e-10)


@each_layer
def test_outputs_are_those_of_the_maps_in_another_order(case):
    # Where the adjoint of forward's last step is its inverse: nothing is interpolated after W.
    for layer, inp, out in maps(case.pathway(), case.inputs()).values():
        if not isinstance(layer, SparseV):
            result = layer.gradient_tokens(out)
            assert result.numel() == out.numel()
            torch.testing.assert_close(result, pre_activations(layer, inp), atol=1e-12, rtol=1e-10)


@each_layer
def test_gram_is_that_of_the_tokens(case):
    for layer, inp, _ in maps(case.pathway(), case.inputs()).values():
        tokens = layer.input_tokens(inp)
        for root in (None, torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)):
            weights = torch.ones(3).double() if root is None else root.square()
            expected = torch.einsum("n,nsbi,nsbj->bij", weights, tokens, tokens)
            found = layer.input_gram(inp, root)
            assert (found is not None) == isinstance(layer, Conv)
            if found is not None:
                torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@each_layer
def test_gradient_gram_is_that_of_the_tokens(case):
    for layer, _, out in maps(case.pathway(), case.inputs()).values():
        grads = torch.randn_like(out)
        tokens = layer.gradient_tokens(grads)
        expected = torch.einsum("nsbi,nsbj->bij", tokens, tokens)
        found = layer.gradient_gram(grads)
        assert (found is not None) == isinstance(layer, Conv)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_outer_is_a_sum_over_rows_and_positions():
    left, right = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6)
    expected = sum(
        left[n, s, :, :, None] * right[n, s, :, None] for n, s in product(range(2), range(3))
    )
    torch.testing.assert_close(outer(left, right), expected)


@each_layer
def test_shared_positions_are_the_kept_ones(case):
    pathway, n_kept = case.pathway(), math.prod(case.output_grid)
    found = {
        name: layer.input_tokens(inp).shape[1:3]
        for name, (layer, inp, _) in maps(pathway, case.inputs()).items()
    }
    if pathway.group is not None:
        assert found == {"": (pathway.group.order * n_kept, 1)}
    elif case.kind == "fc":
        assert found == {"": (1, 1)}
    else:
        assert found == {"U": (1, case.n_channels[0]), "V": (1, case.n_channels[1])}


def test_a_map_without_a_bias():
    assert SparseFC(2, 3, (2, 4)).V.bias is None
    for layer in (SparseFC(2, 3, (2, 4)).U, FactorU(2, 8, 3), FactorV(3, 2, 8)):
        assert layer.bias.shape == (layer.weight.shape[1],)


@each_layer
def test_only_maps_at_anchors_have_tangents(case):
    for layer, inp, out in maps(case.pathway(), case.inputs()).values():
        has_anchors = case.kind.startswith("sparse")
        assert (layer.interpolation is not None) == has_anchors
        assert (layer.input_tangent(inp) is not None) == isinstance(layer, SparseU | SparseConv)
        assert (layer.gradient_tangent(out) is not None) == isinstance(layer, SparseV)


# ── start


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


# Kaiming's gain of 2 makes good what ReLU takes; U and V have none.
STARTS = {
    "conv": ({"weight": 2 / (8 * 9)}, 2.0),
    "p2_conv": ({"weight": 2 / (8 * 9)}, 2.0),
    "p4_conv": ({"weight": 2 / (8 * 9)}, 2.0),
    "p4m_conv": ({"weight": 2 / (8 * 9)}, 2.0),
    "pm_conv": ({"weight": 2 / (8 * 9)}, 2.0),
    "fc": ({"weight": 2 / (8 * 64)}, 2.0),
    "factored_fc": ({"U.weight": 1 / 64, "V.weight": 1 / 8}, 1.0),
    # at the pixels or taps; a least-squares fit keeps 7 of the 9 directions of white noise
    "sparse_conv": ({"": 7 / 9 * 2 / (8 * 9)}, 7 / 9 * 2.0),
    "sparse_fc": ({"U": 1 / 64, "V": 1 / 8}, 1.0),
}


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reset_draws_the_stated_start(kind, stride):
    group = KINDS[kind].group or P1
    channels = (8 // group.order, 32 // group.order)
    case = LayerCase(kind, channels, (8, 8), stride, group, group)
    pathway = case.pathway()
    pathway.reset()
    variances, gain = STARTS[kind]
    for name, variance in variances.items():
        if kind.startswith("sparse"):
            weights = at_pixels(pathway.get_submodule(name), case)
        else:
            weights = pathway.get_parameter(name).detach()
            assert weights.abs().max() <= (3 * variance) ** 0.5
        assert weights.square().mean().item() == pytest.approx(variance, rel=0.12)
        assert weights.mean().abs() < 0.2 * variance**0.5
    assert all((p == 0).all() for name, p in pathway.named_parameters() if name.endswith("bias"))
    outputs = pathway(case.inputs(n=200))
    assert outputs.square().mean().item() == pytest.approx(gain, rel=0.25)


def at_pixels(layer, case):
    """Weights at the pixels or taps that are interpolated from those at anchors."""
    grids = {SparseU: case.grid, SparseV: case.output_grid, SparseConv: (3, 3)}
    weights = layer.weight.detach()
    weights = weights.transpose(1, 2) if isinstance(layer, SparseV) else weights
    n_anchors = layer.interpolation.n_anchors
    psi = interpolation_of(layer, grids[type(layer)], n_anchors)
    return weights.reshape(-1, n_anchors) @ psi


@pytest.mark.parametrize("kind", KINDS)
def test_reset_follows_its_generator_alone(kind):
    pathway = LayerCase(kind, (2, 2), (4, 4), (1, 1), *[KINDS[kind].group or P1] * 2).pathway()
    found, state = [], torch.get_rng_state()
    for seed in (1, 1, 2):
        pathway.reset(torch.Generator().manual_seed(seed))
        found.append([p.detach().clone() for p in pathway.parameters()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True) if a.any())


# ── anchors


@each_sparse_layer
@pytest.mark.parametrize("log_omega", [0.0, 0.5])
def test_tangents_against_central_differences(case, log_omega):
    pathway, step = case.pathway(), 1e-5
    for layer, inp, out in maps(pathway, case.inputs()).values():
        for tokens, tangent, x in (
            (layer.input_tokens, layer.input_tangent, inp),
            (layer.gradient_tokens, layer.gradient_tangent, out),
        ):
            either = []
            for value in (log_omega + step, log_omega - step):
                layer.interpolation.set_log_omega(value)
                either.append(tokens(x))
            layer.interpolation.set_log_omega(log_omega)
            expected = (either[0] - either[1]) / (2 * step)
            found = tangent(x)
            if found is None:
                assert (expected == 0).all()
            else:
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("log_omega", [-0.5, 0.6])
@each_sparse_layer
def test_against_the_slow_loop_at_another_lengthscale(case, log_omega):
    pathway, inputs = case.pathway(), case.inputs()
    before = pathway(inputs)
    for interpolation in {m for m in pathway.modules() if isinstance(m, Interpolation)}:
        interpolation.set_log_omega(log_omega)
    expected = slow_pathway(pathway, case, inputs)
    torch.testing.assert_close(pathway(inputs), expected, atol=1e-10, rtol=1e-10)
    assert taps(case.grid) == 1 or error(pathway(inputs), before) > 1e-4


ROWS = (1, 2, 5, 200)
FACTORS = [((4, 4), (1, 2)), ((4, 4), (8, 8)), ((2, 6), (5, 1)), ((3, 3), (4, 9))]


def costs(n, grid, channels):
    """Products of U and of V if pixels are projected, and if interpolated weights are formed."""
    (c, d), x, m = channels, math.prod(grid), anchors_of(math.prod(grid))
    u = n * c * m * (x + d), d * c * x * (m + n)
    v = n * d * m * (c + x), c * d * x * (m + n)
    return u, v


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("grid", "channels"), FACTORS, ids=str)
def test_both_orders_are_the_same_and_the_cheaper_one_is_taken(n, grid, channels):
    layer = randomise(SparseFC(*channels, grid)).double()
    inputs = torch.randn(n, channels[0], *grid, dtype=torch.float64)
    with FlopCounterMode(display=False) as of_u:
        hidden = layer.U(inputs)
    with FlopCounterMode(display=False) as of_v:
        outputs = layer.V(hidden)
    cheaper = [2 * min(either) for either in costs(n, grid, channels)]
    assert [of_u.get_total_flops(), of_v.get_total_flops()] == cheaper
    # A single row may take the other order.
    alone = torch.cat([layer.U(row[None]) for row in inputs], 1)
    torch.testing.assert_close(hidden, alone, atol=1e-12, rtol=1e-10)
    alone = torch.cat([layer.V(hidden[:, [i]]) for i in range(n)], 1)
    torch.testing.assert_close(outputs, alone, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("grid", "channels"), FACTORS, ids=str)
def test_predictions_have_the_order_that_is_cheaper_for_many_rows(grid, channels):
    layer, (c, d) = randomise(SparseFC(*channels, grid)).double(), channels
    for factor, shape, (project, form) in zip(
        (layer.U, layer.V),
        (lambda n: (n, c, *grid), lambda n: (c, n, d)),
        costs(10_000, grid, channels),
        strict=True,
    ):
        for n in ROWS:
            products = []
            for rows in (n, 2 * n):
                inputs = torch.randn(shape(rows), dtype=torch.float64)
                with FlopCounterMode(display=False) as counter:
                    found = factor.eval()(inputs)
                products.append(counter.get_total_flops())
                torch.testing.assert_close(found, factor.train()(inputs), atol=1e-12, rtol=1e-10)
            of_weights = 2 * products[0] - products[1]  # whatever the number of rows
            assert (of_weights == 0) == (project <= form)


def test_both_orders_occur():
    found = {n: [costs(n, *factor) for factor in FACTORS] for n in ROWS}
    for factor in (0, 1):
        taken = {pair[factor][0] < pair[factor][1] for pairs in found.values() for pair in pairs}
        assert taken == {True, False}


def fully_sparse(grid):
    """Sparse layers with an anchor on each pixel, and the dense ones that they stand for."""
    conv, free = randomise(Conv(2, 3, grid)).double(), randomise(FactoredFC(2, 3, grid)).double()
    with torch.no_grad():
        free.V.bias.zero_()  # which the sparse layer lacks
    sparse = SparseConv(2, 3, grid, anchor_fraction=1.0), SparseFC(2, 3, grid, anchor_fraction=1.0)
    sparse = [layer.double() for layer in sparse]
    for layer, dense in zip(sparse, (conv, free), strict=True):
        layer.load_state_dict(dense.state_dict(), strict=False)
    return zip(sparse, (conv, free), strict=True)


def test_an_anchor_on_each_pixel_gives_the_dense_layer(monkeypatch):
    inputs, errors = torch.randn(5, 2, 4, 4, dtype=torch.float64), []
    for noise in (0.1, 0.01, 1e-4):
        monkeypatch.setattr(anchors, "NOISE", noise)
        errors.append(
            [error(sparse(inputs), dense(inputs)) for sparse, dense in fully_sparse((4, 4))]
        )
    for coarse, usual, fine in zip(*errors, strict=True):
        assert usual < 0.05
        assert fine < 1e-3 * usual < 1e-4 * coarse


def test_dense_weights_are_fitted_exactly_where_each_pixel_has_an_anchor():
    inputs = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    (conv, dense_conv), (free, dense_free) = fully_sparse((4, 4))
    fits = [
        (conv, dense_conv.weight.unflatten(2, (2, 9)).detach()),
        (free.U, dense_free.U.weight.detach()),
        (free.V, dense_free.V.weight.detach().transpose(1, 2)),
    ]
    for layer, dense in fits:
        fitted = layer.interpolation.fit(dense)
        fitted = fitted.transpose(1, 2) if layer is free.V else fitted
        layer.load_state_dict({"weight": fitted.reshape(layer.weight.shape)}, strict=False)
    assert error(conv(inputs), dense_conv(inputs)) < 1e-9
    assert error(free(inputs), dense_free(inputs)) < 1e-9


def test_a_convolution_has_more_anchors_where_it_is_alone():
    spec = {"in_channels": 2, "out_channels": 3, "grid": (4, 4)}
    for extra, expected in (
        ({"alone": True}, 7),
        ({"alone": False}, 4),
        ({"alone": True, "anchor_fraction": 0.3}, 3),
        ({"alone": False, "anchor_fraction": 1.0}, 9),
    ):
        layer = SparseConv.from_spec(LayerSpec(**spec, **extra))
        assert layer.interpolation.n_anchors == expected
        assert layer.weight.shape == (1, 3, 2 * expected)


# ── readouts


def test_pooled_readout_takes_the_maximum_over_orientations():
    layer = randomise(PooledFC(12, 5, P4)).double()
    features = torch.randn(6, 12, 1, 1, dtype=torch.float64)
    pooled = [[max(row[4 * c : 4 * c + 4, 0, 0]) for c in range(3)] for row in features]
    expected = torch.tensor(pooled, dtype=torch.float64) @ layer.weight[0].T + layer.bias
    torch.testing.assert_close(layer(features).flatten(1), expected)
    torch.testing.assert_close(
        layer.gradient_tokens(layer(features)), pre_activations(layer, features)
    )
    assert layer.weight.shape == (1, 5, 3)
    made = PooledFC.from_spec(LayerSpec(12, 5, (1, 1), in_group=P4))
    assert made.weight.shape == layer.weight.shape
    assert made.group == layer.group == P4


def test_of_orientations_that_tie_but_for_rounding_the_first_is_read():
    layer = randomise(PooledFC(8, 3, P4)).double()
    one = 1 - 1e-15  # below the largest by a few last bits, and still one of them
    rows = [[0.5, one, 1, 0, -2, -2, -2, -2], [1, one, 1, 1, -3, -1 - 1e-15, -1, -4]]
    rows += [[0, 0, 0, 0, 0.2, 0.3, 0.3 - 1e-9, 0.1]]
    features = torch.tensor(rows).double()[:, :, None, None].requires_grad_()
    layer(features).sum().backward()
    first = [[1, 4], [0, 5], [0, 5]]
    assert [row.flatten().nonzero().flatten().tolist() for row in features.grad] == first


@pytest.mark.parametrize("group", [P2, P4, P4M, PM], ids=lambda group: group.name)
def test_pooled_readout_is_invariant(group):
    layer = randomise(PooledFC(3 * group.order, 5, group)).double()
    features = torch.randn(6, 3 * group.order, 1, 1, dtype=torch.float64)
    free = randomise(FC(3 * group.order, 5, (1, 1))).double()
    for g in group.elements((1, 1)):
        moved = group.act(features, g, group)
        assert torch.equal(layer(moved), layer(features))
        assert error(free(moved), free(features)) > 0.1
