"""The examples compile, run with a budget of a few epochs, and show what they say."""

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


def started(path, folder, *arguments, max_epochs=6, **options):
    """An example that begins to run; without a cap of the epochs, at the budget of readers."""
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    environment.pop("SOFTEQ_MAX_EPOCHS", None)
    if max_epochs is not None:
        environment["SOFTEQ_MAX_EPOCHS"] = str(max_epochs)
    command = [sys.executable, "-W", "error::DeprecationWarning:sklearn_softeq", path, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)


def run(path, folder, *arguments):
    """What an example prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = started(path, folder, *arguments, **pipes)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


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


@pytest.mark.slow
def test_a_symmetry_is_told_from_none_within_a_minute(tmp_path):
    path = EXAMPLES / "plot_did_my_data_have_this_symmetry.py"
    with open(tmp_path / "printed", "w") as file:
        process = started(path, tmp_path, max_epochs=None, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)  # of this process, whatever others end
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    printed = (tmp_path / "printed").read_text()
    answers = re.findall(r"^label: (.+): a quarter turn is (.+)$", printed, re.MULTILINE)
    assert answers == [("digit", "a symmetry"), ("digit and orientation", "no symmetry")]
    assert re.findall(r"^    start: (.+)$", printed, re.MULTILINE) == ["p4", "joint"]
    symmetric, broken = (
        float(change) for change in re.findall(r"change of the logits .+ (\S+)$", printed, re.M)
    )
    assert symmetric < 0.25
    assert broken > 1.1
    used, free = (
        float(share) for share in re.findall(r"effective dimensions .+ (\S+)%$", printed, re.M)
    )
    assert used < 10
    assert free > 60
    seconds = usage.ru_utime + usage.ru_stime  # of the processor: what else runs does not count
    assert seconds < 1.5 * 60  # 52 of one thread, beside other work
