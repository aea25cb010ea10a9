"""The examples compile, and run with a budget of a few epochs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PLOTS = sorted(EXAMPLES.glob("plot_*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_compiles(path):
    compile(path.read_text(encoding="utf-8"), path, "exec")


def run(path, folder, *arguments):
    environment = {**os.environ, "MPLBACKEND": "Agg", "SOFTEQ_MAX_EPOCHS": "6"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:sklearn_softeq", path, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_demo(tmp_path):
    printed = run(EXAMPLES / "demo.py", tmp_path, "--max-epochs", "6", "--n-train", "200")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]
    assert "Figure: demo.png" in printed
    assert printed.count("200 training images") == 2
    assert len(re.findall(r"^  blocks\.\d  conv ", printed, re.MULTILINE)) == 12
    assert len(re.findall(r"^On '(?:digit|quadrant)' the free pathways", printed, re.M)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("path", PLOTS, ids=lambda path: path.stem)
def test_plots_run_and_write_nothing(path, tmp_path):
    assert run(path, tmp_path)
    assert not list(tmp_path.iterdir())
