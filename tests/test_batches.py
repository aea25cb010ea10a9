"""Batches of the training data: every row once, shared, augmented; subsets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sklearn_softeq.batches import Batches, TrainingData, batch_rows, crop_flip
from sklearn_softeq.processes import Processes


def numbered(n):
    rows = torch.arange(n, dtype=torch.float64)
    return TrainingData(rows.view(n, 1, 1, 1), rows.long() + 100, rows + 0.5, float(n))


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 64), (64, 64), (65, 16), (120, 16), (128, 16), (250, 32), (1000, 125), (1024, 128)],
)
def test_rows_of_a_batch(n, expected):
    assert batch_rows("auto", n) == expected
    assert batch_rows("auto", 60_000) == 128
    assert batch_rows(np.int64(7), n) == 7


@pytest.mark.parametrize(("n", "size", "parts"), [(10, 4, 3), (12, 4, 3), (7, 6, 2), (9, 1, 9)])
def test_every_row_stands_once_in_an_epoch(n, size, parts):
    batches = Batches(numbered(n), size, np.random.RandomState(0))
    epochs = [list(batches), list(batches)]
    for epoch in epochs:
        sizes = [len(inputs) for inputs, _ in epoch]
        assert len(sizes) == parts
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        rows = torch.cat([inputs.flatten() for inputs, _ in epoch])
        assert sorted(rows.tolist()) == list(range(n))
        for inputs, (targets, weights, places, n_rows) in epoch:  # and keeps its target and weight
            assert torch.equal(targets, inputs.flatten().long() + 100)
            assert torch.equal(weights, inputs.flatten() + 0.5)
            assert torch.equal(places, inputs.flatten().long())
            assert n_rows == len(inputs)
    orders = [torch.cat([inputs.flatten() for inputs, _ in epoch]).tolist() for epoch in epochs]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(n))


@pytest.mark.parametrize("size", [8, 9, 1000])
def test_few_rows_are_one_batch_in_their_own_order(size):
    random_state = np.random.RandomState(0)
    before = random_state.get_state()[1].copy()
    for _ in range(2):
        [(inputs, _)] = Batches(numbered(8), size, random_state)
        assert inputs.flatten().tolist() == list(range(8))
    np.testing.assert_array_equal(random_state.get_state()[1], before)


def test_batches_repeat_with_the_random_state():
    orders = [
        [inputs.flatten().tolist() for inputs, _ in Batches(numbered(20), 7, state)]
        for state in (np.random.RandomState(3), np.random.RandomState(3), np.random.RandomState(4))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_data_in_order():
    data = numbered(7)
    parts = list(data.in_order(3))
    assert [len(inputs) for inputs, _, _ in parts] == [3, 2, 2]  # no small one is left over
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    assert torch.equal(columns[0], data.inputs)
    assert torch.equal(columns[1], data.targets)
    assert torch.equal(columns[2], data.weights)
    assert len(data) == 7


# ── rows held out


def labelled(labels):
    data = numbered(len(labels))
    return replace(data, targets=torch.tensor(labels))


@pytest.mark.parametrize("every", [2, 5])
def test_every_row_is_kept_or_held_out(every):
    data, state = replace(numbered(23), targets=torch.full((23,), 100)), torch.get_rng_state()
    kept, held = data.split(every, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    rows = [part.inputs.flatten() for part in (kept, held)]
    assert sorted(torch.cat(rows).tolist()) == list(range(23))
    assert 23 // every <= len(held) <= 23 // every + 1
    for part in (kept, held):
        assert torch.equal(part.targets, torch.full_like(part.targets, 100))
        assert torch.equal(part.weights, part.inputs.flatten() + 0.5)
        assert part.inputs.flatten().tolist() == sorted(part.inputs.flatten().tolist())
    # N is shared out by weight, also where the data stand for more than their sum.
    assert kept.n_observations + held.n_observations == pytest.approx(23.0)
    share = held.weights.sum() / data.weights.sum()
    assert held.n_observations == pytest.approx(23.0 * share.item())


def test_each_class_is_held_out_in_its_share():
    data = labelled([0] * 50 + [1] * 30 + [2] * 20)
    _, held = data.split(5, torch.Generator().manual_seed(0))
    assert torch.bincount(held.targets).tolist() == [10, 6, 4]


def test_equal_rows_are_held_out_together_whatever_their_order():
    images = torch.randn(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    targets, repeats = torch.arange(40) % 4, 1 + torch.arange(40) % 3

    def held(rows):
        weights = torch.ones(len(rows))
        data = TrainingData(images[rows], targets[rows], weights, len(rows))
        kept, out = data.split(5, torch.Generator().manual_seed(3))
        assert len(kept) + len(out) == len(rows)
        return {tuple(image.flatten().tolist()) for image in out.inputs}

    once = held(torch.arange(40))
    assert len(once) == 8
    assert held(torch.arange(40).flip(0)) == once
    assert held(torch.arange(40).repeat_interleave(repeats)) == once


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_one_row_is_kept(seed):
    labels = [0, *[1] * 7, 2, *[3] * 8, 4]
    kept, held = labelled(labels).split(5, torch.Generator().manual_seed(seed))
    assert {0, 2, 4} <= set(kept.targets.tolist())
    assert set(held.targets.tolist()) == {1, 3}


def test_fewer_different_rows_than_one_in_so_many_are_not_split():
    four, generator = labelled([0, 0, 1, 1]), torch.Generator().manual_seed(0)
    assert four.split(4, generator) is not None
    assert four.split(5, generator) is None
    assert labelled([0, 0, 1, 1, 2]).split(5, generator) is None
    rows = torch.arange(4).repeat_interleave(3)
    assert four._rows(rows).split(5, generator) is None
    assert four._rows(torch.zeros(6, dtype=torch.long)).split(5, generator) is None


def test_as_many_rows_are_held_out_as_are_asked_for_or_none():
    data = numbered(24)
    data = replace(data, targets=torch.arange(24) % 3)
    for fewest, expected in ((4, (19, 5)), (5, None)):
        found = data.split(5, torch.Generator().manual_seed(3), fewest)
        assert (found and tuple(map(len, found))) == expected


def test_rows_held_out_follow_the_generator():
    data = labelled([0, 1] * 20)
    seen = [
        data.split(5, torch.Generator().manual_seed(seed))[1].inputs.flatten().tolist()
        for seed in (0, 0, 1, 2, 3)
    ]
    assert seen[0] == seen[1]
    assert any(rows != seen[0] for rows in seen[2:])


# ── several processes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_each_batch(size):
    whole = list(Batches(numbered(20), 7, np.random.RandomState(0)))
    shares = [
        list(Batches(numbered(20), 7, np.random.RandomState(0), processes=Processes(rank, size)))
        for rank in range(size)
    ]
    for i, (inputs, (_, _, _, n_rows)) in enumerate(whole):
        parts = [share[i] for share in shares]
        rows = torch.cat([part.flatten() for part, _ in parts])
        assert sorted(rows.tolist()) == sorted(inputs.flatten().tolist())
        assert all(n == n_rows for _, (_, _, _, n) in parts)
        for part, (targets, weights, places, _) in parts:
            assert torch.equal(places, part.flatten().long())
            assert torch.equal(targets, part.flatten().long() + 100)
            assert torch.equal(weights, part.flatten() + 0.5)


# ── samples that stand for all rows


def undecided(n, seed=0):
    """Traces of output Hessians as a well trained network has them: a few large ones."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 8


def sample_of(data, size, traces, seed=0, copies=1):
    found = data.sample(size, traces, torch.Generator().manual_seed(seed), copies)
    assert len(found) == size
    assert torch.equal(found.targets, found.inputs.flatten().long() + 100)
    assert found.n_observations == data.n_observations
    return found


def means_over_draws(data, size, traces, n_draws, copies=1):
    """Over draws: how often each row is met, the weight it has, and Σ weight · trace."""
    sums = []
    counts = torch.zeros(len(data), dtype=torch.float64)
    weights = torch.zeros(len(data), dtype=torch.float64)
    for seed in range(n_draws):
        found = sample_of(data, size, traces, seed, copies)
        rows = found.targets - 100
        assert rows.bincount().max() <= copies
        counts.index_add_(0, rows, torch.ones_like(counts[rows]))
        weights.index_add_(0, rows, found.weights.double())
        sums.append((found.weights * traces[rows]).sum().double())
    return counts / n_draws, weights / n_draws, torch.stack(sums)


@pytest.mark.parametrize(("size", "copies"), [(1, 1), (7, 1), (25, 1), (49, 1), (25, 2), (49, 9)])
def test_the_mean_of_many_samples_is_the_data(size, copies):
    data = replace(numbered(50), n_observations=500.0)
    traces = undecided(50)
    chances, weights, sums = means_over_draws(data, size, traces, 4000, copies)
    expected = data.weights * (500.0 / data.weights.sum())
    once = chances.clamp_max(1)
    error = (expected**2 * (1 / once - 1) / 4000).sqrt()  # of a mean of w/π or 0
    error += expected / chances * (chances > 1) / 4000**0.5  # of one copy more or less
    assert ((weights - expected).abs() <= 5 * error + 1e-9 * expected).all()
    true = expected @ traces
    assert (sums.mean() - true).abs() <= 5 * sums.std() / 4000**0.5 + 1e-9


def test_rows_come_with_their_share_of_weight_and_of_curvature():
    data, traces, size = numbered(50), undecided(50), 10
    found, _, _ = means_over_draws(data, size, traces, n_draws=4000)
    curvature = data.weights * traces
    shares = data.weights / data.weights.sum() + curvature / curvature.sum()
    # The chances that add up to the size when none exceeds 1.
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * shares).clamp_max(1).sum() < size else (low, middle)
    expected = (low * shares).clamp_max(1)
    assert expected.sum() == pytest.approx(size)
    assert (expected == 1).sum() >= 2, "none is taken for certain"
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()
    assert (found[expected == 1] == 1).all()


def test_every_degree_of_indecision_is_represented():
    # Sums over rows by their traces vary less than with independent rows by far.
    data, traces = replace(numbered(400), weights=torch.ones(400).double()), undecided(400)
    _, _, sums = means_over_draws(data, 60, traces, n_draws=300)
    chances = (lambda s: 30 * (1 / 400 + s / s.sum()))(traces).clamp_max(1)
    independent = (traces**2 * (1 / chances - 1)).sum().sqrt()
    assert sums.std() < 0.2 * independent


@pytest.mark.parametrize("traces", [torch.zeros(30), torch.full((30,), 1e-30), torch.ones(30)])
def test_rows_that_are_alike_are_drawn_alike(traces):
    data = replace(numbered(30), weights=torch.ones(30))
    chances, _, _ = means_over_draws(data, 6, traces, n_draws=2000)
    assert (chances - 0.2).abs().max() <= 5 * (0.2 * 0.8 / 2000) ** 0.5
    found = sample_of(data, 6, traces)
    torch.testing.assert_close(found.weights, torch.full((6,), 5.0))  # 30 / 6


def test_samples_repeat_with_the_generator():
    data, traces = numbered(50), undecided(50)
    first, again, other = (sample_of(data, 10, traces, seed) for seed in (0, 0, 1))
    assert torch.equal(again.inputs, first.inputs)
    assert not torch.equal(other.inputs, first.inputs)


def test_no_step_leads_beyond_the_last_row(monkeypatch):
    # In float32 the last of many steps is rounded to the number of rows itself.
    data, traces = numbered(5000), undecided(5000)
    monkeypatch.setattr(torch, "rand", lambda *_, **k: torch.tensor(1 - 2**-53, dtype=k["dtype"]))
    for size in (4096, 4999):
        found = sample_of(data, size, traces)
        assert traces.argmax() + 100 in found.targets  # the last one in their order
        assert (found.weights > 0).all()


def test_rows_that_are_alike_come_in_a_random_order():
    # Every tenth row, as even steps in the order of the data would take, may be of one class.
    data = replace(numbered(200), weights=torch.ones(200))
    for seed in range(5):
        rows = sample_of(data, 20, torch.ones(200), seed).targets - 100
        assert len((rows % 10).unique()) > 4


def test_a_single_row_may_hold_all_curvature():
    data, traces = numbered(50), torch.zeros(50)
    traces[17] = 0.5
    for seed in range(20):
        rows = sample_of(data, 5, traces, seed).targets - 100
        assert 17 in rows


def test_a_row_with_most_of_the_curvature_comes_more_than_once():
    data, traces = replace(numbered(50), weights=torch.ones(50)), torch.full((50,), 0.01)
    traces[17] = 2.0
    # Half of 20 by weight, half by trace, of which the row has 2 of 2.49: 20 / 2 · (1/50 + .803).
    for copies, expected in ((1, 1), (3, 3), (9, 8.23)):
        found = [sample_of(data, 20, traces, seed, copies) for seed in range(300)]
        counts = torch.stack([(f.targets == 117).sum() for f in found]).double()
        assert counts.mean().item() == pytest.approx(expected, abs=0.1)
        assert counts.max() - counts.min() <= 1
        assert all(f.weights.sum().item() == pytest.approx(50, rel=0.5) for f in found)


@pytest.mark.parametrize(("weights", "unit"), [((1.0, 1.0), True), ((1.0, 2.0), False)])
def test_unit_weights(weights, unit):
    data = TrainingData(torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), torch.tensor(weights), 3.0)
    assert data.unit_weights is unit


# ── augmentation


def images(n=6, height=16, width=8):
    return torch.arange(1.0, n * 2 * height * width + 1).view(n, 2, height, width)


def augmented(augment, seed=0, data=None, epochs=1):
    data = data or TrainingData(images(), torch.arange(6), torch.ones(6), 6.0)
    batches = Batches(data, 4, np.random.RandomState(0), augment, np.random.RandomState(seed))
    return [torch.cat([inputs for inputs, _ in batches]) for _ in range(epochs)]


def test_augmentation_sees_each_batch_and_leaves_the_data():
    data = TrainingData(images(), torch.arange(6), torch.ones(6), 6.0)
    seen = []

    def brighter(batch):
        seen.append(len(batch))
        return batch.add_(100.0)  # in place, as a careless one may do

    [plain], [found] = augmented(None, data=data), augmented(brighter, data=data)
    assert seen == [3, 3]
    assert torch.equal(found, plain + 100.0)
    assert torch.equal(data.inputs, images())


def test_random_numbers_of_an_augmentation_follow_its_seed_alone():
    def noisy(batch):
        return batch + torch.rand(len(batch), 1, 1, 1)

    state = torch.get_rng_state()
    first = augmented(noisy, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = augmented(noisy, epochs=2), augmented(noisy, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    shifts = [found - plain for found, plain in zip(first, augmented(None, epochs=2), strict=True)]
    assert not torch.equal(first[0], other[0])
    assert not torch.allclose(shifts[0], shifts[1])  # other numbers in the next epoch


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (lambda batch: batch[:, :1], "(3, 1, 16, 8)"),
        (lambda batch: None, "NoneType"),
        (lambda batch: batch.numpy(), "ndarray"),
    ],
)
def test_what_an_augmentation_must_return(augment, said):
    with pytest.raises(ValueError, match=r"tensor of the shape \(3, 2, 16, 8\)") as error:
        augmented(augment)
    assert said in str(error.value)


def windows(image):
    """Every crop of an image with margins of an eighth, as it is and flipped."""
    height, width = image.shape[1:]
    rows, columns = height // 8, width // 8
    padded = torch.nn.functional.pad(image, (columns, columns, rows, rows))
    for i in range(2 * rows + 1):
        for j in range(2 * columns + 1):
            crop = padded[:, i : i + height, j : j + width]
            yield from (crop, crop.flip(2))


def test_crop_flip_draws_from_all_crops_and_their_mirror_images():
    torch.manual_seed(0)
    one = images(1)
    found = crop_flip(one.expand(3000, -1, -1, -1))
    choices = torch.stack(list(windows(one[0])))  # (5 · 3 · 2, 2, 16, 8)
    equal = (found[:, None] == choices).flatten(2).all(2)  # (3000, 30)
    assert (equal.sum(1) == 1).all()
    assert (equal.sum(0) - 100).abs().max() < 5 * 10


def test_crop_flip_treats_samples_apart_and_keeps_the_dtype():
    torch.manual_seed(0)
    found = crop_flip(images(8).double())
    assert found.dtype == torch.float64
    for image, result in zip(images(8).double(), found, strict=True):
        assert any(torch.equal(result, window) for window in windows(image))


def test_an_image_without_room_for_a_margin_is_only_flipped():
    torch.manual_seed(0)
    small = torch.arange(12.0).view(1, 1, 3, 4).expand(20, 1, 3, 4)
    found = crop_flip(small)
    same, flipped = ((found == other).flatten(1).all(1) for other in (small, small.flip(3)))
    assert (same ^ flipped).all()
    assert 0 < same.sum() < 20
