"""Densities against torch's; roots and sketches against the Hessian of autograd."""

import dataclasses
import math
from itertools import product

import pytest
import torch

from sklearn_softeq import likelihoods
from sklearn_softeq.likelihoods import Categorical, Gaussian

CATEGORICAL = Categorical()


def random_logits(n=6, k=5, scale=1.0):
    return scale * torch.randn(n, k, dtype=torch.float64)


def saturated_logits():
    """Probabilities that are 0, 1 or tiny to the last bit, the large one at each place."""
    logits = torch.zeros(3, 3, dtype=torch.float64)
    logits[range(3), range(3)] = torch.tensor([1e4, 40.0, 800.0], dtype=torch.float64)
    return logits


LOGITS = {
    "one class": lambda: random_logits(k=1),
    "two classes": lambda: random_logits(k=2),
    "five classes": random_logits,
    "large": lambda: random_logits(scale=20.0),
    "saturated": saturated_logits,
    "all equal": lambda: torch.zeros(2, 4, dtype=torch.float64),
}
each_logits = pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)

MODELS = [CATEGORICAL, Gaussian(), Gaussian(0.2)]
each_model = pytest.mark.parametrize("likelihood", MODELS, ids=str)


def targets_for(likelihood, outputs):
    if likelihood is CATEGORICAL:
        return torch.arange(len(outputs)) % outputs.shape[1]
    return torch.randn_like(outputs)


def negative_hessian(likelihood, outputs):
    targets = targets_for(likelihood, outputs)
    return -torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda f, y=y: likelihood.log_prob(f[None], y[None]).sum(), row
            )
            for row, y in zip(outputs, targets, strict=True)
        ]
    )


def square(columns):
    return columns @ columns.transpose(1, 2)


@each_model
def test_log_prob_against_torch(likelihood):
    outputs = random_logits()
    targets = targets_for(likelihood, outputs)
    if likelihood is CATEGORICAL:
        expected = torch.distributions.Categorical(logits=outputs).log_prob(targets)
    else:
        scale = likelihood.noise_variance**0.5
        expected = torch.distributions.Normal(outputs, scale).log_prob(targets).sum(1)
    torch.testing.assert_close(likelihood.log_prob(outputs, targets), expected)


@each_logits
def test_categorical_root_is_the_hessian(logits):
    outputs = logits()
    root = CATEGORICAL.hessian_root(outputs)
    n, k = outputs.shape
    assert root.shape == (n, k, k - 1)
    expected = negative_hessian(CATEGORICAL, outputs)
    torch.testing.assert_close(square(root), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("noise_variance", [0.04, 1.0, 9.0])
def test_gaussian_root_is_the_hessian(noise_variance):
    outputs, likelihood = random_logits(), Gaussian(noise_variance)
    expected = negative_hessian(likelihood, outputs)
    torch.testing.assert_close(square(likelihood.hessian_root(outputs)), expected)


@each_model
def test_float32_root(likelihood):
    outputs = random_logits().float()
    root = likelihood.hessian_root(outputs)
    assert root.dtype == torch.float32
    expected = square(likelihood.hessian_root(outputs.double())).float()
    torch.testing.assert_close(square(root), expected)


@each_logits
def test_columns_of_the_root_come_by_their_size(logits):
    # What the first j columns leave is the covariance of the classes behind.
    outputs = logits()
    expected = negative_hessian(CATEGORICAL, outputs)
    columns = CATEGORICAL.hessian_root(outputs).unbind(-1)
    for row, p in enumerate(outputs.softmax(1)):
        order = p.argsort(descending=True, stable=True)
        for j, column in enumerate(columns, 1):
            expected[row] -= torch.outer(column[row], column[row])
            done = order[:j]
            assert expected[row, done].abs().max() <= 1e-12
    assert (expected.abs() <= 1e-12).all()


def test_a_sketch_of_two_classes_is_exact():
    # And of any number of them where all but two are out of the question.
    for outputs in (
        random_logits(k=2),
        torch.cat([random_logits(k=2), torch.full((6, 3), -1e4)], 1),
    ):
        columns = CATEGORICAL.hessian_sketch(outputs, 1, torch.Generator().manual_seed(0))
        expected = square(CATEGORICAL.hessian_root(outputs))
        torch.testing.assert_close(square(columns), expected, atol=1e-12, rtol=1e-10)


@each_logits
@each_model
def test_trace_of_the_hessian(likelihood, logits):
    outputs = logits()
    found = likelihood.hessian_trace(outputs)
    expected = negative_hessian(likelihood, outputs).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-10)
    assert (found >= 0).all()


@each_model
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sketch_is_unbiased_over_all_signs(monkeypatch, likelihood, k):
    # The mean over every pattern of signs is the expectation itself.
    outputs = random_logits(k=k)
    total = torch.zeros(len(outputs), k, k, dtype=torch.float64)
    for pattern in product((-1.0, 1.0), repeat=k):
        signs = torch.tensor(pattern, dtype=torch.float64)[None, :, None]
        monkeypatch.setattr(likelihoods, "_signs", lambda f, m, g, s=signs: s.expand(len(f), k, m))
        total += square(likelihood.hessian_sketch(outputs, 2, torch.Generator())) / 2**k
    torch.testing.assert_close(
        total, square(likelihood.hessian_root(outputs)), atol=1e-12, rtol=1e-10
    )


@each_model
def test_sketch_is_unbiased_over_draws(likelihood):
    outputs, n_sketches = random_logits(n=4, k=3), 20_000
    columns = likelihood.hessian_sketch(outputs, n_sketches, torch.Generator().manual_seed(1))
    assert columns.shape == (4, 3, n_sketches)
    one_by_one = n_sketches * columns[:, :, None] * columns[:, None]  # (n, K, K, sketches)
    error = one_by_one.std(-1) / n_sketches**0.5
    expected = square(likelihood.hessian_root(outputs))
    assert ((one_by_one.mean(-1) - expected).abs() <= 5 * error + 1e-12).all()
    # Rows are drawn independently of each other.
    inner = (columns[:1] * columns[1:]).sum(1) * n_sketches
    assert inner.mean(-1).abs().max() < 5 * inner.std(-1).max() / n_sketches**0.5


@pytest.mark.parametrize("logits", [(0.0, 0.0, -40.0), (0.0, -8.0, -45.0, -46.0)])
def test_sketch_of_near_certain_rows_in_single_precision(logits):
    outputs = torch.tensor([logits])
    columns = CATEGORICAL.hessian_sketch(outputs, 2000, torch.Generator().manual_seed(0))
    assert columns.sum(1).abs().max() < 1e-6  # nothing in the direction that no logit sees
    exact = CATEGORICAL.hessian_trace(outputs.double()).item()
    assert columns.double().square().sum().item() == pytest.approx(exact, rel=1e-3)


@each_model
@pytest.mark.parametrize("random", ["hessian_sketch", "hessian_labels"])
def test_random_columns_follow_their_generator_alone(likelihood, random):
    outputs, draw = random_logits(), getattr(likelihood, random)
    state = torch.get_rng_state()
    first, again, other = (
        draw(outputs, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.dtype == torch.float64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# ── labels of the model

N_LABELS = 20_000


def drawn(likelihood, outputs, seed=1):
    """Columns as if each were the only one, (n, K, labels)."""
    generator = torch.Generator().manual_seed(seed)
    return N_LABELS**0.5 * likelihood.hessian_labels(outputs, N_LABELS, generator)


def near(samples, expected):
    """Whether the mean over the last axis is within its error of what it should be."""
    error = 5 * samples.std(-1) / N_LABELS**0.5
    unseen = 1 / N_LABELS  # what is rarer than that may not have been drawn at all
    return ((samples.mean(-1) - expected).abs() <= error + unseen).all()


@each_logits
def test_labels_have_the_hessian_for_their_mean_square(logits):
    outputs = logits()
    columns = drawn(CATEGORICAL, outputs)
    assert columns.shape == (*outputs.shape, N_LABELS)
    expected = negative_hessian(CATEGORICAL, outputs)
    assert near(columns[:, :, None] * columns[:, None], expected)
    assert near(columns, torch.zeros_like(outputs))


@pytest.mark.parametrize("noise_variance", [0.04, 1.0, 9.0])
def test_noise_has_the_hessian_for_its_mean_square(noise_variance):
    outputs, likelihood = random_logits(n=4, k=3), Gaussian(noise_variance)
    columns = drawn(likelihood, outputs)
    assert columns.shape == (*outputs.shape, N_LABELS)
    expected = negative_hessian(likelihood, outputs)
    assert near(columns[:, :, None] * columns[:, None], expected)
    # Of the size of a score of the model's own noise, not only on average.
    assert near(columns**4, 3 * torch.full_like(outputs, noise_variance**-2))


@each_logits
def test_a_label_is_one_class_for_sure(logits):
    # ∇ log p(y | f) for some class y of positive probability, at each draw.
    outputs = logits()
    probabilities = outputs.softmax(1)
    columns = 2 * CATEGORICAL.hessian_labels(outputs, 4, torch.Generator().manual_seed(0))
    labels = columns + probabilities[:, :, None]
    expected = torch.nn.functional.one_hot(labels.argmax(1), outputs.shape[1]).transpose(1, 2)
    torch.testing.assert_close(labels, expected.double(), atol=1e-12, rtol=0)
    assert (probabilities.gather(1, labels.argmax(1)) > 0).all()


@each_model
def test_labels_are_independent_of_each_other(likelihood):
    columns = drawn(likelihood, random_logits(n=3, k=3))
    zero = torch.zeros(3, 3, dtype=torch.float64)
    # from one column to the next, and from one row to the next
    assert near(columns[:, :, None] * columns[:, None].roll(1, -1), zero)
    assert near(columns[:, :, None] * columns.roll(1, 0)[:, None], zero)
    # as are their squares
    squares = columns**2 - columns.square().mean(-1, keepdim=True)
    assert near(squares * squares.roll(1, -1), zero)


@each_model
def test_labels_in_float32(likelihood):
    outputs = random_logits().float()
    found = likelihood.hessian_labels(outputs, 3, torch.Generator().manual_seed(1))
    assert found.dtype == torch.float32
    expected = likelihood.hessian_labels(outputs.double(), 3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected.float())


def test_constant_log_likelihood_is_the_best_constant():
    targets = torch.tensor([0, 2, 2, 0, 2])  # class 1 is missing
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0], dtype=torch.float64)
    (found,) = Categorical().constant_log_likelihoods(targets, weights)
    # By ascent over the logits of a constant prediction.
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10)

    def loss():
        optimizer.zero_grad()
        log_prob = Categorical().log_prob(logits.expand(5, 3), targets)
        value = -(weights * log_prob).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert found == pytest.approx(-loss().item(), abs=1e-4)
    single = torch.zeros(4, dtype=torch.long)
    assert Categorical().constant_log_likelihoods(single, weights[:4]) == (0,)


# ── the scale of logits


def test_scale_of_logits_in_closed_form():
    # Two classes, margins m = ±2: log p = −log(1 + exp(−s m)).
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    targets, weights = torch.tensor([0, 1]), torch.tensor([1.0, 3.0], dtype=torch.float64)
    for scale in (0.1, 0.5, 0.99):
        value = -4 * math.log1p(math.exp(-2 * scale))
        found = CATEGORICAL.scale_of_outputs(logits, targets, weights, value)
        assert found == pytest.approx(scale, abs=1e-8)


def test_logits_are_not_scaled_up_or_away():
    logits, targets = random_logits(), torch.tensor([0, 1, 2, 3, 4, 0])
    logits[range(6), targets] = logits.max() + 1.0  # right, but not sure
    weights = torch.ones(6, dtype=torch.float64)
    reached = CATEGORICAL.log_prob(logits, targets).sum().item()
    for value in (reached, reached + 1.0, -6 * math.log(5), -1e9):
        assert CATEGORICAL.scale_of_outputs(logits, targets, weights, value) == 1.0


# ── noise

UNLIKE = (0.2, 9.0, 1e-3)
NOISY = [
    Gaussian(0.2, True, 0.7),
    Gaussian(3.0),
    Gaussian(1e-3, True),
    Gaussian(UNLIKE, True, 0.7),
    Gaussian(UNLIKE),
]
each_noise = pytest.mark.parametrize("likelihood", NOISY, ids=str)


def weighted_numbers(n=7, k=3):
    outputs = random_logits(n, k)
    return outputs, outputs + 0.3 * torch.randn_like(outputs), torch.rand(n).double() + 0.5


def of_all(likelihood, outputs, targets, weights):
    """Log likelihoods by output, number of observations: as likelihoods are told of them."""
    log_probs = likelihood.log_probs(outputs, targets)
    return (weights @ log_probs).tolist(), weights.sum().item()


def test_densities_are_in_the_units_that_they_are_said_to_be():
    # t = 5 y + 1: the density of t is that of y over 5, for each output.
    outputs, targets, _ = weighted_numbers()
    found = Gaussian(0.2, log_units=-3 * math.log(5.0)).log_prob(outputs, targets)
    normal = torch.distributions.Normal(5 * outputs + 1, 5 * math.sqrt(0.2))
    torch.testing.assert_close(found, normal.log_prob(5 * targets + 1).sum(1))


@each_noise
def test_squares_are_told_from_the_log_likelihood(likelihood):
    outputs, targets, weights = weighted_numbers()
    noise = likelihood.noise(*of_all(likelihood, outputs, targets, weights))
    if not likelihood.learned:
        assert noise is None
        assert likelihood.log_hyperparameters() == []
        assert likelihood.with_log_hyperparameters([]) == likelihood
        return
    squares = weights @ (outputs - targets).square()  # (K,)
    several = isinstance(likelihood.noise_variance, tuple)
    expected = squares.tolist() if several else [squares.sum().item()]
    assert noise.squares == pytest.approx(expected, rel=1e-9)
    assert noise.n_numbers == pytest.approx((1 if several else 3) * weights.sum().item())
    assert noise.log_precisions == tuple(-math.log(v) for v in likelihood.variances)
    assert likelihood.log_hyperparameters() == list(noise.log_precisions)
    other = likelihood.with_log_hyperparameters([math.log(4.0)] * len(expected))
    assert other.variances == pytest.approx([0.25] * len(expected))
    assert isinstance(other.noise_variance, tuple) == several
    assert (other.learned, other.log_units) == (True, likelihood.log_units)


@pytest.mark.parametrize("unit", [1.0, 1e6, 1e-12])
def test_small_squares_are_told_whatever_the_unit(unit):
    apart = 1e-3 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    likelihood = Gaussian((1.0,), True, -math.log(unit))
    told = of_all(likelihood, apart, torch.zeros(1000, 1), torch.ones(1000).double())
    squares = apart.double().square().sum().item()
    assert likelihood.noise(*told).squares == pytest.approx((squares,), rel=1e-5)


@each_noise
def test_the_best_noise_is_the_best(likelihood):
    outputs, targets, weights = weighted_numbers()
    told = of_all(likelihood, outputs, targets, weights)
    best = likelihood.at_best_noise(*told)
    value = sum(of_all(best, outputs, targets, weights)[0])
    assert likelihood.score(*told) == pytest.approx(value / told[1], rel=1e-9)
    for i, factor in product(range(len(best.variances)), (0.9, 1.1)):
        variances = list(best.variances)
        variances[i] *= factor
        near = tuple(variances) if len(variances) > 1 else variances[0]
        near = dataclasses.replace(best, noise_variance=near)
        assert sum(of_all(near, outputs, targets, weights)[0]) < value


@each_noise
def test_the_best_constant_is_the_mean(likelihood):
    _, targets, weights = weighted_numbers()
    found = likelihood.constant_log_likelihoods(targets, weights)
    mean = (weights @ targets / weights.sum()).expand_as(targets)
    assert found == pytest.approx(of_all(likelihood, mean, targets, weights)[0])
    for shift in (-0.1, 0.1):
        others = of_all(likelihood, mean + shift, targets, weights)[0]
        assert all(other < best for other, best in zip(others, found, strict=True))


@each_noise
def test_what_is_explained_is_the_share_of_the_variance(likelihood):
    outputs, targets, weights = weighted_numbers()
    log_likelihoods, n_observations = of_all(likelihood, outputs, targets, weights)
    constants = likelihood.constant_log_likelihoods(targets, weights)
    found = likelihood.explained(log_likelihoods, constants, n_observations)
    apart = targets - weights @ targets / weights.sum()
    left, whole = (weights @ d.square().sum(1) for d in (outputs - targets, apart))
    assert found == pytest.approx(1 - (left / whole).item(), rel=1e-9)
    # And it says where the score is, from that of the constant, if it is so of each noise.
    alike = weights @ apart.square() * (1 - found)
    alike = Gaussian(tuple(alike.tolist()), log_units=likelihood.log_units)
    at = [
        -0.5 * (left / v + n_observations * alike._normaliser(v, 3))
        for left, v in zip(alike.variances, likelihood._of_each(3), strict=True)
    ]
    scores = [likelihood.score(values, n_observations) for values in (at, constants)]
    assert likelihood.score_of(found, scores[1], 3) == pytest.approx(scores[0])
    nothing = torch.zeros_like(targets)
    told = of_all(likelihood, nothing, nothing, weights)
    assert likelihood.explained(told[0], told[0], *told[1:]) == 1.0
    assert math.isfinite(likelihood.score(*told))


def test_scores_of_labels_are_what_they_are():
    outputs, targets = random_logits(), torch.arange(6) % 5
    weights = torch.rand(6, dtype=torch.float64)
    told = of_all(CATEGORICAL, outputs, targets, weights)
    assert CATEGORICAL.score(*told) == told[0][0] / told[1]
    assert CATEGORICAL.deviations == ()
    assert CATEGORICAL.at_best_noise(*told) is CATEGORICAL
    assert CATEGORICAL.noise(*told) is None
    assert CATEGORICAL.log_hyperparameters() == []
    assert CATEGORICAL.with_log_hyperparameters([]) is CATEGORICAL
    assert CATEGORICAL.stake(-2.3, 10) == 2.3
    assert CATEGORICAL.score_of(0.5, -2.0, 10) == -1.0


@each_model
def test_number_of_columns_is_that_of_the_root(likelihood):
    outputs = random_logits(k=4)
    assert likelihood.hessian_root(outputs).shape[2] == likelihood.n_columns(4)


@pytest.mark.parametrize("variance", [0.04, 9.0])
def test_the_pace_makes_steps_those_of_least_squares(variance):
    outputs, targets, _ = weighted_numbers()
    outputs.requires_grad_()
    likelihood = Gaussian(variance)
    (found,) = torch.autograd.grad(likelihood.log_prob(outputs, targets).sum(), outputs)
    torch.testing.assert_close(likelihood.pace * found, (targets - outputs).detach())
    assert CATEGORICAL.pace == 1.0


def test_at_the_pace_of_several_noises_no_step_is_longer_than_that():
    outputs, targets, _ = weighted_numbers()
    outputs.requires_grad_()
    likelihood = Gaussian(UNLIKE)
    (found,) = torch.autograd.grad(likelihood.log_prob(outputs, targets).sum(), outputs)
    steps, longest = likelihood.pace * found, (targets - outputs).detach()
    assert (steps.abs() <= longest.abs() * (1 + 1e-12)).all()
    torch.testing.assert_close(steps[:, 2], longest[:, 2])  # of the quietest


def test_a_noise_for_each_output():
    outputs, targets, _ = weighted_numbers()
    likelihood, variances = Gaussian(UNLIKE), torch.tensor(UNLIKE, dtype=torch.float64)
    density = torch.distributions.Normal(outputs, variances.sqrt()).log_prob(targets)
    torch.testing.assert_close(likelihood.log_probs(outputs, targets), density)
    torch.testing.assert_close(likelihood.log_prob(outputs, targets), density.sum(1))
    assert likelihood.deviations == pytest.approx(variances.sqrt().tolist())
    hessian = negative_hessian(likelihood, outputs)
    root = likelihood.hessian_root(outputs)
    torch.testing.assert_close(square(root), hessian)
    assert (root * (1 - torch.eye(3)) == 0).all()  # each column is of one output
    torch.testing.assert_close(
        likelihood.hessian_trace(outputs), hessian.diagonal(dim1=1, dim2=2).sum(1)
    )
    sketches = likelihood.hessian_sketch(outputs, 2, torch.Generator().manual_seed(0))
    signs = Gaussian().hessian_sketch(outputs, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sketches, signs / variances.sqrt()[:, None])
    labels = likelihood.hessian_labels(outputs, 2, torch.Generator().manual_seed(0))
    errors = Gaussian().hessian_labels(outputs, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(labels, errors / variances.sqrt()[:, None])


def test_a_mean_has_no_scale_to_bring_down():
    outputs = torch.randn(3, 2)
    assert Gaussian().scale_of_outputs(outputs, outputs, torch.ones(3), -1e3) == 1.0
