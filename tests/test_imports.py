"""What it takes to import the package: little more than the libraries that it stands on."""

import json
import os
import statistics
import subprocess
import sys

import pytest

#: The libraries and those of their parts without which no fit could begin.
LIBRARIES = "import torch, sklearn.pipeline, skorch.callbacks"
PACKAGE = "import sklearn_softeq"

#: Libraries that are for some users only, or for some calls.
LAZY = {"matplotlib", "pandas", "rich", "skops", "onnx", "onnxruntime", "onnxscript", "distributed"}

N_TIMES = 7

pytestmark = pytest.mark.slow


def report(*codes):
    """For each, in a fresh process: the time of the processor so far, and the modules loaded."""
    look = "print(json.dumps([time.process_time(), sorted(sys.modules)]))"
    lines = ["import json, sys, time", *(line for code in codes for line in (code, look))]
    # An installed package is compiled, and so is one that was imported before.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_the_package_is_imported_nearly_as_fast_as_its_libraries():
    report(PACKAGE)  # which compiles it
    ratios = []
    for _ in range(N_TIMES):
        # In one process, as the load of the machine changes from one to the next.
        (libraries, _), (package, _) = report(LIBRARIES, PACKAGE)
        ratios.append(package / libraries)
    assert statistics.median(ratios) <= 1.1


def test_what_few_need_is_not_imported():
    loaded, below = (
        {name.partition(".")[0] for name in report(code)[0][1]} for code in (PACKAGE, LIBRARIES)
    )
    assert {"sklearn_softeq", "torch", "sklearn", "skorch"} <= loaded
    assert not LAZY & (loaded - below)  # some are what the libraries import themselves
