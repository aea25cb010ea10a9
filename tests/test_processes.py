"""Several processes: what each of them sees of the others, and fits under torchrun."""

import contextlib
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.processes import ALONE, Processes, alone, joined

# ── alone


def test_alone_nothing_is_sent():
    tensor = torch.ones(2)
    ALONE.add(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    value = object()
    assert ALONE.agreed(value) is value


def test_a_process_is_alone_unless_it_was_launched_with_others(monkeypatch):
    assert joined(torch.device("cpu")) == ALONE == Processes(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # left over, or of another launcher
    assert joined(torch.device("cpu")) == ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert joined(torch.device("cpu")) == ALONE


# ── in a group of the caller's


@contextlib.contextmanager
def group():
    """A group of this process only, as a caller makes one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_a_process_in_a_group_is_not_alone():
    assert alone()
    with group():
        assert not alone()
        assert joined(torch.device("cpu")) == Processes(0, 1)
    assert alone()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_group_that_the_caller_made_is_taken_and_left():
    X, y = np.random.default_rng(0).normal(size=(12, 1, 4, 4)), np.arange(12) % 3
    clf = SoftEquivariantClassifier(width=1, max_epochs=2, start="joint", random_state=0)
    expected = clf.fit(X, y).predict_proba(X)
    with group() as made:
        np.testing.assert_array_equal(clf.fit(X, y).predict_proba(X), expected)
        assert dist.group.WORLD is made


# ── under torchrun

FIT = """
    import os, pickle, sys, warnings

    import numpy as np
    import torch

    from sklearn_softeq import SoftEquivariantClassifier

    settings, n_rows, out = pickle.loads(bytes.fromhex(sys.argv[1]))
    rank = int(os.environ.get("RANK", 0))
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(n_rows, 1, 4, 4)), np.arange(n_rows) % 3
    weights = rng.integers(1, 4, n_rows)
    change = settings.pop("change", "")
    rows = slice(None, None, -1 if change == "order" and rank else 1)
    if change == "label" and rank:
        y[0] = 1
    if change == "nan" and rank:
        X[0] = np.nan
    if change == "lr":
        settings["lr"] = 0.01 * (1 + rank)
    clf = SoftEquivariantClassifier(
        width=2, max_epochs=12, burn_in=3, evidence_every=3, batch_size=16, **settings
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clf.fit(X[rows], y[rows], sample_weight=weights[rows])
    found = {
        "weights": {name: w.detach().numpy() for name, w in clf.module_.named_parameters()},
        "precisions": clf.prior_precisions_by_name_,
        "evidence": clf.log_marginal_likelihood_value_,
        "linear term": clf.evidence_linear_term_,
        "scores": clf.scores_,
        "losses": clf.loss_curve_,
        "probabilities": clf.predict_proba(X),
        "warnings": [str(w.message) for w in caught if "log evidence" in str(w.message)],
        "copy": pickle.loads(pickle.dumps(clf)).predict_proba(X),
    }
    with open(f"{out}.{rank}", "wb") as file:
        pickle.dump(found, file)
"""


def launch(tmp_path, n_processes, *, script=FIT, n_rows=41, timeout=120, **settings):
    """Run a script in so many processes; the completed launcher and what each process found."""
    path, out = tmp_path / "fit.py", tmp_path / f"found{n_processes}"
    path.write_text(textwrap.dedent(script), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    argument = pickle.dumps((settings, n_rows, str(out))).hex()
    done = subprocess.run(
        [sys.executable, *(launcher if n_processes > 1 else []), str(path), argument],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    found = []
    for rank in range(n_processes):
        part = tmp_path / f"{out.name}.{rank}"
        if part.exists():
            found.append(pickle.loads(part.read_bytes()))
    return done, found


def same(found, expected, **tolerance):
    for key in ("scores", "losses", "probabilities", "copy", "evidence", "linear term"):
        np.testing.assert_allclose(found[key], expected[key], err_msg=key, **tolerance)
    for key in ("weights", "precisions"):
        for name, value in expected[key].items():
            np.testing.assert_allclose(found[key][name], value, err_msg=name, **tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {
                "curvature": "rademacher",
                "curvature_subset": 17,
                "optimizer": "kfac",
                "verbose": 1,
            },
            marks=pytest.mark.slow,
            id="sketch",
        ),
        pytest.param(
            {"curvature": "exact", "curvature_subset": 17, "optimizer": "sgd"},
            marks=pytest.mark.slow,
            id="subset",
        ),
        pytest.param(
            {
                "curvature": "monte_carlo",
                "kfac": "reduce",
                "pathways": ("conv", "sparse_fc"),
                "learn_lengthscale": True,
                "augment": "crop_flip",
            },
            marks=pytest.mark.slow,
            id="lengthscales",
        ),
    ],
)
def test_two_processes_fit_what_one_does(tmp_path, settings):
    settings["random_state"] = 0
    _, [alone] = launch(tmp_path, 1, **settings)
    done, found = launch(tmp_path, 2, **settings)
    assert done.returncode == 0, done.stderr
    assert len(found) == 2
    same(found[1], found[0], rtol=0)  # to the last bit
    same(found[0], alone, rtol=1e-9, atol=1e-9)
    assert len(alone["scores"]) >= 3
    # The first process alone speaks.
    assert done.stdout.count("epoch 5/") == settings.get("verbose", 0)
    assert [len(f["warnings"]) for f in found] == [len(alone["warnings"]), 0] == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"random_state": None}, {"random_state": 0, "change": "order"}],
    ids=["nothing is said of chance", "rows in another order"],
)
def test_processes_agree(tmp_path, settings):
    done, found = launch(tmp_path, 2, **settings)
    assert done.returncode == 0, done.stderr
    same(found[1], found[0], rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"change": "label"}, "Each process has to be given the same data"),
        ({"change": "lr"}, "Each process has to be given the same data"),
        (
            {"change": "nan"},
            "Another process has refused its data: ValueError: Input X",
        ),
        ({"n_rows": 2}, "2 rows are too few for 3 processes"),
    ],
)
def test_processes_that_cannot_share_a_fit(tmp_path, settings, said):
    n_processes = 3 if "n_rows" in settings else 2
    done, found = launch(tmp_path, n_processes, random_state=0, **settings)
    assert done.returncode != 0
    assert not found
    assert said in done.stderr


REGRESSION = (
    FIT.replace("SoftEquivariantClassifier", "SoftEquivariantRegressor")
    .replace("np.arange(n_rows) % 3", "rng.normal(size=(n_rows, 2))")
    .replace("    weights = rng", "    y += X[:, 0, 0, :2]\n    weights = rng")
    .replace("predict_proba(X)", "predict(X, return_std=True)")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"curvature": "rademacher", "curvature_subset": 17}], ids=["exact", "subset"]
)
def test_two_processes_find_the_noise_that_one_does(tmp_path, settings):
    settings = {"random_state": 0, "predictive": "laplace", **settings}
    _, [alone] = launch(tmp_path, 1, script=REGRESSION, **settings)
    done, found = launch(tmp_path, 2, script=REGRESSION, **settings)
    assert done.returncode == 0, done.stderr
    same(found[1], found[0], rtol=0)
    same(found[0], alone, rtol=1e-8, atol=1e-8)


KILLED = FIT.replace(
    "    clf = SoftEquivariantClassifier(",
    """
    from skorch.callbacks import Callback

    class Die(Callback):
        def on_epoch_end(self, net, **kwargs):
            if rank == 1 and len(net.history) == 2:
                os.kill(os.getpid(), 9)

    settings["callbacks"] = [("die", Die())]
    clf = SoftEquivariantClassifier(""",
)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_an_error(tmp_path):
    done, found = launch(tmp_path, 2, script=KILLED, random_state=0)  # a timeout would be a hang
    assert done.returncode != 0
    assert not found


@pytest.mark.slow
def test_processes_that_were_killed_go_on_from_the_disk(tmp_path):
    settings = {"random_state": 0, "curvature": "rademacher", "curvature_subset": 17}
    for name in ("whole", "killed", "again"):
        (tmp_path / name).mkdir()
    _, expected = launch(tmp_path / "whole", 2, **settings)
    settings["checkpoint_dir"] = str(tmp_path / "run")
    done, found = launch(tmp_path / "killed", 2, script=KILLED, **settings)
    assert done.returncode != 0
    assert not found
    done, found = launch(tmp_path / "again", 2, verbose=1, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on after epoch") == 1  # the first process alone speaks
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs, rtol=0)
    done, _ = launch(tmp_path / "again", 2, **{**settings, "lr": 0.5})
    assert done.returncode != 0
    assert done.stderr.count("lr was None and is 0.5") >= 2  # an error in each
