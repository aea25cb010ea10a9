"""Kronecker factors against literal loops, and against the full GGN where KFAC is exact."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import ALL_PATHWAYS, APPROXIMATE, EXACT, NetworkCase, chain, randomise
from references import close, ggn, kfac_expand, kfac_reduce
from torch import nn

from sklearn_softeq import curvature
from sklearn_softeq.curvature import Estimator, input_factors, kronecker_factors
from sklearn_softeq.kronecker import Kronecker, Root
from sklearn_softeq.kronecker import dense as as_matrix
from sklearn_softeq.layers import FC, Conv, SharedLinear
from sklearn_softeq.likelihoods import Categorical, Gaussian
from sklearn_softeq.networks import build_network

each_exact = pytest.mark.parametrize("case", EXACT, ids=str)
each_approximate = pytest.mark.parametrize("case", APPROXIMATE, ids=str)
each_case = pytest.mark.parametrize("case", EXACT + APPROXIMATE, ids=str)

BY_NAME = {case.name: case for case in EXACT + APPROXIMATE}


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
        close(weight.left, left / weights.sum())
        close(weight.right, right)
        assert (f"{name}.bias" in found) == (bias is not None)
        if bias is not None:
            close(found[f"{name}.bias"].to_dense(), bias)
        assert right.abs().max() > 1e-6, "a dead layer tests nothing"


@each_case
def test_biases_are_exact_blocks_of_the_ggn(case):
    network, batch = setting(case)
    found = exact_factors(network, case.likelihood, batch)
    biases = [name for name in found if name.endswith("bias")]
    assert biases
    matrix, places = ggn(network, case.likelihood, batch[0], batch[2], biases)
    for name in biases:
        close(found[name].to_dense(), matrix[places[name], places[name]])


def block_errors(case, **options):
    """Relative error of each block A_b ⊗ Γ_b / N of each weight against the full GGN's."""
    network, batch = setting(case)
    found = exact_factors(network, case.likelihood, batch, **options)
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


# ── the other form: tokens are reduced to one before their product

REDUCE = Estimator(kfac="reduce")


@each_case
def test_reduced_factors_against_loops(case):
    network, batch = setting(case)
    inputs, _, weights = batch
    found = exact_factors(network, case.likelihood, batch, estimator=REDUCE)
    for name, (left, right) in kfac_reduce(network, case.likelihood, inputs, weights).items():
        close(found[f"{name}.weight"].left, left / weights.sum())
        close(found[f"{name}.weight"].right, right)


@each_case
def test_forms_differ_where_positions_are_shared(case):
    network, batch = setting(case)
    expand = exact_factors(network, case.likelihood, batch)
    reduce = exact_factors(network, case.likelihood, batch, estimator=REDUCE)
    assert list(reduce) == list(expand)
    for name, layer in maps_of(network).items():
        weights = [found[f"{name}.weight"].to_dense() for found in (reduce, expand)]
        if layer.n_positions == 1:
            close(*weights)
        else:
            assert (weights[0] - weights[1]).norm() > 1e-3 * weights[1].norm(), name
    for name in (name for name in expand if name.endswith("bias")):
        close(reduce[name].to_dense(), expand[name].to_dense())  # exact either way


def test_reduce_is_exact_before_a_mean_over_positions():
    # The outputs of all positions meet in the same weights: Eschenhagen et al. 2023, section 3.2.
    def pooled():
        return chain(Conv(2, 3, (4, 6), (2, 2)), nn.AvgPool2d((2, 3)), FC(3, 2, (1, 1)))

    case = NetworkCase("pooled", pooled, Gaussian(0.7), (2, 4, 6))
    assert max(block_errors(case, estimator=REDUCE).values()) < 1e-10
    assert max(block_errors(case).values()) > 1e-3


def test_forms_of_one_map_by_hand():
    # Patches (3, 1, 2), (1, 2, 3), (2, 3, 1) of the image 1, 2, 3; g = 1/σ² at each position.
    layer = chain(Conv(1, 1, (1, 3))).double()
    inputs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[None, None, None]
    batch = (inputs, torch.zeros(1, 3), torch.ones(1).double())
    mean = torch.full((1, 3, 3), 4.0, dtype=torch.float64)  # of a patch: (2, 2, 2)
    kron = exact_factors(layer, Gaussian(0.5), batch, estimator=REDUCE)["layer0.weight"]
    close(kron.left, mean)
    close(kron.right, torch.full((1, 1, 1), 3 / 0.5, dtype=torch.float64))
    kron = exact_factors(layer, Gaussian(0.5), batch)["layer0.weight"]
    moments = torch.tensor([[14.0, 11, 11], [11, 14, 11], [11, 11, 14]], dtype=torch.float64)
    close(kron.left[0], moments)
    close(kron.right, torch.full((1, 1, 1), 1 / 0.5, dtype=torch.float64))


# ── small samples: the tokens themselves instead of their products


def maps_of(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, SharedLinear)}


def roots(factors):
    """The tensors and sides that are given by their roots."""
    sides = {"left": lambda kron: kron.left, "right": lambda kron: kron.right}
    return {
        (name, side)
        for name, kron in factors.items()
        for side, of in sides.items()
        if isinstance(of(kron), Root)
    }


def expected_roots(network, n_rows, n_columns, reduced=False):
    """Where there are fewer tokens than the matrix has rows."""
    for name, layer in maps_of(network).items():
        n_blocks, n_out, n_in = layer.weight.shape
        n_tokens = n_rows * (1 if reduced else layer.n_positions)
        # Of a bias the tokens are sums over positions and blocks.
        n_tokens_of_bias = n_rows if layer.n_positions * n_blocks > 1 else n_tokens
        if n_tokens < n_in:
            yield f"{name}.weight", "left"
        if n_tokens * n_columns < n_out:
            yield f"{name}.weight", "right"
        if layer.bias is not None and n_tokens_of_bias * n_columns < n_out:
            yield f"{name}.bias", "right"


def parts(batch, sizes):
    """A batch in several."""
    return list(zip(*(column.split(sizes) for column in batch), strict=True))


# More channels than a sample has positions and columns: also the gradients of a convolution.
WIDE = NetworkCase(
    "wide",
    lambda: chain(Conv(1, 40, (2, 2)), nn.ReLU(), Conv(40, 3, (2, 2), (2, 2))),
    Categorical(),
    (1, 2, 2),
)
NAMES = ("all", "sparse", "all-gaussian", "group-readout", "one-p4-gaussian")
SMALL = [replace(case, n=n) for case in (*map(BY_NAME.get, NAMES), WIDE) for n in (1, 2, 6)]
each_small = pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case}-{case.n}")
each_form = pytest.mark.parametrize("kfac", ["expand", "reduce"])


def splits(n):
    """At once, row by row, and so that each batch alone would be small where all are not."""
    return {(n,), (1,) * n, *([(1, n - 1), (n - 1, 1)] if n > 1 else [])}


@each_form
@each_small
def test_small_samples_are_kept_and_larger_ones_multiplied(case, kfac):
    network, batch = setting(case)
    inputs, _, weights = batch
    n_columns = case.likelihood.hessian_root(network(inputs)).shape[2]
    expected = set(expected_roots(network, case.n, n_columns, kfac == "reduce"))
    slow = {"expand": kfac_expand, "reduce": kfac_reduce}[kfac]
    factors = slow(network, case.likelihood, inputs, weights)
    for sizes in splits(case.n):
        options = {"estimator": Estimator(kfac=kfac)}
        found = kronecker_factors(network, case.likelihood, parts(batch, sizes), **options).factors
        assert roots(found) == expected
        for name, (left, right, *_) in factors.items():
            weight = as_matrices(found[f"{name}.weight"])
            close(weight.left, left / weights.sum())
            close(weight.right, right)


@each_small
def test_biases_of_small_samples(case):
    network, batch = setting(case)
    expected = kfac_expand(network, case.likelihood, batch[0], batch[2])
    for sizes in splits(case.n):
        found = exact_factors(network, case.likelihood, *parts(batch, sizes))
        for name, (_, _, bias) in expected.items():
            if bias is not None:
                close(found[f"{name}.bias"].to_dense(), bias)


def test_a_sample_grows_out_of_its_root():
    # d_in = 8: seven rows are kept, the eighth makes a matrix of them, those after are added to it.
    network = randomise(chain(FC(2, 2, (2, 2)))).double()
    inputs = torch.randn(10, 2, 2, 2, dtype=torch.float64)
    weights = torch.rand(10, dtype=torch.float64)
    for n in (1, 6, 7, 8, 9, 10):
        batch = (inputs[:n], torch.zeros(n, 8), weights[:n])
        rows = inputs[:n].flatten(1)
        expected = sum(w * torch.outer(x, x) for w, x in zip(weights, rows, strict=False))[None]
        for sizes in ((n,), (1,) * n):
            (found, *_) = kronecker_factors(network, Gaussian(), parts(batch, sizes))
            left = found["layer0.weight"].left
            assert isinstance(left, Root) == (n < 8)
            close(as_matrix(left), expected / weights[:n].sum())


def test_factors_that_move_are_matrices():
    case = replace(BY_NAME["sparse"], n=1)
    network, batch = setting(case)
    plain = kronecker_factors(network, case.likelihood, [batch]).factors
    found = moving(network, case.likelihood, batch).factors
    at_anchors = {
        f"{name}.weight" for name, m in maps_of(network).items() if m.interpolation is not None
    }
    kept = {(name, side) for name, side in roots(plain) if name.endswith("weight")}
    assert {name for name, _ in kept} & at_anchors
    still = {(name, side) for name, side in roots(found) if name.endswith("weight")}
    assert still == {(name, side) for name, side in kept if name not in at_anchors}


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
    batches = parts((inputs, targets, weights), [1, 2, 1])
    found = kronecker_factors(network, case.likelihood, batches)
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


@each_form
@each_weighted
def test_weights_that_are_known_to_be_one_need_not_be_looked_at(case, kfac):
    network, (inputs, targets, _) = setting(case)
    batch = (inputs, targets, torch.ones(len(inputs), dtype=torch.float64))
    options = {"estimator": Estimator(kfac=kfac), "lengthscales": True}
    found = kronecker_factors(network, case.likelihood, [batch], unit_weights=True, **options)
    expected = kronecker_factors(network, case.likelihood, [batch], **options)
    all_close(found.factors, expected.factors)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    close_derivatives(found, expected)


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


# ── the input factors of the maps that see the images

SEEING = {
    "all": ("blocks.0.conv", "blocks.0.factored_fc.U", "blocks.0.fc"),
    "sparse": (),  # Ψ may change
    "group-readout": ("blocks.0.p4_conv", "blocks.0.conv", "blocks.0.factored_fc.U"),
    "resnet": ("blocks.0.first.conv", "blocks.0.first.factored_fc.U"),
    "group-resnet": ("blocks.0.first.pm_conv",),
    "one-pooled-gaussian": ("layer0",),
}


def with_new_weights(network):
    """The same at other weights; those of a first layer are among them."""
    for module in network.modules():
        if isinstance(module, SharedLinear):
            with torch.no_grad():
                module.weight.mul_(0.7).add_(0.1)


@each_form
@pytest.mark.parametrize("name", SEEING)
def test_input_factors_that_hang_on_no_weight_are_computed_once(name, kfac):
    case = BY_NAME[name]
    network, batch = setting(case)
    batches = parts(batch, [1, case.n - 1])
    options = {"estimator": Estimator(kfac=kfac), "lengthscales": True}
    constants = input_factors(network, batches, kfac=kfac)
    assert set(constants) == set(SEEING[name])
    expected = kronecker_factors(network, case.likelihood, batches, **options)
    for key, factor in constants.items():
        close(as_matrix(factor), as_matrix(expected.factors[f"{key}.weight"].left))
    with_new_weights(network)
    found = kronecker_factors(network, case.likelihood, batches, constants=constants, **options)
    for key, factor in constants.items():
        assert found.factors[f"{key}.weight"].left is factor
    expected = kronecker_factors(network, case.likelihood, batches, **options)
    all_close(found.factors, expected.factors)
    close_derivatives(found, expected)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)


def test_input_factors_run_no_more_of_the_network_than_they_need():
    case = BY_NAME["all"]
    network, batch = setting(case)
    rows = []
    network.head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    input_factors(network, parts(batch, [2, case.n - 2]))
    assert rows == [1]  # which shows which maps see the images
    kronecker_factors(network, case.likelihood, [batch])  # no hook of ours is left behind
    assert rows == [1, case.n]


def test_parameters_ask_for_gradients_as_before():
    case = BY_NAME["all"]
    network, batch = setting(case)
    asking = {name: name.endswith("weight") for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(asking[name])
    kronecker_factors(network, case.likelihood, [batch])
    assert {name: p.requires_grad for name, p in network.named_parameters()} == asking
    network.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kronecker_factors(network, case.likelihood, [batch])
    assert {name: p.requires_grad for name, p in network.named_parameters()} == asking


def test_a_pass_keeps_nothing_for_gradients_of_weights():
    case = BY_NAME["all"]
    network, batch = setting(case)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kronecker_factors(network, case.likelihood, [batch])
        few = len(kept)
        kept.clear()
        network(batch[0]).sum().backward()
    assert few < len(kept)


@pytest.mark.parametrize("n", [1, 6])
def test_input_factors_that_are_given_are_not_looked_at(monkeypatch, n):
    # Whether they are given by their roots or not; the others are computed.
    case = replace(BY_NAME["all"], n=n)
    network, batch = setting(case)
    wrong = torch.full((1, 12, 12), 42.0, dtype=torch.float64)
    constants = {"blocks.0.conv": wrong}
    monkeypatch.setattr(network.blocks[0].conv, "input_gram", None)
    monkeypatch.setattr(network.blocks[0].conv, "input_tokens", None)
    found = kronecker_factors(network, case.likelihood, [batch], constants=constants).factors
    assert found["blocks.0.conv.weight"].left is wrong
    assert set(constants) == {"blocks.0.conv"}
    monkeypatch.undo()
    expected = kronecker_factors(network, case.likelihood, [batch]).factors
    del found["blocks.0.conv.weight"], expected["blocks.0.conv.weight"]
    all_close(found, expected)


def test_input_factors_of_all_rows_serve_any_sample_that_stands_for_them():
    case = BY_NAME["all"]
    network, batch = setting(case)
    constants = input_factors(network, [batch])
    part = tuple(column[:3] for column in batch)
    expected = kronecker_factors(network, case.likelihood, [part], total_weight=7.0).factors
    found = kronecker_factors(
        network, case.likelihood, [part], total_weight=7.0, constants=constants
    ).factors
    whole = kronecker_factors(network, case.likelihood, [batch]).factors
    for name in expected:
        kron = expected[name]
        if name.removesuffix(".weight") in constants:
            kron = replace(kron, left=whole[name].left)
        close(found[name].to_dense(), kron.to_dense())


# ── several processes

OWN = slice(0, None, 2), slice(1, None, 2)


def in_two_processes(run):
    """What two processes find that add their sums to each other's, and how many numbers those are.

    Run one after the other, twice: first for what each sends, then with what the other sent.
    """
    sent, found = ([], []), []
    for mine, own in zip(sent, OWN, strict=True):
        run(own, lambda flat, mine=mine: mine.append(flat.clone()))
    for theirs, own in zip(reversed(sent), OWN, strict=True):
        found.append(run(own, lambda flat, theirs=theirs: flat.add_(*theirs)))
    shapes = {(flat.dtype, tuple(flat.shape)) for mine in sent for flat in mine}
    ((dtype, (n_sent,)),) = shapes
    assert dtype == torch.float64
    assert [len(mine) for mine in sent] == [1, 1]  # all in one go
    return found, n_sent


def runner(case, network, batches, constants=None, **options):
    """A process with its rows, random columns and known input factors."""

    def run(own=slice(None), reduction=None):
        return kronecker_factors(
            network,
            case.likelihood,
            batches,
            own=own,
            reduction=reduction,
            generator=torch.Generator().manual_seed(3),
            constants=dict(constants[own.start]) if constants else {},
            **options,
        )

    return run


def same(found, expected):
    all_close(found.factors, expected.factors)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    close_derivatives(found, expected)


SHARED_OUT = {
    "exact": {},
    "reduce": {"estimator": REDUCE},
    "rademacher": {"estimator": Estimator("rademacher")},
    "sketches": {"estimator": Estimator("rademacher", 3)},
    "label": {"estimator": Estimator("monte_carlo")},
    "labels": {"estimator": Estimator("monte_carlo", 2)},
    "lengthscales": {"lengthscales": True},
    "reduced lengthscales": {"lengthscales": True, "estimator": REDUCE},
    "part": {"lengthscales": True, "total_weight": 1000.0},
}


@pytest.mark.parametrize("options", SHARED_OUT.values(), ids=SHARED_OUT)
@pytest.mark.parametrize("name", ["all", "sparse", "all-gaussian", "group-readout"])
def test_rows_shared_out_to_processes_add_up(name, options):
    # Of a batch of one row one process sees none; both draw the random columns of all rows.
    case = replace(BY_NAME[name], n=5)
    network, batch = setting(case)
    run = runner(case, network, parts(batch, [1, 4]), **options)
    several, _ = in_two_processes(run)
    expected = run()
    for found in several:
        same(found, expected)
    for name, kron in several[0].factors.items():
        assert torch.equal(kron.to_dense(), several[1].factors[name].to_dense())


def test_rows_of_a_process_are_its_own():
    # Without the sums of the other it stands for less.
    case = replace(BY_NAME["all"], n=5)
    network, batch = setting(case)
    for own in OWN:
        mine = tuple(column[own] for column in batch)
        found = kronecker_factors(network, case.likelihood, [batch], own=own)
        same(found, kronecker_factors(network, case.likelihood, [mine]))


@pytest.mark.parametrize("n", [2, 9])
def test_processes_that_know_the_input_factors_send_the_rest(n):
    case = replace(BY_NAME["all"], n=n)
    network, batch = setting(case)
    _, n_everything = in_two_processes(runner(case, network, [batch]))
    first, _ = in_two_processes(
        lambda own, reduction: input_factors(network, [batch], own=own, reduction=reduction)
    )
    expected = input_factors(network, [batch])
    for found in first:
        for name, factor in expected.items():
            close(as_matrix(found[name]), as_matrix(factor))
    constants = {own.start: found for own, found in zip(OWN, first, strict=True)}
    with_new_weights(network)
    second, n_rest = in_two_processes(runner(case, network, [batch], constants))
    for found in second:
        same(found, kronecker_factors(network, case.likelihood, [batch]))
    n_known = sum(as_matrix(factor).numel() for factor in constants[0].values())
    assert n_rest == n_everything - n_known


# ── sketches


def sketched(case, network, batch, seed=0, n_sketches=1, columns="rademacher"):
    generator = torch.Generator().manual_seed(seed)
    estimator = Estimator(columns, n_sketches)
    return exact_factors(network, case.likelihood, batch, estimator=estimator, generator=generator)


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


@pytest.mark.parametrize("name", ["sparse", "all-gaussian"])  # sure of no label
@pytest.mark.parametrize("columns", ["rademacher", "monte_carlo"])
def test_random_columns_follow_their_generator_alone(name, columns):
    case = BY_NAME[name]
    network, batch = setting(case)
    state = torch.get_rng_state()
    first, again, other = (
        sketched(case, network, batch, seed, 8, columns=columns) for seed in (0, 0, 1)
    )
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
    assert any(not torch.allclose(right[0], other, atol=0) for other in right[1:])


class EveryLabel(Categorical):
    """Whose labels are one of each class, as often as they are expected, and not random."""

    def hessian_labels(self, outputs, n_labels, generator):
        p = outputs.softmax(1)
        assert n_labels == p.shape[1]
        scores = torch.eye(n_labels, dtype=p.dtype) - p[:, :, None]  # (n, K, y)
        return scores * p[:, None].sqrt()


class EverySign(Categorical):
    """Whose signs are all of those that there are, and not random."""

    def hessian_sketch(self, outputs, n_sketches, generator):
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=outputs.shape[1]))).T.double()
        assert n_sketches == signs.shape[1]
        p = outputs.softmax(1)
        s = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]
        return s @ signs / n_sketches**0.5


@each_form
@pytest.mark.parametrize(
    ("columns", "samples", "likelihood"),
    [("monte_carlo", 3, EveryLabel()), ("rademacher", 8, EverySign())],
)
def test_all_random_columns_are_the_exact_factors(columns, samples, likelihood, kfac):
    case = BY_NAME["all"]
    network, batch = setting(case)
    exact = exact_factors(network, case.likelihood, batch, estimator=Estimator(kfac=kfac))
    options = {"estimator": Estimator(columns, samples, kfac), "generator": torch.Generator()}
    all_close(exact_factors(network, likelihood, batch, **options), exact)


def test_exact_columns_have_no_number_and_need_no_generator():
    case = BY_NAME["all"]
    network, batch = setting(case)
    exact = exact_factors(network, case.likelihood, batch)
    all_close(
        exact_factors(network, case.likelihood, batch, estimator=Estimator("exact", 7)), exact
    )
    for columns in ("rademacher", "monte_carlo"):
        with pytest.raises(AssertionError):
            exact_factors(network, case.likelihood, batch, estimator=Estimator(columns))


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


@each_form
@pytest.mark.parametrize("columns", ["exact", "rademacher"])
@pytest.mark.parametrize("case", SPARSE[:2], ids=str)
def test_tangents_are_the_derivatives_of_the_factors(case, columns, kfac):
    # In one linear layer with Gaussian noise the tokens in pixels do not depend on ω.
    network, batch = setting(case)
    h = 1e-4

    def look():
        generator = torch.Generator().manual_seed(0)
        options = {"estimator": Estimator(columns, 2, kfac), "generator": generator}
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


@each_form
@each_sparse
def test_derivatives_of_weighted_rows(case, kfac):
    network, (inputs, targets, _) = setting(case)
    options = {"estimator": Estimator(kfac=kfac)}
    repeats = torch.tensor([2, 1, 0, 3])
    twice = (inputs.repeat_interleave(repeats, 0), targets.repeat_interleave(repeats, 0))
    ones = torch.ones(6, dtype=torch.float64)
    repeated = moving(network, case.likelihood, (*twice, ones), **options)
    weighted = moving(network, case.likelihood, (inputs, targets, repeats.double()), **options)
    close_derivatives(weighted, repeated)


@each_form
@each_sparse
def test_derivatives_of_parts(case, kfac):
    network, batch = setting(case)
    options = {"estimator": Estimator(kfac=kfac)}
    whole = moving(network, case.likelihood, batch, **options)
    found = moving(network, case.likelihood, *parts(batch, [1, 2, 1]), **options)
    close_derivatives(found, whole)
    # A part that stands for the whole: each slope and each ∂(A ⊗ Γ) times the same number.
    scale = 1000.0 / batch[2].sum().item()
    found = moving(network, case.likelihood, batch, total_weight=1000.0, **options)
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
        close(found[f"{name}.weight"].left, left / batch[2].sum())
        close(found[f"{name}.weight"].right, right)


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
    vectors, pull_back = [], curvature.pull_back

    def counting(outputs, ends, vector, down_to, keep, visit):
        vectors.append((list(ends), vector))
        assert len(down_to) < len(ends) or list(ends.values()) == down_to
        pull_back(outputs, ends, vector, down_to, keep, visit)

    monkeypatch.setattr(curvature, "pull_back", counting)
    case = BY_NAME["sparse"]
    network, batch = setting(case)
    moving(network, case.likelihood, batch)
    (score, columns) = vectors[0], vectors[1:]
    assert len(columns) == 2  # three classes
    assert all("sparse" in name for name in score[0])  # nothing further down than it must go
    everything = {name.rsplit(".", 1)[0] for name, _ in network.named_parameters()}
    assert all(set(names) == everything for names, _ in columns)
    assert torch.allclose(score[1].sum(1), torch.zeros(4, dtype=torch.float64))  # onehot − p
