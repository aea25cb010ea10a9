"""The regressor: its noise, units of the targets, deviations, weights, chunks, what it leaves."""

import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from cases import chain
from nets import net_of, numbers_of
from references import linear_regression_map
from scipy import sparse
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from skorch.callbacks import Callback

from sklearn_softeq import SoftEquivariantRegressor, marginal_likelihood_score, trials
from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.layers import FC
from sklearn_softeq.likelihoods import Gaussian
from sklearn_softeq.posterior import Posterior
from sklearn_softeq.predictive import laplace_variances

FAST = {
    "width": 2,
    "max_epochs": 12,
    "burn_in": 2,
    "evidence_every": 2,
    "hyper_warmup": 2,
    "random_state": 0,
}
# No trials: a single way to begin.
PLAIN = {**FAST, "pathways": "factored_fc"}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def data():
    """40 images of 4×4 pixels, and two numbers of each: where the light is."""
    images = load_digits().data[:40].reshape(-1, 1, 4, 2, 4, 2).mean((3, 5)) / 16
    rows, columns = (images.sum((1, axis)) @ np.arange(4.0) for axis in (3, 2))
    y = np.stack([rows, columns], 1) / images.sum((1, 2, 3))[:, None]
    return images, y + 0.02 * np.random.default_rng(0).normal(size=y.shape)


def blobs(n, seed=0):
    """Images of a blob on 8×8 pixels, and where it is."""
    rng = np.random.default_rng(seed)
    centre, grid = rng.uniform(1.5, 5.5, (n, 2)), np.arange(8)
    apart = [(grid - c[:, None]) ** 2 for c in centre.T]
    images = np.exp(-0.5 * (apart[0][:, :, None] + apart[1][:, None, :]))
    return images + 0.05 * rng.normal(size=images.shape), centre


def same_fit(found, expected, X, **tolerance):
    np.testing.assert_allclose(found.predict(X), expected.predict(X), **tolerance)
    np.testing.assert_allclose(found.noise_std_, expected.noise_std_, **tolerance)
    np.testing.assert_allclose(
        found.log_marginal_likelihood_value_, expected.log_marginal_likelihood_value_, **tolerance
    )
    np.testing.assert_allclose(found.prior_precision_, expected.prior_precision_, **tolerance)


# ── forms of y


def test_predictions_have_the_form_of_the_targets(data):
    X, y = data
    for targets in (y[:, 0], y[:, :1], y, y.tolist(), torch.tensor(y)):
        reg = SoftEquivariantRegressor(**{**PLAIN, "max_epochs": 4}).fit(X, targets)
        shape = np.asarray(targets).shape
        mean, deviation = reg.predict(X, return_std=True)
        assert mean.shape == deviation.shape == reg.predict(X).shape == shape
        assert reg.noise_std_.shape == reg.target_mean_.shape == (*shape, 1)[1:2]
        assert reg.score(X, targets) == pytest.approx(r2_score(targets, reg.predict(X)))


def test_one_number_as_a_vector_or_a_column_is_the_same(data):
    X, y = data
    found, expected = (SoftEquivariantRegressor(**PLAIN).fit(X, t) for t in (y[:, 0], y[:, :1]))
    np.testing.assert_array_equal(found.predict(X), expected.predict(X)[:, 0])
    np.testing.assert_array_equal(found.scores_, expected.scores_)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.zeros((40, 2, 2)), "dim 3|shape"),
        (np.zeros((40, 0)), r"0 feature|shape \(40, 0\)"),
        (np.full(40, 1j), "omplex"),
        (sparse.csr_array(np.eye(40)), "parse|dense"),
        (np.array(["a"] * 40), "real numbers|convert"),
        (np.full(40, np.nan), "NaN"),
        (None, "requires y to be passed"),
    ],
    ids=["cube", "none", "complex", "sparse", "strings", "nan", "missing"],
)
def test_targets_that_are_no_numbers(y, said, data):
    with pytest.raises((ValueError, TypeError), match=said):
        SoftEquivariantRegressor(**PLAIN).fit(data[0], y)


def test_tags():
    tags = SoftEquivariantRegressor().__sklearn_tags__()
    assert tags.estimator_type == "regressor"
    assert tags.target_tags.multi_output
    assert tags.input_tags.three_d_array


# ── units


def test_another_unit_is_the_same_fit(data):
    X, y = data
    a, b = np.array([8.0, 0.25]), np.array([3.0, -70.0])
    found, expected = (SoftEquivariantRegressor(**FAST).fit(X, t) for t in (a * y + b, y))
    np.testing.assert_allclose(found.predict(X), a * expected.predict(X) + b, rtol=1e-6)
    np.testing.assert_allclose(found.noise_std_, a * expected.noise_std_, rtol=1e-6)
    shift = np.log(a).sum()  # of each observation
    for name in ("scores_", "log_marginal_likelihood_value_"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(ours, theirs - 40 * shift, rtol=1e-6)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_ + shift, rtol=1e-6)
    for name, score in expected.symmetry_trials_.items():
        assert found.symmetry_trials_[name] == pytest.approx(score - shift)
    np.testing.assert_allclose(found.prior_precision_, expected.prior_precision_, rtol=1e-5)


def test_scale_of_the_targets_is_weighted(data):
    X, y = data
    weights = np.arange(40) % 3 + 0.5
    reg = SoftEquivariantRegressor(**{**PLAIN, "max_epochs": 2}).fit(X, y, weights)
    mean = np.average(y, axis=0, weights=weights)
    np.testing.assert_allclose(reg.target_mean_, mean)
    variance = np.average((y - mean) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(reg.target_scale_, np.sqrt(variance))


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_targets_of_any_size(size, data):
    X, y = data
    reg = SoftEquivariantRegressor(**PLAIN).fit(X, size * y)
    expected = SoftEquivariantRegressor(**PLAIN).fit(X, y)
    np.testing.assert_allclose(reg.predict(X), size * expected.predict(X), rtol=1e-4)


def test_an_output_that_is_constant(data):
    X, y = data
    settings = {**FAST, "max_epochs": 24}
    reg = SoftEquivariantRegressor(**settings).fit(X, np.stack([y[:, 0], np.full(40, 7.1)], 1))
    assert reg.target_scale_[1] == 1.0
    np.testing.assert_allclose(reg.predict(X)[:, 1], 7.1, atol=0.5)
    reg = SoftEquivariantRegressor(**FAST).fit(X, np.full(40, -3.0))
    np.testing.assert_allclose(reg.predict(X), -3.0, atol=0.1)
    assert np.isfinite(reg.log_marginal_likelihood_value_)


# ── the noise


def test_noise_is_found():
    # Light of the whole image, which a free readout has at once, with a known noise.
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 1, 2, 2))
    y = X.sum((1, 2, 3)) + 0.5 * rng.normal(size=300)
    settings = {"pathways": "fc", "width": 2, "max_epochs": 60, "random_state": 0}
    reg = SoftEquivariantRegressor(**settings, hyper_warmup=10).fit(X, y)
    assert reg.noise_std_[0] == pytest.approx(0.5, rel=0.12)
    assert reg.score(X, y) > 0.9


def test_each_output_has_its_own_noise():
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(200, 4, 4)), rng.normal(size=(500, 4, 4))
    truth, expected = (4 * images.mean((1, 2)) for images in (X, new))
    y = np.stack([truth, truth + rng.normal(size=200)], 1)
    settings = {"pathways": "conv", "max_epochs": 60, "random_state": 0}
    reg = SoftEquivariantRegressor(**settings).fit(X, y)
    # One noise for both was .53, .74, and the errors .13, .28.
    assert reg.noise_std_[0] < 0.02
    assert reg.noise_std_[1] == pytest.approx(1.0, rel=0.15)
    errors = np.sqrt(np.mean((reg.predict(new) - expected[:, None]) ** 2, axis=0))
    assert errors[0] < 0.02
    assert errors[1] < 0.2
    assert reg.history_["noise"].shape == (len(reg.scores_), 2)
    # What was found by the last of them; the cool-down's end moves it once more.
    np.testing.assert_allclose(reg.history_["noise"][-1], reg.noise_std_, rtol=0.3)


def test_a_noise_for_each_output_by_random_columns():
    # Parts of the outputs come from other rows then.
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 1, 2, 2))
    truth = X.sum((1, 2, 3))[:, None]
    y = truth + rng.normal(size=(300, 2)) * [0.1, 1.0]
    settings = {"pathways": "fc", "width": 2, "max_epochs": 40, "random_state": 0}
    found, expected = (
        SoftEquivariantRegressor(**settings, hyper_warmup=5, curvature=curvature).fit(X, y)
        for curvature in ("rademacher", "exact")
    )
    np.testing.assert_allclose(found.noise_std_, expected.noise_std_, rtol=0.01)
    assert found.noise_std_[0] < 0.2
    assert found.noise_std_[1] == pytest.approx(1.0, rel=0.05)


def test_a_noise_that_is_given_is_in_units_of_the_targets(data):
    X, y = data
    y = y * [1.0, 30.0]
    reg = SoftEquivariantRegressor(**FAST, noise=0.4).fit(X, y)
    np.testing.assert_allclose(reg.noise_std_, 0.4)
    assert reg.target_scale_[0] == reg.target_scale_[1]
    assert reg.target_scale_[0] == pytest.approx(np.sqrt(np.var(y, axis=0).mean()))
    small = np.stack([1e-4 * y[:, 0], np.zeros(40)], 1)  # what is constant has no scale of its own
    found = SoftEquivariantRegressor(**{**PLAIN, "max_epochs": 1}, noise=1e-5).fit(X, small)
    assert found.target_scale_[1] == pytest.approx(1e-4 * np.std(y[:, 0]) / np.sqrt(2))
    # What it makes of the residuals is their density.
    apart = torch.tensor(y - reg.predict(X))
    density = torch.distributions.Normal(0.0, 0.4).log_prob(apart).sum().item()
    data = reg._prepare(X, y, None, first=False)
    assert reg.net_.log_likelihood(data) == pytest.approx(density)


def test_density_of_the_residuals_with_a_learned_noise(data):
    X, y = data
    reg = SoftEquivariantRegressor(**FAST).fit(X, y * [1.0, 30.0])
    noise = torch.tensor(reg.noise_std_)
    apart = torch.tensor(y * [1.0, 30.0] - reg.predict(X))
    density = torch.distributions.Normal(0.0, noise).log_prob(apart).sum().item()
    data = reg._prepare(X, y * [1.0, 30.0], None, first=False)
    assert reg.net_.log_likelihood(data) == pytest.approx(density)


def test_with_fixed_precisions_the_noise_is_still_learned(data):
    reg = SoftEquivariantRegressor(**FAST, learn_prior=False, prior_precision=0.5).fit(*data)
    assert set(np.round(list(reg.prior_precisions_by_name_.values()), 12)) == {0.5}
    assert len(reg.scores_) == 4
    assert (reg.noise_std_ / reg.target_scale_ != 1.0).all()
    fixed = SoftEquivariantRegressor(**FAST, learn_prior=False, noise=0.3).fit(*data)
    np.testing.assert_allclose(fixed.noise_std_, 0.3)
    assert fixed.scores_.tolist() == [fixed.log_marginal_likelihood_value_]


def test_given_precisions_stay_on_a_large_grid(data):
    """Where those of U and V are far from what a random start would say."""
    _, y = data
    X = np.random.default_rng(0).normal(size=(len(y), 16, 16))
    reg = SoftEquivariantRegressor(**FAST, learn_prior=False, prior_precision=0.5).fit(X, y)
    assert set(np.round(list(reg.prior_precisions_by_name_.values()), 12)) == {0.5}


@pytest.mark.parametrize("noise", [0, -1.0, "small", None])
def test_a_noise_that_is_none(noise, data):
    with pytest.raises(ValueError, match="'noise' parameter"):
        SoftEquivariantRegressor(**FAST, noise=noise).fit(*data)


# ── deviations


def test_deviation_of_the_map_is_the_noise(data):
    reg = SoftEquivariantRegressor(**FAST).fit(*data)
    _, deviation = reg.predict(data[0], return_std=True)
    np.testing.assert_array_equal(deviation, np.tile(reg.noise_std_, (40, 1)))
    with pytest.raises(ValueError, match="needs the posterior"):
        reg.set_params(predictive="laplace").predict(data[0], return_std=True)
    assert reg.predict(data[0]).shape == (40, 2)  # it needs none


def test_deviation_with_a_posterior(data):
    X, y = data
    reg = SoftEquivariantRegressor(**FAST, predictive="laplace").fit(X, 5 * y)
    mean, deviation = reg.predict(X, return_std=True)
    assert (deviation > reg.noise_std_).all()
    found = reg._deviations(X, mean.shape)
    inputs, n = reg._new_images(X), 2
    variances = laplace_variances(reg.module_, reg.posterior_, inputs, n).numpy()
    expected = np.sqrt(reg.noise_std_**2 + reg.target_scale_**2 * variances)
    np.testing.assert_allclose(found, expected)
    cold = reg.set_params(predictive_temperature=1e-12).predict(X, return_std=True)[1]
    np.testing.assert_allclose(cold, np.tile(reg.noise_std_, (40, 1)))
    np.testing.assert_array_equal(reg.set_params(predictive="map").predict(X), mean)
    # Row by row, whatever stands beside it.
    reg.set_params(predictive="laplace", predictive_temperature=1.0)
    for i in (0, 7):
        alone = reg.predict(X[i : i + 1], return_std=True)
        np.testing.assert_array_equal(alone[0], mean[i : i + 1])
        np.testing.assert_array_equal(alone[1], deviation[i : i + 1])


def test_variance_of_a_linear_model_is_the_exact_one():
    layer = FC(2, 3, (1, 4), (1, 4)).double()
    network = chain(layer)
    inputs = torch.randn(12, 2, 1, 4, dtype=torch.float64)
    targets, weights = torch.randn(12, 3, dtype=torch.float64), torch.ones(12).double()
    design = inputs.flatten(1)
    precision, noise_variance = 0.7, 0.3
    solution = [
        linear_regression_map(design, t, torch.full((8,), precision).double(), noise_variance)
        for t in targets.T
    ]
    with torch.no_grad():
        layer.weight.copy_(torch.stack(solution)[None])
        layer.bias.zero_()
    likelihood = Gaussian(noise_variance)
    factors = kronecker_factors(network, likelihood, [(inputs, targets, weights)]).factors
    del factors["layer0.bias"]  # of a single tensor the curvature is all there is
    posterior = Posterior.from_curvature(factors, {"layer0.weight": precision}, torch.float64)
    new = torch.randn(5, 2, 1, 4, dtype=torch.float64)
    found = laplace_variances(network, posterior, new, 3)
    hessian = design.T @ design / noise_variance + precision * torch.eye(8).double()
    rows = new.flatten(1)
    expected = (rows @ torch.linalg.inv(hessian) * rows).sum(1)
    torch.testing.assert_close(found, expected[:, None].expand(-1, 3))


# ── weights and rows


def test_weights_are_repetitions_and_order_is_nothing(data):
    X, y = data
    weights = np.arange(40) % 3
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(40), weights))
    found = SoftEquivariantRegressor(**FAST).fit(X, y, weights)
    expected = SoftEquivariantRegressor(**FAST).fit(X[rows], y[rows])
    same_fit(found, expected, X, rtol=0)
    assert found.n_observations_ == weights.sum()


def test_equal_images_with_other_numbers_are_other_rows(data):
    X, y = np.concatenate([data[0], data[0]]), np.concatenate([data[1], data[1] + 0.1])
    reg = SoftEquivariantRegressor(**{**FAST, "max_epochs": 2}).fit(X, y)
    assert reg.n_observations_ == 80


def test_equal_images_are_held_out_together(data, monkeypatch):
    seen = []

    def look(build, groups, rate, kept, held, doublings):
        seen.extend((kept, held))
        raise KeyboardInterrupt

    monkeypatch.setattr("sklearn_softeq.assembly.best_symmetry", look)
    X, y = np.concatenate([data[0], data[0]]), np.concatenate([data[1], data[1] + 0.1])
    with pytest.raises(KeyboardInterrupt):
        SoftEquivariantRegressor(**FAST).fit(X, y)
    kept, held = ({row.numpy().tobytes() for row in part.inputs} for part in seen)
    assert len(held) >= 5
    assert not kept & held


# ── chunks and further fits


class Begin(Callback):
    """The noise that training begins with; on the class, as callbacks are copied."""

    noise = None

    def on_train_begin(self, net, **kwargs):
        Begin.noise = net.criterion_.noise_variance


def test_chunks(data):
    X, y = data
    reg = SoftEquivariantRegressor(**{**FAST, "max_epochs": 30})
    for _ in range(8):
        for rows in (slice(0, 20), slice(20, 40)):
            reg.partial_fit(X[rows], y[rows])
    first = np.asarray(y[:20])
    np.testing.assert_allclose(reg.target_mean_, first.mean(0))
    np.testing.assert_allclose(reg.target_scale_, first.std(0))
    assert reg.n_observations_ == 16 * 20
    assert reg.n_iter_ == 16
    assert (reg.noise_std_ != reg.target_scale_).all()
    before = reg.predict(X)
    with pytest.raises(ValueError, match="y has 1 numbers for each row, but the first call had 2"):
        reg.partial_fit(X, y[:, 0])
    np.testing.assert_array_equal(reg.predict(X), before)
    assert before.shape == (40, 2)


@pytest.mark.parametrize("noise", ["learned", 30.0])
@pytest.mark.parametrize("first", ["one row", "constant target", "constant image"])
def test_a_first_chunk_without_variance(first, noise):
    rng = np.random.default_rng(0)
    X = rng.normal(3.0, 1.0, size=(120, 4, 4))
    y = 1000 * X.mean((1, 2)) + 30 * rng.normal(size=120)
    settings = {"pathways": "fc", "width": 2, "random_state": 0, "noise": noise, "burn_in": 5}
    reg = SoftEquivariantRegressor(**settings)
    rows = slice(0, 1 if first == "one row" else 20)
    begun = X[rows], y[rows]
    if first == "constant target":
        begun = X[rows], np.full(20, 2500.0)
    if first == "constant image":
        begun = np.full((20, 4, 4), 3.0), y[rows]
    found = {"one row": "a target", "constant target": "a target"}
    with pytest.warns(UserWarning, match=f"{found.get(first, 'a channel')}.* did not vary"):
        reg.partial_fit(*begun)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            for start in (0, 60):
                reg.partial_fit(X[start : start + 60], y[start : start + 60])
    assert reg.score(X, y) > 0.3


def test_a_usual_first_chunk_is_silent(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftEquivariantRegressor(**PLAIN).partial_fit(*data)
        dark = SoftEquivariantRegressor(**PLAIN, standardize=False)
        dark.partial_fit(np.zeros((40, 4, 4)), data[1])


def test_predictions_keep_the_form_of_the_first_chunk(data):
    X, y = data
    reg = SoftEquivariantRegressor(**PLAIN).partial_fit(X, y[:, 0])
    reg.partial_fit(X, y[:, :1])
    assert reg.predict(X).shape == (40,)
    reg = SoftEquivariantRegressor(**PLAIN).partial_fit(X, y[:, :1])
    reg.partial_fit(X, y[:, 0])
    assert reg.predict(X).shape == (40, 1)


def test_a_further_fit_begins_with_the_noise_of_the_last(data):
    reg = SoftEquivariantRegressor(**FAST, warm_start=True).fit(*data)
    noise = reg.net_.criterion_.noise_variance
    reg.set_params(callbacks=[Begin()]).fit(*data)
    assert Begin.noise == noise
    reg.set_params(noise=0.2).fit(*data)
    np.testing.assert_allclose(reg.noise_std_, 0.2)


# ── what an estimator is asked for beside


def test_in_searches_and_cross_validation(data):
    X, y = data
    reg = SoftEquivariantRegressor(**{**PLAIN, "max_epochs": 4})
    assert np.isfinite(cross_val_score(reg, X, y, cv=2)).all()
    rows = np.arange(40)
    search = GridSearchCV(
        reg, {"width": [1, 2]}, scoring=marginal_likelihood_score, cv=[(rows, rows)]
    )
    best = search.fit(X, y).best_estimator_
    assert marginal_likelihood_score(best) == pytest.approx(search.best_score_)


def test_simplify_bounds_the_change_in_units_of_the_deviation(data):
    X, y = data
    reg = SoftEquivariantRegressor(**FAST, start="joint").fit(X, 100 * y)
    layer = reg.module_.layers["blocks.1"]
    with torch.no_grad():
        layer.pathways["factored_fc"].V.weight.mul_(1e-3)
        layer.pathways["factored_fc"].V.bias.mul_(1e-3)
    reg.symmetry_[1], reg.output_share_[1] = (1, 0), (1, 0)
    simple = reg.simplify(X, tol=0.5)
    assert ("blocks.1", "factored_fc") in simple.simplification_.removed
    change = np.abs((simple.predict(X) - reg.predict(X)) / reg.target_scale_).max()
    assert simple.simplification_.change == pytest.approx(change)
    with pytest.raises(
        ValueError, match="a prediction, in units of its target's deviation, changes"
    ):
        reg.simplify(X, tol=change / 2)


def test_equivariance_error(data):
    reg = SoftEquivariantRegressor(**{**FAST, "pathways": "conv"}).fit(*data)
    found = reg.equivariance_error(data[0])
    np.testing.assert_allclose(found.layers, 0.0, atol=1e-10)
    assert found.logits < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"pathways": ("conv", "sparse_fc"), "learn_lengthscale": True, "optimizer": "adam"},
        {"pathways": ("p4_conv", "conv"), "augment": "crop_flip"},
        {"architecture": "resnet", "hyper_solver": "adam"},
        {"curvature": "monte_carlo", "kfac": "reduce"},
    ],
    ids=str,
)
def test_with_what_there_is_for_classifiers(options, data):
    reg = SoftEquivariantRegressor(**{**FAST, **options}).fit(*data)
    assert np.isfinite(reg.scores_).all()
    assert np.isfinite(reg.predict(data[0])).all()
    assert (reg.noise_std_ > 0).all()
    if "learn_lengthscale" in options:
        assert set(reg.lengthscales_by_name_.values()) != {1.0}


def test_callbacks_that_predict_after_each_epoch(data):
    callback = pytest.importorskip("sklearn.callback")
    monitor = callback.ScoringMonitor(scoring="r2")
    reg = SoftEquivariantRegressor(**PLAIN).set_callbacks(monitor)
    reg.fit(*data)
    log = monitor.get_logs().data_as_pandas
    scores = log[log["task_name"] == "epoch"].sort_values("task_id")["r2"]
    assert len(scores) == reg.n_iter_
    assert scores.iloc[-1] > scores.iloc[0]
    last = log[log["task_name"] == "fit"]["r2"].item()
    assert last == pytest.approx(reg.score(*data))


def test_a_noise_that_is_not_finite_is_not_taken():
    net = net_of(criterion=partial(Gaussian, 1.0, True))
    with torch.no_grad():
        net.module_.head.output.bias.fill_(math.inf)
    net.fit_noise(numbers_of(9))
    assert net.criterion_.noise_variance == 1.0


def test_float32(data):
    X, y = data
    reg = SoftEquivariantRegressor(**FAST, predictive="laplace").fit(X.astype(np.float32), y)
    assert next(reg.module_.parameters()).dtype == torch.float32
    mean, deviation = reg.predict(X.astype(np.float32), return_std=True)
    assert np.isfinite([mean, deviation]).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "kfac"])
def test_each_optimizer_learns_and_none_runs_away(optimizer, data):
    # Hardly any noise: gradients in nats are a thousand times those of the start.
    X, y = data
    y = 100 * (X.reshape(40, -1) @ np.linspace(-1, 1, 16))
    settings = {**PLAIN, "max_epochs": 60, "width": 4, "start": "joint"}
    reg = SoftEquivariantRegressor(**settings, optimizer=optimizer).fit(X, y)
    assert np.isfinite(reg.loss_curve_).all()
    assert reg.score(X, y) > (0.3 if optimizer == "sgd" else 0.9)


def test_what_is_random_is_columns_and_rows(data):
    settings = {**FAST, "curvature": "rademacher", "curvature_subset": 20}
    reg = SoftEquivariantRegressor(**settings).fit(*data)
    assert set(reg.history_["curvature_rows"]) == {20}
    same_fit(reg, SoftEquivariantRegressor(**settings).fit(*data), data[0], rtol=0)


def test_lines_that_are_printed_are_in_units_of_the_targets(data, capsys):
    reg = SoftEquivariantRegressor(**FAST, verbose=1).fit(data[0], 1e6 * data[1])
    said = capsys.readouterr().out
    last = reg.scores_[-1] / 40
    assert f"log evidence {last:.4f} nats" in said
    assert f"joint {reg.symmetry_trials_['joint']:.3f}" in said
    for noises in (reg.history_["noise"][0], reg.noise_std_):
        assert ", noise {:.3g}, {:.3g}, ".format(*noises) in said
    assert f"end after epoch {reg.n_iter_}: " in said.splitlines()[-1]


# ── what begins


def trial_scores(monkeypatch, p1, joint):
    given = iter([p1, p1, joint, joint])  # each goes on for as long again
    monkeypatch.setattr(
        trials.Trial, "on_train_end", lambda self, net, **_: setattr(self, "score", next(given))
    )


@pytest.mark.parametrize(("lead", "start"), [(0.19, "p1"), (0.21, "joint")])
def test_all_pathways_have_to_lead_by_a_tenth_of_a_nat_for_each_output(
    lead, start, data, monkeypatch
):
    trial_scores(monkeypatch, 5.0, 5.0 + lead)  # better than the mean in any case
    monkeypatch.setattr("sklearn_softeq.course.LEARNT", -9.0)
    reg = SoftEquivariantRegressor(**{**FAST, "max_epochs": 4}).fit(*data)
    assert reg.start_ == start


def test_training_begins_with_the_error_on_rows_held_out(data, monkeypatch):
    noises = []

    def look(build, groups, rate, kept, held, doublings):
        found = trials.best_symmetry(build, groups, rate, kept, held, doublings)
        score = found[2][found[0].name if found[0] else "joint"]
        criterion = found[1].criterion_
        # The score is that of the error of each output.
        mean_square = math.exp(2 * (criterion.log_units - score) / 2 - 1) / 2 / math.pi
        noises.extend((mean_square, math.prod(criterion.deviations), criterion.noise_variance))
        return found

    monkeypatch.setattr("sklearn_softeq.assembly.best_symmetry", look)
    SoftEquivariantRegressor(**{**FAST, "max_epochs": 1}, callbacks=[Begin()]).fit(*data)
    assert noises[0] == pytest.approx(noises[1])
    assert Begin.noise == noises[2]
    assert len(set(noises[2])) == 2


# ── tasks


def test_diabetes():
    X, y = load_diabetes(return_X_y=True)
    settings = {"pathways": "factored_fc", "width": 4, "max_epochs": 40, "hyper_warmup": 10}
    reg = SoftEquivariantRegressor(**settings, random_state=0).fit(X[:300], y[:300])
    assert reg.image_shape_ == (1, 1, 10)
    assert reg.score(X[300:], y[300:]) > 0.4  # least squares: 0.51
    apart = (y[300:] - reg.predict(X[300:])) / reg.noise_std_
    assert 0.8 < np.mean(apart**2) < 1.25


@pytest.mark.slow
def test_where_a_blob_is_breaks_the_symmetry_and_how_bright_it_is_does_not():
    X, centre = blobs(300)
    settings = {"width": 4, "max_epochs": 100, "random_state": 0}
    where = SoftEquivariantRegressor(**settings).fit(X, centre)
    assert where.score(*blobs(200, seed=1)) > 0.95
    assert where.equivariance_error(X).logits > 0.1
    rng = np.random.default_rng(0)
    bright, more = rng.uniform(0.5, 2.0, 300), rng.uniform(0.5, 2.0, 200)
    how = SoftEquivariantRegressor(**settings).fit(X * bright[:, None, None], bright)
    assert how.start_ == "p1"
    assert how.score(blobs(200, seed=1)[0] * more[:, None, None], more) > 0.95
    assert how.equivariance_error(X).logits < 0.05


@pytest.mark.slow
def test_deviations_are_those_of_new_observations():
    rng = np.random.default_rng(0)
    (X, y), (new, truth) = blobs(300), blobs(500, seed=1)
    y, truth = y + 0.3 * rng.normal(size=y.shape), truth + 0.3 * rng.normal(size=truth.shape)
    settings = {"width": 4, "max_epochs": 120, "random_state": 0, "predictive": "laplace"}
    reg = SoftEquivariantRegressor(**settings).fit(X, y)
    np.testing.assert_allclose(reg.noise_std_, 0.3, rtol=0.15)
    mean, deviation = reg.predict(new, return_std=True)
    assert 0.85 < np.mean(((truth - mean) / deviation) ** 2) < 1.15
    assert np.mean(((truth - mean) / reg.noise_std_) ** 2) > np.mean(
        ((truth - mean) / deviation) ** 2
    )


def test_predictions_in_threads(data):
    reg = SoftEquivariantRegressor(**FAST, predictive="laplace").fit(*data)

    def deviations(_):
        return reg.predict(data[0], return_std=True)[1]

    alone = deviations(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(deviations, range(8)):
            np.testing.assert_array_equal(found, alone)
    assert all(parameter.requires_grad for parameter in reg.module_.parameters())


def test_a_file_has_plain_values_alone(data):
    reg = SoftEquivariantRegressor(**FAST, predictive="laplace").fit(*data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pickle.loads(pickle.dumps(reg))
    for ours, theirs in zip(
        again.predict(data[0], return_std=True), reg.predict(data[0], return_std=True), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert again.net_.criterion_ == reg.net_.criterion_
