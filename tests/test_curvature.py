"""Kronecker factors against literal loops, and against the full GGN where KFAC is exact."""

from dataclasses import replace

import pytest
import torch
from cases import ALL_PATHWAYS, APPROXIMATE, EXACT, NetworkCase, chain, randomise
from references import ggn, kfac_expand
from torch import nn

from sklearn_softeq import curvature
from sklearn_softeq.curvature import Estimator, kronecker_factors
from sklearn_softeq.kronecker import Kronecker
from sklearn_softeq.kronecker import dense as as_matrix
from sklearn_softeq.layers import FC, Conv
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.networks import build_network

each_exact = pytest.mark.parametrize("case", EXACT, ids=str)
each_approximate = pytest.mark.parametrize("case", APPROXIMATE, ids=str)
each_case = pytest.mark.parametrize("case", EXACT + APPROXIMATE, ids=str)

BY_NAME = {case.name: case for case in EXACT + APPROXIMATE}


def close(found, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=1e-10 * max(scale, 1e-6), rtol=1e-10)


def dense(factors):
    return {name: kron.to_dense() for name, kron in factors.items()}


def all_close(found, expected):
    assert list(found) == list(expected)
    for name, matrix in dense(found).items():
        close(matrix, expected[name].to_dense())


def setting(case):
    network = case.network()
    return network, case.batch(network)


def as_matrices(kron):
    """The same with factors that are given by their roots multiplied out."""
    return replace(kron, left=as_matrix(kron.left), right=as_matrix(kron.right))


def exact_factors(network, likelihood, *batches, **options):
    found = kronecker_factors(network, likelihood, batches, **options).factors
    return {name: as_matrices(kron) for name, kron in found.items()}


def rademacher(samples):
    """Sketches; none of them stands for all columns."""
    return Estimator("rademacher", samples) if samples else Estimator()


# ── against the definitions


@each_case
def test_factors_against_loops(case):
    network, batch = setting(case)
    inputs, _, weights = batch
    found = exact_factors(network, case.likelihood, batch)
    expected = kfac_expand(network, case.likelihood, inputs, weights)
    assert set(found) == {name for name, _ in network.named_parameters()}
    for name, (left, right, bias) in expected.items():
        weight = found[f"{name}.weight"]
        close(weight.left, left)
        close(weight.right, right / weights.sum())
        assert (f"{name}.bias" in found) == (bias is not None)
        if bias is not None:
            close(found[f"{name}.bias"].to_dense(), bias)
        assert right.abs().max() > 1e-6, "a dead layer tests nothing"


@each_case
def test_biases_are_exact_blocks_of_the_ggn(case):
    network, batch = setting(case)
    found = exact_factors(network, case.likelihood, batch)
    biases = [name for name in found if name.endswith("bias")]
    matrix, places = ggn(network, case.likelihood, batch[0], batch[2], biases)
    for name in biases:
        close(found[name].to_dense(), matrix[places[name], places[name]])


def block_errors(case):
    """Relative error of each block A_b ⊗ Γ_b / N of each weight against the full GGN's."""
    network, batch = setting(case)
    found = exact_factors(network, case.likelihood, batch)
    matrix, places = ggn(network, case.likelihood, batch[0], batch[2])
    errors = {}
    for name, kron in found.items():
        block = matrix[places[name], places[name]]
        side = len(block) // len(kron.left)
        for b in range(len(kron.left)):
            expected = block[b * side : (b + 1) * side, b * side : (b + 1) * side]
            one = Kronecker(kron.left[b : b + 1], kron.right[b : b + 1]).to_dense()
            errors[name, b] = ((one - expected).norm() / expected.norm()).item()
    return errors


@each_exact
def test_kfac_is_exact_here(case):
    errors = block_errors(case)
    assert max(errors.values()) < 1e-10


@each_approximate
def test_kfac_is_an_approximation_here(case):
    # Otherwise the cases above would be exact for want of anything that could go wrong.
    assert max(block_errors(case).values()) > 1e-3


def test_factors_of_one_block_maps_have_the_trace_of_no_other_form():
    # Σ_s inp inpᵀ ⊗ Σ_s E[g gᵀ] / S: with equal tokens everywhere it is the block itself.
    layer = chain(Conv(1, 1, (1, 4))).double()
    inputs = torch.full((1, 1, 1, 4), 2.0, dtype=torch.float64)
    found = exact_factors(layer, Gaussian(0.5), (inputs, torch.zeros(1, 4), torch.ones(1)))
    close(found["layer0.weight"].left[0], torch.full((3, 3), 16.0, dtype=torch.float64))
    close(found["layer0.weight"].right[0], torch.full((1, 1), 2.0, dtype=torch.float64))
    close(found["layer0.bias"].to_dense(), torch.full((1, 1), 8.0, dtype=torch.float64))


def test_columns_of_other_blocks_stay_apart():
    case = BY_NAME["all"]
    found = exact_factors(case.network(), case.likelihood, case.batch(case.network()))
    c, d = 3, 2
    assert found["blocks.0.factored_fc.U.weight"].left.shape == (c, 8, 8)
    assert found["blocks.0.factored_fc.U.weight"].right.shape == (c, d, d)
    assert found["blocks.0.factored_fc.V.weight"].left.shape == (d, c, c)


# ── weights and parts of the data

WEIGHTED = [
    replace(BY_NAME[name], n=4)
    for name in ("all", "conv", "all-gaussian", "one-factored-gaussian", "sparse", "group-readout")
]
each_weighted = pytest.mark.parametrize("case", WEIGHTED, ids=str)


@each_weighted
def test_a_weight_counts_repetitions(case):
    network, (inputs, targets, _) = setting(case)
    repeats = torch.tensor([2, 1, 0, 3])
    twice = (inputs.repeat_interleave(repeats, 0), targets.repeat_interleave(repeats, 0))
    repeated = kronecker_factors(
        network, case.likelihood, [(*twice, torch.ones(6, dtype=torch.float64))]
    )
    weighted = kronecker_factors(network, case.likelihood, [(inputs, targets, repeats.double())])
    all_close(weighted.factors, repeated.factors)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-12)


@each_weighted
def test_several_batches_are_one(case):
    network, (inputs, targets, weights) = setting(case)
    whole = kronecker_factors(network, case.likelihood, [(inputs, targets, weights)])
    parts = zip(*(t.split([1, 2, 1]) for t in (inputs, targets, weights)), strict=True)
    found = kronecker_factors(network, case.likelihood, parts)
    all_close(found.factors, whole.factors)
    assert found.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-12)


@each_weighted
def test_a_part_stands_for_the_whole(case):
    network, batch = setting(case)
    part = kronecker_factors(network, case.likelihood, [batch])
    scale = 1000.0 / batch[2].sum().item()
    found = kronecker_factors(network, case.likelihood, [batch], total_weight=1000.0)
    matrices = {name: as_matrices(kron) for name, kron in part.factors.items()}
    scaled = {name: Kronecker(k.left, scale * k.right) for name, k in matrices.items()}
    all_close(found.factors, scaled)
    assert found.log_likelihood == pytest.approx(scale * part.log_likelihood, rel=1e-12)


def test_log_likelihood_is_the_weighted_sum():
    case = BY_NAME["all"]
    network, (inputs, targets, weights) = setting(case)
    found = kronecker_factors(network, case.likelihood, [(inputs, targets, weights)])
    log_p = network(inputs).log_softmax(1)
    expected = sum(w * row[y] for w, row, y in zip(weights, log_p, targets, strict=True))
    assert found.log_likelihood == pytest.approx(expected.item(), rel=1e-12)


def test_labels_of_the_data_do_not_matter():
    case = BY_NAME["all"]
    network, (inputs, targets, weights) = setting(case)
    first = exact_factors(network, case.likelihood, (inputs, targets, weights))
    other = exact_factors(network, case.likelihood, (inputs, (targets + 1) % 3, weights))
    all_close(first, other)


def test_float32():
    case = BY_NAME["all"]
    network, (inputs, targets, weights) = setting(case)
    expected = dense(exact_factors(network, case.likelihood, (inputs, targets, weights)))
    batch = (inputs.float(), targets, weights.float())
    found = exact_factors(network.float(), case.likelihood, batch)
    for name, kron in found.items():
        assert kron.left.dtype == kron.right.dtype == torch.float32
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            kron.to_dense().double(), expected[name], atol=1e-4 * scale, rtol=1e-3
        )


# ── what a last bit must not decide


def blank(n):
    """Images without an orientation: all orientations of their features are equal."""
    return torch.arange(1.0, n + 1, dtype=torch.float64)[:, None, None, None].expand(n, 1, 4, 4)


def mirrored(n):
    """Images whose polyphase grids are mirror images, of equal norm."""
    half = torch.rand(n, 1, 4, 2, dtype=torch.float64)
    return torch.cat([half, half.flip(3)], 3)


@pytest.mark.parametrize(
    ("pathways", "images"),
    [
        (("p4m_conv",), blank),
        (("conv", "factored_fc"), mirrored),
    ],
    ids=["orientations", "grids"],
)
def test_the_last_bit_decides_nothing(pathways, images):
    options = {"pathways": pathways, "width": 2, "dtype": torch.float64}
    network = randomise(build_network((1, 4, 4), 3, **options))
    x, targets, weights = images(8), torch.arange(8) % 3, torch.ones(8, dtype=torch.float64)
    expected = exact_factors(network, Categorical(), (x, targets, weights))
    for _ in range(3):
        noisy = x * (1 + 1e-15 * torch.randn_like(x))
        found = exact_factors(network, Categorical(), (noisy, targets, weights))
        for name, kron in expected.items():
            for side in ("left", "right"):
                change = (getattr(found[name], side) - getattr(kron, side)).norm()
                assert change <= 1e-8 * getattr(kron, side).norm(), name


# ── sketches


def sketched(case, network, batch, seed=0, n_sketches=1):
    generator = torch.Generator().manual_seed(seed)
    return exact_factors(
        network, case.likelihood, batch, estimator=rademacher(n_sketches), generator=generator
    )


@pytest.mark.parametrize("name", ["all", "all-gaussian"])
def test_many_sketches_approach_the_exact_factors(name):
    case = BY_NAME[name]
    network, batch = setting(case)
    exact = exact_factors(network, case.likelihood, batch)
    found = sketched(case, network, batch, n_sketches=1500)
    for tensor, kron in exact.items():
        close(found[tensor].left, kron.left)
        change = (found[tensor].right - kron.right).norm()
        assert change <= 0.1 * kron.right.norm(), tensor


@pytest.mark.parametrize("n_sketches", [1, 3])
def test_mean_over_draws_of_the_sketch(n_sketches):
    # Were columns not scaled by their number, the mean would be n_sketches times too large.
    case = BY_NAME["fc"]
    network, batch = setting(case)
    exact = exact_factors(network, case.likelihood, batch)
    draws = [sketched(case, network, batch, seed, n_sketches) for seed in range(150)]
    for tensor, kron in exact.items():
        mean = sum(draw[tensor].right for draw in draws) / len(draws)
        assert (mean - kron.right).norm() <= 0.25 * kron.right.norm(), tensor


def test_a_sketch_follows_its_generator_alone():
    case = BY_NAME["all"]
    network, batch = setting(case)
    state = torch.get_rng_state()
    first, again, other = (sketched(case, network, batch, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, kron in first.items():
        assert torch.equal(kron.right, again[name].right)
    assert any(not torch.equal(kron.right, other[name].right) for name, kron in first.items())


def test_one_generator_draws_anew_for_each_batch():
    case = BY_NAME["fc"]
    network, (inputs, targets, weights) = setting(case)
    one = (inputs[:1], targets[:1], weights[:1])
    generator = torch.Generator().manual_seed(0)
    options = {"estimator": rademacher(1), "generator": generator}
    alone = [exact_factors(network, case.likelihood, one, **options) for _ in range(8)]
    right = [draw["head.output.weight"].right for draw in alone]
    assert any(not torch.allclose(right[0], other) for other in right[1:])


# ── derivatives in the lengthscales (their values: test_lengthscales)

SPARSE = [BY_NAME[name] for name in ("one-sparse-gaussian", "one-sparse-conv-gaussian", "sparse")]
each_sparse = pytest.mark.parametrize("case", SPARSE, ids=str)


def moving(network, likelihood, *batches, **options):
    return kronecker_factors(network, likelihood, batches, lengthscales=True, **options)


def tangents(factors):
    """∂A or ∂Γ by tensor and side."""
    sides = {"left": lambda k: k.left_tangent, "right": lambda k: k.right_tangent}
    found = {(n, side): get(k) for n, k in factors.items() for side, get in sides.items()}
    return {key: tangent for key, tangent in found.items() if tangent is not None}


@each_sparse
@pytest.mark.parametrize("n_sketches", [0, 1])
def test_asking_for_derivatives_changes_nothing_else(case, n_sketches):
    network, batch = setting(case)
    options = [
        {"estimator": rademacher(n_sketches), "generator": torch.Generator().manual_seed(0)}
        for _ in range(2)
    ]
    plain = kronecker_factors(network, case.likelihood, [batch], **options[0])
    found = moving(network, case.likelihood, batch, **options[1])
    assert plain.slopes == tangents(plain.factors) == {}
    assert found.log_likelihood == plain.log_likelihood
    for name, kron in plain.factors.items():
        close(found.factors[name].to_dense(), kron.to_dense())


def test_what_moves():
    case = BY_NAME["sparse"]
    network, batch = setting(case)
    found = moving(network, case.likelihood, batch)
    expected = {
        (f"blocks.{i}.{name}.weight", side)
        for i in (0, 1)
        for name, side in (
            ("sparse_conv", "left"),
            ("sparse_fc.U", "left"),
            ("sparse_fc.V", "right"),
        )
    }
    assert set(tangents(found.factors)) == expected
    assert {f"{name}.weight" for name in found.slopes} == {name for name, _ in expected}


@pytest.mark.parametrize("n_sketches", [0, 2])
@pytest.mark.parametrize("case", SPARSE[:2], ids=str)
def test_tangents_are_the_derivatives_of_the_factors(case, n_sketches):
    # In one linear layer with Gaussian noise the tokens in pixels do not depend on ω.
    network, batch = setting(case)
    h = 1e-4

    def look():
        generator = torch.Generator().manual_seed(0)
        options = {"estimator": rademacher(n_sketches), "generator": generator}
        return moving(network, case.likelihood, batch, **options).factors

    for name, layer in network.named_modules():
        psi = getattr(layer, "interpolation", None)
        if psi is None:
            continue
        around = []
        for log_omega in (-0.4, -0.4 + h, -0.4 - h):
            psi.set_log_omega(log_omega)
            around.append(look()[f"{name}.weight"])
        here, up, down = around
        psi.set_log_omega(0.0)
        for tangent, sides in (
            (here.left_tangent, (as_matrix(up.left), as_matrix(down.left))),
            (here.right_tangent, (as_matrix(up.right), as_matrix(down.right))),
        ):
            difference = (sides[0] - sides[1]) / (2 * h)
            expected = torch.zeros_like(difference) if tangent is None else tangent
            scale = sides[0].abs().max().item()
            torch.testing.assert_close(difference, expected, rtol=0, atol=1e-6 * scale)
        assert (here.left_tangent is None) != (here.right_tangent is None)


def close_derivatives(found, expected):
    assert found.slopes == pytest.approx(expected.slopes, rel=1e-10, abs=1e-12)
    other = tangents(expected.factors)
    assert len(other) == len(expected.slopes)
    for key, tangent in tangents(found.factors).items():
        close(tangent, other[key])


@each_sparse
def test_derivatives_of_weighted_rows(case):
    network, (inputs, targets, _) = setting(case)
    repeats = torch.tensor([2, 1, 0, 3])
    twice = (inputs.repeat_interleave(repeats, 0), targets.repeat_interleave(repeats, 0))
    repeated = moving(network, case.likelihood, (*twice, torch.ones(6, dtype=torch.float64)))
    weighted = moving(network, case.likelihood, (inputs, targets, repeats.double()))
    close_derivatives(weighted, repeated)


@each_sparse
def test_derivatives_of_parts(case):
    network, batch = setting(case)
    whole = moving(network, case.likelihood, batch)
    parts = zip(*(t.split([1, 2, 1]) for t in batch), strict=True)
    close_derivatives(moving(network, case.likelihood, *parts), whole)
    # A part that stands for the whole: each slope and each ∂(A ⊗ Γ) times the same number.
    scale = 1000.0 / batch[2].sum().item()
    found = moving(network, case.likelihood, batch, total_weight=1000.0)
    expected = {name: scale * slope for name, slope in whole.slopes.items()}
    assert found.slopes == pytest.approx(expected, rel=1e-12)
    for (name, side), tangent in tangents(found.factors).items():
        factor = scale if side == "right" else 1.0
        close(tangent, factor * tangents(whole.factors)[name, side])


def test_derivatives_in_float32():
    case = BY_NAME["sparse"]
    network, (inputs, targets, weights) = setting(case)
    expected = moving(network, case.likelihood, (inputs, targets, weights))
    batch = (inputs.float(), targets, weights.float())
    found = moving(network.float(), case.likelihood, batch)
    assert found.slopes == pytest.approx(expected.slopes, rel=1e-3, abs=1e-4)
    for key, tangent in tangents(found.factors).items():
        other = tangents(expected.factors)[key]
        atol = 1e-3 * other.abs().max().item()
        torch.testing.assert_close(tangent.double(), other, rtol=0, atol=atol)


def test_a_network_without_lengthscales_has_no_derivatives():
    case = BY_NAME["all"]
    network, batch = setting(case)
    found = moving(network, case.likelihood, batch)
    assert found.slopes == tangents(found.factors) == {}


# ── what the pass leaves behind


def hooks(network):
    return [
        *(h for m in network.modules() for h in m._forward_hooks),
        *(h for m in network.modules() for h in m._forward_pre_hooks),
        *(h for m in network.modules() for h in m._backward_hooks),
    ]


def test_nothing_is_left_on_the_network():
    case = BY_NAME["all"]
    network, batch = setting(case)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        found = exact_factors(network, case.likelihood, batch)
    assert hooks(network) == []
    for name, p in network.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])
    assert not any(k.left.requires_grad or k.right.requires_grad for k in found.values())


def test_nothing_is_left_on_the_network_after_derivatives():
    case = BY_NAME["sparse"]
    network, batch = setting(case)
    with torch.no_grad():
        found = moving(network, case.likelihood, batch)
    assert hooks(network) == []
    assert all(p.grad is None for p in network.parameters())
    assert not any(tangent.requires_grad for tangent in tangents(found.factors).values())


class Broken(Categorical):
    def hessian_root(self, outputs):
        raise RuntimeError("broken likelihood")


def test_no_hook_is_left_after_an_exception():
    case = BY_NAME["all"]
    network, batch = setting(case)
    for lengthscales in (False, True):
        with pytest.raises(RuntimeError, match="broken likelihood"):
            kronecker_factors(network, Broken(), [batch], lengthscales=lengthscales)
        assert hooks(network) == []

    def stops():
        yield batch
        raise RuntimeError("broken data")

    with pytest.raises(RuntimeError, match="broken data"):
        kronecker_factors(network, case.likelihood, stops())
    assert hooks(network) == []
    with pytest.raises(RuntimeError):  # too many channels for the first layer
        kronecker_factors(network, case.likelihood, [(torch.cat([batch[0]] * 2, 1), *batch[1:])])
    assert hooks(network) == []


def test_a_pathway_that_is_off_has_no_factors():
    case = BY_NAME["all"]
    network, batch = setting(case)
    everything = set(exact_factors(network, case.likelihood, batch))
    assert everything == {name for name, _ in network.named_parameters()}
    network.blocks[0].enabled["factored_fc"] = False
    network.blocks[1].enabled["conv"] = False
    found = exact_factors(network, case.likelihood, batch)
    off = {n for n in everything if n.startswith(("blocks.0.factored_fc.", "blocks.1.conv."))}
    assert len(off) == 6
    assert set(found) == everything - off
    expected = kfac_expand(network, case.likelihood, batch[0], batch[2])
    for name, (left, right, _) in expected.items():
        close(found[f"{name}.weight"].left, left)
        close(found[f"{name}.weight"].right, right / batch[2].sum())


def test_a_bias_of_one_position_and_block_shares_its_factor():
    case = BY_NAME["all"]
    network, batch = setting(case)
    found = kronecker_factors(network, case.likelihood, [batch]).factors
    for name in ("blocks.0.fc", "head.hidden", "head.output"):
        assert found[f"{name}.bias"].right is found[f"{name}.weight"].right
    for name in ("blocks.0.conv", "blocks.0.factored_fc.U"):
        assert found[f"{name}.bias"].right is not found[f"{name}.weight"].right


def test_the_same_map_of_a_module_that_is_no_network_of_ours():
    """A new stack needs no line of the curvature: any module that holds the maps will do."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = FC(2, 2, (1, 1)), FC(2, 3, (1, 1))

        def forward(self, x):
            return self.second(torch.tanh(self.first(x))).flatten(1)

    case = NetworkCase("twice", Twice, Categorical(), (2, 1, 1), n=1)
    errors = block_errors(case)
    assert len(errors) == 4
    assert max(errors.values()) < 1e-10


def test_two_classes_take_one_pass_and_one_class_none(monkeypatch):
    passes, grad = [], torch.autograd.grad

    def counting(*args, **kwargs):
        passes.append(args)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    for k in (1, 2, 4):
        network = randomise(build_network((1, 2, 2), k, pathways=ALL_PATHWAYS, width=1)).double()
        inputs = torch.randn(3, 1, 2, 2, dtype=torch.float64)
        targets = torch.zeros(3, dtype=torch.long)
        passes.clear()
        found = exact_factors(network, Categorical(), (inputs, targets, torch.ones(3)))
        assert len(passes) == k - 1
        assert k > 1 or all((kron.right == 0).all() for kron in found.values())


def test_derivatives_take_one_pass_more(monkeypatch):
    vectors, gradients = [], curvature._gradients

    def counting(outputs, record, vector, keep):
        vectors.append((list(record), vector))
        return gradients(outputs, record, vector, keep)

    monkeypatch.setattr(curvature, "_gradients", counting)
    case = BY_NAME["sparse"]
    network, batch = setting(case)
    moving(network, case.likelihood, batch)
    (score, columns) = vectors[0], vectors[1:]
    assert len(columns) == 2  # three classes
    assert all("sparse" in name for name in score[0])  # nothing further down than it must go
    everything = {name.rsplit(".", 1)[0] for name, _ in network.named_parameters()}
    assert all(set(names) == everything for names, _ in columns)
    assert torch.allclose(score[1].sum(1), torch.zeros(4, dtype=torch.float64))  # onehot − p
