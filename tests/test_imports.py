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


def report(code):
    """The time of the processor that a fresh process takes for it, and the modules loaded then."""
    code += "\nimport json, sys, time\n"
    code += "print(json.dumps([time.process_time(), sorted(sys.modules)]))"
    # An installed package is compiled, and so is one that was imported before.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(found.stdout)


def test_the_package_is_imported_nearly_as_fast_as_its_libraries():
    report(PACKAGE)  # which compiles it
    times = {LIBRARIES: [], PACKAGE: []}
    for _ in range(N_TIMES):  # in turns, as the load of the machine changes
        for code, found in times.items():
            found.append(report(code)[0])
    libraries, package = (statistics.median(found) for found in times.values())
    assert package <= 1.1 * libraries, f"{package:.2f} s against {libraries:.2f} s"


def test_what_few_need_is_not_imported():
    loaded, below = (
        {name.partition(".")[0] for name in report(code)[1]} for code in (PACKAGE, LIBRARIES)
    )
    assert {"sklearn_softeq", "torch", "sklearn", "skorch"} <= loaded
    assert not LAZY & (loaded - below)  # some are what the libraries import themselves
