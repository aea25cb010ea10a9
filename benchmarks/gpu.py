"""How fast are training and evidence on a GPU?

Fits of MNIST's and CIFAR-10's size (smooth random images, ten classes) with the default pathways
and the paper's width, all pathways at once from the start so that nothing is removed on the way, in
float32, with bf16 activations, and compiled. Per setting: clock seconds of an epoch at fixed prior
and with a learned one (an evidence every five epochs), from the difference of a long and a short
fit, so that start, compilation and the evidence at the end do not count; beside it the same steps
in a bare PyTorch loop in float32, and the largest memory that the device had allocated. A result
that is there is left out of a further run.

    python benchmarks/gpu.py [--rows N] [--epochs N] [--width N] [--device D] [--settings S ...]
        [--output PATH]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from harness import Results, print_table, smooth_images

from sklearn_softeq import SoftEquivariantClassifier
from sklearn_softeq.networks import build_network
from sklearn_softeq.validation import resolve_device

OUTPUT = Path(__file__).with_suffix(".json")
SIZES = {"MNIST": (1, 28, 28), "CIFAR-10": (3, 32, 32)}
SETTINGS = {
    "float32": {},
    "bf16": {"amp": "bf16"},
    "compiled": {"compile": True},
    "bf16, compiled": {"amp": "bf16", "compile": True},
}
BATCH = 128
SHORT = 5  # epochs: one evidence, after which the next ones cost the same


def clock(device, action):
    """Seconds that an action takes until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_of_an_epoch(device, fit, epochs):
    """From the difference of a fit of many epochs and one of few."""
    fit(SHORT)  # compiles, and chooses its kernels
    short = clock(device, lambda: fit(SHORT))
    return (clock(device, lambda: fit(SHORT + epochs)) - short) / epochs


def measure(shape, settings, options):
    """Seconds of an epoch at fixed and at learned prior, and the memory of the latter."""
    device = resolve_device(options.device)
    X, y = smooth_images(options.rows, shape, 10)
    X = X.astype(np.float32)
    fitted = {}

    def fit(learn_prior):
        def run(epochs):
            fitted[learn_prior] = SoftEquivariantClassifier(
                start="joint",
                optimizer="adam",  # as in the bare loop
                width=options.width,
                max_epochs=epochs,
                burn_in=1,
                evidence_every=5,
                tol=0.0,
                n_iter_no_change=epochs,
                keep_best=False,
                lr_schedule="constant",
                learn_prior=learn_prior,
                random_state=0,
                device=options.device,
                **settings,
            ).fit(X, y)

        return run

    found = {"fixed": seconds_of_an_epoch(device, fit(False), options.epochs)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found["learned"] = seconds_of_an_epoch(device, fit(True), options.epochs)
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    found["rows"] = int(fitted[True].history_["curvature_rows"][-1])
    found["bare"] = seconds_of_an_epoch(device, bare(X, y, shape, options, device), options.epochs)
    return found


def bare(X, y, shape, options, device):
    """The same steps in plain PyTorch, float32."""
    images, targets = torch.from_numpy(X).to(device), torch.from_numpy(y).to(device)

    def run(epochs):
        network = build_network(shape, 10, width=options.width).to(device)
        adam = torch.optim.Adam(
            network.parameters(), lr=0.01, weight_decay=1.0 / len(X), fused=True
        )
        for _ in range(epochs):
            order = torch.randperm(len(X)).to(device)
            for rows in order.tensor_split(-(-len(X) // BATCH)):
                adam.zero_grad(set_to_none=True)
                outputs = network(images[rows])
                torch.nn.functional.cross_entropy(outputs, targets[rows]).backward()
                adam.step()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    results, rows = Results(options.output), []
    device = resolve_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for size, shape in SIZES.items():
        for setting in options.settings:
            key = f"{name}, {size}, {setting}, width {options.width}, {options.rows} rows"
            found = results.get(
                key, lambda shape=shape, s=setting: measure(shape, SETTINGS[s], options)
            )
            rows.append(
                [
                    size,
                    setting,
                    f"{found['bare']:.3f}",
                    f"{found['fixed']:.3f}",
                    f"{found['learned']:.3f}",
                    f"{found['fixed'] / found['bare']:.2f}",
                    f"{found['learned'] / found['fixed']:.2f}",
                    str(found["rows"]),
                    f"{found['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in found else "",
                ]
            )
            print(f"  {key}: done", flush=True)
    print(f"\n{name}, {options.rows} rows, width {options.width}, seconds of an epoch:")
    head = ["images", "setting", "bare loop", "fixed", "learned", "fixed / bare"]
    print_table([*head, "learned / fixed", "rows of an evidence", "peak MiB"], rows)


if __name__ == "__main__":
    main()
