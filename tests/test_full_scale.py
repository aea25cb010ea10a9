"""The benchmark of the paper's network: what it says of layers, and how it goes on."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sklearn_softeq import networks
from sklearn_softeq.training import SoftEquivariantNet

pytest.importorskip("fcntl", reason="the benchmarks lock their files by it")

FEW = ["--rows", "40", "--width", "1", "--epochs", "3", "--priors", "learned", "--sets", "cifar10"]


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark as a module, by a clock that goes on by one whenever it is looked at."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    module = importlib.import_module("full_scale")
    seconds, processor = itertools.count(), itertools.count()
    clock = SimpleNamespace(
        perf_counter=lambda: next(seconds), process_time=lambda: next(processor)
    )
    monkeypatch.setattr(module, "time", clock)
    return module


@pytest.fixture
def files(tmp_path):
    """Arguments for noise in place of CIFAR-10, 40 images to train with and 12 to test with."""
    rng, paths = np.random.default_rng(0), []
    for n in (40, 12):
        paths.append(tmp_path / f"{n}.npz")
        images = rng.integers(256, size=(n, 3, 8, 8), dtype=np.uint8)
        np.savez(paths[-1], X=images, y=np.arange(n) % 4)
    return ["--cifar10", *map(str, paths)]


def results(path):
    return json.loads(path.read_text()) if path.exists() else {}


def fit_of(pathways, gamma, sizes):
    return {"pathways": pathways, "effective_dimensions": gamma, "n_weights": sizes}


# ── what it says of layers


def test_a_layer_is_carried_by_the_pathway_that_uses_most_of_its_weights(benchmark):
    gamma, sizes = [[100.0, 8.0], [300.0, 0.5]], [[100_000, 10], [1000, 100]]
    found = benchmark.pattern(fit_of(["fc", "conv"], gamma, sizes))
    assert found == "CONV 0.800 (FC 0.0012); FC 0.300 (CONV 0.016)"


def test_what_a_layer_does_not_have_or_use_is_zero(benchmark):
    gamma, sizes = [[0.0, 8.0], [0.0, 0.0]], [[0, 10], [1000, 100]]
    found = benchmark.pattern(fit_of(["factored_fc", "conv"], gamma, sizes))
    assert found == "CONV 0.800 (F-FC 0); F-FC 0.000 (CONV 0)"


def test_a_single_pathway_has_no_other(benchmark):
    assert benchmark.pattern(fit_of(["sparse_fc"], [[1.0], [5.0]], [[10], [10]])) == (
        "S-FC 0.100; S-FC 0.500"
    )


# ── going on


@pytest.mark.parametrize(
    "model",
    ["CONV", pytest.param("F-FC+CONV", marks=pytest.mark.slow)],  # without and with trials
)
def test_a_fit_that_was_broken_off_ends_as_if_it_had_not_been(benchmark, files, tmp_path, model):
    arguments = [*FEW, *files, "--models", model, "--output"]
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    benchmark.main([*arguments, str(whole)])
    # The clock is looked at first, before the fit and after each epoch: time for two of three.
    limited = [*arguments, str(broken), "--seconds", "2.5"]
    benchmark.main(limited)
    assert results(broken) == {}
    assert (tmp_path / "broken.fits.part").is_dir()
    benchmark.main(limited)
    (fit,) = results(broken).values()
    assert fit["epochs"] == 3
    assert fit["seconds"] == 4  # one for each epoch and one for the end
    assert results(broken) == results(whole)
    assert not list(tmp_path.glob("*.fits.part"))


def test_after_the_seconds_no_fit_begins(benchmark, files, tmp_path, capsys):
    output = tmp_path / "found.json"
    benchmark.main([*FEW, *files, "--seconds", "0.5", "--output", str(output)])
    assert results(output) == {}
    assert "CONV" not in capsys.readouterr().out


def test_an_interrupt_leaves_no_result(benchmark, files, tmp_path, monkeypatch):
    step = SoftEquivariantNet.train_step

    def interrupted(net, *args, **kwargs):
        if len(net.history) == 3:
            raise KeyboardInterrupt
        return step(net, *args, **kwargs)

    monkeypatch.setattr(SoftEquivariantNet, "train_step", interrupted)
    output = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*FEW, *files, "--models", "CONV", "--output", str(output)])
    assert results(output) == {}


def test_each_model_has_all_sets_before_the_next_one_begins(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *of: {"failure": "none"})
    output = tmp_path / "found.json"
    benchmark.main(["--models", "CONV", "FC", "--priors", "MAP", "--output", str(output)])
    begun = [tuple(key.split(", ")[:2]) for key in results(output)]
    assert begun == list(
        itertools.chain.from_iterable(
            [("digit", model), ("quadrant", model), ("cifar10", model)] for model in ("CONV", "FC")
        )
    )


# ── too little memory


def out_of_memory(net, *args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("owner", "name", "function", "said"),
    [
        (SoftEquivariantNet, "train_step", out_of_memory, "Tried to allocate 2.00 GiB"),
        (networks, "_memory", lambda: 10**7, "this machine has 10000000"),
    ],
)
def test_a_fit_without_memory_is_a_result(
    benchmark, files, tmp_path, capsys, monkeypatch, owner, name, function, said
):
    output = tmp_path / "found.json"
    arguments = [*FEW, *files, "--output", str(output), "--models"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        benchmark.main([*arguments, "FC"])
    (failed,) = results(output).values()
    assert said in failed["failure"]
    assert failed["environment"]["torch"] == torch.__version__
    benchmark.main([*arguments, "FC", "CONV"])  # without another attempt
    assert [("failure" in fit) for fit in results(output).values()] == [True, False]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cifar10")]
    assert f"failed: {failed['failure'][:60]}" in rows[-2]
    assert "CONV 0." in rows[-1]
    assert not list(tmp_path.glob("*.fits.part"))


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("labels")])
def test_other_errors_end_the_run(benchmark, tmp_path, monkeypatch, error):
    def fails(*of):
        raise error

    monkeypatch.setattr(benchmark, "measure", fails)
    with pytest.raises(type(error), match=str(error)):
        benchmark.main(["--output", str(tmp_path / "found.json")])
