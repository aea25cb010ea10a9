"""Short versions of the benchmarks, and the last table of each in docs/benchmarks.md.

Everything is run anew, with few rounds, epochs and cases: a look at where things stand, in at most
ten minutes on two cores, and not what the rest of that page reports. What has no short version is
left out: searches and selections are of many fits, full_scale.py and gpu.py ask for a GPU. Results
go to a folder of their own, and those beside the benchmarks stay as they are.

    python benchmarks/report.py [--output FOLDER] [--page PATH]
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from harness import environment, replaced

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
OUTPUT = HERE.parent / "build" / "bench"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
SHORT = {
    "digits": "--part a --max-epochs 10",
    "orientation": "--seeds 0 --max-epochs 20",
    "symmetry": "--sets digits --tasks digit quadrant --models all --priors learned --seeds 0 "
    '--parameters {"max_epochs":20}',
    "layers": "--rounds 3",
    "factors": "--rounds 1",
    "overhead": "--rounds 1 --epochs 5 --classes 10",
    "scaling": "--short",
    "calibration": "--part a --seeds 0 --max-epochs 10",
}


def run(name: str, output: Path) -> str:
    """The last table that a benchmark prints; what it says goes on to the screen."""
    command = [sys.executable, str(HERE / f"{name}.py"), *SHORT[name].split()]
    command += ["--output", str(output / f"{name}.json")]
    print(f"\n{name} {SHORT[name]}", flush=True)
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(text, flush=True)
    return last_table(text)


def last_table(text: str) -> str:
    """The last block of lines that begin with a bar."""
    blocks = [block for block in text.split("\n\n") if block.strip().startswith("|")]
    return blocks[-1].strip()


def section(tables: dict[str, str], minutes: float) -> str:
    """What stands between the markers."""
    env = environment()
    head = (
        f"{env['device']}, {env['cores']} cores, {env['threads']} thread(s), torch {env['torch']}, "
        f"scikit-learn {env['scikit-learn']}; {minutes:.0f} minutes in all."
    )
    parts = [f"`{name}.py {SHORT[name]}`\n\n{table}" for name, table in tables.items()]
    return "\n\n".join([head, *parts])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="where results go (build/bench)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write to (docs)")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    start = time.perf_counter()
    tables = {name: run(name, options.output) for name in SHORT}
    minutes = (time.perf_counter() - start) / 60
    # Read only now: others may have written to it in the meantime.
    page = options.page.read_text()
    options.page.write_text(replaced(page, section(tables, minutes), BEGIN, END))
    print(f"{options.page} rewritten, {minutes:.1f} minutes")
