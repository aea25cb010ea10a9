"""How do time and memory of a training step and of an evidence grow?

A step of training (128 rows: forward, cross entropy, backward, fused Adam) and a pass of the
evidence (Kronecker factors of all rows, their eigenvalues, the evidence and five hyper steps),
by one sketch and with exact columns, against one quantity at a time. Each is measured in a process
of its own: the median processor time of a few runs, and by how much the first one raised the
resident memory over that of the process with its network and data (Linux only). A result that is
there is left out of a further run.

Part a: rows; b: classes; c: width of the network; d: side of the images; e: the paper's network of
sparse pathways for 3×32×32 images (width 10), whose evidence should need at most one and a half
times the memory of a training step. Part f: processes that fit one classifier on the CPU, each with
a thread of its own: seconds on the clock of an epoch and of an evidence by one sketch of all rows.

    python benchmarks/scaling.py [--part a|b|c|d|e|f] [--short] [--threads N] [--output PATH]
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from harness import Results, curvature_of, mark_row, print_marks, print_table, training_data
from skorch.callbacks import Callback
from torch import nn

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.budget import CurvaturePlan
from sklearn_softeq.curvature import Estimator
from sklearn_softeq.hyperparameters import squared_norms
from sklearn_softeq.kronecker import spectra
from sklearn_softeq.marginal_likelihood import FixedPointSolver, LaplaceEvidence
from sklearn_softeq.networks import SoftEquivariantNetwork, build_network

OUTPUT = Path(__file__).with_suffix(".json")
BATCH = 128
HYPER_STEPS = 5
N_RUNS = 3
WORK = ("training step", "evidence, one sketch", "evidence, exact")


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Parameters
    ----------
    shape : tuple (C, H, W)
    n_classes : int
    width : int
    n_rows : int
        Of an evidence.
    pathways : tuple of str
    """

    shape: tuple[int, int, int] = (1, 16, 16)
    n_classes: int = 10
    width: int = 8
    n_rows: int = 1024
    pathways: tuple[str, ...] = ("conv", "factored_fc")

    def network(self) -> SoftEquivariantNetwork:
        """At a random start."""
        return build_network(
            tuple(self.shape),
            self.n_classes,
            pathways=tuple(self.pathways),
            width=self.width,
            generator=torch.Generator().manual_seed(0),
        )

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of noise; times do not depend on what is in them."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.n_rows, *self.shape, generator=generator)
        return images, torch.arange(self.n_rows) % self.n_classes


DEFAULT = Setting()
PAPER = Setting((3, 32, 32), width=10, n_rows=512, pathways=("sparse_conv", "sparse_fc"))
#: A quantity, and a setting for each of its values.
PARTS: dict[str, tuple[str, dict[str, Setting]]] = {
    "a": ("rows", {str(n): replace(DEFAULT, n_rows=n) for n in (512, 1024, 2048, 4096)}),
    "b": ("classes", {str(k): replace(DEFAULT, n_classes=k) for k in (2, 10, 30, 100)}),
    "c": ("width", {str(w): replace(DEFAULT, width=w) for w in (2, 4, 8, 16)}),
    "d": ("image side", {str(s): replace(DEFAULT, shape=(1, s, s)) for s in (4, 8, 16, 32)}),
    "e": ("the paper's network,", {"S-FC+S-CONV": PAPER}),
}
PROCESSES = (1, 2)
N_EPOCHS, EVERY = 10, 2
#: Of the short run; part a has the default setting.
SHORT = {"a": ("1024",), "b": ("2",), "c": ("4",), "d": ("8",)}


def training_step(setting: Setting) -> Callable[[], None]:
    """A step on the first rows."""
    network, (inputs, targets) = setting.network(), setting.data()
    inputs, targets = inputs[:BATCH], targets[:BATCH]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    return step


def evidence(setting: Setting, columns: str) -> Callable[[], None]:
    """A pass over all rows, and what follows."""
    network, data = setting.network(), training_data(*setting.data())
    plan = CurvaturePlan(Estimator(columns), len(data))
    prior = {name: i for i, (name, _) in enumerate(network.named_parameters())}

    def run():
        traces = torch.ones(len(data))
        curvature = curvature_of(network, data, plan, traces)
        norms = squared_norms(dict(network.named_parameters()))
        found = spectra(curvature.factors)
        objective = LaplaceEvidence(curvature.log_likelihood, found, norms, prior)
        log_precision = torch.zeros(len(prior), dtype=torch.float64)
        for _ in range(HYPER_STEPS):
            log_precision = FixedPointSolver().step(objective, log_precision)
        objective.evidence(log_precision)

    return run


MAKE: dict[str, Callable[[Setting], Callable[[], None]]] = {
    "training step": training_step,
    "evidence, one sketch": lambda setting: evidence(setting, "rademacher"),
    "evidence, exact": lambda setting: evidence(setting, "exact"),
}


def measure_here(work: str, setting: Setting) -> dict:
    """Time and memory of one kind of work, in this process."""
    # What libraries keep for themselves from their first use on is no part of it.
    MAKE[work](replace(setting, width=1, n_rows=2))()
    action = MAKE[work](setting)
    memory = memory_of(action)
    seconds = []
    for _ in range(N_RUNS):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    weights = sum(p.numel() for p in setting.network().parameters())
    return {"seconds": float(np.median(seconds)), "megabytes": memory, "weights": weights}


def memory_of(action: Callable[[], None]) -> float:
    """By how many MB (10⁶ bytes) the resident memory rises at most; NaN where it is not known."""
    gc.collect()
    _own_pages_above(2**16)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    except OSError:
        action()
        return math.nan
    before = _status("VmRSS")
    action()
    peak = _status("VmHWM")
    _own_pages_above(2**25)
    return (peak - before) / 1e6


def _own_pages_above(size: int) -> None:
    """Let blocks of so many bytes come from the system and go back to it when they are freed."""
    # Else the C library keeps what is freed, as it happens, and the peak says little.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


def _status(name: str) -> int:
    """A figure of the process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(setting: Setting, threads: int) -> dict:
    """All kinds of work, each in a fresh process."""
    found = {}
    for work in WORK:
        order = json.dumps({"work": work, "setting": asdict(setting), "threads": threads})
        child = subprocess.run(
            [sys.executable, __file__, "--child", order], check=True, capture_output=True, text=True
        )
        found[work] = json.loads(child.stdout)
    return found


def fit_times() -> dict[str, float]:
    """Seconds of an epoch and of an evidence in a fit that this process has a share in."""
    n_rows = DEFAULT.n_rows * 4
    images, codes = replace(DEFAULT, n_rows=n_rows).data()
    clf = SoftEquivariantClassifier(
        width=DEFAULT.width,
        start="joint",
        optimizer="adam",
        curvature="rademacher",
        burn_in=EVERY,
        evidence_every=EVERY,
        max_epochs=N_EPOCHS,
        n_iter_no_change=N_EPOCHS,
        lr_schedule="constant",
        keep_best=False,
        random_state=0,
        callbacks=[("clock", Clock())],
    ).fit(images.numpy(), codes.numpy())
    epochs = np.diff(dict(clf.net_.callbacks_)["clock"].times)
    plain, with_evidence = epochs[EVERY::EVERY], epochs[EVERY + 1 :: EVERY]
    epoch = float(np.median(plain))
    return {"epoch": epoch, "evidence": float(np.median(with_evidence)) - epoch}


class Clock(Callback):
    """The time at the begin of training and at the end of each epoch."""

    def on_train_begin(self, net, **kwargs):
        self.times = [time.perf_counter()]

    def on_epoch_end(self, net, **kwargs):
        self.times.append(time.perf_counter())


def measure_processes(n_processes: int) -> dict[str, float]:
    """A fit of so many processes."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    child = subprocess.run(
        [sys.executable, "-m", *launch, __file__, "--child", json.dumps({"work": "fit"})],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(child.stdout)


def run_child(order: dict) -> None:
    """Measure what another process has asked for, and say what was found."""
    if order["work"] == "fit":
        found = fit_times()
        if os.environ.get("RANK", "0") != "0":
            return
    else:
        torch.set_num_threads(order["threads"])
        found = measure_here(order["work"], Setting(**order["setting"]))
    print(json.dumps(found))


def row_of(part: str, quantity: str, value: str, result: dict) -> tuple[str, ...]:
    """A row of the table."""
    step, *others = (result[work] for work in WORK)
    cells = [f"{1e3 * step['seconds']:.1f}", f"{step['megabytes']:.0f}"]
    for other in others:
        cells += [f"{other['seconds']:.2f}", f"{other['megabytes']:.0f}"]
    return part, f"{quantity} {value}", str(step["weights"]), *cells


def mark_rows(part: str, quantity: str, value: str, result: dict) -> list[tuple[str, ...]]:
    """Rows for the mark of the paper's network."""
    if part != "e":
        return []
    step, *others = (result[work]["megabytes"] for work in WORK)
    return [
        mark_row(part, f"memory of {work} / {WORK[0]}, {quantity} {value}", other / step, "≤", 1.5)
        for work, other in zip(WORK[1:], others, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=[*PARTS, "f"], help="one part only (all)")
    parser.add_argument("--short", action="store_true", help="fewer values of each quantity")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", default=OUTPUT, help="where results go (beside this file)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(json.loads(options.child))
        sys.exit()
    kept = Results(options.output)
    rows, marks = [], []
    wanted = [options.part] if options.part else [*PARTS, "f"]
    for part in (part for part in wanted if part in PARTS):
        quantity, settings = PARTS[part]
        for value in SHORT.get(part, settings) if options.short else settings:
            key = f"{part}, {quantity}={value}, threads={options.threads}"
            setting = settings[value]
            result = kept.get(key, lambda setting=setting: measure(setting, options.threads))
            rows.append(row_of(part, quantity, value, result))
            marks += mark_rows(part, quantity, value, result)
            print(f"  {quantity} {value}: done", flush=True)
    if "f" in wanted:
        times = []
        for n in PROCESSES:
            result = kept.get(f"f, processes={n}", lambda n=n: measure_processes(n))
            times.append((str(n), f"{result['epoch']:.3f}", f"{result['evidence']:.3f}"))
        print_table(("processes", "epoch, s", "evidence, s"), times)
    head = ("part", "setting", "weights", "step, ms", "MB")
    if rows:
        print_table((*head, "one sketch, s", "MB", "exact, s", "MB"), rows)
    if marks:
        print_marks(marks)
