"""What training does next: plateau, learning rate, start and removal of pathways, the gauge."""

import copy
import math

import pytest
import torch
from cases import randomise

from sklearn_softeq import schedules
from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.groups import P1, P4, PM
from sklearn_softeq.hyperparameters import LOG_PRECISION_BOUNDS, LayerwisePrior, squared_norms
from sklearn_softeq.kfac import KFAC
from sklearn_softeq.kronecker import spectra
from sklearn_softeq.likelihoods import Categorical
from sklearn_softeq.marginal_likelihood import FixedPointSolver, LaplaceEvidence
from sklearn_softeq.networks import build_network
from sklearn_softeq.schedules import (
    GAUGE_LIMIT,
    STARTS,
    JointStart,
    LearningRate,
    Plateau,
    SymmetricStart,
    fix_gauge,
    restart_jointly,
    symmetries,
)

ALL = ("conv", "factored_fc", "fc")


def network_of(*pathways, shape=(2, 4, 4), width=2, **options):
    options = {"pathways": pathways, "width": width, "dtype": torch.float64, **options}
    return randomise(build_network(shape, 3, **options))


def prior_of(network, precision=1.0):
    return LayerwisePrior(dict(network.named_parameters()), precision)


def images(n=6, shape=(2, 4, 4)):
    return torch.randn(n, *shape, dtype=torch.float64)


def enabled(network):
    return [dict(block.enabled) for block in network.blocks]


# ── plateau


def test_plateau_counts_values_without_a_rise_of_more_than_tol():
    plateau = Plateau(tol=0.5, patience=2)
    values = [-3.0, -2.0, -1.5, -1.4, -1.3]
    #         new,  new, +0.5 no, +0.6 new, no
    assert [plateau.reached(v) for v in values] == [False] * 5
    assert plateau.best == -1.4
    assert plateau.reached(-0.9)  # rises by exactly tol do not count either


def test_plateau_compares_with_the_best_value_and_needs_patience_in_a_row():
    plateau = Plateau(tol=0.0, patience=3)
    values = [1.0, 0.0, 0.5, 2.0, 1.0, 1.9, 2.0, 5.0]
    expected = [False, False, False, False, False, False, True, False]
    assert [plateau.reached(v) for v in values] == expected
    assert Plateau(tol=0.0, patience=1).reached(-math.inf)


def test_slow_rises_add_up():
    plateau = Plateau(tol=0.25, patience=3)
    assert not any(plateau.reached(0.1 * i) for i in range(100))


# ── learning rate


def rates(schedule, first, last):
    return [schedule.at(epoch) for epoch in range(first, last + 1)]


def test_constant_rate_ends_where_it_converges():
    schedule = LearningRate("constant", 0.3, 10)
    schedule.rewarm(4)
    assert rates(schedule, 1, 10) == [0.3] * 10
    assert schedule.latest_cooldown == 10
    assert not schedule.finished(10)
    schedule.begin_cooldown(7)
    assert schedule.at(7) == 0.3
    assert schedule.finished(7)


def test_cosine_falls_to_zero_over_max_epochs():
    schedule = LearningRate("cosine", 0.2, 40, warmup=4)
    assert rates(schedule, 1, 3) == pytest.approx(
        [0.2 * (i / 4) * 0.5 * (1 + math.cos(math.pi * (i - 1) / 40)) for i in (1, 2, 3)]
    )
    found = rates(schedule, 4, 40)
    assert found == sorted(found, reverse=True)
    assert schedule.at(21) == pytest.approx(0.1)  # half way
    assert 0 < schedule.at(40) < 0.005 * 0.2  # the end
    assert schedule.at(41) == pytest.approx(0.0, abs=1e-15)
    assert schedule.latest_cooldown == 40
    schedule.begin_cooldown(25)
    assert schedule.finished(25)


def test_cooldown_schedule_warms_up_and_stays():
    schedule = LearningRate("cooldown", 0.1, 100, warmup=5)
    assert rates(schedule, 1, 7) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    schedule.rewarm(20)
    assert rates(schedule, 21, 27) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    assert not schedule.cooling
    assert not schedule.finished(10**6)


@pytest.mark.parametrize("schedule", ["cooldown", "cosine", "constant"])
def test_a_bound_on_the_steps_warms_up_with_the_square_of_the_epochs(schedule):
    tensor = torch.nn.Parameter(torch.zeros(1, 1, 1))
    optimizer = KFAC([tensor], lr=0.1, clip=0.02)
    (group,) = optimizer.param_groups
    rate = LearningRate(schedule, 0.1, 40, warmup=3, bound_warmup=5)
    rate.rewarm(7)
    for epoch, warm in ((8, 0.2), (10, 0.6), (12, 1.0), (30, 1.0)):
        rate.hand_to(optimizer, epoch)
        assert group["clip"] == pytest.approx(0.02 * warm**2)
        assert group["lr"] == pytest.approx(rate.at(epoch))
    rate.begin_cooldown(30)
    rate.hand_to(optimizer, 35)
    assert group["clip"] == 0.02  # the rate alone falls
    other = torch.optim.SGD([tensor], lr=0.1)
    rate.hand_to(other, 8)
    assert "clip" not in other.param_groups[0]


def test_bounded_steps_are_of_the_length_of_the_warm_up():
    rate, lengths = LearningRate("cooldown", 0.1, 40, warmup=5, bound_warmup=5), []
    for epoch in (1, 2, 5):
        tensor = torch.nn.Parameter(torch.ones(1, 1, 1))
        optimizer = KFAC([tensor], lr=0.1, clip=1e-6, momentum=0.0)
        rate.hand_to(optimizer, epoch)
        tensor.grad = torch.full_like(tensor, 3.0)
        optimizer.step()
        lengths.append(1.0 - tensor.item())
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=1e-3)
    assert lengths[2] == pytest.approx(5 * lengths[0], rel=1e-3)


def test_cooldown_takes_a_third_of_the_epochs_so_far():
    schedule = LearningRate("cooldown", 0.1, 1000)
    schedule.begin_cooldown(61)
    assert schedule.cooling
    assert schedule.cooldown_epochs == 20
    found = rates(schedule, 61, 81)
    assert found[0] == 0.1
    assert found == sorted(set(found), reverse=True)  # falls in every epoch
    assert found[-1] > 0  # no epoch is spent at rate zero
    assert schedule.at(82) == pytest.approx(0.0, abs=1e-15)
    assert not schedule.finished(80)
    assert schedule.finished(81)


@pytest.mark.parametrize("max_epochs", range(1, 50))
def test_latest_cooldown_fits_under_the_cap(max_epochs):
    schedule = LearningRate("cooldown", 0.1, max_epochs)
    assert schedule.latest_cooldown <= max_epochs
    start = max(1, schedule.latest_cooldown)
    schedule.begin_cooldown(start)
    end = next(epoch for epoch in range(start, 200) if schedule.finished(epoch))
    assert end <= max_epochs
    assert end - start <= max(1, start // 3)
    if max_epochs >= 8:
        assert end >= max_epochs - 1  # and the cap is used


@pytest.mark.parametrize("epoch", [1, 2, 90, 99, 100])
def test_cooldown_never_goes_beyond_the_cap(epoch):
    schedule = LearningRate("cooldown", 0.1, 100)
    schedule.begin_cooldown(epoch)
    assert schedule.cooldown_epochs == min(max(1, epoch // 3), 100 - epoch)
    assert schedule.finished(100)


# ── starts


def test_table_of_starts():
    assert STARTS == {"joint": JointStart, "symmetric": SymmetricStart}


@pytest.mark.parametrize(
    ("pathways", "n_starting"),
    [
        (("conv", "factored_fc"), 1),
        (("fc", "conv", "factored_fc"), 1),
        (("conv",), 1),
        (("fc",), 1),
        (("fc", "factored_fc"), 2),
        (("conv", "sparse_conv"), 2),
        (("sparse_fc", "conv", "fc", "sparse_conv"), 2),
        (("p4_conv", "conv", "factored_fc"), 1),
        (("p4_conv", "p4m_conv", "pm_conv"), 1),
        (("p4_conv", "pm_conv", "conv"), 2),  # neither holds the other
    ],
    ids=str,
)
@pytest.mark.parametrize("start", STARTS)
def test_scale_of_the_sum_is_that_of_what_starts(pathways, n_starting, start):
    kind = STARTS[start]
    options = {"pathways": pathways, "width": 1, "scale": kind.scale}
    network = build_network((1, 4, 4), 3, **options)
    kind().begin(network)
    expected = n_starting if start == "symmetric" else len(pathways)
    for block in network.blocks:
        assert sum(block.enabled.values()) == expected
        assert block.scale == pytest.approx(1 / math.sqrt(expected))


def test_scale_of_the_readout_and_of_residual_branches():
    options = {"pathways": ("p4_conv", "conv"), "width": 1, "architecture": "resnet"}
    scales = {}
    for start, kind in STARTS.items():
        network = build_network((1, 4, 4), 3, scale=kind.scale, **options)
        scales[start] = {name: layer.scale for name, layer in network.layers.items()}
    expected = {"blocks.0.first": 1, "blocks.0.second": 4, "blocks.1.first": 1}
    expected |= {"blocks.1.second": 4, "head.hidden": 1}  # the branches of two blocks, halved
    assert scales["symmetric"] == pytest.approx({n: v**-0.5 for n, v in expected.items()})
    assert scales["joint"] == pytest.approx({n: (2 * v) ** -0.5 for n, v in expected.items()})


def test_joint_start_does_nothing():
    network = network_of(*ALL)
    prior = prior_of(network)
    state, precisions = copy.deepcopy(network.state_dict()), prior.precisions()
    start = JointStart()
    start.begin(network)
    assert start.release(network, prior, learn=True) is False
    for _ in range(10):
        start.prune(network, dict.fromkeys(prior.index, 0.0))
    assert start.settle(network, dict.fromkeys(prior.index, 0.0)) is False
    assert enabled(network) == [dict.fromkeys(ALL, True)] * 2
    assert prior.precisions() == precisions
    assert all(torch.equal(w, state[name]) for name, w in network.named_parameters())


def test_charges_of_free_pathways_beside_equivariant_ones():
    network = network_of("conv", "factored_fc")
    free = [name for name, _ in network.named_parameters() if ".factored_fc." in name]
    assert SymmetricStart(charge=3.0).charges(network) == dict.fromkeys(free, 3.0)
    assert JointStart().charges(network) == {}
    assert SymmetricStart().charges(network_of("fc", "factored_fc")) == {}


def test_symmetric_start_begins_with_the_equivariant_pathways():
    network = network_of(*ALL)
    SymmetricStart().begin(network)
    assert enabled(network) == [{"conv": True, "factored_fc": False, "fc": False}] * 2


@pytest.mark.parametrize(
    "pathways",
    [
        ("fc",),
        ("factored_fc", "fc"),
        ("conv",),
        ("conv", "sparse_conv"),
        ("sparse_fc", "fc"),
        ("p4_conv",),
    ],
    ids="+".join,
)
def test_symmetric_start_needs_both_kinds(pathways):
    network = network_of(*pathways)
    prior = prior_of(network)
    state = copy.deepcopy(dict(network.named_parameters()))
    start = SymmetricStart()
    start.begin(network)
    assert start.release(network, prior, learn=True) is False
    for _ in range(10):
        start.prune(network, dict.fromkeys(prior.index, 0.0))
    assert enabled(network) == [dict.fromkeys(pathways, True)] * 2
    assert all(torch.equal(w, state[name]) for name, w in network.named_parameters())
    assert set(prior.precisions().values()) == {1.0}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_release_keeps_the_function_to_the_last_bit(dtype, learn):
    network = network_of(*ALL).to(dtype)
    start, x = SymmetricStart(), images().to(dtype)
    start.begin(network)
    before = network(x)
    assert start.release(network, prior_of(network), learn) is True
    assert enabled(network) == [dict.fromkeys(ALL, True)] * 2
    assert torch.equal(network(x), before)


def test_released_pathways_can_come_to_life():
    network = network_of(*ALL)
    start, x = SymmetricStart(), images()
    start.begin(network)
    start.release(network, prior_of(network), learn=True)
    network(x).logsumexp(1).sum().backward()
    for block in network.blocks:
        for name in ("factored_fc", "fc"):
            path = block.pathways[name]
            assert path.get_parameter(path.factor_names[0]).grad.abs().max() > 1e-6
    # The second factor is not zero: otherwise no gradient would ever reach the first.
    assert all(block.factored_fc.V.weight.abs().min() > 0 for block in network.blocks)


def test_release_sets_the_scale_of_a_random_start():
    network = network_of(*ALL, shape=(2, 8, 8), width=4)
    prior = prior_of(network, 3.0)
    start = SymmetricStart()
    start.begin(network)
    start.release(network, prior, learn=True)
    for name, precision in prior.precisions().items():
        weight = network.get_parameter(name)
        if name.endswith("bias") or ".conv." in name or name.startswith("head"):
            assert precision == pytest.approx(3.0)
        else:  # a variance of 2/fan_in (FC) or 1/fan_in (factors) up to sampling
            expected = weight.shape[-1] / (2 if ".fc." in name else 1)
            spread = 6 / math.sqrt(weight.numel())
            assert precision == pytest.approx(expected, rel=max(spread, 0.05)), name
        if ".V.weight" in name:  # not silenced: the very weights that were drawn
            assert precision == pytest.approx(1 / weight.square().mean().item(), rel=1e-12)


def test_release_draws_from_its_generator():
    found, state = [], torch.get_rng_state()
    network = network_of(*ALL)
    torch.set_rng_state(state)
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        SymmetricStart().release(network, prior_of(network), True, generator)
        found.append(network.blocks[0].factored_fc.V.weight.detach().clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_release_leaves_fixed_precisions_alone():
    network = network_of(*ALL)
    prior = prior_of(network, 3.0)
    start = SymmetricStart()
    start.begin(network)
    start.release(network, prior, learn=False)
    assert list(prior.precisions().values()) == pytest.approx([3.0] * len(prior.index))


# Three degrees of symmetry, and a readout with two.
GROUPS = ("p4_conv", "conv", "factored_fc")
HELD = {"conv", "factored_fc", "free"}


def group_network(**options):
    return network_of(*GROUPS, shape=(1, 4, 4), width=1, **options)


def held_tensors(network):
    """Names of the tensors of what is less symmetric than something beside it."""
    names = [name for name, _ in network.named_parameters()]
    return [name for name in names if HELD & set(name.split("."))]


def test_symmetric_start_begins_with_the_largest_group_and_the_pooled_readout():
    network = group_network()
    SymmetricStart().begin(network)
    block = {"p4_conv": True, "conv": False, "factored_fc": False}
    readout = {"pooled": True, "free": False}
    on = {name: layer.enabled for name, layer in network.layers.items()}
    assert on == {"blocks.0": block, "blocks.1": block, "head.hidden": readout}


def test_all_pathways_of_the_largest_group_begin():
    network = network_of("sparse_fc", "conv", "sparse_conv")
    SymmetricStart().begin(network)
    on = {"sparse_fc": False, "conv": True, "sparse_conv": True}
    assert enabled(network) == [on] * 2
    # Neither of two groups holds the other: the sum of the two has what they share.
    network = network_of("p4_conv", "conv", "pm_conv", shape=(1, 4, 4), width=1)
    SymmetricStart().begin(network)
    assert enabled(network) == [{"p4_conv": True, "conv": False, "pm_conv": True}] * 2


def test_symmetries_are_the_groups_from_the_largest_on():
    assert symmetries([None, P1, P4, None, P1, PM]) == [P4, PM, P1]
    assert symmetries([None]) == []


def test_symmetric_start_with_a_group_of_its_own():
    network = group_network()
    SymmetricStart(group=P1).begin(network)
    block = {"p4_conv": False, "conv": True, "factored_fc": False}
    # From one pixel, what is free commutes with shifts; what is pooled would keep quarter turns.
    readout = {"pooled": False, "free": True}
    on = {name: layer.enabled for name, layer in network.layers.items()}
    assert on == {"blocks.0": block, "blocks.1": block, "head.hidden": readout}
    network = network_of("p4_conv", "pm_conv", "conv", shape=(1, 4, 4), width=1)
    SymmetricStart(group=PM).begin(network)
    assert enabled(network) == [{"p4_conv": False, "pm_conv": True, "conv": False}] * 2
    assert network.head.hidden.enabled == {"pooled": True, "free": False}  # over all orientations


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize("group", [None, P4, P1], ids=str)
def test_what_begins_keeps_its_variance(group, architecture):
    pathways = ("p4_conv", "conv", "sparse_conv", "factored_fc")
    options = {"shape": (1, 4, 4), "width": 1, "architecture": architecture, "scale": "symmetric"}
    network = network_of(*pathways, **options)
    before = {name: layer.scale for name, layer in network.layers.items()}
    SymmetricStart(group=group).begin(network)
    for name, layer in network.layers.items():
        n_on = 2 if group == P1 and name != "head.hidden" else 1
        assert sum(layer.enabled.values()) == n_on
        assert layer.scale == pytest.approx(before[name] / n_on**0.5)


@pytest.mark.parametrize("group", [P4, P1], ids=lambda group: group.name)
def test_what_is_held_back_hangs_on_the_group(group):
    network = group_network()
    prior, start, x = prior_of(network, 3.0), SymmetricStart(group=group), images(shape=(1, 4, 4))
    start.begin(network)
    first = network(x)
    assert start.release(network, prior, learn=True) is True
    assert torch.equal(network(x), first)
    held = {"conv", "factored_fc", "free"} if group == P4 else {"p4_conv", "factored_fc", "pooled"}
    changed = {n for n, v in prior.precisions().items() if v != pytest.approx(3.0)}
    names = [n for n, _ in network.named_parameters() if held & set(n.split("."))]
    assert changed == {name for name in names if name.endswith("weight")}
    assert set(start.charges(network)) == set(names)
    assert not start.settle(network, dict.fromkeys(dict(network.named_parameters()), 1.0))
    # Only what was held back can be removed.
    gamma = dict.fromkeys((n for n, _ in network.named_parameters()), 0.0)
    for _ in range(start.patience):
        start.prune(network, gamma)
    off = {n for layer in network.layers.values() for n, on in layer.enabled.items() if not on}
    assert off == held


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
@pytest.mark.parametrize(
    "pathways",
    [GROUPS, ("sparse_conv", "conv", "sparse_fc"), ("pm_conv", "sparse_fc")],
    ids="+".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_release_of_any_pathways_keeps_the_function(pathways, architecture, dtype):
    options = {"shape": (1, 4, 4), "width": 1, "architecture": architecture}
    network = network_of(*pathways, **options).to(dtype)
    start, x = SymmetricStart(), images(shape=(1, 4, 4)).to(dtype)
    start.begin(network)
    symmetric = network(x)
    assert not all(all(layer.enabled.values()) for layer in network.layers.values())
    assert start.release(network, prior_of(network), learn=True) is True
    assert all(all(layer.enabled.values()) for layer in network.layers.values())
    assert torch.equal(network(x), symmetric)
    network(x).logsumexp(1).sum().backward()
    for layer in network.layers.values():
        for path in (layer.pathways[name] for name in layer.less_symmetric):
            first, *others = (path.get_parameter(name) for name in path.factor_names)
            assert torch.count_nonzero(first) == 0
            assert all(torch.count_nonzero(factor) for factor in others)
            assert first.grad.isfinite().all()


def test_released_readout_can_come_to_life():
    network = group_network()
    start, x = SymmetricStart(), images(shape=(1, 4, 4))
    start.begin(network)
    start.release(network, prior_of(network), learn=True)
    network(x).logsumexp(1).sum().backward()
    assert network.head.hidden.free.weight.grad.abs().max() > 1e-6
    assert network.blocks[0].conv.weight.grad.abs().max() > 1e-6


def test_release_sets_the_scale_of_every_held_tensor():
    network = group_network()
    prior, start = prior_of(network, 3.0), SymmetricStart()
    start.begin(network)
    start.release(network, prior, learn=True)
    changed = [n for n, v in prior.precisions().items() if v != pytest.approx(3.0)]
    assert changed == [name for name in held_tensors(network) if name.endswith("weight")]
    v = "blocks.0.factored_fc.V.weight"  # not silenced: the very weights that were drawn
    square = network.get_parameter(v).square().mean().item()
    assert prior.precisions()[v] == pytest.approx(1 / square)
    draws = 2 / network.head.hidden.free.weight.shape[-1]  # FC: a variance of 2/fan_in
    assert prior.precisions()["head.hidden.free.weight"] == pytest.approx(1 / draws, rel=0.3)


@pytest.mark.parametrize("architecture", ["auto", "resnet"])
def test_restart_begins_anew_with_everything(architecture):
    network = group_network(architecture=architecture)
    prior, start = prior_of(network, 3.0), SymmetricStart()
    start.begin(network)
    for name in prior.index:
        prior.set_precision(name, 1e5)
    with torch.no_grad():  # what the prior has taken to zero
        for w in network.parameters():
            w.zero_()
    state = torch.get_rng_state()
    held = {name: layer.less_symmetric for name, layer in network.layers.items()}
    scales = {name: layer.scale for name, layer in network.layers.items()}
    restart_jointly(network, prior, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(all(layer.enabled.values()) for layer in network.layers.values())
    for name, layer in network.layers.items():  # of independent parts, no longer of some alone
        n_paths, n_alone = len(layer.enabled), len(layer.enabled) - len(held[name])
        assert layer.scale == pytest.approx(scales[name] * (n_alone / n_paths) ** 0.5)
    assert list(prior.precisions().values()) == pytest.approx([3.0] * len(prior.index))
    for name, w in network.named_parameters():
        assert (torch.count_nonzero(w) == 0) == name.endswith("bias")
    twin = group_network(architecture=architecture)
    SymmetricStart().begin(twin)
    restart_jointly(twin, prior_of(twin), torch.Generator().manual_seed(1))
    assert all(torch.equal(w, twin.get_parameter(name)) for name, w in network.named_parameters())


@pytest.mark.parametrize("pathways", [("conv",), ("fc", "factored_fc")], ids="+".join)
def test_restart_of_what_holds_nothing_back(pathways):
    network = network_of(*pathways)
    prior, state = prior_of(network, 3.0), copy.deepcopy(dict(network.named_parameters()))
    restart_jointly(network, prior)
    assert all(torch.equal(w, state[name]) for name, w in network.named_parameters())


def test_charges_of_what_is_held_back():
    network = group_network()
    found = SymmetricStart(charge=3.0).charges(network)
    assert found == dict.fromkeys(held_tensors(network), 3.0)
    # conv and the factors of two blocks, the readout
    assert len(found) == 2 * (2 + 4) + 2
    network = network_of("conv", "sparse_conv", "sparse_fc")
    found = SymmetricStart().charges(network)
    assert set(found) == {n for n, _ in network.named_parameters() if "sparse_fc" in n}


# ── learning rates of what is released


def test_paces_fall_with_the_standard_deviation_of_the_prior():
    network = network_of("conv", "factored_fc")
    prior, start = prior_of(network, 3.0), SymmetricStart()
    start.begin(network)
    assert start.paces(prior) == {}
    start.release(network, prior, learn=True)
    held = [name for name in held_tensors(network) if ".conv." not in name]
    assert start.paces(prior) == dict.fromkeys(held, 1.0)
    first, second, *others = held
    for name, factor in ((first, 16.0), (second, 0.25)):
        prior.set_precision(name, factor * prior.precisions()[name])
    found = start.paces(prior)
    assert found[first] == pytest.approx(0.25, rel=1e-12)
    assert found[second] == 1.0  # never above the common rate
    assert {found[name] for name in others} == {1.0}
    prior.keep([name for name in prior.index if name != first])
    assert set(start.paces(prior)) == {second, *others}
    assert JointStart().paces(prior) == {}


# ── removal


def dimensions(network, default=100.0, **values):
    """γ by tensor: each value spread evenly over the tensors of the prefix."""
    found = {name: default for name, _ in network.named_parameters()}
    for prefix, value in values.items():
        prefix = prefix.replace("__", ".") + "."
        tensors = [name for name in found if name.startswith(prefix)]
        assert tensors
        found.update(dict.fromkeys(tensors, value / len(tensors)))
    return found


def test_what_is_low_in_the_end_goes_at_once():
    network, start = network_of(*ALL), SymmetricStart()
    found = dimensions(network, blocks__0__factored_fc=0.8, blocks__1__fc=0.1)
    assert start.settle(network, found) is True
    assert enabled(network) == [
        {"conv": True, "factored_fc": False, "fc": True},
        {"conv": True, "factored_fc": True, "fc": False},
    ]
    assert all(torch.count_nonzero(w) == 0 for w in network.blocks[1].fc.parameters())
    assert start.settle(network, found) is False
    low_convolutions = dimensions(network, blocks__0__conv=0.0, blocks__1__conv=0.0)
    assert start.settle(network, low_convolutions) is False  # which nothing stands beside


def test_prune_removes_after_patience_low_values_in_a_row():
    network = network_of(*ALL)
    start, x = SymmetricStart(), images()
    low = dimensions(network, blocks__0__factored_fc=0.8)
    high = dimensions(network, blocks__0__factored_fc=1.1)
    for values in (low, low, high, low, low):
        start.prune(network, values)
        assert enabled(network) == [dict.fromkeys(ALL, True)] * 2
    others = {
        name: w.detach().clone()
        for name, w in network.named_parameters()
        if not name.startswith("blocks.0.factored_fc.")
    }
    assert network.blocks[0].factored_fc.U.weight.abs().max() > 0
    start.prune(network, low)
    assert enabled(network) == [
        {"conv": True, "factored_fc": False, "fc": True},
        {"conv": True, "factored_fc": True, "fc": True},
    ]
    assert all(torch.count_nonzero(w) == 0 for w in network.blocks[0].factored_fc.parameters())
    assert all(torch.equal(w, others[n]) for n, w in network.named_parameters() if n in others)
    # Switched off or computed at zero, the function is the same.
    off = network(x)
    network.blocks[0].enabled["factored_fc"] = True
    torch.testing.assert_close(network(x), off, rtol=1e-12, atol=1e-12)


def test_prune_sums_over_all_tensors_of_a_pathway():
    network = network_of(*ALL)
    start = SymmetricStart(patience=1)
    # No tensor alone reaches the threshold of 1; the four of them do.
    start.prune(network, dimensions(network, blocks__1__factored_fc=2.0))
    assert all(all(on.values()) for on in enabled(network))
    start.prune(network, dimensions(network, blocks__1__factored_fc=0.5))
    assert enabled(network)[1] == {"conv": True, "factored_fc": False, "fc": True}


def test_prune_never_removes_an_equivariant_pathway_and_remembers_what_is_gone():
    network = network_of(*ALL)
    start = SymmetricStart()
    nothing = dimensions(network, default=0.0)
    for _ in range(5):
        start.prune(network, nothing)
    assert enabled(network) == [{"conv": True, "factored_fc": False, "fc": False}] * 2
    # The evidence no longer knows the tensors of what was removed.
    left = {name: 0.0 for name in nothing if ".conv." in name or name.startswith("head")}
    start.prune(network, left)
    assert enabled(network) == [{"conv": True, "factored_fc": False, "fc": False}] * 2
    assert torch.count_nonzero(network.blocks[0].conv.weight) > 0


def test_prune_counts_each_pathway_by_itself():
    network = network_of(*ALL)
    start = SymmetricStart(patience=2)
    start.prune(network, dimensions(network, blocks__0__fc=0.1))
    start.prune(network, dimensions(network, blocks__1__fc=0.1))
    assert all(all(on.values()) for on in enabled(network))
    start.prune(network, dimensions(network, blocks__1__fc=0.1))
    assert [on["fc"] for on in enabled(network)] == [True, False]


def test_prune_of_three_degrees_of_symmetry():
    network = group_network()
    start = SymmetricStart(patience=2)
    nothing = dimensions(network, default=0.0)
    start.prune(network, {**nothing, "head.hidden.free.weight": 9.0})
    start.prune(network, {**nothing, "blocks.1.conv.bias": 9.0})
    on = {name: layer.enabled for name, layer in network.layers.items()}
    assert on == {
        "blocks.0": {"p4_conv": True, "conv": False, "factored_fc": False},
        "blocks.1": {"p4_conv": True, "conv": True, "factored_fc": False},
        "head.hidden": {"pooled": True, "free": True},  # low once only
    }
    left = {n: v for n, v in nothing.items() if network.get_parameter(n).any()}
    start.prune(network, left)  # the evidence no longer knows what was removed
    start.prune(network, left)
    assert network.blocks[1].enabled == {"p4_conv": True, "conv": False, "factored_fc": False}
    assert network.head.hidden.enabled == {"pooled": True, "free": False}
    assert all(
        layer.removed(name)
        for layer in network.layers.values()
        for name in HELD
        if name in layer.enabled
    )
    kept = {n: w for n, w in network.named_parameters() if n not in held_tensors(network)}
    assert all(torch.count_nonzero(w) for w in kept.values())


# ── the gauge


def objective(network, prior, x, targets):
    batch = (x, targets, torch.ones(len(x), dtype=x.dtype))
    curvature = kronecker_factors(network, Categorical(), [batch])
    return LaplaceEvidence(
        curvature.log_likelihood,
        spectra(curvature.factors),
        squared_norms(dict(network.named_parameters())),
        prior.index,
    )


def drifts(network, prior, kind="factored_fc"):
    """log δ_U − log δ_V from its value at a random start, of each block."""
    precisions, found = prior.precisions(), []
    for i, block in enumerate(network.blocks):
        u, v = (precisions[f"blocks.{i}.{kind}.{f}.weight"] for f in "UV")
        path = block.pathways[kind]
        found.append(math.log(u / v * path.in_channels / path.n_pixels))
    return found


def drift_apart(network, prior, by, kind="factored_fc"):
    """Set log δ_U − log δ_V so that its drift is ``by``, with log(δ_U δ_V) kept."""
    for i, drift in enumerate(drifts(network, prior, kind)):
        for factor, sign in (("U", 0.5), ("V", -0.5)):
            name = f"blocks.{i}.{kind}.{factor}.weight"
            value = prior.precisions()[name] * math.exp(sign * (by - drift))
            prior.set_precision(name, value)


@pytest.mark.parametrize("kind", ["factored_fc", "sparse_fc"])
def test_gauge_is_that_of_a_random_start(kind):
    network = build_network((1, 16, 16), 3, pathways=(kind,), width=8, dtype=torch.float64)
    path = network.blocks[0].pathways[kind]
    u, v = (path.get_parameter(name).square().mean().item() for name in path.factor_names)
    # With half as many anchors as pixels the ratio of fan-ins would be off by log 2.
    assert math.log(v / u) == pytest.approx(path.log_gauge, abs=0.3)


@pytest.mark.parametrize("kind", ["factored_fc", "sparse_fc"])
@pytest.mark.parametrize("by", [-9.0, 7.0])
def test_fix_gauge_bounds_the_drift_and_changes_nothing_else(by, kind):
    network = network_of("conv", kind, "fc")
    prior, x, targets = prior_of(network, 2.0), images(), torch.arange(6) % 3
    drift_apart(network, prior, by, kind)
    outputs, weights = network(x), copy.deepcopy(dict(network.named_parameters()))
    precisions, squares = prior.precisions(), squared_norms(dict(network.named_parameters()))
    log_precision = prior.log_precision.clone()
    before = objective(network, prior, x, targets)
    tensors = ("U.weight", "U.bias", "V.weight")
    gauged = [f"blocks.{i}.{kind}.{tensor}" for i in (0, 1) for tensor in tensors]

    fix_gauge(network, prior)

    assert drifts(network, prior, kind) == pytest.approx([math.copysign(GAUGE_LIMIT, by)] * 2)
    torch.testing.assert_close(network(x), outputs, rtol=1e-10, atol=1e-10)
    after = objective(network, prior, x, targets)
    moved = prior.precisions()
    new_squares = squared_norms(dict(network.named_parameters()))
    gamma = before.effective_dimensions(log_precision)
    new_gamma = after.effective_dimensions(prior.log_precision)
    for name in prior.index:
        if name in gauged:
            assert moved[name] != pytest.approx(precisions[name])
        else:
            assert moved[name] == precisions[name]
            assert torch.equal(network.get_parameter(name), weights[name])
        energy = precisions[name] * squares[name]
        assert moved[name] * new_squares[name] == pytest.approx(energy, rel=1e-10)
        assert new_gamma[name] == pytest.approx(gamma[name], rel=1e-6)
        log_dets = [
            found.spectra[name].log_det_ratio(torch.tensor(delta[name])).item()
            for found, delta in ((before, precisions), (after, moved))
        ]
        assert log_dets[1] == pytest.approx(log_dets[0], rel=1e-6)
    for i in (0, 1):
        u, v = (f"blocks.{i}.{kind}.{factor}.weight" for factor in "UV")
        assert moved[u] * moved[v] == pytest.approx(precisions[u] * precisions[v])
    value = before.evidence(log_precision)
    assert list(after.evidence(prior.log_precision)) == pytest.approx(list(value), rel=1e-7)


@pytest.mark.parametrize("by", [-0.999 * GAUGE_LIMIT, 0.0, 0.999 * GAUGE_LIMIT])
def test_fix_gauge_does_nothing_inside_the_limit(by):
    network = network_of(*ALL)
    prior = prior_of(network, 2.0)
    drift_apart(network, prior, by)
    weights, log_precision = copy.deepcopy(network.state_dict()), prior.log_precision.clone()
    fix_gauge(network, prior)
    assert all(torch.equal(w, weights[name]) for name, w in network.named_parameters())
    torch.testing.assert_close(prior.log_precision, log_precision, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", LOG_PRECISION_BOUNDS)
def test_fix_gauge_moves_weights_and_precisions_together_at_the_bounds(bound):
    # Both factors at a bound of log δ (a pathway that is off): precisions cannot follow beyond it,
    # so the weights must not move either, or they would be rescaled at every evaluation.
    network = network_of("factored_fc", shape=(1, 16, 16), width=1)
    prior = prior_of(network)
    names = [f"blocks.0.factored_fc.{factor}.weight" for factor in "UV"]
    for name in names:
        prior.set_precision(name, math.exp(bound))
    before = squared_norms(dict(network.named_parameters()))
    energies = [prior.precisions()[name] * before[name] for name in names]
    fix_gauge(network, prior)
    after = squared_norms(dict(network.named_parameters()))
    moved = [prior.precisions()[name] * after[name] for name in names]
    assert moved == pytest.approx(energies, rel=1e-10)


def rounds_of_evidence(network, prior, x, targets, n_rounds):
    """Largest |drift| after each round of evidence, hyper steps and MAP along the gauge.

    Training would move the weights to the least δ_U ‖U‖² + δ_V ‖V‖² of the same function; here
    that is done in closed form, and the function stays fixed.
    """
    found, solver = [], FixedPointSolver()
    for _ in range(n_rounds):
        log_precision = prior.log_precision.clone()
        evidence = objective(network, prior, x, targets)
        for _ in range(5):
            log_precision = solver.step(evidence, log_precision)
        prior.log_precision.copy_(log_precision)
        schedules.fix_gauge(network, prior)
        found.append(max(map(abs, drifts(network, prior))))
        precisions = prior.precisions()
        with torch.no_grad():
            for i, block in enumerate(network.blocks):
                u, v = block.factored_fc.U, block.factored_fc.V
                energy = [
                    precisions[f"blocks.{i}.factored_fc.{name}.weight"]
                    * factor.weight.square().sum()
                    for name, factor in (("U", u), ("V", v))
                ]
                a = (energy[1] / energy[0]) ** 0.25
                u.weight.mul_(a)
                u.bias.mul_(a)
                v.weight.div_(a)
    return found


def test_factors_do_not_drift_apart(monkeypatch):
    network = network_of("conv", "factored_fc", shape=(1, 4, 4))
    prior, x, targets = prior_of(network), images(12, (1, 4, 4)), torch.arange(12) % 3
    twin = copy.deepcopy((network, prior))
    outputs = network(x)
    bounded = rounds_of_evidence(network, prior, x, targets, 100)
    assert max(bounded) <= GAUGE_LIMIT + 1e-9
    torch.testing.assert_close(network(x), outputs, rtol=1e-8, atol=1e-8)

    monkeypatch.setattr(schedules, "fix_gauge", lambda network, prior: None)
    free = rounds_of_evidence(*twin, x, targets, 40)
    assert free[19] > GAUGE_LIMIT + 1
    assert free[-1] > free[19] + 1  # and on and on, until a bound of log δ is met
    low, high = LOG_PRECISION_BOUNDS
    assert low <= twin[1].log_precision.min() <= twin[1].log_precision.max() <= high
